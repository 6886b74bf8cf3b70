"""The operators `torch.ops.tritlstm.chains` and `chains_backward`: several LSTMs over one input in one call.

    chains(x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reversed, save) -> (out, h_n, c_n, gates, cells)
    chains_backward(grad_out, grad_h_n, grad_c_n, x, w_ih, w_hh, h0, c0, lengths, out, gates, cells, reversed, needs)
        -> (grad_x, grad_w_ih, grad_w_hh, grad_b, grad_h0, grad_c0)

C chains of H units; dtypes, devices, `lengths` and `save` as of `tritlstm.ops`. Two chains are a bidirectional layer,
more are its heads.

    x        [T, B, D]      w_ih [C, 4H, D]    w_hh [C, 4H, H]    b_ih, b_hh [C, 4H] or None
    h0, c0   [C, B, H]
    reversed how many of the chains, the last ones, walk from the last time step to the first
    out      [T, B, C H]    h_n, c_n [C, B, H]
    gates    [T, B, 4 C HX] and cells [T, B, C HX], for backward; empty(0) where nothing is saved
    needs    six flags, one per result

`chains` (the function) is the operator where the kernels run and have a plan for chains side by side, and the same by
`tritlstm.ops.layer`, chain by chain, elsewhere: there are torch.func's transforms and forward mode. Derivatives of a
gradient take that way too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import aten, batching, ops

__all__ = ["chains"]

Results = ops.Results
_OPTIONAL = ("b_ih", "b_hh", "lengths")

_library = torch.library.Library("tritlstm", "FRAGMENT")
_tags = (torch.Tag.pt2_compliant_tag,)
_library.define(
    "chains(Tensor x, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor h0, Tensor c0, Tensor? lengths, "
    "int reversed, bool save) -> (Tensor out, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
    tags=_tags,
)
_library.define(
    "chains_backward(Tensor? grad_out, Tensor? grad_h_n, Tensor? grad_c_n, Tensor x, Tensor w_ih, Tensor w_hh, "
    "Tensor h0, Tensor c0, Tensor? lengths, Tensor out, Tensor gates, Tensor cells, int reversed, bool[6] needs) "
    "-> (Tensor grad_x, Tensor grad_w_ih, Tensor grad_w_hh, Tensor grad_b, Tensor grad_h0, Tensor grad_c0)",
    tags=_tags,
)
_chains = torch.ops.tritlstm.chains.default
_chains_backward = torch.ops.tritlstm.chains_backward.default


def pays(x: Tensor, chains: int, hidden: int, training: bool) -> bool:
    """Whether the operator is better than one layer after another: kernels run, with a plan for chains side by side.

    A compiler that traces can't ask for a plan, which depends on the sizes; the operator asks itself.
    """
    if torch.compiler.is_compiling():
        return x.is_cuda and x.dtype in ops.KERNEL_DTYPES and x.size(1) > 0
    if not ops.runs_kernels(x) or x.size(1) == 0:
        return False
    if torch._C._are_functorch_transforms_active() or ops.forward_mode():
        return False
    from . import chains as engine

    return engine.fits(x.size(0), x.size(1), chains, hidden, x, training)


def chains(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None = None,
    reversed: int = 0,
    save: bool = False,
) -> Results:
    """`torch.ops.tritlstm.chains`, which also works inside torch.func's transforms and forward mode."""
    args = (x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reversed)
    compiling = torch.compiler.is_compiling()
    if not compiling and ops.unseen(*args):
        return ops.run_unseen(_forward, _RecordedChains, (*args, save), -1)
    if not compiling and (torch._C._are_functorch_transforms_active() or ops.forward_mode()):
        return _composed(*args, save)
    return _chains(*args, save)


def _composed(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    reversed: int,
    save: bool,
) -> Results:
    """The same, chain by chain."""
    return _joined(
        ops.layer(
            x, w_ih[k], w_hh[k], None if b_ih is None else b_ih[k], None if b_hh is None else b_hh[k], h0[k], c0[k],
            lengths, k >= len(w_hh) - reversed, save,
        )
        for k in range(len(w_hh))
    )  # fmt: skip


def _joined(results: Any) -> Results:
    outs, h_n, c_n, gates, cells = zip(*results, strict=True)
    return torch.cat(outs, -1), torch.stack(h_n), torch.stack(c_n), torch.cat(gates, -1), torch.cat(cells, -1)


def _engine(x: Tensor, chains: int, hidden: int, training: bool) -> Any:
    """The module that computes all chains together, or None where they go one after another."""
    if not ops.launches(x):
        return None
    from . import chains as engine

    return engine if engine.fits(x.size(0), x.size(1), chains, hidden, x, training) else None


