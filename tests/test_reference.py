"""The NumPy reference against central finite differences and against torch.nn.LSTM in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tritlstm import reference

EPS64 = np.finfo(np.float64).eps
INPUTS = ("x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0")

SIZES = [
    # T, B, D, H
    (1, 1, 1, 1),
    (1, 3, 2, 4),
    (5, 1, 3, 2),
    (7, 3, 5, 4),
    (4, 2, 1, 9),
]
sizes = pytest.mark.parametrize(("T", "B", "D", "H"), SIZES, ids=lambda value: str(value))


def draw(T: int, B: int, D: int, H: int, seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {
        "x": (T, B, D),
        "w_ih": (4 * H, D),
        "w_hh": (4 * H, H),
        "b_ih": (4 * H,),
        "b_hh": (4 * H,),
        "h0": (B, H),
        "c0": (B, H),
    }
    return {name: scale * rng.standard_normal(shape) for name, shape in shapes.items()}


def draw_gradients(T: int, B: int, H: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(99)
    shapes = {"grad_h": (T, B, H), "grad_h_n": (B, H), "grad_c_n": (B, H)}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def loss(inputs: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> float:
    trace = reference.forward(**inputs)
    return float(
        (trace.h * weights["grad_h"]).sum()
        + (trace.h_n * weights["grad_h_n"]).sum()
        + (trace.c_n * weights["grad_c_n"]).sum()
    )


def gradients_of(inputs: dict[str, np.ndarray], weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    got = reference.backward(reference.forward(**inputs), **weights)
    return {
        "x": got.x,
        "w_ih": got.w_ih,
        "w_hh": got.w_hh,
        "b_ih": got.b,
        "b_hh": got.b,
        "h0": got.h0,
        "c0": got.c0,
    }


def torch_lstm(
    inputs: dict[str, np.ndarray], weights: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Outputs and gradients of torch.nn.LSTM in float64."""
    _, _, D = inputs["x"].shape
    H = inputs["w_hh"].shape[1]
    lstm = torch.nn.LSTM(D, H, dtype=torch.float64)
    parameters = {
        "w_ih": lstm.weight_ih_l0,
        "w_hh": lstm.weight_hh_l0,
        "b_ih": lstm.bias_ih_l0,
        "b_hh": lstm.bias_hh_l0,
    }
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(inputs[name]))
    x, h0, c0 = (torch.from_numpy(inputs[name]).requires_grad_() for name in ("x", "h0", "c0"))
    out, (h_n, c_n) = lstm(x, (h0[None], c0[None]))
    torch.autograd.backward(
        [out, h_n[0], c_n[0]],
        [torch.from_numpy(weights[name]) for name in ("grad_h", "grad_h_n", "grad_c_n")],
    )
    outputs = {"h": out, "h_n": h_n[0], "c_n": c_n[0]}
    leaves = {"x": x, "h0": h0, "c0": c0, **parameters}
    return (
        {name: tensor.detach().numpy() for name, tensor in outputs.items()},
        {name: tensor.grad.numpy() for name, tensor in leaves.items()},
    )


def assert_close(got: np.ndarray, want: np.ndarray, name: str, roundings: float = 16) -> None:
    """Equal but for the order of summation: 16 roundings of the largest element, where 3 were seen."""
    np.testing.assert_allclose(
        got, want, rtol=0, atol=roundings * EPS64 * max(1.0, np.abs(want).max(initial=0)), err_msg=name
    )


def test_one_step_by_hand():
    """B = D = H = 1, with numbers worked out on paper from the textbook's equations."""
    w_ih = [[0.5], [-1.0], [2.0], [0.25]]
    w_hh = [[1.0], [0.5], [-0.5], [2.0]]
    b_ih, b_hh = [0.1, 0.2, 0.3, 0.4], [-0.2, 0.3, 0.1, -0.6]
    trace = reference.forward([[[2.0]]], w_ih, w_hh, b_ih, b_hh, h0=[[0.5]], c0=[[-1.5]])
    # pre-activations: w_ih*2 + w_hh*0.5 + b_ih + b_hh
    i = 1 / (1 + np.exp(-(1.0 + 0.5 - 0.1)))
    f = 1 / (1 + np.exp(-(-2.0 + 0.25 + 0.5)))
    g = np.tanh(4.0 - 0.25 + 0.4)
    o = 1 / (1 + np.exp(-(0.5 + 1.0 - 0.2)))
    c = f * -1.5 + i * g
    want = {"i": i, "f": f, "g": g, "o": o, "c": c, "h": o * np.tanh(c)}
    for name, value in want.items():
        assert getattr(trace, name).item() == pytest.approx(value, rel=1e-14), name
    assert trace.h_n.item() == trace.h.item()
    assert trace.c_n.item() == trace.c.item()


