"""`ops.attention` as an attention implementation of transformers, by the name "slmops"."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops import ops

__all__ = ["register_attention"]

NAME = "slmops"


def register_attention() -> None:
    """Makes "slmops" an attention implementation of transformers, with sdpa's masks.

    Afterwards `model.set_attn_implementation("slmops")` and `attn_implementation="slmops"` of
    `from_pretrained` work, for models that torch_slmops has not changed too. Grouped query heads,
    sliding windows, softcap, padding and position bias are computed; dropout and attention sinks
    are refused with an error. Calling it again changes nothing.

    Raises:
        ImportError: transformers is not installed, or a version without these interfaces.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers' attention modules call with q, k and v of [B, H, L, D].

    Args:
        module: The attention module; its `is_causal` counts where the argument is None.
        query, key, value: [B, H, L, D]; fewer key heads than query heads are not repeated.
        attention_mask: What `sdpa_mask` made: bool, or None for causal or full attention. It has
            the sliding window in it.
        dropout: Must be 0.
        scaling: Factor of q k^T, 1 / sqrt(D) by default.
        is_causal: Whether attention without a mask is causal.
        softcap: See `ops.attention`.
        position_bias: [B or 1, H or 1, Lq, Lk], added to the scores.
        position_ids: [B, Lq]: with them results do not depend on left padding.
        kwargs: What other implementations take.

    Returns:
        [B, Lq, H, Dv] and None: attention weights are not kept.

    Raises:
        RuntimeError: Something is asked for that the op does not compute.
    """
    if dropout > 0:
        raise RuntimeError(
            f"attention: expected no dropout with attn_implementation {NAME!r}, got {dropout}; "
            "call model.eval(), or choose 'sdpa' for training"
        )
    if kwargs.get("s_aux") is not None:
        raise RuntimeError(
            f"attention: expected no attention sinks with attn_implementation {NAME!r}; "
            "choose 'eager'"
        )
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    causal = causal and attention_mask is None
    queries = query.shape[2]
    if causal and 1 < queries < key.shape[2]:
        # A prompt in an empty static cache, whose free slots sdpa_mask leaves to the causal mask.
        key, value = key[:, :, :queries], value[:, :, :queries]
        position_bias = None if position_bias is None else position_bias[..., :queries]
    mask = attention_mask
    if position_bias is not None:
        mask = _with_bias(position_bias, attention_mask)
    out = ops.attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        mask,
        _first_position(position_ids, query.shape[0], key.shape[2]),
        causal,
        0,
        query.shape[3] ** -0.5 if scaling is None else scaling,
        softcap or 0.0,
    )
    return out, None


def _with_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -math.inf)
    return bias + mask


def _first_position(position_ids: Tensor | None, batch: int, keys: int) -> Tensor | None:
    """The token position of key slot 0, if the last query stands in the last slot.

    Where it does not, in a static cache, keys are grouped otherwise: the last bits differ.
    """
    if position_ids is None or position_ids.dim() != 2:
        return None
    last = position_ids[:, -1].to(torch.int64) - (keys - 1)
    return last.expand(batch)
