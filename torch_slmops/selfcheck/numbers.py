"""Inputs from integers alone, the same on every machine: torch's own random floats are not.

Word i of a stream is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", 2014) of its seed and i, all modulo 2^64.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["Numbers"]

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


class Numbers:
    """A stream of numbers that begins at a seed; each call takes the next ones."""

    def __init__(self, seed: int) -> None:
        self._start = np.uint64(seed << 32)
        self._taken = 0

    def _words(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        index = np.arange(self._taken + 1, self._taken + 1 + count, dtype=np.uint64)
        self._taken += count
        z = self._start + index * _STEP
        z = (z ^ (z >> np.uint64(30))) * _FIRST
        z = (z ^ (z >> np.uint64(27))) * _SECOND
        return z ^ (z >> np.uint64(31))

    def integers(self, top: int, *shape: int) -> Tensor:
        """int64 in 0..top; `top` is below 2^32."""
        words = self._words(math.prod(shape)) >> np.uint64(32)
        values = (words * np.uint64(top + 1)) >> np.uint64(32)
        return torch.from_numpy(values.astype(np.int64)).reshape(shape)

    def values(self, *shape: int) -> Tensor:
        """float32 in -3..3, bell-shaped: the sum of three uniform ones, exact."""
        total = sum(self.integers((1 << 22) - 1, *shape) for _ in range(3))
        assert isinstance(total, Tensor)
        return (total - 3 * (1 << 21)).float() * 2.0**-21

    def special(self, *shape: int) -> Tensor:
        """float32, `values` with every kind of number among them, in about half of the rows."""
        x = self.values(*shape)
        kinds = torch.tensor([math.nan, math.inf, -math.inf, 2.0**-149, -0.0, 2.0**-126, 2.0**127])
        chosen = kinds[self.integers(len(kinds) - 1, *shape)]
        rows = self.integers(1, *shape[:-1], 1) == 0
        return torch.where(rows & (self.integers(15, *shape) == 0), chosen, x)

    def patterns(self, *shape: int) -> Tensor:
        """float32 of any bits: all exponents, denormals, NaNs of both signs and all payloads."""
        words = self.integers((1 << 32) - 1, *shape).numpy().astype(np.uint32)
        return torch.from_numpy(words.view(np.float32))

    def permutation(self, count: int) -> Tensor:
        """int64 [count], each of 0..count-1 once."""
        return torch.argsort(self.integers((1 << 32) - 1, count), stable=True)
