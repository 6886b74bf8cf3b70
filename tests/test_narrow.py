"""Where TF32 is allowed: recurrent products of fp32 with operands in fp16, or with weights rounded ahead.

For the first (kernels/narrow.py) the reference here rounds the operands as they should be, in NumPy, and computes all
else in float64. So it agrees with the kernels to the errors of fp32, where TF32 (or any other rounding) is a thousand
times further away.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import test_chains
import test_stack
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_kernels import CUDA, DEVICE, NAMES, Problem, errors, kernels
from torch import Tensor

import tritlstm
from tritlstm import emulator, layer, pipeline, plan, reference
from tritlstm.cell_options import ACTIVATIONS, PLAIN, Cell
from tritlstm.kernels.launch import Launch
from tritlstm.plan import padded

FP32 = torch.float32
ALLOWED: dict[str, Any] = {} if CUDA else {"tf32": True}
#: fp32 errs by 1e-6 at most in a handful of steps. A rounding that goes the other way in fp16, as one in some thousand
#: does, changes an h by up to 2⁻¹⁰ of it, and with it what is multiplied; errors of all roundings, as TF32 makes them,
#: come to 3e-4. In the emulator the numbers are always the same; on a GPU a few results may be beyond it.
AGREES = 2e-5
TWO = np.float64(2)


@pytest.fixture(autouse=True)
def tf32_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")


def rounded_rows(values: Any) -> np.ndarray:
    """Rows as kernels/narrow.py rounds them: in fp16, their largest value at 2¹⁴ to 2¹⁵, scaled by 2¹⁰⁰ at most."""
    rows = np.asarray(values, np.float64)
    largest = np.abs(rows).max(-1, keepdims=True)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        exponent = np.minimum(14 - np.floor(np.log2(largest)), 100)
        scale = TWO ** np.where(np.isfinite(largest), exponent, 0)
        return (rows * scale).astype(np.float16).astype(np.float64) / scale


def rounded_state(h: np.ndarray) -> np.ndarray:
    return (h * 2**14).astype(np.float16).astype(np.float64) / 2**14


def by_rounded_reference(
    p: Problem, lengths: list[int] | None = None, reverse: bool = False, resets: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """out, h_n and c_n, each sequence alone, a step at a time."""
    x, w_ih, w_hh, b_ih, b_hh, h0, c0 = (
        v.double().numpy() for v in (p.x, p.w_ih, p.w_hh, p.b_ih, p.b_hh, p.h0, p.c0)
    )
    weights = w_ih, rounded_rows(w_hh), b_ih, b_hh
    steps, batch, _ = x.shape
    found = {"out": np.zeros((steps, *h0.shape)), "h_n": h0.copy(), "c_n": c0.copy()}
    for b in range(batch):
        one, n = slice(b, b + 1), steps if lengths is None else lengths[b]
        sent, h, c = rounded_rows(h0[one]), h0[one], c0[one]
        for t in reversed(range(n)) if reverse else range(n):
            if resets is not None and resets[t, b]:
                sent, c = np.zeros_like(h), np.zeros_like(c)
            trace = reference.forward(x[t : t + 1, one], *weights, sent, c)
            h, c = trace.h_n, trace.c_n
            sent = rounded_state(h)
            found["out"][t, one] = h
        found["h_n"][one], found["c_n"][one] = h, c
    return found


def draw(t: int, b: int, h: int, seed: int = 0) -> Problem:
    """Without an input, so that the input's products, in TF32, are exact: zero."""
    p = Problem.draw(t, b, 5, h, FP32, seed)
    return dataclasses.replace(p, x=torch.zeros_like(p.x))


@contextlib.contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    seen: list[Launch] = []
    owner: Any = Launch if CUDA else emulator
    run = owner.run
    with monkeypatch.context() as patch:
        patch.setattr(owner, "run", lambda launch: seen.append(launch) or run(launch))
        yield seen


def forward(
    p: Problem, lengths: list[int] | None = None, reverse: bool = False, cell: Cell = PLAIN, **options: Any
) -> dict[str, Tensor]:
    p = p.on(DEVICE)
    ends = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    with kernels(**ALLOWED, **{"narrow": True} | options):
        results = layer.forward(p.x, *p.parameters, p.h0, p.c0, ends, reverse, True, cell=cell)
    return dict(zip(("out", "h_n", "c_n"), (v.cpu() for v in results), strict=False))


