"""The static gate: on the benchmark's shapes, the compiled kernels do no more in a step than the committed table says.

``tritlstm kernels --counts tests/kernel_counts.json`` writes the table anew, after a change that is worth it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import triton

from tritlstm import cli, inspect_kernels, plan, shape_report
from tritlstm.benchmarks.cases import suite

TABLE = json.loads((Path(__file__).with_name("kernel_counts.json")).read_text())
CASES = [
    (arch, direction, shape)
    for arch in shape_report.GATED
    for shape in shape_report.SHAPES
    for direction in ("forward", "backward")
]


def test_the_table_has_every_kernel_and_no_other() -> None:
    assert set(TABLE["kernels"]) == {f"{arch} {direction} {shape}" for arch, direction, shape in CASES}


def test_every_shape_of_the_benchmark_is_gated() -> None:
    """Its sweeps aside; in 16 bits once, since fp16 and bf16 are planned alike."""
    gated = {(s.T, s.B, s.D, s.H, s.dtype.replace("bf16", "fp16")) for s in shape_report.SHAPES}
    cases = [case for case in suite("gpu") if not case.group.startswith("over-")]
    assert {(c.T, c.B, c.D, c.H, c.dtype.replace("bf16", "fp16")) for c in cases} == gated


def test_the_table_has_no_spill_and_no_other_problem() -> None:
    assert not [name for name, row in TABLE["kernels"].items() if row["problems"] or row["spill_bytes"]]


@pytest.mark.skipif(triton.__version__ != TABLE["versions"]["triton"], reason="the table is another Triton's")
@pytest.mark.parametrize(("arch", "direction", "shape"), CASES, ids=str)
def test_a_step_costs_no_more_than_the_table_says(arch: str, direction: str, shape: shape_report.Shape) -> None:
    device = plan.DEVICES[arch]
    committed = TABLE["kernels"][f"{arch} {direction} {shape}"]
    got = shape_report.counts(shape_report.chosen(shape, direction, device), device)
    assert got["problems"] == []
    for name in ("matrix_instruction", "weights_resident"):
        assert got[name] == committed[name], name
    for name in ("registers", "shared_bytes", "layout_conversions"):
        assert got[name] <= committed[name], name
    for name, count in committed["loop"].items():
        assert got["loop"][name] <= count, name


def test_a_shape_is_explained_by_model_and_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kernels", "--explain", "1024,16,768,768", "--dtype", "fp16", "--arch", "sm_90"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {" ".join(line[:-2]): line[-2:] for line in lines[1:]}
    p = plan.recurrent("forward", 1024, 16, 768, shape_report.DTYPES["fp16"], plan.DEVICES["sm_90"])
    assert rows["predicted us a step, all tiles"][0] == f"{p.us_per_step:.2f}"
    # 48 blocks read 16 rows of 768 values of 2 bytes; backward 96 an eighth of 4 * 768, and 8 tiles of 8 x 16 sums.
    assert rows["bytes from L2 a step"] == [f"{48 * 16 * 768 * 2:,}", f"{96 * 16 * (384 * 2 + 8 * 8 * 8):,}"]
    # Forward: products in, gates out, cells, h: (8 + 8 + 4 + 2) bytes a unit. Backward: 8 + 8 + 2 * 4 + 2.
    assert rows["bytes of memory a step, least"] == [f"{16 * 768 * 22:,}", f"{16 * 768 * 26:,}"]
    assert rows["multiply-adds a step"] == [f"{4 * 16 * 768**2:,}"] * 2
    # 270336 bytes over 3.35e6 a us = 0.08; the products take less; one hand-off of 0.40.
    assert rows["floor us a step"][0] == "0.48"
    assert rows["matrix instruction"] == ["HGMMA", "HGMMA"]


def test_a_single_step_is_explained_by_the_kernel_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kernels", "--explain", "1,1,512,512", "--dtype", "fp16", "--arch", "sm_90"]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()[2:]]
    rows = {line[0]: [word.strip() for word in line if word][-2:] for line in lines}
    assert rows["tier, exchange"] == ["one launch", "step, none"]
    assert rows["blocks x groups"][0] == "128 x 1"
    # 2048 rows of weights and, in each of 128 blocks, one of x and of h: 1024 values of 2 bytes.
    assert rows["bytes from L2 a step"][0] == f"{(2048 + 128) * 1024 * 2:,}"
    # The weights and the states come from memory; 4 gates and 4 states of 2 bytes and a cell of 4 a unit go there.
    assert rows["bytes of memory a step, least"][0] == f"{2049 * 1024 * 2 + 512 * 20:,}"
    assert rows["multiply-adds a step"][0] == f"{2048 * 1024:,}"
    assert rows["predicted us: cell"][0] == "-"
    assert rows["matrix instruction"][0] == "HMMA"


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,x", "0,1,1,1", ""])
def test_what_is_no_shape_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kernels", "--explain", text]) == 2
    assert "four positive numbers T,B,D,H" in capsys.readouterr().err


@pytest.mark.skipif(triton.__version__ != TABLE["versions"]["triton"], reason="the limits are another Triton's")
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_partial_sums_of_a_cluster_take_no_trip_through_l2(arch: str) -> None:
    """They are stored into another block's shared memory, and awaited in the block's own."""
    found = {}
    for clustered in (False, True):
        device = dataclasses.replace(plan.DEVICES[arch], clusters=clustered)
        p = plan.recurrent("backward", 1024, 16, 768, torch.float16, device, overrides={"parts": 8, "block_h": 8})
        assert p.clustered == clustered
        launch = inspect_kernels.recurrent_launch(p)
        compiled = inspect_kernels.compile_launch(launch, arch)
        code, _ = inspect_kernels.read_code(compiled, launch)
        row = shape_report.counts(p, device)
        assert (row["problems"], row["spill_bytes"]) == ([], 0)
        assert compiled.metadata.shared + p.cluster_bytes <= device.shared_bytes
        text = [(f"{i.opcode} {i.operands}", loop) for i, loop in zip(code.instructions, code.in_loop, strict=True)]
        found[clustered] = (row["loop"]["shared_loads"], text)
    (before, team), (after, cluster) = found[False], found[True]
    # A look at 8 words and another at those that are missing.
    assert after == before + 16

    def loops(text: list[tuple[str, bool]], start: str) -> list[bool]:
        return [loop for words, loop in text if words.startswith(start)]

    assert sum(loops(team, "LDG.E.64.STRONG.GPU")) == 16
    assert not any(loops(cluster, "LDG.E.64.STRONG.GPU"))
    # Its blocks meet before the loop and after it; no fence or barrier of the cluster stands inside.
    for start in ("UCGABAR_ARV", "UCGABAR_WAIT", "MEMBAR.ALL.GPU", "MEMBAR.SC.GPU"):
        assert not any(loops(cluster, start)), start
    assert len(loops(cluster, "UCGABAR_ARV")) == 2
    assert not loops(team, "UCGABAR_ARV")
