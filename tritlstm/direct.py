"""The kernels one layer after another without an operator each: `functional.run_layers` where nobody would see one.

A short call takes the host longer than the GPU. Here it is one node of autograd, whatever the number of layers, and
the states of all layers are written into the tensors that it returns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops

__all__ = ["run"]

States = tuple[Tensor, Tensor]
#: Arguments of `_forward` before the weights: x, h0, c0, lengths, bias.
_BEFORE = 5


def run(x: Tensor, lengths: Tensor | None, hx: States, weights: Sequence[Tensor], bias: bool) -> Any:
    """out, h_n and c_n of layers of one direction over x [T, B, D]. The tensors are `ops.unseen`."""
    args = (x, *hx, lengths, bias, *weights)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *hx, *weights)):
        return _Layers.apply(*args)
    return _unrecorded(_forward, None, *args)[:3]


def _unrecorded(function: Any, *args: Any) -> Any:
    """`function` below autograd, where the many views take half the time, as nothing notes of what they are one."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return function(*args)


@functools.cache
def _engine() -> Any:
    from . import layer

    return layer


def _forward(first: int | None, *args: Any) -> tuple[Any, ...]:
    """out, h_n, c_n; then what backward needs from layer ``first`` on: its input; out, gates and cells of each."""
    engine = _engine()
    x, h0, c0, lengths, bias, *weights = args
    h_n, c_n = x.new_empty(*h0.shape), x.new_empty(*h0.shape)
    saved: list[Tensor] = []
    h, c, *into = map(_of_layers, (h0, c0, h_n, c_n))
    for k, (w_ih, w_hh, b_ih, b_hh) in enumerate(_groups(weights, bias)):
        save = first is not None and k >= first
        if k == first:
            saved.append(x)
        states = (into[0][k], into[1][k])
        x, _, _, *kept = engine.forward(x, w_ih, w_hh, b_ih, b_hh, h[k], c[k], lengths, False, save, states=states)
        if save:
            saved += (x, *kept)
    return x, h_n, c_n, *saved


def _of_layers(states: Tensor) -> tuple[Tensor, ...]:
    """[L, B, H] as L of [B, H]. A single one stays as it is, which is the same to a kernel."""
    return states.unbind() if len(states) > 1 else (states,)


def _groups(weights: Sequence[Any], bias: bool) -> Iterator[tuple[Any, Any, Any, Any]]:
    """w_ih, w_hh, b_ih and b_hh of one layer after another, or what belongs to them."""
    for k in range(0, len(weights), 4 if bias else 2):
        yield weights[k], weights[k + 1], weights[k + 2] if bias else None, weights[k + 3] if bias else None


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        _, h0, c0, lengths, ctx.bias, *weights = args
        needed = ctx.needs_input_grad
        # What lies below the first layer that needs a gradient is not differentiated.
        needing = [any(group) for group in _groups(needed[_BEFORE:], ctx.bias)]
        ctx.first = 0 if any(needed[:_BEFORE]) else needing.index(True)
        out, h_n, c_n, *saved = _unrecorded(_forward, ctx.first, *args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(h0, c0, lengths, *weights[len(weights) // len(needing) * ctx.first :], *saved)
        return out, h_n, c_n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad
        args = (grads, tensors, needed, ctx.first, ctx.bias)
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not (ops.unseen(*grads) and ops.plain(tensors)):
            return _backward(_by_operators, *args)
        return _unrecorded(_backward, _by_kernels, *args)


def _backward(
    gradients: Callable[..., tuple[Tensor | None, ...]],
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    needed: Sequence[bool],
    first: int,
    bias: bool,
) -> tuple[Tensor | None, ...]:
    """Of each argument of `_Layers`; `gradients` finds those of one layer."""
    h0, c0, lengths, *others = tensors
    each = 4 if bias else 2
    need_x, *need_states = needed[:3]
    needs = needed[_BEFORE + first * each :]
    weights, below, saved = others[: len(needs)], others[len(needs)], others[len(needs) + 1 :]
    inputs = [below, *saved[:-3:3]]
    if torch.is_grad_enabled() or ops.forward_mode():  # of which the gradient is a function that has derivatives
        for k, (w_ih, w_hh, b_ih, b_hh) in enumerate(_groups(weights[:-each], bias)):
            inputs[k + 1] = ops.layer(inputs[k], w_ih, w_hh, b_ih, b_hh, h0[first + k], c0[first + k], lengths)[0]
    grad, grad_h_n, grad_c_n = grads
    d_weights: list[Tensor | None] = []
    d_h0: list[Tensor | None] = []
    d_c0: list[Tensor | None] = []
    for k in range(len(inputs) - 1, -1, -1):
        row, own = first + k, slice(k * each, (k + 1) * each)
        states = (None if grad_h_n is None else grad_h_n[row], None if grad_c_n is None else grad_c_n[row])
        need_w_ih, need_w_hh, *need_b = needs[own]
        grad, d_h, d_c, *of_weights = gradients(
            (grad, *states),
            (inputs[k], *weights[own], *(None,) * (4 - each), h0[row], c0[row], lengths),
            saved[3 * k : 3 * k + 3],
            (k > 0 or need_x, need_w_ih, need_w_hh, any(need_b), *need_states, False),
            need_b,
        )
        d_weights[:0], d_h0[:0], d_c0[:0] = of_weights, [d_h], [d_c]
    d_states = (_of_all(d) if need else None for d, need in zip((d_h0, d_c0), need_states, strict=True))
    return grad, *d_states, None, None, *(None,) * (first * each), *d_weights


def _of_all(states: list[Any]) -> Tensor:
    """Undoes `_of_layers`."""
    return states[0].unsqueeze(0) if len(states) == 1 else torch.stack(states)


def _by_kernels(
    grads: tuple[Any, Any, Any], forward: Sequence[Any], saved: tuple[Any, Any, Any], needs: Any, need_b: Any
) -> tuple[Tensor | None, ...]:
    """Gradients of x, h0, c0 and the weights of one layer."""
    x, w_ih, w_hh, _, _, h0, c0, lengths = forward
    both = len(need_b) == 2 and all(need_b)
    d_x, d_w_ih, d_w_hh, d_b, d_h0, d_c0, _ = _engine().gradients(
        *grads, x, w_ih, w_hh, h0, c0, lengths, *saved, False, needs, times=(2,) if both else ()
    )
    d_biases = d_b.unbind() if both else [d_b if need else None for need in need_b]
    return d_x, d_h0, d_c0, d_w_ih, d_w_hh, *d_biases


def _by_operators(
    grads: tuple[Any, Any, Any], forward: Sequence[Any], saved: tuple[Any, Any, Any], needs: Any, need_b: Any
) -> tuple[Tensor | None, ...]:
    """The same where they are seen, or may be differentiated."""
    found = ops.gradients(grads, (*forward, False, True, None), saved, needs)
    d_x, d_w_ih, d_w_hh, d_b, d_h0, d_c0, _ = (d if need else None for d, need in zip(found, needs, strict=True))
    return d_x, d_h0, d_c0, d_w_ih, d_w_hh, *(ops.of_both_biases(d_b, *need_b) if need_b else ())
