"""What a call of the C library costs, beside torch: ``python -m tritlstm.capi.call_cost``.

Builds both engines and the host ``examples/call_cost.c``, and prints medians in microseconds on one thread, for a
network without work (what the call itself costs) and for the demo's. A figure is shown only where the outputs agree
with torch's.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from . import build

CASES = {  # D, H, layers, T, B, calls
    "no work": (1, 1, 1, 1, 1, 2000),
    "demo's, one sequence": (64, 128, 1, 64, 1, 40),
    "demo's, training batch": (64, 128, 1, 64, 16, 20),
}
KINDS = ("step", "forward", "train")


class WrongError(RuntimeError):
    """The outputs of the C host are not torch's."""


def host_times(program: Path, case: tuple[int, ...], expected: float) -> dict[str, float]:
    """Medians by kind, in microseconds.

    Raises:
        WrongError: the outputs' sum is not ``expected``.
    """
    command = [str(program), *map(str, case)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    lines = [line.split() for line in done.stdout.splitlines()]
    found = float(lines[0][1])
    if not abs(found - expected) <= 1e-4 * (1 + abs(expected)):
        raise WrongError(f"{program.name} {case}: outputs sum to {found}, torch's to {expected}")
    return {kind: int(median) / 1000 for kind, _, median, _ in lines[1:]}


def torch_times(case: tuple[int, ...]) -> tuple[dict[str, float], float]:
    """The same by `torch.nn.LSTM` on one thread, and the sum of its outputs."""
    import torch

    torch.set_num_threads(1)
    D, H, layers, T, B, calls = case
    torch.manual_seed(7)
    module = torch.nn.LSTM(D, H, layers)
    x = (torch.arange(T * B * D) % 7).float().div(7).view(T, B, D)
    leaf = x.clone().requires_grad_()
    one, state = x[:1].contiguous(), (torch.zeros(layers, B, H), torch.zeros(layers, B, H))

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

    def median(call: Callable[[], None]) -> float:
        times = []
        for k in range(calls + calls // 10 + 2):
            before = time.perf_counter()
            call()
            if k >= calls // 10 + 2:
                times.append(time.perf_counter() - before)
        return statistics.median(times) * 1e6

    with torch.no_grad():
        total = float(module(x)[0].double().sum())
    return {"step": median(step), "forward": median(forward), "train": median(train)}, total


def processor() -> str:
    """The processor's name as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; exit status 1 if a host is wrong or can't be built."""
    parser = argparse.ArgumentParser(prog="python -m tritlstm.capi.call_cost", description=__doc__)
    parser.add_argument("--engine", choices=list(build.NAMES), action="append", help="only this one")
    parser.add_argument("--calls", type=int, help="how often each call is made")
    parser.add_argument("--cblas", metavar="OPTIONS", help="as of tritlstm build-c")
    words = parser.parse_args(arguments)
    engines = words.engine or list(build.NAMES)
    with tempfile.TemporaryDirectory() as name:
        programs = {}
        try:
            for engine in engines:
                cblas = words.cblas if engine == "aot" else None
                built = build.build(Path(name, engine), engine=engine, cblas=cblas)
                programs[engine] = build.build_example("call_cost", built, Path(name, f"call_cost_{engine}"))
        except build.BuildError as error:
            print(f"call_cost: {error}", file=sys.stderr)
            return 1
        print(f"{processor()}, one thread, median microseconds\n")
        print(f"{'network':<24} {'call':<8} " + " ".join(f"{column:>10}" for column in (*engines, "torch")))
        for title, case in CASES.items():
            case = (*case[:5], words.calls or case[5])
            beside, total = torch_times(case)
            try:
                columns = [host_times(programs[engine], case, total) for engine in engines]
            except WrongError as error:
                print(f"call_cost: {error}", file=sys.stderr)
                return 1
            for kind in KINDS:
                times = " ".join(f"{column[kind]:10.2f}" for column in (*columns, beside))
                print(f"{title:<24} {kind:<8} {times}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
