"""What turns a layer's plain run into that of a variant, of resets or of a trace: the operator that `functional` calls.

`functional.run_layers` walks the layers and directions; `Extras.operator` gives it for each of them a function with the
arguments and results of `tritlstm.ops.layer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import aten, chain_ops, normed_ops, ops, random_bits, variant_ops
from .cell_options import Cell, CellOptions

__all__ = ["PARAMETERS", "Extras", "Resets", "dense_heads"]

#: A bool tensor, or (nested) sequences of bools.
Resets = Tensor | Sequence[Any]

#: Parameters of a layer and direction that variants have, with their sizes in multiples of H, by option.
PARAMETERS: dict[str, dict[str, int]] = {
    "peephole": {"weight_ch": 3},
    "layer_norm": {"norm_ih": 4, "norm_hh": 4, "norm_c": 1, "norm_c_bias": 1},
}
#: What random bits are for; each layer and direction has a stream for each purpose.
_ZONEOUT, _RECURRENT, _WEIGHT, _PURPOSES = range(4)


class Extras(NamedTuple):
    """What a call adds to `functional.apply`; None in its place is the plain LSTM without resets or trace."""

    options: CellOptions
    training: bool
    weights: Sequence[Mapping[str, Tensor]]  # of each layer and direction, by the names of `PARAMETERS`
    resets: Any = None  # `Resets` as the caller gives them; a tensor [T, B] once `laid_out` or `packed`
    noise: Tensor | None = None  # [2] int64: seed and offset
    record: list[tuple[Tensor, Tensor, Tensor]] | None = None  # gets out, gates and cells of each
    differentiable: bool = False  # of what is recorded
    first: int = 0  # layers and directions before this call's, of a module that makes several

    def laid_out(self, x: Tensor, batch_dim: int, batched: bool) -> Extras:
        """With `resets` [T, B] for the input `x`, which has a batch by now."""
        if self.resets is None:
            return self
        resets = resets_tensor(self.resets, x.device)
        expected = tuple(x.shape[:2]) if batched else (x.size(1 - batch_dim),)
        if resets.dtype != torch.bool or tuple(resets.shape) != expected:
            order = ("[B, T]" if batch_dim == 0 else "[T, B]") if batched else "[T]"
            raise ValueError(
                f"resets must be {order} = {list(expected)} of torch.bool, got {list(resets.shape)} of {resets.dtype}"
            )
        if not batched:
            return self._replace(resets=resets[:, None])
        return self._replace(resets=resets.t() if batch_dim == 0 else resets)

    def packed(self, x: Tensor, steps: int, batch: int) -> Extras:
        """For packed input of `steps` and `batch` with data `x`, in whose order before packing all here is."""
        if self.resets is None:
            return self
        resets = resets_tensor(self.resets, x.device)
        if resets.dtype != torch.bool or resets.shape != (steps, batch):
            raise ValueError(
                f"resets beside a PackedSequence must be [T, B] = {[steps, batch]} of torch.bool, in the order of the "
                f"batch before packing, got {list(resets.shape)} of {resets.dtype}"
            )
        return self._replace(resets=resets)

    def operator(self, k: int) -> Callable[..., ops.Results]:
        """`ops.layer` for the k-th layer and direction."""
        options, weights = self.options, self.weights[k]

        def run(
            x: Tensor,
            w_ih: Tensor,
            w_hh: Tensor,
            b_ih: Tensor | None,
            b_hh: Tensor | None,
            h0: Tensor,
            c0: Tensor,
            lengths: Tensor | None = None,
            reverse: bool = False,
            gate0: Tensor | None = None,
        ) -> ops.Results:
            if options.num_heads > 1:
                if gate0 is None and self.heads_apart(x, h0.size(1)):
                    return _heads(options.num_heads, x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse)
                w_hh = dense_heads(w_hh, options.num_heads)
            if options.weight_dropout and self.training:
                kept = self._kept(k, _WEIGHT, w_hh, options.weight_dropout)
                w_hh = (w_hh * kept).to(w_hh.dtype)
            cell = self._cell(k, weights.get("weight_ch"), x, h0)
            args = (x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, reverse)
            norm = None
            if options.layer_norm:
                norm = aten.Norm(*(weights[name] for name in PARAMETERS["layer_norm"]))
            if self.record is not None and self.differentiable:
                results = self._plain(args, gate0, cell, norm)
            elif norm is not None:
                # A projection, from which gate0 comes, can't be had with it.
                results = normed_ops.layer(*args, self.record is not None, cell, norm)
            else:
                saves = self.record is not None
                results = variant_ops.layer(*args, saves, gate0, cell, options.recompute and not saves)
            if self.record is not None:
                self.record.append((results[0], results[3], results[4]))
            return results

        return run

    def heads_apart(self, x: Tensor, hidden: int) -> bool:
        """Whether the kernels run each head by itself; beside other options the heads are one w_hh with zeros."""
        plain = not (self.options.changed.keys() - {"num_heads"}) and self.resets is None and self.record is None
        heads = self.options.num_heads
        return plain and chain_ops.pays(x, heads, hidden // heads, torch.is_grad_enabled())

    def _cell(self, k: int, peephole: Tensor | None, x: Tensor, h0: Tensor) -> Cell:
        options = self.options
        scale = noise = None
        if options.recurrent_dropout and self.training:
            scale = self._kept(k, _RECURRENT, h0, options.recurrent_dropout)
        if max(options.zoneout) and self.training:
            noise = self._stream(k, _ZONEOUT)
        return Cell(
            self.resets, peephole, scale, noise, options.coupled, options.cell_clip or 0.0, *options.zoneout,
            options.codes,
        )  # fmt: skip

    def _plain(self, args: tuple[Any, ...], gate0: Tensor | None, cell: Cell, norm: aten.Norm | None) -> ops.Results:
        x = args[0]
        if aten.autocasts(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            args = tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        with aten.without_autocast(x.device.type):
            run: Any = aten.forward
            return run(*args, self.record is not None, gate0, cell, norm=norm)

    def _stream(self, k: int, purpose: int) -> Tensor:
        if self.noise is None:
            raise ValueError("a step of training needs noise, got None")
        stream = torch.full((1,), (self.first + k) * _PURPOSES + purpose, device=self.noise.device)
        return torch.cat((self.noise, stream))

    def _kept(self, k: int, purpose: int, like: Tensor, p: float) -> Tensor:
        """0 with probability p, else 1 / (1 - p)."""
        words = random_bits.draw(self._stream(k, purpose), tuple(like.shape))[0]
        scale = torch.full((), 1 / (1 - p), dtype=aten.state_dtype(like.dtype), device=like.device)
        return torch.where(random_bits.bernoulli(words, p), 0.0, scale)


def resets_tensor(resets: Resets, device: torch.device) -> Tensor:
    if isinstance(resets, Tensor):
        return resets
    try:
        made = torch.as_tensor(resets, device=device)
    except (TypeError, ValueError) as error:
        raise ValueError(f"resets must be a bool tensor or nested sequences of bools, got {resets!r}") from error
    return made if made.numel() else made.bool()  # an empty list has no dtype


def _heads(
    heads: int,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    h0: Tensor,
    c0: Tensor,
    lengths: Tensor | None,
    reverse: bool,
) -> ops.Results:
    """A layer by its heads, side by side. Their rows of a parameter are those of gate i, of f, of g and of o."""

    def by_head(parameter: Tensor | None) -> Tensor | None:
        if parameter is None:
            return None
        return parameter.unflatten(0, (4, heads, -1)).transpose(0, 1).flatten(1, 2)

    def of_heads(state: Tensor) -> Tensor:
        return state.unflatten(1, (heads, -1)).transpose(0, 1)

    weights = [by_head(parameter) for parameter in (w_ih, w_hh, b_ih, b_hh)]
    run: Any = chain_ops.chains
    turned = heads if reverse else 0
    out, h_n, c_n, gates, cells = run(x, *weights, of_heads(h0), of_heads(c0), lengths, turned)
    h_n, c_n = (state.transpose(0, 1).flatten(1, 2) for state in (h_n, c_n))
    return out, h_n, c_n, gates, cells


def dense_heads(w_hh: Tensor, heads: int) -> Tensor:
    """Block-diagonal [4H, H] of the heads' [4H, H / heads]: a unit of a head receives h of that head alone."""
    size = w_hh.size(1)
    blocks = w_hh.view(4, heads, size, 1, size)
    own = torch.eye(heads, dtype=w_hh.dtype, device=w_hh.device).view(1, heads, 1, heads, 1)
    return (blocks * own).reshape(w_hh.size(0), heads * size)
