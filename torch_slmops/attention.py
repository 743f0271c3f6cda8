"""`ops.attention` as an attention implementation of transformers, by the name "slmops"."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops import ops
from torch_slmops.int8_tensor import Int8Tensor

__all__ = ["check_kv_cache", "register_attention", "set_kv_cache", "use_own_attention"]

NAME = "slmops"


def register_attention() -> None:
    """Makes "slmops" an attention implementation of transformers, with sdpa's masks.

    Afterwards `model.set_attn_implementation("slmops")` and `attn_implementation="slmops"` of
    `from_pretrained` work, for models that torch_slmops has not changed too. Grouped query heads,
    sliding windows, softcap, padding and position bias are computed; with dropout, or where
    gradients are recorded, transformers' sdpa is; attention sinks are refused with an error.
    Calling it again changes nothing.

    Raises:
        ImportError: transformers is not installed, or a version without these interfaces.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def use_own_attention(model: nn.Module) -> None:
    """Sets "slmops" as the attention of transformers models in `model` that are fused throughout.

    Only in the place of "sdpa": who has chosen "eager" or another one, keeps it.
    """
    from torch_slmops.fused import FusedAttention

    for module in model.modules():
        config = getattr(module, "config", None)
        change = getattr(module, "set_attn_implementation", None)
        if change is None or getattr(config, "_attn_implementation", None) != "sdpa":
            continue
        attentions = [m for m in module.modules() if "Attention" in type(m).__name__]
        own = [isinstance(m, FusedAttention) and m.slmops.row.forward is None for m in attentions]
        if own and all(own):
            register_attention()
            change(NAME)


def check_kv_cache(dtype: object) -> None:
    """Refuses what keys and values cannot be kept as."""
    if dtype not in (None, "int8"):
        raise ValueError(f'kv_cache: expected "int8" or None, got {dtype!r}')


def set_kv_cache(model: nn.Module, dtype: str | None) -> None:
    """Says in which dtype the fused attentions of `model` keep keys and values.

    Those with a sliding window keep theirs: what they have to keep is short.
    """
    from torch_slmops.fused import FusedAttention, read

    for module in model.modules():
        if isinstance(module, FusedAttention) and module.slmops.row.forward is None:
            window = dict(module.slmops.row.options).get("sliding_window")
            sliding = window is not None and read(module, window) is not None
            module.slmops_kv_cache = None if sliding else dtype


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
        query, key, value: [B, H, L, D]; fewer key heads than query heads are not repeated. Keys and
            values may be int8, as `torch_slmops.Cache(dtype="int8")` gives them.
        attention_mask: What `sdpa_mask` made: bool, or None for causal or full attention. It has
            the sliding window in it.
        dropout: With it, and where gradients are recorded, transformers' sdpa computes.
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
    if dropout > 0 or (torch.is_grad_enabled() and query.requires_grad):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options = kwargs | {"softcap": softcap, "position_bias": position_bias}
        options |= {"position_ids": position_ids}
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **options
        )
        return out, None
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
    if mask is not None and mask.shape[2] == 1:
        mask = mask.expand(-1, -1, queries, -1)
    if position_bias is not None:
        mask = _with_bias(position_bias, mask)
    scales: tuple[Tensor, ...] = ()
    if isinstance(key, Int8Tensor) and isinstance(value, Int8Tensor):
        keys, values, scales = key.codes, value.codes, (key.scale, value.scale)
    else:
        keys, values = key.transpose(1, 2), value.transpose(1, 2)
    out = ops.attention(
        query.transpose(1, 2),
        keys,
        values,
        mask,
        _first_position(position_ids, query.shape[0], key.shape[2]),
        causal,
        0,
        query.shape[3] ** -0.5 if scaling is None else scaling,
        softcap or 0.0,
        *scales,
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
