"""The operators `torch.ops.tritlstm.stack` and `stack_backward`: layers of one direction in one call.

    stack(x, w_ih, w_between, w_hh, b_ih, b_hh, h0, c0, lengths, save) -> (out, h_n, c_n, hidden, gates, cells)
    stack_backward(grad_out, grad_h_n, grad_c_n, x, w_ih, w_between, w_hh, h0, c0, lengths, hidden, gates, cells, needs)
        -> (grad_x, grad_w_ih, grad_w_between, grad_w_hh, grad_b, grad_h0, grad_c0)

L layers of H units, L at least 2; dtypes, devices, `lengths` and `save` as of `tritlstm.ops`.

    x        [T, B, D]    w_ih [4H, D] of the first layer    w_between [L - 1, 4H, H]: w_ih of the others
    w_hh     [L, 4H, H]   b_ih, b_hh [L, 4H] or None         h0, c0 [L, B, H]
    out      [T, B, H] of the last layer    h_n, c_n [L, B, H]
    hidden   [L, T, B, HX], gates [L, T, B, 4 HX] and cells [L, T, B, HX], for backward alone, which knows their order
             in memory; empty(0) where nothing is saved
    needs    seven flags, one per result

Where the kernels run and the planner says so, the layers run together (`tritlstm.stack`), elsewhere one after another;
so they do in `stack` (the function) inside torch.func's transforms and in forward mode, and for the derivatives of a
gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import aten, batching, ops

__all__ = ["next_layers", "stack"]

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_GIVEN = 8  # tensors that may have a gradient: x, w_ih, w_between, w_hh, b_ih, b_hh, h0, c0

_library = torch.library.Library("tritlstm", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "stack(Tensor x, Tensor w_ih, Tensor w_between, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor h0, Tensor c0, "
    "Tensor? lengths, bool save) "
    "-> (Tensor out, Tensor h_n, Tensor c_n, Tensor hidden, Tensor gates, Tensor cells)",
    tags=_tags,
)
_library.define(
    "stack_backward(Tensor? grad_out, Tensor? grad_h_n, Tensor? grad_c_n, Tensor x, Tensor w_ih, Tensor w_between, "
    "Tensor w_hh, Tensor h0, Tensor c0, Tensor? lengths, Tensor hidden, Tensor gates, Tensor cells, bool[7] needs) "
    "-> (Tensor grad_x, Tensor grad_w_ih, Tensor grad_w_between, Tensor grad_w_hh, Tensor grad_b, Tensor grad_h0, "
    "Tensor grad_c0)",
    tags=_tags,
)
_stack = torch.ops.tritlstm.stack.default
_stack_backward = torch.ops.tritlstm.stack_backward.default


def next_layers(x: Tensor, layers: int, hidden: int, training: bool) -> int:
    """How many of the next ``layers`` the operator should run together; 1: it is of no use.

    A compiler that traces can't ask for a plan, which depends on the sizes: there, layers go one after another.
    """
    if torch.compiler.is_compiling() or x.size(0) == 1 or not ops.runs_kernels(x) or x.size(1) == 0:
        return 1
    if torch._C._are_functorch_transforms_active() or ops.forward_mode():
        return 1
    from . import stack as engine

    return engine.next_layers(x.size(0), x.size(1), layers, hidden, x, training)


def stack(
    x: Tensor,
    w_ih: Tensor,
    w_between: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None = None,
    save: bool = False,
) -> Results:
    """`torch.ops.tritlstm.stack`, which also works inside torch.func's transforms and forward mode."""
    args = (x, w_ih, w_between, w_hh, b_ih, b_hh, h0, c0, lengths, save)
    compiling = torch.compiler.is_compiling()
    if not compiling and ops.unseen(*args):
        return ops.run_unseen(_forward, _RecordedStack, args, -1)
    if not compiling and (torch._C._are_functorch_transforms_active() or ops.forward_mode()):
        return _composed(*args)
    return _stack(*args)


def _composed(*args: Any, run: Any = ops.layer) -> Results:
    """The same, layer by layer."""
    x, w_ih, w_between, w_hh, b_ih, b_hh, h0, c0, lengths, save = args
    found = []
    for k in range(len(w_hh)):
        biases = [None if b is None else b[k] for b in (b_ih, b_hh)]
        w = w_ih if k == 0 else w_between[k - 1]
        results = run(x, w, w_hh[k], *biases, h0[k], c0[k], lengths, False, save, None)
        x = results[0]
        found.append(results)
    outs, h_n, c_n, gates, cells = zip(*found, strict=True)
    if not save:
        return x, torch.stack(h_n), torch.stack(c_n), *(x.new_empty(0) for _ in range(2)), cells[0].new_empty(0)
    width = _padded(h0.size(2))
    hidden = torch.nn.functional.pad(torch.stack(outs), (0, width - h0.size(2)))
    return x, torch.stack(h_n), torch.stack(c_n), hidden, torch.stack(gates), torch.stack(cells)


