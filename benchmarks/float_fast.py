"""Times `linear` with activations "float_fast" beside "float", "int8" and torch's bfloat16."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import torch_slmops
from benchmarks.machine import probe
from torch_slmops import memory
from torch_slmops.bench.linear import KERNELS, ROTATED_BYTES, Kernel, dense, rotated
from torch_slmops.bench.shapes import LINEARS, ROWS, LinearShape
from torch_slmops.bench.timing import Timing, interleaved
from torch_slmops.weights import QuantizedWeight

MODES = ("float", "float_fast", "int8")


def check(packed: dict[str, Tensor], n: int, k: int) -> None:
    """Refuses to time what is wrong: the error of "float_fast" is that of bfloat16."""
    x = torch.randn(8, k)
    fast, slow = (torch.ops.slmops.linear(x, packed[mode], n) for mode in ("float_fast", "float"))
    error = float((fast - slow).square().mean().sqrt() / slow.square().mean().sqrt())
    if not 0 <= error <= 2.0**-8:
        raise RuntimeError(f"float_fast is off by {error:.3g} of the result; not timed")


def measure(
    shape: LinearShape, quantized: QuantizedWeight, kernel: Kernel, weight: Tensor, budget: float
) -> dict[int, dict[str, Timing]]:
    """Times of all modes, by rows."""

    def clone(packed: Tensor) -> Tensor:
        return memory.empty(packed.numel()).copy_(packed)

    packed = {mode: quantized.pack(kernel.act_group, mode) for mode in MODES}
    check(packed, shape.out_features, shape.in_features)
    copies = {mode: rotated(p, clone, ROTATED_BYTES // 2) for mode, p in packed.items()}
    bf16 = dense(weight, ROTATED_BYTES // 2)

    def call(mode: str, x: Tensor, i: int) -> object:
        own = copies[mode]
        return torch.ops.slmops.linear(x, own[i % len(own)], shape.out_features)

    times = {}
    for rows in ROWS:
        x = torch.randn(rows, shape.in_features).bfloat16()
        calls = {mode: partial(call, mode, x) for mode in MODES}
        times[rows] = interleaved(calls | {"torch bf16": partial(bf16.call, x)}, budget=budget)
    return times


def run(output: Path, *, budget: float, threads: int) -> None:
    """Times all formats at two shapes; prints tables and appends JSON lines to `output`.

    Args:
        output: JSON-lines file.
        budget: Seconds per (format, rows) cell.
        threads: torch threads.
    """
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    buffer = memory.empty(ROTATED_BYTES).zero_()
    for shape in LINEARS[:2]:
        weight = torch.randn(shape.out_features, shape.in_features) / shape.in_features**0.5
        for kernel in KERNELS:
            before = probe(buffer)
            quantized = torch_slmops.quantize_weight(
                weight, kernel.bits, kernel.scale_kind, kernel.group_size
            )
            times = measure(shape, quantized, kernel, weight, budget)
            limits = before.best(probe(buffer))
            name = f"{shape.out_features} x {shape.in_features}, {kernel.name}"
            Console(width=110).print(_table(f"{name}; {torch_slmops.isa()}, {limits}", times))
            with output.open("a") as lines:
                for rows, found in times.items():
                    us = {mode: timing.median * 1e6 for mode, timing in found.items()}
                    lines.write(json.dumps({"float_fast": name, "rows": rows, "us": us}) + "\n")


def _table(title: str, times: dict[int, dict[str, Timing]]) -> Table:
    table = Table(title=title)
    for column in ("rows", *(f"{mode} us" for mode in (*MODES, "torch bf16")), "float / fast"):
        table.add_column(column, justify="right")
    for rows, found in times.items():
        cells = [f"{timing.median * 1e6:.0f}" for timing in found.values()]
        ratio = found["float"].median / found["float_fast"].median
        table.add_row(str(rows), *cells, f"{ratio:.2f}")
    return table
