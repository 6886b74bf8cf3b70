"""What one kernel launch is: the same description is run on a GPU, emulated, or cross-compiled."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

KERNELS = {
    "gate_gemm": "gate_gemm",
    "recurrent_forward": "recurrent_forward",
    "recurrent_backward": "recurrent_backward",
}


def kernel_function(name: str) -> Any:
    """The ``triton.jit`` function called ``name`` (each lives in the module of its own name)."""
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

    def options(self, backend: str) -> dict[str, int]:
        """Compiler options for a Triton backend, ``'cuda'`` or ``'hip'``."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if backend == "cuda":
            # Told nothing, ptxas aims at two blocks a multiprocessor and spills for it; here one fills it.
            options["maxnreg"] = min(255, 65536 // (32 * self.num_warps))
        return options

    def run(self) -> None:
        """Launches on the current CUDA device and stream."""
        import torch

        options: dict[str, Any] = dict(self.options("hip" if torch.version.hip else "cuda"))
        if self.cooperative:
            options["launch_cooperative_grid"] = True
        kernel_function(self.kernel)[self.grid](**self.arguments, **self.constants, **options)
