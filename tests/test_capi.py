"""The C library's functions, called through cffi's ABI mode on the header: values, and every refusal."""

from __future__ import annotations

import itertools
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capi_harness import (
    ARGUMENT,
    BIG,
    BUFFER,
    CASES,
    CPU,
    CUDA,
    DEVICE,
    DTYPES,
    FILE,
    FORKED,
    FORMAT,
    INTERNAL,
    MEMORY,
    NULL,
    OK,
    OVERFLOW,
    STATE,
    UNAVAILABLE,
    UNSUPPORTED,
    WEIGHTS,
    B,
    D,
    Failed,
    H,
    Library,
    Problem,
    T,
    assert_same,
    assert_within_budget,
    case_id,
    ffi,
    make_forward,
    pointer,
    pointers,
    refuses,
    shared_build,
)
from safetensors.torch import save_file
from torch import Tensor, nn

import tritlstm
from tritlstm import emulator, reference
from tritlstm.capi import build, host, network

# torch says so once for each process; the C library is silent.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.fixture(scope="module", params=list(build.NAMES))
def lib(request) -> Any:
    return ffi.dlopen(str(shared_build(request.param).library))


PYTHON = pytest.mark.parametrize("lib", ["python"], indirect=True)


@pytest.fixture(scope="module")
def c(lib) -> Library:
    return Library(lib)


# -- values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_outputs_and_every_gradient_match_torch(c, case):
    problem = Problem(case)
    base, own = problem.torch(torch.float64), problem.torch(problem.dtype)
    assert_within_budget(problem.c(c), base, own, problem.dtype)


@pytest.mark.parametrize("steps", [1, 9])
def test_outputs_and_gradients_match_the_numpy_reference(c, steps):
    problem = Problem((1, False, True, 0, False, "float64", False), steps)
    weights = [weight.detach().numpy() for weight in problem.module.parameters()]
    trace = reference.forward(problem.x.numpy(), *weights, problem.h0[0].numpy(), problem.c0[0].numpy())
    grads = reference.backward(
        trace, *(grad.numpy().squeeze(0) if k else grad.numpy() for k, grad in enumerate(problem.grads))
    )
    values = [trace.h, trace.h_n[None], trace.c_n[None], grads.x, grads.h0[None], grads.c0[None]]
    values += [grads.w_ih, grads.w_hh, grads.b, grads.b]
    base = dict(zip(problem.names, values, strict=True))
    assert_within_budget(problem.c(c), base, base, torch.float64)


def test_absent_states_are_zeros_and_unwanted_results_are_left_alone(c):
    problem = Problem((2, False, True, 0, False, "float32", False))
    lstm = c.create(pointers(list(problem.module.parameters())), **problem.options())
    out = torch.empty(T, B, H)
    c.forward(lstm, make_forward(c, problem.x, out))
    half = torch.empty(T, B, H)
    c.forward(lstm, make_forward(c, problem.x, half, c0=problem.c0))
    with torch.no_grad():  # recorded by autograd, torch takes another path
        assert_same(c, out, problem.module(problem.x)[0])
        assert_same(c, half, problem.module(problem.x, (torch.zeros_like(problem.h0), problem.c0))[0])


def test_final_states_may_replace_the_initial_ones(c):
    problem = Problem((1, True, True, 2, False, "float32", False))
    lstm = c.create(pointers(list(problem.module.parameters())), **problem.options())
    h, c_ = problem.h0.clone(), problem.c0.clone()
    out = torch.empty_like(problem.grads[0])
    c.forward(lstm, make_forward(c, problem.x, out, h0=h, c0=c_, h_n=h, c_n=c_))
    with torch.no_grad():
        expected, (h_n, c_n) = problem.module(problem.x, (problem.h0, problem.c0))
    for ours, theirs in ((out, expected), (h, h_n), (c_, c_n)):
        assert_same(c, ours, theirs)


