"""One LSTM layer in one direction on the CPU: what the operators run there, in place and by large products.

It computes what `tritlstm.aten` writes down, with the same arguments and results. The time loop has one small product
a step and works in preallocated memory; all of autograd's work per step, the weights' gradients among it, becomes one
large product after the loop. Rows of sequences that have ended are left out, so padding costs nothing but memory.
Variants of the cell other than resets run in `tritlstm.aten`.

The same call gives the same bits, but not those of torch's own LSTM, which evaluation runs: sums are made in another
order. Both err alike against float64 (tests/test_cpu.py). Derivatives of gradients come from `tritlstm.aten`.

Inside, tensors are lists of rows: N rows, step by step, the longest sequence first in each, like the data of a
`PackedSequence`. All arithmetic is in float32 (float64 for float64 inputs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import aten
from .cell_options import PLAIN, Cell

#: Rows of one product of w_hh's gradient, if a step has fewer. torch's own backward adds up one product a step, which
#: rounds less than one long sum does. With 64 rows, T = 40, B = 5, H = 12, 10 of 24 runs of the budget in
#: tests/test_cpu.py were over it, with 32 two, with 16 none; 16 take 0.2 ms longer than 64, of 12 for a training step
#: (T = 60, B = 16, H = 128).
ROWS = 16

# Where a training step is faster here than in torch's own LSTM. Measured on 2026-11-25 with torch 2.13.0 on an Intel
# Xeon with AVX-512, with one and with two threads, in turns with nn.LSTM; benchmarks/README.md has the figures.
#: Packed data of several lengths, which torch runs step by step under autograd: its speed for 16 steps (less for fewer,
#: up to H = 128), 1.0 to 2.3 times as fast for 24, 1.4 to 2.6 times for 60.
PACKED_STEPS = 24
#: Here a batch is padded, up to so many times the rows that carry data. A training step's peak of memory is then up to
#: twice that of torch's own (T = 200, B = 64, H = 256: 1.5 times without padding, 1.9 times with 3.9).
MOST_PADDING = 4
#: oneDNN lays all weights out anew in every call, which takes as long as some rows of products. It loses where
#: T (B + 16), the rows and what a step costs here, is small beside the weights of a layer: 1.0 to 4 times as fast up to
#: a 16384th of them, about as fast at an 8192nd.
WEIGHTS_PER_ROW = 16384
FEWEST_WEIGHTS = 1 << 19  # H = D = 256; below, what a call costs here decides
MOST_ROWS = 256

Rebuild = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Rows(NamedTuple):
    """Which rows there are; `places` and `order` are None where every sequence has every step."""

    sizes: list[int]  # sequences of each step
    batch: int
    places: Tensor | None  # [N], where in [T B]
    order: Tensor | None  # [B], sequences by falling length

    @classmethod
    def of(cls, steps: int, batch: int, lengths: Tensor | None) -> _Rows:
        if lengths is None:
            return cls([batch] * steps, batch, None, None)
        ends, order = lengths.long().sort(descending=True, stable=True)
        active = torch.arange(steps, device="cpu")[:, None] < ends
        sizes = [size for size in active.sum(1).tolist() if size]
        places = (torch.arange(steps, device="cpu")[:, None] * batch + order)[active]
        return cls(sizes, batch, places, order)

    @property
    def offsets(self) -> Tensor:
        """[T + 1], the first row of each step."""
        return torch.tensor([0, *self.sizes], device="cpu").cumsum(0)

    def gather(self, values: Tensor) -> Tensor:
        """[T, B, ...] to [N, ...]."""
        flat = values.flatten(0, 1)
        return flat if self.places is None else flat.index_select(0, self.places)

    def scatter(self, rows: Tensor, steps: int) -> Tensor:
        """[N, ...] to [T, B, ...], zero where there is no row."""
        if self.places is None:
            return rows.unflatten(0, (steps, self.batch))
        flat = rows.new_zeros(steps * self.batch, *rows.shape[1:])
        return flat.index_copy_(0, self.places, rows).unflatten(0, (steps, self.batch))

    def sort(self, state: Tensor) -> Tensor:
        return state if self.order is None else state.index_select(0, self.order)

    def unsort(self, state: Tensor) -> Tensor:
        return state if self.order is None else torch.empty_like(state).index_copy_(0, self.order, state)

    def split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """[N, ...] step by step."""
        return rows.split_with_sizes(self.sizes)

    def times(self, reverse: bool) -> range:
        last = len(self.sizes) - 1
        return range(last, -1, -1) if reverse else range(last + 1)

    def previous(self, rows: Tensor, initial: Tensor, reverse: bool) -> Tensor:
        """What each row's step began with: the row of the step before it, or `initial` [B, ...]."""
        if self.places is None:
            return torch.cat((rows[self.batch :], initial) if reverse else (initial, rows[: -self.batch]))
        parts, sizes = self.split(rows), self.sizes
        if not reverse:
            return torch.cat([initial[: sizes[0]], *(part[:n] for part, n in zip(parts, sizes[1:], strict=False))])
        pieces = []
        for t, size in enumerate(sizes):
            later = sizes[t + 1] if t + 1 < len(sizes) else 0
            pieces += [parts[t + 1], initial[later:size]] if later else [initial[:size]]
        return torch.cat(pieces)

    def first(self, reverse: bool) -> Tensor:
        """The row that each sequence with any begins at; they are the first ones of the sorted order."""
        if not reverse:
            return torch.arange(self.sizes[0], device="cpu")
        if self.places is None:
            return torch.arange(self.batch, device="cpu") + (len(self.sizes) - 1) * self.batch
        k = torch.arange(self.sizes[0], device="cpu")
        ends = (torch.tensor(self.sizes, device="cpu")[:, None] > k).sum(0)
        return self.offsets[ends - 1] + k


