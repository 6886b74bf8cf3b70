"""The benchmarks: cases, floor, gate, clocks, rows, resuming, rendering and the command."""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tritlstm import reference
from tritlstm.benchmarks import (
    ahead,
    command,
    device,
    floor,
    gate,
    problem,
    providers,
    render,
    rows,
    session,
    timing,
)
from tritlstm.benchmarks import cases as cases_module
from tritlstm.benchmarks.cases import PASSES, Case, suite

CPU = torch.device("cpu")
KEYS = {
    "case", "provider", "device", "pass", "dtype", "T", "B", "D", "H", "layers", "bidirectional",
    "median_ms", "p20_ms", "p80_ms", "us_per_step", "floor_us_per_step", "max_error", "versions",
    "date", "included",
}  # fmt: skip
LIMITS = floor.Limits(bandwidth=1e9, rate=1e9)
SMALL = Case("small", 4, 3, 5, 6)
DEEP = Case("deep", 6, 5, 7, 8, layers=2, bidirectional=True, lengths=(2, 6))
RESETS = Case("resets", 6, 4, 16, 32, layers=2, resets=0.3)


class TickTimer:
    """Calls once and reports what a clock with fixed steps would."""

    def __init__(self, ms: float = 2.0) -> None:
        self.ms = ms
        self.calls = 0

    def sample(self, call: timing.Call, count: int) -> list[float]:
        call(0)
        self.calls += count
        return [self.ms + 0.1 * index for index in range(count)]


def cpu_device(timer: timing.Timer | None = None) -> device.Device:
    return device.Device("cpu", CPU, "a CPU", timer or TickTimer(), memory_bytes=1 << 30, threads=1)


class Silent:
    def begin(self, total: int) -> None:
        self.total = total

    def doing(self, text: str) -> None: ...

    def advance(self) -> None: ...

    def unit(self, case: Case, which: str, rows: list[rows.Row]) -> None: ...


HEADER = {"suite": "cpu", "device": "a CPU", "threads": 1, "versions": {"torch": "x"}}


def make_session(path: Path, **options: Any) -> session.Session:
    store = options.pop("store", None) or rows.Store(path, HEADER)
    return session.Session(
        device=options.pop("device", cpu_device()),
        store=store,
        limits=lambda dtype: LIMITS,
        reporter=Silent(),
        effort=timing.Effort(budget_ms=4.0, rounds=2, fewest=2),
        **options,
    )


# -- Cases


def test_gpu_suite_has_every_case_that_was_agreed():
    sizes = {(c.T, c.B, c.D, c.H, c.layers, c.directions, c.dtype) for c in suite("gpu")}
    cudnn = [(1024, 16, 768, 768), (512, 64, 512, 512), (512, 64, 1024, 1024), (512, 128, 1024, 1024),
             (256, 32, 256, 256)]  # fmt: skip
    agreed = {(*s, 1, 1, dtype) for s in cudnn for dtype in ("fp16", "bf16", "fp32")}
    refused = [(512, 20, 650, 650), (70, 80, 1150, 1150), (35, 20, 1500, 1500)]
    agreed |= {(*s, 1, 1, dtype) for s in refused for dtype in ("fp16", "bf16")}
    agreed |= {
        (800, 32, 80, 512, 5, 2, "bf16"),
        (800, 32, 80, 1024, 5, 2, "bf16"),
        (100, 64, 256, 256, 2, 2, "fp16"),
        (100, 1024, 16, 64, 2, 1, "fp32"),
        (80, 64, 512, 512, 1, 1, "fp32"),
        (1, 4096, 256, 256, 1, 1, "fp32"),
        (32, 1024, 28, 32, 1, 1, "fp32"),
        (1, 1, 512, 512, 2, 1, "fp16"),
        (256, 32, 2048, 2048, 1, 1, "bf16"),
        (128, 32, 4096, 4096, 1, 1, "bf16"),
        (16384, 8, 512, 512, 1, 1, "bf16"),
    }
    assert agreed <= sizes
    assert {c.lengths for c in suite("gpu") if c.group == "speech"} == {(200, 800)}
    assert [c.T for c in suite("gpu") if c.resets] == [80]


@pytest.mark.parametrize("name", cases_module.SUITES)
def test_suites_are_consistent(name):
    all_cases = suite(name)
    names = [case.name for case in all_cases]
    assert len(set(names)) == len(names)
    assert all(case.group in cases_module.GROUPS for case in all_cases)
    assert all(set(case.without) <= providers.PROVIDERS.keys() for case in all_cases)
    assert all("tritlstm" not in case.without and "torch" not in case.without for case in all_cases)
    quick = suite(name, quick=True)
    assert 0 < len(quick) < len(all_cases)
    for group, axis in render.SWEEPS.items():  # the pictures need at least two points, in a quick run too
        for chosen in (all_cases, quick):
            assert len({getattr(c, axis) for c in chosen if c.group == group}) > 1


def test_cases_are_chosen_by_part_of_the_name_or_by_pattern():
    assert {c.group for c in suite("gpu", pattern="refused")} == {"refused"}
    assert {c.H for c in suite("gpu", pattern="over-H/*x1024-bf16")} == {1024}
    with pytest.raises(ValueError, match="none of the cases of suite 'cpu' matches 'nothing'"):
        suite("cpu", pattern="nothing")
    with pytest.raises(ValueError, match="no suite 'tpu'; there are cpu, gpu"):
        suite("tpu")


def test_a_case_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="got 'fp8'"):
        Case("x", 1, 1, 1, 1, dtype="fp8")
    with pytest.raises(ValueError, match="at least 1"):
        Case("x", 0, 1, 1, 1)
    with pytest.raises(ValueError, match=r"up to T=4, got \(1, 5\)"):
        Case("x", 4, 1, 1, 1, lengths=(1, 5))