def _padded(hidden: int) -> int:
    return (hidden + aten.GROUP - 1) // aten.GROUP * aten.GROUP


def _engine(x: Tensor, layers: int, hidden: int, training: bool) -> Any:
    """The module that computes all layers together, or None where they go one after another."""
    if not ops.launches(x):
        return None
    from . import stack as engine

    way = engine.way(x.size(0), x.size(1), layers, hidden, x, training).way
    return None if way == "apart" else engine


def _forward(*args: Any) -> tuple[Tensor, ...]:
    _check(*args)
    x, w_hh, c0, save = args[0], args[3], args[7], args[-1]
    engine = _engine(x, len(w_hh), w_hh.size(2), save)
    if engine is not None:
        return engine.forward(*args)
    out, h_n, c_n, *saved = _composed(*args, run=ops._engine(x).forward)
    return out.clone(), h_n, c_n.to(c0.dtype), *saved


def _backward(*args: Any) -> tuple[Tensor, ...]:
    grad_out, grad_h_n, grad_c_n, x, w_ih, w_between, w_hh, h0, c0, lengths, hidden, gates, cells, needs = args
    layers, _, size = w_hh.shape
    engine = _engine(x, layers, size, True)
    if engine is not None:
        return engine.backward(*args)
    one = ops._engine(x)
    outs = hidden[..., :size].contiguous()
    found: list[tuple[Tensor, ...]] = []
    for k in reversed(range(layers)):
        below, w = (x, w_ih) if k == 0 else (outs[k - 1], w_between[k - 1])
        need_w = needs[1] if k == 0 else needs[2]
        states = (None if g is None else g[k] for g in (grad_h_n, grad_c_n))
        saved = (outs[k], gates[k], cells[k], False)
        own = (k > 0 or needs[0], need_w, *needs[3:], False)
        results = one.backward(grad_out, *states, below, w, w_hh[k], h0[k], c0[k], lengths, *saved, own)
        grad_out = results[0]
        found.insert(0, results)
    d_x, d_w, *others = zip(*(results[:6] for results in found), strict=True)
    between = torch.stack(d_w[1:]) if needs[2] else x.new_empty(0)
    stacked = (torch.stack(d) if need else x.new_empty(0) for d, need in zip(others, needs[3:], strict=True))
    return d_x[0], d_w[0], between, *stacked


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    _check(*args)
    x, h0, c0, save = args[0], args[6], args[7], args[-1]
    (steps, batch, _), (layers, _, size) = x.shape, h0.shape
    width = _padded(size)
    shapes = [(layers, steps, batch, n * width) if save else (0,) for n in (1, 4, 1)]
    return (
        x.new_empty(steps, batch, size),
        x.new_empty(layers, batch, size),
        c0.new_empty(layers, batch, size),
        x.new_empty(shapes[0]),
        x.new_empty(shapes[1]),
        x.new_empty(shapes[2], dtype=aten.state_dtype(x.dtype)),
    )


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    x, w_ih, w_between, w_hh, h0, c0 = args[3:9]
    like = (x, w_ih, w_between, w_hh, w_hh.new_empty(w_hh.shape[:2]), h0, c0)
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip(like, args[-1], strict=True))


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return ops.below_autograd(_stack, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, _ = inputs
        _, _, _, hidden, gates, cells = output
        ctx.mark_non_differentiable(hidden, gates, cells)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, hidden, gates, cells)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *given, lengths, hidden, gates, cells = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():  # someone may differentiate the gradient
            return (*_differentiable(grads[:3], given, lengths, needed), None, None)
        x, w_ih, w_between, w_hh, _, _, h0, c0 = given
        needs = (*needed[:4], needed[4] or needed[5], *needed[6:_GIVEN])
        inputs = (*grads[:3], x, w_ih, w_between, w_hh, h0, c0, lengths, hidden, gates, cells)
        results = ops.run_backward(_backward, _stack_backward, inputs, needs)
        *before, d_b, d_h0, d_c0 = (r if need else None for r, need in zip(results, needs, strict=True))
        return (*before, *ops.of_both_biases(d_b, *needed[4:6]), d_h0, d_c0, None, None)


_RecordedStack = ops.recorder(_Stack, _forward)


