"""Which kernel, which tiles and which exchange protocol a layer runs with, and why.

The planner lists every feasible candidate for the sizes, the dtype and the device's limits, predicts the time
of one step from a written cost model (:class:`StepCost`; derivation in ``kernels/README.md``), and takes the
fastest. Plans depend on T only through "one step or more", and on B through a few tile widths, so that a new
T never compiles anything and a new B at most picks another of a handful of kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import emulator, measured
from .kernels import exchange, rounding
from .kernels.launch import Compiled, Launch

__all__ = [
    "DEVICES",
    "TIERS",
    "Device",
    "GemmPlan",
    "NarrowPlan",
    "OneStepPlan",
    "PlanError",
    "RecurrentPlan",
    "RoundPlan",
    "StepCost",
    "Together",
    "device_of",
    "dot_precision",
    "gate_gemm",
    "narrow",
    "next_layers",
    "one_step",
    "recurrent",
    "rounded",
    "tiers",
    "together",
]

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
#: 3.7, which the kernels are tuned with. What another one needs besides stands where it is asked for.
TUNED = (3, 7) <= TRITON < (3, 9)
#: Columns that a product has at least for wgmma, as Triton makes it.
WGMMA_COLUMNS = 8 if TRITON >= (3, 8) else 16
TIERS = ("single", "persistent", "streaming", "step")
PROTOCOLS = {"none": exchange.NONE.value, "counter": exchange.COUNTER.value, "flag": exchange.FLAG.value}
TAGGED_SLOTS = exchange.TAGGED_SLOTS.value
KERNELS = {"forward": "recurrent_forward", "backward": "recurrent_backward"}
#: dtypes of the kernels; anything else takes the ATen path.
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: Turns of a spin before it gives up: 2 to 5 seconds at the 0.5 to 1 µs of an L2 round trip and a check.
SPIN_LIMIT = 1 << 22


@dataclasses.dataclass(frozen=True)
class Device:
    """Limits and rates of a device, as far as the plan depends on them. Rates are data-sheet values where nothing was
    measured."""

    name: str
    arch: str
    sms: int
    shared_bytes: int  # a block's limit
    clock_ghz: float
    fma_per_clock: int  # a multiprocessor's dense 16-bit multiply-adds on its matrix unit
    l2_bytes_per_us: float  # all multiprocessors together
    memory_bytes_per_us: float
    warp_size: int = 32
    #: Rows that the fast matrix instruction wants (wgmma, tcgen05); 16 where mma.sync or MFMA is meant.
    matrix_rows: int = 16
    constants: measured.Constants = measured.DATA_SHEET
    #: Whether teams may be thread-block clusters, whose partial sums go through their shared memory.
    clusters: bool = False


#: Set to 1, it lets the planner choose clusters, which no GPU has run yet.
CLUSTERS = "TRITLSTM_CLUSTERS"


def _table() -> dict[str, Device]:
    rows = (
        Device("A100", "sm_80", 108, 163 << 10, 1.41, 1024, 4.0e6, 1.55e6),
        Device("RTX 3090", "sm_86", 82, 99 << 10, 1.70, 512, 2.0e6, 0.93e6),
        Device("RTX 4090", "sm_89", 128, 99 << 10, 2.52, 512, 5.0e6, 1.0e6),
        Device("H100", "sm_90", 132, 227 << 10, 1.755, 2048, 4.76e6, 3.35e6, matrix_rows=64, constants=measured.HOPPER),
        Device("B200", "sm_100", 148, 227 << 10, 1.85, 4096, 8.0e6, 7.7e6, matrix_rows=64),
        Device("RTX 5090", "sm_120", 170, 99 << 10, 2.41, 512, 6.0e6, 1.79e6),
        Device("MI250X", "gfx90a", 104, 64 << 10, 1.70, 512, 3.5e6, 1.6e6, warp_size=64),
        Device("MI300X", "gfx942", 304, 64 << 10, 2.10, 1024, 8.0e6, 5.3e6, warp_size=64),
    )
    wanted = os.environ.get(CLUSTERS) == "1"
    return {d.arch: dataclasses.replace(d, clusters=wanted and d.matrix_rows > 16) for d in rows}


#: A typical part of every architecture that the kernels are compiled for.
DEVICES: Mapping[str, Device] = _table()


@functools.lru_cache(maxsize=64)
def _cuda_device(index: int) -> Device:
    device = data_sheet(index)
    found = measured.find(device)
    return device if found is None else found.apply(device)


def data_sheet(index: int) -> Device:
    """A CUDA device as the data sheet and the driver describe it."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        base = DEVICES.get(arch, DEVICES["gfx942"])
        return dataclasses.replace(
            base, name=properties.name, arch=arch, sms=properties.multi_processor_count
        )
    arch = f"sm_{properties.major}{properties.minor}"
    # An architecture that the table does not name plans like the nearest older one that it does.
    known = [d for d in DEVICES.values() if d.arch.startswith("sm_") and int(d.arch[3:]) <= int(arch[3:])]
    base = DEVICES.get(arch) or (max(known, key=lambda d: int(d.arch[3:])) if known else DEVICES["sm_80"])
    return dataclasses.replace(
        base,
        name=properties.name,
        arch=arch,
        sms=properties.multi_processor_count,
        shared_bytes=getattr(properties, "shared_memory_per_block_optin", base.shared_bytes),
    )


def device_of(x: Tensor) -> Device:
    """The device that ``x`` lies on; inside :func:`tritlstm.emulator.emulate`, the pretended one."""
    emulation = emulator.current()
    if emulation is not None:
        return dataclasses.replace(
            DEVICES["sm_90"],
            name="emulator",
            arch="emulated",
            clusters=False,  # where one is asked for
            sms=emulation.sms,
            shared_bytes=emulation.shared_bytes,
        )
    index = x.device.index if x.device.index is not None else torch.cuda.current_device()
    return _cuda_device(index)


@functools.lru_cache(maxsize=64)
def _has_tf32(index: int | None) -> bool:
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(index) >= (8, 0)


#: "none" follows the next one; `allow_tf32 = False` leaves "none" everywhere. Kept, as torch takes long to find them.
_TF32_SWITCHES = (torch.backends.cudnn.rnn, torch.backends.cudnn, torch.backends)


def dot_precision(x: Tensor) -> str:
    """``input_precision`` of the kernels' products: fp32 follows torch's TF32 switch for cuDNN RNNs."""
    emulation = emulator.current()
    if emulation is not None:
        return "tf32" if emulation.tf32 and x.dtype == torch.float32 else "ieee"
    if x.dtype != torch.float32 or torch.version.hip or not _has_tf32(x.device.index):
        return "ieee"
    for switch in _TF32_SWITCHES:
        precision = getattr(switch, "fp32_precision", "none")
        if precision != "none":
            return "tf32" if precision == "tf32" else "ieee"
    return "ieee"


#: Up to so many units the recurrent products of fp32 are made of three of TF32 where one is allowed.
SPLIT_UNITS = 64


#: Precision of the recurrent products of fp32 where TF32 is allowed and operands in fp16, scaled, do as well.
NARROW = "fp16"


