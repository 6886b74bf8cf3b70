"""The modules on the Triton kernels: through the parallel emulator, or on CUDA where it is found.

A few tiny cases, because an emulated step takes milliseconds; together they pass every branch of the walk
from the module to the kernels and back. The yardstick is torch in float64, the budget twice torch's own error
in the same dtype on the same numbers, plus one rounding.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import tritlstm
from tritlstm import aten, cpu, emulator, ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, B, D, H = 4, 3, 5, 12
LENGTHS = [2, 4, 3]
CASES: dict[str, tuple[torch.dtype, dict[str, Any], str]] = {
    "fp32": (torch.float32, {}, "batch"),
    "fp16": (torch.float16, {"bias": False}, "batch"),
    "bf16 batch_first": (torch.bfloat16, {"batch_first": True}, "batch_first"),
    "fp32 both directions packed": (torch.float32, {"bidirectional": True}, "packed"),
    "bf16 two layers both directions": (torch.bfloat16, {"num_layers": 2, "bidirectional": True}, "batch"),
    "fp16 projection": (torch.float16, {"proj_size": 5}, "batch"),
    "fp32 projection both directions packed": (
        torch.float32,
        {"proj_size": 5, "bidirectional": True},
        "packed",
    ),
    "fp32 unbatched": (torch.float32, {}, "unbatched"),
}


def kernels() -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if DEVICE == "cuda" else emulator.emulate()


def draw(kind: dict[str, Any], form: str) -> tuple[nn.LSTM, Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    module = nn.LSTM(D, H, **kind)
    rows = module.num_layers * (1 + module.bidirectional)
    batch = () if form == "unbatched" else (B,)
    shape = {"batch_first": (B, T, D), "unbatched": (T, D)}.get(form, (T, B, D))
    h, c = (torch.randn(rows, *batch, width) / 2 for width in (module.proj_size or H, H))
    return module, torch.randn(shape), (h, c)


def run(module: nn.RNNBase, x: Tensor, hx: tuple[Tensor, Tensor], form: str) -> dict[str, Tensor]:
    """Results and gradients, by name, in float64 on the CPU."""
    inputs = [t.detach().clone().requires_grad_() for t in (x, *hx)]
    input: Any = inputs[0]
    if form == "packed":
        input = pack_padded_sequence(input, LENGTHS, enforce_sorted=False)
    out, (h_n, c_n) = module(input, (inputs[1], inputs[2]))
    results = [out.data if isinstance(out, PackedSequence) else out, h_n, c_n]
    weights = [torch.linspace(1, -1, t.numel(), device=t.device).view(t.shape).to(t.dtype) for t in results]
    torch.autograd.backward(results, weights)
    named = dict(zip(("output", "h_n", "c_n"), results, strict=True))
    leaves = {**dict(zip(("x", "h0", "c0"), inputs, strict=True)), **dict(module.named_parameters())}
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    return {name: value.detach().double().cpu() for name, value in (named | gradients).items()}


def assert_within_budget(got: Any, torchs: Any, exact: Any, dtype: torch.dtype) -> None:
    for name, reference in exact.items():
        error, torch_error = ((v[name] - reference).abs().max().item() for v in (got, torchs))
        rounding = reference.abs().max().item() * torch.finfo(dtype).eps / 2
        assert error <= 2 * torch_error + rounding, f"{name}: {error:.3g}, torch {torch_error:.3g}"


@pytest.mark.parametrize(("dtype", "kind", "form"), CASES.values(), ids=CASES.keys())
def test_results_and_gradients_are_within_budget(dtype, kind, form):
    module, x, hx = draw(kind, form)
    theirs = module.to(dtype)
    x, hx = x.to(dtype), (hx[0].to(dtype), hx[1].to(dtype))
    exact = nn.LSTM(D, H, **kind, dtype=torch.float64)
    exact.load_state_dict(theirs.state_dict())
    mine = tritlstm.LSTM(D, H, **kind, dtype=dtype, device=DEVICE)
    mine.load_state_dict(theirs.state_dict())
    with kernels():
        got = run(mine, x.to(DEVICE), (hx[0].to(DEVICE), hx[1].to(DEVICE)), form)
    expected = run(exact, x.double(), (hx[0].double(), hx[1].double()), form)
    assert_within_budget(got, run(theirs, x, hx, form), expected, dtype)


@pytest.mark.parametrize("with_gate0", [False, True], ids=["", "gate0"])
@pytest.mark.parametrize("lengths", [None, [2, 4, 0]], ids=["", "lengths"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_kernels_and_plain_operators_keep_one_contract(reverse, lengths, with_gate0):
    """Every result of both operators, what is saved included: either side may go on from the other's."""
    torch.manual_seed(0)
    x, w_ih, w_hh = torch.randn(T, B, D), torch.randn(4 * H, D) / 2, torch.randn(4 * H, H) / 3
    b_ih, b_hh, h0, c0 = torch.randn(4 * H), torch.randn(4 * H), torch.randn(B, H), torch.randn(B, H)
    gate0 = torch.randn(B, 4 * H) if with_gate0 else None
    ends = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
    forward = on_device(x, w_ih, w_hh, b_ih, b_hh, h0, c0, ends, reverse, True, gate0)
    expected = aten.forward(*forward)
    grads = [torch.randn(t.shape).to(DEVICE) for t in expected[:3]]
    saved = (expected[0], *expected[3:])
    backward = (*grads, *on_device(x, w_ih, w_hh, h0, c0, ends), *saved, reverse, [True] * 7)
    with kernels():
        got = torch.ops.tritlstm.layer(*forward)
        got_backward = torch.ops.tritlstm.layer_backward(*backward)
    expected_backward = aten.backward(*backward)
    got, expected = (meaningful(*results, ends) for results in (got, expected))
    # float32 with sums of some dozen terms of order one; TF32 is off.
    for a, b in zip((*got, *got_backward), (*expected, *expected_backward), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def meaningful(
    out: Tensor, h_n: Tensor, c_n: Tensor, gates: Tensor, cells: Tensor, ends: Any
) -> list[Tensor]:
    """Without what is saved for units beyond H and for steps beyond a sequence's end."""
    gates, cells = torch.cat(aten.unpack_gates(gates, H), -1), cells[..., :H]
    if ends is not None:
        inside = torch.arange(T, device=DEVICE)[:, None] < ends.to(DEVICE)
        gates, cells = gates[inside], cells[inside]
    return [out, h_n, c_n, gates, cells]


def on_device(*values: Any) -> tuple[Any, ...]:
    return tuple(v.to(DEVICE) if isinstance(v, Tensor) else v for v in values)


def test_the_kernels_are_what_runs():
    x = torch.zeros(1, 1, 1, device=DEVICE)
    with kernels():
        assert ops._engine(x).__name__ == "tritlstm.layer"
        assert ops._engine(x.double()) is (aten if x.is_cuda else cpu)
    assert ops._engine(x.cpu()) is cpu


def test_results_of_backward_that_are_not_needed_are_tensors_of_their_own():
    x, w_ih, w_hh, state = on_device(*(torch.zeros(s) for s in ((2, 1, 3), (16, 3), (16, 4), (1, 4))))
    with kernels():
        out, _, _, gates, cells = torch.ops.tritlstm.layer(
            x, w_ih, w_hh, None, None, state, state, None, False, True
        )
        grads = torch.ops.tritlstm.layer_backward(
            out, None, None, x, w_ih, w_hh, state, state, None, out, gates, cells, False, [False] * 7
        )
        engine = ops._engine(x)
        more = engine.backward(
            out, None, None, x, w_ih, w_hh, state, state, None, out, gates, cells, False, (False,) * 8
        )
    assert all(g.shape == (0,) for g in (*grads, *more))
    assert len({id(g) for g in more}) == len(more) == 8


def test_inference_gives_the_bits_of_training():
    module = tritlstm.LSTM(D, H, bidirectional=True, device=DEVICE)
    x = torch.randn(T, B, D, device=DEVICE)
    with kernels():
        out, (h_n, c_n) = module(x)
        with torch.no_grad():
            again, (h_again, c_again) = module(x)
    assert torch.equal(out, again)
    assert torch.equal(h_n, h_again)
    assert torch.equal(c_n, c_again)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_the_cell(bias):
    torch.manual_seed(0)
    theirs, mine = nn.LSTMCell(D, H, bias), tritlstm.LSTMCell(D, H, bias, device=DEVICE)
    mine.load_state_dict(theirs.state_dict())
    x, hx = torch.randn(B, D), (torch.randn(B, H), torch.randn(B, H))
    with kernels():
        h, c = mine(x.to(DEVICE), (hx[0].to(DEVICE), hx[1].to(DEVICE)))
        (h * c).sum().backward()
    expected = theirs(x, hx)
    (expected[0] * expected[1]).sum().backward()
    # float32, sums of at most H + D terms of order one.
    torch.testing.assert_close((h.cpu(), c.cpu()), expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=1e-5, atol=1e-5)


def test_autocast():
    torch.manual_seed(0)
    theirs = nn.LSTM(D, H, proj_size=5)
    mine = tritlstm.LSTM(D, H, proj_size=5, device=DEVICE)
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, D)
    with kernels(), torch.autocast(DEVICE, torch.float16):
        out, (h_n, c_n) = mine(x.to(DEVICE))
    with kernels():
        out.float().square().sum().backward()
    assert {t.dtype for t in (out, h_n, c_n)} == {torch.float16}
    assert {p.grad.dtype for p in mine.parameters()} == {torch.float32}
    expected, _ = theirs(x)
    expected.square().sum().backward()
    # float16 rounds at 2^-11 in the weights, in every state and in every gradient of a gate.
    torch.testing.assert_close(out.float().cpu(), expected, rtol=0.01, atol=0.002)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad.cpu(), b.grad, rtol=0.02, atol=0.002)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
