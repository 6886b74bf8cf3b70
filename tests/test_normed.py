"""Layer normalisation in the Triton kernels: in the parallel emulator, or on CUDA, against float64.

What is exact here is `tritlstm.aten.forward` in float64 and autograd's gradient of it, which `tests/test_variants.py`
holds to NumPy and to finite differences; each sequence is run alone, cut to its length and flipped, so that lengths and
the reverse direction are formulated by other means.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import tritlstm
from tritlstm import aten, emulator, inspect_kernels, normed, normed_ops, plan
from tritlstm.cell_options import Cell

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
INPUTS = ("x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0")
RESULTS = ("out", "h_n", "c_n")


def kernels(**options: Any) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if CUDA else emulator.emulate(**options)


@dataclasses.dataclass
class Problem:
    inputs: dict[str, Tensor]
    norm: aten.Norm
    grads: list[Tensor]

    @classmethod
    def draw(cls, sizes: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Problem:
        t, b, d, h = sizes
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
            return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale + mean).to(dtype)

        shapes = ((t, b, d), (4 * h, d), (4 * h, h), (4 * h,), (4 * h,), (b, h), (b, h))
        scales = (1.0, d**-0.5, h**-0.5, 0.3, 0.3, 1.0, 1.0)
        inputs = {n: normal(*s, scale=scale) for n, s, scale in zip(INPUTS, shapes, scales, strict=True)}
        gains = [normal(size, scale=0.2, mean=1.0) for size in (4 * h, 4 * h, h)]
        return cls(inputs, aten.Norm(*gains, normal(h, scale=0.2)), [normal(t, b, h), normal(b, h), normal(b, h)])

    def leaves(self, dtype: torch.dtype, device: str) -> tuple[dict[str, Tensor], aten.Norm]:
        def leaf(value: Tensor) -> Tensor:
            return value.detach().to(device, dtype, copy=True).requires_grad_()

        return {n: leaf(v) for n, v in self.inputs.items()}, aten.Norm(*map(leaf, self.norm))

    def by_kernels(
        self, lengths: list[int] | None = None, reverse: bool = False, cell: Cell | None = None, **options: Any
    ) -> dict[str, Tensor]:
        inputs, norm = self.leaves(self.inputs["x"].dtype, DEVICE)
        ends = None if lengths is None else torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        moved = None
        if cell is not None:
            tensors = {n: v.to(DEVICE) for n, v in cell._asdict().items() if isinstance(v, Tensor)}
            moved = cell._replace(**tensors)
            if moved.peephole is not None:
                moved = moved._replace(peephole=moved.peephole.detach().clone().requires_grad_())
        with kernels(**options):
            assert normed_ops.runs_kernels(inputs["x"], inputs["h0"].size(1))
            results = normed_ops.layer(*inputs.values(), ends, reverse, False, moved or Cell(), norm)[:3]
            torch.autograd.backward(results, [g.to(DEVICE) for g in self.grads])
        return named(results, inputs, norm, moved)

    def plain(self, dtype: torch.dtype, lengths: Any = None, reverse: bool = False, cell: Cell | None = None) -> Any:
        """By plain operators, whatever they make of lengths and direction."""
        inputs, norm = self.leaves(dtype, "cpu")
        ends = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)
        if cell is not None and cell.peephole is not None:
            cell = cell._replace(peephole=cell.peephole.detach().to(dtype, copy=True).requires_grad_())
        run: Any = aten.forward
        results = run(*inputs.values(), ends, reverse, False, None, cell or Cell(), norm=norm)[:3]
        torch.autograd.backward(results, [g.to(dtype) for g in self.grads])
        return named(results, inputs, norm, cell)

    def exact(self, lengths: list[int] | None = None, reverse: bool = False) -> dict[str, Tensor]:
        inputs, norm = self.leaves(torch.float64, "cpu")
        x, w_ih, w_hh, b_ih, b_hh, h0, c0 = inputs.values()
        grad_out, grad_h_n, grad_c_n = (g.double() for g in self.grads)
        steps, batch, _ = x.shape
        out, h_n, c_n = torch.zeros(steps, batch, h0.size(1), dtype=torch.float64), h0.detach(), c0.detach()
        h_n, c_n, total = h_n.clone(), c_n.clone(), torch.zeros((), dtype=torch.float64)
        for k in range(batch):
            one, n = slice(k, k + 1), steps if lengths is None else lengths[k]
            if n == 0:
                total = total + (h0[one] * grad_h_n[one]).sum() + (c0[one] * grad_c_n[one]).sum()
                continue
            mine = x[:n, one].flip(0) if reverse else x[:n, one]
            run: Any = aten.forward
            got = run(mine, w_ih, w_hh, b_ih, b_hh, h0[one], c0[one], None, False, False, norm=norm)
            own = got[0].flip(0) if reverse else got[0]
            out[:n, one], h_n[one], c_n[one] = own.detach(), got[1].detach(), got[2].detach()
            total = total + (own * grad_out[:n, one]).sum() + (got[1] * grad_h_n[one]).sum()
            total = total + (got[2] * grad_c_n[one]).sum()
        total.backward()
        return named((out, h_n, c_n), inputs, norm, None)


def named(results: Any, inputs: dict[str, Tensor], norm: aten.Norm, cell: Cell | None) -> dict[str, Tensor]:
    found = dict(zip(RESULTS, results, strict=True)) | {n: v.grad for n, v in inputs.items()}
    found |= {f"norm_{n}": v.grad for n, v in norm._asdict().items()}
    if cell is not None and cell.peephole is not None:
        found["peephole"] = cell.peephole.grad
    return {name: value.detach().cpu() for name, value in found.items()}


def assert_close(got: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Sums of some hundred terms over a few steps: a few hundred roundings of 6e-8, of the largest value."""
    assert got.keys() == exact.keys()
    for name, value in got.items():
        error = (value.double() - exact[name]).abs().max()
        assert error <= 2e-5 * max(1.0, exact[name].abs().max()), (name, error)


