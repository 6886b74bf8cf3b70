"""Settings of the whole suite: threads, NaN-filled ``torch.empty``, time limits, CUDA selection."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Iterator
from typing import Any

# One thread a process, set before torch is imported: the emulator forks, and a forked child of a process with
# a live OpenMP pool hangs in it. `pytest -n 2` makes use of a second core.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic cuBLAS
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

pytest.register_assert_rewrite("capi_harness", "aot_world")
torch.set_num_threads(1)

# The same examples in every run: a failure in CI can be repeated at the desk.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")

TIMEOUT = 180.0  # seconds a test may take, unless it carries @pytest.mark.timeout(seconds)
GRACE = 30.0  # then the process ends, for a test that hangs where Python can't interrupt it

_stderr = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_stderr] = os.dup(2)  # pytest captures nothing yet
    if _failures():
        # Whoever ends the run at a time limit gets the report of what has run.
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_unconfigure(config: pytest.Config) -> None:
    faulthandler.cancel_dump_traceback_later()
    os.close(config.stash[_stderr])


def _failures() -> str | None:
    """TRITLSTM_FAILURES names a file for failures as they happen, of a run that may be ended before its own report."""
    return None if "PYTEST_XDIST_WORKER" in os.environ else os.environ.get("TRITLSTM_FAILURES")


def _note(nodeid: str, when: str | None, text: str) -> None:
    path = _failures()
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{nodeid} ({when})\n{text}\n\n")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _note(report.nodeid, report.when, report.longreprtext)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _note(report.nodeid, "collection", report.longreprtext)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    status = f"{session.testscollected} collected, {session.testsfailed} failed, exit status {int(exitstatus)}"
    _note("the run", "end", status)


def _limit(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker else TIMEOUT


def _within_limit(item: pytest.Item) -> Iterator[None]:
    limit = _limit(item)

    def expire(signum: int, frame: Any) -> None:
        pytest.fail(f"took longer than {limit:g} s (see TIMEOUT in tests/conftest.py)")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    return (yield from _within_limit(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    return (yield from _within_limit(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    return (yield from _within_limit(item))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    # For a wait in C, which no signal handler of Python reaches: every thread's stack, then the end.
    faulthandler.dump_traceback_later(_limit(item) + GRACE, exit=True, file=item.config.stash[_stderr])
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def fp32_products_in_fp32() -> Iterator[None]:
    """On CUDA the kernels follow torch's TF32 switch for cuDNN RNNs, on by default; budgets here are fp32's."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


@pytest.fixture(autouse=True)
def nan_filled_empty() -> Iterator[None]:
    """``torch.empty`` holds NaN (integers: the largest value): reading what was never written shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_deterministic_debug_mode("warn")  # without deterministic algorithms the fill does not happen
    yield
    torch.set_deterministic_debug_mode("default")
