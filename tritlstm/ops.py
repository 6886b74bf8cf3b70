"""The operators `torch.ops.tritlstm.layer` and `torch.ops.tritlstm.layer_backward`.

One layer, one direction, all time steps in one call, opaque to the compiler. On CUDA tensors of float16,
bfloat16 and float32 the Triton kernels run (`tritlstm.layer`), and so they do on CPU tensors inside
`tritlstm.emulator.emulate()`; everywhere else the same formula in plain PyTorch operators (`tritlstm.aten`).
Importing this module registers them (as using `tritlstm.LSTM` or `tritlstm.lstm` does).

    layer(x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, save, gate0=None)
        -> (out, h_n, c_n, gates, cells)
    layer_backward(grad_out, grad_h_n, grad_c_n, x, w_ih, w_hh, h0, c0, lengths, out, gates, cells,
                   reverse, needs)
        -> (grad_x, grad_w_ih, grad_w_hh, grad_b, grad_h0, grad_c0, grad_gate0)

T time steps, B batch, D input size, H hidden size, HX = H rounded up to a multiple of 8; gates i, f, g, o.

    x        [T, B, D]   any float dtype, which w_ih, w_hh, b_ih, b_hh, h0 and gate0 share
    w_ih     [4H, D]     w_hh [4H, H]    b_ih, b_hh [4H] or None (independently)
    h0       [B, H]      c0   [B, H], which may be wider than x, to carry a float32 cell from call to call
    lengths  [B] int32 of values 0 to T, or None. Positions t >= lengths[b] give zeros and leave the state as
             it was; in reverse a sequence starts at its own end; h_n and c_n are the states at its own end
    reverse  walk the time steps from the last to the first
    save     return what backward needs; switched on by itself where autograd records
    gate0    [B, 4H] or None, added to the gates before activation at each sequence's first processed step
    out      [T, B, H]   h_n [B, H], of x's dtype    c_n [B, H], of c0's dtype
    gates    [T, B, 4 HX] of x's dtype, after activation; gate k of unit u in column 4 u + k
    cells    [T, B, HX]  float32 (float64 for float64 inputs). Both are finite, but without meaning, in units
             beyond H and steps beyond a sequence's end, and empty(0) where nothing is saved
    needs    seven flags, one per result; a result not needed is empty(0). grad_b [4H] is that of either bias

Wrong arguments raise ValueError with the value received. Derivatives of every order of `layer`: the Triton kernels
compute results and first gradients; derivatives of a gradient (only when they are asked for) and forward-mode
derivatives are computed by the plain operators, on any device, from the inputs anew. `torch.func.vmap` adds the
mapped dimension to the batch (`tritlstm.batching`). Under autocast every tensor except c0 and lengths is cast to the
autocast dtype; the cell state stays float32.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import aten, batching, cpu

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def runs_kernels(x: Tensor) -> bool:
    """Whether operators on `x` run the Triton kernels."""
    return (x.is_cuda or (_emulating() and x.is_cpu)) and x.dtype in KERNEL_DTYPES


def layer(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None = None,
    reverse: bool = False,
    save: bool = False,
    gate0: Tensor | None = None,
) -> Results:
    """`torch.ops.tritlstm.layer`, which also works inside `torch.func.grad` and `torch.func.vmap`."""
    args = (x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse)
    if not torch.compiler.is_compiling() and unseen(*args, gate0):
        return run_unseen(_forward, _RecordedLayer, (*args, save, gate0), -2)
    if not torch.compiler.is_compiling() and forward_mode() and not aten.autocasts(x.device.type):
        return _plain_forward(*args, True, gate0)
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return _layer(*args, save, gate0)
    # A torch.func transform must meet the Function itself, not an operator that hides it.
    if aten.autocasts(x.device.type):
        return _forward_autocast(*args, save, gate0)
    return _Layer.apply(*args, True, gate0)


#: Names of the dispatch keys that a tensor has if only its device and autograd ask for it.
_PLAIN_KEYS = frozenset(
    ("CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA", "BackendSelect")
)
_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int))
_keys_of = torch._C._dispatch_keys
_keys_included = torch._C._dispatch_tls_local_include_set
_keys_excluded = torch._C._dispatch_tls_local_exclude_set


def unseen(*args: Any) -> bool:
    """Whether nobody but autograd would see an operator of these arguments: it may be left out for what it computes.

    The dispatcher and operators in Python take longer than a short kernel. Those who would see it: a tracer, modes of
    torch's functions and of its dispatcher, torch.func, autocast, forward mode, a profiler, subclasses of tensors.
    """
    if torch._C._is_any_autocast_enabled() or torch._C._len_torch_function_stack() or forward_ad._current_level >= 0:
        return False
    if torch.autograd._profiler_enabled() or not _plain(_keys_included().raw_repr()):
        return False
    if torch.is_grad_enabled() and not _records(_keys_excluded().raw_repr()):
        return False
    if not plain(args):
        return False
    return all(map(_plain, {_keys_of(value).raw_repr() for value in args if isinstance(value, Tensor)}))


def plain(args: Sequence[Any]) -> bool:
    """Whether no argument is of a subclass of tensors, nor anything unknown."""
    return _PLAIN_TYPES.issuperset(map(type, args))


def _key_names(raw: int) -> set[str]:
    names = str(torch._C.DispatchKeySet.from_raw_repr(raw))  # DispatchKeySet(CPU, AutogradCPU)
    return set(names.partition("(")[2].rstrip(")").split(", ")) - {""}


@functools.lru_cache(maxsize=64)
def _plain(keys: int) -> bool:
    return _key_names(keys) <= _PLAIN_KEYS


@functools.lru_cache(maxsize=64)
def _records(excluded: int) -> bool:
    return not any("Autograd" in name for name in _key_names(excluded))


def run_unseen(compute: Any, function: Any, args: tuple[Any, ...], save: int) -> Any:
    """What an operator of `unseen` arguments returns. `save` is the place of that flag in `args`."""
    if not _recorded(args):
        return below_autograd(compute, args)
    given = list(args)
    given[save] = True
    return function.apply(*given)


def recorder(function: Any, compute: Any) -> Any:
    """`function` without `setup_context`, which torch.func needs and which binds all arguments anew in every call."""

    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        output = below_autograd(compute, args)
        function.setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    return type(function.__name__, (torch.autograd.Function,), members)


def _emulating() -> bool:
    # Looked up, not imported: who never emulates never loads the emulator. Compiled code asks when it runs.
    emulator = sys.modules.get("tritlstm.emulator")
    return emulator is not None and not torch.compiler.is_compiling() and emulator.active()


def launches(x: Tensor) -> bool:
    """Whether operators on `x` launch kernels; an empty batch needs no launch."""
    return runs_kernels(x) and x.size(1) > 0


def _engine(x: Tensor) -> Any:
    """The module whose `forward` and `backward` compute on `x`."""
    if not launches(x):
        return cpu if x.is_cpu else aten
    from . import layer

    return layer


_library = torch.library.Library("tritlstm", "DEF")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "layer(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor h0, Tensor c0, "
    "Tensor? lengths, bool reverse, bool save, Tensor? gate0=None) "
    "-> (Tensor out, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
    tags=_tags,
)
_library.define(
    "layer_backward(Tensor? grad_out, Tensor? grad_h_n, Tensor? grad_c_n, Tensor x, Tensor w_ih, "
    "Tensor w_hh, Tensor h0, Tensor c0, Tensor? lengths, Tensor out, Tensor gates, Tensor cells, "
    "bool reverse, bool[7] needs) "
    "-> (Tensor grad_x, Tensor grad_w_ih, Tensor grad_w_hh, Tensor grad_b, Tensor grad_h0, Tensor grad_c0, "
    "Tensor grad_gate0)",
    tags=_tags,
)
_layer = torch.ops.tritlstm.layer.default
_layer_backward = torch.ops.tritlstm.layer_backward.default


def _forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    _check(x, *args)
    out, h_n, c_n, gates, cells = _engine(x).forward(x, *args)
    return out, h_n, c_n.to(args[5].dtype), gates, cells


def _backward(*args: Any) -> tuple[Tensor, ...]:
    return _engine(args[3]).backward(*args)


def _forward_fake(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    reverse: bool,
    save: bool,
    gate0: Tensor | None = None,
) -> tuple[Tensor, ...]:
    _check(x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, save, gate0)
    (steps, batch, _), hidden = x.shape, h0.size(1)
    padded = (hidden + aten.GROUP - 1) // aten.GROUP * aten.GROUP
    saved = ((steps, batch, 4 * padded), (steps, batch, padded)) if save else ((0,), (0,))
    return (
        x.new_empty(steps, batch, hidden),
        x.new_empty(batch, hidden),
        c0.new_empty(batch, hidden),
        x.new_empty(saved[0]),
        x.new_empty(saved[1], dtype=aten.state_dtype(x.dtype)),
    )


def _plain_forward(*args: Any) -> Results:
    """The layer in plain operators, which autograd differentiates in every mode."""
    _check(*args)
    out, h_n, c_n, gates, cells = aten.forward(*args)
    return out, h_n, c_n.to(args[6].dtype), gates, cells


def _backward_fake(
    grad_out: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    out: Tensor,
    gates: Tensor,
    cells: Tensor,
    reverse: bool,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    bias, gate0 = w_hh.new_empty(w_hh.size(0)), x.new_empty(x.size(1), w_hh.size(0))
    like = (x, w_ih, w_hh, bias, h0, c0, gate0)
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip(like, needs, strict=True))


class _Layer(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return below_autograd(_layer, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.reverse, _, gate0 = inputs
        out, _, _, gates, cells = output
        ctx.mark_non_differentiable(gates, cells)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, gate0, out, gates, cells)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, gate0, out, gates, cells = ctx.saved_tensors
        *before, need_b_ih, need_b_hh, need_h0, need_c0, _, _, _, need_gate0 = ctx.needs_input_grad
        needs = (*before, need_b_ih or need_b_hh, need_h0, need_c0, need_gate0)
        forward = (x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, ctx.reverse, True, gate0)
        results = gradients(grads[:3], forward, (out, gates, cells), needs)
        d_x, d_w_ih, d_w_hh, d_b, d_h0, d_c0, d_gate0 = (
            result if need else None for result, need in zip(results, needs, strict=True)
        )
        d_biases = of_both_biases(d_b, need_b_ih, need_b_hh)
        return d_x, d_w_ih, d_w_hh, *d_biases, d_h0, d_c0, None, None, None, d_gate0


_RecordedLayer = recorder(_Layer, _forward)


def gradients(
    grads: Sequence[Tensor | None], forward: Sequence[Any], saved: Sequence[Tensor], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """`layer_backward` of what `layer` saved of the arguments `forward`, in whatever way it is differentiated."""
    if forward_mode():
        return _differentiable_backward(grads, forward, needs)
    if torch.is_grad_enabled():  # someone may differentiate the gradient
        return _Gradient.apply(*grads, *forward, *saved, needs)
    x, w_ih, w_hh, _, _, h0, c0, lengths, reverse, *_ = forward
    given = (*grads, x, w_ih, w_hh, h0, c0, lengths, *saved, reverse)
    return run_backward(_backward, _layer_backward, given, needs)


def run_backward(compute: Any, op: Any, given: tuple[Any, ...], needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """A backward operator with grad mode off, or what it computes."""
    if not torch.compiler.is_compiling() and unseen(*given):
        return below_autograd(compute, (*given, needs))
    return op(*given, needs)


class _LayerBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return below_autograd(_layer_backward, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "tritlstm: torch.ops.tritlstm.layer_backward can't be differentiated by itself. Differentiate "
            "torch.ops.tritlstm.layer twice: torch.autograd.grad(..., create_graph=True)"
        )


class _Gradient(torch.autograd.Function):
    """`layer_backward`, whose own derivatives are those of plain operators that begin at the layer's inputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        grads, needs = args[:3], args[-1]
        x, w_ih, w_hh, _, _, h0, c0, lengths, reverse, _, _, *saved = args[3:-1]
        return below_autograd(_layer_backward, (*grads, x, w_ih, w_hh, h0, c0, lengths, *saved, reverse, needs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.reverse, ctx.save, gate0, _, _, _, ctx.needs = inputs
        ctx.save_for_backward(*tensors, gate0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, gate0 = ctx.saved_tensors
        inputs = [*tensors, ctx.reverse, ctx.save, gate0]
        asked = [k for k, value in enumerate(inputs) if isinstance(value, Tensor) and ctx.needs_input_grad[k]]

        def gradient(*values: Tensor) -> tuple[Tensor, ...]:
            args = list(inputs)
            for k, value in zip(asked, values, strict=True):
                args[k] = value
            return _differentiable_backward(args[:3], args[3:], ctx.needs)

        results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        derivative = torch.func.vjp(gradient, *(inputs[k] for k in asked))[1]
        for k, value in zip(asked, derivative(grads), strict=True):
            results[k] = value
        return tuple(results)


def _differentiable_backward(
    grads: Sequence[Tensor | None], forward: Sequence[Any], needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The layer's backward by plain operators, with what the forward saves a function of its inputs again."""
    x, w_ih, w_hh, _, _, h0, c0, lengths, reverse, *_ = forward
    with aten.without_autocast(x.device.type):
        plain: Any = aten
        out, _, _, gates, cells = plain.forward(*forward)
        return plain.backward(*grads, x, w_ih, w_hh, h0, c0, lengths, out, gates, cells, reverse, needs)


def of_both_biases(grad_b: Tensor | None, need_ih: bool, need_hh: bool) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of b_ih and b_hh, which are equal: two tensors, that changing one in place leaves the other."""
    if grad_b is None:
        return None, None
    return grad_b if need_ih else None, (grad_b.clone() if need_ih else grad_b) if need_hh else None


def below_autograd(op: Any, args: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _recorded(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


def forward_mode() -> bool:
    """Whether forward-mode differentiation is on, of which an autograd.Function would give a silent zero."""
    return forward_ad._current_level >= 0


def _forward_autograd(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    reverse: bool,
    save: bool,
    gate0: Tensor | None = None,
) -> tuple[Tensor, ...]:
    tensors = (x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths)
    recorded = _recorded((*tensors, gate0))
    args = (*tensors, reverse, save or recorded, gate0)
    if forward_mode():
        return _plain_forward(*args)
    return _Layer.apply(*args) if recorded else below_autograd(_layer, args)


def _backward_autograd(*args: Any) -> tuple[Tensor, ...]:
    apply = _recorded(args) or forward_mode()
    return _LayerBackward.apply(*args) if apply else below_autograd(_layer_backward, args)


def _forward_autocast(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    reverse: bool,
    save: bool,
    gate0: Tensor | None = None,
) -> Results:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Any) -> Any:
        return t if t is None or t.dtype == torch.float64 else t.to(dtype)

    with torch.autocast(device, enabled=False):
        x, w_ih, w_hh, b_ih, b_hh, h0 = (cast(t) for t in (x, w_ih, w_hh, b_ih, b_hh, h0))
        return layer(x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse, save, cast(gate0))


def _backward_autocast(*args: Any) -> tuple[Tensor, ...]:
    # Its tensors are those of one forward already; only the products inside must not be cast.
    with aten.without_autocast(args[3].device.type):
        return _layer_backward(*args)


def _check(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    reverse: bool,
    save: bool,
    gate0: Tensor | None = None,
) -> None:
    if x.dim() != 3 or h0.dim() != 2:
        raise ValueError(
            f"tritlstm layer: x must be [T, B, D] and h0 [B, H], got {list(x.shape)} and {list(h0.shape)}; "
            "add the missing dimension with unsqueeze"
        )
    steps, batch, features = x.shape
    hidden = h0.size(1)
    if steps == 0:
        raise ValueError("tritlstm layer: x needs at least one time step, got T = 0; leave the call out")
    expected = (
        ("w_ih", w_ih, (4 * hidden, features), x.dtype),
        ("w_hh", w_hh, (4 * hidden, hidden), x.dtype),
        ("b_ih", b_ih, (4 * hidden,), x.dtype),
        ("b_hh", b_hh, (4 * hidden,), x.dtype),
        ("h0", h0, (batch, hidden), x.dtype),
        ("c0", c0, (batch, hidden), c0.dtype),
        ("lengths", lengths, (batch,), torch.int32),
        ("gate0", gate0, (batch, 4 * hidden), x.dtype),
    )
    device = x.device
    for name, value, shape, dtype in expected:
        if value is not None and (value.shape != shape or value.dtype != dtype or value.device != device):
            raise ValueError(
                f"tritlstm layer: {name} must be {list(shape)} of {dtype} on {x.device} beside x "
                f"{list(x.shape)} of {x.dtype} and h0 {list(h0.shape)}, got {list(value.shape)} of "
                f"{value.dtype} on {value.device}"
            )


for _key in ("CPU", "CUDA"):
    _library.impl("layer", _forward, _key)
    _library.impl("layer_backward", _backward, _key)
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("layer", _forward_autocast, _key)
    _library.impl("layer_backward", _backward_autocast, _key)
_library.impl("layer", _forward_autograd, "Autograd")
_library.impl("layer_backward", _backward_autograd, "Autograd")
torch.library.register_fake(_layer, _forward_fake, lib=_library)
torch.library.register_fake(_layer_backward, _backward_fake, lib=_library)
batching.register(_library, _layer, _layer_backward)
