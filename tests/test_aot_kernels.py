"""The kernels that only the C library needs, in the emulator, against NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tritlstm import emulator
from tritlstm.kernels.launch import Launch

TILES = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2, "PRECISION": "ieee"}
BLOCKS = {"ROWS": 4, "COLUMNS": 32}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def values(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def run(kernel: str, grid: tuple[int, ...], constants: dict[str, Any], **arguments: Any) -> None:
    with emulator.emulate():
        emulator.run(Launch(kernel, grid, arguments, constants, 4))


@pytest.mark.parametrize("trans", [(False, True), (False, False), (True, False)], ids=["nt", "nn", "tn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product(trans: tuple[bool, bool], dtype: torch.dtype) -> None:
    m, n, k = (40, 72, 37) if trans[0] else (37, 72, 40)
    a = draw(*((k, m) if trans[0] else (m, k)), dtype=dtype, seed=1)
    b = draw(*((n, k) if trans[1] else (k, n)), dtype=dtype, seed=2)
    bias, c = draw(n, seed=3), draw(m, 80, dtype=dtype, seed=4)
    exact = values(a).T if trans[0] else values(a)
    exact = exact @ (values(b).T if trans[1] else values(b)) + values(bias) + values(c)[:, :n]
    before = c[:, n:].clone()
    run(
        "product", (-(-m // 32) * -(-n // 32),), {**TILES, "TRANS_A": trans[0], "TRANS_B": trans[1]},
        a_ptr=a, b_ptr=b, bias_ptr=bias, c_ptr=c, M=m, N=n, K=k, a_stride=a.shape[1], b_stride=b.shape[1], c_stride=80,
        biased=1, accumulate=1,
    )  # fmt: skip
    # One rounding of the result, and fp32 sums of k terms of a few units.
    budget = np.abs(exact).max() * (2.0**-8 if dtype == torch.bfloat16 else 2.0**-22) + k * 2.0**-22
    assert np.abs(values(c)[:, :n] - exact).max() < budget
    assert torch.equal(c[:, n:], before)


def test_product_overwrites_what_it_is_not_told_to_add() -> None:
    a, b, c = draw(5, 16, seed=1), draw(8, 16, seed=2), torch.full((5, 8), torch.nan)
    nothing = torch.full((8,), torch.nan)
    run(
        "product", (1,), {**TILES, "TRANS_A": False, "TRANS_B": True}, a_ptr=a, b_ptr=b, bias_ptr=nothing, c_ptr=c,
        M=5, N=8, K=16, a_stride=16, b_stride=16, c_stride=8, biased=0, accumulate=0,
    )  # fmt: skip
    assert np.allclose(values(c), values(a) @ values(b).T, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_column_sums(dtype: torch.dtype) -> None:
    a, out = draw(150, 40, dtype=dtype), torch.full((40,), torch.nan)
    run("column_sums", (2,), {"BLOCK_K": 64, "BLOCK_N": 32}, a_ptr=a, out_ptr=out, K=150, N=40)
    assert np.abs(values(out) - values(a).sum(0)).max() < 150 * 2.0**-22


def test_rearrange_pads_transposes_and_converts() -> None:
    """Rows of PyTorch's order, gate by gate, to the kernels' order, the gates of a unit side by side; and back."""
    h, k = 5, 7
    w = draw(4 * h, k, dtype=torch.float16)
    packed = torch.full((8, 4, 16), torch.nan)
    strides = {"source_stride0": k, "source_stride1": h * k, "target_stride0": 64, "target_stride1": 16}
    extents = {"n0": 8, "n1": 4, "n2": 16, "valid0": h, "valid1": 4, "valid2": k}
    run("rearrange", (8, 1), BLOCKS, source_ptr=w, target_ptr=packed, **extents, **strides, accumulate=0)
    expected = np.zeros((8, 4, 16))
    expected[:h, :, :k] = values(w).reshape(4, h, k).transpose(1, 0, 2)
    assert np.array_equal(values(packed), expected)

    back = torch.ones(4 * h, k, dtype=torch.float16)
    strides = {"source_stride0": 64, "source_stride1": 16, "target_stride0": k, "target_stride1": h * k}
    extents = {"n0": h, "n1": 4, "n2": k, "valid0": h, "valid1": 4, "valid2": k}
    run("rearrange", (5, 1), BLOCKS, source_ptr=packed, target_ptr=back, **extents, **strides, accumulate=1)
    assert torch.equal(back, w + 1)


@pytest.mark.parametrize("reverse", [0, 1])
def test_first_steps_and_the_states_before(reverse: int) -> None:
    t, b, w = 4, 5, 40
    lengths = torch.tensor([4, 0, 2, 1, 3], dtype=torch.int32)
    h, h0, addend = draw(t, b, w, seed=1), draw(b, w, seed=2), draw(b, w, seed=3)
    first = [max(int(n) - 1, 0) if reverse else 0 for n in lengths]
    sizes = {"B": b, "W": w, "reverse": reverse}

    taken = torch.full((b, w), torch.nan)
    run("take_first", (2, 2), BLOCKS, source_ptr=h, lengths_ptr=lengths, target_ptr=taken, **sizes)
    assert torch.equal(taken, h[first, range(b)])

    added = h.clone()
    run("add_first", (2, 2), BLOCKS, source_ptr=addend, lengths_ptr=lengths, target_ptr=added, **sizes)
    expected = values(h)
    for i in range(b):
        expected[first[i], i] += values(addend)[i]
    assert np.abs(values(added) - expected).max() < 2.0**-21

    before = torch.full((t, b, w), torch.nan)
    run(
        "previous_states", (5, 2), BLOCKS, h_ptr=h, h0_ptr=h0, lengths_ptr=lengths, target_ptr=before, T=t, **sizes
    )  # fmt: skip
    for i, n in enumerate(lengths.tolist()):
        own = [h0[i], *(h[:n, i].flip(0) if reverse else h[:n, i])][:n]
        own = own[::-1] if reverse else own
        expected_rows = torch.stack([*own, *[torch.zeros(w)] * (t - n)])
        assert torch.equal(before[:, i], expected_rows)

    kept = h0.clone()
    run("keep_empty", (2, 2), BLOCKS, source_ptr=addend, lengths_ptr=lengths, target_ptr=kept, B=b, W=w)
    assert torch.equal(kept, torch.where((lengths == 0)[:, None], addend, h0))

    ended = h.clone()
    ended[1:, 1:2] = torch.nan
    run("zero_ends", (5, 2), BLOCKS, lengths_ptr=lengths, target_ptr=ended, T=t, B=b, W=w)
    active = (torch.arange(t)[:, None] < lengths)[:, :, None]
    assert torch.equal(ended, torch.where(active, h, 0.0))


def test_clamp_lengths() -> None:
    lengths, out = torch.tensor([-3, 0, 2, 9], dtype=torch.int32), torch.full((4,), 77, dtype=torch.int32)
    run("clamp_lengths", (1,), {"ROWS": 8}, lengths_ptr=lengths, target_ptr=out, T=4, B=4)
    assert out.tolist() == [0, 0, 2, 4]
