"""`attention` in the order of operations of docs/arithmetic.md."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_slmops.reference.arithmetic import fma32, reduce16, round_to
from torch_slmops.reference.functions import exp, tanh

__all__ = ["attention"]

_SPLIT = 256

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
) -> Tensor:
    """softmax(q k^T * scale + mask) v: `torch_slmops.ops.attention`.

    Arguments and result as there.
    """
    batch, queries, heads, _ = q.shape
    keys, group = k.shape[1], heads // k.shape[2]
    wide_k, wide_v = (
        x.float().transpose(1, 2).repeat_interleave(group, 1) for x in (k, v)
    )  # [B, Hq, Lk, .]
    wide_q = q.float().transpose(1, 2)
    seen = _may_see(queries, keys, causal, window).expand(batch, heads, queries, keys)
    bias = None
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        bias = mask.float().expand(batch, heads, queries, keys)
    out = torch.zeros(batch, heads, queries, v.shape[3])
    for b in range(batch):
        first = 0 if first_position is None else int(first_position[b])
        state: _Part | None = None
        for start in range(-(first % _SPLIT), keys, _SPLIT):  # slots where splits begin
            part = slice(max(start, 0), min(start + _SPLIT, keys))
            scores = _scores(wide_q[b], wide_k[b, :, part], scale, softcap)
            if bias is not None:
                add = bias[b, :, :, part]
                scores = torch.where(add == -math.inf, add, scores + add)
            scores = torch.where(seen[b, :, :, part], scores, -math.inf)
            found = _split(scores, wide_v[b, :, part], part.start - start)
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


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """[H, Lq, keys] of q [H, Lq, D] and k [H, keys, D]."""
    scores = torch.zeros(q.shape[0], q.shape[1], k.shape[1])
    for d in range(q.shape[2]):
        scores = fma32(q[:, :, None, d], k[:, None, :, d], scores)
    scores = scores * torch.tensor(scale)
    if softcap > 0:
        scores = tanh(scores / torch.tensor(softcap)) * torch.tensor(softcap)
    return scores


def _split(scores: Tensor, v: Tensor, position: int) -> _Part:
    """The keys of one split, the first of which is at `position` in it."""
    most = torch.where(scores.isnan(), math.inf, scores).amax(-1)
    p = exp(scores - most[..., None])
    # Zeros before the first key put key t into partial sum t mod 16.
    aligned = torch.nn.functional.pad(p, (position % 16, 0))
    total = reduce16(aligned, torch.ones_like(aligned))
    weighted = torch.zeros(*p.shape[:2], v.shape[2])
    for j in range(v.shape[1]):
        weight = p[:, :, j, None]
        weighted = torch.where(weight == 0, weighted, fma32(weight, v[:, None, j], weighted))
    return most, total, weighted


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
