"""report: what of a model is packed and fused, what is not, and why."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from torch_slmops.cli import models
from torch_slmops.cli.screen import OK, Screen, make_table

__all__ = ["add", "show_report"]


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "report",
        parents=[common],
        help="what of a model is packed and fused, what is left, and why",
        description="Loads and optimizes a model, and shows what that did. Writes nothing.",
    )
    models.add_model_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, screen: Screen) -> int:
    from torch_slmops.report import report

    loaded = models.load(args, screen, wants_tokenizer=False)
    found = report(loaded.model)
    show_report(found, screen)
    screen.result(asdict(found) | {"bit_portable": found.bit_portable})
    return OK


def show_report(found: Any, screen: Screen) -> None:
    """Prints a `torch_slmops.Report` as tables."""
    packed = [
        (row.name, row.count, row.was, row.now, _mb(row.bytes_before), _mb(row.bytes_after))
        for row in found.packed
    ]
    screen.show(make_table("packed", ("layers", "", "was", "now", "MB before", "MB after"), packed))
    left = [(row.name, row.count, row.what, row.reason, _mb(row.bytes)) for row in found.left]
    if left:
        screen.show(make_table("left as it was", ("layers", "", "what", "why", "MB"), left))
    fused = [(row.name, row.count, row.what, row.now) for row in found.fused]
    if fused:
        screen.show(make_table("fused blocks", ("blocks", "", "class", "now"), fused))
    unfused = [(row.name, row.count, row.what, row.reason) for row in found.unfused]
    if unfused:
        screen.show(make_table("blocks not fused", ("blocks", "", "class", "why"), unfused))
    smaller = found.bytes_before / max(found.bytes_after, 1)
    before, after = _mb(found.bytes_before), _mb(found.bytes_after)
    screen.show(f"all weights and buffers: {before} MB -> {after} MB ({smaller:.1f} x smaller)")
    screen.show(_portable(found))


def _portable(found: Any) -> str:
    if found.bit_portable:
        return "same bits on every CPU: yes"
    others = ", ".join(f"{name} x{count}" for name, count in found.not_portable)
    return f"same bits on every CPU: the packed layers; torch computes in {others}"


def _mb(size: int) -> str:
    return f"{size / 1e6:.2f}"
