"""Several recurrences over the same input on the kernel path: both directions of a layer, or its heads.

A chain is an LSTM of H units that needs nothing of the others. Their gates, states and results lie side by side in a
row of memory, so that one gate GEMM reads the input once for all, one launch of a recurrent kernel walks all that fit
on the device together, and its results are the concatenated output. Runs where :mod:`tritlstm.layer` does; arguments
are trusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import layer, plan, status, tf32
from .plan import padded

__all__ = ["backward", "fits", "forward"]


def fits(length: int, batch: int, chains: int, hidden: int, x: Tensor, save: bool) -> bool:
    """Whether there are plans that know chains, forward and, if ``save``, backward."""
    try:
        for direction in ("forward", "backward") if save else ("forward",):
            _plan(direction, length, batch, chains, hidden, x, save)
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
    reversed: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward of C chains, of which the last ``reversed`` walk from the last step to the first.

    ``x`` [T, B, D], ``w_ih`` [C, 4H, D], ``w_hh`` [C, 4H, H], biases [C, 4H], ``h0`` and ``c0`` [C, B, H],
    ``lengths`` int32 [B].

    Returns ``out`` [T, B, C H], ``h_n`` and ``c_n`` [C, B, H] and, if ``save``, ``gates`` [T, B, C * 4 HX] and
    ``cells`` [T, B, C * HX] in fp32 (else empty).
    """
    length, batch, _ = x.shape
    chains, _, hidden = w_hh.shape
    width = padded(hidden)
    device, precision = plan.device_of(x), plan.dot_precision(x)
    chosen = _plan("forward", length, batch, chains, hidden, x, save)
    separate = chosen.constants["SEPARATE_OUT"]
    b_ih, b_hh = (None if b is None else _gate_major(b, width) for b in (b_ih, b_hh))
    gates = layer._input_products(x, _gate_major(w_ih, width), b_ih, b_hh, chains * width, device, precision)
    buffer = layer._exchange_buffer((length, batch, chains * width), x, chosen.protocol, chosen.narrow)
    out = x.new_empty(length, batch, chains * hidden) if separate else buffer
    cells = torch.empty((length, batch, chains * width) if save else (0,), dtype=torch.float32, device=x.device)
    h_n = x.new_empty(chains, batch, hidden)
    # Between the launches of the step tier the cell state keeps fp32.
    c_n = torch.empty_like(c0, dtype=torch.float32 if chosen.tier == "step" else c0.dtype).contiguous()
    flag = status.of(x.device)
    in_rows = {
        "gates_ptr": (gates, 4 * width),
        "exchange_ptr": (buffer, width),
        "out_ptr": (out, hidden),
        "cells_ptr": (cells, width if save else 0),
    }
    by_chain = {
        **layer._operands(w_hh, h0, chosen),
        "c0_ptr": c0.contiguous(),
        "h_n_ptr": h_n,
        "c_n_ptr": c_n,
        "counter_ptr": layer._counters(chosen, x.device),
    }
    shared = {"lengths_ptr": lengths, "status_ptr": flag, "T": length, "B": batch}
    _launch(chosen, length, in_rows, by_chain, shared, reversed)
    status.check(flag)
    return out, h_n, c_n.to(c0.dtype), gates if save else x.new_empty(0), cells


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
    reversed: int,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Backward of :func:`forward`: gradients of x, w_ih, w_hh, the bias sum [C, 4H], h0 and c0, empty if not needed."""
    length, batch, features = x.shape
    chains, _, hidden = w_hh.shape
    width = padded(hidden)
    chosen = _plan("backward", length, batch, chains, hidden, x, True)
    grad_gates = layer._exchange_buffer((length, batch, chains * 4 * width), x, chosen.protocol)
    grad_c0 = torch.empty((chains, batch, hidden), dtype=torch.float32, device=x.device)
    flag = status.of(x.device)
    in_rows = {
        "grad_out_ptr": (None if grad_out is None else grad_out.contiguous(), hidden),
        "gates_ptr": (gates, 4 * width),
        "cells_ptr": (cells, width),
        "grad_gates_ptr": (grad_gates, 4 * width),
    }
    by_chain = {
        "grad_h_n_ptr": None if grad_h_n is None else grad_h_n.contiguous(),
        "grad_c_n_ptr": None if grad_c_n is None else grad_c_n.contiguous(),
        "w_ptr": layer._weights(w_hh, chosen),
        "c0_ptr": c0.contiguous(),
        "parts_ptr": layer._parts(chosen, x.device),
        "grad_c_ptr": grad_c0,
        "counter_ptr": layer._counters(chosen, x.device),
    }
    strides = {"grad_out_stride_t": batch * chains, "grad_out_stride_b": chains}
    shared = {"lengths_ptr": lengths, "status_ptr": flag, "T": length, "B": batch, **strides}
    _launch(chosen, length, in_rows, by_chain, shared, reversed)
    status.check(flag)

    need_x, need_w_ih, need_w_hh, need_b, need_h0, need_c0 = needs
    rows = grad_gates.view(length * batch, -1)
    grad_x, grad_w_ih, grad_w_hh, grad_b, grad_h0 = (x.new_empty(0) for _ in range(5))
    if need_x:
        grad_x = torch.mm(rows, _unit_major(w_ih, width).flatten(0, 1)).view(length, batch, features)
    if need_w_ih:
        product = torch.mm(rows.t(), x.reshape(length * batch, features))
        grad_w_ih = _from_unit_major(product.view(chains, 4 * width, features), hidden)
    if need_b:
        grad_b = _from_unit_major(rows.sum(0).view(chains, 4 * width), hidden)
    if need_w_hh or need_h0:
        of_chains = rows.view(length * batch, chains, -1).transpose(0, 1)
        h = out.view(length * batch, chains, hidden).transpose(0, 1)
        wide, small = [], []
        for part, reverse in _directions(chains, reversed):
            grads = of_chains[part]
            first = grads[:, layer._first_rows(length, batch, lengths, reverse, x.device)].contiguous()
            if need_w_hh:
                product = _recurrent_weight_gradient(grads, first, h[part], h0[part], batch, reverse)
                wide.append(_from_unit_major(product, hidden))
            if need_h0:
                small.append(torch.bmm(first, _unit_major(w_hh[part], width)))
        if need_w_hh:
            grad_w_hh = torch.cat(wide)
        if need_h0:
            grad_h0 = torch.cat(small)
            if lengths is not None and grad_h_n is not None:
                grad_h0 = torch.where((lengths == 0)[:, None], grad_h_n, grad_h0)
    return grad_x, grad_w_ih, grad_w_hh, grad_b, grad_h0, grad_c0.to(c0.dtype) if need_c0 else x.new_empty(0)


def _plan(
    direction: str, length: int, batch: int, chains: int, hidden: int, x: Tensor, save: bool
) -> plan.RecurrentPlan:
    precision, device = plan.dot_precision(x), plan.device_of(x)
    return plan.recurrent(
        direction, length, batch, hidden, x.dtype, device, precision, save, layer._overrides(), chains
    )


def _launch(
    chosen: plan.RecurrentPlan,
    length: int,
    in_rows: Mapping[str, tuple[Tensor | None, int]],
    by_chain: Mapping[str, Tensor | None],
    shared: Mapping[str, Any],
    reversed: int,
) -> None:
    """Launches for all chains, ``at_once`` at a time. A tensor of ``in_rows`` comes with a chain's part of a row."""
    for first in range(0, chosen.chains, chosen.at_once):
        arguments = dict(shared)
        for name, (rows, each) in in_rows.items():
            arguments[name] = rows if rows is None else rows.view(-1)[first * each :]
        for name, tensor in by_chain.items():
            arguments[name] = tensor if tensor is None else tensor[first:]
        # The kernel counts from the first chain that it is given.
        arguments["reverse"] = reversed + first
        count = min(chosen.at_once, chosen.chains - first)
        for begin, end in layer._steps(chosen, length):
            layer._run(chosen.launch({**arguments, "step_begin": begin, "step_end": end}, count))


