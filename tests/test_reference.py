"""The executable specification against what does not depend on it: C fmaf, float64, numpy."""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
import math

import numpy as np
import pytest
import torch
from bits import assert_same_bits, bits_of, from_bits
from torch import Tensor

from torch_slmops import reference

SPECIAL = [0.0, 1.0, 3.0, 2.0**-149, 2.0**-126, 2.0**-75, 2.0**-60, 2.0**127, math.inf]
SPECIAL = [*SPECIAL, *(-x for x in SPECIAL), math.nan]


def c_fmaf(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """fmaf of the C library, elementwise."""
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    return torch.tensor([fmaf(*v) for v in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)])


def assert_fmaf(a: Tensor, b: Tensor, c: Tensor) -> None:
    """Asserts fma32 = fmaf, any NaN being as good as another."""
    actual, expected = reference.fma32(a, b, c), c_fmaf(a, b, c)
    assert_same_bits(reference.canonical_nan(actual), reference.canonical_nan(expected), "fma32")


def random_patterns(count: int) -> Tensor:
    return from_bits(torch.randint(0, 1 << 32, (count,)), torch.float32)


def traps(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Products in the middle of two float32, and addends too small to show in float64."""
    shift = torch.randint(1, 12, (count,)).double()
    a = (1 + 2.0**-shift).float()
    b = (1 + 2.0 ** (shift - 24)).float()  # a * b = 1 + 2^-shift + 2^(shift - 24) + 2^-24
    exponent = torch.randint(-125, -60, (count,)).double()
    sign = 2.0 * torch.randint(0, 2, (count,)) - 1
    return a, b, (sign * 2.0**exponent).float()


def test_fma32_on_double_rounding_traps() -> None:
    a, b, c = traps(4000)
    assert_fmaf(a, b, c)
    rounded_twice = (a.double() * b.double() + c.double()).float()
    assert not torch.equal(rounded_twice, c_fmaf(a, b, c)), "the traps catch nothing"


def test_fma32_on_denormal_results() -> None:
    a, b, c = traps(4000)
    scale = 2.0 ** torch.randint(-150, -120, (4000,)).double()
    small = (c.double() * 2.0**-60).float()
    assert_fmaf((a.double() * scale).float(), b, small)


def test_fma32_on_random_bits() -> None:
    a, b, c = (random_patterns(40000) for _ in range(3))
    assert_fmaf(a, b, c)
    assert_fmaf(a, torch.rand(40000) * 2, -a)


def test_fma32_with_cancellation() -> None:
    a, b = torch.randn(20000), torch.randn(20000)
    c = from_bits(bits_of(-a * b) + torch.randint(-2, 3, (20000,)), torch.float32)
    assert_fmaf(a, b, c)


def test_fma32_on_special_values() -> None:
    a, b, c = torch.tensor(list(itertools.product(SPECIAL, repeat=3))).T
    assert_fmaf(a, b, c)


@pytest.mark.parametrize("size", [*range(0, 35), 255, 256, 257])
def test_reduce16(size: int) -> None:
    a, b = torch.randn(size), torch.randn(size)
    partials = torch.zeros(16)
    for i in range(0, size, 16):
        part = slice(i, min(i + 16, size))
        lanes = slice(0, part.stop - i)
        partials[lanes] = c_fmaf(a[part], b[part], partials[lanes])
    p = partials.numpy()
    for distance in (8, 4, 2, 1):
        p = p[:distance] + p[distance : 2 * distance]
    assert_same_bits(reference.reduce16(a, b), torch.from_numpy(p)[0])
    rows = reference.reduce16(a.repeat(3, 1), b.repeat(3, 1))
    assert_same_bits(rows, torch.from_numpy(p).repeat(3))


def neighbours(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float32 at, just below and just above each middle of two positive values of `dtype`.

    Returns them as [3, values] and the expected bits.
    """
    infinity = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}[dtype]
    low = torch.arange(infinity - 1)
    values = from_bits(low, dtype).double(), from_bits(low + 1, dtype).double()
    middle = ((values[0] + values[1]) / 2).float()
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    inputs = torch.stack((middle, torch.nextafter(middle, down), torch.nextafter(middle, up)))
    return inputs, torch.stack((low + (low & 1), low, low + 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_every_16_bit_value(dtype: torch.dtype) -> None:
    patterns = torch.arange(1 << 16)
    values = from_bits(patterns, dtype)
    numbers = ~values.isnan()
    assert_same_bits(reference.round_to(values[numbers].float(), dtype), values[numbers])
    nan = reference.round_to(values[~numbers].float(), dtype)
    canonical = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00}[dtype]
    assert_same_bits(nan, from_bits(torch.full((len(nan),), canonical), dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_around_every_middle(dtype: torch.dtype) -> None:
    inputs, expected = neighbours(dtype)
    assert_same_bits(reference.round_to(inputs, dtype), from_bits(expected, dtype))
    negative = reference.round_to(-inputs, dtype)
    assert_same_bits(negative, from_bits(expected | 0x8000, dtype))


@pytest.mark.parametrize(("dtype", "largest"), [(torch.bfloat16, 0x7F7F), (torch.float16, 0x7BFF)])
def test_rounding_to_infinity(dtype: torch.dtype, largest: int) -> None:
    values = from_bits(torch.tensor([largest - 1, largest]), dtype).double()
    limit = values[1] + (values[1] - values[0]) / 2  # the middle to what would come next
    below = torch.nextafter(limit.float(), torch.tensor(0.0))
    rounded = reference.round_to(torch.stack((limit.float(), below)), dtype)
    assert_same_bits(rounded, from_bits(torch.tensor([largest + 1, largest]), dtype))


def test_rounding_equals_numpy_and_torch() -> None:
    x = random_patterns(1 << 18)
    x = x[~x.isnan()]
    with np.errstate(over="ignore"):
        half = torch.from_numpy(x.numpy().astype(np.float16))
    assert_same_bits(reference.to_f16(x), half)
    assert_same_bits(reference.to_bf16(x), x.bfloat16())


def test_float32_keeps_all_but_the_nan() -> None:
    x = random_patterns(1 << 14)
    same = torch.where(x.isnan(), from_bits(torch.tensor(0x7FC00000), torch.float32), x)
    assert_same_bits(reference.round_to(x, torch.float32), same)


def test_quantize_rows_equals_numpy() -> None:
    # 8-bit significands hit the middle between two codes often, where every rounding shows.
    rows = torch.randn(500, 64).bfloat16()
    codes, scale = reference.quantize_rows(rows, 64, 64)
    x = rows.float().numpy()
    amax = np.abs(x).max(axis=1)
    expected = np.rint(x * (np.float32(127) / amax)[:, None]).astype(np.int64)
    assert_same_bits(codes[:, 0], torch.from_numpy(expected), "codes")
    assert_same_bits(scale[:, 0], torch.from_numpy(amax / np.float32(127)), "scales")


def test_quantize_rows_of_special_rows() -> None:
    rows = torch.randn(6, 32)
    rows[0, 5] = math.nan
    rows[1, 6] = -math.inf
    rows[2] = 0.0
    rows[3] *= 2.0**-130
    rows[4, :] = 2.0**-120
    codes, scale = reference.quantize_rows(rows, 64, 32)
    assert codes.shape == (6, 2, 32)
    assert scale[:2, 0].isnan().all()
    assert not codes[:4].any()
    assert_same_bits(scale[2:4], torch.zeros(2, 2))
    assert codes[4, 0].eq(127).all() and scale[4, 0] == torch.tensor(2.0**-120) / 127
    # |x / s - code| <= 1/2, and r, s and the product are each within 2^-24 of 127 in relation
    steps = rows[5].double() / scale[5, 0].double()
    assert (steps - codes[5, 0]).abs().max() <= 0.5 + 127 * 4 * 2.0**-24
