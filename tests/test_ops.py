"""Every op case on every ISA row, for every float dtype: the bits of the reference."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from attention_cases import ATTENTION_CASES
from bits import assert_same_bits, from_bits
from cases import (
    CASES,
    FLOATS,
    FORMATS,
    Case,
    Format,
    assert_cases_cover,
    random_packed,
    random_parts,
    random_values,
    whole_k_only,
)
from fused_cases import FUSED_CASES, random_gate_up
from torch import Tensor

from torch_slmops import ops, reference

# All but pack_ and store_int8_, which have tests of their own: they fill buffers.
OPS = {
    "add_rms_norm",
    "attention",
    "embedding",
    "linear",
    "qkv_rotary",
    "quantize",
    "rms_norm",
    "rotary",
    "rotary_table",
    "swiglu",
    "unpack",
}
ALL_CASES = [*CASES, *FUSED_CASES, *ATTENTION_CASES]


def assert_same(actual: Any, expected: Any) -> None:
    """assert_same_bits for the result of an op: a tensor or a tuple of them."""
    if isinstance(expected, Tensor):
        assert_same_bits(actual, expected)
        return
    for i, (left, right) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(left, right, f"result {i}")


def test_every_op_has_a_case() -> None:
    assert_cases_cover(ALL_CASES, OPS)


@functools.cache
def expected_result(case: Case, dtype: torch.dtype) -> Any:
    """What the reference says, once for all ISA rows."""
    return getattr(reference, case.op)(*case.arguments(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_op_equals_reference(case: Case, dtype: torch.dtype, isa: str) -> None:
    arguments = case.arguments(dtype)
    if case.op == "quantize" and not arguments[0].isfinite().all():  # float16 overflowed
        with pytest.raises(RuntimeError, match="finite"):
            ops.quantize(*arguments)
        return
    assert_same(getattr(ops, case.op)(*arguments), expected_result(case, dtype))


@pytest.mark.parametrize("shape", [(1, 1), (32, 64), (33, 129), (70, 256)], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_pack_equals_reference(fmt: Format, shape: tuple[int, int]) -> None:
    if not whole_k_only(fmt, shape[1]):
        fmt = Format(fmt.bits, fmt.group, -1, fmt.zero, fmt.activations, fmt.scale)
    parts = random_parts(fmt, *shape, seed=5)
    expected = reference.pack(*parts, *fmt.options)
    kind = "sub16" if fmt.sub16 else "group"
    zero = parts[2] is not None
    size = ops.packed_bytes(*shape, fmt.bits, kind, zero, fmt.group, fmt.act_group)
    # A byte more on both sides, which must stay, and an odd address for everything between.
    buffer = torch.full((size + 2,), 0xA5, dtype=torch.uint8)
    packed = buffer[1:-1]
    ops.pack_(packed, *parts, *fmt.options)
    assert_same_bits(packed, expected)
    assert buffer[0] == buffer[-1] == 0xA5
    for i, (actual, given) in enumerate(zip(ops.unpack(packed), parts, strict=True)):
        if given is None:
            assert actual.numel() == 0
        else:
            assert_same_bits(actual, given, f"part {i}")


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_packed_weights_work_at_odd_addresses(fmt: Format, isa: str) -> None:
    k = 160 if whole_k_only(fmt, 160) else 64
    packed = random_packed(fmt, 40, k)
    moved = torch.empty(packed.numel() + 3, dtype=torch.uint8)[3:].copy_(packed)
    x = random_values("normal", (5, k), seed=1)
    assert_same_bits(ops.linear(x, moved, 40), ops.linear(x, packed, 40))
    ids = torch.arange(40)
    expected = ops.embedding(ids, packed, k, torch.float32)
    assert_same_bits(ops.embedding(ids, moved, k, torch.float32), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides_of_activations(dtype: torch.dtype, isa: str) -> None:
    packed = random_packed(FORMATS[1], 40, 96)
    x = random_values("normal", (4, 6, 96), seed=1).to(dtype)
    expected = ops.linear(x, packed, 40)
    wide = torch.randn(4, 6, 200).to(dtype)
    wide[..., 7:103] = x
    layouts = {
        "slice of a row": wide[..., 7:103],
        "transposed rows": x.transpose(0, 1).contiguous().transpose(0, 1),
        "columns first": x.movedim(-1, 0).contiguous().movedim(0, -1),
        "every other column": x.repeat_interleave(2, -1)[..., ::2],
    }
    for name, view in layouts.items():
        assert_same_bits(ops.linear(view, packed, 40), expected, name)
    row = ops.linear(x[:1, :1].expand(4, 6, 96), packed, 40)
    assert_same_bits(row, expected[:1, :1].expand(4, 6, 40).contiguous(), "stride 0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversion_of_every_16_bit_value(dtype: torch.dtype, isa: str) -> None:
    convert = torch.ops.slmops._convert
    values = from_bits(torch.arange(1 << 16), dtype)
    assert_same_bits(convert(values, torch.float32), reference.canonical_nan(values.float()))
    # Every middle between two neighbours, and the float32 on both sides of it.
    size = {torch.bfloat16: 16, torch.float16: 13}[dtype]
    patterns = from_bits(torch.arange(1 << 16), dtype).float().view(torch.int32).long()
    around = torch.cat([patterns + (1 << (size - 1)) + d for d in (-1, 0, 1)])
    inputs = torch.cat((values.float(), from_bits(around, torch.float32)))
    assert_same_bits(convert(inputs, dtype), reference.round_to(inputs, dtype))
    small = from_bits(torch.arange(0x33000000 - 4096, 0x38800000 + 4096, 61), torch.float32)
    for inputs in (small, -small):  # where float16 is denormal
        assert_same_bits(convert(inputs, dtype), reference.round_to(inputs, dtype))


@pytest.mark.full
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_conversion_of_every_float32(dtype: torch.dtype, isa: str) -> None:
    chunk = 1 << 24
    for start in range(0, 1 << 32, chunk):
        inputs = torch.arange(start, start + chunk, dtype=torch.int64)
        x = inputs.to(torch.int32).view(torch.float32)
        actual = torch.ops.slmops._convert(x, dtype)
        nan = x.isnan()
        assert_same_bits(actual[~nan], x[~nan].to(dtype))
        assert_same_bits(actual[nan], reference.round_to(x[nan], dtype))


def vector_calls() -> list[Any]:
    """opcheck's calls of the ops without packed weights, contiguous and not."""
    calls: list[Any] = []
    cos, sin = torch.randn(2, 1, 3, 16)
    for dtype in FLOATS:
        x, weight = torch.randn(2, 3, 40).to(dtype), torch.randn(40)
        for view in (x, x.transpose(0, 1), x[:0], x.repeat_interleave(2, -1)[..., ::2]):
            calls.append(("rms_norm", (view, weight, 1e-6, 0.0, True)))
            calls.append(("add_rms_norm", (view, view, weight, 1e-6, 1.0, False, torch.float32)))
        heads = torch.randn(2, 5, 3, 20).to(dtype)
        for view in (heads.transpose(1, 2), heads.movedim(-1, 0).contiguous().movedim(0, -1)):
            length = view.shape[1]
            tables = (table[:, :1].expand(1, length, 16) for table in (cos, sin))
            calls.append(("rotary", (view, *tables, True)))
    frequencies = torch.rand(4, dtype=torch.float64)
    calls.append(("rotary_table", (torch.arange(6).view(2, 3).T, frequencies, 1.0)))
    calls.append(("_activation", (torch.randn(3, 4).T, "silu")))
    return calls


