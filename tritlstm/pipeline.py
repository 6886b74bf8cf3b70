"""Layers as a pipeline on the kernel path: a layer runs on one chunk of time while the next runs on the chunk before.

Where a wavefront (:mod:`tritlstm.stack`) does not fit or does not pay. Each layer has launches of its own, a gate GEMM
and a recurrence for every chunk, in a stream of its own; what one layer needs of another is waited for by events. The
kernels of different layers share the device if they fit beside each other, and else follow each other: nothing waits
in a circle. Runs where :mod:`tritlstm.layer` does; arguments are trusted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import emulator, layer, plan, status, tf32
from .plan import padded

__all__ = ["backward", "forward"]


def forward(
    x: Tensor,
    w_ih: Tensor,
    w_between: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    save: bool,
    chunks: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As :func:`tritlstm.stack.forward`, in ``chunks`` chunks of time."""
    length, batch, _ = x.shape
    layers, _, size = w_hh.shape
    width = padded(size)
    device, precision = plan.device_of(x), plan.dot_precision(x)
    overrides = {**layer._overrides(), **plan.FULL_TILES}
    chosen = plan.recurrent("forward", length, batch, size, x.dtype, device, precision, save, overrides)
    separate = chosen.constants["SEPARATE_OUT"]
    hidden = layer._exchange_buffer((layers, length, batch, width), x, chosen.protocol, chosen.narrow)
    outs = x.new_empty(layers, length, batch, size) if separate else hidden
    gates = x.new_empty(layers, length, batch, 4 * width)
    cells = torch.empty((layers, length, batch, width) if save else (0,), dtype=torch.float32, device=x.device)
    h_n = x.new_empty(layers, batch, size)
    # Between launches the cell state keeps fp32.
    c_n = torch.empty((layers, batch, size), dtype=torch.float32, device=x.device)
    operands, c0_dense = layer._operands(w_hh, h0, chosen), c0.contiguous()
    counters = [layer._counters(chosen, x.device) for _ in range(layers)]
    flag = status.of(x.device)

    def run(k: int, begin: int, end: int) -> None:
        below, w = (x, w_ih) if k == 0 else (outs[k - 1], w_between[k - 1])
        bias_ih, bias_hh = (None if b is None else b[k] for b in (b_ih, b_hh))
        layer._input_products(below[begin:end], w, bias_ih, bias_hh, size, device, precision, gates=gates[k, begin:end])
        arguments = {
            "gates_ptr": gates[k],
            **{name: tensor[k] for name, tensor in operands.items()},
            "c0_ptr": c0_dense[k],
            "lengths_ptr": lengths,
            "exchange_ptr": hidden[k],
            "out_ptr": outs[k],
            "cells_ptr": cells[k] if save else cells,
            "h_n_ptr": h_n[k],
            "c_n_ptr": c_n[k],
            "counter_ptr": counters[k],
            "status_ptr": flag,
            "T": length,
            "B": batch,
            "reverse": 0,
            "step_begin": begin,
            "step_end": end,
        }
        layer._run(chosen.launch(arguments))

    _in_streams(x, range(layers), _parts(length, chunks), run)
    status.check(flag)
    if not save:
        hidden, gates = x.new_empty(0), x.new_empty(0)
    elif chosen.narrow:
        hidden = layer._pad_columns(outs, width)
    return outs[-1].clone(), h_n, c_n.to(c0.dtype), hidden, gates, cells


