"""Operands of products as the matrix unit should take them."""

import triton
import triton.language as tl

#: How :func:`round_weights` lays the weights out: in their rows, or in their columns, gates side by side.
ROWS = tl.constexpr(0)
COLUMNS = tl.constexpr(1)


@triton.constexpr_function
def in_columns(precision, single):
    """Whether the backward kernel's weights are those of :func:`round_weights`."""
    return precision == "tf32" and not single


@triton.constexpr_function
def of_weights(precision):
    """What :func:`operands` has left to do with such weights: to split them."""
    return precision if precision == "tf32x3" else "ieee"


@triton.constexpr_function
def of_operands(precision):
    """``input_precision`` of a product; it says nothing of operands in fp16."""
    return "ieee" if precision == "fp16" else precision


@triton.jit
def nearest(x):
    """``x`` rounded to TF32.

    The matrix unit reads the upper 19 bits of an fp32 operand. Left to it the rest is cut off, always toward zero,
    and the errors of a sum no longer cancel.
    """
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", (x,), dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """``x``, rounded where products are of TF32."""
    if PRECISION == "tf32":
        x = nearest(x)
    return x


@triton.jit
def operands(x, PRECISION: tl.constexpr):
    """``x`` as :func:`multiply` takes it: a tuple of ``x`` alone or, for ``"tf32x3"``, of two that add up to it but for
    2⁻²² of it."""
    if PRECISION == "tf32x3":
        high = nearest(x)
        parts = (high, nearest(x - high))
    else:
        parts = (operand(x, PRECISION),)
    return parts


@triton.jit
def multiply(weights, x, acc, PRECISION: tl.constexpr):
    """``acc + weights @ x`` with the ``weights`` of :func:`operands`.

    ``"tf32x3"`` is nearly exact fp32 by three products of TF32; the fourth, of what the roundings left, is lost in the
    rounding of the sum.
    """
    if PRECISION == "tf32x3":
        parts = operands(x, PRECISION)
        acc = tl.dot(weights[1], parts[0], acc, input_precision="tf32")
        acc = tl.dot(weights[0], parts[1], acc, input_precision="tf32")
        acc = tl.dot(weights[0], parts[0], acc, input_precision="tf32")
    else:
        acc = tl.dot(weights[0], x, acc, input_precision=of_operands(PRECISION))
    return acc


@triton.jit
def round_weights(
    w_ptr,  # [C, 4H, H]
    out_ptr,  # ROWS: [C, 4H, HX]; COLUMNS: [C, HX, HX, 4], the units of w's columns before those of its rows
    H: tl.constexpr,
    HX: tl.constexpr,
    ORDER: tl.constexpr,
    TILE: tl.constexpr,
):
    """w_hh rounded to TF32, zero beyond H, before a recurrent kernel reads it.

    Rounded there it would pass through registers, and the compiler would leave it there for the matrix unit, or bring
    it back in every step. And wgmma takes operands of fp32 only in rows of K.
    """
    gate = tl.arange(0, 4)[:, None, None]
    row_unit = (tl.program_id(0) * TILE + tl.arange(0, TILE))[None, :, None]
    unit = (tl.program_id(1) * TILE + tl.arange(0, TILE))[None, None, :]
    chain = tl.program_id(2).to(tl.int64)
    row = gate * H + row_unit
    known = (gate < 4) & (row_unit < H) & (unit < H)
    w = nearest(tl.load(w_ptr + (chain * 4 * H + row) * H + unit, mask=known, other=0.0))
    inside = (gate < 4) & (row_unit < HX) & (unit < HX)
    if ORDER == ROWS:
        at = (chain * 4 * H + row) * HX + unit
        inside = inside & (row_unit < H)
    else:
        at = ((chain * HX + unit) * HX + row_unit) * 4 + gate
    tl.store(out_ptr + at, w, mask=inside)
