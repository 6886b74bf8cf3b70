"""Truncated backpropagation through time: a long stream chunk by chunk, with the state carried and its gradient cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .variants import Resets, resets_tensor

__all__ = ["Chunks", "chunks"]


class Chunks:
    """What `chunks` returns; iterate over it."""

    def __init__(self, module: nn.Module, stream: Tensor, length: int, state: Any, resets: Tensor | None) -> None:
        self.module, self.stream, self.length, self.resets = module, stream, length, resets
        self.start = _detached(state)
        #: The state behind the chunks so far, without a gradient; None before the first where none was given.
        self.state = self.start

    def __iter__(self) -> Iterator[tuple[Tensor, slice]]:
        self.state = self.start
        time = 1 if self.stream.dim() == 3 and getattr(self.module, "batch_first", False) else 0
        steps = self.stream.size(time)
        for begin in range(0, steps, self.length):
            part = slice(begin, min(begin + self.length, steps))
            where = (slice(None),) * time + (part,)
            given = {} if self.resets is None else {"resets": self.resets[where]}
            out, state = self.module(self.stream[where], self.state, **given)
            self.state = _detached(state)
            yield out, part


def chunks(
    module: nn.Module, stream: Tensor, length: int, hx: Any = None, *, resets: Resets | None = None
) -> Chunks:
    """Runs ``module`` over ``stream`` in chunks of time, each from the state that the one before left.

    No gradient flows from a chunk into the one before, so each can be differentiated as soon as it comes and memory
    holds one chunk. Weights that an optimizer changes between two chunks count from the next one on.

    Args:
        module: a `tritlstm.LSTM` or `torch.nn.LSTM` of one direction.
        stream: [T, B, D], [B, T, D] if the module is ``batch_first``, or [T, D].
        length: time steps of a chunk, at least 1; the last may be shorter.
        hx: the state before the first step, as the module takes it; None for zeros.
        resets: bool, for the whole stream, as a `tritlstm.LSTM` takes them.

    Returns:
        An iterable of (output of a chunk, slice of its time steps). Its attribute ``state`` is the state so far,
        detached; give it as ``hx`` for the stream that follows. Iterated again, it starts again from ``hx``.

    Raises:
        ValueError: ``length`` is not positive, or the module is bidirectional.

    Source: Williams & Peng (1990).

    Example:
        >>> run = tritlstm.chunks(tritlstm.LSTM(8, 16), torch.randn(100, 4, 8), 25)
        >>> for out, part in run:
        ...     out.square().mean().backward()
        >>> h, c = run.state
    """
    if length < 1:
        raise ValueError(f"chunks must have at least one time step, got length={length}")
    if getattr(module, "bidirectional", False):
        raise ValueError(
            "chunks go from a stream's start to its end, but the reverse direction begins at the stream's end, got a "
            "module with bidirectional=True; run it on the whole stream, or take one of one direction"
        )
    return Chunks(module, stream, length, hx, None if resets is None else resets_tensor(resets, stream.device))


def _detached(state: Any) -> Any:
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state.detach()
    return type(state)(_detached(part) for part in state)
