"""What one kernel launch is: the same description is run on a GPU, emulated, or cross-compiled."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any

import triton
from triton import knobs
from triton.runtime import driver

#: The module of each kernel.
KERNELS = {
    "gate_gemm": "gate_gemm",
    "one_step": "one_step",
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


class Compiled(dict[Any, Any]):
    """Kernels that Triton compiled for the same constants and options, by all else that it compiles for."""

    def __reduce__(self) -> Any:  # they stay in their process
        return Compiled, ()


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

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
        return self.kernel, self.num_warps, self.num_stages, self.cooperative, self.max_registers

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
        return kernel_function(self.kernel)[self.grid](**self.arguments, **self.constants, **options)

    def _run_compiled(self, compiled: Compiled) -> None:
        """As Triton launches, without its look-up by all arguments, which takes longer than a short kernel."""
        names = tuple(self.arguments)
        found = compiled.get(names)
        if found is None:
            parameters = kernel_function(self.kernel).params
            places = {p.name: p.num for p in parameters if not p.is_constexpr}
            defaults = [self.constants.get(p.name, p.default) for p in parameters]
            known = [places.get(name) for name in names]
            if None in known:
                self._run_jit()  # says which one it does not know
                return
            own: dict[Any, Any] = {}
            found = compiled[names] = (self.constants, self._choices, defaults, known, own)
        constants, choices, defaults, known, kernels = found
        if constants is not self.constants or choices != self._choices:  # a changed copy of a launch
            self._run_jit()
            return
        values, unaligned, wide = defaults.copy(), 0, 0
        device = driver.active.get_current_device()
        key: list[Any] = [device]
        for place, value in zip(known, self.arguments.values(), strict=True):
            if type(value) is int:
                if not -0x80000000 <= value < 0x80000000:
                    wide |= 1 << place  # an argument of 64 bits
            elif value is None:
                key.append(None)
            else:
                pointer = value.data_ptr()
                if pointer & 15:
                    unaligned |= 1 << place
                key.append(value.dtype)
                # As a number it need not be looked up. Memory of the host may have another address on the device.
                value = pointer if value.is_cuda else value
            values[place] = value
        key += (unaligned, wide)
        kernel = kernels.get(tuple(key))
        if kernel is None:
            kernel = self._run_jit()
            if kernel is not None:  # a hook may keep Triton from compiling
                kernels[tuple(key)] = kernel
            return
        x, y, z = (*self.grid, 1, 1)[:3]
        stream = driver.active.get_current_stream(device)
        kernel.run(x, y, z, stream, kernel.function, kernel.packed_metadata, None, None, None, *values)