def _directions(chains: int, reversed: int) -> Iterator[tuple[slice, bool]]:
    for part, reverse in ((slice(0, chains - reversed), False), (slice(chains - reversed, chains), True)):
        if part.start < part.stop:
            yield part, reverse


def _recurrent_weight_gradient(
    rows: Tensor, first: Tensor, h: Tensor, h0: Tensor, batch: int, reverse: bool
) -> Tensor:
    """``sum over t of grad_gates[t]ᵀ h[t - 1]`` of chains of one direction, [chains, 4 HX, H]."""
    product = torch.bmm(first.transpose(1, 2), h0)
    inner = rows.shape[1] - batch
    if inner == 0:
        return product
    later, earlier = (rows[:, :inner], h[:, batch:]) if reverse else (rows[:, batch:], h[:, :inner])
    return torch.baddbmm(product, later.transpose(1, 2), earlier)


def _padded_units(matrix: Tensor, width: int) -> Tensor:
    """``[C, 4H, …]`` to ``[C, 4, HX, …]``, zero in the padding."""
    chains, rows, *rest = matrix.shape
    units = matrix.reshape(chains, 4, rows // 4, *rest)
    if rows == 4 * width:
        return units
    return torch.nn.functional.pad(units, (0, 0) * len(rest) + (0, width - rows // 4))


def _gate_major(matrix: Tensor, width: int) -> Tensor:
    """``[C, 4H, …]`` to ``[4 C HX, …]`` for the gate GEMM: gates i, f, g, o, in each the units of all chains."""
    return _padded_units(matrix, width).transpose(0, 1).flatten(0, 2).contiguous()


def _unit_major(matrix: Tensor, width: int) -> Tensor:
    """``[C, 4H, …]`` to ``[C, 4 HX, …]``, the four gates of a unit side by side."""
    return _padded_units(matrix, width).transpose(1, 2).flatten(1, 2)


def _from_unit_major(matrix: Tensor, hidden: int) -> Tensor:
    """The inverse of :func:`_unit_major`."""
    chains, rows, *rest = matrix.shape
    units = matrix.reshape(chains, rows // 4, 4, *rest)[:, :hidden]
    return units.transpose(1, 2).reshape(chains, 4 * hidden, *rest)
