"""libtritlstm on a CPU: the host path's own arithmetic, in every instruction set, and what it is built from."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import capi_harness as capi
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tritlstm import reference
from tritlstm.capi import build

CPU, NULL, ffi = capi.CPU, capi.NULL, capi.ffi
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
LEVELS = {"vectors of 16 bytes": 0, "AVX2": 1, "AVX-512": 2}
NAMES = {0: "16-byte vectors", 1: "AVX2", 2: "AVX-512"}


def explain(c: capi.Library, lstm: Any, steps: int = 3, batch: int = 2) -> str:
    text = ffi.new("char[]", 2000)
    c.explain(lstm, steps, batch, 1, text, 2000, NULL)
    return ffi.string(text).decode()


@pytest.fixture(scope="module", params=LEVELS.values(), ids=list(LEVELS))
def c(request, tmp_path_factory) -> capi.Library:
    """The library held to one instruction set; what this processor lacks is skipped."""
    cc = f"{os.environ.get('CC') or 'cc'} -DTRITLSTM_HOST_LEVEL={request.param}"
    built = build.build(tmp_path_factory.mktemp("level"), cc, "aot")
    library = capi.Library(ffi.dlopen(str(built.library)))
    if f"({NAMES[request.param]})" not in explain(library, library.create()):
        pytest.skip(f"this processor does not run {NAMES[request.param]}")
    return library


# -- whole networks -----------------------------------------------------------------------------------------

SHAPES = [  # T, B, D, H, then layers, bidirectional, bias, proj_size, batch_first, dtype, lengths
    (1, 1, 1, 1, (1, False, True, 0, False, "float32", False)),
    (2, 3, 4, 2, (1, True, True, 1, False, "float64", True)),
    (70, 7, 19, 37, (2, True, True, 0, False, "float32", True)),
    (70, 7, 19, 37, (2, True, False, 5, True, "float64", True)),
    (3, 195, 33, 17, (1, True, True, 0, True, "float64", False)),  # more rows than a block of a product has
    (4, 9, 300, 270, (1, False, True, 0, False, "float32", True)),  # deeper than a block is
    (3, 2, 11, 290, (2, False, True, 130, False, "float64", False)),
    (200, 1, 5, 16, (2, False, True, 0, False, "float32", False)),
    (25, 4, 12, 33, (2, True, True, 0, False, "float16", True)),
    (25, 4, 12, 33, (2, True, True, 9, False, "bfloat16", True)),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s[:4])) + "-" + capi.case_id(s[4]))
def test_outputs_and_every_gradient_match_torch(c, shape):
    steps, batch, D, H, case = shape
    problem = capi.Problem(case, steps, batch, (D, H))
    base, own = problem.torch(torch.float64), problem.torch(problem.dtype)
    capi.assert_within_budget(problem.c(c), base, own, problem.dtype, terms=1000)


def test_the_numpy_reference_agrees_over_a_grid(c):
    generator = np.random.default_rng(3)
    for T in (1, 2, 33):
        for B in (1, 5):
            for D, H in ((1, 1), (3, 15), (16, 16), (7, 17), (40, 65)):
                check_against_reference(c, generator, T, B, D, H)


def check_against_reference(c: capi.Library, generator: Any, T: int, B: int, D: int, H: int) -> None:
    def draw(*shape: int) -> Tensor:
        return torch.from_numpy(generator.standard_normal(shape))

    x, h0, c0 = draw(T, B, D), draw(1, B, H), draw(1, B, H)
    weights = [draw(4 * H, D) / D**0.5, draw(4 * H, H) / H**0.5, draw(4 * H), draw(4 * H)]
    seeds = draw(T, B, H), draw(1, B, H), draw(1, B, H)
    lstm = c.create(capi.pointers(weights), input_size=D, hidden_size=H, dtype=capi.DTYPES["float64"])
    out, h_n, c_n = (torch.full_like(seed, math.nan) for seed in seeds)
    _, reserve = c.scratch(lstm, T, B, True)
    args = capi.make_forward(c, x, out, h0=h0, c0=c0, h_n=h_n, c_n=c_n)
    args.reserve, args.reserve_bytes = reserve.pointer, reserve.size
    c.forward(lstm, args)
    results = [torch.full_like(value, math.nan) for value in (x, h0, c0, *weights)]
    back = c.struct("backward_args", steps=T, batch=B, reserve=reserve.pointer, reserve_bytes=reserve.size)
    back.x, back.h0, back.c0, back.out = (capi.pointer(value) for value in (x, h0, c0, out))
    back.grad_out, back.grad_h_n, back.grad_c_n = (capi.pointer(seed) for seed in seeds)
    back.grad_x, back.grad_h0, back.grad_c0 = (capi.pointer(value) for value in results[:3])
    array = capi.pointers(results[3:])
    back.grad_weights = array
    c.backward(lstm, back)

    trace = reference.forward(x.numpy(), *(w.numpy() for w in weights), h0[0].numpy(), c0[0].numpy())
    grads = reference.backward(trace, seeds[0].numpy(), seeds[1][0].numpy(), seeds[2][0].numpy())
    expected = [trace.h, trace.h_n[None], trace.c_n[None], grads.x, grads.h0[None], grads.c0[None]]
    expected += [grads.w_ih, grads.w_hh, grads.b, grads.b]
    for found, exact in zip((out, h_n, c_n, *results), expected, strict=True):
        # float64, sums of some hundred terms of order ten
        np.testing.assert_allclose(found.numpy(), exact, rtol=1e-11, atol=1e-11)


def test_the_same_inputs_give_the_same_bits(c):
    case = (2, True, True, 3, False, "float32", True)
    first, second = (capi.Problem(case, 40, 6, (9, 21)).c(c) for _ in range(2))
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])


def test_a_sequence_does_not_depend_on_its_neighbours_or_on_what_follows_its_end(c):
    """One sequence alone, and in a batch beside NaNs and with NaNs behind its end."""
    T, D, H = 9, 5, 20
    x, out, alone = torch.randn(T, 3, D), torch.empty(T, 3, 2 * H), torch.empty(4, 1, 2 * H)
    x[:, 0] = math.nan
    x[4:, 1] = math.nan
    lstm = c.create(input_size=D, hidden_size=H, bidirectional=1)
    lengths = torch.tensor([T, 4, 0], dtype=torch.int32)
    args = capi.make_forward(c, x, out)
    args.lengths = ffi.cast("int32_t *", capi.pointer(lengths))
    _, reserve = c.scratch(lstm, T, 3, True)
    args.reserve, args.reserve_bytes = reserve.pointer, reserve.size
    c.forward(lstm, args)
    its_x = x[:4, 1:2].contiguous()
    c.forward(lstm, capi.make_forward(c, its_x, alone))
    torch.testing.assert_close(out[:4, 1:2], alone, rtol=1e-6, atol=1e-7)
    assert not out[4:, 1].any()
    assert not out[:, 2].any()
    assert out[:, 0].isnan().all()

    x[:, 0] = 1
    c.forward(lstm, args)
    grad_out, weight = torch.ones_like(out), torch.full((4 * H, D), math.nan)
    back = c.struct("backward_args", steps=T, batch=3, x=args.x, lengths=args.lengths, out=args.out)
    back.grad_out, back.reserve, back.reserve_bytes = capi.pointer(grad_out), reserve.pointer, reserve.size
    array = capi.pointers([weight, *[None] * 7])
    back.grad_weights = array
    c.backward(lstm, back)
    assert weight.isfinite().all()


# -- the cell's functions -----------------------------------------------------------------------------------


def cell_state(c: capi.Library, x: Tensor, biases: list[float], c0: float, take_x: int) -> Tensor:
    """c_n [N] of one step of one unit on N sequences: gate `take_x` (of i, f, g, o) sees x, the others their bias."""
    w_ih, bias = torch.zeros(4, 1, dtype=x.dtype), torch.tensor(biases, dtype=x.dtype)
    w_ih[take_x] = 1
    weights = [w_ih, torch.zeros(4, 1, dtype=x.dtype), bias, torch.zeros_like(bias)]
    name = str(x.dtype).removeprefix("torch.")
    lstm = c.create(capi.pointers(weights), input_size=1, hidden_size=1, dtype=capi.DTYPES[name])
    out, c_n = torch.empty(1, len(x), 1, dtype=x.dtype), torch.empty(1, len(x), 1, dtype=x.dtype)
    start = torch.full_like(c_n, c0)
    c.forward(lstm, capi.make_forward(c, x.view(1, -1, 1), out, c0=start, c_n=c_n))
    return c_n.flatten()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("function", ["sigmoid", "tanh"])
def test_activations_are_right_to_a_few_roundings(c, dtype, function):
    generator = torch.Generator().manual_seed(1)
    few = torch.tensor([0.0, -0.0, 1e-30, 1e-8, 0.17, 0.35, 0.3466, 0.8, 9.2, 19.5, 30, 87, 88, 89, 800, 1e30])
    spread = torch.randn(20000, generator=generator, dtype=torch.float64) * 4
    tiny = torch.randn(5000, generator=generator, dtype=torch.float64) * 1e-3
    x = torch.cat([few.double(), -few.double(), spread, tiny]).to(dtype)
    if function == "sigmoid":  # c = f(x) * 1 + sigmoid(-1000) * g
        found = cell_state(c, x, [-1000, 0, 0, 0], 1.0, take_x=1)
        with np.errstate(over="ignore"):
            exact = 1 / (1 + np.exp(-x.numpy().astype(np.longdouble)))
    else:  # c = sigmoid(1000) * tanh(x) + f * 0
        found = cell_state(c, x, [1000, 0, 0, 0], 0.0, take_x=2)
        exact = np.tanh(x.numpy().astype(np.longdouble))
    info = torch.finfo(dtype)
    # below the smallest normal number only the absolute error counts
    error = np.abs(found.numpy().astype(np.longdouble) - exact) / np.maximum(np.abs(exact), info.tiny / info.eps)
    assert float(error.max()) <= 3 * info.eps
    assert float(found.abs().max()) <= 1
    nan = cell_state(c, torch.tensor([math.nan], dtype=dtype), [0, 0, 0, 0], 1.0, take_x=1)
    assert nan.isnan().all()


# -- numbers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> capi.Library:
    return capi.Library(ffi.dlopen(str(capi.shared_build("aot").library)))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_sixteen_bit_number_goes_in_and_out_as_it_is(library, name):
    """All 65536 patterns; of a NaN only that it stays one."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(getattr(torch, name))
    H, D = 16, 1024
    weights = [numbers.view(4 * H, D), *(torch.zeros(4 * H, n).to(numbers.dtype) for n in (H,))]
    lstm = library.create(capi.pointers(weights), input_size=D, hidden_size=H, bias=0, dtype=capi.DTYPES[name])
    found = [torch.zeros_like(weights[0]), None]
    library.get_weights(lstm, capi.pointers(found), CPU, NULL)
    same = found[0].view(torch.int16) == weights[0].view(torch.int16)
    both_nan = found[0].isnan() & weights[0].isnan()
    assert (same | both_nan).all()


