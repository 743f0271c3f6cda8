"""`rms_norm` and `add_rms_norm` in the order of operations of docs/arithmetic.md."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_slmops.reference.arithmetic import reduce16, round_to

__all__ = ["add_rms_norm", "rms_norm"]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (offset + weight): `torch_slmops.ops.rms_norm`.

    Arguments and result as there.
    """
    wide = x.float()
    mean = reduce16(wide, wide) / torch.tensor(float(x.shape[-1]))
    # The float64 root of a float32 is never so near the middle of two float32 that rounding it
    # again could go wrong; torch's float32 root may be a library's.
    root = (mean + torch.tensor(eps)).double().sqrt().float()
    y = wide * (torch.ones_like(root) / root)[..., None]
    if cast_before_weight:
        y = round_to(y, x.dtype).float()
    w = weight.float()
    if torch.tensor(offset) != 0:
        w = torch.tensor(offset) + w
    return round_to(y * w, out_dtype or x.dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and that sum: `torch_slmops.ops.add_rms_norm`.

    Arguments and result as there.
    """
    total = round_to(x.float() + residual.float(), x.dtype)
    return rms_norm(total, weight, eps, offset, cast_before_weight, out_dtype), total