def assert_agrees(got: dict[str, Tensor], expected: dict[str, np.ndarray]) -> None:
    for name, value in expected.items():
        errors = np.abs(got[name].double().numpy() - value)
        if CUDA:
            assert np.median(errors) < AGREES / 10, name
            assert np.quantile(errors, 0.9) < AGREES, name
        else:
            assert errors.max() < AGREES, name


#: Columns of a chunk: on a GPU a thread waits for whole runs of 16 bytes.
WIDE = 128 if CUDA else 32
#: (T, B, H) and what forces the path.
PATHS: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    "flag": ((6, 5, 72), {"tier": "persistent"}),
    "flag, odd": ((5, 5, 70), {"tier": "persistent", "block_k": WIDE}),
    "several groups and tiles": ((4, 65, 72), {"tier": "persistent", "block_h": 16, "block_b": 16, "sms": 16}),
    "counter": ((5, 18, 80), {"tier": "persistent", "protocol": "counter", "block_b": 16, "sms": 12}),
    "chunk by chunk": ((4, 3, 136), {"tier": "persistent", "block_k": WIDE, "poll": 1, "sms": 9}),
    "a chunk in registers": (
        (4, 17, 72), {"tier": "persistent", "block_h": 16, "block_b": 16, "block_k": 32, "held": 1, "sms": 10},
    ),
    "7 sequences in half a tile": (
        (4, 20, 72), {"tier": "persistent", "tile_rows": 7, "block_b": 16, "half": True, "block_h": 16, "sms": 15},
    ),
    "8 sequences a tile": ((4, 20, 72), {"tier": "persistent", "block_b": 8, "sms": 15}),
    "streaming": (
        (4, 3, 150), {"tier": "streaming", "sms": 10, "shared_bytes": 32 << 10, "block_k": 32, "block_h": 16},
    ),
    "streaming, copied ahead": (
        (4, 3, 150),
        {"tier": "streaming", "sms": 10, "shared_bytes": 64 << 10, "block_k": 32, "block_h": 16, "stages": 3,
         "resident": 1},
    ),
    "step": ((4, 5, 72), {"tier": "step"}),
    "step, copied ahead": ((3, 3, 150), {"tier": "step", "block_k": 32, "stages": 3}),
}  # fmt: skip


#: In the emulator, where they take minutes, every path runs with lengths or without, by turns.
BY_TURNS = [(path, ends) for k, path in enumerate(PATHS) for ends in (False, True) if CUDA or ends == k % 2]


@pytest.mark.parametrize(("path", "with_lengths"), BY_TURNS)
def test_the_operands_are_those_of_fp16_and_all_else_is_fp32(path, with_lengths):
    sizes, options = PATHS[path]
    p = draw(*sizes)
    ends = {"lengths": [(3 * k + 1) % (sizes[0] + 1) for k in range(sizes[1])], "reverse": True} if with_lengths else {}
    got = forward(p, **ends, **options)
    assert_agrees(got, by_rounded_reference(p, **ends))
    if path == "flag":
        assert 1e-4 < (got["out"] - forward(p, **ends, **options, narrow=False)["out"]).abs().max() < 2e-3


def test_errors_are_those_of_tf32():
    """Of all results and gradients; the input is not zero, and its products are of TF32 in both."""
    most = {name: [0.0, 0.0] for name in NAMES}
    for seed in range(4 if CUDA else 2):
        p = Problem.draw(6, 5, 8, 80, FP32, seed)
        exact = p.by_reference()
        for k, narrow in enumerate((False, True)):
            found = errors(p.by_kernels(tier="persistent", narrow=narrow, **ALLOWED), exact)
            for name in NAMES:
                most[name][k] = max(most[name][k], found[name])
    for name, (tf32, fp16) in most.items():
        assert 1e-5 < fp16 < 1.5 * tf32, (name, tf32, fp16)


def test_weights_and_first_states_of_any_size():
    """Rows of w_hh from 1e-9 to 1e4 and of zeros, of h0 from 1e-30 to 1e30 and of zeros, in one layer."""
    p = draw(5, 9, 72)
    rows = 10.0 ** torch.linspace(-9, 4, 72 * 4)
    rows[::7] = 0
    p.w_hh *= rows[torch.randperm(72 * 4, generator=torch.Generator().manual_seed(0))][:, None]
    p.h0 *= torch.tensor([1, 0, 1e-30, 1e-8, 1e3, 7e4, 1e6, 1e30, 1e-3])[:, None]
    got, expected = forward(p, tier="persistent"), by_rounded_reference(p)
    expected.pop("h_n")
    assert_agrees(got, expected)


