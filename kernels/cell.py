"""The LSTM cell's algebra and its derivative, in fp32, element by element.

Both recurrent kernels call these and nothing else does the arithmetic again. Gate order is i, f, g, o.
Source: Hochreiter & Schmidhuber (1997) with the forget gate of Gers et al. (2000), as in ``torch.nn.LSTM``.

``EXACT`` is for results that are kept in fp32: an exponential with its argument reduced, correctly rounded
division, and a ``tanh`` without cancellation; the short forms err by a few 1e-7 of 1, more for large arguments.
``AMD`` has no PTX.
"""

import triton
import triton.language as tl

_EXP2 = tl.constexpr("ex2.approx.ftz.f32 $0, $1;")
_RECIPROCAL = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp2(x, AMD: tl.constexpr):
    if AMD:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise(_EXP2, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _reciprocal(x, AMD: tl.constexpr):
    if AMD:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise(_RECIPROCAL, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def _exp(x, EXACT: tl.constexpr, AMD: tl.constexpr):
    if EXACT:
        # x = n ln 2 + rest; n times the upper part of ln 2 is exact.
        n = tl.floor(x * _LOG2_E + 0.5)
        rest = (x - n * 0.693145751953125) - n * 1.4286068203094172e-06
        y = _exp2(rest * _LOG2_E, AMD) * _exp2(n, AMD)
    else:
        y = _exp2(x * _LOG2_E, AMD)
    return y


@triton.jit
def sigmoid(x, EXACT: tl.constexpr, AMD: tl.constexpr):
    e = _exp(-x, EXACT, AMD)
    if EXACT:
        y = tl.div_rn(1.0, 1.0 + e)
    else:
        y = _reciprocal(1.0 + e, AMD)
    return y


@triton.jit
def tanh(x, EXACT: tl.constexpr, AMD: tl.constexpr):
    if EXACT:
        # (1 - e) / (1 + e) cancels near zero; the Taylor polynomial is exact to fp32 rounding below 0.25.
        magnitude = tl.abs(x)
        e = _exp(-2.0 * magnitude, EXACT, AMD)
        large = tl.div_rn(1.0 - e, 1.0 + e)
        square = x * x
        series = 0.021869488536155203
        series = series * square - 0.053968253968253971
        series = series * square + 0.13333333333333333
        series = series * square - 0.33333333333333331
        small = magnitude + magnitude * (square * series)
        y = tl.where(magnitude < 0.25, small, large)
        y = tl.where(x < 0, -y, y)
    else:
        y = 2.0 * _reciprocal(1.0 + _exp(-2.0 * x, EXACT, AMD), AMD) - 1.0
    return y


@triton.jit
def forward(pre_i, pre_f, pre_g, pre_o, c_previous, EXACT: tl.constexpr, AMD: tl.constexpr):
    """Pre-activations and the previous cell state to ``(i, f, g, o, c, h)``, all of one shape, fp32."""
    i = sigmoid(pre_i, EXACT, AMD)
    f = sigmoid(pre_f, EXACT, AMD)
    g = tanh(pre_g, EXACT, AMD)
    o = sigmoid(pre_o, EXACT, AMD)
    c = f * c_previous + i * g
    return i, f, g, o, c, o * tanh(c, EXACT, AMD)


@triton.jit
def backward(dh, dc, i, f, g, o, c, c_previous, EXACT: tl.constexpr, AMD: tl.constexpr):
    """Gradients of h and of the next step's cell input to those of the pre-activations.

    Returns ``(d_pre_i, d_pre_f, d_pre_g, d_pre_o, dc_previous)``, fp32.
    """
    tanh_c = tanh(c, EXACT, AMD)
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)
    d_pre_i = dc * g * i * (1.0 - i)
    d_pre_f = dc * c_previous * f * (1.0 - f)
    d_pre_g = dc * i * (1.0 - g * g)
    d_pre_o = dh * tanh_c * o * (1.0 - o)
    return d_pre_i, d_pre_f, d_pre_g, d_pre_o, dc * f
