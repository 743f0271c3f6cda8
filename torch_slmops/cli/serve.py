"""serve: `transformers serve`, in a process that knows packed models."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import Any

from torch_slmops.cli import models
from torch_slmops.cli.screen import Screen, UserError

__all__ = ["add"]

_NEEDED = ("fastapi", "uvicorn", "openai", "accelerate")


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "serve",
        parents=[common],
        help="serve a packed model by `transformers serve`, with OpenAI's protocol",
        description="Runs `transformers serve MODEL OPTIONS...` with torch_slmops imported, so "
        "that folders which `quantize` wrote load. `transformers serve --help` has the options.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder that quantize wrote, or a hub id")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of transformers serve")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, screen: Screen) -> int:
    models.require_transformers()
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"serve needs {', '.join(missing)}: pip install 'transformers[serving]'")
    if models.locate(args.model).gguf is not None:
        raise UserError(f"{args.model}: quantize it to a folder first, and serve that")
    from transformers.cli import transformers as command_line

    main: Any = command_line.main
    sys.argv = ["transformers", "serve", args.model, "--device", "cpu", *args.options]
    main()
    return 0
