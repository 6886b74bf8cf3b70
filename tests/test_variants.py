"""`tritlstm.LSTM` with resets and as a variant, against an independent formulation, on both paths.

*cpu* is float64 in plain operators; *emulated* runs the Triton kernels in float32 (on CUDA where it is found).
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import tritlstm
from tritlstm import emulator, random_bits, reference
from tritlstm.cell_options import ACTIVATIONS, CellOptions

T, B, D, H = 5, 3, 4, 12
CUDA = torch.cuda.is_available()
NOISE = torch.tensor([2024, 7])
paths = pytest.mark.parametrize("path", ["cpu", "emulated"])


class Path:
    """Where a test runs: device, dtype, context, and how close values must be."""

    def __init__(self, name: str) -> None:
        emulated = name == "emulated"
        self.dtype = torch.float32 if emulated else torch.float64
        self.device = "cuda" if emulated and CUDA else "cpu"
        # float32: sums of some dozen terms of order one over five steps, a hundred roundings of 6e-8.
        self.atol = 1e-5 if emulated else 1e-12
        self.emulated = emulated

    def kernels(self) -> contextlib.AbstractContextManager[Any]:
        return emulator.emulate() if self.emulated and not CUDA else contextlib.nullcontext()

    def lstm(self, *args: Any, **kind: Any) -> tritlstm.LSTM:
        torch.manual_seed(0)
        made = tritlstm.LSTM(*args, dtype=torch.float64, **kind)
        with torch.no_grad():  # values that float32 holds exactly, and not too small
            for p in made.parameters():
                p.copy_((2 * p).float())
        return made.to(self.device, self.dtype)

    def draw(self, *shape: int, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def close(self, got: Any, expected: Any, name: str = "") -> None:
        if isinstance(got, Tensor):
            got = got.detach().double().cpu().numpy()
        if isinstance(expected, Tensor):
            expected = expected.detach().double().cpu().numpy()
        limit = self.atol * max(1.0, np.abs(expected).max(initial=0.0))
        np.testing.assert_allclose(got, expected, rtol=0, atol=limit, err_msg=name)


def weights_of(module: tritlstm.LSTM) -> dict[str, np.ndarray]:
    names = {"w_ih": "weight_ih_l0", "w_hh": "weight_hh_l0", "b_ih": "bias_ih_l0", "b_hh": "bias_hh_l0"}
    return {name: getattr(module, full).detach().double().cpu().numpy() for name, full in names.items()}


def bits(stream: int, shape: tuple[int, ...], p: float, word: int = 0) -> np.ndarray:
    """Zoneout's or dropout's draws, by the published generator's words alone."""
    words = random_bits.draw(torch.cat((NOISE, torch.tensor([stream]))), shape)[word]
    return (words.numpy() / 2**32 < p).astype(float)


def of_peephole(module: tritlstm.LSTM) -> np.ndarray:
    return module.weight_ch_l0.detach().double().cpu().numpy()


#: Arguments of the module, whether it trains, and what it is in the NumPy reference.
OPTIONS: dict[str, tuple[dict[str, Any], bool, Callable[[tritlstm.LSTM], reference.Variant]]] = {
    "peephole": ({"peephole": True}, True, lambda m: reference.Variant(peephole=of_peephole(m))),
    "coupled": ({"coupled": True}, True, lambda m: reference.Variant(coupled=True)),
    "cell_clip": ({"cell_clip": 0.25}, True, lambda m: reference.Variant(cell_clip=0.25)),
    "zoneout in training": (
        {"zoneout": (0.3, 0.4)},
        True,
        lambda m: reference.Variant(keep_h=bits(0, (T, B, H), 0.3), keep_c=bits(0, (T, B, H), 0.4, 1)),
    ),
    "zoneout in evaluation": (
        {"zoneout": 0.3},
        False,
        lambda m: reference.Variant(keep_h=np.full((T, B, H), 0.3), keep_c=np.full((T, B, H), 0.3)),
    ),
    "recurrent_dropout": (
        {"recurrent_dropout": 0.25},
        True,
        lambda m: reference.Variant(h_scale=(1 - bits(1, (B, H), 0.25)) / 0.75),
    ),
    "recurrent_dropout in evaluation": ({"recurrent_dropout": 0.25}, False, lambda m: reference.Variant()),
    "activations": (
        {"activations": ("hard_sigmoid", "softsign", "relu")},
        True,
        lambda m: reference.Variant(activations=("hard_sigmoid", "softsign", "relu")),
    ),
    "recompute": ({"recompute": True}, True, lambda m: reference.Variant()),
    "several": (
        {"peephole": True, "coupled": True, "cell_clip": 0.5, "recompute": True},
        True,
        lambda m: reference.Variant(peephole=of_peephole(m), coupled=True, cell_clip=0.5),
    ),
}


