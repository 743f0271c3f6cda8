"""`linear` and `embedding` in the order of operations of docs/arithmetic.md.

Loops run over k, or over groups of k, and nothing else: rows and outputs are vectorized.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_slmops.reference.arithmetic import fma32, round_to
from torch_slmops.reference.layout import Layout, read_header, unpack

__all__ = ["embedding", "linear", "quantize_rows"]

TINY_ACTIVATION = 2.0**-120  # a group whose largest |x| is less counts as zero


class _Weight(NamedTuple):
    """An unpacked weight, K padded; absent parts are empty."""

    layout: Layout
    codes: Tensor  # int64 [N, k_padded], minus the zero point where that is an integer
    scale: Tensor  # float32 [N, groups]; sub16: [N]
    zero: Tensor  # float32 [N, groups], floating zero points and offsets only


def linear(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    perm: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y[..., n] = sum over k of x[..., k] * w[n, k] + bias[n]: `torch_slmops.ops.linear`.

    Arguments and result as there. "float_fast" is outside of the contract; here it is "float", from
    which it differs by no more than `float_fast_bound`.

    Raises:
        ValueError: A shape that does not fit the packed weight.
    """
    weight = _unpacked(packed)
    layout = weight.layout
    if x.shape[-1] != layout.k or out_features != layout.n:
        raise ValueError(
            f"linear: expected {layout.k} inputs and {layout.n} outputs, got {x.shape[-1]} and "
            f"{out_features}"
        )
    rows = x.reshape(-1, layout.k)
    if perm is not None:
        rows = rows[:, perm]
    if layout.activations == "int8":
        codes, s_a = quantize_rows(rows, layout.k_padded, layout.act_group)
        y = _sub16_dots(codes, s_a, weight) if layout.sub16 else _group_dots(codes, s_a, weight)
    else:
        wide = torch.nn.functional.pad(rows.float(), (0, layout.k_padded - layout.k))
        y = _float_sums(wide, weight)
    if layout.sub16:
        y = y * weight.scale
    if bias is not None:
        y = y + bias.float()
    return round_to(y, out_dtype or x.dtype).view(*x.shape[:-1], layout.n)


