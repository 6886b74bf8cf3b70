"""Reading compiled kernels back: loops, addresses, spills, and the command `tritlstm kernels`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import random
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tritlstm import inspect_kernels, machine_code, plan
from tritlstm.inspect_kernels import Configuration
from tritlstm.kernels.launch import Launch

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32

# SASS by hand. Parameters: w at 0x218, x at 0x220 of constant bank 0, as on sm_90.
PARAMETERS = {"w_ptr": 0x8, "x_ptr": 0x10}
BASE = 0x210


def sass(text: str) -> machine_code.Code:
    """`nvdisasm -c` of instructions, one a line; a line that ends with a colon is a label."""
    lines = []
    for number, line in enumerate(textwrap.dedent(text).strip().splitlines()):
        word = line.strip()
        label = word.endswith(":")
        lines.append(word if label else f"        /*{16 * number:04x}*/                   {word} ;")
    return machine_code.parse_sass("\n".join(lines), PARAMETERS, BASE)


def reads(code: machine_code.Code, parameter: str = "w_ptr") -> list[tuple[str, bool]]:
    return [(load.instruction.opcode, load.in_loop) for load in code.reads(parameter)]


def test_a_load_before_the_loop_and_one_inside() -> None:
    code = sass("""
        ULDC.64 UR4, c[0x0][0x208]
        LDC.64 R2, c[0x0][0x218]
        IMAD.WIDE R4, R0, 0x2, R2
        @!P1 LDG.E.128 R20, desc[UR4][R4.64+0x100]
        .L_x_0:
        LDC.64 R6, c[0x0][0x220]
        LEA R6, P2, R7, R6, 0x1
        LDG.E.64.STRONG.SYS R8, desc[UR4][R6.64]
        ISETP.GE.AND P0, PT, R9, 0x10, PT
        @!P0 BRA `(.L_x_0)
        STG.E.128 desc[UR4][R10.64], R20
        EXIT
        .L_x_1:
        BRA `(.L_x_1)
    """)
    assert reads(code) == [("LDG.E.128", False)]
    assert reads(code, "x_ptr") == [("LDG.E.64.STRONG.SYS", True)]
    (load,) = code.reads("x_ptr")
    assert (load.width, load.coherent) == (8, True)
    (load,) = code.reads("w_ptr")
    assert (load.width, load.coherent) == (16, False)
    assert code.counts()["LDG"] == 2
    assert code.writes("w_ptr") == code.writes("x_ptr") == []


def test_stores_are_told_from_loads_by_their_address_alone() -> None:
    code = sass("""
        LDC.64 R2, c[0x0][0x218]
        LDC.64 R4, c[0x0][0x220]
        LDG.E R8, desc[UR4][R2.64]
        STG.E.U16 desc[UR4][R4.64+0x20], R2
        EXIT
    """)
    assert reads(code) == [("LDG.E", False)]
    assert reads(code, "x_ptr") == []
    (store,) = code.writes("x_ptr")
    assert (store.width, store.is_store) == (2, True)
    assert code.writes("w_ptr") == []


def test_an_address_is_followed_through_uniform_registers_and_the_stack() -> None:
    code = sass("""
        ULDC.64 UR6, c[0x0][0x218]
        UIADD3 UR8, UP0, UR6, 0x40, URZ
        MOV R2, UR8
        STL [R1+0x10], R2
        CS2R R2, SRZ
        .L_x_0:
        LDL R12, [R1+0x10]
        LDG.E R8, desc[UR4][R12.64]
        BRA.U UP1, `(.L_x_0)
        EXIT
    """)
    assert reads(code) == [("LDG.E", True)]


def test_a_constant_operand_makes_an_address() -> None:
    """sm_80 adds the parameter without loading it first; only the low half matters."""
    code = sass("""
        .L_x_0:
        LEA R16, P0, R8.reuse, c[0x0][0x218], 0xb
        LEA.HI.X R17, R78, c[0x0][0x21c], RZ, 0x1, P0
        LDG.E.128 R20, [R16.64]
        BRA `(.L_x_0)
    """)
    assert reads(code) == [("LDG.E.128", True)]


def test_two_parameters_loaded_at_once_are_told_apart() -> None:
    code = sass("""
        LDCU.128 UR4, c[0x0][0x218]
        LDG.E.128 R20, desc[UR10][UR4.64]
        LDG.E.64 R24, desc[UR10][UR6.64]
        EXIT
    """)
    assert reads(code) == [("LDG.E.128", False)]
    assert reads(code, "x_ptr") == [("LDG.E.64", False)]


def test_a_register_that_is_used_again_is_no_address_of_the_weights() -> None:
    code = sass("""
        LDC.64 R2, c[0x0][0x218]
        LDG.E.128 R20, desc[UR4][R2.64]
        .L_x_0:
        LDC.64 R2, c[0x0][0x220]
        LDG.E R8, desc[UR4][R2.64]
        BRA `(.L_x_0)
    """)
    assert reads(code) == [("LDG.E.128", False)]


def test_under_a_predicate_the_old_value_may_remain() -> None:
    code = sass("""
        LDC.64 R2, c[0x0][0x218]
        .L_x_0:
        @P0 LDC.64 R2, c[0x0][0x220]
        LDG.E R8, desc[UR4][R2.64]
        BRA `(.L_x_0)
    """)
    assert reads(code) == reads(code, "x_ptr") == [("LDG.E", True)]


def test_under_the_same_predicate_only_what_was_written_under_it() -> None:
    text = """
        /*0000*/ LDC.64 R2, c[0x0][0x210] ;
        /*0010*/ LDC.64 R4, c[0x0][0x218] ;
        /*0020*/ @P0 MOV R2, R4 ;
        /*0030*/ @P0 MOV R3, R5 ;
        /*0040*/ @P0 LDG.E R8, desc[UR4][R2.64] ;
        /*0050*/ @!P0 LDG.E R8, desc[UR4][R2.64] ;
        /*0060*/ ISETP.GE.AND P0, PT, R6, R7, PT ;
        /*0070*/ @P0 LDG.E R8, desc[UR4][R2.64] ;
        /*0080*/ EXIT ;
