"""Two pictures of a trained model: its loss curve, and its gates and cells over a line of code."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..tracing import heat_maps
from .data import encode
from .model import count_layers, numpy_traces
from .train import Point

CONTEXT = 'def report(data, name):\n    """Say how large a part is."""\n'
LINE = '    print("size (in bytes):", len(data[name]))  # not "zero"'
ROWS = 12
CLEAR = 0.3  # correlation from which a unit counts as following a property of the text
STUDIED_STREAMS, STUDIED_STEPS, SETTLING_STEPS = 16, 512, 64

_PIECES = re.compile(
    r'''(?P<string>[rbfuRBFU]{0,2}("""(?:\\.|[^\\])*?"""|\'\'\'(?:\\.|[^\\])*?\'\'\'|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'))'''
    r"|(?P<comment>\#[^\n]*)|(?P<open>[(\[{])|(?P<close>[)\]}])|(?P<word>\w+)|(?P<other>.)",
    re.DOTALL,
)


def properties(text: str) -> dict[str, np.ndarray]:
    """Numbers [n] that describe the place behind each of the n characters of Python source.

    Found by a scanner that knows strings, comments and brackets and is right except in broken code.
    """
    n = len(text)
    found = {
        name: np.zeros(n)
        for name in (
            "in a string",
            "in a comment",
            "bracket depth",
            "position in line",
            "indentation",
            "in a word",
        )
    }
    depth = 0
    for match in _PIECES.finditer(text):
        begin, end = match.span()
        kind = (
            match.lastgroup if match.lastgroup in ("string", "comment", "open", "close", "word") else "other"
        )
        if kind == "string":
            found["in a string"][begin : end - 1] = 1.0
        elif kind == "comment":
            found["in a comment"][begin:end] = 1.0
        elif kind == "word":
            found["in a word"][begin:end] = 1.0
        elif kind == "open":
            depth += 1
        elif kind == "close":
            depth = max(0, depth - 1)
        found["bracket depth"][begin:end] = depth
    column, indent, leading = 0, 0, True
    for position, character in enumerate(text):
        if character == "\n":
            column, indent, leading = 0, 0, True
        else:
            column += 1
            leading = leading and character == " "
            indent += leading
        found["position in line"][position] = column
        found["indentation"][position] = indent
    return found


@dataclass(frozen=True)
class Unit:
    """A unit of the last layer, chosen for the picture: what its cell follows, and how closely."""

    index: int
    follows: str  # a name of `properties`, or "" where it was chosen for its forget gate
    correlation: float  # of the cell state, on the picture's logarithmic scale, with that property; -1 to 1

    @property
    def label(self) -> str:
        if not self.follows:
            return f"unit {self.index}"
        return f"{self.follows} (r = {self.correlation:+.2f})  unit {self.index}"


def _log_scale(cells: np.ndarray) -> np.ndarray:
    """Cells as the picture colours them: some units hold ±1, others count to 100."""
    return np.sign(cells) * np.log1p(np.abs(cells))


def _line_trace(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gates "i", "f", "o" and cells "c" [T, H] of the last layer over `LINE`, read after `CONTEXT`."""
    ids = encode((CONTEXT + LINE).encode(), weights["vocabulary"])
    trace = numpy_traces(weights, ids[:, None])[-1]
    return {name: getattr(trace, name)[len(CONTEXT) :, 0] for name in "ifoc"}