def _split(precision: str, hidden: int) -> str:
    """How the recurrent products are made: cuDNN does not use TF32 in them for few units (seen on an H200 for 64 and
    1024 sequences), and where a step is short three of them are cheap."""
    return "tf32x3" if precision == "tf32" and padded(hidden) <= SPLIT_UNITS else precision


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Predicted time of one step of one batch tile, in µs, part by part; the parts add up."""

    hand_off: float  # until a published element can be read
    copy: float  # the tile of h (or of gate gradients) from L2
    parts: float  # the second hand-off of the backward pass, of partial sums
    weights: float  # resident weights from shared memory, or the matrix unit's time if longer; fences
    streamed: float  # the other weights from L2
    cell: float  # epilogue: gates, cell, stores
    launch: float  # of the step tier
    prefill: float  # poison of the flag protocol, spread over the steps

    @property
    def total(self) -> float:
        return sum(getattr(self, name) for name in self.__dataclass_fields__)


SHARED_BYTES_PER_CLOCK = 128
HOST_LAUNCH_US = 30.0  # what Python takes for one
#: Override of the plans of a pipeline of layers.
FULL_TILES = {"tile_rows": 0}
#: Steps of a chunk of a pipeline of layers, at least.
SHORTEST_CHUNK = 16


class _Launches:
    """Of a plan: what its launches have compiled, kept with it."""

    @functools.cached_property
    def _compiled(self) -> Compiled:
        return Compiled()


@dataclasses.dataclass(frozen=True)
class RecurrentPlan(_Launches):
    """How one recurrent kernel will be launched."""

    direction: str  # forward or backward
    tier: str
    protocol: str
    hidden: int
    dtype: torch.dtype
    precision: str
    block_h: int
    block_b: int
    block_k: int
    parts: int  # of K, each multiplied by another block of a team (backward)
    chunks: int
    resident: int
    poll: int
    num_warps: int
    n_blocks: int
    n_groups: int
    n_tiles: int
    shared_bytes: int
    save: bool
    cost: StepCost
    max_registers: int | None = None
    amd: bool = False
    hoist: bool = False
    spin_limit: int = SPIN_LIMIT
    #: Constexpr parameters of a variant of the cell that are not the kernel's defaults.
    cell: tuple[tuple[str, Any], ...] = ()
    chains: int = 1  # recurrences side by side in the buffers: directions, heads
    at_once: int = 1  # of them, in one launch
    stacked: bool = False  # the chains are layers, each of which reads the one before it
    stages: int = 1  # of the loop over streamed chunks: above 1 the compiler copies them ahead
    held: int = 0  # of the resident chunks, in registers
    clustered: bool = False  # a team is a thread-block cluster
    tile_rows: int = 0  # sequences of a batch tile, at most block_b
    half: bool = False  # at most half of block_b: the other places have no cells
    alone: bool = False  # the only step of a backward pass, which multiplies nothing

    @property
    def narrow(self) -> bool:
        """Whether the recurrent products of fp32 are of operands in fp16, and h is exchanged in it."""
        return self.precision == NARROW

    @property
    def order(self) -> int | None:
        """How ``rounding.round_weights`` must lay w_hh out for it; None: it reads w_hh as it is, or ``narrow``."""
        if self.precision != "tf32" or self.alone:
            return None
        if self.direction == "forward":
            return rounding.ROWS.value
        return None if self.tier == "single" else rounding.COLUMNS.value

    @property
    def element(self) -> int:
        """Bytes of an element of w_hh and of what is exchanged."""
        return 2 if self.narrow else self.dtype.itemsize

    @property
    def places(self) -> int:
        """Sequences that a tile has room for."""
        return self.block_b // 2 if self.half else self.block_b

    @property
    def cells_a_thread(self) -> float:
        """Of a tile, in a warp of 32."""
        return self.block_h * self.places / (32 * self.num_warps)

    @property
    def cluster_bytes(self) -> int:
        """Shared memory of a block for partial sums and their turns."""
        words = TAGGED_SLOTS * self.parts * self.block_h * self.block_b
        return 8 * words if self.clustered else 0

    @property
    def prologue(self) -> int:
        """Chunks of w_hh that are loaded together before the time loop: as many as half the registers hold."""
        rows = self.block_h * (4 if self.direction == "forward" else self.parts)
        return max(1, PROLOGUE_BYTES * self.num_warps // (rows * self.block_k * self.element))

    @functools.cached_property
    def us_per_step(self) -> float:
        """Predicted time of one step of the whole batch, of all chains."""
        return self.cost.total * math.ceil(self.n_tiles / self.n_groups) * math.ceil(self.chains / self.at_once)

    def cost_of(self, length: int) -> float:
        """Predicted µs of ``length`` steps; the last layer of a stack ends ``chains - 1`` steps after the first."""
        return self.us_per_step * (length + (self.chains - 1 if self.stacked else 0))

    @functools.cached_property
    def constants(self) -> dict[str, Any]:
        """The constexpr parameters of the kernel."""
        constants = {
            "H": self.hidden,
            "HX": padded(self.hidden),
            "BLOCK_H": self.block_h,
            "BLOCK_B": self.block_b,
            "BLOCK_K": self.block_k,
            "RESIDENT": self.resident,
            "PROLOGUE": self.prologue,
            "POLL": self.poll,
            "PROTOCOL": PROTOCOLS[self.protocol],
            "AMD": self.amd,
            "HOIST": self.hoist,
            "SINGLE": self.tier == "single",
            "WARPS": self.num_warps,
            "PRECISION": self.precision,
        }
        if self.chains > 1:
            constants["CHAINS"] = self.chains
        if self.stages > 1:
            constants["STAGES"] = self.stages
        if self.held:
            constants["HELD"] = self.held
        if self.clustered:
            constants["CLUSTER"] = True
        if self.half:
            constants["HALF"] = True
        if self.alone:
            constants["ALONE"] = True
        if self.direction == "forward":
            separate = padded(self.hidden) != self.hidden or self.narrow
            return {**constants, "SAVE": self.save, "SEPARATE_OUT": separate, **dict(self.cell)}
        return {**constants, "PARTS": self.parts, **dict(self.cell)}

    def launch(self, arguments: dict[str, Any], chains: int | None = None) -> Launch:
        """The launch with its tensors and sizes filled in; of ``chains``, if that is fewer than ``at_once``."""
        own = {"n_tiles": self.n_tiles, "tile_rows": self.tile_rows, "spin_limit": self.spin_limit}
        grid: tuple[int, ...] = (self.n_blocks, self.n_groups)
        if self.chains > 1:
            grid = (*grid, chains or self.at_once)
        return Launch(
            KERNELS[self.direction],
            grid,
            {**arguments, **own},
            self.constants,
            self.num_warps,
            cooperative=self.protocol != "none",
            max_registers=self.max_registers,
            cluster=self.parts if self.clustered else 1,
            cluster_bytes=self.cluster_bytes,
            compiled=self._compiled,
        )

    @functools.cached_property
    def cells(self) -> dict[Any, RecurrentPlan]:
        """This plan for other cells, kept so that each is the same object in every call."""
        return {}

    def describe(self) -> str:
        """One line: tier, protocol, tiles."""
        held = f", {self.held} of them in registers" if self.held else ""
        fp16 = " in fp16" if self.narrow else ""
        on_chip = f"{self.resident}/{self.chunks} chunks of w_hh on chip{fp16}{held}"
        if self.alone:
            on_chip = "no w_hh in the only step"
        teams = f" in {'clusters' if self.clustered else 'teams'} of {self.parts}" if self.parts > 1 else ""
        rows = f"{self.tile_rows} in {self.block_b}" if self.tile_rows < self.block_b else f"{self.block_b}"
        what = "layers" if self.stacked else "chains"
        chains = f" x {self.at_once} of {self.chains} {what}" if self.chains > 1 else ""
        return (
            f"{self.tier}, exchange {self.protocol}, {self.n_blocks} blocks of {self.block_h} units{teams} x "
            f"{self.n_groups} groups{chains}, {self.n_tiles} batch tiles of {rows}, {on_chip}, "
            f"{self.num_warps} warps"
        )


def padded(hidden: int) -> int:
    """H rounded up to a multiple of 8, so that rows of a state begin at multiples of 16 bytes: HX."""
    return -(-hidden // 8) * 8


def _power_of_two(value: int, least: int) -> int:
    return max(least, 1 << (value - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class _Problem:
    direction: str
    batch: int
    hidden: int
    dtype: torch.dtype
    precision: str
    device: Device
    save: bool
    one_step: bool
    block_k: int | None = None
    #: The counter protocol runs where it is asked for: a barrier of all blocks of a group costs more than a flag.
    protocols: tuple[str, ...] = ("flag",)
    chains: int = 1
    stacked: bool = False
    #: Layer normalisation: sums over all units inside a step, so no tier that launches step by step.
    normed: bool = False
    #: That were asked for.
    parts: int | None = None
    held: int | None = None
    clustered: bool | None = None
    tile_rows: int | None = None  # 0: as many as the tile has places
    half: bool | None = None

    @property
    def element(self) -> int:
        return 2 if self.precision == NARROW else self.dtype.itemsize

    @property
    def pieces(self) -> int:
        """Tiles that an operand of the products is made of."""
        return 2 if self.precision == "tf32x3" else 1

    @property
    def depth(self) -> int:
        """K of the recurrent product: what a block reads of one batch row in a step."""
        return padded(self.hidden) * (4 if self.direction == "backward" else 1)


def _block_k(problem: _Problem, depth: int, tier: str, block_b: int, threads: int) -> int:
    """Elements of K in a chunk: long chunks, but little padding at the end of a block's ``depth``.

    The products of two chunks are kept apart by a wait for the matrix unit and a fence. Chunks that are read again in
    every step pass through registers, so they are short.
    """
    if problem.block_k is not None:
        return problem.block_k
    if _scalar_products(problem):
        return 64  # the compiler unrolls such a product, with all its operands in registers
    chunks = [size // problem.element for size in (1024, 512, 256)]
    if tier != "persistent":
        return chunks[-1]
    if block_b < 16:
        return 128  # measured: longer ones took up to half as long again
    received = {chunk: chunk * block_b * problem.element / 4 / threads for chunk in chunks}
    # Without wgmma, the operands of a product pass through registers as well.
    most = RECEIVED_REGISTERS / (2 if problem.device.matrix_rows > 16 else 4) / (2 if problem.stacked else 1)
    if _without_wgmma(problem.device) and problem.direction == "backward":
        most /= 2  # else 8 to 16 bytes spill for sm_80
    chunks = [chunk for chunk in chunks if received[chunk] <= most] or chunks[-1:]
    return min(chunks, key=lambda chunk: -(-depth // chunk) * (chunk + 48))


def _candidates(problem: _Problem) -> Iterator[RecurrentPlan]:
    yield from _of_precision(problem)
    # Layers as a wavefront would leave what backward reads in fp16.
    if problem.direction == "forward" and problem.precision == "tf32" and not problem.stacked:
        yield from _of_precision(dataclasses.replace(problem, precision=NARROW))


def _of_precision(problem: _Problem) -> Iterator[RecurrentPlan]:
    hidden = problem.hidden
    if problem.stacked and (problem.one_step or _wavefronts_spill(problem)):
        return
    for block_b in (8, 16, 32) if problem.device.arch in ("sm_90", "emulated") else (16, 32):
        if block_b > 16 and block_b >= 2 * _power_of_two(problem.batch, 16):
            continue
        whole = _power_of_two(padded(hidden), 16)
        if whole <= 128 and not problem.one_step and not problem.stacked and problem.precision != NARROW:
            yield from _feasible(problem, "single", whole, block_b, 1, _single_warps(problem, whole), 1)
        in_loop = ("persistent", "streaming") if problem.normed else ("persistent", "streaming", "step")
        for tier in ("step",) if problem.one_step else in_loop:
            if problem.chains > 1 and tier != "persistent" and not problem.one_step:
                continue  # where one chain leaves no room for another, the layers run one after another
            for block_h, parts in _teams(problem, tier):
                if (block_h > 16 or parts > 4) and block_h * parts >= 2 * padded(hidden):
                    continue
                for stages in _stages(problem, tier):
                    sizes = (block_h, block_b, parts, _num_warps(problem, block_h * parts), stages)
                    for clustered in _clusters(problem, tier, parts):
                        yield from _feasible(problem, tier, *sizes, clustered=clustered)
                        if stages == 1 and problem.one_step and problem.direction == "backward":
                            yield from _feasible(problem, tier, *sizes, alone=True)
                        if stages == 1 and block_b >= 16 and _holds(problem, tier):
                            yield from _feasible(problem, tier, *sizes, 1, clustered)
                    if stages == 1 and _halves(problem, tier, block_b):
                        yield from _feasible(problem, tier, *sizes, half=True)
                        if _holds(problem, tier):
                            yield from _feasible(problem, tier, *sizes, 1, half=True)


def _halves(problem: _Problem, tier: str, block_b: int) -> bool:
    """Whether a tile of up to 8 sequences may have the 16 places that wgmma wants, and cells for 8."""
    able = problem.direction == "forward" and tier == "persistent" and not problem.stacked and not problem.normed
    wanted = problem.half if problem.device.arch == "emulated" else problem.device.matrix_rows > 16
    return bool(able and wanted and block_b == 16 and not _scalar_products(problem))


def _clusters(problem: _Problem, tier: str, parts: int) -> tuple[bool, ...]:
    """Whether a team may be a cluster: where the device is said to have them, or one was asked for."""
    known = TUNED or problem.device.arch == "emulated"  # the Triton whose launches they are made by
    able = known and problem.device.matrix_rows > 16 and parts > 1 and tier == "persistent"
    wanted = problem.device.clusters if problem.clustered is None else problem.clustered
    return (False, True) if able and wanted else (False,)


def _teams(problem: _Problem, tier: str) -> tuple[tuple[int, int], ...]:
    """Units of a block, and how many blocks share the products for theirs.

    Backward a block has only BLOCK_H rows of its own, and K is 4 HX: a team of blocks multiplies for all its units,
    each block a part of K. The matrix unit then gets 64 rows or 128, and a block reads a part of what was exchanged.
    The step tier has no exchange, so no teams. Eight blocks of 8 units read half of what four of 16 read, and multiply
    half as much, where there are multiprocessors for twice as many blocks; eight of 16 make up as many rows as four of
    32.
    """
    if problem.direction == "forward" or tier == "step":
        # 64 units without wgmma take all registers; side by side, or with Triton 3.6 or 3.9, a few more.
        fit = problem.device.matrix_rows > 16 or (TUNED and problem.chains == 1)
        wide = problem.direction == "forward" and fit and problem.pieces == 1
        sizes = (16,) if _scalar_products(problem) else (16, 32, 64) if wide else (16, 32)
        return tuple((block_h, 1) for block_h in sizes)
    if _scalar_products(problem):
        return ((16, 4),)
    # The emulator would run twice as many processes for nothing.
    wanted = problem.parts == 8 if problem.device.arch == "emulated" else TUNED
    eights = ((8, 8), (16, 8)) if wanted and problem.device.matrix_rows > 16 else ()
    return ((16, 4), (32, 2), (32, 4), *eights)


def _max_registers(device: Device, crowded: bool = False) -> int | None:
    """What ptxas is told. Told nothing it aims at two blocks a multiprocessor and spills for it; but the backward
    kernels for sm_90 with the most cells a thread spill only when told (seen by compiling with Triton 3.7.1)."""
    untold = device.arch == "sm_90" and crowded
    return 255 if device.arch.startswith("sm_") and not untold else None


def _hoists(problem: _Problem, tier: str) -> bool:
    """Whether the compiler may move what does not change out of the time loop. With wgmma it must not: the descriptors
    of all weights would take up registers. Without, Triton 3.9 would store the weights to shared memory in every step,
    out of registers that spill, and 3.6 those of a single block (seen by compiling every configuration); 3.7 does not
    need to be told."""
    tiers = ("single", "persistent") if TRITON >= (3, 9) else ("single",) if TRITON < (3, 7) else ()
    without_wgmma = problem.device.matrix_rows == 16 or _scalar_products(problem)
    return tier in tiers and problem.device.arch.startswith("sm_") and without_wgmma


def _num_warps(problem: _Problem, units: int) -> int:
    # 16 of the product's rows a warp. Forward, its units are then the same as in the tile of cells.
    if _scalar_products(problem):
        return 8
    return min(8, max(4, units * (4 if problem.direction == "forward" else 1) // 16))


def _single_warps(problem: _Problem, units: int) -> int:
    # Backward, 16 rows a warp of a wgmma's product: eight warps would multiply 64 rows twice.
    if problem.direction == "backward" and 16 < problem.device.matrix_rows <= units and not _scalar_products(problem):
        return units // 16
    return 4 if units < 32 else 8


#: Of the loop over streamed chunks, where it is a pipeline: two of them are under way while one is multiplied. With two
#: stages the compiler would issue a copy and wait for it at once.
STAGES = 3


def _stages(problem: _Problem, tier: str) -> tuple[int, ...]:
    """Stages that the loop over streamed chunks may have. AMD's pipelines are other ones; FMAs are slower than any
    copy; what is split passes through registers; and a streaming kernel's polls are seen to stay out of the pipeline
    only under the flag protocol."""
    streams = tier == "step" or (tier == "streaming" and problem.protocols == ("flag",))
    arch = problem.device.arch
    if not streams or arch.startswith("gfx") or _scalar_products(problem) or problem.pieces > 1:
        return (1,)
    if tier == "streaming" and problem.device.matrix_rows > 16 and arch != "emulated":
        # For tcgen05 the compiler would run the polls ahead as well, and fails. On an H200 the pipeline was at best as
        # fast as the loop with as many chunks on chip, and it takes the room of two or three of them.
        return (1,)
    return (STAGES, 1) if TUNED else (1,)  # where every configuration was compiled


#: 32-bit registers of what a thread receives at a time, at most.
RECEIVED_REGISTERS = 64
#: Bytes of weights in flight a warp before the time loop: 64 registers of 32 threads.
PROLOGUE_BYTES = 64 * 32 * 4


def _wavefronts_spill(problem: _Problem) -> bool:
    """With Triton 3.6 and 3.9 those of multiply-adds on ordinary cores do, and with 3.9 those without wgmma: 8 to 336
    bytes, however few tiles are received at a time."""
    return not TUNED and (_scalar_products(problem) or (TRITON >= (3, 9) and _without_wgmma(problem.device)))


def _without_wgmma(device: Device) -> bool:
    """Whether it is one of NVIDIA's that has neither wgmma nor tcgen05."""
    return device.arch.startswith("sm_") and device.matrix_rows == 16


