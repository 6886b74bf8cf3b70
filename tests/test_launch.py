"""Launching what Triton compiled before without Triton's look-up: the same arguments, and the same kernels."""

from __future__ import annotations

import dataclasses
import pickle
import weakref
from collections import namedtuple
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from tritlstm import layer, plan
from tritlstm.cell_options import PLAIN, Cell
from tritlstm.kernels import launch as launches
from tritlstm.kernels.launch import Compiled, Launch, kernel_function

FORWARD = plan.recurrent("forward", 9, 16, 256, torch.float16, plan.DEVICES["sm_90"])
REAL = kernel_function("recurrent_forward")
POINTERS = (
    "gates_ptr", "w_ptr", "h0_ptr", "c0_ptr", "exchange_ptr", "out_ptr", "cells_ptr", "h_n_ptr", "c_n_ptr",
    "counter_ptr",
)  # fmt: skip
INTS = {"T": 9, "B": 16, "reverse": 0, "step_begin": 0, "step_end": 9}


class OnDevice:
    """What a launch asks of a CUDA tensor."""

    is_cuda = True

    def __init__(self, address: int, dtype: torch.dtype = torch.float16) -> None:
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


class Kernel:
    function, packed_metadata = "function", "metadata"
    metadata: Any = None

    def __init__(self) -> None:
        self.runs: list[tuple[Any, ...]] = []

    def run(self, *args: Any) -> None:
        self.runs.append(args)


METADATA = namedtuple("METADATA", "target num_warps num_ctas shared")


class Jit:
    """A `triton.jit` function whose compiler is a stub."""

    params, arg_names = REAL.params, REAL.arg_names

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.kernels: list[Kernel] = []
        self.pre_run_hooks: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(**arguments: Any) -> Kernel:
            self.calls.append({"grid": grid, **arguments})
            self.kernels.append(Kernel())
            return self.kernels[-1]

        return call


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Stubs of Triton's driver, on device 0 and stream 7, and of its function."""
    here = SimpleNamespace(device=0, backend="cuda", jit=Jit())
    active = SimpleNamespace(
        get_current_device=lambda: here.device,
        get_current_stream=lambda device: 7 + device,
        get_current_target=lambda: GPUTarget(here.backend, 90, 32),
    )
    monkeypatch.setattr(launches, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launches, "kernel_function", lambda name: here.jit)
    launches._launches_directly.cache_clear()
    yield here
    launches._launches_directly.cache_clear()


def made(**changed: Any) -> Launch:
    arguments = {name: OnDevice(256 * (k + 1)) for k, name in enumerate(POINTERS)}
    status = torch.zeros(4, dtype=torch.int32)  # in memory of the host
    return FORWARD.launch({**arguments, "status_ptr": status, "lengths_ptr": None, **INTS, **changed})


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    FORWARD._compiled.clear()
    yield
    FORWARD._compiled.clear()


def test_the_second_launch_passes_the_arguments_in_the_order_of_the_signature(triton: SimpleNamespace) -> None:
    first, second = made(), made(gates_ptr=OnDevice(1 << 40), T=12)
    first.run()
    assert len(triton.jit.calls) == 1
    assert triton.jit.kernels[0].runs == []
    assert triton.jit.calls[0] == {
        "grid": first.grid, **first.arguments, **first.constants, **first.options, "launch_cooperative_grid": True,
    }  # fmt: skip
    second.run()
    assert len(triton.jit.calls) == 1
    (run,) = triton.jit.kernels[0].runs
    assert run[:9] == (*second.grid, 1, 7, "function", "metadata", None, None, None)
    given = dict(zip(REAL.arg_names, run[9:], strict=True))
    # Memory of the host may have another address on the device: Triton looks it up.
    assert given.pop("status_ptr") is second.arguments["status_ptr"]
    for name, value in second.arguments.items():
        if name != "status_ptr":
            assert given.pop(name) == (value.data_ptr() if isinstance(value, OnDevice) else value), name
    for name, value in second.constants.items():
        assert given.pop(name) == value, name
    assert given == {name: REAL.signature.parameters[name].default for name in given}


