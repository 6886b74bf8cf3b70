"""A run: every case and pass in turn, every provider that can, gate first, then the clock."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Protocol

import torch

from .cases import PASSES, Case
from .device import Device, alive
from .floor import Limits, floor
from .gate import Check, Gate, forward, forward_backward
from .problem import Problem, make
from .providers import Provider
from .rows import Row, Store
from .timing import Call, Effort, percentile, take_turns

# Inputs that are rotated through: enough that none is warm by itself, within a small part of memory.
ROTATED = 3
ROTATED_BYTES = 512 << 20


class Reporter(Protocol):
    def begin(self, total: int) -> None: ...

    def doing(self, text: str) -> None: ...

    def advance(self) -> None: ...

    def unit(self, case: Case, which: str, rows: list[Row]) -> None: ...


class DeviceLostError(Exception):
    """A provider left the device unusable for this process; a new process can go on behind it."""


@dataclass
class Session:
    """One run over some cases.

    `limits` gives the measured limits of a dtype. `deadline` is on `clock`'s scale; None is no limit. With
    `named`, the providers were asked for and also run the cases that leave them out by default.
    """

    device: Device
    store: Store
    limits: Callable[[str], Limits]
    reporter: Reporter
    effort: Effort = field(default_factory=Effort)
    deadline: float | None = None
    note: str = ""
    named: bool = False
    clock: Callable[[], float] = time.monotonic
    _longest: float = field(default=0.0, init=False)

    def run(self, cases: list[Case], providers: list[Provider]) -> bool:
        """Run what is not in the store yet; False if the time limit came first."""
        plan = self.plan(cases, providers)
        self.reporter.begin(sum(len(todo) for _, _, todo, _ in plan))
        problem: Problem | None = None
        gate: Gate | None = None
        for case, which, todo, absent in plan:
            if self._no_time_for_another():
                return False
            started = self.clock()
            self.reporter.doing(f"{case.name} {which}: limits of the device and the reference")
            self.limits(case.dtype)
            if problem is None or gate is None or problem.case != case:
                problem = gate = None  # free the old one first
                try:
                    problem = make(case, self.device.torch_device, _copies(case))
                    gate = Gate(problem, self.device.memory_bytes)
                except Exception as error:
                    reason = f"no reference: {_short(error)}"
                    self._finish_all(case, which, todo, absent, reason)
                    continue
            if not self._unit(problem, gate, which, todo, absent):
                return False
            self._longest = max(self._longest, self.clock() - started)
        return True

    def plan(
        self, cases: list[Case], providers: list[Provider]
    ) -> list[tuple[Case, str, list[Provider], dict[str, str]]]:
        """(case, pass, providers that still have to run, why others do not) for all that is left to do."""
        unavailable = {
            provider.name: reason
            for provider in providers
            if (reason := provider.available(self.device.torch_device)) is not None
        }
        finished = self.store.finished
        plan = []
        for case in cases:
            absent = dict(unavailable)
            for provider in providers:
                if provider.name in absent:
                    continue
                if provider.name in case.without and not self.named:
                    absent[provider.name] = f"left out to save time; --provider {provider.name} runs it"
                elif (reason := provider.supports(case, self.device.torch_device)) is not None:
                    absent[provider.name] = reason
            able = [provider for provider in providers if provider.name not in absent]
            for which in PASSES:
                todo = [p for p in able if (case.name, p.name, which) not in finished]
                if todo:
                    plan.append((case, which, todo, absent))
        return plan

    def _no_time_for_another(self) -> bool:
        if self.deadline is None:
            return False
        return self.clock() + self._longest > self.deadline

    def _unit(
        self, problem: Problem, gate: Gate, which: str, todo: list[Provider], absent: dict[str, str]
    ) -> bool:
        """One case and pass: gate each provider, time the green ones together, write a row for each."""
        case = problem.case
        rows: list[Row] = []
        calls: dict[str, Call] = {}
        checks: dict[str, Check] = {}
        whole = True
        by_name = {provider.name: provider for provider in todo}

        def finish(provider: Provider, **columns: object) -> None:
            row = self._row(case, provider, which, gate.problem.case.T, absent, **columns)
            self.store.append(row)
            rows.append(row)
            self.reporter.advance()

        for provider in todo:
            if self.deadline is not None and self.clock() > self.deadline:
                whole = False
                break
            self.reporter.doing(f"{case.name} {which}: checking {provider.label}")
            try:
                check = gate.check(provider, which)
                if check.passed:
                    call = self._call(provider, problem, which)
                    self.device.timer.sample(call, 1)
            except Exception as error:
                # Whatever a peer does wrong belongs in its row, not at the end of everyone's run.
                finish(provider, status="failed", reason=_short(error))
                self._still_alive(f"{provider.label} on {case.name} {which}")
                continue
            if not check.passed:
                finish(provider, status="wrong", **_columns(check))
                continue
            calls[provider.name] = call
            checks[provider.name] = check

        self.reporter.doing(f"{case.name} {which}: timing {len(calls)} providers")
        try:
            timed = take_turns(calls, self.device.timer, self.effort)
        except Exception as error:
            left = [by_name[name] for name in calls]
            self._finish_all(case, which, left, absent, f"while timing together: {_short(error)}")
            return whole
        for name, samples in timed.items():
            median = percentile(samples, 0.5)
            finish(
                by_name[name],
                status="ok",
                median_ms=median,
                p20_ms=percentile(samples, 0.2),
                p80_ms=percentile(samples, 0.8),
                samples=len(samples),
                us_per_step=1e3 * median / case.T,
                **_columns(checks[name]),
            )
        self.reporter.unit(case, which, rows)
        return whole

    def _finish_all(
        self, case: Case, which: str, providers: list[Provider], absent: dict[str, str], reason: str
    ) -> None:
        rows = [
            self._row(case, provider, which, 0, absent, status="failed", reason=reason)
            for provider in providers
        ]
        for row in rows:
            self.store.append(row)
            self.reporter.advance()
        self.reporter.unit(case, which, rows)
        self._still_alive(f"{case.name} {which}")

    def _still_alive(self, what: str) -> None:
        if not alive(self.device):
            raise DeviceLostError(
                f"{what} left the GPU unusable for this process; the rows say how. "
                "Run again with --resume to go on behind it."
            )

    def _call(self, provider: Provider, problem: Problem, which: str) -> Call:
        runner = provider.build(problem)
        runner.train(which == "fwdbwd")
        inputs = [problem.inputs(index, batch_first=runner.batch_first) for index in range(len(problem.xs))]
        for one in inputs:
            runner.prepare(one)
        if which == "fwd":
            return lambda index: forward(runner, inputs[index % len(inputs)])
        grad_out = problem.grad_out
        if runner.batch_first:
            grad_out = grad_out.transpose(0, 1).contiguous()
        return lambda index: forward_backward(runner, inputs[index % len(inputs)], grad_out)

    def _row(
        self,
        case: Case,
        provider: Provider,
        which: str,
        checked_steps: int,
        absent: dict[str, str],
        **columns: object,
    ) -> Row:
        least = floor(case, which, self.limits(case.dtype))
        row: Row = {
            "case": case.name,
            "group": case.group,
            "provider": provider.name,
            "device": self.device.name,
            "threads": self.device.threads,
            "pass": which,
            "dtype": case.dtype,
            "T": case.T,
            "B": case.B,
            "D": case.D,
            "H": case.H,
            "layers": case.layers,
            "bidirectional": case.bidirectional,
            "lengths": list(case.lengths) if case.lengths else None,
            "resets": case.resets or None,
            "status": "",
            "reason": None,
            "median_ms": None,
            "p20_ms": None,
            "p80_ms": None,
            "samples": 0,
            "us_per_step": None,
            "floor_us_per_step": least.us_per_step,
            "floor": least.as_row(),
            "max_error": None,
            "error_budget": None,
            "worst_tensor": None,
            "checked_steps": checked_steps,
            "load": round(os.getloadavg()[0], 2) if self.device.kind == "cpu" else None,
            "tf32": bool(torch.backends.cudnn.allow_tf32)
            if self.device.kind == "gpu" and case.dtype == "fp32"
            else None,
            "included": provider.included,
            "absent": absent,
            "versions": self.store.header["versions"],
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "note": self.note or None,
        }
        unknown = columns.keys() - row.keys()
        assert not unknown, unknown
        return {**row, **columns}


def _copies(case: Case) -> int:
    size = 4 * case.T * case.B * case.D
    return max(1, min(ROTATED, ROTATED_BYTES // size))


def _columns(check: Check) -> dict[str, object]:
    infinite = not math.isfinite(check.error)
    return {
        "max_error": None if infinite else check.error,
        "error_budget": check.budget,
        "worst_tensor": check.tensor,
        **({"reason": f"{check.tensor}: not finite, or of another shape"} if infinite else {}),
    }


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return text if len(text) <= 300 else text[:297] + "..."
