"""`tritlstm info`: what is installed here, and which path an LSTM takes."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import shutil
import subprocess
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("tritlstm", "torch", "triton", "numpy", "safetensors", "cffi", "matplotlib", "rich")

HEADERS_REMEDY = (
    f"Debian and Ubuntu: apt install python{sysconfig.get_python_version()}-dev; "
    "Fedora: dnf install python3-devel"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(args: argparse.Namespace) -> int:
    facts = collect()
    if args.json:
        print(json.dumps(facts, indent=1))
        return 0
    print(f"python      {facts['python']}")
    for name, version in facts["versions"].items():
        print(f"{name:11s} {version or f'not installed: pip install {name}'}")
    print(f"system      {facts['system']}, {facts['cpus']} CPUs")
    for device in facts["devices"]:
        print(
            f"device      {device['name']}, {device['capability']}, {device['processors']} multiprocessors, "
            f"{device['memory_gib']} GiB"
        )
    if not facts["devices"]:
        print(f"device      no GPU: {facts['no_device']}")
    print(f"compiler    {facts['compiler'] or 'none: build-c needs one; apt install build-essential'}")
    print(f"Python.h    {facts['python_headers'] or f'none: build-c needs it; {HEADERS_REMEDY}'}")
    print(f"path        {facts['path']}")
    return 0


def collect() -> dict[str, Any]:
    """All facts as a JSON-able dictionary; what is missing is None."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "compiler": _compiler(),
        "python_headers": python_headers(),
    }
    facts["devices"], facts["no_device"] = _devices()
    if facts["devices"]:
        facts["path"] = (
            "CUDA tensors of float16, bfloat16 and float32: the Triton kernels; "
            "CPU tensors and float64: torch's own LSTM. tritlstm.explain(module, input) says more"
        )
    else:
        facts["path"] = (
            "torch's own LSTM on the CPU, or what trains faster there; the Triton kernels run on a GPU, or in "
            "tritlstm.emulator"
        )
    return facts


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> tuple[list[dict[str, Any]], str]:
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError as error:
        return [], f"torch cannot be imported ({error})"
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        if torch.version.hip:
            capability = properties.gcnArchName.partition(":")[0]
        else:
            capability = f"sm_{properties.major}{properties.minor}"
        devices.append(
            {
                "name": properties.name,
                "capability": capability,
                "processors": properties.multi_processor_count,
                "memory_gib": round(properties.total_memory / 2**30),
            }
        )
    built = "for the CPU only" if not torch.backends.cuda.is_built() else "for GPUs, but it finds none"
    return devices, f"torch {torch.__version__} is built {built}"


def _compiler() -> str | None:
    """The first line of the C compiler's --version, with its path."""
    found = shutil.which(os.environ.get("CC") or "cc")
    if found is None:
        return None
    done = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    return f"{found}: {(done.stdout.splitlines() or ['?'])[0]}"


def python_headers() -> str | None:
    """The folder of Python.h, None where it is missing."""
    folder = sysconfig.get_path("include")
    return folder if Path(folder, "Python.h").is_file() else None
