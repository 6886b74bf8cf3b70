"""The planner: its cost model against numbers computed by hand, what every plan promises, and overrides."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritlstm import emulator, measured, plan
from tritlstm.kernels import exchange

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
#: With the rates and constants that the numbers below were computed from.
H100 = dataclasses.replace(plan.DEVICES["sm_90"], l2_bytes_per_us=5.5e6, constants=measured.DATA_SHEET)


# The cost model


def test_cost_of_a_forward_step_under_the_flag_protocol() -> None:
    """H=1024, B=64 in fp16 on an H100: 64 blocks of 16 units for each of 2 groups of 32 sequences.

    Computed by hand from the rates in plan.DEVICES: 1.755 GHz, 2048 multiply-adds and 128 bytes of shared memory a
    clock, 57 KB/µs from L2 to one multiprocessor and 5.5 MB/µs to all, 3.35 MB/µs of memory.
    """
    p = plan.recurrent("forward", 512, 64, 1024, FP16, H100, overrides={
        "tier": "persistent", "protocol": "flag", "block_h": 16, "block_b": 32})  # fmt: skip
    assert (p.n_blocks, p.n_groups, p.n_tiles, p.chunks, p.resident) == (64, 2, 2, 4, 4)
    assert (p.block_k, p.poll) == (256, 1)
    cost = p.cost
    # A tile of h: 32 * 1024 * 2 = 65536 bytes, for 128 blocks 8388608 bytes, over 5.5e6 bytes/µs;
    # and a latency of 0.17 for each of 4 chunks.
    assert cost.copy == pytest.approx(4 * 0.17 + 1.525201, abs=1e-6)
    # The weights, 131072 bytes, and twice the tile of h, 65536, over 128 * 1755 bytes/µs. (16 * 32 * 4 * 1024 = 2097152
    # multiply-adds over 2048 * 1755 a µs take half as long.) A fence for each of 4 chunks.
    assert cost.weights == pytest.approx(1.166952 + 4 * 0.04, abs=1e-6)
    assert cost.streamed == cost.launch == 0.0
    # 512 cells, four a thread: half as long again as two.
    assert cost.cell == pytest.approx(0.15 * 1.5, abs=1e-9)
    # 2 groups * 65536 bytes of poison.
    assert cost.prefill == pytest.approx(0.039126, abs=1e-6)
    assert cost.hand_off == 0.14
    total = 0.14 + 2.205201 + 1.326952 + 0.225 + 0.039126
    assert p.us_per_step == pytest.approx(total, abs=1e-5)


def test_cost_of_a_backward_step_under_the_counter_protocol() -> None:
    """H=512, B=16 in fp16 on an A100: 32 blocks of 16 units in teams of 4, one group. 1.41 GHz, 1024 multiply-adds a
    clock."""
    p = plan.recurrent("backward", 512, 16, 512, FP16, plan.DEVICES["sm_80"], overrides={
        "tier": "persistent", "protocol": "counter", "block_h": 16, "block_b": 16, "block_k": 256,
        "tile_rows": 0})  # fmt: skip
    assert (p.n_blocks, p.parts, p.n_groups, p.n_tiles, p.chunks, p.resident) == (32, 4, 1, 1, 2, 2)
    cost = p.cost
    assert cost.hand_off == 1.0
    # A quarter of the gate gradients: 16 * 512 * 2 = 16384 bytes over 57e3 bytes/µs (for all: 524288 over 4e6, which
    # is less).
    assert cost.copy == pytest.approx(0.17 + 0.287439, abs=1e-6)
    # Partial sums: a hand-off, a latency, and from each of 4 blocks 16 * 16 words of 8 bytes: 8192 over 57e3.
    assert cost.parts == pytest.approx(0.15 + 0.14 + 0.17 + 0.143719, abs=1e-6)
    # The weights, 65536 bytes, and twice the tile, 16384, over 128 * 1410 bytes/µs. (16 * 16 * 4 * 512 = 524288
    # multiply-adds over 1024 * 1410 a µs take less.)
    assert cost.weights == pytest.approx(0.544681 + 2 * 0.04, abs=1e-6)
    assert cost.cell == pytest.approx(0.15, abs=1e-9)
    assert cost.streamed == cost.prefill == cost.launch == 0.0
    assert p.us_per_step == pytest.approx(2.835839, abs=1e-5)


def test_teams_of_eight_read_and_multiply_half_as_much() -> None:
    """H=768, B=16 in fp16 on an H100, with the constants measured on an H200."""
    p = plan.recurrent("backward", 1024, 16, 768, FP16, plan.DEVICES["sm_90"], overrides={"held": 0})
    assert (p.tier, p.n_blocks, p.block_h, p.parts, p.block_b, p.num_warps) == ("persistent", 96, 8, 8, 16, 4)
    four = plan.recurrent("backward", 1024, 16, 768, FP16, plan.DEVICES["sm_90"], overrides={
        "tier": "persistent", "block_h": 16, "parts": 4, "block_b": 16, "held": 0, "tile_rows": 0})  # fmt: skip
    assert four.n_blocks == 48
    # An eighth of 16 rows of 4 * 768 gate gradients, and a quarter.
    assert p.cost.copy == pytest.approx(0.108 + 12288 / 46.7e3)
    assert four.cost.copy == pytest.approx(0.108 + 24576 / 46.7e3)
    # 8 * 8 * 16 words of 8 bytes, and 4 * 16 * 16.
    assert p.cost.parts == four.cost.parts == pytest.approx(0.764 + 0.40 + 0.108 + 8192 / 46.7e3)
    # The weights, 49152 bytes, and twice the tile, 12288, over 128 * 1755 bytes/µs; twice as much.
    assert p.cost.weights == pytest.approx((49152 + 24576) / (128 * 1755) + 3 * 0.0037)
    assert four.cost.weights == pytest.approx(2 * (49152 + 24576) / (128 * 1755) + 3 * 0.0037)


def test_what_is_in_registers_is_not_read_from_shared_memory() -> None:
    """H=768, B=16 in fp16 on an H100: a chunk of 256 columns of three. And H=2048, of which a block needs 262144 bytes,
    more than its shared memory."""
    p = plan.recurrent("forward", 1024, 16, 768, FP16, plan.DEVICES["sm_90"])
    assert (p.tier, p.held, p.chunks, p.block_k, p.constants["HELD"]) == ("persistent", 1, 3, 256, 1)
    assert p.cost.weights == pytest.approx((65536 + 2 * 24576) / (128 * 1755) + 3 * 0.0037)
    other = plan.recurrent("forward", 1024, 16, 768, FP16, plan.DEVICES["sm_90"], overrides={"held": 0})
    assert "HELD" not in other.constants
    assert other.cost.weights == pytest.approx((98304 + 2 * 24576) / (128 * 1755) + 3 * 0.0037)
    # 32768 bytes fewer.
    assert other.shared_bytes - p.shared_bytes == 32768
    large = plan.recurrent("backward", 256, 32, 2048, BF16, plan.DEVICES["sm_90"])
    assert (large.tier, large.held, large.block_h * 4 * 2048 * 2) == ("persistent", 1, 262144)
    with pytest.raises(plan.PlanError, match="held"):
        plan.recurrent("backward", 256, 32, 2048, BF16, plan.DEVICES["sm_90"], overrides={
            "held": 0, "tier": "persistent"})  # fmt: skip
    for arch, dtype, more in (("sm_100", FP16, {}), ("sm_80", FP16, {}), ("sm_90", FP32, {"narrow": False})):
        with pytest.raises(plan.PlanError, match="held"):
            plan.recurrent("forward", 9, 16, 768, dtype, plan.DEVICES[arch], "tf32", overrides={"held": 1, **more})


@pytest.mark.parametrize("chains", [1, 2])
@pytest.mark.parametrize(("dtype", "precision"), [(FP16, "ieee"), (FP32, "tf32"), (FP32, "ieee")])
def test_the_only_step_of_a_backward_pass_multiplies_nothing(chains: int, dtype: torch.dtype, precision: str) -> None:
    fixed = (4096, 256, dtype, plan.DEVICES["sm_90"], precision, True)
    p = plan.recurrent("backward", 1, *fixed, None, chains)
    assert (p.alone, p.order, p.constants["ALONE"]) == (True, None, True)
    assert p.cost.total == p.cost.cell > 0
    assert "no w_hh in the only step" in p.describe()
    whole = plan.recurrent("backward", 1, *fixed, {"alone": False}, chains)
    assert "ALONE" not in whole.constants
    assert whole.us_per_step > 5 * p.us_per_step
    assert not plan.recurrent("backward", 2, *fixed, None, chains).alone
    assert not plan.recurrent("forward", 1, *fixed, {"alone": True}, chains).alone
    with pytest.raises(plan.PlanError, match="alone"):
        plan.recurrent("backward", 2, *fixed, {"alone": True}, chains)


def test_a_part_of_k_begins_with_a_whole_run() -> None:
    """H=1000 in 16 bits: an eighth of 4000 columns is 1000 bytes, no multiple of 16. In fp32 it is."""
    overrides = {"parts": 8}
    with pytest.raises(plan.PlanError, match="parts"):
        plan.recurrent("backward", 9, 16, 1000, FP16, plan.DEVICES["sm_90"], overrides=overrides)
    assert plan.recurrent("backward", 9, 16, 1008, FP16, plan.DEVICES["sm_90"], overrides=overrides).parts == 8
    assert plan.recurrent("backward", 9, 16, 1000, FP32, plan.DEVICES["sm_90"], "tf32", overrides=overrides).parts == 8


def test_in_fp32_w_hh_of_1024_units_fits_on_chip_backward() -> None:
    fixed = ("backward", 512, 64, 1024, FP32, plan.DEVICES["sm_90"], "tf32", True)
    p = plan.recurrent(*fixed, {"tier": "persistent"})
    assert (p.tier, p.n_blocks, p.block_h, p.parts, p.n_groups) == ("persistent", 128, 8, 8, 1)
    # Weights in columns stream as fast as those of 16 bits.
    streamed = plan.recurrent(*fixed, {"tier": "streaming", "block_h": 32, "parts": 4, "block_b": 16})
    left = (1 - streamed.resident / streamed.chunks) * 32 * 4 * 1024 * 4
    assert streamed.cost.streamed == pytest.approx(128 * left / 4.76e6)


def test_cost_of_streaming() -> None:
    """H=2048, B=32 in bf16 on an H100: 16 chunks of 16 KiB a block, one of which is held beside a tile of h."""
    p = plan.recurrent("forward", 256, 32, 2048, torch.bfloat16, H100, overrides={
        "tier": "streaming", "block_h": 16, "block_b": 32, "stages": 1})  # fmt: skip
    assert (p.n_blocks, p.n_groups, p.chunks, p.poll, p.resident) == (128, 1, 16, 1, 12)
    assert "STAGES" not in p.constants
    # h: 32 * 2048 * 2 = 131072 bytes, for 128 blocks over 5.5e6 bytes/µs; and each chunk is waited for.
    assert p.cost.copy == pytest.approx(16 * 0.17 + 3.050403, abs=1e-6)
    # The chunks that are not on chip, for 128 blocks.
    assert p.cost.streamed == pytest.approx(4 * 16384 * 128 / 5.5e6, abs=1e-6)


def test_a_pipeline_waits_for_its_first_chunk_only() -> None:
    """Not on Hopper, where the pipeline was measured to be slower."""
    if not (3, 7) <= plan.TRITON < (3, 9):
        pytest.skip("no pipelines with this Triton")
    fixed = {"tier": "streaming", "block_h": 16, "block_b": 16}
    args = ("forward", 256, 16, 1024, torch.bfloat16, plan.DEVICES["sm_80"], "ieee", True)
    one, three = (plan.recurrent(*args, {**fixed, "stages": stages}) for stages in (1, 3))
    assert three.constants["STAGES"] == 3
    for p, streamed in ((one, one.chunks - one.resident), (three, 1)):
        waits = math.ceil(p.resident / p.poll) + streamed
        blocks, read = p.n_blocks * p.n_groups, 16 * 1024 * 2
        assert p.cost.copy == pytest.approx(waits * 0.17 + max(read / 57e3, blocks * read / 4.0e6))
    with pytest.raises(plan.PlanError, match="stages"):
        plan.recurrent("forward", 256, 32, 2048, torch.bfloat16, H100, overrides={"tier": "streaming", "stages": 3})


def test_every_part_of_the_cost_counts_once() -> None:
    assert plan.StepCost(1, 2, 4, 8, 16, 32, 64, 128).total == 255


def test_the_fastest_predicted_plan_of_all_tiers_is_taken() -> None:
    for batch, hidden in ((16, 768), (64, 1024), (1024, 64), (32, 2048), (1, 512)):
        for direction in ("forward", "backward"):
            best = plan.recurrent(direction, 100, batch, hidden, FP16, H100)
            tiers = plan.tiers(direction, 100, batch, hidden, FP16, H100)
            times = [t.us_per_step for t in tiers.values() if not isinstance(t, str)]
            assert best.us_per_step == min(times)
            assert tiers[best.tier] == best


# What every plan promises


def products(arch: str) -> list[tuple[torch.dtype, str]]:
    """dtype and precision; bf16 plans as fp16 does (tested below), and AMD has no TF32."""
    return [(FP16, "ieee"), (FP32, "ieee"), *([(FP32, "tf32")] if arch.startswith("sm_") else [])]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Any, ...]:
    arch = draw(st.sampled_from(sorted(plan.DEVICES)))
    dtype, precision = draw(st.sampled_from(products(arch)))
    direction = draw(st.sampled_from(("forward", "backward")))
    length = draw(st.sampled_from((1, 2, 300)))
    hidden = draw(st.one_of(st.integers(1, 4096), st.integers(1, 300), st.integers(1, 64).map(lambda n: 64 * n)))
    batch = draw(st.one_of(st.integers(1, 8192), st.integers(1, 140)))
    return direction, length, batch, hidden, dtype, plan.DEVICES[arch], precision


@settings(max_examples=600)
@given(problems())
def test_a_plan_exists_and_fits_the_device(problem: tuple[Any, ...]) -> None:
    direction, length, batch, hidden, _, device, _ = problem
    p = plan.recurrent(*problem)
    assert p.shared_bytes <= device.shared_bytes
    # The grid covers every unit and every sequence, and nothing twice.
    covered = p.n_blocks * p.block_h
    assert covered >= hidden
    assert covered - p.block_h * p.parts < plan.padded(hidden) or p.tier == "single"
    assert 1 <= p.tile_rows <= p.block_b
    assert (p.n_tiles - 1) * p.tile_rows < batch <= p.n_tiles * p.tile_rows
    assert 1 <= p.n_groups <= p.n_tiles
    # Blocks that wait for one another must all be resident.
    if p.protocol != "none":
        assert p.n_blocks * p.n_groups <= device.sms
    assert (p.protocol == "none") is (p.tier in ("single", "step"))
    assert p.launch({}).cooperative is (p.protocol != "none")
    # K is covered by the chunks, and they are on chip as the tier says.
    depth = plan.padded(hidden) * (4 if direction == "backward" else 1)
    if p.tier == "single":
        assert (p.n_blocks, p.chunks, p.resident) == (1, 1, 1)
        assert p.block_h >= hidden
    else:
        assert (p.chunks - 1) * p.block_k < depth // p.parts <= p.chunks * p.block_k
        expected = {"persistent": [p.chunks], "streaming": range(1, p.chunks), "step": [0]}[p.tier]
        assert p.resident in expected
    assert 1 <= p.poll <= 16
    assert p.poll & (p.poll - 1) == 0  # a power of two, so that few kernels serve all sizes
    assert p.prologue >= 1
    assert (length == 1) <= (p.tier == "step")
    assert p.us_per_step > 0


@settings(max_examples=300)
@given(problems(), st.integers(1, 4096))
def test_more_batch_never_makes_a_step_cheaper(problem: tuple[Any, ...], more: int) -> None:
    larger = (*problem[:2], problem[2] + more, *problem[3:])
    assert plan.recurrent(*larger).us_per_step >= plan.recurrent(*problem).us_per_step * (1 - 1e-12)


@settings(max_examples=100)
@given(problems(), st.integers(2, 1 << 40))
def test_a_plan_knows_nothing_of_the_length_beyond_one_step(problem: tuple[Any, ...], length: int) -> None:
    direction, _, *rest = problem
    assert plan.recurrent(direction, length, *rest) == plan.recurrent(direction, 2, *rest)


@settings(max_examples=100)
@given(problems())
def test_saving_and_the_kind_of_sixteen_bits_change_no_tile(problem: tuple[Any, ...]) -> None:
    trained = plan.recurrent(*problem, True)
    assert plan.recurrent(*problem, False) == dataclasses.replace(trained, save=False)
    if trained.dtype == FP16:
        *before, device, precision = problem
        before[-1] = BF16
        assert plan.recurrent(*before, device, precision) == dataclasses.replace(trained, dtype=BF16)


def kernels_over_batches(direction: str, hidden: int, dtype: torch.dtype, device: plan.Device) -> Iterator[str]:
    for batch in (*range(1, 300, 3), *range(300, 2048, 48), *range(2048, 8193, 256)):
        p = plan.recurrent(direction, 2, batch, hidden, dtype, device)
        yield f"{p.constants}, {p.num_warps} warps"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_handful_of_kernels_serves_all_batch_sizes(arch: str, direction: str) -> None:
    """Seen over all H tried, both directions and every architecture: at most 6, for B from 1 to 8192."""
    for hidden in (64, 100, 512, 1024, 2048):
        assert len(set(kernels_over_batches(direction, hidden, FP16, plan.DEVICES[arch]))) <= 6


@settings(max_examples=200)
@given(st.integers(1, 1 << 24), st.integers(1, 5000), st.integers(1, 4096), st.sampled_from(sorted(plan.DEVICES)))
def test_the_gate_gemm_covers_its_output(rows: int, features: int, hidden: int, arch: str) -> None:
    for dtype, precision in products(arch):
        g = plan.gate_gemm(rows, features, hidden, dtype, plan.DEVICES[arch], precision)
        assert g.grid == -(-rows // g.block_m) * -(-4 * plan.padded(hidden) // g.block_n)
        assert g.launch({}).constants["D"] == features
        for block in (g.block_m, g.block_n, g.block_k):
            assert block >= 16
            assert block & (block - 1) == 0
        stages = (g.block_m + g.block_n) * g.block_k * dtype.itemsize * g.num_stages
        assert stages <= plan.DEVICES[arch].shared_bytes


# Overrides, and what can't be had

SMALL = ("forward", 100, 64, 256, FP16, H100)


@pytest.mark.parametrize(
    "wanted",
    [
        {"tier": "persistent"}, {"tier": "streaming"}, {"tier": "step"}, {"protocol": "counter"},
        {"tier": "streaming", "stages": 1}, {"tier": "step", "stages": 1},
        {"protocol": "flag"}, {"block_h": 32}, {"block_b": 32}, {"tier": "persistent", "block_h": 16, "poll": 1},
        {"n_groups": 1, "protocol": "counter"}, {"block_k": 64, "tier": "persistent"}, {"spin_limit": 7},
        {"tier": "streaming", "resident": 1},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_overrides_are_honoured(direction: str, wanted: dict[str, Any]) -> None:
    p = plan.recurrent(direction, *SMALL[1:], overrides=wanted)
    assert {name: getattr(p, name) for name in wanted} == wanted
    assert p.launch({}).arguments["spin_limit"] == wanted.get("spin_limit", plan.SPIN_LIMIT)
    if p.tier == "persistent":
        assert p.resident == p.chunks


def test_overrides_of_the_small_device_of_the_emulator() -> None:
    with emulator.emulate(sms=6, tier="persistent", protocol="counter", block_h=16, block_b=16) as emulation:
        device = plan.device_of(torch.zeros(1))
        assert (device.sms, device.arch) == (6, "emulated")
        p = plan.recurrent("forward", 5, 40, 40, FP32, device, overrides=emulation.overrides)
    assert (p.tier, p.protocol, p.n_blocks, p.n_groups, p.n_tiles) == ("persistent", "counter", 3, 2, 3)
    assert p.constants["PROTOCOL"] == exchange.COUNTER.value


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"tier": "single"}, r"no forward kernel configuration for H=256, B=64, torch.float16 on H100.*'single'"),
        ({"tier": "single", "protocol": "flag"}, r"132 multiprocessors, 232448 bytes.*'flag'"),
        ({"block_h": 24}, r"with \{'block_h': 24\}"),
    ],
)
def test_overrides_that_nothing_fits_are_refused(wanted: dict[str, Any], words: str) -> None:
    with pytest.raises(plan.PlanError, match=words):
        plan.recurrent(*SMALL, overrides=wanted)


def test_a_device_with_too_few_multiprocessors_falls_back_to_step_by_step() -> None:
    one = dataclasses.replace(H100, sms=1)
    assert plan.recurrent("forward", 100, 16, 1024, FP16, one).tier == "step"
    with pytest.raises(plan.PlanError, match=r"1 multiprocessors.*'persistent'"):
        plan.recurrent("forward", 100, 16, 1024, FP16, one, overrides={"tier": "persistent"})


@pytest.mark.parametrize(
    ("length", "hidden", "tier", "words"),
    [
        (1, 256, "persistent", "a single time step needs no loop"),
        (100, 256, "single", "a block would hold all of w_hh, 512 KiB, in at most 227 KiB of shared memory"),
        (100, 4096, "persistent", "w_hh is 131072 KiB; 132 blocks with 227 KiB of shared memory each"),
        (100, 64, "streaming", "w_hh fits on chip"),
    ],
)
def test_reasons_against_a_tier(length: int, hidden: int, tier: str, words: str) -> None:
    told = plan.tiers("forward", length, 32, hidden, BF16, H100)[tier]
    assert isinstance(told, str)
    assert told.startswith(words)


# Rows of a tile


@pytest.mark.parametrize(
    ("batch", "places", "groups", "rows"),
    [
        (16, 16, 1, 16),
        (16, 16, 2, 8),  # two groups of blocks find room: each has half
        (20, 16, 3, 7),
        (20, 16, 1, 10),  # one group walks two tiles, alike
        (5, 16, 8, 1),
        (1, 16, 8, 1),
        (64, 16, 4, 16),
        (65, 16, 4, 9),  # two turns of four tiles
        (1000, 32, 3, 31),
    ],
)
def test_a_batch_is_dealt_out_to_all_groups_alike(batch: int, places: int, groups: int, rows: int) -> None:
    assert plan.tile_rows(batch, places, groups) == rows
    turns = -(-batch // (places * groups))
    assert -(-batch // rows) <= groups * turns


def test_who_has_fewer_rows_reads_less() -> None:
    """H=768, B=16 in fp16 on an H100: of 132 multiprocessors 96, in two groups of 48 blocks."""
    fixed = ("forward", 1024, 16, 768, FP16, plan.DEVICES["sm_90"])
    p, full = plan.recurrent(*fixed, overrides={"half": False}), plan.recurrent(*fixed, overrides={"tile_rows": 0})
    assert (p.block_b, p.tile_rows, p.n_tiles, p.n_groups) == (16, 8, 2, 2)
    assert (full.block_b, full.tile_rows, full.n_tiles, full.n_groups) == (16, 16, 1, 1)
    assert full.cost.copy - p.cost.copy == pytest.approx(8 * 768 * 2 / 46.7e3)
    assert full.us_per_step - p.us_per_step == pytest.approx(8 * 768 * 2 / 46.7e3)
    # The same kernel: how many rows a tile has is no constant of it.
    assert p.constants == full.constants
    assert p.launch({}).arguments == {"n_tiles": 2, "tile_rows": 8, "spin_limit": plan.SPIN_LIMIT}
    assert "2 batch tiles of 8 in 16," in p.describe()
    # As wgmma has no fewer columns than 16, eight places stay empty; they need no cells.
    half = plan.recurrent(*fixed)
    assert (half.half, half.tile_rows, half.block_b, half.constants["HALF"]) == (True, 8, 16, True)
    assert p.cost.cell - half.cost.cell == pytest.approx(0.524 * 0.25)
    with pytest.raises(plan.PlanError, match="'half': True"):
        plan.recurrent(*fixed, overrides={"half": True, "tile_rows": 9})
    asked = plan.recurrent(*fixed, overrides={"tile_rows": 5, "block_b": 16})
    assert (asked.tile_rows, asked.n_tiles) == (5, 4)
    with pytest.raises(plan.PlanError, match="no forward kernel"):
        plan.recurrent(*fixed, overrides={"tile_rows": 33})
    with pytest.raises(plan.PlanError, match="no forward kernel"):  # whose tiles are full
        plan.recurrent("forward", 9, 16, 64, FP16, plan.DEVICES["sm_90"], overrides={"tier": "single", "tile_rows": 5})


def test_layers_of_a_pipeline_leave_each_other_room() -> None:
    """Four layers of H=1024 and B=16 in fp16: two of 64 blocks find room beside each other, whole batches each."""
    device = plan.DEVICES["sm_90"]
    way = plan.together(1024, 16, 4, 1024, FP16, device, training=False)
    assert way.way == "pipeline"
    p = plan.recurrent("forward", 1024, 16, 1024, FP16, device, save=False, overrides=plan.FULL_TILES)
    assert 2 * p.n_blocks * p.n_groups <= device.sms


# Clusters


def test_clusters_are_chosen_where_they_are_allowed() -> None:
    """Until a GPU has run them, by TRITLSTM_CLUSTERS=1 alone."""
    sm_90 = plan.DEVICES["sm_90"]
    allowed = dataclasses.replace(sm_90, clusters=True)
    fixed = ("backward", 9, 16, 768, FP16)
    team, cluster = plan.recurrent(*fixed, sm_90), plan.recurrent(*fixed, allowed)
    assert not team.clustered
    assert cluster.clustered
    assert cluster.us_per_step < team.us_per_step
    assert "96 blocks of 8 units in clusters of 8 x 1 groups" in cluster.describe()
    # Four slots of eight blocks' sums of 8 units and 16 sequences, of 8 bytes.
    assert cluster.cluster_bytes == 4 * 8 * 8 * 16 * 8
    assert cluster.shared_bytes == team.shared_bytes + cluster.cluster_bytes
    launch = cluster.launch({})
    assert (launch.cluster, launch.cluster_bytes, launch.constants["CLUSTER"]) == (8, cluster.cluster_bytes, True)
    assert (team.launch({}).cluster, team.cluster_bytes) == (1, 0)
    # 8 KiB of sums between neighbours, at 24.8 KB a us.
    assert cluster.cost.parts == pytest.approx(0.2 + 8192 / 24.8e3)
    assert not plan.recurrent("forward", *fixed[1:], allowed).clustered


def test_clusters_leave_multiprocessors_free() -> None:
    """All blocks must be resident, and those of a cluster lie in one part of the device."""
    for batch in (16, 64, 512):
        p = plan.recurrent("backward", 9, batch, 512, FP16, H100, overrides={"clustered": True})
        assert p.n_blocks * p.n_groups <= 0.85 * H100.sms


@pytest.mark.parametrize("arch", ["sm_80", "sm_120", "gfx942"])
def test_clusters_are_of_hopper_and_later(arch: str) -> None:
    with pytest.raises(plan.PlanError, match="'clustered': True"):
        plan.recurrent("backward", 9, 16, 256, FP16, plan.DEVICES[arch], overrides={"clustered": True})


def test_the_environment_allows_clusters() -> None:
    code = "from tritlstm import plan; print([d.arch for d in plan.DEVICES.values() if d.clusters])"
    for value, archs in (("1", ["sm_90", "sm_100"]), ("0", [])):
        environment = {**os.environ, plan.CLUSTERS: value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == f"{archs}\n"


# One step


@settings(max_examples=300)
@given(problems(), st.integers(1, 4096))
def test_one_step_covers_every_cell_and_fits(problem: tuple[Any, ...], features: int) -> None:
    _, _, batch, hidden, dtype, device, precision = problem
    p = plan.one_step(batch, features, hidden, dtype, device, precision)
    (tiles, blocks), element = p.grid, dtype.itemsize
    assert (blocks - 1) * p.block_h < plan.padded(hidden) <= blocks * p.block_h
    assert (tiles - 1) * p.block_b < batch <= tiles * p.block_b
    assert blocks <= 65535  # CUDA's second dimension, where the first has 2**31 - 1
    assert p.stages * (4 * p.block_h + p.block_b) * p.block_k * element <= device.shared_bytes
    assert p.block_h * p.block_b <= plan.MOST_CELLS_AT_ONCE * p.num_warps * device.warp_size
    assert p.block_k >= 16
    assert p.us_per_step > 0


def test_one_step_of_few_sequences_has_many_blocks() -> None:
    h100 = plan.DEVICES["sm_90"]
    assert plan.one_step(1, 512, 512, FP16, h100).grid == (1, 128)
    few, many = plan.one_step(16, 1024, 1024, FP16, h100), plan.one_step(4096, 1024, 1024, FP16, h100)
    assert (few.block_h, few.block_b) < (many.block_h, many.block_b)
    # Both products and nothing twice: weights and states, 2048 values for each of 32 rows and one sequence.
    assert few.grid[0] * few.grid[1] <= h100.sms
    one = plan.one_step(1, 1024, 1024, FP16, h100)
    read = 33 * 2048 * 2
    assert (one.block_h, one.grid) == (8, (1, 128))
    assert one.us_per_step == pytest.approx(0.108 + max(read / 46.7e3, 128 * read / 4.76e6) + 0.524 * (0.5 + 0.25 * 2))


# Precision


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_few_units_are_multiplied_nearly_exactly_where_tf32_is_allowed(direction: str) -> None:
    def precision(hidden: int, dtype: torch.dtype, asked: str) -> str:
        return plan.recurrent(direction, 9, 1024, hidden, dtype, plan.DEVICES["sm_90"], asked).precision

    more = "fp16" if direction == "forward" else "tf32"
    assert [precision(hidden, FP32, "tf32") for hidden in (1, 64, 65)] == ["tf32x3", "tf32x3", more]
    assert precision(64, FP32, "ieee") == precision(64, FP16, "ieee") == "ieee"


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_where_tf32_is_allowed_forward_runs_as_in_fp16(arch: str) -> None:
    """The same plan, for the operands are the same, at no more than its time: and not where h is handed on in fp32 or
    may be larger than one."""
    device = plan.DEVICES[arch]
    for hidden, batch in ((72, 16), (256, 32), (768, 16), (1024, 64), (2048, 32)):
        fixed = ("forward", 100, batch, hidden)
        wide, half = plan.recurrent(*fixed, FP32, device, "tf32"), plan.recurrent(*fixed, FP16, device)
        assert wide.narrow
        assert (wide.element, wide.constants["PRECISION"], wide.constants["SEPARATE_OUT"]) == (2, "fp16", True)
        assert dataclasses.replace(wide, dtype=FP16, precision="ieee") == half
        assert not half.narrow
        kept = plan.recurrent(*fixed, FP32, device, "tf32", overrides={"narrow": False})
        assert (kept.precision, kept.narrow, kept.element) == ("tf32", False, 4)
        assert wide.us_per_step < kept.us_per_step
        for other in (
            plan.recurrent(*fixed, FP32, device, "ieee"),
            plan.recurrent("backward", *fixed[1:], FP32, device, "tf32"),
        ):
            assert not other.narrow
    layers = plan.recurrent("forward", 100, 16, 128, FP32, device, "tf32", chains=2, stacked=True)
    assert layers.precision == "tf32"
    assert plan.recurrent("forward", 100, 16, 256, FP32, device, "tf32", chains=2).narrow
    with pytest.raises(plan.PlanError, match="narrow"):
        plan.recurrent("forward", 100, 16, 256, FP16, device, overrides={"narrow": True})
    alternatives = plan.tiers("forward", 100, 16, 256, FP32, device, "tf32")
    assert {p.narrow for p in alternatives.values() if not isinstance(p, str)} == {True}
    alternatives = plan.tiers("forward", 100, 16, 256, FP32, device, "tf32", narrow=False)
    assert {p.narrow for p in alternatives.values() if not isinstance(p, str)} == {False}


def test_products_of_fp32_follow_the_switch_for_tf32() -> None:
    x = torch.empty(0)
    switch = torch.backends.cudnn.rnn
    before = switch.fp32_precision
    try:
        switch.fp32_precision = "tf32"
        assert plan.dot_precision(x) == "tf32"
        assert plan.dot_precision(x.half()) == "ieee"
        with emulator.emulate():
            assert plan.dot_precision(x) == "ieee"
        with emulator.emulate(tf32=True):
            assert plan.dot_precision(x) == "tf32"
            assert plan.dot_precision(x.half()) == "ieee"
        switch.fp32_precision = "ieee"
        assert plan.dot_precision(x) == "ieee"
    finally:
        switch.fp32_precision = before


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_how_layers_run_does_not_depend_on_tf32(arch: str) -> None:
    """Backward reads what forward saved in the order that its way has, and TF32 may be allowed in one of them alone."""
    device, seen = plan.DEVICES[arch], set()
    for hidden, batch, length, layers in itertools.product((64, 72, 128, 256, 512), (16, 64), (30, 512), (2, 4)):
        fixed = (length, batch, layers, hidden, FP32, device)
        found = plan.together(*fixed, "tf32")
        assert plan.together(*fixed, "ieee") == found
        seen.add(found.way)
        if found.way != "apart":
            for precision in ("tf32", "ieee"):
                assert found.way in plan._ways(*fixed, True, (), (plan.SHORTEST_CHUNK, plan.HOST_LAUNCH_US), precision)
    assert len(seen) > 1


@pytest.mark.parametrize("batch", [600_000, 1_000_000])
@pytest.mark.parametrize(("dtype", "precision"), [(FP16, "ieee"), (FP32, "tf32")])
def test_a_step_of_many_sequences_fits_the_grid(dtype: torch.dtype, precision: str, batch: int) -> None:
    p = plan.recurrent("backward", 1, batch, 256, dtype, plan.DEVICES["sm_90"], precision)
    assert p.launch({}).grid[1] <= 65535
