"""The C engine and the driver: what it loads and launches on several devices, and every error that the driver can give.

The driver is tests/capi_hosts/standin_libcuda.c; nothing is computed here, see test_aot_engine.py."""

from __future__ import annotations

import dataclasses
import gc
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from aot_world import (
    ARGUMENT,
    BUFFER,
    CPU,
    CUDA,
    DEVICE,
    MEMORY,
    NULL,
    OK,
    OVERFLOW,
    UNAVAILABLE,
    UNSUPPORTED,
    Failed,
    World,
    ffi,
    make_standin,
    pointer,
)  # fmt: skip
from torch import Tensor

from tritlstm.capi import aot
from tritlstm.plan import DEVICES

pytestmark = pytest.mark.timeout(600)  # kernels are compiled
IMAGES = "sm_80,sm_86,sm_90,ptx,fp32,H32,persistent,step"
T, B, D, H = 3, 2, 5, 20
HANDLE = ffi.new("tritlstm **")
OUT_OF_MEMORY, NO_BINARY, UNSUPPORTED_PTX, ILLEGAL_ADDRESS, TOO_LARGE, CAPTURE = 2, 209, 222, 700, 720, 900


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("driver"), IMAGES)


@pytest.fixture
def world(built: World) -> Iterator[World]:
    built.pretend()
    built.skip_launches()
    yield built
    gc.collect()  # handles that a caught exception's frames still hold
    built.pretend()
    assert built.driver.standin_live() == 0, "something was not ended"
    assert built.driver.standin_depth() == 0


def options(**other: Any) -> dict[str, Any]:
    return {"input_size": D, "hidden_size": H, **other}


class Scene:
    """Everything a host does with one LSTM, one call after another."""

    def __init__(self, world: World, lstm: Any, training: int = 1, **shape: int):
        self.world, self.lstm, self.training = world, lstm, training
        t, b = shape.get("t", T), shape.get("b", B)
        width, rows = shape.get("width", H), shape.get("rows", 1)
        need = world.sizes(lstm, t, b, training)

        def empty(*extents: int) -> Tensor:
            return world.empty(*extents, dtype=torch.float32)

        self.x, self.out, self.h, self.c = empty(t, b, D), empty(t, b, width), empty(rows, b, width), empty(rows, b, H)
        self.workspace, self.reserve = empty(need[0] // 4), empty(max(need[1] // 4, 1))
        self.forward_args = world.struct(
            "forward_args", steps=t, batch=b, x=pointer(self.x), out=pointer(self.out), h_n=pointer(self.h),
            c_n=pointer(self.c), workspace=pointer(self.workspace), workspace_bytes=need[0],
        )  # fmt: skip
        self.backward_args = world.struct(
            "backward_args", steps=t, batch=b, x=pointer(self.x), out=pointer(self.out),
            workspace=pointer(self.workspace), workspace_bytes=need[0], reserve=pointer(self.reserve),
            reserve_bytes=need[1],
        )  # fmt: skip
        if training:
            self.forward_args.reserve, self.forward_args.reserve_bytes = pointer(self.reserve), need[1]
        self.grad_x = empty(t, b, D)
        self.backward_args.grad_x = pointer(self.grad_x)

    def forward(self) -> None:
        self.world.call("forward", self.lstm, self.forward_args)

    def backward(self) -> None:
        self.world.call("backward", self.lstm, self.backward_args)


def launches(world: World, kernel: str) -> list[Any]:
    found = [world.driver.standin_launched_at(k) for k in range(world.driver.standin_launches())]
    return [launched for launched in found if ffi.string(launched.kernel).decode() == kernel]


# -- devices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "family"),
    [((8, 0), "sm_80"), ((8, 6), "sm_86"), ((8, 9), "sm_86"), ((9, 0), "sm_90"), ((10, 3), "ptx"), ((13, 0), "ptx")],
    ids=lambda value: value if isinstance(value, str) else "{}.{}".format(*value),
)
def test_what_a_device_loads_and_launches(world: World, capability: tuple[int, int], family: str) -> None:
    limit = DEVICES[aot.FAMILIES[family]].shared_bytes
    world.pretend(*capability, sms=40, shared=limit)
    world.skip_launches()
    scene = Scene(world, world.create(**options()), b=50)
    scene.forward()
    scene.backward()
    text = world.explain(scene.lstm, T, 50, 1)
    code = "PTX of sm_80, compiled by the driver" if family == "ptx" else f"machine code (cubin) of {family}"
    assert f"images: {code}" in text
    assert f"Stand-in 0, compute capability {capability[0]}.{capability[1]}, 40 multiprocessors, {limit} bytes" in text
    for name, direction, save in (("forward", "forward", True), ("backward", "backward", True)):
        (launched,) = launches(world, f"recurrent_{name}")
        kernel, image = world.kernel_of(launched)
        own = [k.plan for k, _ in world.built if k.family == family and k.plan is not None
               and (k.plan.direction, k.plan.save) == (direction, save)]  # fmt: skip
        device = DEVICES[aot.FAMILIES[family]]
        best = aot.choose(own, dataclasses.replace(device, sms=40, shared_bytes=limit), 50, False)
        assert best is not None
        assert kernel.arch == aot.FAMILIES[family]
        assert kernel.plan is not None
        assert kernel.plan.constants == best.constants
        assert (launched.x, launched.y, launched.threads) == (best.n_blocks, best.n_groups, 32 * best.num_warps)
        assert (launched.shared, launched.cooperative) == (image.shared_bytes, 1)
        arguments = world.arguments_of(launched)
        sizes = {
            "T": T, "B": 50, "step_begin": 0, "step_end": T, "reverse": 0, "n_tiles": best.n_tiles,
            "tile_rows": best.tile_rows, "spin_limit": best.spin_limit,
        }  # fmt: skip
        assert {name: arguments[name] for name in sizes} == sizes
        assert f"{name}: {best.tier}, exchange flag, {best.n_blocks} blocks of {best.block_h} units" in text
        rows = f"{best.tile_rows} in {best.places}" if best.tile_rows < best.places else best.places
        assert f"x {best.n_groups} groups, {best.n_tiles} batch tiles of {rows}" in text


