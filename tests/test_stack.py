"""Layers as a wavefront in one launch, against the layers one after another."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from test_kernels import CUDA, DEVICE, DTYPES, kernels, shared_out
from torch import Tensor

import tritlstm
from tritlstm import emulator, pipeline, plan, reference, stack, stack_ops
from tritlstm.kernels.launch import Launch

NAMES = ("out", "h_n", "c_n", "x", "w_ih", "w_between", "w_hh", "b", "h0", "c0")
OPERATOR = torch.ops.tritlstm.stack.default
BACKWARD = torch.ops.tritlstm.stack_backward.default


class Problem:
    """Random inputs of L layers, exactly representable in ``dtype``, and upstream gradients of all results."""

    def __init__(self, sizes: tuple[int, int, int, int, int], dtype: torch.dtype, seed: int = 0) -> None:
        layers, t, b, d, h = sizes
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator) * scale).to(dtype)

        scale = h**-0.5
        weights = [random(4 * h, d, scale=d**-0.5)]
        weights += [random(n, 4 * h, h, scale=scale) for n in (layers - 1, layers)]
        biases = [random(layers, 4 * h, scale=scale) for _ in range(2)]
        self.given = [random(t, b, d), *weights, *biases, random(layers, b, h), random(layers, b, h)]
        self.grads = [random(t, b, h), random(layers, b, h), random(layers, b, h)]

    def by_kernels(
        self, lengths: list[int] | None = None, chunks: int | None = None, **options: Any
    ) -> dict[str, Tensor]:
        given, grads = ([v.to(DEVICE) for v in values] for values in (self.given, self.grads))
        x, w_ih, w_between, w_hh, _, _, h0, c0 = given
        ends = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        with kernels(**options):
            engine, more = (stack, ()) if chunks is None else (pipeline, (chunks,))
            out, h_n, c_n, *saved = engine.forward(*given, ends, True, *more)
            inputs = (x, w_ih, w_between, w_hh, h0, c0, ends)
            gradients = engine.backward(*grads, *inputs, *saved, (True,) * 7, *more)
        return dict(zip(NAMES, (v.cpu() for v in (out, h_n, c_n, *gradients)), strict=True))

    def by_reference(self, lengths: list[int] | None = None) -> dict[str, np.ndarray]:
        """Each sequence alone, cut to its length, layer by layer through the NumPy reference."""
        x, w_ih, w_between, w_hh, b_ih, b_hh, h0, c0 = (v.double().numpy() for v in self.given)
        upstream = [g.double().numpy() for g in self.grads]
        t, b, _ = x.shape
        weights = [w_ih, *w_between]
        found: dict[str, Any] = {"out": np.zeros_like(upstream[0])}
        given = zip(NAMES[1:], (h0, c0, x, w_ih, w_between, w_hh, b_ih, h0, c0), strict=True)
        found |= {name: np.zeros_like(value) for name, value in given}
        for i in range(b):
            one, n = slice(i, i + 1), t if lengths is None else lengths[i]
            if n == 0:
                found["h_n"][:, one], found["c_n"][:, one] = h0[:, one], c0[:, one]
                found["h0"][:, one], found["c0"][:, one] = upstream[1][:, one], upstream[2][:, one]
                continue
            traces, h = [], x[:n, one]
            for k, w in enumerate(weights):
                trace = reference.forward(h, w, w_hh[k], b_ih[k], b_hh[k], h0[k, one], c0[k, one])
                traces.append(trace)
                h = trace.h
                found["h_n"][k, one], found["c_n"][k, one] = trace.h_n, trace.c_n
            found["out"][:n, one] = h
            down = upstream[0][:n, one]
            for k in reversed(range(len(weights))):
                grad = reference.backward(traces[k], down, upstream[1][k, one], upstream[2][k, one])
                down = grad.x
                found["h0"][k, one], found["c0"][k, one] = grad.h0, grad.c0
                found["w_hh"][k] += grad.w_hh
                found["b"][k] += grad.b
                if k:
                    found["w_between"][k - 1] += grad.w_ih
                else:
                    found["w_ih"] += grad.w_ih
            found["x"][:n, one] = down
        return found

    def by_torch(self) -> dict[str, Tensor]:
        """torch's own LSTM in the same dtype, on the CPU, without lengths."""
        x, w_ih, w_between, w_hh, b_ih, b_hh, h0, c0 = (v.clone().requires_grad_() for v in self.given)
        groups = zip([w_ih, *w_between], w_hh, b_ih, b_hh, strict=True)
        weights = [weight for group in groups for weight in group]
        out, h_n, c_n = torch._VF.lstm(x, (h0, c0), weights, True, len(w_hh), 0.0, False, False, False)
        torch.autograd.backward((out, h_n, c_n), self.grads)
        leaves = (x, w_ih, w_between, w_hh, b_ih, h0, c0)
        values = (out, h_n, c_n, *(leaf.grad for leaf in leaves))
        return dict(zip(NAMES, (v.detach() for v in values), strict=True))


