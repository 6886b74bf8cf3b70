"""Copies between a caller's arrays and the kernels' own: other strides, other dtypes, padding; rows of a sequence's
first step. The C library's; the Python library leaves these to torch.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=[
    "n0", "n1", "n2", "valid0", "valid1", "valid2", "source_stride0", "source_stride1", "target_stride0",
    "target_stride1", "accumulate",
])  # fmt: skip
def rearrange(
    source_ptr,
    target_ptr,
    n0,
    n1,
    n2,
    valid0,  # beyond these extents the source is taken for zero
    valid1,
    valid2,
    source_stride0,
    source_stride1,
    target_stride0,
    target_stride1,
    accumulate,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``target[i, j, k] = source[i, j, k]`` for ``[n0, n1, n2]``, in the target's dtype; the last stride is 1."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = (row // n1)[:, None]
    j = (row % n1)[:, None]
    k = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (i < n0) & (k < n2)
    known = inside & (i < valid0) & (j < valid1) & (k < valid2)
    source = i.to(tl.int64) * source_stride0 + j.to(tl.int64) * source_stride1 + k
    target = target_ptr + i.to(tl.int64) * target_stride0 + j.to(tl.int64) * target_stride1 + k
    value = tl.load(source_ptr + source, mask=known, other=0.0).to(tl.float32)
    value += tl.load(target, mask=inside & (accumulate != 0), other=0.0).to(tl.float32)
    tl.store(target, value.to(target_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _first_step(length, reverse):
    """The step at which a sequence starts; for one of no steps, step 0."""
    return tl.where(reverse != 0, tl.maximum(length - 1, 0), 0)


@triton.jit(do_not_specialize=["B", "W", "reverse"])
def take_first(
    source_ptr,  # [T, B, W]
    lengths_ptr,  # [B] int32
    target_ptr,  # [B, W], out
    B,
    W,
    reverse,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The rows of each sequence's first step."""
    b = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (b[:, None] < B) & (k[None, :] < W)
    row = _first_step(tl.load(lengths_ptr + b, mask=b < B, other=0), reverse).to(tl.int64) * B + b
    value = tl.load(source_ptr + row[:, None] * W + k[None, :], mask=inside, other=0.0)
    tl.store(target_ptr + b.to(tl.int64)[:, None] * W + k[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["B", "W", "reverse"])
def add_first(
    source_ptr,  # [B, W]
    lengths_ptr,  # [B] int32
    target_ptr,  # [T, B, W], in and out
    B,
    W,
    reverse,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds to the rows of each sequence's first step."""
    b = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (b[:, None] < B) & (k[None, :] < W)
    row = _first_step(tl.load(lengths_ptr + b, mask=b < B, other=0), reverse).to(tl.int64) * B + b
    at = target_ptr + row[:, None] * W + k[None, :]
    value = tl.load(source_ptr + b.to(tl.int64)[:, None] * W + k[None, :], mask=inside, other=0.0).to(tl.float32)
    value += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, value.to(target_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "B", "W", "reverse"])
def previous_states(
    h_ptr,  # [T, B, W]
    h0_ptr,  # [B, W]
    lengths_ptr,  # [B] int32
    target_ptr,  # [T, B, W], out
    T,
    B,
    W,
    reverse,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The state that each step started from; zero beyond a sequence's end."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    t = row // B
    b = row % B
    inside = (t[:, None] < T) & (k[None, :] < W)
    length = tl.load(lengths_ptr + b, mask=t < T, other=0)
    before = t - 1 + 2 * reverse
    fresh = (before < 0) | (before >= length)
    active = inside & (t < length)[:, None]
    earlier = before.to(tl.int64) * B + b
    h = tl.load(h_ptr + earlier[:, None] * W + k[None, :], mask=active & (fresh == 0)[:, None], other=0.0)
    h0 = tl.load(h0_ptr + b.to(tl.int64)[:, None] * W + k[None, :], mask=active & fresh[:, None], other=0.0)
    value = tl.where(fresh[:, None], h0, h)
    tl.store(target_ptr + row.to(tl.int64)[:, None] * W + k[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["B", "W"])
def keep_empty(
    source_ptr,  # [B, W]
    lengths_ptr,  # [B] int32
    target_ptr,  # [B, W], out where the length is 0
    B,
    W,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Copies the rows of the sequences of no steps."""
    b = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    empty = (b < B) & (tl.load(lengths_ptr + b, mask=b < B, other=1) == 0)
    copied = empty[:, None] & (k[None, :] < W)
    at = b.to(tl.int64)[:, None] * W + k[None, :]
    tl.store(target_ptr + at, tl.load(source_ptr + at, mask=copied, other=0.0), mask=copied)


@triton.jit(do_not_specialize=["T", "B", "W"])
def zero_ends(
    lengths_ptr,  # [B] int32
    target_ptr,  # [T, B, W], out beyond the sequences' ends
    T,
    B,
    W,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Zeros the steps beyond each sequence's end."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    t = row // B
    length = tl.load(lengths_ptr + row % B, mask=t < T, other=0)
    beyond = (t < T) & (t >= length)
    zero = tl.zeros((ROWS, COLUMNS), target_ptr.dtype.element_ty)
    at = row.to(tl.int64)[:, None] * W + k[None, :]
    tl.store(target_ptr + at, zero, mask=beyond[:, None] & (k[None, :] < W))


@triton.jit(do_not_specialize=["T", "B"])
def clamp_lengths(
    lengths_ptr,  # [B] int32
    target_ptr,  # [B] int32, out
    T,
    B,
    ROWS: tl.constexpr,
):
    """Lengths, from 0 to T."""
    b = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    length = tl.load(lengths_ptr + b, mask=b < B, other=0)
    tl.store(target_ptr + b, tl.minimum(tl.maximum(length, 0), T), mask=b < B)