def _forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    _check(x, *args)
    w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reversed, save = args
    engine = _engine(x, len(w_hh), w_hh.size(2), save)
    if engine is not None:
        return engine.forward(x, *args)
    one = ops._engine(x)
    out, h_n, c_n, gates, cells = _joined(
        one.forward(
            x, w_ih[k], w_hh[k], None if b_ih is None else b_ih[k], None if b_hh is None else b_hh[k], h0[k], c0[k],
            lengths, k >= len(w_hh) - reversed, save, None,
        )
        for k in range(len(w_hh))
    )  # fmt: skip
    return out, h_n, c_n.to(c0.dtype), gates, cells


def _backward(*args: Any) -> tuple[Tensor, ...]:
    *grads, x, w_ih, w_hh, h0, c0, lengths, out, gates, cells, reversed, needs = args
    chains, _, hidden = w_hh.shape
    engine = _engine(x, chains, hidden, True)
    if engine is not None:
        return engine.backward(*args)
    one = ops._engine(x)
    grad_out, grad_h_n, grad_c_n = grads
    whole = (grad_out, out, gates, cells)
    parts = [[None] * chains if t is None else t.chunk(chains, -1) for t in whole]
    found = []
    for k in range(chains):
        part_out, *saved = (None if p[k] is None else p[k].contiguous() for p in parts)  # type: ignore[union-attr]
        states = (None if g is None else g[k] for g in (grad_h_n, grad_c_n))
        found.append(
            one.backward(
                part_out, *states, x, w_ih[k], w_hh[k], h0[k], c0[k], lengths, *saved, k >= chains - reversed,
                (*needs, False),
            )[:6]
        )  # fmt: skip
    d_x, *others = zip(*found, strict=True)
    grad_x = torch.stack(d_x).sum(0) if needs[0] else x.new_empty(0)
    return (grad_x, *(torch.stack(d) if need else x.new_empty(0) for d, need in zip(others, needs[1:], strict=True)))


def _forward_fake(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    reversed: int,
    save: bool,
) -> tuple[Tensor, ...]:
    _check(x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reversed, save)
    (steps, batch, _), (chains, _, hidden) = x.shape, h0.shape
    padded = (hidden + aten.GROUP - 1) // aten.GROUP * aten.GROUP * chains
    saved = ((steps, batch, 4 * padded), (steps, batch, padded)) if save else ((0,), (0,))
    return (
        x.new_empty(steps, batch, chains * hidden),
        x.new_empty(chains, batch, hidden),
        c0.new_empty(chains, batch, hidden),
        x.new_empty(saved[0]),
        x.new_empty(saved[1], dtype=aten.state_dtype(x.dtype)),
    )


def _backward_fake(*args: Any) -> tuple[Tensor, ...]:
    x, w_ih, w_hh, h0, c0 = args[3:8]
    needs = args[-1]
    like = (x, w_ih, w_hh, w_hh.new_empty(w_hh.shape[:2]), h0, c0)
    return tuple(t.new_empty(t.shape if need else (0,)) for t, need in zip(like, needs, strict=True))


