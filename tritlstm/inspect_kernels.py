"""``tritlstm kernels``: cross-compiles what the planner can choose and reads the result, without a GPU.

A row of the JSON describes one compiled kernel:

========================  ============================================================================
``kernel``, ``config``    its name; constexpr parameters, warps, tier, protocol, planned shared memory
``arch``, ``dtype``       ``sm_90``, ``gfx942``, …; ``fp16``, ``bf16`` or ``fp32``
``registers``             a thread
``spill_bytes``           a thread's registers kept in memory: stack on NVIDIA, scratch on AMD
``shared_bytes``          of a block; ``shared_limit`` is the architecture's limit
``instructions``          counts by mnemonic, the matrix instruction among them
``matrix_instruction``    its mnemonic (``HGMMA``, ``v_mfma_f32_16x16x16_bf16``), or null
``weights_resident``      whether ``w_hh`` is read before the time loop and not inside it
``exchange_reads``        loads of other blocks' results: counts by opcode; ``exchange_read_bytes`` of each
``layout_conversions``    operations in the time loop that move a tile between threads
``variant``               of the cell: an option of ``--variant``
``problems``              what is wrong with it, in words; empty if nothing is
``versions``              of triton and torch
========================  ============================================================================
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import inspect
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

from . import machine_code, measured, plan
from .kernels import rounding
from .kernels.launch import Launch, kernel_function
from .plan import Device, GemmPlan, NarrowPlan, OneStepPlan, RecurrentPlan, RoundPlan

__all__ = [
    "Configuration",
    "add_arguments",
    "compile_launch",
    "configurations",
    "expected_matrix",
    "inspect_launch",
    "parameter_offsets",
    "problems",
    "run",
    "signature",
]

#: Where the planner is asked; dense enough that a random size is planned like one of these (tests/test_inspect.py).
HIDDEN_SIZES = (
    16, *range(32, 257, 32), *range(320, 1025, 64), *range(1152, 2049, 128), *range(2304, 4097, 256)
)  # fmt: skip
BATCH_SIZES = (1, 16, 17, 32, 33, 48, 64, 65, 96, 128, 129, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
#: Recurrences side by side: none, two directions, heads.
CHAINS = (1, 2, 4, 16)
#: Layers as a wavefront.
LAYERS = (2, 3, 4, 8)
#: Of the cell: none; all its options at once, which need the most registers; layer norm; all options and layer norm.
VARIANTS = ("plain", "cell", "norm", "cell-norm")
#: Parameters of the kernels that only a wavefront has.
STACK = ("input_ptr", "below_ptr", "bias_ptr", "above_ptr")
#: Added to a hidden size for the uneven variant: no multiple of 8, so every mask is needed.
UNEVEN = -3


def _sixteen_bit_precision() -> str:
    return plan.dot_precision(torch.empty(0, dtype=torch.float16))


#: dtype and input_precision of every product the kernels can be asked for.
PRODUCTS = (
    (torch.float16, _sixteen_bit_precision()),
    (torch.bfloat16, _sixteen_bit_precision()),
    (torch.float32, "tf32"),
    (torch.float32, "ieee"),
)
TYPE_NAMES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"
}  # fmt: skip
#: The pointer through which a kernel reads what other blocks of its launch have written.
EXCHANGE = {"recurrent_forward": "exchange_ptr", "recurrent_backward": "grad_gates_ptr"}
#: What tells the assembly that waits for other blocks' results from the rest.
POLL = "ld.relaxed.gpu.global.v4.b32"
MATRIX_INSTRUCTION = re.compile(r"^(HGMMA|HMMA|QGMMA|UTC\w*MMA|v_mfma\w+|v_wmma\w+)$")
COUNTED = re.compile(
    r"^(\w*MMA|UTC\w+|BAR|LDG|STG|LDS|LDSM|STS|STSM|LDGSTS|LDTM|STTM|LDL|STL|ATOM\w*|RED\w*|MEMBAR|FFMA\d?|MUFU|SHFL"
    r"|v_w?mfma\w+|v_wmma\w+|v_(pk_)?fmac?_f32\w*|ds_\w+|(global|buffer|flat|scratch)_\w+|s_barrier)$"
)


AnyPlan = RecurrentPlan | GemmPlan | OneStepPlan | NarrowPlan | RoundPlan


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One kernel that the planner can choose on a device, at the largest size it is chosen for."""

    launch: Launch
    plan: AnyPlan
    dtype: torch.dtype
    device: Device
    variant: str = "plain"


