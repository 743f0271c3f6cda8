"""The op `decoder_layers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torch_slmops.ops.common import OPS, check_gradient, fake, refuse_devices, same_device

__all__ = ["LAYER_PARTS", "Kept", "decoder_layers"]

# The tensors of a layer, in this order.
LAYER_PARTS = (
    "pre_attention_norm",
    "qkv",
    "qkv_bias",
    "q_norm",
    "k_norm",
    "output",
    "output_bias",
    "post_attention_norm",
    "pre_mlp_norm",
    "gate_up",
    "gate_up_bias",
    "down",
    "down_bias",
    "post_mlp_norm",
)

_KEEP = 18  # its place behind `cache` among the arguments


class Kept(tuple[Tensor, ...]):
    """Tensors for many calls of `decoder_layers`, which then get them at no cost for each."""

    number: int

    def __new__(cls, tensors: Sequence[Tensor]) -> Kept:
        made = super().__new__(cls, tensors)
        made.number = OPS._keep.default(list(tensors))
        return made

    def __reduce__(self) -> tuple[type[Kept], tuple[list[Tensor]]]:
        return Kept, (list(self),)

    def __del__(self) -> None:
        drop, number = getattr(OPS, "_drop", None), vars(self).get("number")
        if drop is not None and number is not None:
            drop.default(number)


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
    """Decoder layers one after the other, in one parallel region. Each of them computes

    h = x + residual_multiplier * post_attention_norm(output(attention(qkv(pre_attention_norm(x)))))
    y = h + residual_multiplier * post_mlp_norm(mlp(pre_mlp_norm(h)))

    with the bits of `rms_norm`, `qkv_rotary`, `attention`, `linear`, `swiglu` and additions in the
    dtype of x; a multiplier other than 1 is a product of its own, rounded.

    Args:
        x: [B, L, K], float32, bfloat16 or float16.
        weights: For each layer tensors in the order of `LAYER_PARTS`, empty ones where it has none:
            norms [K]; qkv, output, gate_up and down packed as for `qkv_rotary`, `linear` and
            `swiglu`; q_norm and k_norm [D] or [heads * D]; biases.
        cache: For each layer keys and values, [B, Hk, S, D] of the dtype of x, whose last dimension
            is contiguous. The new ones are written to slots `start` to `start + L`. Keys may lie in
            blocks of 16 slots instead, [B, Hk, blocks, D, 16], element [.., i, :, j] that of slot
            16 i + j: attention reads these without transposing them. Or int8: four tensors for each
            layer, the codes of keys and of values as `store_int8_` fills them, then their scales.
            Or empty: then no keys are kept, and `start` is 0.
        start: int64 of one element: how many keys the cache holds.
        cos, sin, interleaved: As in `qkv_rotary`.
        mask: As in `attention`, over at least the `start + L` keys; None: causal.
        position_ids: int64 [B or 1, L], or None: token positions, of which those of the last
            queries decide how keys are grouped; see `first_position` of `attention`.
        heads_q_k_v: The numbers of heads; as many of k as of v.
        head_dim: D.
        hidden: Rows of the MLP's gate.
        activation: As in `swiglu`.
        eps, offset, cast_before_weight: Of the norms of x, as in `rms_norm`.
        qk_eps, qk_offset: Of the norms of q and k.
        scale, softcap: As in `attention`.
        residual_multiplier: See above.
        keep: How many positions are wanted of each sequence, its last ones; 0: all. The others need
            nothing of the last layer but their keys and values.

    Returns:
        [B, `keep` or L, K] of the dtype of x, contiguous.
    """
    check_gradient("decoder_layers", x)
    parts: tuple[Any, Any] = weights, cache
    op = OPS.decoder_layers.default
    if isinstance(weights, Kept) and isinstance(cache, Kept):
        parts, op = (weights.number, cache.number), OPS._kept_decoder_layers.default
    y: Tensor = op(
        x,
        *parts,
        start,
        cos,
        sin,
        mask,
        position_ids,
        heads_q_k_v,
        head_dim,
        hidden,
        activation,
        eps,
        offset,
        cast_before_weight,
        qk_eps,
        qk_offset,
        interleaved,
        scale,
        softcap,
        residual_multiplier,
        keep,
    )
    return y


@fake("decoder_layers")
def _decoder_layers_fake(
    x: Tensor, weights: Sequence[Tensor], cache: Sequence[Tensor], *args: Any
) -> Tensor:
    for part in (*weights, *cache):
        same_device("decoder_layers", "x", x, part, "weights and cache")
    keep = args[_KEEP] if len(args) > _KEEP else 0  # its default is not passed on
    return x.new_empty((x.shape[0], keep or x.shape[1], x.shape[2]))


refuse_devices("decoder_layers")
