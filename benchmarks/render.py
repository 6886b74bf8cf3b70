"""Markdown and pictures from rows; the same rows give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .cases import GROUPS, PASSES
from .providers import PROVIDERS
from .rows import Row, write_atomically

OURS, PEER = "tritlstm", "torch"
FEW_CASES = 12  # above this the picture of ratios leaves the loops in Python out: it would be a scroll
PASS_LABEL = {"fwd": "forward", "fwdbwd": "forward + backward"}
SWEEPS = {"over-H": "H", "over-B": "B"}

# Okabe and Ito's palette, which colour-blind readers can tell apart too; the same colours in every picture.
_COLOURS = {
    "tritlstm": "#d55e00",
    "torch": "#0072b2",
    "explicit": "#882255",
    "compiled-loop": "#009e73",
    "eager-loop": "#7f7f7f",
    "flashrnn": "#cc79a7",
    "flashrnn-alternating": "#e69f00",
    "flashrnn-triton": "#8b6f00",
    "torchrl": "#56b4e9",
}
_MARKERS = dict(zip(_COLOURS, "os<D^vP*X", strict=True))


class MissingExtraError(Exception):
    """A package that only the pictures need is not installed."""


def render(rows: list[Row], directory: Path, stem: str) -> list[Path]:
    """Write `stem`.md and the pictures that the rows have figures for; returns the paths written.

    Raises MissingExtraError where matplotlib is not installed (the Markdown is written all the same) and
    ValueError if there are no rows.
    """
    if not rows:
        raise ValueError("there are no rows to render")
    directory.mkdir(parents=True, exist_ok=True)
    drawings = _drawings(rows)
    table = directory / f"{stem}.md"
    write_atomically(table, markdown(rows, {name: f"{stem}-{name}.png" for name in drawings}))
    return [table, *_draw(drawings, directory, stem)]


# -- Markdown


def markdown(rows: list[Row], pictures: dict[str, str]) -> str:
    """The report: what was measured where, a summary, one table a group, and what did not run and why."""
    first = rows[0]
    shown = _providers(rows)
    parts = [
        f"# LSTM benchmarks: {first['device']}",
        _facts(rows),
        "Microseconds a time step: median, and in brackets the 20th and 80th percentile. *Floor* is what no "
        "implementation on this device can go below (benchmarks/README.md says how it is counted). "
        "A timing stands only beside a passed correctness check of the same case, provider and pass; "
        "`wrong` gives the error instead, – was not run (reasons at the end).",
    ]
    if OURS in shown and PEER in shown:
        parts.append(_summary(rows, shown))
    parts += [f"![{name}]({file})" for name, file in pictures.items()]
    for group in _ordered(row["group"] for row in rows):
        parts.append(f"## {GROUPS.get(group, group)}")
        parts.append(_group_table([row for row in rows if row["group"] == group], shown))
    parts.append("## The checks")
    parts.append(_check_table(rows, shown))
    missing = _missing(rows)
    if missing:
        parts += ["## Not run, and why", missing]
    parts += ["## What a timing contains", _bullets(_ordered(_included(rows)))]
    return "\n\n".join(parts) + "\n"


def _facts(rows: list[Row]) -> str:
    first = rows[0]
    dates = sorted(row["date"] for row in rows)
    begun, ended = dates[0].replace("T", " ")[:16], dates[-1].replace("T", " ")[:16]
    facts = [
        f"Measured {begun} to {ended} UTC",
        ", ".join(f"{name} {version}" for name, version in first["versions"].items()),
    ]
    if first["threads"]:
        facts.append(_threads(first["threads"]))
    for dtype in _ordered(row["dtype"] for row in rows):
        limits = next(row["floor"] for row in rows if row["dtype"] == dtype)
        bandwidth, rate = limits["bandwidth"] / 1e9, limits["rate"] / 1e12
        text = f"Limits measured for {dtype}: {bandwidth:.0f} GB/s, {rate:.3g} TFLOP/s"
        if limits["handoff_us"]:
            text += f"; a hand-off between thread blocks is taken as {limits['handoff_us']} µs"
        facts.append(text)
    facts += _ordered(row["note"] for row in rows if row["note"])
    return _bullets(facts)


def _summary(rows: list[Row], shown: list[str]) -> str:
    ours = [row for row in rows if row["provider"] == OURS]
    by_group = [["", *(PASS_LABEL[which] for which in PASSES)]]
    groups = _ordered(row["group"] for row in rows)
    for label, chosen in [*((GROUPS.get(g, g), {g}) for g in groups), ("**all cases**", set(groups))]:
        mine = [row for row in ours if row["group"] in chosen]
        by_group.append([label, *_means(mine, partial(_ratio, rows, peer=PEER))])
    by_peer = [["", *(PASS_LABEL[which] for which in PASSES)]]
    for name in shown:
        if name != OURS:
            by_peer += [[_label(name), *_means(ours, partial(_ratio, rows, peer=name))]]
    by_peer.append(["physical floor", *_means(ours, _floor_ratio)])
    return (
        "How many times as fast as torch.nn.LSTM tritlstm.LSTM was, geometric mean (number of cases):\n\n"
        f"{_table(by_group)}\n\n"
        "and as each of the others, over the cases that both ran:\n\n"
        f"{_table(by_peer)}"
    )


def _means(rows: list[Row], ratio: Callable[[Row], float | None]) -> list[str]:
    """Geometric mean of a ratio for each pass, with the number of cases that have it."""
    cells = []
    for which in PASSES:
        ratios = [r for row in rows if row["pass"] == which and (r := ratio(row)) is not None]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
        cells.append("–" if mean is None else f"{mean:.2f}× ({len(ratios)})")
    return cells


def _floor_ratio(row: Row) -> float | None:
    return None if row["us_per_step"] is None else row["floor_us_per_step"] / row["us_per_step"]


def _group_table(rows: list[Row], shown: list[str]) -> str:
    both = OURS in shown and PEER in shown
    table = [["case", "pass", "floor", *(_label(name) for name in shown), *(["vs nn.LSTM"] if both else [])]]
    for case in _ordered(row["case"] for row in rows):
        for which in PASSES:
            here = {row["provider"]: row for row in rows if row["case"] == case and row["pass"] == which}
            if not here:
                continue
            some = next(iter(here.values()))
            line = [case.split("/", 1)[1], which, _number(some["floor_us_per_step"])]
            line += [_cell(here[name]) if name in here else "–" for name in shown]
            if both:
                ratio = _ratio(rows, here[OURS], PEER) if OURS in here else None
                line.append("–" if ratio is None else f"{ratio:.2f}×")
            table.append(line)
    return _table(table)


def _cell(row: Row) -> str:
    if row["status"] == "ok":
        low, high = (1e3 * row[name] / row["T"] for name in ("p20_ms", "p80_ms"))
        return f"{_number(row['us_per_step'])} ({_number(low)}–{_number(high)})"
    if row["status"] == "wrong":
        error = "not finite" if row["max_error"] is None else f"{row['max_error']:.1e}"
        return f"wrong: {error}, budget {row['error_budget']:.1e}"
    return "failed"


def _check_table(rows: list[Row], shown: list[str]) -> str:
    table = [["provider", "passed", "wrong", "failed", "error closest to its budget"]]
    for name in shown:
        mine = [row for row in rows if row["provider"] == name]
        count = {s: sum(row["status"] == s for row in mine) for s in ("ok", "wrong", "failed")}
        checked = [row for row in mine if row["max_error"] is not None]
        worst = max(checked, key=lambda row: row["max_error"] / row["error_budget"], default=None)
        text = "–" if worst is None else (
            f"{worst['max_error']:.1e} of {worst['error_budget']:.1e}, {worst['worst_tensor']}, "
            f"{worst['case']} {worst['pass']}"
        )  # fmt: skip
        table.append([_label(name), str(count["ok"]), str(count["wrong"]), str(count["failed"]), text])
    return (
        "Largest difference from float64, relative to the largest value of the tensor. The budget is twice "
        "torch's own error in the same dtype plus one rounding, so torch itself sits at half of it.\n\n"
    ) + _table(table)


def _missing(rows: list[Row]) -> str:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, reason in row["absent"].items():
            cases = reasons.setdefault((_label(name), reason), [])
            if row["case"] not in cases:
                cases.append(row["case"])
        if row["status"] == "failed":
            reasons.setdefault((_label(row["provider"]), f"failed: {row['reason']}"), []).append(
                f"{row['case']} {row['pass']}"
            )
    total = len({row["case"] for row in rows})
    lines = []
    for (label, reason), cases in reasons.items():
        where = "every case" if len(cases) == total else ", ".join(cases[:4])
        more = f" and {len(cases) - 4} more" if where != "every case" and len(cases) > 4 else ""
        lines.append(f"{label}: {reason} ({where}{more})")
    return _bullets(lines)


def _included(rows: list[Row]) -> Iterable[str]:
    for row in rows:
        yield f"{_label(row['provider'])}: {row['included']}"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(lines: list[list[str]]) -> str:
    head, *body = lines
    rule = ["---" if number == 0 else "---:" for number in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))


def _number(value: float) -> str:
    """Three significant digits without an exponent."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def _label(provider: str) -> str:
    return PROVIDERS[provider].label if provider in PROVIDERS else provider


