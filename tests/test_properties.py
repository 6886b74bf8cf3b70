"""Drawn sizes, flags, lengths and resets: reference = CPU path = operators = emulated kernels; the bits of a split.

The reference is `tritlstm.reference`, one sequence, layer and direction at a time, in float64, forward and backward.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import tritlstm
from tritlstm import emulator, functional, ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclasses.dataclass(frozen=True)
class Case:
    """What was drawn: `R` 0 without a projection, `resets` [T][B], `packed` with lengths from 1 on, T the largest."""

    T: int
    B: int
    D: int
    H: int
    layers: int
    bidirectional: bool
    bias: bool
    batch_first: bool
    states: bool
    lengths: tuple[int, ...] | None
    R: int = 0
    resets: tuple[tuple[bool, ...], ...] | None = None
    packed: bool = False

    def module(self, dtype: torch.dtype) -> tritlstm.LSTM:
        torch.manual_seed(self.T + 10 * self.H)
        kind = {"bias": self.bias, "batch_first": self.batch_first, "bidirectional": self.bidirectional}
        return tritlstm.LSTM(self.D, self.H, self.layers, **kind, proj_size=self.R, dtype=dtype)

    def inputs(self) -> list[Tensor]:
        """x [T, B, D] and, where asked for, h_0 and c_0, in float64 of float32's values."""
        generator = torch.Generator().manual_seed(self.D)
        state = (self.layers * (1 + self.bidirectional), self.B)
        states = [(*state, self.R or self.H), (*state, self.H)] if self.states else []
        shapes = [(self.T, self.B, self.D), *states]
        return [torch.randn(shape, generator=generator).double() for shape in shapes]


@st.composite
def cases(draw: Callable[..., Any], T: int = 6, B: int = 4, D: int = 5, H: int = 9, layers: int = 2) -> Case:
    steps, batch = draw(st.integers(1, T)), draw(st.integers(1, B))
    packed = draw(st.booleans())
    some = st.lists(st.integers(int(packed), steps), min_size=batch, max_size=batch).map(tuple)
    lengths = draw(some if packed else st.none() | some)
    if packed:
        steps = max(lengths)
    sizes = draw(st.integers(1, D)), draw(st.integers(1, H)), draw(st.integers(1, layers))
    flags = [draw(st.booleans()) for _ in range(4)]
    R = draw(st.just(0) | st.integers(0, sizes[1] - 1))
    return Case(steps, batch, *sizes, *flags, lengths, R, draw(st.none() | some_resets(steps, batch)), packed)


def some_resets(steps: int, batch: int) -> st.SearchStrategy[Any]:
    row = st.lists(st.booleans(), min_size=batch, max_size=batch).map(tuple)
    return st.lists(row, min_size=steps, max_size=steps).map(tuple)


def loss_weights(results: list[np.ndarray]) -> list[np.ndarray]:
    return [np.cos(np.arange(r.size)).reshape(r.shape) for r in results]