@pytest.mark.parametrize("t", [1, 2])
def test_gates_and_cells_err_by_a_few_roundings_of_fp32(t, monkeypatch):
    """Without weights a step is the cell alone, whose shorter functions beside TF32 err by a few 1e-7 of each value."""
    p = draw(t, 1, 256)
    generator = torch.Generator().manual_seed(0)
    sizes = 10 ** (torch.rand(1024, generator=generator) * 9 - 7.7)  # up to 20
    p.b_ih = sizes * torch.randn(1024, generator=generator).sign()
    p = dataclasses.replace(p, w_hh=torch.zeros_like(p.w_hh), b_hh=torch.zeros_like(p.b_hh), c0=p.c0 * 1e-3)
    with watched(monkeypatch) as launches:
        if t == 1:
            q = p.on(DEVICE)
            with kernels(**ALLOWED):
                results = layer.forward(q.x, *q.parameters, q.h0, q.c0, None, False, True)
            got = dict(zip(("out", "h_n", "c_n"), (v.cpu() for v in results), strict=False))
        else:
            got = forward(p, tier="persistent")
    assert [launch.kernel for launch in launches][-1] == ("one_step" if t == 1 else "recurrent_forward")
    exact = p.by_reference()
    for name in ("out", "h_n", "c_n"):
        np.testing.assert_allclose(got[name].double().numpy(), exact[name], rtol=6e-6, atol=1e-15, err_msg=name)


def test_small_states_keep_their_digits():
    """An h of 1e-6 would have 5 of its 11 bits in fp16 as it is."""
    p = draw(6, 4, 72)
    p = dataclasses.replace(
        p, b_ih=torch.zeros_like(p.b_ih), b_hh=torch.zeros_like(p.b_hh), h0=p.h0 * 1e-6, c0=p.c0 * 1e-6
    )
    got, exact = forward(p, tier="persistent"), by_rounded_reference(p)
    assert np.abs(exact["out"]).max() < 1e-5
    np.testing.assert_allclose(got["out"].double().numpy(), exact["out"], rtol=0, atol=1e-4 * 1e-6)


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), -float("inf")])
def test_what_is_not_finite_in_a_first_state_stays_in_its_row(bad):
    p = draw(4, 4, 72)
    clean = forward(p, tier="persistent")
    p.h0[2, 5] = bad
    got = forward(p, tier="persistent")
    plain = forward(p, tier="persistent", narrow=False)
    others = [0, 1, 3]
    for name in ("out", "h_n", "c_n"):
        assert torch.equal(got[name][..., others, :], clean[name][..., others, :]), name
        assert torch.equal(got[name].isnan(), plain[name].isnan()), name
    assert np.isnan(bad) <= got["out"][:, 2].isnan().all()


@pytest.mark.parametrize("protocol", ["flag", "counter"])
def test_the_same_inputs_give_the_same_bits_whatever_the_scheduling(protocol):
    p = Problem.draw(4, 18, 5, 70, FP32)
    options = {"tier": "persistent", "protocol": protocol, "block_h": 16, "block_b": 16, "sms": 10}
    first = forward(p, **options)
    for seed in range(2):
        again = forward(p, **options, seed=seed, delays=emulator.Delays(0.05, 0.004))
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_resets():
    p = draw(6, 5, 72)
    resets = torch.rand((6, 5), generator=torch.Generator().manual_seed(1)) < 0.4
    got = forward(p, cell=Cell(resets=resets.to(DEVICE)), tier="persistent")
    assert resets[0].any()
    assert_agrees(got, by_rounded_reference(p, resets=resets.numpy()))


