"""The LSTM cell's algebra and its derivative, in fp32, element by element.

Both recurrent kernels call these and nothing else does the arithmetic again. Gate order is i, f, g, o.
Source: Hochreiter & Schmidhuber (1997) with the forget gate of Gers et al. (2000), as in ``torch.nn.LSTM``. What a
variant changes (``tritlstm.reference.Variant`` has its equations) are compile-time branches: off, they leave no trace.

``FORM`` says how exponential functions are made. ``EXACT`` is for results that are kept in fp32: an exponential with
its argument reduced, correctly rounded division, and a ``tanh`` without cancellation. ``NEAR``, beside products of
TF32, errs by a few 1e-7 of each value, ``SHORT`` by as much of 1; both by more for large arguments. ``AMD`` has no PTX.
"""

import triton
import triton.language as tl

_EXP2 = tl.constexpr("ex2.approx.ftz.f32 $0, $1;")
_RECIPROCAL = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")
_LOG2_E = tl.constexpr(1.4426950408889634)
SHORT = tl.constexpr(0)
NEAR = tl.constexpr(1)
EXACT = tl.constexpr(2)


@triton.constexpr_function
def form(dtype, precision):
    """For results of ``dtype`` after products of ``precision``."""
    if dtype != tl.float32:
        return SHORT.value
    return NEAR.value if precision in ("tf32", "fp16") else EXACT.value


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
def _exp(x, FORM: tl.constexpr, AMD: tl.constexpr):
    if FORM == EXACT:
        # Far beyond where the result is zero or infinity; the rest of a huge x would be anything.
        x = tl.minimum(tl.maximum(x, -200.0, tl.PropagateNan.ALL), 200.0, tl.PropagateNan.ALL)
        # x = n ln 2 + rest; n times the upper part of ln 2 is exact.
        n = tl.floor(x * _LOG2_E + 0.5)
        rest = (x - n * 0.693145751953125) - n * 1.4286068203094172e-06
        y = _exp2(rest * _LOG2_E, AMD) * _exp2(n, AMD)
    else:
        y = _exp2(x * _LOG2_E, AMD)
    return y


@triton.jit
def sigmoid(x, FORM: tl.constexpr, AMD: tl.constexpr):
    e = _exp(-x, FORM, AMD)
    if FORM == EXACT:
        y = tl.div_rn(1.0, 1.0 + e)
    else:
        y = _reciprocal(1.0 + e, AMD)
    return y


@triton.jit
def tanh(x, FORM: tl.constexpr, AMD: tl.constexpr):
    if FORM != SHORT:
        # (1 - e) / (1 + e) cancels near zero; the Taylor polynomial is exact to fp32 rounding below 0.25.
        magnitude = tl.abs(x)
        e = _exp(-2.0 * magnitude, FORM, AMD)
        if FORM == EXACT:
            large = tl.div_rn(1.0 - e, 1.0 + e)
        else:
            large = (1.0 - e) * _reciprocal(1.0 + e, AMD)
        square = x * x
        series = 0.021869488536155203
        series = series * square - 0.053968253968253971
        series = series * square + 0.13333333333333333
        series = series * square - 0.33333333333333331
        small = magnitude + magnitude * (square * series)
        y = tl.where(magnitude < 0.25, small, large)
        y = tl.where(x < 0, -y, y)
    else:
        y = 2.0 * _reciprocal(1.0 + _exp(-2.0 * x, FORM, AMD), AMD) - 1.0
    return y


@triton.jit
def activation(x, KIND: tl.constexpr, FORM: tl.constexpr, AMD: tl.constexpr):
    """``KIND`` is a place in ``tritlstm.cell_options.ACTIVATIONS``."""
    if KIND == 0:
        y = sigmoid(x, FORM, AMD)
    elif KIND == 1:
        y = tanh(x, FORM, AMD)
    elif KIND == 2:
        y = tl.maximum(x, 0.0)
    elif KIND == 3:
        y = tl.minimum(tl.maximum(0.2 * x + 0.5, 0.0), 1.0)
    elif KIND == 4:
        y = x / (1.0 + tl.abs(x))
    elif KIND == 5:
        y = tl.maximum(x, 0.0) + tl.log(1.0 + _exp(-tl.abs(x), FORM, AMD))
    elif KIND == 6:
        y = tl.where(x > 0, x, 0.01 * x)
    else:
        y = tl.where(x > 0, x, _exp(tl.minimum(x, 0.0), FORM, AMD) - 1.0)
    return y


