"""The physical floor: what no implementation on the device can go below, from sizes and measured limits.

    floor = max(bytes / bandwidth, operations / matrix rate) + hand-offs x time of one

Bytes count each tensor that must cross the memory bus once (input, weights, output, states; in backward also
their gradients), nothing that an implementation may choose to store, and nothing that the caches can keep
from one call to the next (on a GPU the timing overwrites the cache). Operations count the matrix products
alone. A hand-off is the passing of h from the threads that made it to those that need it in the next step:
T-1 of them in a layer, overlapping between stacked layers of one direction. It goes from thread block to
thread block, or, where the recurrent weights fit one multiprocessor, through its shared memory. On a CPU it
counts nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .cases import PASSES, Case

ELEMENT_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4, "fp64": 8}

# The shortest hand-off through a GPU's L2 cache that has been reported: data that is its own flag. It agrees
# with one L2 hit on an H100, 264 cycles near at 1.755 GHz = 0.15 µs. A release/acquire pair costs 0.37 µs and
# a counter barrier over 132 blocks 1.0 µs; shared memory of a neighbour in a cluster could be 0.1 µs.
HANDOFF_US = 0.14

# One load from shared memory: 23 cycles (Turing, sjfeng1999/gpu-arch-microbenchmark) at an H100's 1.755 GHz.
# Without it the floor of a small H would be that of a product that has no steps at all.
SHARED_US = 0.013


@dataclass(frozen=True)
class Limits:
    """What the device can do at most, for one dtype.

    `bandwidth` bytes/s, `rate` operations/s, `handoff_us` µs a hand-off between thread blocks and `shared_us`
    within one (0 on a CPU), `on_chip_bytes` what one multiprocessor can hold of the recurrent weights (0 on a
    CPU), `cache_bytes` what may be in cache already when a call begins (0 on a GPU).
    """

    bandwidth: float
    rate: float
    handoff_us: float = 0.0
    shared_us: float = 0.0
    on_chip_bytes: int = 0
    cache_bytes: int = 0


@dataclass(frozen=True)
class Work:
    """What a pass over a case must at least move, compute and hand over."""

    bytes: int
    operations: int
    handoffs: int
    one_block: bool


@dataclass(frozen=True)
class Floor:
    """Floor of a pass: total in µs, per step in µs, and which term decides it."""

    total_us: float
    us_per_step: float
    bound: str
    work: Work
    limits: Limits

    def as_row(self) -> dict[str, Any]:
        return {**asdict(self.work), **asdict(self.limits), "bound": self.bound}


def work(case: Case, which: str, on_chip_bytes: int = 0) -> Work:
    """Least work of `which` ("fwd" or "fwdbwd") over `case`, with gradients of input, weights and biases."""
    if which not in PASSES:
        raise ValueError(f"a pass is one of {', '.join(PASSES)}, got {which!r}")
    H, directions, tokens = case.H, case.directions, case.tokens()
    inputs = [case.D] + [H * directions] * (case.layers - 1)
    products = directions * sum(4 * H * (d + H) for d in inputs)
    weights = products + directions * case.layers * 8 * H
    states = 4 * case.layers * directions * case.B * H

    elements = tokens * (case.D + directions * H) + weights + states
    operations = 2 * tokens * products
    chain = case.T - 1 + case.layers - 1 if directions == 1 else case.layers * case.T - 1
    size = ELEMENT_BYTES[case.dtype]
    if which == "fwdbwd":
        elements += tokens * (case.D + directions * H) + weights
        operations *= 3
        chain *= 2
    fits = 4 * H * H * size <= on_chip_bytes
    return Work(bytes=elements * size, operations=operations, handoffs=chain, one_block=fits)


def floor(case: Case, which: str, limits: Limits) -> Floor:
    """Floor of a pass over a case on a device with these limits."""
    least = work(case, which, limits.on_chip_bytes)
    memory_us = 1e6 * max(0, least.bytes - limits.cache_bytes) / limits.bandwidth
    matrix_us = 1e6 * least.operations / limits.rate
    handoff_us = least.handoffs * (limits.shared_us if least.one_block else limits.handoff_us)
    total = max(memory_us, matrix_us) + handoff_us
    terms = {"memory": memory_us, "matrix": matrix_us, "hand-off": handoff_us}
    return Floor(total, total / case.T, max(terms, key=lambda term: terms[term]), least, limits)