def fused_calls() -> list[Any]:
    """opcheck's calls of the fused ops."""
    calls: list[Any] = []
    cos, sin = torch.randn(2, 1, 3, 16)
    for fmt, dtype in itertools.product((FORMATS[0], FORMATS[8]), FLOATS):
        x, qkv = torch.randn(2, 3, 96).to(dtype), random_packed(fmt, 100, 96)
        norm = torch.randn(20)
        calls.append(
            ("qkv_rotary", (x, qkv, [3, 1, 1], 20, None, None, None, 0.0, 0.0, None, None, False))
        )
        options = (torch.randn(100), norm, norm, 1e-6, 1.0, cos, sin, True, torch.randperm(96))
        calls.append(("qkv_rotary", (x[..., :].flip(0), qkv, [3, 1, 1], 20, *options)))
        gate_up, down = random_gate_up(fmt, 40, 96, 3), random_packed(fmt, 50, 40)
        calls.append(("swiglu", (x, gate_up, down, 40, 50, "silu")))
        biases = (torch.randn(80), torch.randn(50))
        calls.append(("swiglu", (x[:0], gate_up, down, 40, 50, "gelu", *biases)))
    return calls


def attention_calls() -> list[Any]:
    """opcheck's calls of attention: layouts, masks of both kinds, no keys."""
    calls: list[Any] = []
    for dtype in FLOATS:
        q, k = torch.randn(2, 3, 4, 24).to(dtype), torch.randn(2, 7, 2, 24).to(dtype)
        v = torch.randn(2, 7, 2, 16).to(dtype)
        first = torch.tensor([-3, 300])
        calls.append(("attention", (q, k, v, None, None, True, 0, 0.2)))
        heads_first = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        mask = torch.rand(2, 1, 3, 7) < 0.5
        calls.append(("attention", (*heads_first, mask, first, False, 3, 0.2, 30.0)))
        bias = torch.randn(1, 4, 7, 3).transpose(2, 3)
        calls.append(("attention", (q, k, v, bias, None, False, 0, 0.2)))
    calls.append(("attention", (q, k[:, :0], v[:, :0], None, None, True, 0, 0.2)))
    return calls


