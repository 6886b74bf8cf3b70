"""Products of matrices whose sizes are known at run time only, and sums over rows.

The Python library leaves these to ``torch.mm`` and ``torch.sum``; the C library has only what stands here. Both add in
an order that depends on the sizes and tiles alone, so the same inputs give the same bits.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=[
    "M", "N", "K", "a_stride", "b_stride", "c_stride", "biased", "accumulate"
])  # fmt: skip
def product(
    a_ptr,  # [M, K], or [K, M] if TRANS_A
    b_ptr,  # [K, N], or [N, K] if TRANS_B
    bias_ptr,  # [N] fp32, read if biased
    c_ptr,  # [M, N], out; read too if accumulate
    M,
    N,
    K,
    a_stride,  # elements between two rows
    b_stride,
    c_stride,
    biased,
    accumulate,
    TRANS_A: tl.constexpr,
    TRANS_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``C = op(A) op(B) + bias + C``, summed in fp32 and rounded once."""
    # Tiles in groups of GROUP_M rows, so that neighbouring programs share their operands in L2.
    program = tl.program_id(0)
    n_m = tl.cdiv(M, BLOCK_M)
    n_n = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_M * n_n)
    first_m = group * GROUP_M
    group_rows = tl.minimum(n_m - first_m, GROUP_M)
    within = program - group * GROUP_M * n_n
    m = (first_m + within % group_rows) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within // group_rows) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m = m < M
    in_n = n < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k_begin in range(0, K, BLOCK_K):
        k = k_begin + tl.arange(0, BLOCK_K)
        in_k = k < K
        if TRANS_A:
            at = k.to(tl.int64)[:, None] * a_stride + m[None, :]
            a = tl.trans(tl.load(a_ptr + at, mask=in_k[:, None] & in_m[None, :], other=0.0))
        else:
            at = m.to(tl.int64)[:, None] * a_stride + k[None, :]
            a = tl.load(a_ptr + at, mask=in_m[:, None] & in_k[None, :], other=0.0)
        if TRANS_B:
            at = n.to(tl.int64)[:, None] * b_stride + k[None, :]
            b = tl.trans(tl.load(b_ptr + at, mask=in_n[:, None] & in_k[None, :], other=0.0))
        else:
            at = k.to(tl.int64)[:, None] * b_stride + n[None, :]
            b = tl.load(b_ptr + at, mask=in_k[:, None] & in_n[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    acc += tl.load(bias_ptr + n, mask=in_n & (biased != 0), other=0.0)[None, :]
    at = c_ptr + m.to(tl.int64)[:, None] * c_stride + n[None, :]
    inside = in_m[:, None] & in_n[None, :]
    acc += tl.load(at, mask=inside & (accumulate != 0), other=0.0).to(tl.float32)
    tl.store(at, acc.to(c_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["K", "N"])
def column_sums(
    a_ptr,  # [K, N], dense
    out_ptr,  # [N] fp32, out
    K,
    N,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums over the rows; each of BLOCK_K interleaved parts is summed by itself, then the parts."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for k_begin in range(0, K, BLOCK_K):
        k = k_begin + tl.arange(0, BLOCK_K)
        at = k.to(tl.int64)[:, None] * N + n[None, :]
        acc += tl.load(a_ptr + at, mask=(k[:, None] < K) & (n[None, :] < N), other=0.0).to(tl.float32)
    tl.store(out_ptr + n, tl.sum(acc, 0), mask=n < N)