PERSISTENT: dict[str, Any] = {"tier": "persistent", "block_h": 16, "block_b": 16}
STREAMING: dict[str, Any] = {"tier": "streaming", "sms": 7, "shared_bytes": 48 << 10, "block_k": 32}
#: (T, B, D, H) and what forces the path: odd sizes, several blocks a group, several groups, several tiles a group.
PATHS: dict[str, tuple[tuple[int, int, int, int], dict[str, Any]]] = {
    "single": ((4, 5, 7, 37), {"tier": "single"}),
    "flag": ((4, 5, 7, 37), PERSISTENT),
    "counter": ((4, 5, 7, 37), PERSISTENT | {"protocol": "counter"}),
    "several groups": ((3, 20, 5, 37), PERSISTENT | {"sms": 8}),
    "several tiles a group": ((3, 33, 5, 24), PERSISTENT | {"sms": 4}),
    "two teams": ((2, 3, 5, 70), PERSISTENT | {"sms": 8}),
    "two teams of eight": ((2, 7, 5, 80), {"tier": "persistent", "parts": 8, "sms": 16}),
    "32 units x 32 sequences": ((3, 33, 5, 70), {"tier": "persistent", "block_h": 32, "block_b": 32, "sms": 6}),
    "streaming": ((3, 3, 7, 100), STREAMING),
    "streaming, counter": ((3, 3, 7, 100), STREAMING | {"protocol": "counter"}),
    "without PTX": ((4, 5, 7, 37), PERSISTENT | {"amd": True}),
    "counter, without PTX": ((3, 3, 5, 40), PERSISTENT | {"protocol": "counter", "amd": True}),
    "T=1": ((1, 3, 5, 20), PERSISTENT),
    "T=1, single": ((1, 3, 5, 20), {"tier": "single"}),
    "B=1": ((4, 1, 5, 20), PERSISTENT),
}


@pytest.mark.parametrize(("sizes", "options"), PATHS.values(), ids=PATHS.keys())
def test_results_and_all_gradients_in_every_tier(sizes, options):
    problem = Problem.draw(sizes)
    assert_close(problem.by_kernels(**options), problem.exact())