def test_lengths_are_drawn_within_their_range_and_the_same_each_time():
    case = next(c for c in suite("gpu") if c.lengths)
    lengths = case.sequence_lengths()
    assert len(lengths) == case.B
    assert lengths[0] == max(lengths) == case.T
    assert min(lengths) >= case.lengths[0]
    assert len(set(lengths)) > 1
    assert lengths == replace(case).sequence_lengths()
    assert case.tokens() == sum(lengths)
    assert case.shortened(300).sequence_lengths()[0] == 300
    assert case.shortened(300).name == case.name


# -- The floor, against numbers worked out by hand


def test_least_work_of_a_plain_case():
    # products 4*5*(3+5) = 160, biases 8*5 = 40, states 4*2*5 = 40, input 8*3, output 8*5
    case = Case("hand", 4, 2, 3, 5)
    forward = floor.work(case, "fwd")
    assert (forward.bytes, forward.operations, forward.handoffs) == (4 * 304, 2 * 8 * 160, 3)
    # backward: the gradients of input, output and weights once more, twice the operations more
    both = floor.work(case, "fwdbwd")
    assert (both.bytes, both.operations, both.handoffs) == (4 * (304 + 64 + 200), 3 * 2560, 6)


def test_least_work_of_stacked_layers_and_two_directions():
    stacked = floor.work(Case("hand", 4, 2, 3, 5, layers=2), "fwd")
    # 160 and 4*5*(5+5) = 200; the second layer runs one step behind the first
    assert (stacked.operations, stacked.handoffs) == (2 * 8 * 360, 3 + 1)
    both_ways = floor.work(Case("hand", 4, 2, 3, 5, layers=2, bidirectional=True, dtype="fp16"), "fwd")
    # 2*160 and 2*4*5*(10+5) = 600; a layer needs both directions of the one below, so 2 * 3 + 1
    assert (both_ways.operations, both_ways.handoffs) == (2 * 8 * 920, 7)
    # input 24, output 80, products 920, biases 2*2*40, states 4*2*2*2*5
    assert both_ways.bytes == 2 * (24 + 80 + 920 + 160 + 160)


def test_least_work_counts_only_the_steps_that_carry_data():
    case = Case("hand", 6, 3, 2, 4, lengths=(1, 6))
    tokens = sum(case.sequence_lengths())
    assert tokens < 18
    assert floor.work(case, "fwd").operations == 2 * tokens * 4 * 4 * 6


def test_floor_is_the_larger_term_plus_the_handoffs():
    case = Case("hand", 4, 2, 3, 5)
    memory = floor.floor(case, "fwd", floor.Limits(bandwidth=1e8, rate=1e9))
    assert memory.total_us == pytest.approx(12.16)
    assert memory.bound == "memory"
    matrix = floor.floor(case, "fwd", floor.Limits(bandwidth=1e9, rate=1e9, handoff_us=0.5))
    assert matrix.total_us == pytest.approx(2.56 + 3 * 0.5)
    assert matrix.us_per_step == pytest.approx((2.56 + 1.5) / 4)
    assert matrix.bound == "matrix"
    handoff = floor.floor(case, "fwd", floor.Limits(bandwidth=1e9, rate=1e9, handoff_us=2.0))
    assert handoff.bound == "hand-off"


def test_floor_hands_over_within_a_block_where_the_weights_fit_one():
    case = Case("hand", 4, 2, 3, 5)  # w_hh is 4*5*5*4 = 400 bytes
    limits = floor.Limits(bandwidth=1e9, rate=1e9, handoff_us=2.0, shared_us=0.1, on_chip_bytes=400)
    assert floor.floor(case, "fwd", limits).total_us == pytest.approx(2.56 + 3 * 0.1)
    smaller = replace(limits, on_chip_bytes=399)
    assert floor.floor(case, "fwd", smaller).total_us == pytest.approx(2.56 + 3 * 2.0)


def test_floor_leaves_out_what_the_cache_keeps():
    case = Case("hand", 4, 2, 3, 5)
    limits = floor.Limits(bandwidth=1e8, rate=1e12, cache_bytes=1000)
    assert floor.floor(case, "fwd", limits).total_us == pytest.approx(2.16)
    assert floor.floor(case, "fwd", replace(limits, cache_bytes=5000)).total_us == pytest.approx(0.00256)


def test_floor_of_the_headline_case():
    # cuDNN's 1.96 µs a step on an H100 (3.35 TB/s, 989 TFLOP/s) must lie above it, and near
    case = Case("cudnn", 1024, 16, 768, 768, dtype="fp16")
    got = floor.floor(case, "fwd", floor.Limits(3.35e12, 989e12, handoff_us=0.14))
    # 2 * 16384 * 4*768*1536 operations = 154.6e9 take 156 µs; 1023 hand-offs 143 µs
    assert got.us_per_step == pytest.approx((156.3 + 143.2) / 1024, rel=1e-3)
    assert got.us_per_step < 1.96


# -- The gate


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", [SMALL, DEEP, RESETS], ids=lambda case: case.group)
def test_the_loop_passes_the_gate(case, dtype):
    case = replace(case, dtype=dtype, name="")
    judge = gate.Gate(problem.make(case, CPU), 1 << 30)
    for which in PASSES:
        check = judge.check(providers.EagerLoop(), which)
        assert check.passed, check
        assert check.steps == case.T


def test_tritlstm_passes_the_gate():
    for case in (SMALL, DEEP):
        judge = gate.Gate(problem.make(case, CPU), 1 << 30)
        for which in PASSES:
            assert judge.check(providers.Tritlstm(), which).passed