def packed_pays(batch_sizes: Tensor) -> bool:
    """Whether training on packed data is faster here; `batch_sizes` [T] are those of a `PackedSequence`."""
    steps = len(batch_sizes)
    # torch runs packed data of one length as it runs any batch, in oneDNN.
    if steps < PACKED_STEPS or bool(batch_sizes[0] == batch_sizes[-1]):
        return False
    return steps * int(batch_sizes[0]) <= MOST_PADDING * int(batch_sizes.sum())


def small(input_size: int, hidden_size: int) -> bool:
    """Whether a layer is so small that only packed data are faster here."""
    return 4 * hidden_size * (input_size + hidden_size) < FEWEST_WEIGHTS


def few_rows_pay(steps: int, batch: int, x: Tensor, input_size: int, hidden_size: int) -> bool:
    """Whether training on T = `steps`, B = `batch` is faster here; of `x` the dtype counts, and whether it is empty."""
    rows, weights = steps * (batch + 16), 4 * hidden_size * (input_size + hidden_size)
    if rows > MOST_ROWS or small(input_size, hidden_size) or rows * WEIGHTS_PER_ROW > weights:
        return False
    return x.dtype == torch.float32 and x.numel() > 0


def computes(x: Tensor, h0: Tensor, cell: Cell, recompute: bool) -> bool:
    """Whether this module has what is asked for; what it has not is in `tritlstm.aten`."""
    plain = cell is PLAIN or cell._replace(resets=None) == PLAIN
    return x.numel() > 0 and h0.size(1) > 0 and plain and not recompute


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the layer over all time steps; arguments and results are those of `tritlstm.aten.forward`."""
    if not computes(x, h0, cell, recompute):
        return aten.forward(x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, save, gate0, cell, recompute)
    steps, hidden, wide = x.size(0), h0.size(1), aten.state_dtype(x.dtype)
    rows = _Rows.of(steps, x.size(1), lengths)
    h, c = rows.sort(h0).to(wide), rows.sort(c0).to(wide)
    if not rows.sizes:
        results = (x.new_zeros(steps, rows.batch, hidden), h0.clone(), c0.clone())
        return *results, *_saved(x.new_zeros(0, 4 * hidden), c.new_zeros(0, hidden), rows, x, save)
    cuts, cut = _cuts(cell, lengths, reverse, rows)
    gates = _input_product(rows.gather(x).to(wide), w_ih, b_ih, b_hh)  # [N, 4H]
    if gate0 is not None:
        first = rows.first(reverse)
        added = rows.sort(gate0)[: len(first)].to(wide)
        gates.index_add_(0, first, added if cuts is None else added.masked_fill(cuts[first], 0))
    h, c, out, cells = _walk(gates, w_hh.to(wide).t(), h, c, rows, reverse, cuts, cut, x.dtype)
    results = (rows.scatter(out, steps), rows.unsort(h).to(x.dtype), rows.unsort(c).to(c0.dtype))
    return *results, *_saved(gates, cells, rows, x, save)


def _input_product(x: Tensor, w_ih: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    biases = [bias.to(x.dtype) for bias in (b_ih, b_hh) if bias is not None]
    weights = w_ih.to(x.dtype).t()
    return torch.addmm(sum(biases[1:], biases[0]), x, weights) if biases else x @ weights


def _cuts(cell: Cell, lengths: Tensor | None, reverse: bool, rows: _Rows) -> tuple[Tensor | None, list[bool]]:
    """Rows [N, 1] whose step begins with a reset, and the steps that have any."""
    cuts = aten.cut_steps(cell.resets, lengths, reverse)
    if cuts is None:
        return None, [False] * len(rows.sizes)
    return rows.gather(cuts), cuts.flatten(1).any(1).tolist()


def _walk(
    gates: Tensor,
    recurrent: Tensor,
    h0: Tensor,
    c0: Tensor,
    rows: _Rows,
    reverse: bool,
    cuts: Tensor | None,
    cut: list[bool],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The time loop: activates `gates` [N, 4H] in place. Final h and c [B, H]; all h, of `dtype`, and c [N, H]."""
    hidden, wide = h0.size(1), gates.dtype
    out, cells = gates.new_empty(len(gates), hidden, dtype=dtype), gates.new_empty(len(gates), hidden)
    shown = gates.new_empty(rows.sizes[0], hidden)
    pre, out_t, c_t = rows.split(gates), rows.split(out), rows.split(cells)
    i_f, i, f, g, o = (
        rows.split(gates[:, begin * hidden : end * hidden]) for begin, end in ((0, 2), (0, 1), (1, 2), (2, 3), (3, 4))
    )
    cut_t = [] if cuts is None else rows.split(cuts)
    mul, tanh = torch.mul, torch.tanh
    h_n, c_n = h0.clone(), c0.clone()
    active = rows.sizes[-1 if reverse else 0]
    h, c = h0[:active], c0[:active]
    for t in rows.times(reverse):
        size = rows.sizes[t]
        if size < active:
            h_n[size:active], c_n[size:active] = h[size:], c[size:]
            h, c = h[:size], c[:size]
        elif size > active:
            h, c = torch.cat((h, h0[active:size])), torch.cat((c, c0[active:size]))
        active = size
        if cut[t]:
            h, c = h.masked_fill(cut_t[t], 0), c.masked_fill(cut_t[t], 0)
        pre[t].addmm_(h, recurrent)
        i_f[t].sigmoid_()
        g[t].tanh_()
        o[t].sigmoid_()
        c = mul(f[t], c, out=c_t[t]).addcmul_(i[t], g[t])
        tanh_c = tanh(c, out=shown[:size])
        if dtype == wide:
            h = mul(o[t], tanh_c, out=out_t[t])
        else:
            h = out_t[t].copy_(mul(o[t], tanh_c)).to(wide)
    h_n[:active], c_n[:active] = h, c
    return h_n, c_n, out, cells


