"""Times `linear` of few rows by how far ahead it asks memory for weights (`torch_slmops.tune`)."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import interleaved_with_limits
from torch_slmops import memory, tuning
from torch_slmops.bench.linear import ROTATED_BYTES, Candidate, ours
from torch_slmops.bench.shapes import LINEARS

ROWS = (1, 2, 4, 8)
AHEAD = (0, 2048, 4096, 8192, 16384)


def _ahead(candidate: Candidate, bytes_ahead: int, x: Tensor, index: int) -> object:
    torch.ops.slmops._set_read_ahead(bytes_ahead)
    return candidate.call(x, index)


def run(output: Path, *, budget: float, threads: int) -> None:
    """Prints GB/s of weights for each format, number of rows and bytes ahead.

    Args:
        output: JSON-lines file to append to.
        budget: Seconds per row of the table.
        threads: torch threads.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    buffer = memory.empty(ROTATED_BYTES).zero_()
    shape = LINEARS[1]
    weight = torch.randn(shape.out_features, shape.in_features) / shape.in_features**0.5
    table = Table(title=f"GB/s by bytes ahead, {shape.out_features} x {shape.in_features}")
    for column in ("weights", "rows", *map(str, AHEAD), "machine"):
        table.add_column(column, justify="right")
    try:
        for name, candidate in ours(weight).items():
            assert candidate.bytes is not None
            for rows in ROWS:
                x = torch.randn(rows, shape.in_features).bfloat16()
                calls = {str(n): partial(_ahead, candidate, n, x) for n in AHEAD}
                times, limits = interleaved_with_limits(calls, buffer, budget=budget)
                found = {n: candidate.bytes / time.median / 1e9 for n, time in times.items()}
                cells = [f"{value:.1f}" for value in found.values()]
                table.add_row(name, str(rows), *cells, f"{limits.bandwidth / 1e9:.1f}")
                with output.open("a") as lines:
                    row = {"read_ahead": name, "rows": rows, "threads": threads, "gb_s": found}
                    row["bandwidth"] = limits.bandwidth / 1e9
                    lines.write(json.dumps(row) + "\n")
    finally:
        tuning.start()
    Console(width=100).print(table)
