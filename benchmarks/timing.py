"""Clocks, and the order in which providers take turns in front of them."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Call = Callable[[int], Any]
"""What is timed; the argument counts calls, so that a call can rotate through its inputs."""


class Timer(Protocol):
    def sample(self, call: Call, count: int) -> list[float]:
        """Call `count` times, return the milliseconds of each."""
        ...


class CpuTimer:
    """Wall clock. The inputs rotate; caches are left as the calls leave them."""

    def sample(self, call: Call, count: int) -> list[float]:
        times = []
        for index in range(count):
            start = time.perf_counter_ns()
            call(index)
            times.append((time.perf_counter_ns() - start) / 1e6)
        return times


class CudaTimer:
    """CUDA events around each call, the L2 cache overwritten before it, one synchronisation at the end.

    As in `triton.testing.do_bench`, overwriting the cache also gives the host time to run ahead, so that
    launch overhead shows only where it exceeds the work. `cuda` stands for `torch.cuda` in tests.
    """

    def __init__(self, flush: Callable[[], Any], cuda: Any = None) -> None:
        if cuda is None:
            import torch

            cuda = torch.cuda
        self.cuda = cuda
        self.flush = flush

    def sample(self, call: Call, count: int) -> list[float]:
        starts = [self.cuda.Event(enable_timing=True) for _ in range(count)]
        ends = [self.cuda.Event(enable_timing=True) for _ in range(count)]
        for index in range(count):
            self.flush()
            starts[index].record()
            call(index)
            ends[index].record()
        self.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)]


@dataclass(frozen=True)
class Effort:
    """How long to look at each provider: milliseconds of samples, rounds of turns, fewest and most samples.

    A call longer than `slow_ms` is sampled `fewest_slow` times only.
    """

    budget_ms: float = 300.0
    rounds: int = 7
    fewest: int = 7
    most: int = 420
    slow_ms: float = 1000.0
    fewest_slow: int = 3


def schedule(call_ms: float, effort: Effort) -> list[int]:
    """Samples to take in each round for a call of about this length."""
    if call_ms > effort.slow_ms:
        return [1] * effort.fewest_slow
    wanted = math.ceil(effort.budget_ms / max(call_ms, 1e-6))
    total = min(max(wanted, effort.fewest), effort.most)
    return [math.ceil(total / effort.rounds)] * effort.rounds


def take_turns(calls: Mapping[str, Call], timer: Timer, effort: Effort) -> dict[str, list[float]]:
    """Warm every call up, then let them take turns round by round, each round beginning with another one.

    Whatever else the machine does then falls on all of them. Every second round goes backwards, so that none is always
    the one behind another. The first call of a turn is not counted, but for slow ones: it meets the caches and the
    allocator as the call of another one left them.
    """
    plans, uncounted = {}, {}
    for name, call in calls.items():
        call_ms = timer.sample(call, 1)[0]
        if call_ms <= effort.slow_ms:
            call_ms = min(timer.sample(call, 2))
        plans[name] = schedule(call_ms, effort)
        uncounted[name] = int(call_ms <= effort.slow_ms)
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(max(map(len, plans.values()), default=0)):
            first = turn % len(names)
            order = names[::-1] if turn % 2 else names
            for name in order[first:] + order[:first]:
                if turn < len(plans[name]):
                    samples[name] += timer.sample(calls[name], uncounted[name] + plans[name][turn])[uncounted[name] :]
    finally:
        if collecting:
            gc.enable()
    return samples


def percentile(samples: list[float], fraction: float) -> float:
    """Percentile with linear interpolation between the neighbouring samples; `fraction` from 0 to 1."""
    ordered = sorted(samples)
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
