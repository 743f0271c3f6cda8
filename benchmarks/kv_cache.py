"""Times a decode step's attention over the caches of the decoder_layers op: bf16 and int8.

Layers with next to no weights, one call over so many of them that their keys and values are larger
than the CPU's caches. What the layers take over a single key is subtracted: the rest of a layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.cache_utils import DynamicLayer

import torch_slmops
from benchmarks.machine import fp32_peak, interleaved_with_limits
from torch_slmops import ops
from torch_slmops.bench.shapes import MODELS, ModelShape
from torch_slmops.cache import adopt
from torch_slmops.packed_rows import interleave
from torch_slmops.weights import quantize_weight

LENGTHS = (512, 4096, 8192)
WIDTH = 64  # of the hidden state
BYTES = 256 << 20  # of all bf16 keys and values of a call


def layer_weights(shape: ModelShape) -> list[Tensor]:
    """The tensors of a layer with the heads of `shape` and little else."""
    width, rows = shape.heads * shape.head_dim, shape.heads + 2 * shape.kv_heads

    def packed(n: int, k: int) -> Tensor:
        return quantize_weight(torch.randn(n, k) * 0.05, 4).pack()

    parts = {
        "qkv": packed(rows * shape.head_dim, WIDTH),
        "output": packed(WIDTH, width),
        "gate_up": interleave(quantize_weight(torch.randn(2 * WIDTH, WIDTH) * 0.05, 4)).pack(),
        "down": packed(WIDTH, WIDTH),
    }
    return [parts.get(name, torch.empty(0)) for name in ops.LAYER_PARTS]


def caches(shape: ModelShape, keys: int, layers: int) -> dict[str, list[Tensor]]:
    """The tensors of all layers, with room for a key more, where `torch_slmops.Cache` has them."""
    slots = keys + 16
    states = torch.randn(1, shape.kv_heads, slots, shape.head_dim).bfloat16()
    found: dict[str, list[Tensor]] = {"bf16": [], "int8": []}
    for _ in range(layers):
        floats, int8 = (
            adopt(DynamicLayer(), dtype)  # type: ignore[no-untyped-call]
            for dtype in (None, "int8")
        )
        keys_and_values = floats.reserve(states, states, blocked=True)[:2]
        keys_and_values[0][:, :, : slots // 16] = states.view(
            1, shape.kv_heads, -1, 16, shape.head_dim
        ).mT
        keys_and_values[1][:, :, :slots] = states
        int8.update(states, states)
        found["bf16"] += keys_and_values
        found["int8"] += int8.reserve_int8(states[:, :, :0], states[:, :, :0])[0]
    return found


def step(
    shape: ModelShape, weights: list[Tensor], cache: list[Tensor], keys: int, layers: int
) -> Callable[[int], Tensor]:
    """A decode step of all layers over `keys` keys, its own included."""
    source = torch.Generator().manual_seed(1)
    x = torch.randn(1, 1, WIDTH, generator=source).bfloat16()
    cos, sin = torch.randn(2, 1, 1, shape.head_dim, generator=source)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    start, scale = torch.tensor(keys - 1), shape.head_dim**-0.5
    inputs = (x, weights * layers, cache, start, cos, sin, None, None, heads, shape.head_dim)
    options = (WIDTH, "silu", 1e-5, 0.0, True, 0.0, 0.0, False, scale)
    return lambda i: ops.decoder_layers(*inputs, *options)


def check(floats: Tensor, int8: Tensor) -> None:
    """Refuses to time what is wrong: of two layers, a few roundings of a percent of the values."""
    if not bool((floats - int8).abs().amax() <= 0.05 * floats.abs().amax()):
        raise RuntimeError("decoder_layers: output on an int8 cache is wrong; not timed")


def run(output: Path, *, budget: float, threads: int) -> None:
    """Prints a table for one model's heads; appends JSON lines to `output`."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    shape = MODELS["llama-3.2-1b"]
    buffer = torch.zeros(256 << 20, dtype=torch.uint8)
    weights = layer_weights(shape)
    title = f"attention of a decode step of {shape.name} from the cache, {torch_slmops.isa()}"
    table = Table(title=title)
    for column in ("keys", "kept as", "us a layer", "GB/s", "limit us", "x limit"):
        table.add_column(column, justify="right")
    for keys in LENGTHS:
        elements = 2 * keys * shape.kv_heads * shape.head_dim
        layers = BYTES // (2 * elements)
        kept = caches(shape, keys, layers)
        calls = {
            f"{kind}{'' if count == keys else ' rest'}": step(shape, weights, cache, count, layers)
            for kind, cache in kept.items()
            for count in (1, keys)
        }
        check(
            *(step(shape, weights, kept[k][:n], keys, 2)(0) for k, n in (("bf16", 4), ("int8", 8)))
        )
        peak = fp32_peak(threads)
        timings, limits = interleaved_with_limits(calls, buffer, budget=budget)
        bandwidth, peak = limits.bandwidth, max(peak, fp32_peak(threads))
        work = 2 * keys * shape.heads * shape.head_dim
        for kind in kept:
            rest = timings[f"{kind} rest"].median
            us = (timings[kind].median - rest) / layers * 1e6
            per_head = 2 * shape.head_dim if kind == "bf16" else shape.head_dim + 4
            size = 2 * keys * shape.kv_heads * per_head
            limit = size / bandwidth if kind == "int8" else max(size / bandwidth, work / peak)
            cells = (keys, kind, f"{us:.0f}", f"{size / us / 1e3:.1f}", f"{limit * 1e6:.0f}")
            table.add_row(*map(str, cells), f"{us / limit / 1e6:.2f}")
            record = {"op": "kv_cache", "kind": kind, "keys": keys, "us": us, "bytes": size}
            record |= {"rest_us": rest / layers * 1e6, "multiply_adds": work, "fma_peak": peak}
            record |= {"bandwidth": bandwidth, "isa": torch_slmops.isa(), "threads": threads}
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
    Console(width=110).print(table)
