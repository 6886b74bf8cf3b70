"""TF32 in the products that torch's library makes for a backward pass, where it is allowed for the LSTM.

``torch.nn.LSTM`` makes all its products as ``torch.backends.cudnn.rnn.fp32_precision`` says, where TF32 is allowed
unless someone forbids it. Those of ``torch.mm`` follow ``torch.backends.cuda.matmul``, where it is not. Both are set
for all threads of a process, so while a backward pass launches its products, those of other threads are of TF32 too.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from . import plan

__all__ = ["allowed", "of_backward"]

Function = TypeVar("Function", bound=Callable[..., Any])

_lock = threading.Lock()
_users = 0
_restore: Callable[[], None] | None = None


@contextlib.contextmanager
def allowed() -> Iterator[None]:
    """TF32 in torch's products on CUDA meanwhile, in whichever way torch was told before; nests, over threads too."""
    global _users, _restore
    with _lock:
        if _users == 0:
            _restore = _allow()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _restore is not None:
                _restore()
                _restore = None


def _allow() -> Callable[[], None] | None:
    """Allows it; returns what undoes that, or None if it was allowed."""
    matmul = torch.backends.cuda.matmul
    before = getattr(matmul, "fp32_precision", None)  # torch 2.9 and later
    try:
        legacy = matmul.allow_tf32
    except RuntimeError:  # fp32_precision was set apart from it, and torch reads that
        legacy = None
    if legacy is None:
        if before == "tf32":
            return None
        matmul.fp32_precision = "tf32"
        return functools.partial(setattr, matmul, "fp32_precision", before)
    if legacy:
        return None
    matmul.allow_tf32 = True  # sets fp32_precision too

    def undo() -> None:
        matmul.allow_tf32 = False
        if before is None:
            return
        # That left "ieee". "none" follows torch.backends.fp32_precision, which `before` may have come from.
        matmul.fp32_precision = "none"
        if matmul.fp32_precision != before:
            matmul.fp32_precision = before

    return undo


def of_backward(function: Function) -> Function:
    """A function of grad_out, grad_h_n, grad_c_n, x and more, whose products are as those of the kernels for ``x``."""

    @functools.wraps(function)
    def run(grad_out: Any, grad_h_n: Any, grad_c_n: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        if x.is_cuda and x.dtype == torch.float32 and plan.dot_precision(x) == "tf32":
            with allowed():
                return function(grad_out, grad_h_n, grad_c_n, x, *args, **options)
        return function(grad_out, grad_h_n, grad_c_n, x, *args, **options)

    return cast(Function, run)