def _saved(gates: Tensor, cells: Tensor, rows: _Rows, x: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    if not save:
        return x.new_empty(0), cells.new_empty(0)
    return rows.scatter(aten.pack_gates(gates).to(x.dtype), x.size(0)), rows.scatter(aten.pad_units(cells), x.size(0))


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
    needs: Sequence[bool],
    cell: Cell = PLAIN,
    rebuild: Rebuild | None = None,
) -> tuple[Tensor, ...]:
    """Walk back over all steps; arguments and results are those of `tritlstm.aten.backward`."""
    inputs = (x, w_ih, w_hh, h0, c0, lengths, out, gates, cells, reverse, needs, cell, rebuild)
    steps, hidden, wide = x.size(0), h0.size(1), aten.state_dtype(x.dtype)
    rows = _Rows.of(steps, x.size(1), lengths) if computes(x, h0, cell, rebuild is not None) else None
    if rows is None or not rows.sizes or any(needs[7:]):
        return aten.backward(grad_out, grad_h_n, grad_c_n, *inputs)
    cuts, cut = _cuts(cell, lengths, reverse, rows)
    weights = w_hh.to(wide)
    c = rows.gather(cells)[:, :hidden]
    c_prev = rows.previous(c, rows.sort(c0).to(wide), reverse)
    if cuts is not None:
        c_prev = c_prev.masked_fill(cuts, 0)
    activated = rows.gather(gates).unflatten(1, (-1, 4))[:, :hidden].transpose(1, 2).flatten(1).to(wide)  # [N, 4H]
    forget = activated[:, hidden : 2 * hidden]
    scales, per_c = _scales(activated, c, c_prev)
    grad_h, grad_c = (None if grad is None else rows.sort(grad).to(wide) for grad in (grad_h_n, grad_c_n))
    grad_rows = None if grad_out is None else rows.gather(grad_out).to(wide)
    deltas, grad_h0, grad_c0 = _walk_back(
        grad_rows, grad_h, grad_c, weights, scales, per_c, forget, rows, reverse, cuts, cut
    )

    def h_prev() -> Tensor:
        h = rows.previous(rows.gather(out), rows.sort(h0), reverse)
        return h if cuts is None else h.masked_fill(cuts, 0)

    def grad_gate0() -> Tensor:
        first = rows.first(reverse)
        entered = deltas.index_select(0, first)
        if cuts is not None:
            entered = entered.masked_fill(cuts[first], 0)
        whole = entered.new_zeros(rows.batch, 4 * hidden)
        whole[: len(first)] = entered
        return rows.unsort(whole).to(x.dtype)

    results = (
        lambda: rows.scatter((deltas @ w_ih.to(wide)).to(x.dtype), steps),
        lambda: (deltas.t() @ rows.gather(x).to(wide)).to(w_ih.dtype),
        lambda: _recurrent_gradient(deltas, h_prev().to(wide), max(ROWS, rows.batch)).to(w_hh.dtype),
        lambda: deltas.sum(0).to(w_ih.dtype),
        lambda: rows.unsort(grad_h0).to(h0.dtype),
        lambda: rows.unsort(grad_c0).to(c0.dtype),
        grad_gate0,
        lambda: x.new_empty(0),
    )
    return tuple(result() if need else x.new_empty(0) for result, need in zip(results, needs, strict=False))


