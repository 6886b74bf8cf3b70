"""The walk around the operator: layers, directions, projection, packing, states. Against torch.nn.LSTM.

Each case of the grid runs in float64 on both paths of `tritlstm.functional`: through torch's own LSTM, which
is what a CPU takes, and through the operators, which is what the Triton kernels take.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import tritlstm
from tritlstm import functional, ops

T, B, D, H = 5, 3, 4, 6
LENGTHS = {"sorted": [5, 3, 2], "unsorted": [2, 5, 3]}

GRID: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True},
    "projection": {"proj_size": 2},
    "projection, no bias": {"proj_size": 2, "bias": False},
    "projection of one less": {"proj_size": H - 1},
    "three layers, both directions, projection": {"num_layers": 3, "bidirectional": True, "proj_size": 3},
    "two layers, both directions, no bias": {"num_layers": 2, "bidirectional": True, "bias": False},
}
grid = pytest.mark.parametrize("kind", GRID.values(), ids=GRID.keys())
forms = pytest.mark.parametrize("form", ["batch", "batch_first", "unbatched", "sorted", "unsorted"])


@pytest.fixture(params=["torch", "operators"])
def path(request, monkeypatch):
    if request.param == "operators":
        monkeypatch.setattr(functional, "runs_kernels", lambda x: True)
    return request.param


def build(kind: dict[str, Any], form: str = "batch") -> nn.LSTM:
    torch.manual_seed(0)
    return nn.LSTM(D, H, batch_first=form == "batch_first", dtype=torch.float64, **kind)


def draw_input(form: str) -> Tensor:
    shape = {"batch_first": (B, T, D), "unbatched": (T, D)}.get(form, (T, B, D))
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def in_form(x: Tensor, form: str) -> Tensor | PackedSequence:
    return pack_padded_sequence(x, LENGTHS[form], enforce_sorted=form == "sorted") if form in LENGTHS else x


def draw_states(module: nn.LSTM, form: str) -> tuple[Tensor, Tensor]:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    batch = () if form == "unbatched" else (B,)
    sizes = (module.proj_size or H, H)
    h, c = (torch.randn(rows, *batch, n, dtype=torch.float64, requires_grad=True) for n in sizes)
    return h, c


def call(module: nn.LSTM, input: Any, hx: Any) -> Any:
    return tritlstm.lstm(
        input,
        hx,
        list(module.parameters()),
        bidirectional=module.bidirectional,
        batch_first=module.batch_first,
        dropout=module.dropout,
        training=module.training,
    )


def assert_same(got: Any, expected: Any, x: Tensor, hx: Any, module: nn.LSTM) -> None:
    """Values, and gradients of everything by a loss that weighs each element of each result differently."""
    values = []
    for out, (h_n, c_n) in (got, expected):
        if isinstance(out, PackedSequence):
            for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
                mine, theirs = getattr(got[0], field), getattr(expected[0], field)
                assert (mine is None) == (theirs is None)
                assert mine is None or torch.equal(mine, theirs)
            out = out.data
        results = (out, h_n, c_n)
        loss = sum((torch.linspace(1, 2, t.numel()).view(t.shape) * t).sum() for t in results)
        grads = torch.autograd.grad(loss, [x, *(hx or ()), *module.parameters()])
        values.append((*results, *grads))
    # float64 on both sides; 1e-10 leaves room for sums in another order, and for the folded projection's.
    for mine, theirs in zip(*values, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


class TestAgainstTorch:
    @pytest.mark.parametrize("with_states", [False, True], ids=["", "states"])
    @forms
    @grid
    def test_values_and_gradients(self, kind, form, with_states, path):
        module, x = build(kind, form), draw_input(form)
        hx = draw_states(module, form) if with_states else None
        got, expected = call(module, in_form(x, form), hx), module(in_form(x, form), hx)
        assert_same(got, expected, x, hx, module)

    @pytest.mark.parametrize("name", ["plain", "three layers, both directions, projection"])
    def test_one_time_step_and_one_sequence(self, name, path):
        module = build(GRID[name])
        for shape in ((1, B, D), (T, 1, D), (1, 1, D)):
            x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
            assert_same(call(module, x, None), module(x), x, None, module)

    def test_an_empty_batch(self, path):
        module = build({"num_layers": 2, "bidirectional": True})
        out, (h_n, c_n) = call(module, torch.zeros(T, 0, D, dtype=torch.float64), None)
        assert (out.shape, h_n.shape, c_n.shape) == ((T, 0, 2 * H), (4, 0, H), (4, 0, H))

    def test_the_output_has_torchs_strides_in_batch_first(self, path):
        module, x = build({}, "batch_first"), draw_input("batch_first")
        assert call(module, x, None)[0].stride() == module(x)[0].stride()

    def test_the_projection_of_16_bit_weights_is_within_twice_torchs_error(self, monkeypatch):
        # The fold rounds W_hh W_hr once, torch rounds W_hr m at every step: two errors of one size.
        monkeypatch.setattr(functional, "runs_kernels", lambda x: True)
        torch.manual_seed(0)
        module, x = nn.LSTM(16, 32, proj_size=12, dtype=torch.bfloat16), torch.randn(20, 4, 16).bfloat16()
        exact = nn.LSTM(16, 32, proj_size=12, dtype=torch.float64)
        exact.load_state_dict(module.state_dict())
        with torch.no_grad():
            expected, theirs, mine = exact(x.double())[0], module(x)[0], call(module, x, None)[0]
        rounding = expected.abs().max() * torch.finfo(torch.bfloat16).eps / 2
        assert (mine - expected).abs().max() <= 2 * (theirs - expected).abs().max() + rounding


class TestDropout:
    def test_the_mask_of_the_operators_path(self, monkeypatch):
        torch.manual_seed(0)
        module, x = nn.LSTM(2, 64, num_layers=2, dropout=0.3), torch.randn(50, 20, 2)
        received = []
        layer = ops.layer

        def spy(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            received.append(x)
            return layer(x, *args, **kwargs)

        monkeypatch.setattr(functional, "runs_kernels", lambda x: True)
        monkeypatch.setattr(ops, "layer", spy)
        call(module.eval(), x, None)
        call(module.train(), x, None)
        _, whole, _, dropped = received
        kept = dropped != 0
        # 64 000 draws: their mean misses five standard deviations once in two million runs.
        assert abs(kept.double().mean() - 0.7) < 5 * (0.3 * 0.7 / kept.numel()) ** 0.5
        torch.testing.assert_close(dropped[kept], whole[kept] / 0.7)

    @pytest.mark.parametrize("kind", [{"dropout": 0.5}, {"dropout": 1.0}], ids=["half", "all"])
    def test_eval_mode_drops_nothing(self, kind, path):
        module, x = build({"num_layers": 2, **kind}).eval(), draw_input("batch")
        assert_same(call(module, x, None), module(x), x, None, module)

    def test_dropping_everything_feeds_zeros_to_the_next_layer(self, path):
        module, x = build({"num_layers": 2, "dropout": 1.0}), draw_input("batch")
        (out, _), (expected, _) = call(module, x, None), module(x)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)

    def test_a_seed_repeats_the_mask_and_calls_differ(self, path):
        module, x = build({"num_layers": 2, "dropout": 0.5}), draw_input("batch")
        outs = []
        for _ in range(2):
            torch.manual_seed(3)
            outs += [call(module, x, None)[0], call(module, x, None)[0]]
        assert torch.equal(outs[0], outs[2])
        assert torch.equal(outs[1], outs[3])
        assert not torch.equal(outs[0], outs[1])

    def test_the_last_layer_is_not_dropped(self, path):
        module, x = build({"dropout": 0.0}), draw_input("batch")
        out = tritlstm.lstm(x, None, list(module.parameters()), dropout=0.9, training=True)[0]
        torch.testing.assert_close(out, module(x)[0], rtol=1e-10, atol=1e-10)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda p: p[:1], r"must begin with w_ih \[4H, D\] and w_hh \[4H, R\], got shapes \[\[24, 4\]\]"),
            (lambda p: [p[2], *p], r"must begin with w_ih.*got shapes \[\[24\], \[24, 4\]\]"),
            (lambda p: [p[0][:-1], *p[1:]], r"must begin with w_ih.*\[\[23, 4\]"),
            (lambda p: p[:-1], r"4 tensors for each layer and direction, so a multiple of 4, got 7"),
            (lambda p: p[:3], r"a multiple of 4, got 3; check bidirectional \(now False\)"),
            (lambda p: [*p[:4], p[0], *p[5:]], r"params\[4\] must have shape \[24, 6\], got \[24, 4\]"),
            (
                lambda p: [*p[:3], p[3][:-1], *p[4:]],
                r"params\[3\] must have shape \[24\], got \[23\]; .* = 6",
            ),
        ],
    )
    def test_wrong_parameters(self, change, text):
        params = list(build({"num_layers": 2}).parameters())
        with pytest.raises(ValueError, match=text):
            tritlstm.lstm(draw_input("batch"), None, change(params))

    def test_one_direction_given_for_two(self):
        with pytest.raises(ValueError, match=r"a multiple of 8, got 4; check bidirectional \(now True\)"):
            tritlstm.lstm(draw_input("batch"), None, list(build({}).parameters()), bidirectional=True)

    @pytest.mark.parametrize("dropout", [-0.1, 1.5, True, float("nan")])
    def test_wrong_dropout(self, dropout):
        with pytest.raises(ValueError, match=rf"range \[0, 1\].*got {dropout!r}"):
            tritlstm.lstm(draw_input("batch"), None, list(build({}).parameters()), dropout=dropout)

    def test_only_keywords_after_the_parameters(self):
        with pytest.raises(TypeError, match="positional"):
            tritlstm.lstm(draw_input("batch"), None, list(build({}).parameters()), True)  # type: ignore[misc]
