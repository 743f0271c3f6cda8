"""Ops on vectors and heads, without a packed weight."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_slmops.ops.common import OPS, check_gradient, fake, refuse_devices, same_device

__all__ = ["add_rms_norm", "rms_norm", "rotary", "rotary_table"]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y[..., k] = x[..., k] / sqrt(mean of x[..., :]^2 + eps) * (offset + weight[k]).

    The mean is float32 in a fixed order: a row's bits depend on nothing but the row. A row with a
    NaN is NaN; one whose squares overflow float32 has rms infinity: zeros, NaN where x is infinite.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides.
        weight: [K], float32, bfloat16 or float16.
        eps: Added to the mean, as a float32.
        offset: Added to the weight in float32; 0 adds nothing, 1 is Gemma's.
        cast_before_weight: Whether x / rms is rounded to the dtype of `x` before the product
            (Llama, Qwen), or stays float32 (Gemma, OLMo2).
        out_dtype: dtype of the result; that of `x` by default.

    Returns:
        [..., K], contiguous.
    """
    check_gradient("rms_norm", x)
    y: Tensor = OPS.rms_norm.default(x, weight, eps, offset, cast_before_weight, out_dtype)
    return y


@fake("rms_norm")
def _rms_norm_fake(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    same_device("rms_norm", "x", x, weight, "weight")
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """sum = x + residual; normed = rms_norm(sum): the bits of both ops in a row.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides.
        residual: Shape and dtype of `x`; any strides.
        weight, eps, offset, cast_before_weight, out_dtype: As in `rms_norm`.

    Returns:
        `normed` [..., K] and `sum` [..., K], rounded to the dtype of `x`; both contiguous.
    """
    check_gradient("add_rms_norm", x)
    normed, total = OPS.add_rms_norm.default(
        x, residual, weight, eps, offset, cast_before_weight, out_dtype
    )
    return normed, total


@fake("add_rms_norm")
def _add_rms_norm_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    same_device("add_rms_norm", "x", x, residual, "residual")
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype), x.new_empty(x.shape)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turns pairs of each head: a = a cos - b sin, b = b cos + a sin, for (a, b) in the first R.

    Pairs are (i, i + R/2), or (2i, 2i + 1) if interleaved; a and b each read cos and sin at their
    own index. Elements from R on stay.

    Args:
        x: [B, L, H, D], float32, bfloat16 or float16; any strides.
        cos: [B or 1, L, R], float32, bfloat16 or float16; R is even and at most D.
        sin: Shape and dtype of `cos`.
        interleaved: Which elements are pairs.

    Returns:
        [B, L, H, D], contiguous, with the dtype of `x`.
    """
    check_gradient("rotary", x)
    y: Tensor = OPS.rotary.default(x, cos, sin, interleaved)
    return y


@fake("rotary")
def _rotary_fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    same_device("rotary", "x", x, cos, "cos")
    return x.new_empty(x.shape)


def rotary_table(
    positions: Tensor, inv_freq: Tensor, scaling: float, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """cos and sin of positions[...] * inv_freq[i], times `scaling`, for both elements of pair i.

    Angles, cos and sin are float64 in a fixed order of operations, rounded once to float32: the
    same bits on every CPU, which torch's own cos does not give.

    Args:
        positions: int64 [...]. |position * inv_freq| is at most 2^30.
        inv_freq: float64 [R / 2], radians per position.
        scaling: Factor of all values.
        interleaved: Pair i has entries 2i and 2i + 1, else i and i + R/2: as `rotary` takes them.

    Returns:
        cos and sin, float32 [..., R], contiguous.
    """
    cos, sin = OPS.rotary_table.default(positions, inv_freq, scaling, interleaved)
    return cos, sin


@fake("rotary_table")
def _rotary_table_fake(
    positions: Tensor, inv_freq: Tensor, scaling: float, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    same_device("rotary_table", "positions", positions, inv_freq, "inv_freq")
    shape = (*positions.shape, 2 * inv_freq.shape[0])
    return (
        positions.new_empty(shape, dtype=torch.float32),
        positions.new_empty(shape, dtype=torch.float32),
    )


@fake("_activation")
def _activation_fake(x: Tensor, name: str) -> Tensor:
    return x.new_empty(x.shape)


refuse_devices("rms_norm", "add_rms_norm", "rotary")
