"""Times attention against torch's scaled_dot_product_attention, beside the machine's limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import torch_slmops
from benchmarks import kv_cache
from benchmarks.machine import fp32_peak, interleaved_with_limits
from torch_slmops import ops
from torch_slmops.bench.shapes import MODELS, ModelShape

# Queries and keys: a prompt, a short and a long context, what a verify pass has.
CASES = {"prefill": (2048, 2048), "decode": (1, 8192), "decode 512": (1, 512), "verify": (8, 8192)}


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.attention(q, k, v, None, None, True, 0, q.shape[3] ** -0.5)


def theirs(mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA on [B, H, L, D] views, in the form that transformers gives it."""
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    if q.shape[1] == 1:  # the query heads of a key head as its queries
        packed = query.reshape(q.shape[0], key.shape[1], -1, q.shape[3])
        return scaled_dot_product_attention(packed, key, value).reshape(query.shape)
    causal = mask is None and q.shape[1] == k.shape[1]
    return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=True)


def as_int8(x: Tensor, values: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of keys or values [B, L, H, D]."""
    shape = (x.shape[0], x.shape[2], *ops.int8_shape(x.shape[1], x.shape[3], values))
    codes = torch.empty(shape, dtype=torch.uint8)
    scale = torch.empty(x.shape[0], x.shape[2], x.shape[1])
    ops.store_int8_(x, codes, scale, 0, values)
    return codes, scale


def multiply_adds(shape: ModelShape, queries: int, keys: int) -> int:
    """Of both products over the keys that causal queries see."""
    seen = queries * (keys - queries) + queries * (queries + 1) // 2
    return 2 * seen * shape.heads * shape.head_dim


def candidates(shape: ModelShape, queries: int, keys: int) -> dict[str, Callable[[int], Tensor]]:
    """Calls on copies of k and v, together larger than the caches, of which each takes the next."""
    size = 2 * 2 * keys * shape.kv_heads * shape.head_dim
    copies = 1 if queries > 8 else max(2, (256 << 20) // size)
    q = torch.randn(1, queries, shape.heads, shape.head_dim).bfloat16()
    # As a transformers cache has it: [B, H, L, D].
    kv = torch.randn(copies, 2, 1, shape.kv_heads, keys, shape.head_dim).bfloat16()
    mask = None
    if 1 < queries < keys:
        mask = torch.arange(keys - queries, keys)[:, None] >= torch.arange(keys)

    def on(call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[int], Tensor]:
        return lambda i: call(q, *kv[i % copies].transpose(2, 3))

    pairs = [[as_int8(x.transpose(1, 2), i == 1) for i, x in enumerate(pair)] for pair in kv]

    def on_int8(i: int) -> Tensor:
        (k, k_scale), (v, v_scale) = pairs[i % copies]
        options = (True, 0, shape.head_dim**-0.5, 0.0, k_scale, v_scale)
        return ops.attention(q, k, v, None, None, *options)

    found = {"ours": on(ours), "int8": on_int8, "torch": on(partial(theirs, mask))}
    right = found["torch"](0).transpose(1, 2).float()
    # bf16 roundings of p and of the result in torch's kernels: 2^-8 of the largest |v| each.
    for name, most in (("ours", 3 * 2.0**-8), ("int8", 6 * 2.0**-8)):
        if not bool(((found[name](0).float() - right).abs() <= most * right.abs().amax()).all()):
            raise RuntimeError(f"attention, {name}: output is wrong; not timed")
    return found


def run(output: Path, *, budget: float, threads: int) -> None:
    """Prints a table for one model's heads; appends JSON lines to `output`."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    shape = MODELS["llama-3.2-1b"]
    buffer = torch.zeros(256 << 20, dtype=torch.uint8)
    table = Table(title=f"attention of {shape.name}, bf16, {torch_slmops.isa()}")
    columns = ("case", "us", "torch us", "x", "GFMA/s", "of peak", "limit us", "x limit")
    for column in (*columns, "int8 us", "x"):
        table.add_column(column, justify="right")
    for name, (queries, keys) in CASES.items():
        calls = candidates(shape, queries, keys)
        peak = fp32_peak(threads)
        timings, limits = interleaved_with_limits(calls, buffer, budget=budget)
        bandwidth, peak = limits.bandwidth, max(peak, fp32_peak(threads))
        us = {key: timing.median * 1e6 for key, timing in timings.items()}
        work = multiply_adds(shape, queries, keys)
        size = 2 * 2 * keys * shape.kv_heads * shape.head_dim
        limit = max(size / bandwidth, work / peak) * 1e6
        table.add_row(
            name,
            f"{us['ours']:.0f}",
            f"{us['torch']:.0f}",
            f"{us['torch'] / us['ours']:.2f}",
            f"{work / us['ours'] / 1e3:.1f}",
            f"{work / us['ours'] * 1e6 / peak:.0%}",
            f"{limit:.0f}",
            f"{us['ours'] / limit:.2f}",
            f"{us['int8']:.0f}",
            f"{us['torch'] / us['int8']:.2f}",
        )
        record = {"op": "attention", "case": name, "queries": queries, "keys": keys, "us": us}
        record |= {"multiply_adds": work, "bandwidth": bandwidth, "fma_peak": peak}
        record |= {"isa": torch_slmops.isa(), "threads": threads}
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a") as lines:
            lines.write(json.dumps(record) + "\n")
    Console(width=110).print(table)
    kv_cache.run(output, budget=budget, threads=threads)
