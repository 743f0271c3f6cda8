"""Quantized weights as plain tensors: quantizing, packing, foreign parts, memory."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import sys
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor

from torch_slmops import QuantizedWeight, memory, ops, quantize_weight

FORMATS: dict[str, dict[str, Any]] = {
    "sub16": {},
    "int4-g32": {"scale_kind": "group"},
    "int4-g64-zero": {"group_size": 64, "symmetric": False},
    "int4-row": {"group_size": -1},
    "int8-g32": {"bits": 8},
    "int8-g96-zero": {"bits": 8, "group_size": 96, "symmetric": False},
    "int8-row": {"bits": 8, "group_size": -1},
}
SHAPES = [(1, 1), (32, 64), (33, 96), (7, 130), (65, 31)]


def gaussian(n: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n * 1000 + k)).to(dtype)


def assert_same_parts(a: QuantizedWeight, b: QuantizedWeight) -> None:
    assert (a.bits, a.shape, a.scale_kind) == (b.bits, b.shape, b.scale_kind)
    for name in ("codes", "scale", "zero_point", "sub_scale"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        if left is not None:
            assert_same_bits(left, right)


def exact(weight: QuantizedWeight) -> Tensor:
    """The values in float64, where every product of a float32 scale and a code is exact."""
    n, k = weight.shape
    j = torch.arange(k)
    codes = weight.codes.double()
    if weight.sub_scale is not None:
        sub = weight.sub_scale.double()[:, j // 16]
        return weight.scale.double()[:, None] * sub * (codes - 8)
    group = j // (k if weight.group_size == -1 else weight.group_size)
    zero = 2 ** (weight.bits - 1) * torch.ones(n, k)
    if weight.zero_point is not None:
        zero = weight.zero_point[:, group]
    return weight.scale.double()[:, group] * (codes - zero.double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_pack_and_unpack_are_inverse(name: str, shape: tuple[int, int]) -> None:
    weight = quantize_weight(gaussian(*shape), **FORMATS[name])
    again = QuantizedWeight.unpack(weight.pack())
    assert_same_parts(weight, again)
    assert_same_bits(weight.pack(), again.pack())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_is_the_formula(name: str, shape: tuple[int, int]) -> None:
    weight = quantize_weight(gaussian(*shape), **FORMATS[name])
    assert_same_bits(weight.dequantize(), exact(weight).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_dequantize_is_what_embedding_looks_up(name: str, dtype: torch.dtype, isa: str) -> None:
    weight = quantize_weight(gaussian(33, 130), **FORMATS[name])
    looked_up = ops.embedding(torch.arange(33), weight.pack(), 130, dtype)
    assert_same_bits(weight.dequantize(dtype), looked_up)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sources_are_widened_exactly(dtype: torch.dtype) -> None:
    w = gaussian(33, 130, dtype)
    assert_same_parts(quantize_weight(w), quantize_weight(w.float()))


def test_strided_sources() -> None:
    w = gaussian(64, 96)
    assert_same_parts(quantize_weight(w.t()), quantize_weight(w.t().contiguous()))
    assert_same_parts(quantize_weight(w[::2, :33]), quantize_weight(w[::2, :33].contiguous()))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 2.0**-130])
@pytest.mark.parametrize("name", FORMATS)
def test_constant_weights(name: str, value: float) -> None:
    w = torch.full((5, 40), value)
    got = quantize_weight(w, **FORMATS[name]).dequantize()
    # Some code times some scale is the value, up to the rounding of the scale to 16 bits (bfloat16:
    # 2^-9) and of sums of at most 64 equal float32 terms (64 * 2^-24, twice). Below 2^-100 is zero.
    limit = max(abs(value) * (2.0**-9 + 2.0**-17), 2.0**-100) if value else 0.0
    assert float((got - w).abs().max()) <= limit


def test_default_scale_kind() -> None:
    w = gaussian(4, 64)
    assert quantize_weight(w).scale_kind == "sub16"
    assert quantize_weight(w, group_size=64).scale_kind == "group"
    assert quantize_weight(w, symmetric=False).scale_kind == "group"
    assert quantize_weight(w, 8).scale_kind == "group"
    assert quantize_weight(w, 8).group_size == 32


@pytest.mark.parametrize(
    ("bits", "group", "k", "expected"),
    [
        (4, None, 256, 128),
        (4, None, 192, 64),
        (4, None, 96, 32),
        (4, None, 100, 32),
        (4, 64, 256, 128),
        (4, 96, 384, 32),  # 128 is neither a multiple nor a divisor of 96
        (4, -1, 384, 128),
        (8, 32, 256, 32),
        (8, -1, 256, 32),
    ],
)
def test_default_act_group(bits: int, group: int | None, k: int, expected: int) -> None:
    packed = quantize_weight(gaussian(3, k), bits, group_size=group).pack()
    assert ops.describe(packed).act_group == expected


def test_header_says_what_was_packed() -> None:
    packed = quantize_weight(gaussian(33, 100), 8, group_size=64).pack(-1, "float")
    header = ops.describe(packed)
    assert header[:5] == (8, "group", torch.float16, "none", "float")
    assert header[5:] == (33, 100, 64, 128, packed.numel())


BAD_WEIGHTS = [
    (torch.ones(3, 4, dtype=torch.float64), TypeError, "float64"),
    (torch.ones(3, 4, dtype=torch.int8), TypeError, "int8"),
    ("weight", TypeError, "str"),
    (torch.ones(3), ValueError, "2-D"),
    (torch.ones(3, 0), ValueError, "non-empty"),
    (torch.ones(3, 4, device="meta"), ValueError, "meta"),
    (torch.tensor([[1.0, float("inf")]]), ValueError, "infinity"),
    (torch.tensor([[1.0, float("nan")]]), ValueError, "NaN"),
]


@pytest.mark.parametrize(("weight", "error", "words"), BAD_WEIGHTS)
def test_refuses_weights(weight: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        quantize_weight(weight)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 5}, "bits 4 or 8"),
        ({"scale_kind": "rows"}, "scale_kind"),
        ({"scale_kind": "sub16", "bits": 8}, "sub16"),
        ({"scale_kind": "sub16", "symmetric": False}, "sub16"),
        ({"scale_kind": "sub16", "group_size": 32}, "sub16"),
        ({"group_size": 0}, "group_size"),
        ({"search": "best"}, "search"),
        ({"importance": torch.ones(3)}, "importance"),
        ({"importance": -torch.ones(64)}, "importance"),
    ],
)
def test_refuses_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        quantize_weight(gaussian(4, 64), **options)


@pytest.mark.parametrize("arguments", [(48, "int8"), (256, "int8"), (None, "int4")], ids=str)
def test_pack_refuses(arguments: tuple[Any, str]) -> None:
    with pytest.raises(RuntimeError, match="expected"):
        quantize_weight(gaussian(4, 100)).pack(*arguments)


def test_pack_refuses_groups_that_lines_do_not_fit() -> None:
    weight = quantize_weight(gaussian(4, 96), group_size=48)
    assert_same_bits(weight.dequantize(), exact(weight).float())
    with pytest.raises(RuntimeError, match="multiple of 32"):
        weight.pack()


class TestFromParts:
    """Codes and scales from elsewhere keep their values."""

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize("zero", [False, True])
    def test_signed_codes_are_shifted(self, bits: int, zero: bool) -> None:
        half = 1 << (bits - 1)
        generator = torch.Generator().manual_seed(bits)
        codes = torch.randint(-half, half, (6, 70), generator=generator, dtype=torch.int8)
        scale = gaussian(6, 3).half()
        points = torch.randint(-half, half, (6, 3), generator=generator, dtype=torch.int8)
        weight = QuantizedWeight.from_parts(
            codes, scale, points if zero else None, bits=bits, group_size=32
        )
        shift = points.int().repeat_interleave(32, 1)[:, :70] if zero else 0
        expected = (codes.int() - shift) * scale.float().repeat_interleave(32, 1)[:, :70]
        assert_same_bits(weight.dequantize(), expected)
        assert_same_parts(weight, QuantizedWeight.unpack(weight.pack()))

    def test_symmetric_zero_points_are_dropped(self) -> None:
        codes = torch.zeros(4, 64, dtype=torch.int8)
        for dtype in (torch.int8, torch.int32, torch.int64):
            points = torch.zeros(4, 2, dtype=dtype)
            weight = QuantizedWeight.from_parts(
                codes, torch.ones(4, 2), points, bits=4, group_size=32
            )
            assert weight.zero_point is None

    def test_float_zero_points(self) -> None:
        codes = torch.arange(16, dtype=torch.uint8).repeat(2, 4)
        points = torch.tensor([[7.5, 0.25], [1.0, 3.0]], dtype=torch.float16)
        scale = torch.tensor([[0.5, 2.0], [1.5, 0.75]], dtype=torch.float16)
        weight = QuantizedWeight.from_parts(codes, scale, points, bits=4, group_size=32)
        # Few significant bits everywhere: no operation rounds.
        expected = (codes.float() - points.float().repeat_interleave(32, 1)) * (
            scale.float().repeat_interleave(32, 1)
        )
        assert_same_bits(weight.dequantize(), expected)
        assert_same_bits(ops.embedding(torch.arange(2), weight.pack(), 64, torch.float32), expected)

    @pytest.mark.parametrize(
        ("scale", "dtype"),
        [
            (0.375, torch.float16),
            (2.0**-24, torch.float16),
            (1e30, None),
            (2.0**100, torch.bfloat16),
        ],
    )
    def test_float32_scales_must_be_exact(self, scale: float, dtype: torch.dtype | None) -> None:
        codes, scales = torch.ones(1, 32, dtype=torch.uint8), torch.tensor([[scale]])
        if dtype is not None:
            weight = QuantizedWeight.from_parts(codes, scales, bits=4, group_size=32)
            assert weight.scale.dtype == dtype
            assert_same_bits(weight.scale.float(), scales)
            return
        with pytest.raises(ValueError, match="round_scales=True"):
            QuantizedWeight.from_parts(codes, scales, bits=4, group_size=32)
        weight = QuantizedWeight.from_parts(codes, scales, bits=4, group_size=32, round_scales=True)
        assert_same_bits(weight.scale, scales.bfloat16())

    def test_rounds_to_float16_where_it_has_the_range(self) -> None:
        codes, scale = torch.ones(1, 64, dtype=torch.uint8), torch.tensor([[0.1, 0.0]])
        weight = QuantizedWeight.from_parts(codes, scale, bits=4, group_size=32, round_scales=True)
        assert_same_bits(weight.scale, scale.half())

    def test_sub_scales(self) -> None:
        made = quantize_weight(gaussian(5, 40))
        taken = QuantizedWeight.from_parts(
            made.codes, made.scale, sub_scale=made.sub_scale, bits=4, group_size=16
        )
        assert_same_parts(made, taken)

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"codes": torch.full((4, 64), 16, dtype=torch.uint8)}, ValueError, "codes"),
            ({"codes": torch.full((4, 64), -9, dtype=torch.int8)}, ValueError, "codes"),
            ({"codes": torch.zeros(4, 64)}, TypeError, "codes"),
            ({"codes": torch.zeros(4, dtype=torch.uint8)}, ValueError, "codes"),
            ({"scale": torch.ones(4, 3)}, ValueError, "scale"),
            ({"scale": torch.ones(4, 2, dtype=torch.int32)}, TypeError, "scale"),
            ({"scale": torch.full((4, 2), float("nan"))}, ValueError, "finite"),
            ({"zero_point": torch.full((4, 2), 16)}, ValueError, "zero_point"),
            ({"zero_point": torch.zeros(4)}, ValueError, "zero_point"),
            ({"zero_point": torch.zeros(4, 2, dtype=torch.bool)}, TypeError, "zero_point"),
            ({"sub_scale": torch.zeros(4, 4, dtype=torch.uint8)}, ValueError, "sub_scale"),
            ({"bits": 3}, ValueError, "bits"),
            ({"group_size": 0}, ValueError, "group_size"),
        ],
    )
    def test_refuses(self, change: dict[str, Any], error: type[Exception], words: str) -> None:
        parts: dict[str, Any] = {
            "codes": torch.zeros(4, 64, dtype=torch.uint8),
            "scale": torch.ones(4, 2),
            "bits": 4,
            "group_size": 32,
        }
        QuantizedWeight.from_parts(**parts)
        with pytest.raises(error, match=words):
            QuantizedWeight.from_parts(**(parts | change))

    def test_signed_codes_with_float_zero_points_that_do_not_shift(self) -> None:
        with pytest.raises(ValueError, match="not exact"):
            QuantizedWeight.from_parts(
                torch.zeros(1, 32, dtype=torch.int8),
                torch.ones(1, 1),
                torch.tensor([[2.0**-30]]),
                bits=4,
                group_size=32,
            )


@pytest.mark.filterwarnings("ignore")  # torchao's own, at import
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_takes_over_torchao_weights(bits: int, dtype: torch.dtype) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    linear = torch.nn.Linear(128, 48, dtype=dtype)
    config = quantization.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"), granularity=granularity.PerGroup(32)
    )
    quantization.quantize_(linear, config)
    exact_scales = dtype != torch.float32
    if not exact_scales:
        with pytest.raises(ValueError, match="round_scales=True"):
            QuantizedWeight.from_torchao(linear.weight)
    weight = QuantizedWeight.from_torchao(linear.weight, round_scales=not exact_scales)
    theirs = linear.weight.dequantize()
    if exact_scales:
        assert_same_bits(weight.dequantize(dtype), theirs)
    else:  # float16 scales are off by at most 2^-11, and so are the values
        assert bool(((weight.dequantize() - theirs).abs() <= theirs.abs() * 2.0**-11).all())
    assert_same_parts(weight, QuantizedWeight.unpack(weight.pack()))


def test_from_torchao_refuses_others() -> None:
    with pytest.raises(TypeError, match="qdata"):
        QuantizedWeight.from_torchao(torch.ones(3, 3))


class TestMemory:
    """Tensors in huge pages are like any others."""

    SIZE = memory.HUGE_PAGE + 12345

    @pytest.mark.parametrize("size", [0, 1, 64, memory.HUGE_PAGE - 1, memory.HUGE_PAGE, SIZE])
    def test_is_a_plain_tensor(self, size: int) -> None:
        tensor = memory.empty(size)
        assert (tensor.dtype, tuple(tensor.shape)) == (torch.uint8, (size,))
        assert (tensor.storage_offset(), tensor.untyped_storage().nbytes()) == (0, size)
        tensor.fill_(7)
        assert int(tensor.sum()) == 7 * size

    @pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux")
    def test_begins_at_a_huge_page(self) -> None:
        assert memory.empty(self.SIZE).data_ptr() % memory.HUGE_PAGE == 0

    def test_copies_and_pickles(self) -> None:
        tensor = memory.empty(self.SIZE)
        tensor.copy_(torch.arange(self.SIZE) % 251)
        assert_same_bits(copy.deepcopy(tensor), tensor)
        assert_same_bits(pickle.loads(pickle.dumps(tensor)), tensor)
        file = io.BytesIO()
        torch.save(tensor, file)
        assert len(file.getvalue()) < self.SIZE + 4096  # no more than the tensor is saved
        file.seek(0)
        assert_same_bits(torch.load(file), tensor)

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_is_freed_with_the_tensor(self) -> None:
        def address_space() -> int:
            with open("/proc/self/statm") as file:
                return int(file.read().split()[0]) * 4096

        size = 1 << 32
        tensor = memory.empty(size)[: size // 2]  # a view keeps it as well
        gc.collect()
        held = address_space()
        del tensor
        gc.collect()
        assert held - address_space() >= size
