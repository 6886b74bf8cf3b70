"""LSTM in Triton: a drop-in for torch.nn.LSTM, a C library, and a NumPy reference.

Names are imported on first use, so that ``import tritlstm.reference`` needs NumPy alone.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .functional import lstm
    from .module import LSTM, LSTMCell, swap
    from .plan import explain

__all__ = ["LSTM", "LSTMCell", "__version__", "explain", "lstm", "swap"]

_HOME = {
    "LSTM": "module",
    "LSTMCell": "module",
    "swap": "module",
    "lstm": "functional",
    "explain": "plan",
}
_SUBMODULES = frozenset(
    {
        "benchmarks",
        "capi",
        "cli",
        "demo",
        "emulator",
        "functional",
        "kernels",
        "layer",
        "module",
        "ops",
        "plan",
        "reference",
    }
)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module 'tritlstm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
