"""Weights of an LSTM from and to other libraries, and a module as an ONNX model.

Every library stacks the same four gates, in an order, an orientation and with a count of biases of its own. With D
input features, H units and S directions, for one layer:

    =========  ===========  ================  ==================  ===========================
    library    gates        input weights     recurrent weights   biases
    =========  ===========  ================  ==================  ===========================
    torch      i, f, g, o   w_ih [4H, D]      w_hh [4H, H]        b_ih [4H], b_hh [4H]
    Keras      i, f, g, o   kernel [D, 4H]    recurrent [H, 4H]   bias [4H]
    ONNX       i, o, f, g   W [S, 4H, D]      R [S, 4H, H]        B [S, 8H]: b_ih, then b_hh
    Haste      i, g, f, o   kernel [D, 4H]    recurrent [H, 4H]   bias [4H]
    =========  ===========  ================  ==================  ===========================

(g is also called c: the cell's input.) Where a library has one bias, it becomes b_ih and b_hh is zero; the other way
the two are added. Values are copied, in the dtype they have. None but torch has a projection; ONNX alone has
peepholes, coupled gates and other activations. Heads (`num_heads`) become the zeros that they stand for, and
recurrent and weight dropout, which act in training only, are left out. Whatever else of a module can't be expressed
raises ValueError.

Sources: the documentation of `keras.layers.LSTM` (Keras 3), of the operator `LSTM` (ONNX, opset 14), and the module
`haste_pytorch.LSTM` (Haste 0.4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .cell_options import CellOptions
from .module import LSTM
from .variants import dense_heads

__all__ = [
    "export_onnx", "from_haste", "from_keras", "from_onnx", "from_torch", "to_haste", "to_keras", "to_onnx", "to_torch",
]  # fmt: skip

#: One direction of one layer in torch's form: w_ih, w_hh and, where there are biases, b_ih and b_hh.
Direction = list[Tensor]
Array = Any  # what torch.as_tensor takes

_ARGUMENTS = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
_IN_TRAINING_ONLY = ("recompute", "recurrent_dropout", "weight_dropout")


def from_torch(module: nn.LSTM) -> LSTM:
    """A new module with the weights and settings of `module`, which stays as it is (see `tritlstm.swap`)."""
    if not isinstance(module, nn.LSTM):
        raise TypeError(f"from_torch takes a torch.nn.LSTM, got {type(module).__name__}")
    return _copy(module, LSTM)


def to_torch(module: LSTM) -> nn.LSTM:
    """A new `torch.nn.LSTM` with the weights and settings of `module`, which must not be a variant."""
    _expect_lstm("to_torch", module)
    _refuse_variant("to_torch", module, ("recompute",))
    if module.hidden_sizes is not None:
        raise ValueError(f"to_torch: nn.LSTM's layers have one size, got hidden_size={list(module.hidden_sizes)}")
    return _copy(module, nn.LSTM)


def from_keras(layers: Sequence[Sequence[Array]], *, bidirectional: bool = False, batch_first: bool = True) -> LSTM:
    """A module of Keras's weights.

    Args:
        layers: for each layer, from the input on, what `layer.get_weights()` gives: kernel, recurrent_kernel and, with
            `use_bias`, bias; of a `Bidirectional` layer these of the forward and then of the backward layer.
        bidirectional: whether they are `Bidirectional` layers (with the default `merge_mode="concat"`).
        batch_first: of the module; Keras's own order is [B, T, D].

    Only the default activations, tanh and sigmoid, compute the same. Raises ValueError for other shapes or counts.
    """
    return _from_kernels("from_keras", layers, "ifgo", bidirectional, batch_first)


def to_keras(module: LSTM) -> list[list[np.ndarray]]:
    """For each layer what `set_weights` of a Keras layer takes; the inverse of `from_keras`."""
    return _to_kernels("to_keras", module, "ifgo")


def from_haste(layers: Sequence[Sequence[Array]], *, batch_first: bool = False) -> LSTM:
    """A module of Haste's weights: for each layer kernel, recurrent_kernel and bias of a `haste_pytorch.LSTM`.

    Its dropout, zoneout and layer normalization act in training only or are other modules; they are not converted.
    """
    return _from_kernels("from_haste", layers, "igfo", False, batch_first)


def to_haste(module: LSTM) -> list[list[np.ndarray]]:
    """For each layer kernel, recurrent_kernel and bias of a `haste_pytorch.LSTM`; the inverse of `from_haste`."""
    if getattr(module, "bidirectional", False):
        raise ValueError("to_haste: Haste's LSTM has one direction, got a bidirectional module")
    layers = _to_kernels("to_haste", module, "igfo")
    if not module.bias:
        for layer in layers:
            layer.append(np.zeros(4 * module.hidden_size, dtype=layer[0].dtype))
    return layers


def from_onnx(
    layers: Sequence[Mapping[str, Array]],
    *,
    batch_first: bool = False,
    coupled: bool = False,
    activations: Sequence[str] | None = None,
) -> LSTM:
    """A module of the weights of ONNX `LSTM` nodes.

    Args:
        layers: for each node, from the input on, its inputs by the operator's names: `W`, `R`, and where the node has
            them `B` and `P`. Two directions where their first dimension is 2.
        batch_first: of the module; the operator's own order is [T, B, D].
        coupled: the nodes' attribute `input_forget`.
        activations: the nodes' first three, in lower case with underscores, as in `tritlstm.LSTM`; default the
            operator's own.

    Nodes with the attribute `clip` compute something else. Peepholes `P` make a module with `peephole=True`. Raises
    ValueError for shapes that do not fit.
    """
    directions = {len(layer["W"]) for layer in layers}
    if len(directions) != 1 or not directions <= {1, 2}:
        raise ValueError(
            f"from_onnx: W must be [1 or 2, 4H, D], alike in all layers, got {sorted(directions)} directions"
        )
    parts, peepholes = [], []
    for number, layer in enumerate(layers):
        unknown = set(layer) - {"W", "R", "B", "P"}
        if unknown:
            raise ValueError(f"from_onnx: layer {number} has {sorted(unknown)}; it takes W, R, B and P")
        for k in range(len(layer["W"])):
            weights = [torch.as_tensor(layer[name][k]) for name in ("W", "R")]
            if layer.get("B") is not None:
                weights += torch.as_tensor(layer["B"][k]).chunk(2)
            parts.append([_reorder("from_onnx", w, "iofg", "ifgo") for w in weights])
            if layer.get("P") is not None:
                peepholes.append(_reorder("from_onnx", torch.as_tensor(layer["P"][k]), "iof", "ifo"))
    if len(peepholes) not in (0, len(parts)):
        raise ValueError("from_onnx: all layers need peepholes P or none; zeros stand for none")
    variant = {"peephole": bool(peepholes), "coupled": coupled, "activations": activations}
    module = _build("from_onnx", parts, directions == {2}, batch_first, **variant)
    for name, value in zip(_peepholes(module), peepholes, strict=True):
        _copy_into("from_onnx", module, name, value)
    return module


def to_onnx(module: LSTM) -> list[dict[str, np.ndarray]]:
    """For each layer the inputs `W`, `R` and, where the module has them, `B` and `P` of an ONNX `LSTM` node.

    The inverse of `from_onnx`. Coupled gates and activations are attributes of a node: see `export_onnx`.
    """
    layers = []
    allowed = ("peephole", "coupled", "activations")
    peepholes = iter([getattr(module, name).detach() for name in _peepholes(module)])
    for directions in _directions("to_onnx", module, allowed):
        ordered = [[_reorder("to_onnx", w, "ifgo", "iofg") for w in weights] for weights in directions]
        layer = {"W": [w[0] for w in ordered], "R": [w[1] for w in ordered]}
        if module.bias:
            layer["B"] = [torch.cat(w[2:]) for w in ordered]
        if module.cell_options.peephole:
            layer["P"] = [_reorder("to_onnx", next(peepholes), "ifo", "iof") for _ in directions]
        layers.append({name: _numpy("to_onnx", torch.stack(values)) for name, values in layer.items()})
    return layers


def export_onnx(
    module: LSTM, path: str | Path | None = None, *, lengths: bool = False, states: bool = False, opset: int = 17
) -> Any:
    """The module as an ONNX model of one `LSTM` node a layer, with any T and B.

    Inputs: `input` [T, B, D] ([B, T, D] with `batch_first`); with `states` also `h_0` and `c_0` [L S, B, H], else they
    are zero; with `lengths` also `lengths` int32 [B], of values from 1 to T (for 0 the operator says nothing).
    Outputs: `output` [T, B, S H] (in the order of the input), `h_n` and `c_n` [L S, B, H]. Dropout is left out, as in
    eval mode. float16, float32 and float64 as the module's parameters are; ONNX Runtime's CPU runs float32.

    Args:
        path: also written there.
        opset: version of ONNX's operator set, at least 14.

    Returns:
        The `onnx.ModelProto`.

    Raises:
        ImportError: the package onnx is missing; `pip install 'tritlstm[onnx]'`.
        ValueError: the module has a projection, layers of different sizes, bfloat16 parameters or a variant that
            ONNX does not know, or `opset` is below 14.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("export_onnx needs the package onnx: pip install 'tritlstm[onnx]'") from error
    if opset < 14:
        raise ValueError(f"export_onnx: opset must be at least 14, got {opset}")
    weights = to_onnx(module)
    if module.hidden_sizes is not None:
        raise ValueError(
            f"export_onnx: h_n and c_n need layers of one size, got hidden_size={list(module.hidden_sizes)}; "
            "make a model of the weights of to_onnx"
        )
    graph = _Graph(module, weights, lengths, states)
    return graph.model(onnx, opset, path)


