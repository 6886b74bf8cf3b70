"""The wheel, the bare source tree, the order of the rooms, the set-up script, the suite's own settings."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

import tritlstm

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"tritlstm": "tritlstm", "kernels": "tritlstm/kernels", "capi": "tritlstm/capi"}
FOLDERS["benchmarks"] = "tritlstm/benchmarks"


# -- the wheel ----------------------------------------------------------------------------------------------


def source_files() -> set[str]:
    """Every file that belongs in the wheel, by its path there: all but prose, results and build products."""
    found = set()
    for folder, home in FOLDERS.items():
        for path in (ROOT / folder).rglob("*"):
            inside = path.relative_to(ROOT / folder)
            if path.is_dir() or {"__pycache__", "results"} & set(inside.parts):
                continue
            if path.suffix not in {".md", ".so", ".o", ".pyc"}:
                found.add(f"{home}/{inside.as_posix()}")
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # Built from a copy: setuptools leaves build/ behind, and a stale one puts deleted files into the wheel.
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "*.o")
    for folder in [*FOLDERS, "tests", "examples", "docs"]:
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "-w", str(out), str(source)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_source_folders_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    wanted = source_files()
    assert sorted(wanted - files) == [], "missing: list the subpackage or file type in pyproject.toml"
    assert sorted(files - wanted) == [], "these do not belong in the wheel"
    assert "tritlstm/py.typed" in files


def test_the_wheels_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        scripts = configparser.ConfigParser()
        scripts.read_string(archive.read(f"{folder}/entry_points.txt").decode())
        assert archive.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert metadata["Name"] == "tritlstm"
    assert metadata["Version"] == tritlstm.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    needs = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    names = sorted(re.match(r"[\w-]+", need)[0] for need in needs)
    assert names == ["cffi", "numpy", "safetensors", "torch", "triton"]
    assert {"demo", "bench", "test", "lint"} <= set(metadata.get_all("Provides-Extra"))
    assert scripts["console_scripts"]["tritlstm"] == "tritlstm.cli:main"


def test_the_wheel_works_once_installed(wheel, tmp_path):
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*command, "--target", tmp_path / "site", wheel], check=True, timeout=150)
    code = """
