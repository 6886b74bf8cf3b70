"""What the kernels compile to, without a GPU: a static gate on the planned kernels of the benchmark's shapes.

A selection of the cases of ``benchmarks/README.md``, so that it takes 100 seconds on a core: every tier and every
kind of matrix instruction on sm_90, and what differs from it on the other architectures. ``tritlstm kernels``
compiles everything else. bf16 stands for fp16 where the kernel is the same but for the conversions.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from tritlstm import inspect_kernels, plan
from tritlstm.inspect_kernels import Configuration
from tritlstm.kernels.launch import KERNELS, Launch, kernel_function

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
#: Conversions of a tile's layout in the time loop, each a trip through shared memory and a barrier. They may only
#: become fewer: lower the number when they do.
CONVERSIONS = json.loads((Path(__file__).parent / "data" / "layout_conversions.json").read_text())


@dataclasses.dataclass(frozen=True)
class Case:
    """A benchmark's shape on an architecture."""

    name: str
    arch: str
    direction: str
    length: int
    batch: int
    hidden: int
    dtype: torch.dtype
    precision: str = "tf32"  # of fp32

    def __str__(self) -> str:
        return f"{self.arch}-{self.name}-{self.direction}"

    @functools.cached_property
    def configuration(self) -> Configuration:
        device = plan.DEVICES[self.arch]
        sixteen_bit = self.dtype != FP32
        precision = plan.dot_precision(torch.empty(0, dtype=self.dtype)) if sixteen_bit else self.precision
        chosen = plan.recurrent(
            self.direction, self.length, self.batch, self.hidden, self.dtype, device, precision, True
        )
        launch = inspect_kernels.recurrent_launch(chosen, lengths=self.hidden % 8 != 0)
        return Configuration(launch, chosen, self.dtype, device)


def both(name: str, arch: str, *sizes: Any, **more: Any) -> list[Case]:
    return [Case(name, arch, direction, *sizes, **more) for direction in ("forward", "backward")]


CASES = [
    *both("cudnn", "sm_90", 1024, 16, 768, FP16),
    *both("wide", "sm_90", 512, 64, 1024, FP16),
    *both("refused", "sm_90", 512, 20, 650, FP16),
    *both("odd", "sm_90", 35, 20, 1500, BF16),
    *both("speech", "sm_90", 800, 32, 512, BF16),
    *both("textbook", "sm_90", 32, 1024, 32, FP32),
    *both("learning", "sm_90", 80, 64, 512, FP32),
    *both("exact", "sm_90", 80, 64, 512, FP32, precision="ieee"),
    Case("large", "sm_90", "forward", 256, 32, 2048, BF16),
    Case("one step", "sm_90", "forward", 1, 4096, 256, FP32),
    *both("wide", "sm_80", 512, 64, 1024, FP16),
    Case("textbook", "sm_80", "forward", 32, 1024, 32, FP32),
    *both("speech", "sm_100", 800, 32, 512, BF16),
    Case("textbook", "sm_100", "forward", 32, 1024, 32, FP32),
    *both("text", "gfx942", 100, 64, 256, FP16),
    Case("time series", "gfx942", "forward", 100, 1024, 64, FP32, "ieee"),
]