@pytest.mark.timeout(300)
def test_more_blocks_than_are_received_at_a_time():
    """17 blocks, of which 16 at a time: the moments of both parts are combined."""
    problem = Problem.draw((1, 17, 3, 260))
    options = {"tier": "persistent", "block_h": 16, "block_b": 32, "sms": 20}
    assert_close(problem.by_kernels(**options), problem.exact())


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("options", [{"tier": "single"}, PERSISTENT, PERSISTENT | {"protocol": "counter"}], ids=str)
def test_lengths_are_those_of_sequences_cut_and_run_alone(options, reverse):
    problem, lengths = Problem.draw((4, 5, 7, 37), seed=1), [4, 0, 2, 1, 3]
    assert_close(problem.by_kernels(lengths, reverse, **options), problem.exact(lengths, reverse))


@pytest.mark.parametrize("options", [{"tier": "single"}, PERSISTENT], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_short_types_err_at_most_twice_as_much_as_plain_operators(dtype, options):
    """Of the plain operators in the same dtype, which compute in float32, plus a rounding.

    The largest error of a draw, as root mean square over several: plain operators round h alone and may be lucky once.
    """
    squares: dict[str, list[float]] = {}
    draws = 6 if CUDA else 3
    for seed in range(draws):
        problem = Problem.draw((3, 13, 4, 37), dtype, seed)
        exact, plain = problem.exact(), problem.plain(dtype)
        for name, value in problem.by_kernels(**options).items():
            found = [(v.double() - exact[name]).abs().max().item() ** 2 for v in (value, plain[name])]
            found.append(exact[name].abs().max().item() ** 2)
            squares[name] = [a + b for a, b in zip(squares.get(name, [0.0] * 3), found, strict=True)]
    for name, sums in squares.items():
        error, of_plain, largest = ((total / draws) ** 0.5 for total in sums)
        assert error <= 2 * of_plain + largest * torch.finfo(dtype).eps / 2, (name, error, of_plain)


@pytest.mark.parametrize("coupled", [True, False], ids=["coupled", "not coupled"])
@pytest.mark.parametrize(
    ("options", "reverse"), [({"tier": "single"}, False), (PERSISTENT, True), (PERSISTENT, False)], ids=str
)
def test_together_with_every_other_option_of_the_cell(options, reverse, coupled):
    problem, generator = Problem.draw((4, 5, 7, 37), seed=2), torch.Generator().manual_seed(3)
    resets = torch.rand((4, 5), generator=generator) < 0.4
    peephole, scale = torch.randn(111, generator=generator), torch.rand((5, 37), generator=generator) * 1.5
    noise = torch.tensor([11, 5, 2]) if coupled else None
    cell = Cell(resets, peephole, scale, noise, coupled, 0.8, 0.4, 0.3, (3, 4, 1))
    lengths = [4, 0, 2, 1, 3]
    exact_cell = cell._replace(h_scale=scale.double())
    exact = problem.plain(torch.float64, lengths, reverse, exact_cell)
    assert_close(problem.by_kernels(lengths, reverse, cell, **options), exact)


def test_a_mean_far_from_zero_does_not_cancel():
    """Means of products and cells lie hundreds of deviations off zero: differences of squares would keep nothing."""
    problem = Problem.draw((2, 3, 4, 37), seed=4)
    problem.inputs["c0"] += 1000.0
    problem.inputs["b_ih"] += 3.0
    problem.inputs["w_hh"] += 1.0
    problem.inputs["h0"] += 100.0
    exact, plain = problem.exact(), problem.plain(torch.float32)
    got = problem.by_kernels(**PERSISTENT)
    for name, value in got.items():
        error, of_plain = ((v.double() - exact[name]).abs().max().item() for v in (value, plain[name]))
        largest = exact[name].abs().max().item()
        assert error <= 2 * of_plain + 2e-5 * max(1.0, largest), (name, error, of_plain)


@pytest.mark.parametrize("protocol", ["flag", "counter"])
def test_the_same_bits_whatever_the_scheduling(protocol):
    problem = Problem.draw((3, 5, 4, 37), torch.float16)
    first = problem.by_kernels(**PERSISTENT)
    for seed in range(2):
        delays = emulator.Delays(0.05, 0.004)
        again = problem.by_kernels(**PERSISTENT, protocol=protocol, seed=seed, delays=delays)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.skipif(CUDA, reason="about the emulator's faults")
@pytest.mark.parametrize("protocol", ["flag", "counter"])
def test_a_block_that_dies_ends_the_others_waits(protocol):
    problem = Problem.draw((3, 2, 4, 33))
    fault = emulator.Fault((1, 0), 3)
    with pytest.raises(RuntimeError, match=r"gave up|time"):
        problem.by_kernels(**PERSISTENT, protocol=protocol, fault=fault, spin_limit=200)


def test_the_module_runs_it_and_says_so():
    module = tritlstm.LSTM(5, 20, num_layers=2, bidirectional=True, layer_norm=True).to(DEVICE)
    x, lengths = torch.randn(4, 3, 5, device=DEVICE), torch.tensor([4, 1, 3])
    expected = module.double().cpu()(x.double().cpu(), lengths=lengths)[0]
    module.float().to(DEVICE)
    with kernels(sms=8):
        got = module(x, lengths=lengths)[0]
        said = tritlstm.explain(module, x)
    torch.testing.assert_close(got.double().cpu(), expected, rtol=0, atol=2e-5)
    assert said.path == "kernels"
    assert "not step: layer normalisation sums over all units inside a step" in str(said)
    assert "two exchanges of row sums more in every step" in str(said)


@pytest.mark.skipif(CUDA, reason="pretends a device on which nothing fits")
def test_what_no_kernel_fits_runs_in_plain_operators_and_says_so():
    module, x = tritlstm.LSTM(3, 200, layer_norm=True), torch.randn(2, 2, 3)
    expected = module(x)[0]
    with emulator.emulate(sms=2):
        said = tritlstm.explain(module, x)
        assert torch.equal(module(x)[0], expected)
    assert said.path == "aten"
    assert "layer_norm needs all blocks of a step on the device at once: no forward kernel" in said.reason


@pytest.mark.parametrize("coupled", [True, False], ids=["coupled", "not coupled"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_the_explicit_gradient_of_plain_operators_is_autograds(reverse, coupled):
    """In float64, with every other option of the cell: the operator outside the kernels."""
    problem, generator = Problem.draw((5, 4, 3, 7), torch.float64, seed=8), torch.Generator().manual_seed(9)
    resets = torch.rand((5, 4), generator=generator) < 0.4
    peephole, scale = (torch.randn(s, generator=generator).double() for s in ((21,), (4, 7)))
    noise = torch.tensor([11, 5, 2]) if coupled else None
    cell, lengths = Cell(resets, peephole, scale, noise, coupled, 0.8, 0.4, 0.3, (3, 4, 1)), [5, 0, 2, 3]
    exact = problem.plain(torch.float64, lengths, reverse, cell)
    inputs, norm = problem.leaves(torch.float64, "cpu")
    cell = cell._replace(peephole=peephole.clone().requires_grad_())
    ends = torch.tensor(lengths, dtype=torch.int32)
    results = normed_ops.layer(*inputs.values(), ends, reverse, False, cell, norm)[:3]
    assert "_LayerBackward" in type(results[0].grad_fn).__name__
    torch.autograd.backward(results, problem.grads)
    for name, value in named(results, inputs, norm, cell).items():
        torch.testing.assert_close(value, exact[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(CUDA, reason="on CUDA plain operators run only where no kernel fits")
@pytest.mark.parametrize("by_kernels", [True, False], ids=["saved by kernels", "saved by plain operators"])
def test_kernels_and_plain_operators_save_the_same(by_kernels):
    """What one saves, the other differentiates, as compiled code may meet it."""
    problem, lengths = Problem.draw((4, 5, 7, 37), seed=10), [4, 0, 2, 1, 3]
    exact = problem.exact(lengths, True)
    inputs, norm = problem.leaves(torch.float32, "cpu")
    ends, grads = torch.tensor(lengths, dtype=torch.int32), problem.grads
    with emulator.emulate() if by_kernels else contextlib.nullcontext():
        results = normed_ops.layer(*inputs.values(), ends, True, False, Cell(), norm)[:3]
    with contextlib.nullcontext() if by_kernels else emulator.emulate():
        torch.autograd.backward(results, grads)
    assert_close(named(results, inputs, norm, None), exact)


def test_double_backward_is_that_of_the_plain_operators():
    problem = Problem.draw((3, 2, 3, 8), seed=5)

    def gradients(inputs: dict[str, Tensor], norm: aten.Norm, run: Any) -> list[Tensor]:
        out = run(*inputs.values(), norm)
        first = torch.autograd.grad(out.square().sum(), [*inputs.values(), *norm], create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), [*inputs.values(), norm.hh])]

    with kernels():
        got = gradients(
            *problem.leaves(torch.float32, DEVICE),
            lambda *a: normed_ops.layer(*a[:7], None, False, False, Cell(), a[7])[0],
        )
    exact = gradients(
        *problem.leaves(torch.float64, "cpu"), lambda *a: aten.forward(*a[:7], None, False, False, norm=a[7])[0]
    )
    for value, expected in zip(got, exact, strict=True):
        torch.testing.assert_close(value.double().cpu(), expected, rtol=2e-5, atol=2e-5 * expected.abs().max().item())


def test_forward_mode_of_the_operator_is_that_of_finite_differences():
    problem = Problem.draw((3, 2, 3, 4), torch.float64, seed=11)
    inputs, norm = problem.leaves(torch.float64, "cpu")

    def run(x: Tensor, w_hh: Tensor, gain: Tensor) -> Tensor:
        given = [*(inputs | {"x": x, "w_hh": w_hh}).values(), None, False, False, *Cell()]
        return torch.ops.tritlstm.normed_layer(*given, *norm._replace(c=gain))[0]

    leaves = (inputs["x"], inputs["w_hh"], norm.c)
    assert torch.autograd.gradcheck(run, leaves, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_checkpointing_has_the_gradients_of_a_call_without_it(reentrant):
    module, x = tritlstm.LSTM(3, 4, layer_norm=True).to(DEVICE), torch.randn(4, 2, 3, device=DEVICE)
    x.requires_grad_()
    found = []

    def flat(x: Tensor) -> tuple[Tensor, ...]:
        out, states = module(x)
        return out, *states

    with kernels(sms=2):
        for run in (flat, lambda x: checkpoint(flat, x, use_reentrant=reentrant)):
            out, h_n, c_n = run(x)
            (out.square().sum() + h_n.sum() + c_n.sum()).backward()
            found.append([value.grad for value in (x, *module.parameters())])
            module.zero_grad()
            x.grad = None
    for value, expected in zip(*found, strict=True):
        assert torch.equal(value, expected)


def test_torch_func_transforms_run_plain_operators():
    problem = Problem.draw((3, 2, 3, 8), seed=6)
    inputs = {n: v.to(DEVICE) for n, v in problem.inputs.items()}
    norm = aten.Norm(*(v.to(DEVICE) for v in problem.norm))

    def loss(x: Tensor, gain: Tensor) -> Tensor:
        rest = list(inputs.values())[1:]
        return normed_ops.layer(x, *rest, None, False, False, Cell(), norm._replace(hh=gain))[0].square().sum()

    gains = torch.stack([norm.hh, norm.hh * 2])
    with kernels():
        got = torch.func.vmap(torch.func.grad(loss, 1), (None, 0))(inputs["x"], gains)
    for k in range(2):
        torch.testing.assert_close(got[k], torch.func.grad(loss, 1)(inputs["x"], gains[k]))


@pytest.mark.parametrize(
    ("dtype", "by_kernels"), [(torch.float32, True), (torch.float32, False), (torch.float64, False)], ids=str
)
def test_operators_are_registered_as_torch_asks(dtype, by_kernels):
    problem = Problem.draw((3, 2, 3, 8), dtype)
    inputs, norm = problem.leaves(dtype, DEVICE)
    cell = Cell(peephole=torch.randn(24, device=DEVICE, dtype=dtype).requires_grad_())
    with kernels() if by_kernels else contextlib.nullcontext():
        torch.library.opcheck(
            torch.ops.tritlstm.normed_layer.default, (*inputs.values(), None, True, True, *cell, *norm)
        )


@pytest.mark.parametrize("by_kernels", [True, False], ids=["kernels", "plain operators"])
def test_torch_compile_sees_one_operator(by_kernels):
    module, x = tritlstm.LSTM(5, 8, layer_norm=True).to(DEVICE), torch.randn(3, 2, 5, device=DEVICE)
    names: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    with kernels() if by_kernels else contextlib.nullcontext(), torch.no_grad():
        got = torch.compile(module, backend=backend, fullgraph=True)(x)[0]
        expected = module(x)[0]
    assert torch.equal(got, expected)
    assert "tritlstm.normed_layer.default" in names


def test_autocast_keeps_the_cell_wide_and_casts_the_rest():
    problem = Problem.draw((3, 2, 3, 8))
    inputs, norm = problem.leaves(torch.float32, DEVICE)
    with kernels(), torch.autocast(DEVICE, torch.bfloat16):
        out, _, c_n, *_ = normed_ops.layer(*inputs.values(), None, False, False, Cell(), norm)
        by_operator = torch.ops.tritlstm.normed_layer(*inputs.values(), None, False, False, *Cell(), *norm)
    low = [value.bfloat16() for value in list(inputs.values())[:6]]
    with kernels():
        expected = normed_ops.layer(*low, inputs["c0"], None, False, False, Cell(), norm)
    assert (out.dtype, c_n.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, expected[0])
    assert torch.equal(c_n, expected[2])
    assert torch.equal(by_operator[0], out)


def test_what_the_operators_refuse():
    problem = Problem.draw((3, 2, 3, 8))
    inputs, norm = problem.inputs.values(), problem.norm
    with kernels(), pytest.raises(ValueError, match=r"norm_hh must be \[32\] of a float dtype .* got \[8\]"):
        torch.ops.tritlstm.normed_layer(*inputs, None, False, False, *Cell(), *norm._replace(hh=norm.c))


@pytest.mark.skipif(CUDA, reason="compiles for other architectures; on CUDA the tests above do for this one")
@pytest.mark.parametrize(
    ("direction", "arch", "dtype"),
    [("forward", "sm_90", torch.float16), ("backward", "sm_90", torch.float16), ("backward", "gfx942", torch.bfloat16)],
    ids=str,
)
def test_the_kernels_compile_without_spilling(direction, arch, dtype):
    chosen = plan.recurrent(direction, 64, 16, 256, dtype, plan.DEVICES[arch], normed=True)
    launch = inspect_kernels.recurrent_launch(chosen, variant="norm")
    _, resources = inspect_kernels.read_code(inspect_kernels.compile_launch(launch, arch), launch)
    assert resources.spill_bytes == 0


def test_a_plan_never_launches_step_by_step():
    for length in (1, 64):
        for device in plan.DEVICES.values():
            for direction in ("forward", "backward"):
                chosen = plan.recurrent(direction, length, 16, 512, torch.float16, device, normed=True)
                assert chosen.tier in ("single", "persistent", "streaming")
    with kernels():
        assert normed.fits(torch.empty(1, 3, 4, device=DEVICE), 20)


@pytest.mark.skipif(CUDA, reason="of pretended devices")
@pytest.mark.parametrize("shared", [24, 40, 64, 96])
@pytest.mark.parametrize("hidden", [72, 136])
def test_explain_says_what_runs_where_tf32_is_allowed(hidden, shared):
    with emulator.emulate(sms=4, shared_bytes=shared << 10, tf32=True):
        x = torch.zeros(4, 3, 6)
        found = tritlstm.explain(tritlstm.LSTM(6, hidden, layer_norm=True), x)
        assert (found.path == "kernels") == normed_ops.runs_kernels(x, hidden)
