"""Times rms_norm, add_rms_norm and rotary against torch's eager composition of the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import torch_slmops
from torch_slmops import ops
from torch_slmops.bench.shapes import MODELS, ModelShape
from torch_slmops.bench.timing import interleaved

EPS = 1e-6
ROWS = (1, 16, 512)

Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Candidates:
    """One op and torch's composition; `bytes` is what a call reads and writes at least."""

    ours: Callable[[], Result]
    torch: Callable[[], Result]
    bytes: int


def eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """What transformers' LlamaRMSNorm does."""
    wide = x.float()
    variance = wide.pow(2).mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + EPS)).to(x.dtype)


def eager_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return eager_rms_norm(total, weight), total


def eager_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What transformers' apply_rotary_pos_emb does to one of q and k; x is [B, L, H, D]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), -1)
    return x * cos[:, :, None] + turned * sin[:, :, None]


def candidates(shape: ModelShape, rows: int) -> dict[str, Candidates]:
    """The ops at the sizes of a model, each checked."""
    x, residual = torch.randn(2, 1, rows, shape.hidden).bfloat16()
    weight = torch.randn(shape.hidden).bfloat16()
    heads = torch.randn(1, rows, shape.heads, shape.head_dim).bfloat16()
    angles = (torch.rand(1, rows, shape.head_dim // 2) * 6).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    narrow = cos.bfloat16(), sin.bfloat16()
    norm = (weight, EPS, 0.0, True)
    found = {
        "rms_norm": Candidates(
            partial(ops.rms_norm, x, *norm), partial(eager_rms_norm, x, weight), 2 * x.nbytes
        ),
        "add_rms_norm": Candidates(
            partial(ops.add_rms_norm, x, residual, *norm),
            partial(eager_add_rms_norm, x, residual, weight),
            4 * x.nbytes,
        ),
        "rotary": Candidates(
            partial(ops.rotary, heads, cos, sin, False),
            partial(eager_rotary, heads, *narrow),
            2 * heads.nbytes,
        ),
    }
    for name, pair in found.items():
        assert_near(name, pair.ours(), pair.torch())
    return found


def assert_near(name: str, ours: Result, torchs: Result) -> None:
    """Refuses to time what is wrong: torch's composition rounds to bfloat16 three times or less."""
    for left, right in zip(tensors(ours), tensors(torchs), strict=True):
        limit = 4 * 2.0**-8 * right.float().abs().amax()
        if not bool(((left.float() - right.float()).abs() <= limit).all()):
            raise RuntimeError(f"{name}: output is wrong; not timed")


def tensors(result: Result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def repeated(call: Callable[[], Result]) -> Callable[[int], object]:
    """`call` as `interleaved` wants it: with an index, which it ignores."""
    return lambda _: call()


def run(output: Path, *, budget: float, threads: int) -> None:
    """Prints a table for one model's sizes; appends JSON lines to `output`."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    shape = MODELS["llama-3.2-1b"]
    table = Table(title=f"vector ops of {shape.name}, bf16, {torch_slmops.isa()}")
    for column in ("rows", "op", "us", "GB/s", "torch us", "torch GB/s", "x"):
        table.add_column(column, justify="right")
    for rows in ROWS:
        for name, pair in candidates(shape, rows).items():
            size = pair.bytes
            turns = {"ours": repeated(pair.ours), "torch": repeated(pair.torch)}
            timings = interleaved(turns, budget=budget)
            us = {key: timing.median * 1e6 for key, timing in timings.items()}
            rates = {key: size / value / 1e3 for key, value in us.items()}
            table.add_row(
                str(rows),
                name,
                f"{us['ours']:.1f}",
                f"{rates['ours']:.1f}",
                f"{us['torch']:.1f}",
                f"{rates['torch']:.1f}",
                f"{us['torch'] / us['ours']:.1f}",
                end_section=name == "rotary",
            )
            record = {"op": name, "rows": rows, "us": us, "GB/s": rates, "bytes": size}
            record |= {"isa": torch_slmops.isa(), "threads": threads}
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
    Console(width=110).print(table)