def _meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def recurrent_launch(chosen: RecurrentPlan, lengths: bool = False, variant: str = "plain") -> Launch:
    """The launch of a plan with tensors that have a dtype but no memory."""
    chosen, added = _with_variant(chosen, variant)
    value, single = _meta(chosen.dtype, 1), _meta(torch.float32, 1)
    word = _meta(torch.int32, 1)
    if chosen.narrow:
        added |= NARROWED
    names = inspect.signature(kernel_function(plan.KERNELS[chosen.direction]).fn).parameters
    fp32 = {"cells_ptr", "grad_c_ptr"} | ({"c_n_ptr"} if chosen.tier == "step" else set())
    given: dict[str, Any] = {}
    for name, parameter in names.items():
        if parameter.default is not inspect.Parameter.empty:
            if chosen.stacked and name in STACK:
                given[name] = single if name == "bias_ptr" else value
            continue  # of a variant of the cell
        if name in {"counter_ptr", "status_ptr"} or (name == "lengths_ptr" and lengths):
            given[name] = word
        elif name == "lengths_ptr":
            given[name] = None
        elif name == "parts_ptr":
            given[name] = _meta(torch.int64, 1) if chosen.parts > 1 and not chosen.clustered else None
        elif name.endswith("_ptr"):
            given[name] = single if name in fp32 else value
        elif name not in chosen.constants and name not in {"n_tiles", "tile_rows", "spin_limit"}:
            given[name] = 3
    return chosen.launch(given | added)


def _with_variant(chosen: RecurrentPlan, variant: str) -> tuple[RecurrentPlan, dict[str, torch.Tensor]]:
    """A plan of `VARIANTS`, and the arguments that it adds to the plain cell's."""
    from . import layer
    from .cell_options import Cell

    forward, value = chosen.direction == "forward", chosen.dtype
    names: dict[str, torch.dtype] = {}
    if variant.startswith("cell"):
        cell = Cell(coupled=True, cell_clip=2.0, zoneout_h=0.1, zoneout_c=0.2, activations=(3, 1, 4))
        if chosen.narrow:
            cell = cell._replace(zoneout_h=0.0, activations=(0, 4, 1))  # no h larger than one
        chosen = layer._with_cell(chosen, cell, **({"SEPARATE_OUT": chosen.tier != "single"} if forward else {}))
        names |= {"cuts_ptr": torch.int32, "peephole_ptr": value, "noise_ptr": torch.int64}
        if not chosen.narrow:
            names["h_scale_ptr"] = torch.float32
        names |= {"entry_ptr": value} if forward else {"grad_h_ptr": torch.float32}
    if variant.endswith("norm"):
        names["norm_ptr"] = torch.float32
        if chosen.tier != "single":
            names["rows_ptr"] = torch.int64
        if chosen.save:
            names |= {"products_ptr": value, "statistics_ptr": torch.float32}
        if not forward:
            names |= {"grad_pre_ptr": value, "grad_norm_ptr": torch.float32}
    return chosen, {name: _meta(dtype, 1) for name, dtype in names.items()}


#: What a kernel with products of fp16 reads in place of fp32, and their scales.
NARROWED = {
    **dict.fromkeys(("w_ptr", "exchange_ptr", "entry_ptr"), _meta(torch.float16, 1)),
    **dict.fromkeys(("w_scale_ptr", "entry_scale_ptr"), _meta(torch.float32, 1)),
}


def gemm_launch(chosen: GemmPlan, dtype: torch.dtype) -> Launch:
    value = _meta(dtype, 1)
    pointers = dict.fromkeys(("x_ptr", "w_ptr", "b_ih_ptr", "b_hh_ptr", "gates_ptr"), value)
    return chosen.launch({**pointers, "rows": 3, "B": 3, "x_stride_t": 3, "x_stride_b": 3})


def prepare_launch(chosen: NarrowPlan | RoundPlan) -> Launch:
    half, single = _meta(torch.float16, 1), _meta(torch.float32, 1)
    if isinstance(chosen, RoundPlan):
        return chosen.launch({"w_ptr": single, "out_ptr": single})
    pointers = {"w_ptr": single, "h0_ptr": single, "w_out_ptr": half, "entry_ptr": half}
    return chosen.launch({**pointers, "w_scale_ptr": single, "entry_scale_ptr": single, "states": 3})


