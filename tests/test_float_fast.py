"""activations="float_fast": outside of the promise of bits, inside the bound of arithmetic.md."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import FLOATS, FORMATS, Format, random_packed, random_values
from fused_cases import random_gate_up
from hypothesis import given, settings
from hypothesis import strategies as st
from test_properties import absolute_sums, drawn, exact_weight, gamma, run
from torch import Tensor

import torch_slmops
from torch_slmops import ops
from torch_slmops.isa import features

BF16_U = 2.0**-8  # of rounding to bfloat16
FAST = [replace(fmt, activations="float_fast") for fmt in FORMATS if fmt.activations == "float"]
NEVER = 1 << 40


def set_library_rows(rows: int) -> None:
    torch.ops.slmops._set_library_rows(rows, rows)


@pytest.fixture(params=[1, NEVER], ids=["library", "kernels"])
def rows(request: pytest.FixtureRequest) -> Iterator[int]:
    """From how many rows on torch's matrix product is used: always, or never."""
    set_library_rows(request.param)
    yield request.param
    set_library_rows(0)


MODERATE = drawn(FAST, values=("normal", "outliers", "zeros"))


@given(MODERATE, st.sampled_from([1, NEVER]))
@settings(max_examples=300)
def test_error_bound(d: Any, library: int) -> None:
    """(1 + u)^3 (1 + gamma) - 1 of sum |x| |w| + |bias|: bfloat16 x, weight (or bias), result."""
    packed = random_packed(d.fmt, d.n, d.x.shape[1], 10)  # of moderate scales
    d = d._replace(packed=packed, out_dtype=torch.float32)
    set_library_rows(library)
    try:
        y = run(d).double()
    finally:
        set_library_rows(0)
    x = d.x.double() if d.perm is None else d.x.double()[:, d.perm]
    bias = torch.zeros(()) if d.bias is None else d.bias.double()
    size = absolute_sums(d, x) + bias.abs()
    bound = ((1 + BF16_U) ** 3 * (1 + gamma(x.shape[1] + 300)) - 1) * size
    error = (y - x @ exact_weight(d).T - bias).abs()
    assert (error <= bound).all(), f"{float((error / bound).nan_to_num().max())} of the bound"


@pytest.mark.parametrize("fmt", FAST, ids=str)
def test_mean_error(fmt: Format, rows: int, isa: str) -> None:
    """Roundings to bfloat16 are unbiased, so their sum is far below the bound: u / 4 of |x| |w|.

    Each rounds by at most u relative, by u / 3 in the root mean square of uniform mantissas; three
    of them, with K = 512 products of random sign, stay below u / 3 * sqrt(3) of the root of the sum
    of squares, which is near |x| |w| / sqrt(K) here.
    """
    n, k = 96, 512
    packed = random_packed(fmt, n, k)
    x = random_values("normal", (8, k), seed=3)
    y = ops.linear(x, packed, n, out_dtype=torch.float32)
    exact = ops.linear(x, random_packed(replace(fmt, activations="float"), n, k), n)
    scale = exact.square().mean().sqrt()
    assert 0 <= (y - exact).square().mean().sqrt() / scale <= BF16_U


@pytest.mark.parametrize("fmt", FAST, ids=str)
def test_without_bf16_dots_few_rows_are_those_of_float(fmt: Format, isa: str) -> None:
    x = random_values("normal", (3, 192), seed=1)
    expected = ops.linear(x, random_packed(replace(fmt, activations="float"), 70, 192), 70)
    with without_bf16(isa):
        assert_same_bits(ops.linear(x, random_packed(fmt, 70, 192), 70), expected)


@contextmanager
def without_bf16(isa: str) -> Iterator[None]:
    """A CPU without dots of bfloat16, on the row that is in use."""
    before = features()
    torch.ops.slmops._set_features(", ".join(name for name in before if "bf16" not in name))
    torch_slmops.set_isa(isa)
    try:
        yield
    finally:
        torch.ops.slmops._set_features(", ".join(before))
        torch_slmops.set_isa(isa)


