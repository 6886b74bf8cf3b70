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

A :class:`Variant` changes the cell. With all of it, where φ, ψ, χ are the activations of the gates, the input node
and the output, P the peephole weights, m the scale of h, and k^h, k^c the parts that zoneout keeps::

    H', C' = H_{t-1}, C_{t-1}, or zero where the state is reset before step t
    A      = X_t W_x + (m ⊙ H') W_h + b
    I_t    = φ(A_i + P_i ⊙ C')
    F_t    = φ(A_f + P_f ⊙ C'), or 1 - I_t where they are coupled
    C̃_t    = ψ(A_c)
    Ĉ_t    = F_t ⊙ C' + I_t ⊙ C̃_t, clamped to [-clip, clip]
    O_t    = φ(A_o + P_o ⊙ Ĉ_t)
    H_t    = k^h ⊙ H' + (1 - k^h) ⊙ O_t ⊙ χ(Ĉ_t)
    C_t    = k^c ⊙ C' + (1 - k^c) ⊙ Ĉ_t
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Gradients", "Trace", "Variant", "backward", "forward", "sigmoid"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Variant:
    """How the cell differs from the textbook's; everything off by default.

    Sources: peepholes, Gers, Schraudolph & Schmidhuber (2002), with a weight a unit; coupled gates and clipping,
    Greff et al. (2017) and Sak, Senior & Beaufays (2014); zoneout, Krueger et al. (2017); a scale of h that is the same
    at every step, Gal & Ghahramani (2016).
    """

    resets: ArrayLike | None = None  # [T, B], true where the state is zeroed before step t
    peephole: ArrayLike | None = None  # [3H]: P_i, P_f, P_o
    coupled: bool = False
    cell_clip: float | None = None
    activations: tuple[str, str, str] = ("sigmoid", "tanh", "tanh")  # of gates, input node, output
    h_scale: ArrayLike | None = None  # [B, H]
    keep_h: ArrayLike | None = None  # [T, B, H]
    keep_c: ArrayLike | None = None  # [T, B, H]


_ARRAYS = frozenset({"resets", "peephole", "h_scale", "keep_h", "keep_c"})


@dataclass(frozen=True)
class Trace:
    """A forward pass with everything it computed; float64, C order."""

    x: Array  # [T, B, D]
    w_ih: Array  # [4H, D]
    w_hh: Array  # [4H, H]
    b: Array  # [4H], b_ih + b_hh
    h0: Array  # [B, H]
    c0: Array  # [B, H]
    h: Array  # [T, B, H], the layer's output
    c: Array  # [T, B, H], the memory cell after each step
    i: Array  # [T, B, H], input gate, in (0, 1)
    f: Array  # [T, B, H], forget gate, in (0, 1)
    g: Array  # [T, B, H], input node, in (-1, 1)
    o: Array  # [T, B, H], output gate, in (0, 1)
    c_hat: Array  # [T, B, H], the memory cell before zoneout; c where there is none
    h_prev: Array  # [T, B, H], the hidden state each step began with
    c_prev: Array  # [T, B, H], the memory cell each step began with
    variant: Variant = Variant()

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
    peephole: Array  # [3H]; of no meaning where the variant has none


def sigmoid(a: Array) -> Array:
    """σ(a) = 1 / (1 + exp(-a)), without overflow and accurate in both tails."""
    e = np.exp(-np.abs(a))
    return np.where(a >= 0, 1.0, e) / (1.0 + e)


#: Each with its derivative, both as functions of the argument.
_ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "sigmoid": (sigmoid, lambda a: sigmoid(a) * sigmoid(-a)),
    "tanh": (np.tanh, lambda a: np.cosh(np.clip(a, -300, 300)) ** -2.0),
    "relu": (lambda a: np.maximum(a, 0.0), lambda a: np.where(a > 0, 1.0, 0.0)),
    "hard_sigmoid": (
        lambda a: np.minimum(1.0, np.maximum(0.0, 0.2 * a + 0.5)),
        lambda a: np.where(np.abs(a) < 2.5, 0.2, 0.0),
    ),
    "softsign": (lambda a: a / (1.0 + np.abs(a)), lambda a: (1.0 + np.abs(a)) ** -2.0),
    "softplus": (lambda a: np.logaddexp(0.0, a), sigmoid),
    "leaky_relu": (lambda a: np.where(a > 0, a, 0.01 * a), lambda a: np.where(a > 0, 1.0, 0.01)),
    "elu": (lambda a: np.where(a > 0, a, np.expm1(np.minimum(a, 0))), lambda a: np.exp(np.minimum(a, 0))),
}


def forward(
    x: ArrayLike,
    w_ih: ArrayLike,
    w_hh: ArrayLike,
    b_ih: ArrayLike | None = None,
    b_hh: ArrayLike | None = None,
    h0: ArrayLike | None = None,
    c0: ArrayLike | None = None,
    *,
    variant: Variant | None = None,
) -> Trace:
    """Run the LSTM over a sequence and keep every gate and state.

    Args:
        x: input [T, B, D]; T, B and D may be 0.
        w_ih: input weights [4H, D], gates stacked i, f, g, o.
        w_hh: recurrent weights [4H, H], stacked likewise.
        b_ih, b_hh: biases [4H]; None is zero.
        h0, c0: initial hidden and cell state [B, H]; None is zero.
        variant: how the cell differs from the textbook's; None is not at all.

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

    variant = variant or Variant()
    held = {k: np.array(v) for k, v in vars(variant).items() if k in _ARRAYS and v is not None}
    variant = replace(variant, **held)  # type: ignore[arg-type]  # copies: a trace outlives its inputs
    cuts, p_i, p_f, p_o, scale, keep_h, keep_c = _parts(variant, T, B, H)
    phi, psi, chi = (_activation(name)[0] for name in variant.activations)
    i, f, g, o, c, h, c_hat, h_prev, c_prev = (np.empty((T, B, H)) for _ in range(9))
    for t in range(T):
        h_prev[t] = np.where(cuts[t], 0.0, h[t - 1] if t else h0)
        c_prev[t] = np.where(cuts[t], 0.0, c[t - 1] if t else c0)
        a = x[t] @ w_ih.T + (scale * h_prev[t]) @ w_hh.T + b  # [B, 4H]
        a_i, a_f, a_g, a_o = np.split(a, 4, axis=1)  # [B, H] each
        i[t] = phi(a_i + p_i * c_prev[t])
        f[t] = 1 - i[t] if variant.coupled else phi(a_f + p_f * c_prev[t])
        g[t] = psi(a_g)
        c_hat[t] = f[t] * c_prev[t] + i[t] * g[t]
        if variant.cell_clip is not None:
            c_hat[t] = np.clip(c_hat[t], -variant.cell_clip, variant.cell_clip)
        o[t] = phi(a_o + p_o * c_hat[t])
        h[t] = keep_h[t] * h_prev[t] + (1 - keep_h[t]) * o[t] * chi(c_hat[t])
        c[t] = keep_c[t] * c_prev[t] + (1 - keep_c[t]) * c_hat[t]
    given = {"x": x, "w_ih": w_ih, "w_hh": w_hh, "h0": h0, "c0": c0, "b": b}
    return Trace(
        **given, h=h, c=c, i=i, f=f, g=g, o=o, c_hat=c_hat, h_prev=h_prev, c_prev=c_prev, variant=variant
    )


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
    variant = trace.variant
    cuts, p_i, p_f, p_o, scale, keep_h, keep_c = _parts(variant, T, B, H)
    d_phi, d_psi, d_chi = (_activation(name)[1] for name in variant.activations)
    chi = _activation(variant.activations[2])[0]
    sent = scale * trace.h_prev  # [T, B, H], what the recurrent weights receive
    a_i, a_f, a_g, a_o = np.split(trace.x @ trace.w_ih.T + sent @ trace.w_hh.T + trace.b, 4, axis=2)

    gates = np.empty((T, B, 4 * H))
    for t in reversed(range(T)):
        i, f, g, o, c_prev, c_hat = (getattr(trace, k)[t] for k in ("i", "f", "g", "o", "c_prev", "c_hat"))
        dh = dh + grad_h[t]
        dh_new = (1 - keep_h[t]) * dh
        da_o = dh_new * chi(c_hat) * d_phi(a_o[t] + p_o * c_hat)
        dc_hat = (1 - keep_c[t]) * dc + dh_new * o * d_chi(c_hat) + da_o * p_o
        if variant.cell_clip is not None:
            dc_hat = np.where(np.abs(c_hat) < variant.cell_clip, dc_hat, 0.0)
        di, df = dc_hat * g, dc_hat * c_prev
        if variant.coupled:
            di, df = di - df, np.zeros_like(df)
        da_i = di * d_phi(a_i[t] + p_i * c_prev)
        da_f = df * d_phi(a_f[t] + p_f * c_prev)
        da_g = dc_hat * i * d_psi(a_g[t])
        gates[t] = np.concatenate([da_i, da_f, da_g, da_o], axis=1)
        dh = np.where(cuts[t], 0.0, scale * (gates[t] @ trace.w_hh) + keep_h[t] * dh)
        dc = np.where(cuts[t], 0.0, dc_hat * f + da_i * p_i + da_f * p_f + keep_c[t] * dc)
    d_i, d_f, _, d_o = np.split(gates, 4, axis=2)
    seen = ((d_i, trace.c_prev), (d_f, trace.c_prev), (d_o, trace.c_hat))
    return Gradients(
        x=gates @ trace.w_ih,
        w_ih=_over_steps(gates, trace.x),
        w_hh=_over_steps(gates, sent),
        b=gates.sum(axis=(0, 1)),
        h0=dh,
        c0=dc,
        gates=gates,
        peephole=np.concatenate([(d * c).sum(axis=(0, 1)) for d, c in seen]),
    )


def _parts(variant: Variant, T: int, B: int, H: int) -> tuple[Array, ...]:
    """cuts [T, B, 1], the peephole weights of i, f and o [H], scale [B, H], keep_h and keep_c [T, B, H]."""

    def part(name: str, shape: tuple[int, ...], default: float) -> Array:
        value = getattr(variant, name)
        return np.full(shape, default) if value is None else _expect(name, _array(name, value), shape, "of the variant")

    p_i, p_f, p_o = np.split(part("peephole", (3 * H,), 0.0), 3)
    cuts = part("resets", (T, B), 0.0)[..., None] != 0
    keeps = part("keep_h", (T, B, H), 0.0), part("keep_c", (T, B, H), 0.0)
    return cuts, p_i, p_f, p_o, part("h_scale", (B, H), 1.0), *keeps


def _activation(name: str) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]


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
