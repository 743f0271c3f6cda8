"""The choice of codes and the packed layout, as the specification makes them."""

from __future__ import annotations

import math

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor

from torch_slmops import reference

Parts = tuple[Tensor, Tensor, Tensor, Tensor]
SEARCHES = ["absmax", "mse"]


def values(parts: Parts, bits: int, group: int) -> Tensor:
    """The weight that codes stand for, exactly, in float64."""
    codes, scale, zero, sub = (part.double() for part in parts)
    k = codes.shape[1]
    if sub.numel():
        return scale[:, None] * sub.repeat_interleave(16, 1)[:, :k] * (codes - 8)
    group = k if group == -1 else group
    shift = zero.repeat_interleave(group, 1)[:, :k] if zero.numel() else 1 << (bits - 1)
    return scale.repeat_interleave(group, 1)[:, :k] * (codes - shift)


def decibel(w: Tensor, parts: Parts, bits: int, group: int) -> float:
    error = (values(parts, bits, group) - w.double()).square().sum()
    return float(10 * torch.log10(w.double().square().sum() / error))


def test_search_gains_on_gaussian_weights() -> None:
    """The project's promise for int4 is 1.3 dB; every other kind gains too."""
    w = torch.randn(64, 512)

    def gain(bits: int, kind: str, group: int, symmetric: bool) -> float:
        absmax, mse = (reference.quantize(w, bits, kind, group, symmetric, s) for s in SEARCHES)
        return decibel(w, mse, bits, group) - decibel(w, absmax, bits, group)

    assert gain(4, "group", 32, True) >= 1.3
    assert gain(4, "group", 128, True) > 0
    assert gain(4, "group", 32, False) > 0
    assert gain(8, "group", 32, True) > 0
    assert gain(8, "group", 32, False) > 0
    assert gain(4, "sub16", 16, True) > 0


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
@pytest.mark.parametrize("group", [1, 7, 32, -1])
def test_absmax_is_within_half_a_step(bits: int, symmetric: bool, group: int) -> None:
    w = torch.randn(9, 75) + (0 if symmetric else 0.5)
    codes, scale, zero, _ = reference.quantize(w, bits, "group", group, symmetric, "absmax")
    error = (values((codes, scale, zero, torch.empty(0)), bits, group) - w.double()).abs()
    step = scale.double().repeat_interleave(75 if group == -1 else group, 1)[:, :75]
    # x / s is at most `top` steps; s is rounded to 16 bits, and x * (1 / s) twice to 24. A zero
    # point is rounded too, but what it moves over the end of the range it moves by half a step.
    top, rounding = (1 << bits) - 1, torch.finfo(scale.dtype).eps / 2
    assert (error / step).max() <= 0.5 + top * (rounding + 2 * 2.0**-23)


@pytest.mark.parametrize("search", SEARCHES)
def test_sub16_error_is_bounded(search: str) -> None:
    w = torch.randn(9, 75)
    parts = reference.quantize(w, 4, "sub16", 16, True, search)
    error = (values(parts, 4, 16) - w.double()).abs()
    step = (parts[1][:, None] * parts[3]).double().repeat_interleave(16, 1)[:, :75]
    inside = (w.abs() <= 7 * step) & (step > 0)
    assert inside.double().mean() > 0.5
    # Codes that are not clamped: half a step, and x * (1 / t) has 3 roundings of at most 8 steps.
    assert (error[inside] / step[inside]).max() <= 0.5 + 8 * 3 * 2.0**-24


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(
    ("bits", "kind", "group", "symmetric"),
    [
        (4, "group", 32, True),
        (8, "group", 32, True),
        (4, "group", 32, False),
        (4, "sub16", 16, True),
    ],
)
def test_weights_of_zero(bits: int, kind: str, group: int, symmetric: bool, search: str) -> None:
    w = torch.randn(5, 70)
    w[1] = 0.0
    w[2, :32] = -0.0
    w[3] *= 2.0**-110  # each |w| below 2^-100 counts as zero
    parts = reference.quantize(w, bits, kind, group, symmetric, search)
    restored = values(parts, bits, group)
    assert not restored[1].any() and not restored[2, :32].any() and not restored[3].any()
    assert restored[0].any() and restored[2, 32:].any()
    assert parts[1][1].eq(0).all()


