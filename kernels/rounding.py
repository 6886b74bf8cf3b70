"""Operands of products as the matrix unit should take them."""

import triton
import triton.language as tl


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """``x``, rounded to nearest where products are of TF32.

    The matrix unit reads the upper 19 bits of an fp32 operand. Left to it the rest is cut off, always toward zero,
    and the errors of a sum no longer cancel.
    """
    if PRECISION == "tf32":
        x = tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", (x,), dtype=tl.float32, is_pure=True, pack=1
        )
    return x