def test_a_device_too_small_for_an_exchange_runs_step_by_step(world: World) -> None:
    world.pretend(sms=1)
    world.skip_launches()
    scene = Scene(world, world.create(**options()))
    scene.forward()
    steps = [world.arguments_of(launched) for launched in launches(world, "recurrent_forward")]
    assert [(a["step_begin"], a["step_end"]) for a in steps] == [(0, 1), (1, 2), (2, 3)]
    assert not any(launched.cooperative for launched in launches(world, "recurrent_forward"))
    assert "forward: step, exchange none" in world.explain(scene.lstm, T, B, 0)


@pytest.mark.parametrize(
    ("device", "status", "words"),
    [
        (
            {"major": 7, "minor": 5},
            UNSUPPORTED,
            "of compute capability 7.5, for which .* no kernels: 8.0 is the oldest",
        ),
        ({"shared": 4 << 10}, UNSUPPORTED, r"no kernel for hidden_size 20 fits Stand-in 0 \(4 multiproc.*, 4096 bytes"),
        ({"cooperative": 0}, UNSUPPORTED, "Stand-in 0 can not launch cooperatively"),
        ({"count": 0}, DEVICE, "device_index is 0, but the driver sees 0 CUDA devices"),
    ],
)
def test_devices_that_will_not_do(world: World, device: dict[str, int], status: int, words: str) -> None:
    world.pretend(**device)
    with pytest.raises(Failed, match=words) as failed:
        world.create(**options())
    assert failed.value.status == status


def test_sizes_and_types_that_are_not_built(world: World) -> None:
    cases = [
        ({"hidden_size": 33}, "hidden_size is 33, but this library has kernels up to 32: .* --images H40"),
        ({"dtype": 2}, "dtype is 2, for which this library has no kernels"),
        ({"dtype": 4}, "dtype is 4, .* on CUDA devices: use libtritlstm_python"),
        ({"device_index": 3}, "device_index is 3, but the driver sees 1 CUDA device$"),
    ]
    for members, words in cases:
        with pytest.raises(Failed, match=words):
            world.create(**options(**members))


