"""The choice of a kernel in C against the planner's in Python, over devices, sizes and batches; nothing is compiled."""

from __future__ import annotations

import dataclasses
import subprocess
from typing import Any

import pytest
import torch
from cffi import FFI

from tritlstm import plan
from tritlstm.capi import aot, build
from tritlstm.plan import DEVICES, Device

SELECTION = aot.parse("sm_80,sm_86,sm_90,sm_100,ptx,fp16,fp32,H64,H256,H1024,H2048")
DIRECTIONS = (("forward", 0), ("forward", 1), ("backward", 1))
DTYPES = {torch.float32: 1, torch.float16: 2}
BATCHES = (1, 7, 16, 17, 32, 33, 64, 65, 100, 128, 300, 1024, 5000)

ffi = FFI()
ffi.cdef("""
typedef struct { const char *name; int major, minor, later; double l2; int first, count; } family;
typedef struct { const family *family; int sms; int64_t shared; } limits;
typedef struct {
    uint8_t kind, dtype, variant; uint16_t rows, columns; uint8_t warps; uint32_t shared, image, first_parameter;
    uint16_t parameters, parameter_bytes, hidden; uint8_t tier, protocol; uint16_t n_blocks; uint32_t planned;
    uint16_t resident, chunks, parts; double cost[7];
} kernel;
const family *tritlstm_cuda_family_for(int, int);
int tritlstm_cuda_hidden(const family *, int, int64_t);
int64_t tritlstm_cuda_groups(const kernel *, int, int64_t);
double tritlstm_cuda_predicted(const kernel *, const limits *, int64_t, int);
const kernel *tritlstm_cuda_choose(const limits *, int, int, int, int, int64_t, int);
""")


@pytest.fixture(scope="module")
def built() -> list[aot.Kernel]:
    return aot.kernels(SELECTION)


