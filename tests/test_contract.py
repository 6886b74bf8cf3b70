"""What torch.nn.LSTM and LSTMCell promise, asked of tritlstm's: torch's own module tests, and uses around a call.

The samples are those that torch tests its modules with. Every case runs through torch's LSTM and through the
operators that the Triton kernels stand behind; the samples through emulated kernels as well.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence
from torch.testing._internal import common_modules
from torch.utils.checkpoint import checkpoint

import tritlstm
from tritlstm import emulator, functional

T, B, D, H = 5, 3, 4, 6
F64 = torch.float64


@pytest.fixture(params=["torch", "operators"])
def path(request, monkeypatch):
    if request.param == "operators":
        monkeypatch.setattr(functional, "runs_kernels", lambda x: True)
    return request.param


def info(mine: type, theirs: str) -> Any:
    errors = {"LSTM": "RNN_GRU", "LSTMCell": "LSTMCell"}[theirs]
    return common_modules.ModuleInfo(
        mine,
        train_and_eval_differ=theirs == "LSTM",
        module_inputs_func=getattr(common_modules, f"module_inputs_torch_nn_{theirs}"),
        module_error_inputs_func=getattr(common_modules, f"module_error_inputs_torch_nn_{errors}"),
    )


INFOS = {"LSTM": (info(tritlstm.LSTM, "LSTM"), nn.LSTM), "LSTMCell": (info(tritlstm.LSTMCell, "LSTMCell"), nn.LSTMCell)}


def samples(name: str) -> list[Any]:
    found, _ = INFOS[name]
    arguments = {"device": "cpu", "dtype": F64, "requires_grad": True, "training": True}
    return list(found.module_inputs_func(found, **arguments))


def error_samples(name: str) -> list[Any]:
    found, _ = INFOS[name]
    arguments = {"device": "cpu", "dtype": torch.float32, "requires_grad": False, "training": True}
    return list(found.module_error_inputs_func(found, **arguments))


def numbered(each: Any) -> list[Any]:
    return [pytest.param(name, k, id=f"{name}-{k}") for name in INFOS for k in range(len(each(name)))]


def flat(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else [t for value in values for t in flat(value)]


class TestTorchsOwnSamples:
    @pytest.mark.parametrize(("name", "number"), numbered(samples))
    def test_values_gradients_and_double_gradients(self, name, number, path):
        found, theirs = INFOS[name]
        sample = samples(name)[number]
        constructor, call = sample.constructor_input, sample.forward_input
        torch.manual_seed(number)
        mine = found.module_cls(*constructor.args, **constructor.kwargs, dtype=F64)
        original = theirs(*constructor.args, **constructor.kwargs, dtype=F64)
        original.load_state_dict(mine.state_dict())
        got, expected = flat(mine(*call.args, **call.kwargs)), flat(original(*call.args, **call.kwargs))
        inputs = [t for t in flat(call.args) if t.requires_grad]
        grads = torch.autograd.grad(sum((r * r).sum() for r in got), [*inputs, *mine.parameters()])
        grads_expected = torch.autograd.grad(sum((r * r).sum() for r in expected), [*inputs, *original.parameters()])
        for a, b in zip((*got, *grads), (*expected, *grads_expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        reference = sample.reference_fn(mine, *call.args, **call.kwargs)
        for a, b in zip(got, flat(reference), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)

        if constructor.kwargs.get("batch_first"):
            return  # the layout changes nothing in what follows, and the check takes a second

        def run(*_: Tensor) -> tuple[Tensor, ...]:
            return tuple(flat(mine(*call.args, **call.kwargs)))

        assert torch.autograd.gradgradcheck(run, (*inputs, *mine.parameters()), fast_mode=True)

    @pytest.mark.parametrize(
        "number", [k for k, s in enumerate(samples("LSTM")) if not s.constructor_input.kwargs.get("batch_first")]
    )
    def test_values_gradients_and_double_gradients_of_emulated_kernels(self, number):
        """In fp32, which is what they have: against torch's in float64, to some hundred roundings."""
        sample = samples("LSTM")[number]
        constructor, call = sample.constructor_input, sample.forward_input
        torch.manual_seed(number)
        original = nn.LSTM(*constructor.args, **constructor.kwargs, dtype=F64)
        mine = tritlstm.LSTM(*constructor.args, **constructor.kwargs)
        mine.load_state_dict(original.state_dict())

        def derivatives(module: nn.Module, dtype: torch.dtype) -> list[Tensor]:
            arguments = torch.utils._pytree.tree_map(lambda t: t.detach().to(dtype).requires_grad_(), call.args)
            wanted = [*flat(arguments), *module.parameters()]
            results = flat(module(*arguments, **call.kwargs))
            first = torch.autograd.grad(sum((r * r).sum() for r in results), wanted, create_graph=True)
            second = torch.autograd.grad(sum((g * g).sum() for g in first), wanted)
            return [*results, *first, *second]

        with emulator.emulate(sms=4):
            got = derivatives(mine, torch.float32)
            assert tritlstm.explain(mine, call.args[0].float()).path == "kernels"
        for a, b in zip(got, derivatives(original, F64), strict=True):
            scale = max(1.0, b.abs().max().item())
            torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-4 * scale)

    @pytest.mark.parametrize(("name", "number"), numbered(error_samples))
    def test_errors(self, name, number, path):
        found, _ = INFOS[name]
        sample = error_samples(name)[number]
        constructor, call = sample.module_error_input.constructor_input, sample.module_error_input.forward_input
        at_construction = sample.error_on == common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR
        if at_construction:
            with pytest.raises(sample.error_type, match=sample.error_regex):
                found.module_cls(*constructor.args, **constructor.kwargs)
            return
        module = found.module_cls(*constructor.args, **constructor.kwargs)
        with pytest.raises(sample.error_type, match=sample.error_regex):
            module(*call.args, **call.kwargs)


