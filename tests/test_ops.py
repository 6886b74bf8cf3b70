"""The operators torch.ops.tritlstm.layer and layer_backward: values, gradients, registration, errors."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tritlstm import aten, ops, reference

layer = torch.ops.tritlstm.layer
layer_backward = torch.ops.tritlstm.layer_backward

NAMES = ("x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0")
GRADIENTS = ("x", "w_ih", "w_hh", "b", "h0", "c0", "gate0")
ALL = [True] * 7
SIZES = [(1, 1, 1, 1), (1, 3, 2, 4), (5, 1, 3, 2), (6, 3, 5, 8), (4, 2, 1, 9)]  # T, B, D, H
sizes = pytest.mark.parametrize(("T", "B", "D", "H"), SIZES, ids=lambda value: str(value))
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def draw(T: int, B: int, D: int, H: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * T + 100 * B + 10 * D + H)
    shapes = ((T, B, D), (4 * H, D), (4 * H, H), (4 * H,), (4 * H,), (B, H), (B, H))
    scales = (1.0, D**-0.5, H**-0.5, 0.5, 0.5, 0.5, 1.0)
    values = (
        scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    )
    return dict(zip(NAMES, values, strict=True))


def draw_lengths(T: int, B: int) -> Tensor:
    return torch.tensor([max(T - 2 * b, 0) for b in range(B)], dtype=torch.int32)


def leaves(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [value.detach().clone().requires_grad_() for value in inputs.values()]


def gradients_of_outputs(out: Tensor, h_n: Tensor, c_n: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (out, h_n, c_n)
    ]


def numpy_layer(inputs: dict[str, Tensor], reverse: bool, grads: list[Tensor]) -> dict[str, np.ndarray]:
    """Results and gradients by the NumPy reference, which knows neither directions nor lengths."""
    flip = (lambda a: a[::-1]) if reverse else (lambda a: a)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    trace = reference.forward(**{**arrays, "x": flip(arrays["x"])})
    grad_out, grad_h_n, grad_c_n = (g.numpy() for g in grads)
    got = reference.backward(trace, flip(grad_out), grad_h_n, grad_c_n)
    gates = np.concatenate([trace.i, trace.f, trace.g, trace.o], -1)
    forward = {"out": flip(trace.h), "h_n": trace.h_n, "c_n": trace.c_n}
    saved = {"gates": flip(gates), "cells": flip(trace.c)}
    gradients = (flip(got.x), got.w_ih, got.w_hh, got.b, got.h0, got.c0, got.gates[0])
    return {**forward, **saved, **dict(zip(GRADIENTS, gradients, strict=True))}


def close(got: Tensor, expected: np.ndarray | Tensor | float, name: str = "") -> None:
    # Both sides compute in float64, with sums of some hundred terms of order one: 1e-12 is 5000 roundings.
    expected = expected if isinstance(expected, Tensor) else torch.from_numpy(np.array(expected))
    tolerance = 1e-12 if got.dtype == torch.float64 else 0.0
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")


class TestValues:
    @directions
    @sizes
    def test_forward_and_backward_equal_the_reference(self, T, B, D, H, reverse):
        inputs = draw(T, B, D, H)
        out, h_n, c_n, gates, cells = layer(*inputs.values(), None, reverse, True)
        grads = gradients_of_outputs(out, h_n, c_n)
        expected = numpy_layer(inputs, reverse, grads)
        for name, got in zip(("out", "h_n", "c_n"), (out, h_n, c_n), strict=True):
            close(got, expected[name], name)
        close(torch.cat(aten.unpack_gates(gates, H), -1), expected["gates"], "gates")
        close(cells[..., :H], expected["cells"], "cells")

        x, w_ih, w_hh, _, _, h0, c0 = inputs.values()
        results = layer_backward(*grads, x, w_ih, w_hh, h0, c0, None, out, gates, cells, reverse, ALL)
        for name, got in zip(GRADIENTS, results, strict=True):
            close(got, expected[name], f"gradient of {name}")

    @directions
    def test_lengths_give_what_each_sequence_gives_alone(self, reverse):
        T, B, D, H = 6, 4, 3, 5
        inputs, lengths = draw(T, B, D, H), torch.tensor([6, 3, 1, 4], dtype=torch.int32)
        args = leaves(inputs)
        out, h_n, c_n, _, _ = layer(*args, lengths, reverse, True)
        grads = gradients_of_outputs(out, h_n, c_n)
        torch.autograd.backward((out, h_n, c_n), grads)
        sums = dict.fromkeys(("w_ih", "w_hh", "b"), 0.0)
        for b, n in enumerate(lengths.tolist()):
            alone = {
                **inputs,
                "x": inputs["x"][:n, b : b + 1],
                "h0": inputs["h0"][b : b + 1],
                "c0": inputs["c0"][b : b + 1],
            }
            expected = numpy_layer(
                alone, reverse, [grads[0][:n, b : b + 1], *(g[b : b + 1] for g in grads[1:])]
            )
            close(out[:n, b : b + 1], expected["out"])
            assert (out[n:, b] == 0).all()
            close(h_n[b : b + 1], expected["h_n"])
            close(c_n[b : b + 1], expected["c_n"])
            close(args[0].grad[:n, b : b + 1], expected["x"])
            assert (args[0].grad[n:, b] == 0).all()
            close(args[5].grad[b : b + 1], expected["h0"])
            close(args[6].grad[b : b + 1], expected["c0"])
            sums = {name: total + expected[name] for name, total in sums.items()}
        for k, name in ((1, "w_ih"), (2, "w_hh"), (3, "b"), (4, "b")):
            close(args[k].grad, sums[name], name)

    @directions
    def test_a_length_of_zero_leaves_the_state_and_passes_its_gradient(self, reverse):
        args = leaves(draw(3, 2, 2, 3))
        out, h_n, c_n, _, _ = layer(*args, torch.tensor([0, 2], dtype=torch.int32), reverse, True)
        assert (out[:, 0] == 0).all()
        assert torch.equal(h_n[0], args[5][0])
        assert torch.equal(c_n[0], args[6][0])
        (2 * h_n[0].sum() + 3 * c_n[0].sum() + out[:, 0].sum()).backward()
        assert (args[5].grad[0] == 2).all()
        assert (args[6].grad[0] == 3).all()
        assert all((args[k].grad == 0).all() for k in range(5))

    @directions
    def test_gate0_is_added_at_the_first_processed_step(self, reverse):
        # W h_0 as gate0 beside a zero state is what h_0 does; its gradient is that of those gates.
        inputs, lengths = draw(5, 3, 2, 4), torch.tensor([5, 2, 4], dtype=torch.int32)
        x, w_ih, w_hh, b_ih, b_hh, h0, c0 = inputs.values()
        gate0 = (h0 @ w_hh.t()).requires_grad_()
        zero = torch.zeros_like(h0)
        got = layer(x, w_ih, w_hh, b_ih, b_hh, zero, c0, lengths, reverse, True, gate0)
        args = leaves(inputs)
        expected = layer(*args, lengths, reverse, True)
        for a, b in zip(got[:3], expected[:3], strict=True):
            close(a.detach(), b.detach())
        grads = gradients_of_outputs(*got[:3])
        torch.autograd.backward(got[:3], grads)
        torch.autograd.backward(expected[:3], grads)
        close(gate0.grad @ w_hh, args[5].grad)

    @pytest.mark.parametrize("H", [1, 7, 8, 9, 20])
    def test_the_four_gates_of_a_unit_lie_side_by_side(self, H):
        _, _, _, gates, cells = layer(*draw(2, 3, 2, H).values(), None, False, True)
        plain = torch.stack(aten.unpack_gates(gates, H))  # [4, T, B, H]
        padded = (H + 7) // 8 * 8
        assert gates.shape == (2, 3, 4 * padded)
        assert cells.shape == (2, 3, padded)
        for unit, gate in itertools.product(range(H), range(4)):
            assert torch.equal(gates[..., 4 * unit + gate], plain[gate, ..., unit])
        unused = torch.ones(4 * padded, dtype=torch.bool)
        unused[: 4 * H] = False
        assert (gates[..., unused] == 0).all()
        assert (cells[..., H:] == 0).all()

    @pytest.mark.parametrize("missing", [("b_ih",), ("b_hh",), ("b_ih", "b_hh")], ids="-".join)
    def test_a_missing_bias_is_a_bias_of_zero(self, missing):
        inputs = draw(3, 2, 3, 4)
        zeros = {**inputs, **{name: torch.zeros_like(inputs[name]) for name in missing}}
        without = {**inputs, **dict.fromkeys(missing)}
        got, expected = (layer(*values.values(), None, False, True) for values in (without, zeros))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    def test_a_split_sequence_gives_what_the_whole_gives(self):
        x, *weights, h0, c0 = draw(7, 2, 3, 5).values()
        out, h_n, c_n, _, _ = layer(x, *weights, h0, c0, None, False, False)
        first, h, c, _, _ = layer(x[:3], *weights, h0, c0, None, False, False)
        second, h, c, _, _ = layer(x[3:], *weights, h, c, None, False, False)
        close(torch.cat((first, second)), out)
        close(h, h_n)
        close(c, c_n)

    def test_an_empty_batch_gives_empty_results_and_zero_gradients(self):
        args = leaves(draw(3, 0, 2, 4))
        out, h_n, c_n, _, _ = layer(*args, None, False, True)
        assert (out.shape, h_n.shape, c_n.shape) == ((3, 0, 4), (0, 4), (0, 4))
        (out.sum() + h_n.sum()).backward()
        assert (args[1].grad == 0).all()

    def test_strided_input_equals_contiguous_input(self):
        x, *rest = draw(4, 3, 5, 4).values()
        strided = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert not strided.is_contiguous()
        close(layer(strided, *rest, None, False, False)[0], layer(x, *rest, None, False, False)[0])


class TestSaving:
    def test_nothing_is_saved_unless_asked(self):
        out, _, _, gates, cells = layer(*draw(3, 2, 2, 4).values(), None, False, False)
        assert gates.shape == cells.shape == (0,)
        assert (gates.dtype, cells.dtype) == (out.dtype, torch.float64)

    def test_autograd_saves_by_itself(self):
        args = leaves(draw(3, 2, 2, 4))
        out, _, _, gates, cells = layer(*args, None, False, False)
        assert gates.shape == (3, 2, 32)
        assert not gates.requires_grad
        assert not cells.requires_grad
        out.sum().backward()
        assert args[0].grad is not None
        with torch.no_grad():
            assert layer(*args, None, False, False)[3].shape == (0,)

    @pytest.mark.parametrize("only", range(7), ids=GRADIENTS)
    def test_only_what_is_needed_is_computed(self, only):
        inputs = draw(4, 2, 3, 5)
        out, h_n, c_n, gates, cells = layer(*inputs.values(), None, False, True)
        x, w_ih, w_hh, _, _, h0, c0 = inputs.values()
        args = (*gradients_of_outputs(out, h_n, c_n), x, w_ih, w_hh, h0, c0, None, out, gates, cells, False)
        full = layer_backward(*args, ALL)
        part = layer_backward(*args, [k == only for k in range(7)])
        for k, (a, b) in enumerate(zip(part, full, strict=True)):
            assert torch.equal(a, b) if k == only else a.shape == (0,)

    @pytest.mark.parametrize("frozen", NAMES)
    def test_inputs_that_need_no_gradient_get_none(self, frozen):
        inputs = dict(zip(NAMES, leaves(draw(3, 2, 2, 4)), strict=True))
        everything = torch.autograd.grad(
            layer(*inputs.values(), None, False, False)[0].sum(), [*inputs.values()]
        )
        inputs[frozen].requires_grad_(False)
        layer(*inputs.values(), None, False, False)[0].sum().backward()
        for (name, value), expected in zip(inputs.items(), everything, strict=True):
            if name == frozen:
                assert value.grad is None
            else:
                assert torch.equal(value.grad, expected)

    def test_the_same_inputs_give_the_same_bits(self):
        inputs = draw(5, 3, 4, 6, torch.float32)

        def run() -> list[Tensor]:
            args = leaves(inputs)
            results = layer(*args, None, True, False)
            results[0].square().sum().backward()
            return [*results[:3], *(arg.grad for arg in args)]

        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


class TestDerivatives:
    @pytest.mark.parametrize("with_gate0", [False, True], ids=["", "gate0"])
    @pytest.mark.parametrize("with_lengths", [False, True], ids=["", "lengths"])
    @directions
    def test_gradcheck(self, reverse, with_lengths, with_gate0):
        T, B, D, H = 3, 2, 2, 3
        lengths = draw_lengths(T, B) if with_lengths else None
        args = leaves(draw(T, B, D, H))
        if with_gate0:
            args.append(torch.linspace(-1, 1, B * 4 * H, dtype=torch.float64).view(B, 4 * H).requires_grad_())

        def run(*args: Tensor) -> tuple[Tensor, ...]:
            return layer(*args[:7], lengths, reverse, True, *args[7:])[:3]

        assert torch.autograd.gradcheck(run, args)

    @directions
    def test_gradgradcheck(self, reverse):
        args, lengths = leaves(draw(3, 2, 2, 2)), torch.tensor([3, 1], dtype=torch.int32)
        assert torch.autograd.gradgradcheck(lambda *args: layer(*args, lengths, reverse, True)[:3], args)

    @pytest.mark.parametrize("which", range(3), ids=["out", "h_n", "c_n"])
    def test_each_output_alone_has_the_right_gradient(self, which):
        inputs = draw(4, 2, 3, 5)
        args = leaves(inputs)
        results = layer(*args, None, False, False)[:3]
        grads = gradients_of_outputs(*results)
        results[which].backward(grads[which])
        expected = numpy_layer(inputs, False, [g if k == which else 0 * g for k, g in enumerate(grads)])
        for name, arg in zip(("x", "w_ih", "w_hh", "b", "b", "h0", "c0"), args, strict=True):
            close(arg.grad, expected[name], name)

    def test_the_backward_operator_by_itself_refuses_to_be_differentiated(self):
        args = leaves(draw(3, 2, 2, 3))
        with torch.no_grad():
            out, _, _, gates, cells = layer(*args, None, False, True)
        x, w_ih, w_hh, _, _, h0, c0 = args
        upstream = torch.ones_like(out).requires_grad_()
        results = torch.ops.tritlstm.layer_backward(
            upstream, None, None, x, w_ih, w_hh, h0, c0, None, out, gates, cells, False, (True,) * 7
        )
        with pytest.raises(NotImplementedError, match=r"layer twice.*create_graph=True"):
            results[0].sum().backward()

    def test_func_grad_and_vmap_equal_autograd(self):
        x, *rest = draw(3, 2, 2, 3).values()

        def loss(x: Tensor, scale: Tensor) -> Tensor:
            return (scale * ops.layer(x, *rest)[0].square()).sum()

        def expected(x: Tensor, scale: float) -> Tensor:
            x = x.clone().requires_grad_()
            return torch.autograd.grad(loss(x, torch.tensor(scale)), x)[0]

        close(torch.func.grad(loss)(x, torch.tensor(2.0)), expected(x, 2.0))
        many, scales = torch.stack((x, -x)), torch.tensor([2.0, 3.0])
        got = torch.func.vmap(torch.func.grad(loss))(many, scales)
        close(got, torch.stack((expected(x, 2.0), expected(-x, 3.0))))

    @pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
    def test_forward_mode_equals_finite_differences(self, reverse):
        inputs = list(draw(3, 2, 2, 3).values())
        lengths = torch.tensor([2, 3], dtype=torch.int32)
        directions = [torch.randn_like(value) for value in inputs]

        def run(step: float) -> tuple[Tensor, ...]:
            moved = [value + step * way for value, way in zip(inputs, directions, strict=True)]
            return layer(*moved, lengths, reverse, False)[:3]

        expected = [(a - b) / 2e-6 for a, b in zip(run(1e-6), run(-1e-6), strict=True)]
        forward_ad = torch.autograd.forward_ad
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(inputs, directions, strict=True)]
            got = [forward_ad.unpack_dual(r).tangent for r in layer(*duals, lengths, reverse, False)[:3]]
        _, func = torch.func.jvp(
            lambda *args: ops.layer(*args, lengths, reverse)[:3], tuple(inputs), tuple(directions)
        )
        for a, b, c in zip(got, func, expected, strict=True):
            torch.testing.assert_close(a, c, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(b, c, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
    def test_gradcheck_in_forward_mode(self, reverse):
        args = leaves(draw(3, 2, 2, 3))
        assert torch.autograd.gradcheck(
            lambda *args: layer(*args, None, reverse, False)[:3], args, check_forward_ad=True, check_backward_ad=False
        )


class TestRegistration:
    @pytest.mark.parametrize("save", [False, True], ids=["", "save"])
    @pytest.mark.parametrize("with_lengths", [False, True], ids=["", "lengths"])
    def test_opcheck_layer(self, with_lengths, save):
        lengths = draw_lengths(3, 2) if with_lengths else None
        args = (*leaves(draw(3, 2, 2, 5, torch.float32)), lengths, True, save)
        torch.library.opcheck(layer.default, args)
        torch.library.opcheck(layer.default, (*(a.detach() for a in args[:7]), *args[7:]))

    def test_opcheck_layer_with_everything_optional(self):
        x, w_ih, w_hh, _, _, h0, c0 = draw(3, 2, 2, 5, torch.float32).values()
        gate0 = torch.ones(2, 20, requires_grad=True)
        torch.library.opcheck(layer.default, (x, w_ih, w_hh, None, None, h0, c0, None, False, False, gate0))

    @pytest.mark.parametrize("needs", [ALL, [False, True] * 3 + [False]], ids=["all", "some"])
    def test_opcheck_layer_backward(self, needs):
        inputs = draw(3, 2, 2, 5, torch.float32)
        x, w_ih, w_hh, _, _, h0, c0 = inputs.values()
        out, h_n, c_n, gates, cells = layer(*inputs.values(), None, False, True)
        grad_out, _, grad_c_n = gradients_of_outputs(out, h_n, c_n)
        args = (grad_out, None, grad_c_n, x, w_ih, w_hh, h0, c0, None, out, gates, cells, False, needs)
        torch.library.opcheck(layer_backward.default, args)

    def test_a_new_length_or_batch_recompiles_nothing(self):
        frames = []

        def backend(graph: Any, inputs: Any) -> Any:
            frames.append(graph)
            return graph

        _, *rest = draw(1, 1, 3, 4, torch.float32).values()
        run = torch.compile(lambda x, h, c: ops.layer(x, *rest[:4], h, c)[0], backend=backend, dynamic=True)
        for T, B in ((5, 2), (7, 6), (9, 11)):
            x, *_, h0, c0 = draw(T, B, 3, 4, torch.float32).values()
            close(run(x, h0, c0), layer(x, *rest[:4], h0, c0, None, False, False)[0])
        assert len(frames) == 1


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    def test_error_is_within_twice_torchs_own(self, dtype):
        """Against float64: at most twice the error of nn.LSTM in the same dtype, plus one rounding."""
        inputs = draw(24, 4, 16, 32, dtype)
        exact = leaves({name: value.double() for name, value in inputs.items()})
        mine, theirs = leaves(inputs), leaves(inputs)

        def torch_layer(x, w_ih, w_hh, b_ih, b_hh, h0, c0):
            out, h_n, c_n = torch._VF.lstm(
                x, (h0[None], c0[None]), [w_ih, w_hh, b_ih, b_hh], True, 1, 0.0, True, False, False
            )
            return out, h_n[0], c_n[0]

        results = [
            layer(*exact, None, False, False)[:3], layer(*mine, None, False, False)[:3], torch_layer(*theirs)
        ]  # fmt: skip
        grads = gradients_of_outputs(*results[1])
        for values in results:
            torch.autograd.backward(values, [g.to(values[0].dtype) for g in grads])
        names = ("out", "h_n", "c_n", *(f"gradient of {name}" for name in NAMES))
        columns = zip(
            *([*r, *(a.grad for a in args)] for r, args in zip(results, (exact, mine, theirs), strict=True)),
            strict=True,
        )
        for name, (reference_, got, torchs) in zip(names, columns, strict=True):
            error, torch_error = ((v.double() - reference_).abs().max().item() for v in (got, torchs))
            rounding = reference_.abs().max().item() * torch.finfo(dtype).eps / 2
            assert error <= 2 * torch_error + rounding, f"{name}: {error} against {torch_error} of torch"

    def test_the_cell_state_of_16_bit_layers_is_float32(self):
        x, w_ih, w_hh, b_ih, b_hh, h0, c0 = draw(3, 2, 2, 4, torch.bfloat16).values()
        out, h_n, c_n, gates, cells = layer(x, w_ih, w_hh, b_ih, b_hh, h0, c0.float(), None, False, True)
        assert cells.dtype == c_n.dtype == torch.float32
        assert out.dtype == h_n.dtype == gates.dtype == torch.bfloat16
        assert torch.equal(cells[-1, :, :4], c_n)
        assert not torch.equal(c_n, c_n.bfloat16().float())

    def test_autocast_casts_everything_but_the_cell_state(self):
        args = leaves(draw(3, 2, 2, 4, torch.float32))
        with torch.autocast("cpu", torch.bfloat16):
            out, h_n, c_n, gates, cells = layer(*args, None, False, True)
            expected = layer(*(a.detach().bfloat16() for a in args[:6]), args[6].detach(), None, False, True)
            out.sum().backward()
        for got, value in zip((out, h_n, c_n, gates, cells), expected, strict=True):
            assert got.dtype == value.dtype
            assert torch.equal(got, value)
        assert (c_n.dtype, cells.dtype) == (torch.float32, torch.float32)
        assert all(a.grad.dtype == torch.float32 for a in args if a.grad is not None)

    def test_autocast_does_not_change_the_arithmetic_of_backward(self):
        inputs = draw(4, 2, 3, 4, torch.bfloat16)

        def gradient(autocast: bool, create_graph: bool) -> Tensor:
            args = leaves(inputs)
            out = layer(*args, None, False, False)[0]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return torch.autograd.grad(out.sum(), args[1], create_graph=create_graph)[0]

        plain = gradient(False, False)
        assert torch.equal(gradient(True, False), plain)
        assert torch.equal(gradient(True, True), plain)

    def test_autocast_inside_func_grad(self):
        x, *rest = draw(3, 2, 2, 4, torch.float32).values()

        def loss(x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return ops.layer(x, *rest)[0].float().square().sum()

        leaf = x.clone().requires_grad_()
        loss(leaf).backward()
        assert torch.equal(torch.func.grad(loss)(x), leaf.grad)


def wrong(name: str, value: Any) -> pytest.param:
    return pytest.param(name, value, id=f"{name}-{list(value.shape)}-{value.dtype}".replace("torch.", ""))


class TestErrors:
    @pytest.mark.parametrize(
        ("name", "value"),
        [
            wrong("w_ih", torch.zeros(16, 4, dtype=torch.float64)),
            wrong("w_hh", torch.zeros(16, 3, dtype=torch.float64)),
            wrong("b_ih", torch.zeros(15, dtype=torch.float64)),
            wrong("b_hh", torch.zeros(16, 1, dtype=torch.float64)),
            wrong("c0", torch.zeros(3, 4, dtype=torch.float64)),
            wrong("w_ih", torch.zeros(16, 2)),
            wrong("h0", torch.zeros(2, 4)),
            wrong("lengths", torch.zeros(3, dtype=torch.int32)),
            wrong("lengths", torch.zeros(2, dtype=torch.int64)),
            wrong("gate0", torch.zeros(2, 4, dtype=torch.float64)),
            wrong("w_hh", torch.zeros(16, 4, dtype=torch.float64, device="meta")),
        ],
    )
    def test_a_wrong_argument_is_named_with_what_was_received(self, name, value):
        inputs = {
            **draw(3, 2, 2, 4),
            "lengths": None,
            "reverse": False,
            "save": False,
            "gate0": None,
            name: value,
        }
        got = rf"{name} must be .*, got \{str([*value.shape])[:-1]}\] of {value.dtype} on {value.device}"
        with pytest.raises(ValueError, match=got):
            ops._check(*inputs.values())
        if value.device.type == "cpu":
            with pytest.raises(ValueError, match=got):
                layer(*inputs.values())

    def test_dimensions(self):
        x, *rest = draw(3, 2, 2, 4).values()
        with pytest.raises(ValueError, match=r"x must be \[T, B, D\].*got \[2, 2\].*unsqueeze"):
            layer(x[0], *rest, None, False, False)
        with pytest.raises(ValueError, match=r"at least one time step, got T = 0"):
            layer(x[:0], *rest, None, False, False)