def choose_units(weights: Mapping[str, np.ndarray], held_out: np.ndarray) -> list[Unit]:
    """The units of the last layer to show: those whose cells follow a property of the text, at most two each.

    Among these come first the closest correlations over held_out (ids [n]), weighted by how far the cell
    moves along `LINE`. Where they are too few, units whose forget gates vary most make up the number.
    """
    text = weights["vocabulary"][held_out].tobytes().decode("latin-1")
    described = properties(text)
    length = min(STUDIED_STEPS, len(held_out))
    begins = np.linspace(0, len(held_out) - length, STUDIED_STREAMS).astype(int)
    places = begins + np.arange(length)[:, None]  # [T, B]
    settled = min(SETTLING_STEPS, length // 2)
    trace = numpy_traces(weights, held_out[places])[-1]
    hidden = trace.c.shape[-1]
    cells = _log_scale(trace.c[settled:].reshape(-1, hidden))
    cells -= cells.mean(0)
    sizes = np.maximum(np.sqrt((cells**2).sum(0)), 1e-12)
    moves = np.minimum(1.0, np.ptp(_log_scale(_line_trace(weights)["c"]), axis=0))  # [H]

    candidates = []
    for name, values in described.items():
        value = values[places[settled:]].ravel()
        value = value - value.mean()
        size = np.sqrt((value**2).sum())
        if size > 0:
            r = value @ cells / (size * sizes)  # [H]
            candidates += [Unit(u, name, float(r[u])) for u in range(hidden) if abs(r[u]) >= CLEAR]
    candidates.sort(key=lambda unit: -abs(unit.correlation) * moves[unit.index])
    chosen: list[Unit] = []
    for unit in candidates:
        new = all(unit.index != other.index for other in chosen)
        if new and sum(unit.follows == other.follows for other in chosen) < 2:
            chosen.append(unit)
    order = list(described)
    chosen = sorted(chosen[:ROWS], key=lambda unit: (order.index(unit.follows), -abs(unit.correlation)))
    shown = {unit.index for unit in chosen}
    by_forget_gate = np.argsort(-trace.f[settled:].std((0, 1)))
    rest = [int(u) for u in by_forget_gate if int(u) not in shown]
    return chosen + [Unit(u, "", 0.0) for u in rest[: ROWS - len(chosen)]]


def heat_map(weights: Mapping[str, np.ndarray], held_out: np.ndarray, path: Path) -> list[Unit]:
    """Draw input, forget and output gates and the cell state over `LINE`; returns the units shown.

    Gates and states are the NumPy reference's, of the model's last layer, which has read `CONTEXT` before.
    """
    units = choose_units(weights, held_out)
    rows = [unit.index for unit in units]
    part = {name: value[:, rows].T for name, value in _line_trace(weights).items()}  # [units, characters]
    layers = count_layers(weights)
    size = weights["head.weight"].shape[1]
    figure = heat_maps(
        part,
        list(LINE),
        [unit.label for unit in units],
        f"What {len(units)} of {size} units of the {'' if layers == 1 else 'last '}LSTM layer do "
        "along a line of Python",
        "character just read      (r: correlation of a unit's cell state with that property of held-out text)",
    )
    figure.savefig(path, dpi=110)
    return units


def loss_curve(history: Sequence[Point], baselines: Mapping[str, float], final: float, path: Path) -> None:
    """Draw perplexity against characters read: training, held-out text, and the counted `baselines`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    millions = [point.characters / 1e6 for point in history]
    axis.plot(
        millions, [np.exp(point.loss) for point in history], color="#5b8fb9", label="training text", lw=1.5
    )
    axis.plot(
        millions,
        [point.perplexity for point in history],
        color="#c1440e",
        label="held-out text, a part of it",
        lw=2,
        marker=".",
    )
    axis.plot([], [], color="#c1440e", marker="*", ms=12, lw=0, label="all held-out text, at the end")
    last = history[-1].characters / 1e6 if history else 1.0
    for (name, value), style in zip(baselines.items(), ((0, (1, 1.5)), (0, (5, 2))), strict=False):
        axis.axhline(value, color="#666666", linestyle=style, lw=1.2)
        axis.annotate(
            f"{name} model {value:.1f}",
            (last, value),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            color="#444444",
        )
    axis.set_yscale("log")
    axis.set_yticks([3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100])
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    values = [
        *baselines.values(),
        final,
        *(p.perplexity for p in history),
        *(float(np.exp(p.loss)) for p in history),
    ]
    axis.set_ylim(0.9 * min(values), 1.1 * min(max(values), 120.0))
    axis.plot([last], [final], color="#c1440e", marker="*", ms=12, clip_on=False)
    axis.set_xlim(0, last)
    axis.set_xlabel("million characters read")
    axis.set_ylabel("perplexity per character")
    axis.set_title(f"Learning to write Python: perplexity {final:.2f} on text never seen", loc="left")
    axis.grid(color="#dddddd", lw=0.6)
    axis.legend(frameon=False)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