@pytest.mark.parametrize("constant", [1.0, -1.0, 0.0078125, -3.1])
@pytest.mark.parametrize("bits", [4, 8])
def test_constant_weights_are_kept(bits: int, constant: float) -> None:
    w = torch.full((3, 64), constant)
    parts = reference.quantize(w, bits, "group", 32, True, "mse")
    # The constant maps to the code -8 or -128, a power of two: only the scale is rounded.
    error = (values(parts, bits, 32) - w.double()).abs().max()
    assert error <= 2.0**-11 * abs(constant)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_scaling_by_a_power_of_two(bits: int, symmetric: bool, search: str) -> None:
    w = torch.randn(8, 96)
    one = reference.quantize(w, bits, "group", 32, symmetric, search)
    four = reference.quantize(w * 4, bits, "group", 32, symmetric, search)
    assert_same_bits(four[0], one[0])
    assert_same_bits(four[1], one[1] * 4)
    sub = [reference.quantize(x, 4, "sub16", 16, True, search) for x in (w, w * 2.0**40)]
    assert_same_bits(sub[1][0], sub[0][0])
    assert_same_bits(sub[1][1], sub[0][1] * 2.0**40)
    assert_same_bits(sub[1][3], sub[0][3])


@pytest.mark.parametrize("bits", [4, 8])
def test_negated_weights(bits: int) -> None:
    w = torch.randn(8, 96)
    plus, minus = (reference.quantize(x, bits, "group", 32, True, "mse") for x in (w, -w))
    assert_same_bits(minus[0], plus[0], "codes: the scale has the sign of the largest weight")
    assert_same_bits(minus[1], -plus[1], "scale")


@pytest.mark.parametrize(("factor", "dtype"), [(1.0, torch.float16), (2.0**30, torch.bfloat16)])
@pytest.mark.parametrize("search", SEARCHES)
def test_type_of_scales(factor: float, dtype: torch.dtype, search: str) -> None:
    for w in (torch.randn(4, 64) * factor, torch.randn(4, 64) / factor):
        assert reference.quantize(w, 4, "group", 32, True, search)[1].dtype == dtype


@pytest.mark.parametrize("search", SEARCHES)
def test_one_large_group_makes_all_scales_bfloat16(search: str) -> None:
    w = torch.randn(4, 64)
    w[3, 40:] = 2.0**20
    assert reference.quantize(w, 4, "group", 32, True, search)[1].dtype == torch.bfloat16


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("kind", ["group", "sub16"])
def test_largest_and_least_weights(kind: str, search: str) -> None:
    largest = torch.finfo(torch.float32).max
    w = torch.stack((torch.full((32,), largest), -torch.full((32,), largest), torch.randn(32)))
    w = torch.cat((w, torch.full((1, 32), 2.0**-100)))
    parts = reference.quantize(w, 4, kind, 16, True, search)
    restored = values(parts, 4, 16)
    assert restored.isfinite().all()
    # The rows of one constant have an end of the codes' range: only the bf16 scale is rounded.
    constant = w[[0, 1, 3]].double()
    assert ((restored[[0, 1, 3]] - constant) / constant).abs().max() <= 2.0**-8


@pytest.mark.parametrize("kind", ["group", "sub16"])
def test_importance_moves_the_error(kind: str) -> None:
    w = torch.randn(64, 64)
    importance = torch.ones(64)
    importance[::4] = 1000.0
    plain = reference.quantize(w, 4, kind, 16, True, "mse")
    weighted = reference.quantize(w, 4, kind, 16, True, "mse", importance)
    squares = [(values(p, 4, 16) - w.double())[:, ::4].square().sum() for p in (plain, weighted)]
    assert squares[1] < squares[0]
    ones = reference.quantize(w, 4, kind, 16, True, "mse", torch.ones(64))
    for name, a, b in zip(("codes", "scale", "zero", "sub"), ones, plain, strict=True):
        assert_same_bits(a, b, name)


@pytest.mark.parametrize("factor", [0.0, 3e38])
def test_importance_without_use_falls_back_to_absmax(factor: float) -> None:
    """No weight has an error, or all sums overflow."""
    w = torch.randn(8, 64)
    parts = reference.quantize(w, 4, "group", 32, True, "mse", torch.full((64,), factor))
    absmax = reference.quantize(w, 4, "group", 32, True, "absmax")
    assert_same_bits(parts[0], absmax[0], "codes")
    assert_same_bits(parts[1], absmax[1], "scale")


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    w = torch.randn(4, 64)
    w[2, 3] = bad
    with pytest.raises(ValueError, match="finite"):
        reference.quantize(w, 4, "group", 32, True, "mse")


def test_low_precision_sources_are_widened() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        w = torch.randn(6, 40).to(dtype)
        for a, b in zip(
            reference.quantize(w, 4, "sub16", 16, True, "mse"),
            reference.quantize(w.float(), 4, "sub16", 16, True, "mse"),
            strict=True,
        ):
            assert_same_bits(a, b)
