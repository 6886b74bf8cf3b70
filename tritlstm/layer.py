"""One layer in one direction on the kernel path: buffers, launches, and the large products after the recurrence.

Runs CUDA tensors on the GPU and, inside :func:`tritlstm.emulator.emulate`, CPU tensors in the emulator.
Arguments are trusted: :mod:`tritlstm.functional` validates them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import emulator, plan, status
from .kernels import exchange
from .kernels.launch import Launch
from .plan import padded

__all__ = ["backward", "forward", "pack_rows", "padded", "unpack_rows"]

NEEDS_ALL = (True,) * 7


def pack_rows(matrix: Tensor) -> Tensor:
    """``[4H, …]`` in i, f, g, o order to ``[4 HX, …]``, the four gates of a unit side by side, zero for the padding."""
    hidden = matrix.shape[0] // 4
    rest = matrix.shape[1:]
    units = matrix.reshape(4, hidden, *rest).transpose(0, 1)
    if padded(hidden) == hidden:
        return units.reshape(4 * hidden, *rest)
    wide = matrix.new_zeros(padded(hidden), 4, *rest)
    wide[:hidden] = units
    return wide.view(4 * padded(hidden), *rest)


def unpack_rows(matrix: Tensor, hidden: int) -> Tensor:
    """The inverse of :func:`pack_rows`: ``[4 HX, …]`` to ``[4H, …]``."""
    rest = matrix.shape[1:]
    return matrix.reshape(-1, 4, *rest)[:hidden].transpose(0, 1).reshape(4 * hidden, *rest)


def _run(launch: Launch) -> None:
    if emulator.active():
        emulator.run(launch)
    else:
        with torch.cuda.device_of(next(v for v in launch.arguments.values() if isinstance(v, Tensor))):
            launch.run()


def _overrides() -> dict[str, Any]:
    emulation = emulator.current()
    return {} if emulation is None else {**emulation.overrides, "spin_limit": emulation.spin_limit}


def _row_strides(x: Tensor) -> tuple[Tensor, int, int]:
    """``x`` [T, B, D] with its strides in rows of D elements; copied only where it has no such strides."""
    t, b, width = x.shape
    dense = x.is_contiguous() or x.transpose(0, 1).is_contiguous()
    if not dense or width == 0:
        return x.contiguous(), b, 1
    if x.is_contiguous():
        return x, b, 1
    return x.transpose(0, 1), 1, t


def _pad_columns(state: Tensor, width: int) -> Tensor:
    return (
        state.contiguous()
        if state.shape[-1] == width
        else torch.nn.functional.pad(state, (0, width - state.shape[-1]))
    )


def _first_rows(
    length: int, batch: int, lengths: Tensor | None, reverse: bool, device: torch.device
) -> Tensor:
    """Row of [T * B] of the step each sequence starts with; for a zero length, its row at time 0."""
    columns = torch.arange(batch, device=device)
    if not reverse:
        return columns
    if lengths is None:
        return columns + (length - 1) * batch
    return (lengths.long() - 1).clamp_min(0) * batch + columns


def _exchange_buffer(shape: tuple[int, ...], like: Tensor, protocol: str) -> Tensor:
    buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
    if protocol == "flag":
        buffer.view(torch.int16 if buffer.element_size() == 2 else torch.int32).fill_(exchange.POISON.value)
    return buffer


def _counters(layout: plan.RecurrentPlan, device: torch.device) -> Tensor:
    words = layout.n_tiles * exchange.COUNTER_STRIDE.value if layout.protocol == "counter" else 1
    return torch.zeros(words, dtype=torch.int32, device=device)


def _parts(layout: plan.RecurrentPlan, device: torch.device) -> Tensor | None:
    if layout.parts == 1:
        return None
    slots = layout.n_groups * exchange.TAGGED_SLOTS.value
    words = slots * layout.n_blocks * layout.parts * layout.block_h * layout.block_b
    return torch.zeros(words, dtype=torch.int64, device=device)


def _steps(layout: plan.RecurrentPlan, length: int) -> list[tuple[int, int]]:
    if layout.tier == "step":
        return [(step, step + 1) for step in range(length)]
    return [(0, length)]


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
    """Forward of one layer and direction.

    ``x`` [T, B, D], ``w_ih`` [4H, D], ``w_hh`` [4H, H], biases [4H], ``h0`` and ``c0`` [B, H], ``lengths``
    int32 [B], ``gate0`` [B, 4H] added to the pre-activations of each sequence's first step. All of one dtype.

    Returns ``out`` [T, B, H], ``h_n`` and ``c_n`` [B, H] and, if ``save``, what :func:`backward` needs:
    ``gates`` [T, B, 4 HX], the four of a unit side by side, and ``cells`` [T, B, HX] in fp32 (else empty).
    """
    length, batch, _ = x.shape
    hidden = w_hh.shape[1]
    width = padded(hidden)
    precision = plan.dot_precision(x)
    device = plan.device_of(x)
    layout = plan.recurrent("forward", length, batch, hidden, x.dtype, device, precision, save, _overrides())

    gates = _input_products(x, w_ih, b_ih, b_hh, hidden, device, precision)
    if gate0 is not None:
        first = _first_rows(length, batch, lengths, reverse, x.device)
        flat = gates.view(length * batch, 4 * width)
        flat[first] += pack_rows(gate0.t()).t().to(flat.dtype)

    separate = width != hidden
    buffer = _exchange_buffer((length, batch, width), x, layout.protocol)
    out = torch.empty((length, batch, hidden), dtype=x.dtype, device=x.device) if separate else buffer
    cells = torch.empty((length, batch, width) if save else (0,), dtype=torch.float32, device=x.device)
    h_n = torch.empty((batch, hidden), dtype=x.dtype, device=x.device)
    # Between the launches of the step tier the cell state keeps fp32.
    c_dtype = torch.float32 if layout.tier == "step" else c0.dtype
    c_n = torch.empty((batch, hidden), dtype=c_dtype, device=x.device)
    counters = _counters(layout, x.device)
    flag = status.of(x.device)
    arguments = {
        "gates_ptr": gates,
        "w_ptr": _pad_columns(w_hh, width),
        "h0_ptr": _pad_columns(h0, width),
        "c0_ptr": c0.contiguous(),
        "lengths_ptr": lengths,
        "exchange_ptr": buffer,
        "out_ptr": out,
        "cells_ptr": cells,
        "h_n_ptr": h_n,
        "c_n_ptr": c_n,
        "counter_ptr": counters,
        "status_ptr": flag,
        "T": length,
        "B": batch,
        "reverse": int(reverse),
    }
    for begin, end in _steps(layout, length):
        _run(layout.launch({**arguments, "step_begin": begin, "step_end": end}))
    status.check(flag)
    empty = x.new_empty(0)
    return out, h_n, c_n.to(c0.dtype), gates if save else empty, cells


def _input_products(
    x: Tensor,
    w_ih: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    hidden: int,
    device: plan.Device,
    precision: str,
) -> Tensor:
    length, batch, features = x.shape
    x, stride_t, stride_b = _row_strides(x)
    gates = torch.empty((length, batch, 4 * padded(hidden)), dtype=x.dtype, device=x.device)
    layout = plan.gate_gemm(length * batch, features, hidden, x.dtype, device, precision)
    arguments = {
        "x_ptr": x,
        "w_ptr": w_ih.contiguous(),
        "b_ih_ptr": b_ih,
        "b_hh_ptr": b_hh,
        "gates_ptr": gates,
        "rows": length * batch,
        "B": batch,
        "x_stride_t": stride_t,
        "x_stride_b": stride_b,
    }
    _run(layout.launch(arguments))
    return gates


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
    needs: tuple[bool, ...] = NEEDS_ALL,
) -> tuple[Tensor, ...]:
    """Backward of :func:`forward`, from what it saved.

    Returns the gradients of x, w_ih, w_hh, the bias sum [4H], h0, c0 and gate0 [B, 4H], each an empty tensor
    where ``needs`` says so.
    """
    length, batch, features = x.shape
    hidden = w_hh.shape[1]
    grad_gates, grad_c0 = _recurrent_backward(
        grad_out, grad_h_n, grad_c_n, w_hh, c0, lengths, gates, cells, reverse, x
    )
    rows = grad_gates.view(length * batch, -1)
    empty = x.new_empty(0)
    need_x, need_w_ih, need_w_hh, need_b, need_h0, need_c0, need_gate0 = needs
    grad_x = grad_w_ih = grad_w_hh = grad_b = grad_h0 = grad_gate0 = empty
    if need_x:
        grad_x = torch.mm(rows, pack_rows(w_ih)).view(length, batch, features)
    if need_w_ih:
        grad_w_ih = unpack_rows(torch.mm(rows.t(), x.reshape(length * batch, features)), hidden)
    if need_b:
        grad_b = unpack_rows(rows.sum(0), hidden)
    if need_w_hh or need_h0 or need_gate0:
        first = rows[_first_rows(length, batch, lengths, reverse, x.device)]
        if need_w_hh:
            grad_w_hh = unpack_rows(_recurrent_weight_gradient(rows, first, out, h0, reverse), hidden)
        if need_h0:
            grad_h0 = torch.mm(first, pack_rows(w_hh))
            if lengths is not None and grad_h_n is not None:
                grad_h0 = torch.where((lengths == 0)[:, None], grad_h_n, grad_h0)
        if need_gate0:
            grad_gate0 = unpack_rows(first.t(), hidden).t().contiguous()
    return (
        grad_x,
        grad_w_ih,
        grad_w_hh,
        grad_b,
        grad_h0,
        grad_c0.to(c0.dtype) if need_c0 else empty,
        grad_gate0,
    )


def _recurrent_backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    w_hh: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    reverse: bool,
    x: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the gates' pre-activations [T, B, 4 HX] and of c0 [B, H] (fp32)."""
    length, batch, _ = x.shape
    hidden = w_hh.shape[1]
    device = plan.device_of(x)
    precision = plan.dot_precision(x)
    layout = plan.recurrent("backward", length, batch, hidden, x.dtype, device, precision, True, _overrides())
    stride_t, stride_b = batch, 1
    if grad_out is not None:
        grad_out, stride_t, stride_b = _row_strides(grad_out)
    grad_gates = _exchange_buffer((length, batch, 4 * padded(hidden)), x, layout.protocol)
    grad_c0 = torch.empty((batch, hidden), dtype=torch.float32, device=x.device)
    flag = status.of(x.device)
    arguments = {
        "grad_out_ptr": grad_out,
        "grad_h_n_ptr": None if grad_h_n is None else grad_h_n.contiguous(),
        "grad_c_n_ptr": None if grad_c_n is None else grad_c_n.contiguous(),
        "w_ptr": _pad_columns(w_hh, padded(hidden)),
        "c0_ptr": c0.contiguous(),
        "lengths_ptr": lengths,
        "gates_ptr": gates,
        "cells_ptr": cells,
        "grad_gates_ptr": grad_gates,
        "parts_ptr": _parts(layout, x.device),
        "grad_c_ptr": grad_c0,
        "counter_ptr": _counters(layout, x.device),
        "status_ptr": flag,
        "T": length,
        "B": batch,
        "grad_out_stride_t": stride_t,
        "grad_out_stride_b": stride_b,
        "reverse": int(reverse),
    }
    for begin, end in _steps(layout, length):
        _run(layout.launch({**arguments, "step_begin": begin, "step_end": end}))
    status.check(flag)
    return grad_gates, grad_c0


def _recurrent_weight_gradient(rows: Tensor, first: Tensor, out: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    """``sum over t of grad_gates[t]ᵀ h[t - 1]``, [4 HX, H]; h past a sequence's end is zero in ``out``."""
    length, batch, hidden = out.shape
    product = torch.mm(first.t(), h0)
    if length == 1:
        return product
    inner = (length - 1) * batch
    h = out.reshape(length * batch, hidden)
    later, earlier = (rows[:inner], h[batch:]) if reverse else (rows[batch:], h[:inner])
    return product.addmm(later.t(), earlier)