def embedding(ids: Tensor, packed: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """y[..., k] = w[ids[...], k]: `torch_slmops.ops.embedding`.

    Arguments and result as there.

    Raises:
        ValueError: `dim` is not K.
    """
    weight = _unpacked(packed)
    layout = weight.layout
    if dim != layout.k:
        raise ValueError(f"embedding: expected dim {layout.k}, got {dim}")
    values = weight.codes[ids].float()
    if layout.sub16:
        values = values * weight.scale[ids][..., None]
    else:
        scale = weight.scale[ids].repeat_interleave(layout.group, -1)
        if layout.zero_kind >= 2:
            zero = weight.zero[ids].repeat_interleave(layout.group, -1)
        if layout.zero_kind == 3:
            values = fma32(values, scale, zero)
        else:
            values = (values - zero if layout.zero_kind == 2 else values) * scale
    return round_to(values[..., :dim].contiguous(), dtype)


def quantize_rows(x: Tensor, k_padded: int, act_group: int) -> tuple[Tensor, Tensor]:
    """Rounds activations to int8 per group.

    Args:
        x: [M, K], float32, bfloat16 or float16.
        k_padded: K rounded up to a multiple of `act_group`.
        act_group: Inputs that share a scale.

    Returns:
        codes int64 [M, k_padded / act_group, act_group], in -127..127; scales float32
        [M, k_padded / act_group], NaN for a group with a non-finite element.
    """
    wide = torch.nn.functional.pad(x.float(), (0, k_padded - x.shape[1]))
    groups = wide.view(len(x), k_padded // act_group, act_group)
    amax = groups.abs().amax(2)
    finite = groups.isfinite().all(2)
    used = finite & (amax >= TINY_ACTIVATION)
    safe = torch.where(used, amax, 1.0)
    r = torch.tensor(127.0) / safe  # torch computes 127 / safe as (1 / safe) * 127: two roundings
    codes = torch.round(groups * r[:, :, None]).clamp(-127, 127)
    codes = torch.where(used[:, :, None], codes, 0.0)
    scale = torch.where(used, safe / 127, 0.0)
    return codes.to(torch.int64), torch.where(finite, scale, torch.nan)


def _unpacked(packed: Tensor) -> _Weight:
    layout = read_header(packed)
    codes, scale, zero_point, sub_scale = unpack(packed)
    wide = codes.to(torch.int64)
    none = torch.empty(0)
    missing = layout.k_padded - layout.k
    if layout.sub16:
        sub = sub_scale.to(torch.int64).repeat_interleave(16, 1)[:, : layout.k]
        wide = torch.nn.functional.pad(sub * (wide - 8), (0, missing))
        return _Weight(layout, wide, scale, none)
    groups = layout.k_padded // layout.group
    pad_groups = (0, groups - scale.shape[1])
    scale = torch.nn.functional.pad(scale.float(), pad_groups)
    if layout.zero_kind >= 2:
        zero = torch.nn.functional.pad(zero_point.float(), pad_groups)
        return _Weight(layout, torch.nn.functional.pad(wide, (0, missing)), scale, zero)
    if layout.zero_kind == 1:
        zeros = zero_point.to(torch.int64).repeat_interleave(layout.group, 1)
        wide = wide - zeros[:, : layout.k]
    else:
        wide = wide - layout.middle
    return _Weight(layout, torch.nn.functional.pad(wide, (0, missing)), scale, none)


def _group_dots(codes: Tensor, s_a: Tensor, weight: _Weight) -> Tensor:
    """The int8 sums [M, N] of scale kind `group`."""
    layout = weight.layout
    unit = min(layout.group, layout.act_group)  # k of one integer dot
    units = codes.reshape(len(codes), layout.k_padded // unit, unit)
    acc = codes.new_zeros(len(codes), layout.n, dtype=torch.float32)
    for a in range(layout.k_padded // layout.act_group):
        t = torch.zeros_like(acc)
        for k in range(a * layout.act_group, (a + 1) * layout.act_group, unit):
            activations, g = units[:, k // unit], k // layout.group
            s = weight.scale[:, g]
            t = fma32((activations @ weight.codes[:, k : k + unit].T).float(), s, t)
            if layout.zero_kind >= 2:
                zero = weight.zero[:, g]
                shift = zero if layout.zero_kind == 3 else -(s * zero)
                t = fma32(activations.sum(1).float()[:, None], shift, t)
        acc = fma32(t, s_a[:, a, None], acc)
    return acc


def _sub16_dots(codes: Tensor, s_a: Tensor, weight: _Weight) -> Tensor:
    """The int8 sums [M, N] of scale kind `sub16`, not yet times S."""
    width = weight.layout.act_group
    acc = codes.new_zeros(len(codes), weight.layout.n, dtype=torch.float32)
    for a in range(codes.shape[1]):
        dot = codes[:, a] @ weight.codes[:, a * width : (a + 1) * width].T
        acc = fma32(dot.float(), s_a[:, a, None], acc)
    return acc


def _float_sums(x: Tensor, weight: _Weight) -> Tensor:
    """The sums [M, N] with unrounded activations; sub16: not yet times S."""
    layout = weight.layout
    values, scale = weight.codes.float(), weight.scale
    if layout.zero_kind == 2:
        values = values - weight.zero.repeat_interleave(layout.group, 1)
    if layout.zero_kind == 3:
        wide = (part.repeat_interleave(layout.group, 1) for part in (scale, weight.zero))
        values, scale = fma32(values, *wide), torch.ones_like(scale)
    acc = x.new_zeros(len(x), layout.n)
    if layout.sub16:
        for k in range(layout.k_padded):
            acc = fma32(x[:, k, None], values[:, k], acc)
        return acc
    for g in range(layout.k_padded // layout.group):
        t = torch.zeros_like(acc)
        for k in range(g * layout.group, (g + 1) * layout.group):
            t = fma32(x[:, k, None], values[:, k], t)
        acc = fma32(t, scale[:, g], acc)
    return acc
