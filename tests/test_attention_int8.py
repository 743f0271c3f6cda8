"""int8 keys and values: `store_int8_`, and what has to hold between results of attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import attention
from bits import assert_same_bits
from cases import FLOATS, VALUES, random_values
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_kv import int8_heads
from test_attention import LENGTH, pad, sequence
from torch import Tensor

import torch_slmops
from torch_slmops import ops, reference


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    first: list[int] | None = None,
    *,
    causal: bool = True,
    window: int = 0,
) -> Tensor:
    """Attention on k and v [B, L, H, D] as int8."""
    position = None if first is None else torch.tensor(first)
    (keys, k_scale), (values, v_scale) = int8_heads(k, False), int8_heads(v, True)
    scales = (k_scale[:, :, : k.shape[1]], v_scale[:, :, : k.shape[1]])
    options = (causal, window, q.shape[3] ** -0.5, 0.0, *scales)
    return ops.attention(q, keys, values, mask, position, *options)


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Any, ...]:
    group, kv_heads = draw(st.integers(1, 9)), draw(st.integers(1, 2))
    batch = draw(st.integers(1, 2))
    case = attention(
        (draw(st.integers(1, 20)), draw(st.integers(1, 300))),
        (group * kv_heads, kv_heads),
        draw(st.integers(1, 40)),
        batch=batch,
        values=draw(st.sampled_from(VALUES)),
        mask=draw(st.sampled_from(["none", "bool", "padding", "add"])),
        mask_shape=(draw(st.booleans()), draw(st.booleans())),
        first=tuple(draw(st.integers(-300, 600)) for _ in range(batch)),
        causal=draw(st.booleans()),
        window=draw(st.sampled_from([0, 1, 17, 280])),
        softcap=draw(st.sampled_from([0.0, 0.0, 30.0])),
        int8=True,
    )
    return case.arguments(draw(st.sampled_from(FLOATS)))


@given(drawn(), st.sampled_from(torch_slmops.isas()), st.integers(1, 8))
@settings(max_examples=150)
def test_equals_reference(arguments: tuple[Any, ...], isa: str, threads: int) -> None:
    before = torch_slmops.isa(), torch.get_num_threads()
    torch_slmops.set_isa(isa)
    torch.set_num_threads(threads)
    try:
        actual = ops.attention(*arguments)
    finally:
        torch_slmops.set_isa(before[0])
        torch.set_num_threads(before[1])
    assert_same_bits(actual, reference.attention(*arguments))


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


@pytest.mark.parametrize("window", [0, 270])
def test_decode_gives_the_bits_of_prefill(window: int, isa: str) -> None:
    q, k, v = sequence()
    whole = run(q, k, v, window=window)
    for end in (1, 2, 15, 16, 17, 33, 255, 256, 257, 512, 513, LENGTH):
        row = run(q[:, end - 1 : end], k[:, :end], v[:, :end], window=window)
        assert_same_bits(row, whole[:, end - 1 : end], f"token {end}")
    for count in (2, 3, 16, 255, 257):
        for end in (count, 513, LENGTH):
            begin = max(0, end - count)
            rows = run(q[:, begin:end], k[:, :end], v[:, :end], window=window)
            assert_same_bits(rows, whole[:, begin:end], f"{count} tokens up to {end}")


@pytest.mark.parametrize("kind", ["bool", "add"])
@pytest.mark.parametrize("count", [1, 255, 256, 257])
def test_left_padding_changes_no_bit(count: int, kind: str, isa: str) -> None:
    q, k, v = sequence()
    whole = run(q, k, v)
    wide = [pad(x, count) for x in (q, k, v)]
    mask = (torch.arange(count + LENGTH) >= count).expand(1, 1, count + LENGTH, -1)
    if kind == "add":
        mask = torch.where(mask, 0.0, -math.inf)
    padded = run(*wide, mask, [-count])
    assert_same_bits(padded[:, count:], whole)
    assert not padded[:, :count].any(), "queries that see no key"
    for end in (1, 15, 257, LENGTH):
        slots = count + end
        row = run(
            wide[0][:, slots - 1 : slots],
            *(x[:, :slots] for x in wide[1:]),
            mask[:, :, slots - 1 : slots, :slots],
            [-count],
        )
        assert_same_bits(row, whole[:, end - 1 : end], f"token {end}")


def test_a_batch_of_different_paddings(isa: str) -> None:
    q, k, v = sequence()
    counts, length = (0, 1, 255, 257), 300
    parts = [x[:, :length] for x in (q, k, v)]
    batch = [torch.cat([pad(x[:, : length - count], count) for count in counts]) for x in parts]
    mask = torch.arange(length) >= torch.tensor(counts)[:, None, None, None]
    together = run(*batch, mask.expand(-1, 1, length, -1), [-count for count in counts])
    whole = run(q, k, v)
    for b, count in enumerate(counts):
        assert_same_bits(together[b, count:], whole[0, : length - count], f"{count} pads")


@pytest.mark.parametrize("dropped", [1, 100, 256, 300])
def test_a_rolled_cache_changes_no_bit(dropped: int, isa: str) -> None:
    q, k, v = sequence()
    window = 290
    whole = run(q, k, v, window=window)
    for end in (dropped + window, LENGTH):
        row = run(
            q[:, end - 1 : end],
            k[:, dropped:end],
            v[:, dropped:end],
            first=[dropped],
            window=window,
        )
        assert_same_bits(row, whole[:, end - 1 : end], f"token {end}")


def test_number_of_threads(threads: None) -> None:
    q, k, v = sequence()
    calls = {
        "prefill": lambda: run(q, k, v),
        "batch": lambda: run(*(x.expand(9, -1, -1, -1) for x in (q, k, v))),
        "decode": lambda: run(q[:, -1:], k, v),
        "three tokens": lambda: run(q[:, -3:], k, v, first=[7]),
    }
    for name, call in calls.items():
        torch.set_num_threads(1)
        expected = call()
        for count in range(2, 9):
            torch.set_num_threads(count)
            assert_same_bits(call(), expected, f"{name}, {count} threads")


def test_what_is_masked_reaches_nothing(isa: str) -> None:
    q, k, v = sequence(torch.float32)
    q, k, v = q[:, :300], k[:, :300].clone(), v[:, :300].clone()
    mask = torch.rand(1, 1, 300, 300) < 0.8
    hidden = torch.arange(300) % 7 == 3
    mask &= ~hidden
    expected = run(q, k, v, mask)
    for bad in (math.nan, math.inf, -math.inf):
        k[:, hidden], v[:, hidden] = bad, bad
        assert_same_bits(run(q, k, v, mask), expected, str(bad))


@pytest.mark.parametrize("part", ["k", "v"])
def test_what_is_not_finite_reaches_who_sees_it(part: str, isa: str) -> None:
    q, k, v = sequence(torch.float32)
    k, v = k.clone(), v.clone()
    (k if part == "k" else v)[:, 260, 0, 3] = math.inf
    nan = run(q, k, v).isnan()
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
    out = run(q, k, v, causal=False).double().transpose(1, 2)
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
