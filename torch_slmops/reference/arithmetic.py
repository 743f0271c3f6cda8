"""fp32 primitives of the contract in plain torch: fma, roundings, the 16-partial sum.

They need the default floating-point environment (`torch.set_flush_denormal(False)`).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["canonical_nan", "fma32", "reduce16", "round_to", "to_bf16", "to_f16"]

_PARTIALS = 16


def fma32(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Returns a * b + c with one rounding to float32, elementwise (broadcast).

    The product of two float32 is exact in float64. The sum is rounded to odd there (two-sum gives
    its error; an inexact even result moves to its odd neighbour on the error's side), after which
    rounding to float32 is as if from the exact value: float64 has more than two bits to spare
    (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008). Where that cannot
    change anything, it is left out.

    Args:
        a, b, c: float32 tensors.

    Returns:
        float32; the payload of a NaN is unspecified.
    """
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    rounded = total.float()
    # Rounding twice is wrong only where the first result lies between two float32, on the middle:
    # then its low 28 bits are 0 (more, where the float32 is denormal).
    bits = total.view(torch.int64)
    doubtful = (bits & 0xFFFFFFF).eq(0) & rounded.double().ne(total)
    if doubtful.any():
        odd = _round_to_odd(product.expand_as(total), addend.expand_as(total), total)
        rounded = torch.where(doubtful, odd.float(), rounded)
    return rounded


def _round_to_odd(a: Tensor, b: Tensor, total: Tensor) -> Tensor:
    """a + b in float64, an inexact sum to the odd one of its two neighbours; `total` = a + b."""
    part = total - a
    error = (a - (total - part)) + (b - part)  # two-sum: exact; NaN where total is not finite
    bits = total.contiguous().view(torch.int64)
    outwards = (error > 0) == (total > 0)
    move = (error.abs() > 0) & (bits & 1).eq(0)
    bits = bits + torch.where(move, 2 * outwards.to(torch.int64) - 1, 0)
    return bits.view(torch.float64)


def reduce16(a: Tensor, b: Tensor) -> Tensor:
    """Returns the sum of a * b over the last dimension, in the contract's order.

    Element i is added to partial sum i mod 16 by fma, i ascending, the tail as if padded with +0;
    then partials 8 apart are added, then 4, 2, 1.

    Args:
        a, b: float32 [..., K].

    Returns:
        float32 [...].
    """
    pad = -a.shape[-1] % _PARTIALS
    shape = (*a.shape[:-1], (a.shape[-1] + pad) // _PARTIALS, _PARTIALS)
    a = torch.nn.functional.pad(a, (0, pad)).reshape(shape)
    b = torch.nn.functional.pad(b, (0, pad)).reshape(shape)
    partials = a.new_zeros(*a.shape[:-2], _PARTIALS)
    for i in range(a.shape[-2]):
        partials = fma32(a[..., i, :], b[..., i, :], partials)
    distance = _PARTIALS // 2
    while distance:
        partials = partials[..., :distance] + partials[..., distance:]
        distance //= 2
    return partials[..., 0]


def canonical_nan(x: Tensor) -> Tensor:
    """Returns float32 `x` with every NaN replaced by 0x7fc00000."""
    return torch.where(x.isnan(), x.new_tensor(0x7FC00000, dtype=torch.int32).view(x.dtype), x)


def to_bf16(x: Tensor) -> Tensor:
    """Rounds float32 to bfloat16, ties to even, a NaN to 0x7fc0."""
    bits = x.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = torch.where(x.isnan(), 0x7FC0, rounded)
    return _low_16_bits(rounded).view(torch.bfloat16)


def to_f16(x: Tensor) -> Tensor:
    """Rounds float32 to float16, ties to even, overflow to infinity, a NaN to 0x7e00."""
    bits = x.contiguous().view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    sign, magnitude = (bits >> 16) & 0x8000, bits & 0x7FFFFFFF
    normal = (magnitude - (112 << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13
    # Below 2^-14 a unit is 2^-24. Scaling by 2^24 is exact.
    small = torch.round(x.abs().double() * 2.0**24).nan_to_num(0).clamp_max(1024).to(torch.int64)
    value = torch.where(magnitude < (113 << 23), small, normal.clamp_max(0x7C00))
    return _low_16_bits(torch.where(x.isnan(), 0x7E00, sign | value)).view(torch.float16)


def _low_16_bits(x: Tensor) -> Tensor:
    """int16 with the bits of values 0..65535."""
    return torch.where(x >= 1 << 15, x - (1 << 16), x).to(torch.int16)


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds float32 once to `dtype` (float32, bfloat16 or float16), NaN to the canonical one."""
    if dtype == torch.float32:
        return canonical_nan(x)
    if dtype == torch.bfloat16:
        return to_bf16(x)
    if dtype == torch.float16:
        return to_f16(x)
    raise ValueError(f"expected float32, bfloat16 or float16, got {dtype}")
