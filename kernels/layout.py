"""The packed gate order, stated once for the kernels (the host's half is in ``tritlstm.layer``).

A row of ``gates`` holds, for each group of 8 units, the 8 input gates, 8 forget gates, 8 cell inputs and 8
output gates: column ``(u // 8) * 32 + gate * 8 + u % 8``. A block's slice of units is then one contiguous
run, each thread reads 16 bytes, and H is padded to a multiple of 8 only.
"""

import triton
import triton.language as tl


@triton.jit
def unit_of(column):
    return (column // 32) * 8 + column % 8


@triton.jit
def gate_of(column):
    return (column // 8) % 4


@triton.jit
def column_of(unit, gate: tl.constexpr):
    return (unit // 8) * 32 + gate * 8 + unit % 8


@triton.jit
def split_gates(tile, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """``[4 * BLOCK_H, BLOCK_B]`` in packed order to four tiles ``[BLOCK_H, BLOCK_B]``: i, f, g, o."""
    tile = tl.reshape(tile, (BLOCK_H // 8, 2, 2, 8, BLOCK_B))
    tile = tl.permute(tile, (0, 3, 4, 1, 2))
    tile = tl.reshape(tile, (BLOCK_H, BLOCK_B, 2, 2))
    even, odd = tl.split(tile)
    i, g = tl.split(even)
    f, o = tl.split(odd)
    return i, f, g, o