@sizes
def test_matches_torch(T, B, D, H):
    inputs, weights = draw(T, B, D, H), draw_gradients(T, B, H)
    outputs, gradients = torch_lstm(inputs, weights)
    trace = reference.forward(**inputs)
    for name, want in outputs.items():
        assert_close(getattr(trace, name), want, name)
    for name, got in gradients_of(inputs, weights).items():
        assert_close(got, gradients[name], f"gradient of {name}")


@sizes
def test_gradients_match_finite_differences(T, B, D, H):
    inputs, weights = draw(T, B, D, H), draw_gradients(T, B, H)
    got = gradients_of(inputs, weights)
    step = EPS64 ** (1 / 3)  # balances the cut-off error step² against the rounding error eps/step
    for name in INPUTS:
        want = np.empty_like(inputs[name])
        for index in np.ndindex(want.shape):
            both = []
            for sign in (1, -1):
                moved = {**inputs, name: inputs[name].copy()}
                moved[name][index] += sign * step
                both.append(loss(moved, weights))
            want[index] = (both[0] - both[1]) / (2 * step)
        scale = max(1.0, abs(loss(inputs, weights)), np.abs(want).max())
        # 3.4 step² seen
        np.testing.assert_allclose(got[name], want, rtol=0, atol=10 * step**2 * scale, err_msg=name)


