"""Tensors of a case: weights, inputs, states, lengths, resets and the gradient that comes in."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Case

TORCH_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}


@dataclass
class Inputs:
    """What a provider is called with.

    `x` [T, B, D], or [B, T, D] for a provider that is batch first; `h0`, `c0` [layers * directions, B, H];
    `lengths` int64 [B] on the CPU or None; `resets` bool [T, B] or None (True: the state is zeroed before
    this step); `extra` is for a provider's own preparation.
    """

    x: Tensor
    h0: Tensor
    c0: Tensor
    lengths: Tensor | None
    resets: Tensor | None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Problem:
    """A case with its tensors, on one device. `xs` are inputs to rotate through; the first one is checked."""

    case: Case
    device: torch.device
    dtype: torch.dtype
    weights: dict[str, Tensor]
    xs: list[Tensor]
    h0: Tensor
    c0: Tensor
    lengths: Tensor | None
    resets: Tensor | None
    grad_out: Tensor

    def inputs(self, index: int = 0, *, batch_first: bool = False) -> Inputs:
        x = self.xs[index % len(self.xs)]
        if batch_first:
            x = x.transpose(0, 1).contiguous()
        return Inputs(x, self.h0, self.c0, self.lengths, self.resets)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype, with the first input only."""
        return replace(
            self,
            dtype=dtype,
            weights={name: weight.to(dtype) for name, weight in self.weights.items()},
            xs=[self.xs[0].to(dtype)],
            h0=self.h0.to(dtype),
            c0=self.c0.to(dtype),
            grad_out=self.grad_out.to(dtype),
        )

    def first_steps(self, T: int) -> Problem:
        """The same weights and states with only the first T steps."""
        if self.case.T <= T:
            return self
        return replace(
            self,
            case=self.case.shortened(T),
            xs=[self.xs[0][:T].contiguous()],
            lengths=None if self.lengths is None else self.lengths.clamp(max=T),
            resets=None if self.resets is None else self.resets[:T],
            grad_out=self.grad_out[:T].contiguous(),
        )


def make(case: Case, device: torch.device, copies: int = 1) -> Problem:
    """Draw a case's tensors from its own seed: the same numbers on every machine and in every run."""
    generator = torch.Generator().manual_seed(case.seed)
    dtype = TORCH_DTYPE[case.dtype]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    bound = case.H**-0.5
    with torch.device("meta"):
        shapes = nn.LSTM(case.D, case.H, case.layers, bidirectional=case.bidirectional).state_dict()
    weights = {
        name: torch.empty(value.shape).uniform_(-bound, bound, generator=generator).to(device, dtype)
        for name, value in shapes.items()
    }
    states = (case.layers * case.directions, case.B, case.H)
    lengths = None if case.lengths is None else torch.tensor(case.sequence_lengths())
    resets = None
    if case.resets:
        resets = torch.rand(case.T, case.B, generator=generator) < case.resets
        # Before the first step TorchRL's reset means "start from h0", everyone else's "start from zero".
        resets[0] = False
        resets = resets.to(device)
    problem = Problem(
        case=case,
        device=device,
        dtype=dtype,
        weights=weights,
        xs=[normal(case.T, case.B, case.D)],
        h0=0.5 * normal(*states),
        c0=0.5 * normal(*states),
        lengths=lengths,
        resets=resets,
        grad_out=normal(case.T, case.B, case.directions * case.H),
    )
    # Drawn last, so that what is checked does not depend on how many there are.
    problem.xs += [normal(case.T, case.B, case.D) for _ in range(copies - 1)]
    return problem