def test_the_reference_agrees_with_the_numpy_reference():
    data = problem.make(SMALL, CPU).to(torch.float64)
    got = gate.results(providers.TorchLSTM().build(data), data, "fwdbwd")
    numpy = {name: value.numpy() for name, value in data.weights.items()}
    trace = reference.forward(
        data.xs[0].detach().numpy(),
        *(numpy[f"{kind}_l0"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
        h0=data.h0[0].numpy(),
        c0=data.c0[0].numpy(),
    )
    gradients = reference.backward(trace, data.grad_out.numpy())
    # float64 in both: a thousand roundings of room
    np.testing.assert_allclose(got["out"], trace.h, atol=1e-13)
    np.testing.assert_allclose(got["c_n"][0], trace.c_n, atol=1e-13)
    np.testing.assert_allclose(got["grad of x"], gradients.x, atol=1e-13)
    np.testing.assert_allclose(got["grad of weight_hh_l0"], gradients.w_hh, atol=1e-13)
    np.testing.assert_allclose(got["grad of bias_ih_l0"], gradients.b, atol=1e-13)


def test_resets_mean_starting_again_from_zero():
    """The reference with resets against nn.LSTM over each episode of its own."""
    case = Case("resets", 7, 3, 4, 5, resets=0.4)
    data = problem.make(case, CPU).to(torch.float64)
    got = gate.results(providers.TorchLSTM().build(data), data, "fwd")["out"]
    module = torch.nn.LSTM(4, 5).double()
    module.load_state_dict(data.weights)
    assert data.resets is not None
    assert data.resets.any()
    for b in range(case.B):
        starts = [0, *torch.nonzero(data.resets[:, b]).flatten().tolist(), case.T]
        for episode, (begin, end) in enumerate(itertools.pairwise(starts)):
            state = (data.h0[:, b : b + 1], data.c0[:, b : b + 1])
            if episode:
                state = (torch.zeros_like(state[0]), torch.zeros_like(state[1]))
            out, _ = module(data.xs[0][begin:end, b : b + 1], state)
            torch.testing.assert_close(got[begin:end, b : b + 1], out, rtol=0, atol=1e-14)


class Spoiled(providers.EagerLoop):
    """The eager loop with its result changed by `spoil`."""

    name = "spoiled"
    label = "spoiled"

    def __init__(self, spoil: Any) -> None:
        self.spoil = spoil

    def build(self, data: problem.Problem) -> providers.Runner:
        runner = providers.LoopRunner(data)
        spoil = self.spoil

        class Wrapped(providers.LoopRunner):
            def __call__(self, inputs: problem.Inputs) -> providers.Result:
                return spoil(*super().__call__(inputs))

        runner.__class__ = Wrapped
        return runner


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor) -> Tensor:
        return out.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.0001


SPOILS = {
    "a little off": (lambda out, h, c: (out * 1.00001, h, c), {"fwd", "fwdbwd"}, "out"),
    "one element": (
        lambda out, h, c: (out + 1e-4 * (torch.arange(out.numel()) == 7).view(out.shape), h, c),
        {"fwd", "fwdbwd"},
        "out",
    ),
    "state not final": (lambda out, h, c: (out, h, c * 0.99), {"fwd", "fwdbwd"}, "c_n"),
    "not a number": (lambda out, h, c: (out * float("nan"), h, c), {"fwd", "fwdbwd"}, "out"),
    "shape": (lambda out, h, c: (out, h[..., :-1], c), {"fwd", "fwdbwd"}, "h_n"),
    "gradient only": (lambda out, h, c: (WrongGradient.apply(out), h, c), {"fwdbwd"}, "grad of"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILS)
def test_the_gate_rejects_a_wrong_provider(name, tmp_path):
    spoil, wrong_in, tensor = SPOILS[name]
    run = make_session(tmp_path / "rows.jsonl")
    assert run.run([SMALL], [providers.TorchLSTM(), Spoiled(spoil)])
    for row in run.store.rows:
        if row["provider"] == "spoiled" and row["pass"] in wrong_in:
            assert row["status"] == "wrong"
            assert row["median_ms"] is row["us_per_step"] is row["p20_ms"] is row["p80_ms"] is None
            assert row["worst_tensor"].startswith(tensor)
            assert row["max_error"] is None or row["max_error"] > row["error_budget"]
        else:
            assert row["status"] == "ok"
            assert row["median_ms"] > 0


def test_a_missing_gradient_is_not_overlooked():
    class Forgetful(providers.EagerLoop):
        def build(self, data: problem.Problem) -> providers.Runner:
            runner = providers.LoopRunner(data)
            held = runner.params.pop("bias_hh_l0")
            runner.walk = types.MethodType(  # type: ignore[method-assign]
                lambda self, *args: providers.LoopRunner.walk(
                    types.SimpleNamespace(**{**vars(self), "params": {**self.params, "bias_hh_l0": held}}),
                    *args,
                ),
                runner,
            )
            return runner

    check = gate.Gate(problem.make(SMALL, CPU), 1 << 30).check(Forgetful(), "fwdbwd")
    assert not check.passed
    assert check.tensor == "grad of bias_hh_l0 is missing"


def test_difference_is_relative_to_the_largest_value():
    reference_tensor = torch.tensor([4.0, -8.0], dtype=torch.float64)
    assert gate.difference(torch.tensor([4.0, -7.0]), reference_tensor) == 0.125
    assert gate.difference(torch.tensor([4.0, math.nan]), reference_tensor) == math.inf
    assert gate.difference(torch.tensor([4.0]), reference_tensor) == math.inf


def test_the_budget_is_twice_torchs_error_and_one_rounding():
    case = Case("hand", 3, 2, 4, 8, dtype="bf16")
    judge = gate.Gate(problem.make(case, CPU), 1 << 30)
    check = judge.check(providers.TorchLSTM(), "fwd")
    errors = judge.yardstick("fwd")
    assert check.error == errors[check.tensor]
    assert check.budget == pytest.approx(2 * errors[check.tensor] + 2**-8)
    # what torch keeps in fp32 may be rounded by those who say so, and costs them a larger budget, not a pass
    loose = judge.yardstick("fwd", "rounding loop")
    assert all(loose[name] >= errors[name] for name in errors)
    precise = gate.Gate(problem.make(replace(case, dtype="fp32", name=""), CPU), 1 << 30)
    assert precise.yardstick("fwd", "rounding loop") == precise.yardstick("fwd")


def test_a_reference_too_large_for_memory_is_checked_on_the_first_steps():
    kept = 8 * DEEP.B * (12 * 2 * 2 * DEEP.H + 4 * DEEP.D)
    judge = gate.Gate(problem.make(DEEP, CPU), 3 * kept)
    assert judge.problem.case.T == 3
    assert judge.reference["out"].shape == (3, DEEP.B, 2 * DEEP.H)
    check = judge.check(providers.EagerLoop(), "fwdbwd")
    assert check.passed
    assert check.steps == 3


def test_the_checked_numbers_do_not_depend_on_how_many_inputs_rotate():
    one, three = problem.make(SMALL, CPU), problem.make(SMALL, CPU, copies=3)
    assert len(three.xs) == 3
    for name in ("h0", "c0", "grad_out"):
        assert torch.equal(getattr(one, name), getattr(three, name))
    assert torch.equal(one.xs[0], three.xs[0])
    assert not torch.equal(three.xs[0], three.xs[1])


# -- Providers of others, against stand-ins written from their documented shapes


def flashrnn_stand_in(Wx, R, b, states, function, backend, dtype):
    """FlashRNN's: Wx [B, T, 4, N, D], R [4, N, D out, D in], b [4, N, D], states [2, B, 1, N, D]."""
    assert (function, backend, dtype) == ("lstm", "cuda_fused", "float32")
    h, c = states[:, :, 0]
    steps = []
    for t in range(Wx.shape[1]):
        i, f, g, o = (Wx[:, t] + torch.einsum("gnop,bnp->bgno", R, h) + b).unbind(1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        steps.append(torch.stack((h, c)))
    return torch.stack(steps, dim=2), steps[-1][:, :, None]


def torchrl_stand_in(x, hidden, cell, w_ih, w_hh, b_ih, b_hh, is_init, compute_dtype, *, input_precision):
    """TorchRL's: x [B, T, D]; a reset takes the state from hidden, cell [B, T, H] at that step."""
    h, c = hidden[:, 0], cell[:, 0]
    hs, cs = [], []
    for t in range(x.shape[1]):
        h = torch.where(is_init[:, t, None], hidden[:, t], h)
        c = torch.where(is_init[:, t, None], cell[:, t], c)
        i, f, g, o = (x[:, t] @ w_ih.t() + b_ih + h @ w_hh.t() + b_hh).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        hs.append(h)
        cs.append(c)
    return torch.stack(hs, 1), torch.stack(cs, 1), h, c


def test_flashrnn_is_called_by_its_own_shapes(monkeypatch):
    stand_in = types.ModuleType("flashrnn")
    stand_in.flashrnn = flashrnn_stand_in  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashrnn", stand_in)
    judge = gate.Gate(problem.make(Case("flash", 5, 3, 4, 16), CPU), 1 << 30)
    for which in PASSES:
        assert judge.check(providers.FlashRNN(), which).passed


@pytest.mark.parametrize("case", [SMALL, RESETS], ids=lambda case: case.group)
def test_torchrl_is_called_by_its_own_shapes(case, monkeypatch):
    path = "torchrl.modules.tensordict_module._rnn_triton"
    parts = path.split(".")
    for count in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:count]), types.ModuleType(parts[count - 1]))
    sys.modules[path].lstm_triton = torchrl_stand_in  # type: ignore[attr-defined]
    judge = gate.Gate(problem.make(case, CPU), 1 << 30)
    for which in PASSES:
        assert judge.check(providers.TorchRL(), which).passed


