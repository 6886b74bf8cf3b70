"""How training is shown: a bar where there is a terminal, a plain line now and then where there is none."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from .train import Trainer

LINE_SECONDS = 6.0  # between plain lines


def status(trainer: Trainer) -> str:
    """Loss, held-out perplexity and speed of the last evaluation, in one line."""
    history = trainer.counters.history
    if not history:
        return "loss …  val ppl …  … chars/s"
    point = history[-1]
    return (
        f"loss {point.loss:.3f}  val ppl {point.perplexity:.2f}  {count(point.characters_per_second)} chars/s"
    )


def count(number: float) -> str:
    """A count with a thin shape: 950, 12.3k, 4.56M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number:.0f}"


@contextlib.contextmanager
def shown(trainer: Trainer, stream: TextIO | None = None) -> Iterator[Callable[[Trainer], None]]:
    """Yields the function to call after every step of `trainer.run`; writes to `stream`, or sys.stdout."""
    stream = sys.stdout if stream is None else stream
    if stream.isatty():
        with _bar(trainer, stream) as report:
            yield report
    else:
        yield _lines(trainer, stream)


@contextlib.contextmanager
def _bar(trainer: Trainer, stream: TextIO) -> Iterator[Callable[[Trainer], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("step {task.fields[step]}  {task.fields[status]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=stream), refresh_per_second=5) as progress:
        task = progress.add_task("training", total=1.0, step=trainer.counters.step, status=status(trainer))

        def report(trainer: Trainer) -> None:
            counters = trainer.counters
            done = trainer.settings.progress(counters.step, counters.elapsed)
            progress.update(task, completed=done, step=counters.step, status=status(trainer))

        yield report


def _lines(trainer: Trainer, stream: TextIO) -> Callable[[Trainer], None]:
    seen = len(trainer.counters.history)
    last = time.monotonic()

    def report(trainer: Trainer) -> None:
        nonlocal seen, last
        counters = trainer.counters
        done = trainer.settings.progress(counters.step, counters.elapsed)
        news = len(counters.history) > seen
        seen = len(counters.history)
        if news and (done == 1.0 or time.monotonic() - last >= LINE_SECONDS):
            last = time.monotonic()
            print(f"  {done:4.0%}  step {counters.step:<6d} {status(trainer)}", file=stream, flush=True)

    return report
