"""Layers that run without an operator each (`tritlstm.direct`): one node of autograd, the same derivatives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import tritlstm
from tritlstm import direct, emulator, functional, layer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, D, H = 3, 5, 12
ALL = ("out", "h_n", "c_n")


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with contextlib.nullcontext() if DEVICE == "cuda" else emulator.emulate():
        yield


class Looking(TorchFunctionMode):
    """Who looks on sees an operator for each layer."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Case:
    """A module with the tensors that it has gradients for; the same numbers in every case of a size."""

    def __init__(self, kind: Any, steps: int, layers: int, dtype: torch.dtype, device: str, **options: Any) -> None:
        torch.manual_seed(0)
        self.module = kind(D, H, layers, **options)
        tensors = (torch.randn(steps, B, D), torch.randn(layers, B, H) / 2, torch.randn(layers, B, H) / 2)
        self.module.to(device, dtype)
        self.inputs = [t.to(device, dtype).requires_grad_() for t in tensors]

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.inputs, *self.module.parameters()]

    def __call__(self, used: Sequence[str] = ALL) -> list[Tensor]:
        x, h0, c0 = self.inputs
        out, (h_n, c_n) = self.module(x, (h0, c0))
        return [dict(zip(ALL, (out, h_n, c_n), strict=True))[name] for name in used]


def mine(steps: int, layers: int, **options: Any) -> Case:
    return Case(tritlstm.LSTM, steps, layers, torch.float32, DEVICE, **options)


def torchs(steps: int, layers: int, **options: Any) -> Case:
    return Case(nn.LSTM, steps, layers, torch.float64, "cpu", **options)


def weighted(results: Sequence[Tensor]) -> Tensor:
    parts = (torch.linspace(1, -1, r.numel()).to(r).view(r.shape) * r for r in results)
    return torch.stack([part.sum() for part in parts]).sum()