def test_providers_say_why_they_cannot():
    cuda = torch.device("cuda")
    flash, triton_flash, torchrl = (
        providers.PROVIDERS[n] for n in ("flashrnn", "flashrnn-triton", "torchrl")
    )
    assert flash.available(CPU) == "needs an NVIDIA GPU"
    assert torchrl.available(CPU) == "needs a GPU"
    assert flash.supports(DEEP, cuda) == "one layer and one direction only"
    assert flash.supports(Case("x", 9, 2, 3, 16, lengths=(1, 9)), cuda) == "takes no lengths"
    assert flash.supports(Case("x", 9, 2, 3, 16, resets=0.1), cuda) == "takes no resets"
    assert flash.supports(Case("x", 9, 2, 3, 650), cuda) == "hidden size must be a multiple of 16, not 650"
    assert triton_flash.supports(Case("x", 9, 2, 3, 256), cuda).endswith("up to 128, not 256")
    assert torchrl.supports(DEEP, cuda) == "its Triton kernels walk one direction only"
    assert torchrl.supports(Case("x", 9, 2, 3, 16, dtype="fp16"), cuda).endswith("fp32 tensors, not fp16")
    with pytest.raises(ValueError, match="no provider 'cudnn'; there are tritlstm, torch"):
        providers.choose(["cudnn"])
    assert [p.name for p in providers.choose(["torch", "tritlstm"])] == ["tritlstm", "torch"]


def test_providers_that_are_not_installed_name_the_command(monkeypatch):
    monkeypatch.setattr(providers, "find_spec", lambda name: None)
    for name in ("flashrnn", "torchrl"):
        reason = providers.PROVIDERS[name].available(torch.device("cuda"))
        assert reason == f"not installed (pip install {name})"


# -- Clocks