def _threads(count: int) -> str:
    return f"{count} CPU thread" + ("s" if count > 1 else "")


def _ordered(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _providers(rows: list[Row]) -> list[str]:
    present = {row["provider"] for row in rows}
    return [name for name in PROVIDERS if name in present] + sorted(present - PROVIDERS.keys())


def _ratio(rows: list[Row], row: Row, peer: str) -> float | None:
    """How many times as fast as the peer on the same case and pass; None unless both have a timing."""
    for other in rows:
        if (other["provider"], other["case"], other["pass"]) == (peer, row["case"], row["pass"]):
            if row["median_ms"] is None or other["median_ms"] is None:
                return None
            return other["median_ms"] / row["median_ms"]
    return None


# -- Pictures


def _drawings(rows: list[Row]) -> dict[str, list[Row]]:
    """Name of a picture and the timed rows it shows, for those that have something to show."""
    timed = [row for row in rows if row["status"] == "ok"]
    drawings = {}
    for group, axis in SWEEPS.items():
        chosen = [row for row in timed if row["group"] == group]
        if len({row[axis] for row in chosen}) > 1:
            drawings[f"step-over-{axis}"] = chosen
    compared = [
        row
        for row in timed
        if row["group"] not in SWEEPS and row["provider"] != PEER and _ratio(timed, row, PEER) is not None
    ]
    if compared:
        cases = {row["case"] for row in compared}
        drawings["against-torch"] = [row for row in timed if row["case"] in cases]
    return drawings


def _draw(drawings: dict[str, list[Row]], directory: Path, stem: str) -> list[Path]:
    if not drawings:
        return []
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "the pictures need matplotlib: pip install 'tritlstm[bench]', then `tritlstm bench --render FILE`"
        ) from error
    style: Any = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#888888",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e4e4e4",
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "legend.frameon": False,
    }
    paths = []
    with mpl.rc_context(style):
        for name, rows in drawings.items():
            figure = _bars(Figure, rows) if name == "against-torch" else _lines(Figure, rows, name[-1])
            path = directory / f"{stem}-{name}.png"
            # No software name and no date in the file: the same rows give the same bytes.
            figure.savefig(path, dpi=130, metadata={"Software": None})
            paths.append(path)
    return paths


