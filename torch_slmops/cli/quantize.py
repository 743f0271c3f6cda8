"""quantize: packs a model once and saves it, ready to load."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from torch_slmops.cli import models
from torch_slmops.cli.screen import OK, USAGE, Screen, UserError, make_table

__all__ = ["add"]


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "quantize",
        parents=[common],
        help="pack a model and save it with its tokenizer",
        description="Saves an optimized model: safetensors, with its tokenizer. It loads with "
        "`import torch_slmops` and from_pretrained, and by the commands here.",
    )
    models.add_model_options(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--force", action="store_true", help="write into a folder that has files")
    group = parser.add_argument_group("a budget in the place of a format")
    group.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="choose the format of each layer: the fewest bytes whose mean KL per token from the "
        "float model is at most this",
    )
    group.add_argument(
        "--texts",
        type=Path,
        action="append",
        metavar="FILE",
        help="text to measure it on, in UTF-8 (may be given again); default: a few samples",
    )
    group.add_argument(
        "--measurements",
        type=Path,
        metavar="FILE",
        help="keep what was measured, for another budget or to go on",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, screen: Screen) -> int:
    from torch_slmops.report import report

    if args.no_optimize:
        raise UserError("quantize: --no-optimize would leave nothing to save", USAGE)
    _check_out(args)
    loaded = models.load(args, screen, budget=_budget(args))
    if loaded.was_packed:
        raise UserError(f"{args.model} is packed already: copy its folder")
    start = time.perf_counter()
    try:
        loaded.model.save_pretrained(args.out)
        loaded.tokenizer.save_pretrained(args.out)
    except OSError as error:
        raise UserError(f"{args.out}: could not be written: {error}") from error
    seconds = time.perf_counter() - start
    found = report(loaded.model)
    sizes = {file.name: file.stat().st_size for file in sorted(args.out.iterdir())}
    screen.show(
        make_table(
            f"{args.model} -> {args.out}",
            ("", ""),
            [
                ("weights before", f"{found.bytes_before / 1e6:.2f} MB"),
                ("weights packed", f"{found.bytes_after / 1e6:.2f} MB"),
                ("smaller", f"{found.bytes_before / max(found.bytes_after, 1):.1f} x"),
                ("reading and packing", f"{loaded.seconds:.1f} s"),
                ("writing", f"{seconds:.1f} s"),
            ],
        )
    )
    for row in found.left:
        screen.note(f"left as it was: {row.name} x{row.count}, {row.what}: {row.reason}")
    screen.result(
        {
            "model": args.model,
            "out": str(args.out),
            "bytes_before": found.bytes_before,
            "bytes_after": found.bytes_after,
            "pack_seconds": loaded.seconds,
            "save_seconds": seconds,
            "files": sizes,
            "left": [row.name for row in found.left],
        }
    )
    return OK


def _budget(args: argparse.Namespace) -> dict[str, Any] | None:
    """The arguments of `optimize` that are about a budget; None where none was given."""
    if args.max_kl is None:
        if args.texts is not None or args.measurements is not None:
            raise UserError("quantize: --texts and --measurements are for --max-kl", USAGE)
        return None
    texts = None if args.texts is None else models.read_texts("--texts", args.texts)
    return {"max_kl": args.max_kl, "texts": texts, "measurements": args.measurements}


def _check_out(args: argparse.Namespace) -> None:
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out}: expected a folder to write, it is a file")
    if args.out.is_dir() and any(args.out.iterdir()) and not args.force:
        raise UserError(f"{args.out}: the folder has files; --force writes into it all the same")
    if args.out.is_dir() and Path(args.model).is_dir() and args.out.samefile(args.model):
        raise UserError(f"{args.out}: expected another folder than the model's")