def _differentiable(
    grads: Sequence[Tensor | None], given: Sequence[Tensor | None], lengths: Tensor | None, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients by `_composed`, as functions of the inputs and of ``grads``."""
    asked = [k for k, value in enumerate(given) if value is not None and needed[k]]
    results = _composed(*given, lengths, True)[:3]
    pairs = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    found: list[Tensor | None] = [None] * len(given)
    if asked and pairs:
        outputs, seeds = zip(*pairs, strict=True)
        inputs: Any = [given[k] for k in asked]
        gradients = torch.autograd.grad(outputs, inputs, seeds, create_graph=True, allow_unused=True)
        for k, gradient in zip(asked, gradients, strict=True):
            found[k] = gradient
    return found


class _StackBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return ops.below_autograd(_stack_backward, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "tritlstm: torch.ops.tritlstm.stack_backward can't be differentiated by itself. Differentiate "
            "torch.ops.tritlstm.stack twice: torch.autograd.grad(..., create_graph=True)"
        )


def _forward_autograd(*args: Any) -> tuple[Tensor, ...]:
    if ops.forward_mode():
        return _composed(*args)
    recorded = ops._recorded(args)
    args = (*args[:-1], args[-1] or recorded)
    return _Stack.apply(*args) if recorded else ops.below_autograd(_stack, args)


def _backward_autograd(*args: Any) -> tuple[Tensor, ...]:
    apply = ops._recorded(args) or ops.forward_mode()
    return _StackBackward.apply(*args) if apply else ops.below_autograd(_stack_backward, args)


def _forward_autocast(*args: Any) -> Results:
    device = args[0].device.type
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Any) -> Any:
        return t if t is None or t.dtype == torch.float64 else t.to(dtype)

    with torch.autocast(device, enabled=False):
        run: Any = stack
        return run(*(cast(t) for t in args[: _GIVEN - 1]), *args[_GIVEN - 1 :])  # c0 keeps its own


def _backward_autocast(*args: Any) -> tuple[Tensor, ...]:
    # Its tensors are those of one forward already; only the products inside must not be cast.
    with torch.autocast(args[3].device.type, enabled=False):
        return _stack_backward(*args)


def _check(*args: Any) -> None:
    x, w_ih, w_between, w_hh, b_ih, b_hh, h0, c0, lengths, _ = args
    if x.dim() != 3 or h0.dim() != 3:
        raise ValueError(
            f"tritlstm stack: x must be [T, B, D] and h0 [L, B, H], got {list(x.shape)} and {list(h0.shape)}; "
            "add the missing dimension with unsqueeze"
        )
    steps, batch, features = x.shape
    layers, _, hidden = h0.shape
    if steps == 0 or layers < 2:
        what = "one time step, got T = 0; leave the call out" if steps == 0 else f"two layers, got L = {layers}"
        raise ValueError(f"tritlstm stack: it needs at least {what}")
    expected = {
        "w_ih": (w_ih, (4 * hidden, features), x.dtype),
        "w_between": (w_between, (layers - 1, 4 * hidden, hidden), x.dtype),
        "w_hh": (w_hh, (layers, 4 * hidden, hidden), x.dtype),
        "b_ih": (b_ih, (layers, 4 * hidden), x.dtype),
        "b_hh": (b_hh, (layers, 4 * hidden), x.dtype),
        "h0": (h0, (layers, batch, hidden), x.dtype),
        "c0": (c0, (layers, batch, hidden), c0.dtype),
        "lengths": (lengths, (batch,), torch.int32),
    }
    for name, (value, shape, dtype) in expected.items():
        if value is not None and (value.shape != shape or value.dtype != dtype or value.device != x.device):
            raise ValueError(
                f"tritlstm stack: {name} must be {list(shape)} of {dtype} on {x.device} beside x {list(x.shape)} of "
                f"{x.dtype} and h0 {list(h0.shape)}, got {list(value.shape)} of {value.dtype} on {value.device}"
            )


for _key in ("CPU", "CUDA"):
    _library.impl("stack", _forward, _key)
    _library.impl("stack_backward", _backward, _key)
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("stack", _forward_autocast, _key)
    _library.impl("stack_backward", _backward_autocast, _key)
_library.impl("stack", _forward_autograd, "Autograd")
_library.impl("stack_backward", _backward_autograd, "Autograd")
torch.library.register_fake(_stack, _forward_fake, lib=_library)
torch.library.register_fake(_stack_backward, _backward_fake, lib=_library)


def _register_vmap(op: Any) -> None:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> batching.Results:
        return batching.one_by_one(op, info.batch_size, in_dims, args)

    torch.library.register_vmap(op, rule, lib=_library)


_register_vmap(_stack)
_register_vmap(_stack_backward)
