"""`attention` in the order of operations of docs/arithmetic.md."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torch_slmops.reference.arithmetic import fma32, reduce16, round_to
from torch_slmops.reference.functions import exp, tanh
from torch_slmops.reference.int8_heads import read_int8, round_heads

__all__ = ["attention"]

_SPLIT = 256
_TOP_WEIGHT = 16383  # of the codes of p, where v is int8
_TINY_WEIGHT = 2.0**-100

# The max, the sum of p and the weighted sum of v over some keys: [H, L], [H, L], [H, L, D].
_Part = tuple[Tensor, Tensor, Tensor]


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
    """softmax(q k^T * scale + mask) v: `torch_slmops.ops.attention`.

    Arguments and result as there.
    """
    batch, queries, heads, _ = q.shape
    products = _int8_products if k_scale is not None else _float_products
    product = products(q, k, v, scale, k_scale, v_scale)
    keys = product.keys
    seen = _may_see(queries, keys, causal, window).expand(batch, heads, queries, keys)
    bias = None
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        bias = mask.float().expand(batch, heads, queries, keys)
    out = torch.zeros(batch, heads, queries, product.dv)
    for b in range(batch):
        first = 0 if first_position is None else int(first_position[b])
        state: _Part | None = None
        for start in range(-(first % _SPLIT), keys, _SPLIT):  # slots where splits begin
            part = slice(max(start, 0), min(start + _SPLIT, keys))
            scores = product.scores(b, part)
            if softcap > 0:
                scores = tanh(scores / torch.tensor(softcap)) * torch.tensor(softcap)
            if bias is not None:
                add = bias[b, :, :, part]
                scores = torch.where(add == -math.inf, add, scores + add)
            scores = torch.where(seen[b, :, :, part], scores, -math.inf)
            found = _split(scores, partial(product.weighted, b, part), part.start - start)
            state = found if state is None else _merge(state, found)
        if state is not None:
            most, total, weighted = state
            reciprocal = torch.ones_like(total) / total
            result = fma32(weighted, reciprocal[..., None], torch.zeros(()))
            out[b] = torch.where((most == -math.inf)[..., None], 0.0, result)
    return round_to(out.transpose(1, 2).contiguous(), q.dtype)


def _may_see(queries: int, keys: int, causal: bool, window: int) -> Tensor:
    """bool [Lq, Lk] by slots alone."""
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        seen &= distance >= 0
    if window > 0:
        seen &= distance < window
    return seen


class _Products(NamedTuple):
    """Both products, by batch row and slots.

    Attributes:
        keys, dv: Lk and Dv.
        scores: q k^T * scale, [H, Lq, keys].
        weighted: Sum of p v, [H, Lq, Dv], for p of [H, Lq, keys].
    """

    keys: int
    dv: int
    scores: Callable[[int, slice], Tensor]
    weighted: Callable[[int, slice, Tensor], Tensor]


def _float_products(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *scales: Tensor | None
) -> _Products:
    """With each sum a chain of fma."""
    group = q.shape[2] // k.shape[2]
    wide_q = q.float().transpose(1, 2)
    wide_k, wide_v = (x.float().transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))

    def scores(b: int, part: slice) -> Tensor:
        own = wide_k[b, :, part]
        found = torch.zeros(q.shape[2], q.shape[1], own.shape[1])
        for d in range(q.shape[3]):
            found = fma32(wide_q[b, :, :, None, d], own[:, None, :, d], found)
        return found * torch.tensor(scale)

    def weighted(b: int, part: slice, p: Tensor) -> Tensor:
        own = wide_v[b, :, part]
        found = torch.zeros(*p.shape[:2], own.shape[2])
        for j in range(own.shape[1]):
            weight = p[:, :, j, None]
            found = torch.where(weight == 0, found, fma32(weight, own[:, None, j], found))
        return found

    return _Products(k.shape[1], v.shape[3], scores, weighted)


def _int8_products(
    q: Tensor, k: Tensor, v: Tensor, scale: float, k_scale: Tensor | None, v_scale: Tensor | None
) -> _Products:
    """With each sum an exact one of integers."""
    assert k_scale is not None
    assert v_scale is not None
    d, keys, group = q.shape[3], k_scale.shape[2], q.shape[2] // k_scale.shape[1]
    q_codes, q_scale = round_heads(q.transpose(1, 2))
    factor = q_scale * torch.tensor(scale)

    def per_query_head(x: Tensor) -> Tensor:
        return x[:, :, :keys].repeat_interleave(group, 1)

    k_codes, v_codes = (per_query_head(read_int8(x, x is v, d)) for x in (k, v))
    k_scales, v_scales = per_query_head(k_scale), per_query_head(v_scale)

    def scores(b: int, part: slice) -> Tensor:
        dots = q_codes[b] @ k_codes[b, :, part].transpose(1, 2)
        return dots.float() * k_scales[b, :, None, part] * factor[b, :, :, None]

    def weighted(b: int, part: slice, p: Tensor) -> Tensor:
        weights = torch.where(p == 0, 0.0, p * v_scales[b, :, None, part])
        most = weights.amax(-1, keepdim=True)  # NaN where one is
        used = most >= _TINY_WEIGHT
        top = torch.tensor(float(_TOP_WEIGHT))
        r = top / torch.where(used, most, 1.0)
        codes = torch.where(used, torch.round(weights * r), 0.0).to(torch.int64)
        unit = torch.where(used, most / top, 0.0)
        return (codes @ v_codes[b, :, part]).float() * torch.where(most.isnan(), most, unit)

    return _Products(keys, d, scores, weighted)


def _split(scores: Tensor, weighted: Callable[[Tensor], Tensor], position: int) -> _Part:
    """The keys of one split, the first of which is at `position` in it."""
    most = torch.where(scores.isnan(), math.inf, scores).amax(-1)
    p = exp(scores - most[..., None])
    # Zeros before the first key put key t into partial sum t mod 16.
    aligned = torch.nn.functional.pad(p, (position % 16, 0))
    total = reduce16(aligned, torch.ones_like(aligned))
    return most, total, weighted(p)


def _merge(state: _Part, part: _Part) -> _Part:
    """`part` into `state`; one without keys (max -inf) leaves the other as it is."""
    most = torch.where(state[0] > part[0], state[0], part[0])
    a, b = exp(state[0] - most), exp(part[0] - most)
    total = fma32(state[1], a, part[1] * b)
    weighted = fma32(state[2], a[..., None], part[2] * b[..., None])
    merged = (most, total, weighted)
    new, old = state[0] == -math.inf, part[0] == -math.inf

    def choose(index: int) -> Tensor:
        first, second = (x[..., None] if index == 2 else x for x in (new, old))
        chosen = torch.where(first, part[index], merged[index])
        return torch.where(second, state[index], chosen)

    return choose(0), choose(1), choose(2)
