"""The persistent backward recurrence: one launch walks back over all time steps. Derivation: README.md."""

import triton
import triton.language as tl

from . import cell, exchange, layout


@triton.jit
def _weight_chunk(
    w_ptr, unit_begin, column_begin,
    H: tl.constexpr, HX: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Columns of ``w_hh`` of this block's units, rows in packed order: ``[SPLIT, BLOCK_H, BLOCK_K]``, zero outside.

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
    from_unit = layout.unit_of(column)
    row = (layout.gate_of(column) * H + from_unit).to(tl.int64)
    pointers = w_ptr + row * HX + unit
    inside = (from_unit < H) & (unit < HX)
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _single_weights(w_ptr, gate: tl.constexpr, H: tl.constexpr, HX: tl.constexpr, BLOCK_H: tl.constexpr):
    unit = tl.arange(0, BLOCK_H)
    inside = (unit[:, None] < HX) & (unit[None, :] < H)
    return tl.load(w_ptr + (gate * H + unit[None, :]) * HX + unit[:, None], mask=inside, other=0.0)


@triton.jit
def _gradient_pointers(rows, column_begin, wanted, HX: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """Pointers and mask of ``[SPLIT, BLOCK_K, BLOCK_B]`` gate gradients (without ``SPLIT`` where it is 1)."""
    k = tl.arange(0, BLOCK_K)
    if SPLIT == 1:
        column = column_begin + k[:, None]
        rows = rows[None, :]
        wanted = wanted[None, :]
    else:
        column = column_begin + tl.arange(0, SPLIT)[:, None, None] * BLOCK_K + k[None, :, None]
        rows = rows[None, None, :]
        wanted = wanted[None, None, :]
    return rows + column, (column < 4 * HX) & wanted


@triton.jit
def _multiply_resident(
    weights, rows, wanted, acc, alive, spin_limit,
    FIRST: tl.constexpr, COUNT: tl.constexpr, HX: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    PROTOCOL: tl.constexpr, AMD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc`` plus the products of ``COUNT`` resident chunks, received together."""
    pointers = ()
    masks = ()
    for j in tl.static_range(COUNT):
        p, m = _gradient_pointers(rows, (FIRST + j) * SPLIT * BLOCK_K, wanted, HX, BLOCK_K, SPLIT)
        pointers = pointers + (p,)
        masks = masks + (m,)
    tiles, missing = exchange.receive(pointers, masks, None, 1, alive, spin_limit, COUNT, PROTOCOL, AMD)
    for j in tl.static_range(COUNT):
        acc = tl.dot(weights[FIRST + j], tiles[j], acc, input_precision=PRECISION)
    if PROTOCOL == exchange.COUNTER:
        # Nothing else keeps the compiler from loading the next groups' tiles now, and running out of
        # registers.
        tl.debug_barrier()
    return acc, missing


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


@triton.jit
def _gate(ptr, rows, unit, gate: tl.constexpr, mask, HX: tl.constexpr):
    pointers = ptr + rows[None, :] * (4 * HX) + layout.column_of(unit, gate)[:, None]
    return tl.load(pointers, mask=mask, other=0.0)


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
    gates_ptr,  # [T, B, 4 HX] packed, activated
    cells_ptr,  # [T, B, HX] fp32
    grad_gates_ptr,  # [T, B, 4 HX] packed, out: gradients of the pre-activations; the exchange buffer
    grad_c_ptr,  # [B, H] fp32, out: gradient of c0; carries the state between launches of the step tier
    counter_ptr,  # [n_tiles, COUNTER_STRIDE] int32, zero (COUNTER only)
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
    RESIDENT: tl.constexpr,  # K-chunks (of SPLIT * BLOCK_K packed columns) kept on chip
    PROLOGUE: tl.constexpr,  # K-chunks of w_hh loaded together, before the time loop
    POLL: tl.constexpr,
    PROTOCOL: tl.constexpr,
    AMD: tl.constexpr,
    SINGLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    CHUNK: tl.constexpr = SPLIT * BLOCK_K
    N_CHUNKS: tl.constexpr = (4 * HX + CHUNK - 1) // CHUNK
    dtype = grad_gates_ptr.dtype.element_ty
    block = tl.program_id(0)
    group = tl.program_id(1)
    n_blocks = tl.num_programs(0)
    unit_begin = block * BLOCK_H
    unit = unit_begin + tl.arange(0, BLOCK_H)

    weights = ()
    if SINGLE:
        for gate in tl.static_range(4):
            weights = weights + (_single_weights(w_ptr, gate, H, HX, BLOCK_H),)
    else:
        for j in tl.static_range(RESIDENT):
            weights = weights + (_weight_chunk(w_ptr, unit_begin, j * CHUNK, H, HX, BLOCK_H, BLOCK_K, SPLIT),)
            if (j + 1) % PROLOGUE == 0:
                # Else the compiler issues the loads of all chunks at once and runs out of registers.
                tl.debug_barrier()

    alive = tl.full((), 1, tl.int32)
    for tile in range(group, n_tiles, tl.num_programs(1)):
        b = tile * BLOCK_B + tl.arange(0, BLOCK_B)
        in_batch = b < B
        length = tl.zeros((BLOCK_B,), tl.int32) + T
        if lengths_ptr is not None:
            length = tl.load(lengths_ptr + b, mask=in_batch, other=0)
        # Backwards in the direction of the forward pass: t = t_begin + direction * step.
        direction = 2 * reverse - 1
        t_begin = (1 - reverse) * (T - 1)
        # The step whose h is h_n.
        last = tl.where(reverse != 0, 0, length - 1)
        inside = (unit[:, None] < H) & in_batch[None, :]
        stored = (unit[:, None] < HX) & in_batch[None, :]
        counter = counter_ptr + tile * exchange.COUNTER_STRIDE
        state = b.to(tl.int64)[None, :] * H + unit[:, None]
        c0 = tl.load(c0_ptr + state, mask=inside, other=0.0).to(tl.float32)
        grad_h_n = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
        if grad_h_n_ptr is not None:
            grad_h_n = tl.load(grad_h_n_ptr + state, mask=inside, other=0.0).to(tl.float32)
        if step_begin > 0:
            dc = tl.load(grad_c_ptr + state, mask=inside, other=0.0)
        else:
            dc = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
            if grad_c_n_ptr is not None:
                dc = tl.load(grad_c_n_ptr + state, mask=inside, other=0.0).to(tl.float32)

        own_i = tl.zeros((BLOCK_H, BLOCK_B), dtype)
        own_f = own_i
        own_g = own_i
        own_o = own_i
        for step in tl.range(step_begin, step_end, disable_licm=True):
            t = t_begin + direction * step
            t_later = t - direction
            t_earlier = t + direction
            row = t.to(tl.int64) * B + b

            # Independent of the other blocks, and so ahead of the wait.
            i = _gate(gates_ptr, row, unit, 0, stored, HX)
            f = _gate(gates_ptr, row, unit, 1, stored, HX)
            g = _gate(gates_ptr, row, unit, 2, stored, HX)
            o = _gate(gates_ptr, row, unit, 3, stored, HX)
            c = tl.load(cells_ptr + row[None, :] * HX + unit[:, None], mask=stored, other=0.0)
            earlier_row = t_earlier.to(tl.int64) * B + b
            starts = (t_earlier < 0) | (t_earlier >= length)
            c_earlier = tl.load(
                cells_ptr + earlier_row[None, :] * HX + unit[:, None], mask=stored & (starts == 0)[None, :], other=0.0
            )
            c_earlier = tl.where(starts[None, :], c0, c_earlier)
            dh = tl.where((t == last)[None, :], grad_h_n, 0.0)
            if grad_out_ptr is not None:
                out_row = t.to(tl.int64) * grad_out_stride_t + b.to(tl.int64) * grad_out_stride_b
                upstream = tl.load(grad_out_ptr + out_row[None, :] * H + unit[:, None], mask=inside, other=0.0)
                dh += upstream.to(tl.float32)

            missing = alive * 0
            if SINGLE:
                dh = tl.dot(weights[0], own_i, dh, input_precision=PRECISION)
                dh = tl.dot(weights[1], own_f, dh, input_precision=PRECISION)
                dh = tl.dot(weights[2], own_g, dh, input_precision=PRECISION)
                dh = tl.dot(weights[3], own_o, dh, input_precision=PRECISION)
            else:
                missing = exchange.await_count(counter, n_blocks * step, alive, spin_limit, PROTOCOL)
                later_rows = grad_gates_ptr + (t_later.to(tl.int64) * B + b) * (4 * HX)
                wanted = in_batch & (step > 0)
                if SPLIT == 1:
                    acc = tl.zeros((BLOCK_H, BLOCK_B), tl.float32)
                else:
                    acc = tl.zeros((SPLIT, BLOCK_H, BLOCK_B), tl.float32)
                for first in tl.static_range(0, RESIDENT, POLL):
                    acc, late = _multiply_resident(
                        weights, later_rows, wanted, acc, alive, spin_limit, first,
                        POLL if first + POLL <= RESIDENT else RESIDENT - first,
                        HX, BLOCK_K, SPLIT, PROTOCOL, AMD, PRECISION,
                    )  # fmt: skip
                    missing = missing | late
                for chunk in tl.range(RESIDENT, N_CHUNKS, disable_licm=True):
                    streamed = _weight_chunk(w_ptr, unit_begin, chunk * CHUNK, H, HX, BLOCK_H, BLOCK_K, SPLIT)
                    p, m = _gradient_pointers(later_rows, chunk * CHUNK, wanted, HX, BLOCK_K, SPLIT)
                    tiles, late = exchange.receive((p,), (m,), None, 1, alive, spin_limit, 1, PROTOCOL, AMD)
                    missing = missing | late
                    acc = tl.dot(streamed, tiles[0], acc, input_precision=PRECISION)
                    # As above: the compiler would fetch many chunks ahead.
                    tl.debug_barrier()
                alive = exchange.report(status_ptr, missing, alive, block, group, step)
                if SPLIT == 1:
                    dh += acc
                else:
                    dh += _sum_of_parts(acc, SPLIT)

            di, df, dg, do, dc_earlier = cell.backward(
                dh, dc, i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32), c, c_earlier
            )
            active = (t < length)[None, :] & inside
            lost = tl.where(alive > 0, 0.0, float("nan"))
            own_i = tl.where(active, di + lost, 0.0).to(dtype)
            own_f = tl.where(active, df + lost, 0.0).to(dtype)
            own_g = tl.where(active, dg + lost, 0.0).to(dtype)
            own_o = tl.where(active, do + lost, 0.0).to(dtype)
            dc = tl.where(active, dc_earlier + lost, dc)

            at = grad_gates_ptr + row[None, :] * (4 * HX)
            exchange.publish(at + layout.column_of(unit, 0)[:, None], own_i, stored, AMD)
            exchange.publish(at + layout.column_of(unit, 1)[:, None], own_f, stored, AMD)
            exchange.publish(at + layout.column_of(unit, 2)[:, None], own_g, stored, AMD)
            exchange.publish(at + layout.column_of(unit, 3)[:, None], own_o, stored, AMD)
            exchange.announce(counter, alive, PROTOCOL)

        tl.store(grad_c_ptr + state, dc, mask=inside)
