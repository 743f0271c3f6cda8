"""rms_norm, add_rms_norm and rotary: layouts, threads, what they refuse, torch's own results."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import FLOATS, VALUES, random_values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torch_slmops
from torch_slmops import ops, reference

U = 2.0**-24
EPS = 1e-6


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Views with the values of `x` [A, B, K] and other strides."""
    wide = torch.randn(*x.shape[:-1], x.shape[-1] + 9).to(x.dtype)
    wide[..., 5:-4] = x
    return {
        "slice of a row": wide[..., 5:-4],
        "transposed rows": x.transpose(0, 1).contiguous().transpose(0, 1),
        "columns first": x.movedim(-1, 0).contiguous().movedim(0, -1),
        "every other column": x.repeat_interleave(2, -1)[..., ::2],
        "every other row": x.repeat_interleave(2, 1)[:, ::2],
    }


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides_of_norms(dtype: torch.dtype, isa: str) -> None:
    x, residual = torch.randn(2, 4, 6, 70).to(dtype)
    weight = torch.randn(70)
    normed = ops.rms_norm(x, weight, EPS, 0.0, True)
    both = ops.add_rms_norm(x, residual, weight, EPS, 0.0, True)
    for name, view in layouts(x).items():
        assert_same_bits(ops.rms_norm(view, weight, EPS, 0.0, True), normed, name)
        for other_name, other in layouts(residual).items():
            result = ops.add_rms_norm(view, other, weight, EPS, 0.0, True)
            for left, right in zip(result, both, strict=True):
                assert_same_bits(left, right, f"{name}, {other_name}")
    wide_weight = weight.repeat_interleave(3)[::3]
    assert_same_bits(ops.rms_norm(x, wide_weight, EPS, 0.0, True), normed, "weight")
    for first in (x[:1], x[:, :1]):  # strides of 0, outside and inside
        expected = ops.rms_norm(first.expand(4, 6, 70).contiguous(), weight, EPS, 0.0, True)
        repeated = ops.rms_norm(first.expand(4, 6, 70), weight, EPS, 0.0, True)
        assert_same_bits(repeated, expected, "expanded")


@pytest.mark.parametrize("interleaved", [False, True])
def test_strides_of_rotary(interleaved: bool, isa: str) -> None:
    x = torch.randn(2, 3, 4, 40)
    cos, sin = torch.randn(2, 1, 3, 24)
    expected = ops.rotary(x, cos, sin, interleaved)
    projection = torch.randn(2, 3, 4 * 40 + 11)
    projection[..., 7:-4] = x.flatten(2)
    views = {
        "heads first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "part of a projection": projection[..., 7:-4].unflatten(-1, (4, 40)),
        "dims first": x.movedim(-1, 0).contiguous().movedim(0, -1),
    }
    for name, view in views.items():
        assert_same_bits(ops.rotary(view, cos, sin, interleaved), expected, name)
    for name, table in layouts(cos).items():
        assert_same_bits(ops.rotary(x, table, sin, interleaved), expected, name)
    own = ops.rotary(x, cos.expand(2, 3, 24), sin.expand(2, 3, 24), interleaved)
    assert_same_bits(own, expected, "a table for each sequence")
    one = ops.rotary(x[:, :1].expand(2, 3, 4, 40), cos, sin, interleaved)
    repeated = ops.rotary(x[:, :1].repeat(1, 3, 1, 1), cos, sin, interleaved)
    assert_same_bits(one, repeated, "stride 0")


def large_calls() -> list[Any]:
    """Calls large enough for a share on each of 8 threads, as thunks."""
    x, residual = torch.randn(2, 500, 700).bfloat16()
    weight = torch.randn(700).bfloat16()
    heads = torch.randn(1, 100, 50, 128)
    cos, sin = torch.randn(2, 1, 100, 128)
    return [
        lambda: ops.rms_norm(x, weight, EPS, 1.0, False),
        lambda: torch.stack(ops.add_rms_norm(x, residual, weight, EPS, 0.0, True)),
        lambda: ops.rotary(heads, cos, sin, False),
        lambda: ops.rotary(heads, cos, sin, True),
    ]


def test_number_of_threads(threads: None) -> None:
    calls = large_calls()
    torch.set_num_threads(1)
    expected = [call() for call in calls]
    for count in range(2, 9):
        torch.set_num_threads(count)
        for call, result in zip(calls, expected, strict=True):
            assert_same_bits(call(), result, f"{count} threads")


