"""Operands of products as the matrix unit should take them."""

import triton
import triton.language as tl


@triton.constexpr_function
def as_is(precision):
    """The precision of operands that are read in every step: to be rounded they would have to pass through registers.
    Split they do in any case."""
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