def opcheck_arguments() -> list[Any]:
    """(op, arguments) for each op, with and without its optional arguments."""
    sub16, group = FORMATS[0], FORMATS[8]
    packed = [random_packed(fmt, 40, 96) for fmt in (sub16, group)]
    x, bias, perm = torch.randn(2, 3, 96), torch.randn(40), torch.randperm(96)
    parts = random_parts(sub16, 40, 96, seed=6)
    calls: list[Any] = []
    for weight, dtype in itertools.product(packed, FLOATS):
        calls.append(("linear", (x.to(dtype), weight, 40)))
        calls.append(("linear", (x.to(dtype), weight, 40, bias, perm, torch.float32)))
        calls.append(("embedding", (torch.arange(5), weight, 96, dtype)))
    calls.append(("linear", (x[:0], packed[0], 40)))
    calls.append(("pack_", (torch.empty_like(packed[0]), *parts, 4, 16, 32, "int8")))
    calls.append(("quantize", (torch.randn(5, 70), 4, "sub16", 16, True, "mse")))
    calls += vector_calls()
    calls += fused_calls()
    calls += attention_calls()
    return calls


@pytest.mark.parametrize("call", opcheck_arguments(), ids=lambda call: call[0])
def test_opcheck(call: Any) -> None:
    name, arguments = call
    torch.library.opcheck(getattr(torch.ops.slmops, name).default, arguments)


def test_fakes_say_what_depends_on_data() -> None:
    """Shapes or dtypes that only the values tell: tracing gets an error, never a wrong guess."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    real = random_packed(FORMATS[0], 40, 96)
    with FakeTensorMode() as mode:
        packed = mode.from_tensor(real)
        with pytest.raises(DataDependentOutputException):
            ops.unpack(packed)
        with pytest.raises(DataDependentOutputException):
            ops.quantize(torch.empty(4, 64), 4, "group", 32, True, "mse")