def _scales(gates: Tensor, c: Tensor, c_prev: Tensor) -> tuple[Tensor, Tensor]:
    """What a unit gradient of c (for o: of h) adds to each gate [N, 4H], and what one of h adds to c [N, H]."""
    i, _, g, o = gates.chunk(4, 1)
    scales = gates * gates
    per_i, per_f, per_g, per_o = scales.chunk(4, 1)
    first_two = slice(0, 2 * i.size(1))
    torch.sub(gates[:, first_two], scales[:, first_two], out=scales[:, first_two])
    torch.sub(o, per_o, out=per_o)
    shown = torch.tanh(c)
    per_i.mul_(g)
    per_f.mul_(c_prev)
    per_g.neg_().add_(1).mul_(i)
    per_o.mul_(shown)
    return scales, shown.square_().neg_().add_(1).mul_(o)


def _walk_back(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    weights: Tensor,
    deltas: Tensor,
    per_c: Tensor,
    forget: Tensor,
    rows: _Rows,
    reverse: bool,
    cuts: Tensor | None,
    cut: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Makes of the scales [N, 4H] the gradients of the gates before activation, in place; and those of h0 and c0."""
    hidden, sizes = per_c.size(1), rows.sizes
    zeros = per_c.new_zeros(rows.batch, hidden)
    grad_h0, grad_c0 = (zeros.clone() if grad is None else grad.clone() for grad in (grad_h_n, grad_c_n))
    buffer = per_c.new_empty(sizes[0], hidden)
    delta_t, per_c_t, f_t = rows.split(deltas), rows.split(per_c), rows.split(forget)
    i_f_g = rows.split(deltas.unflatten(1, (4, hidden))[:, :3])
    o_t = rows.split(deltas[:, 3 * hidden :])
    given = None if grad_out is None else rows.split(grad_out)
    cut_t = [] if cuts is None else rows.split(cuts)
    addmm, mm = torch.addmm, torch.mm
    active = 0
    before = -1
    for t in rows.times(not reverse):
        size = sizes[t]
        grad_h, grad_c = buffer[:size], grad_c0[:size]
        kept = min(active, size)  # sequences that go on
        if kept and size == active and given is not None and not cut[before]:
            addmm(given[t], delta_t[before], weights, out=grad_h)
        else:
            if active:
                passed = mm(delta_t[before], weights)
                if cut[before]:
                    passed.masked_fill_(cut_t[before], 0)
                grad_h[:kept] = passed[:kept]
                grad_h0[kept:active] = passed[kept:]
            grad_h[kept:] = grad_h0[kept:size]
            if given is not None:
                grad_h += given[t]
        active, before = size, t
        grad_c.addcmul_(grad_h, per_c_t[t])
        o_t[t].mul_(grad_h)
        i_f_g[t].mul_(grad_c.unsqueeze(1))
        grad_c.mul_(f_t[t])
        if cut[t]:
            grad_c.masked_fill_(cut_t[t], 0)
    passed = mm(delta_t[before], weights)
    grad_h0[:active] = passed.masked_fill_(cut_t[before], 0) if cut[before] else passed
    return deltas, grad_h0, grad_c0


def _recurrent_gradient(deltas: Tensor, h: Tensor, part: int) -> Tensor:
    """The sum over all rows of delta hᵀ, [4H, H], by products of `part` rows each."""
    total = deltas[:part].t() @ h[:part]
    for begin in range(part, len(deltas), part):
        total.addmm_(deltas[begin : begin + part].t(), h[begin : begin + part])
    return total
