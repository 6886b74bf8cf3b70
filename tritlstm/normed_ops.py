"""The operators `torch.ops.tritlstm.normed_layer` and `normed_layer_backward`: `variant_layer` with layer norm.

    normed_layer(x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, save, resets, peephole, h_scale, noise, coupled,
                 cell_clip, zoneout_h, zoneout_c, activations, norm_ih, norm_hh, norm_c, norm_c_bias)
        -> (out, h_n, c_n, gates, cells, products, statistics)

The arguments are those of `variant_layer` (see `tritlstm.variant_ops`) without gate0 and recompute, and the parameters
of `tritlstm.aten.Norm`: norm_ih and norm_hh [4H], norm_c and norm_c_bias [H], of any float dtype. What is saved besides
gates and cells: products [T, B, 4 HX], the recurrent products normalised, as gates lie; statistics [T, B, 3], of cells'
dtype: 1 / std of the products; mean and 1 / std of the cell before zoneout.

The Triton kernels run it where they run and the planner has a place for all blocks of a step (`runs_kernels`), plain
operators elsewhere. Derivatives of a gradient and forward mode are `tritlstm.aten.forward`, which autograd
differentiates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import aten, batching, ops, variant_ops
from .cell_options import Cell

__all__ = ["layer", "runs_kernels"]

_PLAIN = 10  # arguments before those of Cell: x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, save
_CELL = len(Cell._fields)
_NORM = _PLAIN + _CELL
_SAVED = 5  # out, gates, cells, products, statistics
_RESULTS = 11  # of the backward operator

_tags = (torch.Tag.pt2_compliant_tag,)
_arguments = (
    "Tensor? resets, Tensor? peephole, Tensor? h_scale, Tensor? noise, bool coupled, float cell_clip, float zoneout_h, "
    "float zoneout_c, int[3] activations, Tensor norm_ih, Tensor norm_hh, Tensor norm_c, Tensor norm_c_bias"
)
_library = torch.library.Library("tritlstm", "FRAGMENT")
_library.define(
    "normed_layer(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor h0, Tensor c0, "
    f"Tensor? lengths, bool reverse, bool save, {_arguments}) -> (Tensor out, Tensor h_n, Tensor c_n, Tensor gates, "
    "Tensor cells, Tensor products, Tensor statistics)",
    tags=_tags,
)
_library.define(
    "normed_layer_backward(Tensor? grad_out, Tensor? grad_h_n, Tensor? grad_c_n, Tensor x, Tensor w_ih, Tensor w_hh, "
    "Tensor h0, Tensor c0, Tensor? lengths, Tensor out, Tensor gates, Tensor cells, Tensor products, "
    f"Tensor statistics, bool reverse, {_arguments}) -> (Tensor grad_x, Tensor grad_w_ih, Tensor grad_w_hh, "
    "Tensor grad_b, Tensor grad_h0, Tensor grad_c0, Tensor grad_peephole, Tensor grad_norm_ih, Tensor grad_norm_hh, "
    "Tensor grad_norm_c, Tensor grad_norm_c_bias)",
    tags=_tags,
)
_normed = torch.ops.tritlstm.normed_layer.default
_normed_backward = torch.ops.tritlstm.normed_layer_backward.default


def runs_kernels(x: Tensor, hidden: int) -> bool:
    """Whether a layer-normed layer of `hidden` units on `x` [T, B, D] runs in the Triton kernels."""
    if not ops.launches(x):
        return False
    from . import normed

    return normed.fits(x, hidden)


def _engine(x: Tensor, hidden: int) -> tuple[Any, Any]:
    """Forward and backward of what computes on `x`."""
    if not runs_kernels(x, hidden):
        return aten.normed_forward, aten.normed_backward
    from . import normed

    return normed.forward, normed.backward


def layer(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    reverse: bool,
    save: bool,
    cell: Cell,
    norm: aten.Norm,
) -> ops.Results:
    """`torch.ops.tritlstm.normed_layer`; inside `torch.func` transforms and in forward mode, plain operators."""
    if aten.autocasts(x.device.type):
        x, w_ih, w_hh, b_ih, b_hh, h0, cell = _cast(x.device.type, x, w_ih, w_hh, b_ih, b_hh, h0, cell)
    args = (x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse)
    with aten.without_autocast(x.device.type):
        transformed = not torch.compiler.is_compiling() and (
            ops.forward_mode() or torch._C._are_functorch_transforms_active()
        )
        if transformed:
            return _plain(args, save, cell, norm)
        results: tuple[Tensor, ...] = _normed(*args, save, *cell, *norm)
        out, h_n, c_n, gates, cells, _, _ = results
        return out, h_n, c_n, gates, cells


def _cast(device: str, *values: Any) -> tuple[Any, ...]:
    """To autocast's dtype, but float64; a Cell's peephole with it."""
    dtype = torch.get_autocast_dtype(device)

    def cast(value: Any) -> Any:
        if isinstance(value, Cell):
            return value._replace(peephole=cast(value.peephole))
        return value.to(dtype) if isinstance(value, Tensor) and value.dtype != torch.float64 else value

    return tuple(cast(value) for value in values)


def _plain(args: tuple[Any, ...], save: bool, cell: Cell, norm: aten.Norm) -> ops.Results:
    run: Any = aten.forward
    out, h_n, c_n, gates, cells = run(*args, save, None, cell, norm=norm)
    return out, h_n, c_n.to(args[6].dtype), gates, cells


def _cell_and_norm(args: Sequence[Any]) -> tuple[Cell, aten.Norm]:
    cell = Cell(*args[:_CELL])
    return cell._replace(activations=tuple(cell.activations)), aten.Norm(*args[_CELL:])


def _forward(*args: Any) -> tuple[Tensor, ...]:
    _check(*args)
    return _run_forward(_engine(args[0], args[5].size(1))[0], args)


def _run_forward(run: Any, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    out, h_n, c_n, *saved = run(*args[:_PLAIN], *_cell_and_norm(args[_PLAIN:]))
    return out, h_n, c_n.to(args[6].dtype), *saved


def _backward(*args: Any) -> tuple[Tensor, ...]:
    _, run = _engine(args[3], args[6].size(1))
    return run(*args[: -_CELL - 4], *_cell_and_norm(args[-_CELL - 4 :]))


def _plain_forward(*args: Any) -> tuple[Tensor, ...]:
    """The layer in plain operators, which autograd differentiates in every mode."""
    _check(*args)
    return _run_forward(aten.normed_forward, args)


def _forward_fake(*args: Any) -> tuple[Tensor, ...]:
    _check(*args)
    results = ops._forward_fake(*args[:_PLAIN])
    (steps, batch, _), save = args[0].shape, args[9]
    statistics = results[4].new_empty((steps, batch, 3) if save else (0,))
    return *results, torch.empty_like(results[3]), statistics


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    x, w_ih, w_hh, h0, c0 = args[3:8]
    cell, norm = _cell_and_norm(args[-_CELL - 4 :])
    peephole = x.new_empty(0) if cell.peephole is None else cell.peephole
    like = (x, w_ih, w_hh, w_hh.new_empty(w_hh.size(0)), h0, c0, peephole, *norm)
    return tuple(value.new_empty(value.shape) for value in like)


class _Layer(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return ops.below_autograd(_normed, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        out, _, _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        ctx.rest = [None if isinstance(value, Tensor) else (value,) for value in inputs]
        ctx.save_for_backward(out, *saved, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors  # once: checkpointing unpacks what is saved a single time
        saved, following = tensors[:_SAVED], iter(tensors[_SAVED:])
        args = [next(following) if value is None else value[0] for value in ctx.rest]
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _differentiable_gradients(grads[:3], args, needed)
        x, w_ih, w_hh, _, _, h0, c0, lengths, reverse, _ = args[:_PLAIN]
        d_x, d_w_ih, d_w_hh, d_b, d_h0, d_c0, d_peephole, *d_norm = _normed_backward(
            *grads[:3], x, w_ih, w_hh, h0, c0, lengths, *saved, reverse, *args[_PLAIN:]
        )
        d_biases = ops.of_both_biases(d_b, *needed[3:5])
        before: tuple[Tensor | None, ...] = (d_x, d_w_ih, d_w_hh, *d_biases, d_h0, d_c0, None, None, None)
        within = (None, d_peephole, *(None,) * (_CELL - 2))
        return tuple(g if need else None for g, need in zip((*before, *within, *d_norm), needed, strict=True))


def _differentiable_gradients(
    grads: Sequence[Tensor | None], args: list[Any], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Someone may differentiate the gradient: that of the plain operators, from the inputs anew."""
    with aten.without_autocast(args[0].device.type):
        # Names of their own, so that a tensor that was given twice gets each part of its gradient once.
        asked = {k: args[k].view_as(args[k]) for k, need in enumerate(needed) if need}
        values = [asked.get(k, value) for k, value in enumerate(args)]
        cell, norm = _cell_and_norm(values[_PLAIN:])
        results = _plain(tuple(values[:9]), False, cell, norm)[:3]
        known = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
        found = torch.autograd.grad(
            [result for result, _ in known], list(asked.values()), [grad for _, grad in known], create_graph=True,
            allow_unused=True,
        )  # fmt: skip
    by_place = dict(zip(asked, found, strict=True))
    return tuple(by_place.get(k) for k in range(len(args)))


