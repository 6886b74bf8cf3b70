"""``tritlstm kernels --explain T,B,D,H``: what bounds a step of a shape, by the cost model and by the compiled code.

Also the table that the static gate holds the kernels to: ``tests/kernel_counts.json`` has, for the benchmark's shapes,
the instructions and barriers that a step may take; ``tritlstm kernels --counts FILE`` writes it anew.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from . import inspect_kernels, machine_code, plan
from .plan import Device, OneStepPlan, RecurrentPlan

__all__ = ["SHAPES", "Report", "Shape", "counts", "parse_shape", "report", "write_counts"]

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
#: Architectures that the static gate covers.
GATED = ("sm_80", "sm_90", "sm_100")
#: What the static gate counts, in everything that control can come back to.
COUNTED = {
    "instructions": "",
    "barriers": "BAR|BARRIER",
    "shared_loads": "LDS|LDSM",
    "shared_stores": "STS|STSM",
    "shuffles": "SHFL",
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes and dtype (``fp16``, ``bf16``, ``fp32`` with TF32) of one layer in one direction."""

    T: int
    B: int
    D: int
    H: int
    dtype: str

    def __str__(self) -> str:
        return f"T={self.T} B={self.B} D={self.D} H={self.H} {self.dtype}"


#: Shapes of the GPU benchmark but its sweeps, one layer of each; what it runs in fp16 and bf16 stands here once.
SHAPES = (
    Shape(1024, 16, 768, 768, "fp16"), Shape(512, 64, 512, 512, "fp16"), Shape(512, 64, 1024, 1024, "fp16"),
    Shape(512, 128, 1024, 1024, "fp16"), Shape(256, 32, 256, 256, "bf16"),
    Shape(1024, 16, 768, 768, "fp32"), Shape(512, 64, 512, 512, "fp32"), Shape(512, 64, 1024, 1024, "fp32"),
    Shape(512, 128, 1024, 1024, "fp32"), Shape(256, 32, 256, 256, "fp32"),
    Shape(512, 20, 650, 650, "bf16"), Shape(70, 80, 1150, 1150, "bf16"), Shape(35, 20, 1500, 1500, "fp16"),
    Shape(800, 32, 80, 512, "bf16"), Shape(800, 32, 80, 1024, "bf16"), Shape(100, 64, 256, 256, "fp16"),
    Shape(100, 1024, 16, 64, "fp32"), Shape(80, 64, 512, 512, "fp32"), Shape(1, 4096, 256, 256, "fp32"),
    Shape(32, 1024, 28, 32, "fp32"), Shape(1, 1, 512, 512, "fp16"), Shape(256, 32, 2048, 2048, "bf16"),
    Shape(128, 32, 4096, 4096, "bf16"), Shape(16384, 8, 512, 512, "bf16"),
)  # fmt: skip


def parse_shape(text: str, dtype: str) -> Shape:
    """``T,B,D,H`` to a shape; raises ValueError in words."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if len(sizes) != 4 or min(sizes) < 1:
        raise ValueError(f"a shape is four positive numbers T,B,D,H, such as 1024,16,768,768; got {text!r}")
    length, batch, features, hidden = sizes
    return Shape(length, batch, features, hidden, dtype)


def chosen(shape: Shape, direction: str, device: Device) -> RecurrentPlan | OneStepPlan:
    """The planner's choice for training."""
    dtype = DTYPES[shape.dtype]
    precision = "tf32" if shape.dtype == "fp32" and not device.arch.startswith("gfx") else "ieee"
    if shape.T == 1 and direction == "forward":
        return plan.one_step(shape.B, shape.D, shape.H, dtype, device, precision)
    return plan.recurrent(direction, shape.T, shape.B, shape.H, dtype, device, precision)


@dataclasses.dataclass(frozen=True)
class Report:
    """One kernel for one shape: bytes a step, predicted parts and floor in µs a step, counts of the compiled code."""

    plan: RecurrentPlan | OneStepPlan
    l2_bytes: int
    memory_bytes: int
    multiply_adds: int
    floor_us: float
    counts: dict[str, Any]


def report(shape: Shape, direction: str, device: Device, compiled: bool = True) -> Report:
    """What a step of ``shape`` moves and computes on ``device``, for the whole batch and all thread blocks.

    ``memory_bytes`` is what crosses the memory bus at least: forward reads the input products and writes h, gates and
    cells; backward reads gates, cells and the gradient of h, and writes the gates' gradients. The floor is the larger
    of these bytes and the product at the device's rates, and one hand-off. The forward pass of a single step has its
    input's product inside, and reads all weights from memory.
    """
    p = chosen(shape, direction, device)
    element, width = p.dtype.itemsize, plan.padded(shape.H)
    exchanged = p.element if isinstance(p, RecurrentPlan) else element  # and multiplied with
    gates, cells, h = 4 * width * element, 4 * width, width * element
    rate = device.fma_per_clock * (1.0 if exchanged == 2 else 0.5) * device.clock_ghz * 1e3 * device.sms
    if isinstance(p, OneStepPlan):
        (tiles, blocks), depth = p.grid, shape.D + shape.H
        l2_bytes = (tiles * 4 * shape.H + blocks * shape.B) * depth * element
        # Weights, x, h0 and c0 in; gates, cells, out, h_n and c_n out.
        memory_bytes = (4 * shape.H + shape.B) * depth * element + shape.B * (gates + cells + 4 * h)
        multiply_adds = 4 * shape.B * shape.H * depth
        floor = max(memory_bytes / device.memory_bytes_per_us, multiply_adds / rate)
        return Report(p, l2_bytes, memory_bytes, multiply_adds, floor, counts(p, device) if compiled else {})
    depth = width * (1 if direction == "forward" else 4)
    streamed = (1 - p.resident / p.chunks) * 4 * width * exchanged * p.block_h if p.tier != "single" else 0
    reads = 0 if p.tier == "single" else p.n_blocks * shape.B * depth // p.parts * exchanged
    if p.parts > 1:
        reads += p.n_blocks * p.parts * p.block_h * shape.B * 8  # partial sums and their turns
    l2_bytes = 0 if p.alone else round(reads + streamed * p.n_blocks * p.n_tiles)
    memory_bytes = shape.B * (2 * gates + cells + h if direction == "forward" else 2 * gates + 2 * cells + h)
    multiply_adds = 0 if p.alone else 4 * shape.B * shape.H * shape.H
    hand_off = 0.0 if p.protocol == "none" else device.constants.flag_us
    floor = max(memory_bytes / device.memory_bytes_per_us, multiply_adds / rate) + hand_off
    return Report(p, l2_bytes, memory_bytes, multiply_adds, floor, counts(p, device) if compiled else {})


