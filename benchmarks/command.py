"""`tritlstm bench`: run a suite, or render the rows of one."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cases import PASSES, SUITES, Case, suite

if TYPE_CHECKING:
    from .device import Device
    from .floor import Limits
    from .providers import Provider
    from .rows import Row, Store
    from .session import Reporter

OUTPUT = Path("bench-results")

EXIT_OK = 0
EXIT_WRONG = 1  # tritlstm itself failed its check
EXIT_USAGE = 2
EXIT_UNFINISHED = 3  # the time limit came first: run again with --resume
EXIT_LOST = 4  # the GPU became unusable for this process: run again with --resume
EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `tritlstm bench`."""
    parser.description = (
        "Time tritlstm.LSTM beside torch.nn.LSTM and other implementations. Every timing stands beside a "
        "passed correctness check and the physical floor of the device."
    )
    parser.add_argument(
        "--suite", choices=SUITES, help="cases to run; default: gpu where torch finds one, otherwise cpu"
    )
    parser.add_argument("--quick", action="store_true", help="a few cases of the suite and shorter samples")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where the rows go; FILE with the ending .jsonl grows meanwhile",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=f"folder for rows, Markdown and pictures; default: the folder of --json, otherwise {OUTPUT}",
    )
    parser.add_argument(
        "--provider", action="append", metavar="NAME", help="only this implementation; may be repeated"
    )
    parser.add_argument("--case", metavar="PATTERN", help="only cases whose name matches, or holds, PATTERN")
    parser.add_argument("--resume", action="store_true", help="continue: keep finished rows and run the rest")
    parser.add_argument(
        "--time-limit",
        type=_seconds,
        metavar="SECONDS",
        help=f"stop in time, with exit status {EXIT_UNFINISHED} if rows are left for --resume",
    )
    parser.add_argument(
        "--threads", type=_count, help="CPU threads torch may use; default: torch's own choice"
    )
    parser.add_argument(
        "--compile-jobs",
        type=_count,
        default=1,
        metavar="N",
        help="before anything is timed on a GPU, compile what tritlstm will run in N processes",
    )
    parser.add_argument(
        "--handoff-us",
        type=_seconds,
        metavar="US",
        help="hand-off between thread blocks, where it was measured",
    )
    parser.add_argument("--note", default="", help="a remark that goes into every row")
    parser.add_argument(
        "--calibrate",
        nargs="?",
        const="",
        metavar="FILE",
        help="time recurrent kernels on this GPU and fit the constants of the planner's cost model; without FILE "
        "they go where the planner looks for them",
    )
    parser.add_argument(
        "--list", action="store_true", help="show the cases and the implementations, run nothing"
    )
    parser.add_argument(
        "--render",
        type=Path,
        metavar="FILE",
        help="make Markdown and pictures from a file of rows, run nothing",
    )


def run(args: argparse.Namespace) -> int:
    """Do what the options say; returns the exit status."""
    try:
        if args.render is not None:
            return _render(args.render, args.output or args.render.parent)
        if args.list:
            return _list(args)
        if args.calibrate is not None:
            return _calibrate(args.calibrate, args.compile_jobs)
        return _bench(args)
    except (_UsageError, OSError) as error:
        print(f"tritlstm bench: {error}", file=sys.stderr)
        return EXIT_USAGE


class _UsageError(Exception):
    pass


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def _suite(args: argparse.Namespace) -> str:
    if args.suite is not None:
        return args.suite
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"


def _cases(name: str, args: argparse.Namespace) -> list[Case]:
    try:
        return suite(name, quick=args.quick, pattern=args.case)
    except ValueError as error:
        raise _UsageError(str(error)) from error


def _render(path: Path, directory: Path) -> int:
    from .render import MissingExtraError, render
    from .rows import read_json

    try:
        paths = render(read_json(path), directory, path.stem)
    except (MissingExtraError, ValueError) as error:
        raise _UsageError(str(error)) from error
    for written in paths:
        print(written)
    return EXIT_OK


