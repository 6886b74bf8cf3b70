"""The command: what it imports when, what it says, and with which exit status."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tritlstm import __version__, cli, info


def command(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; `code` runs before it."""
    program = f"import sys\n{code}\nfrom tritlstm.cli import main\nsys.exit(main({list(arguments)!r}))"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )


def test_help_imports_nothing_of_the_subcommands():
    at_exit = (
        "import atexit\n"
        "atexit.register(lambda: print(*sorted({m.partition('.')[0] for m in sys.modules}), file=sys.stderr))"
    )
    done = command("--help", code=at_exit)
    assert done.returncode == 0
    for name, subcommand in cli.COMMANDS.items():
        assert name in done.stdout
        assert subcommand.help.split()[0] in done.stdout
    assert not set(done.stderr.split()) & {"torch", "triton", "numpy", "matplotlib", "rich", "cffi"}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_subcommand_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: tritlstm {name}" in capsys.readouterr().out


def test_python_m_tritlstm_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "tritlstm", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"tritlstm {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["train"], ["demo", "--no-such-option"]])
def test_wrong_arguments_end_with_status_2_and_usage(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: tritlstm" in capsys.readouterr().err


def test_a_missing_extra_names_its_install_command(tmp_path):
    done = command("demo", "--output", str(tmp_path), code="sys.modules['matplotlib'] = None")
    assert done.returncode == 2
    assert (
        done.stderr
        == "tritlstm demo needs matplotlib, which is not installed: pip install 'tritlstm[demo]'\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_is_no_traceback():
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m tritlstm info | head -n 1"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("python")
    assert done.stderr == ""


def test_info_says_what_is_here(capsys):
    import torch

    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["python"] == platform.python_version()
    assert facts["versions"]["tritlstm"] == __version__
    assert facts["versions"]["torch"] == torch.__version__
    assert len(facts["devices"]) == torch.cuda.device_count()
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"torch       {torch.__version__}" in lines
    path = next(line for line in lines if line.startswith("path"))
    assert "Triton kernels" in path
    assert ("torch's own LSTM on the CPU" in path) == (not torch.cuda.is_available())


def test_info_where_things_are_missing(monkeypatch, capsys):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(info, "python_headers", lambda: None)
    monkeypatch.setattr(info, "PACKAGES", ("tritlstm", "nosuchpackage"))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert "not installed: pip install nosuchpackage" in printed
    assert "compiler    none: build-c needs one; apt install build-essential" in printed
    assert f"apt install python3.{sys.version_info.minor}-dev" in printed
    assert "no GPU: torch cannot be imported" in printed


def test_the_example_learns(tmp_path):
    """Few steps on short sequences: a third of the error of always answering the mean (1/6)."""
    example = Path(__file__).resolve().parents[1] / "examples" / "adding_problem.py"
    done = subprocess.run(
        [sys.executable, str(example), "--steps", "400", "--length", "8"], cwd=tmp_path, capture_output=True,
        text=True, timeout=120, check=True,
    )  # fmt: skip
    error = float(done.stdout.splitlines()[-1].split("error ")[1].split()[0])
    assert error < 1 / 6 / 3