def counts(p: RecurrentPlan | OneStepPlan, device: Device) -> dict[str, Any]:
    """Registers and shared memory of a plan's kernel, and what stands in its loops."""
    if isinstance(p, OneStepPlan):
        launch = inspect_kernels.one_step_launch(p)
    else:
        launch = inspect_kernels.recurrent_launch(p)
    configuration = inspect_kernels.Configuration(launch, p, p.dtype, device)
    compiled = inspect_kernels.compile_launch(launch, device.arch)
    code, _ = inspect_kernels.read_code(compiled, launch)
    row = inspect_kernels.inspect_launch(configuration, device.arch, compiled)
    return {
        "registers": row["registers"],
        "spill_bytes": row["spill_bytes"],
        "shared_bytes": row["shared_bytes"],
        "matrix_instruction": row["matrix_instruction"],
        "weights_resident": row["weights_resident"],
        "layout_conversions": row["layout_conversions"],
        "loop": _in_loops(code),
        "problems": row["problems"],
    }


def _in_loops(code: machine_code.Code) -> dict[str, int]:
    looped = Counter(i.mnemonic for i, inside in zip(code.instructions, code.in_loop, strict=True) if inside)
    result = {"instructions": sum(looped.values())}
    for name, mnemonics in COUNTED.items():
        if mnemonics:
            result[name] = sum(looped[mnemonic] for mnemonic in mnemonics.split("|"))
    return result


def text(shape: Shape, device: Device, reports: dict[str, Report]) -> str:
    """The reports of a shape side by side."""
    rows: list[tuple[str, list[str]]] = []

    def add(name: str, values: list[Any]) -> None:
        rows.append((name, [str(value) for value in values]))

    found = list(reports.values())

    def of_many(tell: Callable[[RecurrentPlan], str], alone: str = "-") -> list[str]:
        return [alone if isinstance(r.plan, OneStepPlan) else tell(r.plan) for r in found]

    add("", list(reports))
    add("tier, exchange", of_many(lambda p: f"{p.tier}, {p.protocol}", "one launch"))
    alone = [f"{r.plan.grid[1]} x {r.plan.grid[0]}" for r in found if isinstance(r.plan, OneStepPlan)]
    add("blocks x groups", of_many(lambda p: f"{p.n_blocks} x {p.n_groups}", *alone))
    add("units x sequences a block", [f"{r.plan.block_h} x {r.plan.block_b}" for r in found])
    add("chunks of w_hh on chip", of_many(lambda p: f"{p.resident} of {p.chunks}"))
    add("bytes from L2 a step", [f"{r.l2_bytes:,}" for r in found])
    add("bytes of memory a step, least", [f"{r.memory_bytes:,}" for r in found])
    add("multiply-adds a step", [f"{r.multiply_adds:,}" for r in found])
    for part in dataclasses.fields(plan.StepCost):
        name = part.name
        add(f"predicted us: {name}", of_many(lambda p, name=name: f"{getattr(p.cost, name):.3f}"))  # type: ignore[misc]
    add("predicted us a step, all tiles", [f"{r.plan.us_per_step:.2f}" for r in found])
    add("floor us a step", [f"{r.floor_us:.2f}" for r in found])
    if all(r.counts for r in found):
        for name in ("registers", "spill_bytes", "shared_bytes", "matrix_instruction", "layout_conversions"):
            add(name.replace("_", " "), [r.counts[name] for r in found])
        for name in COUNTED:
            add(f"{name.replace('_', ' ')} in loops", [r.counts["loop"][name] for r in found])
    width = [max(len(name) for name, _ in rows)] + [max(len(v[i]) for _, v in rows) for i in range(len(found))]
    lines = [
        f"{shape} on {device.name} ({device.arch}); predicted, not measured",
        f"predictions from {device.constants}",
    ]
    for name, values in rows:
        lines.append("  ".join([name.ljust(width[0]), *(v.rjust(w) for v, w in zip(values, width[1:], strict=True))]))
    return "\n".join(lines)


def gate_rows() -> dict[str, dict[str, Any]]:
    """Counts of every gated kernel by ``ARCH DIRECTION SHAPE``."""
    return {
        f"{arch} {direction} {shape}": report(shape, direction, plan.DEVICES[arch]).counts
        for arch in GATED
        for shape in SHAPES
        for direction in ("forward", "backward")
    }


def write_counts(path: str) -> None:
    """Writes the static gate's table."""
    import triton

    table = {"versions": {"triton": triton.__version__}, "kernels": gate_rows()}
    with open(path, "w", encoding="utf-8") as file:
        json.dump(table, file, indent=1)
        file.write("\n")