class _Graph:
    """The nodes of `export_onnx`."""

    def __init__(self, module: LSTM, weights: list[dict[str, np.ndarray]], lengths: bool, states: bool) -> None:
        self.module, self.lengths, self.states = module, lengths, states
        self.constants: dict[str, np.ndarray] = {"joined": np.array([0, 0, -1], dtype=np.int64)}
        self.nodes: list[tuple[str, list[str], list[str], dict[str, Any]]] = []
        layers, directions = module.num_layers, 1 + module.bidirectional
        x = "input"
        if module.batch_first:
            x = self._node("Transpose", [x], "time_first", perm=[1, 0, 2])
        if states:
            self.constants["split"] = np.full(layers, directions, dtype=np.int64)
            for name in ("h_0", "c_0"):
                parts = [f"{name}_{k}" for k in range(layers)]
                self.nodes.append(("Split", [name, "split"], parts, {"axis": 0}))
        for k, layer in enumerate(weights):
            x = self._layer(k, x, layer)
        if module.batch_first:
            x = self._node("Transpose", [x], "batch_first", perm=[1, 0, 2])
        self._node("Identity", [x], "output")
        for name in ("h_n", "c_n"):
            self._node("Concat", [f"{name}_{k}" for k in range(layers)], name, axis=0)

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append((kind, inputs, [output], attributes))
        return output

    def _layer(self, k: int, x: str, weights: dict[str, np.ndarray]) -> str:
        self.constants.update({f"{name}_{k}": value for name, value in weights.items()})
        inputs = [
            x, f"W_{k}", f"R_{k}", f"B_{k}" if "B" in weights else "", "lengths" if self.lengths else "",
            *((f"h_0_{k}", f"c_0_{k}") if self.states else ("", "")), f"P_{k}" if "P" in weights else "",
        ]  # fmt: skip
        while not inputs[-1]:
            inputs.pop()
        direction = "bidirectional" if self.module.bidirectional else "forward"
        options = self.module.cell_options
        attributes: dict[str, Any] = {"hidden_size": self.module.hidden_size, "direction": direction}
        if options.coupled:
            attributes["input_forget"] = 1
        if options.activations != CellOptions.activations:
            names = ["".join(part.title() for part in name.split("_")) for name in options.activations]
            attributes["activations"] = names * (1 + self.module.bidirectional)
        self.nodes.append(("LSTM", inputs, [f"y_{k}", f"h_n_{k}", f"c_n_{k}"], attributes))
        together = self._node("Transpose", [f"y_{k}"], f"by_batch_{k}", perm=[0, 2, 1, 3])  # [T, S, B, H]: [T, B, S, H]
        return self._node("Reshape", [together, "joined"], f"output_{k}")

    def model(self, onnx: Any, opset: int, path: str | Path | None) -> Any:
        helper, module = onnx.helper, self.module
        directions = 1 + module.bidirectional
        kind = helper.np_dtype_to_tensor_dtype(self.constants["W_0"].dtype)
        lead: list[Any] = ["B", "T"] if module.batch_first else ["T", "B"]
        state = [module.num_layers * directions, "B", module.hidden_size]
        inputs = [("input", kind, [*lead, module.input_size])]
        inputs += [("h_0", kind, state), ("c_0", kind, state)] if self.states else []
        inputs += [("lengths", onnx.TensorProto.INT32, ["B"])] if self.lengths else []
        outputs = [
            ("output", kind, [*lead, directions * module.hidden_size]),
            ("h_n", kind, state),
            ("c_n", kind, state),
        ]
        graph = helper.make_graph(
            [helper.make_node(op, given, made, **attributes) for op, given, made, attributes in self.nodes],
            "tritlstm",
            [helper.make_tensor_value_info(*value) for value in inputs],
            [helper.make_tensor_value_info(*value) for value in outputs],
            [onnx.numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        # The oldest file format that holds the operator set: a runtime refuses one newer than itself.
        imports = [helper.make_opsetid("", opset)]
        version = helper.find_min_ir_version_for(imports)
        model = helper.make_model(graph, opset_imports=imports, ir_version=version, producer_name="tritlstm")
        onnx.checker.check_model(model, full_check=True)
        if path is not None:
            onnx.save(model, str(path))
        return model


def _copy(module: nn.RNNBase, kind: type) -> Any:
    arguments = {name: getattr(module, name) for name in _ARGUMENTS}
    weight = module.weight_ih_l0
    copied = kind(**arguments, device=weight.device, dtype=weight.dtype)
    copied.load_state_dict({name: getattr(module, name) for name in copied.state_dict()})
    return copied.train(module.training)


def _refuse_variant(who: str, module: LSTM, allowed: Sequence[str]) -> None:
    foreign = [f"{name}={value}" for name, value in module.cell_options.changed.items() if name not in allowed]
    if foreign:
        raise ValueError(f"{who}: that form has no {' and no '.join(foreign)}; only a module without can be converted")


def _peepholes(module: LSTM) -> list[str]:
    if not getattr(module, "cell_options", CellOptions()).peephole:
        return []
    return [f"weight_ch_{suffix}" for suffix in module._suffixes()]


def _expect_lstm(who: str, module: Any) -> None:
    if not isinstance(module, LSTM):
        raise TypeError(f"{who} takes a tritlstm.LSTM, got {type(module).__name__}; see tritlstm.convert.from_torch")


def _directions(who: str, module: LSTM, allowed: Sequence[str] = ()) -> list[list[Direction]]:
    """The weights by layer and direction, without their graph."""
    _expect_lstm(who, module)
    if module.proj_size:
        raise ValueError(f"{who}: only torch's LSTM has a projection, got proj_size = {module.proj_size}")
    _refuse_variant(who, module, (*_IN_TRAINING_ONLY, "num_heads", *allowed))
    each, heads = 2 + 2 * module.bias, module.cell_options.num_heads
    weights = [getattr(module, name).detach() for name in module._flat_weights_names]
    weights = [dense_heads(w, heads) if k % each == 1 and heads > 1 else w for k, w in enumerate(weights)]
    parts = [weights[k : k + each] for k in range(0, len(weights), each)]
    directions = 1 + module.bidirectional
    return [parts[k : k + directions] for k in range(0, len(parts), directions)]


def _from_kernels(
    who: str, layers: Sequence[Sequence[Array]], order: str, bidirectional: bool, batch_first: bool
) -> LSTM:
    parts = []
    for number, layer in enumerate(layers):
        each, rest = divmod(len(layer), 1 + bidirectional)
        if rest or each not in (2, 3):
            raise ValueError(
                f"{who}: layer {number} must have a kernel, a recurrent kernel and perhaps a bias"
                f"{', twice' if bidirectional else ''}, got {len(layer)} arrays; "
                f"check bidirectional, now {bidirectional}"
            )
        for k in range(0, len(layer), each):
            weights = [
                torch.as_tensor(w).t() if n < 2 else torch.as_tensor(w) for n, w in enumerate(layer[k : k + each])
            ]
            weights = [_reorder(who, w, order, "ifgo") for w in weights]
            parts.append([*weights, torch.zeros_like(weights[2])] if each == 3 else weights)
    return _build(who, parts, bidirectional, batch_first)


def _to_kernels(who: str, module: LSTM, order: str) -> list[list[np.ndarray]]:
    layers = []
    for directions in _directions(who, module):
        layer = []
        for w_ih, w_hh, *biases in directions:
            weights = [w_ih.t(), w_hh.t(), *([biases[0] + biases[1]] if biases else ())]
            layer += [_numpy(who, _reorder(who, w.t(), "ifgo", order).t()) for w in weights[:2]]
            layer += [_numpy(who, _reorder(who, w, "ifgo", order)) for w in weights[2:]]
        layers.append(layer)
    return layers


def _build(who: str, parts: list[Direction], bidirectional: bool, batch_first: bool, **variant: Any) -> LSTM:
    if not parts:
        raise ValueError(f"{who} needs the weights of at least one layer, got none")
    w_ih = parts[0][0]
    sizes = [part[0].size(0) // 4 for part in parts[:: 1 + bidirectional]]
    module = LSTM(
        w_ih.size(1), sizes[0] if len(set(sizes)) == 1 else sizes, len(sizes), len(parts[0]) == 4, batch_first,
        bidirectional=bidirectional, dtype=w_ih.dtype, **variant,
    )  # fmt: skip
    names, values = module._flat_weights_names, [w for part in parts for w in part]
    if len(names) != len(values):
        raise ValueError(
            f"{who}: all layers need a bias or none, got {len(values)} tensors for {len(names)} parameters"
        )
    for name, value in zip(names, values, strict=True):
        _copy_into(who, module, name, value)
    return module


def _copy_into(who: str, module: LSTM, name: str, value: Tensor) -> None:
    parameter = getattr(module, name)
    if parameter.shape != value.shape:
        raise ValueError(f"{who}: {name} must be {list(parameter.shape)}, got {list(value.shape)}")
    with torch.no_grad():
        parameter.copy_(value)


def _reorder(who: str, weight: Tensor, source: str, target: str) -> Tensor:
    """[4H, ...] (peepholes: [3H]) with the gates in the order `source` to the order `target`."""
    count = len(source)
    if weight.dim() == 0 or weight.size(0) % count:
        held = f"{count} gates, so a multiple of {count} rows"
        raise ValueError(f"{who}: weights hold {held}, got shape {list(weight.shape)}")
    gates = dict(zip(source, weight.chunk(count), strict=True))
    return torch.cat([gates[gate] for gate in target])


def _numpy(who: str, value: Tensor) -> np.ndarray:
    if value.dtype == torch.bfloat16:
        raise ValueError(f"{who}: NumPy has no bfloat16, got a module of it; convert it first: module.float()")
    return value.contiguous().cpu().numpy().copy()