def _most_cells(problem: _Problem, tier: str, block_b: int) -> float:
    """Cells a thread computes in a step, at most: with more, registers spill, as compiling every configuration
    (``tritlstm kernels``) shows."""
    if problem.device.arch == "emulated":
        return math.inf
    if _scalar_products(problem):
        return 2 if (tier, problem.direction) == ("single", "forward") else 1
    if problem.normed and (tier, problem.direction) == ("single", "backward"):
        # For sm_90, 8 spill 8 bytes at H=128, and 4 of a tile of 32 sequences 320 to 720 at H=32.
        return 4 if block_b == 16 else 2
    few = TRITON >= (3, 9) and problem.device.arch == "sm_120"  # which has the fewest to spare there
    if tier == "single":
        if few and problem.direction == "backward":
            return 2
        if problem.chains > 1 and problem.device.matrix_rows > 16 and not TUNED:
            return 4 if problem.direction == "forward" else 2  # more spill 8 to 32 bytes for sm_90
        if problem.chains > 1 and problem.direction == "backward" and _without_wgmma(problem.device):
            return 0 if problem.pieces > 1 else 2  # 4 spill 8 bytes for sm_80, and in pieces 2
        if problem.direction == "backward" and problem.pieces > 1:
            # 4 spill 8 bytes for sm_80, of tiles of 32 up to 16 for sm_90, and 2 beside another chain 8 to 24.
            return 0 if problem.chains > 1 else 2 if problem.device.matrix_rows == 16 or block_b > 16 else 4
        if problem.direction == "backward" and problem.element == 4 and problem.device.matrix_rows > 16:
            return 4 if block_b <= 16 else 0  # 8 spill 8 bytes for sm_90
        if problem.direction == "forward" and TRITON < (3, 7) and problem.device.matrix_rows > 16:
            return 4  # 8 spill 24 bytes for sm_90
        return 8 if problem.direction == "forward" or block_b <= 16 else 0
    backward = problem.direction == "backward"
    if problem.stacked and backward and problem.element == 4 and problem.device.matrix_rows > 16:
        return 1  # 2 spill up to 100 bytes for sm_90
    if problem.normed and backward and problem.precision == "tf32" and problem.device.arch == "sm_90":
        return 1  # 2 spill 8 to 24 bytes
    if problem.stacked or problem.normed or (tier == "step" and (backward or problem.pieces > 1)):
        return 2  # of a step, 4 spill 8 bytes for sm_90
    if backward and not TUNED:
        return 2  # 4 spill 16 to 144 bytes for sm_90
    if backward and _without_wgmma(problem.device):
        return 2  # 4 spill 8 to 16 bytes for sm_80
    if problem.element == 4 and problem.device.matrix_rows > 16 and (tier == "persistent" or problem.chains > 1):
        return 2  # 4 spill 8 to 48 bytes for sm_90
    return 2 if problem.element == 4 and (few or backward) else 4