@pytest.mark.parametrize(
    ("change", "narrow"),
    [
        ({}, True),
        ({"coupled": True}, True),
        ({"cell_clip": 0.5}, True),
        ({"zoneout_c": 0.2}, True),
        ({"activations": ("sigmoid", "relu", "tanh")}, True),
        ({"zoneout_h": 0.2}, False),
        ({"h_scale": 3.0}, False),
        ({"activations": ("sigmoid", "tanh", "relu")}, False),
        ({"activations": ("softplus", "tanh", "tanh")}, False),
    ],
    ids=str,
)
def test_an_h_that_may_be_larger_than_one_is_not_narrowed(change, narrow, monkeypatch):
    p = Problem.draw(3, 2, 4, 72, FP32).on(DEVICE)
    if "activations" in change:
        change = {"activations": tuple(ACTIVATIONS.index(name) for name in change["activations"])}
    if "h_scale" in change:
        change = {"h_scale": torch.full((2, 72), change["h_scale"], device=DEVICE)}
    with watched(monkeypatch) as launches, kernels(**ALLOWED):
        layer.forward(p.x, *p.parameters, p.h0, p.c0, None, False, True, cell=Cell(**change))
    (recurrence,) = (launch for launch in launches if launch.kernel == "recurrent_forward")
    assert recurrence.constants["PRECISION"] == ("fp16" if narrow else "tf32")
    assert ("narrow" in [launch.kernel for launch in launches]) == narrow


@pytest.mark.parametrize("options", [{"layer_norm": True}, {"layer_norm": True, "zoneout": 0.1}], ids=["", "zoneout"])
def test_layer_norm(options, monkeypatch):
    """It is bounded by its last tanh. Beside float64, since the reference here has none."""
    torch.manual_seed(0)
    ours = tritlstm.LSTM(6, 70, device=DEVICE, **options).eval()
    exact = copy.deepcopy(ours).double()
    x = torch.randn(5, 3, 6, device=DEVICE)
    given, wide = (v.clone().requires_grad_() for v in (x, x.double()))
    with watched(monkeypatch) as launches, kernels(**ALLOWED):
        out, _ = ours(given)
        out.sin().sum().backward()
    exact(wide)[0].sin().sum().backward()
    (recurrence,) = (launch for launch in launches if launch.kernel == "recurrent_forward")
    assert recurrence.constants["PRECISION"] == ("tf32" if "zoneout" in options else "fp16")
    assert 1e-6 < (out - exact(x.double())[0]).abs().max() < 3e-3
    grads = {name: (p.grad, dict(exact.named_parameters())[name].grad) for name, p in ours.named_parameters()}
    for name, (got, expected) in (grads | {"x": (given.grad, wide.grad)}).items():
        assert (got - expected).abs().max() < 5e-3 * max(1, expected.abs().max()), name


@pytest.mark.parametrize(("h", "at_once"), [(72, 1), (70, 2)])
def test_directions_side_by_side(h, at_once):
    problems = test_chains.draw(2, 4, 5, 5, h, FP32)
    for p in problems:
        p.x = torch.zeros_like(p.x)
    options = {"at_once": at_once, "sms": 20} if not CUDA else {}
    lengths = [4, 0, 2, 3, 1]
    got = test_chains.by_kernels(problems, 1, lengths, tier="persistent", narrow=True, **options, **ALLOWED)
    for k, p in enumerate(problems):
        assert_agrees(got[k], by_rounded_reference(p, lengths, reverse=k == 1))


@pytest.mark.parametrize("h", [72, 70] if CUDA else [70])
def test_a_pipeline_of_layers_gives_the_bits_of_one_after_another(h):
    p = test_stack.Problem((2, 8, 5, 5, h), FP32)
    x, w_ih, w_between, w_hh, b_ih, b_hh, h0, c0 = (v.to(DEVICE) for v in p.given)
    # The same kernels for a chunk and for the whole, whose rows are more than the smallest tile of the gate GEMM.
    same = {"tile_rows": 0, "block_b": 16, "half": False} if CUDA else {}
    options = {"tier": "persistent", "narrow": True, **same, **ALLOWED}
    with kernels(**options):
        out, h_n, c_n, hidden, *_ = pipeline.forward(
            x, w_ih, w_between, w_hh, b_ih, b_hh, h0, c0, None, True, 2
        )
        below = x
        for k, w in enumerate((w_ih, w_between[0])):
            below, last, c, *_ = layer.forward(
                below, w, w_hh[k], b_ih[k], b_hh[k], h0[k], c0[k], None, False, True
            )
            assert torch.equal(hidden[k, ..., : below.shape[2]], below)
            assert torch.equal(h_n[k], last)
            assert torch.equal(c_n[k], c)
    assert torch.equal(out, below)
    assert hidden.shape == (2, 8, 5, padded(h))


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.cuda
@pytest.mark.parametrize("hidden", [72, 256, 650, 768, 1024, 1500, 2048])
def test_cuda_sizes_where_tf32_is_allowed(hidden):
    """What a device plans for itself: several chunks, weights in registers, streamed; both passes, beside float64."""
    torch.manual_seed(0)
    ours = tritlstm.LSTM(40, hidden, device="cuda")
    exact = copy.deepcopy(ours).double()
    x = torch.randn(6, 20, 40, device="cuda")
    found = []
    for module, value in ((ours, x), (exact, x.double())):
        leaf = value.clone().requires_grad_()
        out, (h_n, c_n) = module(leaf)
        (out.sin().sum() + c_n.sum()).backward()
        found.append({"out": out, "h_n": h_n, "c_n": c_n, "x": leaf.grad} | {
            name: p.grad for name, p in module.named_parameters()})  # fmt: skip
    for name, expected in found[1].items():
        error = (found[0][name] - expected).abs().max()
        assert error < 4e-3 * max(1, expected.abs().max()), name