def _lines(figure_class: Any, rows: list[Row], axis: str) -> Any:
    """Time of a step over H or B, a row of panels for each dtype, the floor drawn in."""
    dtypes = _ordered(row["dtype"] for row in rows)
    figure = figure_class(figsize=(10, 1.6 + 3.2 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), len(PASSES), sharex=True, sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    for dtype, line in zip(dtypes, panels, strict=True):
        for which, panel in zip(PASSES, line, strict=True):
            chosen = [row for row in rows if row["dtype"] == dtype and row["pass"] == which]
            panel.set_title(f"{PASS_LABEL[which]}, {dtype}")
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            floors = sorted({(row[axis], row["floor_us_per_step"]) for row in chosen})
            if floors:
                xs, ys = zip(*floors, strict=True)
                panel.fill_between(xs, ys, 1e-9, color="#000000", alpha=0.06, linewidth=0)
                (handles["physical floor"],) = panel.plot(xs, ys, "--", color="#333333", linewidth=1.3)
            for name in _providers(chosen):
                points = sorted((row for row in chosen if row["provider"] == name), key=lambda row: row[axis])
                handles[_label(name)] = _line(panel, points, axis, name)
    for line in panels:
        line[0].set_ylabel("µs a time step")
    for panel in panels[-1]:
        panel.set_xlabel({"H": "hidden size H", "B": "batch size B"}[axis])
        ticks = sorted({row[axis] for row in rows})
        crowded = len(ticks) > 7
        panel.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8 if crowded else None)
        panel.tick_params(axis="x", labelrotation=45 if crowded else 0)
        panel.minorticks_off()
    values = [row["us_per_step"] for row in rows] + [row["floor_us_per_step"] for row in rows]
    panels[0][0].set_ylim(min(values) / 1.6, max(values) * 1.6)
    _caption(figure, rows, handles, _fixed(rows, axis))
    return figure


def _line(panel: Any, points: list[Row], axis: str, name: str) -> Any:
    xs = [row[axis] for row in points]
    colour = _COLOURS.get(name, "#000000")
    low, high = ([1e3 * row[column] / row["T"] for row in points] for column in ("p20_ms", "p80_ms"))
    panel.fill_between(xs, low, high, color=colour, alpha=0.18, linewidth=0)
    (handle,) = panel.plot(
        xs,
        [row["us_per_step"] for row in points],
        color=colour,
        marker=_MARKERS.get(name, "."),
        # Under ours, and showing at its edge where the two coincide.
        markersize=8 if name == PEER else 5.5,
        linewidth=2.4 if name == OURS else 1.5,
        zorder=4 if name == OURS else 3,
    )
    return handle


