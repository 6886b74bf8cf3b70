"""The functional LSTM: layers, directions, dropout, projection, packing and states around one operator.

`lstm` is the public form; `apply` is what it and `tritlstm.LSTM` share. Data take one straight walk: unpack
or unsqueeze, check, run, undo. "Run" is `torch.ops.tritlstm.layer` (or, where nobody would see it, what it computes)
once per layer and direction where the Triton kernels run (`runs_kernels`) and where a training step on the CPU is
faster so, and torch's own fast LSTM everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import _VF, Tensor
from torch.nn.utils.rnn import PackedSequence

from . import aten, chain_ops, cpu, direct, ops, stack_ops
from .cell_options import CellOptions
from .ops import runs_kernels
from .variants import Extras, Resets

__all__ = ["lstm"]

Lengths = Tensor | Sequence[int]
_SHORT = (torch.float16, torch.bfloat16)
_CPU_DTYPES = (*ops.KERNEL_DTYPES, torch.float64)
States = tuple[Tensor, Tensor]
Input = TypeVar("Input", Tensor, PackedSequence)


def lstm(
    input: Input,
    hx: States | None,
    params: Sequence[Tensor],
    *,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    lengths: Lengths | None = None,
    resets: Resets | None = None,
) -> tuple[Input, States]:
    """Apply an LSTM of one or more layers to whole sequences; `torch.nn.LSTM` as a function.

    T time steps, B batch, D input size, H hidden size, R the recurrent width (the projection's size, or H
    where there is none), L layers, S directions (1 or 2). Gate order i, f, g, o.

    Args:
        input: [T, B, D], [B, T, D] with `batch_first`, [T, D] without a batch, or a `PackedSequence`.
            float16, bfloat16, float32 or float64.
        hx: initial states (h_0 [L S, B, R], c_0 [L S, B, H]), without B where the input has none; None for
            zeros. For a packed input they are in the order of the batch before packing.
        params: the weights in the order of `torch.nn.LSTM(...).parameters()`: for each layer, and in it for
            each direction, w_ih [4H, D] (from the second layer on [4H, S R]), w_hh [4H, R], then b_ih and
            b_hh [4H] if there are biases, then w_hr [R, H] if there is a projection. The number of layers,
            the biases and the projection follow from the shapes.
        bidirectional: every layer also walks from the end to the start, with weights of its own.
        batch_first: the input and the output are [B, T, ...]; the states keep their order.
        dropout: probability with which an element of a layer's output is zeroed on its way to the next layer.
        training: whether dropout acts. On the CPU, without it, results and gradients are torch.nn.LSTM's to the bit
            (not so under autocast and in float16, which are computed in float32 and rounded at the end);
            with it, and a gradient to come, the steps that `tritlstm.cpu` computes faster may differ in the last bits.
        lengths: [B] integers from 0 to T, a tensor on any device or a sequence of ints, in any order; None for T
            everywhere. Outputs at positions t >= lengths[b] are zero, the reverse direction starts at a
            sequence's own end, h_n and c_n are the states there (a sequence of length 0 keeps its initial
            ones), and the padding has no influence and gets no gradient, whatever it holds. On the CPU values
            out of range raise. A tensor on another device is not read by the host, which would wait for the
            device: there values below 0 count as 0 and values above T as T; so they do where torch.compile,
            torch.export or a torch.func transform traces the call.
        resets: bool, a tensor or nested sequences, [T, B], [B, T] with `batch_first`, [T] without a batch, always
            [T, B] of the batch before packing beside a `PackedSequence`: the state h and c is zeroed before step t,
            as where an episode ends. It parts steps t - 1 and t in both directions, so the outputs are those of the
            parts run one by one from zeros; `resets[0]` replaces `hx`, but not the reverse direction's.

    Returns:
        The output [T, B, S R] (or in the form of the input), and (h_n [L S, B, R], c_n [L S, B, H]), all of
        the input's dtype; under autocast of the autocast dtype.

    Raises:
        ValueError: a parameter, the input's number of dimensions, its dtype, `dropout` or `lengths` is wrong, or
            `lengths` come with an input without a batch or a packed one.
        RuntimeError: the input's or a state's sizes do not fit the parameters; in torch.nn.LSTM's words.

    Example:
        >>> weights = list(torch.nn.LSTM(10, 20, num_layers=2).parameters())
        >>> x = torch.randn(5, 3, 10)
        >>> out, (h_n, c_n) = tritlstm.lstm(x, None, weights)
        >>> out.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))

    Source: Hochreiter & Schmidhuber (1997), with the forget gate of Gers, Schmidhuber & Cummins (2000) and
    the projection of Sak, Senior & Beaufays (2014).
    """
    weights = list(params)
    if isinstance(dropout, bool) or not 0 <= dropout <= 1:
        raise ValueError(
            "dropout should be a number in range [0, 1] representing the probability of an element being "
            f"zeroed, got {dropout!r}"
        )
    shape = _infer(weights, 2 if bidirectional else 1)
    options = Options(*shape, batch_first, float(dropout), training, bidirectional)
    extras = None
    if resets is not None:
        extras = Extras(CellOptions(), training, [{}] * options.num_layers * (2 if bidirectional else 1), resets)
    return apply(input, hx, weights, options, lengths, extras)


class Options(NamedTuple):
    """What an LSTM is, apart from its weights; the fields are those of `torch.nn.LSTM`."""

    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    training: bool
    bidirectional: bool


def apply(
    input: Input,
    hx: States | None,
    weights: list[Tensor],
    options: Options,
    lengths: Lengths | None = None,
    extras: Extras | None = None,
) -> tuple[Input, States]:
    """`lstm` on weights whose shapes are known to be right; `extras` are what a variant or resets add."""
    if isinstance(input, PackedSequence):
        if lengths is not None:
            raise ValueError("a PackedSequence brings its lengths with it, got lengths too; leave one of them out")
        packed = _apply_packed_untraced if torch.compiler.is_compiling() else _apply_packed
        return packed(input, hx, weights, options, extras)
    if input.dim() not in (2, 3):
        raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
    batch_dim = 0 if options.batch_first else 1
    batched = input.dim() == 3
    x = input if batched else input.unsqueeze(batch_dim)
    if hx is None:
        hx = _zero_states(x, x.size(batch_dim), options)
    elif hx[0].dim() != input.dim() or hx[1].dim() != input.dim():
        raise RuntimeError(
            f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, hx and cx should "
            f"also be {input.dim()}-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
        )
    elif not batched:
        hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
    _check(x, x.size(batch_dim), hx, weights, options)
    if extras is not None:
        extras = extras.laid_out(x, batch_dim, batched)
    if lengths is None:
        out, h_n, c_n = _run(x, None, hx, weights, options, extras)
    elif batched:
        ends = check_lengths(lengths, x.size(1 - batch_dim), x.size(batch_dim))
        out, h_n, c_n = _run_lengths(x, ends, hx, weights, options, extras)
    else:
        raise ValueError(
            f"lengths go with a batch, got an input of shape {list(input.shape)} without one; "
            "cut the sequence to its length, or add the batch dimension with unsqueeze"
        )
    if batched:
        return out, (h_n, c_n)
    return out.squeeze(batch_dim), (h_n.squeeze(1), c_n.squeeze(1))


def apply_sizes(
    input: Any,
    hx: Any,
    weights: list[Tensor],
    options: Options,
    sizes: Sequence[int],
    lengths: Lengths | None = None,
    extras: Extras | None = None,
) -> tuple[Any, Any]:
    """`apply` for layers of different `sizes`: one call after another. The states are lists of [S, B, H_k]."""
    directions = 2 if options.bidirectional else 1
    each = directions * (2 + 2 * options.bias)
    if hx is not None and not (len(hx) == 2 and len(hx[0]) == len(hx[1]) == len(sizes)):
        raise RuntimeError(
            f"Expected hx to be a pair of lists with a state for each of the {len(sizes)} layers, got "
            f"{[len(state) for state in hx]}"
        )
    h_n, c_n, below = [], [], options.input_size
    for layer, size in enumerate(sizes):
        if layer > 0 and options.dropout > 0 and options.training:
            if isinstance(input, PackedSequence):
                input = input._replace(data=F.dropout(input.data, options.dropout))
            else:
                input = F.dropout(input, options.dropout)
        own = options._replace(input_size=below, hidden_size=size, num_layers=1, dropout=0.0)
        first = layer * directions
        added = extras and extras._replace(weights=extras.weights[first : first + directions], first=first)
        states = None if hx is None else (hx[0][layer], hx[1][layer])
        input, (h, c) = apply(input, states, weights[layer * each : (layer + 1) * each], own, lengths, added)
        h_n.append(h)
        c_n.append(c)
        below = directions * size
    return input, (h_n, c_n)


def apply_cell(
    x: Tensor, hx: States, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> States:
    """One time step on the Triton kernels: x [B, D] and (h, c) [B, H] to the next (h, c)."""
    _check_cell(x, hx, w_ih, w_hh)
    _, h_n, c_n = _layer(x.unsqueeze(0), w_ih, w_hh, b_ih, b_hh, None, *hx, None, False)
    return h_n, c_n


def _apply_packed(
    input: PackedSequence, hx: States | None, weights: list[Tensor], options: Options, extras: Extras | None = None
) -> tuple[PackedSequence, States]:
    x, batch_sizes, order, undo = input
    batch = int(batch_sizes[0])
    if hx is None:
        hx = _zero_states(x, batch, options)
    _check(x, batch, hx, weights, options, dim=2)
    if extras is not None:
        extras = extras.packed(x, len(batch_sizes), batch)
        # In the order before packing, which decides the places of random bits and of what a trace keeps.
        out, h_n, c_n = _run_operators(x, batch_sizes, hx, weights, options, extras, order)
        return PackedSequence(out, batch_sizes, order, undo), (h_n, c_n)
    out, h_n, c_n = _run(x, batch_sizes, _permute(hx, order), weights, options)
    return PackedSequence(out, batch_sizes, order, undo), _permute((h_n, c_n), undo)


# The sizes of a packed batch are data on the host, which can't be traced: a graph break, as in nn.LSTM.
_apply_packed_untraced = torch._disable_dynamo(_apply_packed)


def _permute(hx: States, order: Tensor | None) -> States:
    return hx if order is None else (hx[0].index_select(1, order), hx[1].index_select(1, order))


def _zero_states(x: Tensor, batch: int, options: Options) -> States:
    rows = options.num_layers * (2 if options.bidirectional else 1)
    width = options.proj_size or options.hidden_size
    h = torch.zeros(rows, batch, width, dtype=x.dtype, device=x.device)
    if not options.proj_size:
        return h, h  # nobody writes to it
    return h, torch.zeros(rows, batch, options.hidden_size, dtype=x.dtype, device=x.device)


def _run(
    x: Tensor,
    batch_sizes: Tensor | None,
    hx: States,
    weights: list[Tensor],
    options: Options,
    extras: Extras | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if extras is None and short_on_cpu(x, batch_sizes is not None):
        return _in_float32(_run, x, batch_sizes, hx, weights, options)
    # What torch's own LSTM does not have runs in the operators everywhere.
    if (
        extras is not None
        or runs_operators(x)
        or (batch_sizes is None and _unrolls(x, options))
        or _trains_explicitly(x, batch_sizes, hx, weights, options)
    ):
        return _run_operators(x, batch_sizes, hx, weights, options, extras)
    settings = (options.bias, options.num_layers, options.dropout, options.training, options.bidirectional)
    if batch_sizes is None:
        return _VF.lstm(x, hx, weights, *settings, options.batch_first)
    return _VF.lstm(x, batch_sizes, hx, weights, *settings)


def _trains_explicitly(
    x: Tensor, batch_sizes: Tensor | None, hx: States, weights: list[Tensor], options: Options
) -> bool:
    """Whether this is a training step that `tritlstm.cpu` computes faster than torch's own LSTM."""
    # In evaluation the numbers stay torch's, whether or not autograd is on.
    if not options.training or (batch_sizes is None and cpu.small(options.input_size, options.hidden_size)):
        return False  # asked in every call: what is quick comes first
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return explicit_pays(x, batch_sizes, options) and any(tensor.requires_grad for tensor in (x, *hx, *weights))


