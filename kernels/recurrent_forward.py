"""The persistent forward recurrence: one launch walks all time steps. Derivation and layout: README.md."""

import triton
import triton.language as tl

from . import cell, exchange, layout, narrow, norm, random_bits, rounding


@triton.jit
def _weight_chunk(
    w_ptr, unit_begin, k, H: tl.constexpr, HX: tl.constexpr, BLOCK_H: tl.constexpr, PRECISION: tl.constexpr
):
    """Rows of ``w_hh`` of a block's units in the product's order, columns ``k``: ``[4 * BLOCK_H, K]``, zero outside."""
    row = tl.arange(0, 4 * BLOCK_H)
    unit = unit_begin + layout.unit_of_product(row)
    w_row = (layout.gate_of_product(row) * H + unit).to(tl.int64)
    inside = (unit[:, None] < H) & (k[None, :] < HX)
    w = tl.load(w_ptr + w_row[:, None] * HX + k[None, :], mask=inside, other=0.0)
    return rounding.operands(w, rounding.of_weights(PRECISION))


@triton.jit
def _reads(state_words, k_begin, WORD: tl.constexpr, COUNT: tl.constexpr, HX: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where a chunk of h lies, in runs of 16 bytes, and whether they exist COUNT - 1 chunks further on."""
    run = tl.arange(0, BLOCK_K // (4 * WORD)) * 4
    reads = state_words[:, None] + (k_begin // WORD + run)[None, :]
    k = k_begin + run * WORD
    return reads, tl.broadcast_to((k[None, :] + (COUNT - 1) * BLOCK_K < HX), reads.shape)


@triton.jit
def _multiply(
    weights, state_words, k_begin, exists, waiting, mark, status, step, spin_limit, acc, dtype: tl.constexpr,
    FIRST: tl.constexpr, COUNT: tl.constexpr, RAGGED: tl.constexpr, HX: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr, PROTOCOL: tl.constexpr, AMD: tl.constexpr, WARPS: tl.constexpr, PRECISION: tl.constexpr,
    seen=None, is_seen=None,
):  # fmt: skip
    """``acc`` plus the products of the chunks ``weights[FIRST : FIRST + COUNT]`` with h from column ``k_begin`` on.

    ``RAGGED``: the last of these chunks of h may reach beyond HX. ``seen``, ``is_seen``: of :func:`exchange.receive`.
    """
    WORD: tl.constexpr = 32 // dtype.primitive_bitwidth  # values in one
    reads, within = _reads(state_words, k_begin, WORD, COUNT, HX, BLOCK_K)
    inside = None
    if RAGGED:
        inside = within
    exists = tl.broadcast_to(exists[:, None], reads.shape)
    wanted = tl.broadcast_to(waiting[:, None], reads.shape)
    tiles = exchange.receive(
        reads, exists, wanted, inside, mark, status, step, spin_limit, dtype, BLOCK_K // WORD, COUNT, PROTOCOL, AMD,
        WARPS, seen, is_seen,
    )  # fmt: skip
    for j in tl.static_range(COUNT):
        acc = rounding.multiply(weights[FIRST + j], tl.trans(tiles[j]), acc, PRECISION)
    return acc


@triton.jit
def _add_below(
    acc, weights, words, exists, mark, status, step, spin_limit, dtype: tl.constexpr, CHUNKS: tl.constexpr,
    POLL: tl.constexpr, HX: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PROTOCOL: tl.constexpr,
    AMD: tl.constexpr,
    WARPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc`` plus the products of w_ih with the h that the layer below has of this step."""
    for first in tl.static_range(0, CHUNKS, POLL):
        acc = _multiply(
            weights, words, first * BLOCK_K, exists, exists, mark, status, step, spin_limit, acc, dtype, first,
            POLL if first + POLL <= CHUNKS else CHUNKS - first, first + POLL >= CHUNKS and CHUNKS * BLOCK_K > HX,
            HX, BLOCK_B, BLOCK_K, PROTOCOL, AMD, WARPS, PRECISION,
        )  # fmt: skip
        if PROTOCOL == exchange.COUNTER:
            tl.debug_barrier()  # as in the time loop
    return acc


@triton.jit(do_not_specialize=["T", "B", "step_begin", "step_end", "reverse", "n_tiles", "tile_rows", "spin_limit"])
def recurrent_forward(
    # With CHAINS, [T, B, …] are [T, B, CHAINS, …] and the others but lengths are [CHAINS, …].
    gates_ptr,  # [T, B, HX, 4]; in: input products with bias; out, if SAVE: activated gates
    w_ptr,  # [4H, HX], zero columns beyond H; with PRECISION tf32 of rounding.round_weights, in ROWS
    h0_ptr,  # [B, HX]
    c0_ptr,  # [B, H]
    lengths_ptr,  # [B] int32 or None
    exchange_ptr,  # [T, B, HX]
    out_ptr,  # [T, B, H]; the same buffer as exchange_ptr unless SEPARATE_OUT
    cells_ptr,  # [T, B, HX] fp32, written if SAVE
    h_n_ptr,  # [B, H]
    c_n_ptr,  # [B, H]
    counter_ptr,  # [n_tiles, COUNTER_STRIDE] int32, zero: COUNTER's counts; the first word is FLAG's mark
    status_ptr,  # [STATUS_WORDS] int32
    T,
    B,
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
    RESIDENT: tl.constexpr,  # K-chunks of w_hh kept on chip; the rest is read again each step
    PROLOGUE: tl.constexpr,  # K-chunks of w_hh loaded together, before the time loop
    POLL: tl.constexpr,  # K-chunks of h received together
    PROTOCOL: tl.constexpr,
    AMD: tl.constexpr,
    SINGLE: tl.constexpr,  # one block holds all units: h never leaves it
    SAVE: tl.constexpr,
    SEPARATE_OUT: tl.constexpr,
    WARPS: tl.constexpr,
    PRECISION: tl.constexpr,
    # Off by default, and then without a trace in the compiled kernel:
    HOIST: tl.constexpr = False,  # let the compiler move what does not change out of the time loop
    HELD: tl.constexpr = 0,  # of the resident chunks, in registers; the others in shared memory
    HALF: tl.constexpr = False,  # tile_rows <= BLOCK_B / 2, and the places beyond have no cells
    STAGES: tl.constexpr = 1,  # of the loop over streamed chunks; above 1 the compiler copies weights ahead
    CHAINS: tl.constexpr = 1,  # recurrences side by side, of which the last `reverse` walk in reverse
    cuts_ptr=None,  # [T, B] int32: whether the state is zeroed before the step
    entry_ptr=None,  # [B + 1, HX]: h0 as the product reads it, and a row of zeros; None: h0_ptr
    peephole_ptr=None,  # [3, H]: of i, f, o
    h_scale_ptr=None,  # [B, H]: times h on its way into the product
    noise_ptr=None,  # [3] int64, of zoneout
    # Of layers as a wavefront, each a chain that reads the one before it:
    input_ptr=None,  # [T, B, HX, 4]: input products with bias of the first layer; gates_ptr is out alone
    below_ptr=None,  # [CHAINS - 1, 4H, HX]: w_ih of the others
    bias_ptr=None,  # [CHAINS, HX, 4] fp32: of the others; zero for the first
    norm_ptr=None,  # [6, H] fp32: gains of i, f, g, o; gain and bias of the cell on its way out
    rows_ptr=None,  # [n_groups, TAGGED_SLOTS, n_blocks, 2, BLOCK_B] int64, zero; None if SINGLE
    products_ptr=None,  # [T, B, HX, 4], out: normalised recurrent products, if SAVE
    statistics_ptr=None,  # [T, B, STATISTICS] fp32, out, if SAVE
    # Of fp32 whose products are of fp16, w_ptr, entry_ptr and exchange_ptr too (narrow.py):
    w_scale_ptr=None,  # [HX, 4] fp32: what the sums of a row of w_hh are multiplied with
    entry_scale_ptr=None,  # [B] fp32: those with a row of entry_ptr, besides
    KEEP_GATES: tl.constexpr = True,  # write the activated gates, if SAVE
    COUPLED: tl.constexpr = False,
    CLIP: tl.constexpr = None,
    ZONEOUT_H: tl.constexpr = 0.0,
    ZONEOUT_C: tl.constexpr = 0.0,
    GATE: tl.constexpr = 0,
    NODE: tl.constexpr = 1,
    SHOWN: tl.constexpr = 1,
):
    N_CHUNKS: tl.constexpr = (HX + BLOCK_K - 1) // BLOCK_K
    dtype: tl.constexpr = exchange_ptr.dtype.element_ty
    value: tl.constexpr = out_ptr.dtype.element_ty
    WORD: tl.constexpr = 32 // dtype.primitive_bitwidth
    FORM: tl.constexpr = cell.form(value, PRECISION)
    NARROW: tl.constexpr = w_scale_ptr is not None
    STAY: tl.constexpr = not HOIST
    ROW: tl.constexpr = CHAINS * HX
    CELL_B: tl.constexpr = BLOCK_B // 2 if HALF else BLOCK_B
    block = tl.program_id(0)
    group = tl.program_id(1)
    n_blocks = tl.num_programs(0)
    STACKED: tl.constexpr = below_ptr is not None
    if CHAINS > 1:
        tl.static_assert(ZONEOUT_H == 0 and ZONEOUT_C == 0, "chains have no random bits of their own")
        chain = tl.program_id(2)
        gates_ptr += chain * (4 * HX)
        w_ptr += chain * (4 * H * HX)
        h0_ptr += chain.to(tl.int64) * B * HX
        c0_ptr += chain.to(tl.int64) * B * H
        exchange_ptr += chain * HX
        if NARROW:
            entry_ptr += chain.to(tl.int64) * B * HX
            w_scale_ptr += chain * (4 * HX)
            entry_scale_ptr += chain * B
        if not STACKED:
            out_ptr += chain * H
        cells_ptr += chain * HX
        h_n_ptr += chain.to(tl.int64) * B * H
        c_n_ptr += chain.to(tl.int64) * B * H
        counter_ptr += chain * n_tiles * exchange.COUNTER_STRIDE
        reverse = (chain >= CHAINS - reverse).to(tl.int32)
    unit_begin = block * BLOCK_H
    unit = unit_begin + tl.arange(0, BLOCK_H)
    unit_of_cell = layout.unit_of_cells(unit_begin, BLOCK_H)
    pair_of_cell = layout.unit_of_cells(unit_begin // 2, BLOCK_H // 2)
    gate = tl.arange(0, 4)[None, None, None, :]
    exchange_words = exchange_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    if entry_ptr is None:
        h0_words = h0_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        h0_words = entry_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    peephole = None
    if peephole_ptr is not None:
        peephole = cell.peephole_weights(peephole_ptr, unit_of_cell, H)

    if norm_ptr is not None:
        row_turn = tl.full((), 0, tl.int32)
        room = None
        if not SINGLE:
            own_rows = rows_ptr + group * (exchange.TAGGED_SLOTS * n_blocks * 2 * BLOCK_B)
            # COUNTER's count stands in the first word.
            room = (own_rows, counter_ptr + (1 if PROTOCOL == exchange.COUNTER else 0), status_ptr)

    weights = ()
    if SINGLE:
        weights = (_weight_chunk(w_ptr, unit_begin, unit, H, HX, BLOCK_H, PRECISION),)
    else:
        for j in tl.static_range(RESIDENT):
            k = j * BLOCK_K + tl.arange(0, BLOCK_K)
            piece = _weight_chunk(w_ptr, unit_begin, k, H, HX, BLOCK_H, PRECISION)
            weights = weights + (layout.kept(piece, j < HELD),)
            if (j + 1) % PROLOGUE == 0:
                # Else the compiler issues the loads of all chunks at once and runs out of registers.
                tl.debug_barrier()

    if STACKED:
        below_ptr += tl.maximum(chain - 1, 0) * (4 * H * HX)
        below_weights = ()
        for j in tl.static_range(RESIDENT):
            k = j * BLOCK_K + tl.arange(0, BLOCK_K)
            below_weights = below_weights + (_weight_chunk(below_ptr, unit_begin, k, H, HX, BLOCK_H, PRECISION),)
            if (j + 1) % PROLOGUE == 0:
                tl.debug_barrier()
        bias_at = bias_ptr + chain * (4 * HX) + tl.expand_dims(unit_of_cell * 4, 3) + gate
        bias = tl.load(bias_at, mask=(tl.expand_dims(unit_of_cell, 3) < HX) & (gate < 4), other=0.0)
        b_i, b_f, b_g, b_o = layout.split_gates(tl.reshape(bias, (1, BLOCK_H, 1, 2, 2)))

    if NARROW:
        scales_at = w_scale_ptr + tl.expand_dims(unit_of_cell * 4, 3) + gate
        scales = tl.load(scales_at, mask=(tl.expand_dims(unit_of_cell, 3) < H) & (gate < 4), other=0.0)
        s_i, s_f, s_g, s_o = layout.split_gates(tl.reshape(scales, (1, BLOCK_H, 1, 2, 2)))

    alive = tl.full((), 1, tl.int32)
    for tile in range(group, n_tiles, tl.num_programs(1)):
        # What lies beyond the tile's rows is not stored; beyond the batch, it has the addresses of the last sequence.
        tile_begin = tile * BLOCK_B if SINGLE else tile * tile_rows  # of a single block, tiles are full
        b = tile_begin + tl.arange(0, BLOCK_B)
        exists = b < B
        b = tl.minimum(b, B - 1)
        b_of_cell = layout.batch_of_cells(tile_begin, CELL_B)
        in_batch = b_of_cell < B
        if not SINGLE:
            exists = exists & (tl.arange(0, BLOCK_B) < tile_rows)
            in_batch = in_batch & (layout.batch_of_cells(0, CELL_B) < tile_rows)
        inside = (unit_of_cell < H) & in_batch
        stored = (unit_of_cell < HX) & in_batch
        stored_pairs = (pair_of_cell < HX // 2) & in_batch
        in_gates = tl.expand_dims(stored, 3) & (gate < 4)
        if lengths_ptr is not None:
            length = tl.load(lengths_ptr + b)
            length_of_cell = tl.load(lengths_ptr + b_of_cell, mask=in_batch, other=0)
        counter = counter_ptr + tile * exchange.COUNTER_STRIDE

        h0_rows = h0_words + b.to(tl.int64) * (HX // WORD)
        state = b_of_cell.to(tl.int64) * H + unit_of_cell
        if step_begin == 0:
            h = tl.load(h0_ptr + b_of_cell.to(tl.int64) * HX + unit_of_cell, mask=inside, other=0.0).to(tl.float32)
            c = tl.load(c0_ptr + state, mask=inside, other=0.0).to(tl.float32)
        else:
            h = tl.load(h_n_ptr + state, mask=inside, other=0.0).to(tl.float32)
            c = tl.load(c_n_ptr + state, mask=inside, other=0.0).to(tl.float32)
        if h_scale_ptr is not None:
            h_scale = tl.load(h_scale_ptr + state, mask=inside, other=0.0).to(tl.float32)
        if NARROW:
            entry_scale = tl.load(entry_scale_ptr + b_of_cell, mask=in_batch, other=1.0)

        # t = t_begin + direction * step
        direction = 1 - 2 * reverse
        t_begin = reverse * (T - 1)
        first_row = (t_begin + direction * step_begin).to(tl.int64) * B + b_of_cell
        if STACKED:
            at = input_ptr + tl.expand_dims(first_row * (4 * HX) + unit_of_cell * 4, 3) + gate
            upcoming = tl.load(at, mask=in_gates & (chain == 0), other=0.0)
        else:
            at = gates_ptr + tl.expand_dims(first_row * (4 * ROW) + unit_of_cell * 4, 3) + gate
            upcoming = tl.load(at, mask=in_gates, other=0.0)
        for step in tl.range(step_begin, step_end, disable_licm=STAY):
            t = t_begin + direction * step
            t_previous = t - direction
            row = t.to(tl.int64) * B + b_of_cell
            acc = tl.zeros((4 * BLOCK_H, BLOCK_B), tl.float32)
            if cuts_ptr is not None:
                cut = tl.load(cuts_ptr + row, mask=in_batch, other=0) != 0
                h = tl.where(cut, 0.0, h)
                c = tl.where(cut, 0.0, c)
            if SINGLE:
                own = h.to(dtype)
                if h_scale_ptr is not None:
                    own = (own.to(tl.float32) * h_scale).to(dtype)
                acc = rounding.multiply(weights[0], layout.matrix(own, BLOCK_H, BLOCK_B), acc, PRECISION)
                # A step of a single block is shorter than a fetch from memory.
                far = (t + direction * exchange.DISTANCE).to(tl.int64) * B + b_of_cell
                begins = stored & (unit_of_cell * (4 // WORD) % exchange.SECTOR == 0)
                exchange.fetch(
                    gates_ptr + far * (4 * ROW) + unit_of_cell * 4, begins & (step + exchange.DISTANCE < step_end), AMD
                )
            else:
                if STACKED:  # noqa: SIM102 - decided when compiled, unlike the one inside
                    if chain > 0:
                        # Ahead of this layer's own h, which is a step younger.
                        below = counter - n_tiles * exchange.COUNTER_STRIDE
                        alive = exchange.await_count(
                            below, n_blocks, step + 1, alive, status_ptr, step, spin_limit, PROTOCOL, AHEAD=True
                        )
                        below_words = exchange_words - HX // WORD + (t.to(tl.int64) * B + b) * (ROW // WORD)
                        acc = _add_below(
                            acc, below_weights, tl.multiple_of(below_words, 16), exists, counter_ptr, status_ptr, step,
                            spin_limit, dtype, RESIDENT, POLL, HX, BLOCK_B, BLOCK_K, PROTOCOL, AMD, WARPS, PRECISION,
                        )  # fmt: skip
                alive = exchange.await_count(counter, n_blocks, step, alive, status_ptr, step, spin_limit, PROTOCOL)
                previous_rows = exchange_words + (t_previous.to(tl.int64) * B + b) * (ROW // WORD)
                # h0 is nobody's to deliver, and may hold any NaN.
                fresh = tl.zeros((BLOCK_B,), tl.int1) | (step == 0)
                if lengths_ptr is not None:
                    fresh = fresh | (t_previous >= length)
                entering = tl.where(fresh, h0_rows, previous_rows)
                if cuts_ptr is not None:
                    cut_rows = tl.load(cuts_ptr + t.to(tl.int64) * B + b) != 0
                    fresh = fresh | cut_rows
                    entering = tl.where(cut_rows, h0_words + B.to(tl.int64) * (HX // WORD), entering)
                state_words = tl.multiple_of(entering, 16)
                waiting = exists & (fresh == 0)
                for first in tl.static_range(0, RESIDENT, POLL):
                    acc = _multiply(
                        weights, state_words, first * BLOCK_K, exists, waiting, counter_ptr, status_ptr, step,
                        spin_limit, acc, dtype, first, POLL if first + POLL <= RESIDENT else RESIDENT - first,
                        first + POLL >= RESIDENT and RESIDENT * BLOCK_K > HX,
                        HX, BLOCK_B, BLOCK_K, PROTOCOL, AMD, WARPS, PRECISION,
                    )  # fmt: skip
                    if PROTOCOL == exchange.COUNTER:
                        # Nothing else keeps the compiler from loading the next groups' tiles now, and running out of
                        # registers.
                        tl.debug_barrier()
                seen = None
                if STAGES > 1 and PROTOCOL == exchange.FLAG:
                    reads, within = _reads(state_words, RESIDENT * BLOCK_K, WORD, 1, HX, BLOCK_K)
                    seen = exchange.look(reads, tl.broadcast_to(exists[:, None], reads.shape), within, WARPS, AMD)
                for chunk in tl.range(
                    RESIDENT, N_CHUNKS, num_stages=None if STAGES == 1 else STAGES, disable_licm=STAY
                ):
                    k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)
                    streamed = (_weight_chunk(w_ptr, unit_begin, k, H, HX, BLOCK_H, PRECISION),)
                    acc = _multiply(
                        streamed, state_words, chunk * BLOCK_K, exists, waiting, counter_ptr, status_ptr, step,
                        spin_limit, acc, dtype, 0, 1, N_CHUNKS * BLOCK_K > HX, HX, BLOCK_B, BLOCK_K, PROTOCOL, AMD,
                        WARPS, PRECISION,
                        seen, chunk == RESIDENT,
                    )  # fmt: skip
                    if STAGES == 1:
                        # As above: the compiler would fetch many chunks ahead.
                        tl.debug_barrier()

            p_i, p_f, p_g, p_o = layout.split_gates(tl.reshape(upcoming, (CELL_B // 8, BLOCK_H, 8, 2, 2)))
            # A step ahead, so that its latency hides behind the exchange.
            next_row = (t + direction).to(tl.int64) * B + b_of_cell
            if STACKED:
                at = input_ptr + tl.expand_dims(next_row * (4 * HX) + unit_of_cell * 4, 3) + gate
                upcoming = tl.load(at, mask=in_gates & (chain == 0) & (step + 1 < step_end), other=0.0)
            else:
                at = gates_ptr + tl.expand_dims(next_row * (4 * ROW) + unit_of_cell * 4, 3) + gate
                upcoming = tl.load(at, mask=in_gates & (step + 1 < step_end), other=0.0)
            if norm_ptr is not None and PROTOCOL == exchange.COUNTER:
                acc = tl.where(alive > 0, acc, float("nan"))
            if HALF:
                acc = layout.first_half(acc, BLOCK_B)
            r_i, r_f, r_g, r_o = layout.cells_of_product(acc, BLOCK_H, CELL_B)
            if STACKED:
                r_i, r_f, r_g, r_o = r_i + b_i, r_f + b_f, r_g + b_g, r_o + b_o
            if NARROW:
                enters = step == 0
                if lengths_ptr is not None:
                    enters = enters | (t_previous >= length_of_cell)
                factor = tl.where(enters, entry_scale, 1.0)
                r_i, r_f = r_i * (s_i * factor), r_f * (s_f * factor)
                r_g, r_o = r_g * (s_g * factor), r_o * (s_o * factor)
            if norm_ptr is not None:
                known = unit_of_cell < H
                # Here, not before the loop: its registers are those that the product lacks.
                gains = norm.gains(norm_ptr, unit_of_cell, H)
                row_turn += 1
                mean, inverse = norm.moments(
                    (r_i, r_f, r_g, r_o), known, in_batch, row_turn, room, step, spin_limit,
                    H, HX, BLOCK_H, BLOCK_B, SINGLE, AMD, WARPS,
                )  # fmt: skip
                r_i, r_f = tl.where(known, (r_i - mean) * inverse, 0.0), tl.where(known, (r_f - mean) * inverse, 0.0)
                r_g, r_o = tl.where(known, (r_g - mean) * inverse, 0.0), tl.where(known, (r_o - mean) * inverse, 0.0)
                if SAVE:
                    at = products_ptr + tl.expand_dims(row * (4 * HX) + unit_of_cell * 4, 3) + gate
                    hats = layout.join_gates(r_i.to(value), r_f.to(value), r_g.to(value), r_o.to(value))
                    tl.store(at, hats, mask=in_gates)
                    at = tl.broadcast_to(statistics_ptr + row * norm.STATISTICS, inverse.shape)
                    tl.store(at, inverse, mask=in_batch & (unit_of_cell == 0))
                r_i, r_f, r_g, r_o = r_i * gains[0], r_f * gains[1], r_g * gains[2], r_o * gains[3]
            i, f, g, o, c_new, h_new = cell.forward(
                r_i + p_i.to(tl.float32), r_f + p_f.to(tl.float32), r_g + p_g.to(tl.float32), r_o + p_o.to(tl.float32),
                c, FORM, AMD, peephole, COUPLED, CLIP, GATE, NODE, SHOWN,
            )  # fmt: skip
            if norm_ptr is not None:
                row_turn += 1
                mean, inverse = norm.moments(
                    (c_new,), known, in_batch, row_turn, room, step, spin_limit,
                    H, HX, BLOCK_H, BLOCK_B, SINGLE, AMD, WARPS,
                )  # fmt: skip
                if SAVE:
                    at = tl.broadcast_to(statistics_ptr + row * norm.STATISTICS, inverse.shape)
                    tl.store(at + 1, mean, mask=in_batch & (unit_of_cell == 0))
                    tl.store(at + 2, inverse, mask=in_batch & (unit_of_cell == 0))
                shown = (c_new - mean) * inverse * gains[4] + gains[5]
                h_new = o * cell.activation(shown, SHOWN, FORM, AMD)
            if ZONEOUT_H > 0 or ZONEOUT_C > 0:
                keep_h, keep_c = random_bits.zones(noise_ptr, row * H + unit_of_cell, ZONEOUT_H, ZONEOUT_C)
                if ZONEOUT_H > 0:
                    # The h of the step before as everyone has it: rounded.
                    h_new = keep_h * h.to(value).to(tl.float32) + (1.0 - keep_h) * h_new
                if ZONEOUT_C > 0:
                    c_new = keep_c * c + (1.0 - keep_c) * c_new
            if PROTOCOL == exchange.COUNTER:
                c_new = tl.where(alive > 0, c_new, float("nan"))
                h_new = tl.where(alive > 0, h_new, float("nan"))
            if H != HX:
                h_new = tl.where(unit_of_cell < H, h_new, 0.0)
            if lengths_ptr is not None:
                active = t < length_of_cell
                c = tl.where(active, c_new, c)
                h = tl.where(active, h_new, h)
                result = tl.where(active, h_new, 0.0).to(value)
            else:
                c = c_new
                h = h_new
                result = h_new.to(value)

            if not SINGLE:
                words_at = exchange_words + row * (ROW // WORD)
                sent = result
                if h_scale_ptr is not None:
                    sent = (result.to(tl.float32) * h_scale).to(dtype)
                if NARROW:
                    sent = (result * narrow.STATE_SCALE).to(dtype)
                ahead = (direction * exchange.DISTANCE).to(tl.int64) * B * (ROW // WORD)
                soon = step + exchange.DISTANCE < step_end
                if WORD == 2:
                    low, high = layout.pairs(sent, BLOCK_H, CELL_B)
                    exchange.publish(words_at + pair_of_cell, (exchange.pack_words(low, high),), stored_pairs, AMD)
                    begins = stored_pairs & (pair_of_cell % exchange.SECTOR == 0)
                    exchange.prepare(words_at + pair_of_cell + ahead, begins & soon, PROTOCOL, AMD)
                else:
                    exchange.publish(words_at + unit_of_cell, (sent.to(tl.int32, bitcast=True),), stored, AMD)
                    begins = stored & (unit_of_cell % exchange.SECTOR == 0)
                    exchange.prepare(words_at + unit_of_cell + ahead, begins & soon, PROTOCOL, AMD)
                exchange.announce(counter, step, alive, PROTOCOL)
            if STACKED:
                tl.store(out_ptr + row * H + unit_of_cell, result, mask=inside & (chain == CHAINS - 1))
            elif SINGLE or SEPARATE_OUT:
                tl.store(out_ptr + row * (CHAINS * H) + unit_of_cell, result, mask=inside)
            if SAVE:
                if KEEP_GATES:
                    at = gates_ptr + tl.expand_dims(row * (4 * ROW) + unit_of_cell * 4, 3) + gate
                    activated = layout.join_gates(i.to(value), f.to(value), g.to(value), o.to(value))
                    tl.store(at, activated, mask=in_gates)
                tl.store(cells_ptr + row * ROW + unit_of_cell, c, mask=stored)

        tl.store(h_n_ptr + state, h, mask=inside)
        tl.store(c_n_ptr + state, c, mask=inside)
