"""Ops that compute with packed weights, one product at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_slmops.ops.common import OPS, check_gradient, fake, refuse_devices, same_device

__all__ = ["embedding", "linear"]


def linear(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    perm: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y[..., n] = sum over k of x[..., k] * w[n, k] + bias[n], with w packed.

    For a weight packed with activations "int8", x is rounded to int8 per activation group and the
    products are summed as integers; with "float" x is taken as it is. The sums are float32 in a
    fixed order, rounded once to the result's dtype: the same bits on every CPU, for every number
    of threads and rows. A row with a NaN or an infinity gives NaN in "int8" mode.

    With "float_fast" x is rounded to bfloat16 where the CPU has dots of it, and from some number of
    rows on torch multiplies by the unpacked weight: within the bound of docs/arithmetic.md, but
    neither the same bits on every CPU nor in every batch.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides.
        packed: uint8 [bytes], a packed weight of N outputs and K inputs.
        out_features: N.
        bias: [N], float32, bfloat16 or float16.
        perm: int64 [K], the input that each column of w belongs to: x[..., perm] is multiplied.
        out_dtype: dtype of the result; that of `x` by default.

    Returns:
        [..., N], contiguous.
    """
    check_gradient("linear", x)
    y: Tensor = OPS.linear.default(x, packed, out_features, bias, perm, out_dtype)
    return y


@fake("linear")
def _linear_fake(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    perm: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    same_device("linear", "x", x, packed)
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype or x.dtype)


def embedding(ids: Tensor, packed: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """y[..., k] = w[ids[...], k], with w packed; one rounding to `dtype`.

    Args:
        ids: [...], int64 or int32, each in 0..N-1.
        packed: uint8 [bytes], a packed weight of N rows and K columns.
        dim: K.
        dtype: dtype of the result: float32, bfloat16 or float16.

    Returns:
        [..., K], contiguous.
    """
    y: Tensor = OPS.embedding.default(ids, packed, dim, dtype)
    return y


@fake("embedding")
def _embedding_fake(ids: Tensor, packed: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    same_device("embedding", "ids", ids, packed)
    return ids.new_empty((*ids.shape, dim), dtype=dtype)


refuse_devices("linear", "embedding")
