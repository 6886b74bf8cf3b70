"""The C engine's CUDA side without a GPU: every launch that it makes runs in the emulator, and the results are compared
with torch in float64 and with the NumPy reference. Driver: tests/capi_hosts/standin_libcuda.c."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aot_world import CPU, CUDA, DTYPES, HOSTS, NULL, World, ffi, pointer, pointers
from torch import Tensor, nn

from tritlstm import reference
from tritlstm.capi import aot, build

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.timeout(600),  # a launch is many processes
]
#: In fp32 the planner takes the persistent tier, in 16-bit types the single block; and the step tier for one step.
IMAGES = "sm_90,H32"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("aot"), IMAGES)


@dataclasses.dataclass(frozen=True)
class Case:
    layers: int = 1
    both: bool = False
    bias: bool = True
    proj: int = 0
    batch_first: bool = False
    dtype: torch.dtype = torch.float32
    lengths: tuple[int, ...] | None = None
    steps: int = 3
    batch: int = 3
    d: int = 5
    h: int = 20
    sms: int = 4  # of the pretended device
    states: bool = True  # whether h0, c0 are given
    upstream: str = "ohc"  # which of the gradients of out, h_n, c_n come in

    @property
    def options(self) -> dict[str, Any]:
        return {"input_size": self.d, "hidden_size": self.h, "num_layers": self.layers, "bidirectional": self.both,
                "bias": self.bias, "proj_size": self.proj, "batch_first": self.batch_first,
                "dtype": DTYPES[self.dtype]}  # fmt: skip

    def __str__(self) -> str:
        plain = Case()
        words = [
            f"{f.name}={getattr(self, f.name)}".replace("torch.", "")
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != getattr(plain, f.name)
        ]
        return "-".join(words).replace(" ", "") or "plain"


class Problem:
    def __init__(self, case: Case):
        self.case = case
        torch.manual_seed(len(str(case)))
        self.module = self.make(torch.float64)
        self.width, self.rows = case.proj or case.h, case.layers * (1 + case.both)
        with torch.no_grad():
            for weight in self.module.parameters():
                # Of wide layers so small that a rounding does not grow from step to step: with 0.4 and H = 500 torch's
                # error in fp32 was 2 % after ten steps, in bfloat16 all, and budgets of twice that said nothing.
                scale = 0.4 * min(1.0, (32 / weight.shape[1]) ** 0.5) if weight.dim() == 2 else 0.4
                weight.copy_((scale * torch.randn(weight.shape)).to(case.dtype))
        self.x = self.draw(case.steps, case.batch, case.d)
        self.h0, self.c0 = self.draw(self.rows, case.batch, self.width), self.draw(self.rows, case.batch, case.h)
        if not case.states:
            self.h0, self.c0 = torch.zeros_like(self.h0), torch.zeros_like(self.c0)
        shapes = {"o": (case.steps, case.batch, (1 + case.both) * self.width), "h": self.h0.shape, "c": self.c0.shape}
        self.grads = {k: self.draw(*shape) if k in case.upstream else None for k, shape in shapes.items()}
        self.names = ["out", "h_n", "c_n", "x", "h0", "c0", *(name for name, _ in self.module.named_parameters())]

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.case.dtype)

    def make(self, dtype: torch.dtype) -> nn.LSTM:
        c = self.case
        return nn.LSTM(c.d, c.h, c.layers, c.bias, False, 0.0, c.both, c.proj, dtype=dtype)

    def by_torch(self, dtype: torch.dtype) -> dict[str, np.ndarray]:
        """Every sequence cut to its length and run alone; outputs and all gradients."""
        module = self.make(dtype)
        module.load_state_dict(self.module.state_dict())
        x, h0, c0 = (value.to(dtype).requires_grad_() for value in (self.x, self.h0, self.c0))
        lengths = self.case.lengths or (self.case.steps,) * self.case.batch
        parts = []
        for b, length in enumerate(lengths):
            out = x.new_zeros(len(x), 1, (1 + self.case.both) * self.width)
            states = h0[:, b : b + 1].contiguous(), c0[:, b : b + 1].contiguous()
            if length:
                run, states = module(x[:length, b : b + 1], states)
                out = torch.cat([run, out[length:]])
            parts.append((out, *states))
        outputs = [torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)]
        given = [(o, g.to(dtype)) for o, g in zip(outputs, self.grads.values(), strict=True) if g is not None]
        leaves = [x, h0, c0, *module.parameters()]
        results, upstream = zip(*given, strict=True)
        found = torch.autograd.grad(results, leaves, upstream, materialize_grads=True)
        values = [value.detach().double().numpy() for value in (*outputs, *found)]
        return dict(zip(self.names, values, strict=True))

    def flip(self, value: Tensor | None) -> Tensor | None:
        return value.transpose(0, 1).contiguous() if self.case.batch_first and value is not None else value

    def weights(self) -> list[Tensor]:
        return [w.detach().to(self.case.dtype) for w in self.module.parameters()]

    def by_library(self, world: World, offset: int = 0) -> dict[str, np.ndarray]:
        """Inference, training and backward; what the two forwards give must agree."""
        case = self.case
        world.pretend(sms=case.sms)
        lstm = world.create(self.weights(), **case.options)
        beyond = torch.zeros(case.steps, case.batch, 1, dtype=torch.bool)
        if case.lengths is not None:  # what lies beyond the ends is nobody's business
            beyond = (torch.arange(case.steps)[:, None] >= torch.tensor(case.lengths))[:, :, None]
        ended = [None if v is None else v.masked_fill(beyond, torch.nan) for v in (self.x, self.grads["o"])]
        x, grad_out = (world.put(self.flip(v), offset) for v in ended)
        h0, c0 = (world.put(v, offset) if case.states else None for v in (self.h0, self.c0))
        lengths = None if case.lengths is None else torch.tensor(case.lengths, dtype=torch.int32)
        # Beyond 0 ... T they are clamped; the last sequence is the longest.
        if lengths is not None:
            lengths[-1] += 100 * (case.lengths[-1] == case.steps)
        lengths = world.put(lengths, 4)
        common = {"steps": case.steps, "batch": case.batch, "x": pointer(x), "h0": pointer(h0), "c0": pointer(c0),
                  "lengths": ffi.cast("int32_t *", pointer(lengths))}  # fmt: skip
        outputs = []
        reserve = None
        shape = self.flip(torch.empty(case.steps, case.batch, (1 + case.both) * self.width)).shape
        for training in (0, 1):
            results = [world.empty(*s, dtype=case.dtype, offset=offset)
                       for s in (shape, self.h0.shape, self.c0.shape)]  # fmt: skip
            args = world.struct("forward_args", **common)
            args.out, args.h_n, args.c_n = (pointer(v) for v in results)
            need = world.sizes(lstm, case.steps, case.batch, training)
            workspace = world.empty(need[0], dtype=torch.uint8)
            args.workspace, args.workspace_bytes = pointer(workspace), need[0]
            if training:
                reserve = world.empty(need[1], dtype=torch.uint8)
                args.reserve, args.reserve_bytes = pointer(reserve), need[1]
            world.call("forward", lstm, args)
            outputs.append(results)
        for inference, trained in zip(*outputs, strict=True):
            assert torch.equal(inference, trained)
        out, h_n, c_n = outputs[1]
        gradients = [torch.empty_like(v) for v in (self.flip(self.x), self.h0, self.c0, *self.weights())]
        gradients = [world.empty(*g.shape, dtype=case.dtype, offset=offset) for g in gradients]
        args = world.struct("backward_args", **common, out=pointer(out), grad_out=pointer(grad_out))
        args.grad_h_n, args.grad_c_n = (pointer(world.put(self.grads[k])) for k in "hc")
        args.grad_x, args.grad_h0, args.grad_c0 = (pointer(g) for g in gradients[:3])
        array = pointers(gradients[3:])
        args.grad_weights = array
        workspace = world.empty(need[0], dtype=torch.uint8)
        args.workspace, args.workspace_bytes = pointer(workspace), need[0]
        args.reserve, args.reserve_bytes = pointer(reserve), need[1]
        kept = reserve.clone()
        world.call("backward", lstm, args)
        assert torch.equal(reserve, kept)
        values = [self.flip(out), h_n, c_n, self.flip(gradients[0]), *gradients[1:]]
        return {name: v.detach().double().numpy() for name, v in zip(self.names, values, strict=True)}


def assert_within_budget(found: dict[str, np.ndarray], exact: dict[str, np.ndarray], own: dict[str, np.ndarray],
                         dtype: torch.dtype) -> None:  # fmt: skip
    """At most twice torch's own error in the same dtype, plus one rounding, all against float64."""
    for name, value in exact.items():
        largest = max(float(np.abs(value).max()), 1e-30)
        budget = 2 * np.abs(own[name] - value).max() / largest + torch.finfo(dtype).eps
        error = np.abs(found[name] - value).max() / largest
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"  # NaN fails, too


