"""Times qkv_rotary and swiglu against their own linear layers and the bytes that they read."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import torch_slmops
from benchmarks.machine import interleaved_with_limits
from torch_slmops import memory, ops, reference
from torch_slmops.bench.linear import ROTATED_BYTES, rotated
from torch_slmops.bench.shapes import MODELS, ModelShape
from torch_slmops.packed_rows import interleave

ROWS = (1, 4, 512)


class Block:
    """The packed projections of one attention and MLP of a model, 512 MB of copies."""

    def __init__(self, shape: ModelShape, bits: int) -> None:
        self.heads = [shape.heads, shape.kv_heads, shape.kv_heads]
        self.head_dim, self.hidden, self.width = shape.head_dim, shape.intermediate, shape.hidden

        def quantized(n: int, k: int) -> torch_slmops.QuantizedWeight:
            return torch_slmops.quantize_weight(torch.randn(n, k) / k**0.5, bits)

        def clone(packed: Tensor) -> Tensor:
            return memory.empty(packed.numel()).copy_(packed)

        k = shape.hidden
        gate_up = interleave(quantized(2 * shape.intermediate, k)).pack()
        self.qkv = rotated(quantized(sum(self.heads) * self.head_dim, k).pack(), clone)
        self.gate_up = rotated(gate_up, clone)
        self.down = rotated(quantized(k, shape.intermediate).pack(), clone)
        self.bytes = {
            "qkv_rotary": self.qkv[0].numel(),
            "swiglu": gate_up.numel() + self.down[0].numel(),
        }

    def qkv_rotary(self, x: Tensor, cos: Tensor, sin: Tensor, i: int) -> tuple[Tensor, ...]:
        packed = self.qkv[i % len(self.qkv)]
        none = (None, None, None, 0.0, 0.0)
        return ops.qkv_rotary(x, packed, self.heads, self.head_dim, *none, cos, sin, False)

    def qkv_linear(self, x: Tensor, i: int) -> Tensor:
        return ops.linear(x, self.qkv[i % len(self.qkv)], sum(self.heads) * self.head_dim)

    def swiglu(self, x: Tensor, i: int) -> Tensor:
        gate_up, down = self.gate_up[i % len(self.gate_up)], self.down[i % len(self.down)]
        return ops.swiglu(x, gate_up, down, self.hidden, self.width, "silu")

    def mlp_linears(self, x: Tensor, h: Tensor, i: int) -> Tensor:
        ops.linear(x, self.gate_up[i % len(self.gate_up)], 2 * self.hidden)
        return ops.linear(h, self.down[i % len(self.down)], self.width)

    def check(self) -> None:
        """Refuses to time what is wrong: a row against the reference, bit for bit."""
        x = torch.randn(1, 1, self.width).bfloat16()
        cos, sin = torch.randn(2, 1, 1, self.head_dim)
        none = (None, None, None, 0.0, 0.0)
        qkv = (x, self.qkv[0], self.heads, self.head_dim, *none, cos, sin, False)
        mlp = (x, self.gate_up[0], self.down[0], self.hidden, self.width, "silu")
        same = [
            torch.equal(a, b)
            for a, b in zip(ops.qkv_rotary(*qkv), reference.qkv_rotary(*qkv), strict=True)
        ]
        if not all(same) or not torch.equal(ops.swiglu(*mlp), reference.swiglu(*mlp)):
            raise RuntimeError("a fused op differs from its reference; not timed")


def run(output: Path, *, budget: float, threads: int) -> None:
    """Prints a table for one model's sizes; appends JSON lines to `output`."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    shape = MODELS["llama-3.2-1b"]
    buffer = memory.empty(ROTATED_BYTES).zero_()
    table = Table(title=f"fused ops of {shape.name}, bf16, {torch_slmops.isa()}")
    for column in ("weights", "rows", "op", "us", "its linears us", "x linears", "us of its bytes"):
        table.add_column(column, justify="right")
    for bits in (4, 8):
        block = Block(shape, bits)
        block.check()
        for rows in ROWS:
            x = torch.randn(1, rows, shape.hidden).bfloat16()
            h = torch.randn(1, rows, shape.intermediate).bfloat16()
            cos, sin = torch.randn(2, 1, rows, shape.head_dim)
            timings, limits = interleaved_with_limits(
                {
                    "qkv_rotary": partial(block.qkv_rotary, x, cos, sin),
                    "qkv linear": partial(block.qkv_linear, x),
                    "swiglu": partial(block.swiglu, x),
                    "mlp linears": partial(block.mlp_linears, x, h),
                },
                buffer,
                budget=budget,
            )
            for name, linears in (("qkv_rotary", "qkv linear"), ("swiglu", "mlp linears")):
                us, own = (timings[key].median * 1e6 for key in (name, linears))
                least = block.bytes[name] / limits.bandwidth * 1e6
                table.add_row(
                    f"int{bits}",
                    str(rows),
                    name,
                    f"{us:.0f}",
                    f"{own:.0f}",
                    f"{us / own:.3f}",
                    f"{least:.0f}",
                    end_section=name == "swiglu",
                )
                record = {"op": name, "bits": bits, "rows": rows, "us": us, "linears_us": own}
                record |= {"bytes_us": least, "isa": torch_slmops.isa(), "threads": threads}
                output.parent.mkdir(parents=True, exist_ok=True)
                with output.open("a") as lines:
                    lines.write(json.dumps(record) + "\n")
    Console(width=110).print(table)
