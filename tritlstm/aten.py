"""One LSTM layer in one direction, written with plain PyTorch operators: forward and hand-derived backward.

This is what the operators of `tritlstm.ops` and `tritlstm.variant_ops` compute where the Triton kernels do not run
(the CPU, float64). It is the formula, not the fast path: one large product over all time steps, then a Python loop
over them. `tritlstm.cpu` computes the plain cell on the CPU faster; variants and derivatives of gradients come here.
Every function here is pure and differentiable, so running `forward` and `backward` under autograd gives
derivatives of any order.

Shapes: T time steps, B batch, D input size, H hidden size, HX = H rounded up to a multiple of 8.
All arithmetic is in float32 (float64 for float64 inputs); `h` is rounded to the input's dtype at every step,
as it is when it is exchanged between thread blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import random_bits
from .cell_options import PLAIN, Cell

EPSILON = 1e-5  # of layer normalisation; that of kernels/norm.py too
GROUP = 8  # HX is a multiple of this: rows of a 16-bit state then begin at multiples of 16 bytes


class Norm(NamedTuple):
    """Layer normalisation of both products and of the cell on its way out (Ba, Kiros & Hinton, 2016).

    LN(x W_x) and LN(h W_h), each over all 4H, get a gain and, as a bias, b_ih and b_hh; h = o tanh(LN(c)).
    """

    ih: Tensor  # [4H], gain
    hh: Tensor  # [4H]
    c: Tensor  # [H]
    c_bias: Tensor  # [H]


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
    gate0: Tensor | None = None,
    cell: Cell = PLAIN,
    recompute: bool = False,
    norm: Norm | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the layer over all time steps; arguments and results are those of `torch.ops.tritlstm.layer`.

    With `recompute` only the cells are saved: `backward` rebuilds the gates. `norm` normalises; `normed_forward` is the
    form that `normed_backward` goes with.
    """
    return _forward(x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, save, gate0, cell, recompute, norm, None)


def normed_forward(
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
    norm: Norm,
) -> tuple[Tensor, ...]:
    """`forward` of a layer-normed cell: its results, and with `save` products [T, B, 4 HX] and statistics [T, B, 3]."""
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])
    results = _forward(
        x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, save, None, cell, False, norm, kept if save else None
    )
    if not save:
        return *results, x.new_empty(0), results[-1].new_empty(0)
    products, cells = (torch.stack(values[::-1] if reverse else values) for values in kept)
    hat, _, inverse = _normalize(products)
    _, mean, inverse_c = _normalize(cells)
    return *results, pack_gates(hat).to(x.dtype), torch.cat((inverse, mean, inverse_c), -1)


