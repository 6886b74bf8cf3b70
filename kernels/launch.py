"""What one kernel launch is: the same description is run on a GPU, emulated, or cross-compiled."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

#: The module of each kernel.
KERNELS = {
    "gate_gemm": "gate_gemm",
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


def kernel_function(name: str) -> Any:
    """The ``triton.jit`` function called ``name``."""
    return getattr(importlib.import_module(f"{__package__}.{KERNELS[name]}"), name)


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

    @property
    def options(self) -> dict[str, int]:
        """Compiler options."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options

    def run(self) -> None:
        """Launches on the current CUDA device and stream."""
        options: dict[str, Any] = dict(self.options)
        if self.cooperative:
            options["launch_cooperative_grid"] = True
        kernel_function(self.kernel)[self.grid](**self.arguments, **self.constants, **options)