def one_step_launch(chosen: OneStepPlan, lengths: bool = False) -> Launch:
    value, single = _meta(chosen.dtype, 1), _meta(torch.float32, 1)
    names = inspect.signature(kernel_function("one_step").fn).parameters
    given: dict[str, Any] = {name: value for name in names if name.endswith("_ptr")}
    given |= {"lengths_ptr": _meta(torch.int32, 1) if lengths else None, "cells_ptr": single}
    return chosen.launch({**given, "B": 3, "x_stride_b": 3})


def recurrent_key(chosen: RecurrentPlan) -> tuple:
    """What tells the kernels of a direction and dtype apart, except for H and what follows from it."""
    return (chosen.tier, chosen.protocol, chosen.block_h, chosen.block_b, chosen.block_k, chosen.parts,
            chosen.num_warps, chosen.poll, chosen.chains > 1, chosen.stacked, chosen.stages, chosen.held,
            chosen.clustered, chosen.half, chosen.narrow, chosen.alone)  # fmt: skip


def configurations(device: Device, products: Any = PRODUCTS, variant: str = "plain") -> list[Configuration]:
    """Every configuration the planner can choose on ``device``, once, at the largest H it is chosen for.

    The kernels of training come a second time at a hidden size that is no multiple of 8 and with ``lengths``, which
    need the most registers; the forward kernel a second time for inference. Of another ``variant`` than the plain
    cell there are the recurrent kernels only, and none side by side.
    """
    found: dict[tuple, Configuration] = {}
    plain, normed = variant == "plain", variant.endswith("norm")

    def keep(launch: Launch, chosen: AnyPlan, dtype: torch.dtype) -> None:
        configuration = Configuration(launch, chosen, dtype, device, variant)
        key = configuration_key(configuration)
        if key not in found or found[key].plan.hidden < chosen.hidden:
            found[key] = configuration

    for dtype, precision in products:
        if device.arch.startswith("gfx") and precision == "tf32" and dtype == torch.float32:
            continue  # dot_precision never asks for it there
        side_by_side = itertools.product(("forward", "backward"), (1, 2), CHAINS if plain else (1,), (False,), (None,))
        stacked = itertools.product(("forward", "backward"), (2,), LAYERS if plain else (), (True,), (None,))
        # A cell whose h has no bound runs otherwise.
        wide = not plain and (dtype, precision) == (torch.float32, "tf32")
        unbounded = itertools.product(("forward",), (1, 2), (1,) if wide else (), (False,), ({"narrow": False},))
        for direction, length, chains, is_stacked, overrides in (*side_by_side, *stacked, *unbounded):
            fixed = (dtype, device, precision, True, overrides, chains, is_stacked, normed)
            for sizes in _sizes_by_kernel(direction, length, *fixed):
                largest = plan.recurrent(direction, length, sizes[0][1], sizes[0][0], *fixed)
                keep(recurrent_launch(largest, variant=variant), largest, dtype)
                if direction == "forward":
                    inference = dataclasses.replace(largest, save=False)
                    keep(recurrent_launch(inference, variant=variant), inference, dtype)
                for hidden, batch in sizes:
                    uneven = plan.recurrent(direction, length, batch, hidden + UNEVEN, *fixed)
                    keep(recurrent_launch(uneven, True, variant), uneven, dtype)
                    if recurrent_key(uneven) == recurrent_key(largest):
                        break
        for hidden in HIDDEN_SIZES if plain else ():
            for rows in (1, 16, 17, 256, 4096, 1 << 20):
                for h in (hidden, hidden + UNEVEN):
                    g = plan.gate_gemm(rows, h, h, dtype, device, precision)
                    keep(gemm_launch(g, dtype), g, dtype)
            for h in (hidden, hidden + UNEVEN) if (dtype, precision) == (torch.float32, "tf32") else ():
                orders = (rounding.ROWS.value, rounding.COLUMNS.value)
                prepared: list[NarrowPlan | RoundPlan] = [plan.narrow(h)]
                prepared += [plan.rounded(h, 1, order) for order in orders]
                for each in prepared:
                    keep(prepare_launch(each), each, dtype)
            for batch, h in itertools.product(BATCH_SIZES, (hidden, hidden + UNEVEN)):
                one = plan.one_step(batch, h, h, dtype, device, precision)
                keep(one_step_launch(one, h != hidden), one, dtype)
    return list(found.values())


