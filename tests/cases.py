"""The registry of op cases: formats, weights, activations, and the arguments of every op.

`test_ops.py` runs every case on every ISA row against the reference, `test_properties.py` draws
from the same formats. A new op adds its cases here, a fused one in `fused_cases.py`, attention has
`attention_cases.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from bits import from_bits
from torch import Tensor

from torch_slmops import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Format:
    """What a packed weight can be; `zero` is "none", "int16", "float" or "offset"."""

    bits: int
    group: int  # 16 means sub16
    act_group: int
    zero: str = "none"
    activations: str = "int8"
    scale: torch.dtype = torch.float16

    def __str__(self) -> str:
        kind = "sub16" if self.sub16 else f"g{self.group}"
        zero = "" if self.zero == "none" else f"-{self.zero}"
        scale = "-bf16" if self.scale == torch.bfloat16 else ""
        return f"int{self.bits}-{kind}{zero}{scale}-{self.activations}{self.act_group}"

    @property
    def sub16(self) -> bool:
        return self.group == 16

    @property
    def floating_zero(self) -> bool:
        """Whether the sum of codes is multiplied apart."""
        return self.zero in ("float", "offset")

    @property
    def options(self) -> tuple[int, int, int, str, bool]:
        """What `pack` takes after the parts."""
        return self.bits, self.group, self.act_group, self.activations, self.zero == "offset"

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1


BF16 = torch.bfloat16
FORMATS = [
    *(Format(4, 16, act) for act in (32, 64, 128, -1)),
    *(Format(4, 32, act) for act in (32, 64, 128, -1)),
    Format(4, 64, 32, "int16", scale=BF16),
    Format(4, 128, 64, "float"),
    Format(4, 32, 128, "float", scale=BF16),
    Format(4, 32, 128, "offset"),
    Format(4, 128, 64, "offset", scale=BF16),
    Format(4, 32, 128, "int16"),
    Format(4, -1, -1, "int16"),
    Format(4, -1, 32),
    *(Format(8, 32, act) for act in (32, 128, -1)),
    Format(8, 128, 64, "int16"),
    Format(8, 64, 128, "float"),
    Format(8, 32, 32, "offset"),
    Format(8, 96, 32, "float", scale=BF16),
    Format(8, -1, -1, "int16", scale=BF16),
    *(Format(4, group, 128, "none", "float") for group in (16, 32)),
    Format(4, 64, 32, "int16", "float"),
    Format(4, 32, 64, "float", "float", BF16),
    Format(4, 32, 64, "offset", "float"),
    Format(8, 64, 32, "offset", "float", BF16),
    Format(8, 32, 32, "none", "float", BF16),
    Format(8, -1, -1, "float", "float"),
]


def whole_k_only(fmt: Format, k: int) -> bool:
    """Whether the layout holds `fmt` for K = `k`: a group of all K must fit the activations'."""
    if fmt.group != -1 or fmt.act_group == -1:
        return True
    padded = -(-k // 32) * 32
    return padded % fmt.act_group == 0 or fmt.act_group % padded == 0


def random_parts(
    fmt: Format, n: int, k: int, seed: int, scales: str = "normal"
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Codes over their whole range, with scales of both signs and some zeros.

    `scales` is "normal", or "extreme" for those from the least to the largest of their type.
    """
    source = torch.Generator().manual_seed(seed)

    def integers(top: int, *shape: int) -> Tensor:
        return torch.randint(0, top + 1, shape, generator=source)

    codes = integers(fmt.top, n, k).to(torch.uint8)
    # Some rows at the ends of the range: the largest integer sums.
    codes = torch.where(integers(3, n, 1) == 0, codes // (fmt.top // 2 + 1) * fmt.top, codes)
    if fmt.sub16:
        scale = torch.randn(n, generator=source) * (integers(9, n) > 0)
        if scales == "extreme":
            scale = from_bits(integers(0x7F7FFFFF, n), torch.float32)
        sub = integers(15, n, -(-k // 16))
        return codes.to(torch.uint8), scale, None, sub.to(torch.uint8)
    groups = 1 if fmt.group == -1 else -(-k // fmt.group)
    shape = (n, groups)
    scale = (torch.randn(*shape, generator=source) * (integers(9, *shape) > 0)).to(fmt.scale)
    if scales == "extreme":
        largest = 0x7BFF if fmt.scale == torch.float16 else 0x7F7F
        scale = from_bits(integers(largest, *shape), fmt.scale)
    zero = None
    if fmt.zero == "int16":
        zero = integers(fmt.top, *shape).to(torch.int16)
    elif fmt.zero == "offset":
        zero = torch.randn(*shape, generator=source).to(fmt.scale)
    elif fmt.zero == "float":
        zero = (torch.rand(*shape, generator=source) * fmt.top).to(fmt.scale)
    return codes.to(torch.uint8), scale, zero, None


@functools.lru_cache(maxsize=256)
def random_packed(fmt: Format, n: int, k: int, seed: int = 0, scales: str = "normal") -> Tensor:
    """A packed weight of `random_parts`, packed by the reference."""
    parts = random_parts(fmt, n, k, seed, scales)
    return reference.pack(*parts, *fmt.options)


VALUES = ("normal", "outliers", "tiny", "denormal", "huge", "zeros", "special", "patterns")


def random_values(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """float32 activations of one of VALUES."""
    source = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=source)

    def some(fraction: float) -> Tensor:
        return torch.rand(shape, generator=source) < fraction

    if kind == "outliers":
        return torch.where(some(0.02), x * 300, x)
    if kind == "tiny":  # around 2^-120, where a group begins to count as zero
        return x * 2.0**-120
    if kind == "denormal":
        return x * 2.0**-132
    if kind == "huge":
        return x * 2.0**125
    if kind == "zeros":  # of both signs, and whole rows of them
        rows = torch.rand((*shape[:-1], 1), generator=source) < 0.5
        return torch.where(rows | some(0.5), torch.copysign(torch.zeros(()), x), x)
    if kind == "special":
        values = torch.tensor([math.nan, math.inf, -math.inf, 2.0**-149, -0.0])
        chosen = values[torch.randint(0, len(values), shape, generator=source)]
        rows = torch.rand((*shape[:-1], 1), generator=source) < 0.5
        return torch.where(rows & some(0.05), chosen, x)
    if kind == "patterns":
        return from_bits(torch.randint(0, 1 << 32, shape, generator=source), torch.float32)
    return x


def assert_cases_cover(cases: list[Case], names: set[str]) -> None:
    """Asserts that there is a case for every op of `names`."""
    missing = names - {case.op for case in cases}
    assert not missing, f"no case for {missing}; add one to tests/cases.py"


@dataclass(frozen=True)
class Case:
    """One call of an op: `arguments(dtype)` are those of `ops.<op>` and of `reference.<op>`."""

    op: str
    name: str
    arguments: Callable[[torch.dtype], tuple[Any, ...]]

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def _linear(
    fmt: Format,
    rows: tuple[int, ...],
    n: int,
    k: int,
    *,
    values: str = "normal",
    bias: torch.dtype | None = None,
    perm: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Case:
    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        x = random_values(values, (*rows, k), seed=1).to(dtype)
        source = torch.Generator().manual_seed(2)
        b = None if bias is None else torch.randn(n, generator=source).to(bias)
        order = torch.randperm(k, generator=source) if perm else None
        return x, random_packed(fmt, n, k), n, b, order, out_dtype

    extra = "".join(
        f"-{word}"
        for word, used in ((values, values != "normal"), ("bias", bias), ("perm", perm))
        if used
    )
    shape = "x".join(str(size) for size in (*rows, n, k))
    return Case("linear", f"{fmt}-{shape}{extra}", arguments)


def _embedding(fmt: Format, ids: tuple[int, ...], n: int, k: int, index: torch.dtype) -> Case:
    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        source = torch.Generator().manual_seed(3)
        rows = torch.randint(0, n, ids, generator=source).to(index)
        return rows, random_packed(fmt, n, k), k, dtype

    shape = "x".join(str(size) for size in (*ids, n, k))
    return Case("embedding", f"{fmt}-{shape}", arguments)


def _unpack(fmt: Format, n: int, k: int) -> Case:
    return Case("unpack", f"{fmt}-{n}x{k}", lambda dtype: (random_packed(fmt, n, k),))


def _quantize(
    bits: int, group: int, symmetric: bool, search: str, n: int, k: int, factor: float = 1.0
) -> Case:
    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        source = torch.Generator().manual_seed(4)
        w = torch.randn(n, k, generator=source) * factor
        w[n // 2, : k // 2] = 0.0
        importance = torch.rand(k, generator=source) if n % 2 else None
        kind = "sub16" if group == 16 else "group"
        return w.to(dtype), bits, kind, group, symmetric, search, importance

    sign = "" if symmetric else "-zero"
    size = "" if factor == 1 else f"-{factor:g}"
    return Case("quantize", f"int{bits}-g{group}{sign}-{search}-{n}x{k}{size}", arguments)


def _norm(
    op: str,
    shape: tuple[int, ...],
    *,
    values: str = "normal",
    weight: torch.dtype | None = None,
    offset: float = 0.0,
    cast: bool = True,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Case:
    """`weight` is its dtype, that of x by default."""

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        x, residual = (random_values(values, shape, seed).to(dtype) for seed in (1, 2))
        w = random_values("normal", shape[-1:], 3).to(weight or dtype)
        inputs = (x, residual) if op == "add_rms_norm" else (x,)
        return *inputs, w, eps, offset, cast, out_dtype

    size = "x".join(str(n) for n in shape)
    extra = "".join(
        f"-{word}"
        for word in (
            values if values != "normal" else "",
            "" if weight is None else f"{weight}".removeprefix("torch."),
            f"offset{offset:g}" if offset else "",
            "" if cast else "late",
            f"eps{eps:g}" if eps != 1e-6 else "",
            "" if out_dtype is None else f"to-{out_dtype}".replace("torch.", ""),
        )
        if word
    )
    return Case(op, f"{size}{extra}", arguments)


def _rotary(
    shape: tuple[int, int, int, int],
    r: int,
    interleaved: bool,
    *,
    values: str = "normal",
    shared: bool = True,
    angles: torch.dtype = torch.float32,
) -> Case:
    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        x = random_values(values, shape, seed=1).to(dtype)
        table = (1 if shared else shape[0], shape[1], r)
        cos, sin = (random_values("normal", table, seed).to(angles) for seed in (2, 3))
        return x, cos, sin, interleaved

    size = "x".join(str(n) for n in shape)
    words = ("interleaved" if interleaved else "halves", values, "shared" if shared else "own")
    name = f"{size}-{r}-{'-'.join(words)}-{angles}".replace("torch.", "")
    return Case("rotary", name, arguments)


def _rotary_table(
    positions: tuple[int, ...], pairs: int, interleaved: bool, scaling: float = 1.0
) -> Case:
    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        source = torch.Generator().manual_seed(5)
        at = torch.randint(-(1 << 20), 1 << 20, positions, generator=source)
        inv_freq = torch.rand(pairs, generator=source, dtype=torch.float64)
        return at, inv_freq, scaling, interleaved

    size = "x".join(str(n) for n in (*positions, pairs))
    return Case("rotary_table", f"{size}-{interleaved}-{scaling:g}", arguments)


NORMS = ("rms_norm", "add_rms_norm")
HEADS = [  # [B, L, H, D] and R: whole and partial, tails of all kinds
    ((2, 3, 2, 64), 64),
    ((1, 2, 3, 80), 32),
    ((2, 1, 1, 96), 96),
    ((1, 5, 2, 128), 64),
    ((1, 1, 4, 20), 14),
    ((2, 2, 1, 3), 2),
    ((1, 2, 2, 5), 0),
    ((0, 4, 2, 16), 16),
    ((2, 4, 0, 16), 16),
]
MIXED = [
    # decode, batches around the row blocks of the kernels, prefill; N and K off every boundary
    ((1,), 64, 256),
    ((0,), 33, 64),
    ((2, 3), 31, 200),
    ((13,), 97, 128),
    ((1, 1, 5), 1, 1),
    ((50,), 40, 129),
    ((70,), 33, 160),
]
CASES = [
    *(_linear(fmt, *shape) for fmt in FORMATS for shape in MIXED if whole_k_only(fmt, shape[2])),
    *(
        _linear(fmt, (6,), 40, 160, values=values)
        for fmt in FORMATS
        if whole_k_only(fmt, 160)
        for values in VALUES[1:]
    ),
    # groups too long for their float weights to be made once for all rows
    *(_linear(Format(8, -1, -1, zero, "float"), (13,), 33, 1100) for zero in ("none", "float")),
    *(
        _linear(fmt, (3,), 70, 192, bias=bias, perm=perm, out_dtype=out)
        for fmt in (FORMATS[0], FORMATS[6], FORMATS[14], FORMATS[22])
        for bias, perm, out in (
            (torch.float32, False, torch.float32),
            (torch.bfloat16, True, None),
            (torch.float16, False, torch.bfloat16),
            (None, True, torch.float16),
        )
    ),
    *(
        _embedding(fmt, ids, 70, 130, index)
        for fmt in FORMATS
        if whole_k_only(fmt, 130)
        for ids, index in (((5,), torch.int64), ((2, 3), torch.int32))
    ),
    _embedding(FORMATS[0], (0,), 33, 64, torch.int64),
    _embedding(FORMATS[0], (), 33, 64, torch.int64),
    *(_unpack(fmt, n, k) for fmt in FORMATS for n, k in ((70, 160), (1, 1), (32, 256))),
    *(
        _quantize(bits, group, symmetric, search, n, k)
        for bits, group, symmetric in (
            (4, 16, True),
            (4, 32, True),
            (4, 100, False),
            (8, 32, True),
            (8, -1, False),
        )
        for search in ("absmax", "mse")
        for n, k in ((17, 130), (32, 96), (1, 1))
    ),
    *(_quantize(4, 32, True, "mse", 17, 64, factor) for factor in (2.0**-20, 2.0**20, 2.0**-99)),
    *(_quantize(4, 16, True, "mse", 17, 64, factor) for factor in (2.0**-90, 2.0**120)),
    *(
        _norm(op, shape)
        for op in NORMS
        for shape in ((1,), (3, 1), (2, 3, 15), (4, 16), (5, 17), (0, 8), (3, 0), (7, 576))
    ),
    *(
        _norm(op, (6, 100), values=values, cast=cast)
        for op in NORMS
        for values in VALUES[1:]
        for cast in (True, False)
    ),
    *(
        _norm(op, (3, 70), weight=weight, offset=offset, cast=cast, out_dtype=out)
        for op in NORMS
        for weight in FLOATS
        for offset, cast in ((0.0, True), (1.0, True), (1.0, False), (0.1, False))
        for out in (None, torch.float32, torch.bfloat16)
    ),
    *(_norm(op, (4, 40), values="zeros", eps=eps) for op in NORMS for eps in (0.0, 1e-5)),
    *(_rotary(shape, r, interleaved) for shape, r in HEADS for interleaved in (False, True)),
    *(
        _rotary((2, 3, 2, 40), 36, interleaved, values=values, shared=False, angles=angles)
        for interleaved in (False, True)
        for values, angles in zip(VALUES[1:], (*FLOATS, *FLOATS, *FLOATS), strict=False)
    ),
    *(
        _rotary_table(positions, pairs, interleaved, scaling)
        for positions in ((7,), (2, 5), (), (0,))
        for pairs, scaling in ((32, 1.0), (1, 1.3), (0, 1.0))
        for interleaved in (False, True)
    ),
]
