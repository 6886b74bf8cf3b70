"""`LSTM` and `LSTMCell`, drop-ins for torch's modules, and `swap`, which puts them into an existing model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from . import functional, ops
from .cell_options import CellOptions, is_number
from .functional import Input, Lengths, Options, States
from .variants import PARAMETERS, Extras, Resets

__all__ = ["LSTM", "LSTMCell", "swap"]

Model = TypeVar("Model", bound=nn.Module)


# Not a subclass of nn.LSTM: torch.compile refuses to trace whatever is an nn.LSTM, and traces nn.RNNBase.
class LSTM(nn.RNNBase):
    """Long short-term memory of one or more layers; a drop-in for `torch.nn.LSTM`.

    Same arguments, shapes, `state_dict`, values and errors. On a CUDA device float16, bfloat16 and float32
    run the Triton kernels of this library; everything else (the CPU, float64) runs torch's own LSTM at no
    extra cost. Plain PyTorch operators run there only where torch can't trace or map its own: in a model that
    `torch.compile` compiles for training, in an export with a dynamic T, under `vmap` and in forward mode; and in
    training on the CPU where they are faster: packed data and batches with `lengths`, of 24 steps or more, and large
    weights for few rows (`tritlstm.cpu` has the rule). There the results, and what `eval()` computes, which is
    always torch's own, may differ in the last bits. Under autocast on the CPU, and in float16 modules there, everything
    but variants is computed in float32 and rounded at the end: torch.nn.LSTM rounds the cell state at every step.

    T time steps, B batch, D `input_size`, H `hidden_size`, R `proj_size` or else H, S 2 if `bidirectional`
    else 1.

    Args:
        input_size: features of the input at one time step.
        hidden_size: units of the hidden and of the cell state.
        num_layers: layers on top of each other, each reading the output of the one below.
        bias: whether the gates have biases b_ih and b_hh.
        batch_first: input and output are [B, T, ...] instead of [T, B, ...]; the states keep their order.
        dropout: probability, in training, with which an element of every layer's output except the last one's
            is zeroed.
        bidirectional: every layer also walks from the end of the sequence to its start.
        proj_size: if positive, the hidden state is projected to this size by w_hr [R, H]; less than
            `hidden_size`.
        device, dtype: of the parameters.

    Variants, by keyword only (docs/variants.md has the equations and sources); all off is torch.nn.LSTM:
        hidden_size: also a list, one size a layer; then `num_layers` is its length, and the states of call and
            result are lists of [S, B, H_k], one a layer.
        peephole: the gates also see the cell, through weight_ch_l{k} [3H], of i, f and o.
        coupled: the forget gate is 1 - i; its rows of the weights are not used.
        cell_clip: c is clamped to [-cell_clip, cell_clip].
        zoneout: probability with which a unit keeps its value of the step before in training, one for h and c or a
            pair; in evaluation the mean of the two values.
        recurrent_dropout: probability with which a unit of h is zeroed on its way into the recurrent product, the
            same units at every step of a call.
        weight_dropout: probability with which an element of weight_hh is zeroed for a call.
        forget_bias: the forget gate's bias to start with, in bias_ih; that in bias_hh is then zero.
        activations: names of those of the gates, of the input node and of the cell on its way out; of
            `tritlstm.cell_options.ACTIVATIONS`.
        num_heads: splits the units into heads that do not see each other: weight_hh_l{k} is [4H, H / num_heads].
        layer_norm: normalises both products over the 4H gates, with gains norm_ih_l{k} and norm_hh_l{k} [4H] and the
            biases for biases, and the cell on its way out, with norm_c_l{k} and norm_c_bias_l{k} [H].
        recompute: backward computes the gates again instead of keeping them: 4H numbers a step and sequence less. Of
            no effect beside layer_norm.

    Call:
        input: [T, B, D], [B, T, D] if `batch_first`, [T, D] without a batch, or a `PackedSequence`.
        hx: (h_0 [num_layers S, B, R], c_0 [num_layers S, B, H]), without B where the input has none. Default:
            zeros.
        lengths: [B] integers from 0 to T, a tensor on any device or a sequence of ints, in any order, by
            keyword; see `tritlstm.lstm`. For what torch.nn.LSTM takes a `PackedSequence`.
        resets: bool [T, B], [B, T] if `batch_first`, [T] without a batch, a tensor or nested sequences, by keyword: h
            and c are zeroed before step t, in every layer; see `tritlstm.lstm`. Beside a `PackedSequence` always
            [T, B], of the batch before packing.
        noise: int64 [2], seed and offset of the zoneout and of the recurrent and weight dropout of this call, by
            keyword. The same two give the same bits on every device. Default: drawn from torch's generator.
        Returns output [T, B, S R], in the form of the input, and (h_n, c_n), in the form of `hx`.

    Attributes:
        weight_ih_l{k} [4H, D] (k > 0: [4H, S R]), weight_hh_l{k} [4H, R], bias_ih_l{k}, bias_hh_l{k} [4H] and
        weight_hr_l{k} [R, H], each also with the suffix `_reverse`; the rows hold the gates in the order i,
        f, g, o. Drawn from U(-1/sqrt(H), 1/sqrt(H)); gains start at 1, their biases at 0.

    Errors are torch.nn.LSTM's, in type and words. A packed input is checked like any other, which torch
    omits. Second and forward-mode derivatives run in plain PyTorch operators.

    Example:
        >>> rnn = tritlstm.LSTM(10, 20, num_layers=2)
        >>> out, (h_n, c_n) = rnn(torch.randn(5, 3, 10))
        >>> out.shape
        torch.Size([5, 3, 20])
    """

    #: How the cell differs from the plain one; nn.LSTMs that `swap` turned keep this default.
    cell_options = CellOptions()
    #: One a layer, where `hidden_size` was a list.
    hidden_sizes: tuple[int, ...] | None = None
    forget_bias: float | None = None
    #: Of the weights, in the order of their names; None in a module unpickled from a version without it.
    _shapes: list[tuple[int, ...]] | None = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int | Sequence[int],
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        peephole: bool = False,
        coupled: bool = False,
        cell_clip: float | None = None,
        zoneout: float | tuple[float, float] = 0.0,
        recurrent_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        forget_bias: float | None = None,
        activations: Sequence[str] | None = None,
        num_heads: int = 1,
        layer_norm: bool = False,
        recompute: bool = False,
    ) -> None:
        listed = isinstance(hidden_size, (list, tuple))
        sizes = _hidden_sizes(cast(Any, hidden_size), num_layers, proj_size) if listed else None
        first = hidden_size if sizes is None else sizes[0]
        super().__init__(
            "LSTM",
            input_size,
            cast(int, first),
            num_layers if sizes is None else len(sizes),
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )
        self.cell_options = CellOptions.checked(
            sizes or (self.hidden_size,), proj_size, peephole=peephole, coupled=coupled, cell_clip=cell_clip,
            zoneout=zoneout, recurrent_dropout=recurrent_dropout, weight_dropout=weight_dropout,
            activations=activations, num_heads=num_heads, layer_norm=layer_norm, recompute=recompute,
        )  # fmt: skip
        if forget_bias is not None and not is_number(forget_bias):
            raise ValueError(f"forget_bias must be a number, got {forget_bias!r}; None draws it like the others")
        if forget_bias is not None and not bias:
            raise ValueError(f"forget_bias={forget_bias!r} needs bias=True, got bias={bias!r}")
        self.hidden_sizes, self.forget_bias = sizes, forget_bias
        self._remember_shapes()
        if self._shape_parameters():
            self.reset_parameters()
        else:
            self._fill_constants()

    def _suffixes(self) -> list[str]:
        """Of the parameters of each layer and direction."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]

    def _shape_parameters(self) -> bool:
        """Gives the parameters the shapes of a variant and adds those that only variants have; whether any did."""
        changed = False
        options, directions = self.cell_options, 2 if self.bidirectional else 1
        like = cast(Tensor, self.weight_ih_l0)
        for k, suffix in enumerate(self._suffixes()):
            layer = k // directions
            size, shapes = self._size_of(layer), self._shapes_of(layer)
            for option, parameters in PARAMETERS.items():
                if getattr(options, option):
                    shapes |= {name: (times * size,) for name, times in parameters.items()}
            for name, shape in shapes.items():
                old = getattr(self, f"{name}_{suffix}", None)
                if old is not None and old.shape == shape:
                    continue
                empty = torch.empty(shape, dtype=like.dtype, device=like.device)
                setattr(self, f"{name}_{suffix}", nn.Parameter(empty))
                changed = True
        return changed

    def _shapes_of(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Of the parameters that torch.nn.LSTM has too, in its order."""
        directions, size = 2 if self.bidirectional else 1, self._size_of(layer)
        below = self.input_size if layer == 0 else directions * (self.proj_size or self._size_of(layer - 1))
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (4 * size, below)}
        shapes["weight_hh"] = (4 * size, self.proj_size or size // self.cell_options.num_heads)
        if self.bias:
            shapes |= {"bias_ih": (4 * size,), "bias_hh": (4 * size,)}
        if self.proj_size:
            shapes["weight_hr"] = (self.proj_size, size)
        return shapes

    def _remember_shapes(self) -> None:
        directions = 2 if self.bidirectional else 1
        layers = [layer for layer in range(self.num_layers) for _ in range(directions)]
        self._shapes = [shape for layer in layers for shape in self._shapes_of(layer).values()]

    def _size_of(self, layer: int) -> int:
        return self.hidden_size if self.hidden_sizes is None else self.hidden_sizes[layer]

    def reset_parameters(self) -> None:
        if self.hidden_sizes is None:
            super().reset_parameters()
        else:
            for name, parameter in self.named_parameters(recurse=False):
                layer = int(name.removesuffix("_reverse").rpartition("_l")[2])
                bound = self._size_of(layer) ** -0.5
                nn.init.uniform_(parameter, -bound, bound)
        self._fill_constants()

    def _fill_constants(self) -> None:
        """Gains, their biases and the forget gate's bias."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("norm_"):
                nn.init.constant_(parameter, 0.0 if name.startswith("norm_c_bias") else 1.0)
            elif name.startswith("bias_") and self.forget_bias is not None:
                size = parameter.size(0) // 4
                with torch.no_grad():
                    parameter[size : 2 * size] = self.forget_bias if name.startswith("bias_ih") else 0.0

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.hidden_sizes is not None:
            text = text.replace(f", {self.hidden_size}", f", {list(self.hidden_sizes)}", 1)
        changed = self.cell_options.changed
        if self.forget_bias is not None:
            changed["forget_bias"] = self.forget_bias
        return "".join([text, *(f", {name}={value}" for name, value in changed.items())])

    def forward(
        self,
        input: Input,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Resets | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Input, States]:
        return self._run(input, hx, lengths, self._extras(input, resets, noise))

    def _run(
        self, input: Input, hx: States | None, lengths: Lengths | None, extras: Extras | None
    ) -> tuple[Input, States]:
        # Asked for by name in every call: weights that parametrisations, functional_call or hooks put in the
        # place of the registered ones count too. torch's cached list silently keeps the old ones.
        own: dict[str, Any] = self._parameters  # where torch would find most of them too, in thrice the time
        weights = [own[name] if name in own else getattr(self, name) for name in self._flat_weights_names]
        # torch's own LSTM on the CPU crashes the process where one does not fit.
        if self._shapes is not None and [w.shape for w in weights] != self._shapes:
            self._refuse_shapes(weights, self._shapes)
        options = self._options()
        if self.hidden_sizes is not None:
            return functional.apply_sizes(input, hx, weights, options, self.hidden_sizes, lengths, extras)
        return functional.apply(input, hx, weights, options, lengths, extras)

    def _refuse_shapes(self, weights: list[Tensor], shapes: list[tuple[int, ...]]) -> None:
        for name, weight, shape in zip(self._flat_weights_names, weights, shapes, strict=True):
            if weight.shape != shape:
                raise ValueError(
                    f"{name} of {self!r} must have shape {list(shape)}, got {list(weight.shape)}; what replaces a "
                    "weight must fit the module"
                )

    def _options(self) -> Options:
        return Options(
            self.input_size,
            self.hidden_size,
            self.proj_size,
            self.num_layers,
            self.bias,
            self.batch_first,
            self.dropout,
            self.training,
            self.bidirectional,
        )

    def _extras(
        self,
        input: Any,
        resets: Resets | None,
        noise: Tensor | None,
        record: list[Any] | None = None,
        differentiable: bool = False,
    ) -> Extras | None:
        """What a variant, resets or a trace adds to the call; None for the plain LSTM."""
        options = self.cell_options
        if noise is not None:
            _check_noise(noise)
        if not options.changed and resets is None and record is None:
            return None
        if not (self.training and options.random):
            noise = None
        elif noise is None:
            device = (input.data if isinstance(input, PackedSequence) else input).device
            noise = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)
        names = [name for option, own in PARAMETERS.items() if getattr(options, option) for name in own]
        weights = [{name: getattr(self, f"{name}_{suffix}") for name in names} for suffix in self._suffixes()]
        return Extras(options, self.training, weights, resets, noise, record, differentiable)

    def flatten_parameters(self) -> None:
        """Lay the weights out for cuDNN where it runs them; the Triton kernels read each one where it is."""
        if any(w is not None and w.dtype in ops.KERNEL_DTYPES for w in self._flat_weights):
            return
        super().flatten_parameters()


