"""Times whole models in several engines, interleaved: `run`, or `python -m benchmarks engines`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import torch_slmops
from benchmarks.engines.registry import BY_NAME, ENGINES
from benchmarks.engines.results import tables
from benchmarks.engines.session import Case, Session
from torch_slmops.bench.shapes import ModelShape
from torch_slmops.machine import cpu_name

__all__ = ["BY_NAME", "LONG", "SHORT", "USUAL", "Case", "Session", "run", "write"]

SHORT = (Case(512, 0), Case(8, 64))
LONG = (
    *SHORT,
    Case(128, 0),
    Case(2048, 0),
    Case(4096, 0),
    Case(4096, 32),
    Case(128, 0, batch=4),
    Case(8, 64, batch=4),
    Case(8, 64, batch=16),
)
# Compiling takes minutes.
USUAL = tuple(engine.name for engine in ENGINES if engine.options.get("kind") != "compiled")


def write(records: Iterable[dict[str, Any]], output: Path) -> None:
    """Appends JSON lines."""
    environment = {"cpu": cpu_name(), "isa": torch_slmops.isa(), "time": time.time()}
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a") as lines:
        lines.writelines(json.dumps(record | environment) + "\n" for record in records)


def run(
    shapes: Sequence[ModelShape],
    output: Path,
    *,
    cases: Sequence[Case] = SHORT,
    engines: Sequence[str] = USUAL,
    rounds: int = 3,
    threads: int = 2,
    build: Path = Path("build"),
    show: Callable[..., object] | None = None,
) -> list[dict[str, Any]]:
    """Prints tables for each model; appends JSON lines to `output`.

    Args:
        shapes: The models.
        output: JSON-lines file.
        cases: What is timed.
        engines: Names of engines; what has not been set up (setup.sh) is left out and named.
        rounds: How often.
        threads: Of every engine.
        build: Folder with the environments of engines, and models, which are written if missing.
        show: Prints text and rich's tables; None prints to stdout.

    Returns:
        The records of all measurements.
    """
    show, everything = show or Console(width=110).print, []
    for shape in shapes:
        chosen = [BY_NAME[name] for name in engines]
        with Session(shape, chosen, build, threads) as session:
            if session.missing:
                show(f"not set up: {', '.join(session.missing)}")
            session.prepare()
            session.load()
            session.warm(cases)
            records = [r for i in range(1, rounds + 1) for r in session.round(cases, i)]
            loads = [{"model": shape.name, "load": True, **load} for load in session.loads]
            for name, why in session.wrong.items():
                show(f"{name} not timed: {why}")
        write([*loads, *records], output)
        for table in tables(records, session.loads):
            show(table)
        everything += records
    return everything
