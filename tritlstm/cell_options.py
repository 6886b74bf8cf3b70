"""What may differ from the plain LSTM cell: the options of a module, and the arguments of one operator call.

`CellOptions` is what a `tritlstm.LSTM` was built with. `Cell` is what of it, and of one call, reaches the operator of a
layer and direction: tensors, floats, ints and flags, which an operator schema can name.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["ACTIVATIONS", "PLAIN", "STANDARD", "Cell", "CellOptions"]

#: Names of ONNX in lower case; an activation's place is its code in operators and kernels. Parameters are ONNX's
#: defaults: hard_sigmoid clamps 0.2 x + 0.5 to [0, 1]; leaky_relu has slope 0.01; elu has alpha 1.
ACTIVATIONS = ("sigmoid", "tanh", "relu", "hard_sigmoid", "softsign", "softplus", "leaky_relu", "elu")
#: Codes of the plain LSTM: gates, input node, cell on its way out.
STANDARD = (0, 1, 1)


class Cell(NamedTuple):
    """Arguments of `torch.ops.tritlstm.variant_layer` beyond those of `layer`; `PLAIN` has all of them off."""

    resets: Tensor | None = None  # [T, B] bool: the state is zeroed before step t
    peephole: Tensor | None = None  # [3H] of the input, forget and output gate, of x's dtype
    h_scale: Tensor | None = None  # [B, H] float32 (float64), times h on its way into the recurrent product
    noise: Tensor | None = None  # [3] int64: seed, offset, stream of zoneout; None: its mean, as in evaluation
    coupled: bool = False  # f = 1 - i
    cell_clip: float = 0.0  # c is clamped to [-cell_clip, cell_clip]; 0: it is not
    zoneout_h: float = 0.0  # probability with which a unit of h keeps its value of the step before
    zoneout_c: float = 0.0
    activations: tuple[int, ...] = STANDARD  # codes of `ACTIVATIONS`


PLAIN = Cell()


@dataclasses.dataclass(frozen=True)
class CellOptions:
    """The variant of the LSTM that a module is; the fields are keyword arguments of `tritlstm.LSTM`."""

    peephole: bool = False
    coupled: bool = False
    cell_clip: float | None = None
    zoneout: tuple[float, float] = (0.0, 0.0)  # of h and of c
    recurrent_dropout: float = 0.0
    weight_dropout: float = 0.0
    activations: tuple[str, str, str] = ("sigmoid", "tanh", "tanh")
    num_heads: int = 1
    layer_norm: bool = False
    recompute: bool = False
    #: The options that are not the plain LSTM's, by name; asked in every call.
    changed: dict[str, Any] = dataclasses.field(init=False, repr=False, compare=False, hash=False)

    @classmethod
    def checked(cls, hidden_sizes: tuple[int, ...], proj_size: int, **given: Any) -> CellOptions:
        """The options, or ValueError with the value received and the remedy."""
        for name in ("peephole", "coupled", "layer_norm", "recompute"):
            if not isinstance(given[name], bool):
                raise TypeError(f"{name} must be True or False, got {given[name]!r}")
        zoneout = given.pop("zoneout")
        pair = tuple(zoneout) if isinstance(zoneout, (tuple, list)) else (zoneout, zoneout)
        if len(pair) != 2 or not all(_is_probability(p) for p in pair):
            raise ValueError(
                f"zoneout must be a probability in [0, 1), or one of h and one of c, got {zoneout!r}; "
                "zoneout=(0.1, 0.3) zones h out at 0.1 and c at 0.3"
            )
        names = tuple(given.pop("activations") or cls.activations)
        unknown = [name for name in names if name not in ACTIVATIONS]
        if len(names) != 3 or unknown:
            raise ValueError(
                f"activations must be three names, of the gates, of the input node and of the cell on its way out, "
                f"got {names!r}; known are {', '.join(ACTIVATIONS)}"
            )
        clip, heads = given["cell_clip"], given["num_heads"]
        if clip is not None and not (is_number(clip) and math.isfinite(clip) and clip > 0):
            raise ValueError(f"cell_clip must be a positive number, got {clip!r}; None leaves the cell unclipped")
        for size in hidden_sizes:
            if not (is_number(heads) and isinstance(heads, numbers.Integral)) or heads < 1 or size % heads:
                raise ValueError(f"num_heads must divide hidden_size, got num_heads={heads!r} and hidden_size={size}")
        options = cls(zoneout=(float(pair[0]), float(pair[1])), activations=names, **given)
        for name in ("recurrent_dropout", "weight_dropout"):
            if not _is_probability(getattr(options, name)):
                raise ValueError(f"{name} must be a probability in [0, 1), got {getattr(options, name)!r}")
        if proj_size:
            options._check_projection(proj_size)
        return options

    def _check_projection(self, proj_size: int) -> None:
        reasons = {
            "zoneout of h": self.zoneout[0] > 0,
            "recurrent_dropout": self.recurrent_dropout > 0,
            "weight_dropout": self.weight_dropout > 0,
            "num_heads": self.num_heads > 1,
            "layer_norm": self.layer_norm,
        }
        found = [name for name, on in reasons.items() if on]
        if found:
            raise ValueError(
                f"{' and '.join(found)} can't be had with a projection (proj_size={proj_size}), which the recurrence "
                "folds into w_hh; leave one of the two out"
            )

    @property
    def codes(self) -> tuple[int, int, int]:
        gates, node, shown = (ACTIVATIONS.index(name) for name in self.activations)
        return gates, node, shown

    @property
    def random(self) -> bool:
        """Whether a training step draws random numbers."""
        return max(*self.zoneout, self.recurrent_dropout, self.weight_dropout) > 0

    def __post_init__(self) -> None:
        given = [field for field in dataclasses.fields(self) if field.init]
        changed = {f.name: getattr(self, f.name) for f in given if getattr(self, f.name) != f.default}
        object.__setattr__(self, "changed", changed)


def is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_probability(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1
