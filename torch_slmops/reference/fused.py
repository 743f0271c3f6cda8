"""The fused ops: compositions of other ops in fp32, rounded once at the end."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torch_slmops.reference.arithmetic import round_to
from torch_slmops.reference.compute import linear
from torch_slmops.reference.functions import activate
from torch_slmops.reference.rms_norm import rms_norm
from torch_slmops.reference.rotary import rotary

__all__ = ["qkv_rotary", "swiglu"]

TILE = 32  # rows of gate, then of up, that alternate in a packed gate_up


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
            y = rms_norm(y, weight, eps, offset, cast_before_weight=False)
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
    inner = activate(activation, gate.contiguous()) * up
    return linear(inner.contiguous(), down, out_features, down_bias, None, x.dtype)