def test_gradients_not_wanted_are_not_written_and_absent_ones_count_as_zero(c):
    problem = Problem((2, False, True, 0, False, "float64", False))
    lstm = c.create(pointers(list(problem.module.parameters())), **problem.options())
    out, (_, reserve) = torch.empty(T, B, H, dtype=torch.float64), c.scratch(lstm, T, B, True)
    c.forward(lstm, make_forward(c, problem.x, out, reserve=reserve.pointer, reserve_bytes=reserve.size))
    weight = torch.full((4 * H, H), math.nan, dtype=torch.float64)
    array = pointers([None, weight, None, None, None, None, None, None])
    args = c.struct("backward_args", steps=T, batch=B, x=pointer(problem.x), out=pointer(out))
    args.reserve, args.reserve_bytes, args.grad_weights = reserve.pointer, reserve.size, array
    args.grad_c_n = pointer(problem.grads[2])
    for _ in range(2):  # the reserve is only read
        c.backward(lstm, args)
    _, (_, c_n) = problem.module(problem.x)
    (expected,) = torch.autograd.grad(c_n, problem.module.weight_hh_l0, problem.grads[2])
    torch.testing.assert_close(weight, expected, rtol=1e-13, atol=1e-13)

    gradient = torch.full_like(problem.x, math.nan)
    args.grad_c_n, args.grad_weights, args.grad_x = NULL, NULL, pointer(gradient)
    c.backward(lstm, args)  # no gradient comes in
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_steps_carry_the_state_and_give_the_sequences_outputs(c):
    problem = Problem((2, False, True, 3, True, "float32", False))
    lstm = c.create(pointers(list(problem.module.parameters())), **problem.options())
    state = ffi.new("tritlstm_state **")
    c.state_create(lstm, B, state)
    handle = ffi.gc(state[0], c.lib.tritlstm_state_destroy)
    expected, (h_n, c_n) = problem.module(problem.x)
    out = torch.empty(B, 3)
    workspace, _ = c.scratch(lstm, 1, B, False)
    scratch = (workspace.pointer, workspace.size) if workspace.size else (NULL, 0)
    del lstm  # a state keeps its network
    for t in range(T):
        c.step(handle, pointer(problem.x[t]), pointer(out), *scratch, NULL)
        torch.testing.assert_close(out, expected[t], rtol=1e-6, atol=1e-7)
    h, c_ = torch.empty(2, B, 3), torch.empty(2, B, H)
    c.state_get(handle, pointer(h), pointer(c_), CPU, NULL)
    torch.testing.assert_close(h, h_n, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(c_, c_n, rtol=1e-6, atol=1e-7)

    rows = ffi.new("uint8_t[]", [0, 1, 0])
    c.state_reset(handle, rows, NULL)
    kept_h, kept_c = torch.empty_like(h), torch.empty_like(c_)
    c.state_get(handle, pointer(kept_h), pointer(kept_c), CPU, NULL)
    for before, after in ((h, kept_h), (c_, kept_c)):
        assert torch.equal(after[:, 1], torch.zeros_like(after[:, 1]))
        assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    c.step(handle, pointer(problem.x[0]), pointer(out), *scratch, NULL)
    torch.testing.assert_close(out[1], expected[0, 1], rtol=1e-6, atol=1e-7)

    c.state_set(handle, pointer(problem.h0), NULL, CPU, NULL)
    c.state_reset(handle, NULL, NULL)
    c.state_set(handle, NULL, pointer(problem.c0), CPU, NULL)
    c.step(handle, pointer(problem.x[0]), pointer(out), *scratch, NULL)
    begun, _ = problem.module(problem.x[:1], (torch.zeros_like(problem.h0), problem.c0))
    torch.testing.assert_close(out, begun[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layers", "bias", "proj"), [(1, True, 0), (2, False, 0), (3, True, 0), (1, True, 4)])
def test_steps_of_every_dtype_from_changing_arrays(c, dtype, layers, bias, proj):
    """Against float64; a host may pass the same arrays each time, with other numbers in them, or new ones."""
    problem = Problem((layers, False, bias, proj, False, dtype, False), 7)
    base, own = problem.torch(torch.float64), problem.torch(problem.dtype)
    lstm = c.create(pointers(list(problem.module.parameters())), **problem.options())
    state = ffi.new("tritlstm_state **")
    c.state_create(lstm, B, state)
    handle = ffi.gc(state[0], c.lib.tritlstm_state_destroy)
    c.state_set(handle, pointer(problem.h0), pointer(problem.c0), CPU, NULL)
    workspace, _ = c.scratch(lstm, 1, B, False)
    scratch = (workspace.pointer, workspace.size) if workspace.size else (NULL, 0)
    x, out = torch.empty_like(problem.x[0]), torch.empty_like(problem.grads[0][0])
    outs = []
    for t in range(7):
        if t < 4:
            x.copy_(problem.x[t])
        else:
            x, out = problem.x[t].clone(), torch.full_like(out, math.nan)
        c.step(handle, pointer(x), pointer(out), *scratch, NULL)
        outs.append(out.clone())
    h, c_ = torch.empty_like(problem.h0), torch.empty_like(problem.c0)
    c.state_get(handle, pointer(h), pointer(c_), CPU, NULL)
    found = {"out": torch.stack(outs), "h_n": h, "c_n": c_}
    found = {name: value.double().numpy() for name, value in found.items()}
    assert_within_budget(found, {name: base[name] for name in found}, own, problem.dtype)


@PYTHON
def test_views_of_arrays_do_not_pile_up_and_keep_to_their_sizes(c):
    """One array as the input of several sizes, and more arrays than are kept."""
    problem = Problem((1, False, True, 0, False, "float32", False), 8)
    lstm = c.create(pointers(list(problem.module.parameters())), **problem.options())
    whole = torch.empty_like(problem.grads[0])
    c.forward(lstm, make_forward(c, problem.x, whole))
    for steps in (1, 8, 3):
        out = torch.empty(steps, B, H)
        c.forward(lstm, make_forward(c, problem.x[:steps], out))
        torch.testing.assert_close(out, whole[:steps], rtol=1e-6, atol=1e-7)
    many = [(problem.x.clone(), torch.empty_like(whole)) for _ in range(network.VIEWS)]
    for x, out in many:
        c.forward(lstm, make_forward(c, x, out))
        assert torch.equal(out, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_seeds_give_pytorchs_own_initial_weights(c, dtype):
    torch.manual_seed(11)
    expected = list(nn.LSTM(D, H, 2, bidirectional=True, proj_size=2, dtype=dtype).parameters())
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    name = str(dtype).removeprefix("torch.")
    lstm = c.create(num_layers=2, bidirectional=1, proj_size=2, seed=11, dtype=DTYPES[name])
    assert torch.equal(torch.random.get_rng_state(), before), "the host's own random numbers must not move"
    found = [torch.empty_like(weight) for weight in expected]
    c.get_weights(lstm, pointers(found), CPU, NULL)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_weights_go_in_and_out_in_pytorchs_order(c):
    module = nn.LSTM(D, H, 2, bidirectional=True, proj_size=2)
    lstm = c.create(num_layers=2, bidirectional=1, proj_size=2, initial_weights=2)
    count = ffi.new("int64_t *")
    c.num_weights(lstm, count)
    named = dict(module.named_parameters())
    assert count[0] == len(named) == 20
    for k, (name, weight) in enumerate(named.items()):
        info = ffi.new("tritlstm_weight *", {"size": ffi.sizeof("tritlstm_weight")})
        c.weight_info(lstm, k, info)
        assert ffi.string(info.name).decode() == name
        assert (info.rows, info.columns or None) == (
            weight.shape[0],
            weight.shape[1] if weight.dim() == 2 else None,
        )
        assert info.bytes == weight.numel() * 4
    found = [torch.full_like(weight, math.nan) for weight in named.values()]
    c.get_weights(lstm, pointers(found), CPU, NULL)
    assert all(torch.equal(weight, torch.zeros_like(weight)) for weight in found)
    given: list[Tensor | None] = list(named.values())
    given[3] = None
    c.set_weights(lstm, pointers(given), CPU, NULL)
    wanted: list[Tensor | None] = list(found)
    wanted[5] = None
    found[5].fill_(7)
    c.get_weights(lstm, pointers(wanted), CPU, NULL)
    for k, (ours, theirs) in enumerate(zip(found, named.values(), strict=True)):
        if k == 5:
            assert torch.equal(ours, torch.full_like(ours, 7))
        else:
            assert torch.equal(ours, torch.zeros_like(ours) if k == 3 else theirs)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("asked", [None, "float32", "float64"])
def test_files_give_pytorchs_module(c, tmp_path, stored, asked):
    module = nn.LSTM(D, H, 2, bidirectional=True, proj_size=3).to(getattr(torch, stored))
    tensors = {f"encoder.lstm.{name}": value for name, value in module.state_dict().items()}
    save_file({**tensors, "head.weight": torch.ones(3, dtype=torch.int64)}, tmp_path / "m", {"format": "pt"})
    prefix = ffi.new("char[]", b"encoder.lstm.")
    lstm = c.load(tmp_path / "m", prefix=prefix, dtype=DTYPES[asked] if asked else 0, batch_first=1)
    options = c.struct("options")
    c.get_options(lstm, options)
    dtype = getattr(torch, asked or stored)
    assert (options.input_size, options.hidden_size, options.num_layers, options.proj_size) == (D, H, 2, 3)
    assert (options.bias, options.bidirectional, options.batch_first) == (1, 1, 1)
    assert options.dtype == DTYPES[asked or stored]
    found = [torch.empty(weight.shape, dtype=dtype) for weight in module.parameters()]
    c.get_weights(lstm, pointers(found), CPU, NULL)
    for ours, theirs in zip(found, module.parameters(), strict=True):
        assert torch.equal(ours, theirs.to(dtype))


def test_explain_names_engine_device_and_path(c):
    lstm = c.create()
    needed = ffi.new("size_t *")
    c.explain(lstm, T, B, 1, NULL, 0, needed)
    text = ffi.new("char[]", needed[0])
    c.explain(lstm, T, B, 1, text, needed[0], NULL)
    words = ffi.string(text).decode()
    assert len(words) == needed[0] - 1
    parts = [f"engine: {c.engine}, tritlstm {tritlstm.__version__}", "dtype: float32"]
    if c.engine == "python":
        parts += [f"torch {torch.__version__}"]
        parts += [str(tritlstm.explain(tritlstm.LSTM(D, H), torch.zeros(T, B, D))), "tritlstm_step: torch.lstm_cell"]
    else:
        workspace, reserve = c.scratch(lstm, T, B, True)
        parts += ["path: host path, C on the calling thread", "because options.device is TRITLSTM_CPU"]
        parts += ["products: own loops", f"workspace {workspace.size} bytes, reserve {reserve.size} bytes"]
    for part in parts:
        assert part in words
    with pytest.raises(Failed, match=f"capacity is 20 bytes, but the text needs {needed[0]}") as caught:
        c.explain(lstm, T, B, 1, text, 20, NULL)
    assert caught.value.status == BUFFER
    assert ffi.string(text).decode() == words[:19]


def test_versions_and_names(c, lib):
    assert lib.tritlstm_version() == 100
    assert ffi.string(lib.tritlstm_version_string()).decode() == tritlstm.__version__
    assert c.engine in build.NAMES
    assert ffi.string(lib.tritlstm_status_string(FORKED)) == b"TRITLSTM_ERROR_FORKED"
    for unknown in (-1, 14, 2**31 - 1, -(2**31)):
        assert ffi.string(lib.tritlstm_status_string(unknown)) == b"unknown status"


def test_status_numbers_never_change(lib):
    names = [
        "OK",
        "ARGUMENT",
        "UNSUPPORTED",
        "OVERFLOW",
        "MEMORY",
        "FILE",
        "FORMAT",
        "WEIGHTS",
        "BUFFER",
        "STATE",
    ]
    names += ["UNAVAILABLE", "DEVICE", "FORKED", "INTERNAL"]
    for number, name in enumerate(names):
        full = f"TRITLSTM_{'ERROR_' * bool(number)}{name}"
        assert getattr(lib, full) == number
        assert ffi.string(lib.tritlstm_status_string(number)).decode() == full


# -- refusals -----------------------------------------------------------------------------------------------


OPTIONS = [
    ({"input_size": 0}, ARGUMENT, "input_size is 0, but must be at least 1"),
    ({"input_size": -3}, ARGUMENT, "input_size is -3"),
    ({"hidden_size": 0}, ARGUMENT, "hidden_size is 0"),
    ({"hidden_size": -(2**63)}, ARGUMENT, "hidden_size is -9223372036854775808"),
    ({"num_layers": 0}, ARGUMENT, "num_layers is 0"),
    ({"num_layers": 1025}, ARGUMENT, "num_layers is 1025, but may be at most 1024"),
    ({"num_layers": 2**63 - 1}, ARGUMENT, "num_layers is 9223372036854775807"),
    ({"proj_size": -1}, ARGUMENT, "proj_size is -1"),
    ({"proj_size": H}, ARGUMENT, "proj_size is 6, but must be smaller than hidden_size 6"),
    ({"bias": 2}, ARGUMENT, "bias is 2, but must be 0 or 1"),
    ({"bidirectional": -1}, ARGUMENT, "bidirectional is -1"),
    ({"batch_first": 7}, ARGUMENT, "batch_first is 7"),
    ({"dtype": 0}, ARGUMENT, "dtype is 0: TRITLSTM_FLOAT32 (1)"),
    ({"dtype": 5}, ARGUMENT, "dtype is 5"),
    ({"device": 0}, ARGUMENT, "device is 0: TRITLSTM_CPU (1) or TRITLSTM_CUDA (2)"),
    ({"device": 3}, ARGUMENT, "device is 3"),
    ({"device_index": 1}, ARGUMENT, "device_index is 1: must be 0 with TRITLSTM_CPU"),
    ({"device_index": -1}, ARGUMENT, "device_index is -1"),
    ({"initial_weights": 0}, ARGUMENT, "initial_weights is 0"),
    ({"reserved": 1}, ARGUMENT, "reserved is 1"),
    ({"hidden_size": 2**61}, OVERFLOW, "hidden_size 2305843009213693952 is too large"),
    ({"hidden_size": 2**32}, OVERFLOW, "weight_hh_l0: 17179869184 x 4294967296 x 1 elements are too large"),
    ({"input_size": BIG}, OVERFLOW, "weight_ih_l0: 24 x 4611686018427387904 x 1"),
    (
        {"hidden_size": 2**25, "num_layers": 1024},
        OVERFLOW,
        "the weights of 1024 layers are too large together",
    ),
    ({"hidden_size": 2**23}, MEMORY, "can't allocate memory"),
    ({"size": 0}, ARGUMENT, "options.size is 0, which no version had: call tritlstm_options_init first"),
    ({"size": 8}, ARGUMENT, "options.size is 8"),
    ({"size": 2**40}, ARGUMENT, "options.size is 1099511627776"),
]


@pytest.mark.parametrize(("members", "status", "words"), OPTIONS, ids=lambda value: str(value)[:30])
def test_bad_options_are_refused(c, members, status, words):
    with refuses(status, words):
        c.create(**members)


def test_a_refusal_leaves_no_handle_and_a_success_leaves_the_message(c):
    handle = ffi.new("tritlstm **", ffi.cast("tritlstm *", 1))
    assert c.lib.tritlstm_create(c.struct("options"), NULL, handle) == ARGUMENT
    assert handle[0] == NULL
    c.create()
    assert c.error().startswith("input_size is 0")


def test_structs_of_other_versions(c, lib):
    size = ffi.sizeof("tritlstm_options")
    longer = ffi.new("char[]", size + 16)
    options = ffi.cast("tritlstm_options *", longer)
    assert lib.tritlstm_options_init(options, size + 16) == OK
    assert options.size == size + 16
    options.input_size, options.hidden_size = D, H
    handle = ffi.new("tritlstm **")
    c.__getattr__("create")(options, NULL, handle)
    filled = ffi.new("char[]", b"\xff" * (size + 16))
    wide = ffi.cast("tritlstm_options *", filled)
    wide.size = size + 16
    c.get_options(handle[0], wide)
    assert (wide.size, wide.hidden_size, bytes(ffi.buffer(filled, size + 16))[size:]) == (
        size + 16,
        H,
        bytes(16),
    )
    lib.tritlstm_destroy(handle[0])
    longer[size + 3] = b"\x01"
    with refuses(UNSUPPORTED, "options has a member set that library version 0.1.0 does not know"):
        c.__getattr__("create")(options, NULL, handle)
    for wrong in (0, size - 1, 2**63):
        assert lib.tritlstm_options_init(options, wrong) == ARGUMENT
        assert f"size {wrong} is not that of a options" in c.error()


def test_structs_of_the_first_version(c, lib, tmp_path):
    """Hosts that were built before `more` and `resets`: nothing behind their structs is read or written."""

    def first(type_: str, size: int) -> Any:
        memory = ffi.new("char[]", b"\xff" * 256)
        old.append(memory)
        value = ffi.cast(f"tritlstm_{type_} *", memory)
        assert getattr(lib, f"tritlstm_{type_}_init")(value, size) == OK
        assert bytes(ffi.buffer(memory, 256))[size:] == b"\xff" * (256 - size)
        return value

    old: list[Any] = []
    x, out, gradient = torch.randn(T, B, D), torch.zeros(T, B, H), torch.zeros(T, B, D)
    options = first("options", 80)
    options.input_size, options.hidden_size = D, H
    handle = ffi.new("tritlstm **")
    c.__getattr__("create")(options, NULL, handle)
    lstm = ffi.gc(handle[0], lib.tritlstm_destroy)
    c.get_options(lstm, options)
    assert (options.size, options.hidden_size) == (80, H)
    save_file(nn.LSTM(D, H).state_dict(), tmp_path / "m")
    c.create_from_safetensors(str(tmp_path / "m").encode(), first("load_options", 32), handle)
    lib.tritlstm_destroy(handle[0])
    _, reserve = c.scratch(lstm, T, B, True)
    args, back = first("forward_args", 120), first("backward_args", 160)
    for struct_ in (args, back):
        struct_.steps, struct_.batch, struct_.x, struct_.out = T, B, pointer(x), pointer(out)
        struct_.reserve, struct_.reserve_bytes = reserve.pointer, reserve.size
    c.forward(lstm, args)
    back.grad_out, back.grad_x = pointer(out), pointer(gradient)
    c.backward(lstm, back)
    assert gradient.abs().max() > 0
    for value in old:
        assert bytes(ffi.buffer(value, 256))[160:] == b"\xff" * 96


def test_null_pointers_are_refused(c, lib):
    lstm = c.create()
    state = ffi.new("tritlstm_state **")
    c.state_create(lstm, B, state)
    handle, count = ffi.new("tritlstm **"), ffi.new("int64_t *")
    x, out = torch.zeros(T, B, D), torch.zeros(T, B, H)
    forward = make_forward(c, x, out)
    options = c.struct("options", input_size=D, hidden_size=H)
    calls = {
        "options_init": [(NULL, 88)],
        "load_options_init": [(NULL, 40)],
        "forward_args_init": [(NULL, 128)],
        "backward_args_init": [(NULL, 168)],
        "create": [(NULL, NULL, handle), (options, NULL, NULL)],
        "create_from_safetensors": [(NULL, NULL, handle), (b"x", NULL, NULL)],
        "get_options": [(NULL, options), (lstm, NULL)],
        "num_weights": [(NULL, count), (lstm, NULL)],
        "weight_info": [(NULL, 0, NULL), (lstm, 0, NULL)],
        "get_weights": [(NULL, NULL, CPU, NULL), (lstm, NULL, CPU, NULL)],
        "set_weights": [(NULL, NULL, CPU, NULL), (lstm, NULL, CPU, NULL)],
        "sizes": [(NULL, T, B, 0, NULL, NULL)],
        "forward": [(NULL, forward), (lstm, NULL)],
        "backward": [(NULL, NULL), (lstm, NULL)],
        "state_create": [(NULL, B, state), (lstm, B, NULL)],
        "step": [(NULL, NULL, NULL, NULL, 0, NULL), (state[0], NULL, pointer(out), NULL, 0, NULL)]
        + [(state[0], pointer(x), NULL, NULL, 0, NULL)],
        "state_reset": [(NULL, NULL, NULL)],
        "state_get": [(NULL, NULL, NULL, CPU, NULL)],
        "state_set": [(NULL, NULL, NULL, CPU, NULL)],
        "explain": [(NULL, T, B, 0, NULL, 0, NULL), (lstm, T, B, 0, NULL, 5, NULL)],
    }
    kept = state[0]
    for name, arguments in calls.items():
        for args in arguments:
            if name == "step" and args[0] != NULL:
                args = (kept, *args[1:])
            elif name == "state_create" and args[0] == NULL:
                args = (NULL, B, ffi.new("tritlstm_state **"))
            assert getattr(lib, f"tritlstm_{name}")(*args) == ARGUMENT, (name, args)
            assert c.error().endswith(" is NULL"), (name, c.error())
    # Every function that can fail is in the table.
    failing = {f.removeprefix("tritlstm_") for f in dir(lib) if f.startswith("tritlstm_")}
    safe = {"status_string", "last_error", "version", "version_string", "engine", "destroy", "state_destroy"}
    assert failing - safe == set(calls)
    lib.tritlstm_destroy(NULL)
    lib.tritlstm_state_destroy(NULL)
    lib.tritlstm_state_destroy(kept)


def test_what_is_no_handle_is_refused(c, lib):
    nothing = ffi.new("char[256]")
    assert lib.tritlstm_num_weights(ffi.cast("tritlstm *", nothing), ffi.new("int64_t *")) == ARGUMENT
    assert "lstm is not a handle" in c.error()
    assert lib.tritlstm_state_reset(ffi.cast("tritlstm_state *", nothing), NULL, NULL) == ARGUMENT
    assert "state is not a handle" in c.error()
    lib.tritlstm_destroy(ffi.cast("tritlstm *", nothing))


FORWARD = [
    ({"steps": 0}, ARGUMENT, "steps is 0, but must be at least 1"),
    ({"steps": -1}, ARGUMENT, "steps is -1"),
    ({"batch": 0}, ARGUMENT, "batch is 0"),
    ({"batch": -(2**63)}, ARGUMENT, "batch is -9223372036854775808"),
    ({"steps": BIG}, OVERFLOW, "x: 4611686018427387904 x 3 x 4 elements are too large"),
    ({"steps": 2**31, "batch": 2**31}, OVERFLOW, "x: 2147483648 x 2147483648 x 4"),
    ({"steps": 2**28, "batch": 2**28}, OVERFLOW, "gates: 268435456 steps x 268435456 batch x 1 layers"),
    ({"x": None}, ARGUMENT, "x is NULL"),
    ({"out": None}, ARGUMENT, "out is NULL"),
    ({"x": 2}, ARGUMENT, "not a multiple of 4 bytes"),
    ({"reserve": 8, "reserve_bytes": 64}, ARGUMENT, "not a multiple of 16 bytes"),
    ({"reserve": 0, "reserve_bytes": 63}, BUFFER, "reserve_bytes is 63, but {reserve} are needed: ask tritlstm_sizes"),
    ({"reserve_bytes": 64}, ARGUMENT, "reserve is NULL"),
    ({"workspace_bytes": 1}, ARGUMENT, "workspace is NULL"),
    ({"stream": 0}, ARGUMENT, "but must be NULL with TRITLSTM_CPU"),
    ({"size": 4}, ARGUMENT, "forward_args.size is 4"),
]


@pytest.mark.parametrize(("members", "status", "words"), FORWARD, ids=lambda value: str(value)[:30])
def test_bad_forward_arguments_are_refused(c, members, status, words):
    lstm = c.create()
    x, out = torch.zeros(T, B, D), torch.full((T, B, H), 7.0)
    scratch = torch.zeros(128, dtype=torch.uint8)
    words = words.format(reserve=c.scratch(lstm, T, B, True)[1].size)
    args = make_forward(c, x, out)
    for name, value in members.items():
        if name in ("x", "out", "reserve", "stream"):
            base = x if name == "x" else scratch
            value = NULL if value is None else ffi.cast("void *", base.data_ptr() + value)
        setattr(args, name, value)
    with refuses(status, words):
        c.forward(lstm, args)
    assert torch.equal(out, torch.full_like(out, 7.0))


def test_arrays_that_overlap_are_refused(c):
    lstm = c.create()
    memory = torch.zeros(4 * T * B * H)
    x, out = memory[: T * B * D].view(T, B, D), memory[T * B * D - 1 :][: T * B * H].view(T, B, H)
    with refuses(ARGUMENT, "x and out overlap in memory"):
        c.forward(lstm, make_forward(c, x, out))
    c.forward(lstm, make_forward(c, x, memory[T * B * D :][: T * B * H].view(T, B, H)))
    h = torch.zeros(2 * B * H)
    with refuses(ARGUMENT, "h_n and h0 overlap in memory"):
        c.forward(lstm, make_forward(c, x, memory[T * B * D :][: T * B * H].view(T, B, H), h0=h[1:], h_n=h))
    with refuses(ARGUMENT, "h_n and c_n overlap in memory"):
        c.forward(lstm, make_forward(c, x, memory[T * B * D :][: T * B * H].view(T, B, H), h_n=h, c_n=h))


def test_lengths_out_of_range_are_refused(c):
    lstm = c.create()
    x, out = torch.zeros(T, B, D), torch.zeros(T, B, H)
    for values, words in (
        ([T, T + 1, 0], "lengths[1] is 6, but must be 0 ... steps (5)"),
        ([0, 0, -1], "lengths[2] is -1"),
    ):
        lengths = ffi.new("int32_t[]", values)  # a struct does not keep what it points to
        with refuses(ARGUMENT, words):
            c.forward(lstm, make_forward(c, x, out, lengths=lengths))


def test_bad_backward_arguments_are_refused(c):
    lstm, other = c.create(), c.create()
    x, out = torch.zeros(T, B, D), torch.zeros(T, B, H)
    _, reserve = c.scratch(lstm, T, B, True)
    c.forward(lstm, make_forward(c, x, out, reserve=reserve.pointer, reserve_bytes=reserve.size))

    def backward(handle: Any = lstm, **members: Any) -> None:
        args = c.struct("backward_args", steps=T, batch=B, x=pointer(x), out=pointer(out))
        args.reserve, args.reserve_bytes = reserve.pointer, reserve.size
        for name, value in members.items():
            setattr(args, name, value)
        c.backward(handle, args)

    backward()
    gradient = torch.zeros(T, B, D)
    before = "the reserve was not filled by a forward of this handle with the same steps"
    with refuses(ARGUMENT, "reserve is NULL"):
        backward(reserve=NULL, reserve_bytes=0)
    with refuses(BUFFER, f"reserve_bytes is 8, but {reserve.size} are needed"):
        backward(reserve_bytes=8)
    with refuses(STATE, before):
        backward(other)
    with refuses(STATE, before):
        backward(steps=T - 1)
    with refuses(ARGUMENT, "out is NULL"):
        backward(out=NULL)
    with refuses(ARGUMENT, "x and grad_x overlap"):
        backward(grad_x=pointer(x))
    with refuses(ARGUMENT, "grad_weights and grad_weights overlap"):
        same = ffi.new("void *[]", [pointer(torch.empty(0)), pointer(gradient), pointer(gradient), NULL])
        same[0] = NULL
        backward(grad_weights=same)
    with refuses(OVERFLOW, "x: 4611686018427387904 x 3 x 4"):
        backward(steps=BIG)
    with refuses(STATE, before):
        reserve.memory.zero_()
        backward()


def test_bad_weights_and_states_are_refused(c, lib):
    lstm = c.create()
    weights = [torch.zeros(4 * H, D), torch.zeros(4 * H, H), torch.zeros(4 * H), torch.zeros(4 * H)]
    with refuses(ARGUMENT, "weights[2] (bias_ih_l0) is NULL: give all 4 or none"):
        c.create(pointers([*weights[:2], None, weights[3]]))
    odd = ffi.new("void *[]", [pointer(weights[0]), ffi.cast("void *", 6), pointer(weights[2]), pointer(weights[3])])
    with refuses(ARGUMENT, "weights[1] (weight_hh_l0) is not aligned to 4 bytes"):
        c.create(odd)
    with refuses(ARGUMENT, "weights is at address 0x6, not a multiple of 4 bytes"):
        c.set_weights(lstm, odd, CPU, NULL)
    with refuses(ARGUMENT, "weights and weights overlap"):
        c.get_weights(lstm, pointers([weights[0], None, weights[2], weights[2]]), CPU, NULL)
    with refuses(ARGUMENT, "device is 2, but the handle's is 1"):
        c.set_weights(lstm, pointers(weights), CUDA, NULL)
    with refuses(ARGUMENT, "device is 9"):
        c.get_weights(lstm, pointers(weights), 9, NULL)
    with refuses(ARGUMENT, "must be NULL with TRITLSTM_CPU"):
        c.get_weights(lstm, pointers(weights), CPU, pointer(weights[0]))
    info = ffi.new("tritlstm_weight *", {"size": ffi.sizeof("tritlstm_weight")})
    for index in (-1, 4):
        with refuses(ARGUMENT, f"weight {index} of 4"):
            c.weight_info(lstm, index, info)
    info.size = 3
    with refuses(ARGUMENT, "size 3 is not that of a weight"):
        c.weight_info(lstm, 0, info)
    with refuses(ARGUMENT, "training is 2"):
        c.sizes(lstm, T, B, 2, NULL, NULL)
    state = ffi.new("tritlstm_state **")
    with refuses(ARGUMENT, "batch is 0"):
        c.state_create(lstm, 0, state)
    with refuses(UNSUPPORTED, "a bidirectional LSTM needs the whole sequence"):
        c.state_create(c.create(bidirectional=1), B, state)
    assert state[0] == NULL
    c.state_create(lstm, B, state)
    x = torch.zeros(B, H)
    with refuses(ARGUMENT, "x and out overlap"):
        c.step(state[0], pointer(x), pointer(x), NULL, 0, NULL)
    with refuses(ARGUMENT, "h and c overlap"):
        c.state_get(state[0], pointer(x), pointer(x), CPU, NULL)
    lib.tritlstm_state_destroy(state[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_missing_device_is_said_to_be_missing(c):
    if c.engine == "python":
        status, words = DEVICE, f"no CUDA device: torch {torch.__version__} was built"
    else:
        status, words = UNAVAILABLE, "was built without device images: build it with `tritlstm build-c DIR --engine aot"
    with refuses(status, words):
        c.create(device=CUDA)


# -- files --------------------------------------------------------------------------------------------------


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ONE = entry([1], 0, 4)
FILES = [
    (b"", "0 bytes are too few"),
    (b"1234567", "7 bytes are too few"),
    (raw(b"{}", length=3), "a header of 3 bytes is announced, the file has 10"),
    (raw(b"{}", length=2**64 - 1), "a header of 18446744073709551615 bytes"),
    (raw(b"{}", length=100_000_001), "a header of 100000001 bytes is announced"),
    (raw(b""), "byte 0 of the header: expected '{'"),
    (raw(b"[]"), "expected '{'"),
    (raw(b"{"), "expected a string"),
    (raw(b'{"a'), "expected the end of a string"),
    (raw(b'{"a\\'), "expected the end of a string"),
    (raw(b'{"a\\q":1}'), "expected a valid character"),
    (raw(b'{"a\\u12":1}'), "expected a valid character"),
    (raw(b'{"a\\u0000":1}'), "expected a valid character"),
    (raw(b'{"\\ud800":1}'), "expected a valid character"),
    (raw(b'{"a\nb":1}'), "expected a valid character"),
    (raw(b'{"a" 1}'), "expected ':'"),
    (raw(b'{"a":1}'), "expected '{'"),
    (raw(b'{"a":{}}'), "expected a string"),
    (raw(b'{"a":{"dtype":"F32"}}'), "expected dtype, shape and data_offsets before"),
    (raw(b'{"a":{"dtype":"F32","dtype":"F32"}}'), "each once"),
    (raw({"a": {**ONE, "more": 1}}, bytes(4)), "each once"),
    (raw({"a": {**ONE, "shape": [-1]}}, bytes(4)), "expected a whole number"),
    (raw({"a": {**ONE, "shape": [1.5]}}, bytes(4)), "expected ',' or ']'"),
    (raw({"a": {**ONE, "shape": [1] * 9}}, bytes(4)), "expected fewer numbers"),
    (raw(b'{"a":{"shape":[01]}}'), "expected a whole number"),
    (raw({"a": {**ONE, "shape": [2**64]}}, bytes(4)), "expected a number below 2^64"),
    (raw({"a": {**ONE, "shape": [2**40, 2**40]}}, bytes(4)), "whose product is below 2^63"),
    (raw({"a": {**ONE, "shape": [2**62]}}, bytes(4)), "data_offsets that fit the shape"),
    (raw({"a": {**ONE, "data_offsets": [0]}}, bytes(4)), "expected two data_offsets"),
    (raw({"a": {**ONE, "data_offsets": [4, 0]}}, bytes(4)), "data_offsets inside the file"),
    (raw({"a": entry([2], 0, 8)}, bytes(7)), "data_offsets inside the file"),
    (raw({"a": entry([2], 0, 4)}, bytes(4)), "data_offsets that fit the shape"),
    (raw({"a": entry([1], 4, 8)}, bytes(8)), "overlaps another or leaves a gap"),
    (raw({"a": ONE, "b": ONE}, bytes(4)), "overlaps another or leaves a gap"),
    (raw({"a": ONE}, bytes(5)), "1 bytes behind the last tensor"),
    (raw(b'{"a":%b,"a":%b}' % ((json.dumps(ONE).encode(),) * 2), bytes(4)), "'a' stands twice"),
    (raw(b"{} x"), "expected nothing more"),
    (raw({"__metadata__": {"a": 1}}), "expected a string"),
    (raw(b'{"__metadata__":{"a":"b"},"__metadata__":{}}'), "__metadata__ once"),
]


@pytest.mark.parametrize(("content", "words"), FILES, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_damaged_files_are_refused(c, tmp_path, content, words):
    (tmp_path / "m").write_bytes(content)
    with refuses(FORMAT, words):
        c.load(tmp_path / "m")
    assert str(tmp_path / "m") in c.error()


def test_a_file_cut_at_any_byte_is_refused(c, tmp_path):
    save_file(nn.LSTM(1, 1).state_dict(), tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    c.load(tmp_path / "whole")
    for size in range(len(content)):
        (tmp_path / "m").write_bytes(content[:size])
        with refuses(FORMAT, str(tmp_path / "m")):
            c.load(tmp_path / "m")


def test_files_that_can_not_be_read(c, tmp_path):
    with refuses(FILE, "No such file or directory"):
        c.load(tmp_path / "missing")
    with refuses(FILE, "not a regular file"):
        c.load(tmp_path)
    with refuses(FILE, "not a regular file"):
        c.load(Path("/dev/zero"))
    with refuses(FILE, "No such file or directory"):
        c.load(Path("/nowhere/\xe9\u20ac/x"))


WRONG = [
    (lambda w: w.pop("weight_ih_l0"), "the file has no 'weight_ih_l0' (of 7 tensors): is it of an LSTM?"),
    (
        lambda w: w.update({"lstm.weight_ih_l0": w.pop("weight_ih_l0")}),
        "but 'lstm.weight_ih_l0': set prefix to \"lstm.\"",
    ),
    (lambda w: w.pop("bias_hh_l1"), "the file has no 'bias_hh_l1'"),
    (lambda w: w.update(weight_ih_l3=w.pop("weight_ih_l1")), "the file has 'weight_ih_l3' but not layer 1"),
    (
        lambda w: w.update(weight_hh_l1=torch.zeros(4, 5, 6)),
        "'weight_hh_l1' has shape [4, 5, 6] instead of [24, 6]",
    ),
    (lambda w: w.update(bias_ih_l0=torch.zeros(23)), "'bias_ih_l0' has shape [23] instead of [24]"),
    (lambda w: w.update(weight_ih_l0=torch.zeros(23, 4)), "is not a [4 * hidden_size, input_size] matrix"),
    (lambda w: w.update(weight_ih_l0=torch.zeros(24)), "is not a [4 * hidden_size, input_size] matrix"),
    (lambda w: w.update(weight_hr_l0=torch.zeros(6, 6)), "is not a [proj_size, hidden_size] matrix"),
    (
        lambda w: w.update(weight_ch_l0=torch.zeros(18)),
        'it is of an LSTM with peepholes, which only the engine "python" runs',
    ),
    (lambda w: w.update(norm_ih_l0=torch.zeros(24)), 'with "layer_norm=True" in load_options.more'),
    (
        lambda w: w.update(bias_ih_l1=torch.zeros(24).half()),
        "'bias_ih_l1' is stored as F16: the weights differ in type",
    ),
    (
        lambda w: w.update(bias_ih_l1=torch.zeros(24).int()),
        "is stored as I32: only F64, F32, F16 and BF16 can be read",
    ),
    (
        lambda w: w.update(weight_ih_l0=torch.zeros(24, 4).int()),
        "is I32: only F64, F32, F16 and BF16 can be read",
    ),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=[words[:50] for _, words in WRONG])
def test_files_with_other_weights_are_refused(c, tmp_path, change, words):
    weights = dict(nn.LSTM(D, H, 2).state_dict())
    change(weights)
    save_file(weights, tmp_path / "m")
    with refuses(WEIGHTS, words):
        c.load(tmp_path / "m")


def test_bad_load_options_are_refused(c, tmp_path):
    save_file(nn.LSTM(D, H).state_dict(), tmp_path / "m")
    long = ffi.new("char[]", b"x" * 401)
    for members, words in (
        ({"dtype": 5}, "dtype is 5"),
        ({"dtype": -1}, "dtype is -1"),
        ({"device": 0}, "device is 0"),
        ({"device_index": 2}, "device_index is 2"),
        ({"batch_first": 3}, "batch_first is 3"),
        ({"prefix": long}, "prefix is longer than 400 bytes"),
        ({"size": 1}, "load_options.size is 1"),
    ):
        with refuses(ARGUMENT, words):
            c.load(tmp_path / "m", **members)


# -- what Python raises -------------------------------------------------------------------------------------


RAISED = [
    (SystemExit(0), INTERNAL, "SystemExit: 0"),
    (KeyboardInterrupt(), INTERNAL, "KeyboardInterrupt: KeyboardInterrupt()"),
    (MemoryError("none left"), MEMORY, "none left"),
    (torch.OutOfMemoryError("CUDA out of memory"), MEMORY, "CUDA out of memory"),
    (RuntimeError("CUDA error: an illegal memory access"), DEVICE, "an illegal memory access"),
    (NotImplementedError("no such kernel"), UNSUPPORTED, "no such kernel"),
    (ImportError("no triton"), UNAVAILABLE, "ImportError: no triton"),
    (ValueError("x" * 5000), INTERNAL, "xxx"),
    (ValueError("\u20ac" * 900), INTERNAL, "\u20ac\u20ac"),
    (ValueError("\ud800"), INTERNAL, "ValueError: ?"),
    (RecursionError("deep"), INTERNAL, "deep"),
]


@PYTHON
@pytest.mark.parametrize(
    ("error", "status", "words"),
    RAISED,
    ids=lambda value: str(value)[:25].encode("ascii", "replace").decode(),
)
def test_whatever_python_raises_becomes_a_status(c, monkeypatch, capfd, error, status, words):
    lstm = c.create()

    def run(*args: Any) -> None:
        raise error

    monkeypatch.setattr(network.Network, "run", run)
    x, out = torch.zeros(T, B, D), torch.zeros(T, B, H)
    with refuses(status, words):
        c.forward(lstm, make_forward(c, x, out))
    assert len(c.error().encode()) <= 1023
    assert capfd.readouterr() == ("", "")


@PYTHON
def test_an_error_without_words(c, monkeypatch, capfd):
    class Silent(Exception):
        def __str__(self) -> str:
            raise SystemExit("not even this")

    lstm = c.create()
    monkeypatch.setattr(network.Network, "run", lambda *args: (_ for _ in ()).throw(Silent()))
    with refuses(INTERNAL, "could not be put into words"):
        c.forward(lstm, make_forward(c, torch.zeros(T, B, D), torch.zeros(T, B, H)))
    assert capfd.readouterr() == ("", "")


def test_another_version_of_the_package_is_refused():
    words = r"built by tritlstm 3\.2\.1, but the environment has .*: run `tritlstm build-c`"
    with pytest.raises(ImportError, match=words):
        host.prepare(30201, own=False)


# -- CUDA ---------------------------------------------------------------------------------------------------


def by_the_module(problem: Problem, device: str) -> dict[str, np.ndarray]:
    """Outputs and gradients by tritlstm.LSTM itself, whose kernels other tests hold to torch."""
    options = (problem.layers, problem.bias, False, 0.0, problem.bidirectional, problem.proj)
    module = tritlstm.LSTM(problem.D, problem.H, *options, device=device, dtype=problem.dtype)
    module.load_state_dict(problem.module.state_dict())
    leaves = [value.detach().to(device).requires_grad_() for value in (problem.x, problem.h0, problem.c0)]
    out, (h_n, c_n) = module(leaves[0], (leaves[1], leaves[2]), lengths=problem.lengths)
    upstream = [grad.to(device) for grad in problem.grads]
    gradients = torch.autograd.grad((out, h_n, c_n), [*leaves, *module.parameters()], upstream)
    values = [value.detach().double().cpu().numpy() for value in (out, h_n, c_n, *gradients)]
    return dict(zip(problem.names, values, strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if case[5:] == ("float32", True)], ids=case_id)
def test_what_a_gpu_is_compared_with_is_right(case):
    problem = Problem(case)
    base, own = problem.torch(torch.float64), problem.torch(problem.dtype)
    with emulator.emulate():
        assert_within_budget(by_the_module(problem, "cpu"), base, own, problem.dtype)


@pytest.mark.cuda
@PYTHON
@pytest.mark.parametrize("case", [case for case in CASES if case[5] != "float64"], ids=case_id)
def test_device_pointers_and_a_stream(c, case):
    """Within twice the module's own error: that torch's on the CPU is larger in so few numbers would be luck."""
    problem = Problem(case)
    base, own = problem.torch(torch.float64), by_the_module(problem, "cuda")
    stream = torch.cuda.Stream()
    lstm = c.create(pointers(list(problem.module.parameters())), **problem.options(), device=CUDA)
    with torch.cuda.stream(stream):
        x, h0, c0 = (value.cuda() for value in (problem.flip(problem.x), problem.h0, problem.c0))
        lengths = None if problem.lengths is None else problem.lengths.cuda()
        grads = [problem.flip(problem.grads[0]).cuda(), *(grad.cuda() for grad in problem.grads[1:])]
        outputs = [torch.full_like(grad, math.nan) for grad in grads]
        results = [torch.full_like(value, math.nan) for value in (x, h0, c0)]
        weights = [torch.full_like(value, math.nan, device="cuda") for value in problem.module.parameters()]
        reserve = torch.empty(64, dtype=torch.uint8, device="cuda")
        address = ffi.cast("void *", stream.cuda_stream)
        args = make_forward(c, problem.x, outputs[0], x=x, h0=h0, c0=c0, h_n=outputs[1], c_n=outputs[2])
        args.lengths = ffi.cast("int32_t *", pointer(lengths))
        args.reserve, args.reserve_bytes, args.stream = pointer(reserve), 64, address
        c.forward(lstm, args)
        back = c.struct("backward_args", steps=T, batch=B, x=pointer(x), stream=address)
        back.lengths, back.h0, back.c0, back.out = args.lengths, args.h0, args.c0, args.out
        back.grad_out, back.grad_h_n, back.grad_c_n = (pointer(grad) for grad in grads)
        back.grad_x, back.grad_h0, back.grad_c0 = (pointer(result) for result in results)
        array = pointers(weights)
        back.grad_weights, back.reserve, back.reserve_bytes = array, pointer(reserve), 64
        c.backward(lstm, back)
    stream.synchronize()
    values = [problem.flip(outputs[0]), *outputs[1:], problem.flip(results[0]), *results[1:], *weights]
    found = {name: value.double().cpu().numpy() for name, value in zip(problem.names, values, strict=True)}
    assert_within_budget(found, base, own, problem.dtype)


def test_the_grid_covers_every_option():
    """A reduced grid: of any two options at least three of the four combinations stand in some case."""
    values = [
        (layers > 1, both, bias, proj > 0, first, lengths) for layers, both, bias, proj, first, _, lengths in CASES
    ]
    for one, two in itertools.combinations(range(6), 2):
        seen = {(value[one], value[two]) for value in values}
        assert len(seen) >= 3, (one, two, seen)
    assert {case[5] for case in CASES} == set(DTYPES)
