"""The parallel emulator itself: right arithmetic, real concurrency, and errors that are reported, never hung on."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest
import torch

import tritlstm
from tritlstm import emulator, layer, status
from tritlstm.kernels.launch import Launch

T, B, D, H = 4, 3, 5, 40
#: Turns that outlast the unequal start of the programs; a turn takes about 1 ms, or 50 us.
PATIENCE = {"flag": 800, "counter": 10_000}
PERSISTENT = {"tier": "persistent", "block_h": 16, "sms": 4}  # H=40: three programs


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((T, B, D), (4 * H, D), (4 * H, H), (4 * H,), (4 * H,), (B, H), (B, H))
    return tuple((torch.randn(s, generator=generator) / 4).to(dtype) for s in shapes)


def forward(**options: Any) -> torch.Tensor:
    x, *parameters, h0, c0 = inputs()
    with emulator.emulate(**{**PERSISTENT, **options}):
        return layer.forward(x, *parameters, h0, c0, None, False, False)[0]


def gemm(x: torch.Tensor, w: torch.Tensor, gates: torch.Tensor, rows: int) -> Launch:
    arguments = {"x_ptr": x, "w_ptr": w, "b_ih_ptr": None, "b_hh_ptr": None, "gates_ptr": gates, "rows": rows, "B": 1}
    sizes = {"D": x.shape[1], "H": w.shape[0] // 4, "HX": w.shape[0] // 4}
    tiles = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP_M": 1, "PRECISION": "ieee"}
    grid = (-(-rows // 16) * (gates.shape[1] // 32),)
    return Launch("gate_gemm", grid, {**arguments, "x_stride_t": 1, "x_stride_b": 1}, {**sizes, **tiles}, 4)


def test_a_product_of_bf16_multiplies_values_and_rounds_to_nearest():
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(s, generator=generator).to(torch.bfloat16) for s in ((16, 16), (32, 16)))
    gates = torch.zeros(16, 32, dtype=torch.bfloat16)
    with emulator.emulate():
        emulator.run(gemm(x, w, gates, 16))
    exact = x.double() @ layer.pack_rows(w).double().t()
    assert torch.equal(gates, exact.to(torch.bfloat16))


def test_programs_run_at_the_same_time():
    """Three programs wait for each other at every step; one after another they could not end."""
    x, *parameters, h0, c0 = inputs()
    expected = torch._VF.lstm(x, (h0[None], c0[None]), parameters, True, 1, 0.0, False, False, False)[0]
    torch.testing.assert_close(forward(), expected)


def test_a_seed_and_delays_change_the_schedule_but_not_the_bits():
    calm = forward()
    for seed in range(2):
        assert torch.equal(forward(seed=seed, delays=emulator.Delays(0.1, 0.003)), calm)


@pytest.mark.parametrize("amd", [False, True], ids=["ptx", "portable"])
@pytest.mark.parametrize("protocol", ["flag", "counter"])
@pytest.mark.parametrize("kind", ["kill", "stall"])
def test_a_program_that_stops_is_reported_by_the_others_bounded_spins(kind, protocol, amd):
    begin = time.monotonic()
    fault = emulator.Fault((1, 0), store=1, kind=kind)
    with pytest.raises(status.ExchangeTimeout, match=r"gave up waiting at step 2 \(block [02] of group 0\)"):
        forward(protocol=protocol, fault=fault, spin_limit=PATIENCE[protocol], amd=amd)
    assert time.monotonic() - begin < 150  # seconds on an idle machine


@pytest.mark.parametrize("protocol", ["flag", "counter"])
def test_after_a_time_out_the_results_are_nan_not_wrong_numbers(protocol, monkeypatch):
    monkeypatch.setattr(status, "check", lambda record: None)
    out = forward(protocol=protocol, fault=emulator.Fault((1, 0), store=1), spin_limit=PATIENCE[protocol])
    assert torch.isfinite(out[0]).all()  # before the fault
    others = torch.cat((out[:, :, :16], out[:, :, 32:]), -1)
    assert torch.isfinite(others[:2]).all()
    assert others[2:].isnan().all()


def test_the_emulator_works_on_after_a_failure():
    with pytest.raises(status.ExchangeTimeout):
        forward(fault=emulator.Fault((0, 0), store=0), spin_limit=PATIENCE["flag"])
    assert torch.isfinite(forward()).all()


def test_an_access_past_the_end_of_a_buffer_is_an_error():
    x, w, gates = torch.zeros(2048, 16), torch.zeros(32, 16), torch.zeros(2048, 32)
    with emulator.emulate(), pytest.raises(emulator.EmulationError, match=r"program .* outside its buffers"):
        emulator.run(gemm(x[:1024].contiguous(), w, gates, 2048))
    with emulator.emulate(), pytest.raises(emulator.EmulationError, match=r"outside its buffers"):
        emulator.run(gemm(x, w, gates[:1024].contiguous(), 2048))


def test_an_exception_in_a_program_is_told_with_its_traceback():
    broken = gemm(torch.zeros(16, 16), torch.zeros(32, 16), torch.zeros(16, 32), 16)
    broken.constants["BLOCK_K"] = 15
    with emulator.emulate(), pytest.raises(emulator.EmulationError, match=r"(?s)program \(0, 0\).*power of 2"):
        emulator.run(broken)


def test_a_deadline_ends_programs_that_never_do():
    message = r"program \(0, 0\) was still running at the time-out"
    with pytest.raises(emulator.EmulationError, match=message):
        forward(delays=emulator.Delays(1.0, 60.0), timeout_s=0.5)


def test_outside_of_emulate_nothing_is_emulated():
    assert not emulator.active()
    with emulator.emulate() as emulation:
        assert emulator.active()
        assert emulator.current() is emulation
    assert not emulator.active()
    launch = gemm(torch.zeros(16, 16), torch.zeros(32, 16), torch.zeros(16, 32), 16)
    with pytest.raises(emulator.EmulationError, match="with emulate"):
        emulator.run(launch)


def test_a_non_contiguous_argument_is_refused():
    launch = gemm(torch.zeros(16, 32)[:, ::2], torch.zeros(32, 16), torch.zeros(16, 32), 16)
    with emulator.emulate(), pytest.raises(emulator.EmulationError, match="'x_ptr' must be a contiguous CPU tensor"):
        emulator.run(launch)


def test_a_module_runs_on_the_kernels_inside_emulate():
    module = tritlstm.LSTM(D, H)
    x = inputs()[0]
    with emulator.emulate(**PERSISTENT):
        emulated = module(x)[0]
    torch.testing.assert_close(emulated, module(x)[0])


def test_a_status_record_is_read_once():
    record = torch.tensor([1, 7, 2, 9], dtype=torch.int32)
    with pytest.raises(status.ExchangeTimeout, match=r"step 9 \(block 7 of group 2\)"):
        status.check(record)
    status.check(record)


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode, lambda: torch.device("meta")])
def test_the_record_of_a_gpu_lies_on_the_host_and_can_be_cleared(monkeypatch, mode):
    """Whatever torch's default device is, and in whatever mode the first kernel was launched."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda record: record)  # which needs a GPU
    monkeypatch.setattr(status, "_records", {})
    with mode():
        record = status.of(torch.device("cuda", 0))
    assert record.is_cpu
    assert status.of(torch.device("cuda", 0)) is record
    record[0] = 1
    with pytest.raises(status.ExchangeTimeout):
        status.check(record)
    assert record.tolist() == [0] * status.WORDS