@pytest.mark.parametrize("stored", ["float32", "float64"])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_rounding_is_torchs(library, tmp_path, name, stored):
    """Random numbers over the whole range, halfway cases and their neighbours, infinities."""
    dtype, generator = getattr(torch, name), torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (2**16,), generator=generator).to(torch.int32).view(torch.float32)
    small = torch.randn(2**15, generator=generator) * 2.0 ** torch.randint(-30, 18, (2**15,), generator=generator)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    near = patterns.view(dtype if dtype.itemsize == 2 else torch.float16).float()
    halves = (near + torch.cat([near[1:], near[:1]])) / 2
    halves = torch.cat([halves, halves.nextafter(near), halves.nextafter(-near)])
    numbers = torch.cat([bits, small, near, halves, torch.tensor([65504.0, 65519.9, 65520.0, math.inf, -math.inf])])
    numbers = torch.where(numbers.isnan(), 1.0, numbers).to(getattr(torch, stored))
    H, D = 64, -(-len(numbers) // 256)
    matrix = torch.zeros(4 * H * D, dtype=numbers.dtype)
    matrix[: len(numbers)] = numbers
    tensors = {"weight_ih_l0": matrix.view(4 * H, D), "weight_hh_l0": torch.zeros(4 * H, H, dtype=numbers.dtype)}
    save_file(tensors, tmp_path / "m")
    lstm = library.load(tmp_path / "m", dtype=capi.DTYPES[name])
    found = torch.zeros(4 * H, D, dtype=dtype)
    library.get_weights(lstm, capi.pointers([found, None]), CPU, NULL)
    assert torch.equal(found, tensors["weight_ih_l0"].to(dtype))


@pytest.mark.parametrize("name", capi.DTYPES)
def test_seeds_give_pytorchs_initial_weights_in_every_dtype(library, name):
    dtype = getattr(torch, name)
    for seed, H in ((0, 6), (11, 50), (2**40 + 5, 7), (3, 200)):
        expected = [torch.empty_like(w, dtype=dtype) for w in torch.nn.LSTM(4, H, 2, proj_size=2).parameters()]
        generator = torch.Generator().manual_seed(seed)
        for weight in expected:
            weight.uniform_(-1 / math.sqrt(H), 1 / math.sqrt(H), generator=generator)
        options = {"hidden_size": H, "num_layers": 2, "proj_size": 2, "dtype": capi.DTYPES[name], "seed": seed}
        lstm = library.create(**options)
        found = [torch.empty_like(weight) for weight in expected]
        library.get_weights(lstm, capi.pointers(found), CPU, NULL)
        for ours, theirs in zip(found, expected, strict=True):
            assert torch.equal(ours, theirs)


# -- workspace and reserve ----------------------------------------------------------------------------------


def test_a_workspace_that_is_too_small_is_refused_by_its_size(library):
    lstm = library.create()
    x, out = torch.zeros(5, 3, 4), torch.zeros(5, 3, 6)
    workspace, reserve = library.scratch(lstm, 5, 3, True)
    inference, none = library.scratch(lstm, 5, 3, False)
    step, _ = library.scratch(lstm, 1, 3, False)
    assert none.size == 0
    args = capi.make_forward(library, x, out, workspace=inference.pointer, workspace_bytes=inference.size - 1)
    words = f"workspace_bytes is {inference.size - 1}, but {inference.size} are needed: ask tritlstm_sizes"
    with capi.refuses(capi.BUFFER, words):
        library.forward(lstm, args)
    args.reserve, args.reserve_bytes = reserve.pointer, reserve.size
    args.workspace, args.workspace_bytes = workspace.pointer, workspace.size
    library.forward(lstm, args)
    back = library.struct("backward_args", steps=5, batch=3, x=args.x, out=args.out)
    back.reserve, back.reserve_bytes = reserve.pointer, reserve.size - 1
    with capi.refuses(capi.BUFFER, f"reserve_bytes is {reserve.size - 1}, but {reserve.size} are needed"):
        library.backward(lstm, back)
    back.reserve_bytes, back.workspace, back.workspace_bytes = reserve.size, workspace.pointer, workspace.size - 1
    with capi.refuses(capi.BUFFER, f"workspace_bytes is {workspace.size - 1}, but {workspace.size} are needed"):
        library.backward(lstm, back)
    state = ffi.new("tritlstm_state **")
    library.state_create(lstm, 3, state)
    with capi.refuses(capi.BUFFER, f"workspace_bytes is {step.size - 1}, but {step.size} are needed"):
        library.step(state[0], capi.pointer(x), capi.pointer(out), step.pointer, step.size - 1, NULL)
    with capi.refuses(capi.BUFFER, f"workspace_bytes is 0, but {step.size} are needed"):
        library.step(state[0], capi.pointer(x), capi.pointer(out), NULL, 0, NULL)
    library.lib.tritlstm_state_destroy(state[0])


def test_sizes_that_pass_the_address_space_are_refused(library):
    lstm = library.create(hidden_size=1, input_size=1)
    sizes = ffi.new("size_t[2]")
    with capi.refuses(capi.OVERFLOW, "too large"):
        library.sizes(lstm, 2**54, 1, 1, sizes, sizes + 1)
    with capi.refuses(capi.OVERFLOW, "too large"):
        library.sizes(lstm, 1, 2**54, 0, sizes, sizes + 1)
    state = ffi.new("tritlstm_state **")
    with capi.refuses(capi.MEMORY, "can't allocate memory for a state of 9007199254740992 sequences"):
        library.state_create(lstm, 2**53, state)


# -- the build ----------------------------------------------------------------------------------------------

NAIVE = """
#include <stddef.h>
static long calls;
long naive_calls(void);
long naive_calls(void) { return calls; }
#define GEMM(name, real)                                                                                             \\
    void name(int order, int ta, int tb, int m, int n, int k, real alpha, const real *a, int lda, const real *b,     \\
              int ldb, real beta, real *c, int ldc);                                                                 \\
    void name(int order, int ta, int tb, int m, int n, int k, real alpha, const real *a, int lda, const real *b,     \\
              int ldb, real beta, real *c, int ldc)                                                                  \\
    {                                                                                                                \\
        calls += order == 101;                                                                                       \\
        for (int i = 0; i < m; i++)                                                                                  \\
            for (int j = 0; j < n; j++) {                                                                            \\
                double sum = 0;                                                                                      \\
                for (int l = 0; l < k; l++)                                                                          \\
                    sum += (double)(ta == 112 ? a[(size_t)l * lda + i] : a[(size_t)i * lda + l]) *                   \\
                           (tb == 112 ? b[(size_t)j * ldb + l] : b[(size_t)l * ldb + j]);                            \\
                real *to = c + (size_t)i * ldc + j;                                                                  \\
                *to = (real)(alpha * sum + (beta == 0 ? 0 : beta * *to));                                            \\
            }                                                                                                        \\
    }
GEMM(cblas_sgemm, float)
GEMM(cblas_dgemm, double)
"""


def test_a_cblas_of_the_build_makes_the_large_products(tmp_path):
    (tmp_path / "naive.c").write_text(NAIVE)
    library = tmp_path / "libnaive.so"
    command = [*build.compiler(), "-O2", "-shared", "-fPIC", tmp_path / "naive.c", "-o", library]
    subprocess.run(list(map(str, command)), check=True)
    options = f"-L{tmp_path} -lnaive -Wl,-rpath,{tmp_path}"
    built = build.build(tmp_path / "prefix", engine="aot", cblas=options)
    c = capi.Library(ffi.dlopen(str(built.library)))
    calls = ctypes_function(library, "naive_calls")
    assert "products: large ones by the CBLAS of the build" in explain(c, c.create())
    for case in ((2, True, True, 3, True, "float32", True), (2, True, False, 0, False, "float64", True)):
        problem = capi.Problem(case, 11, 6, (9, 21))
        before = calls()
        base, own = problem.torch(torch.float64), problem.torch(problem.dtype)
        capi.assert_within_budget(problem.c(c), base, own, problem.dtype, terms=1000)
        assert calls() - before > 50


def ctypes_function(library: Path, name: str) -> Any:
    import ctypes

    function = getattr(ctypes.CDLL(str(library)), name)
    function.restype = ctypes.c_long
    return function


def test_a_build_is_the_same_byte_for_byte(tmp_path):
    one, two = capi.shared_build("aot"), build.build(tmp_path / "another place", engine="aot")
    assert one.library.read_bytes() == two.library.read_bytes()
    assert one.library.stat().st_size < 400_000


def test_clang_builds_it_too(tmp_path):
    clang = next((name for name in ("clang", "clang-14", "clang-16", "clang-19") if shutil.which(name)), None)
    if clang is None:
        pytest.skip("clang is not installed (Debian: apt install clang)")
    c = capi.Library(ffi.dlopen(str(build.build(tmp_path, clang, "aot").library)))
    for name in ("float32", "float64", "bfloat16"):
        problem = capi.Problem((2, True, True, 3, True, name, True), 11, 6, (9, 21))
        base, own = problem.torch(torch.float64), problem.torch(problem.dtype)
        capi.assert_within_budget(problem.c(c), base, own, problem.dtype, terms=1000)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="registers of x86-64")
