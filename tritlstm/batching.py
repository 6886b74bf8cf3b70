"""`torch.func.vmap` over the operators of `tritlstm.ops`: the mapped dimension joins the batch, one call for all.

Only where the weights themselves are mapped does one call follow another. Per-sample gradients,
`vmap(grad(loss), in_dims=(None, 0))`, need the gradient of shared weights for each mapped sample: the
recurrence still runs once for all, and the products after it once a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import aten

__all__ = ["register"]

#: The batch's dimension of every tensor that has one, arguments and results; the others are shared by the batch.
BATCH = {
    "x": 1, "h0": 0, "c0": 0, "lengths": 0, "gate0": 0, "out": 1, "h_n": 0, "c_n": 0, "gates": 1, "cells": 1,
    "resets": 1, "h_scale": 0,
    "grad_out": 1, "grad_h_n": 0, "grad_c_n": 0, "grad_x": 1, "grad_h0": 0, "grad_c0": 0, "grad_gate0": 0,
}  # fmt: skip
SHARED_GRADIENTS = ("grad_w_ih", "grad_w_hh", "grad_b")

Results = tuple[tuple[Tensor, ...], tuple[int | None, ...]]


def register(library: torch.library.Library, layer: Any, layer_backward: Any) -> None:
    """Gives both operators their rules."""

    def rule_layer(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Results:
        return _rule(layer, info.batch_size, in_dims, args, _fold)

    def rule_layer_backward(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Results:
        return _rule(layer_backward, info.batch_size, in_dims, args, _fold_backward)

    torch.library.register_vmap(layer, rule_layer, lib=library)
    torch.library.register_vmap(layer_backward, rule_layer_backward, lib=library)


def _rule(op: Any, count: int, in_dims: Sequence[Any], args: Sequence[Any], fold: Any) -> Results:
    # An argument left at its default is not passed on, neither here.
    names = [argument.name for argument in op._schema.arguments][: len(args)]
    mapped = [isinstance(a, Tensor) and isinstance(dim, int) for a, dim in zip(args, in_dims, strict=True)]
    if all(name in BATCH for name, is_mapped in zip(names, mapped, strict=True) if is_mapped):
        folded = [
            _into_batch(a, dim if is_mapped else None, BATCH[name], count)
            if isinstance(a, Tensor) and name in BATCH
            else a
            for name, a, dim, is_mapped in zip(names, args, in_dims, mapped, strict=True)
        ]
        return fold(op, count, dict(zip(names, folded, strict=True)))
    return one_by_one(op, count, in_dims, args)  # the weights are mapped


def one_by_one(op: Any, count: int, in_dims: Sequence[Any], args: Sequence[Any]) -> Results:
    mapped = [isinstance(a, Tensor) and isinstance(dim, int) for a, dim in zip(args, in_dims, strict=True)]
    rows = [
        op(*(a.select(dim, v) if is_mapped else a for a, dim, is_mapped in zip(args, in_dims, mapped, strict=True)))
        for v in range(count)
    ]
    results = tuple(torch.stack(column) for column in zip(*rows, strict=True))
    return results, (0,) * len(results)


def _into_batch(value: Tensor, mapped: int | None, batch: int, count: int) -> Tensor:
    """[..., B, ...] mapped `count` times, or the same for each, to [..., count B, ...]."""
    if mapped is None:
        value = value.unsqueeze(batch).expand(*value.shape[:batch], count, *value.shape[batch:])
    else:
        value = value.movedim(mapped, batch)
    return value.flatten(batch, batch + 1)


def _out_of_batch(results: dict[str, Tensor], count: int) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    """The mapped dimension again, in front of the batch; a result that was not asked for, empty(0), has none."""
    dims = {n: BATCH[n] if n in BATCH and value.dim() > 1 else None for n, value in results.items()}
    values = {n: v if (dim := dims[n]) is None else _unfold(v, dim, count) for n, v in results.items()}
    return values, dims


def _unfold(value: Tensor, batch: int, count: int) -> Tensor:
    return value.unflatten(batch, (count, value.size(batch) // count))


def _fold(op: Any, count: int, args: dict[str, Any]) -> Results:
    names = [result.name for result in op._schema.returns]
    values, dims = _out_of_batch(dict(zip(names, op(*args.values()), strict=True)), count)
    return tuple(values.values()), tuple(dims.values())


def _fold_backward(op: Any, count: int, args: dict[str, Any]) -> Results:
    names = [result.name for result in op._schema.returns]
    needs = dict(zip(names, args["needs"], strict=True))
    if not any(needs[name] for name in SHARED_GRADIENTS):
        return _fold(op, count, args)
    x, w_ih = args["x"], args["w_ih"]
    with aten.without_autocast(x.device.type):
        # With the identity in the place of w_ih, the gradient of x is that of the gates, before any product.
        instead = {
            "x": x.new_zeros(1, 1, 1).expand(*x.shape[:2], w_ih.size(0)),
            "w_ih": torch.eye(w_ih.size(0), dtype=w_ih.dtype, device=w_ih.device),
            "needs": [n == "grad_x" or (need and n not in SHARED_GRADIENTS) for n, need in needs.items()],
        }
        results = dict(zip(names, op(*{**args, **instead}.values()), strict=True))
        grad_gates = results["grad_x"]
        results["grad_x"] = grad_gates @ w_ih if needs["grad_x"] else x.new_empty(0)
        values, dims = _out_of_batch(results, count)
        samples = _samples(grad_gates, count).mT
        if needs["grad_w_ih"]:
            values["grad_w_ih"] = samples @ _samples(x, count)
        if needs["grad_w_hh"]:
            first = aten._first_steps(x.size(0), args["lengths"], args["reverse"], x.device)
            h_prev = torch.where(first, args["h0"], args["out"].roll(-1 if args["reverse"] else 1, 0))
            values["grad_w_hh"] = samples @ _samples(h_prev, count)
        if needs["grad_b"]:
            values["grad_b"] = samples.sum(2)
    dims.update((name, 0) for name in SHARED_GRADIENTS if needs[name])
    return tuple(values.values()), tuple(dims.values())


def _samples(value: Tensor, count: int) -> Tensor:
    """[T, count B, N] to [count, T B, N]."""
    return _unfold(value, 1, count).transpose(0, 1).flatten(1, 2)
