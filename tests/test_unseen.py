"""Where an operator is left out for what it computes: only where nobody but autograd would see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tritlstm
from tritlstm import chain_ops, emulator, functional, ops, stack_ops

T, B, D, H = 3, 2, 4, 5


class Spied(Exception):
    """An operator was called."""


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> Any:
        raise Spied

    for module, name in ((ops, "layer"), (stack_ops, "stack"), (chain_ops, "chains")):
        monkeypatch.setattr(module, f"_{name}", refuse)
        monkeypatch.setattr(module, f"_{name}_backward", refuse)


def arguments(kind: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    lead: dict[str, tuple[int, ...]] = {"layer": (), "stack": (2,), "chains": (2,)}
    first = () if kind == "stack" else lead[kind]
    shapes: list[tuple[int, ...]] = [(T, B, D), (*first, 4 * H, D)]
    shapes += [(1, 4 * H, H)] * (kind == "stack")
    shapes += [(*lead[kind], *shape) for shape in ((4 * H, H), (4 * H,), (4 * H,), (B, H), (B, H))]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)


FUNCTIONS: dict[str, Any] = {"layer": ops.layer, "stack": stack_ops.stack, "chains": chain_ops.chains}
OPERATORS = {name: getattr(torch.ops.tritlstm, name).default for name in FUNCTIONS}
LAST: dict[str, tuple[Any, ...]] = {"layer": (None, False, False), "stack": (None, False), "chains": (None, 1, False)}


def gradients(results: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad([r.square().sum() for r in results[:3]], inputs)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_the_same_bits(kind: str) -> None:
    inputs = arguments(kind)
    expected = OPERATORS[kind](*inputs, *LAST[kind])
    got = FUNCTIONS[kind](*inputs, *LAST[kind])
    assert type(got[0].grad_fn).__name__ == type(expected[0].grad_fn).__name__
    for a, b in zip((*got, *gradients(got, inputs)), (*expected, *gradients(expected, inputs)), strict=True):
        assert torch.equal(a, b)
        assert a._is_view() == b._is_view()
    with torch.no_grad():
        got, expected = FUNCTIONS[kind](*inputs, *LAST[kind]), OPERATORS[kind](*inputs, *LAST[kind])
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_no_operator_is_called(kind: str) -> None:
    inputs = arguments(kind)
    gradients(FUNCTIONS[kind](*inputs, *LAST[kind]), inputs)
    with torch.no_grad():
        FUNCTIONS[kind](*inputs, *LAST[kind])
    with torch.inference_mode():
        FUNCTIONS[kind](*(t.clone() for t in inputs), *LAST[kind])


class Seeing(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("mode", [Seeing, Functions])
def test_modes_see_the_operator(kind: str, mode: type[Any]) -> None:
    inputs = arguments(kind)
    with mode() as here:
        results = FUNCTIONS[kind](*inputs, *LAST[kind])
    assert OPERATORS[kind] in here.seen
    if mode is Seeing:
        with mode() as here:
            gradients(results, inputs)
        assert getattr(torch.ops.tritlstm, f"{kind}_backward").default in here.seen


def test_a_profiler_sees_the_operator() -> None:
    inputs = arguments("layer")
    with torch.autograd.profiler.profile() as profile:
        gradients(ops.layer(*inputs), inputs)
    assert {"tritlstm::layer", "tritlstm::layer_backward"} <= {event.name for event in profile.function_events}


def test_a_tracer_sees_the_operator() -> None:
    inputs = tuple(t.detach() for t in arguments("layer"))
    graph = make_fx(lambda *args: ops.layer(*args)[0])(*inputs)
    assert OPERATORS["layer"] in {node.target for node in graph.graph.nodes}


def test_a_subclass_sees_the_operator() -> None:
    seen = []

    class Sub(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().__torch_function__(func, types, args, kwargs or {})

    x, *rest = (t.detach() for t in arguments("layer"))
    ops.layer(x.as_subclass(Sub), *rest)
    assert OPERATORS["layer"] in seen


@pytest.mark.usefixtures("refusing")
@pytest.mark.parametrize(
    "way", ["negative", "zero", "autocast", "forward mode", "below autograd", "jit", "functionalize"]
)
def test_what_the_dispatcher_is_needed_for(way: str) -> None:
    x = torch.randn(T, B, D)
    assert ops.unseen(x, None, True, 3, torch.nn.Parameter(x))
    if way == "negative":
        assert not ops.unseen(torch.randn(3, dtype=torch.complex64).conj().imag)
    elif way == "zero":
        assert not ops.unseen(torch._efficientzerotensor(3))
    elif way == "autocast":
        with torch.autocast("cpu"):
            assert not ops.unseen(x)
    elif way == "forward mode":
        with torch.autograd.forward_ad.dual_level():
            assert not ops.unseen(x)
    elif way == "below autograd":
        with torch._C._AutoDispatchBelowAutograd():
            assert not ops.unseen(x)
            with torch.no_grad():  # then there is nothing to leave out
                assert ops.unseen(x)
    elif way == "jit":
        found = []
        torch.jit.trace(lambda t: (found.append(ops.unseen(t)), t * 2)[1], x, check_trace=False)
        assert found == [False]
    else:
        found = []
        torch.func.functionalize(lambda t: (found.append(ops.unseen(t)), t * 2)[1])(x)
        assert found == [False]
    assert ops.unseen(x)


def test_a_negative_tensor_is_resolved() -> None:
    x, *rest = (t.detach() for t in arguments("layer"))
    negative = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negative.is_neg()
    assert torch.equal(ops.layer(negative, *rest)[0], ops.layer(x, *rest)[0])


def test_states_of_one_layer_are_no_views() -> None:
    state = torch.randn(B, H)
    joined = functional._joined((state,))
    assert joined.shape == (1, B, H)
    joined.detach_()  # refused for views
    grown = torch.randn(B, H, requires_grad=True) * 2
    assert functional._joined((grown,)).shape == (1, B, H)
    assert grown.shape == (B, H)


@pytest.mark.parametrize("tier", [None, "step"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("steps", "layers", "bias"), [(1, 1, True), (1, 2, True), (3, 1, False), (3, 2, True)])
def test_inference_on_the_kernels_is_the_same_without_operators(
    steps: int, layers: int, bias: bool, dtype: torch.dtype, tier: str | None
) -> None:
    module = tritlstm.LSTM(D, H, layers, bias=bias, dtype=dtype)
    x = torch.randn(steps, B, D).to(dtype)
    hx = (torch.randn(layers, B, H).to(dtype), torch.randn(layers, B, H).to(dtype))
    lengths = torch.tensor([steps, steps - 1])
    overrides = {} if tier is None or steps == 1 else {"tier": tier}
    with emulator.emulate(**overrides), torch.no_grad():
        for given in (None, lengths):
            out, states = module(x, hx, lengths=given)
            with Functions() as mode:
                expected, expected_states = module(x, hx, lengths=given)
            assert OPERATORS["layer"] in mode.seen or OPERATORS["stack"] in mode.seen
            for a, b in zip((out, *states), (expected, *expected_states), strict=True):
                assert torch.equal(a, b)
                assert a.dtype == dtype
                assert not a._is_view()
