"""Error-feedback rounding: the codes of GPTQ's definition, and what they gain."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_slmops import QuantizedWeight, quantize_weight
from torch_slmops.feedback import DAMPING, factorize, feed_back

FORMATS: dict[str, dict[str, Any]] = {
    "int4 sub16": {},
    "int4 group 32": {"group_size": 32},
    "int4 group 32 zero points": {"group_size": 32, "symmetric": False},
    "int4 per output": {"group_size": -1},
    "int8 group 32": {"bits": 8},
    "int8 group 64 zero points": {"bits": 8, "group_size": 64, "symmetric": False},
}
every_format = pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)


def second_moments(k: int, rows: int, seed: int = 0) -> Tensor:
    """Of inputs that hang together and have very different sizes; number 3 is always 0."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=generator) + 4 * torch.randn(k, 1, generator=generator)
    x = torch.randn(rows, k, generator=generator) @ mixing
    x *= torch.rand(k, generator=generator) ** 3
    x[:, 3] = 0
    return x.t() @ x / rows


def weight(n: int, k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    w[1] = 0
    w[2, :40] *= 1e-3
    return w


def weighted_error(w: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> float:
    d = w.double() - quantized.dequantize().double()
    return float(((d @ hessian.double()) * d).sum())


def by_definition(w: Tensor, start: QuantizedWeight, hessian: Tensor) -> Tensor:
    """GPTQ, one input after the other: nearest code, then the best change of all later inputs.

    With the inverse of H over the inputs that are left, the best change of them for an error e in
    input i is -e inverse[i] / inverse[i,i]; the inverse without input i follows from it.
    """
    h = hessian.double()
    order = h.diagonal().argsort(descending=True, stable=True)
    mean = h.diagonal().mean()
    h = h + torch.diag((h.diagonal() == 0) * mean) + DAMPING * mean * torch.eye(len(h))
    inverse = torch.linalg.inv(h)
    values = [
        dataclasses.replace(start, codes=torch.full_like(start.codes, code)).dequantize().double()
        for code in range(1 << start.bits)
    ]
    left = w.double().clone()
    codes = torch.empty_like(start.codes)
    for i in order.tolist():
        choices = torch.stack([value[:, i] for value in values])
        codes[:, i] = (choices - left[:, i]).abs().argmin(0)
        chosen = choices.gather(0, codes[:, i].long()[None])[0]
        left += torch.outer((chosen - left[:, i]) / inverse[i, i], inverse[i])
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1.0  # gone; its row and column are 0
    return codes


@every_format
def test_codes_are_those_of_the_definition(options: Any) -> None:
    w, h = weight(24, 160), second_moments(160, 400)
    start = quantize_weight(w, importance=h.diagonal(), **options)
    found = feed_back(w, start, factorize(h))
    expected = by_definition(w, start, h)
    live = found.dequantize() != dataclasses.replace(found, codes=expected).dequantize()
    assert not live.any()  # where a scale is 0 every code is the nearest
    assert (found.codes != start.codes).any()
    for name in ("scale", "zero_point", "sub_scale"):
        before, after = getattr(start, name), getattr(found, name)
        assert before is after


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_independent_inputs_give_the_codes_of_quantize(options: Any, dtype: torch.dtype) -> None:
    w = weight(40, 200).to(dtype)
    start = quantize_weight(w, **options)
    found = feed_back(w, start, factorize(3 * torch.eye(200)))
    assert torch.equal(found.codes, start.codes)


@every_format
def test_weighted_error_is_smaller(options: Any) -> None:
    shares = []
    for seed in range(6):
        w, h = weight(64, 256, seed), second_moments(256, 2000, seed)
        start = quantize_weight(w, importance=h.diagonal(), **options)
        before = weighted_error(w, start, h)
        after = weighted_error(w, feed_back(w, start, factorize(h)), h)
        assert after <= before
        shares.append(after / before)
    assert sum(shares) / len(shares) < 0.6


def test_rows_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    w, factor = weight(50, 96), factorize(second_moments(96, 300))
    start = quantize_weight(w)
    expected = feed_back(w, start, factor).codes
    monkeypatch.setattr("torch_slmops.feedback._ROWS", 7)
    assert torch.equal(feed_back(w, start, factor).codes, expected)


def test_few_rows_of_inputs_are_enough() -> None:
    w, h = weight(16, 128), second_moments(128, 3)  # of rank 3
    start = quantize_weight(w, importance=h.diagonal())
    for damping in (DAMPING, 0.0):
        found = feed_back(w, start, factorize(h, damping))
        assert weighted_error(w, found, h) < weighted_error(w, start, h)


def test_inputs_that_are_all_zero_change_nothing() -> None:
    w = weight(16, 64)
    start = quantize_weight(w)
    assert torch.equal(feed_back(w, start, factorize(torch.zeros(64, 64))).codes, start.codes)


def test_infinite_moments_are_an_error() -> None:
    with pytest.raises(ValueError, match="finite activations"):
        factorize(torch.full((32, 32), torch.inf))
