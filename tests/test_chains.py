"""Recurrences side by side in one launch (both directions of a layer, its heads), against each of them alone."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from test_kernels import CUDA, DEVICE, DTYPES, NAMES, Problem, assert_within_budget, kernels, shared_out
from torch import Tensor

import tritlstm
from tritlstm import chain_ops, chains, emulator, plan
from tritlstm.kernels.launch import Launch

WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0")
OPERATOR = torch.ops.tritlstm.chains.default
BACKWARD = torch.ops.tritlstm.chains_backward.default


def draw(count: int, t: int, b: int, d: int, h: int, dtype: torch.dtype, seed: int = 0) -> list[Problem]:
    """Problems of ``count`` chains, which share x."""
    drawn = [Problem.draw(t, b, d, h, dtype, seed + 100 * k) for k in range(count)]
    for problem in drawn[1:]:
        problem.x = drawn[0].x
    return drawn


def stacked(problems: list[Problem]) -> list[Tensor]:
    return [problems[0].x, *(torch.stack([getattr(p, name) for p in problems]) for name in WEIGHTS)]


def upstream(problems: list[Problem]) -> tuple[Tensor, Tensor, Tensor]:
    outs, h_n, c_n = zip(*(p.grads for p in problems), strict=True)
    return torch.cat(outs, -1), torch.stack(h_n), torch.stack(c_n)


def by_kernels(
    problems: list[Problem], reversed: int, lengths: list[int] | None = None, **options: Any
) -> list[dict[str, Tensor]]:
    """Results and gradients, chain by chain; the gradient of x is that of all, which the first chain gets."""
    count = len(problems)
    x, *rest = (v.to(DEVICE) for v in stacked(problems))
    grads = [g.to(DEVICE) for g in upstream(problems)]
    ends = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    with kernels(**options):
        out, h_n, c_n, gates, cells = chains.forward(x, *rest, ends, reversed, True)
        w_ih, w_hh, _, _, h0, c0 = rest
        saved = (out, gates, cells, reversed, (True,) * 6)
        d_x, *d = chains.backward(*grads, x, w_ih, w_hh, h0, c0, ends, *saved)
    found = []
    for k in range(count):
        values = (out.chunk(count, -1)[k], h_n[k], c_n[k], d_x, *(g[k] for g in d))
        found.append(dict(zip(NAMES, (v.cpu() for v in values), strict=True)))
    return found


#: (chains, T, B, D, H), how many in reverse, what forces the path.
PATHS: dict[str, tuple[tuple[int, int, int, int, int], int, dict[str, Any]]] = {
    "two directions": ((2, 4, 5, 7, 37), 1, {"tier": "persistent"}),
    "several groups": (
        (2, 3, 33, 5, 24), 1, {"tier": "persistent", "block_h": 16, "block_b": 16, "sms": 16, "at_once": 2}
    ),
    "one after the other": ((2, 3, 20, 5, 20), 1, {"tier": "persistent", "block_h": 16, "block_b": 16, "at_once": 1}),
    "counter": (
        (2, 3, 20, 5, 40), 1,
        {"tier": "persistent", "protocol": "counter", "block_h": 16, "block_b": 16, "sms": 24, "at_once": 2},
    ),
    "teams of eight": ((2, 3, 18, 5, 48), 1, {"tier": "persistent", "parts": 8, "sms": 16}),
    "without PTX": ((2, 3, 7, 4, 24), 1, {"tier": "persistent", "amd": True}),
    "a block each": ((3, 4, 7, 7, 9), 0, {"tier": "single"}),
    "more than fit": ((5, 4, 7, 4, 8), 2, {"tier": "single", "sms": 3}),
    "in reverse": ((3, 3, 7, 4, 8), 3, {"tier": "single"}),
    "T=1": ((2, 1, 7, 5, 20), 1, {}),
    "free": ((2, 3, 3, 16, 64), 1, {}),
}  # fmt: skip


@pytest.mark.parametrize(("path", "dtype", "with_lengths"), shared_out(PATHS, lengths=True))
def test_results_and_all_gradients_are_within_budget(path, dtype, with_lengths):
    (sizes, reversed, options), dtype = PATHS[path], DTYPES[dtype]
    count, t, b, *_ = sizes
    lengths = [(3 * k + 1) % (t + 1) for k in range(b)] if with_lengths else None
    pairs, whole = [], []
    for seed in range(min(8 if CUDA else 3, -(-800 // (t * b * sizes[-1])))):
        problems = draw(*sizes, dtype, seed)
        exact = [p.by_reference(lengths, k >= count - reversed) for k, p in enumerate(problems)]
        got = by_kernels(problems, reversed, lengths, **options)
        d_x = sum(e["x"] for e in exact)
        whole.append((got[0]["x"], d_x, problems))
        for problem, result, like in zip(problems, got, exact, strict=True):
            pairs += [(problem, {**result, "x": torch.from_numpy(like["x"])}, like)]
    assert_within_budget(pairs)
    # The gradient of the shared input is a sum over the chains, and so is what torch errs for it.
    torch_error = sum(
        max(np.abs(p[k].by_torch()["x"].double().numpy() - p[k].by_reference()["x"]).max() for _, _, p in whole)
        for k in range(count)
    )
    largest = max(np.abs(d_x).max() for _, d_x, _ in whole)
    error = max(np.abs(got.double().numpy() - d_x).max() for got, d_x, _ in whole)
    assert error <= 2 * torch_error + torch.finfo(dtype).eps / 2 * largest


@pytest.mark.parametrize("sizes", [(2, 3, 20, 7, 37), (2, 3, 5, 4, 24)], ids=str)
def test_together_or_one_by_one_the_bits_are_the_same(sizes):
    problems = draw(*sizes, torch.bfloat16)
    options = {"tier": "persistent", "block_h": 16, "block_b": 16, "sms": 40}
    together, apart = (by_kernels(problems, 1, at_once=n, **({} if CUDA else options)) if not CUDA
                       else by_kernels(problems, 1) for n in (2, 1))  # fmt: skip
    for one, other in zip(together, apart, strict=True):
        for name in NAMES:
            assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_all_blocks_of_a_launch_are_resident(arch, direction):
    device = plan.DEVICES[arch]
    several = 0
    for hidden in (8, 64, 100, 256, 512, 700, 1024, 1536):
        for batch in (1, 16, 50, 300):
            for count in (2, 8):
                try:
                    found = plan.recurrent(
                        direction, 5, batch, hidden, torch.float16, device, "ieee", True, None, count
                    )
                except plan.PlanError:
                    continue
                assert found.n_blocks * found.n_groups * found.at_once <= device.sms
                assert found.launch({}).grid == (found.n_blocks, found.n_groups, found.at_once)
                assert found.tier in ("single", "persistent")
                several += found.at_once > 1
    assert several > 20


class TestModule:
    """`tritlstm.LSTM` finds the way by itself."""

    T, B, D, H = 4, 3, 5, 20

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

    @pytest.mark.parametrize("layers", [1, 2])
    @pytest.mark.parametrize("bias", [False, True])
    def test_both_directions_are_one_launch(self, layers, bias, launches):
        torch.manual_seed(0)
        exact = torch.nn.LSTM(self.D, self.H, layers, bias=bias, bidirectional=True)
        ours = tritlstm.LSTM(self.D, self.H, layers, bias=bias, bidirectional=True, device=DEVICE)
        ours.load_state_dict(exact.state_dict())
        x = torch.randn(self.T, self.B, self.D)
        expected = self.results(exact.double(), x.double())
        with kernels():
            got = self.results(ours, x.to(DEVICE))
        for name, value in expected.items():
            # float32: sums of some dozen terms of order one over a few steps.
            assert torch.allclose(got[name], value, rtol=0, atol=2e-5), name
        names = [launch.kernel for launch in launches]
        assert names == ["gate_gemm", "recurrent_forward"] * layers + ["recurrent_backward"] * layers
        assert all(launch.grid[2] == 2 for launch in launches if launch.kernel != "gate_gemm")

    def test_lengths(self, launches):
        torch.manual_seed(0)
        ours = tritlstm.LSTM(self.D, self.H, bidirectional=True, device=DEVICE)
        x, lengths = torch.randn(self.T, self.B, self.D), [2, 0, 4]
        # In float64 the module runs plain operators, and lengths by packing.
        expected = self.results(copy.deepcopy(ours).double(), x.double().to(DEVICE), lengths)
        with kernels():
            got = self.results(ours, x.to(DEVICE), lengths)
        for name, value in expected.items():
            assert torch.allclose(got[name], value, rtol=0, atol=2e-5), name
        assert len(launches) == 3

    @pytest.mark.parametrize("bidirectional", [False, True])
    @pytest.mark.parametrize("heads", [2, 5])
    def test_heads_run_apart(self, heads, bidirectional, launches):
        torch.manual_seed(0)
        ours = tritlstm.LSTM(self.D, self.H, num_heads=heads, bidirectional=bidirectional, device=DEVICE)
        x = torch.randn(self.T, self.B, self.D)
        expected = self.results(copy.deepcopy(ours).double(), x.double().to(DEVICE))
        with kernels():
            got = self.results(ours, x.to(DEVICE))
        for name, value in expected.items():
            assert torch.allclose(got[name], value, rtol=0, atol=2e-5), name
        for kernel in ("recurrent_forward", "recurrent_backward"):
            assert sum(launch.grid[2] for launch in launches if launch.kernel == kernel) == heads * (1 + bidirectional)

    @pytest.mark.skipif(CUDA, reason="chooses the path in the emulator")
    def test_what_does_not_fit_side_by_side_runs_one_by_one(self, launches):
        ours = tritlstm.LSTM(self.D, self.H, bidirectional=True)
        with emulator.emulate(tier="step"), torch.no_grad():
            ours(torch.randn(self.T, self.B, self.D))
        assert all(len(launch.grid) == 2 for launch in launches if launch.kernel == "recurrent_forward")
        assert len(launches) == 2 * (1 + self.T)

    def test_autocast_and_double_backward(self):
        ours = tritlstm.LSTM(self.D, self.H, bidirectional=True, device=DEVICE)
        x = torch.randn(self.T, self.B, self.D, device=DEVICE, requires_grad=True)
        with kernels(), torch.autocast(DEVICE, torch.bfloat16):
            out, (h_n, _) = ours(x)
        assert out.dtype == h_n.dtype == torch.bfloat16
        with kernels():
            (grad,) = torch.autograd.grad(ours(x)[0].sin().sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(grad.square().sum(), x)
        plain = copy.deepcopy(ours).double()
        wide = x.detach().double().requires_grad_()
        (expected,) = torch.autograd.grad(plain(wide)[0].sin().sum(), wide, create_graph=True)
        (expected,) = torch.autograd.grad(expected.square().sum(), wide)
        assert torch.allclose(second.double(), expected, rtol=0, atol=1e-5)

    def test_torch_func(self):
        ours = tritlstm.LSTM(self.D, self.H, bidirectional=True, device=DEVICE)
        x = torch.randn(2, self.T, self.B, self.D, device=DEVICE)

        def loss(x: Tensor) -> Tensor:
            return ours(x)[0].sin().sum()

        with kernels():
            got = torch.func.vmap(torch.func.grad(loss))(x)
            one_by_one = torch.stack([torch.func.grad(loss)(part) for part in x])
            _, tangent = torch.func.jvp(loss, (x[0],), (x[1],))
        assert torch.allclose(got, one_by_one, rtol=0, atol=1e-5)
        assert torch.allclose(tangent, (got[0] * x[1]).sum(), rtol=0, atol=1e-3)

    @pytest.mark.skipif(CUDA, reason="about the emulator's sizes")
    def test_explain_says_so(self):
        x = torch.zeros(self.T, self.B, self.D)
        with emulator.emulate():
            both = str(tritlstm.explain(tritlstm.LSTM(self.D, self.H, 2, bidirectional=True), x))
            heads = str(tritlstm.explain(tritlstm.LSTM(self.D, self.H, num_heads=4), x))
            varied = str(tritlstm.explain(tritlstm.LSTM(self.D, self.H, num_heads=4, peephole=True), x))
            wide = torch.zeros(self.T, self.B, 600)
            no_room = str(tritlstm.explain(tritlstm.LSTM(600, 600, bidirectional=True), wide))
        assert "each of 2 layer(s) x 1 direction(s), both directions side by side:" in both
        assert "x 2 of 2 chains" in both
        assert "note: layers run one after another" in both
        assert "the layer, its 4 heads side by side:" in heads
        assert "x 4 of 4 chains" in heads
        assert "num_heads=4 runs as one w_hh with zeros outside the heads: 4 times their products" in varied
        assert "layers and directions run one after another" in no_room


class TestOperator:
    def arguments(self, dtype: torch.dtype = torch.float64, grad: bool = True) -> list[Any]:
        values = [v.to(dtype).requires_grad_(grad) for v in stacked(draw(3, 3, 2, 4, 5, torch.float32))]
        return [*values, torch.tensor([3, 1], dtype=torch.int32), 1]

    def test_opcheck(self):
        torch.library.opcheck(OPERATOR, (*self.arguments(torch.float32), False))
        x, w_ih, w_hh, _, _, h0, c0, lengths, reversed = self.arguments(torch.float32, grad=False)
        saved = OPERATOR(x, w_ih, w_hh, None, None, h0, c0, lengths, reversed, True)
        out, gates, cells = saved[0], saved[3], saved[4]
        for needs in ((True,) * 6, (False, True) * 3):
            args = (out, None, c0, x, w_ih, w_hh, h0, c0, lengths, out, gates, cells, reversed, needs)
            torch.library.opcheck(BACKWARD, args)

    def test_gradients_of_both_orders(self):
        *leaves, lengths, reversed = self.arguments()

        def run(*leaves: Tensor) -> tuple[Tensor, ...]:
            return chain_ops.chains(*leaves, lengths, reversed)[:3]

        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)

    def test_saved_gates_do_not_depend_on_the_way(self):
        *leaves, lengths, reversed = self.arguments(torch.float32, grad=False)
        plain = OPERATOR(*leaves, lengths, reversed, True)
        with kernels():
            got = OPERATOR(*(v.to(DEVICE) for v in leaves), lengths.to(DEVICE), reversed, True)
        for name, value, expected in zip(("out", "h_n", "c_n"), got, plain, strict=False):
            assert torch.allclose(value.cpu(), expected, rtol=0, atol=1e-5), name
        assert [v.shape for v in got] == [v.shape for v in plain]

    def test_the_gradient_of_the_gradients_operator_is_refused(self):
        x, w_ih, w_hh, _, _, h0, c0, lengths, reversed = self.arguments()
        saved = [v.detach() for v in OPERATOR(x, w_ih, w_hh, None, None, h0, c0, lengths, reversed, True)]
        grads = BACKWARD(
            saved[0], None, None, x, w_ih, w_hh, h0, c0, lengths, saved[0], *saved[3:], reversed, (True,) * 6
        )
        with pytest.raises(NotImplementedError, match=r"Differentiate torch\.ops\.tritlstm\.chains twice"):
            grads[0].sum().backward()

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"x": torch.zeros(2, 4)}, r"x must be \[T, B, D\] and h0 \[C, B, H\], got \[2, 4\]"),
            ({"x": torch.zeros(0, 2, 4)}, "at least one time step, got T = 0"),
            ({"w_hh": torch.zeros(3, 20, 4)}, r"w_hh must be \[3, 20, 5\].* got \[3, 20, 4\]"),
            ({"c0": torch.zeros(2, 2, 5)}, r"c0 must be \[3, 2, 5\].* got \[2, 2, 5\]"),
            ({"lengths": torch.zeros(2)}, r"lengths must be \[2\] of torch.int32.* got \[2\] of torch.float32"),
            ({"reversed": 4}, "reversed must lie between 0 and the number of chains 3, got 4"),
        ],
    )
    def test_wrong_arguments_are_refused(self, changes, words):
        names = ("x", *WEIGHTS, "lengths", "reversed")
        given = dict(zip(names, self.arguments(torch.float32, grad=False), strict=True)) | changes
        with pytest.raises(ValueError, match=words):
            OPERATOR(*given.values(), False)