@pytest.fixture(scope="module")
def c(built: list[aot.Kernel], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("table")
    images = [aot.Image(b"", b"", kernel.plan.shared_bytes if kernel.plan else 0) for kernel in built]
    aot.write(folder, SELECTION, list(zip(built, images, strict=True)))
    files = [folder / "cuda_table.c", build.SOURCE / "src" / "cuda_plan.c"]
    flags = [f"-I{build.SOURCE / part}" for part in ("include", "src")]
    command = ["cc", "-std=c11", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *flags, *map(str, files)]
    subprocess.run([*command, "-o", str(folder / "plan.so")], check=True)
    return ffi.dlopen(str(folder / "plan.so"))


def devices(family: str) -> list[Device]:
    """The reference part of a family, a smaller and a larger one, and one with little shared memory."""
    base = DEVICES[aot.FAMILIES[family]]
    sizes = [(base.sms, base.shared_bytes), (base.sms // 3, base.shared_bytes), (190, base.shared_bytes),
             (base.sms, 64 << 10), (7, base.shared_bytes)]  # fmt: skip
    return [dataclasses.replace(base, sms=sms, shared_bytes=shared) for sms, shared in sizes]


def described(kernel: Any, groups: int) -> tuple[Any, ...]:
    return (plan.TIERS[kernel.tier], kernel.rows, kernel.columns, kernel.parts, kernel.warps, kernel.n_blocks,
            kernel.resident, kernel.chunks, groups)  # fmt: skip


@pytest.mark.parametrize("family", SELECTION.families)
def test_c_chooses_as_python_does(c: Any, built: list[aot.Kernel], family: str) -> None:
    name = ffi.new("char[]", family.encode())
    number = int(aot.FAMILIES[family].removeprefix("sm_"))
    found = c.tritlstm_cuda_family_for(13 if family == "ptx" else number // 10, number % 10)
    assert ffi.string(found.name) == ffi.string(name)
    chosen = set()
    for device in devices(family):
        limits = ffi.new("limits *", {"family": found, "sms": device.sms, "shared": device.shared_bytes})
        for dtype, number in DTYPES.items():
            for hidden in SELECTION.hidden:
                for kind, (direction, save) in enumerate(DIRECTIONS):
                    own = [k.plan for k in built if k.family == family and k.dtype == dtype and k.plan is not None
                           and (k.plan.hidden, k.plan.direction, k.plan.save) == (hidden, direction, save)]  # fmt: skip
                    for batch in BATCHES:
                        for alone in (0, 1):
                            best = aot.choose(own, device, batch, bool(alone))
                            args = (limits, kind // 2, number, save, hidden, batch, alone)
                            ours = c.tritlstm_cuda_choose(*args)
                            if best is None:
                                assert ours == ffi.NULL
                                continue
                            p = best
                            expected = (p.tier, p.block_h, p.places, p.parts, p.num_warps, p.n_blocks, p.resident,
                                        p.chunks, p.n_groups)  # fmt: skip
                            groups = c.tritlstm_cuda_groups(ours, device.sms, batch)
                            assert described(ours, groups) == expected, (device, dtype, hidden, direction, batch, alone)
                            time = c.tritlstm_cuda_predicted(ours, limits, batch, alone)
                            assert time == pytest.approx(best.us_per_step, rel=1e-8)
                            chosen.add((direction, best.tier))
    assert {tier for _, tier in chosen} >= {"persistent", "streaming", "step"}


def test_what_the_library_in_c_can_not_launch_is_not_built() -> None:
    """Clusters (TRITLSTM_CLUSTERS), which its launcher does not make, and the backward kernel of a single step: it has
    one step kernel for all lengths."""
    device = dataclasses.replace(DEVICES["sm_90"], clusters=True)
    assert plan.recurrent("backward", 2, 16, 768, torch.float16, device, "ieee", True).clustered
    assert plan.recurrent("backward", 1, 16, 768, torch.float16, device, "ieee", True).alone
    for tiers in ((), ("persistent",), ("step",)):
        found = aot.recurrent_plans(torch.float16, 768, device, tiers)
        assert found
        assert not any(p.clustered or p.alone for p in found)


@pytest.mark.parametrize("family", SELECTION.families)
def test_the_planners_own_choice_is_built_and_taken(built: list[aot.Kernel], family: str) -> None:
    """At the batch sizes that the set is made for, what Python would run is what C runs."""
    device = DEVICES[aot.FAMILIES[family]]
    for dtype in DTYPES:
        for hidden in SELECTION.hidden:
            for direction, save in DIRECTIONS:
                own = [k.plan for k in built if k.family == family and k.dtype == dtype and k.plan is not None
                       and (k.plan.hidden, k.plan.direction, k.plan.save) == (hidden, direction, save)]  # fmt: skip
                for batch in aot.BATCHES:
                    wanted = plan.recurrent(direction, 2, batch, hidden, dtype, device, "ieee", bool(save))
                    taken = aot.choose(own, device, batch, False)
                    assert taken is not None
                    assert (taken.constants, taken.n_groups) == (wanted.constants, wanted.n_groups)


def test_which_images_a_device_takes(c: Any) -> None:
    taken = {
        (major, minor): ffi.string(family.name).decode() if (family := c.tritlstm_cuda_family_for(major, minor)) else ""
        for major, minor in [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (13, 1)]
    }
    assert taken == {
        (7, 5): "", (8, 0): "sm_80", (8, 6): "sm_86", (8, 7): "sm_86", (8, 9): "sm_86", (9, 0): "sm_90",
        (10, 0): "sm_100", (10, 3): "ptx", (12, 0): "ptx", (13, 1): "ptx",
    }  # fmt: skip


def test_the_next_larger_hidden_size(c: Any) -> None:
    family = c.tritlstm_cuda_family_for(9, 0)
    sizes = {h: c.tritlstm_cuda_hidden(family, 1, h) for h in (1, 64, 65, 650, 1024, 1025, 2048, 2049)}
    assert sizes == {1: 64, 64: 64, 65: 256, 650: 1024, 1024: 1024, 1025: 2048, 2048: 2048, 2049: 0}
    assert c.tritlstm_cuda_hidden(family, 3, 1) == 0  # bf16 is not in this selection


def test_a_cost_model_of_another_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = DEVICES["sm_90"]
    chosen = plan.recurrent("forward", 2, 16, 256, torch.float16, device)
    original = plan._cost

    def changed(problem: Any, there: Any) -> plan.StepCost:
        cost = original(problem, there)
        return dataclasses.replace(cost, cell=cost.cell + 0.01 * problem.batch**2)

    assert len(aot.costs(chosen, device)) == 7
    monkeypatch.setattr(plan, "_cost", changed)
    with pytest.raises(aot.ImageError, match=r"has a term that capi/aot\.py does not know"):
        aot.costs(chosen, device)


def test_selections() -> None:
    assert aot.parse("default") == aot.DEFAULT
    assert aot.parse("sm_90,fp16,H656") == aot.Selection(("sm_90",), ("fp16",), (656,), ())
    assert aot.parse("ptx,step").tiers == ("step",)
    for word in ("sm_75", "H650", "fp64", ""):
        with pytest.raises(aot.ImageError, match=f"images: '{word}' is not known: use default or"):
            aot.parse(word)