@dataclasses.dataclass
class Direction:
    """One sequence, layer and direction, by `tritlstm.reference`.

    A projection h' = h W_rᵀ turns the recurrent product h' W_hᵀ into h (W_h W_r)ᵀ, but for the initial state, which
    is an h': it goes beside x[0] into the input product, with W_h for weights.
    """

    weights: dict[str, np.ndarray]  # w_ih, w_hh and, where there are, b_ih, b_hh and w_hr
    h0: np.ndarray  # [1, R]
    cuts: np.ndarray  # [T, 1]: resets in the order of the direction
    trace: reference.Trace

    @classmethod
    def run(
        cls, x: np.ndarray, weights: dict[str, np.ndarray], h0: np.ndarray, c0: np.ndarray, cuts: np.ndarray
    ) -> Direction:
        """x [T, 1, D], c0 [1, H]."""
        w_ih, w_hh, w_hr = weights["w_ih"], weights["w_hh"], weights.get("w_hr")
        biases = weights.get("b_ih"), weights.get("b_hh")
        variant = reference.Variant(resets=cuts)
        if w_hr is None:
            return cls(weights, h0, cuts, reference.forward(x, w_ih, w_hh, *biases, h0, c0, variant=variant))
        beside = np.zeros((*x.shape[:2], h0.shape[1]))
        beside[:1] = np.where(cuts[:1, :, None], 0.0, h0)
        wide, w_wide = np.concatenate((x, beside), -1), np.concatenate((w_ih, w_hh), 1)
        trace = reference.forward(wide, w_wide, w_hh @ w_hr, *biases, None, c0, variant=variant)
        return cls(weights, h0, cuts, trace)

    @property
    def out(self) -> np.ndarray:
        w_hr = self.weights.get("w_hr")
        return self.trace.h if w_hr is None else self.trace.h @ w_hr.T

    @property
    def h_n(self) -> np.ndarray:
        return self.out[-1] if len(self.out) else self.h0

    def gradients(self, grad_out: np.ndarray, grad_h: np.ndarray, grad_c: np.ndarray) -> dict[str, np.ndarray]:
        w_hr, w_hh, D = self.weights.get("w_hr"), self.weights["w_hh"], self.weights["w_ih"].shape[1]
        if w_hr is None:
            got = reference.backward(self.trace, grad_out, grad_h, grad_c)
            return {**vars(got), "b_ih": got.b, "b_hh": got.b}
        whole = grad_out.copy()
        whole[-1:] += grad_h
        got = reference.backward(self.trace, whole @ w_hr, None, grad_c)
        return {
            "x": got.x[..., :D],
            "w_ih": got.w_ih[:, :D],
            "w_hh": got.w_ih[:, D:] + got.w_hh @ w_hr.T,
            "w_hr": w_hh.T @ got.w_hh + np.einsum("tbr,tbh->rh", whole, self.trace.h),
            "h0": np.where(self.cuts[0][:, None], 0.0, got.x[0, :, D:]) if len(whole) else grad_h,
            "c0": got.c0,
            "b_ih": got.b,
            "b_hh": got.b,
        }


NAMES = {"w_ih": "weight_ih", "w_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh", "w_hr": "weight_hr"}


def by_reference(case: Case) -> dict[str, np.ndarray]:
    """Results [T, B, ...] and every gradient of the sum of the results weighed by `loss_weights`."""
    module = case.module(torch.float32)
    weights = {name: value.detach().double().numpy() for name, value in module.named_parameters()}
    x, *states = (value.numpy() for value in case.inputs())
    S, R = 1 + case.bidirectional, case.R or case.H
    h0, c0 = states or (np.zeros((case.layers * S, case.B, size)) for size in (R, case.H))
    lengths = case.lengths or (case.T,) * case.B
    resets = np.zeros((case.T, case.B), bool) if case.resets is None else np.array(case.resets)
    out = np.zeros((case.T, case.B, S * R))
    h_n, c_n, ran = h0.copy(), c0.copy(), {}
    for b, n in enumerate(lengths):
        values = x[:n, b : b + 1]
        # A reset at t parts t - 1 and t; the reverse direction comes from t to t - 1.
        cuts = resets[:n, b : b + 1], np.append(resets[1:n, b : b + 1], np.zeros((min(n, 1), 1), bool), 0)
        for layer in range(case.layers):
            outs = []
            for s in range(S):
                k, flip, suffix = layer * S + s, slice(None, None, -1 if s else 1), f"_l{layer}{'_reverse' * s}"
                own = {short: weights[name + suffix] for short, name in NAMES.items() if name + suffix in weights}
                ran[b, k] = Direction.run(values[flip], own, h0[k, b : b + 1], c0[k, b : b + 1], cuts[s][flip])
                h_n[k, b], c_n[k, b] = ran[b, k].h_n[0], ran[b, k].trace.c_n[0]
                outs.append(ran[b, k].out[flip])
            values = np.concatenate(outs, -1)
        out[:n, b] = values[:, 0]
    results = {"out": out, "h_n": h_n, "c_n": c_n}
    grad_out, grad_h, grad_c = loss_weights([*results.values()])
    grads = {name: np.zeros_like(value) for name, value in {**weights, "x": x, "h0": h0, "c0": c0}.items()}
    for b, n in enumerate(lengths):
        upstream = grad_out[:n, b : b + 1]
        for layer in reversed(range(case.layers)):
            below = 0.0
            for s in range(S):
                k, flip, suffix = layer * S + s, slice(None, None, -1 if s else 1), f"_l{layer}{'_reverse' * s}"
                part = upstream[..., s * R : (s + 1) * R][flip]
                got = ran[b, k].gradients(part, grad_h[k, b : b + 1], grad_c[k, b : b + 1])
                below = below + got["x"][flip]
                for short in ran[b, k].weights:
                    grads[NAMES[short] + suffix] += got[short]
                grads["h0"][k, b], grads["c0"][k, b] = got["h0"][0], got["c0"][0]
            upstream = below
        grads["x"][:n, b : b + 1] = upstream
    if not states:
        del grads["h0"], grads["c0"]
    return {**results, **{f"gradient of {name}": value for name, value in grads.items()}}