@triton.jit
def through(d, y, KIND: tl.constexpr, FORM: tl.constexpr, AMD: tl.constexpr):
    """``d`` times the derivative of :func:`activation`, from its value ``y``."""
    if KIND == 0:
        d = d * y * (1.0 - y)
    elif KIND == 1:
        d = d * (1.0 - y * y)
    elif KIND == 2:
        d = tl.where(y > 0, d, 0.0)
    elif KIND == 3:
        d = tl.where((y > 0) & (y < 1), 0.2 * d, 0.0)
    elif KIND == 4:
        d = d * (1.0 - tl.abs(y)) * (1.0 - tl.abs(y))
    elif KIND == 5:
        d = d * (1.0 - _exp(-y, FORM, AMD))
    elif KIND == 6:
        d = tl.where(y > 0, d, 0.01 * d)
    else:
        d = tl.where(y > 0, d, d * (y + 1.0))
    return d


@triton.jit
def candidate(i, f, g, c_previous, CLIP: tl.constexpr):
    """The cell state before zoneout."""
    c = f * c_previous + i * g
    if CLIP is not None:
        c = tl.minimum(tl.maximum(c, -CLIP), CLIP)
    return c


@triton.jit
def peephole_weights(peephole_ptr, unit, H: tl.constexpr):
    """Those of i, f and o, ``[1, BLOCK_H, 1]`` each, fp32."""
    known = unit < H
    p_i = tl.load(peephole_ptr + unit, mask=known, other=0.0).to(tl.float32)
    p_f = tl.load(peephole_ptr + H + unit, mask=known, other=0.0).to(tl.float32)
    p_o = tl.load(peephole_ptr + 2 * H + unit, mask=known, other=0.0).to(tl.float32)
    return p_i, p_f, p_o


@triton.jit
def forward(
    pre_i, pre_f, pre_g, pre_o, c_previous, FORM: tl.constexpr, AMD: tl.constexpr, peephole=None,
    COUPLED: tl.constexpr = False, CLIP: tl.constexpr = None, GATE: tl.constexpr = 0, NODE: tl.constexpr = 1,
    SHOWN: tl.constexpr = 1,
):  # fmt: skip
    """Pre-activations and the previous cell state to ``(i, f, g, o, c, h)``, all of one shape, fp32.

    ``peephole`` is None or the weights of i, f and o. ``GATE``, ``NODE`` and ``SHOWN`` are the activations.
    """
    if peephole is not None:
        pre_i += peephole[0] * c_previous
        pre_f += peephole[1] * c_previous
    i = activation(pre_i, GATE, FORM, AMD)
    if COUPLED:
        f = 1.0 - i
    else:
        f = activation(pre_f, GATE, FORM, AMD)
    g = activation(pre_g, NODE, FORM, AMD)
    if peephole is None:
        o = activation(pre_o, GATE, FORM, AMD)
        c = candidate(i, f, g, c_previous, CLIP)
    else:
        c = candidate(i, f, g, c_previous, CLIP)
        o = activation(pre_o + peephole[2] * c, GATE, FORM, AMD)
    return i, f, g, o, c, o * activation(c, SHOWN, FORM, AMD)


@triton.jit
def backward(
    dh, dc, i, f, g, o, c, c_previous, FORM: tl.constexpr, AMD: tl.constexpr, peephole=None,
    COUPLED: tl.constexpr = False, CLIP: tl.constexpr = None, GATE: tl.constexpr = 0, NODE: tl.constexpr = 1,
    SHOWN: tl.constexpr = 1, normed=None,
):  # fmt: skip
    """Gradients of h and of the next step's cell input to those of the pre-activations.

    ``c`` is the cell state before zoneout, ``dh`` and ``dc`` the gradients without what zoneout passes by. ``normed``:
    of a cell normalised on its way out, the activation's value and what of its gradient reaches c. Returns
    ``(d_pre_i, d_pre_f, d_pre_g, d_pre_o, dc_previous)``, fp32.
    """
    if normed is None:
        shown = activation(c, SHOWN, FORM, AMD)
        dc = dc + through(dh * o, shown, SHOWN, FORM, AMD)
    else:
        shown = normed[0]
        dc = dc + normed[1]
    if peephole is not None:
        d_pre_o = through(dh * shown, o, GATE, FORM, AMD)
        dc += d_pre_o * peephole[2]
    if CLIP is not None:
        dc = tl.where(tl.abs(c) < CLIP, dc, 0.0)
    if COUPLED:
        d_pre_i = through(dc * (g - c_previous), i, GATE, FORM, AMD)
        d_pre_f = d_pre_i * 0.0
    else:
        d_pre_i = through(dc * g, i, GATE, FORM, AMD)
        d_pre_f = through(dc * c_previous, f, GATE, FORM, AMD)
    d_pre_g = through(dc * i, g, NODE, FORM, AMD)
    if peephole is None:
        d_pre_o = through(dh * shown, o, GATE, FORM, AMD)
    dc_previous = dc * f
    if peephole is not None:
        dc_previous += d_pre_i * peephole[0] + d_pre_f * peephole[1]
    return d_pre_i, d_pre_f, d_pre_g, d_pre_o, dc_previous
