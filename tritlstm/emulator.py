"""A parallel emulator for Triton kernels whose programs wait for each other.

Triton's interpreter runs the programs of a launch one after another, so a kernel that exchanges data between
programs never ends in it. Here each program is a process of its own over shared memory: loads, stores and
atomics are real and concurrent, and the exchange between thread blocks really happens. In addition

* ``tl.dot`` of bf16 multiplies the values (the interpreter multiplies their bit patterns);
* every buffer ends at an inaccessible page, so that an access past its end is an error, not a wrong number;
* ``delays`` sleep at random places, store tiles in two parts and so hunt for races;
* ``faults`` kill or stall one program, to see the others' bounded spins report it.

::

    with tritlstm.emulator.emulate(sms=4):
        out, (h_n, c_n) = tritlstm.LSTM(8, 16)(torch.randn(5, 3, 8))   # the Triton kernels, on a CPU

It is a testing tool: a step of a small layer takes milliseconds.
"""

from __future__ import annotations

import atexit
import contextlib
import contextvars
import ctypes
import dataclasses
import math
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from typing import Any

__all__ = ["Delays", "Emulation", "EmulationError", "Fault", "active", "current", "emulate", "run"]


class EmulationError(RuntimeError):
    """A program of an emulated launch failed: which one, and why."""


@dataclasses.dataclass(frozen=True)
class Delays:
    """Random scheduling: before a memory operation, sleep up to ``longest_s`` with ``probability``.

    A delayed store is made in two parts with the sleep between them, in random order of elements.
    """

    probability: float = 0.02
    longest_s: float = 0.002


@dataclasses.dataclass(frozen=True)
class Fault:
    """Kills (``kind='kill'``) or stops for good (``'stall'``) one program before its n-th store."""

    program: tuple[int, ...]  # its place in the grid
    store: int
    kind: str = "kill"


@dataclasses.dataclass(frozen=True)
class Emulation:
    """What :func:`emulate` was asked for."""

    sms: int = 4
    shared_bytes: int = 227 << 10
    seed: int | None = None
    delays: Delays | None = None
    fault: Fault | None = None
    spin_limit: int = 20_000
    timeout_s: float = 120.0
    tf32: bool = False
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)


_current: contextvars.ContextVar[Emulation | None] = contextvars.ContextVar("emulation", default=None)


def active() -> bool:
    """Whether CPU tensors run through the Triton kernels here."""
    return _current.get() is not None


def current() -> Emulation | None:
    """The innermost :func:`emulate`, or None."""
    return _current.get()


@contextlib.contextmanager
def emulate(
    sms: int = 4,
    seed: int | None = None,
    delays: Delays | None = None,
    *,
    shared_bytes: int = 227 << 10,
    fault: Fault | None = None,
    spin_limit: int = 20_000,
    timeout_s: float = 120.0,
    tf32: bool = False,
    **overrides: Any,
) -> Iterator[Emulation]:
    """Runs CPU tensors of fp32, fp16 and bf16 through the Triton kernels, in the parallel emulator.

    ``sms`` is how many thread blocks the pretended device holds at once, ``shared_bytes`` the shared memory
    of each. ``seed`` makes ``delays`` repeatable as far as the operating system's scheduling lets them be. With
    ``tf32``, fp32 is multiplied as TF32: of the operands only the upper 19 bits are read.
    ``overrides`` force fields of the plan, as in :func:`tritlstm.plan.plan` (``block_h=16``,
    ``protocol='counter'``, …).
    """
    emulation = Emulation(sms, shared_bytes, seed, delays, fault, spin_limit, timeout_s, tf32, overrides)
    token = _current.set(emulation)
    try:
        yield emulation
    finally:
        _current.reset(token)


# The worker imports Triton in interpreter mode, which is decided once a process, and forks a child a program.
# It never imports torch: forking after torch has started threads is not safe.


