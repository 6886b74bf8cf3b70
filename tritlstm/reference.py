"""The LSTM in NumPy and float64, forward and backward: what every other path is measured against.

One layer, one direction, full sequences. It needs NumPy and nothing else.

The equations (Hochreiter & Schmidhuber, 1997, with the forget gate of Gers, Schmidhuber & Cummins, 2000;
notation of "Dive into Deep Learning", chapter *Modern Recurrent Neural Networks*)::

    I_t = σ(X_t W_xi + H_{t-1} W_hi + b_i)       input gate
    F_t = σ(X_t W_xf + H_{t-1} W_hf + b_f)       forget gate
    O_t = σ(X_t W_xo + H_{t-1} W_ho + b_o)       output gate
    C̃_t = tanh(X_t W_xc + H_{t-1} W_hc + b_c)    input node
    C_t = F_t ⊙ C_{t-1} + I_t ⊙ C̃_t              memory cell internal state
    H_t = O_t ⊙ tanh(C_t)                        hidden state

torch stacks the transposes of the four matrices in the order i, f, g, o (its g is C̃) and keeps two biases.
With T time steps, batch B, input size D (the book's d) and hidden size H (the book's h)::

    textbook                          here and in torch, part by part     whole array
    X_t                     [B, d]    x[t]                                x           [T, B, D]
    H_t, C_t                [B, h]    h[t], c[t]                          h, c        [T, B, H]
    H_0, C_0                [B, h]    h0, c0                              h0, c0      [B, H]
    I_t, F_t, C̃_t, O_t      [B, h]    i[t], f[t], g[t], o[t]              i, f, g, o  [T, B, H]
    W_xi, W_xf, W_xc, W_xo  [d, h]    w_ih[:H].T, w_ih[H:2*H].T, …        w_ih        [4H, D]
    W_hi, W_hf, W_hc, W_ho  [h, h]    w_hh[:H].T, w_hh[H:2*H].T, …        w_hh        [4H, H]
    b_i, b_f, b_c, b_o      [h]       b_ih[:H] + b_hh[:H], …              b_ih, b_hh  [4H]

The book counts time from 1, and H_0 is the initial state; the arrays count from 0, so ``h[0]`` is H_1.

The gradients, derived by hand. Write ∂Y for the derivative of the loss by Y; A_i, A_f, A_c, A_o for what
stands inside each σ and tanh (the pre-activations); A for the four side by side. From the last step to the
first::

    ∂H_t  = (derivative by the output H_t) + ∂A_{t+1} W_hᵀ
    ∂C_t  = ∂H_t ⊙ O_t ⊙ (1 - tanh²(C_t)) + ∂C_{t+1} ⊙ F_{t+1}
    ∂A_i  = ∂C_t ⊙ C̃_t      ⊙ I_t ⊙ (1 - I_t)
    ∂A_f  = ∂C_t ⊙ C_{t-1}  ⊙ F_t ⊙ (1 - F_t)
    ∂A_c  = ∂C_t ⊙ I_t      ⊙ (1 - C̃_t²)
    ∂A_o  = ∂H_t ⊙ tanh(C_t) ⊙ O_t ⊙ (1 - O_t)

At the last step the derivatives by the final states stand in place of the terms from t+1. Then, over all
steps::

    ∂W_x = Σ_t X_tᵀ ∂A_t     ∂W_h = Σ_t H_{t-1}ᵀ ∂A_t     ∂b   = Σ_t Σ_batch ∂A_t
    ∂X_t = ∂A_t W_xᵀ         ∂H_0 = ∂A_1 W_hᵀ             ∂C_0 = ∂C_1 ⊙ F_1

Both biases enter as a sum, so b_ih and b_hh have the same gradient. For the reverse direction flip ``x`` in
time, call :func:`forward`, and flip the results.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Gradients", "Trace", "backward", "forward", "sigmoid"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Trace:
    """A forward pass with everything it computed; float64, C order."""

    x: Array  # [T, B, D]
    w_ih: Array  # [4H, D]
    w_hh: Array  # [4H, H]
    h0: Array  # [B, H]
    c0: Array  # [B, H]
    h: Array  # [T, B, H], the layer's output
    c: Array  # [T, B, H], the memory cell after each step
    i: Array  # [T, B, H], input gate, in (0, 1)
    f: Array  # [T, B, H], forget gate, in (0, 1)
    g: Array  # [T, B, H], input node, in (-1, 1)
    o: Array  # [T, B, H], output gate, in (0, 1)

    @property
    def h_n(self) -> Array:
        """Final hidden state [B, H] (``h0`` where T = 0)."""
        return self.h[-1] if len(self.h) else self.h0

    @property
    def c_n(self) -> Array:
        """Final cell state [B, H] (``c0`` where T = 0)."""
        return self.c[-1] if len(self.c) else self.c0


@dataclass(frozen=True)
class Gradients:
    """The loss's derivative by each input of :func:`forward`, shaped as that input; float64."""

    x: Array  # [T, B, D]
    w_ih: Array  # [4H, D]
    w_hh: Array  # [4H, H]
    b: Array  # [4H], of b_ih and of b_hh alike
    h0: Array  # [B, H]
    c0: Array  # [B, H]
    gates: Array  # [T, B, 4H], of the pre-activations, in the order i, f, g, o


def sigmoid(a: Array) -> Array:
    """σ(a) = 1 / (1 + exp(-a)), without overflow and accurate in both tails."""
    e = np.exp(-np.abs(a))
    return np.where(a >= 0, 1.0, e) / (1.0 + e)


