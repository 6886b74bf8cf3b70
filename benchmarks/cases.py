"""The benchmark cases, as data."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

PASSES = ("fwd", "fwdbwd")
DTYPES = ("fp16", "bf16", "fp32")
SUITES = ("cpu", "gpu")

# FlashRNN builds its kernels for each size by nvcc, which takes minutes, so a default run asks for it at
# cuDNN's sizes only. In the sweeps and on a CPU the compiler's time is left out likewise.
_NVCC = ("flashrnn",)
_SWEEP = ("compiled-loop", "flashrnn", "torchrl")
_CPU = ("compiled-loop",)


@dataclass(frozen=True)
class Case:
    """One problem that every provider is given.

    T time steps, B sequences, D input features, H hidden units. `lengths` is (shortest, longest) of a padded
    batch, `resets` the chance that an episode ends before a step. `quick` marks the cases of `--quick`;
    `without` names providers that run this case only when they are asked for with `--provider`.
    """

    group: str
    T: int
    B: int
    D: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    dtype: str = "fp32"
    lengths: tuple[int, int] | None = None
    resets: float = 0.0
    quick: bool = False
    without: tuple[str, ...] = ()
    name: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype of a case is one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if min(self.T, self.B, self.D, self.H, self.layers) < 1:
            raise ValueError(f"sizes of a case are at least 1, got {self}")
        if self.lengths is not None and not 1 <= self.lengths[0] <= self.lengths[1] == self.T:
            raise ValueError(f"lengths must run from at least 1 up to T={self.T}, got {self.lengths}")
        if not self.name:
            object.__setattr__(self, "name", self._name())

    def _name(self) -> str:
        parts = [f"{self.group}/{self.T}x{self.B}x{self.D}x{self.H}"]
        if self.layers > 1:
            parts.append(f"{self.layers}layers")
        if self.bidirectional:
            parts.append("bi")
        if self.lengths is not None:
            parts.append("lengths")
        if self.resets:
            parts.append("resets")
        return "-".join([*parts, self.dtype])

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def seed(self) -> int:
        return zlib.crc32(self.name.encode())

    def sequence_lengths(self) -> list[int]:
        """Length of each of the B sequences; the first is T, so that the longest is always there."""
        if self.lengths is None:
            return [self.T] * self.B
        draw = random.Random(self.seed)
        return [self.T] + [draw.randint(*self.lengths) for _ in range(self.B - 1)]

    def tokens(self) -> int:
        """Steps that carry data, over all sequences."""
        return sum(self.sequence_lengths())

    def shortened(self, T: int) -> Case:
        """The same case with at most T steps, under the same name (and so with the same weights)."""
        if self.T <= T:
            return self
        lengths = None if self.lengths is None else (min(self.lengths[0], T), T)
        return replace(self, T=T, lengths=lengths)


_CUDNN = ((1024, 16, 768, 768), (512, 64, 512, 512), (512, 64, 1024, 1024), (512, 128, 1024, 1024),
          (256, 32, 256, 256))  # fmt: skip
_REFUSED = ((512, 20, 650, 650), (70, 80, 1150, 1150), (35, 20, 1500, 1500))
_GPU_H = (64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 2048)
_GPU_B = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_CPU_H = (32, 64, 128, 256, 512)
_CPU_B = (1, 4, 16, 32, 128)


def _gpu() -> Iterable[Case]:
    for dtype in DTYPES:
        for sizes in _CUDNN:
            quick = sizes[0] == 1024 or (sizes == (512, 64, 512, 512) and dtype == "fp16")
            group = "cudnn" if dtype == "fp16" else "cudnn-sizes"
            yield Case(
                group,
                *sizes,
                dtype=dtype,
                quick=quick and dtype != "fp32",
                without=_NVCC if dtype == "fp32" else (),
            )
    for dtype in ("fp16", "bf16"):
        for sizes in _REFUSED:
            yield Case("refused", *sizes, dtype=dtype, quick=sizes[1:] == (20, 650, 650), without=_NVCC)
    for H in (512, 1024):
        yield Case("speech", 800, 32, 80, H, layers=5, bidirectional=True, dtype="bf16", lengths=(200, 800),
                   quick=H == 512)  # fmt: skip
    yield Case("text", 100, 64, 256, 256, layers=2, bidirectional=True, dtype="fp16", quick=True)
    yield Case("series", 100, 1024, 16, 64, layers=2)
    yield Case("rl", 80, 64, 512, 512, resets=0.05)
    yield Case("rl", 1, 4096, 256, 256, without=_NVCC)
    yield Case("textbook", 32, 1024, 28, 32, quick=True, without=_NVCC)
    yield Case("streaming", 1, 1, 512, 512, layers=2, dtype="fp16", quick=True)
    yield Case("large", 256, 32, 2048, 2048, dtype="bf16", without=_NVCC)
    yield Case("large", 128, 32, 4096, 4096, dtype="bf16", without=_NVCC)
    yield Case("long", 16384, 8, 512, 512, dtype="bf16", without=_NVCC)
    for dtype in ("fp16", "bf16"):
        for H in _GPU_H:
            yield Case("over-H", 256, 32, H, H, dtype=dtype, without=_SWEEP,
                       quick=dtype == "bf16" and H in (128, 512, 1024, 2048))  # fmt: skip
        for B in _GPU_B:
            yield Case("over-B", 256, B, 512, 512, dtype=dtype, without=_SWEEP,
                       quick=dtype == "bf16" and B in (1, 16, 128, 1024))  # fmt: skip


def _cpu() -> Iterable[Case]:
    yield Case("textbook", 32, 1024, 28, 32, quick=True)
    yield Case("text", 50, 16, 64, 96, layers=2, bidirectional=True, without=_CPU)
    yield Case("speech", 60, 16, 40, 128, bidirectional=True, lengths=(15, 60), without=_CPU)
    yield Case("series", 100, 64, 16, 64, layers=2, without=_CPU)
    yield Case("rl", 40, 16, 64, 64, resets=0.05, without=_CPU)
    yield Case("streaming", 1, 1, 256, 256, layers=2, quick=True, without=_CPU)
    yield Case("half", 32, 16, 128, 128, dtype="bf16", without=_CPU)
    for H in _CPU_H:
        yield Case("over-H", 32, 16, H, H, quick=H in (64, 256), without=_CPU)
    for B in _CPU_B:
        yield Case("over-B", 32, B, 128, 128, quick=B in (1, 32), without=_CPU)


_SUITES = {"cpu": _cpu, "gpu": _gpu}
GROUPS = {
    "cudnn": "cuDNN's own ground",
    "cudnn-sizes": "the same sizes in bf16 and fp32",
    "refused": "sizes that cuDNN's fast path refuses",
    "speech": "speech: lengths, two directions",
    "text": "text recognition",
    "series": "time series",
    "rl": "reinforcement learning",
    "textbook": "the textbook",
    "streaming": "streaming: latency of a step",
    "half": "half precision",
    "large": "large",
    "long": "long",
    "over-H": "sweep over H",
    "over-B": "sweep over B",
}


def suite(name: str, *, quick: bool = False, pattern: str | None = None) -> list[Case]:
    """Cases of a suite, in order; `pattern` is a shell pattern or a part of a case's name.

    Raises ValueError for a suite that does not exist or a pattern that no case matches.
    """
    if name not in _SUITES:
        raise ValueError(f"no suite {name!r}; there are {', '.join(SUITES)}")
    cases = [case for case in _SUITES[name]() if case.quick or not quick]
    if pattern is None:
        return cases
    shell = any(mark in pattern for mark in "*?[")
    found = [c for c in cases if (fnmatchcase(c.name, pattern) if shell else pattern in c.name)]
    if not found:
        kind = "quick cases" if quick else "cases"
        raise ValueError(f"none of the {kind} of suite {name!r} matches {pattern!r}; --list shows them")
    return found
