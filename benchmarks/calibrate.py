"""`tritlstm bench --calibrate`: time a set of recurrent kernels on this GPU and fit the constants of the cost model.

`fit` is a pure function of timings. It asks the planner's own cost model for its predictions, so that a term that the
model gains is fitted too.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from typing import Any, Protocol

import numpy as np
import torch
import triton

from .. import layer, measured, plan
from ..kernels.launch import Launch

#: What is fitted; of it, what the timings determine. The bandwidth of memory has too small a part in a step.
FITTED = ("flag_us", "counter_us", "l2_latency_us", "sm_l2_bytes_per_us", "cell_us", "grad_us", "parts_us",
          "fence_us", "launch_us", "l2_bytes_per_us", "clock_ghz")  # fmt: skip
#: With timings of clusters, these too.
FITTED_OF_CLUSTERS = ("cluster_us",)
#: Largest standard error of a constant that counts as determined: a part of it or of the data sheet's, if larger.
DETERMINED = 0.25
LENGTHS = (256, 768)  # the difference leaves out what a launch costs once
REPEATS = 15


@dataclass(frozen=True)
class Setting:
    """A kernel to time; `overrides` are those of `plan.recurrent`."""

    direction: str
    batch: int
    hidden: int
    dtype: torch.dtype
    overrides: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Timing:
    """What a kernel took for a step of the whole batch."""

    chosen: plan.RecurrentPlan
    batch: int
    us_per_step: float


@dataclass(frozen=True)
class Fit:
    """Constants that the timings determine with their standard errors, and how far predictions are off."""

    constants: dict[str, float]
    errors: dict[str, float]
    undetermined: tuple[str, ...]
    before: tuple[float, float]  # median and largest relative error of the data sheet's predictions
    after: tuple[float, float]
    timings: int


def settings(clusters: bool = False) -> Iterator[Setting]:
    """Kernels that together move every term of the cost model, and those in ``clusters`` if they are wanted."""
    half, single = torch.float16, torch.float32
    sizes = ((1, 64), (16, 64), (16, 128), (1, 256), (32, 256), (1, 512), (16, 512), (64, 512), (16, 768), (1, 1024),
             (32, 1024), (16, 1536), (16, 2048))  # fmt: skip
    for direction in ("forward", "backward"):
        for batch, hidden in sizes:
            yield Setting(direction, batch, hidden, half)
            # More cells a thread, and more rows to read.
            yield Setting(direction, batch, hidden, half, (("tile_rows", 0),))
        for batch, hidden in sizes[::3]:
            yield Setting(direction, batch, hidden, single)
        for hidden in (256, 512, 1024):
            for fixed in ({"protocol": "counter"}, {"tier": "step"}, {"block_h": 16}, {"block_h": 32}):
                yield Setting(direction, 16, hidden, half, tuple(fixed.items()))
        for hidden in (512, 1024):
            for block_k in (64, 128, 256, 512):
                yield Setting(direction, 16, hidden, half, (("block_h", 16), ("block_k", block_k)))
        for poll in (1, 2):
            yield Setting(direction, 16, 1024, half, (("block_h", 16), ("poll", poll)))
        yield Setting(direction, 16, 1024, half, (("tier", "streaming"),))
        # Which weights lie in registers, and how large teams are: alike in all else.
        for batch, hidden in ((16, 768), (32, 1024)):
            yield Setting(direction, batch, hidden, half, (("held", 0),))
            if direction == "backward":
                yield Setting(direction, batch, hidden, half, (("held", 0), ("parts", 4)))
        if direction == "backward" and clusters:
            teams = ((1, 256, 8), (32, 256, 4), (16, 512, 4), (16, 512, 8), (16, 768, 4), (16, 768, 8), (32, 1024, 8),
                     (16, 1536, 8))  # fmt: skip
            for batch, hidden, parts in teams:
                yield Setting(direction, batch, hidden, half, (("clustered", True), ("parts", parts)))
        # So many blocks that the whole L2 is the limit.
        yield Setting(direction, 128, 512, half, (("block_h", 16),))
        yield Setting(direction, 128, 1024, half, (("block_h", 16),))


def predicted(chosen: plan.RecurrentPlan, batch: int, device: plan.Device) -> float:
    """µs a step of the kernel alone, by the cost model with the constants of `device`."""
    problem = plan._Problem(
        chosen.direction, batch, chosen.hidden, chosen.dtype, chosen.precision, device, chosen.save, False
    )
    cost = dataclasses.replace(plan._cost(problem, chosen), prefill=0.0)  # the poison is written before the launch
    return dataclasses.replace(chosen, cost=cost).us_per_step


def fit(timings: Sequence[Timing], device: plan.Device) -> Fit:
    """Least squares of relative errors, from the values of `device` on.

    A constant that the timings leave open (its standard error is above `DETERMINED`) keeps its value, and the others
    are fitted again. Raises ValueError where there are fewer timings than constants.
    """
    fitted = FITTED + (FITTED_OF_CLUSTERS if any(t.chosen.clustered for t in timings) else ())
    if len(timings) <= len(fitted):
        raise ValueError(f"{len(fitted)} constants need more than {len(fitted)} timings, got {len(timings)}")
    if wrong := [t.us_per_step for t in timings if not t.us_per_step > 0]:
        raise ValueError(f"timings must be positive, got {wrong[0]}")
    start = {name: _value(device, name) for name in fitted}
    wanted = np.log([t.us_per_step for t in timings])

    def residuals(names: Sequence[str], logs: np.ndarray) -> np.ndarray:
        changed = _with(device, dict(zip(names, np.exp(logs).tolist(), strict=True)))
        return np.log([predicted(t.chosen, t.batch, changed) for t in timings]) - wanted

    names = list(fitted)
    while True:
        # Where another limit binds at the start, nothing says that this one should move; so from lower ones too.
        starts = ({**start, "l2_bytes_per_us": start["l2_bytes_per_us"] / times} for times in (1, 2, 4))
        solved = [_least_squares(names, begin, residuals) for begin in starts]
        logs, jacobian, rest = min(solved, key=lambda found: float(found[2] @ found[2]))
        values = dict(zip(names, np.exp(logs).tolist(), strict=True))
        errors = dict(zip(names, _standard_errors(jacobian, rest) * np.exp(logs), strict=True))
        relative = {name: errors[name] / max(values[name], start[name]) for name in names}
        worst = max(relative, key=lambda name: relative[name], default=None)
        if worst is None or relative[worst] <= DETERMINED:
            break
        names.remove(worst)
    before = residuals([], np.zeros(0))
    return Fit(
        values,
        {name: float(error) for name, error in errors.items()},
        tuple(name for name in fitted if name not in names),
        _off(before),
        _off(rest),
        len(timings),
    )


def _off(residuals: np.ndarray) -> tuple[float, float]:
    off = np.abs(np.expm1(residuals))
    return float(np.median(off)), float(off.max())


def _value(device: plan.Device, name: str) -> float:
    return getattr(device if name in measured.RATES else device.constants, name)


def _with(device: plan.Device, values: dict[str, float]) -> plan.Device:
    rates: Any = {name: value for name, value in values.items() if name in measured.RATES}
    own: Any = {name: value for name, value in values.items() if name not in measured.RATES}
    return dataclasses.replace(device, constants=dataclasses.replace(device.constants, **own), **rates)


Residuals = Callable[[Sequence[str], np.ndarray], np.ndarray]


def _least_squares(
    names: Sequence[str], start: dict[str, float], residuals: Residuals
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Levenberg and Marquardt's method in the logarithms of the constants, which stay positive so.

    The model is linear in them but for its maxima, which change with what binds; so derivatives are differences.
    """
    logs = np.log([start[name] for name in names])
    # A hundredfold either way: what tends to zero stops there.
    least, most = logs - np.log(100), logs + np.log(100)
    damping, rest = 1e-2, residuals(names, logs)
    jacobian = _jacobian(names, logs, rest, residuals)
    for _ in range(200):
        normal = jacobian.T @ jacobian
        scale = np.diag(np.diag(normal) + 1e-9)
        step = -np.linalg.solve(normal + damping * scale, jacobian.T @ rest)
        tried = np.clip(logs + np.clip(step, -1, 1), least, most)
        there = residuals(names, tried)
        if there @ there < rest @ rest:
            moved = np.abs(tried - logs).max()
            logs, rest, damping = tried, there, damping / 4
            jacobian = _jacobian(names, logs, rest, residuals)
            if moved < 1e-7:
                break
        else:
            damping *= 4
            if damping > 1e9:
                break
    return logs, jacobian, rest


