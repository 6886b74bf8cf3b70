"""The adding problem (Hochreiter & Schmidhuber, 1997): remember two marked numbers and give their sum.

Each sequence holds random numbers and a mark that is 1 at two places, one in each half. Answering with the
mean gives an error of 1/6; an LSTM learns to let the marked numbers in and to keep them.

    python examples/adding_problem.py [--steps 1500] [--length 40]
"""

import argparse

import torch
from torch import nn

import tritlstm


class Adder(nn.Module):
    """[T, B, 2] to [B]."""

    def __init__(self, hidden_size: int = 32) -> None:
        super().__init__()
        self.lstm = tritlstm.LSTM(2, hidden_size)
        self.head = nn.Linear(hidden_size, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, _ = self.lstm(x)
        return self.head(out[-1]).squeeze(-1)


def problems(length: int, batch: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences [length, batch, 2] of (number, mark), and the sums [batch] of the marked numbers."""
    numbers = torch.rand(length, batch, device=device)
    half = length // 2
    marked = torch.stack([torch.randint(half, (batch,)), half + torch.randint(length - half, (batch,))])
    marks = torch.zeros_like(numbers).scatter_(0, marked.to(device), 1.0)
    return torch.stack([numbers, marks], -1), (numbers * marks).sum(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--length", type=int, default=40)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Adder().to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(1, args.steps + 1):
        x, y = problems(args.length, 64, device)
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 0:
            print(f"step {step:5d}  mean squared error {loss.item():.4f}")

    with torch.no_grad():
        x, y = problems(args.length, 1000, device)
        error = nn.functional.mse_loss(model(x), y).item()
    print(f"mean squared error {error:.4f} on new sequences; always answering 1 gives {y.var().item():.4f}")


if __name__ == "__main__":
    main()
