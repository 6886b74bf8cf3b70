"""`tritlstm.cpu`, the in-place layer with an explicit backward: its numbers, and where training on the CPU runs it."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import tritlstm
from tritlstm import aten, cpu, explain, functional, ops, reference
from tritlstm.cell_options import PLAIN

NAMES = ("out", "h_n", "c_n", "gates", "cells")
GRADIENTS = ("x", "w_ih", "w_hh", "b", "h0", "c0", "gate0")
LENGTHS = {
    "none": None,
    "equal": [6] * 5,
    "mixed": [4, 6, 1, 3, 6],
    "some empty": [0, 5, 2, 0, 3],
    "all empty": [0] * 5,
}


def draw(dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * 0.7).to(dtype)


def close(got: Tensor, wanted: Tensor, name: str, tolerance: float) -> None:
    assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype), name
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("more", ["", "resets", "gate0", "resets gate0"])
@pytest.mark.parametrize("H", [4, 9])
def test_it_computes_what_the_formula_says(reverse, kind, more, H):
    torch.manual_seed(0)
    T, B, D = 6, 5, 3
    dtype = torch.float64
    x, w_ih, w_hh = draw(dtype, T, B, D), draw(dtype, 4 * H, D), draw(dtype, 4 * H, H)
    biases, states = (draw(dtype, 4 * H), draw(dtype, 4 * H)), (draw(dtype, B, H), draw(dtype, B, H))
    ends = None if LENGTHS[kind] is None else torch.tensor(LENGTHS[kind], dtype=torch.int32)
    gate0 = draw(dtype, B, 4 * H) if "gate0" in more else None
    cell = PLAIN._replace(resets=torch.rand(T, B) < 0.3) if "resets" in more else PLAIN
    args = (x, w_ih, w_hh, *biases, *states, ends, reverse, True, gate0, cell)
    got, wanted = cpu.forward(*args), aten.forward(*args)
    inside = torch.ones(T, B) if ends is None else torch.arange(T)[:, None] < ends
    for name, a, b in zip(NAMES, got, wanted, strict=True):
        if name in ("gates", "cells"):  # without meaning past an end
            assert torch.isfinite(a).all()
            a, b = a * inside[..., None], b * inside[..., None]
        close(a, b, name, 1e-12)

    grads = (draw(dtype, T, B, H), draw(dtype, B, H), draw(dtype, B, H))
    kept = [t.clone() for t in got]
    for given in (grads, (grads[0], None, None), (None, *grads[1:]), (None, None, None)):
        saved = (got[0], got[3], got[4])
        args = (*given, x, w_ih, w_hh, *states, ends, *saved, reverse, (True,) * 7, cell)
        for name, a, b in zip(GRADIENTS, cpu.backward(*args), aten.backward(*args), strict=True):
            close(a, b, name, 1e-12)
    assert all(torch.equal(a, b) for a, b in zip(kept, got, strict=True)), "backward may not write what was saved"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_dtype_is_within_its_roundings(dtype):
    # h is rounded to the dtype in every step; forward, half an ulp of 1 or so a step that the recurrence passes on.
    torch.manual_seed(0)
    T, B, D, H = 12, 4, 5, 16
    x, w_ih, w_hh, b = (draw(dtype, *s) * 0.5 for s in ((T, B, D), (4 * H, D), (4 * H, H), (4 * H,)))
    h0, c0 = draw(dtype, B, H), draw(torch.float32, B, H)
    wide = [t.double() for t in (x, w_ih, w_hh, b, b, h0, c0)]
    out, h_n, c_n, *_ = cpu.forward(x, w_ih, w_hh, b, b, h0, c0, None, False, True)
    expected = aten.forward(*wide, None, False, True)
    assert (out.dtype, h_n.dtype, c_n.dtype) == (dtype, dtype, torch.float32)
    for got, want in zip((out, h_n, c_n), expected, strict=False):
        assert (got.double() - want).abs().max() < 4 * torch.finfo(dtype).eps * max(1.0, want.abs().max().item())


def test_the_reference_agrees():
    rng = np.random.default_rng(0)
    T, B, D, H = 5, 3, 4, 6
    x, w_ih, w_hh, b = (rng.standard_normal(s) for s in ((T, B, D), (4 * H, D), (4 * H, H), (4 * H,)))
    h0, c0 = (rng.standard_normal((B, H)) for _ in range(2))
    expected = reference.forward(x, w_ih, w_hh, b, np.zeros_like(b), h0, c0)
    given = (torch.from_numpy(a) for a in (x, w_ih, w_hh, b, np.zeros_like(b), h0, c0))
    out, h_n, c_n, *_ = cpu.forward(*given, None, False, False)
    for got, want in ((out, expected.h), (h_n, expected.h[-1]), (c_n, expected.c[-1])):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-12)


def test_padding_and_states_before_a_reset_have_no_influence():
    torch.manual_seed(0)
    dtype, nan = torch.float64, float("nan")
    ends, resets = torch.tensor([2, 4], dtype=torch.int32), torch.zeros(4, 2, dtype=torch.bool)
    resets[0, 1] = True
    x, h0 = draw(dtype, 4, 2, 3), draw(dtype, 2, 5)
    weights = (draw(dtype, 20, 3), draw(dtype, 20, 5), None, None)
    results = []
    for poison in (0.0, nan):
        x[2:, 0], h0[1] = poison, poison
        cell = PLAIN._replace(resets=resets)
        out, h_n, c_n, gates, cells = cpu.forward(x, *weights, h0, h0, ends, False, True, None, cell)
        grads = cpu.backward(out, h_n, c_n, x, *weights[:2], h0, h0, ends, out, gates, cells, False, (True,) * 7, cell)
        results.append((out, h_n, c_n, *grads))
    for one, two in zip(*results, strict=True):
        assert torch.isfinite(one).all()
        assert torch.equal(one, two)


def test_variants_of_the_cell_go_to_the_formula(monkeypatch):
    called = []
    forward = aten.forward
    monkeypatch.setattr(aten, "forward", lambda *args: called.append(args) or forward(*args))
    x = torch.randn(3, 2, 4)
    tritlstm.LSTM(4, 4, peephole=True)(x)
    tritlstm.LSTM(4, 4, recompute=True)(x)
    assert len(called) == 2
    tritlstm.LSTM(4, 4)(x, resets=torch.zeros(3, 2, dtype=torch.bool))
    assert len(called) == 2


# Where it runs


def of_lengths(steps: int = 24, features: int = 5, dtype: torch.dtype = torch.float32) -> PackedSequence:
    lengths = torch.tensor([steps, 3, steps - 4, 1, 9])
    return pack_padded_sequence(torch.randn(steps, 5, features, dtype=dtype), lengths, enforce_sorted=False)


@pytest.fixture
def torchs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of torch's own LSTM."""
    calls: list[Any] = []
    lstm = functional._VF.lstm
    monkeypatch.setattr(functional._VF, "lstm", lambda *args: calls.append(args) or lstm(*args), raising=False)
    return calls