def _sizes_by_kernel(direction: str, length: int, *fixed: Any) -> Iterable[list[tuple[int, int]]]:
    """For each kernel that the planner chooses, where it does: (H, B), the largest H first."""
    sizes: dict[tuple, list[tuple[int, int]]] = {}
    for hidden in reversed(HIDDEN_SIZES):
        for batch in BATCH_SIZES:
            try:
                chosen = plan.recurrent(direction, length, batch, hidden, *fixed)
            except plan.PlanError:
                continue  # chains that do not fit run one after another, as layers
            sizes.setdefault(recurrent_key(chosen), []).append((hidden, batch))
    return sizes.values()


def configuration_key(configuration: Configuration) -> tuple:
    """What tells the kernels of a device apart, except for the hidden size: tiles, mode, and whether H needs masks."""
    chosen = configuration.plan
    common = (configuration.launch.kernel, configuration.dtype, chosen.precision, chosen.hidden % 8 != 0)
    if isinstance(chosen, RecurrentPlan):
        return (*common, chosen.save, *recurrent_key(chosen))
    if isinstance(chosen, OneStepPlan):
        return (*common, chosen.block_h, chosen.block_b, chosen.block_k, chosen.constants["RECURRENT"])
    if isinstance(chosen, NarrowPlan):
        return (*common, chosen.columns)
    if isinstance(chosen, RoundPlan):
        return (*common, chosen.order)
    return (*common, chosen.block_m, chosen.block_n, chosen.block_k, chosen.num_warps, chosen.num_stages)


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list]]:
    """A launch as Triton's compiler is told of it: parameter types, constexpr values, attributes.

    It depends on which tensors are given and on their dtypes, and on the launch's constants; never on the value of
    an integer argument.
    """
    types: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int, ...], list] = {}
    parameters = inspect.signature(kernel_function(launch.kernel).fn).parameters
    for position, (name, parameter) in enumerate(parameters.items()):
        value = launch.arguments.get(name)
        if name in launch.constants or value is None:
            types[name] = "constexpr"
            default = None if parameter.default is inspect.Parameter.empty else parameter.default
            constants[name] = launch.constants.get(name, default)
        elif isinstance(value, torch.Tensor):
            types[name] = "*" + TYPE_NAMES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "i32"
    return types, constants, attributes


