"""A layer-normed LSTM on the kernel path: what `tritlstm.layer` does for the plain cell, with its three normalisations.

The input products are normalised for all steps at once, before the recurrence; the recurrent products and the cell on
its way out inside of it (`kernels/norm.py`). Backward makes the raw input products again, so they are not kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import aten, layer, plan, tf32
from .cell_options import Cell
from .kernels import exchange
from .kernels import norm as kernel_norm

__all__ = ["Normed", "backward", "fits", "forward"]


@dataclasses.dataclass
class Normed:
    """The parameters of one pass, and what it hands on: `layer.forward` and `_recurrent_backward` ask it."""

    norm: aten.Norm
    products: Tensor  # [T, B, 4 HX], normalised recurrent products; empty where nothing is saved
    statistics: Tensor  # [T, B, 3] float32
    grad_pre: Tensor | None = None  # [T, B, 4 HX], gradients of the pre-activations
    grad_cell: Tensor | None = None  # [2, B, H] float32, of gain and bias of the cell, sequence by sequence

    def _shared(self, layout: plan.RecurrentPlan, device: torch.device) -> dict[str, Any]:
        parameters = (self.norm.hh, self.norm.c, self.norm.c_bias)
        given = {"norm_ptr": torch.cat([p.detach().to(torch.float32).flatten() for p in parameters])}
        if layout.tier != "single":
            blocks = -(-plan.padded(layout.hidden) // layout.block_h)
            words = layout.n_groups * exchange.TAGGED_SLOTS.value * blocks * 2 * layout.block_b
            given["rows_ptr"] = torch.zeros(words, dtype=torch.int64, device=device)
        return given

    def forward_arguments(self, layout: plan.RecurrentPlan, device: torch.device) -> dict[str, Any]:
        given = self._shared(layout, device)
        if layout.save:
            given |= {"products_ptr": self.products, "statistics_ptr": self.statistics}
        return given

    def backward_arguments(self, layout: plan.RecurrentPlan, like: Tensor) -> dict[str, Any]:
        self.grad_pre = torch.empty_like(self.products)
        self.grad_cell = torch.empty((2, like.shape[1], layout.hidden), dtype=torch.float32, device=like.device)
        saved = {"products_ptr": self.products, "statistics_ptr": self.statistics}
        made = {"grad_pre_ptr": self.grad_pre, "grad_norm_ptr": self.grad_cell}
        return {**self._shared(layout, like.device), **saved, **made}

    def input_products(
        self,
        x: Tensor,
        w_ih: Tensor,
        b_ih: Tensor | None,
        b_hh: Tensor | None,
        hidden: int,
    ) -> Tensor:
        """Normalised, with gain and both biases, as the recurrence reads them: [T, B, 4 HX]."""
        length, batch, _ = x.shape
        gates = x.new_zeros((length, batch, 4 * plan.padded(hidden)))
        gain = _packed(self.norm.ih)
        bias = torch.zeros_like(gain)
        for added in (b_ih, b_hh):
            if added is not None:
                bias = bias + _packed(added)
        for steps, raw in _raw_products(x, w_ih, hidden):
            normalized = torch.nn.functional.layer_norm(raw, raw.shape[-1:], gain, bias, kernel_norm.EPSILON.value)
            gates[steps, :, : 4 * hidden] = normalized.to(gates.dtype)
        return gates


def _packed(values: Tensor) -> Tensor:
    """[4H] in the order of memory, a unit's four gates side by side, float32."""
    return values.detach().to(torch.float32).view(4, -1).t().flatten()