def _scalar_products(problem: _Problem) -> bool:
    """Whether ``tl.dot`` becomes multiply-adds of the ordinary cores: fp32 without TF32."""
    return problem.precision == "ieee" and problem.element == 4 and problem.device.arch != "emulated"


def _holds(problem: _Problem, tier: str) -> bool:
    """Whether a chunk of w_hh may stay in registers, which wgmma reads in place of shared memory; tcgen05 does not.

    Beside streamed chunks, 24 to 48 bytes spill for sm_90.
    """
    if problem.device.arch == "emulated":
        return problem.held == 1 and tier == "persistent"
    fits = problem.element == 2 and not problem.stacked and not problem.normed and problem.chains == 1
    return fits and tier == "persistent" and problem.device.arch == "sm_90" and TUNED


#: Per cent of the multiprocessors that clusters surely find: those of one are of one part of the device (GPC), and what
#: a part has beyond a multiple of them stays free. An estimate.
CLUSTERED_PART = 85
#: Columns of w_hh in registers, at most: 64 registers a thread, a quarter of all.
HELD_COLUMNS = 256
#: What a tile passes through on its way there, which is free again before the time loop.
HELD_SCRATCH = 24 << 10


def tile_rows(batch: int, places: int, groups: int) -> int:
    """Sequences of a tile that has so many places, where so many groups of blocks find room.

    Who has fewer reads less in every step, so the batch is dealt out to all groups alike.
    """
    turns = math.ceil(math.ceil(batch / places) / groups)
    return math.ceil(batch / min(batch, groups * turns))