def parameter_offsets(launch: Launch) -> dict[str, int]:
    """Where each argument lies in the kernel's argument block, in bytes: pointers have 8, integers 4."""
    offsets: dict[str, int] = {}
    at = 0
    for name, kind in signature(launch)[0].items():
        if kind != "constexpr":
            size = 8 if kind.startswith("*") else 4
            at = -(-at // size) * size
            offsets[name] = at
            at += size
    return offsets


def compile_launch(launch: Launch, arch: str) -> Any:
    """Compiles a launch for ``arch`` (``sm_90``, ``gfx942``, …); needs no GPU. Returns Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64)
    else:
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    types, constants, attributes = signature(launch)
    source = ASTSource(kernel_function(launch.kernel), types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=launch.options)


def read_code(compiled: Any, launch: Launch) -> tuple[machine_code.Code, machine_code.Resources]:
    """The machine code of what :func:`compile_launch` returned."""
    offsets = parameter_offsets(launch)
    if "cubin" in compiled.asm:
        return machine_code.sass(compiled.asm["cubin"], launch.kernel, offsets)
    text = compiled.asm["amdgcn"]
    return machine_code.amdgcn(text, offsets), machine_code.amdgcn_resources(text)


def expected_matrix(launch: Launch, dtype: torch.dtype, arch: str) -> re.Pattern[str] | None:
    """The matrix instruction that is meant; None where products are to run on ordinary multiply-adds.

    wgmma (sm_90) and tcgen05 (sm_100) multiply 64 rows at least. The forward pass gives them 4 * BLOCK_H rows, the
    backward pass PARTS * BLOCK_H. Fewer columns than `plan.WGMMA_COLUMNS` the compiler leaves to mma.sync.
    """
    constants = launch.constants
    if launch.kernel in ("narrow", "round_weights") or constants.get("ALONE"):
        return None
    if arch.startswith("gfx"):
        return re.compile(r"v_mfma_f32_\w+")
    if dtype == torch.float32 and constants["PRECISION"] == "ieee":
        return None
    if launch.kernel == "gate_gemm":
        rows = constants["BLOCK_M"]
    elif launch.kernel in ("recurrent_forward", "one_step"):
        rows = 4 * constants["BLOCK_H"]
    else:
        rows = constants["BLOCK_H"] * constants["PARTS"]
    if rows >= 64 and constants.get("BLOCK_B", 16) >= plan.WGMMA_COLUMNS and arch in ("sm_90", "sm_100"):
        return re.compile("HGMMA" if arch == "sm_90" else "UTC.?MMA")
    return re.compile("HMMA")


def inspect_launch(configuration: Configuration, arch: str, compiled: Any = None) -> dict[str, Any]:
    """Compiles one configuration, unless it is given ``compiled``; returns a row of ``tritlstm kernels --json``.

    The module says what its keys are.
    """
    launch = configuration.launch
    compiled = compiled or compile_launch(launch, arch)
    code, resources = read_code(compiled, launch)
    counts = {name: number for name, number in sorted(code.counts().items()) if COUNTED.match(name)}
    matrix = sorted((name for name in counts if MATRIX_INSTRUCTION.match(name)), key=lambda name: -counts[name])
    row = _heading(configuration, arch) | {
        "registers": resources.registers,
        "spill_bytes": resources.spill_bytes,
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": configuration.device.shared_bytes,
        "instructions": counts,
        "matrix_instruction": matrix[0] if matrix else None,
        "weights_resident": False,
        "exchange_reads": {},
        "exchange_read_bytes": [],
        "layout_conversions": 0,
    }
    found: list[str] = []
    if launch.kernel in EXCHANGE:
        ttgir = compiled.asm["ttgir"]
        alone = isinstance(configuration.plan, RecurrentPlan) and configuration.plan.alone
        resident, found = (False, []) if alone else _resident(code, ttgir)
        exchanged = code.reads(EXCHANGE[launch.kernel])
        row["weights_resident"] = resident
        row["exchange_reads"] = dict(collections.Counter(_named(load) for load in exchanged))
        row["exchange_read_bytes"] = sorted({load.width for load in exchanged})
        scattered = machine_code.ttgir_scattered(ttgir, POLL, 4)
        if scattered:
            found.append(f"runs of 16 bytes are spread over threads: {scattered[0]}")
        row["layout_conversions"] = machine_code.ttgir_count(ttgir, "ttg.convert_layout", depth=2)
        stale = [load for load in exchanged if not load.coherent]
        if row["config"]["protocol"] != "none":
            if not exchanged:
                found.append("no read of other blocks' results found")
            if stale:
                found.append(f"reads other blocks' results through a cache of its own: {_named(stale[0])}")
            found += _withheld(code, EXCHANGE[launch.kernel], arch)
    row["problems"] = problems(row, configuration) + found
    return row


def _named(load: machine_code.Access) -> str:
    flags = re.findall(r"\b(sc0|sc1|nt|glc|slc)\b", load.instruction.operands)
    return " ".join([load.instruction.opcode, *flags])


def _withheld(code: machine_code.Code, pointer: str, arch: str) -> list[str]:
    """Results for other blocks that stay where those do not look: gfx942 has an L2 for each of its chiplets."""
    writes = code.writes(pointer)
    if not writes:
        return ["no write of results for other blocks found"]
    kept = [write for write in writes if not write.coherent]
    if arch == "gfx942" and kept:
        return [f"writes results for other blocks into the L2 of one chiplet: {_named(kept[0])}"]
    return []


def _resident(code: machine_code.Code, ttgir: str) -> tuple[bool, list[str]]:
    """Whether the weights are read before the loops and in none, by the machine code and by Triton's IR."""
    reads = code.reads("w_ptr")
    unknown = [load for load in code.loads if load.in_loop and not load.parameters]
    by_code = bool(reads) and not any(load.in_loop for load in reads)
    outside, inside = machine_code.ttgir_reads(ttgir, "w_ptr")
    by_ir = outside > 0 and inside == 0
    if not reads:
        return False, ["no read of the weights found in the machine code"]
    if by_code != by_ir:
        return False, [f"weights resident by the {'machine code' if by_code else 'GPU IR'} only"]
    if by_code and unknown:
        return False, [f"cannot tell what {unknown[0].instruction.opcode} in the time loop reads"]
    return by_code, []


def _heading(configuration: Configuration, arch: str) -> dict[str, Any]:
    launch, chosen = configuration.launch, configuration.plan
    config: dict[str, Any] = {
        **launch.constants,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "max_registers": launch.max_registers,
        "cooperative": launch.cooperative,
    }
    if not isinstance(chosen, (GemmPlan, NarrowPlan, RoundPlan)):
        config["lengths"] = launch.arguments["lengths_ptr"] is not None
    if isinstance(chosen, RecurrentPlan):
        config |= {"tier": chosen.tier, "protocol": chosen.protocol, "planned_shared_bytes": chosen.shared_bytes}
    versions = {"triton": _triton_version(), "torch": torch.__version__}
    dtype = TYPE_NAMES[configuration.dtype]
    common = {"kernel": launch.kernel, "variant": configuration.variant, "config": config}
    return common | {"arch": arch, "dtype": dtype, "versions": versions}


def _triton_version() -> str:
    import triton

    return triton.__version__


def problems(row: dict[str, Any], configuration: Configuration) -> list[str]:
    """What a row's numbers say is wrong: registers, shared memory, matrix instruction, weights, width of the reads."""
    found = []
    config = row["config"]
    if row["spill_bytes"]:
        found.append(f"{row['spill_bytes']} bytes spilled")
    if row["shared_bytes"] > row["shared_limit"]:
        found.append(f"{row['shared_bytes']} bytes of shared memory, limit {row['shared_limit']}")
    planned = config.get("planned_shared_bytes", row["shared_limit"])
    if row["shared_bytes"] > planned:
        found.append(f"{row['shared_bytes']} bytes of shared memory, planned {planned}")
    meant = expected_matrix(configuration.launch, configuration.dtype, row["arch"])
    matrix = row["matrix_instruction"]
    if meant is None and matrix is not None:
        found.append(f"matrix instruction {matrix} in products meant to be exact in fp32")
    if meant is not None and (matrix is None or not meant.fullmatch(matrix)):
        found.append(f"matrix instruction {matrix or 'missing'}, meant {meant.pattern}")
    tier = config.get("tier")
    if tier in {"single", "persistent"} and not row["weights_resident"]:
        found.append("weights read again inside the time loop")
    if tier == "streaming" and row["weights_resident"]:
        found.append("a streaming kernel that streams nothing")
    narrow = min(row["exchange_read_bytes"], default=16)
    wanted = min(16, _bytes_a_thread(configuration)) if tier in {"persistent", "streaming"} else 0
    if narrow < wanted:
        found.append(f"reads other blocks' results {narrow} bytes at a time, {wanted} could be")
    return found


def _bytes_a_thread(configuration: Configuration) -> int:
    """Of a tile of other blocks' results, a chunk of K wide."""
    chosen = configuration.plan
    if not isinstance(chosen, RecurrentPlan):
        return 0
    tile = chosen.block_k * chosen.block_b * chosen.element
    return tile // (chosen.num_warps * configuration.device.warp_size)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tritlstm kernels``."""
    parser.add_argument("--arch", action="append", choices=sorted(plan.DEVICES), help="repeatable; default: all")
    parser.add_argument("--dtype", action="append", choices=("fp16", "bf16", "fp32"), help="repeatable; default: all")
    parser.add_argument("--variant", choices=VARIANTS, default="plain",
                        help="of the cell: plain, all its options at once, layer norm, or both; default: plain"
                        )  # fmt: skip
    parser.add_argument("--match", action="append", default=[], metavar="TEXT",
                        help="only configurations whose line in --list contains this text; repeatable: one of them"
                        )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the rows there, each as soon as it is known")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that compile; default: one a core")
    parser.add_argument("--list", action="store_true", help="only list the configurations")
    parser.add_argument("--explain", action="append", metavar="T,B,D,H",
                        help="only say what bounds a step of this shape, by the cost model and the code; repeatable; "
                             "for --arch (default: sm_90) and --dtype (default: fp16)")  # fmt: skip
    parser.add_argument("--measured", metavar="FILE",
                        help="--explain with the constants of this file, which tritlstm bench --calibrate wrote, and "
                             "on its architecture")  # fmt: skip
    parser.add_argument("--counts", metavar="FILE",
                        help="only write the table of the static gate, tests/kernel_counts.json")  # fmt: skip


