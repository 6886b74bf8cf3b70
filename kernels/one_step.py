"""A sequence of one time step in one launch: the input's product, the recurrent product, and the cell."""

import triton
import triton.language as tl

from . import cell, layout, rounding


@triton.jit
def _multiply(
    w_ptr, w_row, known, x_ptr, x_row, exists, acc, K: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc`` plus rows of ``w`` [., K] times rows of ``x``; ``w_row`` and ``x_row`` are where they begin."""
    for k_begin in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = k_begin + tl.arange(0, BLOCK_K)
        w = tl.load(w_ptr + w_row[:, None] + k[None, :], mask=known[:, None] & (k[None, :] < K), other=0.0)
        x = tl.load(x_ptr + x_row[:, None] + k[None, :], mask=exists[:, None] & (k[None, :] < K), other=0.0)
        weights = rounding.operands(w, PRECISION)
        acc = rounding.multiply(weights, tl.trans(rounding.operand(x, PRECISION)), acc, PRECISION)
    return acc


@triton.jit(do_not_specialize=["B", "x_stride_b"])
def one_step(
    x_ptr,  # [B, D], rows x_stride_b * D apart
    w_ih_ptr,  # [4H, D]
    w_hh_ptr,  # [4H, H]
    b_ih_ptr,  # [4H] or None
    b_hh_ptr,  # [4H] or None
    h0_ptr,  # [B, H]
    c0_ptr,  # [B, H]
    lengths_ptr,  # [B] int32 of values 0 and 1, or None
    out_ptr,  # [B, H], out; zero where a sequence has no step
    h_n_ptr,  # [B, H], out
    c_n_ptr,  # [B, H], out
    gates_ptr,  # [B, HX, 4], out: activated; with SAVE only
    cells_ptr,  # [B, HX] fp32, out; with SAVE only
    B,
    x_stride_b,
    D: tl.constexpr,
    H: tl.constexpr,
    HX: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,  # of the input's product
    RECURRENT: tl.constexpr,  # of the other
    SAVE: tl.constexpr,
    AMD: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    FORM: tl.constexpr = cell.form(dtype, RECURRENT)
    batch_begin = tl.program_id(0) * BLOCK_B
    unit_begin = tl.program_id(1) * BLOCK_H
    row = tl.arange(0, 4 * BLOCK_H)
    unit = unit_begin + layout.unit_of_product(row)
    known = unit < H
    gate_row = layout.gate_of_product(row) * H + unit
    b = batch_begin + tl.arange(0, BLOCK_B)
    exists = b < B
    b = b.to(tl.int64)

    acc = tl.zeros((4 * BLOCK_H, BLOCK_B), tl.float32)
    at = gate_row.to(tl.int64)
    acc = _multiply(w_ih_ptr, at * D, known, x_ptr, b * x_stride_b * D, exists, acc, D, BLOCK_K, STAGES, PRECISION)
    acc = _multiply(w_hh_ptr, at * H, known, h0_ptr, b * H, exists, acc, H, BLOCK_K, STAGES, RECURRENT)
    if b_ih_ptr is not None:
        acc += tl.load(b_ih_ptr + gate_row, mask=known, other=0.0).to(tl.float32)[:, None]
    if b_hh_ptr is not None:
        acc += tl.load(b_hh_ptr + gate_row, mask=known, other=0.0).to(tl.float32)[:, None]

    unit_of_cell = layout.unit_of_cells(unit_begin, BLOCK_H)
    b_of_cell = layout.batch_of_cells(batch_begin, BLOCK_B)
    in_batch = b_of_cell < B
    inside = (unit_of_cell < H) & in_batch
    state = b_of_cell.to(tl.int64) * H + unit_of_cell
    c0 = tl.load(c0_ptr + state, mask=inside, other=0.0).to(tl.float32)
    i, f, g, o = layout.cells_of_product(acc, BLOCK_H, BLOCK_B)
    i, f, g, o, c, h = cell.forward(i, f, g, o, c0, FORM, AMD)
    shown = h
    if lengths_ptr is not None:
        active = tl.load(lengths_ptr + b_of_cell, mask=in_batch, other=0) > 0
        shown = tl.where(active, h, 0.0)
        h = tl.where(active, h, tl.load(h0_ptr + state, mask=inside, other=0.0).to(tl.float32))
        c = tl.where(active, c, c0)
    tl.store(out_ptr + state, shown.to(dtype), mask=inside)
    tl.store(h_n_ptr + state, h.to(dtype), mask=inside)
    tl.store(c_n_ptr + state, c, mask=inside)
    if SAVE:
        # Backward reads what lies beyond H, and wants it finite.
        stored = (unit_of_cell < HX) & in_batch
        row_of_cell = b_of_cell.to(tl.int64) * HX + unit_of_cell
        at = gates_ptr + tl.expand_dims(row_of_cell * 4, 3) + tl.arange(0, 4)[None, None, None, :]
        activated = layout.join_gates(i.to(dtype), f.to(dtype), g.to(dtype), o.to(dtype))
        tl.store(at, activated, mask=tl.expand_dims(stored, 3) & (tl.arange(0, 4)[None, None, None, :] < 4))
        tl.store(cells_ptr + row_of_cell, c, mask=stored)