class _Worker:
    def __init__(self) -> None:
        self.connection, theirs = Pipe()
        fd = theirs.fileno()
        environment = dict(os.environ, TRITON_INTERPRET="1", OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tritlstm.emulator_worker", str(fd)],
            pass_fds=[fd],
            env=environment,
            start_new_session=True,  # Ctrl-C is the caller's; the worker ends with the pipe
        )
        theirs.close()

    def call(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        self.connection.send(request)
        if not self.connection.poll(timeout_s + 30.0):
            self.stop()
            raise EmulationError(f"the emulator's worker gave no answer within {timeout_s + 30.0:.0f} s")
        try:
            return self.connection.recv()
        except EOFError:
            self.stop()
            raise EmulationError("the emulator's worker process ended; its stderr says why") from None

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


_worker: _Worker | None = None


def _get_worker() -> _Worker:
    global _worker
    if _worker is None or _worker.process.poll() is not None:
        _worker = _Worker()
        atexit.register(_worker.stop)
    return _worker


class Arena:
    """Buffers in one shared mapping, each ending at an inaccessible page."""

    def __init__(self, sizes: list[int]) -> None:
        page = mmap.PAGESIZE
        self.offsets: list[int] = []
        self.guards: list[int] = [0]
        position = page
        for size in sizes:
            whole = -(-max(size, 1) // page) * page
            # The start stays 16-byte aligned, as on a GPU, so up to 15 bytes of slack remain before the
            # guard.
            self.offsets.append(position + (whole - size) // 16 * 16)
            position += whole
            self.guards.append(position)
            position += page
        self.size = position
        self.fd = os.memfd_create("tritlstm-emulator")
        os.ftruncate(self.fd, self.size)
        self.map = mmap.mmap(self.fd, self.size)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def close(self) -> None:
        os.close(self.fd)


def run(launch: Any) -> float:
    """Runs a :class:`tritlstm.kernels.launch.Launch` of CPU tensors; returns the seconds it took.

    Raises :class:`EmulationError` when a program raised, died or did not end, except the one of a
    :class:`Fault`.
    """
    import numpy as np
    import torch

    emulation = current()
    if emulation is None:
        raise EmulationError("emulator.run outside of emulator.emulate(); wrap the call in `with emulate():`")
    tensors = {name: value for name, value in launch.arguments.items() if isinstance(value, torch.Tensor)}
    by_storage: dict[int, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise EmulationError(f"argument {name!r} must be a contiguous CPU tensor, got {tensor.stride()}")
        by_storage.setdefault(tensor.data_ptr(), tensor)
        if by_storage[tensor.data_ptr()].nbytes < tensor.nbytes:
            by_storage[tensor.data_ptr()] = tensor
    programs = math.prod(launch.grid) if launch.cluster > 1 else 0
    beside = [programs * launch.cluster_bytes, programs * 4]  # shared memory of blocks, and their meetings
    arena = Arena([*(tensor.nbytes for tensor in by_storage.values()), *beside])
    try:
        offsets = dict(zip(by_storage, arena.offsets, strict=False))
        # What lies in it at first may be anything, such as the number of a turn.
        np.frombuffer(arena.map, np.uint32, beside[0] // 4, arena.offsets[-2])[:] = 1
        for key, tensor in by_storage.items():
            if tensor.nbytes:
                ctypes.memmove(arena.address + offsets[key], tensor.data_ptr(), tensor.nbytes)
        arguments: dict[str, Any] = {}
        for name, value in launch.arguments.items():
            if isinstance(value, torch.Tensor):
                arguments[name] = (
                    "tensor",
                    offsets[value.data_ptr()],
                    str(value.dtype).removeprefix("torch."),
                )
            else:
                arguments[name] = ("value", value)
        request = {
            "arena": f"/proc/{os.getpid()}/fd/{arena.fd}",
            "size": arena.size,
            "guards": arena.guards,
            "kernel": launch.kernel,
            "grid": launch.grid,
            "cluster": (launch.cluster, launch.cluster_bytes, *arena.offsets[-2:]),
            "arguments": arguments,
            "constants": launch.constants,
            "emulation": dataclasses.asdict(emulation),
        }
        begin = time.perf_counter()
        answer = _get_worker().call(request, emulation.timeout_s)
        elapsed = time.perf_counter() - begin
        for key, tensor in by_storage.items():
            if tensor.nbytes:
                ctypes.memmove(tensor.data_ptr(), arena.address + offsets[key], tensor.nbytes)
    finally:
        arena.close()
    if answer["errors"]:
        raise EmulationError(f"{launch.kernel} over grid {launch.grid}: " + "; ".join(answer["errors"]))
    return elapsed
