"""What an import of tritlstm brings with it, each in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import tritlstm


def run(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imported_after(statement: str, cwd: Path) -> set[str]:
    return set(
        run(
            f"import sys\n{statement}\nprint(*sorted({{m.partition('.')[0] for m in sys.modules}}))", cwd
        ).split()
    )


def test_the_reference_imports_neither_torch_nor_triton(tmp_path):
    modules = imported_after("import tritlstm.reference", tmp_path)
    assert "numpy" in modules
    assert not modules & {"torch", "triton", "cffi", "safetensors", "matplotlib", "rich"}


def test_the_package_itself_imports_no_dependency(tmp_path):
    modules = imported_after("import tritlstm; tritlstm.__version__; dir(tritlstm)", tmp_path)
    assert not modules & {"numpy", "torch", "triton", "cffi", "safetensors", "matplotlib", "rich"}


def test_the_reference_works_where_torch_and_triton_cannot_be_imported(tmp_path):
    code = """
import sys
sys.modules["torch"] = sys.modules["triton"] = None  # makes their import raise
from tritlstm import reference
trace = reference.forward([[[1.0]]], [[1.0]] * 4, [[1.0]] * 4)
print(trace.h.item(), reference.backward(trace, grad_h_n=[[1.0]]).x.item())
"""
    h, dx = map(float, run(code, tmp_path).split())
    assert h == pytest.approx(0.3696063529, abs=1e-9)
    assert dx > 0


def test_unknown_names_raise_attribute_error():
    with pytest.raises(AttributeError, match="module 'tritlstm' has no attribute 'GRU'"):
        tritlstm.GRU  # noqa: B018


def test_every_listed_name_resolves(tmp_path):
    """In a fresh interpreter, so that no other test has imported it before."""
    code = "import tritlstm\nprint(*(type(getattr(tritlstm, name)).__name__ for name in tritlstm.__all__))"
    assert len(run(code, tmp_path).split()) == len(tritlstm.__all__)


def test_dir_lists_what_can_be_had():
    assert set(tritlstm.__all__) <= set(dir(tritlstm))
    assert {"reference", "functional", "emulator"} <= set(dir(tritlstm))
