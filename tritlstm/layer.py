"""One layer in one direction on the kernel path: buffers, launches, and the large products after the recurrence.

Runs CUDA tensors on the GPU and, inside :func:`tritlstm.emulator.emulate`, CPU tensors in the emulator.
Arguments are trusted: :mod:`tritlstm.functional` validates them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import aten, emulator, plan, status, tf32
from .cell_options import PLAIN, STANDARD, Cell
from .kernels import exchange
from .kernels.launch import Launch
from .plan import padded

__all__ = ["backward", "bounded", "forward", "pack_rows", "padded", "unpack_rows"]

NEEDS_ALL = (True,) * 7
NOTHING: tuple[Tensor | None, ...] = (None,) * 6


def pack_rows(matrix: Tensor) -> Tensor:
    """``[4H, …]`` in i, f, g, o order to ``[4 HX, …]``, the four gates of a unit side by side, zero for the padding."""
    hidden = matrix.shape[0] // 4
    rest = matrix.shape[1:]
    units = matrix.reshape(4, hidden, *rest).transpose(0, 1)
    if padded(hidden) == hidden:
        return units.reshape(4 * hidden, *rest)
    wide = matrix.new_zeros(padded(hidden), 4, *rest)
    wide[:hidden] = units
    return wide.view(4 * padded(hidden), *rest)


def unpack_rows(matrix: Tensor, hidden: int) -> Tensor:
    """The inverse of :func:`pack_rows`: ``[4 HX, …]`` to ``[4H, …]``."""
    rest = matrix.shape[1:]
    return matrix.reshape(-1, 4, *rest)[:hidden].transpose(0, 1).reshape(4 * hidden, *rest)


def _run(launch: Launch) -> None:
    if emulator.active():
        emulator.run(launch)
        return
    index = next(filter(torch.is_tensor, launch.arguments.values())).get_device()
    if index == torch.cuda.current_device():
        launch.run()
    else:
        with torch.cuda.device(index):
            launch.run()


def _overrides() -> dict[str, Any]:
    emulation = emulator.current()
    return {} if emulation is None else {**emulation.overrides, "spin_limit": emulation.spin_limit}


def _row_strides(x: Tensor) -> tuple[Tensor, int, int]:
    """``x`` [T, B, D] with its strides in rows of D elements; copied only where it has no such strides."""
    t, b, width = x.shape
    dense = x.is_contiguous() or x.transpose(0, 1).is_contiguous()
    if not dense or width == 0:
        return x.contiguous(), b, 1
    if x.is_contiguous():
        return x, b, 1
    return x.transpose(0, 1), 1, t


def _pad_columns(state: Tensor, width: int) -> Tensor:
    return (
        state.contiguous()
        if state.shape[-1] == width
        else torch.nn.functional.pad(state, (0, width - state.shape[-1]))
    )


def _first_rows(
    length: int, batch: int, lengths: Tensor | None, reverse: bool, device: torch.device
) -> Tensor | slice:
    """Row of [T * B] of the step each sequence starts with; for a zero length, its row at time 0."""
    if not reverse:
        return slice(0, batch)
    if lengths is None:
        return slice((length - 1) * batch, length * batch)
    return (lengths.long() - 1).clamp_min(0) * batch + torch.arange(batch, device=device)


def _exchange_buffer(shape: tuple[int, ...], like: Tensor, protocol: str, narrow: bool = False) -> Tensor:
    buffer = like.new_empty(*shape, dtype=torch.float16 if narrow else None)
    if protocol == "flag":
        buffer.view(torch.int16 if buffer.element_size() == 2 else torch.int32).fill_(exchange.POISON.value)
    return buffer


@functools.lru_cache(maxsize=64)
def _untouched(dtype: torch.dtype, device: torch.device) -> Tensor:
    """For a pointer of a kernel that it neither reads nor writes through."""
    return torch.empty(1, dtype=dtype, device=device)


def _weights(w: Tensor, layout: plan.RecurrentPlan) -> Tensor:
    """Weights [*C, 4H, H] as a recurrent kernel reads them: padded or, for products of TF32, rounded and laid out."""
    *chains, rows, hidden = w.shape
    width = padded(hidden)
    if layout.alone:
        return w  # which is not read
    if layout.order is None or w.numel() == 0:
        return _pad_columns(w, width)
    out = w.new_empty(*chains, rows if layout.direction == "forward" else 4 * width, width)
    launch = plan.rounded(hidden, math.prod(chains), layout.order).launch
    _run(launch({"w_ptr": w.contiguous(), "out_ptr": out}))
    return out


def _operands(w_hh: Tensor, h0: Tensor, layout: plan.RecurrentPlan) -> dict[str, Tensor]:
    """What the forward kernel multiplies, by the names of its pointers: of C chains, or of one, without C.

    ``w_ptr`` [C, 4H, HX] and ``h0_ptr`` [C, B, HX]; of a ``narrow`` plan also ``entry_ptr`` [C, B, HX], or of one chain
    [B + 1, HX] with a row of zeros, ``w_scale_ptr`` [C, HX, 4] and ``entry_scale_ptr`` [C, B] or [B + 1].
    """
    *chains, batch, hidden = h0.shape
    width = padded(hidden)
    if not layout.narrow:
        return {"w_ptr": _weights(w_hh, layout), "h0_ptr": _pad_columns(h0, width)}
    w_hh, h0 = w_hh.contiguous(), h0.contiguous()
    count = math.prod(chains)
    states = count * batch
    w = w_hh.new_empty(*w_hh.shape[:-1], width, dtype=torch.float16)
    entry = h0.new_empty(states + 1, width, dtype=torch.float16)
    w_scale, entry_scale = w_hh.new_empty(*chains, width, 4), h0.new_empty(states + 1)
    arguments = {
        "w_ptr": w_hh,
        "h0_ptr": h0,
        "w_out_ptr": w,
        "entry_ptr": entry,
        "w_scale_ptr": w_scale,
        "entry_scale_ptr": entry_scale,
        "states": states,
    }
    _run(plan.narrow(hidden, count).launch(arguments))
    if chains:
        entry, entry_scale = entry[:states].view(*chains, batch, width), entry_scale[:states].view(*chains, batch)
    scales = {"w_scale_ptr": w_scale, "entry_scale_ptr": entry_scale}
    return {"w_ptr": w, "h0_ptr": _pad_columns(h0, width), "entry_ptr": entry, **scales}


def _counters(layout: plan.RecurrentPlan, device: torch.device) -> Tensor:
    many = layout.protocol == "counter" or layout.chains > 1
    if layout.protocol == "none" and not many:
        return _untouched(torch.int32, device)
    words = layout.n_tiles * exchange.COUNTER_STRIDE.value if many else 1
    # Who exchanges nothing reads none; to zero them would be a launch.
    make = torch.empty if layout.protocol == "none" else torch.zeros
    return make((layout.chains, words), dtype=torch.int32, device=device)


def _parts(layout: plan.RecurrentPlan, device: torch.device) -> Tensor | None:
    if layout.parts == 1 or layout.clustered:
        return None
    slots = layout.n_groups * exchange.TAGGED_SLOTS.value
    words = slots * layout.n_blocks * layout.parts * layout.block_h * layout.block_b
    return torch.zeros((layout.chains, words), dtype=torch.int64, device=device)


def _steps(layout: plan.RecurrentPlan, length: int) -> list[tuple[int, int]]:
    if layout.tier == "step":
        return [(step, step + 1) for step in range(length)]
    return [(0, length)]


def forward(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    reverse: bool,
    save: bool,
    gate0: Tensor | None = None,
    cell: Cell = PLAIN,
    recompute: bool = False,
    norm: Any = None,
    states: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Forward of one layer and direction.

    ``x`` [T, B, D], ``w_ih`` [4H, D], ``w_hh`` [4H, H], biases [4H], ``h0`` and ``c0`` [B, H], ``lengths``
    int32 [B], ``gate0`` [B, 4H] added to the pre-activations of each sequence's first step. All of one dtype.
    ``cell`` is how the cell differs from the plain one; ``norm`` is a :class:`tritlstm.normed.Normed`. ``states`` are
    tensors for ``h_n`` and ``c_n`` of a plain layer; where nothing is saved, what it then returns for ``gates`` and
    ``cells`` means nothing.

    Returns ``out`` [T, B, H], ``h_n`` and ``c_n`` [B, H] and, if ``save``, what :func:`backward` needs:
    ``gates`` [T, B, 4 HX], the four of a unit side by side (empty with ``recompute``), and ``cells`` [T, B, HX] in fp32
    (else empty).
    """
    length, batch, _ = x.shape
    plain = cell is PLAIN and norm is None and gate0 is None and not recompute
    # Overrides are those of a plan of many steps.
    if length == 1 and plain and not _overrides().keys() - {"spin_limit"}:
        return _one_step(x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, save, states)
    hidden = w_hh.shape[1]
    width = padded(hidden)
    precision = plan.dot_precision(x)
    device = plan.device_of(x)
    overrides = _overrides() if bounded(cell) else {**_overrides(), "narrow": False}
    layout = plan.recurrent(
        "forward", length, batch, hidden, x.dtype, device, precision, save, overrides,
        normed=norm is not None,
    )
    cuts = None if cell.resets is None else aten.cut_steps(cell.resets, lengths, reverse)
    separate = layout.constants["SEPARATE_OUT"] or cell.h_scale is not None
    if cell is not PLAIN or recompute:
        layout = _with_cell(layout, cell, SEPARATE_OUT=separate, KEEP_GATES=not recompute)

    if norm is None:
        gates = _input_products(x, w_ih, b_ih, b_hh, hidden, device, precision)
    else:
        gates = norm.input_products(x, w_ih, b_ih, b_hh, hidden)
    _add_gate0(gates, gate0, cuts, lengths, reverse)

    place = x.device
    buffer = _exchange_buffer((length, batch, width), x, layout.protocol, layout.narrow)
    out = x.new_empty(length, batch, hidden) if separate else buffer
    steps = _steps(layout, length)
    # Between the launches of the step tier the cell state keeps fp32.
    c_dtype = c0.dtype if len(steps) == 1 else torch.float32
    if save or states is None:
        cells = x.new_empty(*((length, batch, width) if save else (0,)), dtype=torch.float32)
    else:
        cells = _untouched(torch.float32, place)
    if states is None:
        h_n = x.new_empty(batch, hidden)
        c_n = x.new_empty(batch, hidden, dtype=c_dtype)
    else:
        h_n, c_n = states
        if c_n.dtype != c_dtype:
            c_n = x.new_empty(batch, hidden, dtype=c_dtype)
    flag = status.of(place)
    arguments = {
        "gates_ptr": gates,
        **_operands(w_hh, h0, layout),
        "c0_ptr": c0.contiguous(),
        "lengths_ptr": lengths,
        "exchange_ptr": buffer,
        "out_ptr": out,
        "cells_ptr": cells,
        "h_n_ptr": h_n,
        "c_n_ptr": c_n,
        "counter_ptr": _counters(layout, place),
        "status_ptr": flag,
        "T": length,
        "B": batch,
        "reverse": int(reverse),
    }
    if cell is not PLAIN:
        arguments |= _cell_arguments(cell, cuts)
        if not layout.narrow:  # there they have a row of zeros already
            arguments["entry_ptr"] = _entry(h0, cell, width)
    if norm is not None:
        arguments |= norm.forward_arguments(layout, place)
    for begin, end in steps:
        _run(layout.launch({**arguments, "step_begin": begin, "step_end": end}))
    status.check(flag)
    if states is not None:
        return out, h_n, c_n if c_n is states[1] else states[1].copy_(c_n), gates, cells
    return out, h_n, c_n.to(c0.dtype), gates if save and not recompute else x.new_empty(0), cells