def assert_within_budget(problems: list[Problem], lengths: list[int] | None = None, **options: Any) -> None:
    """Errors at most twice torch's in the same dtype on the same numbers, plus one rounding of the largest value."""

    def worst(values: list[dict[str, Tensor]], exact: list[dict[str, np.ndarray]], name: str) -> float:
        return max(np.abs(v[name].double().numpy() - e[name]).max() for v, e in zip(values, exact, strict=True))

    exact, plain = ([p.by_reference(ends) for p in problems] for ends in (lengths, None))
    got, torchs = [p.by_kernels(lengths, **options) for p in problems], [p.by_torch() for p in problems]
    for name in NAMES:
        largest = max(np.abs(e[name]).max() for e in (*exact, *plain))
        error, torch_error = worst(got, exact, name), worst(torchs, plain, name)
        epsilon = torch.finfo(problems[0].given[0].dtype).eps / 2
        assert error <= 2 * torch_error + epsilon * largest, f"{name}: {error:.3g}, torch {torch_error:.3g}"


def draws(sizes: tuple[int, int, int, int, int], dtype: torch.dtype) -> list[Problem]:
    """So many that torch's error is hardly small by luck; in the emulator, whose draws are always the same, fewer."""
    _, t, b, _, h = sizes
    numbers, most = (2000, 6) if CUDA else (1400, 2)
    return [Problem(sizes, dtype, seed) for seed in range(min(most, -(-numbers // (t * b * h))))]


def ends_of(sizes: tuple[int, int, int, int, int], with_lengths: bool) -> list[int] | None:
    _, t, b, _, _ = sizes
    return [(3 * k + 1) % (t + 1) for k in range(b)] if with_lengths else None


#: (layers, T, B, D, H) and what forces the path.
PATHS: dict[str, tuple[tuple[int, int, int, int, int], dict[str, Any]]] = {
    "two layers": ((2, 4, 7, 7, 37), {"sms": 12}),
    "several groups": ((2, 3, 20, 5, 24), {"block_h": 16, "block_b": 16, "sms": 16}),
    "several tiles a group": ((2, 3, 33, 5, 24), {"block_h": 16, "block_b": 16, "sms": 8}),
    "three layers, chunk by chunk": ((3, 3, 7, 5, 40), {"block_k": 16, "poll": 1, "sms": 24}),
    "counter": ((2, 3, 20, 5, 40), {"protocol": "counter", "block_h": 16, "block_b": 16, "sms": 32}),
    "without PTX": ((2, 3, 15, 5, 20), {"amd": True, "block_b": 16, "sms": 12}),
    "counter, without PTX": ((2, 3, 15, 5, 20), {"protocol": "counter", "amd": True, "block_b": 16, "sms": 12}),
    "teams of eight": ((2, 3, 7, 4, 48), {"parts": 8, "sms": 16}),
    "B=1": ((4, 4, 1, 3, 40), {"sms": 24}),
}


@pytest.mark.parametrize(("path", "dtype", "with_lengths"), shared_out(PATHS, lengths=True))
def test_results_and_all_gradients_are_within_budget(path, dtype, with_lengths):
    (sizes, options), dtype = PATHS[path], DTYPES[dtype]
    assert_within_budget(draws(sizes, dtype), ends_of(sizes, with_lengths), **options)


#: As above, with the number of chunks.
PIPELINES: dict[str, tuple[tuple[int, int, int, int, int], int, dict[str, Any]]] = {
    "three layers": ((3, 5, 31, 7, 13), 2, {"tier": "persistent", "block_b": 32}),
    "persistent": ((2, 4, 20, 5, 37), 3, {"tier": "persistent", "block_h": 16, "block_b": 16, "sms": 12}),
    "counter": ((2, 4, 15, 5, 24), 2, {"tier": "persistent", "protocol": "counter", "block_h": 16}),
    "streaming": ((2, 3, 4, 7, 150), 2, {"tier": "streaming", "sms": 10, "shared_bytes": 64 << 10, "block_k": 32}),
    "a step each": ((2, 3, 14, 7, 20), 3, {"tier": "persistent", "amd": True}),
}


@pytest.mark.parametrize(("path", "dtype", "with_lengths"), shared_out(PIPELINES, lengths=True))
def test_a_pipeline_is_within_budget(path, dtype, with_lengths):
    (sizes, chunks, options), dtype = PIPELINES[path], DTYPES[dtype]
    assert_within_budget(draws(sizes, dtype), ends_of(sizes, with_lengths), chunks=chunks, **options)


def test_chunks_do_not_change_the_recurrence():
    """Products over a chunk of rows may add in another order than over all; what the recurrence makes of them not."""
    problem = Problem((2, 4, 3, 4, 20), torch.float32)
    by_chunks = [problem.by_kernels(chunks=n, **({} if CUDA else {"tier": "persistent"})) for n in (1, 2, 4)]
    for found in by_chunks[1:]:
        for name in ("out", "h_n", "c_n", "h0", "c0"):
            torch.testing.assert_close(found[name], by_chunks[0][name], rtol=0, atol=2e-6)


@pytest.mark.skipif(CUDA, reason="delays programs in the emulator")
@pytest.mark.parametrize("protocol", ["flag", "counter"])
def test_the_same_bits_whatever_the_scheduling(protocol):
    problem = Problem((3, 4, 9, 5, 24), torch.float16)
    options = {"protocol": protocol, "block_h": 16, "block_b": 16, "sms": 24}
    first = problem.by_kernels(**options)
    for seed in range(2):
        again = problem.by_kernels(**options, seed=seed, delays=emulator.Delays(0.05, 0.004))
        for name in NAMES:
            assert torch.equal(first[name], again[name]), name


@pytest.mark.skipif(CUDA, reason="kills a program in the emulator")
@pytest.mark.parametrize("protocol", ["flag", "counter"])
def test_a_layer_that_stops_is_reported_by_those_above(protocol):
    problem = Problem((3, 4, 3, 5, 24), torch.float32)
    fault = emulator.Fault((1, 0, 0), store=3, kind="kill")
    with pytest.raises(RuntimeError, match="gave up waiting"):
        problem.by_kernels(protocol=protocol, block_h=16, sms=24, fault=fault, spin_limit=300)


def test_a_wavefront_is_planned_only_where_all_layers_fit():
    device = plan.DEVICES["sm_90"]
    for direction in ("forward", "backward"):
        for hidden, layers in ((256, 2), (256, 8), (512, 4)):
            found = plan.recurrent(
                direction, 9, 16, hidden, torch.float16, device, chains=layers, stacked=True
            )
            assert found.n_blocks * found.n_groups * layers <= device.sms
            assert found.launch({}).grid == (found.n_blocks, found.n_groups, layers)
            alone = plan.recurrent(direction, 9, 16, hidden, torch.float16, device)
            assert found.cost_of(1000) < layers * alone.cost_of(1000)
        for hidden, layers in ((1024, 2), (768, 3)):
            with pytest.raises(plan.PlanError, match=f"{layers} layers"):
                plan.recurrent(direction, 9, 16, hidden, torch.float16, device, chains=layers, stacked=True)


class TestModule:
    T, B, D, H = 5, 3, 4, 20

    @pytest.fixture
    def launches(self, monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
        seen: list[Launch] = []
        owner, name = (Launch, "run") if CUDA else (emulator, "run")
        run = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda launch: seen.append(launch) or run(launch))
        return seen

    def results(self, module: torch.nn.Module, x: Tensor, lengths: Any = None) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        out, (h_n, c_n) = module(x) if lengths is None else module(x, lengths=lengths)
        (out.sin().sum() + h_n.square().sum() + c_n.cos().sum()).backward()
        found = {"out": out, "h_n": h_n, "c_n": c_n, "x": x.grad}
        found |= {name: p.grad for name, p in module.named_parameters()}
        return {name: value.detach().double().cpu() for name, value in found.items()}

    def compare(self, module: tritlstm.LSTM, lengths: Any = None, **options: Any) -> None:
        torch.manual_seed(1)
        x = torch.randn(self.T, self.B, self.D)
        # In float64 the module runs plain operators, layer by layer.
        expected = self.results(copy.deepcopy(module).double(), x.double().to(DEVICE), lengths)
        with kernels(**options):
            got = self.results(module, x.to(DEVICE), lengths)
        for name, value in expected.items():
            # float32: sums of some dozen terms of order one over a few steps.
            assert torch.allclose(got[name], value, rtol=0, atol=2e-5), name

    def module(self, **kind: Any) -> tritlstm.LSTM:
        torch.manual_seed(0)
        return tritlstm.LSTM(self.D, self.H, **{"num_layers": 3, **kind}, device=DEVICE)

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("lengths", [None, [2, 0, 5]], ids=["", "lengths"])
    def test_layers_are_one_launch_where_they_fit(self, bias, lengths, launches):
        self.compare(self.module(bias=bias), lengths, sms=24)
        assert [launch.kernel for launch in launches] == ["gate_gemm", "recurrent_forward", "recurrent_backward"]
        assert all(launch.grid[2] == 3 for launch in launches[1:])

    @pytest.mark.skipif(CUDA, reason="chooses the path in the emulator")
    def test_what_does_not_fit_together_is_split(self, launches):
        self.compare(self.module(num_layers=5), sms=14, tier="persistent", block_h=16, parts=4)
        forward = [launch for launch in launches if launch.kernel == "recurrent_forward"]
        assert [launch.grid[2] if len(launch.grid) == 3 else 1 for launch in forward] == [3, 2]

    @pytest.mark.skipif(CUDA, reason="chooses the path in the emulator")
    def test_a_pipeline_where_a_wavefront_does_not_fit(self, launches, monkeypatch):
        monkeypatch.setattr(plan, "SHORTEST_CHUNK", 2)
        monkeypatch.setattr(plan, "HOST_LAUNCH_US", 0.01)
        module = self.module(num_layers=2)
        options = {"sms": 24, "tier": "persistent", "block_h": 16, "block_b": 16, "parts": 4, "block_k": 32,
                   "shared_bytes": 20 << 10}  # fmt: skip
        self.compare(module, [2, 0, 5], **options)
        assert not any("below_ptr" in launch.arguments for launch in launches)
        steps = [(launch.arguments["step_begin"], launch.arguments["step_end"])
                 for launch in launches if launch.kernel == "recurrent_forward"]  # fmt: skip
        assert steps == [(0, 2), (0, 2), (2, 5), (2, 5)]
        with emulator.emulate(**options):
            said = str(tritlstm.explain(module, torch.zeros(self.T, self.B, self.D)))
        assert "2 layers, each of them:" in said
        assert "2 chunks of time: a layer runs on one while the next layer runs on the one before" in said

    @pytest.mark.parametrize(
        "kind", [{"dropout": 0.5}, {"bidirectional": True}, {"proj_size": 8}, {"peephole": True}], ids=str
    )
    def test_what_needs_whole_layers_runs_one_after_another(self, kind, launches):
        module = self.module(**kind)
        with kernels(sms=24):
            module(torch.randn(self.T, self.B, self.D, device=DEVICE))
        forward = [launch for launch in launches if launch.kernel == "recurrent_forward"]
        assert len(forward) == 3
        assert not any(launch.arguments.get("below_ptr") is not None for launch in forward)

    def test_in_evaluation_dropout_does_not_keep_layers_apart(self, launches):
        with kernels(sms=24), torch.no_grad():
            self.module(dropout=0.5).eval()(torch.randn(self.T, self.B, self.D, device=DEVICE))
        assert [launch.kernel for launch in launches] == ["gate_gemm", "recurrent_forward"]

    def test_autocast_double_backward_and_torch_func(self):
        module = self.module(num_layers=2)
        x = torch.randn(self.T, self.B, self.D, device=DEVICE, requires_grad=True)

        def loss(x: Tensor) -> Tensor:
            return module(x)[0].sin().sum()

        with kernels(sms=24):
            with torch.autocast(DEVICE, torch.bfloat16):
                assert module(x)[0].dtype == torch.bfloat16
            (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
            (second,) = torch.autograd.grad(grad.square().sum(), x)
            by_func = torch.func.grad(loss)(x)
        plain = copy.deepcopy(module).double()
        wide = x.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(plain(wide)[0].sin().sum(), wide, create_graph=True)
        assert torch.allclose(by_func.double(), expected, rtol=0, atol=1e-5)
        (expected,) = torch.autograd.grad(expected.square().sum(), wide)
        assert torch.allclose(second.double(), expected, rtol=0, atol=1e-5)

    @pytest.mark.skipif(CUDA, reason="about the emulator's sizes")
    def test_explain_says_so(self):
        with emulator.emulate(sms=24):
            said = str(tritlstm.explain(self.module(), torch.zeros(self.T, self.B, self.D)))
        assert "3 layers as a wavefront:" in said
        assert "x 3 of 3 layers" in said
        assert "one after another" not in said


class TestOperator:
    def arguments(self, dtype: torch.dtype = torch.float64, grad: bool = True) -> list[Any]:
        values = [v.to(dtype).requires_grad_(grad) for v in Problem((3, 3, 2, 4, 5), torch.float32).given]
        return [*values, torch.tensor([3, 1], dtype=torch.int32)]

    def test_opcheck(self):
        torch.library.opcheck(OPERATOR, (*self.arguments(torch.float32), False))
        x, w_ih, w_between, w_hh, _, _, h0, c0, lengths = self.arguments(torch.float32, grad=False)
        out, _, _, *saved = OPERATOR(x, w_ih, w_between, w_hh, None, None, h0, c0, lengths, True)
        for needs in ((True,) * 7, (False, True) * 3 + (False,)):
            args = (out, None, c0, x, w_ih, w_between, w_hh, h0, c0, lengths, *saved, needs)
            torch.library.opcheck(BACKWARD, args)

    def test_gradients_of_both_orders(self):
        *leaves, lengths = self.arguments()

        def run(*leaves: Tensor) -> tuple[Tensor, ...]:
            return stack_ops.stack(*leaves, lengths)[:3]

        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)

    def test_the_gradient_of_the_gradients_operator_is_refused(self):
        x, w_ih, w_between, w_hh, _, _, h0, c0, lengths = self.arguments()
        out, _, _, *saved = (v.detach() for v in OPERATOR(x, w_ih, w_between, w_hh, None, None, h0, c0, lengths, True))
        inputs = (x, w_ih, w_between, w_hh, h0, c0, lengths)
        grads = BACKWARD(out, None, None, *inputs, *saved, (True,) * 7)
        with pytest.raises(NotImplementedError, match=r"Differentiate torch\.ops\.tritlstm\.stack twice"):
            grads[0].sum().backward()

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({0: torch.zeros(2, 4)}, r"x must be \[T, B, D\] and h0 \[L, B, H\], got \[2, 4\]"),
            ({0: torch.zeros(0, 2, 4)}, "at least one time step, got T = 0"),
            ({6: torch.zeros(1, 2, 5)}, "at least two layers, got L = 1"),
            ({2: torch.zeros(3, 20, 5)}, r"w_between must be \[2, 20, 5\].* got \[3, 20, 5\]"),
            ({8: torch.zeros(2)}, r"lengths must be \[2\] of torch.int32.* got \[2\] of torch.float32"),
        ],
        ids=str,
    )
    def test_wrong_arguments_are_refused(self, changes, words):
        given = self.arguments(torch.float32, grad=False)
        for place, value in changes.items():
            given[place] = value
        with pytest.raises(ValueError, match=words):
            OPERATOR(*given, False)


@pytest.mark.skipif(CUDA, reason="the pretended TF32 is the emulator's")
@pytest.mark.parametrize("forward", [True, False])
def test_tf32_in_one_pass_alone(forward):
    """The way, and so the order of what is saved, is the same with and without."""
    problem = Problem((2, 20, 3, 5, 40), torch.float32)
    x, w_ih, w_between, w_hh, b_ih, b_hh, h0, c0 = problem.given
    options = {"sms": 24}
    with emulator.emulate(tf32=forward, **options):
        out, h_n, c_n, *saved = stack.forward(x, w_ih, w_between, w_hh, b_ih, b_hh, h0, c0, None, True)
    with emulator.emulate(tf32=not forward, **options):
        inputs = (x, w_ih, w_between, w_hh, h0, c0, None)
        gradients = stack.backward(*problem.grads, *inputs, *saved, (True,) * 7)
    exact = problem.by_reference()
    for name, got in zip(NAMES, (out, h_n, c_n, *gradients), strict=True):
        assert np.abs(got.double().numpy() - exact[name]).max() < 2e-2, name
