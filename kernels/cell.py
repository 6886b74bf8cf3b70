"""The LSTM cell's algebra and its derivative, in fp32, element by element.

Both recurrent kernels call these and nothing else does the arithmetic again. Gate order is i, f, g, o.
Source: Hochreiter & Schmidhuber (1997) with the forget gate of Gers et al. (2000), as in ``torch.nn.LSTM``.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    # (1 - e) / (1 + e) cancels near zero; the Taylor polynomial is exact to fp32 rounding below 0.25.
    magnitude = tl.abs(x)
    e = tl.exp(-2.0 * magnitude)
    large = (1.0 - e) / (1.0 + e)
    square = x * x
    series = 0.021869488536155203
    series = series * square - 0.053968253968253971
    series = series * square + 0.13333333333333333
    series = series * square - 0.33333333333333331
    small = magnitude + magnitude * (square * series)
    result = tl.where(magnitude < 0.25, small, large)
    return tl.where(x < 0, -result, result)


@triton.jit
def forward(pre_i, pre_f, pre_g, pre_o, c_previous):
    """Pre-activations and the previous cell state to ``(i, f, g, o, c, h)``, all of one shape, fp32."""
    i = sigmoid(pre_i)
    f = sigmoid(pre_f)
    g = tanh(pre_g)
    o = sigmoid(pre_o)
    c = f * c_previous + i * g
    return i, f, g, o, c, o * tanh(c)


@triton.jit
def backward(dh, dc, i, f, g, o, c, c_previous):
    """Gradients of h and of the next step's cell input to those of the pre-activations.

    Returns ``(d_pre_i, d_pre_f, d_pre_g, d_pre_o, dc_previous)``, fp32.
    """
    tanh_c = tanh(c)
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)
    d_pre_i = dc * g * i * (1.0 - i)
    d_pre_f = dc * c_previous * f * (1.0 - f)
    d_pre_g = dc * i * (1.0 - g * g)
    d_pre_o = dh * tanh_c * o * (1.0 - o)
    return d_pre_i, d_pre_f, d_pre_g, d_pre_o, dc * f
