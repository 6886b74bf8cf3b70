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
#: Of each of both numbers that blocks give each other, those a thread receives together.
WORDS_A_THREAD = tl.constexpr(4)


@triton.constexpr_function
def blocks_of_units(HX, BLOCK_H):
    """Blocks of a group that own units; backward, others may only multiply."""
    return -(-HX // BLOCK_H)


@triton.constexpr_function
def blocks_at_a_time(count, BLOCK_B, WARPS):
    """Of ``count`` blocks, those whose numbers are received together."""
    whole = 1 << (count - 1).bit_length()
    return max(1, min(whole, WORDS_A_THREAD.value * 32 * WARPS // BLOCK_B))


@triton.jit
def gains(norm_ptr, unit, H: tl.constexpr):
    """``[1, BLOCK_H, 1]`` each: gains of i, f, g, o; gain and bias of the cell. 0 beyond H."""
    known = unit < H
    weights = ()
    for n in tl.static_range(6):
        weights = weights + (tl.load(norm_ptr + n * H + unit, mask=known, other=0.0),)
    return weights


@triton.jit
def _of_row(values, known):
    """Sums over a row of ``values``, in every cell of it that is ``known``.

    Not ``[BLOCK_B / 8, 1, 8]``: what is computed with tiles of that shape has a layout of theirs, which the compiler
    carries back through the sum; then every thread computes all units of a row.
    """
    return tl.where(known, tl.sum(values, 1, keep_dims=True), 0.0)


@triton.jit
def _share(
    first, second, turn, room, in_batch, HX: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr,
    AMD: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Publishes two numbers a row, which every cell of it has, under ``turn``; returns where those of block 0 begin."""
    COUNT: tl.constexpr = blocks_of_units(HX, BLOCK_H)
    slot = room[0] + turn % exchange.TAGGED_SLOTS * (COUNT * 2 * BLOCK_B)
    at = slot + layout.batch_of_cells(0, BLOCK_B)
    block = tl.program_id(0)
    own = tl.broadcast_to(at + block * (2 * BLOCK_B), first.shape)
    mask = in_batch & (block < COUNT) & (layout.unit_of_cells(0, BLOCK_H) == 0)
    exchange.publish_tagged(own, first, turn, mask, AMD, WARPS)
    exchange.publish_tagged(own + BLOCK_B, second, turn, mask, AMD, WARPS)
    return at


@triton.jit
def _take(
    at, begin: tl.constexpr, turn, room, in_batch, step, spin_limit, HX: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr, TOGETHER: tl.constexpr, AMD: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Both numbers of the blocks from ``begin`` on, ``[BLOCK_B / 8, TOGETHER, 8]`` each; 0 where there is no block."""
    COUNT: tl.constexpr = blocks_of_units(HX, BLOCK_H)
    wanted = in_batch & (tl.program_id(0) < COUNT)
    if begin + TOGETHER <= COUNT:
        # A constant apart from those of other groups, which would else take registers during the whole time loop.
        pointers = at + layout.unit_of_cells(0, TOGETHER) * (2 * BLOCK_B) + begin * 2 * BLOCK_B
    else:
        k = layout.unit_of_cells(begin, TOGETHER)
        wanted = wanted & (k < COUNT)
        pointers = at + tl.minimum(k, COUNT - 1) * (2 * BLOCK_B)
    wanted = tl.broadcast_to(wanted, pointers.shape)
    first, second = exchange.receive_tagged(
        pointers, wanted, turn, room[1], room[2], step, spin_limit, BLOCK_B, 2, AMD, WARPS
    )
    return tl.where(wanted, first, 0.0), tl.where(wanted, second, 0.0)


@triton.jit
def moments(
    values, known, in_batch, turn, room, step, spin_limit, H: tl.constexpr, HX: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr, SINGLE: tl.constexpr, AMD: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / std of a row, in each cell of it: of all ``known`` units in all tiles ``values``.

    ``room`` is None in a single block, else the group's words, the mark of a time-out and the status record.
    """
    TILES: tl.constexpr = len(values)
    units = tl.minimum(tl.maximum(H - tl.program_id(0) * BLOCK_H, 1), BLOCK_H)
    total = values[0]
    for n in tl.static_range(1, TILES):
        total = total + values[n]
    mean = _of_row(tl.where(known, total, 0.0), known) / (TILES * units).to(tl.float32)
    square = (values[0] - mean) * (values[0] - mean)
    for n in tl.static_range(1, TILES):
        square = square + (values[n] - mean) * (values[n] - mean)
    deviation = _of_row(tl.where(known, square, 0.0), known)
    if not SINGLE:
        COUNT: tl.constexpr = blocks_of_units(HX, BLOCK_H)
        TOGETHER: tl.constexpr = blocks_at_a_time(COUNT, BLOCK_B, WARPS)
        at = _share(mean, deviation, turn, room, in_batch, HX, BLOCK_H, BLOCK_B, AMD, WARPS)
        # Place by place over the groups of blocks, then once across places: a reduction takes barriers.
        owned = tl.full((1, TOGETHER, 1), BLOCK_H, tl.float32)
        for begin in tl.static_range(0, COUNT, TOGETHER):
            means, deviations = _take(
                at, begin, turn, room, in_batch, step, spin_limit, HX, BLOCK_H, BLOCK_B, TOGETHER, AMD, WARPS
            )
            if begin == 0:
                places, squares = means, deviations
            # Units of a place in the groups before, all of them whole, and in this one.
            before = begin // TOGETHER * BLOCK_H
            if begin + TOGETHER >= COUNT:
                k = layout.unit_of_cells(begin, TOGETHER)
                owned = tl.minimum(tl.maximum(H - k * BLOCK_H, 0), BLOCK_H).to(tl.float32)
            if begin > 0:
                apart = means - places
                share = owned / (before + owned)
                places += apart * share
                squares += deviations + apart * apart * (TILES * before * share)
        owned += (COUNT - 1) // TOGETHER * BLOCK_H
        average = tl.sum(places * owned, 1, keep_dims=True) / H
        apart = places - average
        mean = tl.where(known, average, 0.0)
        deviation = _of_row(squares + apart * apart * (TILES * owned), known)
    return mean, 1.0 / tl.sqrt(deviation / (TILES * H) + EPSILON)


@triton.jit
def means(
    first, second, known, in_batch, turn, room, step, spin_limit, N: tl.constexpr, HX: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_B: tl.constexpr, SINGLE: tl.constexpr, AMD: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Sums over a row of two tiles that are 0 beyond H, divided by ``N``, in every ``known`` cell of it."""
    first = _of_row(first, known)
    second = _of_row(second, known)
    if not SINGLE:
        COUNT: tl.constexpr = blocks_of_units(HX, BLOCK_H)
        TOGETHER: tl.constexpr = blocks_at_a_time(COUNT, BLOCK_B, WARPS)
        at = _share(first, second, turn, room, in_batch, HX, BLOCK_H, BLOCK_B, AMD, WARPS)
        for begin in tl.static_range(0, COUNT, TOGETHER):
            firsts, seconds = _take(
                at, begin, turn, room, in_batch, step, spin_limit, HX, BLOCK_H, BLOCK_B, TOGETHER, AMD, WARPS
            )
            if begin == 0:
                places, others = firsts, seconds
            else:
                places += firsts
                others += seconds
        first = _of_row(places, known)
        second = _of_row(others, known)
    return first * (1.0 / N), second * (1.0 / N)


@triton.jit
def through(d, hat, first, second, inverse):
    """The gradient ``d`` of normalised values ``hat`` to that of the values, with the means of d and of d hat."""
    return inverse * (d - first - hat * second)