class _LayerBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return ops.below_autograd(_normed_backward, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "tritlstm: torch.ops.tritlstm.normed_layer_backward can't be differentiated by itself. Differentiate "
            "torch.ops.tritlstm.normed_layer twice: torch.autograd.grad(..., create_graph=True)"
        )


def _forward_autograd(*args: Any) -> tuple[Tensor, ...]:
    recorded = ops._recorded(args)
    args = (*args[:9], args[9] or recorded, *args[_PLAIN:])
    if ops.forward_mode():
        return _plain_forward(*args)
    return _Layer.apply(*args) if recorded else ops.below_autograd(_normed, args)


def _backward_autograd(*args: Any) -> tuple[Tensor, ...]:
    return _LayerBackward.apply(*args) if ops._recorded(args) else ops.below_autograd(_normed_backward, args)


def _forward_autocast(*args: Any) -> tuple[Tensor, ...]:
    device = args[0].device.type
    with torch.autocast(device, enabled=False):
        cell, norm = _cell_and_norm(args[_PLAIN:])
        *given, cell = _cast(device, *args[:6], cell)
        return _normed(*given, *args[6:_PLAIN], *cell, *norm)


def _backward_autocast(*args: Any) -> tuple[Tensor, ...]:
    with aten.without_autocast(args[3].device.type):
        return _normed_backward(*args)


