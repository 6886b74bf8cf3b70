"""Which path a module takes for an input, with which kernels, tiles and exchange, and why not a faster one."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import emulator, functional, plan
from .functional import Lengths

__all__ = ["Explanation", "KernelChoice", "explain"]


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """One kernel of one layer: the plan that runs and, tier by tier, the alternatives or why there is none."""

    name: str
    chosen: plan.RecurrentPlan
    tiers: dict[str, plan.RecurrentPlan | str]

    def __str__(self) -> str:
        chosen = self.chosen
        cost = dataclasses.asdict(chosen.cost)
        parts = ", ".join(f"{name} {value:.2f}" for name, value in cost.items() if value)
        lines = [
            f"  {self.name}: {chosen.describe()}",
            f"    predicted {chosen.us_per_step:.2f} us a step (of one tile: {parts}); not a measurement",
        ]
        for tier, other in self.tiers.items():
            if tier == chosen.tier:
                continue
            told = other if isinstance(other, str) else f"predicted {other.us_per_step:.2f} us a step"
            lines.append(f"    not {tier}: {told}")
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``str()`` tells it all.

    ``path`` is ``'kernels'``, ``'torch'`` (torch's own LSTM) or ``'aten'`` (the layer in plain operators).
    """

    path: str
    reason: str
    device: str
    sizes: dict[str, int]
    layers: str = ""
    kernels: tuple[KernelChoice, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={value}" for name, value in self.sizes.items())
        lines = [f"path: {self.path} ({self.reason})", f"device: {self.device}", f"sizes: {sizes}"]
        if self.kernels:
            lines.append(f"{self.layers}:")
            lines.extend(str(kernel) for kernel in self.kernels)
        lines.extend(f"note: {note}" for note in self.notes)
        return "\n".join(lines)


def explain(
    module: nn.Module,
    input: Tensor | PackedSequence,
    hx: Any = None,
    *,
    training: bool | None = None,
    lengths: Lengths | None = None,
    resets: Tensor | None = None,
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
    own_notes = () if lengths is None else (_note_lengths(module, input, lengths, length, batch),)
    if training is None:
        asked = (data, *(hx if isinstance(hx, tuple) else ()), *module.parameters())
        training = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in asked)
    sizes = {"T": length, "B": batch, "D": module.input_size, "H": module.hidden_size}
    changed = {} if isinstance(module, LSTMCell) else module.cell_options.changed
    beyond = [*changed, *(["resets"] if resets is not None else [])]
    own_notes = (*own_notes, *_note_variant(module, changed))
    dtype = data.dtype
    if torch.is_autocast_enabled(data.device.type):
        dtype = torch.get_autocast_dtype(data.device.type)
    if not data.is_cuda and not emulator.active():
        if beyond:
            reason = f"torch's own LSTM has no {' and no '.join(beyond)}; plain PyTorch operators do"
            return Explanation("aten", reason, str(data.device), sizes, notes=own_notes)
        if hasattr(module, "num_layers") and functional.short_on_cpu(data, isinstance(input, PackedSequence)):
            short = "in 16 bits all is computed in float32 and rounded at the end, so that the cell state stays float32"
            own_notes = (*own_notes, short)
        if training and module.training and _explicit(module, input, lengths):
            reason = "a training step whose explicit backward in plain PyTorch operators is faster than torch's own"
            return Explanation("aten", reason, str(data.device), sizes, notes=own_notes)
        notes = (
            "compiled training and an export with a dynamic T run the layer in plain PyTorch operators instead",
            "tritlstm.emulator.emulate() runs the Triton kernels on a CPU, for tests",
        )
        reason = f"tensors on {data.device.type}: torch's own LSTM is the fast one there"
        return Explanation("torch", reason, str(data.device), sizes, notes=(*own_notes, *notes))
    if dtype not in plan.DTYPES:
        names = ", ".join(str(kind).removeprefix("torch.") for kind in plan.DTYPES)
        reason = f"the kernels compute in {names}, not in {str(dtype).removeprefix('torch.')}"
        if beyond:
            reason = f"{reason}, and torch's own LSTM has no {' and no '.join(beyond)}"
            return Explanation("aten", reason, str(data.device), sizes, notes=own_notes)
        if lengths is not None:
            reason = f"lengths run where they are, in plain PyTorch operators; {reason}"
            return Explanation("aten", reason, str(data.device), sizes, notes=own_notes)
        return Explanation("torch", reason, str(data.device), sizes)
    if batch == 0:
        return Explanation("aten", "an empty batch needs no kernel", str(data.device), sizes)
    given = (module, data.to(dtype=dtype, device="meta"), plan.device_of(data), sizes)
    precision = plan.dot_precision(torch.empty(0, dtype=dtype))
    if "layer_norm" in changed:
        try:
            # Both directions must be possible, as they must for the operator, trained or not.
            _kernels(*given, True, beyond, precision, normed=True)
            found = _kernels(*given, training, beyond, precision, normed=True)
        except plan.PlanError as error:
            reason = f"layer_norm needs all blocks of a step on the device at once: {error}"
            return Explanation("aten", reason, str(data.device), sizes, notes=own_notes)
        return dataclasses.replace(found, notes=(*own_notes, *found.notes))
    found = _kernels(*given, training, beyond, precision)
    return dataclasses.replace(found, notes=(*own_notes, *found.notes))


def _explicit(module: Any, input: Tensor | PackedSequence, lengths: Lengths | None) -> bool:
    if not hasattr(module, "num_layers"):
        return False
    packed = isinstance(input, PackedSequence)
    if functional.short_on_cpu(cast(Any, input).data, packed):
        with torch.autocast("cpu", enabled=False):  # what runs then is decided in float32
            return _explicit(module, cast(Any, input).to(torch.float32), lengths)
    if isinstance(input, PackedSequence):
        return functional.explicit_pays(input.data, input.batch_sizes, module._options())
    if lengths is None:
        x = input if input.dim() == 3 else input.unsqueeze(int(not module.batch_first))
        return functional.explicit_pays(x, None, module._options())
    return functional.explicit_pays(input, functional.batch_sizes_of(torch.as_tensor(lengths)), module._options())


def _folds(module: Any) -> bool:
    return bool(getattr(module, "proj_size", 0))


def _note_variant(module: Any, changed: dict[str, Any]) -> tuple[str, ...]:
    notes = []
    if "layer_norm" in changed:
        notes.append("layer_norm: two exchanges of row sums more in every step, unless one block holds all units")
        notes.append("layer_norm inside torch.func transforms runs in plain PyTorch operators")
    if "recompute" in changed and "layer_norm" in changed:
        notes.append("recompute: of no effect beside layer_norm, whose gates are kept")
    elif "recompute" in changed:
        notes.append("recompute: backward makes the gates again, by one product over all steps")
    if getattr(module, "hidden_sizes", None):
        notes.append(f"hidden sizes {list(module.hidden_sizes)}, layer by layer; what is said here is of the first")
    return tuple(notes)


def _note_lengths(
    module: nn.Module, input: Tensor | PackedSequence, lengths: Lengths, steps: int, batch: int
) -> str:
    if not hasattr(module, "num_layers"):
        raise TypeError("a tritlstm.LSTMCell knows no lengths, got some; leave them out")
    if isinstance(input, PackedSequence) or input.dim() != 3:
        got = "a PackedSequence" if isinstance(input, PackedSequence) else f"shape {list(input.shape)}"
        raise ValueError(f"lengths go with a batch [T, B, D] or [B, T, D], got {got}; leave them out")
    ends = functional.check_lengths(lengths, steps, batch)
    if functional.packs(input):
        return "the host reads the lengths, sorts and packs the batch, and leaves sequences of length 0 out"
    where = "are read" if ends.device == input.device else f"are copied from {ends.device} and read"
    return f"lengths {where} on {input.device}: no sorting, no packing, no copy to the host"


def _sizes(module: nn.Module, input: Tensor | PackedSequence) -> tuple[int, int]:
    if isinstance(input, PackedSequence):
        return len(input.batch_sizes), int(input.batch_sizes[0])
    if not hasattr(module, "num_layers"):
        return 1, input.shape[0] if input.dim() == 2 else 1
    if input.dim() == 2:
        return input.shape[0], 1
    steps, batch = (1, 0) if module.batch_first else (0, 1)
    return input.shape[steps], input.shape[batch]


def _kernels(
    module: Any,
    data: Tensor,
    device: plan.Device,
    sizes: dict[str, int],
    training: bool,
    beyond: list[str],
    precision: str,
    normed: bool = False,
) -> Explanation:
    length, batch, hidden = sizes["T"], sizes["B"], sizes["H"]
    emulation = emulator.current()
    overrides = {} if emulation is None else emulation.overrides

    def choices(chains: int, width: int, stacked: bool = False) -> list[KernelChoice]:
        found = []
        for direction in ("forward", "backward") if training else ("forward",):
            arguments = (direction, length, batch, width, data.dtype, device, precision, training)
            chosen = plan.recurrent(*arguments, overrides, chains, stacked, normed)
            found.append(KernelChoice(direction, chosen, plan.tiers(*arguments, chains, stacked, normed)))
        return found

    layers = getattr(module, "num_layers", 1)
    directions = 1 + bool(getattr(module, "bidirectional", False))
    heads = module.cell_options.num_heads if "num_heads" in beyond else 1
    together = heads if beyond == ["num_heads"] else 1 if beyond or _folds(module) else directions
    count, way = 1, "apart"
    dropped = layers > 1 and module.dropout > 0 and module.training
    if not (beyond or dropped or directions > 1 or _folds(module)):
        fixed = (hidden, data.dtype, device, precision, training, overrides)
        count = plan.next_layers(layers, length, batch, *fixed)
        way, chunks, _ = plan.together(length, batch, count, *fixed)
    try:
        if way == "wavefront":
            kernels = choices(count, hidden, stacked=True)
        else:
            kernels = choices(together, hidden // heads if together > 1 else hidden)
    except plan.PlanError:
        kernels, together = choices(1, hidden), 1
    one_by_one = directions if together == 1 or heads > 1 else 1
    name = "the layer" if layers * one_by_one == 1 else f"each of {layers} layer(s) x {one_by_one} direction(s)"
    if together > 1:
        name += f", its {heads} heads side by side" if heads > 1 else ", both directions side by side"
    if count > 1:
        name = f"{count} layers as a wavefront" if way == "wavefront" else f"{count} layers, each of them"
        name += f", the first of {layers}" if count < layers else ""
    gemm = plan.gate_gemm(length * batch, sizes["D"], hidden, data.dtype, device, precision)
    tile = f"{gemm.block_m} rows, {gemm.block_n} gates, {gemm.block_k} deep"
    notes = [f"predictions from {device.constants}", f"the product of input and weights in tiles of {tile}"]
    if way == "pipeline":
        notes.append(f"{chunks} chunks of time: a layer runs on one while the next layer runs on the one before")
    if layers * one_by_one > count:
        what = "layers and directions" if one_by_one > 1 else "layers"
        notes.append(f"{what} run one after another")
    if heads > 1 and together == 1:
        notes.append(f"num_heads={heads} runs as one w_hh with zeros outside the heads: {heads} times their products")
    if _folds(module):
        notes.append("projection is folded into w_hh, so the recurrence runs at the full width H")
    if training:
        notes.append("derivatives of a gradient and forward-mode ones run in plain PyTorch operators")
    if data.dtype == torch.float32:
        notes.append(f"fp32 products in {precision}, as torch.backends.cudnn.rnn.fp32_precision asks")
    where = f"{device.name} ({device.arch}, {device.sms} multiprocessors, {device.shared_bytes} bytes of shared memory)"
    return Explanation("kernels", "Triton kernels", where, sizes, name, tuple(kernels), tuple(notes))
