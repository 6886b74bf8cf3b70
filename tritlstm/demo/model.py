"""The demo's character model: embedding, `tritlstm.LSTM`, linear; its file, sampling and NumPy twin."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import tritlstm
from tritlstm import reference

from .data import UNKNOWN_ID, decode, encode

States = tuple[Tensor, Tensor]


class CharacterModel(nn.Module):
    """Reads ids of bytes and gives the logits of the next one.

    Call: ids [T, B] (any integer type) and states (h, c), each [layers, B, H], default zeros; returns logits
    [T, B, V] and the next states.
    """

    def __init__(
        self,
        vocabulary_size: int,
        embedding_size: int,
        hidden_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        lstm: Callable[..., nn.Module] | None = None,
    ) -> None:
        """`lstm` makes the recurrent part; default `tritlstm.LSTM`."""
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding_size)
        between = dropout if num_layers > 1 else 0.0
        make = tritlstm.LSTM if lstm is None else lstm
        self.lstm = make(embedding_size, hidden_size, num_layers, dropout=between)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, vocabulary_size)
        with torch.no_grad():
            for layer in range(num_layers):
                # A cell that forgets half a step learns slowly what to keep: start at σ(1) = 0.73.
                self.lstm.get_parameter(f"bias_hh_l{layer}").zero_()
                bias = self.lstm.get_parameter(f"bias_ih_l{layer}").zero_()
                bias[hidden_size : 2 * hidden_size] = 1.0

    def forward(self, ids: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        out, states = self.lstm(self.embedding(ids.long()), states)
        return self.head(self.dropout(out)), states

    def sizes(self) -> tuple[int, int, int, int]:
        """V, E, H, number of layers."""
        return (*self.embedding.weight.shape, self.head.in_features, count_layers(self.state_dict()))  # type: ignore[return-value]


def count_layers(weights: Mapping[str, object]) -> int:
    return sum(name.startswith("lstm.weight_hh_l") for name in weights)


def save(model: CharacterModel, vocabulary: np.ndarray, path: Path) -> None:
    """Write the float32 weights and `vocabulary` (uint8 [V]) as safetensors, in one step.

    Tensors: `embedding.weight` [V, E], `lstm.weight_ih_l0` [4H, E] and so on as in torch.nn.LSTM,
    `head.weight` [V, H], `head.bias` [V], and `vocabulary`, the byte of every id. Id 0 stands for all others.
    """
    from safetensors.torch import save as serialise

    tensors = {
        name: value.detach().to("cpu", torch.float32).contiguous()
        for name, value in model.state_dict().items()
    }
    tensors["vocabulary"] = torch.from_numpy(vocabulary.copy())
    sizes = ("vocabulary_size", "embedding_size", "hidden_size", "num_layers")
    metadata = {name: str(size) for name, size in zip(sizes, model.sizes(), strict=True)}
    metadata |= {"format": "pt", "unknown_id": str(UNKNOWN_ID)}
    part = path.with_name(path.name + ".part")
    part.write_bytes(serialise(tensors, metadata))
    os.replace(part, path)


def load_weights(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file written by `save`, as NumPy arrays."""
    from safetensors.numpy import load_file

    return load_file(path)


def torch_model(
    weights: Mapping[str, np.ndarray], dtype: torch.dtype, lstm: Callable[..., nn.Module] | None = None
) -> CharacterModel:
    """The model of `load_weights` on the CPU, in evaluation mode; `lstm` as for `CharacterModel`."""
    vocabulary_size, embedding_size = weights["embedding.weight"].shape
    hidden_size = weights["head.weight"].shape[1]
    model = CharacterModel(vocabulary_size, embedding_size, hidden_size, count_layers(weights), lstm=lstm)
    tensors = {name: torch.from_numpy(value) for name, value in weights.items() if name != "vocabulary"}
    model.load_state_dict(tensors)
    return model.to(dtype).eval().requires_grad_(False)


def numpy_traces(weights: Mapping[str, np.ndarray], ids: np.ndarray) -> list[reference.Trace]:
    """Every layer's gates and states on ids [T, B], by the NumPy reference in float64."""
    x = weights["embedding.weight"].astype(np.float64)[ids]  # [T, B, E]
    traces = []
    for layer in range(count_layers(weights)):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        traces.append(reference.forward(x, *(weights[f"lstm.{name}_l{layer}"] for name in names)))
        x = traces[-1].h
    return traces


def numpy_logits(weights: Mapping[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Logits [T, B, V] of ids [T, B], by the NumPy reference in float64."""
    h = numpy_traces(weights, ids)[-1].h
    return h @ weights["head.weight"].astype(np.float64).T + weights["head.bias"].astype(np.float64)


@torch.no_grad()
def generate(
    weights: Mapping[str, np.ndarray], prompt: str, length: int, seed: int, temperature: float = 0.7
) -> str:
    """`prompt` and `length` more bytes drawn from the model, on the CPU; the same text for the same seed."""
    model = torch_model(weights, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    prompt_ids = encode(prompt.encode(), weights["vocabulary"])
    ids = torch.from_numpy(prompt_ids)[:, None]  # [T, 1]
    states = None
    drawn = []
    for _ in range(length):
        logits, states = model(ids, states)
        scaled = logits[-1, 0] / temperature
        scaled[UNKNOWN_ID] = -torch.inf
        choice = torch.multinomial(scaled.softmax(-1), 1, generator=generator)  # [1]
        drawn.append(int(choice))
        ids = choice[None]
    return decode(np.concatenate([prompt_ids, np.array(drawn, np.uint8)]), weights["vocabulary"])
