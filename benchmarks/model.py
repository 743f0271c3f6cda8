"""Times prefill and decode of a real-size model before and after `optimize`, interleaved."""

from __future__ import annotations

import copy
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import torch_slmops
from benchmarks.machine import probe
from torch_slmops import memory
from torch_slmops.bench.model import PROMPT, measure, random_llama
from torch_slmops.bench.shapes import ModelShape
from torch_slmops.machine import cpu_name

ROUNDS = 3


def run(shape: ModelShape, output: Path, *, threads: int) -> None:
    """Prints rates of the float, int8 and int4 model; appends JSON lines to `output`."""
    torch.set_num_threads(threads)
    base = random_llama(shape)
    models = {"bf16 eager": base}
    seconds: dict[str, float] = {"bf16 eager": 0.0}
    for name, options in (
        ("int8", {"weights": "int8"}),
        ("int4", {"weights": "int4"}),
        ("int4, int4 head", {"weights": "int4", "lm_head": "int4"}),
    ):
        clone = copy.deepcopy(base)
        start = time.perf_counter()
        models[name] = torch_slmops.optimize(clone, **options)
        seconds[name] = time.perf_counter() - start
    prompt = torch.randint(3, shape.vocab, (1, PROMPT))
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            results[name].append(measure(model, prompt))
    limits = probe(memory.empty(512 << 20).zero_())
    table = Table(title=f"{shape.name}, random weights, {cpu_name()}, {torch_slmops.isa()}")
    for column in ("model", "optimize s", f"prefill {PROMPT} tok/s", "decode tok/s"):
        table.add_column(column, justify="right")
    table.add_column("prefill x", justify="right")
    table.add_column("decode x", justify="right")
    base_rates = [statistics.median(values) for values in zip(*results["bf16 eager"], strict=True)]
    for name, pairs in results.items():
        prefill, decode = (statistics.median(values) for values in zip(*pairs, strict=True))
        cells = [name, f"{seconds[name]:.1f}", f"{prefill:.1f}", f"{decode:.2f}"]
        table.add_row(*cells, f"{prefill / base_rates[0]:.2f}", f"{decode / base_rates[1]:.2f}")
        record = {"model": shape.name, "variant": name, "prefill": prefill, "decode": decode}
        record |= {"optimize_s": seconds[name], "limits": asdict(limits)}
        record |= {"isa": torch_slmops.isa(), "threads": threads}
        with output.open("a") as lines:
            lines.write(json.dumps(record) + "\n")
    table.caption = str(limits)
    Console(width=110).print(table)