def test_no_driver_and_one_that_is_too_old(world: World, tmp_path: Path) -> None:
    absent, old = tmp_path / "absent.so", make_standin(tmp_path / "old.so", "-DWITHOUT_LAUNCH")
    for driver, words in [
        (
            absent,
            r"the NVIDIA driver's .*driver-1\.so can not be opened \(.*\): install the driver, or use TRITLSTM_CPU",
        ),
        (old, "the NVIDIA driver lacks cuLaunchKernelEx: it must be of CUDA 11.8 or later"),
    ]:
        lib = world.fresh_library(driver)
        assert lib.tritlstm_create(world.struct("options", device=CUDA, **options()), NULL, HANDLE) == UNAVAILABLE
        assert re.fullmatch(words, ffi.string(lib.tritlstm_last_error()).decode())


def test_a_driver_that_does_not_start_is_asked_again(world: World) -> None:
    lib = world.fresh_library(world.standin)
    world.driver.standin_fail(1, 12345)
    given = world.struct("options", device=CUDA, **options())
    assert lib.tritlstm_create(given, NULL, HANDLE) == DEVICE
    assert ffi.string(lib.tritlstm_last_error()).decode() == "cuInit: unknown error (12345): words of the stand-in"
    assert lib.tritlstm_create(given, NULL, HANDLE) == OK
    lib.tritlstm_destroy(HANDLE[0])


# -- failures ---------------------------------------------------------------------------------------------------


def everything(world: World, attempt: Callable[..., bool]) -> None:
    """A host that stops at its first failure and ends what it has."""
    handle, state = ffi.new("tritlstm **"), ffi.new("tritlstm_state **")
    lib = world.lib
    given = world.struct("options", device=CUDA, **options(num_layers=2))
    if attempt(lib.tritlstm_create(given, NULL, handle)):
        scene = Scene(world, handle[0], rows=2)
        weights = [torch.zeros(4 * H * max(D, H)) for _ in range(8)]
        array = ffi.new("void *[]", [pointer(w) for w in weights])
        dense = torch.zeros(2 * B * H)
        calls: list[Callable[[], int]] = [
            lambda: lib.tritlstm_forward(handle[0], scene.forward_args),
            lambda: lib.tritlstm_backward(handle[0], scene.backward_args),
            lambda: lib.tritlstm_get_weights(handle[0], array, CPU, NULL),
            lambda: lib.tritlstm_set_weights(handle[0], ffi.cast("void **", array), CPU, NULL),
            lambda: lib.tritlstm_state_create(handle[0], B, state),
            lambda: lib.tritlstm_state_set(state[0], pointer(dense), pointer(dense), CPU, NULL),
            lambda: lib.tritlstm_step(state[0], pointer(scene.x), pointer(scene.out), pointer(scene.workspace),
                                      4 * scene.workspace.numel(), NULL),
            lambda: lib.tritlstm_state_reset(state[0], ffi.new("uint8_t[]", [0, 1]), NULL),
            lambda: lib.tritlstm_state_get(state[0], pointer(dense), NULL, CPU, NULL),
        ]  # fmt: skip
        all(attempt(call()) for call in calls)
    lib.tritlstm_state_destroy(state[0])
    lib.tritlstm_destroy(handle[0])


#: Calls that end something: a failure there has nobody to be told to.
ENDING = {"cuMemFree_v2", "cuMemFreeHost", "cuModuleUnload", "cuDevicePrimaryCtxRelease_v2"}


