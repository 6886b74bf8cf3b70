"""``tritlstm kernels``: cross-compiles what the planner can choose and reads the result, without a GPU."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import plan
from .kernels.launch import Launch, kernel_function

__all__ = ["add_arguments", "compile_launch", "configurations", "inspect_launch", "run"]

HIDDEN_SIZES = (16, 32, 64, 100, 128, 160, 192, 256, 320, 384, 448, 512, 576, 640, 650, 704, 768, 832, 896, 960, 1000,
                1024, 1150, 1280, 1500, 1536, 1792, 2048, 2560, 3072, 4096)  # fmt: skip
BATCH_SIZES = (1, 16, 17, 32, 64, 128, 256, 1024, 4096)
#: dtype and input_precision of every product the kernels can be asked for.
PRODUCTS = ((torch.float16, "tf32"), (torch.bfloat16, "tf32"), (torch.float32, "tf32"), (torch.float32, "ieee"))
TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32"}
MATRIX_INSTRUCTION = re.compile(r"^(HGMMA|QGMMA|HMMA|UTCHMMA|UTC\w*MMA|v_mfma\w*)")
COUNTED = re.compile(
    r"^(HGMMA|HMMA|UTC\w+|BAR|LDG|STG|LDS|LDSM|STS|STSM|LDGSTS|ATOM\w*|RED\w*|MEMBAR|FFMA|MUFU|SHFL|LDL|STL|LDTM|STTM"
    r"|v_mfma\w*|ds_\w+|global_\w+|scratch_\w+|s_barrier|buffer_\w+)"
)


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One kernel that the planner can choose on a device, at the largest size it is chosen for."""

    launch: Launch
    plan: plan.RecurrentPlan | plan.GemmPlan
    dtype: torch.dtype
    device: plan.Device


