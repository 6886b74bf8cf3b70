"""tritlstm.LSTM and LSTMCell as drop-ins: all about the modules but the grid of test_functional.py."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import io
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import tritlstm
from tritlstm import emulator, functional

D, H = 4, 6
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "both directions": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "projection": {"proj_size": 3, "num_layers": 2, "dropout": 0.25},
}
VARIANTS: dict[str, Any] = {
    "num_heads": 2,
    "layer_norm": True,
    "peephole": True,
    "zoneout": 0.1,
    "recompute": True,
    "hidden_size": [5, H],
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


@pytest.fixture(params=["torch", "operators"])
def path(request, monkeypatch):
    """Both ways through the modules: torch's own LSTM, and the operators as where the Triton kernels run."""
    if request.param == "operators":
        monkeypatch.setattr(functional, "runs_kernels", lambda x: True)
    return request.param


#: Where a module may run: contexts in which it and its tensors are made, and called.
PLACES: dict[str, Any] = {"cpu": contextlib.nullcontext, "emulated kernels": emulator.emulate}
places = pytest.mark.parametrize(
    "place",
    [*PLACES.values(), pytest.param(lambda: torch.device("cuda"), marks=pytest.mark.cuda)],
    ids=[*PLACES.keys(), "cuda"],
)


def pair(kind: dict[str, Any] | None = None, **more: Any) -> tuple[nn.LSTM, tritlstm.LSTM]:
    torch.manual_seed(0)
    theirs = nn.LSTM(D, H, **(kind or {}), **more)
    torch.manual_seed(0)
    return theirs, tritlstm.LSTM(D, H, **(kind or {}), **more)


def outputs(result: Any) -> list[Tensor]:
    out, states = result
    return [out.data if isinstance(out, PackedSequence) else out, *states]


