"""Drawn cases against the reference, and what has to hold between results of the ops.

The properties are exact (equal bits) but for the last ones, whose bounds against float64 are
derived where they are tested: u = 2^-24, gamma(n) = n u / (1 - n u).
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import pytest
import torch
from bits import assert_same_bits
from cases import (
    FLOATS,
    FORMATS,
    VALUES,
    Format,
    random_packed,
    random_parts,
    random_values,
    whole_k_only,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torch_slmops
from torch_slmops import ops, reference

U = 2.0**-24
EXACT_ZERO = [fmt for fmt in FORMATS if not fmt.floating_zero]
SHORT_GROUPS = [fmt for fmt in FORMATS if -1 not in (fmt.group, fmt.act_group)]


def gamma(n: int) -> float:
    return n * U / (1 - n * U)


class Drawn(NamedTuple):
    """A linear call."""

    fmt: Format
    x: Tensor
    packed: Tensor
    n: int
    bias: Tensor | None
    perm: Tensor | None
    out_dtype: torch.dtype | None
    isa: str
    threads: int


@st.composite
def drawn(
    draw: st.DrawFn,
    formats: list[Format] = FORMATS,
    values: tuple[str, ...] = VALUES,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> Drawn:
    fmt = draw(st.sampled_from(formats))
    k = draw(st.integers(1, 300).filter(lambda k: whole_k_only(fmt, k)))
    n, m, seed = draw(st.integers(1, 80)), draw(st.integers(1, 20)), draw(st.integers(0, 999))
    scales = draw(st.sampled_from(["normal", "normal", "normal", "extreme"]))
    dtype = draw(st.sampled_from(dtypes))
    x = random_values(draw(st.sampled_from(values)), (m, k), seed).to(dtype)
    source = torch.Generator().manual_seed(seed)
    bias_dtype = draw(st.sampled_from([None, *FLOATS]))
    bias = None if bias_dtype is None else torch.randn(n, generator=source).to(bias_dtype)
    perm = torch.randperm(k, generator=source) if draw(st.booleans()) else None
    out_dtype = draw(st.sampled_from([None, *FLOATS]))
    isa = draw(st.sampled_from(torch_slmops.isas()))
    packed = random_packed(fmt, n, k, seed, scales)
    return Drawn(fmt, x, packed, n, bias, perm, out_dtype, isa, draw(st.integers(1, 8)))


def run(d: Drawn, x: Tensor | None = None) -> Tensor:
    """The op's result, on the drawn row of instructions and number of threads."""
    before, threads = torch_slmops.isa(), torch.get_num_threads()
    torch_slmops.set_isa(d.isa)
    torch.set_num_threads(d.threads)
    try:
        return ops.linear(d.x if x is None else x, d.packed, d.n, d.bias, d.perm, d.out_dtype)
    finally:
        torch_slmops.set_isa(before)
        torch.set_num_threads(threads)


@given(drawn())
@settings(max_examples=400)
def test_linear_equals_reference(d: Drawn) -> None:
    expected = reference.linear(d.x, d.packed, d.n, d.bias, d.perm, d.out_dtype)
    assert_same_bits(run(d), expected)


@given(drawn())
@settings(max_examples=100)
def test_a_row_does_not_know_its_batch(d: Drawn) -> None:
    rows = torch.cat([run(d, d.x[i : i + 1]) for i in range(len(d.x))])
    assert_same_bits(run(d), rows)
    assert_same_bits(run(d, d.x.flip(0)), rows.flip(0))


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_number_of_threads(fmt: Format, threads: None) -> None:
    """A share for each of 8 threads even at one row: a share takes 2^16 products at least."""
    n, k = 2080, 256
    assert n * k >= 8 << 16
    packed = random_packed(fmt, n, k)
    x = random_values("outliers", (50, k), seed=2)
    ids = torch.arange(n)

    def results() -> tuple[Tensor, ...]:
        one = ops.linear(x[:1], packed, n)
        return ops.linear(x, packed, n), one, ops.embedding(ids, packed, k, torch.float32)

    torch.set_num_threads(1)
    expected = results()
    for count in range(2, 9):
        torch.set_num_threads(count)
        for name, a, b in zip(("M=50", "M=1", "embedding"), results(), expected, strict=True):
            assert_same_bits(a, b, f"{count} threads, {name}")


