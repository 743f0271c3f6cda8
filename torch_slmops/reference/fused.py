"""Norms, rotary embedding and the fused blocks: compositions in fp32, rounded once at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_slmops.reference.arithmetic import fma32, reduce16, round_to
from torch_slmops.reference.compute import linear

__all__ = ["activate", "qkv_rotary", "rms_norm", "rotary", "swiglu"]

TILE = 32  # rows of gate, then of up, that alternate in a packed gate_up


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
    r = torch.tensor(1.0) / torch.sqrt(mean + torch.tensor(eps))
    y = wide * r[..., None]
    if cast_before_weight:
        y = round_to(y, x.dtype).float()
    scale = weight.float()
    if offset:
        scale = scale + torch.tensor(offset)
    return round_to((y * scale).contiguous(), out_dtype or x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates pairs of the last dimension of x: `torch_slmops.ops.rotary`.

    Arguments and result as there.
    """
    width = cos.shape[-1]
    wide, c, s = x.float(), cos.float()[:, :, None], sin.float()[:, :, None]
    y = wide.clone()
    if interleaved:
        first, second = slice(0, width, 2), slice(1, width, 2)
    else:
        first, second = slice(0, width // 2), slice(width // 2, width)
    a, b = wide[..., first], wide[..., second]
    y[..., first] = fma32(a, c[..., first], -(b * s[..., first]))
    y[..., second] = fma32(b, c[..., second], a * s[..., second])
    return round_to(y, x.dtype)


def qkv_rotary(
    x: Tensor,
    packed: Tensor,
    heads_q_k_v: Sequence[int],
    head_dim: int,
    bias: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    perm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """linear, then norm and rotary of q and k, all in fp32: `torch_slmops.ops.qkv_rotary`.

    Arguments and result as there.
    """
    rows = linear(x, packed, sum(heads_q_k_v) * head_dim, bias, perm, torch.float32)
    parts = torch.split(rows, [heads * head_dim for heads in heads_q_k_v], -1)
    found: list[Tensor] = []
    for part, heads, weight in zip(parts, heads_q_k_v, (q_norm, k_norm, None), strict=True):
        y = part.contiguous()
        shape = (*x.shape[:-1], heads, head_dim)
        if weight is not None:
            y = y.view(shape) if weight.numel() == head_dim else y
            y = rms_norm(y, weight, eps, offset, cast_before_weight)
        y = y.view(shape)
        if cos is not None and sin is not None and len(found) < 2:
            y = rotary(y, cos, sin, interleaved)
        found.append(round_to(y, x.dtype))
    q, k, v = found
    return q, k, v


def swiglu(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    hidden: int,
    out_features: int,
    activation: str,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """down(activation(gate(x)) * up(x)), the inner part in fp32: `torch_slmops.ops.swiglu`.

    Arguments and result as there.
    """
    tiles = -(-hidden // TILE)
    rows = linear(x, gate_up, 2 * TILE * tiles, None, None, torch.float32)
    rows = rows.view(*x.shape[:-1], tiles, 2, TILE)
    gate, up = (part.flatten(-2)[..., :hidden] for part in rows.unbind(-2))
    if gate_up_bias is not None:
        gate = gate + gate_up_bias[:hidden].float()
        up = up + gate_up_bias[hidden:].float()
    inner = activate(activation, gate) * up
    return linear(inner.contiguous(), down, out_features, down_bias, None, x.dtype)


def activate(name: str, x: Tensor) -> Tensor:
    """Returns the activation `name` ("silu", "gelu_tanh", "gelu", "relu2") of float32 x."""
    if name == "silu":
        return x / (1 + torch.exp(-x))
    if name == "gelu_tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
        return 0.5 * x * (1 + torch.tanh(inner))
    if name == "gelu":
        return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))
    if name == "relu2":
        return torch.relu(x) * torch.relu(x)
    raise ValueError(f"expected silu, gelu_tanh, gelu or relu2, got {name!r}")
