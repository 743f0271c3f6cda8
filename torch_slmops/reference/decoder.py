"""Decoder layers: compositions of the other ops, with a rounding after each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_slmops.reference.arithmetic import round_to
from torch_slmops.reference.attention import attention
from torch_slmops.reference.compute import linear
from torch_slmops.reference.fused import qkv_rotary, swiglu
from torch_slmops.reference.int8_heads import store_int8_
from torch_slmops.reference.rms_norm import rms_norm

__all__ = ["decoder_layers"]

_PARTS = 14


def decoder_layers(
    x: Tensor,
    weights: Sequence[Tensor],
    cache: Sequence[Tensor],
    start: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    mask: Tensor | None,
    position_ids: Tensor | None,
    heads_q_k_v: Sequence[int],
    head_dim: int,
    hidden: int,
    activation: str,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    qk_eps: float,
    qk_offset: float,
    interleaved: bool,
    scale: float,
    softcap: float = 0.0,
    residual_multiplier: float = 1.0,
    keep: int = 0,
) -> Tensor:
    """Decoder layers one after the other: `torch_slmops.ops.decoder_layers`.

    Arguments and result as there; new keys and values are written into `cache`.
    """
    keys = int(start) + x.shape[1]
    first = None if position_ids is None else (position_ids[:, -1] - (keys - 1)).expand(len(x))
    seen = None if mask is None else mask[..., :keys]

    def norm(y: Tensor, weight: Tensor) -> Tensor:
        return y if weight.numel() == 0 else rms_norm(y, weight, eps, offset, cast_before_weight)

    def add(y: Tensor, branch: Tensor) -> Tensor:
        if residual_multiplier != 1.0:
            factor = torch.tensor(residual_multiplier, dtype=torch.float32)
            branch = round_to(branch.float() * factor, x.dtype)
        return round_to(y.float() + branch.float(), x.dtype)

    parts = len(cache) // (len(weights) // _PARTS)
    for i in range(len(weights) // _PARTS):
        (
            pre_attention,
            qkv,
            qkv_bias,
            q_norm,
            k_norm,
            output,
            output_bias,
            post_attention,
            pre_mlp,
            gate_up,
            gate_up_bias,
            down,
            down_bias,
            post_mlp,
        ) = weights[_PARTS * i : _PARTS * (i + 1)]
        q, k, v = qkv_rotary(
            norm(x, pre_attention),
            qkv,
            heads_q_k_v,
            head_dim,
            _or_none(qkv_bias),
            _or_none(q_norm),
            _or_none(k_norm),
            qk_eps,
            qk_offset,
            cos,
            sin,
            interleaved,
        )
        scales: Sequence[Tensor] = ()
        if parts == 4:
            k, v, *scales = _stored_int8(cache[4 * i : 4 * i + 4], (k, v), keys)
        elif parts == 2:
            k, v = (_stored(cache[2 * i + j], part, keys) for j, part in enumerate((k, v)))
        if keep > 0 and i == len(weights) // _PARTS - 1:
            x, q = x[:, -keep:], q[:, -keep:]
            seen = None if seen is None else seen[:, :, -keep:]
        y = attention(q, k, v, seen, first, mask is None, 0, scale, softcap, *scales).flatten(2)
        y = linear(y, output, x.shape[2], _or_none(output_bias), None, x.dtype)
        x = add(x, norm(y, post_attention))
        y = swiglu(
            norm(x, pre_mlp),
            gate_up,
            down,
            hidden,
            x.shape[2],
            activation,
            _or_none(gate_up_bias),
            _or_none(down_bias),
        )
        x = add(x, norm(y, post_mlp))
    return x


def _or_none(part: Tensor) -> Tensor | None:
    return part if part.numel() else None


def _stored(cache: Tensor, part: Tensor, keys: int) -> Tensor:
    """All keys or values, [B, keys, H, D], after the new ones have been written."""
    new = slice(keys - part.shape[1], keys)
    if cache.dim() == 4:
        cache[:, :, new] = part.transpose(1, 2)
        return cache[:, :, :keys].transpose(1, 2)
    slots = cache.transpose(3, 4).flatten(2, 3)  # of blocks of keys
    slots[:, :, new] = part.transpose(1, 2)
    blocks = slots.reshape(*cache.shape[:3], cache.shape[4], cache.shape[3])
    cache.copy_(blocks.transpose(3, 4))
    return slots[:, :, :keys].transpose(1, 2)


def _stored_int8(cache: Sequence[Tensor], new: tuple[Tensor, Tensor], keys: int) -> list[Tensor]:
    """Codes of keys and of values and both scales, after the new ones have been written."""
    for part, codes, scale, values in zip(new, cache[:2], cache[2:], (False, True), strict=True):
        store_int8_(part, codes, scale, keys - part.shape[1], values)
    return [*cache[:2], *(scale[:, :, :keys] for scale in cache[2:])]