@pytest.mark.parametrize("group", [16, 32])
def test_number_of_threads_of_quantize(group: int, threads: None) -> None:
    w = torch.randn(300, 256)
    kind = "sub16" if group == 16 else "group"
    torch.set_num_threads(1)
    expected = ops.quantize(w, 4, kind, group, True, "mse")
    for count in range(2, 9):
        torch.set_num_threads(count)
        parts = ops.quantize(w, 4, kind, group, True, "mse")
        for i, (left, right) in enumerate(zip(parts, expected, strict=True)):
            assert_same_bits(left, right, f"{count} threads, part {i}")


def test_calls_from_many_threads_at_once() -> None:
    packed = random_packed(FORMATS[2], 300, 256)
    x = random_values("normal", (40, 256), seed=3)
    expected = ops.linear(x, packed, 300)
    results: list[Tensor] = []

    def work() -> None:
        for _ in range(20):
            results.append(ops.linear(x, packed, 300))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 80
    for result in results:
        assert_same_bits(result, expected)


@given(drawn(), st.integers(0, 999))
@settings(max_examples=60)
def test_order_of_outputs(d: Drawn, seed: int) -> None:
    order = torch.randperm(d.n, generator=torch.Generator().manual_seed(seed))
    codes, scale, zero, sub = ops.unpack(d.packed)
    parts = [part[order] if part.numel() else None for part in (codes, scale, zero, sub)]
    packed = reference.pack(*parts, *d.fmt.options)
    bias = None if d.bias is None else d.bias[order]
    moved = d._replace(packed=packed, bias=bias)
    assert_same_bits(run(moved), run(d)[:, order])