"""
    code = machine_code.parse_sass(text, {"w_ptr": 0, "exchange_ptr": 8}, 0x210)
    same, other, changed = (load.parameters for load in code.loads)
    assert same == {"exchange_ptr"}
    assert other == changed == {"w_ptr", "exchange_ptr"}


@pytest.mark.parametrize(
    ("layout", "whole"),
    [
        ("blocked [1, 1, 4] [2, 1, 0]", True),
        ("blocked [1, 1, 2] [2, 1, 0]", False),
        ("blocked [1, 4, 4] [1, 2, 0]", False),
        ("linear [[0, 0, 1], [0, 0, 2], [8, 0, 0]]", True),
        ("linear [[0, 0, 2], [0, 0, 1], [8, 0, 0]]", False),
        ("linear [[0, 0, 1], [8, 0, 0]]", False),
    ],
)  # fmt: skip
def test_a_layout_that_scatters_runs_is_seen(layout: str, whole: bool) -> None:
    kind, first, *rest = re.findall(r"\w+|\[.*?\](?!,)", layout)
    if kind == "blocked":
        layout = f"#ttg.blocked<{{sizePerThread = {first}, threadsPerWarp = [2, 16, 1], warpsPerCTA = [4, 1, 1], "
        layout += f"order = {rest[0]}}}>"
    else:
        layout = f"#ttg.linear<{{register = {first}, lane = [[0, 1, 0]], warp = [], block = []}}>"
    line = (
        '%1:2 = tt.elementwise_inline_asm "ld.relaxed {$0}" %0 : tensor<16x8x4x!tt.ptr<i32>, #runs> '
        "-> tensor<16x8x4xi32, #runs> loc(#loc)"
    )
    ttgir = f"#runs = {layout}\n  {line}\n  {line.replace('ld.relaxed', 'ex2')}\n"
    assert machine_code.ttgir_scattered(ttgir, "ld.relaxed", 4) == ([] if whole else [layout])


def test_an_asynchronous_copy_is_a_read() -> None:
    code = sass("""
        LDC.64 R2, c[0x0][0x218]
        .L_x_0:
        LDGSTS.E.BYPASS.128 [R40], desc[UR4][R2.64], !P1
        BRA `(.L_x_0)
    """)
    assert reads(code) == [("LDGSTS.E.BYPASS.128", True)]


def test_threads_reconverge_at_the_place_of_their_own_barrier() -> None:
    """B0 is used twice: taking the second place for the first would carry R2 past the instruction that replaces it."""
    code = sass("""
        LDC.64 R2, c[0x0][0x218]
        .L_x_5:
        BSSY B0, `(.L_x_0)
        @P0 BRA `(.L_x_0)
        BSYNC B0
        .L_x_0:
        LDC.64 R2, c[0x0][0x220]
        BSSY B0, `(.L_x_1)
        @P1 BRA `(.L_x_1)
        BSYNC B0
        .L_x_1:
        LDG.E R8, desc[UR4][R2.64]
        @P2 BRA `(.L_x_5)
        EXIT
    """)
    assert reads(code) == []
    assert reads(code, "x_ptr") == [("LDG.E", True)]


def test_what_a_loop_calls_is_in_the_loop() -> None:
    code = sass("""
        LDG.E R8, desc[UR4][R4.64]
        .L_x_0:
        CALL.REL.NOINC `($helper)
        @P2 BRA `(.L_x_0)
        EXIT
        $helper:
        LDC.64 R2, c[0x0][0x218]
        LDG.E R8, desc[UR4][R2.64]
        RET.REL.NODEC R6 `(.L_x_0)
    """)
    assert [load.in_loop for load in code.loads] == [False, True]
    assert reads(code) == [("LDG.E", True)]


def test_nothing_follows_a_trap() -> None:
    code = sass("""
        LDC.64 R2, c[0x0][0x218]
        LDG.E R20, desc[UR4][R2.64]
        .L_x_0:
        @P1 BRA `(.L_x_2)
        LDC.64 R2, c[0x0][0x220]
        .L_x_1:
        LDG.E.STRONG.SYS R8, desc[UR4][R2.64]
        FADD2 R2, R8.F32x2.HI_LO, R10.F32x2.HI_LO
        @P0 BRA `(.L_x_0)
        EXIT
        .L_x_2:
        BPT.TRAP 0x1
        BRA `(.L_x_1)
    """)
    assert reads(code) == [("LDG.E", False)]


def test_an_indirect_jump_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot follow the indirect jump BRX R2"):
        _ = sass("BRX R2 -0x10\nEXIT").in_loop


def test_a_jump_to_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown place: '`\(.L_x_9\)'"):
        _ = sass("BRA `(.L_x_9)\nEXIT").in_loop


def test_text_without_instructions_is_refused() -> None:
    with pytest.raises(ValueError, match="no instruction"):
        machine_code.parse_sass("nothing", {}, BASE)
    with pytest.raises(ValueError, match="no instruction"):
        machine_code.amdgcn("kernel:\n", {})


# AMDGCN by hand


def amdgcn(text: str) -> machine_code.Code:
    lines = [line.strip() for line in textwrap.dedent(text).strip().splitlines()]
    return machine_code.amdgcn(
        "\n".join(line if line.endswith(":") else f"\t{line}" for line in lines), PARAMETERS
    )


def test_amd_loops_and_descriptors() -> None:
    code = amdgcn("""
        s_load_dwordx4 s[4:7], s[0:1], 0x8
        s_waitcnt lgkmcnt(0)
        v_lshl_add_u64 v[2:3], s[4:5], 0, v[6:7]
        global_load_dwordx4 v[8:11], v[2:3], off
        s_mov_b32 s12, s6
        s_and_b32 s13, s7, 0xffff
        .LBB0_1:
        buffer_load_dwordx2 v[20:21], v5, s[12:15], 0 offen sc0 sc1
        s_cbranch_scc1 .LBB0_1
        s_endpgm
    """)
    assert reads(code) == [("global_load_dwordx4", False)]
    (load,) = code.reads("x_ptr")
    assert (load.in_loop, load.width, load.coherent) == (True, 8, True)


def test_amd_a_carry_and_an_unused_upper_half_are_no_sources() -> None:
    code = amdgcn("""
        s_load_dwordx4 s[4:7], s[0:1], 0x8
        v_mov_b32_e32 v2, s4
        v_mov_b32_e32 v3, s6
        v_mad_u64_u32 v[2:3], s[6:7], v0, s9, v[2:3]
        v_mov_b32_e32 v3, v9
        global_load_dword v1, v[2:3], off
        v_mov_b64_e32 v[4:5], s[6:7]
        global_load_dword v1, v[4:5], off
        s_endpgm
    """)
    first, second = code.loads
    assert first in code.reads("w_ptr")
    assert "x_ptr" not in first.parameters
    assert second.parameters == set()


def test_amd_stores() -> None:
    code = amdgcn("""
        s_load_dwordx4 s[4:7], s[0:1], 0x8
        v_mov_b32_e32 v2, s4
        v_mov_b32_e32 v3, s5
        global_store_short v[2:3], v9, off sc0 sc1
        global_store_dword v7, v2, s[6:7]
        s_endpgm
    """)
    (short,), (word,) = code.writes("w_ptr"), code.writes("x_ptr")
    assert (short.width, short.coherent) == (2, True)
    assert (word.width, word.coherent) == (4, False)
    assert code.loads == []


def test_amd_scalars_parked_in_lanes_are_followed_one_by_one() -> None:
    code = amdgcn("""
        s_load_dwordx4 s[4:7], s[0:1], 0x8
        v_writelane_b32 v95, s4, 0
        v_writelane_b32 v95, s6, 1
        s_mov_b64 s[4:5], 0
        .LBB0_1:
        v_readlane_b32 s20, v95, 1
        v_mov_b32_e32 v2, s20
        global_load_ushort v9, v[2:3], off
        s_cbranch_vccnz .LBB0_1
        s_endpgm
    """)
    assert reads(code) == []
    (load,) = code.reads("x_ptr")
    assert (load.width, load.coherent, load.in_loop) == (2, False, True)


@pytest.mark.parametrize(
    ("opcode", "operands", "width", "coherent"),
    [
        ("LDG.E.128.STRONG.SYS", "R4, desc[UR4][R2.64]", 16, True),
        ("LDG.E.U16", "R4, desc[UR4][R2.64]", 2, False),
        ("LDG.E.STRONG.GPU", "R4, [R2]", 4, True),
        ("global_load_dwordx4", "v[2:5], v[0:1], off sc0 sc1", 16, True),
        ("global_load_dwordx3", "v[2:4], v[0:1], off", 12, False),
        ("global_load_dword", "v2, v[0:1], off glc", 4, True),
        ("buffer_load_ushort", "v2, v7, s[20:23], 0 offen sc0 nt", 2, False),
        ("buffer_load_u16", "v2, v7, s[20:23], 0 offen", 2, False),
        ("global_load_ubyte", "v2, v[0:1], off", 1, False),
        ("global_load_b128", "v[2:5], v[0:1], off glc dlc", 16, True),
    ],
)
def test_width_and_coherence_of_a_load(opcode: str, operands: str, width: int, coherent: bool) -> None:
    load = machine_code.Access(machine_code.Instruction(opcode, operands), frozenset(), True)
    assert (load.width, load.coherent) == (width, coherent)


def test_amd_scratch_is_a_spill_and_a_parked_scalar_is_none() -> None:
    text = ".private_segment_fixed_size: {}\n.sgpr_spill_count: 12\n.vgpr_count: 96\n.vgpr_spill_count: {}\n"
    assert machine_code.amdgcn_resources(text.format(0, 0)) == machine_code.Resources(96, 0)
    assert machine_code.amdgcn_resources(text.format(36, 9)) == machine_code.Resources(96, 36)


# Triton's GPU IR by hand

IR = """
module {
  tt.func public @kernel(%w_ptr: !tt.ptr<bf16> {tt.divisibility = 16 : i32}, %x_ptr: !tt.ptr<bf16>) {
    %w = tt.splat %w_ptr : !tt.ptr<bf16> -> tensor<64x!tt.ptr<bf16>> loc(#loc1)
    %first = tt.addptr %w, %offsets : tensor<64x!tt.ptr<bf16>>, tensor<64xi32> loc(#loc2)
    %resident = tt.load %first : tensor<64x!tt.ptr<bf16>> loc(#loc3)
    %kept = ttg.local_alloc %resident : (tensor<64xbf16>) -> !ttg.memdesc<64xbf16>
    %out:2 = scf.for %i = %a to %b step %c iter_args(%p = %START, %s = %zero) -> (tensor<64x!tt.ptr<bf16>>, f32) {
      %again = ttg.convert_layout %p : tensor<64x!tt.ptr<bf16>> -> tensor<64x!tt.ptr<bf16>, #b>
      %value = OPERATION %again : tensor<64x!tt.ptr<bf16>>
      %next = tt.addptr %p, %offsets : tensor<64x!tt.ptr<bf16>>, tensor<64xi32>
      %inner = scf.while (%k = %value) : (tensor<64xbf16>) -> tensor<64xbf16> {
        %turned = ttg.convert_layout %k : tensor<64xbf16> -> tensor<64xbf16, #b>
        scf.condition(%t) %turned : tensor<64xbf16>
      } do {
        scf.yield %k : tensor<64xbf16>
      }
      scf.yield %next, %s : tensor<64x!tt.ptr<bf16>>, f32
    }
    tt.return
  }
}
"""


@pytest.mark.parametrize(
    "operation", ["tt.load", "ttg.async_copy_global_to_local", "amdg.buffer_load", '"some.later_operation"']
)
def test_ir_sees_a_pointer_that_a_loop_carries(operation: str) -> None:
    carried = IR.replace("%START", "%first").replace("OPERATION", operation)
    assert machine_code.ttgir_reads(carried, "w_ptr") == (1, 1)
    other = IR.replace("%START", "%x_ptr").replace("OPERATION", operation)
    assert machine_code.ttgir_reads(other, "w_ptr") == (1, 0)
    assert machine_code.ttgir_reads(other, "x_ptr") == (0, 1)


def test_ir_sees_a_pointer_that_only_a_later_turn_brings() -> None:
    late = IR.replace("%START", "%x_ptr").replace("OPERATION", "tt.load").replace("scf.yield %next", "scf.yield %first")
    assert machine_code.ttgir_reads(late, "w_ptr") == (1, 1)


def test_ir_counts_operations_by_depth_of_loops() -> None:
    counts = [machine_code.ttgir_count(IR, "ttg.convert_layout", depth) for depth in (0, 1, 2, 3)]
    assert counts == [2, 2, 1, 0]


# Kernels that do and don't keep their weights


@triton.jit
def keeps(w_ptr, x_ptr, out_ptr, steps, N: tl.constexpr):
    i = tl.arange(0, N)
    w = tl.load(w_ptr + i[:, None] * N + i[None, :])
    total = tl.zeros((N, N), tl.float32)
    for step in tl.range(steps, disable_licm=True):
        x = tl.load(x_ptr + step * N * N + i[:, None] * N + i[None, :], volatile=True)
        total = tl.dot(w, x, total)
    tl.store(out_ptr + i[:, None] * N + i[None, :], total)


@triton.jit
def reloads(w_ptr, x_ptr, out_ptr, steps, N: tl.constexpr):
    i = tl.arange(0, N)
    total = tl.zeros((N, N), tl.float32)
    for step in tl.range(steps, disable_licm=True):
        w = tl.load(w_ptr + i[:, None] * N + i[None, :])
        x = tl.load(x_ptr + step * N * N + i[:, None] * N + i[None, :], volatile=True)
        total = tl.dot(w, x, total)
        tl.debug_barrier()
    tl.store(out_ptr + i[:, None] * N + i[None, :], total)


@triton.jit
def walks(w_ptr, x_ptr, out_ptr, steps, N: tl.constexpr):
    """Its pointer to the weights is carried from step to step."""
    i = tl.arange(0, N)
    pointers = w_ptr + i[:, None] * N + i[None, :]
    total = tl.zeros((N, N), tl.float32)
    for step in tl.range(steps, disable_licm=True):
        x = tl.load(x_ptr + step * N * N + i[:, None] * N + i[None, :], volatile=True)
        total = tl.dot(tl.load(pointers), x, total)
        pointers += N * N
    tl.store(out_ptr + i[:, None] * N + i[None, :], total)


@functools.lru_cache
def compiled(kernel: Any, arch: str, num_warps: int = 4) -> tuple[machine_code.Code, Any]:
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    types = {"w_ptr": "*bf16", "x_ptr": "*bf16", "out_ptr": "*fp32", "steps": "i32", "N": "constexpr"}
    attributes = {(n,): [["tt.divisibility", 16]] for n in range(3)}
    source = ASTSource(kernel, types, constexprs={"N": 64}, attrs=attributes)
    built = triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": 1})
    offsets = {"w_ptr": 0, "x_ptr": 8, "out_ptr": 16, "steps": 24}
    if "cubin" in built.asm:
        return machine_code.sass(built.asm["cubin"], kernel.__name__, offsets)[0], built
    return machine_code.amdgcn(built.asm["amdgcn"], offsets), built


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx90a", "gfx942"])
@pytest.mark.parametrize(("kernel", "resident"), [(keeps, True), (reloads, False), (walks, False)])
def test_residence_is_seen_in_machine_code_and_ir_alike(kernel: Any, resident: bool, arch: str) -> None:
    code, built = compiled(kernel, arch)
    weights, inputs = code.reads("w_ptr"), code.reads("x_ptr")
    assert weights
    assert {load.in_loop for load in weights} == {not resident}
    assert any(load.in_loop for load in inputs)  # not all: a compiler may take the first turn out of the loop
    if arch.startswith("sm"):
        assert all(load.coherent for load in inputs)  # volatile
    assert inspect_kernels._resident(code, built.asm["ttgir"]) == (resident, [])


@pytest.mark.parametrize(
    ("arch", "name"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma")]
)
def test_the_matrix_instruction_of_each_architecture_has_its_name(arch: str, name: str) -> None:
    counts = compiled(keeps, arch)[0].counts()
    found = [mnemonic for mnemonic in counts if inspect_kernels.MATRIX_INSTRUCTION.match(mnemonic)]
    assert [mnemonic.startswith(name) for mnemonic in found] == [True]


@pytest.mark.parametrize(("arch", "base"), [("sm_80", 0x160), ("sm_90", 0x210), ("sm_100", 0x380)])
def test_where_the_parameters_begin_is_read_from_the_cubin(arch: str, base: int) -> None:
    assert machine_code._parameter_base(compiled(keeps, arch)[1].asm["cubin"], "keeps") == base


def test_a_spill_is_seen() -> None:
    """The forward kernel held to 32 registers: stack, and loads and stores of it."""
    chosen = plan.recurrent("forward", 10, 32, 512, BF16, plan.DEVICES["sm_80"])
    launch = dataclasses.replace(inspect_kernels.recurrent_launch(chosen), max_registers=32)
    configuration = Configuration(launch, chosen, BF16, plan.DEVICES["sm_80"])
    row = inspect_kernels.inspect_launch(configuration, "sm_80")
    assert row["registers"] <= 32
    assert row["spill_bytes"] > 0
    assert row["instructions"]["LDL"] > 0
    assert row["instructions"]["STL"] > 0
    assert f"{row['spill_bytes']} bytes spilled" in row["problems"]


# What a row is judged by


def configuration(**overrides: Any) -> Configuration:
    device = plan.DEVICES["sm_90"]
    chosen = plan.recurrent("forward", 10, 32, 512, BF16, device, overrides=overrides)
    return Configuration(inspect_kernels.recurrent_launch(chosen), chosen, BF16, device)


def row(**changes: Any) -> dict[str, Any]:
    """A row that has no problem, changed."""
    tier = changes.pop("tier", "persistent")
    good = {
        "arch": "sm_90", "dtype": "bf16", "registers": 100, "spill_bytes": 0, "shared_bytes": 1000,
        "shared_limit": 232448, "matrix_instruction": "HGMMA", "weights_resident": True,
        "exchange_read_bytes": [16], "config": {"tier": tier, "planned_shared_bytes": 2000},
    }  # fmt: skip
    return good | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"spill_bytes": 8}, "8 bytes spilled"),
        ({"shared_bytes": 2001}, "2001 bytes of shared memory, planned 2000"),
        ({"shared_bytes": 300000}, "300000 bytes of shared memory, limit 232448"),
        ({"matrix_instruction": None}, "matrix instruction missing, meant HGMMA"),
        ({"matrix_instruction": "HMMA"}, "matrix instruction HMMA, meant HGMMA"),
        ({"weights_resident": False}, "weights read again inside the time loop"),
        ({"tier": "streaming"}, "a streaming kernel that streams nothing"),
        ({"tier": "step", "weights_resident": False}, ""),
        ({"exchange_read_bytes": [2, 16]}, "reads other blocks' results 2 bytes at a time, 16 could be"),
    ],
)
def test_problems_in_words(changes: dict[str, Any], words: str) -> None:
    found = inspect_kernels.problems(row(**changes), configuration(tier="persistent", num_warps=4))
    assert words in found if words else found == []


@pytest.mark.parametrize(
    ("kernel", "constants", "dtype", "arch", "name"),
    [
        ("recurrent_forward", {"BLOCK_H": 16, "PRECISION": "ieee"}, BF16, "sm_90", "HGMMA"),
        ("recurrent_forward", {"BLOCK_H": 16, "PRECISION": "ieee"}, BF16, "sm_100", "UTCHMMA"),
        ("recurrent_forward", {"BLOCK_H": 16, "PRECISION": "ieee"}, BF16, "sm_120", "HMMA"),
        ("recurrent_forward", {"BLOCK_H": 16, "PRECISION": "tf32"}, FP32, "sm_90", "HGMMA"),
        ("recurrent_forward", {"BLOCK_H": 16, "PRECISION": "ieee"}, FP32, "sm_90", None),
        ("recurrent_backward", {"BLOCK_H": 16, "PARTS": 4, "PRECISION": "ieee"}, BF16, "sm_90", "HGMMA"),
        ("recurrent_backward", {"BLOCK_H": 64, "PARTS": 1, "PRECISION": "ieee"}, BF16, "sm_90", "HGMMA"),
        ("recurrent_backward", {"BLOCK_H": 32, "PARTS": 1, "PRECISION": "ieee"}, BF16, "sm_90", "HMMA"),
        ("gate_gemm", {"BLOCK_M": 128, "PRECISION": "ieee"}, FP16, "sm_90", "HGMMA"),
        ("gate_gemm", {"BLOCK_M": 16, "PRECISION": "ieee"}, FP16, "sm_90", "HMMA"),
        ("gate_gemm", {"BLOCK_M": 128, "PRECISION": "tf32"}, FP32, "sm_86", "HMMA"),
        ("recurrent_forward", {"BLOCK_H": 16, "PRECISION": "ieee"}, FP32, "gfx90a", "v_mfma_f32_16x16x4_f32"),
    ],
)
def test_the_matrix_instruction_that_is_meant(
    kernel: str, constants: dict[str, Any], dtype: torch.dtype, arch: str, name: str | None
) -> None:
    meant = inspect_kernels.expected_matrix(Launch(kernel, (1,), {}, constants, 4), dtype, arch)
    assert meant is None if name is None else meant is not None and meant.fullmatch(name)


@pytest.mark.parametrize(("arch", "variant"), [("sm_90", "plain"), ("gfx942", "plain"), ("sm_80", "norm")])
def test_a_random_size_is_planned_like_one_that_is_compiled(arch: str, variant: str) -> None:
    """`configurations` asks the planner at some sizes only; 99 of 100 others must lead to the same kernels."""
    device, draw, normed = plan.DEVICES[arch], random.Random(0), variant == "norm"
    products = [p for p in inspect_kernels.PRODUCTS if arch.startswith("sm") or p != (FP32, "tf32")]
    # Both 16-bit types are planned alike, and asking at all sizes takes most of the time.
    asked = inspect_kernels.configurations(device, [p for p in products if p[0] != BF16], variant)
    asked += [dataclasses.replace(c, dtype=BF16) for c in asked if c.dtype == FP16]
    known = {inspect_kernels.configuration_key(c) for c in asked}
    missing = []
    for _ in range(1000):
        hidden = draw.choice((draw.randint(1, 4096), draw.randint(1, 512)))
        batch = int(2 ** draw.uniform(0, 13))
        dtype, precision = draw.choice(products)
        direction, length = draw.choice(("forward", "backward")), draw.choice((1, 2))
        chains, stacked = draw.choice((1, 2, draw.randint(2, 32))), draw.random() < 0.3
        chains = 1 if normed else chains
        stacked = stacked and chains > 1
        fixed = (dtype, device, precision, True, None, chains, stacked, normed)
        try:
            chosen = plan.recurrent(direction, length, batch, hidden, *fixed)
        except plan.PlanError:
            assert chains > 1 or (normed and hidden > 512)
            continue
        here = Configuration(inspect_kernels.recurrent_launch(chosen), chosen, dtype, device)
        if inspect_kernels.configuration_key(here) not in known:
            missing.append((direction, length, batch, hidden, dtype, precision, chains, stacked))
    assert len(missing) <= 10, missing


@pytest.mark.parametrize("variant", inspect_kernels.VARIANTS[1:])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_variant_of_the_cell_adds_its_arguments(direction: str, variant: str) -> None:
    chosen = plan.recurrent(direction, 8, 16, 512, FP16, plan.DEVICES["sm_90"], normed=variant != "cell")
    launch = inspect_kernels.recurrent_launch(chosen, variant=variant)
    types, constants, _ = inspect_kernels.signature(launch)
    normed = {"norm_ptr": "*fp32", "rows_ptr": "*i64", "products_ptr": "*fp16", "statistics_ptr": "*fp32"}
    optional = {"cuts_ptr": "*i32", "peephole_ptr": "*fp16", "h_scale_ptr": "*fp32", "noise_ptr": "*i64"}
    for arguments, given in ((normed, variant != "cell"), (optional, variant != "norm")):
        meant = arguments if given else dict.fromkeys(arguments, "constexpr")
        assert {name: types[name] for name in arguments} == meant
    assert constants.get("COUPLED", False) == (variant != "norm")


# The command

ARCHES = ["--arch", "sm_90", "--arch", "gfx942"]


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> list[Configuration]:
    """Three configurations to be chosen from, and a compiler that makes them up."""
    some = [configuration(tier="persistent"), configuration(tier="streaming"), configuration(tier="step")]
    monkeypatch.setattr(inspect_kernels, "configurations", lambda device, products, variant: some)

    def work(item: tuple[Configuration, str]) -> dict[str, Any]:
        resident = item[0].plan.tier == "persistent"
        return inspect_kernels._heading(*item) | {
            "registers": 96, "spill_bytes": 0, "shared_bytes": 4096, "shared_limit": 65536,
            "instructions": {"HGMMA": 2}, "matrix_instruction": "HGMMA", "weights_resident": resident,
            "exchange_reads": {}, "exchange_read_bytes": [], "layout_conversions": 0, "problems": [],
        }  # fmt: skip

    monkeypatch.setattr(inspect_kernels, "_work", work)
    return some


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    inspect_kernels.add_arguments(parser)
    return inspect_kernels.run(parser.parse_args(["--jobs", "1", *words]))


def test_rows_have_the_promised_keys(
    three: list[Configuration], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.json"
    assert command(*ARCHES, "--json", str(path)) == 0
    rows = json.loads(path.read_text())
    assert len(rows) == 6
    for each in rows:
        assert {"kernel", "config", "arch", "dtype", "registers", "spill_bytes", "shared_bytes", "instructions",
                "weights_resident"} <= each.keys()  # fmt: skip
        assert each["config"]["H"] == 512
        assert all(isinstance(count, int) for count in each["instructions"].values())
    printed = capsys.readouterr().out
    assert printed.count("weights resident\n") == 2
    assert "sm_90: 3 configurations, 0 with a problem; at most 96 registers and 4096 of 65536 bytes shared" in printed
    assert f"6 rows in {path}" in printed


@pytest.mark.parametrize("failing", [1, 3])
def test_what_was_done_is_kept_when_stopped(
    three: list[Configuration], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, failing: int
) -> None:
    path, work, calls = tmp_path / "rows.json", inspect_kernels._work, []

    def interrupted(item: Any) -> dict[str, Any]:
        # The file is whole before every row.
        assert len(json.loads(path.read_text())) == len(calls)
        if len(calls) == failing:
            raise KeyboardInterrupt
        calls.append(item)
        return work(item)

    monkeypatch.setattr(inspect_kernels, "_work", interrupted)
    assert command(*ARCHES, "--json", str(path)) == 130
    assert len(json.loads(path.read_text())) == failing
    assert f"stopped: {6 - failing} of 6 configurations are missing" in capsys.readouterr().out


def test_a_problem_fails_the_command(
    three: list[Configuration], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = inspect_kernels._work
    monkeypatch.setattr(
        inspect_kernels, "_work", lambda i: work(i) | {"problems": ["8 bytes spilled"] * (i[0] is three[1])}
    )
    assert command("--arch", "sm_90") == 1
    printed = capsys.readouterr().out
    assert printed.count(" PROBLEM: 8 bytes spilled") == 1
    assert "3 configurations, 1 with a problem" in printed


def test_what_does_not_compile_is_a_row_with_its_reason(
    three: list[Configuration], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    broken = dataclasses.replace(three[0], launch=dataclasses.replace(three[0].launch, kernel="no_such_kernel"))
    monkeypatch.setattr(inspect_kernels, "configurations", lambda device, products, variant: [broken])
    path = tmp_path / "rows.json"
    assert command("--arch", "sm_90", "--json", str(path)) == 1
    (only,) = json.loads(path.read_text())
    assert only["kernel"] == "no_such_kernel"
    assert only["problems"][0].startswith("KeyError: 'no_such_kernel'")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--match", "no such thing"], "no configuration contains 'no such thing'; --list shows them all"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--variant", "norm", "--explain", "8,4,16,16"], "--variant norm goes with neither --counts nor --explain"),
        (["--variant", "cell", "--counts", "/no/such/file"], "--variant cell goes with neither --counts nor --explain"),
        (["--json", "/no/such/folder/rows.json"], "cannot write /no/such/folder/rows.json: No such file or directory"),
    ],
)
def test_wrong_arguments_are_refused(
    three: list[Configuration], words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--arch", "sm_90", *words) == 2
    assert told in capsys.readouterr().err


def test_list_and_match_choose_without_compiling(
    three: list[Configuration], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inspect_kernels, "_work", None)
    assert command("--arch", "sm_90", "--list", "--match", "streaming", "--match", " step,") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.sub(r".* H=512 (\w+),.*", r"\1", line) for line in lines] == ["streaming", "step"]


def test_the_list_of_a_variant(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--arch", "sm_90", "--dtype", "bf16", "--variant", "norm", "--list"]
    parser = argparse.ArgumentParser()
    inspect_kernels.add_arguments(parser)
    assert inspect_kernels.run(parser.parse_args(words)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[:2] == ["sm_90", "norm"] for line in lines} == {True}
    assert not [line for line in lines if "gate_gemm" in line or " step," in line or "chains" in line]


def test_two_processes_give_the_rows_of_one(tmp_path: Path) -> None:
    """For real, on the two smallest kernels there are."""
    rows: dict[int, list[Any]] = {}
    for jobs in (1, 2):
        path = tmp_path / f"{jobs}.json"
        parser = argparse.ArgumentParser()
        inspect_kernels.add_arguments(parser)
        words = ["--arch", "sm_80", "--dtype", "bf16", "--match", "gate_gemm bf16/ieee D=H=16"]
        words += ["--jobs", str(jobs), "--json", str(path)]
        assert inspect_kernels.run(parser.parse_args(words)) == 0
        rows[jobs] = sorted(json.loads(path.read_text()), key=str)
    assert rows[1] == rows[2]
    assert len(rows[1]) >= 1
    assert all(each["kernel"] == "gate_gemm" for each in rows[1])
