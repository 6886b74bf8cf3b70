"""The persistent backward recurrence: one launch walks back over all time steps. Derivation: README.md."""

import triton
import triton.language as tl

from . import cell, exchange, layout, norm, random_bits, rounding


@triton.jit
def _weight_chunk(
    w_ptr, team_begin, column_begin, column_end,
    H: tl.constexpr, HX: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns of ``w_hh`` of a team's units, its rows unit by unit: ``[ROWS, BLOCK_K]``, zero outside."""
    unit = team_begin + tl.arange(0, ROWS)[:, None]
    column = column_begin + tl.arange(0, BLOCK_K)[None, :]
    from_unit = column // 4
    if rounding.in_columns(PRECISION, False):
        at = unit.to(tl.int64) * (4 * HX) + column
    else:
        at = (column % 4 * H + from_unit).to(tl.int64) * HX + unit
    inside = (column < column_end) & (from_unit < H) & (unit < HX)
    w = tl.load(w_ptr + at, mask=inside, other=0.0)
    return rounding.operands(w, rounding.of_weights(PRECISION))


@triton.jit
def _single_weights(
    w_ptr, gate: tl.constexpr, H: tl.constexpr, HX: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr
):
    unit = layout.unit_of_sum(tl.arange(0, BLOCK_H), BLOCK_H)[:, None]
    from_unit = tl.arange(0, BLOCK_H)[None, :]
    inside = (unit < HX) & (from_unit < H)
    w = tl.load(w_ptr + (gate * H + from_unit) * HX + unit, mask=inside, other=0.0)
    return rounding.operands(w, PRECISION)


@triton.jit
def _reads(later_words, column_begin, column_end, WORD: tl.constexpr, COUNT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where a chunk of gate gradients lies, in runs of 16 bytes, and whether they exist COUNT - 1 chunks further on."""
    column = column_begin + tl.arange(0, BLOCK_K // (4 * WORD)) * (4 * WORD)
    reads = later_words[:, None] + (column // WORD)[None, :]
    return reads, tl.broadcast_to(column[None, :] + (COUNT - 1) * BLOCK_K < column_end, reads.shape)


@triton.jit
def _multiply(
    weights, later_words, column_begin, column_end, exists, waiting, mark, status, step, spin_limit, acc,
    dtype: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, RAGGED: tl.constexpr, BLOCK_K: tl.constexpr,
    PROTOCOL: tl.constexpr, AMD: tl.constexpr, WARPS: tl.constexpr, PRECISION: tl.constexpr, seen=None, is_seen=None,
):  # fmt: skip
    """``acc`` plus the products of ``weights[FIRST : FIRST + COUNT]`` with gate gradients from ``column_begin`` on.

    ``RAGGED``: the last of these chunks may reach beyond ``column_end``. ``seen``, ``is_seen``: of
    :func:`exchange.receive`. """
    WORD: tl.constexpr = 32 // dtype.primitive_bitwidth  # values in one
    reads, within = _reads(later_words, column_begin, column_end, WORD, COUNT, BLOCK_K)
    inside = None
    if RAGGED:
        inside = within
    exists = tl.broadcast_to(exists[:, None], reads.shape)
    wanted = exists & waiting
    tiles = exchange.receive(
        reads, exists, wanted, inside, mark, status, step, spin_limit, dtype, BLOCK_K // WORD, COUNT, PROTOCOL, AMD,
        WARPS, seen, is_seen,
    )  # fmt: skip
    for j in tl.static_range(COUNT):
        acc = rounding.multiply(weights[FIRST + j], tl.trans(tiles[j]), acc, PRECISION)
    return acc


@triton.jit
def _from_above(
    weights, words, depth_begin, depth_end, exists, mark, status, step, spin_limit, dtype: tl.constexpr,
    CHUNKS: tl.constexpr, POLL: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROTOCOL: tl.constexpr, AMD: tl.constexpr, WARPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The products of w_ih with the gate gradients that the layer above has of this step."""
    waiting = tl.full((), 1, tl.int1)
    acc = tl.zeros((ROWS, BLOCK_B), tl.float32)
    for first in tl.static_range(0, CHUNKS, POLL):
        acc = _multiply(
            weights, words, depth_begin + first * BLOCK_K, depth_end, exists, waiting, mark, status, step, spin_limit,
            acc, dtype, first, POLL if first + POLL <= CHUNKS else CHUNKS - first,
            first + POLL >= CHUNKS and CHUNKS * BLOCK_K > DEPTH, BLOCK_K, PROTOCOL, AMD, WARPS, PRECISION,
        )  # fmt: skip
        if PROTOCOL == exchange.COUNTER:
            tl.debug_barrier()  # as in the time loop
    return acc


@triton.jit
def _saved(
    gates_ptr, cells_ptr, t, direction, exists, length, B, b_of_cell, unit_of_cell, stored, in_gates, ROW: tl.constexpr
):
    """What the forward pass saved for step ``t``, if it ``exists``: its gates, and the cell before it."""
    row = t.to(tl.int64) * B + b_of_cell
    at = tl.expand_dims(row * (4 * ROW) + unit_of_cell * 4, 3) + tl.arange(0, 4)[None, None, None, :]
    gates = tl.load(gates_ptr + at, mask=in_gates & exists, other=0.0)
    t_earlier = t + direction
    continues = (t_earlier >= 0) & (t_earlier < length)
    earlier_at = (t_earlier.to(tl.int64) * B + b_of_cell) * ROW + unit_of_cell
    return gates, tl.load(cells_ptr + earlier_at, mask=stored & continues & exists, other=0.0)


@triton.jit
def _upstream(grad_out_ptr, t, stride_t, stride_b, b_of_cell, unit_of_cell, shown, H: tl.constexpr):
    row = t.to(tl.int64) * stride_t + b_of_cell.to(tl.int64) * stride_b
    return tl.load(grad_out_ptr + row * H + unit_of_cell, mask=shown, other=0.0)


@triton.jit
def _sum(tiles, COUNT: tl.constexpr):
    """Of 1, 2, 4 or 8 tiles, pairwise: in the same order whatever came first."""
    if COUNT == 1:
        total = tiles[0]
    elif COUNT == 2:
        total = tiles[0] + tiles[1]
    else:
        total = (tiles[0] + tiles[1]) + (tiles[2] + tiles[3])
        if COUNT == 8:
            total += (tiles[4] + tiles[5]) + (tiles[6] + tiles[7])
    return total


@triton.jit(do_not_specialize=[
    "T", "B", "grad_out_stride_t", "grad_out_stride_b", "step_begin", "step_end", "reverse", "n_tiles", "tile_rows",
    "spin_limit",
])  # fmt: skip
def recurrent_backward(
    # With CHAINS, [T, B, …] are [T, B, CHAINS, …] and the others but lengths are [CHAINS, …].
    grad_out_ptr,  # rows of H: row t * stride_t + b * stride_b; or None
    grad_h_n_ptr,  # [B, H] or None
    grad_c_n_ptr,  # [B, H] or None
    # [4H, HX], zero columns beyond H; with PRECISION tf32 of rounding.round_weights, in COLUMNS unless SINGLE:
    w_ptr,
    c0_ptr,  # [B, H]
    lengths_ptr,  # [B] int32 or None
    gates_ptr,  # [T, B, HX, 4], activated
    cells_ptr,  # [T, B, HX] fp32
    grad_gates_ptr,  # [T, B, HX, 4], out: gradients of the pre-activations; the exchange buffer
    parts_ptr,  # [n_groups, TAGGED_SLOTS, n_blocks, PARTS, BLOCK_H, BLOCK_B] int64, zero; None if PARTS == 1 or CLUSTER
    grad_c_ptr,  # [B, H] fp32, out: gradient of c0; carries the state between launches of the step tier
    counter_ptr,  # [n_tiles, COUNTER_STRIDE] int32, zero: COUNTER's counts; the first word is FLAG's mark
    status_ptr,  # [STATUS_WORDS] int32
    T,
    B,
    grad_out_stride_t,
    grad_out_stride_b,
    step_begin,
    step_end,
    reverse,
    n_tiles,
    tile_rows,  # sequences of a tile, at most BLOCK_B
    spin_limit,
    H: tl.constexpr,
    HX: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,  # blocks of a team, which multiply for all its units, each a part of K
    RESIDENT: tl.constexpr,  # K-chunks kept on chip
    PROLOGUE: tl.constexpr,  # K-chunks of w_hh loaded together, before the time loop
    POLL: tl.constexpr,
    PROTOCOL: tl.constexpr,
    AMD: tl.constexpr,
    SINGLE: tl.constexpr,
    WARPS: tl.constexpr,
    PRECISION: tl.constexpr,
    # Off by default, and then without a trace in the compiled kernel:
    HOIST: tl.constexpr = False,  # let the compiler move what does not change out of the time loop
    HELD: tl.constexpr = 0,  # of the resident chunks, in registers; the others in shared memory
    CLUSTER: tl.constexpr = False,  # a team is a cluster: partial sums go through its blocks' shared memory
    STAGES: tl.constexpr = 1,  # of the loop over streamed chunks; above 1 the compiler copies weights ahead
    ALONE: tl.constexpr = False,  # one step: no gradient comes from a later one, and nothing is multiplied
    CHAINS: tl.constexpr = 1,  # recurrences side by side, of which the last `reverse` walk in reverse
    cuts_ptr=None,  # [T, B] int32: whether the state was zeroed before the step
    peephole_ptr=None,  # [3, H]: of i, f, o
    h_scale_ptr=None,  # [B, H]: times h on its way into the product
    noise_ptr=None,  # [3] int64, of zoneout
    above_ptr=None,  # [CHAINS - 1, …] as w_ptr, of layers as a wavefront: w_ih of each but the first
    grad_h_ptr=None,  # [B, H] fp32, out: what zoneout passes by of the gradient of h0; a carry as grad_c_ptr
    norm_ptr=None,  # [6, H] fp32: gains of i, f, g, o; gain and bias of the cell on its way out
    rows_ptr=None,  # [n_groups, TAGGED_SLOTS, blocks of units, 2, BLOCK_B] int64, zero; None if SINGLE
    products_ptr=None,  # [T, B, HX, 4]: normalised recurrent products
    statistics_ptr=None,  # [T, B, STATISTICS] fp32
    grad_pre_ptr=None,  # [T, B, HX, 4], out: gradients of the pre-activations; grad_gates has those of the products
    grad_norm_ptr=None,  # [2, B, H] fp32, out: gradients of the cell's gain and bias, of each sequence
    COUPLED: tl.constexpr = False,
    CLIP: tl.constexpr = None,
    ZONEOUT_H: tl.constexpr = 0.0,
    ZONEOUT_C: tl.constexpr = 0.0,
    GATE: tl.constexpr = 0,
    NODE: tl.constexpr = 1,
    SHOWN: tl.constexpr = 1,
):
    ROWS: tl.constexpr = PARTS * BLOCK_H
    DEPTH: tl.constexpr = 4 * HX // PARTS  # of K, a part
    N_CHUNKS: tl.constexpr = (DEPTH + BLOCK_K - 1) // BLOCK_K
    dtype: tl.constexpr = grad_gates_ptr.dtype.element_ty
    WORD: tl.constexpr = 32 // dtype.primitive_bitwidth
    FORM: tl.constexpr = cell.form(dtype, PRECISION)
    OF_CHAIN: tl.constexpr = 4 * HX * (HX if rounding.in_columns(PRECISION, SINGLE) else H)  # weights
    STAY: tl.constexpr = not HOIST
    ROW: tl.constexpr = CHAINS * HX
    block = tl.program_id(0)
    group = tl.program_id(1)
    n_blocks = tl.num_programs(0)
    STACKED: tl.constexpr = above_ptr is not None
    if CHAINS > 1:
        tl.static_assert(ZONEOUT_H == 0 and ZONEOUT_C == 0, "chains have no random bits of their own")
        chain = tl.program_id(2)
        if grad_out_ptr is not None and not STACKED:
            grad_out_ptr += chain * H
        if grad_h_n_ptr is not None:
            grad_h_n_ptr += chain.to(tl.int64) * B * H
        if grad_c_n_ptr is not None:
            grad_c_n_ptr += chain.to(tl.int64) * B * H
        w_ptr += chain * OF_CHAIN
        c0_ptr += chain.to(tl.int64) * B * H
        gates_ptr += chain * (4 * HX)
        cells_ptr += chain * HX
        grad_gates_ptr += chain * (4 * HX)
        if PARTS > 1 and not CLUSTER:
            own: tl.constexpr = exchange.TAGGED_SLOTS * PARTS * BLOCK_H * BLOCK_B
            parts_ptr += (chain * tl.num_programs(1) * n_blocks).to(tl.int64) * own
        grad_c_ptr += chain.to(tl.int64) * B * H
        counter_ptr += chain * n_tiles * exchange.COUNTER_STRIDE
        reverse = (chain >= CHAINS - reverse).to(tl.int32)
    part = block % PARTS
    unit_begin = block * BLOCK_H
    team_begin = unit_begin - part * BLOCK_H
    depth_begin = part * DEPTH
    depth_end = depth_begin + DEPTH
    unit_of_cell = layout.unit_of_cells(unit_begin, BLOCK_H)
    gate = tl.arange(0, 4)[None, None, None, :]
    grad_gates_words = grad_gates_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    gates_words = gates_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    peephole = None
    if peephole_ptr is not None:
        peephole = cell.peephole_weights(peephole_ptr, unit_of_cell, H)

    if norm_ptr is not None:
        gains = norm.gains(norm_ptr, unit_of_cell, H)
        row_turn = tl.full((), 0, tl.int32)
        room = None
        if not SINGLE:
            slots: tl.constexpr = exchange.TAGGED_SLOTS * norm.blocks_of_units(HX, BLOCK_H)
            # COUNTER's count stands in the first word.
            room = (rows_ptr + group * (slots * 2 * BLOCK_B),
                    counter_ptr + (1 if PROTOCOL == exchange.COUNTER else 0), status_ptr)  # fmt: skip

    weights = ()
    if SINGLE:
        for n in tl.static_range(4):
            weights = weights + (_single_weights(w_ptr, n, H, HX, BLOCK_H, PRECISION),)
    else:
        for j in tl.static_range(RESIDENT):
            k = depth_begin + j * BLOCK_K
            piece = _weight_chunk(w_ptr, team_begin, k, depth_end, H, HX, ROWS, BLOCK_K, PRECISION)
            weights = weights + (layout.kept(piece, j < HELD),)
            if (j + 1) % PROLOGUE == 0:
                # Else the compiler issues the loads of all chunks at once and runs out of registers.
                tl.debug_barrier()

    if STACKED:
        above_ptr += tl.minimum(chain, CHAINS - 2) * OF_CHAIN
        above_weights = ()
        for j in tl.static_range(RESIDENT):
            k = depth_begin + j * BLOCK_K
            above_weights = above_weights + (
                _weight_chunk(above_ptr, team_begin, k, depth_end, H, HX, ROWS, BLOCK_K, PRECISION),
            )
            if (j + 1) % PROLOGUE == 0:
                tl.debug_barrier()

    if PARTS > 1:
        # A slot holds, for each block, what the blocks of its team have for it.
        OWN: tl.constexpr = BLOCK_H * BLOCK_B
        team_row = tl.arange(0, ROWS)[:, None]
        sequence = tl.arange(0, BLOCK_B)[None, :]
        if CLUSTER:
            slot_words = PARTS * OWN
            SIZE: tl.constexpr = 8 * exchange.TAGGED_SLOTS * PARTS * OWN
            send_at = exchange.cluster_memory(team_row // BLOCK_H, SIZE)
            send_at = send_at + (part * BLOCK_H + team_row % BLOCK_H) * BLOCK_B + sequence
            take_at = exchange.cluster_memory(part, SIZE, OWN=True)
            word = tl.arange(0, SIZE // 8)
            nothing = tl.zeros((SIZE // 8,), tl.float32)
            exchange.publish_tagged(take_at + word, nothing, part * 0, word >= 0, AMD, WARPS, CLUSTER)
            exchange.meet(part)
        else:
            slot_words = n_blocks * PARTS * OWN
            own_parts = parts_ptr + group * exchange.TAGGED_SLOTS * slot_words
            to_block = block - part + team_row // BLOCK_H
            send_at = own_parts + ((to_block * PARTS + part) * BLOCK_H + team_row % BLOCK_H) * BLOCK_B + sequence
            take_at = own_parts + block * PARTS * OWN
        take_at = take_at + layout.place_of_cells(BLOCK_H, BLOCK_B)
        # COUNTER's count stands in the first word.
        parts_mark = counter_ptr + (1 if PROTOCOL == exchange.COUNTER else 0)
    turn = tl.full((), 0, tl.int32)
    alive = tl.full((), 1, tl.int32)
    for tile in range(group, n_tiles, tl.num_programs(1)):
        # What lies beyond the tile's rows is not stored; beyond the batch, it has the addresses of the last sequence.
        tile_begin = tile * BLOCK_B if SINGLE else tile * tile_rows  # of a single block, tiles are full
        b = tile_begin + tl.arange(0, BLOCK_B)
        exists = b < B
        b = tl.minimum(b, B - 1)
        b_of_cell = layout.batch_of_cells(tile_begin, BLOCK_B)
        in_batch = b_of_cell < B
        if not SINGLE:
            exists = exists & (tl.arange(0, BLOCK_B) < tile_rows)
            in_batch = in_batch & (layout.batch_of_cells(0, BLOCK_B) < tile_rows)
        inside = (unit_of_cell < H) & in_batch
        stored = (unit_of_cell < HX) & in_batch
        in_gates = tl.expand_dims(stored, 3) & (gate < 4)
        length = b_of_cell * 0 + T
        if lengths_ptr is not None:
            length = tl.load(lengths_ptr + b_of_cell, mask=in_batch, other=0)
        # Backwards in the direction of the forward pass: t = t_begin + direction * step.
        direction = 2 * reverse - 1
        t_begin = (1 - reverse) * (T - 1)
        # The step whose h is h_n.
        last = tl.where(reverse != 0, 0, length - 1)
        counter = counter_ptr + tile * exchange.COUNTER_STRIDE
        state = b_of_cell.to(tl.int64) * H + unit_of_cell
        c0 = tl.load(c0_ptr + state, mask=inside, other=0.0).to(tl.float32)
        grad_h_n = tl.zeros((BLOCK_B // 8, BLOCK_H, 8), tl.float32)
        if grad_h_n_ptr is not None:
            grad_h_n = tl.load(grad_h_n_ptr + state, mask=inside, other=0.0).to(tl.float32)
        if step_begin > 0:
            dc = tl.load(grad_c_ptr + state, mask=inside, other=0.0)
        else:
            dc = tl.zeros((BLOCK_B // 8, BLOCK_H, 8), tl.float32)
            if grad_c_n_ptr is not None:
                dc = tl.load(grad_c_n_ptr + state, mask=inside, other=0.0).to(tl.float32)
        if h_scale_ptr is not None:
            h_scale = tl.load(h_scale_ptr + state, mask=inside, other=0.0).to(tl.float32)
        if ZONEOUT_H > 0:
            kept_h = tl.zeros((BLOCK_B // 8, BLOCK_H, 8), tl.float32)
            if step_begin > 0:
                kept_h = tl.load(grad_h_ptr + state, mask=inside, other=0.0)

        if norm_ptr is not None:
            grad_gain = tl.zeros((BLOCK_B // 8, BLOCK_H, 8), tl.float32)
            grad_bias = grad_gain
        own_i = tl.zeros((BLOCK_B // 8, BLOCK_H, 8), dtype)
        own_f = own_i
        own_g = own_i
        own_o = own_i
        visible = inside  # what grad_out has
        if STACKED:
            visible = inside & (chain == CHAINS - 1)
        first_t = t_begin + direction * step_begin
        gates_ahead, c_ahead = _saved(
            gates_ptr, cells_ptr, first_t, direction, step_begin < step_end, length, B, b_of_cell, unit_of_cell, stored,
            in_gates, ROW,
        )  # fmt: skip
        if grad_out_ptr is not None:
            upstream = _upstream(
                grad_out_ptr, first_t, grad_out_stride_t, grad_out_stride_b, b_of_cell, unit_of_cell, visible, H
            )
        first_at = (first_t.to(tl.int64) * B + b_of_cell) * ROW + unit_of_cell
        c = tl.load(cells_ptr + first_at, mask=stored, other=0.0)
        for step in tl.range(step_begin, step_end, disable_licm=STAY):
            t = t_begin + direction * step
            t_later = t - direction
            t_earlier = t + direction
            row = t.to(tl.int64) * B + b_of_cell

            at = tl.expand_dims(row * (4 * ROW) + unit_of_cell * 4, 3) + gate
            gates = gates_ahead
            c_saved = c_ahead
            starts = (t_earlier < 0) | (t_earlier >= length)
            c_earlier = tl.where(starts, c0, c_saved)
            if cuts_ptr is not None:
                cut = tl.load(cuts_ptr + row, mask=in_batch, other=0) != 0
                later_row = t_later.to(tl.int64) * B + b_of_cell
                cut_later = tl.load(cuts_ptr + later_row, mask=in_batch & (step > 0), other=0) != 0
                c_earlier = tl.where(cut, 0.0, c_earlier)
            if norm_ptr is not None:
                hats = tl.load(products_ptr + at, mask=in_gates, other=0.0)
                statistics_at = statistics_ptr + row * norm.STATISTICS
                inverse_r = tl.load(statistics_at, mask=in_batch, other=0.0)
                mean_c = tl.load(statistics_at + 1, mask=in_batch, other=0.0)
                inverse_c = tl.load(statistics_at + 2, mask=in_batch, other=0.0)
            dh = tl.where(t == last, grad_h_n, 0.0)
            if grad_out_ptr is not None:
                dh += upstream.to(tl.float32)

            if SINGLE:
                acc = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
                acc = rounding.multiply(weights[0], layout.matrix(own_i, BLOCK_H, BLOCK_B), acc, PRECISION)
                acc = rounding.multiply(weights[1], layout.matrix(own_f, BLOCK_H, BLOCK_B), acc, PRECISION)
                acc = rounding.multiply(weights[2], layout.matrix(own_g, BLOCK_H, BLOCK_B), acc, PRECISION)
                acc = rounding.multiply(weights[3], layout.matrix(own_o, BLOCK_H, BLOCK_B), acc, PRECISION)
                if WORD == 2:
                    # A step of a single block is shorter than a fetch from memory. In fp32 no registers are left.
                    far_t = t + direction * exchange.DISTANCE
                    far = far_t.to(tl.int64) * B + b_of_cell
                    soon = stored & (step + exchange.DISTANCE < step_end)
                    begins = unit_of_cell * (4 // WORD) % exchange.SECTOR == 0
                    exchange.fetch(gates_ptr + far * (4 * ROW) + unit_of_cell * 4, soon & begins, AMD)
                    begins = unit_of_cell % exchange.SECTOR == 0
                    exchange.fetch(cells_ptr + far * ROW + unit_of_cell, soon & begins, AMD)
                    if grad_out_ptr is not None:
                        far = far_t.to(tl.int64) * grad_out_stride_t + b_of_cell.to(tl.int64) * grad_out_stride_b
                        exchange.fetch(grad_out_ptr + far * H + unit_of_cell, soon & begins & visible, AMD)
            elif not ALONE:
                if STACKED:
                    from_above = tl.zeros((ROWS, BLOCK_B), tl.float32)
                    if chain < CHAINS - 1:
                        # Ahead of this layer's own gradients, which are a step younger.
                        above = counter + n_tiles * exchange.COUNTER_STRIDE
                        alive = exchange.await_count(
                            above, n_blocks, step + 1, alive, status_ptr, step, spin_limit, PROTOCOL, AHEAD=True
                        )
                        above_words = grad_gates_words + 4 * HX // WORD + (t.to(tl.int64) * B + b) * (4 * ROW // WORD)
                        from_above = _from_above(
                            above_weights, above_words, depth_begin, depth_end, exists, counter_ptr, status_ptr, step,
                            spin_limit, dtype, RESIDENT, POLL, DEPTH, ROWS, BLOCK_B, BLOCK_K, PROTOCOL, AMD, WARPS,
                            PRECISION,
                        )  # fmt: skip
                alive = exchange.await_count(counter, n_blocks, step, alive, status_ptr, step, spin_limit, PROTOCOL)
                # In the first step nobody has a gradient to pass on: what is read instead is not used.
                first_step = step == 0
                source = tl.where(first_step, t, t_later).to(tl.int64) * B + b
                later_words = tl.where(first_step, gates_words, grad_gates_words) + source * (4 * ROW // WORD)
                waiting = first_step == 0
                acc = tl.zeros((ROWS, BLOCK_B), tl.float32)
                for first in tl.static_range(0, RESIDENT, POLL):
                    acc = _multiply(
                        weights, later_words, depth_begin + first * BLOCK_K, depth_end, exists, waiting, counter_ptr,
                        status_ptr, step, spin_limit, acc, dtype, first,
                        POLL if first + POLL <= RESIDENT else RESIDENT - first,
                        first + POLL >= RESIDENT and RESIDENT * BLOCK_K > DEPTH,
                        BLOCK_K, PROTOCOL, AMD, WARPS, PRECISION,
                    )  # fmt: skip
                    if PROTOCOL == exchange.COUNTER:
                        # Nothing else keeps the compiler from loading the next groups' tiles now, and running out of
                        # registers.
                        tl.debug_barrier()
                seen = None
                if STAGES > 1 and PROTOCOL == exchange.FLAG:
                    reads, within = _reads(later_words, depth_begin + RESIDENT * BLOCK_K, depth_end, WORD, 1, BLOCK_K)
                    seen = exchange.look(reads, tl.broadcast_to(exists[:, None], reads.shape), within, WARPS, AMD)
                for chunk in tl.range(
                    RESIDENT, N_CHUNKS, num_stages=None if STAGES == 1 else STAGES, disable_licm=STAY
                ):
                    k = depth_begin + chunk * BLOCK_K
                    streamed = (
                        _weight_chunk(
                            w_ptr, team_begin, k, depth_end, H, HX, ROWS, BLOCK_K, PRECISION
                        ),
                    )  # fmt: skip
                    acc = _multiply(
                        streamed, later_words, k, depth_end, exists, waiting, counter_ptr, status_ptr, step, spin_limit,
                        acc, dtype, 0, 1, N_CHUNKS * BLOCK_K > DEPTH, BLOCK_K, PROTOCOL, AMD, WARPS, PRECISION,
                        seen, chunk == RESIDENT,
                    )  # fmt: skip
                    if STAGES == 1:
                        # As above: the compiler would fetch many chunks ahead.
                        tl.debug_barrier()

            # A step ahead, so that its latency hides behind the exchange.
            more = step + 1 < step_end
            gates_ahead, c_ahead = _saved(
                gates_ptr, cells_ptr, t_earlier, direction, more, length, B, b_of_cell, unit_of_cell, stored, in_gates,
                ROW,
            )  # fmt: skip
            if grad_out_ptr is not None:
                upstream = _upstream(
                    grad_out_ptr, t_earlier, grad_out_stride_t, grad_out_stride_b, b_of_cell, unit_of_cell,
                    visible & more, H,
                )  # fmt: skip
            if SINGLE:
                from_later = layout.cells_of_sum(acc, BLOCK_H, BLOCK_B)
            elif ALONE:
                from_later = tl.zeros(dh.shape, tl.float32)
            else:
                if STACKED:
                    acc = tl.where(first_step, 0.0, acc) + from_above
                if PARTS > 1:
                    turn += 1
                    slot = turn % exchange.TAGGED_SLOTS * slot_words
                    if PROTOCOL == exchange.COUNTER:
                        acc = tl.where(alive > 0, acc, float("nan"))
                    sent = (team_begin + team_row < HX) & (sequence < tile_rows) & (tile_begin + sequence < B)
                    exchange.publish_tagged(send_at + slot, acc, turn, sent, AMD, WARPS, CLUSTER)
                    parts = exchange.receive_tagged(
                        take_at + slot, stored, turn, parts_mark, status_ptr, step, spin_limit, OWN, PARTS, AMD, WARPS,
                        CLUSTER,
                    )  # fmt: skip
                    from_later = _sum(parts, PARTS)
                else:
                    from_later = layout.cells(acc, BLOCK_H, BLOCK_B)
                if not STACKED:
                    from_later = tl.where(first_step, 0.0, from_later)
            if h_scale_ptr is not None:
                from_later = from_later * h_scale
            if ZONEOUT_H > 0:
                from_later += kept_h
            if cuts_ptr is not None:
                from_later = tl.where(cut_later, 0.0, from_later)
            dh += from_later

            i, f, g, o = layout.split_gates(tl.reshape(gates, (BLOCK_B // 8, BLOCK_H, 8, 2, 2)))
            i, f, g, o = i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)
            dc_new = dc
            if ZONEOUT_H > 0 or ZONEOUT_C > 0:
                keep_h, keep_c = random_bits.zones(noise_ptr, row * H + unit_of_cell, ZONEOUT_H, ZONEOUT_C)
                if ZONEOUT_H > 0:
                    kept_h = tl.where(t < length, keep_h * dh, kept_h)
                    dh = (1.0 - keep_h) * dh
                if ZONEOUT_C > 0:
                    c = cell.candidate(i, f, g, c_earlier, CLIP)
                    dc_new = (1.0 - keep_c) * dc
            normed = None
            if norm_ptr is not None:
                # Into the sums over all units nothing may come from beyond H.
                dh = tl.where(inside, dh, 0.0)
                if PROTOCOL == exchange.COUNTER:
                    dh = tl.where(alive > 0, dh, float("nan"))
                c_hat = (c - mean_c) * inverse_c
                shown = cell.activation(c_hat * gains[4] + gains[5], SHOWN, FORM, AMD)
                d_shown = cell.through(dh * o, shown, SHOWN, FORM, AMD)
                d_hat = d_shown * gains[4]
                row_turn += 1
                first_mean, second_mean = norm.means(
                    d_hat, d_hat * c_hat, inside, in_batch, row_turn, room, step, spin_limit,
                    H, HX, BLOCK_H, BLOCK_B, SINGLE, AMD, WARPS,
                )  # fmt: skip
                normed = (shown, norm.through(d_hat, c_hat, first_mean, second_mean, inverse_c))
                grad_gain += tl.where(t < length, d_shown * c_hat, 0.0)
                grad_bias += tl.where(t < length, d_shown, 0.0)
            di, df, dg, do, dc_earlier = cell.backward(
                dh, dc_new, i, f, g, o, c, c_earlier, FORM, AMD, peephole, COUPLED, CLIP, GATE, NODE, SHOWN, normed
            )
            if ZONEOUT_C > 0:
                dc_earlier += keep_c * dc
            if cuts_ptr is not None:
                dc_earlier = tl.where(cut, 0.0, dc_earlier)
            active = (t < length) & inside
            if PROTOCOL == exchange.COUNTER:
                lost = tl.where(alive > 0, 0.0, float("nan"))
                di, df, dg, do, dc_earlier = di + lost, df + lost, dg + lost, do + lost, dc_earlier + lost
            own_i = tl.where(active, di, 0.0).to(dtype)
            own_f = tl.where(active, df, 0.0).to(dtype)
            own_g = tl.where(active, dg, 0.0).to(dtype)
            own_o = tl.where(active, do, 0.0).to(dtype)
            dc = tl.where(active, dc_earlier, dc)
            if norm_ptr is not None:
                tl.store(grad_pre_ptr + at, layout.join_gates(own_i, own_f, own_g, own_o), mask=in_gates)
                di, df = tl.where(active, di, 0.0) * gains[0], tl.where(active, df, 0.0) * gains[1]
                dg, do = tl.where(active, dg, 0.0) * gains[2], tl.where(active, do, 0.0) * gains[3]
                r_i, r_f, r_g, r_o = layout.split_gates(tl.reshape(hats, (BLOCK_B // 8, BLOCK_H, 8, 2, 2)))
                r_i, r_f, r_g, r_o = r_i.to(tl.float32), r_f.to(tl.float32), r_g.to(tl.float32), r_o.to(tl.float32)
                row_turn += 1
                first_mean, second_mean = norm.means(
                    (di + df) + (dg + do), (di * r_i + df * r_f) + (dg * r_g + do * r_o), inside, in_batch, row_turn,
                    room, step, spin_limit, 4 * H, HX, BLOCK_H, BLOCK_B, SINGLE, AMD, WARPS,
                )  # fmt: skip
                own_i = tl.where(active, norm.through(di, r_i, first_mean, second_mean, inverse_r), 0.0).to(dtype)
                own_f = tl.where(active, norm.through(df, r_f, first_mean, second_mean, inverse_r), 0.0).to(dtype)
                own_g = tl.where(active, norm.through(dg, r_g, first_mean, second_mean, inverse_r), 0.0).to(dtype)
                own_o = tl.where(active, norm.through(do, r_o, first_mean, second_mean, inverse_r), 0.0).to(dtype)

            words_at = grad_gates_words + (row * ROW + unit_of_cell) * (4 // WORD)
            if WORD == 2:
                words = (exchange.pack_words(own_i, own_f), exchange.pack_words(own_g, own_o))
            else:
                words = (
                    own_i.to(tl.int32, bitcast=True), own_f.to(tl.int32, bitcast=True),
                    own_g.to(tl.int32, bitcast=True), own_o.to(tl.int32, bitcast=True),
                )  # fmt: skip
            exchange.publish(words_at, words, stored, AMD)
            ahead = words_at + (direction * exchange.DISTANCE).to(tl.int64) * B * (4 * ROW // WORD)
            begins = stored & (unit_of_cell * (4 // WORD) % exchange.SECTOR == 0)
            exchange.prepare(ahead, begins & (step + exchange.DISTANCE < step_end), PROTOCOL, AMD)
            exchange.announce(counter, step, alive, PROTOCOL)
            c = c_saved

        tl.store(grad_c_ptr + state, dc, mask=inside)
        if ZONEOUT_H > 0:
            tl.store(grad_h_ptr + state, kept_h, mask=inside)
        if norm_ptr is not None:
            tl.store(grad_norm_ptr + state, grad_gain, mask=inside)
            tl.store(grad_norm_ptr + B.to(tl.int64) * H + state, grad_bias, mask=inside)
    if CLUSTER:
        # A block's shared memory must not be gone before all have written there.
        exchange.meet(part)
