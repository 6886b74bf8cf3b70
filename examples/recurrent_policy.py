"""A recurrent policy (PPO's and A2C's kind of rollout) whose episodes end inside the sequences: `resets` does the rest.

The game: an episode begins with a signal, left or right, that is then hidden for some steps; at the end the player
must go where the signal pointed. It takes memory within an episode, and none across: what is remembered of the episode
before misleads. Rollouts have a fixed length, so episodes begin and end anywhere in them. The usual code cuts the
sequences at every episode end and loops over the pieces; here one call runs them all, and the state is carried from
rollout to rollout.

    python examples/recurrent_policy.py [--updates 150]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import tritlstm

STEPS, GAMES, HIDDEN, DELAY = 16, 64, 16, 5
State = tuple[Tensor, Tensor]


class Game:
    """GAMES games side by side; an observation is (signal, whether it is time to answer)."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.clock = torch.zeros(GAMES, dtype=torch.long)
        self.delay = self._random(DELAY) + 2
        self.side = self._random(2)

    def _random(self, below: int) -> Tensor:
        return torch.randint(below, (GAMES,), generator=self.generator)

    def observe(self) -> tuple[Tensor, Tensor]:
        """Observations [GAMES, 2], and which games are at their first step."""
        first = self.clock == 0
        signal = torch.where(first, 2.0 * self.side - 1.0, 0.0)
        return torch.stack([signal, (self.clock == self.delay).float()], -1), first

    def play(self, action: Tensor) -> Tensor:
        """Rewards [GAMES]; games that have ended begin anew."""
        ends = self.clock == self.delay
        reward = torch.where(ends, torch.where(action == self.side, 1.0, -1.0), 0.0)
        self.clock = torch.where(ends, 0, self.clock + 1)
        self.delay = torch.where(ends, self._random(DELAY) + 2, self.delay)
        self.side = torch.where(ends, self._random(2), self.side)
        return reward


class Policy(nn.Module):
    """[T, B, 2] to action logits [T, B, 2] and values [T, B]."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = tritlstm.LSTM(2, HIDDEN)
        self.actor, self.critic = nn.Linear(HIDDEN, 2), nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor, state: State, first: Tensor) -> tuple[Tensor, Tensor, State]:
        out, state = self.lstm(x, state, resets=first)
        return self.actor(out), self.critic(out).squeeze(-1), state


def rollout(policy: Policy, game: Game, state: State) -> tuple[dict[str, Tensor], State]:
    """STEPS steps of all games, played step by step: T = 1 a call, with the same `resets`."""
    rows: dict[str, list[Tensor]] = {"x": [], "first": [], "action": [], "reward": []}
    with torch.no_grad():
        for _ in range(STEPS):
            x, first = game.observe()
            logits, _, state = policy(x[None], state, first[None])
            action = torch.multinomial(logits[0].softmax(-1), 1, generator=game.generator)[:, 0]
            for name, value in zip(rows, (x, first, action, game.play(action)), strict=True):
                rows[name].append(value)
    return {name: torch.stack(values) for name, values in rows.items()}, state


def returns(reward: Tensor, first: Tensor, decay: float = 0.95) -> Tensor:
    """What is still to come in the episode, [T, B]; an episode that the rollout cuts off ends there."""
    total, later = torch.zeros(GAMES), []
    for t in reversed(range(STEPS)):
        ends = first[t + 1] if t + 1 < STEPS else torch.ones(GAMES, dtype=torch.bool)
        total = reward[t] + decay * torch.where(ends, 0.0, total)
        later.append(total)
    return torch.stack(later[::-1])


def train(updates: int, seed: int = 0) -> list[float]:
    """The share of answers that were right, in each rollout."""
    torch.manual_seed(seed)
    game = Game(torch.Generator().manual_seed(seed))
    policy = Policy()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    state = (torch.zeros(1, GAMES, HIDDEN), torch.zeros(1, GAMES, HIDDEN))
    right = []
    for _ in range(updates):
        before = state
        data, state = rollout(policy, game, state)
        # All episodes of the rollout in one call, from the state that it began with.
        logits, values, _ = policy(data["x"], before, data["first"])
        goal = returns(data["reward"], data["first"])
        chosen = logits.log_softmax(-1).gather(-1, data["action"][..., None])[..., 0]
        advantage = (goal - values).detach()
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
        loss = -(chosen * advantage).mean() + 0.5 * (goal - values).square().mean() - 0.01 * entropy.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        answered = data["reward"] != 0
        right.append((data["reward"][answered] > 0).float().mean().item())
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=150)
    right = train(parser.parse_args().updates)
    tenth = max(1, len(right) // 10)
    begin, end = (sum(part) / tenth for part in (right[:tenth], right[-tenth:]))
    print(f"right answers: {begin:.0%} in the first rollouts, {end:.0%} in the last")


if __name__ == "__main__":
    main()