def test_every_driver_call_may_fail(world: World) -> None:
    """Calls of a host's whole life fail, one in each run: it hears of it, in the driver's words, and nothing leaks."""
    statuses: list[int] = []

    def attempt(status: int) -> bool:
        statuses.append(status)
        return status == OK

    everything(world, attempt)
    assert set(statuses) == {OK}
    names = [ffi.string(world.driver.standin_call(k)).decode() for k in range(world.driver.standin_calls())]
    assert len(names) > 200
    told: set[str] = set()
    seen: dict[str, int] = {}
    for n, name in enumerate(names, 1):
        # Of the calls of one name that follow each other, a few stand for all.
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 12 and n % 7:
            continue
        world.pretend()
        world.skip_launches()
        statuses.clear()
        error = OUT_OF_MEMORY if n % 2 else ILLEGAL_ADDRESS
        world.driver.standin_fail(n, error)
        everything(world, attempt)
        failed = [status for status in statuses if status != OK]
        if failed:
            word = "OUT_OF_MEMORY (2): out of memory" if n % 2 else "ILLEGAL_ADDRESS (700): words of the stand-in"
            assert failed == [MEMORY if n % 2 else DEVICE], (n, name)
            assert f"{name}: CUDA_ERROR_{word}" in world.error(), (n, name)
            told.add(name)
        else:
            # Ending things: told to nobody; and the pop of a context while something is ended.
            assert name in ENDING or name.startswith("cuCtx"), (n, name)
        world.pretend()
        if not failed and name == "cuCtxPushCurrent_v2":
            world.driver.standin_forget()  # without the context nothing can be freed
        assert world.driver.standin_live() == 0, (n, name)
        assert world.driver.standin_depth() == 0, (n, name)
    assert told == set(names) - ENDING


@pytest.mark.parametrize(
    ("call", "error", "status", "words"),
    [
        ("cuModuleLoadDataEx", NO_BINARY, UNAVAILABLE, r"CUDA_ERROR_NO_BINARY_FOR_GPU \(209\)"),
        ("cuModuleLoadDataEx", UNSUPPORTED_PTX, UNAVAILABLE, r"CUDA_ERROR_UNSUPPORTED_PTX_VERSION \(222\)"),
        ("cuMemAlloc_v2", OUT_OF_MEMORY, MEMORY, r"cuMemAlloc_v2: CUDA_ERROR_OUT_OF_MEMORY \(2\): out of memory"),
    ],
)
def test_errors_while_creating(world: World, call: str, error: int, status: int, words: str) -> None:
    world.create(**options())
    names = [ffi.string(world.driver.standin_call(k)).decode() for k in range(world.driver.standin_calls())]
    world.driver.standin_fail(names.index(call) + 1, error)
    with pytest.raises(Failed, match=words) as failed:
        world.create(**options())
    assert failed.value.status == status


def test_an_image_that_is_refused_brings_the_drivers_log(world: World) -> None:
    world.driver.standin_rejecting = 1
    words = r"cuModuleLoadDataEx: CUDA_ERROR_NO_BINARY_FOR_GPU \(209\): words of the stand-in\. the stand-in's log"
    with pytest.raises(Failed, match=words) as failed:
        world.create(**options())
    assert failed.value.status == UNAVAILABLE


def test_a_grid_that_does_not_fit_at_once_is_refused(world: World) -> None:
    scene = Scene(world, world.create(**options()))
    world.driver.standin_sms = 1
    with pytest.raises(Failed, match=r"cuLaunchKernelEx: CUDA_ERROR_COOP.* Something else holds part of") as failed:
        scene.forward()
    assert failed.value.status == DEVICE


def test_a_time_out_in_a_kernel_is_told_once_and_without_waiting(world: World) -> None:
    scene = Scene(world, world.create(**options()))
    scene.forward()
    (launched,) = launches(world, "recurrent_forward")
    record = ffi.cast("int32_t *", world.arguments_of(launched)["status_ptr"])
    for k, value in enumerate((1, 3, 0, 17)):
        record[k] = value
    with pytest.raises(Failed, match=r"gave up waiting at step 17 \(block 3 of group 0\)") as failed:
        scene.backward()
    assert failed.value.status == DEVICE
    scene.forward()
    scene.backward()


# -- what a host may rely on ------------------------------------------------------------------------------------