def _raw_products(x: Tensor, w_ih: Tensor, hidden: int) -> Iterator[tuple[slice, Tensor]]:
    """Steps and their x W_ih [steps, B, 4H], float32; a few steps at a time, since float32 takes room."""
    length, batch, _ = x.shape
    device, precision = plan.device_of(x), plan.dot_precision(x)
    steps = max(1, layer.REBUILT // (batch * hidden))
    for begin in range(0, length, steps):
        part = slice(begin, min(begin + steps, length))
        wide = layer._input_products(x[part], w_ih, None, None, hidden, device, precision, torch.float32)
        yield part, wide[..., : 4 * hidden]


def check(
    length: int, batch: int, hidden: int, dtype: torch.dtype, device: plan.Device, precision: str
) -> None:
    """Raises PlanError unless the planner has kernels for a layer-normed layer, both passes and whatever the cell."""
    overrides = {"narrow": False, **layer._overrides()}
    for direction in ("forward", "backward"):
        plan.recurrent(
            direction, length, batch, hidden, dtype, device, precision, overrides=overrides, normed=True
        )  # fmt: skip


def fits(x: Tensor, hidden: int) -> bool:
    """Whether there are kernels for a layer-normed layer of `hidden` units on `x`: :func:`check`."""
    try:
        check(x.shape[0], x.shape[1], hidden, x.dtype, plan.device_of(x), plan.dot_precision(x))
    except plan.PlanError:
        return False
    return True


def forward(
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
) -> tuple[Tensor, ...]:
    """`layer.forward` of a layer-normed cell: its results, and with `save` products [T, B, 4 HX] and statistics."""
    length, batch, _ = x.shape
    shapes = [(length, batch, 4 * plan.padded(h0.shape[1])), (length, batch, kernel_norm.STATISTICS.value)]
    products = torch.empty(shapes[0] if save else (0,), dtype=x.dtype, device=x.device)
    statistics = torch.empty(shapes[1] if save else (0,), dtype=torch.float32, device=x.device)
    run = Normed(norm, products, statistics)
    results = layer.forward(x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, save, None, cell, norm=run)
    return *results, products, statistics


@tf32.of_backward
def backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    out: Tensor,
    gates: Tensor,
    cells: Tensor,
    products: Tensor,
    statistics: Tensor,
    reverse: bool,
    cell: Cell,
    norm: aten.Norm,
) -> tuple[Tensor, ...]:
    """Gradients of x, w_ih, w_hh, the bias sum, h0, c0, `cell.peephole` (or empty), and the four of `norm`."""
    length, batch, features = x.shape
    hidden = h0.shape[1]
    cuts = aten.cut_steps(cell.resets, lengths, reverse)
    run = Normed(norm, products, statistics)
    grad_products, grad_c0, kept_h = layer._recurrent_backward(
        grad_out, grad_h_n, grad_c_n, w_hh, c0, lengths, cuts, gates, cells, reverse, x, cell, run
    )
    assert run.grad_pre is not None
    assert run.grad_cell is not None
    grad_raw, grad_ih, grad_hh = _input_gradient(run.grad_pre, products, x, w_ih, hidden, norm)
    rows_in, rows_pre, rows = (g.view(length * batch, -1) for g in (grad_raw, run.grad_pre, grad_products))
    first_rows = layer._first_rows(length, batch, lengths, reverse, x.device)
    first = rows[first_rows]
    entered = first if cuts is None else torch.where(cuts.reshape(-1, 1)[first_rows], 0, first)
    sent, sent0 = layer._sent(out, h0, cuts, reverse, cell)
    grad_w_hh = layer._recurrent_weight_gradient(rows, entered, sent, sent0, reverse)
    peephole = x.new_empty(0)
    if cell.peephole is not None:
        peephole = layer._grad_peephole(run.grad_pre, gates, cells, out, h0, c0, lengths, cuts, reverse, cell)
    grad_c, grad_c_bias = run.grad_cell.sum(1)
    return (
        torch.mm(rows_in, layer.pack_rows(w_ih)).view(length, batch, features),
        layer.unpack_rows(torch.mm(rows_in.t(), x.reshape(length * batch, features)), hidden),
        layer.unpack_rows(grad_w_hh, hidden),
        layer.unpack_rows(rows_pre.sum(0), hidden),
        layer._grad_h0(entered, grad_h_n, layer.pack_rows(w_hh), lengths, cell, kept_h, cuts, first_rows),
        grad_c0.to(c0.dtype),
        peephole,
        grad_ih.to(norm.ih.dtype),
        grad_hh.to(norm.hh.dtype),
        grad_c.to(norm.c.dtype),
        grad_c_bias.to(norm.c_bias.dtype),
    )


def _input_gradient(
    grad_pre: Tensor, products: Tensor, x: Tensor, w_ih: Tensor, hidden: int, norm: aten.Norm
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x W_ih [T, B, 4 HX] and of both gains [4H]."""
    grad_raw = torch.zeros_like(grad_pre)
    gain = _packed(norm.ih)
    grad_ih, grad_hh = torch.zeros_like(gain), torch.zeros_like(gain)
    own = slice(0, 4 * hidden)
    for steps, raw in _raw_products(x, w_ih, hidden):
        hat, _, inverse = torch.native_layer_norm(raw, raw.shape[-1:], None, None, kernel_norm.EPSILON.value)
        d = grad_pre[steps, :, own].to(torch.float32)
        grad_ih += (d * hat).sum((0, 1))
        grad_hh += (d * products[steps, :, own]).sum((0, 1))
        d = d * gain
        d = inverse * (d - d.mean(-1, keepdim=True) - hat * (d * hat).mean(-1, keepdim=True))
        grad_raw[steps, :, own] = d.to(grad_raw.dtype)
    grad_ih, grad_hh = (g.view(-1, 4).t().flatten() for g in (grad_ih, grad_hh))
    return grad_raw, grad_ih, grad_hh
