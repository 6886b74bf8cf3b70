"""LSTM in Triton: a drop-in for torch.nn.LSTM, a C library, and a NumPy reference.

Names are imported on first use, so that ``import tritlstm.reference`` needs NumPy alone.
"""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .explanation import explain
    from .functional import lstm
    from .module import LSTM, LSTMCell, swap
    from .streaming import chunks
    from .tracing import plot_gates, trace

__all__ = ["LSTM", "LSTMCell", "__version__", "chunks", "explain", "lstm", "plot_gates", "swap", "trace"]

_HOME = {
    "LSTM": "module",
    "LSTMCell": "module",
    "swap": "module",
    "lstm": "functional",
    "explain": "explanation",
    "chunks": "streaming",
    "trace": "tracing",
    "plot_gates": "tracing",
}
_SUBMODULES = frozenset({"capi", "convert", "emulator", "functional", "kernels", "ops", "plan", "reference"})

# The three folders beside this one become subpackages when setuptools installs them; in a bare source tree
# they are missing, and the first import of a kernel would fail without saying why.
_missing = [
    name for name in ("tritlstm.kernels", "tritlstm.capi", "tritlstm.benchmarks") if find_spec(name) is None
]
if _missing:
    raise ImportError(
        f"tritlstm was imported from {__path__[0]}, where {', '.join(_missing)} cannot "
        "be found: this is the source tree, not an installed package. "
        "Run `pip install -e .` beside its pyproject.toml (`make test` does it for you), "
        "or start Python from another directory to use the installed copy."
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
