"""The operators `torch.ops.tritlstm.variant_layer` and `variant_layer_backward`: `layer` with all that may differ.

The arguments and results of `torch.ops.tritlstm.layer` (see `tritlstm.ops`), and after them

    resets       [T, B] bool or None: the state is zeroed before step t. It parts steps t - 1 and t in both directions:
                 in reverse the state is zeroed before step t - 1. Resets at or past lengths[b] part nothing
    peephole     [3H] or None: weights of the cell in the input, forget and output gate (order i, f, o)
    h_scale      [B, H] float32 (float64 for float64 inputs) or None: times h on its way into the recurrent product, at
                 every step; has no gradient
    noise        [3] int64 or None: seed, offset and stream of zoneout's bits (`tritlstm.random_bits`); None takes
                 their mean
    coupled      the forget gate is 1 - i; its rows of weights and its peephole are not used
    cell_clip    c is clamped to [-cell_clip, cell_clip] before anything reads it; 0: it is not
    zoneout_h, zoneout_c   probability with which a unit of h, of c keeps its value of the step before
    activations  three codes, places in `tritlstm.cell_options.ACTIVATIONS`: gates, input node, cell on its way out
    recompute    save the cells and no gates; backward rebuilds them by one product over all steps

`tritlstm.reference.Variant` has the equations. `variant_layer_backward` takes b_ih, b_hh, gate0 and all of the above
too, eight flags in `needs`, and returns the gradient of `peephole` as an eighth result. Derivatives of every order, as
of `layer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import aten, batching, ops
from .cell_options import ACTIVATIONS, Cell

__all__ = ["layer"]

Results = ops.Results
_FORWARD = 11  # arguments before those of Cell: x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, save, gate0
_BACKWARD = 17

_CELL = (
    "Tensor? resets, Tensor? peephole, Tensor? h_scale, Tensor? noise, bool coupled, float cell_clip, "
    "float zoneout_h, float zoneout_c, int[3] activations, bool recompute"
)
_tags = (torch.Tag.pt2_compliant_tag,)
_library = torch.library.Library("tritlstm", "FRAGMENT")
_library.define(
    "variant_layer(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor h0, Tensor c0, "
    f"Tensor? lengths, bool reverse, bool save, Tensor? gate0, {_CELL}) "
    "-> (Tensor out, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
    tags=_tags,
)
_library.define(
    "variant_layer_backward(Tensor? grad_out, Tensor? grad_h_n, Tensor? grad_c_n, Tensor x, Tensor w_ih, Tensor w_hh, "
    "Tensor? b_ih, Tensor? b_hh, Tensor h0, Tensor c0, Tensor? lengths, Tensor out, Tensor gates, Tensor cells, "
    f"bool reverse, Tensor? gate0, bool[8] needs, {_CELL}) "
    "-> (Tensor grad_x, Tensor grad_w_ih, Tensor grad_w_hh, Tensor grad_b, Tensor grad_h0, Tensor grad_c0, "
    "Tensor grad_gate0, Tensor grad_peephole)",
    tags=_tags,
)
_variant = torch.ops.tritlstm.variant_layer.default
_variant_backward = torch.ops.tritlstm.variant_layer_backward.default


def layer(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None = None,
    reverse: bool = False,
    save: bool = False,
    gate0: Tensor | None = None,
    cell: Cell = aten.PLAIN,
    recompute: bool = False,
) -> Results:
    """`torch.ops.tritlstm.variant_layer`, which also works inside `torch.func.grad` and `torch.func.vmap`."""
    args = (x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse)
    rest = (gate0, *cell, recompute)
    autocast = aten.autocasts(x.device.type)
    if not torch.compiler.is_compiling() and ops.forward_mode() and not autocast:
        return _plain_forward(*args, True, *rest)
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return _variant(*args, save, *rest)
    # A torch.func transform must meet the Function itself, not an operator that hides it.
    if autocast:
        return _forward_autocast(*args, save, *rest)
    return _Variant.apply(*args, True, *rest)


def _cell(args: Sequence[Any]) -> tuple[Cell, bool]:
    *cell, recompute = args
    return Cell(*cell)._replace(activations=tuple(cell[-1])), recompute


def _forward(*args: Any) -> tuple[Tensor, ...]:
    _check(*args)
    cell, recompute = _cell(args[_FORWARD:])
    out, h_n, c_n, gates, cells = ops._engine(args[0]).forward(*args[:_FORWARD], cell, recompute)
    return out, h_n, c_n.to(args[6].dtype), gates, cells


def _plain_forward(*args: Any) -> Results:
    """The layer in plain operators, which autograd differentiates in every mode."""
    _check(*args)
    cell, _ = _cell(args[_FORWARD:])
    run: Any = aten.forward
    out, h_n, c_n, gates, cells = run(*args[:_FORWARD], cell)
    return out, h_n, c_n.to(args[6].dtype), gates, cells


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    _check(*args)
    out, h_n, c_n, gates, cells = ops._forward_fake(*args[:_FORWARD])
    return out, h_n, c_n, args[0].new_empty(0) if args[-1] else gates, cells


def _backward(*args: Any) -> tuple[Tensor, ...]:
    return _backward_on(ops._engine(args[3]), *args)


def _backward_on(engine: Any, *args: Any) -> tuple[Tensor, ...]:
    grads, (x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths) = args[:3], args[3:11]
    out, gates, cells, reverse, gate0, needs = args[11:_BACKWARD]
    cell, recompute = _cell(args[_BACKWARD:])
    rebuild = (b_ih, b_hh, gate0) if recompute else None
    return engine.backward(
        *grads, x, w_ih, w_hh, h0, c0, lengths, out, gates, cells, reverse, needs, cell, rebuild
    )


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    x, w_ih, w_hh, _, _, h0, c0 = args[3:10]
    peephole = args[_BACKWARD + 1]
    bias, gate0 = w_hh.new_empty(w_hh.size(0)), x.new_empty(x.size(1), w_hh.size(0))
    like = (x, w_ih, w_hh, bias, h0, c0, gate0, x if peephole is None else peephole)
    needs = args[_BACKWARD - 1]
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip(like, needs, strict=True))


class _Variant(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return ops.below_autograd(_variant, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        out, _, _, gates, cells = output
        ctx.mark_non_differentiable(gates, cells)
        ctx.set_materialize_grads(False)
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.rest = [None if isinstance(value, Tensor) else (value,) for value in inputs]
        ctx.save_for_backward(out, gates, cells, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        out, gates, cells, *tensors = ctx.saved_tensors
        following = iter(tensors)
        args = [next(following) if value is None else value[0] for value in ctx.rest]
        needed = ctx.needs_input_grad
        need_b = needed[3] or needed[4]
        needs = [*needed[:3], need_b, *needed[5:7], needed[10], needed[_FORWARD + 1]]
        reverse, _, gate0 = args[8:_FORWARD]
        tail = (reverse, gate0, needs, *args[_FORWARD:])
        if torch.is_grad_enabled():
            # Someone may differentiate the gradient: what was saved becomes a function of the inputs again,
            # and the gradient a chain of plain operators.
            with aten.without_autocast(args[0].device.type):
                cell, _ = _cell(args[_FORWARD:])
                run: Any = aten.forward
                out, _, _, gates, cells = run(*args[:9], True, gate0, cell)
                results = _backward_on(aten, *grads[:3], *args[:8], out, gates, cells, *tail[:-1], False)
        else:
            results = _variant_backward(*grads[:3], *args[:8], out, gates, cells, *tail)
        d_x, d_w_ih, d_w_hh, d_b, d_h0, d_c0, d_gate0, d_peephole = (
            result if need else None for result, need in zip(results, needs, strict=True)
        )
        d_biases = ops.of_both_biases(d_b, *needed[3:5])
        before = (d_x, d_w_ih, d_w_hh, *d_biases, d_h0, d_c0, None, None, None, d_gate0, None, d_peephole)
        return (*before, *(None,) * (len(needed) - len(before)))


class _VariantBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return ops.below_autograd(_variant_backward, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "tritlstm: torch.ops.tritlstm.variant_layer_backward can't be differentiated by itself. Differentiate "
            "torch.ops.tritlstm.variant_layer twice: torch.autograd.grad(..., create_graph=True)"
        )


def _forward_autograd(*args: Any) -> tuple[Tensor, ...]:
    recorded = ops._recorded(args)
    args = (*args[:9], args[9] or recorded, *args[10:])
    if ops.forward_mode():
        return _plain_forward(*args)
    return _Variant.apply(*args) if recorded else ops.below_autograd(_variant, args)


def _backward_autograd(*args: Any) -> tuple[Tensor, ...]:
    apply = ops._recorded(args) or ops.forward_mode()
    return _VariantBackward.apply(*args) if apply else ops.below_autograd(_variant_backward, args)


def _forward_autocast(*args: Any) -> Results:
    device = args[0].device.type
    dtype = torch.get_autocast_dtype(device)
    kept = {6, _FORWARD + 2}  # c0 and h_scale

    def cast(k: int, value: Any) -> Any:
        if k in kept or not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
            return value
        return value.to(dtype)

    with torch.autocast(device, enabled=False):
        given = [cast(k, value) for k, value in enumerate(args)]
        run: Any = layer
        return run(*given[:_FORWARD], *_cell(given[_FORWARD:]))


def _backward_autocast(*args: Any) -> tuple[Tensor, ...]:
    with aten.without_autocast(args[3].device.type):
        return _variant_backward(*args)


def _check(*args: Any) -> None:
    ops._check(*args[:_FORWARD])
    x, hidden = args[0], args[5].size(1)
    cell, _ = _cell(args[_FORWARD:])
    steps, batch, _ = x.shape
    expected = {
        "resets": (cell.resets, (steps, batch), torch.bool),
        "peephole": (cell.peephole, (3 * hidden,), x.dtype),
        "h_scale": (cell.h_scale, (batch, hidden), aten.state_dtype(x.dtype)),
        "noise": (cell.noise, (3,), torch.int64),
    }
    for name, (value, shape, dtype) in expected.items():
        if value is not None and (value.shape != shape or value.dtype != dtype or value.device != x.device):
            raise ValueError(
                f"tritlstm variant_layer: {name} must be {list(shape)} of {dtype} on {x.device} beside x "
                f"{list(x.shape)} of {x.dtype} and h0 {list(args[5].shape)}, got {list(value.shape)} of {value.dtype} "
                f"on {value.device}"
            )
    if not all(0 <= code < len(ACTIVATIONS) for code in cell.activations):
        raise ValueError(
            f"tritlstm variant_layer: activations must be codes below {len(ACTIVATIONS)}, places in "
            f"tritlstm.cell_options.ACTIVATIONS, got {list(cell.activations)}"
        )
    for name in ("zoneout_h", "zoneout_c"):
        if not 0 <= getattr(cell, name) < 1:
            raise ValueError(f"tritlstm variant_layer: {name} must be in [0, 1), got {getattr(cell, name)}")
    if cell.cell_clip < 0:
        raise ValueError(f"tritlstm variant_layer: cell_clip must not be negative, got {cell.cell_clip}; 0 is none")


for _key in ("CPU", "CUDA"):
    _library.impl("variant_layer", _forward, _key)
    _library.impl("variant_layer_backward", _backward, _key)
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("variant_layer", _forward_autocast, _key)
    _library.impl("variant_layer_backward", _backward_autocast, _key)
_library.impl("variant_layer", _forward_autograd, "Autograd")
_library.impl("variant_layer_backward", _backward_autograd, "Autograd")
torch.library.register_fake(_variant, _forward_fake, lib=_library)
torch.library.register_fake(_variant_backward, _backward_fake, lib=_library)


def _register_vmap(op: Any) -> None:
    names = [argument.name for argument in op._schema.arguments]

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> batching.Results:
        given = dict(zip(names, args, strict=True))
        # Zoneout's bits depend on the place in the batch; gradients of shared weights are asked for one by one.
        shared = [need for k, need in enumerate(given.get("needs", ())) if k in (1, 2, 3, 7)]
        if given["noise"] is not None or any(shared):
            return batching.one_by_one(op, info.batch_size, in_dims, args)
        return batching._rule(op, info.batch_size, in_dims, args, batching._fold)

    torch.library.register_vmap(op, rule, lib=_library)


_register_vmap(_variant)
_register_vmap(_variant_backward)