@pytest.mark.skipif(CUDA, reason="one launch a draw")
@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(finite, min_size=3, max_size=3), min_size=13, max_size=13), st.booleans())
@example([[0.0, 1e-45, -1e-40]] * 6 + [[3.4e38, 1.0, 1e-9]] * 7, False)
@example([[1.0, 2.0**-11, 1 + 2.0**-11]] * 13, True)
def test_narrowed_rows_are_the_formula_s(rows, bad):
    """Bit for bit, padding and the row of zeros included; and a row that is not finite keeps what is not."""
    values = torch.tensor(rows, dtype=FP32)
    if bad:
        values[4, 1], values[12, 2] = float("inf"), float("nan")
    w_hh, h0 = values[:12], values[12:]
    fixed = plan.recurrent("forward", 4, 1, 72, FP32, plan.DEVICES["sm_90"], "tf32")
    chosen = dataclasses.replace(fixed, hidden=3)
    with emulator.emulate():
        found = layer._operands(w_hh, h0, chosen)
    assert found["w_ptr"].dtype == found["entry_ptr"].dtype == torch.float16
    scale = found["w_scale_ptr"][:3].transpose(0, 1).reshape(12, 1).double() * 2**14
    for got, factor, given_rows in (
        (found["w_ptr"], scale, w_hh), (found["entry_ptr"], found["entry_scale_ptr"][:, None].double() / 2**14, h0),
    ):  # fmt: skip
        assert not got[:, 3:].any()
        got, behind = got[: len(given_rows)], got[len(given_rows) :]
        assert len(behind) == (given_rows is h0)
        assert not behind.any()
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal((got[:, :3].double() * factor[: len(got)]).numpy(), rounded_rows(given_rows))


@pytest.mark.skipif(CUDA, reason="reads the emulator's launches")
def test_a_module_narrows_where_tf32_is_allowed(monkeypatch):
    torch.manual_seed(0)
    exact = torch.nn.LSTM(6, 72, bidirectional=True).double()
    ours = tritlstm.LSTM(6, 72, bidirectional=True)
    ours.load_state_dict(exact.state_dict())
    x = torch.randn(4, 3, 6)
    for tf32 in (True, False):
        with watched(monkeypatch) as launches, emulator.emulate(sms=20, tf32=tf32):
            out, (h_n, _) = ours(x)
        assert ("narrow" in [launch.kernel for launch in launches]) == tf32
        expected, (h, _) = exact(x.double())
        error = max((out - expected).abs().max(), (h_n - h).abs().max())
        assert error < (2e-3 if tf32 else 2e-6)
        assert out.dtype == FP32


@pytest.mark.skipif(CUDA, reason="of the pretended device")
def test_explain_says_so():
    x = torch.zeros(4, 3, 6)
    with emulator.emulate(tf32=True):
        wide = str(tritlstm.explain(tritlstm.LSTM(6, 72), x))
        few = str(tritlstm.explain(tritlstm.LSTM(6, 64), x))
        unbounded = str(tritlstm.explain(tritlstm.LSTM(6, 72, zoneout=0.1), x))
    note = "forward, the recurrent ones have operands in fp16, scaled: as many bits as TF32 keeps"
    assert note in wide
    assert "chunks of w_hh on chip in fp16" in wide
    assert note not in few
    assert note not in unbounded


# Weights that are rounded to TF32 before the kernel that reads them