CASES = [
    Case(h=32, d=8),  # no padding
    Case(layers=2, lengths=(2, 0, 3), bias=False),
    Case(layers=2, both=True, batch_first=True, lengths=(1, 0, 3)),
    Case(proj=6, both=True, lengths=(2, 0, 3)),
    Case(layers=2, proj=8, batch_first=True, bias=False, steps=2),
    Case(sms=1, both=True, lengths=(3, 2, 3)),  # the blocks of an exchange do not fit at once: the step tier
    Case(steps=1, batch=17),
    Case(states=False, upstream="hc", steps=2),
    Case(proj=4, states=False, upstream="c", steps=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_every_gradient_match_torch(world: World, case: Case) -> None:
    problem = Problem(case)
    found = problem.by_library(world)
    assert_within_budget(found, problem.by_torch(torch.float64), problem.by_torch(case.dtype), case.dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_types(world: World, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype, lengths=(3, 0, 2), layers=2)
    problem = Problem(case)
    found = problem.by_library(world)
    assert_within_budget(found, problem.by_torch(torch.float64), problem.by_torch(dtype), dtype)
    assert {kernel.plan.tier for kernel in world.ran if kernel.plan} == {"single"}


def test_more_batch_tiles_than_tiles_of_16(tmp_path: Path) -> None:
    """Tiles of 8 sequences: what a launch begins with must not reach what lies behind it, the padded x for one."""
    case = Case(dtype=torch.float16, h=64, batch=17, both=True, steps=2, sms=8)
    world, problem = World(tmp_path, "sm_90,fp16,H64"), Problem(case)
    found = problem.by_library(world)
    assert_within_budget(found, problem.by_torch(torch.float64), problem.by_torch(torch.float16), torch.float16)
    plans = [kernel.plan for kernel in world.ran if kernel.plan]
    assert {plan.places for plan in plans if plan.tier == "persistent"} == {8}
    assert {plan.half for plan in plans if plan.direction == "forward"} == {True}


def test_numpy_reference_and_arrays_that_are_aligned_to_an_element_only(world: World) -> None:
    problem = Problem(Case(h=32, d=8))
    weights = [w.double().numpy() for w in problem.weights()]
    states = [v[0].double().numpy() for v in (problem.h0, problem.c0)]
    trace = reference.forward(problem.x.double().numpy(), *weights, *states)
    upstream = [problem.grads["o"].double().numpy(), *(problem.grads[k][0].double().numpy() for k in "hc")]
    g = reference.backward(trace, *upstream)
    values = [trace.h, trace.h_n[None], trace.c_n[None], g.x, g.h0[None], g.c0[None], g.w_ih, g.w_hh, g.b, g.b]
    exact = dict(zip(problem.names, values, strict=True))
    found = problem.by_library(world, offset=4)
    tiers = {kernel.plan.tier for kernel in world.ran if kernel.plan}
    assert tiers
    assert tiers <= {"single", "persistent"}
    assert_within_budget(found, exact, problem.by_torch(torch.float32), torch.float32)


def state_of(world: World, lstm: Any, batch: int) -> Any:
    state = ffi.new("tritlstm_state **")
    world.call("state_create", lstm, batch, state)
    return ffi.gc(state[0], world.lib.tritlstm_state_destroy)


@pytest.mark.parametrize("proj", [0, 6])
def test_steps_carry_a_state(world: World, proj: int) -> None:
    """Steps of a stream against torch over the whole sequence; resets, and states in and out, on the way."""
    case = Case(layers=2, proj=proj, steps=4)
    problem = Problem(case)
    module, width = problem.module, proj or case.h
    world.pretend()
    lstm = world.create(problem.weights(), **case.options)
    state = state_of(world, lstm, case.batch)
    room = world.sizes(lstm, 1, case.batch, 0)[0]
    workspace, out = world.empty(room, dtype=torch.uint8), world.empty(case.batch, width, dtype=torch.float32)
    h, c = (
        torch.zeros(2, case.batch, width, dtype=torch.float64),
        torch.zeros(2, case.batch, case.h, dtype=torch.float64),
    )
    outs, expected = [], []
    for t in range(case.steps):
        if t == 2:  # sequence 1 begins anew
            world.call("state_reset", state, ffi.new("uint8_t[]", [0, 1, 0]), NULL)
            h[:, 1] = c[:, 1] = 0
        if t == 3:  # ordinary memory
            given = problem.h0.contiguous(), problem.c0.contiguous()
            world.call("state_set", state, *map(pointer, given), CPU, NULL)
            h, c = (v.double() for v in given)
        x = world.put(problem.x[t])
        world.call("step", state, pointer(x), pointer(out), pointer(workspace), room, NULL)
        outs.append(out.clone().double())
        with torch.no_grad():
            o, (h, c) = module(problem.x[t : t + 1].double(), (h, c))
        expected.append(o[0])
    found = [torch.full_like(problem.h0, torch.nan), torch.full_like(problem.c0, torch.nan)]
    world.call("state_get", state, *map(pointer, found), CPU, NULL)
    there = world.empty(*problem.c0.shape, dtype=torch.float32)
    world.call("state_get", state, NULL, pointer(there), CUDA, NULL)
    assert torch.equal(there, found[1])
    for ours, exact in ((torch.stack(outs), torch.stack(expected)), (found[0], h), (found[1], c)):
        assert (ours.double() - exact).abs().max() < 2e-6

    world.call("state_reset", state, NULL, NULL)
    world.call("state_get", state, *map(pointer, found), CPU, NULL)
    assert not any(v.any() for v in found)


def test_weights_out_and_in(world: World) -> None:
    case = Case(both=True, proj=6, steps=2)
    first, second = Problem(case), Problem(dataclasses.replace(case, batch=4))
    world.pretend()
    lstm = world.create(first.weights(), **case.options)
    out = [torch.full_like(w, torch.nan) for w in first.weights()]
    world.call("get_weights", lstm, pointers(out), CPU, NULL)
    assert all(torch.equal(a, b) for a, b in zip(out, first.weights(), strict=True))

    # All but one from ordinary memory, that one from the device's.
    given: list[Tensor | None] = [*second.weights()]
    on_device = world.put(given[3])
    given[3] = None
    world.call("set_weights", lstm, ffi.cast("void **", pointers(given)), CPU, NULL)
    alone: list[Tensor | None] = [None] * len(given)
    alone[3] = on_device
    world.call("set_weights", lstm, ffi.cast("void **", pointers(alone)), CUDA, NULL)
    there = [world.empty(*w.shape, dtype=torch.float32) for w in first.weights()]
    world.call("get_weights", lstm, pointers(there), CUDA, NULL)
    assert all(torch.equal(a, b) for a, b in zip(there, second.weights(), strict=True))
    found = forward(world, lstm, first.x, 12)
    with torch.no_grad():
        expected = second.module(first.x.double())[0]
    assert (found.double() - expected).abs().max() < 2e-6


def forward(world: World, lstm: Any, x: Tensor, width: int) -> Tensor:
    t, b, _ = x.shape
    room = world.sizes(lstm, t, b, 0)[0]
    out, workspace = world.empty(t, b, width, dtype=torch.float32), world.empty(room, dtype=torch.uint8)
    args = world.struct("forward_args", steps=t, batch=b, x=pointer(world.put(x)), out=pointer(out),
                        workspace=pointer(workspace), workspace_bytes=room)  # fmt: skip
    world.call("forward", lstm, args)
    return out


def test_initial_weights_are_those_of_the_host_path(world: World) -> None:
    world.pretend()
    found = []
    for device in (CPU, CUDA):
        given = world.struct("options", device=device, input_size=3, hidden_size=5, seed=7)
        handle = ffi.new("tritlstm **")
        world.call("create", given, NULL, handle)
        weights = [torch.full(shape, torch.nan) for shape in ((20, 3), (20, 5), (20,), (20,))]
        world.call("get_weights", handle[0], pointers(weights), CPU, NULL)
        world.lib.tritlstm_destroy(handle[0])
        found.append(weights)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(0.3 < w.abs().max() <= 5**-0.5 for w in found[0])


def test_final_states_may_replace_the_initial_ones(world: World) -> None:
    case = Case(both=True, proj=6, steps=2)
    problem = Problem(case)
    world.pretend()
    lstm = world.create(problem.weights(), **case.options)
    h, c, x = world.put(problem.h0), world.put(problem.c0), world.put(problem.x)
    out = world.empty(2, case.batch, 12, dtype=torch.float32)
    room = world.sizes(lstm, 2, case.batch, 0)[0]
    workspace = world.empty(room, dtype=torch.uint8)
    args = world.struct("forward_args", steps=2, batch=case.batch, x=pointer(x), out=pointer(out), h0=pointer(h),
                        c0=pointer(c), h_n=pointer(h), c_n=pointer(c), workspace=pointer(workspace),
                        workspace_bytes=room)  # fmt: skip
    world.call("forward", lstm, args)
    with torch.no_grad():
        _, (h_n, c_n) = problem.module(problem.x.double(), (problem.h0.double(), problem.c0.double()))
    assert (h.double() - h_n).abs().max() < 2e-6
    assert (c.double() - c_n).abs().max() < 2e-6


def test_the_tests_can_fail(world: World) -> None:
    """What this file proves hangs on the launches: without them nothing is right."""
    problem = Problem(Case(steps=1, h=32, d=8))
    found = problem.by_library(world)
    kernels = {kernel.launch.kernel for kernel in world.ran}
    assert {kernel.plan.tier for kernel in world.ran if kernel.plan} == {"step"}
    assert kernels >= {"product", "recurrent_forward", "recurrent_backward", "rearrange", "previous_states"}
    exact, own = problem.by_torch(torch.float64), problem.by_torch(torch.float32)
    found["weight_hh_l0"][3, 4] += 1e-4
    with pytest.raises(AssertionError, match="weight_hh_l0: error"):
        assert_within_budget(found, exact, own, torch.float32)


# -- a plain C host -----------------------------------------------------------------------------------------------


def compile_host(folder: Path, built: build.Built) -> Path:
    host = folder / "cuda_host"
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror"]
    command = ["cc", *flags, str(HOSTS / "cuda_host.c"), *built.flags(), "-ldl", "-o", str(host)]
    subprocess.run(command, check=True)
    return host


def by_host(
    host: Path, problem: Problem, folder: Path, under: tuple[str, ...] = (), **environment: str
) -> tuple[dict[str, np.ndarray], str]:
    case = problem.case
    sizes = [case.d, case.h, case.layers, case.both, case.bias, case.proj, DTYPES[case.dtype], case.steps, case.batch]
    arrays = [*problem.weights(), problem.x, problem.h0, problem.c0, *problem.grads.values()]
    (folder / "problem").write_bytes(
        np.array(sizes, np.int64).tobytes() + b"".join(a.contiguous().view(torch.uint8).numpy() for a in arrays)
    )
    command = [*under, str(host), str(folder / "problem"), str(folder / "result")]
    run = subprocess.run(
        command, env={**os.environ, **environment}, text=True, capture_output=True, check=False, timeout=300
    )
    assert (run.returncode, run.stderr) == (0, "")
    result = torch.from_numpy(np.fromfile(folder / "result", np.uint8))
    shapes = [problem.grads["o"].shape, problem.h0.shape, problem.c0.shape, problem.x.shape, problem.h0.shape,
              problem.c0.shape, *(w.shape for w in problem.weights())]  # fmt: skip
    found, at = {}, 0
    for name, shape in zip(problem.names, shapes, strict=True):
        end = at + math.prod(shape) * case.dtype.itemsize
        found[name] = result[at:end].clone().view(case.dtype).view(shape).double().numpy()
        at = end
    assert at == result.numel()
    return found, run.stdout


def test_a_plain_c_host_gets_as_far_as_the_driver_lets_it(world: World, tmp_path: Path) -> None:
    """The host of the test below, on the stand-in, where no launch computes anything: it runs to its end."""
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / "libcuda.so.1").symlink_to(world.standin)
    host = compile_host(tmp_path, world.package)
    found, text = by_host(host, Problem(Case(proj=6)), tmp_path, LD_LIBRARY_PATH=str(tmp_path / "driver"))
    assert "images: machine code (cubin) of sm_90" in text
    assert "hidden size: 20 runs in kernels of 32, padded with zeros" in text
    assert re.search("^backward: (persistent, exchange flag|single)", text, re.M)
    assert np.isnan(found["out"]).all()


@pytest.mark.skipif(not shutil.which("valgrind"), reason="needs valgrind (Debian: apt install valgrind)")
def test_a_plain_c_host_under_valgrind(world: World, tmp_path: Path) -> None:
    """No leak and no invalid access in the library, from opening the driver to the last handle's end."""
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / "libcuda.so.1").symlink_to(world.standin)
    host = compile_host(tmp_path, world.package)
    valgrind = ("valgrind", "-q", "--leak-check=full", "--error-exitcode=9")
    problem = Problem(Case(proj=6, layers=2, both=True))
    by_host(host, problem, tmp_path, valgrind, LD_LIBRARY_PATH=str(tmp_path / "driver"))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_plain_c_host_on_this_gpu(dtype: torch.dtype, tmp_path: Path) -> None:
    family = "sm_{}{}".format(*torch.cuda.get_device_capability())
    word = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    images = f"{family if family in aot.FAMILIES else 'ptx'},{word},H128,H512"
    host = compile_host(tmp_path, build.build(tmp_path / "lib", None, "aot", images))
    for case in (
        Case(dtype=dtype, d=40, h=100, steps=30, batch=20, layers=2, both=True),
        Case(dtype=dtype, d=512, h=512, steps=50, batch=16),
        Case(dtype=dtype, d=33, h=500, steps=10, batch=40, proj=100),
    ):
        problem = Problem(case)
        found, text = by_host(host, problem, tmp_path)
        print(text)
        assert_within_budget(found, problem.by_torch(torch.float64), problem.by_torch(dtype), dtype)