def test_calls_from_many_threads_at_once() -> None:
    calls = large_calls()
    expected = [call() for call in calls]
    found: list[list[Tensor]] = []
    workers = [
        threading.Thread(target=lambda: found.append([call() for call in calls])) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    for results in found:
        for actual, result in zip(results, expected, strict=True):
            assert_same_bits(actual, result)


def test_a_row_does_not_know_its_batch(isa: str) -> None:
    x, residual = torch.randn(2, 9, 130).bfloat16()
    weight = torch.randn(130)
    rows = [ops.add_rms_norm(x[i], residual[i], weight, EPS, 0.0, True) for i in range(9)]
    for whole, parts in zip(
        ops.add_rms_norm(x, residual, weight, EPS, 0.0, True), zip(*rows, strict=True), strict=True
    ):
        assert_same_bits(whole, torch.stack(parts))
    heads, (cos, sin) = torch.randn(3, 4, 5, 48), torch.randn(2, 3, 4, 32)
    turned = ops.rotary(heads, cos, sin, False)
    for b, i, h in ((0, 0, 0), (2, 3, 4), (1, 2, 3)):
        alone = ops.rotary(
            heads[b : b + 1, i : i + 1, h : h + 1],
            cos[b : b + 1, i : i + 1],
            sin[b : b + 1, i : i + 1],
            False,
        )
        assert_same_bits(alone[0, 0, 0], turned[b, i, h])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("values", VALUES)
def test_sum_is_torchs(values: str, dtype: torch.dtype, isa: str) -> None:
    """One rounding, NaN canonical; normed is rms_norm of the sum."""
    x, residual = (random_values(values, (6, 100), seed).to(dtype) for seed in (1, 2))
    weight = torch.randn(100).to(dtype)
    normed, total = ops.add_rms_norm(x, residual, weight, EPS, 0.0, True)
    expected = x + residual
    canonical = reference.round_to(torch.full_like(expected, torch.nan).float(), dtype)
    assert_same_bits(total, torch.where(expected.isnan(), canonical, expected))
    assert_same_bits(normed, ops.rms_norm(total, weight, EPS, 0.0, True))


@given(
    st.integers(1, 300),
    st.integers(1, 6),
    st.sampled_from(VALUES),
    st.sampled_from(FLOATS),
    st.sampled_from(FLOATS),
    st.sampled_from([None, *FLOATS]),
    st.sampled_from([0.0, 1.0, -0.5, 1e-9]),
    st.sampled_from([0.0, 1e-6, 1e-5, 1e-30]),
    st.booleans(),
    st.sampled_from(torch_slmops.isas()),
)
@settings(max_examples=300)
def test_norms_equal_reference(
    k: int,
    rows: int,
    values: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    out_dtype: torch.dtype | None,
    offset: float,
    eps: float,
    cast: bool,
    isa: str,
) -> None:
    x, residual = (random_values(values, (rows, k), seed).to(dtype) for seed in (k, k + 1))
    weight = random_values("normal", (k,), rows).to(weight_dtype)
    options = (weight, eps, offset, cast, out_dtype)
    before = torch_slmops.isa()
    torch_slmops.set_isa(isa)
    try:
        normed = ops.rms_norm(x, *options)
        both = ops.add_rms_norm(x, residual, *options)
    finally:
        torch_slmops.set_isa(before)
    assert_same_bits(normed, reference.rms_norm(x, *options))
    for actual, expected in zip(both, reference.add_rms_norm(x, residual, *options), strict=True):
        assert_same_bits(actual, expected)


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 140)),
    st.integers(0, 70),
    st.sampled_from(VALUES),
    st.sampled_from(FLOATS),
    st.sampled_from(FLOATS),
    st.booleans(),
    st.booleans(),
    st.sampled_from(torch_slmops.isas()),
)
@settings(max_examples=300)
def test_rotary_equals_reference(
    shape: tuple[int, int, int, int],
    pairs: int,
    values: str,
    dtype: torch.dtype,
    angles: torch.dtype,
    shared: bool,
    interleaved: bool,
    isa: str,
) -> None:
    r = 2 * min(pairs, shape[3] // 2)
    x = random_values(values, shape, r).to(dtype)
    table = (1 if shared else shape[0], shape[1], r)
    cos, sin = (random_values("normal", table, seed).to(angles) for seed in (1, 2))
    before = torch_slmops.isa()
    torch_slmops.set_isa(isa)
    try:
        actual = ops.rotary(x, cos, sin, interleaved)
    finally:
        torch_slmops.set_isa(before)
    assert_same_bits(actual, reference.rotary(x, cos, sin, interleaved))


@pytest.mark.parametrize("k", [1, 100, 4096])
def test_norm_against_float64(k: int) -> None:
    """Relative error: half that of the sum of squares (k/16 + 4 roundings), and 6 single ones."""
    x, weight = torch.randn(8, k), torch.randn(k)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
    y = ops.rms_norm(x, weight, EPS, 0.0, True)
    limit = ((k / 16 + 1 + 4) / 2 + 6) * U
    assert ((y.double() - exact).abs() <= limit * exact.abs()).all()


def test_norms_of_transformers() -> None:
    """Llama's and Gemma's modules, whose sum has another order: one unit of bfloat16 at most."""
    pytest.importorskip("transformers")
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = torch.randn(200, 576).bfloat16()
    weight = torch.randn(576).bfloat16()
    for module, offset, cast in (
        (LlamaRMSNorm(576, eps=EPS), 0.0, True),
        (GemmaRMSNorm(576, eps=EPS), 1.0, False),
    ):
        module.weight.data = weight
        with torch.no_grad():
            theirs = module(x)
        ours = ops.rms_norm(x, weight, EPS, offset, cast)
        assert theirs.dtype == ours.dtype == torch.bfloat16
        assert (ours.float() - theirs.float()).abs().le(2.0**-7 * theirs.float().abs()).all()
        assert ours.eq(theirs).float().mean() > 0.99


def test_rotary_of_transformers() -> None:
    """Llama's function in float32: three roundings there, two here."""
    pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = torch.randn(2, 5, 3, 64)
    angles = torch.rand(2, 5, 32) * 6
    cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))
    theirs, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    error = (ops.rotary(x, cos, sin, False) - theirs).abs()
    assert (error <= 6 * U * x.abs().amax()).all()


