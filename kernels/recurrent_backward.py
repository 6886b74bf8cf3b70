"""The persistent backward recurrence: one launch walks back over all time steps. Derivation: README.md."""

import triton
import triton.language as tl

from . import cell, exchange, layout


@triton.jit
def _weight_chunk(
    w_ptr, unit_begin, column_begin,
    H: tl.constexpr, HX: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Columns of ``w_hh`` of this block's units, rows unit by unit: ``[SPLIT, BLOCK_H, BLOCK_K]``, zero outside.

    With ``SPLIT == 1`` the leading dimension is left out.
    """
    unit = unit_begin + tl.arange(0, BLOCK_H)
    k = tl.arange(0, BLOCK_K)
    if SPLIT == 1:
        column = column_begin + k[None, :]
        unit = unit[:, None]
    else:
        column = column_begin + tl.arange(0, SPLIT)[:, None, None] * BLOCK_K + k[None, None, :]
        unit = unit[None, :, None]
    from_unit = column // 4
    row = (column % 4 * H + from_unit).to(tl.int64)
    pointers = w_ptr + row * HX + unit
    inside = (from_unit < H) & (unit < HX)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _single_weights(w_ptr, gate: tl.constexpr, H: tl.constexpr, HX: tl.constexpr, BLOCK_H: tl.constexpr):
    unit = tl.arange(0, BLOCK_H)
    inside = (unit[:, None] < HX) & (unit[None, :] < H)
    return tl.load(w_ptr + (gate * H + unit[None, :]) * HX + unit[:, None], mask=inside, other=0.0)


@triton.jit
def _multiply(
    weights, later_words, column_begin, waiting, mark, status, step, spin_limit, acc, dtype: tl.constexpr,
    FIRST: tl.constexpr, COUNT: tl.constexpr, RAGGED: tl.constexpr, HX: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, PROTOCOL: tl.constexpr, AMD: tl.constexpr, WARPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc`` plus the products of ``weights[FIRST : FIRST + COUNT]`` with gate gradients from ``column_begin`` on.

    ``RAGGED``: the last of these chunks may reach beyond 4 HX.
    """
    WORD: tl.constexpr = 32 // dtype.primitive_bitwidth  # values in one
    k = tl.arange(0, BLOCK_K // (4 * WORD)) * (4 * WORD)
    if SPLIT == 1:
        column = column_begin + k[None, :]
        rows = later_words[:, None]
    else:
        column = column_begin + tl.arange(0, SPLIT)[:, None, None] * BLOCK_K + k[None, None, :]
        rows = later_words[None, :, None]
    reads = rows + column // WORD
    inside = None
    if RAGGED:
        inside = tl.broadcast_to(column + (COUNT - 1) * SPLIT * BLOCK_K < 4 * HX, reads.shape)
    wanted = tl.broadcast_to(waiting, reads.shape)
    tiles = exchange.receive(
        reads, wanted, inside, mark, status, step, spin_limit, dtype, SPLIT * BLOCK_K // WORD, COUNT, PROTOCOL, AMD,
        WARPS,
    )  # fmt: skip
    for j in tl.static_range(COUNT):
        if SPLIT == 1:
            acc = tl.dot(weights[FIRST + j], tl.trans(tiles[j]), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(weights[FIRST + j], tl.permute(tiles[j], (0, 2, 1)), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _sum_of_parts(parts, SPLIT: tl.constexpr):
    """``[SPLIT, M, N]`` summed over its first dimension, pairwise.

    ``tl.sum`` would leave the result, and with it the whole cell, in every warp: it lies in a layout in which
    the warps differ only in the summed dimension.
    """
    total = tl.permute(parts, (1, 2, 0))
    if SPLIT == 8:
        total = tl.reshape(total, (parts.shape[1], parts.shape[2], 4, 2))
        even, odd = tl.split(total)
        total = even + odd
    if SPLIT >= 4:
        total = tl.reshape(total, (parts.shape[1], parts.shape[2], 2, 2))
        even, odd = tl.split(total)
        total = even + odd
    even, odd = tl.split(total)
    return even + odd


@triton.jit(do_not_specialize=[
    "T", "B", "grad_out_stride_t", "grad_out_stride_b", "step_begin", "step_end", "reverse", "n_tiles", "spin_limit"
])  # fmt: skip
def recurrent_backward(
    grad_out_ptr,  # rows of H: row t * stride_t + b * stride_b; or None
    grad_h_n_ptr,  # [B, H] or None
    grad_c_n_ptr,  # [B, H] or None
    w_ptr,  # [4H, HX], zero columns beyond H
    c0_ptr,  # [B, H]
    lengths_ptr,  # [B] int32 or None
    gates_ptr,  # [T, B, HX, 4], activated
    cells_ptr,  # [T, B, HX] fp32
    grad_gates_ptr,  # [T, B, HX, 4], out: gradients of the pre-activations; the exchange buffer
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
    spin_limit,
    H: tl.constexpr,
    HX: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,  # parts of K that different warps multiply
    RESIDENT: tl.constexpr,  # K-chunks (of SPLIT * BLOCK_K columns) kept on chip
    PROLOGUE: tl.constexpr,  # K-chunks of w_hh loaded together, before the time loop
    POLL: tl.constexpr,
    PROTOCOL: tl.constexpr,
    AMD: tl.constexpr,
    SINGLE: tl.constexpr,
    WARPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    CHUNK: tl.constexpr = SPLIT * BLOCK_K
    N_CHUNKS: tl.constexpr = (4 * HX + CHUNK - 1) // CHUNK
    dtype: tl.constexpr = grad_gates_ptr.dtype.element_ty
    WORD: tl.constexpr = 32 // dtype.primitive_bitwidth
    EXACT: tl.constexpr = WORD == 1
    block = tl.program_id(0)
    group = tl.program_id(1)
    n_blocks = tl.num_programs(0)
    unit_begin = block * BLOCK_H
    unit_of_cell = layout.unit_of_cells(unit_begin, BLOCK_H)
    gate = tl.arange(0, 4)[None, None, None, :]
    grad_gates_words = grad_gates_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    gates_words = gates_ptr.to(tl.pointer_type(tl.int32), bitcast=True)

    weights = ()
    if SINGLE:
        for n in tl.static_range(4):
            weights = weights + (_single_weights(w_ptr, n, H, HX, BLOCK_H),)
    else:
        for j in tl.static_range(RESIDENT):
            weights = weights + (_weight_chunk(w_ptr, unit_begin, j * CHUNK, H, HX, BLOCK_H, BLOCK_K, SPLIT),)
            if (j + 1) % PROLOGUE == 0:
                # Else the compiler issues the loads of all chunks at once and runs out of registers.
                tl.debug_barrier()

    alive = tl.full((), 1, tl.int32)
    for tile in range(group, n_tiles, tl.num_programs(1)):
        # What lies beyond the batch repeats its last row and is not stored: reads need no mask.
        b = tl.minimum(tile * BLOCK_B + tl.arange(0, BLOCK_B), B - 1)
        b_of_cell = layout.batch_of_cells(tile * BLOCK_B, BLOCK_B)
        in_batch = b_of_cell < B
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

        own_i = tl.zeros((BLOCK_B // 8, BLOCK_H, 8), dtype)
        own_f = own_i
        own_g = own_i
        own_o = own_i
        for step in tl.range(step_begin, step_end, disable_licm=True):
            t = t_begin + direction * step
            t_later = t - direction
            t_earlier = t + direction
            row = t.to(tl.int64) * B + b_of_cell

            # Independent of the other blocks, and so ahead of the wait.
            at = tl.expand_dims(row * (4 * HX) + unit_of_cell * 4, 3) + gate
            gates = tl.load(gates_ptr + at, mask=in_gates, other=0.0)
            c = tl.load(cells_ptr + row * HX + unit_of_cell, mask=stored, other=0.0)
            earlier_row = t_earlier.to(tl.int64) * B + b_of_cell
            starts = (t_earlier < 0) | (t_earlier >= length)
            c_earlier = tl.load(
                cells_ptr + earlier_row * HX + unit_of_cell, mask=stored & (starts == 0), other=0.0
            )
            c_earlier = tl.where(starts, c0, c_earlier)
            dh = tl.where(t == last, grad_h_n, 0.0)
            if grad_out_ptr is not None:
                out_row = t.to(tl.int64) * grad_out_stride_t + b_of_cell.to(tl.int64) * grad_out_stride_b
                upstream = tl.load(grad_out_ptr + out_row * H + unit_of_cell, mask=inside, other=0.0)
                dh += upstream.to(tl.float32)

            if SINGLE:
                acc = tl.dot(weights[0], layout.matrix(own_i, BLOCK_H, BLOCK_B), input_precision=PRECISION)
                acc = tl.dot(weights[1], layout.matrix(own_f, BLOCK_H, BLOCK_B), acc, input_precision=PRECISION)
                acc = tl.dot(weights[2], layout.matrix(own_g, BLOCK_H, BLOCK_B), acc, input_precision=PRECISION)
                acc = tl.dot(weights[3], layout.matrix(own_o, BLOCK_H, BLOCK_B), acc, input_precision=PRECISION)
                dh += layout.cells(acc, BLOCK_H, BLOCK_B)
            else:
                alive = exchange.await_count(counter, n_blocks * step, alive, status_ptr, step, spin_limit, PROTOCOL)
                # In the first step nobody has a gradient to pass on: what is read instead is not used.
                first_step = step == 0
                source = tl.where(first_step, t, t_later).to(tl.int64) * B + b
                later_words = tl.where(first_step, gates_words, grad_gates_words) + source * (4 * HX // WORD)
                waiting = first_step == 0
                if SPLIT == 1:
                    acc = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
                else:
                    acc = tl.zeros((SPLIT, BLOCK_H, BLOCK_B), tl.float32)
                for first in tl.static_range(0, RESIDENT, POLL):
                    acc = _multiply(
                        weights, later_words, first * CHUNK, waiting, counter_ptr, status_ptr, step, spin_limit, acc,
                        dtype, first, POLL if first + POLL <= RESIDENT else RESIDENT - first,
                        first + POLL >= RESIDENT and RESIDENT * CHUNK > 4 * HX,
                        HX, BLOCK_B, BLOCK_K, SPLIT, PROTOCOL, AMD, WARPS, PRECISION,
                    )  # fmt: skip
                    if PROTOCOL == exchange.COUNTER:
                        # Nothing else keeps the compiler from loading the next groups' tiles now, and running out of
                        # registers.
                        tl.debug_barrier()
                for chunk in tl.range(RESIDENT, N_CHUNKS, disable_licm=True):
                    streamed = (_weight_chunk(w_ptr, unit_begin, chunk * CHUNK, H, HX, BLOCK_H, BLOCK_K, SPLIT),)
                    acc = _multiply(
                        streamed, later_words, chunk * CHUNK, waiting, counter_ptr, status_ptr, step, spin_limit, acc,
                        dtype, 0, 1, N_CHUNKS * CHUNK > 4 * HX, HX, BLOCK_B, BLOCK_K, SPLIT, PROTOCOL, AMD, WARPS,
                        PRECISION,
                    )  # fmt: skip
                    # As above: the compiler would fetch many chunks ahead.
                    tl.debug_barrier()
                if SPLIT > 1:
                    acc = _sum_of_parts(acc, SPLIT)
                dh += tl.where(first_step, 0.0, layout.cells(acc, BLOCK_H, BLOCK_B))

            i, f, g, o = layout.split_gates(tl.reshape(gates, (BLOCK_B // 8, BLOCK_H, 8, 2, 2)))
            di, df, dg, do, dc_earlier = cell.backward(
                dh, dc, i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32), c, c_earlier, EXACT, AMD
            )
            active = (t < length) & inside
            if PROTOCOL == exchange.COUNTER:
                lost = tl.where(alive > 0, 0.0, float("nan"))
                di, df, dg, do, dc_earlier = di + lost, df + lost, dg + lost, do + lost, dc_earlier + lost
            own_i = tl.where(active, di, 0.0).to(dtype)
            own_f = tl.where(active, df, 0.0).to(dtype)
            own_g = tl.where(active, dg, 0.0).to(dtype)
            own_o = tl.where(active, do, 0.0).to(dtype)
            dc = tl.where(active, dc_earlier, dc)

            words_at = grad_gates_words + (row * HX + unit_of_cell) * (4 // WORD)
            if WORD == 2:
                words = (exchange.pack_words(own_i, own_f), exchange.pack_words(own_g, own_o))
            else:
                words = (
                    own_i.to(tl.int32, bitcast=True), own_f.to(tl.int32, bitcast=True),
                    own_g.to(tl.int32, bitcast=True), own_o.to(tl.int32, bitcast=True),
                )  # fmt: skip
            exchange.publish(words_at, words, stored, AMD)
            exchange.announce(counter, alive, PROTOCOL)

        tl.store(grad_c_ptr + state, dc, mask=inside)