def pair(**kind: Any) -> tuple[nn.LSTM, tritlstm.LSTM]:
    torch.manual_seed(0)
    mine = tritlstm.LSTM(D, H, **kind, dtype=F64)
    theirs = nn.LSTM(D, H, **kind, dtype=F64)
    theirs.load_state_dict(mine.state_dict())
    return theirs, mine


def draw(*shape: int) -> Tensor:
    return torch.randn(*(shape or (T, B, D)), dtype=F64)


def close(got: Any, expected: Any) -> None:
    for a, b in zip(flat(got), flat(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class TestWeights:
    @pytest.mark.parametrize("how", ["parametrization", "hook"])
    def test_weight_norm_changes_what_runs(self, how, path):
        theirs, mine = pair()
        x = draw()
        if how == "parametrization":
            parametrizations.weight_norm(mine, "weight_hh_l0")
            g = mine.parametrizations.weight_hh_l0.original0
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                nn.utils.weight_norm(mine, "weight_hh_l0")
            g = mine.weight_hh_l0_g
        close(mine(x), theirs(x))
        with torch.no_grad():
            g.mul_(2)  # the length of every row
            theirs.weight_hh_l0.mul_(2)
        close(mine(x), theirs(x))
        mine(x)[0].sum().backward()
        theirs(x)[0].sum().backward()
        # Along a row, so the length's derivative is the row's direction times the weight's gradient.
        direction = theirs.weight_hh_l0 / theirs.weight_hh_l0.norm(dim=1, keepdim=True)
        close(g.grad, (direction * theirs.weight_hh_l0.grad).sum(1, keepdim=True).detach())

    def test_shared_weights_gather_both_gradients(self, path):
        torch.manual_seed(0)
        mine, theirs = (tritlstm.LSTM(H, H, 2, dtype=F64), nn.LSTM(H, H, 2, dtype=F64))
        mine.weight_hh_l1 = mine.weight_hh_l0
        mine.weight_ih_l1 = mine.weight_ih_l0
        theirs.load_state_dict(mine.state_dict())
        assert len(list(mine.parameters())) == 6
        x = draw(T, B, H)
        close(mine(x), theirs(x))
        mine(x)[0].square().sum().backward()
        theirs(x)[0].square().sum().backward()
        close(mine.weight_hh_l0.grad, theirs.weight_hh_l0.grad + theirs.weight_hh_l1.grad)
        close(mine.weight_ih_l0.grad, theirs.weight_ih_l0.grad + theirs.weight_ih_l1.grad)

    def test_flat_weights_and_flatten_parameters(self):
        _, mine = pair(num_layers=2, bidirectional=True)
        mine.flatten_parameters()
        new = nn.Parameter(torch.zeros_like(mine.weight_hh_l1))
        mine.weight_hh_l1 = new
        assert [w is p for w, p in zip(mine._flat_weights, mine.parameters(), strict=True)] == [True] * 16
        assert mine.all_weights[2][1] is new
        mine.float().flatten_parameters()
        assert all(w is p for w, p in zip(mine._flat_weights, mine.parameters(), strict=True))
        assert {w.dtype for w in mine._flat_weights} == {torch.float32}

    def test_an_optimizer_step_changes_what_runs(self, path):
        theirs, mine = pair(num_layers=2)
        x, pulled = draw(), []
        for module in (mine, theirs):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                module(x)[0].square().sum().backward()
                optimizer.step()
            pulled.append(module(x))
        close(*pulled)

    def test_moving_to_another_dtype_and_back(self, path):
        theirs, mine = pair(bidirectional=True)
        x = draw()
        for module in (mine, theirs):
            module.to(torch.float32).to(F64)
        close(mine(x), theirs(x))

    @pytest.mark.cuda
    def test_moving_to_cuda_and_back(self):
        theirs, mine = pair(bidirectional=True)
        x = draw()
        on_gpu = mine.cuda()(x.cuda())
        for a, b in zip(flat(on_gpu), flat(theirs(x)), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-10)
        close(mine.cpu()(x), theirs(x))

    def test_a_deep_copy_is_independent(self, path):
        _, mine = pair()
        x = draw()
        other = copy.deepcopy(mine)
        before = other(x)
        with torch.no_grad():
            mine.weight_hh_l0.zero_()
        close(other(x), before)
        assert not torch.equal(mine(x)[0], before[0])


class TestSizes:
    @pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "flipped"])
    def test_input_that_is_not_contiguous(self, layout, path):
        theirs, mine = pair(bidirectional=True)
        x = {
            "transposed": draw(B, T, D).transpose(0, 1),
            "sliced": draw(T, 2 * B, 2 * D)[:, ::2, 1::2],
            "expanded": draw(T, 1, D).expand(T, B, D),
            "flipped": draw(D, B, T).permute(2, 1, 0),
        }[layout]
        x.requires_grad_()
        states = tuple(draw(H, B, 2).permute(2, 1, 0) for _ in range(2))
        results = []
        for module in (mine, theirs):
            out = module(x, states)
            results.append([*flat(out), *torch.autograd.grad(out[0].sin().sum(), [x, *module.parameters()])])
        close(*results)

    def test_a_batch_of_no_sequences_has_zero_gradients(self, path):
        _, mine = pair(num_layers=2)
        x = draw(T, 0, D).requires_grad_()
        out, (h_n, c_n) = mine(x)
        (out.sum() + h_n.sum() + c_n.sum()).backward()
        assert x.grad.shape == (T, 0, D)
        assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in mine.parameters())

    def test_no_input_features(self, path):
        """nn.LSTM refuses to be built so, and with it the module; the functional form computes it."""
        torch.manual_seed(0)
        weights = [draw(4 * H, 0), draw(4 * H, H) / 3, draw(4 * H), draw(4 * H)]
        wide = [torch.ones(4 * H, 1, dtype=F64), *weights[1:]]  # with a feature that is zero
        leaves = [w.requires_grad_() for w in weights]
        out, states = tritlstm.lstm(draw(T, B, 0), None, leaves)
        expected = nn.LSTM(1, H, dtype=F64)
        expected.load_state_dict(dict(zip(expected.state_dict(), wide, strict=True)))
        close((out, states), expected(torch.zeros(T, B, 1, dtype=F64)))
        grads = torch.autograd.grad(out.square().sum(), leaves)
        expected(torch.zeros(T, B, 1, dtype=F64))[0].square().sum().backward()
        assert grads[0].shape == (4 * H, 0)
        close(grads[1:], [p.grad for p in list(expected.parameters())[1:]])
        with pytest.raises(ValueError, match="input_size must be greater than zero"):
            tritlstm.LSTM(0, H)


