"""`tritlstm.trace` and `tritlstm.plot_gates`: values against the NumPy reference, and what a picture shows."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import tritlstm
from tritlstm import emulator, reference

T, B, D, H = 5, 3, 4, 12
CUDA = torch.cuda.is_available()
PARTS = ("h", "c", "i", "f", "g", "o")


def lstm(dtype: torch.dtype = torch.float64, **kind: Any) -> tritlstm.LSTM:
    torch.manual_seed(0)
    return tritlstm.LSTM(D, H, dtype=dtype, **kind)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_reference(module: tritlstm.LSTM, layer: int, reverse: bool, x: np.ndarray, **given: Any) -> reference.Trace:
    suffix = f"_l{layer}" + ("_reverse" if reverse else "")
    names = {"w_ih": "weight_ih", "w_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh"}
    weights = {name: getattr(module, full + suffix).detach().double().numpy() for name, full in names.items()}
    return reference.forward(x[::-1] if reverse else x, **weights, **given)


@pytest.mark.parametrize("path", ["cpu", "differentiable", "emulated"])
def test_every_layer_and_direction_is_the_reference_s(path):
    if path == "emulated" and CUDA:
        pytest.skip("about the emulator")
    dtype = torch.float32 if path == "emulated" else torch.float64
    module, x = lstm(dtype, num_layers=2, bidirectional=True), draw(T, B, D).to(dtype)
    with emulator.emulate() if path == "emulated" else contextlib.nullcontext():
        seen = tritlstm.trace(module, x, differentiable=path == "differentiable")
        output, state = module(x)
    torch.testing.assert_close((seen.output, seen.state), (output, state))
    assert [(s.layer, s.reverse) for s in seen.layers] == [(0, False), (0, True), (1, False), (1, True)]
    below = x.double().numpy()
    for layer in range(2):
        outs = []
        for direction in range(2):
            exact, got = by_reference(module, layer, direction == 1, below), seen[2 * layer + direction]
            for part in PARTS:
                value = getattr(exact, part)[::-1] if direction else getattr(exact, part)
                limit = 1e-5 if path == "emulated" else 1e-12  # float32: a hundred roundings of order one
                np.testing.assert_allclose(getattr(got, part).detach().numpy(), value, rtol=0, atol=limit, err_msg=part)
            outs.append(exact.h[::-1] if direction else exact.h)
        below = np.concatenate(outs, -1)


def test_what_lies_past_an_end_is_zero_and_packed_input_is_padded():
    module, x, lengths = lstm(bidirectional=True, batch_first=True), draw(B, T, D), [2, 5, 3]
    by_lengths = tritlstm.trace(module, x, lengths=lengths)
    packed = tritlstm.trace(module, pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    torch.testing.assert_close(packed.output, by_lengths.output)
    for k, got in enumerate(by_lengths.layers):
        for part in PARTS:
            value = getattr(got, part)
            torch.testing.assert_close(getattr(packed[k], part), value)
            for b, n in enumerate(lengths):
                exact = getattr(by_reference(module, 0, k == 1, x[b, :n, None].numpy()), part)
                exact = exact[::-1] if k else exact
                np.testing.assert_allclose(value[:n, b].detach().numpy(), exact[:, 0], rtol=0, atol=1e-12)
                assert not value[n:, b].any()


def test_a_trace_of_a_variant_with_resets():
    module = lstm(peephole=True, coupled=True, recompute=True)
    x, resets = draw(T, B, D), torch.rand((T, B), generator=torch.Generator().manual_seed(2)) < 0.4
    got = tritlstm.trace(module, x, resets=resets)[0]
    peephole = module.weight_ch_l0.detach().numpy()
    variant = reference.Variant(resets=resets.numpy(), peephole=peephole, coupled=True)
    exact = by_reference(module, 0, False, x.numpy(), variant=variant)
    for part in PARTS:
        np.testing.assert_allclose(getattr(got, part).detach().numpy(), getattr(exact, part), rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", ["cpu", "emulated"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
def test_resets_beside_packed_input_are_time_first_as_the_module_takes_them(batch_first, path):
    if path == "emulated" and CUDA:
        pytest.skip("about the emulator")
    dtype = torch.float32 if path == "emulated" else torch.float64
    module, lengths = lstm(dtype, batch_first=batch_first), [2, 5, 3, 4, 1]  # B = T: both layouts have this shape
    x = draw(T, T, D).to(dtype)
    resets = torch.zeros(T, T, dtype=torch.bool)
    resets[1, 3] = resets[2, 2] = resets[4, 1] = True
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    weights = list(module.parameters())
    with emulator.emulate() if path == "emulated" else contextlib.nullcontext():
        seen = tritlstm.trace(module, packed, resets=resets)
        calls = [module(packed, resets=resets), tritlstm.lstm(packed, None, weights, resets=resets)]
    for out, state in calls:
        assert torch.equal(seen.output, pad_packed_sequence(out, batch_first)[0])
        torch.testing.assert_close(seen.state, state, rtol=0, atol=0)
    limit = 1e-5 if path == "emulated" else 1e-12  # float32: a hundred roundings of order one
    for b, n in enumerate(lengths):
        variant = reference.Variant(resets=resets[:n, b : b + 1].numpy())
        exact = by_reference(module, 0, False, x[:n, b : b + 1].double().numpy(), variant=variant)
        for part in PARTS:
            value = getattr(seen[0], part)
            np.testing.assert_allclose(
                value[:n, b : b + 1].detach().numpy(), getattr(exact, part), rtol=0, atol=limit, err_msg=part
            )
            assert not value[n:, b].any()


def test_a_trace_of_packed_input_draws_what_the_module_draws():
    module = lstm(num_layers=2, dropout=0.5, zoneout=0.3)
    packed = pack_padded_sequence(draw(T, B, D), [2, 5, 3], enforce_sorted=False)
    torch.manual_seed(3)
    seen = tritlstm.trace(module, packed)
    torch.manual_seed(3)
    out, state = module(packed)
    assert torch.equal(seen.output, pad_packed_sequence(out)[0])
    torch.testing.assert_close(seen.state, state, rtol=0, atol=0)


def test_gates_can_be_differentiated_where_it_is_asked_for():
    module = lstm()
    x = draw(3, 2, D).requires_grad_()

    def run(x: Tensor) -> tuple[Tensor, ...]:
        seen = tritlstm.trace(module, x, differentiable=True)[0]
        return tuple(getattr(seen, part) for part in PARTS)

    assert torch.autograd.gradcheck(run, (x,))
    seen = tritlstm.trace(module, x)
    assert not seen[0].f.requires_grad
    seen.output.sum().backward()
    assert x.grad is not None


def test_layers_of_different_sizes_are_traced():
    module = tritlstm.LSTM(D, [6, 4], dtype=torch.float64)
    seen = tritlstm.trace(module, draw(T, B, D))
    assert [s.c.shape[-1] for s in seen.layers] == [6, 4]
    torch.testing.assert_close(seen.output, seen[1].h)
    torch.testing.assert_close(seen[1].h, seen[1].o * seen[1].c.tanh())


def test_only_this_library_s_module_is_traced():
    with pytest.raises(TypeError, match=r"takes a tritlstm.LSTM, got LSTM; tritlstm.swap\(model\) turns"):
        tritlstm.trace(nn.LSTM(D, H), draw(T, B, D))
    packed = pack_padded_sequence(draw(T, B, D), [5, 3, 2])
    with pytest.raises(ValueError, match="brings its lengths with it"):
        tritlstm.trace(lstm(), packed, lengths=[5, 3, 2])


class TestPlotGates:
    def images(self, figure: Figure) -> list[np.ndarray]:
        return [np.asarray(axis.images[0].get_array()) for axis in figure.axes if axis.images]

    def test_the_picture_holds_the_numbers(self):
        seen = tritlstm.trace(lstm(num_layers=2), draw(T, B, D))
        figure = tritlstm.plot_gates(seen, "abc", sequence=1, units=[7, 2], parts="fc", title="two units")
        shown = self.images(figure)
        for image, part in zip(shown, "fc", strict=True):
            expected = getattr(seen[1], part)[:3, 1, [7, 2]].T.detach().float().numpy()
            np.testing.assert_array_equal(image, expected)
        axis = figure.axes[0]
        assert [label.get_text() for label in axis.get_xticklabels()] == ["a", "b", "c"]
        assert [label.get_text() for label in axis.get_yticklabels()] == ["unit 7", "unit 2"]
        assert figure.get_suptitle() == "two units"

    def test_units_whose_cells_move_most_are_chosen(self):
        torch.manual_seed(0)
        seen = tritlstm.trace(tritlstm.LSTM(D, 40), draw(T, B, D).float())
        figure = tritlstm.plot_gates(seen[0])
        moves = np.ptp(seen[0].c[:, 0].detach().numpy(), axis=0)
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert labels == [f"unit {u}" for u in sorted(np.argsort(-moves)[:16])]

    def test_it_is_saved(self, tmp_path):
        seen = tritlstm.trace(lstm(), 5 * draw(T, B, D))
        tritlstm.plot_gates(seen, ["the", "cat", "sat", "on", "it"], parts="ifogch").savefig(tmp_path / "gates.png")
        assert (tmp_path / "gates.png").stat().st_size > 10_000

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"tokens": "abcdef"}, "tokens must be 1 to T = 5, one a step, got 6"),
            ({"parts": "ixc"}, "parts must be letters of ifogch, got 'ixc'"),
            ({"units": [12]}, r"units must be below H = 12, got \[12\]"),
            ({"sequence": 3}, "sequence must be one of the 3 of the batch, got 3"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, given, words):
        with pytest.raises(ValueError, match=words):
            tritlstm.plot_gates(tritlstm.trace(lstm(), draw(T, B, D)), **given)

    def test_a_missing_matplotlib_is_named_with_its_command(self, monkeypatch):
        seen = tritlstm.trace(lstm(), draw(T, B, D))
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r"pip install 'tritlstm\[plot\]'"):
            tritlstm.plot_gates(seen)
