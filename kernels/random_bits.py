"""Random bits that depend on a seed, an offset, a stream and a place: those of ``tritlstm.random_bits``."""

import triton
import triton.language as tl

#: A probability is compared with 24 of a word's 32 bits.
DENOMINATOR = tl.constexpr(1 << 24)


@triton.constexpr_function
def threshold(probability):
    return round(probability * DENOMINATOR.value)


@triton.jit
def two_words(noise_ptr, place):
    """Two 32-bit words for each place (int64); ``noise_ptr`` [3] int64 is seed, offset and stream."""
    zero = (place * 0).to(tl.uint32)
    low, high = (place & 0xFFFFFFFF).to(tl.uint32), (place >> 32).to(tl.uint32)
    offset, stream = tl.load(noise_ptr + 1).to(tl.uint32), tl.load(noise_ptr + 2).to(tl.uint32)
    first, second, _, _ = tl.philox(tl.load(noise_ptr), low, high, zero + offset, zero + stream)
    return first, second


@triton.jit
def bernoulli(words, PROBABILITY: tl.constexpr):
    """1.0 with ``PROBABILITY`` for each of ``words``, else 0.0."""
    return ((words >> 8).to(tl.int32) < threshold(PROBABILITY)).to(tl.float32)


@triton.jit
def zones(noise_ptr, place, OF_H: tl.constexpr, OF_C: tl.constexpr):
    """Which part of h and of c keeps its value of the step before; without a seed, the mean of that."""
    if noise_ptr is None:
        keep_h, keep_c = OF_H, OF_C
    else:
        first, second = two_words(noise_ptr, place)
        keep_h, keep_c = bernoulli(first, OF_H), bernoulli(second, OF_C)
    return keep_h, keep_c