def test_the_rule():
    sizes = torch.tensor([3] * 23 + [2])
    assert cpu.packed_pays(sizes)
    assert not cpu.packed_pays(sizes[1:])
    assert not cpu.packed_pays(torch.tensor([3] * 30))
    x = torch.zeros(1, 1, 1)
    assert cpu.few_rows_pay(1, 48, x, 256, 256)
    assert not cpu.few_rows_pay(1, 49, x, 256, 256)
    assert not cpu.few_rows_pay(1, 1, x, 255, 256)
    assert cpu.few_rows_pay(8, 16, x, 512, 512)
    assert not cpu.few_rows_pay(9, 16, x, 512, 512)
    assert not cpu.few_rows_pay(32, 1, x, 4096, 4096)
    assert not cpu.few_rows_pay(1, 1, x.bfloat16(), 512, 512)
    assert not cpu.few_rows_pay(1, 0, x[:, :0], 512, 512)


@pytest.mark.parametrize("kind", ["packed", "lengths", "few rows", "resets"])
def test_a_training_step_runs_it_and_nothing_else_does(torchs, kind):
    module = tritlstm.LSTM(512 if kind == "few rows" else 5, 512 if kind == "few rows" else 6)
    more: dict[str, Any] = {}
    if kind == "packed":
        x: Any = of_lengths()
    else:
        x = torch.randn((2, 1, 512) if kind == "few rows" else (24, 5, 5))
        more = {"lengths": [24, 3, 7, 1, 9]} if kind == "lengths" else more
    if kind == "resets":
        more = {"resets": torch.zeros(24, 5, dtype=torch.bool)}
    module(x, **more)
    assert torchs == []
    assert explain(module, x, **more).path == "aten"
    if kind == "resets":
        return

    def runs_torchs() -> None:
        before = len(torchs)
        module(x, **more)
        assert len(torchs) == before + 1
        assert explain(module, x, **more).path == "torch"

    with torch.no_grad():
        runs_torchs()
    with torch.autocast("cpu"):
        before = len(torchs)
        module(x, **more)
        assert len(torchs) == before + 1
    module.eval()
    runs_torchs()
    module.train().requires_grad_(False)
    runs_torchs()