@paths
@pytest.mark.parametrize(("kind", "training", "variant"), OPTIONS.values(), ids=OPTIONS.keys())
def test_an_option_is_the_reference_s(kind, training, variant, path):
    path = Path(path)
    module = path.lstm(D, H, **kind).train(training)
    x = path.draw(T, B, D).requires_grad_()
    noise = NOISE.to(path.device)
    with path.kernels():
        out, (h_n, c_n) = module(x, noise=noise)
        grads = [path.draw(*t.shape, seed=k) for k, t in enumerate((out, h_n, c_n))]
        torch.autograd.backward((out, h_n, c_n), grads)
    trace = reference.forward(x.detach().double().cpu().numpy(), **weights_of(module), variant=variant(module))
    g_out, g_h, g_c = (g.double().cpu().numpy() for g in grads)
    exact = reference.backward(trace, g_out, g_h[0], g_c[0])
    path.close(out, trace.h, "out")
    path.close(h_n[0], trace.h_n, "h_n")
    path.close(c_n[0], trace.c_n, "c_n")
    path.close(x.grad, exact.x, "x")
    pairs = [("weight_ih_l0", exact.w_ih), ("weight_hh_l0", exact.w_hh), ("bias_ih_l0", exact.b)]
    pairs += [("weight_ch_l0", exact.peephole)] if kind.get("peephole") else []
    for name, value in pairs:
        path.close(getattr(module, name).grad, value, name)


