"""Layers together on the kernel path: as a wavefront in one launch, or as a pipeline of chunks of time.

In a wavefront each layer is a chain that reads the one before it: layer l is at step t while layer l + 1 is at step
t - 1, so L layers of T steps take T + L - 1 steps and not L T. A block keeps its units' part of w_ih on chip beside
that of w_hh; only the first layer has a gate GEMM. Where that does not fit or does not pay, :mod:`tritlstm.pipeline`
may. Runs where :mod:`tritlstm.layer` does; arguments are trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import chains, layer, pipeline, plan, status, tf32
from .cell_options import PLAIN
from .plan import padded

__all__ = ["backward", "forward", "next_layers", "way"]


def way(length: int, batch: int, layers: int, hidden: int, x: Tensor, training: bool) -> plan.Together:
    """How so many layers run; ``'apart'``: not by this module."""
    return plan.together(length, batch, layers, hidden, *_fixed(x, training))


def next_layers(length: int, batch: int, layers: int, hidden: int, x: Tensor, training: bool) -> int:
    """How many of the next ``layers`` this module should run together; 1: it should not."""
    return plan.next_layers(layers, length, batch, hidden, *_fixed(x, training))


def _fixed(x: Tensor, training: bool) -> tuple[Any, ...]:
    return x.dtype, plan.device_of(x), plan.dot_precision(x), training, layer._overrides()


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward of L layers of H units.

    ``x`` [T, B, D], ``w_ih`` [4H, D] of the first layer, ``w_between`` [L - 1, 4H, H] of the others, ``w_hh``
    [L, 4H, H], biases [L, 4H], ``h0`` and ``c0`` [L, B, H], ``lengths`` int32 [B].

    Returns ``out`` [T, B, H] of the last layer, ``h_n`` and ``c_n`` [L, B, H] and, if ``save``, ``hidden``
    [L, T, B, HX] and ``gates`` [L, T, B, 4 HX] of all layers, and ``cells`` [L, T, B, HX] in fp32 (else empty), whose
    order in memory is for :func:`backward` to know.
    """
    length, batch, _ = x.shape
    layers, _, hidden = w_hh.shape
    found = way(length, batch, layers, hidden, x, save)
    if found.way == "pipeline":
        return pipeline.forward(x, w_ih, w_between, w_hh, b_ih, b_hh, h0, c0, lengths, save, found.chunks)
    width = padded(hidden)
    device, precision = plan.device_of(x), plan.dot_precision(x)
    chosen = layer._with_cell(_plan("forward", length, batch, layers, hidden, x, save), PLAIN, SEPARATE_OUT=True)
    first_ih, first_hh = (None if b is None else b[0] for b in (b_ih, b_hh))
    products = layer._input_products(x, w_ih, first_ih, first_hh, hidden, device, precision)
    buffer = layer._exchange_buffer((length, batch, layers * width), x, chosen.protocol)
    gates = x.new_empty(length, batch, layers * 4 * width) if save else products
    cells = torch.empty((length, batch, layers * width) if save else (0,), dtype=torch.float32, device=x.device)
    out, h_n, c_n = x.new_empty(length, batch, hidden), x.new_empty(layers, batch, hidden), torch.empty_like(c0)
    flag = status.of(x.device)
    arguments = {
        "gates_ptr": gates,
        "w_ptr": layer._weights(w_hh, chosen),
        "h0_ptr": layer._pad_columns(h0, width),
        "c0_ptr": c0.contiguous(),
        "lengths_ptr": lengths,
        "exchange_ptr": buffer,
        "out_ptr": out,
        "cells_ptr": cells,
        "h_n_ptr": h_n,
        "c_n_ptr": c_n,
        "counter_ptr": layer._counters(chosen, x.device),
        "status_ptr": flag,
        "T": length,
        "B": batch,
        "reverse": 0,
        "step_begin": 0,
        "step_end": length,
        "input_ptr": products,
        "below_ptr": layer._weights(w_between, chosen),
        "bias_ptr": _biases(b_ih, b_hh, layers, width, x.device),
    }
    layer._run(chosen.launch(arguments))
    status.check(flag)
    if not save:
        return out, h_n, c_n, x.new_empty(0), x.new_empty(0), cells
    shape = (layers, length, batch, -1)
    return out, h_n, c_n, buffer.view(shape), gates.view(shape), cells.view(shape)


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
) -> tuple[Tensor, ...]:
    """Backward of :func:`forward`: gradients of x, w_ih, w_between, w_hh, the bias sum [L, 4H], h0 and c0."""
    length, batch, features = x.shape
    layers, _, size = w_hh.shape
    width = padded(size)
    found = way(length, batch, layers, size, x, True)
    if found.way == "pipeline":
        inputs = (x, w_ih, w_between, w_hh, h0, c0, lengths, hidden, gates, cells)
        return pipeline.backward(grad_out, grad_h_n, grad_c_n, *inputs, needs, found.chunks)
    chosen = _plan("backward", length, batch, layers, size, x, True)
    grad_gates = layer._exchange_buffer((length, batch, layers * 4 * width), x, chosen.protocol)
    grad_c0 = torch.empty((layers, batch, size), dtype=torch.float32, device=x.device)
    stride_t, stride_b = batch, 1
    if grad_out is not None:
        grad_out, stride_t, stride_b = layer._row_strides(grad_out)
    flag = status.of(x.device)
    arguments = {
        "grad_out_ptr": grad_out,
        "grad_h_n_ptr": None if grad_h_n is None else grad_h_n.contiguous(),
        "grad_c_n_ptr": None if grad_c_n is None else grad_c_n.contiguous(),
        "w_ptr": layer._weights(w_hh, chosen),
        "c0_ptr": c0.contiguous(),
        "lengths_ptr": lengths,
        "gates_ptr": gates,
        "cells_ptr": cells,
        "grad_gates_ptr": grad_gates,
        "parts_ptr": layer._parts(chosen, x.device),
        "grad_c_ptr": grad_c0,
        "counter_ptr": layer._counters(chosen, x.device),
        "status_ptr": flag,
        "T": length,
        "B": batch,
        "grad_out_stride_t": stride_t,
        "grad_out_stride_b": stride_b,
        "step_begin": 0,
        "step_end": length,
        "reverse": 0,
        "above_ptr": layer._weights(w_between, chosen),
    }
    layer._run(chosen.launch(arguments))
    status.check(flag)

    need_x, need_w_ih, need_between, need_w_hh, need_b, need_h0, need_c0 = needs
    grad_x, grad_w_ih, grad_between, grad_w_hh, grad_b, grad_h0 = (x.new_empty(0) for _ in range(6))
    rows = grad_gates.view(length * batch, layers, 4 * width)
    of_layers = rows.transpose(0, 1)
    h = hidden.view(length * batch, layers, width)[..., :size].transpose(0, 1)
    if need_x:
        grad_x = torch.mm(rows[:, 0], layer.pack_rows(w_ih)).view(length, batch, features)
    if need_w_ih:
        grad_w_ih = layer.unpack_rows(torch.mm(rows[:, 0].t(), x.reshape(length * batch, features)), size)
    if need_between:
        product = torch.bmm(of_layers[1:].transpose(1, 2), h[:-1])
        grad_between = chains._from_unit_major(product, size)
    if need_b:
        grad_b = chains._from_unit_major(rows.sum(0), size)
    if need_w_hh:
        product = chains._recurrent_weight_gradient(of_layers, of_layers[:, :batch], h, h0, batch, False)
        grad_w_hh = chains._from_unit_major(product, size)
    if need_h0:
        grad_h0 = torch.bmm(of_layers[:, :batch], chains._unit_major(w_hh, width))
        if lengths is not None and grad_h_n is not None:
            grad_h0 = torch.where((lengths == 0)[:, None], grad_h_n, grad_h0)
    grad_c0 = grad_c0.to(c0.dtype) if need_c0 else x.new_empty(0)
    return grad_x, grad_w_ih, grad_between, grad_w_hh, grad_b, grad_h0, grad_c0


def _plan(
    direction: str, length: int, batch: int, layers: int, hidden: int, x: Tensor, save: bool
) -> plan.RecurrentPlan:
    precision, device = plan.dot_precision(x), plan.device_of(x)
    overrides: Any = layer._overrides()
    return plan.recurrent(
        direction, length, batch, hidden, x.dtype, device, precision, save, overrides, layers, stacked=True
    )


def _biases(b_ih: Tensor | None, b_hh: Tensor | None, layers: int, width: int, device: torch.device) -> Tensor:
    """[L, HX, 4] in fp32, the sums of both; zero for the first layer, whose products have them."""
    biases = torch.zeros((layers, 4 * width), dtype=torch.float32, device=device)
    for b in (b_ih, b_hh):
        if b is not None:
            biases[1:] += chains._unit_major(b[1:], width)
    return biases
