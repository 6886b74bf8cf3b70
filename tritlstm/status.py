"""What a kernel that gave up waiting has reported, and the error made of it.

The record lies in memory that the host reads without waiting for the GPU, so a time-out surfaces as an
exception at the next call; the launch that failed has filled its results with NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import emulator
from .kernels import exchange

__all__ = ["ExchangeTimeout", "check", "of"]

WORDS = exchange.STATUS_WORDS.value
_records: dict[torch.device, Tensor] = {}


class ExchangeTimeout(RuntimeError):
    """A thread block waited for another one longer than the bound of its spin."""


def of(device: torch.device) -> Tensor:
    """The status record of a device: int32 ``[code, block, group, step]``, zero while all is well."""
    found = _records.get(device)
    if found is not None:
        return found
    if device.type != "cuda":
        return _zeros()
    if device.index is None:
        return of(torch.device("cuda", torch.cuda.current_device()))
    # It outlives this call: in inference mode it could not be cleared by a later one outside.
    with torch.inference_mode(False):
        return _records.setdefault(device, _zeros().pin_memory())


def _zeros() -> Tensor:
    # On the host, whatever torch's default device is.
    return torch.zeros(WORDS, dtype=torch.int32, device="cpu")


def check(record: Tensor) -> None:
    """Raises :class:`ExchangeTimeout` if a kernel has reported since the last check, and clears the record."""
    code, block, group, step = record.tolist()
    if code == 0:
        return
    record.zero_()
    where = "in the emulator" if emulator.active() else "on the GPU"
    raise ExchangeTimeout(
        f"an LSTM kernel {where} gave up waiting at step {step} (block {block} of group {group}): another thread "
        "block of the same launch did not deliver its part. The results of that launch are NaN. A debugger, "
        "a preempted GPU or a fault in another kernel can cause this; run the step again, and report it if it stays."
    )
