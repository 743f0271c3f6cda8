"""Parses the command line, runs a command, and turns its errors into exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from torch_slmops import __version__
from torch_slmops.cli import (
    bench,
    chat,
    evaluate,
    generate,
    info,
    quantize,
    report,
    selfcheck,
    serve,
    tune,
)
from torch_slmops.cli.screen import USAGE, Screen, UserError

__all__ = ["COMMANDS", "main"]

COMMANDS = (info, quantize, generate, chat, report, evaluate, selfcheck, bench, tune, serve)

_INTERRUPTED = 130
_EPILOG = """exit codes: 0 done; 1 it failed, or selfcheck found a difference; 2 wrong arguments;
130 interrupted. Errors are one line; --debug adds where they come from."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that `arguments` (by default those of the process) name.

    Returns:
        The exit code.

    Raises:
        SystemExit: For --help, --version and arguments that argparse refuses.
    """
    args = _parser().parse_args(arguments)
    screen = Screen(args.json)
    try:
        _set_machine(args)
        code: int = args.run(args, screen)
        return code
    except UserError as error:
        if args.debug:
            raise
        screen.error(str(error))
        return error.code
    except KeyboardInterrupt:
        screen.write("\n")
        return _INTERRUPTED
    except BrokenPipeError:  # `| head`: nobody reads the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torch-slmops",
        description="Small language models on the CPU, quantized by torch_slmops.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"torch_slmops {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands, _common())
    return parser


def _common() -> argparse.ArgumentParser:
    """The options that all commands have."""
    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("options of all commands")
    group.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    group.add_argument("--isa", metavar="ROW", help="ISA row to use (see info); default: the best")
    group.add_argument("--threads", type=int, metavar="N", help="torch's number of threads")
    group.add_argument("--debug", action="store_true", help="errors with a traceback")
    return common


def _set_machine(args: argparse.Namespace) -> None:
    """Puts the row and the number of threads that were asked for in use."""
    import torch

    from torch_slmops.isa import set_isa

    if args.threads is not None:
        if args.threads < 1:
            raise UserError(f"--threads: expected at least 1, got {args.threads}", USAGE)
        torch.set_num_threads(args.threads)
    if args.isa is not None:
        try:
            set_isa(args.isa)
        except ValueError as error:
            raise UserError(f"--isa: {error}", USAGE) from error
