"""Random numbers that depend on a seed, an offset and a place, and on nothing else: Philox 4x32-10 in plain operators.

The Triton kernels draw the same bits at the same places (`kernels/random_bits.py`), so a seed means the same on every
path, device and plan. Source: Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DENOMINATOR", "bernoulli", "draw", "philox"]

_LOW = 0xFFFFFFFF
#: A probability p is the fraction round(p * DENOMINATOR) / DENOMINATOR: 24 of the 32 bits are compared.
DENOMINATOR = 1 << 24


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words a counter. All are int64 that hold 32 bits; the shapes broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # Products of two 32-bit numbers: int64 wraps around, but has the right 64 bits.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & _LOW) ^ c1 ^ k0, b & _LOW, (a >> 32 & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return c0, c1, c2, c3


def draw(noise: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Four words for each place of ``shape``. ``noise`` [3] int64 is (seed, offset, stream)."""
    count = 1
    for size in shape:
        count *= size
    place = torch.arange(count, device=noise.device).view(shape)
    seed, offset, stream = noise.unbind()
    counter = (place & _LOW, place >> 32, offset & _LOW, stream & _LOW)
    return philox(counter, (seed & _LOW, seed >> 32 & _LOW))


def bernoulli(words: Tensor, probability: float) -> Tensor:
    """True with ``probability`` for each of ``words``."""
    return (words >> 8) < round(probability * DENOMINATOR)
