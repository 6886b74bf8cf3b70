"""`.ci/carry`: a wheel packed anew has what an installation needs, and installs."""

from __future__ import annotations

import csv
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / ".ci" / "carry"


@pytest.fixture
def carry() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("carry", str(SCRIPT))
    spec = importlib.util.spec_from_loader("carry", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_a_repacked_wheel_is_smaller_and_installs(carry, tmp_path):
    source = tmp_path / "a.c"
    source.write_text("int answer(void) { return 42; }\n")
    shared = tmp_path / "a.so"
    subprocess.run([os.environ.get("CC", "cc"), "-g", "-shared", "-fPIC", "-o", shared, source], check=True)
    info = "triton-1.0.dist-info"
    files = {
        "triton/__init__.py": b"import pathlib\nHERE = pathlib.Path(__file__).parent\n" + b"# the same\n" * 1000,
        "triton/_C/libtriton.so": shared.read_bytes(),
        "triton/_C/libproton.so": shared.read_bytes(),
        "triton/backends/nvidia/bin/ptxas": b"#!/bin/sh\necho assembled\n",
        "triton/backends/nvidia/lib/cupti/libcupti.so": b"left out, so never stripped",
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: triton\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-any\n",
        f"{info}/RECORD": b"an old one\n",
    }
    wheel, packed = tmp_path / "triton-1.0-py3-none-any.whl", tmp_path / "packed" / "triton-1.0-py3-none-any.whl"
    packed.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    carry.repack(wheel, packed)
    assert packed.stat().st_size < wheel.stat().st_size / 2

    with zipfile.ZipFile(packed) as archive:
        names = set(archive.namelist())
        rows = {row[0]: row[1:] for row in csv.reader(archive.read(f"{info}/RECORD").decode().splitlines())}
        sizes = {name: len(archive.read(name)) for name in names}
    assert names == set(files) - {"triton/_C/libproton.so", "triton/backends/nvidia/lib/cupti/libcupti.so"}
    assert rows.keys() == names
    assert all(rows[name][1] == str(sizes[name]) for name in names - {f"{info}/RECORD"})
    assert sizes["triton/_C/libtriton.so"] < len(files["triton/_C/libtriton.so"])  # stripped

    site = tmp_path / "site"
    install = ["install", "--quiet", "--no-index", "--no-deps", "--target", site, packed]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True)
    code = "import triton, ctypes; print(ctypes.CDLL(triton.HERE / '_C' / 'libtriton.so').answer())"
    paths = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], env=paths, capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"
    assembler = site / "triton/backends/nvidia/bin/ptxas"
    assert subprocess.run([assembler], capture_output=True, text=True, check=True).stdout == "assembled\n"
