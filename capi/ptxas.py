"""ptxas, made to give the same machine code in every build.

What ptxas makes of some kernels depends on where its data lies in memory, and so on address randomisation, on the
length of its own path and of its files' names. :func:`steady` has Triton run it with ``src/ptxas_heap.c`` in place of
the C library's allocator, with fixed names and an empty environment (``ptxas_run.py``). kernels/README.md has what was
tried.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .build import SOURCE, WARNINGS, compiler

__all__ = ["steady"]

HEAP = SOURCE / "src" / "ptxas_heap.c"
RUN = SOURCE / "ptxas_run.py"
#: Triton's names of the tools, and the variables that replace them.
TOOLS = {"ptxas": "TRITON_PTXAS_PATH", "ptxas_blackwell": "TRITON_PTXAS_BLACKWELL_PATH"}


class _Unsteady(Exception):
    """Why it can't be done here."""


@contextlib.contextmanager
def steady(cc: str | None = None) -> Iterator[str | None]:
    """While it is open, this process and those it starts compile kernels with ptxas made steady.

    What they compile is cached apart from what ptxas alone made. ``cc`` is the C compiler as a command line; where
    that is for another machine, ``cc`` of this one is taken.

    Yields:
        None, or why it can't be done here: then nothing is changed, and two builds may differ.
    """
    with tempfile.TemporaryDirectory(prefix="tritlstm-ptxas-") as folder:
        try:
            variables = _prepare(Path(folder), cc)
        except _Unsteady as reason:
            yield str(reason)
            return
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield None
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _prepare(folder: Path, cc: str | None) -> dict[str, str]:
    """Builds the allocator and a command in place of each tool; returns the environment that has them used."""
    import triton

    tools = {name: getattr(triton.knobs.nvidia, name).path for name in TOOLS if hasattr(triton.knobs.nvidia, name)}
    heap = _heap(folder, cc, list(tools.values()))
    variables = {}
    for name, tool in tools.items():
        command = folder / name
        words = shlex.join([sys.executable or "python3", "-I", "-S", str(RUN), tool, str(heap)])
        command.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        command.chmod(0o700)
        try:
            subprocess.run([command, "--version"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise _Unsteady(f"{command} can't be run: {error}; set TMPDIR to a folder where programs may run") from None
        variables[TOOLS[name]] = str(command)
    recipe = hashlib.sha256(HEAP.read_bytes() + RUN.read_bytes()).hexdigest()[:16]
    return {**variables, "TRITON_CACHE_DIR": str(Path(triton.knobs.cache.dir) / f"tritlstm-{recipe}")}


def _heap(folder: Path, cc: str | None, tools: list[str]) -> Path:
    """The allocator as a library that each of ``tools`` is seen to use."""
    heap = folder / "heap.so"
    # Without -fno-builtin a compiler makes calloc out of calloc's own malloc and memset.
    options = ["-std=c11", "-O2", "-fPIC", "-shared", "-fno-builtin", *WARNINGS, str(HEAP), "-o", str(heap)]
    reasons = []
    for command in dict.fromkeys((shlex.join(compiler(cc)), "cc")):
        if shutil.which(shlex.split(command)[0]) is None:
            continue
        done = subprocess.run([*shlex.split(command), *options], capture_output=True, text=True, check=False)
        if done.returncode:
            reasons.append(f"{command} can't compile {HEAP.name}: {done.stderr.strip()}")
            continue
        for tool in tools:
            # By a relative path: a space would end it.
            environment = {"LD_PRELOAD": f"./{heap.name}", "PTXAS_HEAP_TELLS": "1"}
            tried = subprocess.run(
                [tool, "--version"], capture_output=True, text=True, check=False, env=environment, cwd=folder
            )
            if tried.returncode or "ptxas_heap in use" not in tried.stderr:
                said = tried.stderr.strip() or "it was not loaded"
                reasons.append(f"{tool} does not run with {HEAP.name} by {command}: {said}")
                break
        else:
            return heap
    raise _Unsteady("; ".join(reasons))
