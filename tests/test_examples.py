"""Examples that learn something: short runs, and what has been learnt by their end."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("task", "bounds"),
    [
        ("remember", {"input gate, marked": (0.6, 1.0), "input gate, others": (0.0, 0.2),
                      "forget gate, others": (0.9, 1.0)}),
        ("ignore", {"input gate, marked": (0.5, 1.0), "input gate, others": (0.0, 0.2),
                    "forget gate, marked": (0.0, 0.6), "forget gate, others": (0.85, 1.0)}),
        ("flush", {"forget gate, marked": (0.0, 0.4), "forget gate, others": (0.6, 1.0)}),
    ],
)  # fmt: skip
def test_gates_learn_what_they_are_for(task, bounds):
    example = load("gates_learn")
    model, error = example.train(task, 200, "cpu")
    means, seen, batch = example.gates(task, model, "cpu")
    assert error < 0.1  # of the variance; answering with the mean gives 1
    for name, (low, high) in bounds.items():
        assert low <= means[name] <= high, (name, means)
    torch.testing.assert_close(model.head(seen.output).squeeze(-1), model(batch.x))


def test_a_policy_learns_within_episodes_that_end_inside_its_rollouts():
    example = load("recurrent_policy")
    right = example.train(60)
    assert sum(right[:5]) / 5 < 0.65
    assert sum(right[-5:]) / 5 > 0.9


def test_a_rollout_at_once_is_the_rollout_step_by_step():
    """The values and the state of one call with resets are those of the steps that were played."""
    example = load("recurrent_policy")
    torch.manual_seed(0)
    game, policy = example.Game(torch.Generator().manual_seed(0)), example.Policy()
    zeros = torch.zeros(1, example.GAMES, example.HIDDEN)
    _, before = example.rollout(policy, game, (zeros, zeros))
    data, after = example.rollout(policy, game, before)
    assert data["first"].any(0).all()
    out, state = policy.lstm(data["x"], before, resets=data["first"])
    torch.testing.assert_close(state, after)
    exact = nn.LSTM(2, example.HIDDEN)
    exact.load_state_dict(policy.lstm.state_dict())
    for k in range(3):  # by torch's own, cut at the ends of episodes
        begins = sorted({0, *data["first"][:, k].nonzero()[:, 0].tolist()})
        for begin, end in zip(begins, [*begins[1:], example.STEPS], strict=True):
            h, c = (s[:, k] * (begin == 0) * (~data["first"][0, k]) for s in before)
            torch.testing.assert_close(out[begin:end, k], exact(data["x"][begin:end, k], (h, c))[0])