def test_the_inner_product_keeps_its_sums_in_registers(library, tmp_path):
    """In the loop over k of the largest tile every multiplication adds to a register, and nothing is stored."""
    target = tmp_path / "kernels.o"
    source = build.SOURCE / "src/host_kernels.c"
    flags = ["-std=c11", "-O2", "-ffp-contract=fast", "-fPIC"]
    done = subprocess.run([*build.compiler(), *flags, "-c", source, "-o", target], check=False)
    assert done.returncode == 0
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", target], capture_output=True, text=True, check=True
    ).stdout
    for name, sums in (("panel_float_avx512", 16), ("panel_double_avx512", 16), ("panel_float_avx2", 12)):
        (body,) = re.findall(rf"^[0-9a-f]+ <{name}>:\n(.*?)^$", listing, re.S | re.M)
        lines = [line.split("\t")[1].strip() for line in body.splitlines() if "\t" in line]
        runs: list[list[str]] = [[]]
        for line in lines:  # between two jumps
            runs[-1].append(line)
            if line.startswith("j"):
                runs.append([])
        largest = max(runs, key=lambda run: sum("vfmadd" in line for line in run))
        assert sum("vfmadd" in line for line in largest) == sums
        accumulators = {line.split(",")[-1] for line in largest if "vfmadd" in line}
        assert len(accumulators) == sums
        assert not [line for line in largest if line.startswith("vmov") and line.endswith(")")]