@tf32.of_backward
def backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_between: Tensor,
    w_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    hidden: Tensor,
    gates: Tensor,
    cells: Tensor,
    needs: Sequence[bool],
    chunks: int,
) -> tuple[Tensor, ...]:
    """As :func:`tritlstm.stack.backward`, from the last layer and the last chunk on."""
    length, batch, features = x.shape
    layers, _, size = w_hh.shape
    width = padded(size)
    device, precision = plan.device_of(x), plan.dot_precision(x)
    overrides = {**layer._overrides(), **plan.FULL_TILES}
    chosen = plan.recurrent("backward", length, batch, size, x.dtype, device, precision, True, overrides)
    grad_gates = layer._exchange_buffer((layers, length, batch, 4 * width), x, chosen.protocol)
    grad_c0 = torch.empty((layers, batch, size), dtype=torch.float32, device=x.device)
    grads = x.new_empty(layers - 1, length, batch, size)  # of the outputs between layers
    stride_t, stride_b = batch, 1
    if grad_out is not None:
        grad_out, stride_t, stride_b = layer._row_strides(grad_out)
    states = [None if g is None else g.contiguous() for g in (grad_h_n, grad_c_n)]
    weights, c0 = layer._weights(w_hh, chosen), c0.contiguous()
    packed = [layer.pack_rows(w) for w in w_between]
    counters = [layer._counters(chosen, x.device) for _ in range(layers)]
    steps = _parts(length, chunks)
    # A launch counts its turns from one, so each has words of its own.
    parts = [[layer._parts(chosen, x.device) for _ in steps] for _ in range(layers)]
    flag = status.of(x.device)

    def run(k: int, begin: int, end: int) -> None:
        top = k == layers - 1
        times = slice(length - end, length - begin)
        if not top:
            above = grad_gates[k + 1, times].view(-1, 4 * width)
            torch.mm(above, packed[k], out=grads[k, times].view(-1, size))
        grad_h, grad_c = (None if g is None else g[k] for g in states)
        arguments = {
            "grad_out_ptr": grad_out if top else grads[k],
            "grad_h_n_ptr": grad_h,
            "grad_c_n_ptr": grad_c,
            "w_ptr": weights[k],
            "c0_ptr": c0[k],
            "lengths_ptr": lengths,
            "gates_ptr": gates[k],
            "cells_ptr": cells[k],
            "grad_gates_ptr": grad_gates[k],
            "parts_ptr": parts[k][steps.index((begin, end))],
            "grad_c_ptr": grad_c0[k],
            "counter_ptr": counters[k],
            "status_ptr": flag,
            "T": length,
            "B": batch,
            "grad_out_stride_t": stride_t if top else batch,
            "grad_out_stride_b": stride_b if top else 1,
            "step_begin": begin,
            "step_end": end,
            "reverse": 0,
        }
        layer._run(chosen.launch(arguments))

    _in_streams(x, range(layers - 1, -1, -1), steps, run)
    status.check(flag)

    need_x, need_w_ih, need_between, need_w_hh, need_b, need_h0, need_c0 = needs
    grad_x, grad_w_ih = x.new_empty(0), x.new_empty(0)
    between, wide, biases, initial = [], [], [], []
    outs = hidden[..., :size]
    for k in range(layers):
        rows = grad_gates[k].view(length * batch, 4 * width)
        below = x if k == 0 else outs[k - 1]
        if need_x and k == 0:
            grad_x = torch.mm(rows, layer.pack_rows(w_ih)).view(length, batch, features)
        if need_w_ih if k == 0 else need_between:
            product = torch.mm(rows.t(), below.reshape(length * batch, below.shape[2]))
            between.append(layer.unpack_rows(product, size))
        if need_b:
            biases.append(layer.unpack_rows(rows.sum(0), size))
        if need_w_hh:
            product = layer._recurrent_weight_gradient(rows, rows[:batch], outs[k], h0[k], False)
            wide.append(layer.unpack_rows(product, size))
        if need_h0:
            grad = torch.mm(rows[:batch], layer.pack_rows(w_hh[k]))
            if lengths is not None and grad_h_n is not None:
                grad = torch.where((lengths == 0)[:, None], grad_h_n[k], grad)
            initial.append(grad)
    if need_w_ih:
        grad_w_ih = between.pop(0)
    stacked = (torch.stack(found) if found else x.new_empty(0) for found in (between, wide, biases, initial))
    return grad_x, grad_w_ih, *stacked, grad_c0.to(c0.dtype) if need_c0 else x.new_empty(0)


def _parts(length: int, chunks: int) -> list[tuple[int, int]]:
    """About equal parts of the steps."""
    ends = [length * k // chunks for k in range(chunks + 1)]
    return list(itertools.pairwise(ends))


def _in_streams(
    x: Tensor, layers: Sequence[int], steps: Sequence[tuple[int, int]], run: Callable[[int, int, int], None]
) -> None:
    """``run(layer, begin, end)`` for all: each layer in a stream of its own, a chunk after the layer before it."""
    if emulator.active():
        for begin, end in steps:
            for k in layers:
                run(k, begin, end)
        return
    current = torch.cuda.current_stream(x.device)
    streams = [torch.cuda.Stream(x.device) for _ in layers]
    for stream in streams:
        stream.wait_stream(current)
    for begin, end in steps:
        done = None
        for k, stream in zip(layers, streams, strict=True):
            with torch.cuda.stream(stream):
                if done is not None:
                    stream.wait_event(done)
                run(k, begin, end)
                done = stream.record_event()
    for stream in streams:
        current.wait_stream(stream)
