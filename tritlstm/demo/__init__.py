"""`tritlstm demo`: train a character model on the standard library's source, look into it, verify it.

data      the text, its split, and counted baselines
model     embedding, LSTM, linear; the weights file
train     training and checkpoints
progress  what training shows
pictures  loss curve and gate heat map
verify    the same logits from NumPy, from the Triton kernels and from C
command   the job from end to end
"""

from __future__ import annotations

import argparse
from collections.abc import Callable


def _positive(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    def parse(text: str) -> int | float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = kind.__name__  # argparse names it where `kind` refuses the text
    return parse


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tritlstm demo`. Those left out come from the checkpoint, or suit the device."""
    parser.description = (
        "Train a character-level language model on the source code of Python's standard\n"
        "library with tritlstm.LSTM, draw its loss curve and its gates, and verify the\n"
        "weights with NumPy, the Triton kernels and a C program. A run stopped with Ctrl-C\n"
        "goes on where it was when the same command is given again."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "examples:\n"
        "  tritlstm demo                                  one minute of training\n"
        "  tritlstm demo --seconds 1200 --hidden 256 --output long\n"
        "  tritlstm demo --fresh                          forget an earlier run in the same folder\n"
    )
    integer, number = _positive(int), _positive(float)
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--seconds", type=number, metavar="S", help="train for so long (default: 60)")
    budget.add_argument(
        "--steps", type=integer, metavar="N", help="or for so many optimizer steps (repeatable bits)"
    )
    parser.add_argument(
        "--hidden", type=integer, metavar="H", help="units of a layer (default: 128, on a GPU 512)"
    )
    parser.add_argument("--layers", type=integer, metavar="L", help="LSTM layers (default: 1)")
    parser.add_argument(
        "--embedding", type=integer, metavar="E", help="size of a character's embedding (default: 64)"
    )
    parser.add_argument(
        "--batch", type=integer, metavar="B", help="parallel streams of text (default: 16, on a GPU 64)"
    )
    parser.add_argument(
        "--sequence", type=integer, metavar="T", help="steps of backpropagation (default: 64, on a GPU 128)"
    )
    parser.add_argument(
        "--lr", type=number, help="highest learning rate of Adam (default: 0.008, on a GPU 0.002)"
    )
    parser.add_argument(
        "--dropout", type=_probability, metavar="P", help="between layers and before the output (default: 0)"
    )
    parser.add_argument(
        "--seed", type=int, help="of the initial weights, dropout and the sample (default: 0)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the products in training; weights stay float32 (default: float32)",
    )
    parser.add_argument(
        "--text", metavar="DIR", help="learn from the .py files below DIR (default: the standard library)"
    )
    parser.add_argument(
        "--output", metavar="DIR", default="demo-output", help="folder of all files (default: %(default)s)"
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument(
        "--resume", action="store_true", help="insist on going on from a checkpoint in the folder"
    )
    again.add_argument("--fresh", action="store_true", help="start anew even if there is a checkpoint")


def run(args: argparse.Namespace) -> int:
    """Do the job. Returns 0, 1 where a verification that ran failed, 2 for a bad option, 130 when stopped."""
    from . import command

    return command.run(args)