def test_calls_can_be_captured_into_a_graph(world: World) -> None:
    """After create, nothing that a capture forbids: no allocation, no synchronisation, no copy from ordinary memory."""
    for layers, proj, both in ((2, 0, 1), (1, 6, 0)):
        lstm = world.create(**options(num_layers=layers, proj_size=proj, bidirectional=both))
        shape = {"width": (proj or H) * (1 + both), "rows": layers * (1 + both)}
        scene = Scene(world, lstm, **shape)
        state = ffi.new("tritlstm_state **")
        if not both:
            world.call("state_create", lstm, B, state)
        world.driver.standin_capturing = 1
        scene.forward()
        scene.backward()
        if not both:
            room = 4 * scene.workspace.numel()
            world.call("step", state[0], pointer(scene.x), pointer(scene.out), pointer(scene.workspace), room, NULL)
            world.call("state_reset", state[0], NULL, NULL)
            h = world.empty(1, B, proj or H, dtype=torch.float32)
            world.call("state_get", state[0], pointer(h), NULL, CUDA, NULL)
        with pytest.raises(Failed, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
            world.create(**options())
        world.driver.standin_capturing = 0
        world.lib.tritlstm_state_destroy(state[0])
        del scene, lstm


def test_the_callers_context_and_stream(world: World) -> None:
    mine, stream = ffi.cast("void *", 0x1234), ffi.cast("void *", 0x77)
    world.driver.standin_push(mine)
    try:
        scene = Scene(world, world.create(**options()))
        world.driver.standin_fail(0, 0)
        scene.forward_args.stream = scene.backward_args.stream = stream
        scene.forward()
        scene.backward()
        assert world.driver.standin_current() == mine
        assert world.driver.standin_depth() == 1
        found = [world.driver.standin_launched_at(k).stream for k in range(world.driver.standin_launches())]
        assert set(found) == {stream}
        del scene
    finally:
        world.driver.standin_pop()


def test_scratch_that_is_too_small_and_sizes_that_are_too_large(world: World) -> None:
    scene = Scene(world, world.create(**options()))
    need = world.sizes(scene.lstm, T, B, 1)
    assert world.sizes(scene.lstm, T, B, 0)[1] == 0
    for args, call in ((scene.forward_args, scene.forward), (scene.backward_args, scene.backward)):
        for member, bytes_ in zip(("workspace_bytes", "reserve_bytes"), need, strict=True):
            setattr(args, member, bytes_ - 1)
            words = f"{member} is {bytes_ - 1}, but {bytes_} are needed: ask tritlstm_sizes"
            with pytest.raises(Failed, match=words) as failed:
                call()
            assert failed.value.status == BUFFER
            setattr(args, member, bytes_)
    with pytest.raises(
        Failed, match=r"65536 steps x 32768 batch are too large: their product must be below 2\^31"
    ) as big:
        world.sizes(scene.lstm, 65536, 32768, 0)
    assert big.value.status == OVERFLOW
    with pytest.raises(Failed, match="bidirectional"):
        world.call("state_create", world.create(**options(bidirectional=1)), B, ffi.new("tritlstm_state **"))


def test_two_handles_share_their_kernels(world: World) -> None:
    first = world.create(**options())
    world.driver.standin_fail(0, 0)
    second = world.create(**options())
    names = [ffi.string(world.driver.standin_call(k)).decode() for k in range(world.driver.standin_calls())]
    assert "cuModuleLoadDataEx" not in names
    assert "cuDevicePrimaryCtxRetain" not in names
    del first, second


def test_many_threads_create_and_run_and_end(world: World) -> None:
    """The device is opened by the first, and ended by the last, again and again; kernels are loaded once each time."""
    wrong: list[Any] = []

    def life() -> None:
        for _ in range(8):
            handle = ffi.new("tritlstm **")
            given = world.struct("options", device=CUDA, **options())
            statuses = [world.lib.tritlstm_create(given, NULL, handle)]
            statuses.append(world.lib.tritlstm_forward(handle[0], args))
            world.lib.tritlstm_destroy(handle[0])
            if any(statuses):
                wrong.append((statuses, world.error()))

    args = Scene(world, world.create(**options())).forward_args
    gc.collect()
    threads = [threading.Thread(target=life) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert world.driver.standin_live() == len(world.allocated)


def test_what_the_public_functions_refuse_first(world: World) -> None:
    scene = Scene(world, world.create(**options()))
    scene.forward_args.x = NULL
    with pytest.raises(Failed, match="x is NULL") as failed:
        scene.forward()
    assert failed.value.status == ARGUMENT