class TestAutograd:
    def test_retain_graph_gives_the_same_gradient_again(self, path):
        _, mine = pair(num_layers=2, proj_size=3)
        out = mine(draw())[0].square().sum()
        first = torch.autograd.grad(out, list(mine.parameters()), retain_graph=True)
        again = torch.autograd.grad(out, list(mine.parameters()))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(out, list(mine.parameters()))

    def test_backward_in_eval_mode(self, path):
        theirs, mine = pair(num_layers=2, dropout=0.5)
        x, results = draw(), []
        for module in (mine, theirs):
            module.eval()
            results.append(torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters())))
        close(*results)

    @pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
    def test_checkpointing(self, reentrant, path):
        _, mine = pair(num_layers=2, dropout=0.5, bidirectional=True)
        x = draw().requires_grad_()
        results = []
        for run in (mine, lambda x: checkpoint(mine, x, use_reentrant=reentrant)):
            torch.manual_seed(1)
            mine.zero_grad()
            x.grad = None
            run(x)[0].square().sum().backward()
            results.append([x.grad, *(p.grad for p in mine.parameters())])
        close(*results)

    @pytest.mark.parametrize("wanted", ["x", "h0", "c0", "weight_ih_l0", "bias_hh_l1"])
    def test_a_gradient_of_one_input_alone(self, wanted, path):
        results = []
        for module in pair(num_layers=2):
            torch.manual_seed(2)
            leaves = {"x": draw(), "h0": draw(2, B, H), "c0": draw(2, B, H), **dict(module.named_parameters())}
            for name, leaf in leaves.items():
                leaf.requires_grad_(name == wanted)
            out, (h_n, c_n) = module(leaves["x"], (leaves["h0"], leaves["c0"]))
            results.append(torch.autograd.grad((out.sin().sum() + h_n.cos().sum() + c_n.sum()), leaves[wanted]))
        close(*results)

    @pytest.mark.parametrize("which", range(3), ids=["out", "h_n", "c_n"])
    def test_a_gradient_from_one_result_alone(self, which, path):
        x, results = draw(), []
        for module in pair(num_layers=2, bidirectional=True):
            value = flat(module(x))[which]
            results.append(torch.autograd.grad(value.sin().sum(), list(module.parameters()), allow_unused=True))
        for mine, theirs in zip(*results, strict=True):
            zero = torch.zeros(())
            close(
                zero if mine is None else mine,
                torch.zeros_like(zero if mine is None else mine) if theirs is None else theirs,
            )

    def test_states_carried_on_with_and_without_detach(self, path):
        results = []
        for module in pair():
            torch.manual_seed(3)
            _, states = module(draw())
            module(draw(), states)[0].sum().backward()
            joined = [p.grad.clone() for p in module.parameters()]
            module.zero_grad()
            _, (h, c) = module(draw())
            module(draw(), (h.detach(), c.detach()))[0].sum().backward()
            results.append([*joined, *(p.grad for p in module.parameters())])
        close(*results)


def test_a_packed_input_with_states_of_another_batch_raises(path):
    packed = pack_sequence([torch.zeros(3, D, dtype=F64), torch.zeros(2, D, dtype=F64)])
    states = (torch.zeros(1, 3, H, dtype=F64), torch.zeros(1, 3, H, dtype=F64))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 2, 6\), got \[1, 3, 6\]"):
        tritlstm.LSTM(D, H, dtype=F64)(packed, states)