import tritlstm, tritlstm.benchmarks, tritlstm.capi, tritlstm.kernels, tritlstm.reference
for module in (tritlstm, tritlstm.benchmarks, tritlstm.capi, tritlstm.kernels, tritlstm.reference):
    print(module.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert Path(line).is_relative_to(tmp_path / "site" / "tritlstm"), line


def test_a_bare_source_tree_says_how_to_install(tmp_path):
    shutil.copytree(ROOT / "tritlstm", tmp_path / "tritlstm")
    # -S: without site-packages, so that an installed tritlstm does not lend its kernels.
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import tritlstm"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"ImportError: tritlstm was imported from {tmp_path / 'tritlstm'}, where ")
    for part in ("tritlstm.kernels", "tritlstm.capi", "tritlstm.benchmarks", "pip install -e .", "make test"):
        assert part in message


# -- the rooms ----------------------------------------------------------------------------------------------


def imports_of(path: Path, module: str) -> set[str]:
    """Modules imported anywhere in a file, function bodies included, relative ones resolved."""
    found = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{name.name}" for name in node.names)}
    return found


def test_kernels_import_nothing_of_the_rest():
    for path in (ROOT / "kernels").rglob("*.py"):
        module = ".".join(["tritlstm", *path.relative_to(ROOT).with_suffix("").parts])
        for name in imports_of(path, module.removesuffix(".__init__")):
            inside = (
                name.split(".")[0] != "tritlstm" or name == "tritlstm" or name.startswith("tritlstm.kernels")
            )
            assert inside, f"{path.relative_to(ROOT)} imports {name}"
            assert name.split(".")[0] not in {"kernels", "capi", "benchmarks"}, f"{path} imports {name}"


def test_the_reference_imports_numpy_alone():
    names = {
        name.split(".")[0] for name in imports_of(ROOT / "tritlstm" / "reference.py", "tritlstm.reference")
    }
    assert names - set(sys.stdlib_module_names) == {"numpy"}


def test_dependencies_run_one_way():
    """Nothing imports what stands before it in this order, not even inside a function."""
    order = ["cli", "explanation", "module", "functional", "ops", "layer", "plan"]
    for place, name in enumerate(order):
        path = ROOT / "tritlstm" / f"{name}.py"
        if not path.exists():
            pytest.fail(f"{path} is missing: the order of the rooms has changed, change this test with it")
        above = {f"tritlstm.{earlier}" for earlier in order[:place]}
        upward = {found for found in imports_of(path, f"tritlstm.{name}") if found in above}
        assert not upward, f"tritlstm.{name} imports {upward}"


# -- the set-up script --------------------------------------------------------------------------------------

NO_VENV = """
import sys
sys.modules["ensurepip"] = None
"""
NO_HEADERS = """
import sysconfig
sysconfig.get_path = lambda *args, **kwargs: "/nowhere"
"""
OLD = """
import sys
sys.version_info = (3, 9, 2, "final", 0)
"""


class Machine:
    """A PATH of our own making, to take things away from."""

    def __init__(self, folder: Path):
        self.bin = folder / "bin"
        self.site = folder / "site"
        self.bin.mkdir()
        self.site.mkdir()
        for name in ("sh", "make", "dirname", "head", "cat", "cksum"):
            found = shutil.which(name)
            assert found, f"{name} is needed to test the set-up script"
            (self.bin / name).symlink_to(found)
        self.script("python3", f'exec "{sys.executable}" "$@"')
        self.script("cc", "exit 0")

    def script(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def remove(self, name: str) -> None:
        (self.bin / name).unlink()

    def python_starts_with(self, code: str) -> None:
        (self.site / "sitecustomize.py").write_text(code)

    def check(self, *settings: str) -> tuple[int, str]:
        done = subprocess.run(
            [self.bin / "make", "-s", "-C", ROOT, "check-system", f"VENV={self.site}/none", *settings],
            env={"PATH": str(self.bin), "PYTHONPATH": str(self.site)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


def test_a_complete_machine_passes(machine):
    code, output = machine.check()
    assert code == 0, output
    assert "python, its headers and a C compiler are here" in output


@pytest.mark.parametrize(
    ("remove", "startup", "settings", "says", "packages"),
    [
        (["python3"], "", [], "'python3' was not found", "python3 python3-venv python3-dev"),
        (
            [],
            "",
            ["PYTHON=python3.12"],
            "'python3.12' was not found",
            "python3.12 python3.12-venv python3.12-dev",
        ),
        ([], NO_VENV, [], "the modules venv and ensurepip", "python3-venv"),
        ([], NO_HEADERS, [], "Python.h, the C headers", "python3-dev"),
        ([], OLD, [], "Python 3.10 or newer", ""),
        (["cc"], OLD, [], "Python 3.10 or newer", "build-essential"),
        (["cc"], "", [], "a C compiler: 'cc' cannot compile a program", "build-essential"),
        ([], "", ["CC=clang-99"], "a C compiler: 'clang-99' cannot", "build-essential"),
        (["cc"], NO_VENV + NO_HEADERS, [], "venv and ensurepip", "python3-venv python3-dev build-essential"),
        (["python3", "cc"], "", [], "a C compiler", "python3 python3-venv python3-dev build-essential"),
    ],
    ids=[
        "python",
        "named-python",
        "venv",
        "headers",
        "old",
        "old-and-cc",
        "cc",
        "named-cc",
        "three",
        "everything",
    ],
)
def test_what_is_missing_is_named_with_its_package(machine, remove, startup, settings, says, packages):
    for name in remove:
        machine.remove(name)
    machine.python_starts_with(startup)
    code, output = machine.check(*settings)
    assert code != 0
    assert "tritlstm needs what this machine lacks:" in output
    assert says in output
    if packages:
        assert f"  sudo apt install {packages}\n" in output
    else:
        assert "apt" not in output


def test_a_python_that_does_not_run_is_named(machine):
    machine.script("python3", "exit 127")
    code, output = machine.check()
    assert code != 0
    assert "a Python that runs" in output


def test_ci_calls_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text().splitlines()


# -- the suite's own settings -------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which it would run everything")
def test_what_wants_a_gpu_says_what_is_missing(tmp_path):
    environment = dict(os.environ, PYTHON=sys.executable)
    told = {"": "Everything that wants a GPU", str(tmp_path / "out"): "torch finds no CUDA device here"}
    for folder, says in told.items():
        command = [ROOT / ".ci" / "gpu", *([folder] if folder else [])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert says in done.stderr


def test_empty_tensors_are_filled_with_nan():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        assert torch.empty(7, dtype=dtype).isnan().all()
        assert torch.zeros(3, dtype=dtype).new_empty(5).isnan().all()
    assert (torch.empty(7, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


def test_one_thread_a_process():
    assert torch.get_num_threads() == 1
    assert os.environ["OMP_NUM_THREADS"] == "1"


def run_suite(folder: Path, tests: str, grace: float) -> subprocess.CompletedProcess[str]:
    """The tests under a copy of conftest.py."""
    conftest = (ROOT / "tests" / "conftest.py").read_text()
    assert "GRACE = 30.0" in conftest
    (folder / "conftest.py").write_text(conftest.replace("GRACE = 30.0", f"GRACE = {grace}"))
    (folder / "test_slow.py").write_text(f"import signal, time, pytest\n{tests}")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "."],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_slow_test_fails_and_the_next_one_runs(tmp_path):
    done = run_suite(
        tmp_path,
        """
@pytest.mark.timeout(0.5)
def test_sleeps():
    time.sleep(90)

def test_next():
    pass
""",
        grace=30,
    )
    assert done.returncode == 1
    assert "took longer than 0.5 s" in done.stdout
    assert "1 failed, 1 passed" in done.stdout


def test_a_test_that_cannot_be_interrupted_ends_the_run(tmp_path):
    done = run_suite(
        tmp_path,
        """
@pytest.mark.timeout(0.5)
def test_hangs():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    time.sleep(90)
""",
        grace=1,
    )
    assert done.returncode == 1
    assert "Timeout (0:00:01.5" in done.stderr
    assert "test_slow.py" in done.stderr
    assert "in test_hangs" in done.stderr
