"""libtritlstm on devices that do not exist: built against a stand-in driver, its launches run in the emulator."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import torch
from cffi import FFI
from torch import Tensor

from tritlstm import emulator
from tritlstm.capi import aot, build

HOSTS = Path(__file__).parent / "capi_hosts"
OK, ARGUMENT, UNSUPPORTED, OVERFLOW, MEMORY = range(5)
BUFFER, STATE, UNAVAILABLE, DEVICE = range(8, 12)
INTERNAL = 13
CPU, CUDA = 1, 2
DTYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.float64: 4}
STANDIN = """
typedef struct standin_launched {
    const char *kernel; const void *image; size_t image_bytes; unsigned x, y, threads, shared; int cooperative;
    void *stream; size_t bytes; unsigned char parameters[512];
} standin_launched;
extern int standin_count, standin_major, standin_minor, standin_sms, standin_shared, standin_cooperative;
extern int standin_capturing, standin_rejecting;
extern int (*standin_launch)(const standin_launched *);
long standin_calls(void); const char *standin_call(long); long standin_launches(void);
const standin_launched *standin_launched_at(long); int standin_depth(void); void *standin_current(void);
void standin_push(void *); void standin_pop(void); int standin_arena(void); size_t standin_arena_bytes(void);
char *standin_base(void); void standin_forget(void); void standin_fail(long, long); int standin_live(void);
long standin_guards(uint64_t *, long);
void *standin_allocate(size_t); int standin_deallocate(void *);
"""

ffi = FFI()
ffi.cdef(build.declarations())
ffi.cdef(STANDIN)
NULL = ffi.NULL


class Failed(Exception):
    def __init__(self, status: int, message: str):
        super().__init__(f"{status}: {message}")
        self.status = status


def make_standin(path: Path, *flags: str) -> Path:
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", *flags, "-o", str(path)]
    subprocess.run([*command, str(HOSTS / "standin_libcuda.c"), "-lpthread"], check=True)
    return path


class World:
    """A library and its driver. ``built`` are its kernels."""

    def __init__(self, folder: Path, images: str):
        self.images = images
        self.folder = folder
        self.standin = make_standin(folder / "standin.so")
        self.driver = ffi.dlopen(str(self.standin))
        # A link: copies of the library are given another one, of a name as long.
        self.link = folder / "driver-0.so"
        self.link.symlink_to(self.standin)
        self.copies = 0
        command = f"""cc '-DTRITLSTM_LIBCUDA="{self.link}"'"""
        self.package = build.build(folder / "lib", command, "aot", images)
        self.library = self.package.library
        self.lib = ffi.dlopen(str(self.library))
        self.built = aot.compile_all(aot.parse(images), 1)
        self.codes = {
            (image.ptx + b"\0" if kernel.family == "ptx" else image.code): (kernel, image)
            for kernel, image in self.built
        }
        self.failures: list[BaseException] = []
        self.allocated: list[Any] = []
        self.ran: list[aot.Kernel] = []
        self._callback = ffi.callback("int(const standin_launched *)", self._launched)
        self.pretend()

    def pretend(self, major: int = 9, minor: int = 0, sms: int = 4, shared: int = 227 << 10, **other: int) -> None:
        """Another device, and no arrays; a handle that exists keeps its own. Launches run in the emulator."""
        settings = {"major": major, "minor": minor, "sms": sms, "shared": shared, "count": 1, "cooperative": 1}
        for name, value in {**settings, **other}.items():
            setattr(self.driver, f"standin_{name}", value)
        while self.allocated:
            assert self.driver.standin_deallocate(self.allocated.pop()) == 0
        self.driver.standin_capturing = self.driver.standin_rejecting = 0
        self.driver.standin_launch = self._callback
        self.driver.standin_fail(0, 0)
        self.ran.clear()

    def skip_launches(self) -> None:
        """From now on launches are noted, and nothing runs."""
        self.driver.standin_launch = NULL

    def fresh_library(self, driver: Path) -> Any:
        """The library as another process would find it, not used yet, on a machine with ``driver``."""
        self.copies += 1
        link = self.folder / f"driver-{self.copies}.so"
        link.symlink_to(driver)
        copy = self.folder / f"libtritlstm-{self.copies}.so"
        code = self.library.read_bytes()
        assert code.count(bytes(self.link)) > 0
        copy.write_bytes(code.replace(bytes(self.link), bytes(link)))
        return ffi.dlopen(str(copy))

    # -- launches ----------------------------------------------------------------------------------------------

    def _launched(self, launched: Any) -> int:
        try:
            self._run(launched)
        except BaseException as error:
            self.failures.append(error)
            return 719  # CUDA_ERROR_LAUNCH_FAILED
        return 0

    def kernel_of(self, launched: Any) -> tuple[aot.Kernel, aot.Image]:
        return self.codes[bytes(ffi.buffer(launched.image, launched.image_bytes))]

    def arguments_of(self, launched: Any) -> dict[str, int]:
        kernel, _ = self.kernel_of(launched)
        block = bytes(ffi.buffer(launched.parameters, launched.bytes))
        return {
            name: int.from_bytes(block[offset : offset + size], "little", signed=size == 4)
            for name, offset, size in aot.parameters(kernel.launch)
        }

    def _run(self, launched: Any) -> None:
        kernel, image = self.kernel_of(launched)
        launch = kernel.launch
        assert ffi.string(launched.kernel).decode() == launch.kernel
        assert (launched.threads, launched.shared) == (32 * launch.num_warps, image.shared_bytes)
        assert bool(launched.cooperative) == launch.cooperative
        given = aot.parameters(launch)
        end = max(offset + size for _, offset, size in given)
        assert launched.bytes == -(-end // 8) * 8 + 16
        assert bytes(ffi.buffer(launched.parameters, launched.bytes))[end:].strip(b"\0") == b""
        base = int(ffi.cast("uintptr_t", self.driver.standin_base()))
        arguments: dict[str, Any] = {}
        for name, value in self.arguments_of(launched).items():
            like = launch.arguments.get(name)
            if isinstance(like, Tensor):
                if launch.kernel not in aot.ANY_ALIGNMENT:
                    assert value % 16 == 0, f"{launch.kernel} promises an alignment that {name} lacks"
                arguments[name] = ("tensor", value - base if value else 0, str(like.dtype).removeprefix("torch."))
            else:
                arguments[name] = ("value", value)
        arguments.update({name: ("value", None) for name, value in launch.arguments.items() if value is None})
        for position, hints in aot.signature(launch)[2].items():
            name = list(aot.signature(launch)[0])[position[0]]
            if arguments[name][0] == "value":
                assert arguments[name][1] % hints[0][1] == 0, f"{launch.kernel}: {name}={arguments[name][1]}"
        guards = ffi.new("uint64_t[5000]")
        count = self.driver.standin_guards(guards, 5000)
        emulation = emulator.Emulation(timeout_s=60.0)
        request = {
            "arena": f"/proc/{os.getpid()}/fd/{self.driver.standin_arena()}",
            "size": self.driver.standin_arena_bytes(),
            "guards": list(guards[0:count]),
            "kernel": launch.kernel,
            "grid": (launched.x, launched.y),
            "cluster": (1, 0, 0, 0),  # none
            "arguments": arguments,
            "constants": launch.constants,
            "emulation": dataclasses.asdict(emulation),
            "serial": not launch.cooperative,
        }
        answer = emulator._get_worker().call(request, emulation.timeout_s)
        if answer["errors"]:
            raise emulator.EmulationError(f"{launch.kernel} {launch.constants}: " + "; ".join(answer["errors"]))
        self.ran.append(kernel)

    # -- memory ------------------------------------------------------------------------------------------------

    def empty(self, *shape: int, dtype: torch.dtype, offset: int = 0) -> Tensor:
        """Device memory of NaN, ``offset`` bytes after a multiple of 256."""
        bytes_ = math.prod(shape) * dtype.itemsize
        at = self.driver.standin_allocate(bytes_ + offset)
        assert at != NULL, "the stand-in's memory is used up"
        self.allocated.append(at)
        buffer = ffi.buffer(ffi.cast("char *", at) + offset, bytes_)
        return torch.frombuffer(buffer, dtype=dtype).view(shape)

    def put(self, value: Tensor | None, offset: int = 0) -> Tensor | None:
        """A copy in device memory."""
        if value is None:
            return None
        there = self.empty(*value.shape, dtype=value.dtype, offset=offset)
        return there.copy_(value)

    # -- the library -------------------------------------------------------------------------------------------

    def error(self) -> str:
        return ffi.string(self.lib.tritlstm_last_error()).decode()

    def call(self, name: str, *args: Any) -> None:
        status = getattr(self.lib, f"tritlstm_{name}")(*args)
        if self.failures:
            raise self.failures.pop()
        if status != OK:
            raise Failed(status, self.error())

    def struct(self, type_: str, **members: Any) -> Any:
        value = ffi.new(f"tritlstm_{type_} *")
        assert getattr(self.lib, f"tritlstm_{type_}_init")(value, ffi.sizeof(value[0])) == OK
        for name, member in members.items():
            setattr(value, name, member)
        return value

    def create(self, weights: list[Tensor] | None = None, **options: Any) -> Any:
        handle = ffi.new("tritlstm **")
        given = self.struct("options", device=CUDA, **options)
        self.call("create", given, NULL if weights is None else pointers(weights), handle)
        return ffi.gc(handle[0], self.lib.tritlstm_destroy)

    def sizes(self, lstm: Any, steps: int, batch: int, training: int) -> tuple[int, int]:
        sizes = ffi.new("size_t[2]")
        self.call("sizes", lstm, steps, batch, training, sizes, sizes + 1)
        return sizes[0], sizes[1]

    def explain(self, lstm: Any, steps: int, batch: int, training: int) -> str:
        text = ffi.new("char[4096]")
        self.call("explain", lstm, steps, batch, training, text, 4096, NULL)
        return ffi.string(text).decode()


def pointer(value: Tensor | None) -> Any:
    return NULL if value is None else ffi.cast("void *", value.data_ptr())


def pointers(values: list[Tensor | None]) -> Any:
    return ffi.new("void *[]", [pointer(value) for value in values])