CHANGES: dict[str, dict[str, Any]] = {
    "alignment": {"h0_ptr": OnDevice(264)},
    "dtype": {"c0_ptr": OnDevice(512, torch.float32)},
    "a pointer more": {"lengths_ptr": OnDevice(512, torch.int32)},
    "an optional one": {"cuts_ptr": OnDevice(512, torch.int32)},
    "a pointer less": {"cells_ptr": None},
    "64 bits": {"B": 1 << 31},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_triton_compiles_for_is_looked_up_anew(triton: SimpleNamespace, change: str) -> None:
    for arguments in ({}, CHANGES[change], {}, CHANGES[change]):
        made(**arguments).run()
    assert len(triton.jit.calls) == 2
    assert [len(kernel.runs) for kernel in triton.jit.kernels] == [1, 1]


def test_each_device_has_its_own(triton: SimpleNamespace) -> None:
    for triton.device in (0, 1, 0, 1):
        made().run()
    assert len(triton.jit.calls) == 2
    assert [kernel.runs[0][3] for kernel in triton.jit.kernels] == [7, 8]


@pytest.mark.parametrize("change", CHANGES)
def test_a_look_up_finds_what_triton_would_have_found(change: str) -> None:
    """Triton's own binder, told apart by nothing that a launch does not tell apart, and by all that is in `CHANGES`."""
    bind = create_function_from_signature(REAL.signature, REAL.params, make_backend(GPUTarget("cuda", 90, 32)))

    def specialized(**changed: Any) -> Any:
        launch = made(**changed)
        return bind(**launch.arguments, **launch.constants)[1]

    same = {"T": 1, "B": 3, "step_end": 7, "gates_ptr": OnDevice(1 << 40), "w_ptr": OnDevice(48)}
    assert specialized() == specialized(**same)
    assert specialized() != specialized(**CHANGES[change])


@pytest.mark.parametrize("kernel", ["gate_gemm", "recurrent_forward", "recurrent_backward"])
def test_sizes_are_not_specialized_on(kernel: str) -> None:
    sizes = [p for p in kernel_function(kernel).params if not p.is_constexpr and not p.name.endswith("_ptr")]
    assert sizes
    assert all(p.do_not_specialize for p in sizes)


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_launch_hooks_are_triton_s(triton: SimpleNamespace, hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(metadata: Any) -> None:
        pass

    made().run()
    chain = getattr(knobs.runtime, hook)
    chain.add(seen)
    try:
        made().run()
    finally:
        chain.remove(seen)
    assert len(triton.jit.calls) == 2
    monkeypatch.setattr(knobs.runtime, hook, seen)  # the way before there were chains
    made().run()
    assert len(triton.jit.calls) == 3
    monkeypatch.setattr(knobs.runtime, hook, None)
    made().run()
    assert len(triton.jit.calls) == 3


@pytest.mark.parametrize("way", ["debug", "instrumentation", "pre-run hook"])
def test_what_triton_reads_in_every_launch(
    triton: SimpleNamespace, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made().run()
    if way == "debug":
        monkeypatch.setattr(knobs.runtime, "debug", True)
    elif way == "instrumentation":
        monkeypatch.setattr(knobs.compilation, "instrumentation_mode", "consan")
    else:
        triton.jit.pre_run_hooks.append(print)
    made().run()
    assert len(triton.jit.calls) == 2


@pytest.mark.parametrize(("version", "backend"), [((3, 5), "cuda"), ((4, 0), "cuda"), ((3, 7), "hip")])
def test_other_tritons_and_devices_launch_as_triton_does(
    triton: SimpleNamespace, version: tuple[int, int], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "TRITON", version)
    triton.backend = backend
    for _ in range(2):
        made().run()
    assert len(triton.jit.calls) == 2
    assert FORWARD._compiled == {}


def test_this_triton_is_known() -> None:
    assert launches.TRITON in launches.DIRECT


def test_a_compiler_that_a_hook_keeps_from_compiling(triton: SimpleNamespace) -> None:
    class Nothing(Jit):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **arguments: self.calls.append(arguments)

    triton.jit = Nothing()
    for _ in range(2):
        made().run()
    assert len(triton.jit.calls) == 2


def test_a_changed_copy_of_a_launch_is_not_taken_for_it(triton: SimpleNamespace) -> None:
    launch = made()
    launch.run()
    other = dataclasses.replace(launch, constants={**launch.constants, "WARPS": 2})
    for changed in (other, dataclasses.replace(launch, num_warps=2), dataclasses.replace(launch, cooperative=False)):
        for _ in range(2):
            changed.run()
    assert len(triton.jit.calls) == 7
    launch.run()
    assert len(triton.jit.calls) == 7
    assert len(triton.jit.kernels[0].runs) == 1


def test_no_tensor_is_kept(triton: SimpleNamespace) -> None:
    tensor = torch.zeros(4, dtype=torch.int32)
    alive = weakref.ref(tensor)
    launch = made(status_ptr=tensor)
    for _ in range(2):
        launch.run()
    triton.jit.calls.clear()
    triton.jit.kernels[0].runs.clear()
    del launch, tensor
    assert alive() is None


def test_compiled_kernels_belong_to_a_plan() -> None:
    assert made().compiled is made(T=3).compiled is FORWARD._compiled
    other = layer._with_cell(FORWARD, Cell(coupled=True))
    assert other is layer._with_cell(FORWARD, Cell(coupled=True))
    assert other.cell == (("COUPLED", True),)
    assert other.launch({}).compiled is not FORWARD._compiled
    assert layer._with_cell(FORWARD, PLAIN) is FORWARD
    gemm = plan.gate_gemm(16, 256, 256, torch.float16, plan.DEVICES["sm_90"])
    assert gemm.launch({}).compiled is gemm.launch({}).compiled


class Clustered(Jit):
    """Compiles one kernel; its metadata is as Triton's."""

    params, arg_names = kernel_function("recurrent_backward").params, kernel_function("recurrent_backward").arg_names

    def __init__(self) -> None:
        super().__init__()
        self.kernel = Kernel()
        self.kernel.metadata = METADATA(target=GPUTarget("cuda", 90, 32), num_warps=4, num_ctas=1, shared=45000)
        self.warmed: list[tuple[int, ...]] = []

    def warmup(self, *, grid: tuple[int, ...], **arguments: Any) -> Kernel:
        self.warmed.append(grid)
        return self.kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(**arguments: Any) -> Kernel:
            self.calls.append({"grid": grid, "metadata": self.kernel.packed_metadata})
            return self.kernel

        return call


def test_a_cluster_is_launched_as_triton_counts_it(triton: SimpleNamespace) -> None:
    """Triton multiplies the grid by the blocks of a cluster, and gives a block so much shared memory."""
    triton.jit = Clustered()
    device = dataclasses.replace(plan.DEVICES["sm_90"], clusters=True)
    p = plan.recurrent("backward", 9, 40, 256, torch.float16, device, overrides={"clustered": True, "parts": 8})
    assert p.n_blocks % 8 == 0
    arguments = {"w_ptr": OnDevice(256), "T": 9, "B": 40}
    for _ in range(3):
        p.launch(arguments).run()
    shared = -(-45000 // 128) * 128 + 8 * 4 * 8 * p.block_h * p.block_b
    metadata = (4, 8, shared)
    assert triton.jit.warmed == [(p.n_blocks, p.n_groups)]
    assert triton.jit.calls == [{"grid": (p.n_blocks // 8, p.n_groups), "metadata": metadata}]
    for run in triton.jit.kernel.runs:
        assert run[:6] == (p.n_blocks // 8, p.n_groups, 1, 7, "function", metadata)
    assert len(triton.jit.kernel.runs) == 2
    # Again by Triton's own look-up: it is not made a cluster twice.
    dataclasses.replace(p.launch(arguments), compiled=None).run()
    assert triton.jit.calls[1] == triton.jit.calls[0]


def test_compiled_kernels_stay_in_their_process() -> None:
    compiled = Compiled({"key": lambda: None})
    assert pickle.loads(pickle.dumps(compiled)) == {}