def test_double_backward_equals_that_of_nn_lstm_in_float64(bidirectional):
    """A gradient penalty: the derivative by all weights of the squared gradient by the input."""
    torch.manual_seed(0)
    module = tritlstm.LSTM(D, H, bidirectional=bidirectional, device=DEVICE)
    exact = nn.LSTM(D, H, bidirectional=bidirectional, dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    x = torch.randn(3, 2, D)

    def penalty(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        out, (h_n, c_n) = module(x)
        loss = out.square().sum() + h_n.sin().sum() + c_n.square().sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        first.square().sum().backward()
        return [first.detach(), x.grad, *(p.grad for p in module.parameters())]

    with kernels():
        got = penalty(module, x.to(DEVICE))
    for a, b in zip(got, penalty(exact, x.double()), strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-5, atol=1e-5)


def test_forward_mode_equals_finite_differences_of_nn_lstm_in_float64():
    torch.manual_seed(0)
    module, exact = tritlstm.LSTM(D, H, device=DEVICE), nn.LSTM(D, H, dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    x, v = torch.randn(3, 2, D), torch.randn(3, 2, D)
    with kernels():
        primal, tangent = torch.func.jvp(lambda x: module(x)[0], (x.to(DEVICE),), (v.to(DEVICE),))
    step = 1e-6
    ahead, behind = (exact(x.double() + sign * step * v.double())[0] for sign in (1, -1))
    torch.testing.assert_close(primal.double().cpu(), exact(x.double())[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tangent.double().cpu(), (ahead - behind).detach() / (2 * step), rtol=1e-5, atol=1e-5)


def test_a_compiled_module_runs_the_kernels_too():
    module, x = tritlstm.LSTM(D, H, device=DEVICE), torch.randn(T, B, D, device=DEVICE)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with kernels():
        expected = module(x)[0]
        expected.sum().backward()
        gradients = [p.grad for p in module.parameters()]
        module.zero_grad()
        got = compiled(x)[0]
        got.sum().backward()
    assert torch.equal(got, expected)
    assert all(torch.equal(p.grad, g) for p, g in zip(module.parameters(), gradients, strict=True))
