"""`quantize`: the choice of codes and scales, docs/arithmetic.md section "Choosing codes"."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_slmops.reference.arithmetic import fma32, round_to

__all__ = ["quantize"]

# Divisors in their order: exact ties go to the first.
_INT4 = "-8 -7.75 -7.5 -7.25 -7 -6.75 -6.5 -8.25 -8.5 -8.75 -9 -9.25 -10 -11.5 -13.5 -16"
_INT8 = "-128 -127 -126 -124 -129 -130 -132 -134"
_INT4_ZERO = "1 .90625 .9375 .96875 1.03125 1.0625 1.09375 1.125 1.1875 1.25 1.375 1.5 1.875 2.5"
_INT8_ZERO = "1 .9875 .9925 .99625 1.00390625 1.01 1.02 1.04"
GROUP_DIVISORS = {  # by bits, symmetric
    (4, True): [float(d) for d in _INT4.split()],
    (8, True): [float(d) for d in _INT8.split()],
    (4, False): [float(d) for d in _INT4_ZERO.split()],
    (8, False): [float(d) for d in _INT8_ZERO.split()],
}
SUB_DIVISORS = [7.5, 6, 6.375, 6.75, 7.125, 7.875, 8.25, 8.625, 9]
ROW_DIVISORS = [15, 15.25, 15.625, 16, 16.75, 18.25, 14.75, 14.125]
TINY = 2.0**-100  # below it a weight counts as zero
TINY_SUB = 2.0**-40  # the same for a group of 16, relative to its row's largest
SUB_GROUP = 16
_FLOAT16_RANGE = (2.0**-14, 65504.0)
_CHUNK = 1 << 10  # columns worked on at once: with all candidates they stay in the cache


class _Base(NamedTuple):
    """Step 1 of the choice, each [columns]."""

    amax: Tensor
    base: Tensor
    s_abs: Tensor
    zero: Tensor
    least: Tensor
    largest: Tensor


def quantize(
    w: Tensor,
    bits: int,
    scale_kind: str,
    group_size: int,
    symmetric: bool,
    search: str,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chooses codes and scales of a weight; arguments and results of `torch_slmops.ops.quantize`.

    Raises:
        ValueError: A non-finite element, or an argument outside of what the op takes.
    """
    _check(w, bits, scale_kind, group_size, symmetric, search, importance)
    n, k = w.shape
    size = SUB_GROUP if scale_kind == "sub16" else (k if group_size == -1 else min(group_size, k))
    groups = -(-k // size)
    # Padding with 0 leaves every chain and maximum as it is.
    x = torch.nn.functional.pad(w.float(), (0, groups * size - k)).view(n, groups, size)
    h = torch.ones(k) if importance is None else importance
    h = torch.nn.functional.pad(h, (0, groups * size - k)).view(groups, size)
    if scale_kind == "sub16":
        rows = max(1, _CHUNK // groups)
        parts = [_sub16(part, h, search == "mse") for part in torch.split(x, rows)]
        codes, scale, sub_scale = (torch.cat(one) for one in zip(*parts, strict=True))
        codes = codes.view(n, groups * size)[:, :k].contiguous()
        return codes, scale, torch.empty(0, dtype=torch.int16), sub_scale
    columns = x.reshape(n * groups, size).T
    weights = h.repeat(n, 1).T
    s, base = _group_scales(columns, weights, bits, symmetric, search == "mse")
    scale = round_to(s, _scale_dtype(s))
    codes = _group_codes(columns, scale.float(), base)
    codes = codes.T.reshape(n, groups * size)[:, :k].contiguous()
    zero = torch.empty(0, dtype=torch.int16)
    if not symmetric:
        zero = base.zero.to(torch.int16).view(n, groups)
    return codes, scale.view(n, groups), zero, torch.empty(0, dtype=torch.uint8)


def _check(
    w: Tensor,
    bits: int,
    scale_kind: str,
    group_size: int,
    symmetric: bool,
    search: str,
    importance: Tensor | None,
) -> None:
    if w.dim() != 2 or w.numel() == 0:
        raise ValueError(f"quantize: expected a non-empty [N, K], got {tuple(w.shape)}")
    if not w.isfinite().all():
        raise ValueError("quantize: expected finite weights, got an infinity or a NaN")
    if bits not in (4, 8) or scale_kind not in ("group", "sub16"):
        raise ValueError(f"quantize: expected 4 or 8 bits of a scale kind, got {bits} {scale_kind}")
    if search not in ("mse", "absmax"):
        raise ValueError(f'quantize: expected search "mse" or "absmax", got "{search}"')
    if scale_kind == "sub16" and (bits != 4 or not symmetric or group_size not in (16, -1)):
        raise ValueError("quantize: expected 4 bits, symmetric, group_size 16 for sub16")
    if group_size != -1 and group_size < 1:
        raise ValueError(f"quantize: expected a positive group_size or -1, got {group_size}")
    if importance is not None and not ((importance >= 0) & importance.isfinite()).all():
        raise ValueError("quantize: expected finite importance that is not negative")


def _group_scales(
    x: Tensor, h: Tensor, bits: int, symmetric: bool, mse: bool
) -> tuple[Tensor, _Base]:
    """Unrounded scales [columns] of columns x [group, columns], and step 1."""
    scales, bases = [], []
    for part, weights in zip(*(torch.split(one, _CHUNK, 1) for one in (x, h)), strict=True):
        base = _symmetric_base(part, bits) if symmetric else _asymmetric_base(part, bits)
        s = base.s_abs
        if mse:
            y = part * (1 / base.base)
            ratio = _best_ratio(y, weights, GROUP_DIVISORS[bits, symmetric], base)
            s = torch.where(ratio.isnan(), s, base.base * ratio)
        scales.append(torch.where(base.amax < TINY, 0.0, s))
        bases.append(base)
    return torch.cat(scales), _Base(*(torch.cat(one) for one in zip(*bases, strict=True)))


def _symmetric_base(x: Tensor, bits: int) -> _Base:
    amax, at = _first_largest(x)
    middle = float(1 << (bits - 1))
    zero = torch.full_like(amax, middle)
    base = x.gather(0, at[None])[0]
    return _Base(amax, base, amax / (middle - 1), zero, -zero, zero - 1)


def _first_largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest |x| per column and the first row that has it."""
    amax, at = x[0].abs(), torch.zeros_like(x[0], dtype=torch.int64)
    for k in range(1, x.shape[0]):
        larger = x[k].abs() > amax
        amax = torch.where(larger, x[k].abs(), amax)
        at = torch.where(larger, k, at)
    return amax, at


def _asymmetric_base(x: Tensor, bits: int) -> _Base:
    top = float((1 << bits) - 1)
    hi, lo = x.amax(0).clamp_min(0), x.amin(0).clamp_max(0)
    amax = torch.maximum(hi, -lo)
    s_abs = hi / top - lo / top
    zero = torch.round(-lo * (1 / s_abs)).clamp(0, top)
    zero = torch.where(amax < TINY, 0.0, zero)
    return _Base(amax, s_abs, s_abs, zero, -zero, top - zero)


def _best_ratio(y: Tensor, h: Tensor, divisors: list[float], base: _Base) -> Tensor:
    """Least-squares scale of the best divisor per column of y [group, columns]; NaN if none."""
    d = torch.tensor(divisors)[:, None]
    sums = torch.zeros(2, len(divisors), y.shape[1])  # lx, l2
    for k in range(y.shape[0]):
        q = torch.round(y[k] * d).clamp(base.least, base.largest)
        sums = fma32(torch.stack(((h[k] * y[k]).expand_as(q), h[k] * q)), q, sums)
    best = torch.zeros_like(y[0])
    best_ratio = torch.full_like(best, torch.nan)
    for lx, l2 in sums.unbind(1):
        ratio = lx / l2
        score = lx * ratio
        better = (score > best) & (score < torch.inf)
        best = torch.where(better, score, best)
        best_ratio = torch.where(better, ratio, best_ratio)
    return best_ratio


def _scale_dtype(s: Tensor) -> torch.dtype:
    size = s[s != 0].abs()
    least, largest = _FLOAT16_RANGE
    return torch.float16 if ((size >= least) & (size <= largest)).all() else torch.bfloat16


def _group_codes(x: Tensor, scale: Tensor, base: _Base) -> Tensor:
    codes = torch.round(x * (1 / scale)).clamp(base.least, base.largest) + base.zero
    return torch.where(scale == 0, base.zero, codes).to(torch.uint8)


def _sub16(x: Tensor, h: Tensor, mse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """codes [rows, groups, 16], S [rows], sub-scales [rows, groups] of x [rows, groups, 16]."""
    row_amax = x.abs().amax((1, 2))
    tiny = row_amax < TINY
    y = x * (1 / torch.where(tiny, 1.0, row_amax))[:, None, None]
    group_amax = y.abs().amax(2)
    if mse:
        s = _sub16_scales(y, h, group_amax)
        unit, sub = _sub16_search(y, h, s)
    else:
        s = group_amax / 7
        unit = s.amax(1) / 15
        sub = torch.round(s * (1 / unit)[:, None]).clamp(1, 15)
    scale = torch.where(tiny, 0.0, row_amax * unit)
    sub = torch.where(tiny[:, None], 0.0, sub)
    r = _reciprocal(scale[:, None] * sub)
    codes = torch.round(x * r[:, :, None]).clamp(-8, 7) + 8
    return codes.to(torch.uint8), scale, sub.to(torch.uint8)


def _reciprocal(t: Tensor) -> Tensor:
    return torch.where(t == 0, 0.0, 1 / t)


def _sub16_scales(y: Tensor, h: Tensor, amax: Tensor) -> Tensor:
    """Unsigned scales [rows, groups] of the groups of normalised rows."""
    rows, groups, size = y.shape
    v = (y * (1 / amax)[:, :, None]).reshape(rows * groups, size).T.contiguous()
    nothing = torch.zeros_like(v[0])
    limits = _Base(nothing, nothing, nothing, nothing, nothing - 8, nothing + 7)
    ratio = _best_ratio(v, h.repeat(rows, 1).T, SUB_DIVISORS, limits).view(rows, groups)
    s = torch.where(ratio.isnan(), amax / 7, amax * ratio)
    return torch.where(amax < TINY_SUB, 0.0, s)


def _sub16_search(y: Tensor, h: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Row unit D [rows] and sub-scales [rows, groups] (float32) of least weighted error."""
    units = s.amax(1) / torch.tensor(ROW_DIVISORS)[:, None]  # [candidates, rows]
    middle = torch.round(s * (1 / units)[:, :, None]).clamp_max(15)
    subs = torch.stack((middle, (middle - 1).clamp_min(0), (middle + 1).clamp_max(15)))
    errors = _sub16_error(y, h, units[:, :, None] * subs)  # [3, candidates, rows, groups]
    sub, least = subs[0], errors[0]
    for other, error in zip(subs[1:], errors[1:], strict=True):
        better = error < least
        sub, least = torch.where(better, other, sub), torch.where(better, error, least)
    totals = torch.zeros_like(units)
    for j in range(least.shape[2]):
        totals = totals + least[:, :, j]
    best, unit, chosen = totals[0], units[0], sub[0]
    for i in range(1, len(ROW_DIVISORS)):
        better = totals[i] < best
        best = torch.where(better, totals[i], best)
        unit = torch.where(better, units[i], unit)
        chosen = torch.where(better[:, None], sub[i], chosen)
    return unit, chosen


def _sub16_error(y: Tensor, h: Tensor, t: Tensor) -> Tensor:
    """Weighted squared error of y [rows, groups, 16] with scales t [..., rows, groups]."""
    r, error = _reciprocal(t), torch.zeros_like(t)
    for k in range(SUB_GROUP):
        q = torch.round(y[:, :, k] * r).clamp(-8, 7)
        delta = fma32(-t, q, y[:, :, k])
        error = fma32(h[:, k] * delta, delta, error)
    return error
