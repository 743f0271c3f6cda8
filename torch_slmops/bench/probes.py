"""Limits of the machine that can be measured without a compiler, on torch's threads."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from torch_slmops import memory, ops

__all__ = ["call_seconds", "float_multiply_adds", "read_bandwidth"]

_READ_BYTES = 512 << 20
_REPEATS = 5


def _best(call: Callable[[], object], repeats: int = _REPEATS) -> float:
    """The shortest time of a call, in seconds."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def read_bandwidth(size: int | None = None) -> float:
    """Returns the bytes per second of reading memory: `size` bytes (512 MB) in huge pages.

    It sums int64 by torch, which on the machines of docs/performance.md is as quick as hand-written
    reading loops.
    """
    size = size or _READ_BYTES
    words = memory.empty(size).zero_().view(torch.int64)
    words.sum()
    return size / _best(words.sum)


def float_multiply_adds(n: int = 1024) -> float:
    """Returns the fp32 multiply-adds per second of torch's matrix product, n x n x n."""
    left, right = torch.randn(2, n, n)
    left @ right
    return n**3 / _best(lambda: left @ right)


def call_seconds(calls: int = 1000) -> float:
    """Returns the seconds that the smallest op takes: what a call costs by itself."""
    x, weight = torch.zeros(1, 16), torch.ones(16)

    def many() -> None:
        for _ in range(calls):
            ops.rms_norm(x, weight, 1e-6, 0.0, True)

    with torch.inference_mode():
        return _best(many) / calls