#: (T, B, H) and what forces the path of both directions, of which forward is not narrowed.
ROUNDED: dict[str, tuple[tuple[int, int, int], dict[str, Any]]] = {
    # With more shared memory than any device has.
    "single": ((4, 5, 70), {"tier": "single", "shared_bytes": 512 << 10, "sms": 1}),
    "teams of four": ((4, 5, 70), {"tier": "persistent"}),
    "teams of eight": ((4, 18, 80), {"tier": "persistent", "parts": 8, "sms": 16}),
    "counter": ((4, 18, 72), {"tier": "persistent", "protocol": "counter", "block_b": 16, "sms": 24}),
    "clusters": ((4, 5, 72), {"tier": "persistent", "clustered": True, "block_h": 16, "sms": 8}),
    "streaming": ((3, 3, 150), {"tier": "streaming", "sms": 10, "shared_bytes": 64 << 10, "block_k": 32}),
    "streaming, copied ahead": (
        (3, 3, 150),
        {"tier": "streaming", "sms": 10, "shared_bytes": 64 << 10, "block_k": 32, "stages": 3, "resident": 2},
    ),
    "step": ((3, 3, 72), {"tier": "step"}),
}  # fmt: skip
#: TF32 errs by 1e-3 in sums of this size; weights of another unit or gate, by some tenths.
LARGEST = 1e-2


@pytest.mark.parametrize("path", ROUNDED)
def test_rounded_weights(path, monkeypatch):
    (t, b, h), options = ROUNDED[path]
    p = Problem.draw(t, b, 5, h, FP32)
    with watched(monkeypatch) as launches:
        got = p.by_kernels(**options, **ALLOWED, narrow=False)
    found = errors(got, p.by_reference())
    assert 1e-5 < max(found.values()) < LARGEST, found
    orders = [launch.constants["ORDER"] for launch in launches if launch.kernel == "round_weights"]
    assert orders == ([0] if path == "single" else [0, 1])
    if not CUDA and path not in ("teams of four", "step"):
        return  # minutes in the emulator
    lengths = [(3 * k + 1) % (t + 1) for k in range(b)]
    found = errors(p.by_kernels(lengths, True, **options, **ALLOWED), p.by_reference(lengths, True))
    assert max(found.values()) < LARGEST, found


@pytest.mark.parametrize("more", [{"tier": "persistent", "sms": 20}, {"tier": "single", "shared_bytes": 512 << 10}],
                         ids=["persistent", "single"])  # fmt: skip
def test_rounded_weights_of_directions_side_by_side(more):
    problems = test_chains.draw(2, 3, 5, 5, 70, FP32)
    got = test_chains.by_kernels(problems, 1, **more, narrow=False, **ALLOWED)
    for k, p in enumerate(problems):
        found = errors(got[k] | {"x": p.x}, p.by_reference(reverse=k == 1) | {"x": p.x.numpy()})
        assert max(found.values()) < LARGEST, found


@pytest.mark.parametrize("chunks", [None, 2], ids=["wavefront", "pipeline"])
def test_rounded_weights_of_layers(chunks):
    p = test_stack.Problem((2, 4, 3, 5, 70), FP32)
    forced = {"tier": "persistent", **({} if CUDA else {"sms": 24})}
    got, exact = p.by_kernels(chunks=chunks, **forced, **ALLOWED), p.by_reference()
    found = {name: np.abs(got[name].double().numpy() - exact[name]).max() for name in test_stack.NAMES}
    assert 1e-5 < max(found.values()) < 2 * LARGEST, found


@pytest.mark.parametrize("order", [0, 1], ids=["rows", "columns"])
@pytest.mark.parametrize("h", [72, 67])
def test_weights_are_rounded_to_nearest_and_lie_where_they_should(h, order):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(2, 4 * h, h, generator=generator)
    chosen = plan.recurrent("backward" if order else "forward", 4, 1, 72, FP32, plan.DEVICES["sm_90"], "tf32",
                            overrides={"narrow": False})  # fmt: skip
    with contextlib.nullcontext() if CUDA else emulator.emulate():
        got = layer._weights(w.to(DEVICE), chosen).cpu()
    bits = w.numpy().view(np.int32)
    nearest = ((bits + 0x1000) & ~0x1FFF).view(np.float32)  # ties away from zero
    wide = np.zeros((2, 4, 72, 72), np.float32)
    wide[:, :, :h, :h] = nearest.reshape(2, 4, h, h)
    expected = {
        0: np.pad(nearest, ((0, 0), (0, 0), (0, 72 - h))),
        1: wide.transpose(0, 3, 2, 1).reshape(2, 288, 72),
    }[order]
    np.testing.assert_array_equal(got.numpy(), expected)
