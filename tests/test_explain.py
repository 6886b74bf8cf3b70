"""`tritlstm.explain`: what it says is what runs. No kernel is executed: launches are recorded and left out."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import tritlstm
from tritlstm import aten, cpu, emulator, functional, plan
from tritlstm.kernels.launch import Launch

T, B, D, H = 6, 40, 24, 72


@dataclasses.dataclass
class Taken:
    """What a call did: the launches it made, and the other engines it used."""

    launches: list[Launch] = dataclasses.field(default_factory=list)
    engines: list[str] = dataclasses.field(default_factory=list)
    order: list[str] = dataclasses.field(default_factory=list)  # of both, a recurrence being one

    @property
    def path(self) -> str:
        (path,) = {*self.engines, *(["kernels"] if self.launches else [])}
        return path

    def of(self, kernel: str) -> list[Launch]:
        return [launch for launch in self.launches if launch.kernel == kernel]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    taken = Taken()

    def record(engine: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **more: Any) -> Any:
            taken.engines.append(engine)
            taken.order.append(engine)
            return original(*args, **more)

        return recorded

    def launched(launch: Launch) -> None:
        taken.launches.append(launch)
        taken.order.extend(["kernels"] * (launch.kernel == "recurrent_forward"))

    monkeypatch.setattr(emulator, "run", launched)
    monkeypatch.setattr(functional._VF, "lstm", record("torch", functional._VF.lstm), raising=False)
    monkeypatch.setattr(functional._VF, "lstm_cell", record("torch", functional._VF.lstm_cell), raising=False)
    monkeypatch.setattr(aten, "forward", record("aten", aten.forward))
    monkeypatch.setattr(aten, "normed_forward", record("aten", aten.normed_forward))
    monkeypatch.setattr(cpu, "forward", record("aten", cpu.forward))
    return taken


def lstm(**options: Any) -> tritlstm.LSTM:
    return tritlstm.LSTM(D, H, **options)


def packed(lengths: list[int]) -> PackedSequence:
    return pack_padded_sequence(torch.randn(max(lengths), len(lengths), D), lengths, enforce_sorted=False)


Case = tuple[Callable[[], nn.Module], Callable[[], Any], str]
CASES: dict[str, Case] = {
    "batch": (lstm, lambda: torch.randn(T, B, D), "kernels"),
    "bf16": (lambda: lstm(dtype=torch.bfloat16), lambda: torch.randn(T, B, D).bfloat16(), "kernels"),
    "fp16": (lambda: lstm(dtype=torch.float16), lambda: torch.randn(T, B, D).half(), "kernels"),
    "batch first": (lambda: lstm(batch_first=True), lambda: torch.randn(B, T, D), "kernels"),
    "unbatched": (lstm, lambda: torch.randn(T, D), "kernels"),
    "one step": (lstm, lambda: torch.randn(1, B, D), "kernels"),
    "packed": (lstm, lambda: packed([2, 5, 3]), "kernels"),
    "packed, not padded": (lstm, lambda: pack_sequence([torch.randn(4, D), torch.randn(2, D)]), "kernels"),
    "projection": (lambda: lstm(proj_size=16), lambda: torch.randn(T, B, D), "kernels"),
    "layers, both directions": (
        lambda: lstm(num_layers=2, bidirectional=True), lambda: torch.randn(T, B, D), "kernels"
    ),
    "cell": (lambda: tritlstm.LSTMCell(D, H), lambda: torch.randn(B, D), "kernels"),
    "cell, unbatched": (lambda: tritlstm.LSTMCell(D, H), lambda: torch.randn(D), "kernels"),
    "empty batch": (lstm, lambda: torch.randn(T, 0, D), "aten"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "draw", "path"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_what_is_explained_is_what_is_launched(
    make: Callable[[], nn.Module], draw: Callable[[], Any], path: str, training: bool, taken: Taken
) -> None:
    module, input = make(), draw()
    with emulator.emulate(sms=12), torch.set_grad_enabled(training):
        told = tritlstm.explain(module, input)
        assert not taken.launches, "explain runs nothing"
        results = module(input)
        if training:
            first = results[0].data if isinstance(results[0], PackedSequence) else results[0]
            first.sum().backward()
    assert told.path == path == taken.path
    assert [choice.name for choice in told.kernels] == (
        [] if path != "kernels" else ["forward", "backward"] if training else ["forward"]
    )
    passes = getattr(module, "num_layers", 1) * (1 + getattr(module, "bidirectional", False))
    for choice in told.kernels:
        at_once = isinstance(choice.chosen, plan.OneStepPlan)
        launches = taken.of("one_step" if at_once else f"recurrent_{choice.name}")
        steps = told.sizes["T"] if choice.chosen.tier == "step" else 1
        assert len(launches) == passes * steps // getattr(choice.chosen, "at_once", 1)
        for launch in launches:
            expected = choice.chosen.launch(launch.arguments)
            assert launch.constants == expected.constants
            assert launch.grid == expected.grid
            assert launch.num_warps == expected.num_warps
            assert launch.cooperative == expected.cooperative
            assert at_once or launch.arguments["T"] == told.sizes["T"]
            assert launch.arguments["B"] == told.sizes["B"]
    assert not taken.of("recurrent_backward") or training


@pytest.mark.parametrize(
    "overrides",
    [{"tier": "persistent", "protocol": "counter"}, {"tier": "step"}, {"tier": "streaming"}, {"block_h": 16}],
    ids=str,
)
def test_what_was_forced_is_explained(overrides: dict[str, Any], taken: Taken) -> None:
    module, x = tritlstm.LSTM(D, 200), torch.randn(T, B, D)
    with emulator.emulate(sms=64, **overrides):
        told = tritlstm.explain(module, x)
        module(x)[0].sum().backward()
    for choice in told.kernels:
        assert {name: getattr(choice.chosen, name) for name in overrides} == overrides
        assert taken.of(f"recurrent_{choice.name}")[0].constants == choice.chosen.constants


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_the_cpu_runs_torch(dtype: torch.dtype, taken: Taken) -> None:
    module, x = lstm(dtype=dtype), torch.randn(T, B, D, dtype=dtype)
    told = tritlstm.explain(module, x)
    module(x)
    assert told.path == taken.path == "torch"
    assert str(told).splitlines()[:3] == [
        "path: torch (tensors on cpu: torch's own LSTM is the fast one there)",
        "device: cpu",
        f"sizes: T={T}, B={B}, D={D}, H={H}",
    ]
    assert "emulator.emulate() runs the Triton kernels on a CPU, for tests" in str(told)


@pytest.mark.parametrize("steps", [5, 40])
@pytest.mark.parametrize("form", ["batch", "lengths", "packed"])
@pytest.mark.parametrize("how", ["module", "autocast"])
def test_16_bits_on_the_cpu_run_in_float32(how: str, form: str, steps: int, taken: Taken) -> None:
    module = lstm(dtype=torch.float16 if how == "module" else torch.float32)
    x, lengths = torch.randn(steps, 2, D, dtype=module.weight_hh_l0.dtype), [steps, steps - 1]
    given = pack_padded_sequence(x, lengths) if form == "packed" else x
    more = {"lengths": lengths} if form == "lengths" else {}
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        told = tritlstm.explain(module, given, **more)
        module(given, **more)
    explicit = steps == 40 and (form == "lengths" or (form == "packed" and how == "module"))
    assert told.path == taken.path == ("aten" if explicit else "torch")
    said = "in 16 bits all is computed in float32 and rounded at the end, so that the cell state stays float32"
    assert (said in told.notes) == ((how, form) != ("autocast", "packed"))


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_what_the_kernels_do_not_compute_runs_torch(kind: str, taken: Taken) -> None:
    module = getattr(tritlstm, kind)(D, H, dtype=torch.float64)
    x = torch.randn(*(T, B, D)[kind == "LSTMCell" :], dtype=torch.float64)
    with emulator.emulate():
        told = tritlstm.explain(module, x)
        module(x)
    assert taken.path == "torch"
    assert told.path == taken.path
    assert told.reason == "the kernels compute in float16, bfloat16, float32, not in float64"


def test_an_empty_batch_on_the_cpu_runs_torch(taken: Taken) -> None:
    module, x = lstm(), torch.randn(T, 0, D)
    told = tritlstm.explain(module, x)
    module(x)
    assert told.path == taken.path == "torch"


def test_autocast_decides_the_dtype(taken: Taken) -> None:
    module, x = lstm(), torch.randn(T, B, D)
    with emulator.emulate(sms=12), torch.autocast("cpu", torch.bfloat16):
        told = tritlstm.explain(module, x)
        module(x)
    assert told.kernels[0].chosen.dtype == torch.bfloat16
    (launch,) = taken.of("recurrent_forward")
    assert launch.arguments["gates_ptr"].dtype == torch.bfloat16
    assert launch.constants == told.kernels[0].chosen.constants


def test_training_follows_the_parameters_and_can_be_asked_for(taken: Taken) -> None:
    module, x = lstm().requires_grad_(False), torch.randn(T, B, D)
    with emulator.emulate(sms=12):
        names = [[k.name for k in tritlstm.explain(module, x, training=t).kernels] for t in (None, False, True)]
        assert names == [["forward"], ["forward"], ["forward", "backward"]]
        module(x)
        (launch,) = taken.of("recurrent_forward")
        assert launch.constants["SAVE"] is False
        assert tritlstm.explain(module, x, training=True).kernels[0].chosen.constants["SAVE"] is True


def test_a_gradient_of_the_input_is_training_too(taken: Taken) -> None:
    module, x = lstm().requires_grad_(False), torch.randn(T, B, D, requires_grad=True)
    with emulator.emulate(sms=12):
        told = tritlstm.explain(module, x)
        module(x)
    (launch,) = taken.of("recurrent_forward")
    assert launch.constants["SAVE"] is True
    assert told.kernels[0].chosen.constants["SAVE"] is True


def test_the_words() -> None:
    module, x = lstm(num_layers=3, bidirectional=True, proj_size=8), torch.randn(T, B, D)
    with emulator.emulate(sms=12, shared_bytes=100 << 10):
        told = tritlstm.explain(module, x)
        gemm, above = (plan.gate_gemm(T * B, n, H, torch.float32, plan.device_of(x)) for n in (D, 2 * 8))
    lines = str(told).splitlines()
    assert lines[:4] == [
        "path: kernels (Triton kernels)",
        "device: emulator (emulated, 12 multiprocessors, 102400 bytes of shared memory)",
        f"sizes: T={T}, B={B}, D={D}, H={H}",
        "each of 3 layer(s) x 2 direction(s):",
    ]
    for choice in told.kernels:
        at = lines.index(f"  {choice.name}: {choice.chosen.describe()}")
        predicted = re.match(r" +predicted ([\d.]+) us a step \(of one tile: (.*)\); not a measurement$", lines[at + 1])
        assert predicted
        assert float(predicted[1]) == pytest.approx(choice.chosen.us_per_step, abs=0.005)
        parts = dict(part.rsplit(" ", 1) for part in predicted[2].split(", "))
        cost = {name: value for name, value in dataclasses.asdict(choice.chosen.cost).items() if value}
        assert {name: float(value) for name, value in parts.items()} == pytest.approx(cost, abs=0.005)
        # One line for every tier that was not taken: its prediction or its reason.
        others = [tier for tier in plan.TIERS if tier != choice.chosen.tier]
        for tier, line in zip(others, lines[at + 2 :], strict=False):
            other = choice.tiers[tier]
            words = other if isinstance(other, str) else f"predicted {other.us_per_step:.2f} us a step"
            assert line == f"    not {tier}: {words}"
    assert lines[-5:] == [
        "note: the product of input and weights in tiles of "
        f"{gemm.block_m} rows, {gemm.block_n} gates, {gemm.block_k} deep; above layer 0 of "
        f"{above.block_m} rows, {above.block_n} gates, {above.block_k} deep",
        "note: layers and directions run one after another",
        "note: projection is folded into w_hh, so the recurrence runs at the full width H",
        "note: derivatives of a gradient and forward-mode ones run in plain PyTorch operators",
        "note: fp32 products in ieee, as torch.backends.cudnn.rnn.fp32_precision asks",
    ]


def test_one_layer_is_called_the_layer() -> None:
    with emulator.emulate():
        for module, x in ((lstm(), torch.randn(T, B, D)), (tritlstm.LSTMCell(D, H), torch.randn(B, D))):
            assert "\nthe layer:\n" in str(tritlstm.explain(module, x))


def forward_plans(told: tritlstm.explanation.Explanation) -> list[dict[str, Any]]:
    chosen = [choice.chosen for group in told.groups for choice in group.kernels if choice.name == "forward"]
    return [plan.launch({}).constants for plan in chosen]


@pytest.mark.parametrize("sizes", [[8, 512], [512, 8], [8, 512, 16], [512, 600]], ids=str)
def test_layers_of_a_size_list_are_explained_each(sizes: list[int], taken: Taken) -> None:
    module, x = tritlstm.LSTM(3, sizes, layer_norm=True), torch.randn(2, 2, 3)
    with emulator.emulate(sms=2, shared_bytes=65536):
        told = tritlstm.explain(module, x)
        module(x)
    fits = ["kernels" if size < 512 else "aten" for size in sizes]
    assert taken.order == fits
    assert [group.path for group in told.groups] == fits
    assert told.path == ("mixed" if "kernels" in fits else "aten")
    assert told.sizes == {"T": 2, "B": 2, "D": 3, "H": sizes}
    assert [launch.constants for launch in taken.of("recurrent_forward")] == forward_plans(told)
    lines = str(told).splitlines()
    assert lines[0] == f"path: {told.path} (not the same for all layers)"
    for layer, path in enumerate(fits):
        reason = "Triton kernels" if path == "kernels" else "layer_norm needs all blocks of a step on the device"
        assert any(line.startswith(f"layer {layer}: {path} ({reason}") for line in lines)
    two = "layer_norm: two exchanges of row sums more in every step, unless one block holds all units"
    small = ", ".join(str(layer) for layer, path in enumerate(fits) if path == "kernels")
    noted = f"note: layer{'s' if ',' in small else ''} {small}: {two}" if small else "nothing"
    assert [line for line in lines if two in line] == [line for line in lines if line == noted]
    assert (two in str(told)) == bool(small)


def test_layers_of_a_size_list_that_all_run_kernels_have_a_plan_each(taken: Taken) -> None:
    module, x = tritlstm.LSTM(D, [H, 200], bidirectional=True), torch.randn(T, B, D)
    with emulator.emulate(sms=12):
        told = tritlstm.explain(module, x, training=False)
        with torch.no_grad():
            module(x)
    assert told.path == "kernels"
    assert [group.name for group in told.groups] == [f"layer {k}, both directions side by side" for k in range(2)]
    assert [kernel.chosen.at_once for kernel in told.kernels] == [2, 1]  # of 12 blocks, layer 1 fills more than half
    plans = forward_plans(told)
    assert [launch.constants for launch in taken.of("recurrent_forward")] == [plans[0], plans[1], plans[1]]
    assert "layer 0, both directions side by side:\n  forward: " in str(told)


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_layer_of_a_size_list_is_told_apart(frozen: int, taken: Taken) -> None:
    module, x = tritlstm.LSTM(D, [H, 200]), torch.randn(T, B, D)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(f"_l{frozen}" not in name)
    with emulator.emulate(sms=12):
        told = tritlstm.explain(module, x)
        module(x)
    saves = [launch.constants["SAVE"] for launch in taken.of("recurrent_forward")]
    assert saves == [group.kernels[0].chosen.launch({}).constants["SAVE"] for group in told.groups]
    assert saves == [frozen != 0, True]


def test_a_size_list_on_the_cpu_mixes_torch_and_plain_operators(taken: Taken) -> None:
    module, x = tritlstm.LSTM(8, [8, 512, 8, 8]), torch.randn(2, 1, 8)
    told = tritlstm.explain(module, x)
    module(x)
    assert taken.order == ["torch", "aten", "torch", "torch"]
    assert [(group.name, group.path) for group in told.groups] == [
        ("layer 0", "torch"), ("layer 1", "aten"), ("layers 2 to 3, each of them", "torch")
    ]  # fmt: skip
    assert told.path == "mixed"
    with torch.no_grad():
        told = tritlstm.explain(module, x)
    assert told.path == "torch"
    assert len(told.groups) == 1


def test_groups_of_layers_are_explained_each(taken: Taken) -> None:
    module, x = tritlstm.LSTM(4, 20, num_layers=5), torch.randn(5, 3, 4)
    with emulator.emulate(sms=14, tier="persistent", block_h=16, parts=4):
        told = tritlstm.explain(module, x)
        module(x)
    forward = taken.of("recurrent_forward")
    assert [launch.grid[2] for launch in forward] == [3, 2]
    assert [group.name for group in told.groups] == ["layers 0 to 2 as a wavefront", "layers 3 to 4 as a wavefront"]
    assert [launch.constants for launch in forward] == forward_plans(told)
    assert "note: groups of layers run one after another" in str(told)
    assert told.path == "kernels"


def test_states_of_a_size_list_are_read_for_their_gradient(taken: Taken) -> None:
    module, x = tritlstm.LSTM(D, [4, 5]).requires_grad_(False), torch.randn(T, B, D)
    h, c = ([torch.randn(1, B, size) for size in (4, 5)] for _ in range(2))
    with emulator.emulate(sms=12):
        assert [k.name for k in tritlstm.explain(module, x, (h, c)).kernels] == ["forward", "forward"]
        c[1].requires_grad_()
        told = tritlstm.explain(module, x, (h, c))
        module(x, (h, c))
    assert [k.name for k in told.kernels] == ["forward", "forward", "backward"]
    assert [launch.constants for launch in taken.of("recurrent_forward")] == forward_plans(told)


DOUBLE: dict[str, tuple[dict[str, Any], dict[str, Any], bool, str]] = {
    "autocast": ({}, {}, True, "torch"),
    "autocast, a variant": ({"peephole": True}, {}, True, "aten"),
    "autocast, layer norm": ({"layer_norm": True}, {}, True, "aten"),
    "autocast, lengths": ({}, {"lengths": [30] * 40}, True, "torch"),
    "lengths in evaluation": ({}, {"lengths": [30, *range(1, 30), *range(1, 11)]}, False, "torch"),
    "lengths in training": ({}, {"lengths": [30, *range(1, 30), *range(1, 11)]}, False, "aten"),
    "lengths and resets": ({}, {"lengths": [30] * 40, "resets": torch.zeros(30, 40, dtype=torch.bool)}, False, "aten"),
}


@pytest.mark.parametrize(("kind", "given", "autocast", "path"), DOUBLE.values(), ids=DOUBLE.keys())
def test_float64_never_runs_kernels(
    kind: dict[str, Any], given: dict[str, Any], autocast: bool, path: str, taken: Taken, request: Any
) -> None:
    module, x = lstm(dtype=torch.float64, **kind), torch.randn(30, 40, D, dtype=torch.float64)
    module.train("evaluation" not in request.node.callspec.id)
    with emulator.emulate(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        told = tritlstm.explain(module, x, **given)
        module(x, **given)
    assert told.path == taken.path == path
    words = "a training step" if "training" in request.node.callspec.id else "the kernels compute in float16"
    assert words in told.reason


LENGTHS: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "in evaluation": ({}, {}, False),
    "in training": ({}, {}, True),
    "resets": ({}, {"resets": torch.zeros(30, 4, dtype=torch.bool)}, False),
    "a variant": ({"peephole": True}, {}, False),
    "layer norm": ({"layer_norm": True}, {}, True),
    "a projection": ({"proj_size": 8}, {}, True),
    "sizes": ({"hidden_size": [8, 4]}, {}, False),
    "sizes in training": ({"hidden_size": [8, 4]}, {}, True),
}


@pytest.mark.parametrize("where", ["cpu", "emulated"])
@pytest.mark.parametrize(("kind", "given", "training"), LENGTHS.values(), ids=LENGTHS.keys())
def test_the_batch_is_said_to_be_packed_where_it_is(
    kind: dict[str, Any], given: dict[str, Any], training: bool, where: str, taken: Taken, monkeypatch: Any
) -> None:
    packs: list[int] = []
    original = functional._VF._pack_padded_sequence
    monkeypatch.setattr(
        functional._VF, "_pack_padded_sequence", lambda *args: packs.append(1) or original(*args), raising=False
    )
    module, x = tritlstm.LSTM(**{"input_size": D, "hidden_size": H, **kind}).train(training), torch.randn(30, 4, D)
    given = {"lengths": [30, 28, 25, 20], **given}
    with emulator.emulate() if where == "emulated" else contextlib.nullcontext():
        told = tritlstm.explain(module, x, **given)
        module(x, **given)
    assert ("sorts and packs the batch" in str(told)) == bool(packs)
    assert {group.path for group in told.groups} == set(taken.order)
    if not packs:
        assert "note: lengths are read on cpu: " in str(told)


@pytest.mark.parametrize("given", [{}, {"lengths": [4, 2]}, {"resets": [[False, True]] * 6}], ids=str)
def test_the_meta_device_is_explained_as_what_runs_there(given: dict[str, Any], taken: Taken) -> None:
    module, x = tritlstm.LSTM(D, H, device="meta"), torch.zeros(6, 2, D, device="meta")
    told = tritlstm.explain(module, x, **given)
    assert told.path == ("aten" if given else "torch")
    assert told.device == "meta"
    module(x, **given)
    assert taken.order == ([] if given else ["torch"])  # an operator has only shapes there


class Wrapped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("module", [nn.LSTM(3, 4), nn.LSTMCell(3, 4), Wrapped()], ids=lambda m: type(m).__name__)
def test_other_modules_are_refused_with_the_remedy(module: nn.Module) -> None:
    words = rf"explain takes a tritlstm.LSTM or tritlstm.LSTMCell, got {type(module).__name__}; tritlstm.swap\(model\)"
    with pytest.raises(TypeError, match=words):
        tritlstm.explain(module, torch.randn(2, 3))


def test_a_swapped_model_is_explained() -> None:
    model = tritlstm.swap(nn.Sequential(nn.LSTM(D, H)))
    assert tritlstm.explain(model[0], torch.randn(T, B, D)).path == "torch"


def test_what_runs_together_under_autocast_is_planned_by_its_dtype(taken: Taken) -> None:
    """Two layers of 40 units in bfloat16 fit 6 blocks of 48 KiB as a wavefront; in float32 they would not."""
    module, x = tritlstm.LSTM(D, 40, num_layers=2), torch.randn(3, 2, D)
    with emulator.emulate(sms=6, shared_bytes=48 << 10):
        with torch.autocast("cpu", torch.bfloat16):
            told = tritlstm.explain(module, x)
            module(x)
        assert "wavefront" in str(told)
        assert [launch.constants["CHAINS"] for launch in taken.of("recurrent_forward")] == [2]
        assert "wavefront" not in str(tritlstm.explain(module, x))


def test_overrides_are_not_ignored_where_a_single_step_would_be_one_launch(taken: Taken) -> None:
    module, x = lstm(), torch.randn(1, B, D)
    with emulator.emulate(sms=12, block_h=32):
        (forward, *_) = tritlstm.explain(module, x).kernels
        module(x)
    assert isinstance(forward.chosen, plan.RecurrentPlan)
    assert forward.chosen.block_h == 32
    assert [launch.constants["BLOCK_H"] for launch in taken.of("recurrent_forward")] == [32]
    assert not taken.of("one_step")