@pytest.mark.parametrize("alone", ["grad_h", "grad_h_n", "grad_c_n"])
def test_each_upstream_gradient_alone(alone):
    """None stands for zeros, and the three add up."""
    T, B, D, H = 4, 3, 2, 5
    trace, weights = reference.forward(**draw(T, B, D, H)), draw_gradients(T, B, H)
    zeros = {name: np.zeros_like(value) for name, value in weights.items()}
    got = reference.backward(trace, **{alone: weights[alone]})
    want = reference.backward(trace, **{**zeros, alone: weights[alone]})
    for name in ("x", "w_ih", "w_hh", "b", "h0", "c0", "gates"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    total = reference.backward(trace, **weights)
    parts = [reference.backward(trace, **{name: weights[name]}) for name in weights]
    for name in ("x", "w_ih", "w_hh", "b", "h0", "c0", "gates"):
        assert_close(sum(getattr(part, name) for part in parts), getattr(total, name), name)


def test_missing_bias_and_state_are_zeros():
    inputs = draw(3, 2, 4, 5)
    zeros = {name: np.zeros_like(inputs[name]) for name in ("b_ih", "b_hh", "h0", "c0")}
    want = reference.forward(**{**inputs, **zeros})
    got = reference.forward(inputs["x"], inputs["w_ih"], inputs["w_hh"])
    np.testing.assert_array_equal(got.h, want.h)
    np.testing.assert_array_equal(got.c, want.c)
    only_one = reference.forward(**{**inputs, "b_hh": None, "b_ih": inputs["b_ih"] + inputs["b_hh"]})
    assert_close(only_one.h, reference.forward(**inputs).h, "h with one bias")


def test_a_sequence_in_two_parts():
    inputs = draw(9, 3, 4, 5)
    whole = reference.forward(**inputs)
    first = reference.forward(**{**inputs, "x": inputs["x"][:4]})
    second = reference.forward(**{**inputs, "x": inputs["x"][4:], "h0": first.h_n, "c0": first.c_n})
    np.testing.assert_array_equal(np.concatenate([first.h, second.h]), whole.h)
    np.testing.assert_array_equal(np.concatenate([first.c, second.c]), whole.c)


def test_backward_in_two_parts():
    inputs, weights = draw(9, 3, 4, 5), draw_gradients(9, 3, 5)
    whole = reference.backward(reference.forward(**inputs), **weights)
    first = reference.forward(**{**inputs, "x": inputs["x"][:4]})
    second = reference.forward(**{**inputs, "x": inputs["x"][4:], "h0": first.h_n, "c0": first.c_n})
    late = reference.backward(second, weights["grad_h"][4:], weights["grad_h_n"], weights["grad_c_n"])
    early = reference.backward(first, weights["grad_h"][:4], late.h0, late.c0)
    assert_close(np.concatenate([early.x, late.x]), whole.x, "x")
    assert_close(early.h0, whole.h0, "h0")
    assert_close(early.c0, whole.c0, "c0")
    for name in ("w_ih", "w_hh", "b"):
        assert_close(getattr(early, name) + getattr(late, name), getattr(whole, name), name)


def test_batch_rows_are_independent():
    inputs = draw(5, 4, 3, 6)
    whole = reference.forward(**inputs)
    for row in range(4):
        part = {name: inputs[name][row : row + 1] for name in ("h0", "c0")}
        alone = reference.forward(**{**inputs, "x": inputs["x"][:, row : row + 1], **part})
        assert_close(alone.h, whole.h[:, row : row + 1], f"h of row {row}")


def test_saturated_gates_stay_finite():
    inputs = draw(6, 2, 3, 4, scale=1e3)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        trace = reference.forward(**inputs)
        gradients = reference.backward(trace, **draw_gradients(6, 2, 4))
    for name in ("i", "f", "o"):
        assert ((getattr(trace, name) >= 0) & (getattr(trace, name) <= 1)).all(), name
    assert all(np.isfinite(value).all() for value in vars(gradients).values())


def test_sigmoid_is_accurate_in_both_tails():
    a = np.array([-745.0, -700.0, -40.0, -1.0, -1e-20, 0.0, 1e-20, 1.0, 40.0, 700.0, 800.0])
    want = [float(1 / (1 + np.exp(np.longdouble(-value)))) for value in a]
    np.testing.assert_allclose(reference.sigmoid(a), want, rtol=4 * EPS64, atol=0)
    assert reference.sigmoid(np.array([-800.0])) == 0


@pytest.mark.parametrize(("T", "B", "D", "H"), [(0, 2, 3, 4), (3, 0, 2, 4), (3, 2, 0, 4)])
def test_empty_sizes(T, B, D, H):
    inputs = draw(T, B, D, H)
    trace = reference.forward(**inputs)
    gradients = reference.backward(trace, **draw_gradients(T, B, H))
    assert trace.h.shape == (T, B, H)
    for name in ("x", "w_ih", "w_hh", "h0", "c0"):
        assert getattr(gradients, name).shape == inputs[name].shape
    if T == 0:
        weights = draw_gradients(T, B, H)
        np.testing.assert_array_equal(trace.h_n, inputs["h0"])
        np.testing.assert_array_equal(trace.c_n, inputs["c0"])
        np.testing.assert_array_equal(gradients.h0, weights["grad_h_n"])
        np.testing.assert_array_equal(gradients.c0, weights["grad_c_n"])
        np.testing.assert_array_equal(gradients.w_hh, np.zeros_like(inputs["w_hh"]))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_results_are_float64(dtype):
    inputs = {name: value.astype(dtype) for name, value in draw(3, 2, 4, 5).items()}
    trace = reference.forward(**inputs)
    want = reference.forward(**{name: value.astype(np.float64) for name, value in inputs.items()})
    np.testing.assert_array_equal(trace.h, want.h)
    for record in (trace, reference.backward(trace)):
        arrays = {name: value for name, value in vars(record).items() if name != "variant"}
        assert {value.dtype for value in arrays.values()} == {np.dtype(np.float64)}


def test_a_trace_outlives_its_inputs():
    """An optimizer that changes the weights in place must not change the gradients of an earlier pass."""
    inputs = draw(3, 2, 4, 5)
    trace = reference.forward(**inputs)
    before = reference.backward(trace, grad_h_n=np.ones((2, 5)))
    for value in inputs.values():
        value *= -3
    after = reference.backward(trace, grad_h_n=np.ones((2, 5)))
    for name, value in vars(before).items():
        np.testing.assert_array_equal(getattr(after, name), value, err_msg=name)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "x",
            np.zeros((3, 4)),
            r"x must be \[T, B, D\], got shape \(3, 4\); for one sequence pass x\[:, None, :\]",
        ),
        ("w_hh", np.zeros((21, 5)), r"w_hh must be \[4H, H\], got shape \(21, 5\)"),
        ("w_ih", np.zeros((20, 3)), r"w_ih must have shape \(20, 4\) \(\[4H, D\].*\), got \(20, 3\)"),
        ("b_ih", np.zeros(5), r"b_ih must have shape \(20,\).*, got \(5,\)"),
        ("b_hh", np.zeros((20, 1)), r"b_hh must have shape \(20,\).*, got \(20, 1\)"),
        ("h0", np.zeros((1, 2, 5)), r"h0 must have shape \(2, 5\).*, got \(1, 2, 5\)"),
        ("c0", np.zeros((2, 4)), r"c0 must have shape \(2, 5\).*, got \(2, 4\)"),
        ("x", "text", r"x must be an array of real numbers, got str"),
    ],
)
def test_bad_arguments_name_what_they_got(name, value, message):
    inputs = {**draw(3, 2, 4, 5), name: value}
    with pytest.raises(ValueError, match=message):
        reference.forward(**inputs)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("grad_h", (2, 5), r"grad_h must have shape \(3, 2, 5\).*, got \(2, 5\)"),
        ("grad_h_n", (1, 2, 5), r"grad_h_n must have shape \(2, 5\).*, got \(1, 2, 5\)"),
        ("grad_c_n", (2, 6), r"grad_c_n must have shape \(2, 5\).*, got \(2, 6\)"),
    ],
)
def test_bad_upstream_gradients_name_what_they_got(name, shape, message):
    trace = reference.forward(**draw(3, 2, 4, 5))
    with pytest.raises(ValueError, match=message):
        reference.backward(trace, **{name: np.zeros(shape)})
