"""Operands of the recurrent product of fp32, where TF32 is allowed, in fp16: half the bytes, and twice the products.

TF32 keeps 11 significant bits of an operand, and so does fp16. What fp16 lacks is range, which powers of two give back:
each row of w_hh is multiplied by one that brings its largest value to 2¹⁴ … 2¹⁵, each row of h0 likewise, and h, which
is no larger than 1, by :data:`STATE_SCALE`. Values down to 2⁻²⁸ of the largest then keep their 11 bits; smaller ones
err by 2⁻³⁹ of it at most, where the largest itself may err by 2⁻¹¹. Sums are fp32 and are multiplied by the inverse.
"""

import triton
import triton.language as tl

#: The largest |h| in the exchange buffer.
STATE_SCALE = tl.constexpr(16384.0)
#: Exponents of fp32 as they are stored: what those of the largest value of a row and of its scale add up to, and that
#: of a scale at most.
TOGETHER = tl.constexpr(127 + 127 + 14)
LARGEST = tl.constexpr(127 + 100)


@triton.jit
def _power(exponent):
    """The power of two that has this exponent as it is stored."""
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _rows(
    source_ptr, target_ptr, row, known, stored, H: tl.constexpr, HX: tl.constexpr, COLUMNS: tl.constexpr
):
    """Scales rows of ``[., H]`` into rows of ``[., HX]`` fp16; returns the exponents of their scales.

    Rows that are not ``known`` are zero. One with an infinity or a NaN is not scaled.
    """
    largest = tl.zeros(row.shape, tl.int32)  # of the bits, which are in the order of the values
    for begin in range(0, H, COLUMNS):
        k = begin + tl.arange(0, COLUMNS)
        x = tl.load(source_ptr + row[:, None] * H + k[None, :], mask=known[:, None] & (k[None, :] < H), other=0.0)
        largest = tl.maximum(largest, tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
    own = largest >> 23
    exponent = tl.where(own == 255, 127, tl.minimum(-own + TOGETHER, LARGEST))
    for begin in range(0, HX, COLUMNS):
        k = begin + tl.arange(0, COLUMNS)
        x = tl.load(source_ptr + row[:, None] * H + k[None, :], mask=known[:, None] & (k[None, :] < H), other=0.0)
        x = (x * _power(exponent)[:, None]).to(tl.float16)
        tl.store(target_ptr + row[:, None] * HX + k[None, :], x, mask=stored[:, None] & (k[None, :] < HX))
    return exponent


@triton.jit(do_not_specialize=["states"])
def narrow(
    w_ptr,  # [C, 4H, H]
    h0_ptr,  # [states, H]
    w_out_ptr,  # [C, 4H, HX] fp16, out
    entry_ptr,  # [states + 1, HX] fp16, out; the last row is zero
    w_scale_ptr,  # [C, HX, 4] fp32, out: what a sum with h is multiplied with; nothing beyond H
    entry_scale_ptr,  # [states + 1] fp32, out: a sum with h0, besides
    states,
    H: tl.constexpr,
    HX: tl.constexpr,
    CHAINS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    WEIGHTS: tl.constexpr = CHAINS * 4 * H
    first = tl.program_id(0) * ROWS
    if first < WEIGHTS:
        row = first + tl.arange(0, ROWS)
        known = row < WEIGHTS
        exponent = _rows(w_ptr, w_out_ptr, row.to(tl.int64), known, known, H, HX, COLUMNS)
        of_chain = row % (4 * H)
        at = row // (4 * H) * (4 * HX) + of_chain % H * 4 + of_chain // H
        tl.store(w_scale_ptr + at, _power(254 - exponent) / STATE_SCALE, mask=known)
    else:
        row = first - (WEIGHTS + ROWS - 1) // ROWS * ROWS + tl.arange(0, ROWS)
        stored = row <= states
        exponent = _rows(h0_ptr, entry_ptr, row.to(tl.int64), row < states, stored, H, HX, COLUMNS)
        tl.store(entry_scale_ptr + row, _power(254 - exponent) * STATE_SCALE, mask=stored)
