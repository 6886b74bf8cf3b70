"""Drawn sizes, flags and lengths: reference = torch's path = operators = emulated kernels; and the bits of a split.

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
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tritlstm
from tritlstm import emulator, functional, ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclasses.dataclass(frozen=True)
class Case:
    """What was drawn; `lengths` None for none."""

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

    def module(self, dtype: torch.dtype) -> tritlstm.LSTM:
        torch.manual_seed(self.T + 10 * self.H)
        kind = {"bias": self.bias, "batch_first": self.batch_first, "bidirectional": self.bidirectional}
        return tritlstm.LSTM(self.D, self.H, self.layers, **kind, dtype=dtype)

    def inputs(self) -> list[Tensor]:
        """x [T, B, D] and, where asked for, h_0 and c_0, in float64 of float32's values."""
        generator = torch.Generator().manual_seed(self.D)
        state = (self.layers * (1 + self.bidirectional), self.B, self.H)
        shapes = [(self.T, self.B, self.D), *([state, state] if self.states else [])]
        return [torch.randn(shape, generator=generator).double() for shape in shapes]


@st.composite
def cases(draw: Callable[..., Any], T: int = 6, B: int = 4, D: int = 5, H: int = 9, layers: int = 2) -> Case:
    steps, batch = draw(st.integers(1, T)), draw(st.integers(1, B))
    lengths = draw(st.none() | st.lists(st.integers(0, steps), min_size=batch, max_size=batch).map(tuple))
    sizes = draw(st.integers(1, D)), draw(st.integers(1, H)), draw(st.integers(1, layers))
    return Case(steps, batch, *sizes, *(draw(st.booleans()) for _ in range(4)), lengths)


def loss_weights(results: list[np.ndarray]) -> list[np.ndarray]:
    return [np.cos(np.arange(r.size)).reshape(r.shape) for r in results]


def by_reference(case: Case) -> dict[str, np.ndarray]:
    """Results [T, B, ...] and every gradient of the sum of the results weighed by `loss_weights`."""
    module = case.module(torch.float32)
    weights = {name: value.detach().double().numpy() for name, value in module.named_parameters()}
    x, *states = (value.numpy() for value in case.inputs())
    S, H = 1 + case.bidirectional, case.H
    h0, c0 = states or (np.zeros((case.layers * S, case.B, H)) for _ in range(2))
    lengths = case.lengths or (case.T,) * case.B
    out = np.zeros((case.T, case.B, S * H))
    h_n, c_n, traces = h0.copy(), c0.copy(), {}
    for b, n in enumerate(lengths):
        values = x[:n, b : b + 1]
        for layer in range(case.layers):
            outs = []
            for s in range(S):
                k, flip = layer * S + s, slice(None, None, -1 if s else 1)
                w = [
                    weights.get(f"{name}_l{layer}{'_reverse' * s}")
                    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                ]
                trace = reference.forward(values[flip], *w, h0[k, b : b + 1], c0[k, b : b + 1])
                traces[b, k] = trace
                h_n[k, b], c_n[k, b] = trace.h_n[0], trace.c_n[0]
                outs.append(trace.h[flip])
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
                got = reference.backward(
                    traces[b, k], upstream[..., s * H : (s + 1) * H][flip], grad_h[k, b : b + 1], grad_c[k, b : b + 1]
                )
                below = below + got.x[flip]
                grads["weight_ih" + suffix] += got.w_ih
                grads["weight_hh" + suffix] += got.w_hh
                for name in ("bias_ih", "bias_hh") if case.bias else ():
                    grads[name + suffix] += got.b
                grads["h0"][k, b], grads["c0"][k, b] = got.h0[0], got.c0[0]
            upstream = below
        grads["x"][:n, b : b + 1] = upstream
    if not states:
        del grads["h0"], grads["c0"]
    return {**results, **{f"gradient of {name}": value for name, value in grads.items()}}


def by_module(case: Case, dtype: torch.dtype, device: str = "cpu") -> dict[str, np.ndarray]:
    module = case.module(torch.float32).to(device, dtype)
    leaves = [value.to(device, dtype).requires_grad_() for value in case.inputs()]
    x = leaves[0].transpose(0, 1) if case.batch_first else leaves[0]
    lengths = None if case.lengths is None else torch.tensor(case.lengths, device=device)
    out, (h_n, c_n) = module(x, tuple(leaves[1:]) or None, lengths=lengths)
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
def test_torchs_path_is_the_reference(case):
    assert_same(by_module(case, torch.float64), by_reference(case), 1e-10)


@given(cases())
@settings(max_examples=60)
def test_the_operators_are_the_reference(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "runs_kernels", lambda x: True)
        assert_same(by_module(case, torch.float64), by_reference(case), 1e-10)


def kernels() -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if DEVICE == "cuda" else emulator.emulate(sms=4)


@given(cases(T=4, B=3, H=20, layers=1))
@settings(max_examples=8)
def test_the_kernels_are_the_reference(case):
    with kernels():
        got = by_module(case, torch.float32, DEVICE)
    # float32: some hundred products of order one in the largest sum.
    assert_same(got, by_reference(case), 2e-5)


class TestSplits:
    """The promise of docs/variable-length.md: the same bits, where both runs have the same tiles."""

    @given(cases(T=5, B=3, H=12, layers=1), st.data())
    @settings(max_examples=4)
    def test_a_sequence_in_two_pieces_gives_the_bits_of_one(self, case, data):
        case = dataclasses.replace(case, T=case.T + 3, bidirectional=False, batch_first=False, lengths=None)
        cut = data.draw(st.integers(2, case.T - 2), label="cut")
        module = case.module(torch.float32).to(DEVICE)
        x, *states = (value.to(DEVICE, torch.float32) for value in case.inputs())
        with kernels(), torch.no_grad():
            out, last = module(x, tuple(states) or None)
            first, carried = module(x[:cut], tuple(states) or None)
            second, last_of_two = module(x[cut:], carried)
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
        case = dataclasses.replace(case, T=case.T + 1, B=batch, batch_first=False, lengths=lengths)
        cut = data.draw(st.integers(1, case.B - 1), label="cut")
        module = case.module(torch.float32).to(DEVICE)
        x, *states = (value.to(DEVICE, torch.float32) for value in case.inputs())
        ends = torch.tensor(case.lengths, device=DEVICE)

        def piece(which: slice) -> tuple[Tensor, ...]:
            hx = tuple(state[:, which] for state in states) or None
            out, (h_n, c_n) = module(x[:, which], hx, lengths=ends[which])
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