def _list(args: argparse.Namespace) -> int:
    import torch

    from .providers import PROVIDERS

    name = _suite(args)
    for case in _cases(name, args):
        print(case.name + (f"  (without {', '.join(case.without)})" if case.without else ""))
    print()
    device = torch.device("cuda" if name == "gpu" and torch.cuda.is_available() else "cpu")
    for provider in PROVIDERS.values():
        state = provider.available(device) or ("" if provider.by_default else "only with --provider")
        print(f"{provider.name:21} {provider.label}" + (f": {state}" if state else ""))
    return EXIT_OK


def _calibrate(asked: str, jobs: int) -> int:
    import torch

    from .. import measured, plan
    from . import calibrate

    if jobs > 1 and torch.cuda.is_available():
        from . import ahead

        ahead.compile_ahead(ahead.run_setting, list(calibrate.settings(plan.data_sheet(0).clusters)), jobs)
    try:
        found, measurement = calibrate.calibrate()
    except (RuntimeError, ValueError) as error:
        raise _UsageError(str(error)) from error
    path = Path(asked) if asked else measured.user_folder() / measured.file_name(measurement.device)
    measurement.write(path)
    print(calibrate.report(found, plan.data_sheet(0)))
    print(path)
    if asked:
        print(f"the planner uses it where {measured.VARIABLE} names it")
    return EXIT_OK


