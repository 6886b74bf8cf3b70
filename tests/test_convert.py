"""Weights from and to other libraries: each against that library's own formula, written in NumPy and float64 with its
own layout and gate order, and where it is installed against the library itself. ONNX models run in ONNX Runtime.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tritlstm
from tritlstm import convert

T, B, D, H = 7, 3, 4, 6
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias, batch_first": {"bias": False, "batch_first": True},
    "two layers, both directions": {"num_layers": 2, "bidirectional": True},
    "three layers, batch_first": {"num_layers": 3, "batch_first": True},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def draw(kind: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[tritlstm.LSTM, Tensor]:
    torch.manual_seed(0)
    module = tritlstm.LSTM(D, H, **kind, dtype=dtype)
    return module, torch.randn((B, T, D) if module.batch_first else (T, B, D), dtype=dtype)


def sigmoid(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))


def walk(x: np.ndarray, kernel: np.ndarray, recurrent: np.ndarray, bias: np.ndarray, order: str) -> np.ndarray:
    """One direction over x [T, B, D]: x kernel + h recurrent + bias, the four gates of H columns each in `order`."""
    h = c = np.zeros((x.shape[1], recurrent.shape[0]))
    out = []
    for row in x:
        gates = dict(zip(order, np.split(row @ kernel + h @ recurrent + bias, 4, -1), strict=True))
        c = sigmoid(gates["f"]) * c + sigmoid(gates["i"]) * np.tanh(gates["g"])
        h = sigmoid(gates["o"]) * np.tanh(c)
        out.append(h)
    return np.stack(out)


def walk_layers(x: np.ndarray, layers: list[list[np.ndarray]], order: str, bidirectional: bool) -> np.ndarray:
    for layer in layers:
        each = len(layer) // (1 + bidirectional)
        parts = [[*layer[k : k + each], 0.0][:3] for k in range(0, len(layer), each)]
        outs = [walk(x, *parts[0], order)]
        if bidirectional:
            outs.append(walk(x[::-1], *parts[1], order)[::-1])
        x = np.concatenate(outs, -1)
    return x


def time_first(module: tritlstm.LSTM, value: Any) -> np.ndarray:
    array = value.detach().numpy() if isinstance(value, Tensor) else value
    return array.swapaxes(0, 1) if module.batch_first else array


def assert_equal_modules(got: nn.RNNBase, expected: nn.RNNBase) -> None:
    assert repr(got).partition("(")[2] == repr(expected).partition("(")[2]
    for name, value in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name], value), name


class TestTorch:
    @pytest.mark.parametrize("kind", [*KINDS.values(), {"proj_size": 3, "num_layers": 2, "dropout": 0.5}])
    def test_there_and_back(self, kind):
        mine, x = draw(kind)
        theirs = convert.to_torch(mine.eval())
        back = convert.from_torch(theirs)
        assert (type(theirs), type(back)) == (nn.LSTM, tritlstm.LSTM)
        assert not theirs.training
        assert not back.training
        assert_equal_modules(back, mine)
        torch.testing.assert_close(theirs(x), mine(x), rtol=1e-10, atol=1e-10)
        with torch.no_grad():
            theirs.weight_hh_l0.zero_()  # a copy, not a view
        assert mine.weight_hh_l0.abs().sum() > 0

    def test_computed_weights_are_copied_as_they_are(self):
        mine, x = draw({})
        nn.utils.parametrizations.weight_norm(mine, "weight_hh_l0")
        torch.testing.assert_close(convert.to_torch(mine)(x), mine(x), rtol=1e-10, atol=1e-10)

    def test_other_modules_are_refused(self):
        with pytest.raises(TypeError, match=r"takes a torch\.nn\.LSTM, got GRU"):
            convert.from_torch(nn.GRU(D, H))
        with pytest.raises(TypeError, match=r"takes a tritlstm\.LSTM, got LSTM; see tritlstm\.convert\.from_torch"):
            convert.to_torch(nn.LSTM(D, H))


class TestKeras:
    @kinds
    def test_to_keras_is_its_formula(self, kind):
        module, x = draw(kind)
        layers = convert.to_keras(module)
        assert layers[0][0].shape == (D, 4 * H)
        expected = walk_layers(time_first(module, x), layers, "ifgo", module.bidirectional)
        np.testing.assert_allclose(time_first(module, module(x)[0]), expected, rtol=1e-10, atol=1e-10)

    @kinds
    def test_from_keras_is_its_formula(self, kind):
        rng = np.random.default_rng(0)
        module, x = draw(kind)
        layers = [[rng.standard_normal(w.shape) for w in layer] for layer in convert.to_keras(module)]
        made = convert.from_keras(layers, bidirectional=module.bidirectional, batch_first=module.batch_first)
        expected = walk_layers(time_first(module, x), layers, "ifgo", module.bidirectional)
        np.testing.assert_allclose(time_first(module, made(x)[0]), expected, rtol=1e-10, atol=1e-10)
        for again, layer in zip(convert.to_keras(made), layers, strict=True):
            for a, b in zip(again, layer, strict=True):
                np.testing.assert_array_equal(a, b)

    def test_against_keras_itself(self, monkeypatch):
        if "keras" not in sys.modules:
            monkeypatch.setitem(os.environ, "KERAS_BACKEND", "torch")
        keras = pytest.importorskip("keras", reason="pip install keras")
        rng, x = np.random.default_rng(0), np.random.default_rng(1).standard_normal((B, T, D)).astype(np.float32)
        lower = keras.layers.Bidirectional(keras.layers.LSTM(H, return_sequences=True))
        model = keras.Sequential([keras.Input((None, D)), lower, keras.layers.LSTM(5, return_sequences=True)])
        for layer in model.layers:
            layer.set_weights([rng.standard_normal(w.shape).astype(np.float32) / 2 for w in layer.get_weights()])
        first = convert.from_keras([model.layers[0].get_weights()], bidirectional=True)
        second = convert.from_keras([model.layers[1].get_weights()])
        got = second(first(torch.from_numpy(x))[0])[0].detach().numpy()
        # float32 on both sides.
        np.testing.assert_allclose(got, keras.ops.convert_to_numpy(model(x)), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("layers", "text"),
        [
            ([], "needs the weights of at least one layer, got none"),
            ([[np.zeros((D, 4 * H))]], r"layer 0 must have a kernel.*got 1 arrays; check bidirectional, now False"),
            ([[np.zeros((D, 4 * H - 1)), np.zeros((H, 4 * H))]], r"a multiple of 4 rows, got shape \[23, 4\]"),
            ([[np.zeros((D, 4 * H)), np.zeros((H, 4 * H + 4))]], r"weight_hh_l0 must be \[24, 6\], got \[28, 6\]"),
            (
                [[np.zeros((D, 4 * H)), np.zeros((H, 4 * H)), np.zeros(4 * H)], [np.zeros((H, 4 * H))] * 2],
                "all layers need a bias or none, got 6 tensors for 8 parameters",
            ),
        ],
        ids=["none", "count", "gates", "shape", "mixed"],
    )
    def test_errors(self, layers, text):
        with pytest.raises(ValueError, match=text):
            convert.from_keras(layers)


class TestHaste:
    @pytest.mark.parametrize("kind", [{}, {"num_layers": 2, "batch_first": True}, {"bias": False}])
    def test_is_its_formula_there_and_back(self, kind):
        module, x = draw(kind)
        layers = convert.to_haste(module)
        expected = walk_layers(time_first(module, x), layers, "igfo", False)
        np.testing.assert_allclose(time_first(module, module(x)[0]), expected, rtol=1e-10, atol=1e-10)
        made = convert.from_haste(layers, batch_first=module.batch_first)
        torch.testing.assert_close(made(x), module(x), rtol=1e-10, atol=1e-10)

    def test_one_direction_only(self):
        with pytest.raises(ValueError, match="Haste's LSTM has one direction, got a bidirectional module"):
            convert.to_haste(tritlstm.LSTM(D, H, bidirectional=True))


class TestOnnxWeights:
    @kinds
    def test_is_its_formula_there_and_back(self, kind):
        module, x = draw(kind)
        layers = convert.to_onnx(module)
        as_kernels = []
        for layer in layers:
            directions = range(1 + module.bidirectional)
            biases = [np.split(layer["B"][k], 2) if "B" in layer else (0.0, 0.0) for k in directions]
            as_kernels.append([w for k in directions for w in (layer["W"][k].T, layer["R"][k].T, sum(biases[k]))])
        expected = walk_layers(time_first(module, x), as_kernels, "iofg", module.bidirectional)
        np.testing.assert_allclose(time_first(module, module(x)[0]), expected, rtol=1e-10, atol=1e-10)
        assert_equal_modules(convert.from_onnx(layers, batch_first=module.batch_first), module)

    def test_peepholes_are_their_formula_there_and_back(self):
        module, x = draw({"peephole": True, "bidirectional": True})
        (layer,) = convert.to_onnx(module)
        outs = []
        for k, values in enumerate((x.numpy(), x.numpy()[::-1])):
            p_i, p_o, p_f = np.split(layer["P"][k], 3)
            h = c = np.zeros((B, H))
            out = []
            for row in values:
                products = row @ layer["W"][k].T + h @ layer["R"][k].T + sum(np.split(layer["B"][k], 2))
                i, o, f, g = np.split(products, 4, -1)
                c = sigmoid(f + p_f * c) * c + sigmoid(i + p_i * c) * np.tanh(g)
                h = sigmoid(o + p_o * c) * np.tanh(c)
                out.append(h)
            outs.append(np.stack(out)[:: -1 if k else 1])
        np.testing.assert_allclose(module(x)[0].detach().numpy(), np.concatenate(outs, -1), rtol=1e-10, atol=1e-10)
        assert_equal_modules(convert.from_onnx([layer]), module)

    def test_errors(self):
        (layer,) = convert.to_onnx(draw({})[0])
        with pytest.raises(ValueError, match=r"layer 0 has \['initial_h'\]; it takes W, R, B and P"):
            convert.from_onnx([{**layer, "initial_h": None}])
        with pytest.raises(ValueError, match=r"alike in all layers, got \[1, 2\] directions"):
            convert.from_onnx([layer, {"W": np.zeros((2, 4 * H, H)), "R": np.zeros((2, 4 * H, H))}])
        with pytest.raises(ValueError, match="all layers need peepholes P or none; zeros stand for none"):
            convert.from_onnx([layer, {**convert.to_onnx(tritlstm.LSTM(H, H))[0], "P": np.zeros((1, 3 * H))}])
        with pytest.raises(ValueError, match=r"only torch's LSTM has a projection, got proj_size = 3"):
            convert.to_onnx(tritlstm.LSTM(D, H, proj_size=3))
        with pytest.raises(ValueError, match=r"no bfloat16, got a module of it; convert it first: module\.float\(\)"):
            convert.to_onnx(tritlstm.LSTM(D, H, dtype=torch.bfloat16))


class TestVariants:
    def test_layers_of_different_sizes(self):
        module, x = draw({})
        module = tritlstm.LSTM(D, [H, 5], bidirectional=True, dtype=torch.float64)
        layers = convert.to_keras(module)
        made = convert.from_keras(layers, bidirectional=True, batch_first=False)
        assert made.hidden_sizes == (H, 5)
        np.testing.assert_allclose(
            made(x)[0].detach().numpy(), walk_layers(x.numpy(), layers, "ifgo", True), rtol=1e-10
        )
        with pytest.raises(ValueError, match=r"layers have one size, got hidden_size=\[6, 5\]"):
            convert.to_torch(module)
        with pytest.raises(ValueError, match=r"need layers of one size, got hidden_size=\[6, 5\]; make a model"):
            convert.export_onnx(module)

    def test_heads_become_zeros(self):
        module, x = draw({"num_heads": 2, "recurrent_dropout": 0.3})
        ((_, recurrent, _),) = layers = convert.to_keras(module)
        assert recurrent.shape == (H, 4 * H)
        assert np.count_nonzero(recurrent) == recurrent.size // 2
        expected = walk_layers(x.numpy(), layers, "ifgo", False)
        np.testing.assert_allclose(module.eval()(x)[0].detach().numpy(), expected, rtol=1e-10)

    @pytest.mark.parametrize("convert_", [convert.to_keras, convert.to_haste, convert.to_onnx, convert.to_torch])
    @pytest.mark.parametrize("option", [{"zoneout": 0.25}, {"cell_clip": 2.0}, {"layer_norm": True}], ids=str)
    def test_what_has_no_form_there_is_refused(self, option, convert_):
        (name,) = option
        with pytest.raises(ValueError, match=rf"{convert_.__name__}: that form has no {name}="):
            convert_(tritlstm.LSTM(D, H, **option))
        with pytest.raises(ValueError, match="that form has no peephole=True and no coupled=True"):
            convert.to_keras(tritlstm.LSTM(D, H, peephole=True, coupled=True))


class TestOnnxModel:
    @pytest.mark.parametrize(
        "variant",
        [
            {"peephole": True},
            {"coupled": True},
            {"peephole": True, "coupled": True, "bidirectional": True, "num_layers": 2},
            {"activations": ("hard_sigmoid", "softsign", "relu"), "bidirectional": True},
            {"num_heads": 3},
        ],
        ids=str,
    )
    def test_variants_in_onnx_runtime(self, variant, tmp_path):
        runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
        module, x = draw(variant, torch.float32)
        convert.export_onnx(module, tmp_path / "lstm.onnx")
        session = runtime.InferenceSession(tmp_path / "lstm.onnx")
        got = session.run(None, {"input": x.numpy()})
        out, states = module(x)
        for mine, theirs in zip((out, *states), got, strict=True):
            np.testing.assert_allclose(theirs, mine.detach().numpy(), rtol=1e-4, atol=1e-5)
        options = module.cell_options
        again = convert.from_onnx(convert.to_onnx(module), coupled=options.coupled, activations=options.activations)
        torch.testing.assert_close(again(x), module(x), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("states", [False, True], ids=["", "states"])
    @pytest.mark.parametrize("lengths", [False, True], ids=["", "lengths"])
    @kinds
    def test_onnx_runtime_gives_the_same_numbers(self, kind, lengths, states, tmp_path):
        runtime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime")
        module, _ = draw(kind, torch.float32)
        convert.export_onnx(module, tmp_path / "lstm.onnx", lengths=lengths, states=states)
        session = runtime.InferenceSession(tmp_path / "lstm.onnx")
        rows = module.num_layers * (1 + module.bidirectional)
        for steps, batch in ((T, B), (3, 5)):  # any T and B
            x = torch.randn((batch, steps, D) if module.batch_first else (steps, batch, D))
            hx = tuple(torch.randn(rows, batch, H) for _ in range(2)) if states else None
            ends = torch.arange(batch, dtype=torch.int32) % steps + 1 if lengths else None
            given = {"input": x, **({"lengths": ends} if lengths else {})}
            given.update(zip(("h_0", "c_0"), hx or (), strict=False))
            got = session.run(["output", "h_n", "c_n"], {name: value.numpy() for name, value in given.items()})
            out, (h_n, c_n) = module(x, hx, lengths=ends)
            for mine, theirs in zip((out, h_n, c_n), got, strict=True):
                # float32 on both sides, with ONNX Runtime's own approximation of sigmoid and tanh.
                np.testing.assert_allclose(theirs, mine.detach().numpy(), rtol=1e-4, atol=1e-5)

    def test_the_model_describes_itself(self):
        onnx = pytest.importorskip("onnx", reason="pip install 'tritlstm[onnx]'")
        model = convert.export_onnx(draw({"num_layers": 2})[0], opset=14)
        assert [node.op_type for node in model.graph.node].count("LSTM") == 2
        assert model.opset_import[0].version == 14
        assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.DOUBLE
        sizes = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
        assert sizes == ["T", "B", D]

    def test_errors(self, monkeypatch):
        with pytest.raises(ValueError, match="opset must be at least 14, got 13"):
            convert.export_onnx(tritlstm.LSTM(D, H), opset=13)
        with pytest.raises(TypeError, match=r"takes a tritlstm\.LSTM, got LSTM"):
            convert.export_onnx(nn.LSTM(D, H))
        monkeypatch.setitem(sys.modules, "onnx", None)
        with pytest.raises(ImportError, match=r"needs the package onnx: pip install 'tritlstm\[onnx\]'"):
            convert.export_onnx(tritlstm.LSTM(D, H))
