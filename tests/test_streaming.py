"""`tritlstm.chunks`: values of the whole stream, gradients of each chunk alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tritlstm


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("form", ["", "batch_first", "unbatched", "sizes", "resets"])
def test_chunks_give_the_outputs_of_the_whole(form):
    torch.manual_seed(0)
    hidden = [6, 4] if form == "sizes" else 6
    module = tritlstm.LSTM(3, hidden, batch_first=form == "batch_first", dtype=torch.float64)
    shape = {"batch_first": (2, 11, 3), "unbatched": (11, 3)}.get(form, (11, 2, 3))
    x = draw(*shape)
    resets = torch.rand((11, 2), generator=torch.Generator().manual_seed(1)) < 0.3 if form == "resets" else None
    run = tritlstm.chunks(module, x, 4, resets=resets)
    outs, parts = zip(*run, strict=True)
    whole, state = module(x, **({} if resets is None else {"resets": resets}))
    torch.testing.assert_close(torch.cat(outs, 1 if form == "batch_first" else 0), whole)
    torch.testing.assert_close(run.state, state)
    assert list(parts) == [slice(0, 4), slice(4, 8), slice(8, 11)]


def test_gradients_stop_between_chunks():
    module, exact = tritlstm.LSTM(3, 6, dtype=torch.float64), nn.LSTM(3, 6, dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    x, start = draw(6, 2, 3), (draw(1, 2, 6), draw(1, 2, 6))
    start[0].requires_grad_()
    state = tuple(s.detach() for s in start)
    run = tritlstm.chunks(module, x, 3, start)
    for out, part in run:
        module.zero_grad()
        out.square().sum().backward()
        exact.zero_grad()
        expected, state = exact(x[part], state)
        expected.square().sum().backward()
        state = tuple(s.detach() for s in state)
        torch.testing.assert_close(out, expected)
        for got, like in zip(module.parameters(), exact.parameters(), strict=True):
            torch.testing.assert_close(got.grad, like.grad)
        assert not any(s.requires_grad for s in run.state)
    assert start[0].grad is None


def test_each_iteration_starts_from_the_given_state():
    module, x, start = tritlstm.LSTM(3, 6, dtype=torch.float64), draw(7, 2, 3), (draw(1, 2, 6), draw(1, 2, 6))
    run = tritlstm.chunks(module, x, 3, start)
    assert all(torch.equal(a, b) for a, b in zip(run.state, start, strict=True))
    whole, state = module(x, start)
    next(iter(run))  # left after one chunk
    for _ in range(2):
        torch.testing.assert_close(torch.cat([out for out, _ in run]), whole)
        torch.testing.assert_close(run.state, state)


@pytest.mark.parametrize("kind", [tritlstm.LSTM, nn.LSTM])
def test_a_bidirectional_module_is_refused(kind):
    with pytest.raises(ValueError, match=r"reverse direction begins at the stream's end.* bidirectional=True; run"):
        tritlstm.chunks(kind(3, 6, bidirectional=True), draw(6, 2, 3), 2)


def test_resets_may_be_lists():
    module, x = tritlstm.LSTM(3, 6, dtype=torch.float64), draw(7, 2, 3)
    resets = [[t == 4, t in (1, 5)] for t in range(7)]
    outs = [out for out, _ in tritlstm.chunks(module, x, 3, resets=resets)]
    torch.testing.assert_close(torch.cat(outs), module(x, resets=torch.tensor(resets))[0])


def test_a_length_below_one_is_refused():
    with pytest.raises(ValueError, match="at least one time step, got length=0"):
        tritlstm.chunks(tritlstm.LSTM(3, 6), draw(6, 2, 3), 0)