def explicit_pays(x: Tensor, batch_sizes: Tensor | None, options: Options) -> bool:
    """Whether `tritlstm.cpu` would train faster on `x` than torch's own LSTM."""
    if not x.is_cpu:
        return False
    if batch_sizes is None:
        steps, batch = x.size(int(options.batch_first)), x.size(1 - int(options.batch_first))
        pays = cpu.few_rows_pay(steps, batch, x, options.input_size, options.hidden_size)
    else:
        pays = cpu.packed_pays(batch_sizes)
    return pays and not options.proj_size and x.dtype in _CPU_DTYPES and not torch.is_autocast_enabled("cpu")


def runs_operators(x: Tensor) -> bool:
    """Whether `torch.ops.tritlstm.layer` runs, and not torch's own LSTM."""
    return runs_kernels(x) or _compiles_training(x) or transforms(x)


def short_on_cpu(x: Tensor, packed: bool) -> bool:
    """Whether this is 16-bit work on the CPU that runs in float32: under autocast, where torch's own LSTM would round
    the cell state at every step; and of float16 modules, which is faster too. Not of bfloat16 modules, which oneDNN
    multiplies in hardware."""
    # Asked in every call.
    if not torch._C._is_any_autocast_enabled():
        return x.dtype == torch.float16 and x.is_cpu and not runs_kernels(x)
    # Under autocast torch computes packed data in float32 anyway, and returns them so.
    if packed and x.dtype not in _SHORT:
        return False
    return x.is_cpu and _dtype_of_results(x) in _SHORT and not runs_kernels(x)