def describe(configuration: Configuration) -> str:
    """One line: kernel, sizes and tiles."""
    chosen = configuration.plan
    dtype = f"{TYPE_NAMES[configuration.dtype]}/{chosen.precision}"
    if isinstance(chosen, RecurrentPlan):
        mode = chosen.direction + (" training" if chosen.save and chosen.direction == "forward" else "")
        lengths = " lengths" if configuration.launch.arguments["lengths_ptr"] is not None else ""
        if configuration.variant != "plain":
            mode = f"{configuration.variant} {mode}"
        return f"{mode} {dtype} H={chosen.hidden}{lengths} {chosen.describe()}, poll {chosen.poll}"
    if isinstance(chosen, OneStepPlan):
        lengths = " lengths" if configuration.launch.arguments["lengths_ptr"] is not None else ""
        return f"one_step {dtype} D=H={chosen.hidden}{lengths} {chosen.describe()}, {chosen.block_k} deep"
    if isinstance(chosen, NarrowPlan):
        return f"narrow {dtype} H={chosen.hidden}, {chosen.rows} rows of {chosen.columns}, {chosen.num_warps} warps"
    if isinstance(chosen, RoundPlan):
        return f"round_weights {dtype} H={chosen.hidden}, order {chosen.order}, {chosen.num_warps} warps"
    tile = f"{chosen.block_m}x{chosen.block_n}x{chosen.block_k}"
    return f"gate_gemm {dtype} D=H={chosen.hidden} tile {tile}, {chosen.num_warps} warps"


