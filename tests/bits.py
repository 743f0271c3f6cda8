"""Comparisons of tensors by their bits: `torch.equal` calls 0 and -0 equal, and NaN unequal."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(x: Tensor) -> Tensor:
    """The elements of `x` as integers of the same size."""
    return x.contiguous().view(_INTEGERS[x.element_size()])


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Asserts equal dtype, shape and bits of every element; shows the first mismatch."""
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    different = bits_of(actual).ne(bits_of(expected))
    if not different.any():
        return
    at = tuple(different.nonzero()[0].tolist())
    raise AssertionError(
        f"{what}: {int(different.sum())} of {actual.numel()} elements differ, first at {at}: "
        f"{actual[at].item()!r} (bits {int(bits_of(actual)[at]):#x}), expected "
        f"{expected[at].item()!r} ({int(bits_of(expected)[at]):#x})"
    )


def from_bits(patterns: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of `dtype` whose bits are the low bits of int64 `patterns`."""
    size = dtype.itemsize
    integers = _INTEGERS[size]
    half = 1 << (8 * size - 1)
    wrapped = (patterns + half) % (2 * half) - half
    return wrapped.to(integers).view(dtype)