class _Chains(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return ops.below_autograd(_chains, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.reversed, _ = inputs
        out, _, _, gates, cells = output
        ctx.mark_non_differentiable(gates, cells)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, out, gates, cells)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, out, gates, cells = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():  # someone may differentiate the gradient
            given = (x, w_ih, w_hh, b_ih, b_hh, h0, c0)
            return (*_differentiable(grads[:3], given, lengths, ctx.reversed, needed), None, None, None)
        needs = (*needed[:3], needed[3] or needed[4], *needed[5:7])
        inputs = (*grads[:3], x, w_ih, w_hh, h0, c0, lengths, out, gates, cells, ctx.reversed)
        results = ops.run_backward(_backward, _chains_backward, inputs, needs)
        d_x, d_w_ih, d_w_hh, d_b, d_h0, d_c0 = (r if need else None for r, need in zip(results, needs, strict=True))
        d_biases = ops.of_both_biases(d_b, *needed[3:5])
        return d_x, d_w_ih, d_w_hh, *d_biases, d_h0, d_c0, None, None, None


_RecordedChains = ops.recorder(_Chains, _forward)


def _differentiable(
    grads: Sequence[Tensor | None],
    given: Sequence[Tensor | None],
    lengths: Tensor | None,
    reversed: int,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients by `_composed`, as functions of the inputs and of ``grads``."""
    asked = [k for k, value in enumerate(given) if value is not None and needed[k]]
    run: Any = _composed
    results = run(*given, lengths, reversed, True)[:3]
    pairs = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    found: list[Tensor | None] = [None] * len(given)
    if asked and pairs:
        outputs, seeds = zip(*pairs, strict=True)
        inputs: Any = [given[k] for k in asked]
        gradients = torch.autograd.grad(outputs, inputs, seeds, create_graph=True, allow_unused=True)
        for k, gradient in zip(asked, gradients, strict=True):
            found[k] = gradient
    return found


class _ChainsBackward(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return ops.below_autograd(_chains_backward, args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "tritlstm: torch.ops.tritlstm.chains_backward can't be differentiated by itself. Differentiate "
            "torch.ops.tritlstm.chains twice: torch.autograd.grad(..., create_graph=True)"
        )


def _forward_autograd(*args: Any) -> tuple[Tensor, ...]:
    if ops.forward_mode():
        return _composed(*args)
    recorded = ops._recorded(args)
    args = (*args[:-1], args[-1] or recorded)
    return _Chains.apply(*args) if recorded else ops.below_autograd(_chains, args)


def _backward_autograd(*args: Any) -> tuple[Tensor, ...]:
    apply = ops._recorded(args) or ops.forward_mode()
    return _ChainsBackward.apply(*args) if apply else ops.below_autograd(_chains_backward, args)


def _forward_autocast(x: Tensor, *args: Any) -> Results:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Any) -> Any:
        return t if t is None or t.dtype == torch.float64 else t.to(dtype)

    with torch.autocast(device, enabled=False):
        given = [cast(t) for t in (x, *args[:5])]
        run: Any = chains
        return run(*given, *args[5:])


def _backward_autocast(*args: Any) -> tuple[Tensor, ...]:
    # Its tensors are those of one forward already; only the products inside must not be cast.
    with torch.autocast(args[3].device.type, enabled=False):
        return _chains_backward(*args)


def _check(
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    reversed: int,
    save: bool,
) -> None:
    if x.dim() != 3 or h0.dim() != 3:
        raise ValueError(
            f"tritlstm chains: x must be [T, B, D] and h0 [C, B, H], got {list(x.shape)} and {list(h0.shape)}; "
            "add the missing dimension with unsqueeze"
        )
    steps, batch, features = x.shape
    count, _, hidden = h0.shape
    if steps == 0 or count == 0:
        what = "one time step, got T = 0" if steps == 0 else "one chain, got C = 0"
        raise ValueError(f"tritlstm chains: they need at least {what}; leave the call out")
    if not 0 <= reversed <= count:
        raise ValueError(
            f"tritlstm chains: reversed must lie between 0 and the number of chains {count}, got {reversed}"
        )
    expected = {
        "w_ih": (w_ih, (count, 4 * hidden, features), x.dtype),
        "w_hh": (w_hh, (count, 4 * hidden, hidden), x.dtype),
        "b_ih": (b_ih, (count, 4 * hidden), x.dtype),
        "b_hh": (b_hh, (count, 4 * hidden), x.dtype),
        "h0": (h0, (count, batch, hidden), x.dtype),
        "c0": (c0, (count, batch, hidden), c0.dtype),
        "lengths": (lengths, (batch,), torch.int32),
    }
    for name, (value, shape, dtype) in expected.items():
        if value is None and name in _OPTIONAL:
            continue
        if value.shape != shape or value.dtype != dtype or value.device != x.device:  # type: ignore[union-attr]
            raise ValueError(
                f"tritlstm chains: {name} must be {list(shape)} of {dtype} on {x.device} beside x {list(x.shape)} of "
                f"{x.dtype} and h0 {list(h0.shape)}, got {list(value.shape)} of "  # type: ignore[union-attr]
                f"{value.dtype} on {value.device}"  # type: ignore[union-attr]
            )


for _key in ("CPU", "CUDA"):
    _library.impl("chains", _forward, _key)
    _library.impl("chains_backward", _backward, _key)
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("chains", _forward_autocast, _key)
    _library.impl("chains_backward", _backward_autocast, _key)
_library.impl("chains", _forward_autograd, "Autograd")
_library.impl("chains_backward", _backward_autograd, "Autograd")
torch.library.register_fake(_chains, _forward_fake, lib=_library)
torch.library.register_fake(_chains_backward, _backward_fake, lib=_library)


def _register_vmap(op: Any) -> None:
    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> batching.Results:
        return batching.one_by_one(op, info.batch_size, in_dims, args)

    torch.library.register_vmap(op, rule, lib=_library)


_register_vmap(_chains)
_register_vmap(_chains_backward)
