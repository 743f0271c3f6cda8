"""`rotary` and `rotary_table` in the order of operations of docs/arithmetic.md."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_slmops.reference.arithmetic import fma32, round_to

__all__ = ["rotary", "rotary_table"]

# pi / 2 in three parts; the first two have few enough bits for exact products.
_HALF_PI = [
    float.fromhex(text) for text in ("0x1.921fbp+0", "0x1.5110bp-22", "0x1.18469898cc517p-44")
]
_TWO_OVER_PI = float.fromhex("0x1.45f306dc9c883p-1")
_TERMS = 8


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turns pairs of each head by the angles of its position: `torch_slmops.ops.rotary`.

    Arguments and result as there.
    """
    r = cos.shape[-1]
    wide = x.float()
    turned, rest = wide[..., :r], wide[..., r:]
    index = torch.arange(r)
    partner = index ^ 1 if interleaved else index.roll(r // 2)
    product = turned[..., partner] * sin.float()[:, :, None]
    product = torch.where(index < partner, -product, product)
    turned = fma32(turned, cos.float()[:, :, None], product)
    return round_to(torch.cat((turned, rest), -1), x.dtype)


def rotary_table(
    positions: Tensor, inv_freq: Tensor, scaling: float, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * inv_freq: `torch_slmops.ops.rotary_table`.

    Arguments and result as there.
    """
    sin, cos = _sin_cos(positions.double()[..., None] * inv_freq)
    tables = []
    for values in (cos, sin):
        half = (values * scaling).float()
        tables.append(half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1))
    return tables[0], tables[1]


def _sin_cos(x: Tensor) -> tuple[Tensor, Tensor]:
    """sin and cos of float64 |x| <= 2^30."""
    n = torch.round(x * _TWO_OVER_PI)
    r = ((x - n * _HALF_PI[0]) - n * _HALF_PI[1]) - n * _HALF_PI[2]
    s = r * r
    sine, cosine = torch.zeros_like(s), torch.zeros_like(s)
    for i in range(_TERMS, 0, -1):  # Taylor, from the highest power down
        sign = -1.0 if i % 2 else 1.0
        sine = sine * s + sign / math.factorial(2 * i + 1)
        cosine = cosine * s + sign / math.factorial(2 * i)
    sine = r + r * (s * sine)
    cosine = 1.0 + s * cosine
    quadrant = n.to(torch.int64) & 3
    swap = quadrant % 2 == 1
    sine, cosine = torch.where(swap, cosine, sine), torch.where(swap, sine, cosine)
    return (
        torch.where(quadrant >= 2, -sine, sine),
        torch.where((quadrant == 1) | (quadrant == 2), -cosine, cosine),
    )
