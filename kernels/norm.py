"""Layer normalisation inside the time loops: sums over all units of a batch row, in one block or across a group.

A block reduces its own units; the blocks of a group then give each other two fp32 numbers a row by tagged words
(``exchange.publish_tagged``) and combine those of all blocks in the order of the blocks, so all have the same bits.
Variances come from means and squared deviations (Chan, Golub & LeVeque, 1983), never from a difference of squares.
Derivation and why the slots suffice: README.md.
"""

import triton
import triton.language as tl

from . import exchange, layout

EPSILON = tl.constexpr(1e-5)
#: fp32 numbers a row that the forward pass keeps: 1 / std of the product; mean and 1 / std of the cell.
STATISTICS = tl.constexpr(3)


@triton.constexpr_function
def blocks_of_units(HX, BLOCK_H):
    """Blocks of a group that own units; backward, others may only multiply."""
    return -(-HX // BLOCK_H)


@triton.constexpr_function
def blocks_at_a_time(count, BLOCK_B, WARPS):
    """Of ``count`` blocks, those whose numbers are received together."""
    # A thread holds at most 4 words of 64 bits for each of both numbers; where 8 warps share the tile of cells, 1: with
    # fp32 products on ordinary cores (sm_80, H=1024, backward) 4 make 40 bytes of spills, 2 make 8 (Triton 3.7.1).
    # Likewise 2 instead of 4 for 128 blocks (sm_90, H=2048, fp16, forward: 8 bytes).
    words = 1 if WARPS > 4 else 2 if count > 64 else 4
    whole = 1 << (count - 1).bit_length()
    return max(1, min(whole, words * 32 * WARPS // BLOCK_B))


@triton.constexpr_function
def units_between(first, last, H, BLOCK_H):
    """How many of the H units the blocks from ``first`` up to ``last`` own."""
    return max(0, min(H, last * BLOCK_H) - min(H, first * BLOCK_H))


@triton.jit
def gains(norm_ptr, unit, H: tl.constexpr):
    """``[1, BLOCK_H, 1]`` each: gains of i, f, g, o; gain and bias of the cell. 0 beyond H."""
    known = unit < H
    weights = ()
    for n in tl.static_range(6):
        weights = weights + (tl.load(norm_ptr + n * H + unit, mask=known, other=0.0),)
    return weights


@triton.jit
def _share(
    first, second, turn, room, in_batch, HX: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr,
    AMD: tl.constexpr,
):  # fmt: skip
    """Publishes two numbers a row, ``[BLOCK_B / 8, 1, 8]``, under ``turn``; returns where those of block 0 begin."""
    COUNT: tl.constexpr = blocks_of_units(HX, BLOCK_H)
    slot = room[0] + turn % exchange.TAGGED_SLOTS * (COUNT * 2 * BLOCK_B)
    at = slot + layout.batch_of_cells(0, BLOCK_B)
    block = tl.program_id(0)
    own = at + block * (2 * BLOCK_B)
    mask = in_batch & (block < COUNT)
    exchange.publish_tagged(own, first, turn, mask, AMD)
    exchange.publish_tagged(own + BLOCK_B, second, turn, mask, AMD)
    return at


@triton.jit
def _take(
    at, begin: tl.constexpr, turn, room, in_batch, step, spin_limit, HX: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr, TOGETHER: tl.constexpr, AMD: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Both numbers of the blocks from ``begin`` on, ``[BLOCK_B / 8, TOGETHER, 8]`` each; 0 where there is no block."""
    COUNT: tl.constexpr = blocks_of_units(HX, BLOCK_H)
    k = layout.unit_of_cells(begin, TOGETHER)
    wanted = (k < COUNT) & in_batch & (tl.program_id(0) < COUNT)
    pointers = at + tl.minimum(k, COUNT - 1) * (2 * BLOCK_B)
    first, second = exchange.receive_tagged(
        pointers, wanted, turn, room[1], room[2], step, spin_limit, BLOCK_B, 2, AMD, WARPS
    )
    return tl.where(wanted, first, 0.0), tl.where(wanted, second, 0.0)


@triton.jit
def moments(
    values, known, in_batch, turn, room, step, spin_limit, H: tl.constexpr, HX: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr, SINGLE: tl.constexpr, AMD: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / std, ``[BLOCK_B / 8, 1, 8]``, of a row: of all ``known`` units in all tiles ``values``.

    ``room`` is None in a single block, else the group's words, the mark of a time-out and the status record.
    """
    TILES: tl.constexpr = len(values)
    units = tl.minimum(tl.maximum(H - tl.program_id(0) * BLOCK_H, 1), BLOCK_H)
    total = values[0]
    for n in tl.static_range(1, TILES):
        total = total + values[n]
    mean = tl.sum(tl.where(known, total, 0.0), 1, keep_dims=True) / (TILES * units).to(tl.float32)
    square = (values[0] - mean) * (values[0] - mean)
    for n in tl.static_range(1, TILES):
        square = square + (values[n] - mean) * (values[n] - mean)
    deviation = tl.sum(tl.where(known, square, 0.0), 1, keep_dims=True)
    if not SINGLE:
        COUNT: tl.constexpr = blocks_of_units(HX, BLOCK_H)
        TOGETHER: tl.constexpr = blocks_at_a_time(COUNT, BLOCK_B, WARPS)
        at = _share(mean, deviation, turn, room, in_batch, HX, BLOCK_H, BLOCK_B, AMD)
        mean = mean * 0.0
        deviation = mean
        for begin in tl.static_range(0, COUNT, TOGETHER):
            means, deviations = _take(
                at, begin, turn, room, in_batch, step, spin_limit, HX, BLOCK_H, BLOCK_B, TOGETHER, AMD, WARPS
            )
            k = layout.unit_of_cells(begin, TOGETHER)
            owned = tl.minimum(tl.maximum(H - k * BLOCK_H, 0), BLOCK_H).to(tl.float32)
            # Units before these blocks, and theirs.
            before = units_between(0, begin, H, BLOCK_H)
            these = units_between(begin, begin + TOGETHER, H, BLOCK_H)
            average = tl.sum(means * owned, 1, keep_dims=True) / these
            apart = means - average
            added = tl.sum(deviations + (TILES * owned) * (apart * apart), 1, keep_dims=True)
            apart = average - mean
            mean = mean + apart * (these / (before + these))
            deviation = deviation + added + apart * apart * (TILES * before * these / (before + these))
    return mean, 1.0 / tl.sqrt(deviation / (TILES * H) + EPSILON)


@triton.jit
def means(
    first, second, in_batch, turn, room, step, spin_limit, N: tl.constexpr, HX: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, SINGLE: tl.constexpr, AMD: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Sums over a row of two tiles that are 0 beyond H, divided by ``N``: ``[BLOCK_B / 8, 1, 8]`` each."""
    first = tl.sum(first, 1, keep_dims=True)
    second = tl.sum(second, 1, keep_dims=True)
    if not SINGLE:
        COUNT: tl.constexpr = blocks_of_units(HX, BLOCK_H)
        TOGETHER: tl.constexpr = blocks_at_a_time(COUNT, BLOCK_B, WARPS)
        at = _share(first, second, turn, room, in_batch, HX, BLOCK_H, BLOCK_B, AMD)
        first = first * 0.0
        second = first
        for begin in tl.static_range(0, COUNT, TOGETHER):
            firsts, seconds = _take(
                at, begin, turn, room, in_batch, step, spin_limit, HX, BLOCK_H, BLOCK_B, TOGETHER, AMD, WARPS
            )
            first = first + tl.sum(firsts, 1, keep_dims=True)
            second = second + tl.sum(seconds, 1, keep_dims=True)
    return first * (1.0 / N), second * (1.0 / N)


@triton.jit
def through(d, hat, first, second, inverse):
    """The gradient ``d`` of normalised values ``hat`` to that of the values, with the means of d and of d hat."""
    return inverse * (d - first - hat * second)