def _bars(figure_class: Any, rows: list[Row]) -> Any:
    """How many times as fast as torch.nn.LSTM, a bar for each provider and case, right of 1 is faster."""
    compared = [row for row in rows if row["provider"] != PEER and _ratio(rows, row, PEER) is not None]
    cases = _ordered(row["case"] for row in compared)
    text = "sizes are T×B×D×H; a bar to the right of the line is faster, to the left slower"
    if len(cases) > FEW_CASES:
        compared = [row for row in compared if not row["provider"].endswith("-loop")]
        cases = _ordered(row["case"] for row in compared)
        text += "; the loops in Python are in the table"
    present = {case: _providers([row for row in compared if row["case"] == case]) for case in cases}
    gap = 0.7  # between cases, in bars
    tops, top = {}, 0.0
    for case in cases:
        tops[case] = top
        top += len(present[case]) + gap
    figure = figure_class(figsize=(11, 1.9 + 0.21 * top), layout="constrained")
    panels = figure.subplots(1, len(PASSES), sharey=True, sharex=True)
    handles: dict[str, Any] = {}
    for which, panel in zip(PASSES, panels, strict=True):
        panel.set_title(PASS_LABEL[which])
        panel.set_xscale("log")
        panel.grid(axis="y", visible=False)
        for row in compared:
            if row["pass"] == which:
                y = tops[row["case"]] + present[row["case"]].index(row["provider"])
                handles[_label(row["provider"])] = _bar(panel, y, _ratio(rows, row, PEER), row["provider"])
        panel.axvline(1, color=_COLOURS[PEER], linewidth=1.6, zorder=5)
        panel.set_xlabel("times as fast as torch.nn.LSTM")
        for case in cases[1:]:
            panel.axhline(tops[case] - 0.5 - gap / 2, color="#e4e4e4", linewidth=0.8)
    middles = [tops[case] + (len(present[case]) - 1) / 2 for case in cases]
    panels[0].set_yticks(middles, [_case_label(case) for case in cases])
    panels[0].set_ylim(top - gap - 0.1, -0.9)
    ratios = [ratio for row in compared if (ratio := _ratio(rows, row, PEER)) is not None]
    low, high = min([*ratios, 0.8]), max([*ratios, 1.25])
    room = 1.3 * (high / low) ** 0.12  # for the numbers at the ends of the bars
    low, high = low / room, high * room
    panels[0].set_xlim(low, high)
    ticks = [tick * 10.0**power for power in range(-4, 5) for tick in (1, 2, 5)]
    if high / low > 100:
        ticks = [10.0**power for power in range(-4, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    for panel in panels:
        panel.tick_params(axis="y", length=0)
        panel.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
        panel.minorticks_off()
    handles = {_label(name): handles[_label(name)] for name in _providers(compared)}
    handles[_label(PEER)] = panels[0].lines[0]
    _caption(figure, rows, handles, text)
    return figure


def _bar(panel: Any, y: float, ratio: float | None, provider: str) -> Any:
    assert ratio is not None
    faster = ratio >= 1
    panel.annotate(
        f"{_number(ratio)}×",
        (ratio, y),
        xytext=(4 if faster else -4, 0),
        textcoords="offset points",
        fontsize=8,
        fontweight="bold" if provider == OURS else "normal",
        ha="left" if faster else "right",
        va="center",
        color="#333333",
    )
    return panel.barh(y, ratio - 1, 0.84, left=1, color=_COLOURS.get(provider, "#000000"))


def _case_label(name: str) -> str:
    group, rest = name.split("/", 1)
    sizes, *marks = rest.split("-")
    words = ", ".join(mark.replace("layers", " layers") for mark in marks)
    return f"{group}  {sizes.replace('x', '×')}  {words}"


def _fixed(rows: list[Row], axis: str) -> str:
    """What a sweep keeps fixed, in words."""
    same = {"H": ("T", "B"), "B": ("T", "H")}[axis]
    values = [f"{name} = {rows[0][name]}" for name in same]
    values.append("D = H" if all(row["D"] == row["H"] for row in rows) else f"D = {rows[0]['D']}")
    return ", ".join(values) + "; band: 20th to 80th percentile"


def _caption(figure: Any, rows: Sequence[Row], handles: dict[str, Any], text: str) -> None:
    first = rows[0]
    threads = f", {_threads(first['threads'])}" if first["threads"] else ""
    day = max(row["date"] for row in rows)[:10]
    note = f"\n{first['note']}" if first["note"] else ""
    figure.suptitle(
        f"{first['device']}{threads}, torch {first['versions']['torch']}, {day}\n{text}{note}",
        fontsize=10, x=0.01, ha="left", color="#444444",
    )  # fmt: skip
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)))