def _feasible(
    problem: _Problem, tier: str, block_h: int, block_b: int, parts: int, num_warps: int, stages: int, held: int = 0,
    clustered: bool = False, half: bool = False, alone: bool = False,
) -> Iterator[RecurrentPlan]:  # fmt: skip
    device, hidden, sms = problem.device, problem.hidden, problem.device.sms
    if clustered and device.arch != "emulated":
        sms = CLUSTERED_PART * sms // 100
    element = problem.element * problem.pieces  # of an operand of the products
    forward = problem.direction == "forward"
    matrices = 2 if problem.stacked else 1  # of weights a block
    threads = num_warps * device.warp_size
    places = block_b // 2 if half else block_b
    cells = block_h * places / threads
    if cells > _most_cells(problem, tier, block_b) or (held and cells > 2):
        return
    if problem.normed and parts == 8 and cells > 1 and device.arch != "emulated":
        return  # 8 to 160 bytes spill for sm_90
    if problem.chains > 1 and parts == 8 and cells > 1 and problem.precision == "tf32" and device.arch == "sm_90":
        return  # 40 to 56 bytes spill at H=1024
    if _without_wgmma(device):
        if problem.normed and (stages > 1 or (tier == "persistent" and block_h > 16)):
            return  # 8 to 48 bytes spill for sm_80
        if stages > 1 and cells > (1 if tier == "streaming" and not forward else 2):
            return  # 8 to 104 bytes spill
    n_blocks = 1 if tier == "single" else -(-padded(hidden) // (block_h * parts)) * parts
    n_tiles = -(-problem.batch // block_b)
    if tier != "step" and n_blocks > sms:
        return
    if tier == "step" and n_tiles > 65535:
        return  # more than CUDA's second dimension holds
    if tier == "single":
        block_k = block_h
        chunks = resident = poll = 1
        # Operands of the product come from registers through shared memory.
        shared = 4 * block_h * block_h * element + block_h * block_b * (4 * 4 + element)
        if shared > device.shared_bytes:
            return
    else:
        depth = problem.depth // parts
        block_k = _block_k(problem, depth, tier, block_b, threads)
        if held:
            block_k = min(block_k, HELD_COLUMNS)
        chunks = -(-depth // block_k)
        rows = (4 if forward else parts) * block_h
        chunk_bytes = rows * block_k * element
        tile_bytes = block_k * block_b * element
        scratch = rows * block_b * 4 + (8 * TAGGED_SLOTS * parts * block_h * block_b if clustered else 0)
        if tile_bytes < 16 * threads * problem.pieces and device.arch.startswith("sm_"):
            return  # a thread waits for whole runs of 16 bytes
        if parts == 8 and (depth * problem.element % 16 or cells < 1):
            return  # a part of K would not begin with such a run, or each cell be computed twice
        room = device.shared_bytes - scratch
        per_tile = tile_bytes / 4 / threads
        from_shared = device.matrix_rows > 16
        received = RECEIVED_REGISTERS / (1 if cells <= 2 else 2 if tier == "persistent" and from_shared else 4)
        received /= matrices  # two loops' worth of addresses are held
        if problem.stacked and not forward and (TRITON < (3, 7) or (from_shared and cells > 1)):
            received /= 2  # else 16 to 56 bytes spill for sm_90
        if problem.precision == "tf32" and (tier == "streaming" or (problem.normed and cells >= 2)):
            # More would leave less room for weights; and with a norm 8 bytes spill for sm_90.
            received /= 16 if problem.normed and forward and tier == "streaming" else 4
        elif problem.normed and problem.precision == NARROW:
            received /= 4  # else 8 bytes spill for sm_90
        if problem.normed and forward and _scalar_products(problem):
            received = 0  # one at a time, else 8 bytes spill for sm_90
        resident = poll = 0
        # What the loop over streamed chunks holds, beside tiles that were received before it.
        passing = chunk_bytes if stages == 1 else stages * chunk_bytes + tile_bytes
        if tier == "step" and stages > 1:
            passing += (stages - 1) * tile_bytes  # nobody is waited for, so they are copied ahead as well
            if passing > room:
                return
        for together in (16, 8, 4, 2, 1):
            passed = min(together, chunks) * tile_bytes  # received at a time
            most = (room - passed) // chunk_bytes + held
            if together > 1 and together * per_tile > received:
                continue
            if held and passed / 4 / threads > RECEIVED_REGISTERS * 3 // 4:
                continue  # beside them 40 to 48 bytes spill
            if tier == "step" and most >= 1:
                poll = 1
                break
            if tier == "persistent" and most >= chunks * matrices:
                resident, poll = chunks, together
                break
            if tier == "streaming":
                beside = passing + passed if stages == 1 else max(passing, passed)
                most = min(chunks - 1, (room - beside) // chunk_bytes + held)
                if most >= together:
                    resident, poll = most, together
                    break
        if poll == 0:
            return
        received_bytes = min(poll, chunks) * tile_bytes
        if resident == chunks:
            passing = 0
        beside = received_bytes + passing if stages == 1 else max(received_bytes, passing)
        shared = (resident * matrices - held) * chunk_bytes + beside + scratch
        if held:
            shared = max(shared, HELD_SCRATCH)
    plan = RecurrentPlan(
        problem.direction, tier, "none", hidden, problem.dtype, problem.precision, block_h, block_b, block_k, parts,
        chunks, resident, poll, num_warps, n_blocks, n_tiles, n_tiles, shared, problem.save, cost=_NO_COST,
        max_registers=_max_registers(device, not forward and tier != "single" and cells > 2),
        amd=device.arch.startswith("gfx"), hoist=_hoists(problem, tier),
        chains=problem.chains, stacked=problem.stacked, stages=stages, held=held, clustered=clustered,
        half=half, alone=alone,
    )  # fmt: skip
    most = problem.chains if tier == "step" else min(problem.chains, sms // n_blocks)
    if problem.stacked and most < problem.chains:
        return
    for protocol in ("none",) if tier in ("single", "step") else problem.protocols:
        for at_once in {most} if problem.stacked else {1, most}:
            most_groups = n_tiles if tier == "step" else sms // (n_blocks * at_once)
            rows = problem.tile_rows or block_b
            # A single block and one step's launches read no more for more rows; the emulator has too few processors.
            if problem.tile_rows is None and tier in ("persistent", "streaming") and device.arch != "emulated":
                rows = tile_rows(problem.batch, block_b, most_groups)
            if rows > places or (tier == "single" and rows < places):
                continue  # a single block's tiles are full
            tiles = -(-problem.batch // rows)
            groups = min(tiles, most_groups)
            chosen = dataclasses.replace(
                plan, protocol=protocol, at_once=at_once, tile_rows=rows, n_tiles=tiles, n_groups=groups
            )
            yield dataclasses.replace(chosen, cost=_cost(problem, chosen))


_NO_COST = StepCost(0, 0, 0, 0, 0, 0, 0, 0)


def _cost(problem: _Problem, plan: RecurrentPlan) -> StepCost:
    """The cost model; kernels/README.md derives every line."""
    device, element, known = problem.device, problem.element, problem.device.constants
    forward = problem.direction == "forward"
    blocks = plan.n_blocks * plan.n_groups * plan.at_once
    waves = math.ceil(blocks / device.sms)
    blocks = min(blocks, device.sms)
    rows = min(plan.tile_rows, problem.batch)
    clock = device.clock_ghz * 1e3
    depth = problem.depth
    weight_bytes = plan.block_h * 4 * problem.hidden * element
    share = plan.resident / plan.chunks
    contracted = _power_of_two(problem.hidden, 16) if plan.tier == "single" else problem.hidden
    products = 3 if problem.pieces == 2 else 1
    multiply_adds = products * plan.block_h * plan.block_b * 4 * contracted
    rate = device.fma_per_clock * (1.0 if element == 2 else 0.5)
    if problem.precision == "ieee" and element == 4:
        rate = 128 * 0.25  # CUDA cores, operands from shared memory
    elif plan.block_h * (4 if forward else plan.parts) < device.matrix_rows:
        rate *= 0.5
    matrix = multiply_adds / (rate * clock)
    # A warp group reads 64 rows of weights and, twice over, the tile that it multiplies them with (measured on sm_90).
    warp_groups = math.ceil(plan.block_h * (4 if forward else plan.parts) / 64)
    tiles_read = 2 * warp_groups * plan.block_b * contracted * (1 if forward else 4) * element
    per_clock = SHARED_BYTES_PER_CLOCK
    if plan.block_b < WGMMA_COLUMNS and device.matrix_rows > 16:
        per_clock //= 2  # no wgmma is that narrow: weights pass through registers
    in_shared = (plan.resident - plan.held) / plan.chunks
    shared = products * (in_shared * weight_bytes + tiles_read / plan.parts) / (per_clock * clock)
    read = rows * depth // plan.parts * element
    receptions = math.ceil(plan.resident / plan.poll)
    # Of a pipeline only the first chunk is waited for: to copy one takes longer than to wait for h.
    receptions += plan.chunks - plan.resident if plan.stages == 1 else 1
    copy = (
        0.0
        if plan.tier == "single"
        else receptions * known.l2_latency_us
        + max(read / known.sm_l2_bytes_per_us, blocks * read / device.l2_bytes_per_us)
    )
    parts = 0.0
    if plan.parts > 1:
        taken = plan.parts * plan.block_h * rows * 8  # 64-bit words
        copied = max(taken / known.sm_l2_bytes_per_us, blocks * taken / device.l2_bytes_per_us)
        parts = known.parts_us + known.flag_us + known.l2_latency_us + copied
        if plan.clustered:
            parts = known.cluster_us + taken / known.cluster_bytes_per_us
    if problem.normed and plan.tier != "single":
        # Twice two numbers a row from every block.
        taken = -(-padded(problem.hidden) // plan.block_h) * 2 * rows * 8
        copied = max(taken / known.sm_l2_bytes_per_us, blocks * taken / device.l2_bytes_per_us)
        parts += 2 * (known.flag_us + known.l2_latency_us + copied)
    left = (1.0 - share) * weight_bytes
    streamed = max(left / known.sm_l2_bytes_per_us, blocks * left / device.l2_bytes_per_us)
    hand_off = {"none": 0.0, "counter": known.counter_us, "flag": known.flag_us}[plan.protocol]
    cell = (known.cell_us if forward else known.grad_us) * (0.5 + 0.25 * plan.cells_a_thread)  # constants: of two
    prefill = 0.0
    if plan.protocol == "flag":
        prefill = rows * plan.n_groups * plan.at_once * depth * element / device.memory_bytes_per_us
    if plan.stacked:  # what the layer below or above has is read and multiplied too
        copy, matrix, shared = 2 * copy, 2 * matrix, 2 * shared
    launch = known.launch_us if plan.tier == "step" and not problem.one_step else 0.0
    weights = max(matrix, shared) + known.fence_us * plan.chunks * (2 if plan.stacked else 1)
    if plan.tier == "single":
        # Twice as many operands pass to shared memory; that a turn then takes half as long again is an estimate.
        weights += known.turn_us * (1 if forward else 4) * (1.5 if products > 1 else 1)
    if plan.alone:
        copy = weights = streamed = 0.0
    return StepCost(
        hand_off, copy * waves, parts * waves, weights * waves, streamed * waves, cell * waves, launch, prefill
    )


class PlanError(ValueError):
    """No configuration fits, or the overrides exclude all that do."""


def recurrent(
    direction: str,
    length: int,
    batch: int,
    hidden: int,
    dtype: torch.dtype,
    device: Device,
    precision: str = "ieee",
    save: bool = True,
    overrides: Mapping[str, Any] | None = None,
    chains: int = 1,
    stacked: bool = False,
    normed: bool = False,
) -> RecurrentPlan:
    """The fastest predicted plan of one recurrent kernel.

    ``direction`` is ``'forward'`` or ``'backward'``; ``overrides`` fixes fields of :class:`RecurrentPlan` (``tier``,
    ``protocol``, ``block_h``, ``block_b``, ``block_k``, ``num_warps``, ``at_once``, ``stages``, ``held``, forward
    ``half`` and ``narrow``, backward ``parts``, ``clustered`` and ``alone``, ``tile_rows``, of which 0 is full tiles,
    and after the choice ``resident``, ``poll``, ``n_groups``). ``chains``: so many recurrences side by side, which need
    nothing of each other (directions, heads of H units); only plans that hold w_hh on chip, and those of one step, know
    them.
    ``stacked``: they are layers instead, each of which reads the one before it, and all run at once.
    ``normed``: with layer normalisation.
    Raises :class:`PlanError` if nothing fits.
    """
    found = _recurrent(
        direction, length == 1, batch, hidden, dtype, device, precision, save, _items(overrides), chains, stacked,
        normed,
    )  # fmt: skip
    if isinstance(found, str):
        raise PlanError(found)
    return found


def _items(overrides: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(overrides.items())) if overrides else ()


# Asked several times in every call of a layer, so that it is one look-up, also where nothing fits.
@functools.lru_cache(maxsize=4096)
def _recurrent(
    direction: str,
    one_step: bool,
    batch: int,
    hidden: int,
    dtype: torch.dtype,
    device: Device,
    precision: str,
    save: bool,
    overrides: tuple[tuple[str, Any], ...],
    chains: int,
    stacked: bool,
    normed: bool,
) -> RecurrentPlan | str:
    fixed = dict(overrides)
    if direction == "forward":
        fixed.pop("parts", None)
        fixed.pop("clustered", None)
        fixed.pop("alone", None)
    else:
        fixed.pop("half", None)
        fixed.pop("narrow", None)
    block_k, rows = fixed.pop("block_k", None), fixed.pop("tile_rows", None)
    # A single step needs no exchange; every longer sequence is planned alike.
    asked = fixed.get("protocol")
    protocols = (asked,) if asked in ("flag", "counter") else ("flag",)
    one_step = one_step and not normed
    precision = precision if dtype == torch.float32 else "ieee"
    problem = _Problem(
        direction, batch, hidden, dtype, _split(precision, hidden), device, save, one_step, block_k, protocols, chains,
        stacked, normed, fixed.get("parts"), fixed.get("held"), fixed.get("clustered"), rows,
        fixed.get("half"),
    )  # fmt: skip
    try:
        return _best(problem, tuple(sorted(fixed.items())))
    except PlanError as error:
        return str(error)


class Together(NamedTuple):
    """How layers run: ``'apart'``, in a ``'wavefront'``, or in a ``'pipeline'`` of so many chunks of time."""

    way: str
    chunks: int
    us: float  # predicted, of the recurrence


def together(
    length: int,
    batch: int,
    layers: int,
    hidden: int,
    dtype: torch.dtype,
    device: Device,
    precision: str = "ieee",
    training: bool = True,
    overrides: Mapping[str, Any] | None = None,
) -> Together:
    """The way of running ``layers`` layers that is predicted to take the least time.

    What forward saves lies in memory as its way has it, so backward must take the same: in fp32 it does not depend on
    whether TF32 is allowed, as it may be in one of the two passes alone.
    """
    costs = (SHORTEST_CHUNK, HOST_LAUNCH_US)
    fixed = (length, batch, layers, hidden, dtype, device, training, _items(overrides), costs)
    if dtype == torch.float32 and not device.arch.startswith("gfx"):
        return _together_in_both(*fixed)
    return _together(*fixed, precision)


@functools.lru_cache(maxsize=4096)
def _together_in_both(*fixed: Any) -> Together:
    """The best way where TF32 is allowed, if it is one without TF32 too; else the best one there, likewise."""
    known = []
    for precision in ("tf32", "ieee"):
        with contextlib.suppress(PlanError):  # what runs says so
            known.append(_ways(*fixed, precision))
    if not known:
        return _together(*fixed, "ieee")
    for ways in known:
        best = min(ways.values(), key=lambda way: way.us)
        if all(best.way in others for others in known):
            return best
    return known[0]["apart"]


def _together(*fixed: Any) -> Together:
    return min(_ways(*fixed).values(), key=lambda way: way.us)


@functools.lru_cache(maxsize=4096)
def _ways(
    length: int,
    batch: int,
    layers: int,
    hidden: int,
    dtype: torch.dtype,
    device: Device,
    training: bool,
    overrides: tuple[tuple[str, Any], ...],
    costs: tuple[int, float],  # of a pipeline
    precision: str,
) -> dict[str, Together]:
    """All ways that there are, by name."""
    directions = ("forward", "backward") if training else ("forward",)
    fixed = (length, batch, hidden, dtype, device, precision, training, dict(overrides))
    alone = [recurrent(direction, *fixed) for direction in directions]
    ways = {"apart": Together("apart", 1, layers * sum(plan.cost_of(length) for plan in alone))}
    if layers > 1 and length > 1:
        with contextlib.suppress(PlanError):
            waves = [recurrent(direction, *fixed, layers, stacked=True) for direction in directions]
            ways["wavefront"] = Together("wavefront", 1, sum(plan.cost_of(length) for plan in waves))
        # Full tiles: a batch that is dealt out to all multiprocessors leaves none for another layer.
        full = [recurrent(direction, *fixed[:-1], {**fixed[-1], **FULL_TILES}) for direction in directions]
        pipeline = _pipeline(full, length, layers, device, *costs)
        if pipeline.us < math.inf:
            ways["pipeline"] = pipeline
    return ways


def _pipeline(
    alone: Sequence[RecurrentPlan], length: int, layers: int, device: Device, shortest_chunk: int, launch_us: float
) -> Together:
    whole = sum(plan.cost_of(length) for plan in alone)
    # As many layers at a time as have room beside each other. The last one starts a chunk later for each, so chunks
    # should be short; but each costs its launches.
    side_by_side = min(layers, *(device.sms // (plan.n_blocks * plan.n_groups) for plan in alone))
    each = 2 * launch_us * layers * len(alone)  # a product and a recurrence
    chunks = max(1, min(length // shortest_chunk, round(math.sqrt(whole * (layers - 1) / each))))
    # A single block keeps in registers what the next launch would need.
    if side_by_side < 2 or chunks < 2 or any(plan.tier in ("single", "step") for plan in alone):
        return Together("pipeline", 1, math.inf)
    us = whole * math.ceil(layers / side_by_side) * (1 + (side_by_side - 1) / chunks) + each * chunks
    return Together("pipeline", chunks, us)


def next_layers(layers: int, *fixed: Any) -> int:
    """How many of the next ``layers`` go together: as many as take the least time a layer.

    ``fixed`` are the arguments of :func:`together` around ``layers``: length, batch, then from hidden on.
    """
    length, batch, *rest = fixed
    best, least = 1, together(length, batch, 1, *rest).us
    for count in range(2, layers + 1):
        way = together(length, batch, count, *rest)
        if way.way != "apart" and way.us / count <= least:
            best, least = count, way.us / count
    return best


def tiers(
    direction: str,
    length: int,
    batch: int,
    hidden: int,
    dtype: torch.dtype,
    device: Device,
    precision: str = "ieee",
    save: bool = True,
    chains: int = 1,
    stacked: bool = False,
    normed: bool = False,
    narrow: bool = True,
) -> dict[str, RecurrentPlan | str]:
    """The best plan of every tier or, where a tier can't run these sizes, the reason. ``narrow``: whether it may be."""
    one_step = length == 1 and not normed
    precision = precision if dtype == torch.float32 else "ieee"
    problem = _Problem(
        direction, batch, hidden, dtype, _split(precision, hidden), device, save, one_step, chains=chains,
        stacked=stacked, normed=normed,
    )  # fmt: skip
    found: dict[str, RecurrentPlan | str] = {}
    for tier in TIERS:
        plans = [plan for plan in _candidates(problem) if plan.tier == tier and plan.narrow <= narrow]
        found[tier] = min(plans, key=lambda plan: plan.us_per_step) if plans else _why_not(problem, tier)
    return found


def _why_not(problem: _Problem, tier: str) -> str:
    device, hidden = problem.device, problem.hidden
    weights = 4 * hidden * hidden * problem.element
    if problem.one_step and tier != "step":
        return "a single time step needs no loop"
    if problem.stacked and tier != "persistent":
        return "it runs one layer after another"
    if problem.chains > 1 and tier in ("streaming", "step"):
        return "it runs one chain after another"
    if problem.normed and tier == "step":
        return "layer normalisation sums over all units inside a step, which one launch a step can't"
    if tier == "single":
        return (
            f"a block would hold all of w_hh, {_kib(weights)} KiB, in at most {_kib(device.shared_bytes)} KiB of "
            "shared memory and for H up to 128"
        )
    if tier == "persistent":
        return (
            f"w_hh is {_kib(weights)} KiB; {device.sms} blocks with {_kib(device.shared_bytes)} KiB of shared memory "
            "each, less the tiles that pass through it, can't hold it"
        )
    if -(-padded(hidden) // 64) > device.sms:
        return f"even 64 units a block make more blocks than the {device.sms} multiprocessors hold at once"
    return (
        "w_hh fits on chip"
        if tier == "streaming"
        else "the received tile does not fit registers or shared memory"
    )


def _kib(size: int) -> int:
    return -(-size // 1024)


CHOICES = ("tier", "protocol", "block_h", "block_b", "num_warps", "parts", "at_once", "stages", "held", "clustered",
           "half", "narrow", "alone")  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _best(problem: _Problem, fixed: tuple[tuple[str, Any], ...]) -> RecurrentPlan:
    wanted = dict(fixed)
    suiting = [plan for plan in _candidates(problem) if _matches(plan, wanted)]
    if not suiting:
        raise PlanError(
            f"no {problem.direction} kernel configuration for H={problem.hidden}, B={problem.batch}, "
            f"{problem.dtype} on {problem.device.name} ({problem.device.sms} multiprocessors, "
            f"{problem.device.shared_bytes} bytes of shared memory a block)"
            f"{_chains(problem)}{f' with {wanted}' if wanted else ''}"
        )
    # Of equals the one with a pipeline, so that a tile of one chunk runs the kernel that larger ones run.
    best = min(
        suiting, key=lambda p: (p.us_per_step, p.num_warps, p.block_b, p.block_h, -p.at_once, -p.stages)
    )
    return _adjusted(best, {key: value for key, value in wanted.items() if key not in CHOICES})


def _chains(problem: _Problem) -> str:
    if problem.chains == 1:
        return ""
    return f", {problem.chains} layers as a wavefront" if problem.stacked else f", {problem.chains} side by side"


def _matches(plan: RecurrentPlan, wanted: Mapping[str, Any]) -> bool:
    return all(getattr(plan, key) == wanted[key] for key in CHOICES if key in wanted)


def _adjusted(plan: RecurrentPlan, changes: Mapping[str, Any]) -> RecurrentPlan:
    """``plan`` with fields set by hand, for tests and tuning: what depends on them follows."""
    if not changes or plan.tier == "single":
        return dataclasses.replace(
            plan, **{k: v for k, v in changes.items() if k in ("n_groups", "spin_limit", "amd")}
        )
    resident = plan.chunks
    if plan.tier != "persistent":
        resident = min(changes.get("resident", plan.resident), plan.chunks)
    return dataclasses.replace(
        plan, resident=resident, poll=changes.get("poll", plan.poll),
        n_groups=min(plan.n_tiles, changes.get("n_groups", plan.n_groups)),
        spin_limit=changes.get("spin_limit", plan.spin_limit), amd=changes.get("amd", plan.amd),
        stages=1 if changes.get("amd") else plan.stages,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class GemmPlan(_Launches):
    """How the gate GEMM will be launched."""

    features: int
    hidden: int
    precision: str
    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    grid: int
    max_registers: int | None = None

    @functools.cached_property
    def constants(self) -> dict[str, Any]:
        return {
            "D": self.features,
            "H": self.hidden,
            "HX": padded(self.hidden),
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "PRECISION": self.precision,
        }

    def launch(self, arguments: dict[str, Any]) -> Launch:
        return Launch(
            "gate_gemm",
            (self.grid,),
            arguments,
            self.constants,
            self.num_warps,
            self.num_stages,
            max_registers=self.max_registers,
            compiled=self._compiled,
        )


@functools.lru_cache(maxsize=4096)
def gate_gemm(
    rows: int, features: int, hidden: int, dtype: torch.dtype, device: Device, precision: str = "ieee"
) -> GemmPlan:
    """The plan of the gate GEMM ``[rows, D] x [D, 4H]``: large tiles where they fill the device, else small ones."""
    columns = 4 * padded(hidden)
    if device.arch == "emulated":
        block_m, block_n, num_warps = 32, 64, 4
        ragged = scalar = False
    else:
        block_m, block_n, num_warps = 128, 128, 8
        scalar = precision == "ieee" and dtype == torch.float32
        # Rows that do not begin at 16 bytes are loaded element by element, each with an address of its own.
        ragged = features * dtype.itemsize % 16 != 0
        few = -(-rows // block_m) * -(-columns // block_n) < device.sms
        if few or scalar or ragged or device.shared_bytes < 128 << 10:
            block_m, block_n, num_warps = 64, 64, 8 if scalar else 4
        if rows <= 16:
            block_m = 16
    widest = 64 if dtype.itemsize == 2 else 16 if ragged and scalar else 32
    block_k = min(widest, _power_of_two(features, 16))
    num_stages = 3 if device.shared_bytes >= 128 << 10 else 2
    tiles = -(-rows // block_m) * -(-columns // block_n)
    return GemmPlan(features, hidden, precision, block_m, block_n, block_k, 8, num_warps, num_stages, tiles,
                    _max_registers(device))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class NarrowPlan(_Launches):
    """How w_hh and h0 of fp32 are brought into fp16, before a recurrent kernel whose plan is ``narrow``."""

    hidden: int
    chains: int
    rows: int
    columns: int
    num_warps: int = 4
    precision = NARROW

    @functools.cached_property
    def constants(self) -> dict[str, Any]:
        width = padded(self.hidden)
        return {"H": self.hidden, "HX": width, "CHAINS": self.chains, "ROWS": self.rows, "COLUMNS": self.columns}

    def launch(self, arguments: dict[str, Any]) -> Launch:
        tiles = -(-4 * self.hidden * self.chains // self.rows) + -(-(arguments["states"] + 1) // self.rows)
        return Launch("narrow", (tiles,), arguments, self.constants, self.num_warps, compiled=self._compiled)


@dataclasses.dataclass(frozen=True)
class RoundPlan(_Launches):
    """How weights [C, 4H, H] are rounded to TF32 and laid out, before a recurrent kernel with an ``order``."""

    hidden: int
    chains: int
    order: int
    num_warps: int = 4
    precision = "tf32"

    @functools.cached_property
    def constants(self) -> dict[str, Any]:
        return {"H": self.hidden, "HX": padded(self.hidden), "ORDER": self.order, "TILE": ROUNDED_TILE}

    def launch(self, arguments: dict[str, Any]) -> Launch:
        tiles = -(-padded(self.hidden) // ROUNDED_TILE)
        grid = (tiles, tiles, self.chains)
        return Launch("round_weights", grid, arguments, self.constants, self.num_warps, compiled=self._compiled)


#: Units on either side of the four gates' tile that a program rounds: 32 elements a thread.
ROUNDED_TILE = 32


@functools.lru_cache(maxsize=256)
def rounded(hidden: int, chains: int, order: int) -> RoundPlan:
    """The plan for w_hh [C, 4H, H] of ``chains`` chains."""
    return RoundPlan(hidden, chains, order)


#: Elements that a program brings into fp16 at a time: 32 a thread.
NARROWED_AT_ONCE = 4096


@functools.lru_cache(maxsize=256)
def narrow(hidden: int, chains: int = 1) -> NarrowPlan:
    """The plan for w_hh [C, 4H, H] and h0 of ``chains`` chains."""
    columns = min(1024, _power_of_two(padded(hidden), 64))
    return NarrowPlan(hidden, chains, NARROWED_AT_ONCE // columns, columns)


@dataclasses.dataclass(frozen=True)
class OneStepPlan(_Launches):
    """How a sequence of one time step will be launched: both products and the cell at once."""

    tier = "step"

    features: int
    hidden: int
    dtype: torch.dtype
    precision: str
    block_h: int
    block_b: int
    block_k: int
    num_warps: int
    stages: int
    grid: tuple[int, int]  # batch tiles, of which there may be more than CUDA's second dimension holds, and blocks
    save: bool
    us_per_step: float  # predicted, of the launch
    max_registers: int | None = None
    amd: bool = False

    @functools.cached_property
    def constants(self) -> dict[str, Any]:
        return {
            "D": self.features,
            "H": self.hidden,
            "HX": padded(self.hidden),
            "BLOCK_H": self.block_h,
            "BLOCK_B": self.block_b,
            "BLOCK_K": self.block_k,
            "STAGES": self.stages,
            "PRECISION": self.precision,
            "RECURRENT": _split(self.precision, self.hidden),
            "SAVE": self.save,
            "AMD": self.amd,
        }

    def launch(self, arguments: dict[str, Any]) -> Launch:
        return Launch(
            "one_step",
            self.grid,
            arguments,
            self.constants,
            self.num_warps,
            max_registers=self.max_registers,
            compiled=self._compiled,
        )

    def describe(self) -> str:
        """One line: tiles."""
        return (
            f"one launch for both products and the cell, {self.grid[1]} blocks of {self.block_h} units x "
            f"{self.grid[0]} batch tiles of {self.block_b}, {self.num_warps} warps"
        )


@functools.lru_cache(maxsize=4096)
def one_step(
    batch: int,
    features: int,
    hidden: int,
    dtype: torch.dtype,
    device: Device,
    precision: str = "ieee",
    save: bool = True,
) -> OneStepPlan:
    """The plan of a sequence of one step, ``x`` [1, B, D]: the tiles that are predicted to take the least time.

    All weights are read once, whatever B; so few units a block, and many blocks, where there are few sequences.
    """
    scalar = precision == "ieee" and dtype == torch.float32 and device.arch != "emulated"
    element, known, forms = dtype.itemsize, device.constants, []
    for block_h in (16,) if scalar else (4, 8, 16, 32):
        for block_b in (16,) if scalar else (16, 32, 64, 128):
            rows, warps = 4 * block_h, 8 if scalar else block_h // 4
            cells = block_h * block_b / (warps * device.warp_size)
            if cells > MOST_CELLS_AT_ONCE or (block_b > 16 and block_b >= 2 * _power_of_two(batch, 16)):
                continue
            grid = (-(-batch // block_b), -(-padded(hidden) // block_h))
            blocks = min(grid[0] * grid[1], device.sms)
            read = (rows + min(batch, block_b)) * (features + hidden) * element
            rate = 32.0 if scalar else device.fma_per_clock * (1 if element == 2 else 0.5)
            if rows < device.matrix_rows:
                rate /= 2
            us = max(
                read / known.sm_l2_bytes_per_us, blocks * read / device.l2_bytes_per_us,
                rows * block_b * (features + hidden) / (rate * device.clock_ghz * 1e3),
            )  # fmt: skip
            us = (us + known.cell_us * (0.5 + 0.25 * cells)) * math.ceil(grid[0] * grid[1] / device.sms)
            # Rows that do not begin at 16 bytes are loaded element by element, each with an address of its own.
            ragged = features * element % 16 != 0 or hidden * element % 16 != 0
            registers = CHUNK_REGISTERS // (1 if cells <= 2 else 2) // (3 if ragged else 1)
            most = min(registers * 128 * warps, device.shared_bytes // 6)
            block_k = 1 << (most // ((rows + block_b) * element)).bit_length() - 1
            block_k = 32 if scalar else max(16, min(block_k, _power_of_two(max(features, hidden), 16)))
            forms.append((us, block_h, block_b, block_k, warps, grid))
    us, block_h, block_b, block_k, warps, grid = min(forms)
    return OneStepPlan(
        features, hidden, dtype, precision, block_h, block_b, block_k, warps, 1 if scalar else 3, grid, save,
        us + known.l2_latency_us, _max_registers(device), device.arch.startswith("gfx"),
    )  # fmt: skip


#: Of the kernel for one step, at most: cells a thread computes, and registers of what a thread multiplies at a time.
MOST_CELLS_AT_ONCE, CHUNK_REGISTERS = 8, 64