def _forward(
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
    gate0: Tensor | None,
    cell: Cell,
    recompute: bool,
    norm: Norm | None,
    kept: tuple[list[Tensor], list[Tensor]] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`kept` gets the recurrent product and the cell before zoneout of each step, as they are before normalisation."""
    wide = state_dtype(x.dtype)
    cuts = cut_steps(cell.resets, lengths, reverse)
    biases = (b_ih, b_hh) if norm is None else (None, None)
    inputs = _input_product(x, w_ih, *biases, gate0, cuts, lengths, reverse)  # [T, B, 4H]
    if norm is not None:
        inputs = _normalized(inputs, norm.ih, b_ih)
    recurrent = w_hh.to(wide).t()
    keep_h, keep_c = zones(cell, (x.size(0), *h0.shape), wide)
    h, c = h0, c0.to(wide)
    out, gates, cells = ([h0] * x.size(0) for _ in range(3))
    for t in _order(x.size(0), reverse):
        h_prev, c_prev = h, c
        if cuts is not None:
            h_prev, c_prev = torch.where(cuts[t], 0, h), torch.where(cuts[t], 0, c)
        sent = sent_on(h_prev, cell)
        raw = product = sent.to(wide) @ recurrent
        if norm is not None:
            product = _normalized(raw, norm.hh, b_hh)
        i, f, g, o, c_new = activate(inputs[t] + product, c_prev, cell)
        if kept is not None:
            kept[0].append(raw)
            kept[1].append(c_new)
        shown = c_new if norm is None else _normalized(c_new, norm.c, norm.c_bias)
        h_new = o * _activation(cell.activations[2], shown)
        if keep_h is not None:
            h_new = keep_h[t] * h_prev.to(wide) + (1 - keep_h[t]) * h_new
        if keep_c is not None:
            c_new = keep_c[t] * c_prev + (1 - keep_c[t]) * c_new
        h_new = h_new.to(x.dtype)
        if lengths is None:
            h, c, out[t] = h_new, c_new, h_new
        else:
            active = (t < lengths)[:, None]
            h, c = torch.where(active, h_new, h), torch.where(active, c_new, c)
            out[t] = torch.where(active, h_new, 0)
        gates[t], cells[t] = torch.cat((i, f, g, o), -1), c
    empty, results = x.new_empty(0), (torch.stack(out), h, c.to(c0.dtype, copy=True))
    if not save:
        return *results, empty, c.new_empty(0)
    return *results, empty if recompute else pack_gates(torch.stack(gates)).to(x.dtype), pad_units(torch.stack(cells))


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
    reverse: bool,
    needs: Sequence[bool],
    cell: Cell = PLAIN,
    rebuild: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """Walk back over all steps; arguments and results are those of `torch.ops.tritlstm.layer_backward`.

    An eighth flag of `needs` asks for the gradient of `cell.peephole`. `rebuild`, b_ih, b_hh and gate0 of the forward
    pass, says that `gates` were not saved.
    """
    wide = state_dtype(x.dtype)
    first = _first_steps(x.size(0), lengths, reverse, x.device)
    cuts = cut_steps(cell.resets, lengths, reverse)
    h_prev, c_prev = previous_states(out, cells, h0, c0.to(wide), cuts, first, reverse)
    sent = sent_on(h_prev, cell).to(wide)
    if rebuild is None:
        i, f, g, o = (gate.to(wide) for gate in unpack_gates(gates, h0.size(1)))
    else:
        inputs = _input_product(x, w_ih, *rebuild, cuts, lengths, reverse)
        i, f, g, o, _ = activate(inputs + sent @ w_hh.to(wide).t(), c_prev, cell)
    c_new = cells[..., : h0.size(1)] if cell.zoneout_c == 0 else candidate(i, f, g, c_prev, cell)
    grad_gates, _, _, grad_h0, grad_c0 = _walk_back(
        grad_out, grad_h_n, grad_c_n, w_hh.to(wide), lengths, cuts, (i, f, g, o), c_new, c_prev, reverse, cell, None
    )
    rows = grad_gates.flatten(0, 1)  # [T B, 4H]
    starts = first if cuts is None else first & ~cuts
    results = (
        lambda: (grad_gates @ w_ih.to(wide)).to(x.dtype),
        lambda: (rows.t() @ x.flatten(0, 1).to(wide)).to(w_ih.dtype),
        lambda: (rows.t() @ sent.flatten(0, 1)).to(w_hh.dtype),
        lambda: rows.sum(0).to(w_ih.dtype),
        lambda: grad_h0.to(h0.dtype, copy=True),
        lambda: grad_c0.to(c0.dtype, copy=True),
        lambda: torch.where(starts, grad_gates, 0).sum(0).to(x.dtype),
        lambda: peephole_gradient(grad_gates, c_prev, c_new).to(x.dtype),
    )
    return tuple(result() if need else x.new_empty(0) for result, need in zip(results, needs, strict=False))


class _Normalized(NamedTuple):
    """What the gradient needs of the products and cells that were normalised, of all steps."""

    hat: Tensor  # [T, B, 4H], products normalised
    inverse: Tensor  # [T, B, 1], 1 / std of the products
    hat_c: Tensor  # [T, B, H]
    inverse_c: Tensor  # [T, B, 1]
    gain: Tensor  # [4H], Norm's hh, c and c_bias
    gain_c: Tensor  # [H]
    bias_c: Tensor


def normed_backward(
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
    norm: Norm,
) -> tuple[Tensor, ...]:
    """Gradients of x, w_ih, w_hh, the bias sum, h0, c0, `cell.peephole` (or empty), and the four of `norm`."""
    wide = state_dtype(x.dtype)
    first = _first_steps(x.size(0), lengths, reverse, x.device)
    cuts = cut_steps(cell.resets, lengths, reverse)
    h_prev, c_prev = previous_states(out, cells, h0, c0.to(wide), cuts, first, reverse)
    sent = sent_on(h_prev, cell).to(wide)
    i, f, g, o = (gate.to(wide) for gate in unpack_gates(gates, h0.size(1)))
    c_new = cells[..., : h0.size(1)] if cell.zoneout_c == 0 else candidate(i, f, g, c_prev, cell)
    inverse, mean_c, inverse_c = statistics.split(1, -1)
    hat, hat_c = torch.cat(unpack_gates(products, h0.size(1)), -1).to(wide), (c_new - mean_c) * inverse_c
    normalized = _Normalized(hat, inverse, hat_c, inverse_c, *(gain.to(wide) for gain in norm[1:]))
    grad_gates, grad_products, grad_shown, grad_h0, grad_c0 = _walk_back(
        grad_out, grad_h_n, grad_c_n, w_hh.to(wide), lengths, cuts, (i, f, g, o), c_new, c_prev, reverse, cell,
        normalized,
    )  # fmt: skip
    hat_in, _, inverse_in = _normalize(F.linear(x.to(wide), w_ih.to(wide)))
    grad_inputs = _through(grad_gates * norm.ih.to(wide), hat_in, inverse_in)
    rows_in, rows = grad_inputs.flatten(0, 1), grad_products.flatten(0, 1)  # [T B, 4H]
    peephole = x.new_empty(0)
    if cell.peephole is not None:
        peephole = peephole_gradient(grad_gates, c_prev, c_new).to(x.dtype)
    return (
        (grad_inputs @ w_ih.to(wide)).to(x.dtype),
        (rows_in.t() @ x.flatten(0, 1).to(wide)).to(w_ih.dtype),
        (rows.t() @ sent.flatten(0, 1)).to(w_hh.dtype),
        grad_gates.sum((0, 1)).to(w_ih.dtype),
        grad_h0.to(h0.dtype, copy=True),
        grad_c0.to(c0.dtype, copy=True),
        peephole,
        (grad_gates * hat_in).sum((0, 1)).to(norm.ih.dtype),
        (grad_gates * hat).sum((0, 1)).to(norm.hh.dtype),
        (grad_shown * hat_c).sum((0, 1)).to(norm.c.dtype),
        grad_shown.sum((0, 1)).to(norm.c_bias.dtype),
    )


def _normalize(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values normalised over the last dimension, their means and 1 / std."""
    return torch.native_layer_norm(values, values.shape[-1:], None, None, EPSILON)


def _through(grad: Tensor, hat: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of normalised values `hat` to that of the values before."""
    return inverse * (grad - grad.mean(-1, keepdim=True) - hat * (grad * hat).mean(-1, keepdim=True))


def _normalized(values: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(values.dtype)
    return F.layer_norm(values, values.shape[-1:], gain.to(values.dtype), bias, EPSILON)


def activate(pre: Tensor, c_prev: Tensor, cell: Cell) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pre-activations [..., 4H] and the cell before to i, f, g, o and the cell before zoneout, each [..., H]."""
    gate, node, _ = cell.activations
    pre_i, pre_f, pre_g, pre_o = pre.chunk(4, -1)
    p_i, p_f, p_o = (None,) * 3 if cell.peephole is None else cell.peephole.to(pre.dtype).chunk(3)
    i = _activation(gate, pre_i if p_i is None else pre_i + p_i * c_prev)
    f = 1 - i if cell.coupled else _activation(gate, pre_f if p_f is None else pre_f + p_f * c_prev)
    g = _activation(node, pre_g)
    c = candidate(i, f, g, c_prev, cell)
    o = _activation(gate, pre_o if p_o is None else pre_o + p_o * c)
    return i, f, g, o, c


def sent_on(h: Tensor, cell: Cell) -> Tensor:
    """h as the recurrent product receives it."""
    return h if cell.h_scale is None else (h.to(cell.h_scale.dtype) * cell.h_scale).to(h.dtype)


def candidate(i: Tensor, f: Tensor, g: Tensor, c_prev: Tensor, cell: Cell) -> Tensor:
    c = f * c_prev + i * g
    return c.clamp(-cell.cell_clip, cell.cell_clip) if cell.cell_clip else c


_ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.sigmoid,
    torch.tanh,
    torch.relu,
    lambda x: (0.2 * x + 0.5).clamp(0, 1),
    F.softsign,
    lambda x: F.softplus(x, threshold=40.0),  # beyond, exp(-x) is lost in float64 too
    F.leaky_relu,
    F.elu,
)
#: Their derivatives, from their values.
_DERIVATIVES: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda y: y * (1 - y),
    lambda y: 1 - y * y,
    lambda y: (y > 0).to(y.dtype),
    lambda y: 0.2 * ((y > 0) & (y < 1)).to(y.dtype),
    lambda y: (1 - y.abs()).square(),
    lambda y: -torch.expm1(-y),
    lambda y: torch.where(y > 0, torch.ones_like(y), 0.01),
    lambda y: torch.where(y > 0, torch.ones_like(y), y + 1),
)


