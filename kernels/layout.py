"""The orders of gates, units and sequences, stated once for the kernels (the host's half is in ``tritlstm.layer``).

In memory the four gates of a unit lie side by side: a row of ``gates`` is ``[HX, 4]``, column ``4 * unit + gate``.

On chip, a tile of cells is ``[BLOCK_B / 8, BLOCK_H, 8]``: sequences are split into a slow and a fast part, so that the
compiler's own choice of layout gives a warp 4 units of 8 sequences, and a thread the same unit of every 8th sequence.
The rows of the product are ordered such that its warps hold the same 4 units: two gates of a unit lie in one thread,
the other two 16 lanes away. README.md draws both.
"""

import triton
import triton.language as tl


@triton.jit
def unit_of_product(row):
    """Which of a block's units a row of its product ``[4 * BLOCK_H, BLOCK_B]`` belongs to."""
    return row // 16 * 4 + row % 4


@triton.jit
def gate_of_product(row):
    return row // 4 % 2 * 2 + row // 8 % 2


@triton.jit
def cells_of_product(product, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """``[4 * BLOCK_H, BLOCK_B]`` in the product's order to four tiles of cells: i, f, g, o."""
    tile = tl.reshape(product, (BLOCK_H // 4, 2, 2, 4, BLOCK_B // 8, 8))
    tile = tl.permute(tile, (4, 0, 3, 5, 2, 1))
    return split_gates(tl.reshape(tile, (BLOCK_B // 8, BLOCK_H, 8, 2, 2)))


@triton.jit
def first_half(product, BLOCK_B: tl.constexpr):
    """``[ROWS, BLOCK_B]`` to its first ``BLOCK_B / 2`` columns: in a product, other registers than the rest."""
    tile = tl.reshape(product, (product.shape[0], 2, BLOCK_B // 2))
    first, _ = tl.split(tl.permute(tile, (0, 2, 1)))
    return first


@triton.jit
def unit_of_sum(row, BLOCK_H: tl.constexpr):
    """Which unit a row of the single block's backward product ``[BLOCK_H, BLOCK_B]`` belongs to.

    A warp's 16 rows, if there are so many, are the units that it has in the tile of cells.
    """
    return row // 4 % 4 * (BLOCK_H // 4) + row // 16 * 4 + row % 4


@triton.jit
def cells_of_sum(sum, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """``[BLOCK_H, BLOCK_B]`` in the order of :func:`unit_of_sum` to a tile of cells."""
    tile = tl.reshape(sum, (BLOCK_H // 16, 4, 4, BLOCK_B // 8, 8))
    return tl.reshape(tl.permute(tile, (3, 1, 0, 2, 4)), (BLOCK_B // 8, BLOCK_H, 8))


@triton.jit
def cells(matrix, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """``[BLOCK_H, BLOCK_B]`` to a tile of cells."""
    return tl.permute(tl.reshape(matrix, (BLOCK_H, BLOCK_B // 8, 8)), (1, 0, 2))


@triton.jit
def matrix(cells, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """A tile of cells to ``[BLOCK_H, BLOCK_B]``."""
    return tl.reshape(tl.permute(cells, (1, 0, 2)), (BLOCK_H, BLOCK_B))


@triton.jit
def unit_of_cells(unit_begin, BLOCK_H: tl.constexpr):
    """Which unit: ``[1, BLOCK_H, 1]``."""
    # By a reshape, through which the compiler does not see that units are contiguous in memory: it would move every
    # tile of cells between threads before it is stored.
    return unit_begin + tl.reshape(tl.arange(0, BLOCK_H), (1, BLOCK_H, 1))


@triton.jit
def batch_of_cells(batch_begin, BLOCK_B: tl.constexpr):
    """Which sequence: ``[BLOCK_B / 8, 1, 8]``."""
    slow = tl.arange(0, BLOCK_B // 8) * 8
    return batch_begin + slow[:, None, None] + tl.arange(0, 8)[None, None, :]


@triton.jit
def place_of_cells(BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """Where the cells of a tile lie in a ``[BLOCK_H, BLOCK_B]`` of memory."""
    # By a reshape, so that the compiler does not see neighbours and deal them out in another way than other cells.
    fast = tl.reshape(tl.arange(0, 8), (1, 1, 8))
    slow = tl.arange(0, BLOCK_B // 8) * 8
    return unit_of_cells(0, BLOCK_H) * BLOCK_B + slow[:, None, None] + fast


@triton.jit
def split_gates(tile):
    """``[..., 2, 2]`` to four tiles ``[...]``: i, f, g, o."""
    i_g, f_o = tl.split(tile)
    i, g = tl.split(i_g)
    f, o = tl.split(f_o)
    return i, f, g, o


@triton.jit
def join_gates(i, f, g, o):
    """Four tiles ``[...]`` to ``[..., 4]``, the order of memory."""
    joined = tl.join(tl.join(i, g), tl.join(f, o))
    return tl.reshape(joined, i.shape + [4])


@triton.jit
def pairs(cells, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr):
    """Tiles of the even and of the odd units of a tile of cells: ``[BLOCK_B / 8, BLOCK_H / 2, 8]`` each."""
    tile = tl.reshape(cells, (BLOCK_B // 8, BLOCK_H // 2, 2, 8))
    return tl.split(tl.permute(tile, (0, 1, 3, 2)))


@triton.jit
def in_registers(weights):
    """A tile of 16-bit weights ``[ROWS, K]`` as a product's result lies in registers: from there, and not from shared
    memory, wgmma then takes it as its left operand, without a move."""
    # A product that adds nothing. By a conversion alone the compiler would see a loaded tile, and share it.
    nothing = tl.zeros((weights.shape[0], 16), weights.dtype)
    sum = tl.dot(nothing, tl.zeros((16, weights.shape[1]), weights.dtype), weights.to(tl.float32))
    return sum.to(weights.dtype)


@triton.jit
def kept(weights, HELD: tl.constexpr):
    """Operands of a product, a tuple, as they are kept for the time loop: ``HELD`` in registers, or as they are."""
    if HELD:
        weights = (in_registers(weights[0]),)
    return weights
