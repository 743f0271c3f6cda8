"""tune: measures what is fastest on this machine, and keeps it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from torch_slmops.cli.screen import FAILED, OK, Screen, UserError, make_table

__all__ = ["add"]


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "tune",
        parents=[common],
        help="measure what is fastest on this machine, and keep it (half a minute)",
        description="Measures how many threads are best for decoding and for the prefill, and when "
        'activations "float_fast" go through torch; later processes use it. Results of "int8" and '
        '"float" stay the same bits.',
    )
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="about how long to measure (default 20)"
    )
    parser.add_argument("--dry-run", action="store_true", help="measure and show, keep nothing")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, screen: Screen) -> int:
    from torch_slmops.tune import tune

    try:
        found = tune(seconds=args.seconds, keep=not args.dry_run, progress=not screen.as_json)
    except OSError as error:
        raise UserError(f"tune: the settings cannot be kept: {error}", FAILED) from error
    rows = [
        (m.what, m.choice, f"{m.microseconds:.0f}", "used" if m.chosen else "")
        for m in found.measured
    ]
    screen.show(make_table("tune", ("what", "choice", "us", ""), rows))
    kept = "not kept" if found.path is None else f"kept in {found.path}"
    screen.show(f"{kept}; {found.seconds:.0f} s")
    screen.result(asdict(found) | {"path": None if found.path is None else str(found.path)})
    return OK