Work = tuple[Configuration, str]


def _work(work: Work) -> dict[str, Any]:
    configuration, arch = work
    try:
        return inspect_launch(configuration, arch)
    except Exception as error:
        return _failed(work, error)


def _failed(work: Work, error: BaseException) -> dict[str, Any]:
    """The row of a configuration that could not be compiled or read: its first and its last words."""
    words = " ".join(str(error).split())
    words = words if len(words) <= 400 else f"{words[:150]} … {words[-240:]}"
    return _heading(*work) | {"problems": [f"{type(error).__name__}: {words}"]}


def _leave_interrupts_to_the_parent() -> None:
    os.setpgrp()  # out of the terminal's reach: the compiler's own child processes would die of it
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _rows(work: list[Work], jobs: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows in the order in which they are finished, with their place in ``work``.

    When interrupted, finishes what is being compiled and yields that too, before the interrupt goes on.
    """
    if jobs == 1 or len(work) <= 1:
        yield from enumerate(map(_work, work))
        return
    import multiprocessing
    from concurrent import futures

    interrupted = None
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(jobs, context, _leave_interrupts_to_the_parent) as pool:
        places = {pool.submit(_work, each): place for place, each in enumerate(work)}
        waiting = set(places)
        while waiting:
            try:
                done, waiting = futures.wait(waiting, return_when=futures.FIRST_COMPLETED)
            except KeyboardInterrupt as interrupt:
                if interrupted is not None:
                    raise
                interrupted = interrupt
                for future in waiting:
                    future.cancel()
                continue
            for future in done:
                if future.cancelled():
                    continue
                error = future.exception()
                place = places[future]
                yield place, _failed(work[place], error) if error else future.result()
    if interrupted is not None:
        raise interrupted


class _RowFile:
    """A JSON list in a file that is complete after every row."""

    def __init__(self, path: str | None) -> None:
        self.file: TextIO | None = None
        if path is not None:
            self.file = open(path, "w", encoding="utf-8")  # noqa: SIM115
            self.file.write("[")
            self.end = self.file.tell()
            self.file.write("\n]\n")
            self.file.flush()

    def add(self, row: dict[str, Any]) -> None:
        if self.file is None:
            return
        self.file.seek(self.end)
        self.file.write(("," if self.end > 1 else "") + "\n" + json.dumps(row))
        self.end = self.file.tell()
        self.file.write("\n]\n")
        self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal that has rich; nothing elsewhere, where the lines themselves show how far it is."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda failed: None
        return
    if not sys.stderr.isatty():
        yield lambda failed: None
        return
    columns = (
        TextColumn("compiling"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} with a problem"), TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty()) as progress:
        task = progress.add_task("compiling", total=total, failed=0)
        yield lambda failed: progress.update(task, advance=1, failed=failed)


def run(args: argparse.Namespace) -> int:
    """Prints a line a configuration; exit status 1 if any has a problem, 2 for wrong arguments, 130 if stopped."""
    if args.variant != "plain" and (args.counts or args.explain):
        return _refuse(f"--variant {args.variant} goes with neither --counts nor --explain: leave it out")
    if args.counts:
        return _write_counts(args.counts)
    if args.explain:
        return _explain(args)
    if args.measured:
        return _refuse("--measured goes with --explain T,B,D,H")
    jobs = args.jobs if args.jobs is not None else len(os.sched_getaffinity(0))
    if jobs < 1:
        return _refuse(f"--jobs must be at least 1, got {jobs}")
    products = [p for p in PRODUCTS if not args.dtype or TYPE_NAMES[p[0]] in args.dtype]
    work = [
        (configuration, arch)
        for arch in dict.fromkeys(args.arch or plan.DEVICES)
        for configuration in configurations(plan.DEVICES[arch], products, args.variant)
        if not args.match or any(text in describe(configuration) for text in args.match)
    ]
    if not work:
        return _refuse(f"no configuration contains {' or '.join(map(repr, args.match))}; --list shows them all")
    if args.list:
        for configuration, arch in work:
            print(arch, describe(configuration))
        return 0
    try:
        file = _RowFile(args.json)
    except OSError as error:
        return _refuse(f"cannot write {args.json}: {error.strerror}")
    rows: list[dict[str, Any]] = []
    stopped = False
    with contextlib.closing(file), _progress(len(work)) as advance:
        try:
            failed = 0
            for place, row in _rows(work, jobs):
                rows.append(row)
                file.add(row)
                failed += bool(row["problems"])
                print(_line(row, describe(work[place][0])), flush=True)
                advance(failed)
        except KeyboardInterrupt:
            stopped = True
    _summarize(rows, len(work), args.json)
    return 130 if stopped else 1 if any(row["problems"] for row in rows) else 0


def _write_counts(path: str) -> int:
    from . import shape_report

    try:
        shape_report.write_counts(path)
    except OSError as error:
        return _refuse(f"cannot write {path}: {error.strerror}")
    return 0


def _explain(args: argparse.Namespace) -> int:
    from . import shape_report

    try:
        shapes = [shape_report.parse_shape(text, dtype) for text in args.explain for dtype in args.dtype or ("fp16",)]
        devices = [plan.DEVICES[arch] for arch in args.arch or ("sm_90",)]
        if args.measured:
            devices = [_measured(args)]
    except ValueError as error:
        return _refuse(str(error))
    for shape in shapes:
        for device in devices:
            reports = {d: shape_report.report(shape, d, device) for d in ("forward", "backward")}
            print(shape_report.text(shape, device, reports))
    return 0


def _measured(args: argparse.Namespace) -> Device:
    found = measured.read(Path(args.measured))
    if args.arch not in (None, [found.arch]) or found.arch not in plan.DEVICES:
        asked = f"asked for {', '.join(args.arch)}" if args.arch else f"known are {', '.join(plan.DEVICES)}"
        where = f"{found.device} ({found.arch})"
        raise ValueError(f"{args.measured} was measured on {where}, {asked}; leave --measured out")
    return found.apply(plan.DEVICES[found.arch])


def _refuse(words: str) -> int:
    print(f"tritlstm kernels: {words}", file=sys.stderr)
    return 2


def _line(row: dict[str, Any], description: str) -> str:
    line = f"{row['arch']} {description}"
    if "registers" in row:
        line += (
            f": {row['registers']} registers, {row['shared_bytes']} of {row['shared_limit']} bytes shared, "
            f"{row['matrix_instruction'] or 'no matrix instruction'}"
        )
        if row["weights_resident"]:
            line += ", weights resident"
    return line + (f" PROBLEM: {'; '.join(row['problems'])}" if row["problems"] else "")


def _summarize(rows: list[dict[str, Any]], wanted: int, path: str | None) -> None:
    by_arch: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_arch.setdefault(row["arch"], []).append(row)
    print()
    for arch, group in by_arch.items():
        read = [row for row in group if "registers" in row]
        bad = sum(bool(row["problems"]) for row in group)
        numbers = ""
        if read:
            matrix = collections.Counter(row["matrix_instruction"] or "none" for row in read)
            named = ", ".join(f"{name} in {count}" for name, count in sorted(matrix.items()))
            resident = sum(row["weights_resident"] for row in read)
            numbers = (
                f"; at most {max(row['registers'] for row in read)} registers and "
                f"{max(row['shared_bytes'] for row in read)} of {read[0]['shared_limit']} bytes shared; "
                f"weights resident in {resident}; matrix instruction {named}"
            )
        print(f"{arch}: {len(group)} configurations, {bad} with a problem{numbers}")
    done = sum(map(len, by_arch.values()))
    if done < wanted:
        print(f"stopped: {wanted - done} of {wanted} configurations are missing")
    if path:
        print(f"{done} rows in {path}")
