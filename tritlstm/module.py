"""`LSTM` and `LSTMCell`, drop-ins for torch's modules, and `swap`, which puts them into an existing model."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from . import functional, ops
from .functional import Input, Lengths, Options, States

__all__ = ["LSTM", "LSTMCell", "swap"]

Model = TypeVar("Model", bound=nn.Module)


# Not a subclass of nn.LSTM: torch.compile refuses to trace whatever is an nn.LSTM, and traces nn.RNNBase.
class LSTM(nn.RNNBase):
    """Long short-term memory of one or more layers; a drop-in for `torch.nn.LSTM`.

    Same arguments, shapes, `state_dict`, values and errors. On a CUDA device float16, bfloat16 and float32
    run the Triton kernels of this library; everything else (the CPU, float64) runs torch's own LSTM at no
    extra cost. Plain PyTorch operators run there only where torch can't trace or map its own: in a model that
    `torch.compile` compiles for training, in an export with a dynamic T, under `vmap` and in forward mode.

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

    Call:
        input: [T, B, D], [B, T, D] if `batch_first`, [T, D] without a batch, or a `PackedSequence`.
        hx: (h_0 [num_layers S, B, R], c_0 [num_layers S, B, H]), without B where the input has none. Default:
            zeros.
        lengths: [B] integers from 0 to T, a tensor on any device or a sequence of ints, in any order, by
            keyword; see `tritlstm.lstm`. For what torch.nn.LSTM takes a `PackedSequence`.
        Returns output [T, B, S R], in the form of the input, and (h_n, c_n), in the form of `hx`.

    Attributes:
        weight_ih_l{k} [4H, D] (k > 0: [4H, S R]), weight_hh_l{k} [4H, R], bias_ih_l{k}, bias_hh_l{k} [4H] and
        weight_hr_l{k} [R, H], each also with the suffix `_reverse`; the rows hold the gates in the order i,
        f, g, o. Drawn from U(-1/sqrt(H), 1/sqrt(H)).

    Errors are torch.nn.LSTM's, in type and words. A packed input is checked like any other, which torch
    omits. Second and forward-mode derivatives run in plain PyTorch operators.

    Example:
        >>> rnn = tritlstm.LSTM(10, 20, num_layers=2)
        >>> out, (h_n, c_n) = rnn(torch.randn(5, 3, 10))
        >>> out.shape
        torch.Size([5, 3, 20])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device,
            dtype,
        )

    def forward(
        self, input: Input, hx: States | None = None, *, lengths: Lengths | None = None
    ) -> tuple[Input, States]:
        # Asked for by name in every call: weights that parametrisations, functional_call or hooks put in the
        # place of the registered ones count too. torch's cached list silently keeps the old ones.
        weights = [getattr(self, name) for name in self._flat_weights_names]
        options = Options(
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
        return functional.apply(input, hx, weights, options, lengths)

    def flatten_parameters(self) -> None:
        """Lay the weights out for cuDNN where it runs them; the Triton kernels read each one where it is."""
        if any(w is not None and w.dtype in ops.KERNEL_DTYPES for w in self._flat_weights):
            return
        super().flatten_parameters()


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
        for name, value in (("input", input), *((f"hx[{k}]", state) for k, state in enumerate(hx or ()))):
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
        elif isinstance(module, tuple(_DROP_INS)) and not isinstance(module, LSTMCell):
            left.append(f"{name or 'the model itself'} ({type(module).__qualname__})")
    if left:
        warnings.warn(
            f"tritlstm.swap left {', '.join(left)} as before: a subclass of torch's module may behave in its "
            "own way. Derive it from tritlstm.LSTM or tritlstm.LSTMCell to have it run the Triton kernels",
            stacklevel=2,
        )
    return model
