"""What the settings of the suite keep of a run that is ended before its own report."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import time
import pytest

def test_fails():
    assert [1, 2] == [1, 3], "words of the failure"

@pytest.fixture
def broken():
    raise OSError("words of the fixture")

def test_in_setup(broken):
    pass

def test_waits():
    print("waiting", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_failures_are_kept_as_they_happen_and_a_run_that_is_ended_reports(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_unreadable.py").write_text("import no_such_module\n")
    kept = tmp_path / "kept.txt"
    options = ["-c", "/dev/null", "--rootdir", ".", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    command = [sys.executable, "-m", "pytest", "-q", "-s", *options, "."]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITLSTM_FAILURES": str(kept)}
    run = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE)
    assert run.stdout is not None
    said = ""
    for line in run.stdout:
        said += line
        if "waiting" in line:
            break
    so_far = kept.read_text()
    run.send_signal(signal.SIGTERM)  # as the time limit of a step does
    said += run.communicate(timeout=60)[0]
    for words in ("no_such_module", "words of the failure", "test_some.py::test_fails (call)", "words of the fixture",
                  "test_some.py::test_in_setup (setup)", "test_unreadable.py (collection)"):  # fmt: skip
        assert words in so_far
    assert "words of the failure" in said
    assert "KeyboardInterrupt" in said
    assert "the run (end)\n3 collected, 3 failed, exit status 2" in kept.read_text()
