"""What a call of the C library costs, beside torch: ``python -m tritlstm.capi.call_cost``.

Builds both engines and the host ``examples/call_cost.c``, and prints medians in microseconds on one thread of one
processor, for a network without work (what the call itself costs) and for the demo's. A figure is shown only where
the outputs agree with torch's. All take turns, round after round, and of each figure the calmest round's is shown, so
that what else the machine does meets all alike or none.

The columns: ``aot`` and ``python``, the engines, each call whole, from the C host and back; ``torch op``, the torch
functions that the engine ``python`` calls for it, alone; ``torch``, `torch.nn.LSTM`.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import build

CASES = {  # D, H, layers, T, B, calls
    "no work": (1, 1, 1, 1, 1, 2000),
    "demo's, one sequence": (64, 128, 1, 64, 1, 40),
    "demo's, training batch": (64, 128, 1, 64, 16, 20),
}
KINDS = ("step", "forward", "train")
ROUNDS = 5
#: Kernels for the device of null_libcuda.c that the cases need.
LAUNCHER_IMAGES = "sm_90,fp32,H32,H128"

Times = dict[str, float]


class WrongError(RuntimeError):
    """The outputs of the C host are not torch's."""


def run_host(program: Path, case: tuple[int, ...], *words: str) -> tuple[float, Times]:
    """The outputs' sum, and medians by kind of call in microseconds."""
    command = [str(program), *map(str, case), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    lines = [line.split() for line in done.stdout.splitlines()]
    return float(lines[0][1]), {kind: int(median) / 1000 for kind, _, median, _ in lines[1:]}


def host_times(program: Path, case: tuple[int, ...], expected: float) -> Times:
    """Medians by kind, in microseconds.

    Raises:
        WrongError: the outputs' sum is not ``expected``.
    """
    found, times = run_host(program, case)
    if not abs(found - expected) <= 1e-4 * (1 + abs(expected)):
        raise WrongError(f"{program.name} {case}: outputs sum to {found}, torch's to {expected}")
    return times


class Torch:
    """The same by torch on one thread: by `torch.nn.LSTM`, and by the functions that the engine ``python`` calls."""

    def __init__(self, case: tuple[int, ...]) -> None:
        import torch

        D, H, layers, T, B, self.calls = case
        torch.manual_seed(7)
        self.module = torch.nn.LSTM(D, H, layers)
        self.x = (torch.arange(T * B * D) % 7).float().div(7).view(T, B, D)
        self.h, self.c = torch.zeros(layers, B, H), torch.zeros(layers, B, H)
        with torch.no_grad():
            self.total = float(self.module(self.x)[0].double().sum())

    def _median(self, call: Callable[[], object]) -> float:
        times = []
        for k in range(self.calls + self.calls // 10 + 2):
            before = time.perf_counter()
            call()
            if k >= self.calls // 10 + 2:
                times.append(time.perf_counter() - before)
        return statistics.median(times) * 1e6

    def times(self) -> Times:
        """Medians of `torch.nn.LSTM` by kind, in microseconds."""
        import torch

        module, x = self.module, self.x
        one, state = x[:1].contiguous(), (self.h, self.c)
        leaf = x.clone().requires_grad_()

        def step() -> None:
            nonlocal state
            with torch.no_grad():
                _, state = module(one, state)

        def forward() -> None:
            with torch.no_grad():
                module(x)

        def train() -> None:
            out, _ = module(leaf)
            torch.autograd.grad(out.sum(), [leaf, *module.parameters()])

        return {"step": self._median(step), "forward": self._median(forward), "train": self._median(train)}

    def operator_times(self) -> Times:
        """Medians of the bare functions by kind, in microseconds."""
        import torch

        m, x, state = self.module, self.x, (self.h, self.c)
        weights: list[Any] = list(m.parameters())
        plain = [weight.detach() for weight in weights]
        leaf, ones = x.clone().requires_grad_(), torch.ones(*x.shape[:2], m.hidden_size)
        cells = [(self.h[k], self.c[k], plain[4 * k : 4 * k + 4]) for k in range(m.num_layers)]

        def step() -> None:
            below = x[0]
            for h, c, own in cells:
                below, _ = torch.lstm_cell(below, (h, c), *own)

        def forward() -> None:
            with torch.no_grad():
                torch._VF.lstm(x, state, plain, True, m.num_layers, 0.0, False, False, False)

        def train() -> None:
            forward()
            out, _, _ = torch._VF.lstm(leaf, state, weights, True, m.num_layers, 0.0, True, False, False)
            torch.autograd.grad(out, [leaf, *weights], ones)

        return {"step": self._median(step), "forward": self._median(forward), "train": self._median(train)}


def processor() -> str:
    """The processor's name as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


@contextmanager
def one_processor() -> Iterator[int]:
    """This process, its children and torch on one thread of the last processor that it may use."""
    import torch

    allowed, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {max(allowed)})
    torch.set_num_threads(1)
    try:
        yield max(allowed)
    finally:
        os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)


def in_turns(columns: dict[str, Callable[[], Times]], rounds: int) -> dict[str, Times]:
    """Of each column the times of the calmest round, by kind; another column begins each round."""
    found: dict[str, list[Times]] = {name: [] for name in columns}
    names = list(columns)
    for turn in range(rounds):
        for k in range(len(names)):
            name = names[(turn + k) % len(names)]
            found[name].append(columns[name]())
    return {name: {kind: min(times[kind] for times in all_) for kind in KINDS} for name, all_ in found.items()}


def compare(programs: dict[str, Path], rounds: int, calls: int | None) -> None:
    """Prints the table of the engines beside torch."""
    print(f"{'network':<24} {'call':<8} " + " ".join(f"{name:>9}" for name in (*programs, "torch op", "torch")), end="")
    print("".join(f"  {name}/torch" for name in programs))
    for title, case in CASES.items():
        case = (*case[:5], calls or case[5])
        beside = Torch(case)
        columns: dict[str, Callable[[], Times]] = {
            engine: functools.partial(host_times, program, case, beside.total) for engine, program in programs.items()
        }
        columns |= {"torch op": beside.operator_times, "torch": beside.times}
        found = in_turns(columns, rounds)
        for kind in KINDS:
            times = " ".join(f"{times[kind]:9.2f}" for times in found.values())
            ratios = "".join(f"{found[name][kind] / found['torch'][kind]:{len(name) + 8}.2f}" for name in programs)
            print(f"{title:<24} {kind:<8} {times}{ratios}")


def time_launcher(folder: Path, rounds: int, calls: int | None) -> None:
    """Prints what calls on a CUDA device cost up to the driver."""
    driver = folder / "null_libcuda.so"
    compiler = build.compiler(None)
    source = build.SOURCE / "src" / "null_libcuda.c"
    subprocess.run([*compiler, "-shared", "-fPIC", "-O2", str(source), "-o", str(driver)], check=True)
    command = f"{' '.join(compiler)} '-DTRITLSTM_LIBCUDA=\"{driver}\"'"
    built = build.build(folder / "launcher", command, "aot", LAUNCHER_IMAGES)
    program = build.build_example("call_cost", built, folder / "call_cost_launcher")
    print("\non a CUDA device whose driver does nothing")
    for title, case in CASES.items():
        case = (*case[:5], calls or case[5])
        found = [run_host(program, case, "launcher")[1] for _ in range(rounds)]
        for kind in KINDS:
            print(f"{title:<24} {kind:<8} {min(times[kind] for times in found):9.2f}")


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables; exit status 1 if a host is wrong or can't be built."""
    parser = argparse.ArgumentParser(
        prog="python -m tritlstm.capi.call_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engine", choices=list(build.NAMES), action="append", help="only this one")
    parser.add_argument("--calls", type=int, help="how often each call is made in a round")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"how often all take their turn (default {ROUNDS})")
    parser.add_argument("--cblas", metavar="OPTIONS", help="as of tritlstm build-c")
    parser.add_argument(
        "--launcher",
        action="store_true",
        help="also the calls of libtritlstm on a CUDA device whose driver does nothing (compiles its kernels: half a "
        "minute, needs Triton, no GPU)",
    )
    words = parser.parse_args(arguments)
    engines = words.engine or list(build.NAMES)
    with tempfile.TemporaryDirectory() as name:
        programs = {}
        try:
            for engine in engines:
                cblas = words.cblas if engine == "aot" else None
                built = build.build(Path(name, engine), engine=engine, cblas=cblas)
                programs[engine] = build.build_example("call_cost", built, Path(name, f"call_cost_{engine}"))
            with one_processor() as number:
                print(f"{processor()}, processor {number}, one thread, median microseconds")
                print(f"load average of {os.cpu_count()} processors: {os.getloadavg()[0]:.1f}\n")
                compare(programs, words.rounds, words.calls)
                if words.launcher:
                    time_launcher(Path(name), words.rounds, words.calls)
                print(f"\nload average {os.getloadavg()[0]:.1f} at the end")
        except (build.BuildError, WrongError) as error:
            print(f"call_cost: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