def by_module(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, np.ndarray]:
    module = case.module(torch.float32).to(device, dtype)
    leaves = [value.to(device, dtype).requires_grad_() for value in case.inputs()]
    x = leaves[0].transpose(0, 1) if case.batch_first else leaves[0]
    hx, resets = tuple(leaves[1:]) or None, None
    if case.resets is not None:
        resets = torch.tensor(case.resets, device=device)
        resets = resets.t() if case.batch_first and not case.packed else resets
    if case.packed:
        # [T, B] of resets here whatever the module's order.
        bundle = pack_padded_sequence(x, torch.tensor(case.lengths), case.batch_first, enforce_sorted=False)
        bundle, (h_n, c_n) = module(bundle, hx, resets=resets)
        out, _ = pad_packed_sequence(bundle, case.batch_first)
    else:
        lengths = None if case.lengths is None else torch.tensor(case.lengths, device=device)
        out, (h_n, c_n) = module(x, hx, lengths=lengths, resets=resets)
    results = [out.transpose(0, 1) if case.batch_first else out, h_n, c_n]
    weighed = loss_weights([r.detach().cpu().numpy() for r in results])
    loss = sum((torch.from_numpy(w).to(r) * r).sum() for w, r in zip(weighed, results, strict=True))
    named = {**dict(module.named_parameters()), **dict(zip(("x", "h0", "c0"), leaves, strict=False))}
    unreached = {name: torch.zeros_like(value) for name, value in named.items()}  # by sequences of no steps alone
    grads = (
        torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        if loss.requires_grad
        else [None] * len(named)
    )
    given = {f"gradient of {n}": unreached[n] if g is None else g for n, g in zip(named, grads, strict=True)}
    values = {**dict(zip(("out", "h_n", "c_n"), results, strict=True)), **given}
    return {name: value.detach().double().cpu().numpy() for name, value in values.items()}


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


@given(cases())
@settings(max_examples=60)
def test_the_cpu_path_is_the_reference(case):
    assert_same(by_module(case, torch.float64), by_reference(case), 1e-10)


@given(cases())
@settings(max_examples=60)
def test_the_operators_are_the_reference(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "runs_kernels", lambda x: True)
        assert_same(by_module(case, torch.float64), by_reference(case), 1e-10)


def kernels() -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if DEVICE == "cuda" else emulator.emulate(sms=4)


# So few are drawn that not all may meet.
ALL = Case(
    4, 2, 3, 9, 1, True, True, True, True, (4, 0), 4, ((True, False), (False, False), (True, True), (False, True))
)
PACKED = Case(4, 3, 2, 12, 2, True, False, False, True, (2, 4, 1), 5, ((False, True, True),) * 3 + ((True,) * 3,), True)


@given(cases(T=4, B=3, H=20, layers=1))
@example(ALL)
@example(PACKED)
@settings(max_examples=8)
def test_the_kernels_are_the_reference(case):
    with kernels():
        got = by_module(case, torch.float32, DEVICE)
    # float32: some hundred products of order one in the largest sum.
    assert_same(got, by_reference(case), 2e-5)