class FakeCuda:
    """Notes what happens in which order; an event takes the time of its place in that order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        cuda = self

        class Event:
            def record(self) -> None:
                cuda.log.append("record")
                self.at = len(cuda.log)

            def elapsed_time(self, other: Any) -> float:
                return float(other.at - self.at)

        return Event()

    def synchronize(self) -> None:
        self.log.append("synchronize")


def test_cuda_timer_flushes_before_the_first_event_and_waits_once():
    cuda = FakeCuda()
    timer = timing.CudaTimer(lambda: cuda.log.append("flush"), cuda)
    times = timer.sample(lambda index: cuda.log.append(f"call {index}"), 2)
    one = ["flush", "record", "call {}", "record"]
    assert cuda.log == [step.format(i) for i in range(2) for step in one] + ["synchronize"]
    assert times == [2.0, 2.0]


def test_cpu_timer_measures_each_call():
    times = timing.CpuTimer().sample(lambda index: time.sleep(0.01 * index), 3)
    assert len(times) == 3
    assert times[0] < 10 <= times[1] < times[2]


def test_providers_take_turns_and_each_round_begins_with_another():
    order: list[str] = []

    class Noting:
        def sample(self, call: timing.Call, count: int) -> list[float]:
            call(0)
            return [1.0] * count

    calls = {name: (lambda index, name=name: order.append(name)) for name in "abc"}
    samples = timing.take_turns(calls, Noting(), timing.Effort(budget_ms=12, rounds=3, fewest=3))
    assert {name: len(times) for name, times in samples.items()} == {"a": 12, "b": 12, "c": 12}
    assert "".join(order) == "aabbcc" + "abc" + "bac" + "cab"


def test_schedule_keeps_to_the_budget_the_minimum_and_the_maximum():
    effort = timing.Effort(budget_ms=100, rounds=5, fewest=10, most=50, slow_ms=1000, fewest_slow=3)
    assert schedule_total(5.0, effort) == 20
    assert schedule_total(500.0, effort) == 10
    assert schedule_total(0.01, effort) == 50
    assert timing.schedule(1001.0, effort) == [1, 1, 1]


def schedule_total(call_ms: float, effort: timing.Effort) -> int:
    return sum(timing.schedule(call_ms, effort))


def test_percentiles_are_numpys():
    samples = [5.0, 1.0, 4.0, 2.5, 9.0, 3.0]
    for fraction in (0.0, 0.2, 0.5, 0.8, 1.0):
        assert timing.percentile(samples, fraction) == pytest.approx(np.percentile(samples, 100 * fraction))


# -- Rows


def test_rows_carry_every_key_and_consistent_numbers(tmp_path, monkeypatch):
    # Traced as ever, but run as traced: the C++ compiler would take most of this file's time.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    run = make_session(tmp_path / "rows.jsonl", note="a remark")
    assert run.run([SMALL, RESETS], providers.choose(None))
    got = run.store.rows
    able = {"tritlstm", "torch", "explicit", "compiled-loop", "eager-loop"}
    assert {(r["case"], r["provider"], r["pass"]) for r in got if r["case"] == SMALL.name} == {
        (SMALL.name, name, which) for name in able for which in PASSES
    }
    for row in got:
        assert row.keys() >= KEYS
        assert (row["device"], row["threads"], row["note"]) == ("a CPU", 1, "a remark")
        assert row["absent"]["torchrl"] == "needs a GPU"
        assert row["status"] == "ok", row
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["us_per_step"] == pytest.approx(1e3 * row["median_ms"] / row["T"])
        assert 0 <= row["max_error"] <= row["error_budget"]
        case = SMALL if row["case"] == SMALL.name else RESETS
        assert row["floor_us_per_step"] == floor.floor(case, row["pass"], LIMITS).us_per_step
    assert [json.loads(line) for line in run.store.path.read_text().splitlines()[1:]] == got
    path = tmp_path / "rows.json"
    rows.write_json(path, got)
    assert rows.read_json(path) == rows.read_json(run.store.path) == json.loads(path.read_text()) == got


def test_providers_named_run_the_cases_that_leave_them_out(tmp_path):
    case = replace(SMALL, without=("eager-loop",))
    loop = providers.PROVIDERS["eager-loop"]
    run = make_session(tmp_path / "a.jsonl")
    run.run([case], [providers.TorchLSTM(), loop])
    assert {row["provider"] for row in run.store.rows} == {"torch"}
    assert run.store.rows[0]["absent"] == {
        "eager-loop": "left out to save time; --provider eager-loop runs it"
    }
    run = make_session(tmp_path / "b.jsonl", named=True)
    run.run([case], [loop])
    assert {row["provider"] for row in run.store.rows} == {"eager-loop"}


class Failing(providers.EagerLoop):
    name = "failing"
    label = "failing"

    def build(self, data: problem.Problem) -> providers.Runner:
        raise MemoryError("no room\nfor it")


def test_a_provider_that_fails_gets_a_row_and_the_others_go_on(tmp_path):
    run = make_session(tmp_path / "rows.jsonl")
    assert run.run([SMALL], [Failing(), providers.TorchLSTM()])
    status = {(row["provider"], row["pass"]): (row["status"], row["reason"]) for row in run.store.rows}
    for which in PASSES:
        assert status["failing", which] == ("failed", "MemoryError: no room")
        assert status["torch", which] == ("ok", None)


def test_a_failing_reference_gives_rows_that_say_so(tmp_path, monkeypatch):
    def broken(*args: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(session, "Gate", broken)
    run = make_session(tmp_path / "rows.jsonl")
    assert run.run([SMALL], [providers.TorchLSTM()])
    assert {row["reason"] for row in run.store.rows} == {"no reference: RuntimeError: out of memory"}


def test_a_lost_device_ends_the_run_behind_a_written_row(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    monkeypatch.setattr(session, "alive", lambda device: False)
    run = make_session(path)
    with pytest.raises(session.DeviceLostError, match=r"failing on .* Run again with --resume"):
        run.run([SMALL], [Failing(), providers.TorchLSTM()])
    assert [(row["provider"], row["status"]) for row in run.store.rows] == [("failing", "failed")]
    monkeypatch.undo()
    again = make_session(path, store=rows.Store.resume(path, HEADER))
    assert again.run([SMALL], [Failing(), providers.TorchLSTM()])
    assert len(again.store.finished) == len(again.store.rows) == 4


# -- Stopping and going on


def test_an_interrupted_run_keeps_its_rows_and_goes_on(tmp_path):
    path = tmp_path / "rows.jsonl"
    chosen = [providers.TorchLSTM(), providers.EagerLoop()]

    class Interrupting(TickTimer):
        def sample(self, call: timing.Call, count: int) -> list[float]:
            if self.calls > 20:
                raise KeyboardInterrupt
            return super().sample(call, count)

    run = make_session(path, device=cpu_device(Interrupting()))
    with pytest.raises(KeyboardInterrupt):
        run.run([SMALL, DEEP], chosen)
    first = path.read_text()
    kept = run.store.finished
    assert 0 < len(kept) < 8
    again = make_session(path, store=rows.Store.resume(path, HEADER))
    assert again.run([SMALL, DEEP], chosen)
    assert path.read_text().startswith(first)
    assert len(again.store.rows) == len(again.store.finished) == 8


def test_resume_drops_a_line_that_was_cut_off_and_nothing_else(tmp_path):
    path = tmp_path / "rows.jsonl"
    run = make_session(path)
    run.run([SMALL], [providers.TorchLSTM()])
    whole = path.read_text()
    path.write_text(whole + whole.splitlines()[-1][:50])
    store = rows.Store.resume(path, HEADER)
    assert store.rows == run.store.rows
    assert path.read_text() == whole


def test_resume_refuses_another_machine_version_or_a_damaged_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows.Store(path, HEADER)
    with pytest.raises(rows.ResumeError, match="begun with device 'a CPU' and this run has 'a GPU'"):
        rows.Store.resume(path, {**HEADER, "device": "a GPU"})
    with pytest.raises(rows.ResumeError, match="versions"):
        rows.Store.resume(path, {**HEADER, "versions": {}})
    path.write_text('{"header": {}}\n{"case"\n{"case": 1}\n')
    with pytest.raises(rows.ResumeError, match="line 2 is damaged"):
        rows.Store.resume(path, HEADER)


def test_the_time_limit_stops_before_a_case_that_would_not_fit(tmp_path):
    now = [0.0]

    class Slow(TickTimer):
        def sample(self, call: timing.Call, count: int) -> list[float]:
            now[0] += 1.0
            return super().sample(call, count)

    path = tmp_path / "rows.jsonl"
    options: dict[str, Any] = {"device": cpu_device(Slow()), "clock": lambda: now[0]}
    run = make_session(path, deadline=12.0, **options)
    assert not run.run([SMALL, DEEP], [providers.TorchLSTM()])
    # a unit takes five samples: two fit into twelve seconds, and a third is not begun
    assert now[0] == 10.0
    assert len(run.store.rows) == 2
    again = make_session(path, store=rows.Store.resume(path, HEADER), **options)
    assert again.run([SMALL, DEEP], [providers.TorchLSTM()])
    assert len(again.store.rows) == len(again.store.finished) == 4


@pytest.fixture
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits as if measured, for the tests that are about something else."""
    monkeypatch.setattr(device, "measure", lambda found, dtype: LIMITS)


