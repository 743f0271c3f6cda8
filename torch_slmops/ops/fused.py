"""Ops that are several in one: the same bits as their composition, which stays float32 inside."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torch_slmops.ops.common import OPS, check_gradient, fake, refuse_devices, same_device

__all__ = ["qkv_rotary", "swiglu"]


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
    """q, k, v = linear(x), then norm and rotary of q and k; all in float32, rounded once.

    Args:
        x: [B, L, K], float32, bfloat16 or float16; any strides.
        packed: uint8 [bytes], a packed weight whose rows are those of q, k and v in this order.
        heads_q_k_v: The numbers of heads.
        head_dim: D.
        bias: [N] with N = the sum of the heads times D, or None.
        q_norm: RMS norm weight of each head, [D], or of all of q, [heads * D]; None for no norm.
        k_norm: Likewise.
        eps, offset: As in `rms_norm`, whose x is float32 here: nothing is rounded in between.
        cos, sin, interleaved: As in `rotary`; None for no rotary embedding.
        perm: As in `linear`.

    Returns:
        q, k, v: [B, L, heads, D] of the dtype of x, contiguous.
    """
    check_gradient("qkv_rotary", x)
    parts: tuple[Tensor, Tensor, Tensor] = OPS.qkv_rotary.default(
        x,
        packed,
        heads_q_k_v,
        head_dim,
        bias,
        q_norm,
        k_norm,
        eps,
        offset,
        cos,
        sin,
        interleaved,
        perm,
    )
    return parts


@fake("qkv_rotary")
def _qkv_rotary_fake(
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
    same_device("qkv_rotary", "x", x, packed)
    q, k, v = (x.new_empty((*x.shape[:-1], heads, head_dim)) for heads in heads_q_k_v)
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
    """y = down(activation(gate(x)) * up(x)); float32 between the projections, rounded once.

    Args:
        x: [..., K], float32, bfloat16 or float16.
        gate_up: uint8 [bytes], a packed weight of 64 * ceil(hidden / 32) rows: 32 of the gate, 32
            of up, alternating; what pads each to a multiple of 32 has the scale 0.
        down: uint8 [bytes], a packed weight of `out_features` rows and `hidden` inputs.
        hidden: Rows of the gate, and of up.
        out_features: N.
        activation: "silu", "gelu_tanh", "gelu" or "relu2".
        gate_up_bias: [2 * hidden], the gate's, then up's.
        down_bias: [N].

    Returns:
        [..., N] of the dtype of x, contiguous.
    """
    check_gradient("swiglu", x)
    y: Tensor = OPS.swiglu.default(
        x, gate_up, down, hidden, out_features, activation, gate_up_bias, down_bias
    )
    return y


@fake("swiglu")
def _swiglu_fake(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    hidden: int,
    out_features: int,
    activation: str,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    same_device("swiglu", "x", x, gate_up)
    return x.new_empty((*x.shape[:-1], out_features))


refuse_devices("qkv_rotary", "swiglu")