def assert_close(got: Sequence[Tensor | None], expected: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a is not None
        torch.testing.assert_close(a.detach().cpu().double(), b.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("unpacked", [0, layer.UNPACKED], ids=["packed", "unpacked"])
@pytest.mark.parametrize("used", [ALL, ("out",), ("h_n",), ("c_n",)], ids="+".join)
@pytest.mark.parametrize(("steps", "layers", "bias"), [(1, 1, True), (1, 3, True), (1, 2, False), (4, 1, True)])
def test_results_and_gradients(
    steps: int, layers: int, bias: bool, used: Sequence[str], unpacked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer, "UNPACKED", unpacked)
    case, exact = mine(steps, layers, bias=bias), torchs(steps, layers, bias=bias)
    results, expected = case(used), exact(used)
    assert_close(results, expected)
    assert {type(r.grad_fn).__name__ for r in results} == {"_LayersBackward"}
    assert not any(r._is_view() for r in results)
    got = torch.autograd.grad(weighted(results), case.leaves)
    assert_close(got, torch.autograd.grad(weighted(expected), exact.leaves))
    assert all(g.is_contiguous() for g in got)
    assert len({g.data_ptr() for g in got}) == len(got)


@pytest.mark.parametrize("frozen", ["weight_hh_l0", "bias_ih_l1", "bias_hh_l1", "l0", "l1", "weight", "inputs"])
def test_only_what_needs_a_gradient(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, exact = mine(1, 2), torchs(1, 2)
    for each in (case, exact):
        for name, parameter in each.module.named_parameters():
            parameter.requires_grad_(frozen not in name)
        for t in each.inputs:
            t.requires_grad_(frozen not in ("l0", "inputs"))
    saves = []
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *args, **more: saves.append(args[9]) or forward(*args, **more))
    loss = weighted(case())
    assert saves == [frozen != "l0", True]
    got, expected = (
        torch.autograd.grad(value, [leaf for leaf in each.leaves if leaf.requires_grad])
        for value, each in ((loss, case), (weighted(exact()), exact))
    )
    assert_close(got, expected)


def test_weights_of_layers_that_learn_nothing_may_change() -> None:
    case = mine(1, 2)
    for t in case.inputs:
        t.requires_grad_(False)
    for name, parameter in case.module.named_parameters():
        parameter.requires_grad_("l1" in name)
    loss = weighted(case())
    with torch.no_grad():
        case.module.weight_hh_l0.zero_()
    loss.backward()


@pytest.mark.parametrize(("steps", "layers"), [(1, 1), (1, 2), (3, 1)])
def test_derivatives_of_the_gradient(steps: int, layers: int) -> None:
    found = []
    for case in (mine(steps, layers), torchs(steps, layers)):
        first = torch.autograd.grad(weighted(case()), case.leaves, create_graph=True)
        second = torch.autograd.grad(weighted([g.square() for g in first]), case.leaves)
        found.append((*first, *second))
    assert_close(*found, tolerance=1e-4)


def test_many_gradients_at_once() -> None:
    case, exact = mine(1, 2), torchs(1, 2)
    vectors = torch.randn(3, 1, B, H)
    got, expected = (
        torch.autograd.grad(each(["out"]), each.leaves, [vectors.to(each.inputs[0])], is_grads_batched=True)
        for each in (case, exact)
    )
    assert_close(got, expected)


def test_a_gradient_in_forward_mode() -> None:
    case, exact = mine(1, 2), torchs(1, 2)
    vector, tangent = torch.randn(2, 1, B, H)
    found = []
    for each in (case, exact):
        (out,) = each(["out"])
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(vector.to(out), tangent.to(out))
            grads = torch.autograd.grad(out, each.leaves, dual)
            found.append([t for g in grads for t in torch.autograd.forward_ad.unpack_dual(g)])
    assert_close(*found)


@pytest.mark.parametrize(("steps", "layers"), [(1, 2), (3, 1)])
def test_the_same_bits_as_with_operators(steps: int, layers: int) -> None:
    case = mine(steps, layers)
    results = case()
    with Looking():
        seen = case()
    assert "_LayersBackward" not in {type(r.grad_fn).__name__ for r in seen}
    got, expected = (torch.autograd.grad(weighted(r), case.leaves) for r in (results, seen))
    for a, b in zip((*results, *got), (*seen, *expected), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layers", [1, 2])
def test_inference(layers: int) -> None:
    case = mine(1, layers)
    with torch.no_grad():
        expected = case()
    with torch.inference_mode():
        got = case()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
        assert not a._is_view()
        assert a.is_inference()
        assert a.grad_fn is b.grad_fn is None


def test_a_second_backward() -> None:
    case = mine(1, 2)
    loss = weighted(case())
    first = torch.autograd.grad(loss, case.leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, case.leaves), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(loss, case.leaves)


def test_saved_tensors_are_seen_by_hooks_and_checked() -> None:
    case, moved = mine(1, 2), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: moved.append(t) or t.clone(), lambda t: t):
        results = case()
    assert len(moved) == 2 + 8 + 1 + 2 * 3  # states, weights, input, and of each layer out, gates and cells
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(weighted(results), case.leaves))
    (out,) = case(["out"])
    changed = weighted([out])
    with torch.no_grad():
        out.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(changed, case.leaves)


def test_gradients_of_both_biases_do_not_share_memory() -> None:
    case = mine(1, 1)
    weighted(case()).backward()
    b_ih, b_hh = case.module.bias_ih_l0.grad, case.module.bias_hh_l0.grad
    before = b_hh.clone()
    assert torch.equal(b_ih, before)
    b_ih.zero_()
    assert torch.equal(b_hh, before)


def test_lengths() -> None:
    case, lengths = mine(4, 1), torch.tensor([4, 2, 0])
    x, h0, c0 = case.inputs
    found = []
    for mode in (contextlib.nullcontext(), Looking()):
        with mode:
            out, (h_n, c_n) = case.module(x, (h0, c0), lengths=lengths.to(DEVICE))
        found.append((out, h_n, c_n, *torch.autograd.grad(weighted([out, h_n, c_n]), case.leaves)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, 1), ({"bidirectional": True}, 0), ({"proj_size": 4}, 0), ({"num_layers": 2, "dropout": 0.5}, 0)],
)
def test_who_runs_so(options: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = direct.run
    monkeypatch.setattr(functional.direct, "run", lambda *args: calls.append(args) or run(*args))
    module = tritlstm.LSTM(D, H, device=DEVICE, **options)
    module(torch.randn(2, B, D, device=DEVICE))
    assert len(calls) == expected