def bench(*arguments: str | Path) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


ONE_CASE = ("--suite", "cpu", "--quick", "--case", "over-B/32x1x", "--provider", "torch")


@pytest.mark.usefixtures("quick_limits")
def test_a_killed_run_loses_nothing(tmp_path):
    """SIGKILL while rows are being written, then --resume in this process."""
    path = tmp_path / "rows.json"
    arguments = ["--suite", "cpu", "--quick", "--provider", "torch", "--case", "over-", "--json", str(path)]
    child = subprocess.Popen(
        [sys.executable, "-m", "tritlstm", "bench", *arguments, "--threads", "1"],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    lines = path.with_suffix(".jsonl")
    try:
        while child.poll() is None and (not lines.exists() or lines.read_text().count("\n") < 4):
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    before = rows.read_json(lines)
    assert 3 <= len(before) < 8, "killed too late to show anything"
    assert bench(*arguments, "--resume") == 0
    after = rows.read_json(path)
    assert after[: len(before)] == before
    assert len(after) == len({rows.key(row) for row in after}) == 8


# -- The command


def test_bench_writes_rows_markdown_and_says_where(tmp_path, capsys):
    assert bench(*ONE_CASE, "--output", tmp_path, "--note", "in a test", "--compile-jobs", "2") == 0
    printed = capsys.readouterr().out
    assert "--compile-jobs: for a CPU nothing is compiled" in printed
    (path,) = tmp_path.glob("*-cpu-quick.json")
    got = json.loads(path.read_text())
    assert [row["pass"] for row in got] == list(PASSES)
    assert all(row.keys() >= KEYS and row["note"] == "in a test" for row in got)
    assert got[0]["versions"]["torch"] == torch.__version__
    assert got[0]["floor"]["bandwidth"] > 1e8
    assert f"2 rows in {path}" in printed
    assert path.with_suffix(".md").read_text().startswith("# LSTM benchmarks: ")
    # a second run keeps the first, and --resume has nothing left to do
    assert bench(*ONE_CASE, "--output", tmp_path) == 0
    assert len(list(tmp_path.glob("*-before-*.jsonl"))) == 1
    again = path.read_text()
    assert bench(*ONE_CASE, "--output", tmp_path, "--resume") == 0
    assert path.read_text() == again


@pytest.mark.usefixtures("quick_limits")
def test_time_limit_and_interrupt_have_their_own_exit_status(tmp_path, capsys, monkeypatch):
    path = tmp_path / "rows.json"
    assert bench(*ONE_CASE, "--json", path, "--time-limit", "0.001") == command.EXIT_UNFINISHED
    assert "time limit: 2 rows left, nothing lost" in capsys.readouterr().out

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "take_turns", interrupt)
    assert bench(*ONE_CASE, "--json", path) == command.EXIT_INTERRUPTED
    assert "interrupted: 2 rows left" in capsys.readouterr().out
    monkeypatch.undo()
    assert bench(*ONE_CASE, "--json", path, "--resume") == 0
    assert len(json.loads(path.read_text())) == 2