def _one_step(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    save: bool,
    states: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`forward` of one time step and the plain cell, whose direction is no matter."""
    _, batch, features = x.shape
    hidden = w_hh.shape[1]
    chosen = plan.one_step(batch, features, hidden, x.dtype, plan.device_of(x), plan.dot_precision(x), save)
    out = x.new_empty(1, batch, hidden)
    h_n, c_n = states or (x.new_empty(batch, hidden), c0.new_empty(batch, hidden))
    if save:
        gates = x.new_empty(1, batch, 4 * padded(hidden))
        cells = x.new_empty(1, batch, padded(hidden), dtype=torch.float32)
    else:
        gates, cells = _untouched(x.dtype, x.device), _untouched(torch.float32, x.device)
    x, _, stride_b = _row_strides(x)
    arguments = {
        "x_ptr": x,
        "w_ih_ptr": w_ih.contiguous(),
        "w_hh_ptr": w_hh.contiguous(),
        "b_ih_ptr": b_ih,
        "b_hh_ptr": b_hh,
        "h0_ptr": h0.contiguous(),
        "c0_ptr": c0.contiguous(),
        "lengths_ptr": lengths,
        "out_ptr": out,
        "h_n_ptr": h_n,
        "c_n_ptr": c_n,
        "gates_ptr": gates,
        "cells_ptr": cells,
        "B": batch,
        "x_stride_b": stride_b,
    }
    _run(chosen.launch(arguments))
    if save or states is not None:
        return out, h_n, c_n, gates, cells
    return out, h_n, c_n, x.new_empty(0), cells.new_empty(0)


def _with_cell(layout: plan.RecurrentPlan, cell: Cell, **constants: Any) -> plan.RecurrentPlan:
    """``layout`` with the constexpr parameters that ``cell`` and ``constants`` change."""
    key = (cell[_FIRST_OPTION:], *constants.items())
    found = layout.cells.get(key)
    if found is not None:
        return found
    gate, node, shown = cell.activations
    constants |= {
        "COUPLED": cell.coupled,
        "CLIP": cell.cell_clip or None,
        "ZONEOUT_H": cell.zoneout_h,
        "ZONEOUT_C": cell.zoneout_c,
        "GATE": gate,
        "NODE": node,
        "SHOWN": shown,
    }
    defaults = {**layout.constants, **_CELL_DEFAULTS}
    changed = {name: value for name, value in constants.items() if value != defaults[name]}
    found = dataclasses.replace(layout, cell=tuple(changed.items())) if changed else layout
    layout.cells[key] = found
    return found


def bounded(cell: Cell) -> bool:
    """Whether no h but h0 is larger than 1, on its way into the recurrent product as well."""
    gate, _, shown = cell.activations
    return not cell.zoneout_h and cell.h_scale is None and (gate, shown) == (STANDARD[0], STANDARD[2])


#: Of `Cell`, after its tensors.
_FIRST_OPTION = Cell._fields.index("coupled")


#: Of the kernels' constexpr parameters that belong to a variant.
_CELL_DEFAULTS = {"KEEP_GATES": True, "COUPLED": False, "CLIP": None, "ZONEOUT_H": 0.0, "ZONEOUT_C": 0.0, "GATE": 0,
                  "NODE": 1, "SHOWN": 1}  # fmt: skip


def _cell_arguments(cell: Cell, cuts: Tensor | None) -> dict[str, Tensor]:
    """The kernels' pointers that belong to a variant; what is not given stays None."""
    given = {
        "cuts_ptr": None if cuts is None else cuts[..., 0].to(torch.int32).contiguous(),
        "peephole_ptr": cell.peephole,
        "h_scale_ptr": cell.h_scale,
        "noise_ptr": cell.noise if cell.zoneout_h or cell.zoneout_c else None,
    }
    return {name: value.contiguous() for name, value in given.items() if value is not None}


def _entry(h0: Tensor, cell: Cell, width: int) -> Tensor | None:
    """h0 as the product reads it, [B + 1, HX] with a row of zeros for states that were reset; None: h0 as it is."""
    if cell.h_scale is None and cell.resets is None:
        return None
    return torch.nn.functional.pad(aten.sent_on(h0, cell), (0, width - h0.shape[1], 0, 1))


def _add_gate0(
    gates: Tensor, gate0: Tensor | None, cuts: Tensor | None, lengths: Tensor | None, reverse: bool
) -> None:
    if gate0 is None:
        return
    length, batch, _ = gates.shape
    first = _first_rows(length, batch, lengths, reverse, gates.device)
    if cuts is not None:
        gate0 = torch.where(cuts.reshape(-1, 1)[first], 0, gate0)
    flat = gates.view(length * batch, -1)
    flat[first] += pack_rows(gate0.t()).t().to(flat.dtype)


def _input_products(
    x: Tensor,
    w_ih: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    hidden: int,
    device: plan.Device,
    precision: str,
    dtype: torch.dtype | None = None,
    gates: Tensor | None = None,
) -> Tensor:
    length, batch, features = x.shape
    x, stride_t, stride_b = _row_strides(x)
    if gates is None:
        gates = x.new_empty(length, batch, 4 * padded(hidden), dtype=dtype)
    layout = plan.gate_gemm(length * batch, features, hidden, x.dtype, device, precision)
    arguments = {
        "x_ptr": x,
        "w_ptr": w_ih.contiguous(),
        "b_ih_ptr": b_ih,
        "b_hh_ptr": b_hh,
        "gates_ptr": gates,
        "rows": length * batch,
        "B": batch,
        "x_stride_t": stride_t,
        "x_stride_b": stride_b,
    }
    _run(layout.launch(arguments))
    return gates


def backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    out: Tensor,
    gates: Tensor,
    cells: Tensor,
    reverse: bool,
    needs: Sequence[bool] = NEEDS_ALL,
    cell: Cell = PLAIN,
    rebuild: tuple[Tensor | None, Tensor | None, Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """Backward of :func:`forward`, from what it saved.

    Returns the gradients of x, w_ih, w_hh, the bias sum [4H], h0, c0 and gate0 [B, 4H], each an empty tensor
    where ``needs`` says so; with an eighth flag in ``needs`` also that of ``cell.peephole``. ``rebuild``, b_ih, b_hh
    and gate0 of the forward pass, says that ``gates`` were not saved.
    """
    if rebuild is not None:
        # Not of TF32: of few units, forward's products were not either.
        cuts = None if cell.resets is None else aten.cut_steps(cell.resets, lengths, reverse)
        gates = _rebuilt_gates(x, w_ih, w_hh, *rebuild, h0, c0, lengths, cuts, out, cells, reverse, cell)
    found = gradients(
        grad_out, grad_h_n, grad_c_n, x, w_ih, w_hh, h0, c0, lengths, out, gates, cells, reverse, needs, cell
    )
    # One each: an operator may not return the same tensor twice.
    return tuple(x.new_empty(0) if grad is None else grad for grad in found)


@tf32.of_backward
def gradients(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    out: Tensor,
    gates: Tensor,
    cells: Tensor,
    reverse: bool,
    needs: Sequence[bool],
    cell: Cell = PLAIN,
    times: tuple[int, ...] = (),
) -> tuple[Tensor | None, ...]:
    """:func:`backward` with None for what is not needed, and the bias sum so many ``times``: [*times, 4H]."""
    length, batch, features = x.shape
    hidden = w_hh.shape[1]
    cuts = None if cell.resets is None else aten.cut_steps(cell.resets, lengths, reverse)
    grad_gates, grad_c0, kept_h = _recurrent_backward(
        grad_out, grad_h_n, grad_c_n, w_hh, c0, lengths, cuts, gates, cells, reverse, x, cell
    )
    need_x, need_w_ih, need_w_hh, need_b, need_h0, need_c0, need_gate0, *need_peephole = needs
    grad_x, grad_w_ih, grad_w_hh, grad_b, grad_h0, grad_gate0 = NOTHING
    # What follows costs a small layer more in launches than in memory: one copy of the gates' gradients into the order
    # of the weights spares a copy of every weight and of every gradient of one.
    packed = grad_gates.numel() > UNPACKED
    rows = grad_gates.view(length * batch, -1) if packed else _unpacked(grad_gates, hidden)
    if need_x:
        grad_x = torch.mm(rows, pack_rows(w_ih) if packed else w_ih).view(length, batch, features)
    if need_w_ih:
        product = torch.mm(rows.t(), x.reshape(length * batch, features))
        grad_w_ih = unpack_rows(product, hidden) if packed else product
    if need_b and packed:
        sums = rows.sum(0).view(-1, 4)[:hidden].t()
        grad_b = sums.expand(*times, 4, hidden).reshape(*times, 4 * hidden)
    elif need_b:
        grad_b = rows.expand(*times, *rows.shape).sum(-2)
    if need_w_hh or need_h0 or need_gate0:
        first_rows = _first_rows(length, batch, lengths, reverse, x.device)
        first = rows if length == 1 else rows[first_rows]
        # Into a first step that begins with a reset, neither h0 nor gate0 has entered.
        entered = first if cuts is None else torch.where(cuts.reshape(-1, 1)[first_rows], 0, first)
        if need_w_hh:
            sent, sent0 = _sent(out, h0, cuts, reverse, cell)
            product = _recurrent_weight_gradient(rows, entered, sent, sent0, reverse)
            grad_w_hh = unpack_rows(product, hidden) if packed else product
        if need_h0:
            weights = pack_rows(w_hh) if packed else w_hh
            grad_h0 = _grad_h0(entered, grad_h_n, weights, lengths, cell, kept_h, cuts, first_rows)
        if need_gate0:
            grad_gate0 = unpack_rows(entered.t(), hidden).t().contiguous() if packed else entered.clone()
    found = (grad_x, grad_w_ih, grad_w_hh, grad_b, grad_h0, grad_c0.to(c0.dtype) if need_c0 else None, grad_gate0)
    if not need_peephole:
        return found
    if not need_peephole[0]:
        return *found, None
    return *found, _grad_peephole(grad_gates, gates, cells, out, h0, c0, lengths, cuts, reverse, cell)


#: Gradients of gates, in numbers, up to which they are put into the order of the weights.
UNPACKED = 1 << 22


def _unpacked(gates: Tensor, hidden: int) -> Tensor:
    """``[T, B, 4 HX]`` to ``[T * B, 4H]`` in i, f, g, o order."""
    width = padded(hidden)
    units = gates.view(-1, width, 4)
    if width != hidden:
        units = units[:, :hidden]
    return units.transpose(1, 2).reshape(-1, 4 * hidden)


def _grad_h0(
    entered: Tensor,
    grad_h_n: Tensor | None,
    w_hh: Tensor,  # with its rows in the order of the columns of ``entered``
    lengths: Tensor | None,
    cell: Cell,
    kept_h: Tensor | None,
    cuts: Tensor | None,
    first_rows: Tensor | slice,
) -> Tensor:
    grad = torch.mm(entered, w_hh)
    if cell.h_scale is not None:
        grad = (grad * cell.h_scale).to(grad.dtype)
    if kept_h is not None:
        if cuts is not None:
            kept_h = torch.where(cuts.reshape(-1, 1)[first_rows], 0, kept_h)
        grad = (grad + kept_h).to(grad.dtype)
    if lengths is not None and grad_h_n is not None:
        grad = torch.where((lengths == 0)[:, None], grad_h_n, grad)
    return grad


def _sent(out: Tensor, h0: Tensor, cuts: Tensor | None, reverse: bool, cell: Cell) -> tuple[Tensor, Tensor]:
    """``out`` and ``h0`` as the recurrent product of the step after received them."""
    out, h0 = aten.sent_on(out, cell), aten.sent_on(h0, cell)
    if cuts is not None:
        out = out.masked_fill(cuts.roll(1 if reverse else -1, 0), 0)
    return out, h0


def _rebuilt_gates(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    gate0: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    cuts: Tensor | None,
    out: Tensor,
    cells: Tensor,
    reverse: bool,
    cell: Cell,
) -> Tensor:
    """The activated gates that :func:`forward` would have saved, by one product over all steps."""
    length, batch, _ = x.shape
    hidden = w_hh.shape[1]
    wide = torch.float32
    gates = _input_products(x, w_ih, b_ih, b_hh, hidden, plan.device_of(x), plan.dot_precision(x))
    _add_gate0(gates, gate0, cuts, lengths, reverse)
    first = aten._first_steps(length, lengths, reverse, x.device)
    h_prev, c_prev = aten.previous_states(out, cells, h0, c0.to(wide), cuts, first, reverse)
    sent = aten.sent_on(h_prev, cell)
    rows = gates.view(length * batch, -1)
    torch.addmm(rows, sent.reshape(length * batch, hidden), pack_rows(w_hh).t(), out=rows)
    # A few steps at a time: in fp32, all of them would take twice the memory that not saving the gates has saved.
    steps = max(1, REBUILT // (batch * hidden))
    for part, c in zip(gates.split(steps), c_prev.split(steps), strict=True):
        pre = torch.cat(aten.unpack_gates(part, hidden), -1).to(wide)
        part.copy_(aten.pack_gates(torch.cat(aten.activate(pre, c, cell)[:4], -1)))
    return gates


#: Cells whose gates are rebuilt at a time.
REBUILT = 1 << 20


def _grad_peephole(
    grad_gates: Tensor,
    gates: Tensor,
    cells: Tensor,
    out: Tensor,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    cuts: Tensor | None,
    reverse: bool,
    cell: Cell,
) -> Tensor:
    hidden = h0.shape[1]
    first = aten._first_steps(len(out), lengths, reverse, out.device)
    _, c_prev = aten.previous_states(out, cells, h0, c0.float(), cuts, first, reverse)
    c = cells[..., :hidden]
    if cell.zoneout_c:
        i, f, g, _ = (gate.float() for gate in aten.unpack_gates(gates, hidden))
        c = aten.candidate(i, f, g, c_prev, cell)
    unpacked = torch.cat(aten.unpack_gates(grad_gates, hidden), -1)
    return aten.peephole_gradient(unpacked, c_prev, c).to(out.dtype)


def _recurrent_backward(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    w_hh: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    cuts: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    reverse: bool,
    x: Tensor,
    cell: Cell,
    norm: Any = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of the gates' pre-activations [T, B, 4 HX] and of c0 [B, H] (fp32), and what zoneout passes to h0."""
    length, batch, _ = x.shape
    hidden = w_hh.shape[1]
    device = plan.device_of(x)
    precision = plan.dot_precision(x)
    layout = plan.recurrent(
        "backward", length, batch, hidden, x.dtype, device, precision, True, _overrides(),
        normed=norm is not None,
    )
    if cell is not PLAIN:
        layout = _with_cell(layout, cell)
    stride_t, stride_b = batch, 1
    if grad_out is not None:
        grad_out, stride_t, stride_b = _row_strides(grad_out)
    grad_gates = _exchange_buffer((length, batch, 4 * padded(hidden)), x, layout.protocol)
    grad_c0 = x.new_empty(batch, hidden, dtype=torch.float32)
    flag = status.of(x.device)
    arguments = {
        "grad_out_ptr": grad_out,
        "grad_h_n_ptr": None if grad_h_n is None else grad_h_n.contiguous(),
        "grad_c_n_ptr": None if grad_c_n is None else grad_c_n.contiguous(),
        "w_ptr": _weights(w_hh, layout),
        "c0_ptr": c0.contiguous(),
        "lengths_ptr": lengths,
        "gates_ptr": gates,
        "cells_ptr": cells,
        "grad_gates_ptr": grad_gates,
        "parts_ptr": _parts(layout, x.device),
        "grad_c_ptr": grad_c0,
        "counter_ptr": _counters(layout, x.device),
        "status_ptr": flag,
        "T": length,
        "B": batch,
        "grad_out_stride_t": stride_t,
        "grad_out_stride_b": stride_b,
        "reverse": int(reverse),
    }
    if cell is not PLAIN:
        arguments |= _cell_arguments(cell, cuts)
    if norm is not None:
        arguments |= norm.backward_arguments(layout, x)
    kept_h = torch.empty_like(grad_c0) if cell.zoneout_h else None
    if kept_h is not None:
        arguments["grad_h_ptr"] = kept_h
    for begin, end in _steps(layout, length):
        _run(layout.launch({**arguments, "step_begin": begin, "step_end": end}))
    status.check(flag)
    return grad_gates, grad_c0, kept_h


def _recurrent_weight_gradient(rows: Tensor, first: Tensor, out: Tensor, h0: Tensor, reverse: bool) -> Tensor:
    """``sum over t of rows[t]ᵀ h[t - 1]``, [columns of rows, H]; h past a sequence's end is zero in ``out``."""
    length, batch, hidden = out.shape
    product = torch.mm(first.t(), h0)
    if length == 1:
        return product
    inner = (length - 1) * batch
    h = out.reshape(length * batch, hidden)
    later, earlier = (rows[:inner], h[batch:]) if reverse else (rows[batch:], h[:inner])
    return product.addmm_(later.t(), earlier)