def assert_same(got: Any, expected: Any, tolerance: float = 1e-10) -> None:
    # float64: sums in another order. Cases in float32 pass the tolerance that fits them.
    for mine, theirs in zip(outputs(got), outputs(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def message(call: Any) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as caught:
        call()
    return caught.type, str(caught.value)


class TestConstruction:
    @kinds
    def test_the_same_seed_draws_the_same_parameters(self, kind):
        theirs, mine = pair(kind)
        for (name, value), (other_name, other) in zip(
            mine.named_parameters(), theirs.named_parameters(), strict=True
        ):
            assert name == other_name
            assert torch.equal(value, other)

    @kinds
    def test_repr(self, kind):
        theirs, mine = pair(kind)
        assert repr(mine) == repr(theirs)

    def test_positional_arguments_and_attributes(self):
        arguments = (3, 8, 2, False, True, 0.5, True, 2, "cpu", torch.float16)
        theirs, mine = nn.LSTM(*arguments), tritlstm.LSTM(*arguments)
        for name in nn.RNNBase.__constants__:
            assert getattr(mine, name) == getattr(theirs, name)
        assert {p.dtype for p in mine.parameters()} == {torch.float16}
        names = list(inspect.signature(tritlstm.LSTM).parameters)[: len(arguments)]
        assert names == list(inspect.signature(nn.RNNBase).parameters)[1 : 1 + len(arguments)]

    @pytest.mark.parametrize(
        "arguments",
        [
            {"hidden_size": 0},
            {"hidden_size": 2.0},
            {"input_size": -1},
            {"num_layers": 0},
            {"proj_size": -1},
            {"proj_size": 6},
            {"dropout": 1.5},
            {"dropout": True},
            {"bias": 1},
            {"batch_first": "yes"},
        ],
        ids=str,
    )
    def test_errors_are_torchs(self, arguments):
        arguments = {"input_size": D, "hidden_size": H, **arguments}
        assert message(lambda: tritlstm.LSTM(**arguments)) == message(lambda: nn.LSTM(**arguments))

    def test_an_unknown_argument_is_refused(self):
        with pytest.raises(TypeError, match="nonlinearity"):
            tritlstm.LSTM(D, H, nonlinearity="relu")

    def test_dropout_without_a_next_layer_warns_as_torch_does(self):
        with pytest.warns(UserWarning, match="non-zero dropout expects num_layers greater than 1"):
            tritlstm.LSTM(D, H, dropout=0.5)

    def test_it_is_an_rnn_base_and_not_an_nn_lstm(self):
        mine = tritlstm.LSTM(D, H)
        assert isinstance(mine, nn.RNNBase)
        assert not isinstance(mine, nn.LSTM)
        assert isinstance(tritlstm.LSTMCell(D, H), nn.LSTMCell)


class TestState:
    @kinds
    def test_state_dict_goes_both_ways(self, kind, path):
        theirs, mine = pair(kind, dtype=torch.float64)
        x = torch.randn(5, 3, D, dtype=torch.float64)
        other = tritlstm.LSTM(D, H, **kind, dtype=torch.float64)
        other.load_state_dict(theirs.state_dict())
        back = nn.LSTM(D, H, **kind, dtype=torch.float64)
        back.load_state_dict(mine.state_dict())
        expected = theirs.eval()(x)
        for module in (other, back):
            assert_same(module.eval()(x), expected)

    @kinds
    def test_copies_and_pickles_compute_the_same(self, kind):
        mine = pair(kind)[1].eval()
        x = torch.randn(5, 3, D)
        buffer = io.BytesIO()
        torch.save(mine, buffer)
        buffer.seek(0)
        restored = (
            copy.deepcopy(mine),
            pickle.loads(pickle.dumps(mine)),
            torch.load(buffer, weights_only=False),
        )
        for module in restored:
            assert type(module) is tritlstm.LSTM
            assert_same(module(x), mine(x), 0.0)

    def test_weights_that_a_parametrization_computes_are_used_and_trained(self, path):
        """nn.LSTM keeps using the first value (pytorch#65688)."""

        class Double(nn.Module):
            def forward(self, weight: Tensor) -> Tensor:
                return 2 * weight

        theirs, mine = pair(dtype=torch.float64)
        with torch.no_grad():
            theirs.weight_hh_l0.mul_(2)
        nn.utils.parametrize.register_parametrization(mine, "weight_hh_l0", Double())
        x = torch.randn(5, 3, D, dtype=torch.float64)
        assert_same(mine(x), theirs(x))
        with torch.no_grad():
            theirs.weight_hh_l0.mul_(3)
            mine.parametrizations.weight_hh_l0.original.mul_(3)
        assert_same(mine(x), theirs(x))
        mine(x)[0].sum().backward()
        theirs(x)[0].sum().backward()
        original = mine.parametrizations.weight_hh_l0.original
        torch.testing.assert_close(original.grad, 2 * theirs.weight_hh_l0.grad)

    def test_functional_call_uses_the_weights_it_is_given(self, path):
        theirs, mine = pair(dtype=torch.float64)
        given = {name: 3 * value.detach() for name, value in mine.named_parameters()}
        theirs.load_state_dict(given)
        x = torch.randn(5, 3, D, dtype=torch.float64)
        before = mine(x)
        assert_same(torch.func.functional_call(mine, given, (x,)), theirs(x))
        assert_same(mine(x), before)

    def test_func_grad_of_the_module(self, path):
        mine = pair(dtype=torch.float64)[1]
        x, weights = torch.randn(5, 3, D, dtype=torch.float64), dict(mine.named_parameters())

        def loss(weights: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(mine, weights, (x,))[0].square().sum()

        loss(weights).backward()
        grads = torch.func.grad(loss)({name: value.detach() for name, value in weights.items()})
        for name, value in weights.items():
            torch.testing.assert_close(grads[name], value.grad)

    def test_conversion_and_replaced_parameters(self, path):
        mine = tritlstm.LSTM(D, H).double()
        mine.weight_hh_l0 = nn.Parameter(torch.zeros_like(mine.weight_hh_l0))
        theirs = nn.LSTM(D, H, dtype=torch.float64)
        theirs.load_state_dict(mine.state_dict())
        x = torch.randn(5, 3, D, dtype=torch.float64)
        assert_same(mine(x), theirs(x))

    def test_meta_device(self):
        out, (h_n, _) = tritlstm.LSTM(D, H, device="meta")(torch.empty(5, 3, D, device="meta"))
        assert out.is_meta
        assert h_n.shape == (1, 3, H)


def packed(*lengths: int, width: int = D, dtype: torch.dtype = torch.float32) -> Any:
    return pack_sequence([torch.zeros(n, width, dtype=dtype) for n in lengths], enforce_sorted=False)


def states(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(shape) for shape in shapes)


def elsewhere(state: Tensor) -> Tensor:
    """Not on meta beside CUDA tensors: there torch's LSTM, dispatched to its kernel for meta, returns what nobody wrote
    in place of an error."""
    return state.to("cpu" if state.is_cuda else "meta")


#: What is made of right states h and c.
WRONG_STATES: dict[str, Any] = {
    "three": lambda h, c: (h, c, c),
    "three in a list": lambda h, c: [h, c, c],
    "h on another device": lambda h, c: (elsewhere(h), c),
    "c on another device": lambda h, c: (h, elsewhere(c)),
}
WRONG_TYPES: dict[str, Any] = {
    "c half": lambda h, c: (h, c.half()),
    "c bfloat16": lambda h, c: (h, c.bfloat16()),
    "c float64": lambda h, c: (h, c.double()),
    "h half": lambda h, c: (h.half(), c),
    "h float64": lambda h, c: (h.double(), c),
    "both float64": lambda h, c: (h.double(), c.double()),
    "h of integers": lambda h, c: (h.long(), c),
}
wrong_states = pytest.mark.parametrize("hx", WRONG_STATES.values(), ids=WRONG_STATES.keys())
wrong_types = pytest.mark.parametrize("hx", WRONG_TYPES.values(), ids=WRONG_TYPES.keys())
directions_and_layers = pytest.mark.parametrize("kind", [{}, {"bidirectional": True}, {"num_layers": 2}], ids=str)


class TestErrors:
    @pytest.mark.parametrize(
        ("kind", "arguments"),
        [
            ({}, (torch.zeros(4),)),
            ({}, (torch.zeros(1, 1, 1, D),)),
            ({}, (torch.zeros(5, 3, D + 1),)),
            ({}, (torch.zeros(5, D + 1),)),
            ({}, (torch.zeros(5, 3, D, dtype=torch.float64),)),
            ({}, (torch.zeros(5, 3, D, dtype=torch.float16),)),
            ({}, (torch.zeros(5, 3, D), states((1, 2, H), (1, 3, H)))),
            ({}, (torch.zeros(5, 3, D), states((1, 3, H), (1, 2, H)))),
            ({}, (torch.zeros(5, 3, D), states((2, 3, H), (2, 3, H)))),
            ({}, (torch.zeros(5, 3, D), states((1, 3, H + 1), (1, 3, H)))),
            ({}, (torch.zeros(5, 3, D), states((1, H), (1, H)))),
            ({}, (torch.zeros(5, D), states((1, 3, H), (1, 3, H)))),
            ({}, (torch.zeros(5, D), states((2, H), (1, H)))),
            ({"batch_first": True}, (torch.zeros(3, 5, D), states((1, 5, H), (1, 5, H)))),
            ({"proj_size": 2}, (torch.zeros(5, 3, D), states((1, 3, H), (1, 3, H)))),
            ({"proj_size": 2}, (torch.zeros(5, 3, D), states((1, 3, 2), (1, 3, 2)))),
            ({"bidirectional": True}, (torch.zeros(5, 3, D), states((1, 3, H), (1, 3, H)))),
            ({"num_layers": 3}, (torch.zeros(5, 3, D), states((3, 3, H), (2, 3, H)))),
        ],
    )
    def test_errors_are_torchs(self, kind, arguments, path):
        theirs, mine = pair(kind)
        expected = message(lambda: theirs(*arguments))
        assert message(lambda: mine(*arguments)) == expected

    @pytest.mark.parametrize(
        ("arguments", "kind", "text"),
        [
            ((packed(3, 2, width=D + 1),), RuntimeError, r"Expected 4, got 5"),
            ((packed(3, 2, dtype=torch.float64),), ValueError, r"float64.* does not match weight dtype"),
            ((packed(3, 2), states((1, 3, H), (1, 3, H))), RuntimeError, r"hidden\[0\] size \(1, 2, 6\)"),
            ((packed(3, 2), states((1, 2, H), (1, 1, H))), RuntimeError, r"hidden\[1\] size \(1, 2, 6\)"),
        ],
        ids=["width", "dtype", "h0", "c0"],
    )
    def test_packed_input_is_checked_too(self, arguments, kind, text, path):
        with pytest.raises(kind, match=text):
            tritlstm.LSTM(D, H)(*arguments)

    def both_messages(self, kind: dict[str, Any], hx: Any) -> list[tuple[type[BaseException], str]]:
        modules = pair(kind)
        rows = modules[0].num_layers * (1 + modules[0].bidirectional)
        given = hx(torch.zeros(rows, 3, H), torch.zeros(rows, 3, H))
        return [message(lambda m=m: m(torch.zeros(5, 3, D), given)) for m in modules]

    @wrong_states
    @directions_and_layers
    @places
    def test_states_are_refused_in_torchs_words(self, kind, hx, place):
        with place():
            theirs, mine = self.both_messages(kind, hx)
        assert mine == theirs

    @wrong_types
    @directions_and_layers
    @places
    def test_states_of_another_type_are_refused_as_torch_does(self, kind, hx, place):
        with place():
            theirs, mine = self.both_messages(kind, hx)
        assert mine[0] is theirs[0]
        if place is emulator.emulate:  # torch on the CPU shows oneDNN's words, the kernels those of torch on CUDA
            assert mine[1].startswith("Input and hidden tensors are not the same dtype, found input tensor with Float")
        else:
            assert mine[1] == theirs[1]

    @places
    def test_one_tensor_for_both_states(self, place):
        with place():
            theirs, mine = self.both_messages({}, lambda h, c: torch.stack((h, c)))
        begin = "lstm() received an invalid combination of arguments - got (Tensor, Tensor, list, "
        assert [kind for kind, _ in (mine, theirs)] == [TypeError] * 2
        assert [text.startswith(begin) for _, text in (mine, theirs)] == [True] * 2

    @pytest.mark.parametrize(
        "hx", [(), (0,), (0, 0, 0), [0, 0, 0], 0], ids=["none", "one", "three", "three in a list", "a tensor"]
    )
    @places
    def test_a_cell_refuses_a_wrong_number_of_states_in_torchs_words(self, hx, place):
        with place():
            h, x = torch.zeros(3, H), torch.zeros(3, D)
            given = h if hx == 0 else type(hx)(h for _ in hx)
            theirs, mine = (message(lambda c=c: c(D, H)(x, given)) for c in (nn.LSTMCell, tritlstm.LSTMCell))
        assert mine == theirs

    @pytest.mark.parametrize("wrong", ["h", "c", "x", "device"])
    @places
    def test_a_cell_refuses_other_types_and_devices(self, wrong, place):
        with place():
            x, h, c = torch.zeros(3, D), torch.zeros(3, H), torch.zeros(3, H)
            given = {
                "h": (x, (h.double(), c)),
                "c": (x, (h, c.half())),
                "x": (x.half(), None),
                "device": (x, (elsewhere(h), c)),
            }[wrong]
            cells = [nn.LSTMCell(D, H), tritlstm.LSTMCell(D, H)]
            if wrong == "c" and x.is_cpu:  # which torch refuses on CUDA alone, and so do the kernels
                if place is emulator.emulate:
                    with pytest.raises(RuntimeError, match="expected scalar type Float but found Half"):
                        cells[1](*given)
                return
            theirs, mine = (message(lambda m=m: m(*given)) for m in cells)
        assert mine[0] is theirs[0] is RuntimeError
        # Of devices torch speaks in many words.
        assert "device" in mine[1] if wrong == "device" else mine[1] == theirs[1]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64], ids=str)
    @pytest.mark.parametrize("wrong", ["x", "h"])
    def test_a_cells_words_about_types_on_cuda(self, wrong, dtype):
        """Where torch's cell is a matmul, not a linear; a matmul of CPU tensors has almost the same words. The tensors
        are without memory, so that no GPU is needed."""
        with pytest.raises(RuntimeError) as caught:
            torch.mm(torch.zeros(3, 6, dtype=dtype), torch.zeros(6, 24))
        expected = str(caught.value).replace("m1 and m2", "mat1 and mat2")
        with FakeTensorMode():
            x, h, c = (torch.zeros(3, n, device="cuda") for n in (D, H, H))
            weights = [torch.zeros(4 * H, n, device="cuda") for n in (D, H)]
            given = (x.to(dtype), (h, c)) if wrong == "x" else (x, (h.to(dtype), c))
            assert message(lambda: functional._check_cell(*given, *weights)) == (RuntimeError, expected)

    @pytest.mark.parametrize(
        ("kind", "name", "expected"),
        [
            ({}, "weight_hh_l0", [24, 6]),
            ({}, "bias_hh_l0", [24]),
            ({"bidirectional": True}, "weight_hh_l0_reverse", [24, 6]),
            ({"num_layers": 2, "bidirectional": True}, "weight_ih_l1", [24, 12]),
            ({"proj_size": 3, "num_layers": 2}, "weight_hr_l1", [3, 6]),
            ({"num_heads": 2}, "weight_hh_l0", [24, 3]),
            ({"layer_norm": True, "bias": False}, "weight_ih_l0", [24, 4]),
            ({"hidden_size": [5, 6]}, "weight_ih_l1", [24, 5]),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("how", ["parameter", "functional_call"])
    def test_a_replaced_weight_of_another_shape_is_refused(self, kind, name, expected, how, path):
        """torch's own LSTM takes it on the CPU; its backward then ends the process."""
        mine, x = tritlstm.LSTM(D, **{"hidden_size": H, **kind}), torch.zeros(5, 3, D)
        text = rf"{name} of LSTM\(4, .*\) must have shape {re.escape(str(expected))}, got \[12, 4\]"
        given = {}
        if how == "parameter":
            setattr(mine, name, nn.Parameter(torch.zeros(12, 4)))
        else:
            given[name] = torch.zeros(12, 4)
        with pytest.raises(ValueError, match=text):
            torch.func.functional_call(mine, given, (x,))

    def test_a_swapped_module_refuses_it_too(self):
        mine: Any = tritlstm.swap(nn.LSTM(D, H, 2, proj_size=3))
        mine(torch.zeros(5, 3, D))
        mine.weight_hh_l1 = nn.Parameter(torch.zeros(12, 4))
        with pytest.raises(ValueError, match=r"weight_hh_l1 of LSTM\(4, 6, .*\) must have shape \[24, 3\], got \[12"):
            mine(torch.zeros(5, 3, D))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kind", [{}, {"bidirectional": True}, {"layer_norm": True}, {"num_heads": 2}], ids=str)
    @places
    def test_a_replaced_weight_of_another_type_is_refused(self, kind, dtype, place):
        """In the words of torch on CUDA; torch on the CPU has several."""
        with place():
            mine, x = tritlstm.LSTM(D, H, **kind), torch.zeros(5, 3, D)
            name = "weight_hh_l0_reverse" if kind.get("bidirectional") else "weight_hh_l0"
            setattr(mine, name, nn.Parameter(getattr(mine, name).detach().to(dtype)))
            got = message(lambda: mine(x)[0].sum().backward())
        assert got[0] is RuntimeError
        if mine.cell_options.changed or place is not contextlib.nullcontext:
            torchs = {torch.float64: "Double", torch.bfloat16: "BFloat16"}[dtype]
            assert got[1] == (
                "Input and parameter tensors are not the same dtype, found input tensor with Float and parameter "
                f"tensor with {torchs}"
            )

    @pytest.mark.parametrize(
        "kind",
        [*KINDS.values(), *({name: value} for name, value in VARIANTS.items())],
        ids=[*KINDS.keys(), *VARIANTS.keys()],
    )
    @places
    def test_no_time_steps(self, kind, place):
        """Whatever the module is and runs on, and whether or not lengths or resets come with it."""
        expected = message(lambda: nn.LSTM(D, H)(torch.zeros(0, 3, D)))
        assert expected == (RuntimeError, "Expected sequence length to be larger than 0 in RNN")
        with place():
            x = torch.zeros((3, 0, D) if kind.get("batch_first") else (0, 3, D))
            mine = tritlstm.LSTM(D, **{"hidden_size": H, **kind})
            resets = torch.zeros(x.shape[:2], dtype=torch.bool)
            assert message(lambda: mine(x)) == expected
            assert message(lambda: mine.eval()(x, lengths=[0, 0, 0])) == expected
            assert message(lambda: mine.train()(x, lengths=torch.zeros(3, dtype=torch.int64))) == expected
            assert message(lambda: mine(x, resets=resets)) == expected
            assert message(lambda: tritlstm.trace(mine, x)) == expected
            assert message(lambda: mine(torch.zeros(0, D))) == expected


class TestDerivatives:
    @pytest.mark.parametrize("form", ["batch", "packed"])
    @kinds
    def test_gradcheck(self, kind, form, path):
        mine = pair(kind, dtype=torch.float64)[1].eval()
        x = torch.randn(3, 2, D, dtype=torch.float64, requires_grad=True)

        def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            named = dict(zip(dict(mine.named_parameters()), weights, strict=True))
            input = pack_sequence([x[:, 0], x[:2, 1]]) if form == "packed" else x
            return tuple(outputs(torch.func.functional_call(mine, named, (input,))))

        assert torch.autograd.gradcheck(run, (x, *mine.parameters()), fast_mode=True)

    def test_gradgradcheck(self, path):
        mine = tritlstm.LSTM(2, 3, proj_size=2, bidirectional=True, dtype=torch.float64)
        x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(
            lambda x, *_: outputs(mine(x)), (x, *mine.parameters()), fast_mode=True
        )


class TestAutocast:
    @pytest.mark.parametrize("kind", [{}, {"proj_size": 3}], ids=["plain", "projection"])
    def test_values_are_torchs_and_gradients_stay_float32(self, kind, path):
        theirs, mine = pair(kind)
        x = torch.randn(5, 3, D)
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = outputs(mine(x)), outputs(theirs(x))
        # Both round to bfloat16 (2^-8) at several places; the states are of order one half.
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.01)
        got[0].float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in mine.parameters())

    def test_results_are_of_the_autocast_dtype(self, path):
        with torch.autocast("cpu", torch.bfloat16):
            got = outputs(tritlstm.LSTM(D, H)(torch.randn(5, 3, D)))
        assert {t.dtype for t in got} == {torch.bfloat16}


class TestWideCell:
    """Under autocast, and in float16, the cell state is float32 on every path. torch's own LSTM on the CPU rounds it at
    every step: there, sums of many small terms stop growing where a term is half a unit in the last place of the sum.
    """

    STEPS, TERM = 600, 0.001

    def module(self, dtype: torch.dtype) -> tritlstm.LSTM:
        """Gates of 1 and an input node of TERM at every step."""
        mine = tritlstm.LSTM(D, H)
        with torch.no_grad():
            for parameter in mine.parameters():
                parameter.zero_()
            mine.bias_ih_l0.copy_(torch.tensor([20.0, 20.0, self.TERM, 20.0]).repeat_interleave(H))
        return mine.to(dtype)

    @pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("form", ["plain", "lengths", "packed", "batch_first"])
    @pytest.mark.parametrize(
        ("how", "dtype"), [("autocast", torch.bfloat16), ("autocast", torch.float16), ("module", torch.float16)],
        ids=["autocast-bf16", "autocast-fp16", "fp16"],
    )  # fmt: skip
    def test_many_small_terms_add_up(self, how, dtype, form, training, grad):
        mine = self.module(torch.float32 if how == "autocast" else dtype).train(training)
        mine.batch_first = form == "batch_first"
        x = torch.zeros((2, self.STEPS, D) if mine.batch_first else (self.STEPS, 2, D), dtype=mine.bias_ih_l0.dtype)
        ends = [self.STEPS, self.STEPS - 1]
        given = nn.utils.rnn.pack_padded_sequence(x, ends) if form == "packed" else x
        with torch.autocast("cpu", dtype, enabled=how == "autocast"), torch.set_grad_enabled(grad):
            out, (h_n, c_n) = mine(given, lengths=ends) if form == "lengths" else mine(given)
        cut = form in ("lengths", "packed")
        self.check(h_n, c_n, dtype, mine, torch.tensor(ends if cut else [self.STEPS] * 2))
        assert out.data.dtype == (torch.float32 if (how, form) == ("autocast", "packed") else dtype)

    @pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
    @pytest.mark.parametrize("how", ["autocast", "module"])
    def test_compiled(self, how, training):
        dtype = torch.bfloat16 if how == "autocast" else torch.float16
        mine = self.module(torch.float32 if how == "autocast" else dtype).train(training)
        x = torch.zeros(self.STEPS, 2, D, dtype=mine.bias_ih_l0.dtype)
        torch._dynamo.reset()
        compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", dtype, enabled=how == "autocast"), torch.set_grad_enabled(training):
            _, (h_n, c_n) = compiled(x)
        self.check(h_n, c_n, dtype, mine, torch.tensor([self.STEPS] * 2))

    def check(self, h_n: Tensor, c_n: Tensor, dtype: torch.dtype, mine: tritlstm.LSTM, ends: Tensor) -> None:
        term = mine.bias_ih_l0[2 * H].double().tanh().detach()
        c = (term * ends)[:, None].expand(2, H)
        # One rounding of the result; 600 of float32 and the gates' distance from 1, 2e-9 a step, are far below it.
        unit = torch.finfo(dtype).eps / 2 * 1.01
        torch.testing.assert_close(c_n[0].double(), c, rtol=unit, atol=0)
        torch.testing.assert_close(h_n[0].double(), c.tanh(), rtol=unit, atol=0)

    def test_gradients_are_those_of_a_float32_cell(self):
        """Against float64 on the same weights, with lengths and without."""
        torch.manual_seed(0)
        mine = tritlstm.LSTM(D, H, 2, bidirectional=True, dtype=torch.float16)
        x, exact = torch.randn(20, 3, D).half(), copy.deepcopy(mine).double()
        lengths = torch.full((3,), 20)
        found = []
        for module, given, more in ((mine, x, {}), (mine, x, {"lengths": lengths}), (exact, x.double(), {})):
            module.zero_grad()
            out, (h_n, c_n) = module(given, **more)
            (out.double().square().sum() + c_n.double().sum() + h_n.double().sum()).backward()
            found.append([p.grad.double() for p in module.parameters()])
        # Results, and with them the gradients that come back, and the gradients themselves are rounded by up to 2^-12.
        for *by_mine, expected in zip(*found, strict=True):
            for value in by_mine:
                assert (value - expected).abs().max() <= 2**-10 * expected.abs().max()

    def test_a_bfloat16_module_gives_the_bits_of_torchs(self):
        torch.manual_seed(0)
        mine, x = tritlstm.LSTM(D, H, 2, dtype=torch.bfloat16).eval(), torch.randn(20, 3, D).bfloat16()
        (out, states), (expected, states_expected) = mine(x), tritlstm.convert.to_torch(mine).eval()(x)
        for a, b in zip((out, *states), (expected, *states_expected), strict=True):
            assert torch.equal(a, b)


class TestCompile:
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @kinds
    def test_compiles_as_one_graph_for_training(self, kind, backend, path):
        mine = pair(kind, dtype=torch.float64)[1].eval()
        x = torch.randn(5, 3, D, dtype=torch.float64)
        torch._dynamo.reset()
        compiled = torch.compile(mine, fullgraph=True, backend=backend)
        assert_same(compiled(x), mine(x))
        results = []
        for module in (compiled, mine):
            mine.zero_grad()
            module(x)[0].square().sum().backward()
            results.append([p.grad for p in mine.parameters()])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    def test_compiles_for_training_in_float32_on_the_cpu(self):
        # There oneDNN would run, whose backward torch fails to trace.
        mine, x = tritlstm.LSTM(D, H), torch.randn(5, 3, D)
        torch._dynamo.reset()
        out, _ = torch.compile(mine, fullgraph=True, backend="aot_eager")(x)
        out.sum().backward()
        got = [p.grad for p in mine.parameters()]
        mine.zero_grad()
        mine(x)[0].sum().backward()
        for a, p in zip(got, mine.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad)

    def test_compiles_where_the_emulator_is_loaded(self):
        importlib.import_module("tritlstm.emulator")
        mine, x = tritlstm.LSTM(D, H), torch.randn(5, 3, D)
        torch._dynamo.reset()
        assert_same(torch.compile(mine, fullgraph=True, backend="eager")(x), mine(x), 1e-6)

    def test_compiles_with_packed_input_and_states(self, path):
        mine = tritlstm.LSTM(D, H, bidirectional=True)
        x, lengths = torch.randn(5, 3, D), torch.tensor([5, 3, 2])
        hx = (torch.randn(2, 3, H), torch.randn(2, 3, H))

        def run(x: Tensor, hx: Any) -> Any:
            return mine(nn.utils.rnn.pack_padded_sequence(x, lengths), hx)

        torch._dynamo.reset()
        assert_same(torch.compile(run, backend="eager")(x, hx), run(x, hx), 1e-6)

    def test_inference_compiles(self, path):
        mine, x = tritlstm.LSTM(D, H), torch.randn(5, 3, D)
        torch._dynamo.reset()
        with torch.no_grad():
            assert_same(torch.compile(mine, fullgraph=True, backend="aot_eager")(x), mine(x), 1e-6)

    def test_cell_compiles(self, path):
        cell, x = tritlstm.LSTMCell(D, H), torch.randn(3, D)
        torch._dynamo.reset()
        got = torch.compile(cell, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(got, cell(x))

    @kinds
    def test_exports(self, kind, path):
        mine, x = pair(kind)[1].eval(), torch.randn(5, 3, D)
        exported = torch.export.export(mine, (x,))
        assert_same(exported.module()(x), mine(x), 1e-6)

    def test_operators_export_with_any_number_of_steps(self, monkeypatch):
        monkeypatch.setattr(functional, "runs_kernels", lambda x: True)
        mine, x = tritlstm.LSTM(D, H).eval(), torch.randn(5, 3, D)
        T = torch.export.Dim("T", min=2, max=512)
        exported = torch.export.export(mine, (x,), dynamic_shapes={"input": {0: T}}).module()
        longer = torch.randn(11, 3, D)
        assert_same(exported(longer), mine(longer), 1e-6)


class TestCell:
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize("batch", [(), (3,)], ids=["unbatched", "batch"])
    @pytest.mark.parametrize("with_states", [False, True], ids=["", "states"])
    def test_values_and_gradients_are_torchs(self, with_states, batch, bias, path):
        theirs = nn.LSTMCell(D, H, bias, dtype=torch.float64)
        mine = tritlstm.LSTMCell(D, H, bias, dtype=torch.float64)
        mine.load_state_dict(theirs.state_dict())
        x = torch.randn(*batch, D, dtype=torch.float64, requires_grad=True)
        hx = tuple(torch.randn(*batch, H, dtype=torch.float64, requires_grad=True) for _ in range(2))
        inputs = (x, *hx) if with_states else (x,)
        results = []
        for cell in (mine, theirs):
            h, c = cell(x, hx) if with_states else cell(x)
            results.append((h, c, *torch.autograd.grad((h * c).sum(), [*inputs, *cell.parameters()])))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize(
        "arguments",
        [
            (torch.zeros(1, 3, D),),
            (torch.zeros(3, D), states((1, 3, H), (3, H))),
            (torch.zeros(3, D), states((3, H), (1, 3, H))),
            (torch.zeros(3, D + 1),),
            (torch.zeros(3, D), states((2, H), (3, H))),
            (torch.zeros(3, D), states((3, H), (2, H))),
            (torch.zeros(3, D), states((3, H + 1), (3, H))),
            (torch.zeros(3, D), states((3, H), (3, H - 1))),
        ],
    )
    def test_errors_are_torchs(self, arguments, path):
        expected = message(lambda: nn.LSTMCell(D, H)(*arguments))
        assert message(lambda: tritlstm.LSTMCell(D, H)(*arguments)) == expected

    def test_steps_of_the_cell_give_the_layer(self, path):
        layer = tritlstm.LSTM(D, H, dtype=torch.float64)
        cell = tritlstm.LSTMCell(D, H, dtype=torch.float64)
        cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
        x = torch.randn(5, 3, D, dtype=torch.float64)
        out, (h_n, c_n) = layer(x)
        h, c = cell(x[0])
        for t in range(1, 5):
            torch.testing.assert_close(h, out[t - 1], rtol=1e-10, atol=1e-10)
            h, c = cell(x[t], (h, c))
        torch.testing.assert_close((h, c), (h_n[0], c_n[0]), rtol=1e-10, atol=1e-10)

    def test_repr(self):
        assert repr(tritlstm.LSTMCell(D, H, bias=False)) == repr(nn.LSTMCell(D, H, bias=False))
