"""One LSTM layer in one direction, written with plain PyTorch operators: forward and hand-derived backward.

This is what the operators of `tritlstm.ops` compute where the Triton kernels do not run (the CPU, float64).
It is the formula, not the fast path: one large product over all time steps, then a Python loop over them.
Every function here is pure and differentiable, so running `forward` and `backward` under autograd gives
derivatives of any order.

Shapes: T time steps, B batch, D input size, H hidden size, HX = H rounded up to a multiple of 8.
All arithmetic is in float32 (float64 for float64 inputs); `h` is rounded to the input's dtype at every step,
as it is when it is exchanged between thread blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 8  # HX is a multiple of this: rows of a 16-bit state then begin at multiples of 16 bytes


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the layer over all time steps; arguments and results are those of `torch.ops.tritlstm.layer`."""
    wide = state_dtype(x.dtype)
    inputs = _input_product(x, w_ih, b_ih, b_hh, gate0, lengths, reverse)  # [T, B, 4H]
    recurrent = w_hh.to(wide).t()
    h, c = h0, c0.to(wide)
    out, gates, cells = ([h0] * x.size(0) for _ in range(3))
    for t in _order(x.size(0), reverse):
        i, f, g, o = (inputs[t] + h.to(wide) @ recurrent).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c_new = f * c + i * g
        h_new = (o * c_new.tanh()).to(x.dtype)
        if lengths is None:
            h, c, out[t] = h_new, c_new, h_new
        else:
            active = (t < lengths)[:, None]
            h, c = torch.where(active, h_new, h), torch.where(active, c_new, c)
            out[t] = torch.where(active, h_new, 0)
        gates[t], cells[t] = torch.cat((i, f, g, o), -1), c
    if not save:
        return torch.stack(out), h, c.to(c0.dtype, copy=True), x.new_empty(0), c.new_empty(0)
    saved = pack_gates(torch.stack(gates)).to(x.dtype), pad_units(torch.stack(cells))
    return torch.stack(out), h, c.to(c0.dtype, copy=True), *saved


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
) -> tuple[Tensor, ...]:
    """Walk back over all steps; arguments and results are those of `torch.ops.tritlstm.layer_backward`."""
    wide = state_dtype(x.dtype)
    first = _first_steps(x.size(0), lengths, reverse, x.device)
    shift = -1 if reverse else 1
    h_prev = torch.where(first, h0, out.roll(shift, 0)).to(wide)  # [T, B, H]
    c_prev = torch.where(first, c0.to(wide), cells[..., : h0.size(1)].roll(shift, 0))
    grad_gates, grad_h0, grad_c0 = _walk_back(
        grad_out, grad_h_n, grad_c_n, w_hh.to(wide), lengths, gates, cells, c_prev, reverse
    )
    rows = grad_gates.flatten(0, 1)  # [T B, 4H]
    results = (
        lambda: (grad_gates @ w_ih.to(wide)).to(x.dtype),
        lambda: (rows.t() @ x.flatten(0, 1).to(wide)).to(w_ih.dtype),
        lambda: (rows.t() @ h_prev.flatten(0, 1)).to(w_hh.dtype),
        lambda: rows.sum(0).to(w_ih.dtype),
        lambda: grad_h0.to(h0.dtype, copy=True),
        lambda: grad_c0.to(c0.dtype, copy=True),
        lambda: torch.where(first, grad_gates, 0).sum(0).to(x.dtype),
    )
    return tuple(result() if need else x.new_empty(0) for result, need in zip(results, needs, strict=True))


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
    return torch.where(first, product + gate0.to(wide), product)


def _walk_back(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    w_hh: Tensor,
    lengths: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    c_prev: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the gates before activation [T, B, 4H], and of the first step's h and c [B, H]."""
    wide, hidden_size = c_prev.dtype, c_prev.size(-1)
    i, f, g, o = (gate.to(wide) for gate in unpack_gates(gates, hidden_size))
    shown = cells[..., :hidden_size].tanh()
    # What a unit gradient of c (for o: of h) adds to each gate, and what one of h adds to c: [T, B, H].
    per_i, per_f, per_g = g * i * (1 - i), c_prev * f * (1 - f), i * (1 - g * g)
    per_o, per_c = shown * o * (1 - o), o * (1 - shown * shown)

    zeros = torch.zeros_like(c_prev[0])
    grad_h = zeros if grad_h_n is None else grad_h_n.to(wide)
    grad_c = zeros if grad_c_n is None else grad_c_n.to(wide)
    steps = len(c_prev)
    grad_gates = [zeros] * steps
    for t in _order(steps, not reverse):
        grad_h_t = grad_h if grad_out is None else grad_h + grad_out[t].to(wide)
        grad_c_t = grad_c + grad_h_t * per_c[t]
        grad = (grad_c_t * per_i[t], grad_c_t * per_f[t], grad_c_t * per_g[t], grad_h_t * per_o[t])
        grad_gates[t] = torch.cat(grad, -1)
        if lengths is None:
            grad_h, grad_c = grad_gates[t] @ w_hh, grad_c_t * f[t]
        else:
            active = (t < lengths)[:, None]
            grad_gates[t] = torch.where(active, grad_gates[t], 0)
            grad_h = torch.where(active, grad_gates[t] @ w_hh, grad_h)
            grad_c = torch.where(active, grad_c_t * f[t], grad_c)
    return torch.stack(grad_gates), grad_h, grad_c


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic and of the cell state."""
    return torch.promote_types(dtype, torch.float32)


def _order(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def _first_steps(steps: int, lengths: Tensor | None, reverse: bool, device: torch.device) -> Tensor:
    """Where each sequence begins in the order of processing: bool [T, B or 1, 1]."""
    t = torch.arange(steps, device=device)[:, None, None]
    if not reverse:
        return t == 0
    return t == (steps if lengths is None else lengths[:, None]) - 1