def _check(*args: Any) -> None:
    cell, norm = _cell_and_norm(args[_PLAIN:])
    variant_ops._check(*args[:_PLAIN], None, *cell, False)
    x, hidden = args[0], args[5].size(1)
    for name, value, size in zip(norm._fields, norm, (4 * hidden, 4 * hidden, hidden, hidden), strict=True):
        if value.shape != (size,) or not value.is_floating_point() or value.device != x.device:
            raise ValueError(
                f"tritlstm normed_layer: norm_{name} must be [{size}] of a float dtype on {x.device} beside h0 "
                f"{list(args[5].shape)}, got {list(value.shape)} of {value.dtype} on {value.device}"
            )


for _key in ("CPU", "CUDA"):
    _library.impl("normed_layer", _forward, _key)
    _library.impl("normed_layer_backward", _backward, _key)
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("normed_layer", _forward_autocast, _key)
    _library.impl("normed_layer_backward", _backward_autocast, _key)
_library.impl("normed_layer", _forward_autograd, "Autograd")
_library.impl("normed_layer_backward", _backward_autograd, "Autograd")
torch.library.register_fake(_normed, _forward_fake, lib=_library)
torch.library.register_fake(_normed_backward, _backward_fake, lib=_library)


def _register_vmap(op: Any) -> None:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> batching.Results:
        return batching.one_by_one(op, info.batch_size, in_dims, args)

    torch.library.register_vmap(op, rule, lib=_library)


_register_vmap(_normed)
_register_vmap(_normed_backward)