def _check_noise(noise: Any) -> None:
    if isinstance(noise, Tensor) and noise.shape == (2,) and noise.dtype == torch.int64:
        return
    got = f"{list(noise.shape)} of {noise.dtype}" if isinstance(noise, Tensor) else repr(noise)
    raise ValueError(f"noise must be [2] of torch.int64, seed and offset, got {got}")


def _hidden_sizes(given: Sequence[int], num_layers: int, proj_size: int) -> tuple[int, ...]:
    sizes = tuple(given)
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"hidden_size must be a positive int or a list of them, one a layer, got {given!r}")
    if num_layers not in (1, len(sizes)):
        raise ValueError(
            f"hidden_size={list(sizes)} has {len(sizes)} layers, got num_layers={num_layers}; leave num_layers out"
        )
    if proj_size:
        raise ValueError(f"a list of hidden sizes can't be had with a projection, got proj_size={proj_size}")
    return sizes


class LSTMCell(nn.LSTMCell):
    """One time step of an LSTM; a drop-in for `torch.nn.LSTMCell`.

    Args:
        input_size: D, features of the input.
        hidden_size: H, units of the hidden and of the cell state.
        bias: whether the gates have biases.
        device, dtype: of the parameters.

    Call: input [B, D] or [D], hx = (h [B, H] or [H], c of the same shape), default zeros; returns the next
    (h, c). Parameters weight_ih [4H, D], weight_hh [4H, H], bias_ih and bias_hh [4H], gates in the order i,
    f, g, o. Errors are torch.nn.LSTMCell's, in type and words.

    Example:
        >>> cell = tritlstm.LSTMCell(10, 20)
        >>> h, c = cell(torch.randn(3, 10))
        >>> h, c = cell(torch.randn(3, 10), (h, c))
    """

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        if not (functional.runs_kernels(input) or functional.transforms(input)):
            return super().forward(input, hx)
        given = () if hx is None else enumerate(hx)
        for name, value in (("input", input), *((f"hx[{k}]", state) for k, state in given)):
            if value.dim() not in (1, 2):
                raise ValueError(f"LSTMCell: Expected {name} to be 1D or 2D, got {value.dim()}D instead")
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        if hx is None:
            zeros = torch.zeros(x.size(0), self.hidden_size, dtype=x.dtype, device=x.device)
            hx = (zeros, zeros)
        elif not batched:
            hx = (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        h, c = functional.apply_cell(x, hx, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        return (h, c) if batched else (h.squeeze(0), c.squeeze(0))


_DROP_INS: dict[type, type] = {nn.LSTM: LSTM, nn.LSTMCell: LSTMCell}


def swap(model: Model) -> Model:
    """Turn every `torch.nn.LSTM` and `torch.nn.LSTMCell` in `model`, itself included, into this library's.

    The modules stay the same objects and only change their class. So Parameters, and with them optimizers,
    stay valid; training flag, device, dtype, hooks and every reference to a module too; and a module that
    stands in several places is turned once. `isinstance(module, torch.nn.LSTM)` is false afterwards,
    `torch.nn.RNNBase` still true.

    Rule for subclasses: only modules whose class is exactly nn.LSTM or nn.LSTMCell are turned. A subclass
    (and so a parametrised module) has behaviour of its own that this would lose: it is left as it is, and a
    UserWarning names it.

    Returns `model`. Raises TypeError where it is not a module.

    Example:
        >>> model = tritlstm.swap(torch.nn.Sequential(torch.nn.Linear(8, 10), torch.nn.LSTM(10, 20)))
        >>> type(model[1])
        <class 'tritlstm.module.LSTM'>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap expects a torch.nn.Module, got {type(model).__name__}; pass the model itself")
    left = []
    for name, module in model.named_modules():
        drop_in = _DROP_INS.get(type(module))
        if drop_in is not None:
            cast(Any, module).__class__ = drop_in
            if isinstance(module, LSTM):
                module._remember_shapes()
        elif isinstance(module, tuple(_DROP_INS)) and not isinstance(module, LSTMCell):
            left.append(f"{name or 'the model itself'} ({type(module).__qualname__})")
    if left:
        warnings.warn(
            f"tritlstm.swap left {', '.join(left)} as before: a subclass of torch's module may behave in its "
            "own way. Derive it from tritlstm.LSTM or tritlstm.LSTMCell to have it run the Triton kernels",
            stacklevel=2,
        )
    return model