def by_parts(module: nn.LSTM, x: Tensor, resets: Tensor, hx: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Each sequence [T, D] cut at its resets and run part by part, layer by layer, from zeros but at its ends."""
    layers, directions = module.num_layers, 2 if module.bidirectional else 1
    outs, states = [], []
    for b in range(x.size(1)):
        begins = [t for t in range(len(x)) if t == 0 or resets[t, b]]
        ends = [*begins[1:], len(x)]
        values, h_n, c_n = x[:, b], [], []
        for layer in range(layers):
            columns = []
            for direction in range(directions):
                k = layer * directions + direction
                single = nn.LSTM(values.size(-1), module.hidden_size, dtype=x.dtype)
                suffix = f"_l{layer}" + ("_reverse" if direction else "")
                given = {
                    f"{name}_l0": getattr(module, f"{name}{suffix}")
                    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                }
                results = []
                for begin, end in zip(begins, ends, strict=True):
                    enters = end == len(x) if direction else begin == 0 and not resets[0, b]
                    state = (hx[0][k, b][None], hx[1][k, b][None]) if enters else None
                    part = values[begin:end].flip(0) if direction else values[begin:end]
                    got, last = torch.func.functional_call(single, given, (part, state))
                    results.append((got.flip(0) if direction else got, last))
                columns.append(torch.cat([got for got, _ in results]))
                final = results[0] if direction else results[-1]
                h_n.append(final[1][0][0])
                c_n.append(final[1][1][0])
            values = torch.cat(columns, -1)
        outs.append(values)
        states.append((torch.stack(h_n), torch.stack(c_n)))
    h_n, c_n = (torch.stack(column, 1) for column in zip(*states, strict=True))
    return torch.stack(outs, 1), h_n, c_n


@paths
@pytest.mark.parametrize("kind", [{}, {"num_layers": 2, "bidirectional": True}], ids=["", "2 layers, 2 directions"])
def test_resets_equal_the_parts_run_one_by_one(kind, path):
    path = Path(path)
    module = path.lstm(D, H, **kind)
    exact = nn.LSTM(D, H, dtype=torch.float64, **kind)
    exact.load_state_dict(module.state_dict())
    rows = module.num_layers * (2 if module.bidirectional else 1)
    x, h0, c0 = path.draw(T, B, D), path.draw(rows, B, H, seed=2), path.draw(rows, B, H, seed=3)
    resets = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    ours = [t.clone().requires_grad_() for t in (x, h0, c0)]
    theirs = [t.cpu().double().clone().requires_grad_() for t in (x, h0, c0)]
    with path.kernels():
        got = module(ours[0], tuple(ours[1:]), resets=resets.to(path.device))
        got = (got[0], *got[1])
        grads = [path.draw(*t.shape, seed=k) for k, t in enumerate(got)]
        torch.autograd.backward(got, grads)
    expected = by_parts(exact, theirs[0], resets, (theirs[1], theirs[2]))
    torch.autograd.backward(expected, [g.cpu().double() for g in grads])
    for a, b in zip(got, expected, strict=True):
        path.close(a, b)
    for a, b in zip(ours, theirs, strict=True):
        path.close(a.grad, b.grad)
    for (name, a), b in zip(module.named_parameters(), exact.parameters(), strict=True):
        path.close(a.grad, b.grad, name)


@pytest.mark.parametrize("form", ["batch_first", "unbatched", "packed", "lengths"])
def test_resets_in_every_form_of_input(form):
    path = Path("cpu")
    module = path.lstm(D, H, bidirectional=True)
    x, resets = path.draw(T, B, D), torch.rand((T, B), generator=torch.Generator().manual_seed(4)) < 0.4
    lengths = [3, 5, 2]
    if form == "batch_first":
        module.batch_first = True
        got, expected = module(x.transpose(0, 1), resets=resets.t())[0].transpose(0, 1), plain(module, x, resets)[0]
    elif form == "unbatched":
        got, expected = module(x[:, 0], resets=resets[:, 0])[0], plain(module, x[:, :1], resets[:, :1])[0][:, 0]
    else:
        ends = torch.tensor(lengths)
        if form == "lengths":
            got, (h_n, c_n) = module(x, lengths=ends, resets=resets)
        else:
            packed, (h_n, c_n) = module(pack_padded_sequence(x, ends, enforce_sorted=False), resets=resets)
            assert isinstance(packed, PackedSequence)
            got = nn.utils.rnn.pad_packed_sequence(packed)[0]
        expected = torch.zeros_like(got)
        for b, n in enumerate(lengths):
            out, (h, c) = plain(module, x[:n, b : b + 1], resets[:n, b : b + 1])
            expected[:n, b] = out[:, 0]
            path.close(h_n[:, b], h[:, 0])
            path.close(c_n[:, b], c[:, 0])
    path.close(got, expected)


def plain(module: tritlstm.LSTM, x: Tensor, resets: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    exact = nn.LSTM(D, H, bidirectional=True, dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    zeros = torch.zeros(2, x.size(1), H, dtype=torch.float64)
    out, h, c = by_parts(exact, x, resets, (zeros, zeros))
    return out, (h, c)


def test_the_functional_form_takes_resets():
    path = Path("cpu")
    module = path.lstm(D, H, 2, bidirectional=True, batch_first=True)
    x, resets = path.draw(B, T, D), torch.rand((B, T), generator=torch.Generator().manual_seed(4)) < 0.4
    weights = list(module.parameters())
    got, state = tritlstm.lstm(x, None, weights, bidirectional=True, batch_first=True, resets=resets)
    zeros = torch.zeros(4, B, H, dtype=torch.float64)
    exact = nn.LSTM(D, H, 2, bidirectional=True, dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    expected, *last = by_parts(exact, x.transpose(0, 1), resets.t(), (zeros, zeros))
    path.close(got.transpose(0, 1), expected)
    for a, b in zip(state, last, strict=True):
        path.close(a, b)
    with pytest.raises(ValueError, match=r"resets must be \[B, T\] = \[3, 5\]"):
        tritlstm.lstm(x, None, weights, bidirectional=True, batch_first=True, resets=resets.t())


def test_a_compiled_variant_draws_its_own_noise():
    module = tritlstm.LSTM(D, H, zoneout=0.5, recurrent_dropout=0.5)
    x = torch.randn(T, B, D)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    first, second = compiled(x)[0], compiled(x)[0]
    torch.manual_seed(1)
    assert torch.equal(compiled(x)[0], first)
    assert not torch.equal(first, second)


@paths
def test_resets_with_a_projection(path):
    path = Path(path)
    module = path.lstm(D, H, proj_size=5)
    exact = nn.LSTM(D, H, proj_size=5, dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    x, h0, c0 = path.draw(T, B, D), path.draw(1, B, 5, seed=2), path.draw(1, B, H, seed=3)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[3], resets[0, 1] = True, True
    with path.kernels():
        got, (h_n, c_n) = module(x, (h0, c0), resets=resets.to(path.device))
    keeps = (~resets[0]).double()[None, :, None]
    x, h0, c0 = (t.double().cpu() for t in (x, h0, c0))
    first, _ = exact(x[:3], (h0 * keeps, c0 * keeps))
    second, (h, c) = exact(x[3:])
    path.close(got, torch.cat((first, second)))
    path.close(h_n, h)
    path.close(c_n, c)


@paths
def test_heads_are_lstms_side_by_side_over_one_input(path):
    path = Path(path)
    heads, size = 3, H // 3
    module = path.lstm(D, H, num_heads=heads)
    assert module.weight_hh_l0.shape == (4 * H, size)
    x = path.draw(T, B, D)
    with path.kernels():
        out, _ = module(x)
        (out * path.draw(T, B, H, seed=5)).sum().backward()
    w = weights_of(module)
    rows = np.arange(4 * H).reshape(4, heads, size)
    gradient = np.zeros_like(w["w_hh"])
    for head in range(heads):
        own = rows[:, head].ravel()
        units = slice(head * size, (head + 1) * size)
        trace = reference.forward(x.double().cpu().numpy(), **{name: value[own] for name, value in w.items()})
        path.close(out[..., units], trace.h, f"head {head}")
        upstream = path.draw(T, B, H, seed=5).double().cpu().numpy()[..., units]
        gradient[own] = reference.backward(trace, upstream).w_hh
    path.close(module.weight_hh_l0.grad, gradient)


@paths
def test_weight_dropout_zeroes_elements_of_w_hh(path):
    path = Path(path)
    module = path.lstm(D, H, weight_dropout=0.4)
    x = path.draw(T, B, D)
    with path.kernels():
        out, _ = module(x, noise=NOISE.to(path.device))
        out.sum().backward()
        evaluated, _ = module.eval()(x)
    scale = (1 - bits(2, (4 * H, H), 0.4)) / 0.6
    w = weights_of(module)
    trace = reference.forward(x.double().cpu().numpy(), **{**w, "w_hh": w["w_hh"] * scale})
    path.close(out, trace.h)
    path.close(module.weight_hh_l0.grad, reference.backward(trace, np.ones_like(trace.h)).w_hh * scale)
    path.close(evaluated, reference.forward(x.double().cpu().numpy(), **w).h)


@paths
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_layer_norm_is_ba_s(bias, path):
    path = Path(path)
    module = path.lstm(D, H, layer_norm=True, bias=bias, cell_clip=0.9)
    assert [(n, tuple(p.shape)) for n, p in module.named_parameters() if n.startswith("norm")] == [
        ("norm_ih_l0", (4 * H,)), ("norm_hh_l0", (4 * H,)), ("norm_c_l0", (H,)), ("norm_c_bias_l0", (H,))
    ]  # fmt: skip
    x, h0, c0 = path.draw(T, B, D), path.draw(1, B, H, seed=2), path.draw(1, B, H, seed=3)
    with path.kernels():
        out, (h_n, c_n) = module(x, (h0, c0))
    p = {n: v.detach().double().cpu().numpy() for n, v in module.named_parameters()}
    b_ih, b_hh = (p.get(f"bias_{n}_l0", 0.0) for n in ("ih", "hh"))

    def norm(a: np.ndarray) -> np.ndarray:
        centred = a - a.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)

    h, c = h0[0].double().cpu().numpy(), c0[0].double().cpu().numpy()
    for t in range(T):
        a = norm(x[t].double().cpu().numpy() @ p["weight_ih_l0"].T) * p["norm_ih_l0"] + b_ih
        a = a + norm(h @ p["weight_hh_l0"].T) * p["norm_hh_l0"] + b_hh
        i, f, g, o = np.split(a, 4, -1)
        c = np.clip(reference.sigmoid(f) * c + reference.sigmoid(i) * np.tanh(g), -0.9, 0.9)
        h = reference.sigmoid(o) * np.tanh(norm(c) * p["norm_c_l0"] + p["norm_c_bias_l0"])
        path.close(out[t], h, f"step {t}")
    path.close(h_n[0], h)
    path.close(c_n[0], c)


def test_layer_norm_has_the_gradients_of_finite_differences():
    module = Path("cpu").lstm(2, 3, layer_norm=True, peephole=True)
    x = Path("cpu").draw(3, 2, 2).requires_grad_()
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(run, (x, *module.parameters()))


@pytest.mark.parametrize("form", ["batch", "packed"])
def test_sizes_of_its_own_for_each_layer(form):
    path = Path("cpu")
    sizes = [6, 4, 8]
    module = path.lstm(D, sizes, bidirectional=True)
    assert repr(module) == "LSTM(4, [6, 4, 8], num_layers=3, bidirectional=True)"
    x, lengths = path.draw(T, B, D), [5, 3, 2]
    state = [path.draw(2, B, size, seed=size) for size in sizes]
    input = pack_padded_sequence(x, lengths) if form == "packed" else x
    out, (h_n, c_n) = module(input, (state, state))
    values = input
    for layer, size in enumerate(sizes):
        exact = nn.LSTM(D if layer == 0 else 2 * sizes[layer - 1], size, bidirectional=True, dtype=torch.float64)
        own = {n.replace(f"_l{layer}", "_l0"): p for n, p in module.state_dict().items() if f"_l{layer}" in n}
        exact.load_state_dict(own)
        values, (h, c) = exact(values, (state[layer], state[layer]))
        path.close(h_n[layer], h)
        path.close(c_n[layer], c)
    got, expected = (v.data if isinstance(v, PackedSequence) else v for v in (out, values))
    path.close(got, expected)
    got.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_sizes_with_dropout_resets_and_zoneout_go_layer_by_layer():
    module = tritlstm.LSTM(D, [6, 4], dropout=0.5, zoneout=0.2, dtype=torch.float64)
    x, resets = torch.randn(T, B, D, dtype=torch.float64), torch.rand(T, B) < 0.3
    torch.manual_seed(3)
    out, _ = module(x, noise=NOISE, resets=resets)
    torch.manual_seed(3)
    values = x
    for layer, size in enumerate((6, 4)):
        if layer:
            values = nn.functional.dropout(values, 0.5)
        weights = {
            name: getattr(module, f"{full}_l{layer}").detach().numpy()
            for name, full in (("w_ih", "weight_ih"), ("w_hh", "weight_hh"), ("b_ih", "bias_ih"), ("b_hh", "bias_hh"))
        }
        zones = [bits(3 * layer, (T, B, size), 0.2, word) for word in range(2)]
        variant = reference.Variant(resets=resets.numpy(), keep_h=zones[0], keep_c=zones[1])
        values = torch.from_numpy(reference.forward(values.detach().numpy(), **weights, variant=variant).h)
    torch.testing.assert_close(out, values)


def test_forget_bias_and_the_rest_as_torch_draws_it():
    torch.manual_seed(0)
    theirs = nn.LSTM(D, H, 2)
    torch.manual_seed(0)
    module = tritlstm.LSTM(D, H, 2, forget_bias=1.5)
    for (name, a), b in zip(module.named_parameters(), theirs.parameters(), strict=True):
        if name.startswith("bias"):
            assert (a[H : 2 * H] == (1.5 if "ih" in name else 0.0)).all()
            a, b = (torch.cat((v[:H], v[2 * H :])) for v in (a, b))
        assert torch.equal(a, b), name


@paths
def test_noise_decides_the_bits_and_torch_s_seed_decides_the_noise(path):
    path = Path(path)
    module = path.lstm(D, H, zoneout=0.3, recurrent_dropout=0.3, weight_dropout=0.3)
    x, noise = path.draw(T, B, D), NOISE.to(path.device)
    with path.kernels(), torch.no_grad():
        torch.manual_seed(5)
        first = module(x)[0]
        torch.manual_seed(5)
        assert torch.equal(module(x)[0], first)
        assert not torch.equal(module(x)[0], first)
        assert torch.equal(module(x, noise=noise)[0], module(x, noise=noise)[0])
        assert not torch.equal(module(x, noise=noise)[0], module(x, noise=noise + 1)[0])
        evaluated = module.eval()(x)[0]
        assert torch.equal(module(x)[0], evaluated)


@paths
@pytest.mark.parametrize("hidden", [H, [H, 6]], ids=["one size", "sizes"])
def test_bits_of_packed_sequences_follow_the_batch_before_packing(hidden, path):
    path = Path(path)
    module = path.lstm(D, hidden, zoneout=(0.4, 0.3), recurrent_dropout=0.25, bidirectional=True)
    x, lengths, noise = path.draw(T, B, D), [2, 5, 3], NOISE.to(path.device)
    with path.kernels():
        packed, (h_n, c_n) = module(pack_padded_sequence(x, lengths, enforce_sorted=False), noise=noise)
        padded, states = module(x, lengths=lengths, noise=noise)
    out, ends = pad_packed_sequence(packed)
    assert ends.tolist() == lengths
    assert torch.equal(out, padded)
    assert all(torch.equal(a, b) for a, b in zip((*h_n, *c_n), (*states[0], *states[1]), strict=True))
    if hidden != H:
        return
    scale, zones = 1 - bits(1, (B, H), 0.25), [bits(0, (T, B, H), p, word) for word, p in enumerate((0.4, 0.3))]
    for b, n in enumerate(lengths):
        keep_h, keep_c = (zone[:n, b : b + 1] for zone in zones)
        variant = reference.Variant(keep_h=keep_h, keep_c=keep_c, h_scale=scale[b : b + 1] / 0.75)
        own = x[:n, b : b + 1].double().cpu().numpy()
        exact = reference.forward(own, **weights_of(module), variant=variant)
        path.close(out[:n, b : b + 1, :H], exact.h)
        path.close(h_n[0, b : b + 1], exact.h_n)
        path.close(c_n[0, b : b + 1], exact.c_n)


def test_dropout_between_layers_is_torch_s_for_packed_sequences_in_any_order():
    module, theirs = (kind(D, H, 2, dropout=0.5, dtype=torch.float64) for kind in (tritlstm.LSTM, nn.LSTM))
    theirs.load_state_dict(module.state_dict())
    packed = pack_padded_sequence(Path("cpu").draw(T, B, D), [2, 5, 3], enforce_sorted=False)
    torch.manual_seed(4)
    exact = theirs(packed)[0].data
    torch.manual_seed(4)
    got = module(packed, resets=torch.zeros(T, B, dtype=torch.bool))[0].data
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)


@paths
def test_recompute_keeps_no_gates(path):
    """Bytes that autograd holds between forward and backward, counted tensor by tensor."""
    path = Path(path)

    def kept(recompute: bool) -> int:
        module = tritlstm.LSTM(D, 16, peephole=True, recompute=recompute, device=path.device)
        held: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            held[t.data_ptr()] = t.nbytes
            return t

        with path.kernels(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            module(torch.randn(50, 8, D, device=path.device))
        return sum(held.values())

    # The gates: 50 steps of 8 sequences of 4 * 16 numbers of 4 bytes.
    assert kept(False) - kept(True) == 50 * 8 * 4 * 16 * 4


def test_a_variant_is_saved_copied_and_shown():
    kind = {"peephole": True, "num_heads": 2, "layer_norm": True, "zoneout": 0.1, "activations": ["hard_sigmoid"] * 3}
    module = tritlstm.LSTM(D, H, 2, bidirectional=True, **kind).eval()
    x = torch.randn(T, B, D)
    expected = module(x)[0]
    other = tritlstm.LSTM(D, H, 2, bidirectional=True, **kind).eval()
    other.load_state_dict(module.state_dict())
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    for copied in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x)[0], expected)
    assert repr(module) == (
        "LSTM(4, 12, num_layers=2, bidirectional=True, peephole=True, zoneout=(0.1, 0.1), "
        "activations=('hard_sigmoid', 'hard_sigmoid', 'hard_sigmoid'), num_heads=2, layer_norm=True)"
    )


def test_a_variant_compiles_as_one_graph():
    module = tritlstm.LSTM(D, H, 2, peephole=True, zoneout=0.2, dropout=0.0, dtype=torch.float64)
    x, resets = torch.randn(T, B, D, dtype=torch.float64), torch.rand(T, B) < 0.3
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = module(x, resets=resets, noise=NOISE)[0]
    expected.sum().backward()
    gradients = [p.grad for p in module.parameters()]
    module.zero_grad()
    got = compiled(x, resets=resets, noise=NOISE)[0]
    got.sum().backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close([p.grad for p in module.parameters()], gradients)


def test_per_sample_gradients_with_resets():
    module = tritlstm.LSTM(D, H, dtype=torch.float64)
    x, resets = torch.randn(T, B, D, dtype=torch.float64), torch.rand(T, B) < 0.4
    weights = dict(module.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor, resets: Tensor) -> Tensor:
        given = {"resets": resets[:, None]}
        return torch.func.functional_call(module, weights, (x[:, None],), given)[0].square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 1, 1))(weights, x, resets)
    for b in range(B):
        expected = torch.autograd.grad(loss(weights, x[:, b], resets[:, b]), list(weights.values()))
        for (name, value), exact in zip(got.items(), expected, strict=True):
            torch.testing.assert_close(value[b], exact, msg=name)


META: dict[str, dict[str, Any]] = {
    "plain": {},
    "peephole": {"peephole": True, "recompute": True},
    "random": {"zoneout": 0.1, "recurrent_dropout": 0.1, "weight_dropout": 0.1},
    "heads": {"num_heads": 2},
    "norm": {"layer_norm": True, "bidirectional": True},
    "projection": {"proj_size": 3, "coupled": True},
    "sizes": {"hidden_size": [6, 4], "cell_clip": 1.0},
}


@pytest.mark.parametrize("call", ["alone", "resets", "lengths", "packed", "vmap"])
@pytest.mark.parametrize("kind", META.values(), ids=META.keys())
def test_the_meta_device_has_the_shapes_and_dtypes_of_the_cpu(kind, call):
    def shapes(device: str, training: bool) -> list[Any]:
        module = tritlstm.LSTM(**{"input_size": D, "hidden_size": H, **kind}, device=device).train(training)
        x, given = torch.zeros(T, B, D, device=device, requires_grad=training), {}
        if call != "alone":
            given["resets"] = torch.zeros(T, B, dtype=torch.bool, device=device)
        if call == "lengths":
            given["lengths"] = torch.tensor([5, 0, 2], device=device)
        input = PackedSequence(x.flatten(0, 1), torch.tensor([B] * T)) if call == "packed" else x
        if call == "vmap":
            input = x[:, :, None]
            out = torch.func.vmap(lambda x: module.eval()(x)[0], 1, 1)(input)
            return [out.shape, out.dtype]
        out, state = module(input, **given)
        first = out.data if isinstance(out, PackedSequence) else out
        tensors = [first, *(part for parts in state for part in (parts if isinstance(parts, list) else [parts]))]
        if training:
            first.sum().backward()
            tensors += [value.grad for value in (x, *module.parameters())]
        assert {value.device.type for value in tensors} == {device}
        return [(value.shape, value.dtype) for value in tensors]

    for training in (False, True):
        assert shapes("meta", training) == shapes("cpu", training)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"zoneout": 1.0}, r"zoneout must be a probability in \[0, 1\).* got 1.0"),
        ({"zoneout": (0.1, 0.2, 0.3)}, r"got \(0.1, 0.2, 0.3\)"),
        ({"activations": ("sigmoid", "tanh")}, r"three names.* got \('sigmoid', 'tanh'\)"),
        ({"activations": ("sigmoid", "swish", "tanh")}, r"'swish'.*known are sigmoid, tanh, relu"),
        ({"recurrent_dropout": -0.1}, r"recurrent_dropout must be a probability in \[0, 1\), got -0.1"),
        ({"weight_dropout": 1}, r"weight_dropout must be a probability in \[0, 1\), got 1"),
        ({"cell_clip": 0.0}, r"cell_clip must be a positive number, got 0.0; None leaves"),
        ({"cell_clip": True}, r"cell_clip must be a positive number, got True; None leaves"),
        ({"cell_clip": "1"}, r"cell_clip must be a positive number, got '1'; None leaves"),
        ({"num_heads": True}, r"num_heads must divide hidden_size, got num_heads=True"),
        ({"num_heads": 2.0}, r"num_heads must divide hidden_size, got num_heads=2.0"),
        ({"forget_bias": True}, r"forget_bias must be a number, got True; None draws"),
        ({"num_heads": 5}, r"num_heads must divide hidden_size, got num_heads=5 and hidden_size=12"),
        ({"proj_size": 4, "zoneout": 0.1}, r"zoneout of h can't be had with a projection \(proj_size=4\)"),
        ({"proj_size": 4, "layer_norm": True}, r"layer_norm can't be had with a projection"),
        ({"hidden_size": [4, 0]}, r"hidden_size must be a positive int or a list of them.* got \[4, 0\]"),
        ({"hidden_size": [4, 5], "num_layers": 3}, r"has 2 layers, got num_layers=3; leave num_layers out"),
        ({"hidden_size": [4, 5], "proj_size": 3}, r"can't be had with a projection, got proj_size=3"),
        ({"forget_bias": 1.0, "bias": False}, r"forget_bias=1.0 needs bias=True, got bias=False"),
    ],
)
def test_wrong_options_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        tritlstm.LSTM(**{"input_size": D, "hidden_size": H, **arguments})


@pytest.mark.parametrize("name", ["peephole", "coupled", "layer_norm", "recompute"])
@pytest.mark.parametrize("value", ["yes", 1, None], ids=repr)
def test_a_flag_is_true_or_false(name, value):
    with pytest.raises(TypeError, match=rf"{name} must be True or False, got {value!r}"):
        tritlstm.LSTM(D, H, **{name: value})


def test_numbers_of_numpy_are_numbers():
    module = tritlstm.LSTM(D, H, cell_clip=np.float32(0.5), num_heads=np.int64(3), dtype=torch.float64)
    exact = tritlstm.LSTM(D, H, cell_clip=0.5, num_heads=3, dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    x = 9 * Path("cpu").draw(T, B, D)
    assert torch.equal(module(x)[0], exact(x)[0])
    assert module(x)[1][1].abs().max() == 0.5


@pytest.mark.parametrize("form", ["batch", "batch first", "unbatched", "packed", "functional"])
def test_resets_may_be_lists(form):
    module = tritlstm.LSTM(D, H, batch_first=form == "batch first", dtype=torch.float64)
    x, resets = Path("cpu").draw(T, B, D), torch.rand((T, B), generator=torch.Generator().manual_seed(2)) < 0.4
    if form == "packed":
        input = pack_padded_sequence(x, [2, 5, 3], enforce_sorted=False)
        assert torch.equal(module(input, resets=resets.tolist())[0].data, module(input, resets=resets)[0].data)
        return
    if form == "batch first":
        x, resets = x.transpose(0, 1), resets.t()
    elif form == "unbatched":
        x, resets = x[:, 0], resets[:, 0]
    got, _ = module(x, resets=resets.tolist())
    if form == "functional":
        got, _ = tritlstm.lstm(x, None, list(module.parameters()), resets=resets.tolist())
    assert resets.any()
    assert torch.equal(got, module(x, resets=resets)[0])
    assert torch.equal(got, tritlstm.trace(module, x, resets=resets.tolist()).output)


@pytest.mark.parametrize("noise", [torch.zeros(3, dtype=torch.int64), torch.zeros(2), [1, 2], 7], ids=repr)
@pytest.mark.parametrize("kind", [{}, {"peephole": True}, {"zoneout": 0.1}], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_noise_is_checked_also_where_nothing_is_drawn(kind, noise, training):
    words = r"noise must be \[2\] of torch.int64, seed and offset, got (\[3\] of|\[2\] of torch.float32|\[1, 2\]|7)"
    with pytest.raises(ValueError, match=words):
        tritlstm.LSTM(D, H, **kind).train(training)(torch.zeros(T, B, D), noise=noise)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"resets": [[False] * T] * B}, r"resets must be \[T, B\] = \[5, 3\] of torch.bool, got \[3, 5\]"),
        ({"resets": [[0] * B] * T}, r"of torch.bool, got \[5, 3\] of torch.int64"),
        ({"resets": "yes"}, r"resets must be a bool tensor or nested sequences of bools, got 'yes'"),
        ({"resets": [[False], [False, True]]}, r"resets must be a bool tensor or nested sequences of bools, got \[\[F"),
        ({"resets": torch.zeros(B, T, dtype=torch.bool)}, r"resets must be \[T, B\] = \[5, 3\] .* got \[3, 5\]"),
        ({"resets": torch.zeros(T, B)}, r"of torch.bool, got \[5, 3\] of torch.float32"),
        ({"noise": torch.zeros(3, dtype=torch.int64)}, r"noise must be \[2\] of torch.int64.* got \[3\]"),
    ],
)
def test_wrong_calls_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        tritlstm.LSTM(D, H, zoneout=0.1)(torch.zeros(T, B, D), **given)


def test_wrong_resets_beside_packed_input_are_refused():
    packed = pack_padded_sequence(torch.zeros(T, B, D), [5, 3, 2])
    with pytest.raises(ValueError, match=r"beside a PackedSequence must be \[T, B\] = \[5, 3\].* got \[3, 5\]"):
        tritlstm.LSTM(D, H)(packed, resets=torch.zeros(B, T, dtype=torch.bool))
    module = tritlstm.LSTM(D, [4, 5])
    with pytest.raises(RuntimeError, match=r"a state for each of the 2 layers, got \[1, 1\]"):
        module(torch.zeros(T, B, D), (torch.zeros(1, B, 4), torch.zeros(1, B, 4)))


class TestExplain:
    def test_a_variant_on_the_cpu_runs_plain_operators(self):
        module, x = tritlstm.LSTM(D, H, peephole=True), torch.zeros(T, B, D)
        said = tritlstm.explain(module, x, resets=torch.zeros(T, B, dtype=torch.bool))
        assert said.path == "aten"
        assert "torch's own LSTM has no peephole and no resets; plain PyTorch operators do" in str(said)
        assert tritlstm.explain(tritlstm.LSTM(D, H), x).path == "torch"

    @pytest.mark.skipif(CUDA, reason="about the emulator")
    def test_kernels_have_all_of_them(self):
        x = torch.zeros(T, B, D)
        with emulator.emulate():
            for kind in ({"peephole": True, "zoneout": 0.1, "recurrent_dropout": 0.1}, {"recompute": True}):
                assert tritlstm.explain(tritlstm.LSTM(D, H, **kind), x).path == "kernels"
            heads = tritlstm.explain(tritlstm.LSTM(D, H, num_heads=3, coupled=True), x)
            assert "num_heads=3 runs as one w_hh with zeros outside the heads: 3 times their products" in str(heads)
            norm = tritlstm.explain(tritlstm.LSTM(D, H, layer_norm=True), x)
            assert norm.path == "kernels"
            assert "layer_norm: two exchanges of row sums more in every step" in str(norm)
            both = tritlstm.explain(tritlstm.LSTM(D, H, layer_norm=True, recompute=True), x)
            assert "recompute: of no effect beside layer_norm, whose gates are kept" in str(both)
            sizes = tritlstm.explain(tritlstm.LSTM(D, [8, 4]), x)
            assert "hidden sizes [8, 4], layer by layer" in str(sizes)


def test_the_options_that_are_off_are_the_plain_lstm():
    assert CellOptions().changed == {}
    assert tritlstm.LSTM(D, H)._extras(torch.zeros(T, B, D), None, None) is None
    assert CellOptions().codes == tuple(ACTIVATIONS.index(name) for name in ("sigmoid", "tanh", "tanh"))
