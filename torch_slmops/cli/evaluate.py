"""evaluate: how much a packed model's predictions differ from those of the model it stands for."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from torch_slmops.cli import models
from torch_slmops.cli.screen import OK, Screen, UserError

__all__ = ["add"]


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "evaluate",
        parents=[common],
        help="perplexity, and the divergence from the float model, on texts",
        description="Packs a model and compares its predictions with those of the model as it is; "
        "see torch_slmops.evaluate. Both are in memory.",
    )
    models.add_model_options(parser)
    group = parser.add_argument_group("evaluation")
    group.add_argument("--texts", type=Path, metavar="FILE", help="text; default: built-in samples")
    group.add_argument("--reference", metavar="MODEL", help="for a MODEL that is packed already")
    group.add_argument("--window", type=int, default=256, metavar="N", help="tokens of a window")
    group.add_argument("--max-windows", type=int, metavar="N")
    group.add_argument("--worst", type=int, default=5, metavar="N", help="tokens to show")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, screen: Screen) -> int:
    from torch_slmops.evaluate import evaluate

    loaded = models.load(args, screen)
    reference = None
    if args.reference is not None:
        reference = models.load_float(args.reference, args.dtype)
    elif not loaded.was_packed and not args.no_optimize:
        reference = models.load_float(args.model, args.dtype)
    try:
        found = evaluate(
            loaded.model,
            reference,
            texts=args.texts,
            tokenizer=loaded.tokenizer,
            window=args.window,
            max_windows=args.max_windows,
            worst=args.worst,
            progress=sys.stderr.isatty(),
        )
    except (ValueError, TypeError, OSError) as error:
        raise UserError(str(error)) from error
    screen.write(f"{found}\n")
    screen.result(found.to_dict())
    return OK
