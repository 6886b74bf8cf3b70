"""Which path a module takes for an input, with which kernels, tiles and exchange, and why not a faster one."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import aten, emulator, functional, normed, plan
from .cell_options import Cell
from .functional import Lengths
from .layer import bounded
from .variants import Resets

__all__ = ["Explanation", "KernelChoice", "LayerGroup", "explain"]


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """One kernel of one layer: the plan that runs and, tier by tier, the alternatives or why there is none."""

    name: str
    chosen: plan.RecurrentPlan | plan.OneStepPlan
    tiers: dict[str, plan.RecurrentPlan | str]

    def __str__(self) -> str:
        chosen, parts = self.chosen, ""
        if isinstance(chosen, plan.RecurrentPlan):
            cost = dataclasses.asdict(chosen.cost)
            parts = f" (of one tile: {', '.join(f'{name} {value:.2f}' for name, value in cost.items() if value)})"
        lines = [
            f"  {self.name}: {chosen.describe()}",
            f"    predicted {chosen.us_per_step:.2f} us a step{parts}; not a measurement",
        ]
        for tier, other in self.tiers.items():
            if tier == chosen.tier:
                continue
            told = other if isinstance(other, str) else f"predicted {other.us_per_step:.2f} us a step"
            lines.append(f"    not {tier}: {told}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Layers that run alike: ``path``, ``reason`` and ``kernels`` as `Explanation` has them, of these layers."""

    name: str
    path: str
    reason: str
    kernels: tuple[KernelChoice, ...] = ()


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``str()`` tells it all.

    ``path`` is ``'kernels'``, ``'torch'`` (torch's own LSTM), ``'aten'`` (the layer in plain operators), or ``'mixed'``
    where layers differ in it, as those of a list of hidden sizes can. ``groups`` has it for each group of layers, from
    the first layer on. ``kernels`` are those of all groups; ``layers`` is the group's name where there is one alone.
    """

    path: str
    reason: str
    device: str
    sizes: dict[str, Any]  # T, B, D and H, a list where the module has one size a layer
    layers: str = ""
    kernels: tuple[KernelChoice, ...] = ()
    notes: tuple[str, ...] = ()
    groups: tuple[LayerGroup, ...] = ()

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={value}" for name, value in self.sizes.items())
        lines = [f"path: {self.path} ({self.reason})", f"device: {self.device}", f"sizes: {sizes}"]
        alike = len({(group.path, group.reason) for group in self.groups}) == 1
        for group in self.groups:
            if not alike:
                lines.append(f"{group.name}: {group.path} ({group.reason})")
            elif group.kernels:
                lines.append(f"{group.name}:")
            lines.extend(str(kernel) for kernel in group.kernels)
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)


class _Call(NamedTuple):
    """Layers of one size, which the module runs in one call of `functional.apply` (or as a cell)."""

    first: int
    layers: int
    input_size: int
    hidden: int
    training: bool


class _Run(NamedTuple):
    """Layers of a call that run alike."""

    first: int
    layers: int
    path: str
    reason: str
    kernels: tuple[KernelChoice, ...] = ()
    way: str = "apart"  # of `plan.Together`
    passes: int = 1  # of each layer, one after another
    beside: str = ""

    def name(self, alone: bool) -> str:
        last = self.first + self.layers - 1
        if alone and self.way == "apart":
            one = self.layers * self.passes == 1
            name = "the layer" if one else f"each of {self.layers} layer(s) x {self.passes} direction(s)"
        elif self.layers == 1:
            name = f"layer {self.first}" + (f" in each of {self.passes} directions" if self.passes > 1 else "")
        else:
            name = f"{self.layers} layers" if alone else f"layers {self.first} to {last}"
            name += " as a wavefront" if self.way == "wavefront" else ", each of them"
            name += f" in each of {self.passes} directions" if self.passes > 1 else ""
        return name + self.beside


def explain(
    module: nn.Module,
    input: Tensor | PackedSequence,
    hx: Any = None,
    *,
    training: bool | None = None,
    lengths: Lengths | None = None,
    resets: Resets | None = None,
) -> Explanation:
    """Says which path ``module(input, hx, lengths=lengths, resets=resets)`` takes, without running it.

    Args:
        module: a :class:`tritlstm.LSTM` or :class:`tritlstm.LSTMCell`.
        input: as the module takes it; only its shape, dtype and device are read.
        hx: as the module takes it; only whether it needs a gradient is read.
        training: whether gradients will be asked for; by default, whether autograd is on and a tensor
            needs them.
        resets: as the module takes them; only whether they are given is read.
        lengths: as the module takes them; of a tensor, the values are read only where it is on the CPU.

    Returns:
        An :class:`Explanation`; ``print`` it.

    Raises:
        TypeError: ``module`` is not one of tritlstm's, or a cell, which knows no lengths.
        ValueError: ``lengths`` are not what the module takes.
    """
    from .module import LSTM, LSTMCell

    if not isinstance(module, (LSTM, LSTMCell)):
        raise TypeError(
            f"explain takes a tritlstm.LSTM or tritlstm.LSTMCell, got {type(module).__name__}; "
            "tritlstm.swap(model) turns the modules of torch.nn into them"
        )
    data = input.data if isinstance(input, PackedSequence) else input
    length, batch = _sizes(module, input)
    ends = None if lengths is None else _ends(module, input, lengths, length, batch)
    changed = {} if isinstance(module, LSTMCell) else module.cell_options.changed
    beyond = [*changed, *(["resets"] if resets is not None else [])]
    runs: list[_Run] = []
    notes: dict[str, list[int]] = {}
    calls = _calls(module, data, hx, training)
    for call in calls:
        found, own = _runs(module, call, input, length, batch, ends, beyond)
        path = found[0].path
        if runs and not found[0].kernels and (runs[-1].path, runs[-1].reason) == (path, found[0].reason):
            runs[-1] = runs[-1]._replace(layers=runs[-1].layers + call.layers)
        else:
            runs.extend(found)
        for note in (*_note_lengths(data, ends, path), *_note_variant(module, changed, path), *own):
            notes.setdefault(note, []).append(call.first)
    paths, reasons = (list(dict.fromkeys(values)) for values in zip(*((r.path, r.reason) for r in runs), strict=True))
    groups = tuple(LayerGroup(run.name(len(runs) == 1), run.path, run.reason, run.kernels) for run in runs)
    hidden = getattr(module, "hidden_sizes", None)
    kernels = tuple(kernel for group in groups for kernel in group.kernels)
    return Explanation(
        paths[0] if len(paths) == 1 else "mixed",
        reasons[0] if len(reasons) == 1 else "not the same for all layers",
        _device(data, kernels),
        {"T": length, "B": batch, "D": module.input_size, "H": list(hidden) if hidden else module.hidden_size},
        groups[0].name if len(groups) == 1 and kernels else "",
        kernels,
        tuple(note if len(of) == len(calls) else f"{_layers(of)}: {note}" for note, of in notes.items()),
        groups,
    )


def _calls(module: Any, data: Tensor, hx: Any, training: bool | None) -> list[_Call]:
    def needed(*tensors: Tensor) -> bool:
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

    sizes = getattr(module, "hidden_sizes", None)
    if not sizes:
        if training is None:
            training = needed(data, *_tensors(hx), *module.parameters())
        return [_Call(0, getattr(module, "num_layers", 1), module.input_size, module.hidden_size, training)]
    calls, below, reached = [], module.input_size, needed(data)
    for layer, size in enumerate(sizes):
        own = re.compile(rf"_l{layer}(_reverse)?(\.|$)")
        weights = [parameter for name, parameter in module.named_parameters() if own.search(name)]
        states = [part[layer : layer + 1] for part in hx or ()]
        reached = reached or needed(*weights, *_tensors(states))
        calls.append(_Call(layer, 1, below, size, reached if training is None else training))
        below = size * (1 + module.bidirectional)
    return calls


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def _layers(numbers: list[int]) -> str:
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(str(number) for number in numbers)}"


def _device(data: Tensor, kernels: tuple[KernelChoice, ...]) -> str:
    if not kernels:
        return str(data.device)
    device = plan.device_of(data)
    return f"{device.name} ({device.arch}, {device.sms} multiprocessors, {device.shared_bytes} bytes of shared memory)"


def _runs(
    module: Any,
    call: _Call,
    input: Tensor | PackedSequence,
    length: int,
    batch: int,
    ends: Tensor | None,
    beyond: list[str],
) -> tuple[list[_Run], list[str]]:
    """What a call runs, and notes on it."""
    data = input.data if isinstance(input, PackedSequence) else input

    def other(path: str, reason: str, *notes: str) -> tuple[list[_Run], list[str]]:
        return [_Run(call.first, call.layers, path, reason)], list(notes)

    if not functional.runs_kernels(data):
        kernels_here = data.is_cuda or emulator.active()
        names = ", ".join(str(kind).removeprefix("torch.") for kind in plan.DTYPES)
        reason = f"the kernels compute in {names}, not in {str(data.dtype).removeprefix('torch.')}"
        if beyond:
            missing = f"torch's own LSTM has no {' and no '.join(beyond)}"
            reason = f"{reason}, and {missing}" if kernels_here else f"{missing}; plain PyTorch operators do"
            return other("aten", reason)
        if ends is not None and not functional.packs(data):
            reason = f"; {reason}" if kernels_here else ""
            return other("aten", f"lengths run where they are, in plain PyTorch operators{reason}")
        short: list[str] = []
        if hasattr(module, "num_layers") and functional.short_on_cpu(data, isinstance(input, PackedSequence)):
            short.append(
                "in 16 bits all is computed in float32 and rounded at the end, so that the cell state stays float32"
            )
        if call.training and module.training and _explicit(module, call, input, ends):
            reason = "a training step whose explicit backward in plain PyTorch operators is faster than torch's own"
            return other("aten", reason, *short)
        if kernels_here:
            return other("torch", reason)
        return other(
            "torch",
            f"tensors on {data.device.type}: torch's own LSTM is the fast one there",
            *short,
            "compiled training and an export with a dynamic T run the layer in plain PyTorch operators instead",
            "tritlstm.emulator.emulate() runs the Triton kernels on a CPU, for tests",
        )
    if batch == 0:
        return other("aten", "an empty batch needs no kernel")
    dtype = torch.get_autocast_dtype(data.device.type) if aten.autocasts(data.device.type) else data.dtype
    given = (module, call, dtype, plan.device_of(data), length, batch, beyond)
    if "layer_norm" not in beyond:
        return _kernel_runs(*given)
    try:
        # As the operator asks, trained or not.
        precision = plan.dot_precision(torch.empty(0, dtype=dtype))
        normed.check(length, batch, call.hidden, dtype, plan.device_of(data), precision)
        return _kernel_runs(*given)
    except plan.PlanError as error:
        return other("aten", f"layer_norm needs all blocks of a step on the device at once: {error}")


def _explicit(module: Any, call: _Call, input: Tensor | PackedSequence, ends: Tensor | None) -> bool:
    if not hasattr(module, "num_layers"):
        return False
    packed = isinstance(input, PackedSequence)
    if functional.short_on_cpu(cast(Any, input).data, packed):
        with aten.without_autocast("cpu"):  # what runs then is decided in float32
            return _explicit(module, call, cast(Any, input).to(torch.float32), ends)
    options = module._options()._replace(input_size=call.input_size, hidden_size=call.hidden)
    if isinstance(input, PackedSequence):
        return functional.explicit_pays(input.data, input.batch_sizes, options)
    if ends is None:
        x = input if input.dim() == 3 else input.unsqueeze(int(not module.batch_first))
        return functional.explicit_pays(x, None, options)
    return functional.explicit_pays(input, functional.batch_sizes_of(ends), options)


def _folds(module: Any) -> bool:
    return bool(getattr(module, "proj_size", 0))


def _bounded(module: Any) -> bool:
    options = getattr(module, "cell_options", None)
    if options is None:
        return True
    scaled = torch.empty(0) if options.recurrent_dropout and module.training else None
    return bounded(Cell(h_scale=scaled, zoneout_h=options.zoneout[0], activations=options.codes))


def _note_variant(module: Any, changed: dict[str, Any], path: str) -> tuple[str, ...]:
    notes = []
    if "layer_norm" in changed and path == "kernels":
        notes.append("layer_norm: two exchanges of row sums more in every step, unless one block holds all units")
        notes.append("layer_norm inside torch.func transforms runs in plain PyTorch operators")
    if "recompute" in changed and "layer_norm" in changed:
        notes.append("recompute: of no effect beside layer_norm, whose gates are kept")
    elif "recompute" in changed:
        notes.append("recompute: backward makes the gates again, by one product over all steps")
    if getattr(module, "hidden_sizes", None):
        notes.append(f"hidden sizes {list(module.hidden_sizes)}, layer by layer, each a call of its own")
    return tuple(notes)


def _ends(module: nn.Module, input: Tensor | PackedSequence, lengths: Lengths, steps: int, batch: int) -> Tensor:
    if not hasattr(module, "num_layers"):
        raise TypeError("a tritlstm.LSTMCell knows no lengths, got some; leave them out")
    if isinstance(input, PackedSequence) or input.dim() != 3:
        got = "a PackedSequence" if isinstance(input, PackedSequence) else f"shape {list(input.shape)}"
        raise ValueError(f"lengths go with a batch [T, B, D] or [B, T, D], got {got}; leave them out")
    return functional.check_lengths(lengths, steps, batch)


def _note_lengths(x: Tensor, ends: Tensor | None, path: str) -> tuple[str, ...]:
    if ends is None:
        return ()
    if path == "torch":
        return ("the host reads the lengths, sorts and packs the batch, and leaves sequences of length 0 out",)
    where = "are read" if ends.device == x.device else f"are copied from {ends.device} and read"
    if path == "aten" and x.is_cpu:
        return (f"lengths {where} on {x.device}: the batch stays padded",)
    return (f"lengths {where} on {x.device}: no sorting, no packing, no copy to the host",)


def _sizes(module: nn.Module, input: Tensor | PackedSequence) -> tuple[int, int]:
    if isinstance(input, PackedSequence):
        return len(input.batch_sizes), int(input.batch_sizes[0])
    if not hasattr(module, "num_layers"):
        return 1, input.shape[0] if input.dim() == 2 else 1
    if input.dim() == 2:
        return input.shape[0], 1
    steps, batch = (1, 0) if module.batch_first else (0, 1)
    return input.shape[steps], input.shape[batch]


def _kernel_runs(
    module: Any, call: _Call, dtype: torch.dtype, device: plan.Device, length: int, batch: int, beyond: list[str]
) -> tuple[list[_Run], list[str]]:
    layers, hidden, training = call.layers, call.hidden, call.training
    emulation = emulator.current()
    overrides = {} if emulation is None else emulation.overrides
    may_narrow = _bounded(module)
    if not may_narrow:
        overrides = {**overrides, "narrow": False}
    precision = plan.dot_precision(torch.empty(0, dtype=dtype))
    is_normed = "layer_norm" in beyond
    at_once = length == 1 and not beyond and not _folds(module) and not overrides

    def choices(chains: int, width: int, stacked: bool = False) -> tuple[KernelChoice, ...]:
        found = []
        for direction in ("forward", "backward") if training else ("forward",):
            arguments = (direction, length, batch, width, dtype, device, precision, training)
            chosen: plan.RecurrentPlan | plan.OneStepPlan
            if direction == "forward" and at_once and chains == 1:
                chosen = plan.one_step(batch, call.input_size, hidden, dtype, device, precision, training)
            else:
                chosen = plan.recurrent(*arguments, overrides, chains, stacked, is_normed)
            by_tier = plan.tiers(*arguments, chains, stacked, is_normed, may_narrow)
            found.append(KernelChoice(direction, chosen, by_tier))
        return tuple(found)

    directions = 1 + bool(getattr(module, "bidirectional", False))
    heads = module.cell_options.num_heads if "num_heads" in beyond else 1
    together = heads if beyond == ["num_heads"] else 1 if beyond or _folds(module) else directions
    runs: list[_Run] = []
    notes = [f"predictions from {device.constants}"]
    try:
        kernels = choices(together, hidden // heads if together > 1 else hidden)
    except plan.PlanError:
        kernels, together = choices(1, hidden), 1
    at_once = at_once and together == 1
    passes = directions if together == 1 or heads > 1 else 1
    beside = f", its {heads} heads side by side" if heads > 1 else ", both directions side by side"
    apart = _Run(call.first, 1, "kernels", "Triton kernels", kernels, "apart", passes, beside if together > 1 else "")
    dropped = layers > 1 and module.dropout > 0 and module.training
    fixed = (hidden, dtype, device, precision, training, overrides)
    done = 0
    while done < layers:
        count, way, chunks = 1, "apart", 1
        if not (beyond or dropped or directions > 1 or _folds(module)):
            count = plan.next_layers(layers - done, length, batch, *fixed)
            way, chunks, _ = plan.together(length, batch, count, *fixed)
        first = call.first + done
        if way == "wavefront":
            runs.append(_Run(first, count, "kernels", apart.reason, choices(count, hidden, stacked=True), way))
        elif way == "apart" and runs and runs[-1].way == "apart":
            runs[-1] = runs[-1]._replace(layers=runs[-1].layers + 1)
        else:
            runs.append(apart._replace(first=first, layers=count, way=way))
        if way == "pipeline":
            notes.append(f"{chunks} chunks of time: a layer runs on one while the next layer runs on the one before")
        done += count
    columns = hidden if together == 1 else together * plan.padded(hidden // heads)

    def tile(features: int) -> str:
        if at_once:
            return plan.one_step(batch, features, hidden, dtype, device, precision, training).describe()
        gemm = plan.gate_gemm(length * batch, features, columns, dtype, device, precision)
        return f"{gemm.block_m} rows, {gemm.block_n} gates, {gemm.block_k} deep"

    tiles = [tile(call.input_size)]
    if layers > (runs[0].layers if runs[0].way == "wavefront" else 1):
        tiles.append(tile(directions * (getattr(module, "proj_size", 0) or hidden)))
    tiles = list(dict.fromkeys(tiles))
    if not at_once:
        notes.insert(1, f"the product of input and weights in tiles of {'; above layer 0 of '.join(tiles)}")
    elif len(tiles) > 1:
        notes.insert(1, f"above layer 0: {tiles[1]}")
    if len(runs) > 1:
        notes.append("groups of layers run one after another")
    elif runs[0].way == "apart" and layers * passes > 1:
        notes.append(f"{'layers and directions' if passes > 1 else 'layers'} run one after another")
    if heads > 1 and together == 1:
        notes.append(f"num_heads={heads} runs as one w_hh with zeros outside the heads: {heads} times their products")
    if _folds(module):
        notes.append("projection is folded into w_hh, so the recurrence runs at the full width H")
    if training:
        notes.append("derivatives of a gradient and forward-mode ones run in plain PyTorch operators")
    if dtype == torch.float32:
        narrow = any(isinstance(c.chosen, plan.RecurrentPlan) and c.chosen.narrow for run in runs for c in run.kernels)
        recurrent = "; forward, the recurrent ones have operands in fp16, scaled: as many bits as TF32 keeps"
        notes.append(
            f"fp32 products in {precision}, as torch.backends.cudnn.rnn.fp32_precision asks{recurrent * narrow}"
        )
    return runs, notes


