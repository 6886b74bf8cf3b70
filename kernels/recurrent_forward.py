"""The persistent forward recurrence: one launch walks all time steps. Derivation and layout: README.md."""

import triton
import triton.language as tl

from . import cell, exchange, layout


@triton.jit
def _weight_chunk(
    w_ptr, unit_begin, k_begin, H: tl.constexpr, HX: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Rows of ``w_hh`` of this block's units in packed order: ``[4 * BLOCK_H, BLOCK_K]``, zero outside."""
    column = tl.arange(0, 4 * BLOCK_H)
    unit = unit_begin + layout.unit_of(column)
    row = (layout.gate_of(column) * H + unit).to(tl.int64)
    k = k_begin + tl.arange(0, BLOCK_K)
    inside = (unit[:, None] < H) & (k[None, :] < HX)
    return tl.load(w_ptr + row[:, None] * HX + k[None, :], mask=inside, other=0.0)


@triton.jit
def _state_pointers(rows, k_begin, in_batch, HX: tl.constexpr, BLOCK_K: tl.constexpr):
    """Pointers and mask of ``[BLOCK_K, BLOCK_B]`` elements of h, from the pointers of its rows."""
    k = k_begin + tl.arange(0, BLOCK_K)
    return rows[None, :] + k[:, None], (k[:, None] < HX) & in_batch[None, :]


@triton.jit
def _multiply_resident(
    weights, state_rows, in_batch, exempt, wanted, acc, alive, spin_limit,
    FIRST: tl.constexpr, COUNT: tl.constexpr, HX: tl.constexpr, BLOCK_K: tl.constexpr,
    PROTOCOL: tl.constexpr, AMD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``acc`` plus the products of ``COUNT`` resident chunks, received together."""
    pointers = ()
    masks = ()
    for j in tl.static_range(COUNT):
        p, m = _state_pointers(state_rows, (FIRST + j) * BLOCK_K, in_batch, HX, BLOCK_K)
        pointers = pointers + (p,)
        masks = masks + (m,)
    tiles, missing = exchange.receive(pointers, masks, exempt, wanted, alive, spin_limit, COUNT, PROTOCOL, AMD)
    for j in tl.static_range(COUNT):
        acc = tl.dot(weights[FIRST + j], tiles[j], acc, input_precision=PRECISION)
    if PROTOCOL == exchange.COUNTER:
        # Nothing else keeps the compiler from loading the next groups' tiles now, and running out of
        # registers.
        tl.debug_barrier()
    return acc, missing


@triton.jit
def _initial(ptr, b, unit, inside, H: tl.constexpr):
    return tl.load(ptr + b.to(tl.int64)[None, :] * H + unit[:, None], mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "B", "step_begin", "step_end", "reverse", "n_tiles", "spin_limit"])
def recurrent_forward(
    gates_ptr,  # [T, B, 4 HX] packed; in: input products with bias; out, if SAVE: activated gates
    w_ptr,  # [4H, HX], zero columns beyond H
    h0_ptr,  # [B, HX]
    c0_ptr,  # [B, H]
    lengths_ptr,  # [B] int32 or None
    exchange_ptr,  # [T, B, HX]
    out_ptr,  # [T, B, H]; the same buffer as exchange_ptr unless SEPARATE_OUT
    cells_ptr,  # [T, B, HX] fp32, written if SAVE
    h_n_ptr,  # [B, H]
    c_n_ptr,  # [B, H]
    counter_ptr,  # [n_tiles, COUNTER_STRIDE] int32, zero (COUNTER only)
    status_ptr,  # [STATUS_WORDS] int32
    T,
    B,
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
    RESIDENT: tl.constexpr,  # K-chunks of w_hh kept on chip; the rest is read again each step
    PROLOGUE: tl.constexpr,  # K-chunks of w_hh loaded together, before the time loop
    POLL: tl.constexpr,  # K-chunks of h received together
    PROTOCOL: tl.constexpr,
    AMD: tl.constexpr,
    SINGLE: tl.constexpr,  # one block holds all units: h never leaves it
    SAVE: tl.constexpr,
    SEPARATE_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    N_CHUNKS: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    dtype = exchange_ptr.dtype.element_ty
    block = tl.program_id(0)
    group = tl.program_id(1)
    n_blocks = tl.num_programs(0)
    unit_begin = block * BLOCK_H
    unit = unit_begin + tl.arange(0, BLOCK_H)
    column = 4 * unit_begin + tl.arange(0, 4 * BLOCK_H)

    weights = ()
    for j in tl.static_range(RESIDENT):
        weights = weights + (_weight_chunk(w_ptr, unit_begin, j * BLOCK_K, H, HX, BLOCK_H, BLOCK_K),)
        if (j + 1) % PROLOGUE == 0:
            # Else the compiler issues the loads of all chunks at once and runs out of registers.
            tl.debug_barrier()

    alive = tl.full((), 1, tl.int32)
    for tile in range(group, n_tiles, tl.num_programs(1)):
        b = tile * BLOCK_B + tl.arange(0, BLOCK_B)
        in_batch = b < B
        if lengths_ptr is not None:
            length = tl.load(lengths_ptr + b, mask=in_batch, other=0)
        inside = (unit[:, None] < H) & in_batch[None, :]
        stored = (unit[:, None] < HX) & in_batch[None, :]
        columns_stored = (column[:, None] < 4 * HX) & in_batch[None, :]
        counter = counter_ptr + tile * exchange.COUNTER_STRIDE

        h0_rows = h0_ptr + b.to(tl.int64) * HX
        if step_begin == 0:
            h = _initial(h0_ptr, b, unit, inside, HX)
            c = _initial(c0_ptr, b, unit, inside, H)
        else:
            h = _initial(h_n_ptr, b, unit, inside, H)
            c = _initial(c_n_ptr, b, unit, inside, H)

        # t = t_begin + direction * step
        direction = 1 - 2 * reverse
        t_begin = reverse * (T - 1)
        t = t_begin + direction * step_begin
        row = t.to(tl.int64) * B + b
        gates_pointers = gates_ptr + row[None, :] * (4 * HX) + column[:, None]
        upcoming = tl.load(gates_pointers, mask=columns_stored, other=0.0)
        for step in tl.range(step_begin, step_end, disable_licm=True):
            t = t_begin + direction * step
            t_previous = t - direction
            t_next = t + direction
            row = t.to(tl.int64) * B + b

            acc = upcoming.to(tl.float32)  # [4 BLOCK_H, BLOCK_B]
            # A step ahead, so that its latency hides behind the exchange.
            next_row = t_next.to(tl.int64) * B + b
            upcoming = tl.load(
                gates_ptr + next_row[None, :] * (4 * HX) + column[:, None],
                mask=columns_stored & (step + 1 < step_end),
                other=0.0,
            )

            missing = alive * 0
            if SINGLE:
                acc = tl.dot(weights[0], h.to(dtype), acc, input_precision=PRECISION)
            else:
                missing = exchange.await_count(counter, n_blocks * step, alive, spin_limit, PROTOCOL)
                previous_rows = exchange_ptr + (t_previous.to(tl.int64) * B + b) * HX
                # h0 is nobody's to deliver, and may hold any NaN.
                wanted = tl.minimum(step, 1)
                fresh = tl.full((BLOCK_B,), 0, tl.int1) | (step == 0)
                exempt = None
                if lengths_ptr is not None:
                    fresh = fresh | (t_previous >= length)
                    exempt = fresh[None, :]
                state_rows = tl.where(fresh, h0_rows, previous_rows)
                for first in tl.static_range(0, RESIDENT, POLL):
                    acc, late = _multiply_resident(
                        weights, state_rows, in_batch, exempt, wanted, acc, alive, spin_limit, first,
                        POLL if first + POLL <= RESIDENT else RESIDENT - first, HX, BLOCK_K, PROTOCOL, AMD, PRECISION,
                    )  # fmt: skip
                    missing = missing | late
                for chunk in tl.range(RESIDENT, N_CHUNKS, disable_licm=True):
                    streamed = _weight_chunk(w_ptr, unit_begin, chunk * BLOCK_K, H, HX, BLOCK_H, BLOCK_K)
                    p, m = _state_pointers(state_rows, chunk * BLOCK_K, in_batch, HX, BLOCK_K)
                    tiles, late = exchange.receive((p,), (m,), exempt, wanted, alive, spin_limit, 1, PROTOCOL, AMD)
                    missing = missing | late
                    acc = tl.dot(streamed, tiles[0], acc, input_precision=PRECISION)
                    # As above: the compiler would fetch many chunks ahead.
                    tl.debug_barrier()
                alive = exchange.report(status_ptr, missing, alive, block, group, step)

            pre_i, pre_f, pre_g, pre_o = layout.split_gates(acc, BLOCK_H, BLOCK_B)
            i, f, g, o, c_new, h_new = cell.forward(pre_i, pre_f, pre_g, pre_o, c)
            c_new = tl.where(alive > 0, c_new, float("nan"))
            h_new = tl.where(alive > 0, h_new, float("nan"))
            h_new = tl.where(unit[:, None] < H, h_new, 0.0)
            if lengths_ptr is not None:
                active = (t < length)[None, :]
                c = tl.where(active, c_new, c)
                h = tl.where(active, h_new, h)
                result = tl.where(active, h_new, 0.0).to(dtype)
            else:
                c = c_new
                h = h_new
                result = h_new.to(dtype)

            if not SINGLE:
                exchange.publish(exchange_ptr + row[None, :] * HX + unit[:, None], result, stored, AMD)
                exchange.announce(counter, alive, PROTOCOL)
            if SINGLE or SEPARATE_OUT:
                tl.store(out_ptr + row[None, :] * H + unit[:, None], result, mask=inside)
            if SAVE:
                at = gates_ptr + row[None, :] * (4 * HX)
                tl.store(at + layout.column_of(unit, 0)[:, None], i.to(dtype), mask=stored)
                tl.store(at + layout.column_of(unit, 1)[:, None], f.to(dtype), mask=stored)
                tl.store(at + layout.column_of(unit, 2)[:, None], g.to(dtype), mask=stored)
                tl.store(at + layout.column_of(unit, 3)[:, None], o.to(dtype), mask=stored)
                tl.store(cells_ptr + row[None, :] * HX + unit[:, None], c, mask=stored)

        final = b.to(tl.int64)[None, :] * H + unit[:, None]
        tl.store(h_n_ptr + final, h, mask=inside)
        tl.store(c_n_ptr + final, c, mask=inside)
