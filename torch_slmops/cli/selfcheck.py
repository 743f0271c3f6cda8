"""selfcheck: whether this CPU gives the bits that every CPU must give."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from torch_slmops.cli.screen import FAILED, OK, Screen, make_table

__all__ = ["add"]

_SHOWN = 5  # differences of one op that are printed


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "selfcheck",
        parents=[common],
        help="compare every op with its definition on this CPU, and with what other CPUs gave",
        description="Runs every op on every ISA row of this CPU with several numbers of threads, "
        "compares the bits with the definition in torch_slmops.reference, and both with published "
        "digests. --isa runs one row alone, --threads one number of threads.",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, screen: Screen) -> int:
    from torch_slmops.isa import isas
    from torch_slmops.selfcheck import default_threads, expected, selfcheck, steps

    rows = isas() if args.isa is None else [args.isa]
    threads = default_threads() if args.threads is None else (args.threads,)
    with screen.progress(steps(rows, threads), "selfcheck") as advance:
        found = selfcheck(rows, threads, advance)
    table = make_table(
        f"selfcheck: rows {', '.join(found.rows)}; threads {', '.join(map(str, found.threads))}",
        ("op", "calls", "against the definition", "against other CPUs"),
        [
            (
                op.op,
                op.cases,
                "same bits" if not op.wrong else f"{len(op.wrong)} DIFFER",
                "same bits" if op.digest == op.published else "DIFFERS",
            )
            for op in found.ops
        ],
    )
    screen.show(table)
    for op in found.ops:
        for place in op.wrong[:_SHOWN]:
            screen.show(f"{op.op}: {place} differs")
    screen.show(f"vectors {_verdict(found.vectors, expected.VECTORS)}")
    logits = dict.fromkeys(found.logits.values())
    for digest in logits:
        screen.show(f"logits  {_verdict(digest, expected.LOGITS)}")
    for how in found.wrong_logits[:_SHOWN]:
        screen.show(f"logits: {how} differs")
    screen.show(f"{'passed' if found.passed else 'FAILED'} in {found.seconds:.1f} s")
    screen.result(
        asdict(found)
        | {"passed": found.passed, "published_vectors": expected.VECTORS}
        | {"published_logits": expected.LOGITS}
    )
    return OK if found.passed else FAILED


def _verdict(digest: str, published: str) -> str:
    return f"{digest} {'as published' if digest == published else f'DIFFERS from {published}'}"
