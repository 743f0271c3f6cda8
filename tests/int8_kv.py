"""Keys and values as int8, for tests: made by the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_slmops import ops, reference


def int8_heads(x: Tensor, values: bool, slots: int = 0, start: int = 0) -> tuple[Tensor, Tensor]:
    """Codes and scales of x [B, L, H, D] at slots `start`.., made by the reference.

    There is room for `slots` at least; what is around those of x is garbage.
    """
    batch, length, heads, d = x.shape
    slots = max(slots, start + length)
    shape = (batch, heads, *ops.int8_shape(slots, d, values))
    codes = torch.full(shape, 255, dtype=torch.uint8)
    scale = torch.full((batch, heads, shape[2] * 16), torch.nan)
    reference.store_int8_(x, codes, scale, start, values)
    return codes, scale


def int8_arguments(arguments: tuple[object, ...]) -> tuple[object, ...]:
    """A call of attention with its k and v as int8."""
    q, k, v, *rest = arguments
    assert isinstance(k, Tensor)
    assert isinstance(v, Tensor)
    found = [int8_heads(x, x is v) for x in (k, v)]
    scales = [scale[:, :, : k.shape[1]] for _, scale in found]
    return q, found[0][0], found[1][0], *rest, *scales
