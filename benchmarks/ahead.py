"""Compiles in many processes what will then be timed in one: Triton keeps on disk what it has compiled."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from . import calibrate
from .cases import PASSES, Case
from .gate import results
from .problem import make
from .providers import PROVIDERS

Item = TypeVar("Item")


def run_case(case: Case, device: str = "cuda") -> None:
    """Run both passes of tritlstm.LSTM once."""
    problem = make(case, torch.device(device))
    for which in PASSES:
        results(PROVIDERS["tritlstm"].build(problem), problem, which)


def run_setting(setting: calibrate.Setting) -> None:
    """Run the kernel of a setting on the first GPU for a few steps."""
    calibrate.observe(setting, torch.device("cuda", 0), calibrate.CudaStopwatch, lengths=(2, 3), repeats=1)


def compile_ahead(
    work: Callable[[Item], None], items: Sequence[Item], jobs: int, say: Callable[[str], Any] = print
) -> int:
    """Do `work` of each item in one of `jobs` processes; returns how many failed, and says why the first did.

    A failure here costs nothing but time: who runs the item afterwards compiles, or fails, for all to see. `work` is
    a function of a module, since the processes are started afresh (a process that has used CUDA can't fork).
    """
    started = time.monotonic()
    # Spawned, and not by a server that outlives this call.
    context = multiprocessing.get_context("spawn")
    failures: list[str] = []
    with ProcessPoolExecutor(max_workers=min(jobs, max(len(items), 1)), mp_context=context) as pool:
        pending: list[Future[None]] = [pool.submit(work, item) for item in items]
        for future in as_completed(pending):
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                failures.append("a process died")
            elif error is not None:
                lines = str(error).strip().splitlines()
                failures.append(f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300])
    text = f"compiled ahead in {jobs} processes, by running {len(items)} once: {time.monotonic() - started:.0f} s"
    say(text + (f"; {len(failures)} failed, first: {failures[0]}" if failures else ""))
    return len(failures)