def _meta(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def recurrent_launch(chosen: plan.RecurrentPlan, lengths: bool = False) -> Launch:
    """The launch of a plan with tensors that have a dtype but no memory."""
    value, single = _meta(chosen.dtype, 1), _meta(torch.float32, 1)
    word = _meta(torch.int32, 1)
    names = inspect.signature(kernel_function(plan.KERNELS[chosen.direction]).fn).parameters
    fp32 = {"cells_ptr", "grad_c_ptr"} | ({"c_n_ptr"} if chosen.tier == "step" else set())
    given: dict[str, Any] = {}
    for name in names:
        if name in {"counter_ptr", "status_ptr"} or (name == "lengths_ptr" and lengths):
            given[name] = word
        elif name == "lengths_ptr":
            given[name] = None
        elif name.endswith("_ptr"):
            given[name] = single if name in fp32 else value
        elif name not in chosen.constants and name not in {"n_tiles", "spin_limit"}:
            given[name] = 3
    return chosen.launch(given)


def gemm_launch(chosen: plan.GemmPlan, dtype: torch.dtype) -> Launch:
    value = _meta(dtype, 1)
    pointers = {name: value for name in ("x_ptr", "w_ptr", "b_ih_ptr", "b_hh_ptr", "gates_ptr")}
    return chosen.launch({**pointers, "rows": 3, "B": 3, "x_stride_t": 3, "x_stride_b": 3})


def configurations(device: plan.Device, products: Any = PRODUCTS) -> list[Configuration]:
    """Every configuration the planner can choose on ``device``, once, at the largest H it is chosen for."""
    found: dict[tuple, tuple[int, Configuration]] = {}

    def keep(key: tuple, size: int, build: Any) -> None:
        if key not in found or found[key][0] < size:
            found[key] = (size, build())

    for dtype, precision in products:
        for hidden in HIDDEN_SIZES:
            for batch in BATCH_SIZES:
                for direction, save in (("forward", False), ("forward", True), ("backward", True)):
                    for length in (1, 2):
                        p = plan.recurrent(direction, length, batch, hidden, dtype, device, precision, save)
                        key = (dtype, precision, direction, save, p.tier, p.protocol, p.block_h, p.block_b,
                               p.block_k, p.split, p.num_warps, p.poll)  # fmt: skip
                        keep(key, hidden, lambda p=p, d=dtype: Configuration(recurrent_launch(p), p, d, device))
                g = plan.gate_gemm(batch * 64, hidden, hidden, dtype, device, precision)
                key = (dtype, precision, "gemm", g.block_m, g.block_n, g.block_k, g.num_warps, g.num_stages)
                keep(key, hidden, lambda g=g, d=dtype: Configuration(gemm_launch(g, d), g, d, device))
    return [configuration for _, configuration in found.values()]


def compile_launch(launch: Launch, arch: str) -> Any:
    """Compiles a launch for ``arch`` (``sm_90``, ``gfx942``, …); needs no GPU. Returns Triton's compiled kernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = kernel_function(launch.kernel)
    constants = dict(launch.constants)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list] = {}
    for position, name in enumerate(function.arg_names):
        value = launch.arguments.get(name)
        if name in launch.constants or value is None:
            signature[name] = "constexpr"
            constants[name] = launch.constants.get(name)
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPE_NAMES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64)
    else:
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = launch.options(target.backend)
    source = ASTSource(function, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def _nvidia_tool(name: str) -> str:
    import triton

    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)


def _read_cubin(cubin: bytes) -> tuple[int, int, list[str]]:
    """Registers a thread, spilled bytes, and the mnemonics of the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = subprocess.run(
            [_nvidia_tool("cuobjdump"), "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
        text = subprocess.run(
            [_nvidia_tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True
        ).stdout
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    stack = int(re.findall(r"STACK:(\d+)", usage)[-1])
    mnemonics = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", text, re.MULTILINE)
    return registers, stack, mnemonics


def _read_amdgcn(text: str) -> tuple[int, int, list[str]]:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found.group(1)) if found else 0

    mnemonics = re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE)
    spilled = 4 * (field("vgpr_spill_count") + field("sgpr_spill_count"))
    return field("vgpr_count"), max(spilled, field("private_segment_fixed_size")), mnemonics


def weights_resident(ttgir: str) -> bool:
    """Whether no load of ``w_ptr`` is left inside a loop of the compiled kernel."""
    derived = {"%w_ptr"}
    depth_of_loops: list[int] = []
    depth = 0
    for line in ttgir.splitlines():
        code = line.split(" loc(")[0]
        opened = code.count("{") - code.count("}")
        if re.search(r"\bscf\.(for|while)\b", code):
            depth_of_loops.append(depth)
        result = re.match(r"\s*(%[\w#:]+)\s*=\s*([\w.\"]+)(.*)", code)
        if result:
            name, operation, operands = result.groups()
            used = {operand.split("#")[0] for operand in re.findall(r"%[\w#]+", operands)}
            if used & derived:
                if operation in {"tt.load", "ttg.async_copy_global_to_local", "amdg.buffer_load", "amdgpu.buffer_load"}:
                    if depth_of_loops:
                        return False
                elif operation not in {"scf.for", "scf.while", "tt.call"}:
                    derived.add(name.split(":")[0])
        depth += opened
        while depth_of_loops and depth <= depth_of_loops[-1]:
            depth_of_loops.pop()
    return True


def inspect_launch(configuration: Configuration, arch: str) -> dict[str, Any]:
    """Compiles one configuration; returns a row of ``tritlstm kernels --json`` (keys in the command's help)."""
    launch = configuration.launch
    compiled = compile_launch(launch, arch)
    if "cubin" in compiled.asm:
        registers, spilled, mnemonics = _read_cubin(compiled.asm["cubin"])
    else:
        registers, spilled, mnemonics = _read_amdgcn(compiled.asm["amdgcn"])
    counts = collections.Counter(name for name in mnemonics if COUNTED.match(name))
    matrix = sorted({name for name in counts if MATRIX_INSTRUCTION.match(name)})
    chosen = configuration.plan
    described = {k: v for k, v in launch.constants.items()} | {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "cooperative": launch.cooperative,
    }
    if isinstance(chosen, plan.RecurrentPlan):
        described |= {"tier": chosen.tier, "protocol": chosen.protocol, "planned_shared_bytes": chosen.shared_bytes}
    return {
        "kernel": launch.kernel,
        "config": described,
        "arch": arch,
        "dtype": TYPE_NAMES[configuration.dtype],
        "registers": registers,
        "spill_bytes": spilled,
        "shared_bytes": compiled.metadata.shared,
        "shared_limit": configuration.device.shared_bytes,
        "instructions": {**dict(counts), "matrix": matrix[0] if matrix else None},
        "weights_resident": launch.kernel != "gate_gemm" and weights_resident(compiled.asm["ttgir"]),
        "versions": {"triton": _triton_version(), "torch": torch.__version__},
    }


def _triton_version() -> str:
    import triton

    return triton.__version__


def problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with a row: spills, too much shared memory, no matrix instruction, weights not resident."""
    found = []
    config = row["config"]
    if row["spill_bytes"]:
        found.append(f"{row['spill_bytes']} bytes spilled")
    if row["shared_bytes"] > row["shared_limit"]:
        found.append(f"{row['shared_bytes']} bytes of shared memory, limit {row['shared_limit']}")
    if config["PRECISION"] != "ieee" or row["dtype"] != "fp32":
        if row["instructions"]["matrix"] is None:
            found.append("no matrix instruction")
    if config.get("tier") in {"single", "persistent"} and not row["weights_resident"]:
        found.append("weights read again inside the time loop")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", action="append", choices=sorted(plan.DEVICES), help="repeatable; default: all")
    parser.add_argument("--dtype", action="append", choices=("fp16", "bf16", "fp32"), help="repeatable; default: all")
    parser.add_argument("--match", default="", help="only configurations whose description contains this text")
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile (default: all cores)")
    parser.add_argument("--list", action="store_true", help="only list the configurations")


def _describe(configuration: Configuration) -> str:
    chosen = configuration.plan
    dtype = TYPE_NAMES[configuration.dtype]
    if isinstance(chosen, plan.RecurrentPlan):
        mode = chosen.direction + (" training" if chosen.save and chosen.direction == "forward" else "")
        return f"{mode} {dtype}/{chosen.precision} H={chosen.hidden} {chosen.describe()} poll {chosen.poll}"
    return f"gate_gemm {dtype}/{chosen.precision} tile {chosen.block_m}x{chosen.block_n}x{chosen.block_k}"


def _work(argument: tuple[Configuration, str]) -> dict[str, Any]:
    configuration, arch = argument
    try:
        return inspect_launch(configuration, arch)
    except Exception as error:
        return {"kernel": configuration.launch.kernel, "arch": arch, "error": f"{type(error).__name__}: {error}"[:500]}


def _rows(work: list[tuple[Configuration, str]], jobs: int) -> Iterator[dict[str, Any]]:
    if jobs <= 1 or len(work) == 1:
        yield from map(_work, work)
        return
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(_work, work)


def run(args: argparse.Namespace) -> int:
    """Prints a line a configuration; exit status 1 if any has a problem."""
    products = [p for p in PRODUCTS if not args.dtype or TYPE_NAMES[p[0]] in args.dtype]
    work = [
        (configuration, arch)
        for arch in args.arch or plan.DEVICES
        for configuration in configurations(plan.DEVICES[arch], products)
        if args.match in _describe(configuration)
    ]
    if args.list:
        for configuration, arch in work:
            print(arch, _describe(configuration))
        return 0
    rows, failed = [], 0
    for (configuration, arch), row in zip(work, _rows(work, args.jobs), strict=True):
        rows.append(row)
        wrong = [row["error"]] if "error" in row else problems(row)
        failed += bool(wrong)
        numbers = "" if "error" in row else (
            f"{row['registers']} registers, {row['shared_bytes']} of {row['shared_limit']} bytes shared, "
            f"{row['instructions']['matrix'] or 'no matrix instruction'}"
        )
        print(f"{arch} {_describe(configuration)}: {numbers}{' PROBLEM: ' + '; '.join(wrong) if wrong else ''}")
        sys.stdout.flush()
    print(f"{len(rows)} configurations, {failed} with a problem")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if failed else 0
