"""`lengths=`: every sequence of a batch gives what it gives alone, on torch's LSTM, the operators and the kernels.

The yardstick is torch.nn.LSTM in float64 on one sequence at a time, without padding.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import tritlstm
from tritlstm import emulator, functional

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, B, D, H = 6, 4, 4, 6
LENGTHS = [3, 0, 6, 1]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias, batch_first": {"bias": False, "batch_first": True},
    "both directions": {"bidirectional": True},
    "two layers, both directions, projection": {"num_layers": 2, "bidirectional": True, "proj_size": 3},
    "two layers, projection, batch_first": {"num_layers": 2, "proj_size": 3, "batch_first": True},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


@pytest.fixture(params=["torch", "operators"])
def path(request, monkeypatch):
    """Both ways through the modules: torch's own LSTM, and the operators as where the Triton kernels run."""
    if request.param == "operators":
        monkeypatch.setattr(functional, "runs_kernels", lambda x: True)
    return request.param


def kernels() -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if DEVICE == "cuda" else emulator.emulate()


def draw(kind: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[tritlstm.LSTM, Tensor, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    module = tritlstm.LSTM(D, H, **kind, dtype=dtype)
    rows = module.num_layers * (1 + module.bidirectional)
    x = torch.randn((B, T, D) if module.batch_first else (T, B, D), dtype=dtype)
    return module, x, tuple(torch.randn(rows, B, n, dtype=dtype) for n in (module.proj_size or H, H))


def one_by_one(module: tritlstm.LSTM, x: Tensor, hx: tuple[Tensor, ...], lengths: list[int]) -> tuple[Tensor, ...]:
    """Output and final states, each sequence by itself through torch.nn.LSTM; on the graph of all arguments."""
    alone = nn.LSTM(
        module.input_size, H, module.num_layers, module.bias, proj_size=module.proj_size,
        bidirectional=module.bidirectional, dtype=x.dtype,
    )  # fmt: skip
    outs, states = [], []
    steps = x.transpose(0, 1) if module.batch_first else x
    for b, n in enumerate(lengths):
        start = tuple(state[:, b] for state in hx)
        width = (module.proj_size or H) * (1 + module.bidirectional)
        out = steps.new_zeros(0, width)
        if n > 0:
            out, start = torch.func.functional_call(alone, dict(module.named_parameters()), (steps[:n, b], start))
        outs.append(torch.nn.functional.pad(out, (0, 0, 0, len(steps) - n)))
        states.append(start)
    out = torch.stack(outs, 0 if module.batch_first else 1)
    return out, *(torch.stack(each, 1) for each in zip(*states, strict=True))


def with_gradients(results: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    loss = sum(
        (torch.linspace(1, 2, r.numel(), device=r.device, dtype=r.dtype).view(r.shape) * r).sum() for r in results
    )
    return [*results, *torch.autograd.grad(loss, leaves)]


class TestValues:
    @kinds
    def test_values_and_gradients_are_those_of_each_sequence_alone(self, kind, path):
        module, x, hx = draw(kind)
        leaves = [t.requires_grad_() for t in (x, *hx)] + list(module.parameters())
        out, states = module(x, hx, lengths=LENGTHS)
        got = with_gradients((out, *states), leaves)
        expected = with_gradients(one_by_one(module, x, hx, LENGTHS), leaves)
        for mine, theirs in zip(got, expected, strict=True):  # float64, sums in another order
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("lengths", [[6, 6, 6, 6], [0, 0, 0, 0], [0, 0, 2, 0]], ids=str)
    def test_full_empty_and_lonely(self, lengths, path):
        module, x, hx = draw(KINDS["two layers, both directions, projection"])
        out, states = module(x, hx, lengths=lengths)
        for mine, theirs in zip((out, *states), one_by_one(module, x, hx, lengths), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
        if lengths == [6] * 4:
            for mine, theirs in zip((out, *states), (lambda o, s: (o, *s))(*module(x, hx)), strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("form", [tuple, np.array, torch.tensor, lambda n: torch.tensor(n, dtype=torch.uint8)])
    def test_any_sequence_or_tensor_of_integers(self, form, path):
        module, x, hx = draw({"bidirectional": True})
        assert torch.equal(module(x, hx, lengths=form(LENGTHS))[0], module(x, hx, lengths=LENGTHS)[0])

    def test_on_another_default_device(self, path):
        """A list is checked on the host, and the CPU's tensors stay there."""
        module, x, hx = draw({"num_layers": 2, "bidirectional": True})
        results = []
        for place in (contextlib.nullcontext(), torch.device("meta")):
            module.zero_grad()
            with place:
                out, states = module(x, hx, lengths=LENGTHS)
                packed = pack_padded_sequence(x, torch.tensor([3, 2, 6, 1], device="cpu"), enforce_sorted=False)
                rest, _ = module(packed, hx)
                (out.sum() + rest.data.sum()).backward()
                with pytest.raises(ValueError, match=r"between 0 and T = 6, got lengths\[2\] = 7"):
                    module(x, hx, lengths=[3, 0, 7, 1])
            results.append([out, *states, rest.data, *(p.grad for p in module.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_states_default_to_zeros(self, path):
        module, x, hx = draw({"bidirectional": True})
        zeros = tuple(torch.zeros_like(state) for state in hx)
        assert torch.equal(module(x, lengths=LENGTHS)[0], module(x, zeros, lengths=LENGTHS)[0])

    def test_they_are_those_of_a_packed_input(self, path):
        module, x, hx = draw({"num_layers": 2, "bidirectional": True})
        lengths = [3, 2, 6, 1]
        out, states = module(x, hx, lengths=lengths)
        packed, states_packed = module(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
        torch.testing.assert_close(nn.utils.rnn.pad_packed_sequence(packed)[0], out, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(states_packed, states, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("padding", [1e3, torch.nan, -torch.inf], ids=str)
    def test_what_stands_in_the_padding_has_no_influence(self, padding, path):
        module, x, hx = draw({"num_layers": 2, "bidirectional": True})
        other = x.clone()
        for b, n in enumerate(LENGTHS):
            other[n:, b] = padding
        results = []
        for value in (x, other):
            leaves = [value.requires_grad_(), *module.parameters()]
            out, states = module(value, hx, lengths=LENGTHS)
            results.append(with_gradients((out, *states), leaves))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_the_functional_form(self, path):
        module, x, hx = draw({"batch_first": True})
        out, states = tritlstm.lstm(x, hx, list(module.parameters()), batch_first=True, lengths=LENGTHS)
        expected, expected_states = module(x, hx, lengths=LENGTHS)
        assert torch.equal(out, expected)
        assert all(torch.equal(a, b) for a, b in zip(states, expected_states, strict=True))

    def test_the_order_of_the_batch_does_not_matter(self, path):
        module, x, hx = draw({"bidirectional": True})
        order = torch.tensor([2, 3, 0, 1])
        out, (h_n, c_n) = module(x, hx, lengths=torch.tensor(LENGTHS))
        turned = module(x[:, order], (hx[0][:, order], hx[1][:, order]), lengths=torch.tensor(LENGTHS)[order])
        torch.testing.assert_close(turned[0], out[:, order], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(turned[1], (h_n[:, order], c_n[:, order]), rtol=1e-12, atol=1e-12)

    def test_dropout_acts_between_layers(self, path):
        module, x, hx = draw({"num_layers": 2, "dropout": 1.0})
        module.eval()
        kept = module(x, hx, lengths=LENGTHS)[0]
        module.train()
        dropped = module(x, hx, lengths=LENGTHS)[0]
        above = tritlstm.LSTM(H, H, dtype=x.dtype)
        above.load_state_dict({k.replace("l1", "l0"): v for k, v in module.state_dict().items() if "l1" in k})
        nothing = torch.zeros(T, B, H, dtype=x.dtype)
        expected = above(nothing, (hx[0][1:], hx[1][1:]), lengths=LENGTHS)[0]
        torch.testing.assert_close(dropped, expected, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(kept, dropped)

    def test_under_autocast(self, path):
        module, x, hx = draw({"bidirectional": True}, torch.float32)
        expected, expected_states = module(x, hx, lengths=LENGTHS)
        with torch.autocast("cpu", torch.bfloat16):
            out, states = module(x, hx, lengths=LENGTHS)
            nothing = module(x, hx, lengths=[0] * B)
        assert {t.dtype for t in (out, *states, nothing[0], *nothing[1])} == {torch.bfloat16}
        # bfloat16 rounds at 2^-8 in weights and states, which are of order one.
        torch.testing.assert_close(
            (out.float(), states[0].float()), (expected, expected_states[0]), rtol=0.03, atol=0.02
        )


class TestDerivatives:
    def test_gradgradcheck(self, path):
        torch.manual_seed(0)
        module = tritlstm.LSTM(2, 3, proj_size=2, bidirectional=True, dtype=torch.float64)
        x = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(
            lambda x, *_: module(x, lengths=[2, 0, 3])[0], (x, *module.parameters()), fast_mode=True
        )


class TestKernels:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_values_and_gradients_in_the_emulator_or_on_cuda(self, dtype):
        kind = KINDS["two layers, both directions, projection"]
        module, x, hx = draw(kind, dtype)
        exact = tritlstm.LSTM(D, H, **kind, dtype=torch.float64)
        exact.load_state_dict(module.state_dict())
        exact_leaves = [t.double().requires_grad_() for t in (x, *hx)]
        expected = with_gradients(
            one_by_one(exact, exact_leaves[0], tuple(exact_leaves[1:]), LENGTHS), [*exact_leaves, *exact.parameters()]
        )
        # torch's own error in the same dtype is the measure of a fair one.
        leaves = [t.detach().clone().requires_grad_() for t in (x, *hx)]
        theirs = with_gradients(
            one_by_one(module, leaves[0], tuple(leaves[1:]), LENGTHS), [*leaves, *module.parameters()]
        )
        mine = tritlstm.LSTM(D, H, **kind, dtype=dtype, device=DEVICE)
        mine.load_state_dict(module.state_dict())
        leaves = [t.detach().to(DEVICE).requires_grad_() for t in (x, *hx)]
        with kernels():
            out, states = mine(leaves[0], tuple(leaves[1:]), lengths=torch.tensor(LENGTHS, device=DEVICE))
            got = with_gradients((out, *states), [*leaves, *mine.parameters()])
            for b, n in enumerate(LENGTHS):
                leaves[0].data[n:, b] = torch.nan
            out, states = mine(leaves[0], tuple(leaves[1:]), lengths=torch.tensor(LENGTHS, device=DEVICE))
            again = with_gradients((out, *states), [*leaves, *mine.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
        for value, other, reference in zip(got, theirs, expected, strict=True):
            error, torch_error = ((v.detach().double().cpu() - reference).abs().max() for v in (value, other))
            rounding = reference.abs().max() * torch.finfo(dtype).eps / 2
            assert error <= 2 * torch_error + rounding

    def test_values_out_of_range_that_the_host_does_not_read_count_as_the_nearest(self, monkeypatch):
        monkeypatch.setattr(functional, "_traced", lambda: True)
        module, x, hx = draw({"bidirectional": True})
        out, states = module(x, hx, lengths=torch.tensor([9, -1, 3, 300]))
        expected, expected_states = module(x, hx, lengths=[6, 0, 3, 6])
        assert torch.equal(out, expected)
        assert all(torch.equal(a, b) for a, b in zip(states, expected_states, strict=True))

    def test_no_value_is_read_where_there_are_none(self):
        """On the meta device, as on a GPU, reading a length would raise or wait."""
        module = tritlstm.LSTM(D, H, 2, bidirectional=True, device="meta")
        x, lengths = torch.empty(T, B, D, device="meta"), torch.empty(B, dtype=torch.int64, device="meta")
        out, (h_n, c_n) = module(x, lengths=lengths)
        assert (out.shape, h_n.shape, c_n.shape) == ((T, B, 2 * H), (4, B, H), (4, B, H))

    @pytest.mark.cuda
    def test_nothing_waits_for_the_gpu(self):
        module, x, hx = draw({"num_layers": 2, "bidirectional": True}, torch.float32)
        module, x, lengths = module.cuda(), x.cuda(), torch.tensor(LENGTHS, device="cuda")
        states = tuple(state.cuda() for state in hx)
        expected = module(x, states, lengths=lengths)[0]
        expected.sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = module(x, states, lengths=lengths)[0]
            out.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(out, expected)


class TestErrors:
    @pytest.mark.parametrize(
        ("lengths", "text"),
        [
            (
                [3, 0, 6],
                r"one value for each of the B = 4 sequences, shape \[4\], got shape \[3\]; see also batch_first",
            ),
            (torch.zeros(4, 1, dtype=torch.int64), r"shape \[4\], got shape \[4, 1\]"),
            ([], r"shape \[4\], got shape \[0\]"),
            ([3.0, 0, 6, 1], r"must be integers, got torch\.float32; convert them, as by lengths\.long\(\)"),
            (torch.ones(4), r"must be integers, got torch\.float32"),
            (5, "must be a tensor or a sequence of ints, one for each sequence, got 5"),
            ([True] * 4, r"must be integers, got torch\.bool"),
            ([3, 0, 7, 1], r"between 0 and T = 6, got lengths\[2\] = 7"),
            (torch.tensor([3, -1, 6, 1]), r"between 0 and T = 6, got lengths\[1\] = -1"),
        ],
    )
    def test_wrong_lengths(self, lengths, text, path):
        module, x, hx = draw({})
        for call in (lambda: module(x, hx, lengths=lengths), lambda: tritlstm.explain(module, x, lengths=lengths)):
            with pytest.raises(ValueError, match=text):
                call()

    def test_without_a_batch(self, path):
        with pytest.raises(ValueError, match=r"shape \[6, 4\] without one; cut the sequence.*unsqueeze"):
            tritlstm.LSTM(D, H)(torch.zeros(T, D), lengths=[3])

    def test_with_a_packed_input(self, path):
        packed = pack_sequence([torch.zeros(2, D)])
        with pytest.raises(ValueError, match=r"PackedSequence brings its lengths with it, got lengths too; leave one"):
            tritlstm.LSTM(D, H)(packed, lengths=[2])

    def test_by_keyword_only(self):
        with pytest.raises(TypeError, match="positional"):
            tritlstm.LSTM(D, H)(torch.zeros(T, B, D), None, LENGTHS)


class TestExplain:
    def test_on_the_cpu(self):
        told = str(tritlstm.explain(tritlstm.LSTM(D, H), torch.zeros(T, B, D), lengths=LENGTHS))
        assert "path: torch" in told
        assert "sorts and packs the batch, and leaves sequences of length 0 out" in told

    def test_where_kernels_run(self):
        with emulator.emulate():
            found = tritlstm.explain(tritlstm.LSTM(D, H), torch.zeros(T, B, D), lengths=torch.tensor(LENGTHS))
        assert found.path == "kernels"
        assert "note: lengths are read on cpu: no sorting, no packing, no copy to the host" in str(found)

    def test_where_it_can_not_be(self):
        cell, lstm, zeros = tritlstm.LSTMCell(D, H), tritlstm.LSTM(D, H), torch.zeros(T, D)
        with pytest.raises(TypeError, match=r"LSTMCell knows no lengths, got some; leave them out"):
            tritlstm.explain(cell, zeros, lengths=LENGTHS)
        with pytest.raises(ValueError, match=r"go with a batch .*, got shape \[6, 4\]; leave them out"):
            tritlstm.explain(lstm, zeros, lengths=[3])
        with pytest.raises(ValueError, match=r"got a PackedSequence; leave them out"):
            tritlstm.explain(lstm, pack_sequence([zeros]), lengths=[6])
