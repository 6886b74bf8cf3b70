"""The fused gate GEMM: the input products of all time steps with both biases, the four gates of a unit side by side."""

import triton
import triton.language as tl

from . import rounding


@triton.jit(do_not_specialize=["rows", "B", "x_stride_t", "x_stride_b"])
def gate_gemm(
    x_ptr,  # rows of D: row t * x_stride_t + b * x_stride_b
    w_ptr,  # [4H, D]
    b_ih_ptr,  # [4H] or None
    b_hh_ptr,  # [4H] or None
    gates_ptr,  # [rows, HX, 4], out
    rows,
    B,
    x_stride_t,
    x_stride_b,
    D: tl.constexpr,
    H: tl.constexpr,
    HX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Tiles in groups of GROUP_M rows, so that neighbouring programs share their operands in L2.
    program = tl.program_id(0)
    n_m = tl.cdiv(rows, BLOCK_M)
    n_n: tl.constexpr = (4 * HX + BLOCK_N - 1) // BLOCK_N
    group = program // (GROUP_M * n_n)
    first_m = group * GROUP_M
    group_rows = tl.minimum(n_m - first_m, GROUP_M)
    within = program - group * GROUP_M * n_n
    tile_m = first_m + within % group_rows
    tile_n = within // group_rows

    m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = m < rows
    x_row = (m // B) * x_stride_t + (m % B) * x_stride_b
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    unit = column // 4
    w_row = column % 4 * H + unit
    known = unit < H
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k_begin in range(0, D, BLOCK_K):
        k = k_begin + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + x_row[:, None] * D + k[None, :], mask=in_rows[:, None] & (k[None, :] < D), other=0.0)
        w = tl.load(
            w_ptr + w_row.to(tl.int64)[None, :] * D + k[:, None], mask=known[None, :] & (k[:, None] < D), other=0.0
        )
        x, w = rounding.operand(x, PRECISION), rounding.operand(w, PRECISION)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if b_ih_ptr is not None:
        acc += tl.load(b_ih_ptr + w_row, mask=known, other=0.0).to(tl.float32)[None, :]
    if b_hh_ptr is not None:
        acc += tl.load(b_hh_ptr + w_row, mask=known, other=0.0).to(tl.float32)[None, :]
    tl.store(
        gates_ptr + m[:, None] * (4 * HX) + column[None, :],
        acc.to(gates_ptr.dtype.element_ty),
        mask=in_rows[:, None] & (column[None, :] < 4 * HX),
    )
