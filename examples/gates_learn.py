"""Three things that gates are for, learnt from examples and made visible: remember, ignore, flush.

The chapter on LSTMs in "Dive into Deep Learning" says what gates are for. Here a small LSTM learns each of them from
sequences that need it, and its input and forget gates are looked at:

    remember  the answer at every step is the first number; all that follow are noise
    ignore    the answer is the last number that was marked; numbers without a mark are noise
    flush     the answer is how many events came since the last boundary

    python examples/gates_learn.py [--steps 400] [--pictures DIR]

It prints, for the unit whose cell follows the answer most closely, the mean of its gates where they should be open and
where they should be closed, and draws all units' gates and cells along one sequence.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import tritlstm

LENGTH, BATCH, HIDDEN = 24, 64, 2


@dataclass
class Sequences:
    """A batch of one task."""

    x: Tensor  # [T, B, 2]: a number, and a mark
    y: Tensor  # [T, B]: the answer
    tokens: list[str]  # what sequence `shown` reads, for the picture
    shown: int = 0


def remember(generator: torch.Generator) -> Sequences:
    numbers = torch.randn(LENGTH, BATCH, generator=generator)
    mark = torch.zeros(LENGTH, BATCH)
    mark[0] = 1.0
    tokens = ["first"] + ["noise"] * (LENGTH - 1)
    return Sequences(torch.stack([numbers, mark], -1), numbers[:1].expand(LENGTH, BATCH), tokens)


def ignore(generator: torch.Generator) -> Sequences:
    numbers = torch.randn(LENGTH, BATCH, generator=generator)
    mark = (torch.rand(LENGTH, BATCH, generator=generator) < 0.25).float()
    mark[0] = 1.0
    steps = torch.arange(LENGTH)[:, None].expand(LENGTH, BATCH)
    latest = torch.where(mark > 0, steps, 0).cummax(0).values
    tokens = ["number" if m else "noise" for m in mark[:, 0]]
    return Sequences(torch.stack([numbers, mark], -1), numbers.gather(0, latest), tokens)


def flush(generator: torch.Generator) -> Sequences:
    event = (torch.rand(LENGTH, BATCH, generator=generator) < 0.5).float()
    boundary = (torch.rand(LENGTH, BATCH, generator=generator) < 0.08).float()
    event = event * (1 - boundary)
    counts, count = [], torch.zeros(BATCH)
    for t in range(LENGTH):
        count = (count + event[t]) * (1 - boundary[t])
        counts.append(count)
    shown = int(boundary[4:-4].sum(0).argmax())
    kinds = zip(event[:, shown], boundary[:, shown], strict=True)
    tokens = ["boundary" if b else "event" if e else "-" for e, b in kinds]
    return Sequences(torch.stack([event, boundary], -1), torch.stack(counts) / 4, tokens, shown)


TASKS: dict[str, Callable[[torch.Generator], Sequences]] = {"remember": remember, "ignore": ignore, "flush": flush}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = tritlstm.LSTM(2, HIDDEN, forget_bias=1.0)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0]).squeeze(-1)


def train(task: str, steps: int, device: str) -> tuple[Model, float]:
    """The trained model, and its mean squared error as a share of the answers' variance."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Model().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = TASKS[task](generator)
        loss = nn.functional.mse_loss(model(batch.x.to(device)), batch.y.to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    batch = TASKS[task](generator)
    with torch.no_grad():
        error = nn.functional.mse_loss(model(batch.x.to(device)).cpu(), batch.y)
    return model, (error / batch.y.var()).item()


def gates(task: str, model: Model, device: str) -> tuple[dict[str, float], tritlstm.tracing.Trace, Sequences]:
    """Means of the following unit's gates at steps of the mark and at all others, on sequences it has not seen."""
    batch = TASKS[task](torch.Generator().manual_seed(1))
    with torch.no_grad():
        seen = tritlstm.trace(model.lstm, batch.x.to(device))
    c, i, f = (getattr(seen[0], name).cpu() for name in "cif")
    flat = torch.cat([c.flatten(0, 1), batch.y.reshape(-1, 1)], 1)
    follows = torch.corrcoef(flat.T)[-1, :-1].abs().argmax()
    marked = batch.x[..., 1] > 0
    marked[0] = marked[0] & (task != "flush")
    later = torch.arange(LENGTH)[:, None] > 0
    i, f = i[..., follows], f[..., follows]
    means = {"input gate, marked": i[marked], "input gate, others": i[~marked & later]}
    means |= {"forget gate, marked": f[marked & later], "forget gate, others": f[~marked & later]}
    return {name: value.mean().item() for name, value in means.items() if value.numel()}, seen, batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--pictures", type=Path, help="folder for a picture of each task")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for task in TASKS:
        model, error = train(task, args.steps, device)
        means, seen, batch = gates(task, model, device)
        print(f"{task}: error {error:.4f} of the answers' variance")
        for name, value in means.items():
            print(f"  {name:20} {value:.2f}")
        if args.pictures:
            args.pictures.mkdir(parents=True, exist_ok=True)
            figure = tritlstm.plot_gates(
                seen, batch.tokens, sequence=batch.shown, parts="ifc", title=f"Learnt to {task}"
            )
            figure.savefig(args.pictures / f"gates-{task}.png", dpi=80)


if __name__ == "__main__":
    main()