def _activation(code: int, x: Tensor) -> Tensor:
    return _ACTIVATIONS[code](x)


def cut_steps(resets: Tensor | None, lengths: Tensor | None, reverse: bool) -> Tensor | None:
    """Where the state is zeroed before a step, in the order of processing: bool [T, B, 1].

    A reset at t parts steps t - 1 and t. So in reverse the state is zeroed before step t - 1. Resets past a sequence's
    end part nothing.
    """
    if resets is None:
        return None
    cuts = resets
    if lengths is not None:
        cuts = cuts & (torch.arange(resets.size(0), device=resets.device)[:, None] < lengths)
    if reverse:
        cuts = torch.cat((cuts[1:], torch.zeros_like(cuts[:1])))
    return cuts[..., None]


def previous_states(
    out: Tensor, cells: Tensor, h0: Tensor, c0: Tensor, cuts: Tensor | None, first: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """h [T, B, H] and c [T, B, H] that each step began with; `first` says where a sequence begins."""
    shift = -1 if reverse else 1
    h_prev = torch.where(first, h0, out.roll(shift, 0))
    c_prev = torch.where(first, c0, cells[..., : h0.size(1)].roll(shift, 0))
    if cuts is None:
        return h_prev, c_prev
    return torch.where(cuts, 0, h_prev), torch.where(cuts, 0, c_prev)


def zones(
    cell: Cell, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Which part of h and of c, [T, B, H] = `shape`, stays as it was in the step before; None where nothing does."""
    probabilities = (cell.zoneout_h, cell.zoneout_c)
    if not any(probabilities):
        return None, None
    if cell.noise is None:
        kept = [torch.full((), p, dtype=dtype).expand(shape) for p in probabilities]
    else:
        words = random_bits.draw(cell.noise, shape)
        kept = [random_bits.bernoulli(w, p).to(dtype) for w, p in zip(words[:2], probabilities, strict=True)]
    keep_h, keep_c = (k if p else None for k, p in zip(kept, probabilities, strict=True))
    return keep_h, keep_c


def peephole_gradient(grad_gates: Tensor, c_prev: Tensor, c: Tensor) -> Tensor:
    """[3H] from gradients of the gates before activation [T, B, 4H] and the cells they looked at [T, B, H]."""
    d_i, d_f, _, d_o = grad_gates.chunk(4, -1)
    return torch.cat([(d * seen).sum((0, 1)) for d, seen in ((d_i, c_prev), (d_f, c_prev), (d_o, c))])


def pack_gates(gates: Tensor) -> Tensor:
    """Gates [..., 4H] in the order i, f, g, o to [..., 4 HX]: a unit's side by side; units beyond H are zero."""
    return pad_units(gates.unflatten(-1, (4, -1))).transpose(-1, -2).flatten(-2)


def unpack_gates(packed: Tensor, hidden_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four gates i, f, g, o, each [..., H], of `packed` [..., 4 HX]; undoes `pack_gates`."""
    i, f, g, o = packed.unflatten(-1, (-1, 4))[..., :hidden_size, :].unbind(-1)
    return i, f, g, o


def pad_units(values: Tensor) -> Tensor:
    """Zeros appended to the last dimension up to the next multiple of 8: [..., H] to [..., HX]."""
    return F.pad(values, (0, -values.size(-1) % GROUP))


def _input_product(
    x: Tensor,
    w_ih: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    gate0: Tensor | None,
    cuts: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
) -> Tensor:
    wide = state_dtype(x.dtype)
    product = F.linear(x.to(wide), w_ih.to(wide))
    for bias in (b_ih, b_hh):
        if bias is not None:
            product = product + bias.to(wide)
    if gate0 is None:
        return product
    first = _first_steps(x.size(0), lengths, reverse, x.device)
    first = first if cuts is None else first & ~cuts
    return torch.where(first, product + gate0.to(wide), product)


def _walk_back(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    w_hh: Tensor,
    lengths: Tensor | None,
    cuts: Tensor | None,
    gates: tuple[Tensor, Tensor, Tensor, Tensor],
    c: Tensor,
    c_prev: Tensor,
    reverse: bool,
    cell: Cell,
    norm: _Normalized | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the gates before activation and of the recurrent products [T, B, 4H], of the normalised cell with
    its gain and bias (empty without `norm`), and of the first step's h and c [B, H].

    `c` [T, B, H] is the cell before zoneout.
    """
    wide, steps = c_prev.dtype, len(c_prev)
    i, f, g, o = gates
    d_gate, d_node, d_shown = (_DERIVATIVES[code] for code in cell.activations)
    shown = _activation(cell.activations[2], c if norm is None else norm.hat_c * norm.gain_c + norm.bias_c)
    # What a unit gradient of c (for o: of h) adds to each gate, and what one of h adds to c (as it is shown, normalised
    # or not): [T, B, H].
    per_i, per_f, per_g = g * d_gate(i), c_prev * d_gate(f), i * d_node(g)
    per_o, per_c = shown * d_gate(o), o * d_shown(shown)
    if cell.coupled:
        per_i, per_f = (g - c_prev) * d_gate(i), torch.zeros_like(per_f)
    unclipped = (c.abs() < cell.cell_clip).to(wide) if cell.cell_clip else None
    p_i, p_f, p_o = (None,) * 3 if cell.peephole is None else cell.peephole.to(wide).chunk(3)
    keep_h, keep_c = zones(cell, tuple(c.shape), wide)

    zeros = torch.zeros_like(c_prev[0])
    grad_h = zeros if grad_h_n is None else grad_h_n.to(wide)
    grad_c = zeros if grad_c_n is None else grad_c_n.to(wide)
    grad_gates, grad_products, grad_shown = ([zeros] * steps for _ in range(3))
    for t in _order(steps, not reverse):
        grad_h_t, grad_c_t = grad_h if grad_out is None else grad_h + grad_out[t].to(wide), grad_c
        if keep_h is not None:
            kept_h, grad_h_t = keep_h[t] * grad_h_t, (1 - keep_h[t]) * grad_h_t
        if keep_c is not None:
            kept_c, grad_c_t = keep_c[t] * grad_c_t, (1 - keep_c[t]) * grad_c_t
        d_o = grad_h_t * per_o[t]
        grad_shown[t] = through_c = grad_h_t * per_c[t]
        if norm is not None:
            through_c = _through(through_c * norm.gain_c, norm.hat_c[t], norm.inverse_c[t])
        grad_c_t = grad_c_t + through_c
        if p_o is not None:
            grad_c_t = grad_c_t + d_o * p_o
        if unclipped is not None:
            grad_c_t = grad_c_t * unclipped[t]
        d_i, d_f = grad_c_t * per_i[t], grad_c_t * per_f[t]
        grad_gates[t] = torch.cat((d_i, d_f, grad_c_t * per_g[t], d_o), -1)
        if lengths is not None:
            active = (t < lengths)[:, None]
            grad_gates[t] = torch.where(active, grad_gates[t], 0)
        grad_products[t] = grad_gates[t]
        if norm is not None:
            if lengths is not None:
                grad_shown[t] = torch.where(active, grad_shown[t], 0)
            grad_products[t] = _through(grad_gates[t] * norm.gain, norm.hat[t], norm.inverse[t])
        h_before, c_before = grad_products[t] @ w_hh, grad_c_t * f[t]
        if p_i is not None and p_f is not None:
            c_before = c_before + d_i * p_i + d_f * p_f
        if cell.h_scale is not None:
            h_before = h_before * cell.h_scale
        if keep_h is not None:
            h_before = h_before + kept_h
        if keep_c is not None:
            c_before = c_before + kept_c
        if cuts is not None:
            h_before, c_before = torch.where(cuts[t], 0, h_before), torch.where(cuts[t], 0, c_before)
        if lengths is None:
            grad_h, grad_c = h_before, c_before
        else:
            grad_h, grad_c = torch.where(active, h_before, grad_h), torch.where(active, c_before, grad_c)
    of_gates = torch.stack(grad_gates)
    if norm is None:
        return of_gates, of_gates, of_gates.new_empty(0), grad_h, grad_c
    return of_gates, torch.stack(grad_products), torch.stack(grad_shown), grad_h, grad_c


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of the cell state."""
    return torch.promote_types(dtype, torch.float32)


def autocasts(device: str) -> bool:
    """Whether autocast is on for tensors on ``device``. torch has no answer for "meta", which has no autocast."""
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def _order(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def _first_steps(steps: int, lengths: Tensor | None, reverse: bool, device: torch.device) -> Tensor:
    """Where each sequence begins in the order of processing: bool [T, B or 1, 1]."""
    t = torch.arange(steps, device=device)[:, None, None]
    if not reverse:
        return t == 0
    return t == (steps if lengths is None else lengths[:, None]) - 1