def forward(
    x: ArrayLike,
    w_ih: ArrayLike,
    w_hh: ArrayLike,
    b_ih: ArrayLike | None = None,
    b_hh: ArrayLike | None = None,
    h0: ArrayLike | None = None,
    c0: ArrayLike | None = None,
) -> Trace:
    """Run the LSTM over a sequence and keep every gate and state.

    Args:
        x: input [T, B, D]; T, B and D may be 0.
        w_ih: input weights [4H, D], gates stacked i, f, g, o.
        w_hh: recurrent weights [4H, H], stacked likewise.
        b_ih, b_hh: biases [4H]; None is zero.
        h0, c0: initial hidden and cell state [B, H]; None is zero.

    All are converted to float64.

    Raises:
        ValueError: a shape that does not fit the others; the message gives both.
    """
    x, w_ih, w_hh = _array("x", x), _array("w_ih", w_ih), _array("w_hh", w_hh)
    if x.ndim != 3:
        raise ValueError(f"x must be [T, B, D], got shape {x.shape}; for one sequence pass x[:, None, :]")
    if w_hh.ndim != 2 or w_hh.shape[0] != 4 * w_hh.shape[1]:
        raise ValueError(f"w_hh must be [4H, H], got shape {w_hh.shape}")
    T, B, D = x.shape
    H = w_hh.shape[1]
    _expect("w_ih", w_ih, (4 * H, D), "[4H, D] with H from w_hh and D from x")
    b = np.zeros(4 * H)
    for name, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
        if bias is not None:
            b = b + _expect(name, _array(name, bias), (4 * H,), "[4H] with H from w_hh")
    h0 = _state("h0", h0, (B, H))
    c0 = _state("c0", c0, (B, H))

    i, f, g, o, c, h = (np.empty((T, B, H)) for _ in range(6))
    h_prev, c_prev = h0, c0
    for t in range(T):
        a = x[t] @ w_ih.T + h_prev @ w_hh.T + b  # [B, 4H]
        a_i, a_f, a_g, a_o = np.split(a, 4, axis=1)  # [B, H] each
        i[t], f[t], g[t], o[t] = sigmoid(a_i), sigmoid(a_f), np.tanh(a_g), sigmoid(a_o)
        c[t] = f[t] * c_prev + i[t] * g[t]
        h[t] = o[t] * np.tanh(c[t])
        h_prev, c_prev = h[t], c[t]
    return Trace(x=x, w_ih=w_ih, w_hh=w_hh, h0=h0, c0=c0, h=h, c=c, i=i, f=f, g=g, o=o)


def backward(
    trace: Trace,
    grad_h: ArrayLike | None = None,
    grad_h_n: ArrayLike | None = None,
    grad_c_n: ArrayLike | None = None,
) -> Gradients:
    """Differentiate a loss through :func:`forward`.

    Args:
        trace: what :func:`forward` returned.
        grad_h: the loss's derivative by the output ``trace.h`` [T, B, H]; None is zero.
        grad_h_n, grad_c_n: its derivative by the final states [B, H], on top of ``grad_h[-1]``; None is zero.

    Raises:
        ValueError: a shape that does not fit the trace; the message gives both.
    """
    T, B, H = trace.h.shape
    grad_h = _state("grad_h", grad_h, (T, B, H))
    dh = _state("grad_h_n", grad_h_n, (B, H))  # from step t + 1
    dc = _state("grad_c_n", grad_c_n, (B, H))  # from step t + 1
    h_prev = np.concatenate([trace.h0[None], trace.h])[:T]  # [T, B, H], H_{t-1}
    c_prev = np.concatenate([trace.c0[None], trace.c])[:T]  # [T, B, H], C_{t-1}

    gates = np.empty((T, B, 4 * H))
    for t in reversed(range(T)):
        i, f, g, o = trace.i[t], trace.f[t], trace.g[t], trace.o[t]
        tanh_c = np.tanh(trace.c[t])
        dh = dh + grad_h[t]
        dc = dc + dh * o * (1 - tanh_c**2)
        da_i = dc * g * i * (1 - i)
        da_f = dc * c_prev[t] * f * (1 - f)
        da_g = dc * i * (1 - g**2)
        da_o = dh * tanh_c * o * (1 - o)
        gates[t] = np.concatenate([da_i, da_f, da_g, da_o], axis=1)
        dh = gates[t] @ trace.w_hh
        dc = dc * f
    return Gradients(
        x=gates @ trace.w_ih,
        w_ih=_over_steps(gates, trace.x),
        w_hh=_over_steps(gates, h_prev),
        b=gates.sum(axis=(0, 1)),
        h0=dh,
        c0=dc,
        gates=gates,
    )


def _over_steps(a: Array, b: Array) -> Array:
    """Σ_t a_tᵀ b_t of [T, B, M] and [T, B, N]: [M, N]."""
    T, B, M = a.shape
    return a.reshape(T * B, M).T @ b.reshape(T * B, b.shape[2])


def _array(name: str, value: ArrayLike) -> Array:
    try:
        return np.array(value, dtype=np.float64, order="C")  # a copy: a trace outlives its inputs
    except (TypeError, ValueError) as error:
        kind = type(value).__name__
        raise ValueError(f"{name} must be an array of real numbers, got {kind}: {error}") from error


def _expect(name: str, value: Array, shape: tuple[int, ...], meaning: str) -> Array:
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape} ({meaning}), got {value.shape}")
    return value


def _state(name: str, value: ArrayLike | None, shape: tuple[int, ...]) -> Array:
    if value is None:
        return np.zeros(shape)
    meaning = "[T, B, H]" if len(shape) == 3 else "[B, H]"
    return _expect(name, _array(name, value), shape, f"{meaning} of this sequence")