def _jacobian(names: Sequence[str], logs: np.ndarray, rest: np.ndarray, residuals: Residuals) -> np.ndarray:
    columns = np.empty((len(rest), len(names)))
    for k in range(len(names)):
        moved = logs.copy()
        moved[k] += 1e-5
        columns[:, k] = (residuals(names, moved) - rest) / 1e-5
    return columns


def _standard_errors(jacobian: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Of the logarithms; infinite for those that no timing depends on."""
    moves = np.linalg.norm(jacobian, axis=0) > 1e-6
    errors = np.full(jacobian.shape[1], np.inf)
    if moves.any():
        used = jacobian[:, moves]
        variance = rest @ rest / (len(rest) - used.shape[1])
        errors[moves] = np.sqrt(variance * np.diag(np.linalg.pinv(used.T @ used)).clip(0))
    return errors


class Stopwatch(Protocol):
    """Times what is launched between the first `start` and the last `stop`."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def microseconds(self) -> float: ...


class CudaStopwatch:
    def __init__(self) -> None:
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def start(self) -> None:
        self.events[0].record()

    def stop(self) -> None:
        self.events[1].record()

    def microseconds(self) -> float:
        self.events[1].synchronize()
        return 1e3 * self.events[0].elapsed_time(self.events[1])


@contextmanager
def _watched(kernel: str, overrides: dict[str, Any], watch: Stopwatch) -> Iterator[None]:
    """Inside, layers run with these overrides, and `watch` runs while `kernel` does."""
    run, fixed = layer._run, layer._overrides
    first = True

    def timed(launch: Launch) -> None:
        nonlocal first
        if launch.kernel != kernel:
            run(launch)
            return
        if first:
            watch.start()
            first = False
        run(launch)
        watch.stop()

    layer._run, layer._overrides = timed, lambda: {**fixed(), **overrides}
    try:
        yield
    finally:
        layer._run, layer._overrides = run, fixed


def observe(
    setting: Setting,
    device: torch.device,
    stopwatch: Callable[[], Stopwatch],
    lengths: tuple[int, int] = LENGTHS,
    repeats: int = REPEATS,
) -> Timing | None:
    """Time one setting; None where the planner has nothing of the kind."""
    batch, hidden, overrides = setting.batch, setting.hidden, dict(setting.overrides)
    x = torch.randn(lengths[1], batch, 16, device=device).to(setting.dtype)
    try:
        chosen = plan.recurrent(
            setting.direction, lengths[1], batch, hidden, setting.dtype, plan.device_of(x), plan.dot_precision(x), True,
            {**layer._overrides(), **overrides},
        )  # fmt: skip
    except plan.PlanError:
        return None
    bound = hidden**-0.5
    weights = [torch.empty(4 * hidden, n, device=device).uniform_(-bound, bound).to(x.dtype) for n in (16, hidden)]
    states = [torch.zeros(batch, hidden, device=device).to(x.dtype) for _ in range(2)]
    grad = torch.randn(lengths[1], batch, hidden, device=device).to(x.dtype)

    def once(length: int) -> float:
        watch = stopwatch()
        given: Any = (x[:length], *weights, None, None, *states, None, False, True)
        if setting.direction == "forward":
            with _watched(plan.KERNELS["forward"], overrides, watch):
                layer.forward(*given)
        else:
            out, _, _, gates, cells = layer.forward(*given)
            fixed: Any = (
                grad[:length],
                None,
                None,
                x[:length],
                *weights,
                *states,
                None,
                out,
                gates,
                cells,
                False,
                [False] * 7,
            )
            with _watched(plan.KERNELS["backward"], overrides, watch):
                layer.backward(*fixed)
        return watch.microseconds()

    for length in lengths:
        once(length)  # compiles
    samples: dict[int, list[float]] = {length: [] for length in lengths}
    for _ in range(repeats):
        for length in lengths:
            samples[length].append(once(length))
    short, long = (statistics.median(samples[length]) for length in lengths)
    return Timing(chosen, batch, (long - short) / (lengths[1] - lengths[0]))


def calibrate(say: Callable[[str], Any] = print) -> tuple[Fit, measured.Measurement]:
    """Time and fit on the first GPU. Raises RuntimeError where there is none."""
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"--calibrate needs a GPU that torch {torch.__version__} can use, and it finds none; "
            "the planner goes on with its data-sheet estimates"
        )
    device = torch.device("cuda", 0)
    timings: list[Timing] = []
    seen: set[tuple[plan.RecurrentPlan, int]] = set()
    for setting in settings(plan.data_sheet(0).clusters):
        timing = observe(setting, device, CudaStopwatch)
        if timing is None or (timing.chosen, timing.batch) in seen:
            continue
        seen.add((timing.chosen, timing.batch))
        if timing.us_per_step <= 0:
            say(f"left out, the longer run took no longer: {timing.chosen.describe()}")
            continue
        timings.append(timing)
        say(f"{timing.us_per_step:7.3f} us a step: {setting.direction} B={setting.batch} {timing.chosen.describe()}")
    sheet = plan.data_sheet(0)
    found = fit(timings, sheet)
    quality = {
        "timings": found.timings,
        "median_error": found.after[0],
        "largest_error": found.after[1],
        "median_error_before": found.before[0],
        "largest_error_before": found.before[1],
    }
    versions = {"torch": torch.__version__, "triton": triton.__version__, "driver": driver()}
    today = date.today().isoformat()
    return found, measured.Measurement(sheet.name, sheet.arch, today, versions, found.constants, fit=quality)


def driver() -> str:
    """Version of the GPU's driver."""
    if torch.version.hip:
        return f"HIP {torch.version.hip}"
    query = shutil.which("nvidia-smi")
    if query is not None:
        command = [query, "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    bindings: Any = torch._C
    return f"for CUDA {bindings._cuda_getDriverVersion()}"


def report(found: Fit, device: plan.Device) -> str:
    """What was fitted beside the data sheet's values."""
    lines = [f"{'constant':20} {'data sheet':>12} {'fitted':>12}   standard error"]
    for name in (n for n in FITTED + FITTED_OF_CLUSTERS if n in found.constants or n in found.undetermined):
        sheet = _value(device, name)
        if name in found.constants:
            lines.append(f"{name:20} {sheet:12.4g} {found.constants[name]:12.4g}   {found.errors[name]:.2g}")
        else:
            lines.append(f"{name:20} {sheet:12.4g} {'-':>12}   left open by these timings")
    for when, (median, largest) in (("data sheet", found.before), ("fitted", found.after)):
        lines.append(f"predictions with the {when} values are off by {median:.0%} (median), {largest:.0%} (largest)")
    return "\n".join(lines)
