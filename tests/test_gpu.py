"""What only a GPU can show: launches beside each other, beside other work, many of them, and from a graph."""

from __future__ import annotations

import pytest
import torch
from cuda_graphs import capture
from torch import Tensor

import tritlstm

pytestmark = pytest.mark.cuda

SIZES = {
    "single": (40, 48, 24, 64), "persistent": (60, 16, 32, 256), "many blocks": (30, 32, 40, 768),
    "one step": (1, 48, 24, 256),
}  # fmt: skip


def problem(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[tritlstm.LSTM, Tensor]:
    torch.manual_seed(0)
    t, b, d, h = sizes
    module = tritlstm.LSTM(d, h, device="cuda", dtype=dtype)
    return module, torch.randn(t, b, d, device="cuda", dtype=dtype)


def train(module: tritlstm.LSTM, x: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    x = x.detach().requires_grad_()
    out, _ = module(x)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [x, *module.parameters()])]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_two_streams_at_once(sizes):
    module, x = problem(sizes, torch.float16)
    expected = train(module, x)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = []
    for turn in range(40):
        with torch.cuda.stream(streams[turn % 2]):
            results.append(train(module, x))
    torch.cuda.synchronize()
    assert all(same(got, expected) for got in results)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_beside_kernels_that_occupy_the_gpu(sizes):
    module, x = problem(sizes, torch.bfloat16)
    expected = train(module, x)
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    results: list[list[Tensor]] = []
    for _ in range(20):
        with torch.cuda.stream(other):
            for _ in range(4):
                torch.mm(matrix, matrix)
        results.append(train(module, x))
    torch.cuda.synchronize()
    assert all(same(got, expected) for got in results)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_a_graph_replays_forward_and_backward(sizes):
    module, x = problem(sizes, torch.float16)
    static = x.clone().requires_grad_()

    def step() -> list[Tensor]:
        out, _ = module(static)
        return [out, *torch.autograd.grad(out.float().square().sum(), [static, *module.parameters()])]

    graph, captured = capture(step)
    for seed in range(3):
        torch.manual_seed(seed)
        fresh = torch.randn_like(x)
        with torch.no_grad():
            static.copy_(fresh)
        graph.replay()
        assert same([tensor.detach() for tensor in captured], train(module, fresh))


def test_a_thousand_training_steps_give_the_same_bits():
    module, x = problem((8, 16, 64, 512), torch.float16)
    first = train(module, x)
    for _ in range(1000):
        last = train(module, x)
    assert same(first, last)