@pytest.mark.usefixtures("quick_limits")
def test_a_wrong_tritlstm_fails_the_command(tmp_path, monkeypatch, capsys):
    right = providers._TritlstmRunner.__call__

    def wrong(self: Any, inputs: problem.Inputs) -> providers.Result:
        out, h_n, c_n = right(self, inputs)
        return out * 1.001, h_n, c_n

    monkeypatch.setattr(providers._TritlstmRunner, "__call__", wrong)
    arguments = [a if a != "torch" else "tritlstm" for a in ONE_CASE]
    assert bench(*arguments, "--json", tmp_path / "rows.json") == command.EXIT_WRONG
    printed = capsys.readouterr().out
    assert "WRONG" in printed
    assert "tritlstm failed its check in 2 rows" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "cpu", "--case", "nothing"], "matches 'nothing'; --list shows them"),
        (["--suite", "cpu", "--provider", "cudnn"], "no provider 'cudnn'"),
        (["--render", "missing.json"], "missing.json"),
    ],
)
def test_bad_arguments_are_named(arguments, words, tmp_path, capsys):
    assert bench(*arguments, "--output", tmp_path) == command.EXIT_USAGE
    assert words in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_suite_without_a_gpu_says_what_fits(tmp_path, capsys):
    assert bench("--suite", "gpu", "--output", tmp_path) == command.EXIT_USAGE
    assert "--suite cpu fits this machine" in capsys.readouterr().err


def test_list_shows_cases_and_reasons(capsys):
    assert bench("--suite", "gpu", "--list") == 0
    printed = capsys.readouterr().out
    assert "cudnn/1024x16x768x768-fp16" in printed
    assert "large/128x32x4096x4096-bf16  (without flashrnn)" in printed
    assert "eager-loop            eager cell loop" in printed


# -- Rendering


def row(case: Case, provider: str, which: str, median_ms: float | None, **columns: Any) -> rows.Row:
    got = {
        "case": case.name, "group": case.group, "provider": provider, "device": "a GPU", "threads": None,
        "pass": which, "dtype": case.dtype, "T": case.T, "B": case.B, "D": case.D, "H": case.H,
        "layers": case.layers, "bidirectional": case.bidirectional, "status": "ok", "reason": None,
        "median_ms": median_ms,
        "p20_ms": median_ms and 0.9 * median_ms, "p80_ms": median_ms and 1.2 * median_ms,
        "us_per_step": median_ms and 1e3 * median_ms / case.T,
        "floor_us_per_step": 0.5, "floor": floor.floor(case, which, LIMITS).as_row(), "max_error": 1e-4,
        "error_budget": 3e-4, "worst_tensor": "out", "included": "everything",
        "absent": {"torchrl": "needs a GPU"},
        "versions": {"torch": "1.2.3"}, "date": "2026-01-02T03:04:05Z", "note": "shared machine",
    }  # fmt: skip
    return {**got, **columns}


def some_rows() -> list[rows.Row]:
    got = []
    for which in PASSES:
        text = Case("text", 10, 2, 3, 4, dtype="fp16")
        got += [row(text, "torch", which, 8.0), row(text, "tritlstm", which, 2.0)]
        series = Case("series", 10, 2, 3, 4)
        got += [row(series, "torch", which, 3.0), row(series, "tritlstm", which, 3.0)]
        failed = {"status": "failed", "reason": "RuntimeError: no nvcc", "max_error": None}
        got.append(row(series, "flashrnn", which, None, **failed))
        wrong = {"status": "wrong", "max_error": 5e-2}
        got.append(row(text, "eager-loop", which, None, **wrong))
        for H in (64, 128, 256):
            sweep = Case("over-H", 10, 2, H, H)
            got += [row(sweep, "torch", which, H / 64), row(sweep, "tritlstm", which, H / 128)]
    return got


def test_markdown_has_the_figures_the_errors_and_the_reasons():
    text = render.markdown(some_rows(), {"picture": "picture.png"})
    assert (
        "| 10x2x3x4-fp16 | fwd | 0.500 | 200 (180–240) | 800 (720–960) | wrong: 5.0e-02, budget 3.0e-04"
        in text
    )
    assert "| 4.00× |" in text
    assert "| text recognition | 4.00× (1) | 4.00× (1) |" in text
    # geometric mean over five cases of 4, 1, 2, 2, 2
    assert f"| **all cases** | {32 ** (1 / 5):.2f}× (5)" in text
    assert "| eager cell loop | – | – |" in text
    assert "- FlashRNN fused: failed: RuntimeError: no nvcc (series/10x2x3x4-fp32 fwd" in text
    assert "- TorchRL Triton: needs a GPU (every case)" in text
    assert "- shared machine" in text
    assert "![picture](picture.png)" in text


def test_rendering_is_deterministic(tmp_path, capsys):
    path = tmp_path / "rows.json"
    rows.write_json(path, some_rows())
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        assert bench("--render", path, "--output", directory) == 0
    names = sorted(p.name for p in first.iterdir())
    assert names == ["rows-against-torch.png", "rows-step-over-H.png", "rows.md"]
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert str(second / "rows.md") in capsys.readouterr().out
    for name in names[:2]:
        assert (first / name).read_bytes().startswith(b"\x89PNG")


def test_pictures_plot_the_rows():
    from matplotlib.figure import Figure

    figure = render._lines(Figure, [r for r in some_rows() if r["group"] == "over-H"], "H")
    panel = figure.axes[0]
    assert "forward, fp32" in (panel.get_title(), panel.get_title(loc="left"))
    floor_line, ours, torchs = panel.get_lines()
    assert list(floor_line.get_ydata()) == [0.5, 0.5, 0.5]
    assert list(ours.get_xdata()) == list(torchs.get_xdata()) == [64, 128, 256]
    assert list(ours.get_ydata()) == [50, 100, 200]
    assert list(torchs.get_ydata()) == [100, 200, 400]
    bars = render._bars(Figure, [r for r in some_rows() if r["group"] != "over-H" and r["status"] == "ok"])
    assert [text.get_text() for text in bars.axes[0].texts] == ["4.00×", "1.00×"]
    assert sorted(patch.get_width() for patch in bars.axes[0].patches) == [0.0, 3.0]


def test_render_refuses_a_file_without_rows(tmp_path, capsys):
    path = tmp_path / "other.json"
    path.write_text('{"a": 1}')
    assert bench("--render", path) == command.EXIT_USAGE
    assert "is not a file of benchmark rows" in capsys.readouterr().err
    path.write_text("[]")
    assert bench("--render", path) == command.EXIT_USAGE
    assert "there are no rows" in capsys.readouterr().err


