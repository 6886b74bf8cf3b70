"""The trained weights, run three other ways: do they give the logits that torch gives in float64?"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import tritlstm

from .data import encode
from .model import load_weights, numpy_logits, torch_model

EMULATED_STEPS = 8
C_HOST_SECONDS = 120.0


class NotRunError(RuntimeError):
    """This way cannot be taken on this machine; the message says why and what to install."""


@dataclass(frozen=True)
class Row:
    """The outcome of one way: its error and budget, or why it did not run."""

    way: str
    steps: int
    error: float | None  # largest absolute difference of a logit from torch in float64
    budget: float | None
    seconds: float
    note: str = ""
    ran: bool = True

    @property
    def passed(self) -> bool:
        return self.ran and self.error is not None and self.budget is not None and self.error <= self.budget

    @property
    def failed(self) -> bool:
        return self.ran and not self.passed

    @property
    def verdict(self) -> str:
        if not self.ran:
            return f"not run: {self.note}"
        return "pass" if self.passed else f"FAIL {self.note.partition(chr(10))[0]}".rstrip()


def torch_logits(
    weights: Mapping[str, np.ndarray],
    ids: np.ndarray,
    dtype: torch.dtype,
    lstm: Callable[..., nn.Module] | None = nn.LSTM,
    device: str = "cpu",
) -> np.ndarray:
    """Logits [T, V] in float64 of ids [T], computed in `dtype`; `lstm` as for `CharacterModel`."""
    model = torch_model(weights, dtype, lstm).to(device)
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(ids)[:, None].to(device))
    return logits[:, 0].double().cpu().numpy()


def budget(base: np.ndarray, torch_float32: np.ndarray) -> float:
    """The largest error allowed in float32: twice torch's own, and one rounding of the output."""
    own = float(np.abs(torch_float32 - base).max())
    return 2.0 * own + 0.5 * float(np.finfo(np.float32).eps) * float(np.abs(base).max())


def float64_budget(base: np.ndarray, torch_float32: np.ndarray) -> float:
    """The same for a computation in float64: torch's own error in float32 by the ratio of the roundings.

    Sixteen times it instead of twice: the base errs as well, a vector register holds half as many float64, so
    sums are longer chains, and NumPy's σ is three roundings. Seen: up to 4 times. A single value that passed
    through float32 on its way would show as about 10⁸ times.
    """
    ratio = float(np.finfo(np.float64).eps / np.finfo(np.float32).eps)
    own = float(np.abs(torch_float32 - base).max()) * ratio
    return 16.0 * own + 0.5 * float(np.finfo(np.float64).eps) * float(np.abs(base).max())


def reference_logits(weights: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    return numpy_logits(weights, ids[:, None])[:, 0]


def emulated_logits(weights: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """The Triton kernels in the parallel emulator, float32."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise NotRunError(f"triton cannot be imported ({error}); pip install 'triton>=3.6,<4'") from error
    from tritlstm import emulator

    with emulator.emulate():
        return torch_logits(weights, ids, torch.float32, tritlstm.LSTM)


@contextlib.contextmanager
def _no_tf32() -> Iterator[None]:
    switches: tuple[Any, ...] = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def gpu_logits(weights: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """The Triton kernels on the GPU, float32 without TF32."""
    with _no_tf32():
        return torch_logits(weights, ids, torch.float32, tritlstm.LSTM, "cuda")


def c_logits(weights_file: Path, text: str, vocabulary_size: int, output: Path) -> np.ndarray:
    """The C host, compiled in `output` against the C library built there."""
    from tritlstm.capi import build
    from tritlstm.info import HEADERS_REMEDY, python_headers

    if not sys.platform.startswith("linux"):
        raise NotRunError(f"the C library is for Linux, this is {sys.platform}")
    try:
        build.compiler()
    except build.BuildError as error:
        raise NotRunError(str(error)) from error
    if python_headers() is None:
        raise NotRunError(f"Python.h is missing; {HEADERS_REMEDY}")
    program = build.build_example("generate", build.build(output), output / "bin" / "generate")
    logits_file = output / "logits.f32"
    logits_file.unlink(missing_ok=True)
    command = [str(program), str(weights_file), "--prompt", text, "--logits", str(logits_file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=C_HOST_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{program} ended with status {done.returncode}: {done.stderr.strip()}")
    return np.fromfile(logits_file, "<f4").reshape(-1, vocabulary_size).astype(np.float64)


def verify(
    weights_file: Path, text: str, output: Path, ways: Sequence[str] = ("reference", "emulator", "gpu", "c")
) -> list[Row]:
    """Run the model in `weights_file` over the bytes of `text` in every way, each against torch in float64.

    The emulator reads only the first few bytes. What the C host needs is built in `output`.
    """
    weights = load_weights(weights_file)
    ids = encode(text.encode(), weights["vocabulary"])
    base = torch_logits(weights, ids, torch.float64)
    own = torch_logits(weights, ids, torch.float32)

    def row(
        way: str,
        compute: Callable[[], np.ndarray],
        steps: int,
        allow: Callable[[np.ndarray, np.ndarray], float] = budget,
    ) -> Row:
        begin = time.perf_counter()
        try:
            logits = compute()
        except NotRunError as error:
            return Row(way, steps, None, None, time.perf_counter() - begin, str(error), ran=False)
        except Exception as error:
            # Whatever went wrong in one way, the others' rows are wanted too, and the exit status tells.
            return Row(
                way, steps, None, None, time.perf_counter() - begin, f"{type(error).__name__}: {error}"
            )
        seconds = time.perf_counter() - begin
        allowed = allow(base[:steps], own[:steps])
        if logits.shape != base[:steps].shape:
            return Row(way, steps, None, allowed, seconds, f"logits of shape {logits.shape}")
        largest = float(np.abs(logits - base[:steps]).max())  # NaN fails, too
        return Row(way, steps, largest, allowed, seconds)

    short = ids[:EMULATED_STEPS]
    rows = []
    if "reference" in ways:
        way = "NumPy reference, float64"
        rows.append(row(way, lambda: reference_logits(weights, ids), len(ids), float64_budget))
    if "emulator" in ways:
        way = "Triton kernels, parallel emulator, float32"
        rows.append(row(way, lambda: emulated_logits(weights, short), len(short)))
    if "gpu" in ways and torch.cuda.is_available():
        way = f"Triton kernels, {torch.cuda.get_device_name()}, float32"
        rows.append(row(way, lambda: gpu_logits(weights, ids), len(ids)))
    if "c" in ways:
        rows.append(
            row("C host, float32", lambda: c_logits(weights_file, text, base.shape[1], output), len(ids))
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, and below it what did not fit into a line."""
    head = ("logits against torch in float64", "steps", "max error", "budget", "seconds", "")
    lines = [
        (
            row.way,
            str(row.steps),
            "-" if row.error is None else f"{row.error:.2e}",
            "-" if row.budget is None else f"{row.budget:.2e}",
            f"{row.seconds:.1f}",
            row.verdict,
        )
        for row in rows
    ]
    long = [f"  {row.way}:\n{textwrap.indent(row.note, '    ')}" for row in rows if "\n" in row.note]
    return "\n".join([aligned([head, *lines], left=(0, 5)), *long])


def aligned(lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Columns of text, the ones in `left` flush left and the others flush right, under a ruled head."""
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    widths[-1] = max(len(lines[0][-1]), 4)  # the last column may run on
    out = [
        "  ".join(
            cell.ljust(width) if k in left else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    out.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join("  " + line for line in out)
