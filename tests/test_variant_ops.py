"""Variants of the cell and resets: the NumPy reference by finite differences, the operators and kernels against it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritlstm import emulator, inspect_kernels, plan, random_bits, reference, variant_ops
from tritlstm.cell_options import ACTIVATIONS, STANDARD, Cell

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SIZES = (5, 3, 4, 6)  # T, B, D, H
NAMES = ("x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0")
NOISE = (11, 5, 2)
ZONES = (0.4, 0.3)

#: What differs, by name; `random` below stands for tensors that are drawn.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "resets": {"resets": True},
    "peephole": {"peephole": True},
    "coupled": {"coupled": True},
    "coupled peephole": {"coupled": True, "peephole": True},
    "clip": {"cell_clip": 0.3},
    "clip peephole": {"cell_clip": 0.3, "peephole": True},
    "scaled h": {"h_scale": True},
    "zoneout": {"zoneout": ZONES, "noise": True},
    "zoneout of h": {"zoneout": (0.5, 0.0), "noise": True, "resets": True},
    "zoneout of c with peepholes and clip": {
        "zoneout": (0.0, 0.5), "noise": True, "peephole": True, "cell_clip": 0.5
    },
    "mean zoneout": {"zoneout": ZONES},
    "hard sigmoid": {"activations": ("hard_sigmoid", "tanh", "tanh")},
    "relu and softsign": {"activations": ("sigmoid", "relu", "softsign")},
    "softplus and leaky relu": {"activations": ("sigmoid", "softplus", "leaky_relu")},
    "elu": {"activations": ("hard_sigmoid", "elu", "elu")},
    "all": {
        "resets": True, "peephole": True, "coupled": True, "cell_clip": 0.8, "h_scale": True, "zoneout": ZONES,
        "noise": True, "activations": ("hard_sigmoid", "softsign", "tanh"),
    },
}  # fmt: skip


@dataclasses.dataclass
class Problem:
    """Inputs of one layer and direction, upstream gradients, and what differs, both for the operator and in NumPy."""

    inputs: dict[str, Tensor]
    grads: list[Tensor]
    cell: Cell
    variant: reference.Variant

    @classmethod
    def draw(
        cls, kind: dict[str, Any], sizes: tuple[int, int, int, int] = SIZES, dtype: Any = torch.float64, seed: int = 0
    ) -> Problem:
        t, b, d, h = sizes
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

        shapes = ((t, b, d), (4 * h, d), (4 * h, h), (4 * h,), (4 * h,), (b, h), (b, h))
        scales = (1.0, d**-0.5, h**-0.5, 0.5, 0.5, 0.5, 1.0)
        inputs = {
            name: normal(*shape, scale=scale) for name, shape, scale in zip(NAMES, shapes, scales, strict=True)
        }
        grads = [normal(t, b, h), normal(b, h), normal(b, h)]
        zoneout = kind.get("zoneout", (0.0, 0.0))
        activations = kind.get("activations", ("sigmoid", "tanh", "tanh"))
        resets = torch.rand((t, b), generator=generator) < 0.4 if kind.get("resets") else None
        peephole = normal(3 * h, scale=0.7) if kind.get("peephole") else None
        kept = torch.rand((b, h), generator=generator) < 0.6
        h_scale = (kept * 1.5).to(torch.promote_types(dtype, torch.float32)) if kind.get("h_scale") else None
        noise = torch.tensor(NOISE) if kind.get("noise") else None
        codes = tuple(ACTIVATIONS.index(name) for name in activations)
        coupled, clip = kind.get("coupled", False), kind.get("cell_clip")
        cell = Cell(resets, peephole, h_scale, noise, coupled, clip or 0.0, *zoneout, codes)
        keeps = zones(noise, zoneout, (t, b, h))
        arrays = [None if v is None else v.double().numpy() for v in (peephole, h_scale)]
        variant = reference.Variant(
            None if resets is None else resets.numpy(), arrays[0], coupled, clip, activations, arrays[1], *keeps
        )
        return cls(inputs, grads, cell, variant)

    def by_reference(self, reverse: bool, lengths: list[int] | None = None) -> dict[str, np.ndarray]:
        """Each sequence alone, cut to its length and, in reverse, flipped: directions and lengths by other means."""
        arrays = {name: value.double().numpy() for name, value in self.inputs.items()}
        upstream = [g.double().numpy() for g in self.grads]
        t, b, _ = arrays["x"].shape
        h = arrays["h0"].shape[1]
        found: dict[str, Any] = {k: np.zeros_like(arrays[k]) for k in ("x", "h0", "c0")}
        found |= {"out": np.zeros((t, b, h)), "h_n": np.zeros((b, h)), "c_n": np.zeros((b, h))}
        sums: dict[str, Any] = dict.fromkeys(("w_ih", "w_hh", "b", "peephole"), 0.0)
        gate0 = np.zeros((b, 4 * h))
        weights = {name: arrays[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")}
        flip = (lambda a: a[::-1]) if reverse else (lambda a: a)
        for k in range(b):
            one, n = slice(k, k + 1), t if lengths is None else lengths[k]
            trace = reference.forward(
                x=flip(arrays["x"][:n, one]), **weights, h0=arrays["h0"][one], c0=arrays["c0"][one],
                variant=self.of_one(k, n, reverse),
            )  # fmt: skip
            got = reference.backward(trace, flip(upstream[0][:n, one]), upstream[1][one], upstream[2][one])
            found["out"][:n, one], found["x"][:n, one] = flip(trace.h), flip(got.x)
            found["h_n"][one], found["c_n"][one] = trace.h_n, trace.c_n
            found["h0"][one], found["c0"][one] = got.h0, got.c0
            sums = {name: value + getattr(got, name) for name, value in sums.items()}
            if n:
                cut = trace.variant.resets is not None and trace.variant.resets[0, 0]
                gate0[one] = 0 if cut else got.gates[0]
        return found | sums | {"gate0": gate0}

    def of_one(self, k: int, n: int, reverse: bool) -> reference.Variant:
        one = slice(k, k + 1)
        changes = {}
        for name in ("resets", "keep_h", "keep_c", "h_scale"):
            value = getattr(self.variant, name)
            if value is None:
                continue
            if name == "h_scale":
                changes[name] = value[one]
                continue
            value = value[:n, one]
            if reverse and name == "resets":
                # Step t - 1 is cut off from t: in the order of processing, the step after the one of the reset.
                value = np.concatenate([np.zeros_like(value[:1]), value[1:][::-1]])
            elif reverse:
                value = value[::-1]
            changes[name] = value
        return dataclasses.replace(self.variant, **changes)


def zones(noise: Any, zoneout: tuple[float, float], shape: tuple[int, int, int]) -> list[np.ndarray]:
    if noise is None:
        return [np.full(shape, p) for p in zoneout]
    words = random_bits.draw(noise, shape)
    return [(w.numpy() / 2**32 < p).astype(float) for w, p in zip(words, zoneout, strict=False)]


variants = pytest.mark.parametrize("kind", VARIANTS.values(), ids=VARIANTS.keys())
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
GRADIENTS = ("x", "w_ih", "w_hh", "b", "h0", "c0", "gate0", "peephole")


def close(got: Any, expected: Any, name: str) -> None:
    # Both in float64, sums of some hundred terms of order one: 1e-12 is 5000 roundings.
    np.testing.assert_allclose(np.asarray(got), expected, rtol=1e-12, atol=1e-12, err_msg=name)


@variants
def test_the_reference_s_gradients_are_those_of_finite_differences(kind):
    problem = Problem.draw(kind, (4, 2, 3, 4), seed=3)
    arrays = {name: value.numpy() for name, value in problem.inputs.items()}
    if problem.variant.peephole is not None:
        arrays["peephole"] = np.asarray(problem.variant.peephole)
    upstream = [g.numpy() for g in problem.grads]
    generator = np.random.default_rng(0)

    def loss(values: dict[str, np.ndarray]) -> float:
        given = dict(values)
        variant = dataclasses.replace(problem.variant, peephole=given.pop("peephole", None))
        trace = reference.forward(**given, variant=variant)
        results = (trace.h, trace.h_n, trace.c_n)
        return sum(float((a * b).sum()) for a, b in zip(results, upstream, strict=True))

    variant = dataclasses.replace(problem.variant, peephole=arrays.get("peephole"))
    trace = reference.forward(**{k: v for k, v in arrays.items() if k != "peephole"}, variant=variant)
    got = reference.backward(trace, *upstream)
    for name, value in arrays.items():
        direction = generator.standard_normal(value.shape)
        step = 1e-6
        ahead, behind = (loss({**arrays, name: value + sign * step * direction}) for sign in (1, -1))
        gradient = getattr(got, "b" if name.startswith("b_") else name)
        # The differences err by rounding / step = 1e-10 and step² = 1e-12, in sums of some dozen terms.
        assert (gradient * direction).sum() == pytest.approx((ahead - behind) / (2 * step), rel=1e-7, abs=1e-7), name


@directions
@variants
def test_the_operator_equals_the_reference(kind, reverse):
    problem = Problem.draw(kind)
    assert_operator(problem, reverse, None)


@directions
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@pytest.mark.parametrize("name", ["resets", "zoneout", "all"])
def test_lengths_cut_each_sequence_off(name, recompute, reverse):
    assert_operator(Problem.draw(VARIANTS[name], (5, 4, 3, 6)), reverse, [5, 0, 2, 4], recompute)


@variants
def test_rebuilt_gates_give_the_same_gradients(kind):
    assert_operator(Problem.draw(kind), False, None, recompute=True)


def assert_operator(
    problem: Problem, reverse: bool, lengths: list[int] | None, recompute: bool = False
) -> None:
    exact = problem.by_reference(reverse, lengths)
    for name, value in results_and_gradients(problem, reverse, lengths, recompute).items():
        close(value, exact[name], name)


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
def test_what_is_saved(recompute):
    *_, gates, cells = variant_ops.layer(*Problem.draw({}).inputs.values(), save=True, recompute=recompute)
    assert gates.shape == ((0,) if recompute else (5, 3, 32))
    assert cells.shape == (5, 3, 8)


def results_and_gradients(
    problem: Problem, reverse: bool, lengths: list[int] | None, recompute: bool = False, device: str = "cpu"
) -> dict[str, np.ndarray]:
    """By name, as those of `Problem.by_reference`, in float64."""
    leaves = {name: value.clone().to(device).requires_grad_() for name, value in problem.inputs.items()}
    cell = problem.cell._replace(
        **{n: v.to(device) for n, v in problem.cell._asdict().items() if isinstance(v, Tensor)}
    )
    if cell.peephole is not None:
        cell = cell._replace(peephole=cell.peephole.clone().requires_grad_())
    gate0 = leaves["x"].new_zeros(leaves["h0"].size(0), leaves["w_hh"].size(0)).requires_grad_()
    ends = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=device)
    results = variant_ops.layer(*leaves.values(), ends, reverse, False, gate0, cell, recompute)[:3]
    torch.autograd.backward(results, [g.to(device) for g in problem.grads])
    named = dict(zip(("out", "h_n", "c_n"), results, strict=True))
    named |= {"b" if name == "b_ih" else name: v.grad for name, v in leaves.items() if name != "b_hh"}
    named |= {"gate0": gate0.grad} | ({} if cell.peephole is None else {"peephole": cell.peephole.grad})
    return {name: value.detach().double().cpu().numpy() for name, value in named.items()}


def by_kernels(problem: Problem, *args: Any, **options: Any) -> dict[str, np.ndarray]:
    with contextlib.nullcontext() if CUDA else emulator.emulate(**options):
        return results_and_gradients(problem, *args, device=DEVICE)


def assert_float32(got: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> None:
    """Sums of some hundred terms over a few steps: a few hundred roundings of 6e-8, of the largest value."""
    for name, value in got.items():
        limit = 2e-5 * max(1.0, np.abs(exact[name]).max())
        np.testing.assert_allclose(value, exact[name], rtol=0, atol=limit, err_msg=name)


TIERS: list[dict[str, Any]] = [
    {"tier": "persistent", "protocol": "flag"},
    {"tier": "single"},
    {"tier": "persistent", "protocol": "counter"},
    {"tier": "step"},
]
#: Each variant once, over the tiers, directions, lengths and ways to have the gates in turn.
IN_TURN = list(zip(VARIANTS.items(), itertools.cycle(TIERS), itertools.cycle((False, True, True)), strict=False))


class TestKernels:
    @pytest.mark.parametrize(("name", "tier", "reverse"), [(n, t, r) for (n, _), t, r in IN_TURN], ids=str)
    def test_each_variant_equals_the_reference(self, name, tier, reverse):
        problem = Problem.draw(VARIANTS[name], (4, 3, 4, 20), torch.float32)
        lengths, recompute = ([4, 0, 2] if len(name) % 2 else None), len(name) % 3 == 0
        got = by_kernels(problem, reverse, lengths, recompute, **tier)
        assert_float32(got, problem.by_reference(reverse, lengths))

    @pytest.mark.parametrize("tier", TIERS, ids=str)
    @pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
    def test_everything_at_once_in_every_tier(self, tier, reverse):
        problem = Problem.draw(VARIANTS["all"], (4, 4, 3, 18), torch.float32, seed=5)
        got = by_kernels(problem, reverse, [4, 0, 2, 3], False, **tier)
        assert_float32(got, problem.by_reference(reverse, [4, 0, 2, 3]))

    def test_everything_at_once_where_weights_are_streamed(self):
        problem = Problem.draw(VARIANTS["all"], (3, 3, 4, 150), torch.float32, seed=6)
        options = {"tier": "streaming", "sms": 10, "shared_bytes": 64 << 10, "block_k": 32}
        got = by_kernels(problem, True, [3, 0, 2], True, **options)
        assert_float32(got, problem.by_reference(True, [3, 0, 2]))

    @pytest.mark.parametrize("name", ["all", "peephole"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
    def test_short_types_err_at_most_twice_as_much_as_plain_operators(self, dtype, name):
        """Of the plain operators in the same dtype on the same numbers, computing in float32, plus a rounding.

        The worst of several draws: one of few numbers says little.
        """
        errors: dict[str, list[float]] = {}
        for seed in range(2):
            problem = Problem.draw(VARIANTS[name], (3, 4, 4, 20), dtype, seed)
            exact, plain = problem.by_reference(False), results_and_gradients(problem, False, None)
            for key, value in by_kernels(problem, False, None, tier="persistent").items():
                row = errors.setdefault(key, [0.0, 0.0, 0.0])
                found = (np.abs(value - exact[key]), np.abs(plain[key] - exact[key]), np.abs(exact[key]))
                errors[key] = [max(a, b.max()) for a, b in zip(row, found, strict=True)]
        for key, (error, of_plain, largest) in errors.items():
            assert error <= 2 * of_plain + largest * torch.finfo(dtype).eps / 2, (key, error, of_plain)

    @pytest.mark.skipif(CUDA, reason="compiles for one architecture; on CUDA the tests above do")
    @pytest.mark.parametrize("direction", ["forward", "backward"])
    def test_everything_at_once_compiles_without_spilling(self, direction):
        """The interpreter accepts more than the compiler does."""
        chosen = plan.recurrent(direction, 64, 16, 256, torch.float16, plan.DEVICES["sm_90"])
        launch = inspect_kernels.recurrent_launch(chosen, variant="cell")
        compiled = inspect_kernels.compile_launch(launch, "sm_90")
        _, resources = inspect_kernels.read_code(compiled, launch)
        assert resources.spill_bytes == 0
        assert resources.registers <= 255


@st.composite
def problems(draw: Callable[..., Any], dtype: Any) -> tuple[Problem, bool, list[int] | None, bool]:
    """Any combination of what may differ, with sizes, lengths, direction and whether gates are rebuilt."""
    sizes = tuple(draw(st.integers(1, most)) for most in (6, 4, 3, 18))
    kind: dict[str, Any] = {name: draw(st.booleans()) for name in ("resets", "peephole", "coupled", "h_scale", "noise")}
    kind["cell_clip"] = draw(st.sampled_from([None, 0.4]))
    kind["zoneout"] = (draw(st.sampled_from([0.0, 0.3])), draw(st.sampled_from([0.0, 0.4])))
    choices = (("sigmoid", "hard_sigmoid"), ("tanh", "softsign", "elu"), ("tanh", "softplus"))
    kind["activations"] = tuple(draw(st.sampled_from(of)) for of in choices)
    lengths = draw(st.none() | st.lists(st.integers(0, sizes[0]), min_size=sizes[1], max_size=sizes[1]))
    problem = Problem.draw(kind, sizes, dtype, draw(st.integers(0, 999)))
    return problem, draw(st.booleans()), lengths, draw(st.booleans())


@settings(max_examples=60)
@given(problems(torch.float64))
def test_any_combination_by_plain_operators_is_the_reference_s(drawn):
    problem, reverse, lengths, recompute = drawn
    exact = problem.by_reference(reverse, lengths)
    for name, value in results_and_gradients(problem, reverse, lengths, recompute).items():
        close(value, exact[name], name)


@settings(max_examples=10)
@given(problems(torch.float32))
def test_any_combination_by_the_kernels_is_the_reference_s(drawn):
    problem, reverse, lengths, recompute = drawn
    assert_float32(by_kernels(problem, reverse, lengths, recompute), problem.by_reference(reverse, lengths))


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_plain_variant_gives_the_bits_of_layer(bias):
    inputs = Problem.draw({}).inputs
    if not bias:
        inputs |= {"b_ih": None, "b_hh": None}
    got = variant_ops.layer(*inputs.values(), save=True)
    expected = torch.ops.tritlstm.layer(*inputs.values(), None, False, True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", ["all", "resets"])
def test_double_backward_and_forward_mode(name):
    problem = Problem.draw(VARIANTS[name], (3, 2, 1, 2), seed=1)
    inputs = [value.requires_grad_() for value in problem.inputs.values()]
    cell = problem.cell
    if cell.peephole is not None:
        inputs.append(cell.peephole.requires_grad_())

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        own = cell._replace(peephole=values[7]) if len(values) == 8 else cell
        return variant_ops.layer(*values[:7], cell=own)[:3]

    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_per_sample_gradients_by_vmap():
    problem = Problem.draw(VARIANTS["peephole"] | {"resets": True}, (4, 3, 2, 3))
    x, w_ih, w_hh, b_ih, b_hh, h0, c0 = problem.inputs.values()
    resets = problem.cell.resets

    def loss(w: Tensor, x: Tensor, h: Tensor, c: Tensor, cuts: Tensor) -> Tensor:
        cell = problem.cell._replace(resets=cuts[:, None])
        return variant_ops.layer(x[:, None], w_ih, w, b_ih, b_hh, h[None], c[None], cell=cell)[0].square().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 1, 0, 0, 1))(w_hh, x, h0, c0, resets)
    for k in range(3):
        expected = torch.func.grad(loss)(w_hh, x[:, k], h0[k], c0[k], resets[:, k])
        close(got[k], expected, f"sample {k}")


def test_operators_are_registered_as_torch_asks():
    problem = Problem.draw(VARIANTS["all"])
    args = [value.requires_grad_() for value in problem.inputs.values()]
    for recompute in (False, True):
        torch.library.opcheck(
            torch.ops.tritlstm.variant_layer.default, (*args, None, True, True, None, *problem.cell, recompute)
        )


def test_backward_alone_can_t_be_differentiated():
    problem = Problem.draw({})
    x, w_ih, w_hh, b_ih, b_hh, h0, c0 = (v.requires_grad_() for v in problem.inputs.values())
    with torch.no_grad():
        out, _, _, gates, cells = variant_ops.layer(x, w_ih, w_hh, b_ih, b_hh, h0, c0, save=True)
    got = torch.ops.tritlstm.variant_layer_backward(
        out, None, None, x, w_ih, w_hh, b_ih, b_hh, h0, c0, None, out, gates, cells, False, None, [True] * 7 + [False],
        *Cell(), False,
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match=r"Differentiate torch\.ops\.tritlstm\.variant_layer twice"):
        got[0].sum().backward()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"resets": torch.zeros(3, 5, dtype=torch.bool)}, r"resets must be \[5, 3\] of torch.bool .* got \[3, 5\]"),
        ({"resets": torch.zeros(5, 3)}, r"resets must be \[5, 3\] of torch.bool .* of torch.float32"),
        ({"peephole": torch.zeros(6, dtype=torch.float64)}, r"peephole must be \[18\] .* got \[6\]"),
        ({"h_scale": torch.zeros(6, 3)}, r"h_scale must be \[3, 6\] .* got \[6, 3\]"),
        ({"noise": torch.zeros(2, dtype=torch.int64)}, r"noise must be \[3\] of torch.int64 .* got \[2\]"),
        ({"activations": (0, 1, 8)}, r"codes below 8, .* got \[0, 1, 8\]"),
        ({"zoneout_h": 1.0}, r"zoneout_h must be in \[0, 1\), got 1.0"),
        ({"cell_clip": -1.0}, r"cell_clip must not be negative, got -1.0"),
    ],
)
def test_wrong_arguments_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        variant_ops.layer(*Problem.draw({}).inputs.values(), cell=Cell(**changes))


def test_autocast_keeps_the_cell_wide_and_casts_the_rest():
    problem = Problem.draw(VARIANTS["peephole"] | {"h_scale": True}, dtype=torch.float32)
    args, cell = list(problem.inputs.values()), problem.cell
    with torch.autocast("cpu", torch.bfloat16):
        out, h_n, c_n, _, _ = variant_ops.layer(*args, cell=cell)
    low = [value.bfloat16() for value in args[:6]]
    cast = cell._replace(peephole=cell.peephole.bfloat16())
    expected = variant_ops.layer(*low, args[6], cell=cast)
    assert (out.dtype, h_n.dtype, c_n.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert torch.equal(out, expected[0])
    assert torch.equal(c_n, expected[2])


class TestRandomBits:
    def test_philox_gives_the_published_words(self):
        """Known answers of the authors' Random123 library."""
        for value, words in (
            (0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
            (0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ):
            given = torch.tensor(value)
            assert tuple(int(w) for w in random_bits.philox((given,) * 4, (given,) * 2)) == words

    def test_frequency_independence_and_what_each_number_changes(self):
        noise = torch.tensor([7, 1, 0])
        first, second, *_ = random_bits.draw(noise, (100, 1000))
        drawn = random_bits.bernoulli(first, 0.3).double()
        # 1e5 draws: a standard deviation of 0.0015 of the mean; of the correlation, 0.003.
        assert abs(drawn.mean() - 0.3) < 0.008
        assert abs(torch.corrcoef(torch.stack([first.double().ravel(), second.double().ravel()]))[0, 1]) < 0.016
        for k in range(3):
            other = noise.clone()
            other[k] += 1
            assert (random_bits.draw(other, (100, 1000))[0] == first).double().mean() < 1e-3

    def test_a_seed_beyond_32_bits_and_a_negative_one(self):
        seeds = (5, 5 + (1 << 32), -5)
        words = [random_bits.draw(torch.tensor([s, 0, 0]), (50,))[0] for s in seeds]
        assert len({tuple(w.tolist()) for w in words}) == 3
        assert all(((w >= 0) & (w < 1 << 32)).all() for w in words)


def test_codes_of_the_standard_cell():
    assert tuple(ACTIVATIONS[code] for code in STANDARD) == ("sigmoid", "tanh", "tanh")