def test_markdown_comes_without_matplotlib_and_pictures_name_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(render.MissingExtraError, match=r"pip install 'tritlstm\[bench\]'"):
        render.render(some_rows(), tmp_path, "rows")
    assert (tmp_path / "rows.md").exists()


# -- On a GPU


def test_a_gpu_is_described_by_its_properties(monkeypatch):
    properties = types.SimpleNamespace(
        name="Imaginary H100",
        L2_cache_size=50 << 20,
        shared_memory_per_multiprocessor=228 << 10,
        total_memory=80 << 30,
    )
    wanted: dict[str, Any] = {}

    def empty(size: int, **options: Any) -> Tensor:
        wanted.update(options, size=size)
        return torch.zeros(1)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch, "empty", empty)
    found = device.find("gpu")
    assert (found.kind, found.name, found.threads) == ("gpu", "Imaginary H100", None)
    assert wanted == {"size": 100 << 20, "dtype": torch.uint8, "device": torch.device("cuda", 0)}
    assert found.on_chip_bytes == (228 + 256) << 10
    assert found.memory_bytes == 20 << 30
    assert found.handoff_us == floor.HANDOFF_US
    assert device.find("gpu", handoff_us=0.3).handoff_us == 0.3
    assert isinstance(found.timer, timing.CudaTimer)


def test_products_follow_cudnns_tf32_switch_on_a_gpu_and_are_set_back():
    assert torch.backends.cuda.matmul.allow_tf32 is False
    with device.settings(replace(cpu_device(), kind="gpu")):
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 is False
    with device.settings(cpu_device()):
        assert torch.backends.cuda.matmul.allow_tf32 is False


def test_a_busy_machine_is_pointed_out(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    two = replace(cpu_device(), threads=2)
    for load, threads, expected in ((2.9, 2, False), (3.2, 2, True), (9.0, 1, False), (1.2, 4, True)):
        monkeypatch.setattr("os.getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert bool(device.busy(replace(two, threads=threads))) == expected
    assert "OMP_WAIT_POLICY=passive" in (device.busy(replace(two, threads=4)) or "")
    assert device.busy(replace(two, kind="gpu")) is None


def test_limits_are_bytes_and_operations_over_the_best_time():
    class Halving:
        """Each sample is half of the one before, down to 0.125 ms; the fastest must count."""

        def sample(self, call: timing.Call, count: int) -> list[float]:
            call(0)
            return [max(16.0 / 2**index, 0.125) for index in range(count)]

    limits = device.measure(replace(cpu_device(Halving()), cache_bytes=7), "fp32")
    assert limits.bandwidth == pytest.approx(2 * (128 << 20) / 0.125e-3)
    assert limits.rate == pytest.approx(2 * 512**3 / 0.125e-3)
    assert (limits.handoff_us, limits.shared_us, limits.cache_bytes) == (0, 0, 7)


@pytest.mark.parametrize(("dtype", "tf32", "factors"), [
    ("fp32", True, torch.float16), ("fp32", False, torch.float32), ("bf16", True, torch.bfloat16),
])  # fmt: skip
def test_where_tf32_is_allowed_the_limit_of_products_is_that_of_fp16(monkeypatch, dtype, tf32, factors):
    seen = []

    def sample(call, count):
        call(0)
        return [1.0, 1.0]

    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append({a.dtype, b.dtype, out.dtype}))
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, tf32
    try:
        found = replace(cpu_device(types.SimpleNamespace(sample=sample)), kind="gpu", memory_bytes=1 << 20)
        device.measure(found, dtype)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert seen == [{factors}] * 2


def test_compiling_ahead_says_what_failed_and_goes_on():
    said: list[str] = []
    assert ahead.compile_ahead(math.sqrt, [4.0, -1.0, 9.0], 2, said.append) == 1
    assert "in 2 processes" in said[0]
    assert "1 failed, first: ValueError: math domain error" in said[0]
    # os._exit ends a process as a crash would.
    assert ahead.compile_ahead(os._exit, [3], 2, said.append) == 1
    assert "1 failed, first: a process died" in said[1]
    assert ahead.compile_ahead(math.sqrt, [], 2, said.append) == 0


def test_a_case_is_run_ahead_in_both_passes(monkeypatch):
    ran = []

    def results(runner: providers.Runner, given: problem.Problem, which: str) -> None:
        ran.append((type(runner).__name__, which, gate.results(runner, given, which)["out"].shape))

    monkeypatch.setattr(ahead, "results", results)
    ahead.run_case(SMALL, "cpu")
    name = type(providers.PROVIDERS["tritlstm"].build(problem.make(SMALL, CPU))).__name__
    assert ran == [(name, which, (SMALL.T, SMALL.B, SMALL.H)) for which in PASSES]


def test_only_what_is_left_to_run_is_compiled_ahead(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(ahead, "compile_ahead", lambda work, items, jobs: given.append((work, items, jobs)))
    store = make_session(tmp_path / "rows.jsonl").store
    for which in PASSES:
        store.append({"case": SMALL.name, "provider": "tritlstm", "pass": which, "status": "ok"})
    store.append({"case": DEEP.name, "provider": "tritlstm", "pass": "fwd", "status": "ok"})
    command._compile_ahead([SMALL, DEEP, RESETS], providers.choose(["tritlstm", "torch"]), store, 3)
    assert given == [(ahead.run_case, [DEEP, RESETS], 3)]
    command._compile_ahead([SMALL, DEEP], providers.choose(["torch"]), store, 3)
    command._compile_ahead([SMALL], providers.choose(["tritlstm"]), store, 3)
    assert len(given) == 1


@pytest.mark.cuda
def test_a_small_case_on_the_gpu(tmp_path):
    found = device.find("gpu")
    with device.settings(found):
        limits = device.measure(found, "fp16")
        assert limits.bandwidth > 1e10
        run = make_session(tmp_path / "rows.jsonl", device=found)
        case = Case("small", 16, 8, 32, 64, dtype="fp16")
        assert run.run([case], providers.choose(["tritlstm", "torch", "eager-loop"]))
    assert {row["status"] for row in run.store.rows} == {"ok"}