@pytest.mark.parametrize("fmt", FAST, ids=str)
def test_unpacked_panels_hold_the_weight(fmt: Format, isa: str) -> None:
    """Without bf16 a panel is float32: the product with an identity shows it."""
    n, k = 70, 130 if fmt.group != -1 else 128
    packed = random_packed(fmt, n, k)
    expected = ops.embedding(torch.arange(n), packed, k, torch.float32).T
    set_library_rows(1)
    try:
        with without_bf16(isa):
            assert torch.equal(ops.linear(torch.eye(k), packed, n), expected)
    finally:
        set_library_rows(0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_opcheck(dtype: torch.dtype, rows: int) -> None:
    packed = random_packed(FAST[0], 70, 192)
    source = torch.Generator().manual_seed(1)
    x = random_values("normal", (2, 3, 192), seed=1).to(dtype)
    bias, perm = torch.randn(70, generator=source), torch.randperm(192, generator=source)
    for out_dtype in (None, torch.float32):
        torch.library.opcheck(
            torch.ops.slmops.linear.default, (x, packed, 70, bias, perm, out_dtype)
        )


def test_layouts_of_x(rows: int) -> None:
    packed = random_packed(FAST[0], 70, 192)
    x = random_values("normal", (5, 4, 192), seed=1).bfloat16()
    expected = ops.linear(x, packed, 70)
    assert expected.shape == (5, 4, 70)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert_same_bits(ops.linear(turned, packed, 70), expected)
    assert ops.linear(x[:0], packed, 70).shape == (0, 4, 70)
    assert ops.linear(x[0, 0], packed, 70).shape == (70,)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`."""
    error = (actual.double() - expected.double()).square().mean().sqrt()
    return float(error / expected.double().square().mean().sqrt())


@pytest.mark.parametrize("fmt", FAST, ids=str)
@pytest.mark.parametrize("count", [3, 40])
def test_fused_ops(fmt: Format, count: int, rows: int, isa: str) -> None:
    """As the "float" ones, but for a rounding to bfloat16 of each input, weight and product.

    Three roundings to one product in `qkv_rotary`, seven to the two and h in `swiglu`, each of u at
    most.
    """
    slow = replace(fmt, activations="float")
    k, hidden = (128, 96) if fmt.group == -1 else (130, 70)
    x = random_values("normal", (2, count, k), seed=1)
    source = torch.Generator().manual_seed(2)
    cos, sin = (torch.randn(1, count, 32, generator=source) for _ in range(2))
    bias = torch.randn(4 * 32, generator=source)
    results = []
    for f in (fmt, slow):
        qkv = random_packed(f, 4 * 32, k)
        call = ([2, 1, 1], 32, bias, None, None, 0.0, 0.0, cos, sin, False)
        results.append(torch.cat(ops.qkv_rotary(x, qkv, *call), 2))
    assert relative_error(*results) <= 3 * BF16_U
    outer = torch.randn(2 * hidden, generator=source)
    results = []
    for f in (fmt, slow):
        gate_up, down = random_gate_up(f, hidden, k, 3), random_packed(f, 50, hidden)
        results.append(ops.swiglu(x, gate_up, down, hidden, 50, "relu2", outer))
    assert relative_error(*results) <= 7 * BF16_U


class TestModel:
    @pytest.fixture
    def models(self) -> tuple[Any, Any]:
        pytest.importorskip("transformers")
        from small_models import small

        how: Any = {"progress": False}
        fast = torch_slmops.optimize(small("llama"), activations="float_fast", **how)
        return fast, torch_slmops.optimize(small("llama"), activations="float", **how)

    @pytest.mark.parametrize("length", [1, 5, 40])
    def test_logits(self, models: tuple[Any, Any], length: int, rows: int) -> None:
        """The layers' roundings add up: two layers of four products, seven roundings of u each."""
        from small_models import tokens

        ids = tokens(2, length)
        with torch.inference_mode():
            fast, slow = (model(ids).logits for model in models)
        assert 0 < relative_error(fast, slow) <= 8 * 7 * BF16_U

    def test_generate_and_report(self, models: tuple[Any, Any], rows: int) -> None:
        from small_models import tokens

        fast, slow = models
        out = fast.generate(tokens(1, 20), max_new_tokens=4, do_sample=False)
        assert out.shape == (1, 24)
        found = torch_slmops.report(fast)
        assert not found.bit_portable
        assert any("float_fast" in name for name, _ in found.not_portable)
        assert 'activations="float_fast" sums in the order' in str(found)
        assert not any("float_fast" in name for name, _ in torch_slmops.report(slow).not_portable)