def _in_float32(
    run: Callable[..., tuple[Tensor, Tensor, Tensor]],
    x: Tensor,
    extents: Tensor | None,
    hx: States,
    weights: list[Tensor],
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """`run` with the states in float32 throughout; its results are rounded once."""
    _check_tensors(x, hx, weights)
    dtype = _dtype_of_results(x)
    with aten.without_autocast("cpu"):
        wide = [t.float() for t in (x, *hx, *weights)]
        out, h_n, c_n = run(wide[0], extents, (wide[1], wide[2]), wide[3:], options)
    return out.to(dtype), h_n.to(dtype), c_n.to(dtype)


def _unrolls(x: Tensor, options: Options) -> bool:
    # Traced, torch's own LSTM is its loop over time, unrolled, which fixes T (but for oneDNN's in compiled
    # inference); the operators leave T open.
    if torch.compiler.is_exporting():
        return isinstance(x.size(int(options.batch_first)), torch.SymInt)
    fixed = options.proj_size > 0 or x.dtype == torch.float64
    return fixed and torch.compiler.is_compiling() and x.device.type in ("cpu", "cuda")


def transforms(x: Tensor) -> bool:
    """Whether vmap or forward mode is on, which torch's own LSTM and LSTMCell do not know, or not in float32."""
    # Asked in every call, where it is almost always false: the quick questions come first.
    if torch.compiler.is_compiling() or not (torch._C._are_functorch_transforms_active() or ops.forward_mode()):
        return False
    if x.device.type not in ("cpu", "cuda", "meta"):
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return ops.forward_mode() or any(level.key() != torch._C._functorch.TransformType.Grad for level in stack)


def check_lengths(lengths: Lengths, steps: int, batch: int) -> Tensor:
    """`lengths` as an integer tensor [B]; values are checked where the host has them already."""
    if not isinstance(lengths, Tensor):
        if not hasattr(lengths, "__len__"):
            raise ValueError(f"lengths must be a tensor or a sequence of ints, one for each sequence, got {lengths!r}")
        # On the host, whatever torch's default device is: there the values are checked.
        lengths = torch.as_tensor(lengths if len(lengths) > 0 else torch.zeros(0, dtype=torch.int64), device="cpu")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be integers, got {lengths.dtype}; convert them, as by lengths.long()")
    if lengths.shape != (batch,):
        raise ValueError(
            f"lengths must have one value for each of the B = {batch} sequences, shape [{batch}], got shape "
            f"{list(lengths.shape)}; see also batch_first"
        )
    if lengths.is_cpu and not _traced():
        for b, n in enumerate(lengths.tolist()):
            if not 0 <= n <= steps:
                raise ValueError(f"lengths must lie between 0 and T = {steps}, got lengths[{b}] = {n}")
    return lengths


def _traced() -> bool:
    """Whether a compiler or a torch.func transform looks on, so that no value may be read."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def packs(x: Tensor) -> bool:
    """Whether a batch with lengths runs as packed data in torch's own LSTM, for which the host reads the lengths."""
    return not (x.is_cuda or x.is_meta or runs_operators(x) or _traced())


def _run_lengths(
    x: Tensor,
    lengths: Tensor,
    hx: States,
    weights: list[Tensor],
    options: Options,
    extras: Extras | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch_dim = 0 if options.batch_first else 1
    _check_steps(x.size(1 - batch_dim))
    if extras is None and short_on_cpu(x, packed=False):
        return _in_float32(_run_lengths, x, lengths, hx, weights, options)
    direct = extras is not None or not packs(x)
    if direct or (options.training and _trains_explicitly(x, batch_sizes_of(lengths), hx, weights, options)):
        steps = x.transpose(0, 1) if options.batch_first else x
        ends = lengths.long().clamp(0, steps.size(0)).to(x.device, torch.int32, non_blocking=True)
        # The recurrence skips the padding, but the product of w_ih's gradient would meet a NaN or an infinity in it.
        inside = torch.arange(steps.size(0), device=x.device)[:, None] < ends
        steps = torch.where(inside[..., None], steps, 0)
        out, h_n, c_n = run_layers(steps, ends, hx, weights, options, extras)
        return out.transpose(0, 1) if options.batch_first else out, h_n, c_n
    lengths, order = lengths.cpu().long().clamp(0, x.size(1 - batch_dim)).sort(descending=True)
    count = int((lengths > 0).sum())  # packed data have no sequences of length 0: they are left out
    order, shape = order[:count].to(x.device), (*x.shape[:2], out_width(options))
    dtype = _dtype_of_results(x)
    if count == 0:
        return x.new_zeros(shape, dtype=dtype), hx[0].to(dtype, copy=True), hx[1].to(dtype, copy=True)
    data, batch_sizes = _VF._pack_padded_sequence(
        x.index_select(batch_dim, order), lengths[:count], options.batch_first
    )
    data, h, c = _run(data, batch_sizes, _permute(hx, order), weights, options)
    out, _ = _VF._pad_packed_sequence(data, batch_sizes, options.batch_first, 0.0, x.size(1 - batch_dim))
    out = x.new_zeros(shape, dtype=dtype).index_copy(batch_dim, order, out.to(dtype))
    h_n, c_n = (old.to(dtype).index_copy(1, order, new.to(dtype)) for old, new in zip(hx, (h, c), strict=True))
    return out, h_n, c_n


def batch_sizes_of(lengths: Tensor) -> Tensor:
    """`batch_sizes` of the `PackedSequence` of a batch with such lengths [B], on the CPU."""
    ends = lengths.cpu()
    return (ends[:, None] > torch.arange(int(ends.max()) if ends.numel() else 0, device="cpu")).sum(0)


def out_width(options: Options) -> int:
    return (options.proj_size or options.hidden_size) * (2 if options.bidirectional else 1)


def _dtype_of_results(x: Tensor) -> torch.dtype:
    # Some devices, as meta, have no autocast to ask for.
    if not torch._C._is_any_autocast_enabled() or x.dtype == torch.float64 or not x.is_floating_point():
        return x.dtype
    device = x.device.type
    return torch.get_autocast_dtype(device) if aten.autocasts(device) else x.dtype


def _compiles_training(x: Tensor) -> bool:
    # torch's own LSTM can't be compiled for training: oneDNN's backward loses its workspace when it is traced
    # (pytorch#158007), and without oneDNN the loop over time is unrolled. The operators stay opaque.
    compiles = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return compiles and torch.is_grad_enabled() and x.device.type in ("cpu", "cuda")


def _run_operators(
    x: Tensor,
    batch_sizes: Tensor | None,
    hx: States,
    weights: list[Tensor],
    options: Options,
    extras: Extras | None = None,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`order` are the places of packed sequences in the batch that ``hx`` has; None where they lie in its order."""
    if batch_sizes is not None and x.is_cpu and not runs_kernels(x):
        return _run_packed_rows(x, batch_sizes, hx, weights, options, extras, order)
    if batch_sizes is not None:
        x, lengths = _VF._pad_packed_sequence(x, batch_sizes, False, 0.0, batch_sizes.size(0))
        on_device = lengths.to(x.device, torch.int32, non_blocking=True)
        if order is not None:
            undo = order.argsort()
            x, on_device = x.index_select(1, undo), on_device.index_select(0, undo)
        out, h_n, c_n = run_layers(x, on_device, hx, weights, options, extras)
        if order is not None:
            out = out.index_select(1, order)
        return _VF._pack_padded_sequence(out, lengths, False)[0], h_n, c_n
    if options.batch_first:
        out, h_n, c_n = run_layers(x.transpose(0, 1), None, hx, weights, options, extras)
        return out.transpose(0, 1), h_n, c_n
    return run_layers(x, None, hx, weights, options, extras)


def _run_packed_rows(
    x: Tensor,
    batch_sizes: Tensor,
    hx: States,
    weights: list[Tensor],
    options: Options,
    extras: Extras | None,
    order: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed data by one copy each way, where `pad_packed_sequence` has one a step, each with a node of autograd."""
    steps, batch = len(batch_sizes), int(batch_sizes[0])
    each = torch.arange(batch, device="cpu")
    inside = batch_sizes[:, None] > each
    rows = (torch.arange(steps, device="cpu")[:, None] * batch + (each if order is None else order))[inside]
    padded = x.new_zeros(steps * batch, x.size(1)).index_copy(0, rows, x).unflatten(0, (steps, batch))
    lengths = inside.sum(0, dtype=torch.int32)
    if order is not None:
        lengths = torch.empty_like(lengths).index_copy_(0, order, lengths)
    out, h_n, c_n = run_layers(padded, lengths, hx, weights, options, extras, rows)
    return out.flatten(0, 1).index_select(0, rows), h_n, c_n


def run_layers(
    x: Tensor,
    lengths: Tensor | None,
    hx: States,
    weights: list[Tensor],
    options: Options,
    extras: Extras | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All layers and directions over x [T, B, D]; `rows` are the places in [T B] that dropout draws for."""
    _check_tensors(x, hx, weights)
    _check_steps(x.size(0))
    dtype = _dtype_of_results(x)
    if x.dtype != dtype:
        x = x.to(dtype)  # as autocast would in the operators: what runs together is planned by the dtype
    if extras is None and _direct(x, lengths, hx, weights, options):
        return direct.run(x, lengths, hx, weights, options.bias)
    directions = 2 if options.bidirectional else 1
    each = 2 + 2 * options.bias + (options.proj_size > 0)
    states: list[States] = []
    done = 0  # layers that went along with an earlier one
    for layer in range(options.num_layers):
        if layer < done:
            continue
        if layer > 0 and options.dropout > 0 and options.training:
            x = _dropout(x, options.dropout, rows)
        count = _together(x, options, options.num_layers - layer, extras)
        if count > 1:
            done = layer + count
            groups = [weights[k * each : (k + 1) * each] for k in range(layer, done)]
            h0, c0 = (state[layer:done] for state in hx)
            x, h, c = _stacked(x, groups, h0, c0, lengths)
            states.extend(zip(h.unbind(), c.unbind(), strict=True))
            continue
        both = range(layer * directions, (layer + 1) * directions)
        if directions == 2 and _side_by_side(x, options, extras):
            group = weights[both.start * each : both.stop * each]
            h0, c0 = (state[both.start : both.stop] for state in hx)
            x, h, c = _both_directions(x, group[:each], group[each:], h0, c0, lengths)
            states.extend(zip(h.unbind(), c.unbind(), strict=True))
            continue
        outs = []
        for k in both:
            group = weights[k * each : (k + 1) * each]
            w_ih, w_hh = group[:2]
            b_ih, b_hh = group[2:4] if options.bias else (None, None)
            w_hr = group[-1] if options.proj_size else None
            reverse = k % directions == 1
            run = ops.layer if extras is None else extras.operator(k)
            out, h, c = _layer(x, w_ih, w_hh, b_ih, b_hh, w_hr, hx[0][k], hx[1][k], lengths, reverse, run)
            outs.append(out)
            states.append((h, c))
        x = outs[0] if directions == 1 else torch.cat(outs, -1)
    h_n, c_n = zip(*states, strict=True)
    return x, _joined(h_n), _joined(c_n)


def _direct(x: Tensor, lengths: Tensor | None, hx: States, weights: list[Tensor], options: Options) -> bool:
    """Whether kernels run one layer of one direction after another, and nobody would see their operators."""
    if torch.compiler.is_compiling() or options.bidirectional or options.proj_size:
        return False
    if (options.dropout > 0 and options.training) or not ops.launches(x):
        return False
    return ops.unseen(x, lengths, *hx, *weights) and _together(x, options, options.num_layers, None) == 1


def _joined(states: tuple[Tensor, ...]) -> Tensor:
    """A new dimension of all, which nobody else uses; a single one is not copied, nor made a view, which has limits."""
    if len(states) == 1 and not torch.compiler.is_compiling():
        (state,) = states
        if not state.requires_grad and ops.unseen(state):
            return state.unsqueeze_(0)
    return torch.stack(states)


def _dropout(x: Tensor, p: float, rows: Tensor | None) -> Tensor:
    if rows is None:
        return F.dropout(x, p)
    flat = x.flatten(0, 1)  # the numbers that torch draws for packed data
    return flat.index_copy(0, rows, F.dropout(flat.index_select(0, rows), p)).view_as(x)


def _together(x: Tensor, options: Options, layers: int, extras: Extras | None) -> int:
    """How many of the next ``layers`` the kernels run at once."""
    dropped = options.dropout > 0 and options.training
    if extras is not None or options.proj_size or options.bidirectional or dropped or layers < 2:
        return 1
    return stack_ops.next_layers(x, layers, options.hidden_size, torch.is_grad_enabled())


def _stacked(
    x: Tensor, groups: list[list[Tensor]], h0: Tensor, c0: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    w_ih, w_hh, *biases = zip(*groups, strict=True)
    b_ih, b_hh = (torch.stack(b) for b in biases) if biases else (None, None)
    between = torch.stack(w_ih[1:])
    out, h_n, c_n, *_ = stack_ops.stack(x, w_ih[0], between, torch.stack(w_hh), b_ih, b_hh, h0, c0, lengths)
    return out, h_n, c_n.to(h_n.dtype)


def _side_by_side(x: Tensor, options: Options, extras: Extras | None) -> bool:
    """Whether the kernels run both directions of a layer at once."""
    if extras is not None or options.proj_size:
        return False
    return chain_ops.pays(x, 2, options.hidden_size, torch.is_grad_enabled())


def _both_directions(
    x: Tensor, forward: list[Tensor], backward: list[Tensor], h0: Tensor, c0: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    w_ih, w_hh, *biases = (torch.stack(pair) for pair in zip(forward, backward, strict=True))
    b_ih, b_hh = biases or (None, None)
    out, h_n, c_n, _, _ = chain_ops.chains(x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, 1)
    return out, h_n, c_n.to(h_n.dtype)


def _layer(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    reverse: bool,
    run: Callable[..., ops.Results] = ops.layer,
) -> tuple[Tensor, Tensor, Tensor]:
    if w_hr is None:
        out, h_n, c_n, _, _ = run(x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse)
        return out, h_n, c_n.to(h_n.dtype)
    # The kernels know no projection, and need none. With m_t = o_t tanh(c_t) the projected state is
    # h_t = W_hr m_t, so what the gates receive from it is W_hh h_{t-1} = (W_hh W_hr) m_{t-1}: a layer without
    # projection, whose state is m. Only the first step has no m before it; there W_hh h_0 is added as it is.
    gate0 = F.linear(h0, w_hh)
    m0 = torch.zeros_like(c0, dtype=h0.dtype)
    m, m_n, c_n, _, _ = run(x, w_ih, _multiply(w_hh, w_hr), b_ih, b_hh, m0, c0, lengths, reverse, gate0=gate0)
    h_n = F.linear(m_n, w_hr)
    if lengths is not None:  # a sequence of no steps keeps the state it came with
        h_n = torch.where((lengths == 0)[:, None], h0, h_n)
    return F.linear(m, w_hr), h_n, c_n.to(m_n.dtype)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, rounded once: the product is used at every time step, so it is not left to autocast."""
    wide = aten.state_dtype(a.dtype)
    with aten.without_autocast(a.device.type):
        return (a.to(wide) @ b.to(wide)).to(a.dtype)


def _check(x: Tensor, batch: int, hx: States, weights: list[Tensor], options: Options, dim: int = 3) -> None:
    """The checks of torch.nn.LSTM in its words; it leaves them out where the input is packed."""
    dtype = weights[0].dtype
    if x.dtype != dtype and not torch._C._is_any_autocast_enabled():
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({dtype}). "
            f"Convert input: input.to({dtype}), or convert model: model.to({x.dtype})"
        )
    if x.dim() != dim:
        raise RuntimeError(f"input must have {dim} dimensions, got {x.dim()}")
    if x.size(-1) != options.input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {options.input_size}, got {x.size(-1)}"
        )
    rows = options.num_layers * (2 if options.bidirectional else 1)
    for k, width in enumerate((options.proj_size or options.hidden_size, options.hidden_size)):
        expected = (rows, batch, width)
        if hx[k].size() != expected:
            raise RuntimeError(f"Expected hidden[{k}] size {expected}, got {list(hx[k].size())}")


#: As torch's errors name them.
_TORCHS_NAMES = {
    torch.float16: "Half", torch.bfloat16: "BFloat16", torch.float32: "Float", torch.float64: "Double",
    torch.int32: "Int", torch.int64: "Long",
}  # fmt: skip


_CPP_NAMES = {
    torch.float16: "c10::Half", torch.bfloat16: "c10::BFloat16", torch.float32: "float", torch.float64: "double",
    torch.int32: "int", torch.int64: "long int",
}  # fmt: skip


def _check_tensors(x: Tensor, hx: Any, weights: list[Tensor]) -> None:
    """What torch's own LSTM checks where it runs, so that the operators must; in the words it has for CUDA."""
    if isinstance(hx, Tensor):
        raise TypeError(
            "lstm() received an invalid combination of arguments - got (Tensor, Tensor, list, ...); hx must be a tuple "
            f"of two tensors, (h_0, c_0), got one tensor of shape {list(hx.shape)}"
        )
    if len(hx) != 2:
        raise RuntimeError("lstm expects two hidden states")
    device, dtype = x.device, _dtype_of_results(x)
    # Asked in every call, where it is almost always so.
    if dtype == x.dtype and all(t.dtype == dtype and t.device == device for t in (*hx, *weights)):
        return
    for name, tensors in (("hidden", hx), ("parameter", weights)):
        for t in tensors:
            if t.device != device:
                raise RuntimeError(
                    f"Input and {name} tensors are not at the same device, found input tensor at {device} and {name} "
                    f"tensor at {t.device}"
                )
            if _dtype_of_results(t) != dtype:
                raise RuntimeError(
                    f"Input and {name} tensors are not the same dtype, found input tensor with {_torchs_name(x)} and "
                    f"{name} tensor with {_torchs_name(t)}"
                )


def _torchs_name(x: Tensor) -> str:
    return _TORCHS_NAMES.get(x.dtype, str(x.dtype))


def _check_steps(steps: int) -> None:
    if steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")  # torch.nn.LSTM's words


def _check_cell(x: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor) -> None:
    """The checks of torch.nn.LSTMCell in its words."""
    if not isinstance(hx, (tuple, list)):
        got = type(hx).__name__
        raise TypeError(f"lstm_cell(): argument 'hx' (position 2) must be tuple of Tensors, not {got}")
    if len(hx) != 2:
        raise RuntimeError("lstm_cell expects two hidden states")
    if x.size(1) != w_ih.size(1):
        raise RuntimeError(f"input has inconsistent input_size: got {x.size(1)} expected {w_ih.size(1)}")
    for k, state in enumerate(hx):
        if x.size(0) != state.size(0):
            raise RuntimeError(
                f"Input batch size {x.size(0)} doesn't match hidden{k} batch size {state.size(0)}"
            )
        if state.size(1) != w_hh.size(1):
            raise RuntimeError(
                f"hidden{k} has inconsistent hidden_size: got {state.size(1)}, expected {w_hh.size(1)}"
            )
    for t in (*hx, w_ih, w_hh):
        if t.device != x.device:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, {x.device} and "
                f"{t.device}!"
            )
    for a, b in ((x, w_ih), (hx[0], w_hh)):
        if _dtype_of_results(a) != _dtype_of_results(b):
            # torch's cell is one `linear` a product on the CPU, and a `matmul` on CUDA, which has words of its own.
            if x.is_cuda:
                names = f"{_CPP_NAMES.get(a.dtype, a.dtype)} != {_CPP_NAMES.get(b.dtype, b.dtype)}"
                raise RuntimeError(f"expected mat1 and mat2 to have the same dtype, but got: {names}")
            raise RuntimeError(
                f"mat1 and mat2 must have the same dtype, but got {_torchs_name(a)} and {_torchs_name(b)}"
            )
    if _dtype_of_results(hx[1]) != _dtype_of_results(x):
        raise RuntimeError(f"expected scalar type {_torchs_name(x)} but found {_torchs_name(hx[1])}")


def _infer(params: list[Tensor], directions: int) -> tuple[int, int, int, int, bool]:
    """input_size, hidden_size, proj_size, num_layers and bias, from the shapes of all parameters."""
    if len(params) < 2 or params[0].dim() != 2 or params[1].dim() != 2 or params[0].size(0) % 4:
        raise ValueError(
            "params must begin with w_ih [4H, D] and w_hh [4H, R], got shapes "
            f"{[list(p.shape) for p in params[:2]]}; pass list(module.parameters()) of an LSTM"
        )
    (rows, input_size), width = params[0].shape, params[1].size(1)
    hidden_size = rows // 4
    bias = len(params) > 2 and params[2].dim() == 1
    proj_size = 0 if width == hidden_size else width
    one: list[tuple[int, ...]] = [(rows, input_size), (rows, width)]
    one += [(rows,)] * 2 * bias + [(width, hidden_size)] * (proj_size > 0)
    num_layers, rest = divmod(len(params), len(one) * directions)
    if rest or num_layers == 0:
        raise ValueError(
            f"params must hold {len(one)} tensors for each layer and direction, so a multiple of "
            f"{len(one) * directions}, got {len(params)}; check bidirectional (now {directions == 2})"
        )
    above = [(rows, directions * width), *one[1:]]
    expected = one * directions + above * directions * (num_layers - 1)
    for k, (param, shape) in enumerate(zip(params, expected, strict=True)):
        if param.shape != shape:
            raise ValueError(
                f"params[{k}] must have shape {list(shape)}, got {list(param.shape)}; the tensors before it "
                f"say hidden_size = {hidden_size}, proj_size = {proj_size}, bias = {bias}, "
                f"bidirectional = {directions == 2}"
            )
    return input_size, hidden_size, proj_size, num_layers, bias
