"""Seeing inside: every state and gate of a call (`trace`), and pictures of them (`plot_gates`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from . import aten
from .functional import Lengths, States, check_lengths
from .variants import Resets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LayerTrace", "Trace", "plot_gates", "trace"]

UNITS = 16  # drawn where nobody says which


@dataclasses.dataclass(frozen=True)
class LayerTrace:
    """What one layer computed in one direction, by time step: each [T, B, H], also with `batch_first`.

    Step t of the reverse direction is position t of the input. Zero past a sequence's end.
    """

    layer: int
    reverse: bool
    h: Tensor  # hidden state; with a projection, before it
    c: Tensor  # cell state, float32 or float64
    i: Tensor  # input gate
    f: Tensor  # forget gate
    g: Tensor  # input node
    o: Tensor  # output gate


@dataclasses.dataclass(frozen=True)
class Trace:
    """A call with everything it computed; `trace[k]` is the k-th of `layers`."""

    output: Tensor  # as the module returns it; of packed input, padded with zeros
    state: States  # (h_n, c_n), as the module returns it
    layers: tuple[LayerTrace, ...]  # layer by layer, in each the forward direction first

    def __getitem__(self, k: int) -> LayerTrace:
        return self.layers[k]

    def __len__(self) -> int:
        return len(self.layers)


def trace(
    module: nn.Module,
    input: Tensor | PackedSequence,
    hx: Any = None,
    *,
    lengths: Lengths | None = None,
    resets: Resets | None = None,
    noise: Tensor | None = None,
    differentiable: bool = False,
) -> Trace:
    """Runs ``module(input, hx, …)`` and keeps every hidden state, cell state and gate of every layer and direction.

    Args:
        module: a `tritlstm.LSTM`, of any variant.
        input, hx, lengths, resets, noise: as the module takes them; so `resets` beside packed input are [T, B] of the
            batch before packing.
        differentiable: compute in plain PyTorch operators, so that all that is returned can be differentiated. Without
            it the module runs where it always runs, in the Triton kernels where they are, and gates and cells carry no
            gradient; output and state do.

    Returns:
        A `Trace`.

    Raises:
        TypeError: ``module`` is not a `tritlstm.LSTM`.

    Example:
        >>> lstm = tritlstm.LSTM(10, 20, bidirectional=True)
        >>> seen = tritlstm.trace(lstm, torch.randn(5, 3, 10))
        >>> seen[1].f.shape  # forget gates of the reverse direction
        torch.Size([5, 3, 20])
    """
    from .module import LSTM

    if not isinstance(module, LSTM):
        raise TypeError(
            f"trace takes a tritlstm.LSTM, got {type(module).__name__}; tritlstm.swap(model) turns torch's into it"
        )
    record: list[tuple[Tensor, Tensor, Tensor]] = []
    extras = module._extras(input, resets, noise, record, differentiable)
    call: Any = module._run
    output, state = call(input, hx, lengths, extras)
    if isinstance(output, PackedSequence):
        output, lengths = pad_packed_sequence(output, batch_first=module.batch_first)
    directions = 2 if module.bidirectional else 1
    inside = None
    if lengths is not None:
        steps, batch = record[0][0].shape[:2]
        ends = check_lengths(lengths, steps, batch).to(output.device)
        inside = (torch.arange(steps, device=output.device)[:, None] < ends)[..., None]
    layers = tuple(
        _layer_trace(k // directions, k % directions == 1, *values, inside) for k, values in enumerate(record)
    )
    return Trace(output, state, layers)


def _layer_trace(
    layer: int, reverse: bool, out: Tensor, gates: Tensor, cells: Tensor, inside: Tensor | None
) -> LayerTrace:
    size = out.size(-1)
    values: tuple[Tensor, ...] = (out, cells[..., :size], *aten.unpack_gates(gates, size))
    if inside is not None:
        values = tuple(torch.where(inside, value, 0) for value in values)
    return LayerTrace(layer, reverse, *values)


#: Of a picture's rows, from top to bottom: title, colours, scale.
PANELS = {
    "i": ("Input gate: lets the new token in (1) or not (0)", "cividis", "gate"),
    "f": ("Forget gate: keeps the cell (1) or flushes it (0)", "cividis", "gate"),
    "o": ("Output gate: shows the cell (1) or hides it (0)", "cividis", "gate"),
    "g": ("Input node: what would be written", "RdBu_r", "value"),
    "c": ("Cell state: what is remembered", "RdBu_r", "cell"),
    "h": ("Hidden state: what is shown", "RdBu_r", "value"),
}


def plot_gates(
    trace: Trace | LayerTrace,
    tokens: Sequence[Any] | None = None,
    *,
    layer: int = -1,
    sequence: int = 0,
    units: Sequence[int] | None = None,
    parts: str = "ifoc",
    title: str = "",
) -> Figure:
    """Heat maps of gates and states along a sequence: units from top to bottom, tokens from left to right.

    Args:
        trace: what `trace` returned, or one of its layers.
        tokens: what was read at each step, written under it; its length says how many steps are drawn. None: numbers.
        layer: which of ``trace.layers``; the last by default.
        sequence: which of the batch.
        units: which units; by default the 16 whose cells move most.
        parts: which of i, f, o, g, c, h, from top to bottom.
        title: above it all.

    Returns:
        A matplotlib Figure; ``figure.savefig("gates.png")`` keeps it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a part, a unit or the number of tokens does not fit the trace.
    """
    seen = trace[layer] if isinstance(trace, Trace) else trace
    steps, batch, size = seen.c.shape
    wrong = sorted(set(parts) - set(PANELS))
    if wrong or not parts:
        raise ValueError(f"parts must be letters of {''.join(PANELS)}, got {parts!r}")
    labels = [str(t) for t in range(steps)] if tokens is None else [str(token) for token in tokens]
    if not 0 < len(labels) <= steps:
        raise ValueError(f"tokens must be 1 to T = {steps}, one a step, got {len(labels)}")
    if not -batch <= sequence < batch:
        raise ValueError(f"sequence must be one of the {batch} of the batch, got {sequence}")
    values = {p: getattr(seen, p)[: len(labels), sequence].detach().float().cpu().numpy() for p in {*parts, "c"}}
    if units is None:
        moves = np.ptp(values["c"], axis=0)
        units = sorted(int(u) for u in np.argsort(-moves, kind="stable")[:UNITS])
    elif not all(-size <= unit < size for unit in units):
        raise ValueError(f"units must be below H = {size}, got {list(units)}")
    drawn = {part: values[part][:, list(units)].T for part in parts}
    return heat_maps(drawn, labels, [f"unit {unit}" for unit in units], title)


def heat_maps(
    parts: dict[str, np.ndarray], tokens: Sequence[str], labels: Sequence[str], title: str, below: str = ""
) -> Figure:
    """A figure of one panel for each of `parts` [units, steps], in their order."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import Normalize, SymLogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures of gates need matplotlib, which is not installed: pip install 'tritlstm[plot]'"
        ) from error

    height = max(1.5, 0.22 * len(labels) + 0.75)
    width = min(30.0, max(6.0, 2.5 + 0.2 * len(tokens) + 0.06 * max(map(len, labels)) * 2))
    figure = Figure(figsize=(width, height * len(parts) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(parts), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, values) in zip(axes, parts.items(), strict=True):
        heading, colours, scale = PANELS[name]
        meaning = {"gate": "gate", "value": "value", "cell": "cell state"}[scale]
        largest = float(np.abs(values).max(initial=0.0))
        if scale == "gate":
            norm = Normalize(0.0, max(1.0, largest))
        elif scale == "value" or largest <= 2.0:
            norm = Normalize(-max(1.0, largest), max(1.0, largest))
        else:
            norm = SymLogNorm(1.0, vmin=-largest, vmax=largest)
            meaning = "cell state (log scale beyond ±1)" if len(labels) > 8 else "cell state (log)"
        image = axis.imshow(values, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
        axis.set_title(heading, loc="left", fontsize=12, fontweight="bold")
        axis.set_yticks(range(len(labels)), labels, fontsize=9)
        shown = [token.replace(" ", "␣") for token in tokens]
        turn = 90 if max(map(len, shown)) > 2 else 0
        axis.set_xticks(range(len(shown)), shown, family="DejaVu Sans Mono", fontsize=11, rotation=turn)
        axis.tick_params(axis="x", length=0, labelbottom=True)
        axis.tick_params(axis="y", length=2)
        axis.set_yticks(np.arange(len(labels) - 1) + 0.5, minor=True)
        axis.grid(which="minor", axis="y", color="white", linewidth=1.0)
        axis.tick_params(which="minor", length=0)
        for side in axis.spines.values():
            side.set_visible(False)
        bar = figure.colorbar(image, ax=axis, label=meaning, pad=0.01, aspect=14)
        if isinstance(norm, SymLogNorm):
            ticks = [t for t in (1, 10, 100, 1000) if t <= largest]
            bar.set_ticks([-t for t in reversed(ticks)] + [0] + ticks)
            bar.ax.yaxis.set_major_formatter("{x:g}")
            bar.ax.minorticks_off()
    axes[-1].set_xlabel(below)
    figure.suptitle(title, fontsize=15)
    return figure
