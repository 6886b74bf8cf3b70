"""The command `tritlstm`. A subcommand's module is imported when it is called, so that `--help` is fast."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ._version import __version__


class Command(NamedTuple):
    """A subcommand: `module` has add_arguments(parser) and run(args) -> exit status."""

    module: str
    help: str
    extra: str  # of pyproject.toml, what its imports need beyond the plain installation


COMMANDS = {
    "info": Command(
        "tritlstm.info", "versions, devices, the compiler, and which path an LSTM takes here", ""
    ),
    "demo": Command(
        "tritlstm.demo", "train on the standard library, draw the gates, verify the weights", "demo"
    ),
    "bench": Command("tritlstm.benchmarks.command", "time it against its peers", "bench"),
    "kernels": Command("tritlstm.inspect_kernels", "cross-compile the Triton kernels and inspect them", ""),
    "build-c": Command("tritlstm.capi.build", "build the C library into a folder", "capi"),
}


def make_parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """The parser, with the options of the one subcommand that is `chosen`."""
    parser = argparse.ArgumentParser(
        prog="tritlstm", description="An LSTM in Triton, for PyTorch and for C.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"tritlstm {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=command.help, description=command.help, allow_abbrev=False
        )
        if name == chosen:
            module = importlib.import_module(command.module)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def missing(name: str, error: ImportError) -> str:
    """What to say when a subcommand's imports fail."""
    command = COMMANDS[name]
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("tritlstm"):
        package = error.name.partition(".")[0]
        install = f"'tritlstm[{command.extra}]'" if command.extra else "tritlstm"
        return f"tritlstm {name} needs {package}, which is not installed: pip install {install}"
    return f"tritlstm {name} cannot be loaded: {error}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = arguments[0] if arguments and arguments[0] in COMMANDS else None
    try:
        args = make_parser(chosen).parse_args(arguments)
        return int(args.run(args))
    except ImportError as error:
        if chosen is None:
            raise
        print(missing(chosen, error), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output went away, as in `tritlstm info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
