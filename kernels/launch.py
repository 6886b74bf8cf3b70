"""What one kernel launch is: the same description is run on a GPU, emulated, or cross-compiled."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.compiler import make_backend
from triton.runtime import driver

#: The module of each kernel.
KERNELS = {
    "gate_gemm": "gate_gemm",
    "one_step": "one_step",
    "narrow": "narrow",
    "round_weights": "rounding",
    "recurrent_forward": "recurrent_forward",
    "recurrent_backward": "recurrent_backward",
    "product": "product",
    "column_sums": "product",
    "rearrange": "rearrange",
    "take_first": "rearrange",
    "add_first": "rearrange",
    "previous_states": "rearrange",
    "keep_empty": "rearrange",
    "zero_ends": "rearrange",
    "clamp_lengths": "rearrange",
}


#: Tritons in which the end of ``JITFunction.run`` was read, and is what :meth:`Launch._run_compiled` does.
DIRECT = ((3, 6), (3, 7), (3, 8), (3, 9))
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])


@functools.cache
def kernel_function(name: str) -> Any:
    """The ``triton.jit`` function called ``name``."""
    return getattr(importlib.import_module(f"{__package__}.{KERNELS[name]}"), name)


@functools.cache
def _launches_directly() -> bool:
    # On AMD GPUs Triton also specializes on the size of a tensor.
    return TRITON in DIRECT and driver.active.get_current_target().backend == "cuda"


def _watched(kernel: str) -> bool:
    """Whether something wants to see a launch, or to change how it is compiled: that is left to Triton."""
    if kernel_function(kernel).pre_run_hooks:
        return True
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):  # of a chain, which may be empty
            return True
    return bool(
        runtime.add_stages_inspection_hook is not None or runtime.debug or knobs.compilation.instrumentation_mode
    )


def _make_cluster(kernel: Any, blocks: int, more_bytes: int) -> None:
    """Has a kernel that was compiled for single blocks, and has not run yet, launched in clusters of them.

    Triton would give a cluster to a program (``num_ctas``); here each of its blocks is one, and PTX does the rest.
    """
    if kernel is None or kernel.metadata.num_ctas == blocks:
        return
    shared = -(-kernel.metadata.shared // 128) * 128 + more_bytes
    kernel.metadata = kernel.metadata._replace(num_ctas=blocks, shared=shared)
    backend = make_backend(kernel.metadata.target)
    kernel.packed_metadata = backend.pack_metadata(kernel.metadata)


class Compiled(dict[Any, Any]):
    """Kernels that Triton compiled for the same constants and options, by all else that it compiles for."""

    def __reduce__(self) -> Any:  # they stay in their process
        return Compiled, ()


# Frozen, it would take three times as long to make, in every launch.
@dataclasses.dataclass(slots=True)
class Launch:
    """One launch of a kernel, which is not changed any more.

    ``arguments`` are tensors, ints or None by parameter name; ``constants`` are the constexpr parameters.
    ``cooperative`` asks the driver to refuse a grid that cannot be resident at once, instead of hanging in
    it.
    """

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int = 1
    cooperative: bool = False
    max_registers: int | None = None  # a thread, NVIDIA only
    #: Blocks of a thread-block cluster, neighbours in the grid's first dimension, and bytes of shared memory that each
    #: has behind what the compiler uses, for ``exchange.cluster_memory``.
    cluster: int = 1
    cluster_bytes: int = 0
    #: Kept by whoever launches the same constants and options again and again; without it, Triton looks up each launch.
    compiled: Compiled | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def options(self) -> dict[str, int]:
        """Compiler options."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options

    @property
    def _choices(self) -> tuple[Any, ...]:
        own = self.cluster, self.cluster_bytes
        return self.kernel, self.num_warps, self.num_stages, self.cooperative, self.max_registers, own

    def run(self) -> None:
        """Launches on the current CUDA device and stream."""
        if self.compiled is None or not _launches_directly() or _watched(self.kernel):
            self._run_jit()
        else:
            self._run_compiled(self.compiled)

    def _run_jit(self) -> Any:
        options: dict[str, Any] = dict(self.options)
        if self.cooperative:
            options["launch_cooperative_grid"] = True
        function = kernel_function(self.kernel)
        if self.cluster > 1:
            kernel = function.warmup(**self.arguments, **self.constants, grid=self.grid, **options)
            _make_cluster(kernel, self.cluster, self.cluster_bytes)
        grid = (self.grid[0] // self.cluster, *self.grid[1:])  # in clusters, as Triton's launcher counts it
        return function[grid](**self.arguments, **self.constants, **options)

    def _run_compiled(self, compiled: Compiled) -> None:
        """As Triton launches, without its look-up by all arguments, which takes longer than a short kernel."""
        arguments = self.arguments
        names = tuple(arguments)
        form = compiled.get(names)
        if form is None:
            form = _Form.of(self)
            if form is None:
                self._run_jit()  # says which argument it does not know
                return
            compiled[names] = form
        if form.constants is not self.constants or form.choices != self._choices:  # a changed copy of a launch
            self._run_jit()
            return
        given, values = [*arguments.values()], form.defaults.copy()
        device = driver.active.get_current_device()
        key: list[Any] = [device]
        unaligned = wide = 0
        for k, place in form.pointers:
            value = given[k]
            if value is None:
                key.append(None)
            else:
                key.append(value.dtype)
                value = value.data_ptr()  # as a number it need not be looked up
                if value & 15:
                    unaligned |= 1 << place
            values[place] = value
        for k, place in form.numbers:
            values[place] = value = given[k]
            if not -0x80000000 <= value < 0x80000000:
                wide |= 1 << place  # an argument of 64 bits
        for k, place in form.on_host:
            values[place] = given[k]
        key += (unaligned, wide)
        kernel = form.kernels.get(tuple(key))
        if kernel is None:
            kernel = self._run_jit()
            if kernel is not None:  # a hook may keep Triton from compiling
                form.kernels[tuple(key)] = kernel
            return
        x, y, z = (*self.grid, 1, 1)[:3]
        stream = driver.active.get_current_stream(device)
        kernel.run(x // self.cluster, y, z, stream, kernel.function, kernel.packed_metadata, None, None, None, *values)


class _Form(NamedTuple):
    """What launches with arguments of the same names have in common. Pairs say where an argument is given, and which
    parameter of the kernel it is."""

    constants: dict[str, Any]
    choices: tuple[Any, ...]
    defaults: list[Any]
    pointers: list[tuple[int, int]]  # or None
    numbers: list[tuple[int, int]]
    on_host: list[tuple[int, int]]  # pointers, which may have another address on the device
    kernels: dict[Any, Any]

    @classmethod
    def of(cls, launch: Launch) -> _Form | None:
        """None where the kernel has no parameter of some name."""
        parameters = kernel_function(launch.kernel).params
        places = {p.name: p.num for p in parameters if not p.is_constexpr}
        if not places.keys() >= launch.arguments.keys():
            return None
        defaults = [launch.constants.get(p.name, p.default) for p in parameters]
        pointers: list[tuple[int, int]] = []
        numbers: list[tuple[int, int]] = []
        on_host: list[tuple[int, int]] = []
        for k, (name, value) in enumerate(launch.arguments.items()):
            pair = (k, places[name])
            (numbers if type(value) is int else pointers).append(pair)
            if value is not None and type(value) is not int and not value.is_cuda:
                on_host.append(pair)
        return cls(launch.constants, launch._choices, defaults, pointers, numbers, on_host, {})