def test_evaluation_gives_torchs_bits():
    theirs = nn.LSTM(5, 6, 2, bidirectional=True).eval()
    mine = tritlstm.swap(copy.deepcopy(theirs))
    x = of_lengths()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            (a, (h, c)), (b, (h2, c2)) = mine(x), theirs(x)
            assert all(torch.equal(p, q) for p, q in ((a.data, b.data), (h, h2), (c, c2)))


def gradients(module: nn.Module, x: Any, hx: Any, upstream: Tensor) -> list[Tensor]:
    out, (h_n, c_n) = module(x, hx)
    data = out.data if isinstance(out, PackedSequence) else out
    loss = (data * upstream).sum() + h_n.sum() + (c_n * c_n).sum()
    asked = [x.data if isinstance(x, PackedSequence) else x, *hx, *module.parameters()]
    return [data, h_n, c_n, *torch.autograd.grad(loss, asked)]


@pytest.mark.parametrize("kind", ["packed", "few rows"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}, {"dropout": 0.4}])
def test_training_is_within_twice_torchs_error(torchs, kind, options):
    torch.manual_seed(0)
    D = H = 12 if kind == "packed" else 256
    options = {"num_layers": 2, **options} if "dropout" in options else options
    theirs = nn.LSTM(D, H, **options)
    mine, exact = tritlstm.swap(copy.deepcopy(theirs)), copy.deepcopy(theirs).double()
    x: Any = of_lengths(40, D) if kind == "packed" else torch.randn(2, 3, D)
    x.data.requires_grad_()
    rows, batch = theirs.num_layers * (2 if theirs.bidirectional else 1), 5 if kind == "packed" else 3
    hx = tuple(torch.randn(rows, batch, H, requires_grad=True) for _ in range(2))
    upstream = torch.randn(*x.data.shape[:-1], H * (2 if theirs.bidirectional else 1))

    def run(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
        torch.manual_seed(1)  # the dropout of all three is the same, where it is drawn in the same dtype
        own = tuple(h.detach().to(dtype).requires_grad_() for h in hx)
        cast = x.to(dtype) if isinstance(x, PackedSequence) else x.detach().to(dtype)
        cast.data.requires_grad_()
        return gradients(module, cast, own, upstream.to(dtype))

    by_torch = run(theirs, torch.float32)
    torchs.clear()
    got = run(mine, torch.float32)
    assert torchs == []
    if "dropout" in options:  # float64 draws other numbers: torch's float32 is the measure
        for a, b in zip(got, by_torch, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
        return
    for a, b, c in zip(got, by_torch, run(exact, torch.float64), strict=True):
        largest = c.abs().max()
        budget = 2 * (b.double() - c).abs().max() + torch.finfo(torch.float32).eps / 2 * largest
        assert (a.double() - c).abs().max() <= budget


def test_it_is_an_operator_of_every_transform(torchs):
    torch.manual_seed(0)
    module = tritlstm.LSTM(2, 3).double()
    x = of_lengths(24, 2, torch.float64)
    weights = dict(module.named_parameters())

    def loss(weights: Any) -> Tensor:
        out, (h_n, _) = torch.func.functional_call(module, weights, (x,))
        return (out.data**2).sum() + h_n.sum()

    by_func = torch.func.grad(loss)(weights)
    by_autograd = torch.autograd.grad(loss(weights), list(weights.values()), create_graph=True)
    for a, b in zip(by_func.values(), by_autograd, strict=True):
        torch.testing.assert_close(a, b)
    second = torch.autograd.grad(sum((g**2).sum() for g in by_autograd), list(weights.values()))
    assert torchs == []
    theirs = nn.LSTM(2, 3).double()
    theirs.load_state_dict(module.state_dict())
    first = torch.autograd.grad(
        (lambda out, states: (out.data**2).sum() + states[0].sum())(*theirs(x)),
        list(theirs.parameters()),
        create_graph=True,
    )
    expected = torch.autograd.grad(sum((g**2).sum() for g in first), list(theirs.parameters()))
    for a, b in zip((*by_autograd, *second), (*first, *expected), strict=True):
        torch.testing.assert_close(a, b)


def test_packed_data_come_back_as_they_went_in():
    module = tritlstm.LSTM(5, 6)
    x = of_lengths()
    out, (h_n, c_n) = module(x)
    assert torch.equal(out.batch_sizes, x.batch_sizes)
    padded, ends = pad_packed_sequence(out)
    assert all(torch.equal(padded[n - 1, b], h_n[0, b]) for b, n in enumerate(ends.tolist()))
    again, states = module(pad_packed_sequence(x)[0], lengths=ends)
    torch.testing.assert_close(again, padded)
    torch.testing.assert_close(states, (h_n, c_n))
    assert ops._engine(x.data) is cpu
