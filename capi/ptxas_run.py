"""What :mod:`tritlstm.capi.ptxas` has Triton run as ptxas: a program of its own, which starts in some ms.

Arguments: the true ptxas, the allocator to load before it, and what Triton gives. Everything that ptxas could notice,
its own name, those of its files, its environment, is the same in every run.
"""

from __future__ import annotations

import os
import shutil
import sys


def main(tool: str, heap: str, *arguments: str) -> int:
    if arguments[-2:-1] != ("-o",):
        os.execv(tool, [tool, *arguments])
    *options, source, _, target = arguments
    environment = {"LD_PRELOAD": "./heap.so"}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    folder = os.path.abspath(source) + ".d"  # the source's name is Triton's own for this run
    target = os.path.abspath(target)
    os.mkdir(folder)
    try:
        os.symlink(os.path.abspath(source), f"{folder}/kernel.ptx")
        os.symlink(heap, f"{folder}/heap.so")
        os.chdir(folder)
        words = ["ptxas", *options, "kernel.ptx", "-o", "kernel.cubin"]
        _, status = os.waitpid(os.posix_spawn(tool, words, environment), 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            shutil.copyfile("kernel.cubin", target)
        return code if code >= 0 else 128 - code
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