@given(drawn(SHORT_GROUPS, values=("normal", "outliers", "zeros")), st.integers(1, 64))
@settings(max_examples=60)
def test_inputs_of_zero_change_nothing(d: Drawn, more: int) -> None:
    """Columns of zeros behind K, with any codes, while the group structure stays as it is."""
    k = d.x.shape[1]
    parts = random_parts(d.fmt, d.n, k + more, seed=8)
    wide = reference.pack(*parts, *d.fmt.options)
    groups = -(-k // d.fmt.group)
    codes, scale, zero, sub = parts
    cut = scale if d.fmt.sub16 else scale[:, :groups].contiguous()
    zero = None if zero is None else zero[:, :groups].contiguous()
    sub = None if sub is None else sub[:, :groups].contiguous()
    narrow = reference.pack(codes[:, :k].contiguous(), cut, zero, sub, *d.fmt.options)
    x = torch.nn.functional.pad(d.x, (0, more))
    perm = d.perm
    if perm is not None:
        perm = torch.cat((perm, torch.arange(k, k + more)))
    assert_same_bits(run(d._replace(packed=wide, perm=perm), x), run(d._replace(packed=narrow)))


@given(drawn(values=("normal", "outliers"), dtypes=(torch.float32,)), st.integers(-40, 40))
@settings(max_examples=60)
def test_powers_of_two_pass_through(d: Drawn, power: int) -> None:
    """x * 2^p gives y * 2^p: no sum of |x| < 2^11 and 300 weights leaves float32's range."""
    normal = random_packed(d.fmt, d.n, d.x.shape[1], 9)
    d = d._replace(bias=None, out_dtype=torch.float32, packed=normal)
    assert_same_bits(run(d, d.x * 2.0**power), run(d) * 2.0**power)


@given(drawn(dtypes=(torch.float32, torch.bfloat16)))
@settings(max_examples=60)
def test_sign_passes_through(d: Drawn) -> None:
    """-x gives -y, except that a sum that is exactly 0 is +0 both times."""
    d = d._replace(bias=None)
    plus, minus = run(d), run(d, -d.x)
    nan = plus.isnan()
    assert torch.equal(nan, minus.isnan())
    assert torch.equal(minus[~nan], -plus[~nan])


@given(st.sampled_from(EXACT_ZERO), st.integers(0, 99), st.floats(0.5, 2.0, width=32))
@settings(max_examples=60)
def test_one_input_returns_a_column(fmt: Format, seed: int, value: float) -> None:
    """One-hot x: 127 steps of s_a in int8 mode, x itself in float mode; then one or two scales.

    Without float zero points and offsets, whose part of the sum is rounded apart.
    """
    n, k = 40, 128
    packed = random_packed(fmt, n, k, seed)
    codes, scale, zero, sub = (part.double() for part in ops.unpack(packed))
    at = seed % k
    x = torch.zeros(1, k)
    x[0, at] = value
    y = ops.linear(x, packed, n)[0]
    group = k if fmt.group == -1 else fmt.group
    if fmt.sub16:
        v, s = (sub[:, at // 16] * (codes[:, at] - 8)).float(), scale.float()
    else:
        z = zero[:, at // group] if zero.numel() else float(1 << (fmt.bits - 1))
        v, s = (codes[:, at] - z).float(), scale[:, at // group].float()
    if fmt.activations == "int8":
        s_a = torch.tensor(value) / 127
        dots = 127 * v
        expected = dots * s_a * s if fmt.sub16 else dots * s * s_a
    else:
        expected = torch.tensor(value) * v * s
    assert torch.equal(y, expected)


def exact_weight(d: Drawn) -> Tensor:
    """float64 [N, K] of a drawn weight: all products of codes and scales are exact."""
    codes, scale, zero, sub = (part.double() for part in ops.unpack(d.packed))
    k = codes.shape[1]
    if d.fmt.sub16:
        return scale[:, None] * sub.repeat_interleave(16, 1)[:, :k] * (codes - 8)
    group = k if d.fmt.group == -1 else d.fmt.group
    z = zero.repeat_interleave(group, 1)[:, :k] if zero.numel() else 1 << (d.fmt.bits - 1)
    s = scale.repeat_interleave(group, 1)[:, :k]
    return s * codes + z if d.fmt.zero == "offset" else s * (codes - z)


def absolute_sums(d: Drawn, x: Tensor) -> Tensor:
    """What rounding errors are relative to, in float64 [M, N]: sum of |x| |w|.

    With a float zero point codes and zero point are summed apart: |x| |s| (u + |z|), and with an
    offset m: |x| (|s| u + |m|).
    """
    if not d.fmt.floating_zero:
        return x.abs() @ exact_weight(d).abs().T
    codes, scale, zero, _ = (part.double() for part in ops.unpack(d.packed))
    k = codes.shape[1]
    group = k if d.fmt.group == -1 else d.fmt.group
    s, z = (part.abs().repeat_interleave(group, 1)[:, :k] for part in (scale, zero))
    return x.abs() @ (s * codes + (z if d.fmt.zero == "offset" else s * z)).T


MODERATE = drawn(values=("normal", "outliers"), dtypes=(torch.float32,))


@given(MODERATE)
@settings(max_examples=60)
def test_error_against_float64(d: Drawn) -> None:
    """|y - x w| <= int8 rounding of x + float32 rounding of the sums.

    int8: |x_k - s_a code_k| <= s_a / 2 (1 + 4u) + 2u |x_k| + u |x_k| (the last for s_a itself).
    Sums: each product passes at most all roundings of its chains: one per k in float mode, one or
    two per group in int8 mode, one for float(I), one for s * z, one for S. k_padded + 8 are enough
    for all of them.
    """
    k = d.x.shape[1]
    d = d._replace(
        bias=None, perm=None, out_dtype=torch.float32, packed=random_packed(d.fmt, d.n, k, 10)
    )
    x, w = d.x.double(), exact_weight(d)
    used = x
    bound = torch.zeros(len(x), d.n, dtype=torch.float64)
    if d.fmt.activations == "int8":
        padded = ops.describe(d.packed)
        act = padded.act_group
        width = -(-k // act) * act
        amax = torch.nn.functional.pad(x, (0, width - k)).abs().view(len(x), -1, act).amax(2)
        s_a = (amax / 127).repeat_interleave(act, 1)[:, :k]
        bound += (s_a / 2 * (1 + 4 * U) + 3 * U * x.abs()) @ w.abs().T
        used = x.abs() + s_a  # |s_a code| is at most this
    bound += gamma(k + 256 + 8) * absolute_sums(d, used)
    error = (run(d).double() - x @ w.T).abs()
    assert (error <= bound).all(), f"{float((error / bound).nan_to_num().max())} of the bound"


def test_mean_error_of_rounded_activations(isa: str) -> None:
    """Rounding to the nearest of s_a: errors are uniform, their mean square is s_a^2 / 12.

    Over weights of equal size and random sign the mean square of the outputs' errors is then near
    sum of s_a^2 / 12 |w|^2. N = 1000 outputs deviate by sqrt(2 / N), K = 2048 errors by
    sqrt(0.8 / K): together 4.9 %, and the largest of 128 inputs has no error: 0.8 %. 25 % is five
    deviations.
    """
    n, k = 1000, 2048
    x = torch.randn(1, k)
    codes = (torch.randint(0, 2, (n, k)) * 14 + 1).to(torch.uint8)
    scale = torch.ones(n, k // 32, dtype=torch.float16)
    packed = reference.pack(codes, scale, None, None, 4, 32, 128, "int8")
    error = ops.linear(x, packed, n).double() - x.double() @ (codes.double() - 8).T
    s_a = x.double().view(-1, 128).abs().amax(1) / 127
    expected = float((128 * 7**2 * s_a.square() / 12).sum())
    assert 0.75 <= float(error.square().mean()) / expected <= 1.25


@given(drawn(values=("normal",)), st.sampled_from(FLOATS))
@settings(max_examples=60)
def test_embedding_equals_reference(d: Drawn, dtype: torch.dtype) -> None:
    ids = torch.arange(d.n).flip(0)
    k = d.x.shape[1]
    expected = reference.embedding(ids, d.packed, k, dtype)
    before = torch_slmops.isa()
    torch_slmops.set_isa(d.isa)
    actual = ops.embedding(ids, d.packed, k, dtype)
    torch_slmops.set_isa(before)
    assert_same_bits(actual, expected)
    if dtype == torch.float32 and d.fmt.zero != "float":
        # One rounding of the exact value; float64 holds the product of 24 and 8 bits. (The sign of
        # a zero may differ: an integer 0 has none.)
        assert torch.equal(actual, exact_weight(d).flip(0).float())


class Weights(NamedTuple):
    """A quantize call."""

    w: Tensor
    bits: int
    kind: str
    group: int
    symmetric: bool
    search: str
    importance: Tensor | None


@st.composite
def weights(draw: st.DrawFn) -> Weights:
    kind = draw(st.sampled_from(["group", "sub16"]))
    bits = 4 if kind == "sub16" else draw(st.sampled_from([4, 8]))
    group = 16 if kind == "sub16" else draw(st.sampled_from([1, 5, 32, 64, -1]))
    n, k, seed = draw(st.integers(1, 40)), draw(st.integers(1, 130)), draw(st.integers(0, 999))
    source = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=source) * 2.0 ** draw(st.integers(-125, 124))
    shape = draw(st.sampled_from(["as is", "rows", "zeros", "constant", "positive", "denormal"]))
    if shape == "rows":  # of very different size
        w *= 2.0 ** torch.randint(-60, 1, (n, 1), generator=source)
    elif shape == "zeros":
        w = torch.where(torch.rand(n, k, generator=source) < 0.7, torch.zeros(()), w)
    elif shape == "constant":
        w = w[:, :1].repeat(1, k)
    elif shape == "positive":
        w = w.abs()
    elif shape == "denormal":
        w = w * 2.0**-30
    dtype = draw(st.sampled_from(FLOATS))
    w = w.to(dtype).nan_to_num(posinf=torch.finfo(dtype).max, neginf=torch.finfo(dtype).min)
    symmetric = kind == "sub16" or draw(st.booleans())
    importance = None
    if draw(st.booleans()):
        importance = torch.rand(k, generator=source) * 10.0 ** draw(st.integers(-40, 38))
        importance *= torch.rand(k, generator=source) < 0.8
    return Weights(
        w, bits, kind, group, symmetric, draw(st.sampled_from(["mse", "absmax"])), importance
    )


@given(weights(), st.sampled_from(torch_slmops.isas()), st.integers(1, 8))
@settings(max_examples=250)
def test_quantize_equals_reference(call: Weights, isa: str, count: int) -> None:
    before, threads = torch_slmops.isa(), torch.get_num_threads()
    torch_slmops.set_isa(isa)
    torch.set_num_threads(count)
    try:
        actual = ops.quantize(*call)
    finally:
        torch_slmops.set_isa(before)
        torch.set_num_threads(threads)
    names = ("codes", "scale", "zero_point", "sub_scale")
    for name, left, right in zip(names, actual, reference.quantize(*call), strict=True):
        assert_same_bits(left, right, name)
    assert actual[1].isfinite().all()
