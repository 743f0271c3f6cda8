"""Times `linear` against the limits of the machine and torch kernels, at shapes of real models."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import torch_slmops
from benchmarks.machine import Limits, interleaved_with_limits
from torch_slmops import memory
from torch_slmops.bench.linear import ROTATED_BYTES, Candidate, dense, ours, rotated
from torch_slmops.bench.shapes import LINEARS, ROWS, LinearShape
from torch_slmops.bench.timing import Timing


@dataclass(frozen=True)
class Cell:
    """One measurement, as it is written to the results file."""

    n: int
    k: int
    rows: int
    kernel: str
    us: float
    best_us: float
    calls: int
    gops: float
    limits: Limits
    bytes: int | None = None
    x_limit: float | None = None
    of_peak: float | None = None
    environment: dict[str, str | int] = field(default_factory=dict)


def peers(weight: Tensor) -> dict[str, Candidate]:
    """torch's own kernels on copies of a weight of that shape."""
    n, k = weight.shape
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    int4 = rotated(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
    scales = torch.rand(k // 128, n, 2).bfloat16()
    int8 = rotated(torch.randint(-127, 128, (n, k), dtype=torch.int8))

    def int4pack(x: Tensor, index: int) -> object:
        packed = int4[index % len(int4)]
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 128, scales)

    def int_mm(x: Tensor, index: int) -> object:
        return torch._int_mm(x.to(torch.int8), int8[index % len(int8)].t())

    return {
        "torch bf16": dense(weight),
        "torch int4pack g128": Candidate(int4pack),
        "torch _int_mm": Candidate(int_mm, most_rows=64),
    }


def measure(
    shape: LinearShape, rows: int, candidates: dict[str, Candidate], buffer: Tensor, budget: float
) -> list[Cell]:
    """Times all candidates that are for so many rows; the machine's limits take turns with them."""
    x = torch.randn(rows, shape.in_features).bfloat16()
    fitting = {name: c for name, c in candidates.items() if rows <= c.most_rows}
    calls = {name: partial(c.call, x) for name, c in fitting.items()}
    timings, limits = interleaved_with_limits(calls, buffer, budget=budget)
    return [_cell(shape, rows, name, c, timings[name], limits) for name, c in fitting.items()]


def _cell(
    shape: LinearShape, rows: int, name: str, candidate: Candidate, timing: Timing, limits: Limits
) -> Cell:
    n, k = shape.out_features, shape.in_features
    operations = 2 * rows * n * k
    x_limit = of_peak = None
    if candidate.bytes is not None:
        seconds = max(candidate.bytes / limits.bandwidth, operations / limits.int8_peak)
        x_limit = timing.median / seconds
        of_peak = operations / timing.median / limits.int8_peak
    return Cell(
        n=n,
        k=k,
        rows=rows,
        kernel=name,
        us=timing.median * 1e6,
        best_us=timing.best * 1e6,
        calls=len(timing.samples),
        gops=operations / timing.median / 1e9,
        limits=limits,
        bytes=candidate.bytes,
        x_limit=x_limit,
        of_peak=of_peak,
        environment={"isa": torch_slmops.isa(), "threads": torch.get_num_threads()},
    )


def table_of(shape: LinearShape, cells: list[Cell]) -> Table:
    """The measurements of a shape; `x limit` is the time over that of the nearer machine limit."""
    title = f"{shape.out_features} x {shape.in_features} ({shape.role}), {torch_slmops.isa()}"
    table = Table(title=title)
    for column in ("rows", "kernel", "us", "best us", "GB/s", "GOPS", "of peak", "x limit"):
        table.add_column(column, justify="right")
    for i, cell in enumerate(cells):
        row = [str(cell.rows), cell.kernel, f"{cell.us:.0f}", f"{cell.best_us:.0f}"]
        if cell.bytes is None or cell.x_limit is None or cell.of_peak is None:
            row += ["", f"{cell.gops:.0f}", "", ""]
        else:
            row += [f"{cell.bytes / cell.us / 1e3:.1f}", f"{cell.gops:.0f}"]
            row += [f"{cell.of_peak:.0%}", f"{cell.x_limit:.2f}"]
        table.add_row(*row, end_section=i + 1 == len(cells) or cells[i + 1].rows != cell.rows)
    table.caption = "; ".join(str(cell.limits) for cell in cells[:: max(1, len(cells) // 2)])
    return table


def run(output: Path, *, budget: float, threads: int, full: bool) -> None:
    """Times every shape and row count; prints tables and appends JSON lines to `output`.

    Args:
        output: JSON-lines file.
        budget: Seconds per (shape, rows) cell.
        threads: torch threads.
        full: Also the lm_head shape, which takes some minutes.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    buffer = memory.empty(ROTATED_BYTES).zero_()
    for shape in LINEARS if full else LINEARS[:3]:
        weight = torch.randn(shape.out_features, shape.in_features) / shape.in_features**0.5
        candidates = ours(weight) | peers(weight)
        cells = []
        for rows in ROWS:
            cells += measure(shape, rows, candidates, buffer, budget)
        with output.open("a") as lines:
            lines.writelines(json.dumps(asdict(cell)) + "\n" for cell in cells)
        Console(width=110).print(table_of(shape, cells))