def _bench(args: argparse.Namespace) -> int:
    import torch

    from . import device as device_module
    from .providers import choose
    from .rows import ResumeError, write_json
    from .session import DeviceLostError, Session
    from .timing import Effort

    efforts = {"cpu": Effort(budget_ms=150.0), "gpu": Effort()}
    started = time.monotonic()
    name = _suite(args)
    cases = _cases(name, args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        providers = choose(args.provider)
        device = device_module.find(name, args.handoff_us)
        json_path = _json_path(args, name, device.name)
        store = _open(json_path.with_suffix(".jsonl"), args.resume, name, device)
    except (ValueError, RuntimeError, ResumeError) as error:
        raise _UsageError(str(error)) from error

    if hint := device_module.busy(device):
        print(hint)
    if args.compile_jobs > 1:
        if device.kind == "gpu":
            _compile_ahead(cases, providers, store, args.compile_jobs)
        else:
            print("--compile-jobs: for a CPU nothing is compiled")
    effort = Effort(budget_ms=80.0, rounds=5, fewest=5) if args.quick else efforts[name]
    status = EXIT_OK
    with device_module.settings(device), _reporter() as reporter:
        session = Session(
            device=device,
            store=store,
            limits=_Limits(device),
            reporter=reporter,
            effort=effort,
            deadline=None if args.time_limit is None else started + args.time_limit,
            note=args.note,
            named=bool(args.provider),
        )
        try:
            if not session.run(cases, providers):
                status = EXIT_UNFINISHED
        except DeviceLostError as error:
            print(f"tritlstm bench: {error}", file=sys.stderr)
            status = EXIT_LOST
        except KeyboardInterrupt:
            status = EXIT_INTERRUPTED

    write_json(json_path, store.rows)
    print(f"{len(store.rows)} rows in {json_path}, {time.monotonic() - started:.0f} s")
    left = sum(len(todo) for _, _, todo, _ in session.plan(cases, providers))
    if left:
        why = {EXIT_UNFINISHED: "time limit", EXIT_INTERRUPTED: "interrupted"}.get(status, "stopped")
        print(f"{why}: {left} rows left, nothing lost; the same command with --resume runs them")
    if store.rows and status != EXIT_INTERRUPTED:
        _render_after(store.rows, args.output or json_path.parent, json_path.stem)
    if status == EXIT_OK and (wrong := [row for row in store.rows if _ours_is_wrong(row)]):
        print(f"tritlstm failed its check in {len(wrong)} rows, first: {wrong[0]['case']} {wrong[0]['pass']}")
        status = EXIT_WRONG
    return status


def _compile_ahead(cases: list[Case], providers: list[Provider], store: Store, jobs: int) -> None:
    """What `Session.run` will want of tritlstm; nothing where it is left out or has all its rows."""
    from . import ahead

    ours = [provider for provider in providers if provider.name == "tritlstm"]
    left = [case for case in cases if any((case.name, p.name, w) not in store.finished for p in ours for w in PASSES)]
    if left:
        ahead.compile_ahead(ahead.run_case, left, jobs)


def _ours_is_wrong(row: Row) -> bool:
    return row["provider"] == "tritlstm" and row["status"] != "ok"


def _render_after(rows: list[Row], directory: Path, stem: str) -> None:
    from .render import MissingExtraError, render

    try:
        for path in render(rows, directory, stem):
            print(path)
    except MissingExtraError as error:
        print(f"tritlstm bench: {error}", file=sys.stderr)


def _json_path(args: argparse.Namespace, suite_name: str, device_name: str) -> Path:
    """--json, or DIR/DEVICE-DATE-SUITE.json; with --resume the newest of this device and suite."""
    if args.json is not None:
        return args.json
    directory = args.output or OUTPUT
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    kind = suite_name + ("-quick" if args.quick else "")
    if args.resume:
        # Dates sort as text. The quick run's name ends otherwise, so that neither continues the other.
        found = sorted(directory.glob(f"{slug}-[0-9]*-{kind}.jsonl"))
        if found:
            return found[-1].with_suffix(".json")
    return directory / f"{slug}-{date.today().isoformat()}-{kind}.json"


def _open(path: Path, resume: bool, suite_name: str, device: Device) -> Store:
    from .device import versions
    from .rows import Store

    header = {
        "suite": suite_name,
        "device": device.name,
        "threads": device.threads,
        "versions": versions(),
    }
    if resume and path.exists():
        return Store.resume(path, header)
    if path.exists():
        kept = path.with_name(f"{path.stem}-before-{time.strftime('%Y%m%d-%H%M%S')}.jsonl")
        path.rename(kept)
        print(f"{path} of an earlier run is kept as {kept}")
    return Store(path, header)


class _Limits:
    """Measures a dtype's limits on first use, in a resumed run too: the machine may be a busier one now."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.known: dict[str, Limits] = {}

    def __call__(self, dtype: str) -> Limits:
        from .device import measure

        if dtype not in self.known:
            self.known[dtype] = measure(self.device, dtype)
        return self.known[dtype]


class _PlainReporter:
    """A line for each finished case and pass."""

    def __init__(self, write: Callable[[str], Any] = print) -> None:
        self.write = write
        self.total = self.done = 0

    def begin(self, total: int) -> None:
        self.total = total

    def doing(self, text: str) -> None:
        pass

    def advance(self) -> None:
        self.done += 1

    def unit(self, case: Case, which: str, rows: list[Row]) -> None:
        self.write(f"[{self.done}/{self.total}] {_line(case, which, rows)}")


class _RichReporter(_PlainReporter):
    def __init__(self, progress: Any) -> None:
        super().__init__(lambda text: progress.console.print(text, highlight=False, markup=False))
        self.progress = progress
        self.task = progress.add_task("starting", total=None)

    def begin(self, total: int) -> None:
        super().begin(total)
        self.progress.update(self.task, total=total, refresh=True)

    def doing(self, text: str) -> None:
        self.progress.update(self.task, description=text, refresh=True)

    def advance(self) -> None:
        super().advance()
        self.progress.advance(self.task)


@contextmanager
def _reporter() -> Iterator[Reporter]:
    if not sys.stdout.isatty():
        yield _PlainReporter(lambda text: print(text, flush=True))
        return
    try:
        from rich import progress
    except ImportError:
        print("(a progress bar needs rich: pip install 'tritlstm[bench]')")
        yield _PlainReporter()
        return
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(compact=True),
    )
    # No refreshing thread: it would run beside what is being timed.
    with progress.Progress(*columns, transient=True, auto_refresh=False) as bar:
        yield _RichReporter(bar)


def _line(case: Case, which: str, rows: list[Row]) -> str:
    from .providers import PROVIDERS

    if not rows:
        return f"{case.name} {which}"
    parts = [f"floor {rows[0]['floor_us_per_step']:.3g}"]
    for row in sorted(rows, key=lambda row: list(PROVIDERS).index(row["provider"])):
        if row["status"] == "ok":
            text = f"{row['us_per_step']:.3g}"
        elif row["status"] == "wrong":
            text = (
                f"WRONG (error {row['max_error']}, budget {row['error_budget']:.2g}, {row['worst_tensor']})"
            )
        else:
            text = f"failed ({row['reason']})"
        parts.append(f"{row['provider']} {text}")
    return f"{case.name} {which}: {', '.join(parts)} µs/step"