class TestSplits:
    """The promise of docs/variable-length.md: the same bits, where both runs have the same tiles."""

    def draw_resets(self, case: Case, data: Any) -> Tensor | None:
        drawn = data.draw(st.none() | some_resets(case.T, case.B), label="resets")
        return None if drawn is None else torch.tensor(drawn, device=DEVICE)

    @given(cases(T=5, B=3, H=12, layers=1), st.data())
    @settings(max_examples=4)
    def test_a_sequence_in_two_pieces_gives_the_bits_of_one(self, case, data):
        case = dataclasses.replace(case, T=case.T + 3, bidirectional=False, batch_first=False, lengths=None, R=0)
        cut = data.draw(st.integers(2, case.T - 2), label="cut")
        module = case.module(torch.float32).to(DEVICE)
        x, *states = (value.to(DEVICE, torch.float32) for value in case.inputs())
        cuts = self.draw_resets(case, data)
        with kernels(), torch.no_grad():
            out, last = module(x, tuple(states) or None, resets=cuts)
            first, carried = module(x[:cut], tuple(states) or None, resets=None if cuts is None else cuts[:cut])
            second, last_of_two = module(x[cut:], carried, resets=None if cuts is None else cuts[cut:])
        assert torch.equal(torch.cat((first, second)), out)
        assert all(torch.equal(a, b) for a, b in zip(last_of_two, last, strict=True))

    def test_in_16_bits_the_operator_carries_a_cell_in_float32(self):
        torch.manual_seed(0)
        x, h0, c0 = torch.randn(7, 2, 4).bfloat16(), torch.randn(2, 12).bfloat16(), torch.randn(2, 12)
        weights = [p.to(DEVICE) for p in tritlstm.LSTM(4, 12, dtype=torch.bfloat16).parameters()]
        x, h0, c0 = x.to(DEVICE), h0.to(DEVICE), c0.to(DEVICE)
        with kernels(), torch.no_grad():
            out, h_n, c_n, _, _ = ops.layer(x, *weights, h0, c0)
            first, h, c, _, _ = ops.layer(x[:3], *weights, h0, c0)
            second, h, c, _, _ = ops.layer(x[3:], *weights, h, c)
        assert c.dtype == torch.float32
        for a, b in ((torch.cat((first, second)), out), (h, h_n), (c, c_n)):
            assert torch.equal(a, b)

    @given(cases(T=4, B=3, H=12, layers=1), st.data())
    @settings(max_examples=4)
    def test_a_batch_in_two_pieces_gives_the_bits_of_one(self, case, data):
        batch = case.B + 1
        lengths = data.draw(
            st.lists(st.integers(0, case.T), min_size=batch, max_size=batch).map(tuple), label="lengths"
        )
        case = dataclasses.replace(case, T=case.T + 1, B=batch, batch_first=False, lengths=lengths, R=0)
        cut = data.draw(st.integers(1, case.B - 1), label="cut")
        module = case.module(torch.float32).to(DEVICE)
        x, *states = (value.to(DEVICE, torch.float32) for value in case.inputs())
        ends, cuts = torch.tensor(case.lengths, device=DEVICE), self.draw_resets(case, data)

        def piece(which: slice) -> tuple[Tensor, ...]:
            hx = tuple(state[:, which] for state in states) or None
            own = None if cuts is None else cuts[:, which]
            out, (h_n, c_n) = module(x[:, which], hx, lengths=ends[which], resets=own)
            return out, h_n, c_n

        with kernels(), torch.no_grad():
            whole, left, right = piece(slice(None)), piece(slice(cut)), piece(slice(cut, None))
        for a, b, c in zip(whole, left, right, strict=True):
            assert torch.equal(torch.cat((b, c), 1), a)

    def test_a_neighbours_length_changes_no_bit(self):
        torch.manual_seed(0)
        module, x = tritlstm.LSTM(4, 12, bidirectional=True, device=DEVICE), torch.randn(5, 3, 4, device=DEVICE)
        with kernels(), torch.no_grad():
            one, (h_one, c_one) = module(x, lengths=[4, 5, 0])
            two, (h_two, c_two) = module(x, lengths=[4, 2, 3])
        for a, b in ((one, two), (h_one, h_two), (c_one, c_two)):
            assert torch.equal(a[:, 0], b[:, 0])
