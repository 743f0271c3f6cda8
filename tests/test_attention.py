"""What has to hold between results of attention, and its error against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import attention, random_mask
from bits import assert_same_bits
from cases import FLOATS, VALUES
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_kv import int8_heads
from torch import Tensor

import torch_slmops
from torch_slmops import ops, reference

U = 2.0**-24
LENGTH = 600


def gamma(n: int) -> float:
    return n * U / (1 - n * U)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    first: list[int] | None = None,
    *,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    scales: tuple[Tensor, ...] = (),
) -> Tensor:
    position = None if first is None else torch.tensor(first)
    options = (causal, window, q.shape[3] ** -0.5, softcap, *scales)
    return ops.attention(q, k, v, mask, position, *options)


def run_int8(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
    """`run` on k and v [B, L, H, D] as int8."""
    (keys, k_scale), (values, v_scale) = int8_heads(k, False), int8_heads(v, True)
    scales = (k_scale[:, :, : k.shape[1]], v_scale[:, :, : k.shape[1]])
    return run(q, keys, values, *rest, scales=scales, **options)


@pytest.fixture(params=[run, run_int8], ids=["float", "int8"])
def either(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """Attention on keys and values as they are, and on int8 ones."""
    found: Callable[..., Tensor] = request.param
    return found


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
        int8=draw(st.booleans()),
    )
    return case.arguments(draw(st.sampled_from(FLOATS)))


@given(drawn(), st.sampled_from(torch_slmops.isas()), st.integers(1, 8))
@settings(max_examples=400)
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


def sequence(dtype: torch.dtype = torch.bfloat16, d: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of one sequence of 600 tokens, 4 query and 2 key heads."""
    source = torch.Generator().manual_seed(3)
    shapes = ((1, LENGTH, heads, d) for heads in (4, 2, 2))
    q, k, v = (torch.randn(shape, generator=source).to(dtype) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("window", [0, 270])
def test_decode_gives_the_bits_of_prefill(
    window: int, isa: str, either: Callable[..., Tensor]
) -> None:
    q, k, v = sequence()
    whole = either(q, k, v, window=window)
    steps = [*range(1, 40), *range(250, 262), *range(508, 520), LENGTH]
    for end in steps:
        row = either(q[:, end - 1 : end], k[:, :end], v[:, :end], window=window)
        assert_same_bits(row, whole[:, end - 1 : end], f"token {end}")
    for count in (2, 3, 16, 255, 257):
        for end in (count, 300, 513, LENGTH):
            begin = max(0, end - count)
            rows = either(q[:, begin:end], k[:, :end], v[:, :end], window=window)
            assert_same_bits(rows, whole[:, begin:end], f"{count} tokens up to {end}")


def pad(x: Tensor, count: int) -> Tensor:
    """`count` slots in front, of what nobody should see."""
    garbage = torch.tensor([math.nan, math.inf, -math.inf, 1e4]).to(x.dtype)
    shape = (x.shape[0], count, *x.shape[2:])
    size = math.prod(shape)
    return torch.cat((garbage.repeat(-(-size // 4))[:size].view(shape), x), 1)


@pytest.mark.parametrize("kind", ["bool", "add"])
@pytest.mark.parametrize("count", [1, 255, 256, 257])
def test_left_padding_changes_no_bit(
    count: int, kind: str, isa: str, either: Callable[..., Tensor]
) -> None:
    q, k, v = sequence()
    whole = either(q, k, v)
    wide = [pad(x, count) for x in (q, k, v)]
    mask = (torch.arange(count + LENGTH) >= count).expand(1, 1, count + LENGTH, -1)
    if kind == "add":
        mask = torch.where(mask, 0.0, -math.inf)
    padded = either(*wide, mask, [-count])
    assert_same_bits(padded[:, count:], whole)
    assert not padded[:, :count].any(), "queries that see no key"
    for end in (1, 15, 257, LENGTH):
        slots = count + end
        row = either(
            wide[0][:, slots - 1 : slots],
            *(x[:, :slots] for x in wide[1:]),
            mask[:, :, slots - 1 : slots, :slots],
            [-count],
        )
        assert_same_bits(row, whole[:, end - 1 : end], f"token {end}")


def test_a_batch_of_different_paddings(isa: str, either: Callable[..., Tensor]) -> None:
    q, k, v = sequence()
    counts, length = (0, 1, 255, 257), 300
    parts = [x[:, :length] for x in (q, k, v)]
    batch = [torch.cat([pad(x[:, : length - count], count) for count in counts]) for x in parts]
    mask = torch.arange(length) >= torch.tensor(counts)[:, None, None, None]
    mask = mask.expand(-1, 1, length, -1)
    together = either(*batch, mask, [-count for count in counts])
    whole = either(q, k, v)
    for b, count in enumerate(counts):
        assert_same_bits(together[b, count:], whole[0, : length - count], f"{count} pads")


@pytest.mark.parametrize("dropped", [1, 100, 256, 300])
def test_a_rolled_cache_changes_no_bit(
    dropped: int, isa: str, either: Callable[..., Tensor]
) -> None:
    """A cache of a sliding layer that has dropped what its window no longer reaches."""
    q, k, v = sequence()
    window = 290
    whole = either(q, k, v, window=window)
    for end in (dropped + window, LENGTH):
        row = either(
            q[:, end - 1 : end],
            k[:, dropped:end],
            v[:, dropped:end],
            first=[dropped],
            window=window,
        )
        assert_same_bits(row, whole[:, end - 1 : end], f"token {end}")


def test_number_of_threads(threads: None, either: Callable[..., Tensor]) -> None:
    q, k, v = sequence()
    calls = {
        "prefill": lambda: either(q, k, v),
        "batch": lambda: either(*(x.expand(9, -1, -1, -1) for x in (q, k, v))),
        "decode": lambda: either(q[:, -1:], k, v),
        "three tokens": lambda: either(q[:, -3:], k, v, first=[7]),
    }
    for name, call in calls.items():
        torch.set_num_threads(1)
        expected = call()
        for count in range(2, 9):
            torch.set_num_threads(count)
            assert_same_bits(call(), expected, f"{name}, {count} threads")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides(dtype: torch.dtype, isa: str) -> None:
    q, k, v = (x[:, :70] for x in sequence(dtype, 24))
    expected = run(q, k, v)
    views = {
        "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "slice": lambda x: torch.cat((x, x), 3)[..., 24:],
        "columns first": lambda x: x.movedim(3, 0).contiguous().movedim(0, 3),
    }
    for name, view in views.items():
        assert_same_bits(run(view(q), view(k), view(v)), expected, name)
    mask = random_mask("add", (1, 4, 70, 70))
    assert mask is not None
    expected = run(q, k, v, mask)
    turned = mask.transpose(2, 3).contiguous().transpose(2, 3)
    assert_same_bits(run(q, k, v, turned), expected, "mask")


def test_masks_that_say_the_same(isa: str) -> None:
    q, k, v = sequence()
    q, k, v = q[:, -50:], k[:, :300], v[:, :300]
    distance = torch.arange(250, 300)[:, None] - torch.arange(300)
    seen = ((distance >= 0) & (distance < 40))[None, None]
    expected = run(q, k, v, window=40)
    assert_same_bits(run(q, k, v, seen, causal=False), expected, "bool")
    added = torch.where(seen, 0.0, -math.inf)
    assert_same_bits(run(q, k, v, added, causal=False), expected, "additive")


def test_what_is_masked_reaches_nothing(isa: str, either: Callable[..., Tensor]) -> None:
    q, k, v = sequence(torch.float32)
    q, k, v = q[:, :300], k[:, :300].clone(), v[:, :300].clone()
    mask = torch.rand(1, 1, 300, 300) < 0.8
    hidden = torch.arange(300) % 7 == 3
    mask &= ~hidden
    expected = either(q, k, v, mask)
    for bad in (math.nan, math.inf, -math.inf):
        k[:, hidden], v[:, hidden] = bad, bad
        assert_same_bits(either(q, k, v, mask), expected, str(bad))
        added = torch.where(mask, 0.0, -math.inf)
        assert_same_bits(either(q, k, v, added), expected, f"{bad}, additive")


def test_values_that_are_not_finite(isa: str) -> None:
    """They reach the queries that see them, and no others."""
    q, k, v = sequence(torch.float32)
    q, k, v = q[:, :40], k[:, :40], v[:, :40].clone()
    v[:, 20, 0] = math.nan
    v[:, 30, 1] = math.inf
    nan = run(q, k, v).isnan()
    assert nan[:, 20:, :2].all()
    assert not nan[:, :20].any()
    assert not nan[:, :, 2:].any()
    assert run(q, k, v)[:, 30:, 2:].isinf().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_are_not_numbers(bad: float, isa: str) -> None:
    q, k, v = sequence(torch.float32)
    k = k.clone()
    k[:, 260, 0, 0] = bad
    q = q.clone()
    q[..., 0] = q[..., 0].abs() + 1  # so that +inf stays positive
    nan = run(q, k, v).isnan()
    assert nan[:, 260:, :2].all()
    assert not nan[:, :260].any()
    assert not nan[:, :, 2:].any()


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("kind", ["none", "bool", "add"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_against_float64(dtype: torch.dtype, kind: str, softcap: float) -> None:
    """|out - exact| <= (e^w - 1) sum p |v| / sum p + rounding to the dtype.

    A score s misses the exact one by E <= gamma(D + 2) scale sum |q k| for the chain and the scale
    (a softcap's slope is at most 1, its own error 8 u |s|), and u |s| for the mask. The weight
    exp(s - m) of the split, times exp(m - M) at a merge, takes for each of these factors a
    difference of at most R (rounded: u R) and 4 u for exp and the product; m and M cancel. The sums
    add gamma(256) for v, gamma(20) for p, 4 u a merge. w is the sum for numerator and denominator.
    """
    case = attention(
        (40, 600), (4, 2), 64, mask=kind, mask_shape=(True, True), first=(-3, 9), softcap=softcap
    )
    q, k, v, mask, *rest = case.arguments(dtype)
    scale = rest[3]
    wide_q = q.double().transpose(1, 2)
    wide_k, wide_v = (x.double().transpose(1, 2).repeat_interleave(2, 1) for x in (k, v))
    scores = wide_q @ wide_k.transpose(2, 3) * scale
    error = gamma(64 + 2) * (wide_q.abs() @ wide_k.abs().transpose(2, 3)) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
        error = error + 8 * U * scores.abs()
    seen = torch.arange(560, 600)[:, None] >= torch.arange(600)
    if kind == "bool":
        seen = seen & mask
    elif kind == "add":
        scores = scores + mask.double()
        error = error + U * scores.abs().nan_to_num(posinf=0)
        seen = seen & mask.isfinite()
    scores = scores.masked_fill(~seen, -math.inf)
    p = scores.softmax(-1).nan_to_num(0.0)
    exact, sums = (p @ x for x in (wide_v, wide_v.abs()))
    finite = scores.masked_fill(~seen, 0.0)
    spread = float(finite.amax() - finite.amin())
    splits = 4
    factors = splits * (U * spread + 4 * U)
    w = 2 * (float((error * seen).max()) + factors) + gamma(256) + gamma(20) + 4 * splits * U
    rounding = {torch.float32: U, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    bound = math.expm1(w) * sums + (rounding + 4 * U) * exact.abs() + 2.0**-25
    out = ops.attention(q, k, v, mask, *rest).double().transpose(1, 2)
    assert ((out - exact).abs() <= bound).all(), float(((out - exact).abs() / bound).max())


def call(**changes: Any) -> Tensor:
    """A valid call with some arguments replaced."""
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 3, 4, 16),
        "k": torch.zeros(2, 5, 2, 16),
        "v": torch.zeros(2, 5, 2, 24),
        "mask": None,
        "first_position": None,
        "causal": True,
        "window": 0,
        "scale": 0.25,
        "softcap": 0.0,
    }
    return ops.attention(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.zeros(3, 4, 16)}, r"q of shape \(batch"),
        ({"q": torch.zeros(1, 3, 4, 16)}, "q's batch"),
        ({"q": torch.zeros(2, 3, 4, 24)}, "head_dim"),
        ({"q": torch.zeros(2, 3, 3, 16)}, "multiple of k's, got 3 and 2"),
        (
            {"q": torch.zeros(2, 3, 4, 0), "k": torch.zeros(2, 5, 2, 0)},
            r"q with .* 1\.\.256, got 0",
        ),
        ({"v": torch.zeros(2, 5, 2, 257)}, r"v with .* 1\.\.256, got 257"),
        ({"v": torch.zeros(2, 6, 2, 16)}, "v of shape"),
        ({"v": torch.zeros(2, 5, 2, 16).half()}, "v of dtype float32"),
        ({"q": torch.zeros(2, 3, 4, 16).double()}, "float64"),
        ({"k": torch.zeros(2, 5, 0, 16), "v": torch.zeros(2, 5, 0, 16)}, "multiple of k's"),
        ({"mask": torch.zeros(2, 1, 3, 4)}, "mask of shape"),
        ({"mask": torch.zeros(2, 2, 3, 5)}, "mask of shape"),
        ({"mask": torch.zeros(3, 5)}, "mask of shape"),
        ({"mask": torch.zeros(2, 1, 3, 5).long()}, "int64"),
        ({"first_position": torch.zeros(3).long()}, "first_position of shape"),
        ({"first_position": torch.zeros(2)}, "first_position of dtype"),
        ({"first_position": torch.tensor([0, 1 << 60])}, r"2\^53"),
        ({"window": -1}, "window"),
        ({"scale": math.inf}, "finite scale"),
        ({"softcap": -1.0}, "softcap"),
        ({"q": torch.zeros(2, 3, 4, 16, requires_grad=True)}, "gradient"),
    ],
)
def test_refuses(changes: dict[str, Any], words: str) -> None:
    assert call().shape == (2, 3, 4, 24)
    with pytest.raises(RuntimeError, match=words):
        call(**changes)