def test_the_selection_has_every_tier() -> None:
    tiers = {case.configuration.plan.tier for case in CASES if case.arch == "sm_90"}
    assert tiers == set(plan.TIERS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_planned_kernel_compiles_to_what_was_meant(case: Case) -> None:
    configuration = case.configuration
    row = inspect_kernels.inspect_launch(configuration, case.arch)
    # Spills, shared memory, matrix instruction, weights, and how other blocks' results are read.
    assert row["problems"] == []
    tier = configuration.plan.tier
    assert row["weights_resident"] is (tier in ("single", "persistent"))
    meant = inspect_kernels.expected_matrix(configuration.launch, case.dtype, case.arch)
    assert (row["matrix_instruction"] is None) is (meant is None)
    kind = "single" if tier == "single" else "others"
    assert row["layout_conversions"] <= CONVERSIONS[case.arch][case.direction][kind]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_gate_gemm_compiles_to_what_was_meant(arch: str, precision: str) -> None:
    dtype = BF16 if precision == "tf32" else FP32
    device = plan.DEVICES[arch]
    if dtype == BF16:
        precision = plan.dot_precision(torch.empty(0, dtype=BF16))
    chosen = plan.gate_gemm(512 * 64, 512, 512, dtype, device, precision)
    configuration = Configuration(inspect_kernels.gemm_launch(chosen, dtype), chosen, dtype, device)
    assert inspect_kernels.inspect_launch(configuration, arch)["problems"] == []


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_polling_reads_sixteen_bytes_past_the_cache(name: str) -> None:
    """In PTX, where `relaxed.gpu` is what forbids a stale value; inline, so that nothing hoists it."""
    case = Case("even", "sm_90", name, 100, 32, 256, BF16, "persistent")
    assert case.configuration.plan.hidden % 8 == 0
    ptx = inspect_kernels.compile_launch(case.configuration.launch, case.arch).asm["ptx"]
    loads = set(re.findall(r"ld\.(?:volatile|relaxed\.\w+)\.global\.[\w.]+", ptx))
    # Backward, partial sums come in words of 8 bytes. One word tells whether somebody has given up.
    sums = {"ld.relaxed.gpu.global.b64"} if name == "backward" else set()
    assert loads == {"ld.relaxed.gpu.global.v4.b32", "ld.relaxed.gpu.global.b32", *sums}


# Sizes at run time


def specialization(launch: Launch, arch: str = "sm_90") -> list[Any]:
    """What Triton would key the compiled kernel on: its own code, for a GPU that is not there."""
    function = kernel_function(launch.kernel)
    backend = make_backend(GPUTarget("cuda", int(arch.removeprefix("sm_")), 32))
    bind = jit.create_function_from_signature(function.signature, function.params, backend)
    # A meta tensor has no address; memory of torch's allocator is aligned to 64 bytes.
    given = dict(launch.arguments)
    given.update((n, torch.empty(1, dtype=v.dtype)) for n, v in given.items() if isinstance(v, torch.Tensor))
    return bind(**given, **launch.constants)[1]


def launches(values: dict[str, int]) -> list[Launch]:
    """One launch of every kernel, its integers as given (else 3)."""
    device = plan.DEVICES["sm_90"]
    made = [
        inspect_kernels.recurrent_launch(plan.recurrent(d, 100, 32, 256, BF16, device, save=True))
        for d in ("forward", "backward")
    ]
    gemm = plan.gate_gemm(4096, 256, 256, BF16, device)
    made.append(inspect_kernels.gemm_launch(gemm, BF16))
    return [
        dataclasses.replace(m, arguments={n: values.get(n, v) for n, v in m.arguments.items()}) for m in made
    ]


def integers(launch: Launch) -> list[str]:
    return [name for name, value in launch.arguments.items() if isinstance(value, int)]


def test_no_size_or_stride_is_compiled_in() -> None:
    seen = set()
    for number, launch in enumerate(launches({})):
        names = integers(launch)
        seen.update(names)
        expected = specialization(launch)
        for value in (0, 1, 2, 16, 17, 1 << 20, (1 << 31) - 1):
            changed = launches(dict.fromkeys(names, value))[number]
            assert specialization(changed) == expected, f"{launch.kernel} with its integers at {value}"
        for name, (kind, value) in zip(kernel_function(launch.kernel).arg_names, expected, strict=True):
            if name in names:
                assert (kind, value) == ("i32", None), name
    assert seen == {
        "T", "B", "step_begin", "step_end", "reverse", "n_tiles", "tile_rows", "spin_limit", "rows", "x_stride_t",
        "x_stride_b",
        "grad_out_stride_t", "grad_out_stride_b",
    }  # fmt: skip


def test_the_check_above_would_see_a_specialized_integer() -> None:
    launch = launches({})[0]
    function = kernel_function(launch.kernel)
    free = [jit.KernelParam(p.num, p._param, False, False) for p in function.params]
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = jit.create_function_from_signature(function.signature, free, backend)
    memory = {n: torch.empty(1) if isinstance(v, torch.Tensor) else v for n, v in launch.arguments.items()}
    at = function.arg_names.index("B")
    keys = {str(bind(**{**memory, "B": value}, **launch.constants)[1][at]) for value in (1, 16, 17)}
    assert len(keys) == 3


def test_cross_compiling_sees_the_parameters_that_a_launch_would_have() -> None:
    """`tritlstm kernels` compiles the same types and alignments that Triton derives from real arguments."""
    for launch in launches({}):
        types, _, attributes = inspect_kernels.signature(launch)
        for position, (name, (kind, extra)) in enumerate(
            zip(types, specialization(launch), strict=True)
        ):
            if name not in launch.constants and launch.arguments.get(name) is not None:
                assert types[name] == kind, name
                assert bool(attributes.get((position,))) is (extra == "D"), name
            else:
                assert kind == types[name] == "constexpr", name


def test_every_integer_parameter_is_declared_unspecialized() -> None:
    """Read from the source, so that a parameter added later is not forgotten."""
    for name in KERNELS:
        function = kernel_function(name)
        for parameter in function.params:
            annotated = inspect.signature(function.fn).parameters[parameter.name].annotation
            if not parameter.name.endswith("_ptr") and "constexpr" not in str(annotated):
                assert parameter.do_not_specialize, f"{name}: {parameter.name}"


def test_offsets_of_parameters_are_those_in_the_ptx() -> None:
    for launch in launches({}):
        ptx = inspect_kernels.compile_launch(launch, "sm_80").asm["ptx"]
        sizes = [int(bits) // 8 for bits in re.findall(r"\.param \.[ub](\d+)", ptx)]
        offsets, at = [], 0
        for size in sizes:
            at = -(-at // size) * size
            offsets.append(at)
            at += size
        ours = list(inspect_kernels.parameter_offsets(launch).values())
        assert offsets[: len(ours)] == ours
        assert len(offsets) == len(ours) + 2  # Triton adds two scratch pointers at the end
