"""int8 keys and values: `store_int8_`, and what has to hold between results of attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import attention
from bits import assert_same_bits
from cases import FLOATS, VALUES, random_values
from int8_kv import int8_heads
from test_attention import run_int8, sequence
from torch import Tensor

from torch_slmops import ops


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("d", [1, 16, 40, 64, 256])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_store_equals_reference(dtype: torch.dtype, d: int, values: str, isa: str) -> None:
    """Whatever the slots, the strides and the kind; nothing around them changes."""
    x = random_values(values, (2, 21, 3, d), 1).to(dtype)
    views = (x, x.transpose(1, 2).contiguous().transpose(1, 2), x.movedim(3, 0).contiguous())
    for of_values in (False, True):
        for start in (0, 5, 16, 43):
            codes, scale = int8_heads(x, of_values, 90, start)
            for view in (*views[:2], views[2].movedim(0, 3)):
                actual = torch.full_like(codes, 255), torch.full_like(scale, torch.nan)
                ops.store_int8_(view, *actual, start, of_values)
                assert_same_bits(actual[0], codes, "codes")
                assert_same_bits(actual[1], scale, "scale")


def test_store_into_part_of_a_batch_and_read(threads: None) -> None:
    x = torch.randn(3, 300, 4, 64).bfloat16()
    for values in (False, True):
        expected = int8_heads(x, values)
        for count in (1, 8):
            torch.set_num_threads(count)
            wide = torch.zeros(5, 6, *expected[0].shape[2:], dtype=torch.uint8)
            scale = torch.zeros(5, 6, 400)
            some = wide[1:4, 2:], scale[1:4, 2:, :304]
            ops.store_int8_(x, *some, 0, values)
            assert_same_bits(some[0][:, :, :18].contiguous(), expected[0][:, :, :18])
            found = ops.read_int8(some[0], some[1][:, :, :300], 64, values, torch.bfloat16)
        heads = x.transpose(1, 2).float()
        bound = heads.abs().amax(3, keepdim=True) * (0.5 / 127 + 2.0**-8)
        assert ((found.float() - heads).abs() <= bound).all()


@pytest.mark.parametrize("part", ["k", "v"])
def test_what_is_not_finite_reaches_who_sees_it(part: str, isa: str) -> None:
    q, k, v = sequence(torch.float32)
    k, v = k.clone(), v.clone()
    (k if part == "k" else v)[:, 260, 0, 3] = math.inf
    nan = run_int8(q, k, v).isnan()
    assert nan[:, 260:, :2].all()
    assert not nan[:, :260].any()
    assert not nan[:, :, 2:].any()


@pytest.mark.parametrize("scores", [1.0, 4.0, 30.0])
@pytest.mark.parametrize("sink", [False, True])
def test_error_is_that_of_int8_values(scores: float, sink: bool) -> None:
    """Rounding p to 14 bits adds little to what rounding v has done, root mean squares compared.

    Against float64 with q, k and v as their codes have them, what is left is the rounding of p. Per
    key of a split it is uniform in half a unit of p_max / 16383, times |v|; the rounding of v is
    uniform in half a unit of amax / 127, about 2.5 |v| / 127, times p. Where keys have equal p,
    that is a ratio of 127 / (2.5 * 16383) = 1 / 320; where one has nearly all of p, the others'
    first error stays and their second one goes: sqrt(256) / 320 = 1 / 20.
    """
    source = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, 512, 2, 64, generator=source) for _ in range(3))
    k = k * scores
    if sink:  # one key that takes nearly everything
        k[:, 0] = 1
        q = q + 2 * scores
    out = run_int8(q, k, v, causal=False).double().transpose(1, 2)
    wide_q, wide_k, wide_v = (
        ops.read_int8(*int8_heads(x, kind), 64, kind, torch.float32).double()
        for x, kind in ((q, False), (k, False), (v, True))
    )
    p = (wide_q @ wide_k.transpose(2, 3) / 8).softmax(-1)
    exact, floats = p @ wide_v, p @ v.double().transpose(1, 2)
    assert (out - exact).pow(2).mean().sqrt() <= (floats - exact).pow(2).mean().sqrt() / 15


def call(**changes: Any) -> Tensor:
    """A valid call with some arguments replaced."""
    x = torch.zeros(2, 5, 2, 16)
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 3, 4, 16),
        "k": int8_heads(x, False)[0],
        "v": int8_heads(x, True)[0],
        "mask": None,
        "first_position": None,
        "causal": True,
        "window": 0,
        "scale": 0.25,
        "softcap": 0.0,
        "k_scale": torch.zeros(2, 2, 5),
        "v_scale": torch.zeros(2, 2, 5),
    }
    return ops.attention(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"k": torch.zeros(2, 5, 2, 16)}, "k of dtype uint8"),
        ({"k": torch.zeros(2, 2, 0, 4, 16, 4, dtype=torch.uint8)}, "k of shape .* at least 1"),
        ({"v": torch.zeros(2, 2, 1, 4, 32, 4, dtype=torch.uint8)}, "v of shape"),
        ({"v_scale": None}, "both of k_scale and v_scale"),
        ({"k_scale": torch.zeros(2, 10)}, "k_scale of shape"),
        ({"v_scale": torch.zeros(2, 2, 4)}, "scale of v of shape .* at least 5"),
        ({"v_scale": torch.zeros(2, 2, 5).half()}, "dtype float32"),
        ({"k_scale": torch.zeros(2, 3, 5)}, "k of shape"),
        ({"q": torch.zeros(2, 3, 4, 24)}, "k of shape"),
    ],
)
def test_refuses(changes: dict[str, Any], words: str) -> None:
    assert call().shape == (2, 3, 4, 16)
    with pytest.raises(RuntimeError, match=f"attention: .*{words}"):
        call(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(3, 2, 16)}, "x of shape"),
        ({"x": torch.zeros(2, 3, 2, 300)}, r"head_dim in 1\.\.256"),
        ({"x": torch.zeros(2, 3, 2, 16).double()}, "float64"),
        ({"start": -1}, "start"),
        ({"start": 15}, "at least 2"),
        ({"values": True, "codes": torch.zeros(2, 2, 1, 5, 16, 4, dtype=torch.uint8)}, "codes"),
        ({"scale": torch.zeros(2, 2, 2)}, "at least 3"),
    ],
)
def test_store_refuses(changes: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 3, 2, 16),
        "codes": torch.zeros(2, 2, 1, 4, 16, 4, dtype=torch.uint8),
        "scale": torch.zeros(2, 2, 16),
        "start": 0,
        "values": False,
    }
    ops.store_int8_(**arguments)
    with pytest.raises(RuntimeError, match=f"store_int8_: .*{words}"):
        ops.store_int8_(**arguments | changes)


@pytest.mark.parametrize("mask", ["none", "bool"])
def test_opcheck(mask: str) -> None:
    for dtype in FLOATS:
        arguments = attention((3, 7), d=24, mask=mask, int8=True).arguments(dtype)
        torch.library.opcheck(torch.ops.slmops.attention.default, arguments)
        x = torch.randn(2, 7, 2, 24).to(dtype)
        for values in (False, True):
            filled = int8_heads(x, values, 20)
            torch.library.opcheck(torch.ops.slmops.store_int8_.default, (x, *filled, 3, values))