def test_interleaved_is_another_order_of_halves(isa: str) -> None:
    x, (cos, sin) = torch.randn(2, 5, 3, 64), torch.randn(2, 1, 5, 64)
    order = torch.arange(64).view(2, 32).T.flatten()  # 0, 32, 1, 33, ...
    halves = ops.rotary(x, cos, sin, False)
    pairs = ops.rotary(x[..., order], cos[..., order], sin[..., order], True)
    assert_same_bits(pairs, halves[..., order].contiguous())


X, W = torch.zeros(2, 8), torch.zeros(8)
HEADS = torch.zeros(2, 3, 4, 8)
TABLE = torch.zeros(1, 3, 8)
REFUSED = {
    "scalar": ("rms_norm", (torch.zeros(()), W, EPS, 0.0, True), "dimension"),
    "dtype": ("rms_norm", (X.double(), W, EPS, 0.0, True), "float64"),
    "weight shape": ("rms_norm", (X, torch.zeros(7), EPS, 0.0, True), r"weight of shape \(8,\)"),
    "weight dtype": ("rms_norm", (X, W.double(), EPS, 0.0, True), "weight"),
    "out dtype": ("rms_norm", (X, W, EPS, 0.0, True, torch.int8), "int8"),
    "residual shape": ("add_rms_norm", (X, X[:1], W, EPS, 0.0, True), r"shape \(2, 8\)"),
    "residual rank": ("add_rms_norm", (X, X[0], W, EPS, 0.0, True), r"shape \(2, 8\)"),
    "residual dtype": ("add_rms_norm", (X, X.half(), W, EPS, 0.0, True), "residual"),
    "rank": ("rotary", (HEADS[0], TABLE, TABLE, False), "batch, length, heads"),
    "x dtype": ("rotary", (HEADS.double(), TABLE, TABLE, False), "float64"),
    "table rank": ("rotary", (HEADS, TABLE[0], TABLE[0], False), "cos of shape"),
    "length": ("rotary", (HEADS, TABLE[:, :2], TABLE[:, :2], False), "cos of shape"),
    "batch": ("rotary", (HEADS, TABLE.repeat(3, 1, 1), TABLE, False), "cos of shape"),
    "odd": ("rotary", (HEADS, TABLE[..., :7], TABLE[..., :7], False), "even"),
    "wide": ("rotary", (HEADS, TABLE.repeat(1, 1, 2), TABLE, False), "at most 8"),
    "two shapes": ("rotary", (HEADS, TABLE, TABLE[..., :6], False), "one shape"),
    "two batches": ("rotary", (HEADS, TABLE, TABLE.repeat(2, 1, 1), False), "one shape"),
    "two dtypes": ("rotary", (HEADS, TABLE, TABLE.half(), False), "one shape and dtype"),
    "table dtype": ("rotary", (HEADS, TABLE.double(), TABLE.double(), False), "float64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    op, arguments, words = REFUSED[name]
    with pytest.raises(RuntimeError, match=words):
        getattr(ops, op)(*arguments)
