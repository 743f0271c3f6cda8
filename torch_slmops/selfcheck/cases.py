"""What `selfcheck` runs: calls of every op, with small odd sizes and values of all kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_slmops import ops, reference
from torch_slmops.selfcheck.numbers import Numbers

__all__ = ["Case", "cases"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
F16, BF16 = torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One call, by the op and by its definition; both return a tensor or a tuple of tensors."""

    op: str
    actual: Callable[[], Any]
    expected: Callable[[], Any]


@dataclass(frozen=True)
class _Format:
    """A packed format; `group` 16 is sub16, `zero` is "none", "int16" or "float"."""

    bits: int
    group: int
    act_group: int
    zero: str = "none"
    activations: str = "int8"
    scale: torch.dtype = F16

    def parts(
        self, n: int, k: int, seed: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Codes of the whole range, scales of both signs with some zeros."""
        numbers = Numbers(seed)
        top = (1 << self.bits) - 1
        codes = numbers.integers(top, n, k).to(torch.uint8)
        if self.group == 16:
            scale = numbers.values(n) * (numbers.integers(9, n) > 0)
            return codes, scale, None, numbers.integers(15, n, -(-k // 16)).to(torch.uint8)
        groups = 1 if self.group == -1 else -(-k // self.group)
        scale = numbers.values(n, groups) * (numbers.integers(9, n, groups) > 0)
        zero = None
        if self.zero == "int16":
            zero = numbers.integers(top, n, groups).to(torch.int16)
        elif self.zero == "float":
            zero = (numbers.integers(16 * top, n, groups).float() / 16).to(self.scale)
        return codes, scale.to(self.scale), zero, None

    def pack(self, n: int, k: int, seed: int = 1) -> Tensor:
        """A packed weight of `parts`, packed by its definition."""
        return reference.pack(*self.parts(n, k, seed), *self.options())

    def options(self) -> tuple[int, int, int, str]:
        return self.bits, self.group, self.act_group, self.activations


SUB16, GROUP, INT8 = _Format(4, 16, 128), _Format(4, 32, 32), _Format(8, 32, 32)
FLOAT = _Format(4, 16, 128, activations="float")
FORMATS = (
    SUB16,
    _Format(4, 16, -1),
    GROUP,
    _Format(4, 32, 128, "int16", scale=BF16),
    _Format(4, 128, 64, "float"),
    INT8,
    _Format(8, -1, -1, "int16", scale=BF16),
    _Format(8, 64, 128, "float"),
    FLOAT,
    _Format(4, 64, 32, "int16", "float"),
    _Format(8, 32, 32, "float", "float", BF16),
)


def cases() -> Iterator[Case]:
    """All cases, in a fixed order: the published digests depend on it, and every op has some."""
    yield from _weights()
    yield from _linears()
    yield from _vectors()
    yield from _rotaries()
    yield from _fused()
    yield from _attentions()
    yield from _layers()


def _call(op: str, *arguments: Any) -> Case:
    """The same call of `ops` and of `reference`."""
    return Case(
        op,
        lambda: getattr(ops, op)(*arguments),
        lambda: getattr(reference, op)(*arguments),
    )


def _pack(fmt: _Format, n: int, k: int) -> Case:
    parts = fmt.parts(n, k, seed=2)

    def pack() -> Tensor:
        kind = "sub16" if fmt.group == 16 else "group"
        zero = parts[2] is not None
        size = ops.packed_bytes(n, k, fmt.bits, kind, zero, fmt.group, fmt.act_group)
        out = torch.empty(size, dtype=torch.uint8)
        ops.pack_(out, *parts, *fmt.options())
        return out

    return Case("pack_", pack, lambda: reference.pack(*parts, *fmt.options()))


def _weights() -> Iterator[Case]:
    for fmt in FORMATS:
        yield _pack(fmt, 70, 160)
        packed = fmt.pack(70, 160)
        yield _call("unpack", packed)
        ids = Numbers(3).integers(69, 2, 3)
        for dtype in FLOATS:
            yield _call("embedding", ids, packed, 160, dtype)
    numbers = Numbers(4)
    for bits, group, symmetric in ((4, 16, True), (4, 32, True), (4, 100, False), (8, -1, False)):
        for search, dtype in (("mse", torch.float32), ("absmax", BF16), ("mse", F16)):
            kind = "sub16" if group == 16 else "group"
            w, importance = numbers.values(17, 130).to(dtype), numbers.values(130).abs()
            yield _call("quantize", w, bits, kind, group, symmetric, search, importance)


def _linears() -> Iterator[Case]:
    numbers = Numbers(5)
    for fmt in FORMATS:
        packed = fmt.pack(70, 160)
        for rows, dtype in ((1, torch.float32), (2, BF16), (4, BF16), (19, F16), (40, BF16)):
            yield _call("linear", numbers.values(rows, 160).to(dtype), packed, 70)
        for make in (numbers.special, numbers.patterns):
            x, bias, perm = make(6, 160), numbers.values(70), numbers.permutation(160)
            yield _call("linear", x, packed, 70)
            yield _call("linear", x, packed, 70, bias, perm, BF16)
    # Large enough to be shared out among threads.
    for fmt in (SUB16, INT8):
        yield _call("linear", numbers.values(8, 256).bfloat16(), fmt.pack(512, 256), 512)


def _vectors() -> Iterator[Case]:
    numbers = Numbers(6)
    for dtype in FLOATS:
        for make, cast, offset in (
            (numbers.values, True, 0.0),
            (numbers.values, False, 1.0),
            (numbers.special, True, 0.0),
            (numbers.patterns, False, 0.0),
        ):
            x, residual = (make(5, 101).to(dtype) for _ in range(2))
            options = numbers.values(101).to(dtype), 1e-6, offset, cast
            yield _call("rms_norm", x, *options)
            yield _call("add_rms_norm", x, residual, *options)


def _rotaries() -> Iterator[Case]:
    numbers = Numbers(7)
    positions = numbers.integers(1 << 20, 2, 9)
    inv_freq = numbers.integers((1 << 20) - 1, 7).double() / (1 << 20)
    for interleaved in (False, True):
        yield _call("rotary_table", positions, inv_freq, 1.25, interleaved)
        for dtype in FLOATS:
            x = numbers.special(2, 9, 3, 20).to(dtype)
            cos, sin = (numbers.values(1, 9, 14) for _ in range(2))
            yield _call("rotary", x, cos, sin, interleaved)


def _fused() -> Iterator[Case]:
    numbers = Numbers(8)
    for fmt in (SUB16, GROUP, INT8, FLOAT):
        for dtype in FLOATS:
            make = numbers.special if dtype == F16 else numbers.values
            x = make(2, 3, 96).to(dtype)
            cos, sin = (numbers.values(1, 3, 16) for _ in range(2))
            norms = (numbers.values(20), numbers.values(20)) if dtype == BF16 else (None, None)
            heads = (x, fmt.pack(100, 96), [3, 1, 1], 20, numbers.values(100), *norms)
            yield _call("qkv_rotary", *heads, 1e-6, 0.0, cos, sin, False)
        # 96 hidden rows are whole tiles, so gate and up need no rows between them that pad.
        packed = fmt.pack(192, 96), fmt.pack(40, 96)
        for activation in ("silu", "gelu_tanh", "gelu", "relu2"):
            for make, dtype in ((numbers.values, BF16), (numbers.special, torch.float32)):
                yield _call("swiglu", make(7, 96).to(dtype), *packed, 96, 40, activation)


def _attentions() -> Iterator[Case]:
    numbers = Numbers(9)
    for dtype in FLOATS:
        for queries, keys, d in ((1, 300, 20), (20, 40, 64)):
            make = numbers.special if dtype == F16 else numbers.values
            q = make(2, queries, 4, d).to(dtype)
            k, v = (make(2, keys, 2, d).to(dtype) for _ in range(2))
            first = torch.tensor([-3, 250])
            mask = numbers.integers(3, 2, 1, queries, keys) > 0
            yield _call("attention", q, k, v, None, first, True, 0, 0.25)
            yield _call("attention", q, k, v, mask, first, False, 7, 0.25, 30.0)
            bias = numbers.values(1, 4, queries, keys)
            yield _call("attention", q, k, v, bias, None, True, 0, 0.25)
            for x, values in ((k, False), (v, True)):
                yield _stored(x, values)
            codes, scales = zip(*(_int8(reference, x, x is v) for x in (k, v)), strict=True)
            options = (True, 0, 0.25, 0.0, *scales)
            yield _call("attention", q, *codes, None, first, *options)


def _int8(compute: Any, x: Tensor, values: bool) -> tuple[Tensor, Tensor]:
    """Keys or values [B, L, H, D] as int8: codes, and scales [B, H, L]."""
    batch, length, heads, d = x.shape
    shape = (batch, heads, *ops.int8_shape(length, d, values))
    codes, scale = torch.zeros(shape, dtype=torch.uint8), torch.zeros(batch, heads, length)
    compute.store_int8_(x, codes, scale, 0, values)
    return codes, scale


def _stored(x: Tensor, values: bool) -> Case:
    return Case("store_int8_", lambda: _int8(ops, x, values), lambda: _int8(reference, x, values))


def _layers() -> Iterator[Case]:
    numbers = Numbers(11)
    for dtype, formats, start, length in (
        (torch.float32, (SUB16, GROUP), 0, 3),
        (BF16, (SUB16, SUB16), 5, 1),
        (BF16, (INT8,), 2, 20),
        (F16, (FLOAT,), 0, 3),
    ):
        weights = [part for fmt in formats for part in _layer(fmt, numbers, dtype)]
        cache = [numbers.values(2, 2, 24, 16).to(dtype) for _ in range(2 * len(formats))]
        cos, sin = (numbers.values(1, length, 16) for _ in range(2))
        x = numbers.values(2, length, 96).to(dtype)
        inputs = (x, weights, cache, torch.tensor(start), cos, sin, None, None)
        sizes = ([4, 2, 2], 16, 96, "silu", 1e-5, 0.0, True, 1e-6, 0.0, False, 0.25)
        yield _cached_call(inputs + sizes)
        heads = [numbers.values(2, 24, 2, 16) for _ in range(2 * len(formats))]
        pairs = [_int8(reference, x, i % 2 == 1) for i, x in enumerate(heads)]
        parts = [(*pair, *other) for pair, other in zip(pairs[::2], pairs[1::2], strict=True)]
        int8 = [part for k, k_scale, v, v_scale in parts for part in (k, v, k_scale, v_scale)]
        yield _cached_call((*inputs[:2], int8, *inputs[3:], *sizes))


def _layer(fmt: _Format, numbers: Numbers, dtype: torch.dtype) -> list[Tensor]:
    """The tensors of a layer of 4, 2 and 2 heads of 16, 96 wide, its MLP too."""
    norm = (numbers.values(96) / 4 + 1).to(dtype)
    parts = {
        "pre_attention_norm": norm,
        "qkv": fmt.pack(128, 96),
        "output": fmt.pack(96, 64),
        "pre_mlp_norm": norm,
        "gate_up": fmt.pack(192, 96),
        "down": fmt.pack(96, 96),
    }
    return [parts.get(name, torch.empty(0)) for name in ops.LAYER_PARTS]


def _cached_call(arguments: tuple[Any, ...]) -> Case:
    """decoder_layers, whose cache grows: on a copy of it, which is part of the result."""

    def run(compute: Any) -> list[Tensor]:
        cache = [part.clone() for part in arguments[2]]
        return [compute.decoder_layers(*arguments[:2], cache, *arguments[3:]), *cache]

    return Case("decoder_layers", lambda: run(ops), lambda: run(reference))
