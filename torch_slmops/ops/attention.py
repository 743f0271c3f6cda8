"""The op `attention`."""

from __future__ import annotations

from torch import Tensor

from torch_slmops.ops.common import OPS, check_gradient, fake, refuse_devices, same_device

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    first_position: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    softcap: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """out[b, i, h] = sum over j of p[j] v[b, j, h / (Hq / Hk)], p = softmax(q k^T * scale + mask).

    The bits of a result depend on nothing but its query and the keys and values it sees, with their
    token positions: prefill gives those of decode. What is masked never reaches a result, whatever
    it holds; a query that sees no key gives zeros. A NaN or a score of +inf gives a row of NaN.

    Args:
        q: [B, Lq, Hq, D], float32, bfloat16 or float16; any strides, without a copy where D is
            contiguous; D is at most 256. Query i is at key slot Lk - Lq + i.
        k: [B, Lk, Hk, D], the same dtypes, not necessarily that of `q`; Hq is a multiple of Hk.
        v: [B, Lk, Hk, Dv], dtype of `k`; Dv as D.
        mask: [B or 1, Hq or 1, Lq, Lk], or None. bool: True where a query may see a key. Else
            float32, bfloat16 or float16, added to the scores; -inf hides a key.
        first_position: int64 [B], or None for zeros: the token position of key slot 0. Negative
            with left padding, positive in a cache that has dropped its first tokens. It decides
            only how the keys are grouped (by 256), so that results do not depend on padding.
        causal: Whether keys after the query's slot are hidden.
        window: Keys that a query may see up to its own slot; 0 for all.
        scale: Factor of q k^T, as a float32.
        softcap: Scores become softcap * tanh(score / softcap) before the mask; 0 leaves them.
        k_scale, v_scale: float32 [B, Hk, Lk], where `k` and `v` are the int8 codes that
            `store_int8_` made, in their layout; Dv is then D. Queries are rounded to int8 per head
            too, p to 14 bits per split: both products are exact integer dots.

    Returns:
        [B, Lq, Hq, Dv], contiguous, with the dtype of `q`.
    """
    for x in (q, k, v):
        check_gradient("attention", x)
    y: Tensor = OPS.attention.default(
        q, k, v, mask, first_position, causal, window, scale, softcap, k_scale, v_scale
    )
    return y


@fake("attention")
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    first_position: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    softcap: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    same_device("attention", "q", q, k, "k")
    same_device("attention", "q", q, v, "v")
    return q.new_empty(q.shape if k_scale is not None else (*q.shape[:3], v.shape[3]))


refuse_devices("attention")
