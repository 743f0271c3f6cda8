"""Cases of the fused ops, for the registry in `cases.py`'s form."""

from __future__ import annotations

from typing import Any

import torch
from cases import (
    FLOATS,
    FORMATS,
    VALUES,
    Case,
    Format,
    random_packed,
    random_parts,
    random_values,
    whole_k_only,
)
from torch import Tensor

from torch_slmops import reference

TILE = 32


def random_gate_up(fmt: Format, hidden: int, k: int, seed: int) -> Tensor:
    """A packed gate_up: tiles of gate and up alternate, rows that pad them have the scale 0."""
    rows = 2 * TILE * (-(-hidden // TILE))
    codes, scale, zero, sub = random_parts(fmt, rows, k, seed)
    index = torch.arange(rows)
    pads = index // (2 * TILE) * TILE + index % TILE >= hidden
    codes[pads] = 0 if zero is not None else (fmt.top + 1) // 2
    scale[pads] = 0
    if zero is not None:
        zero[pads] = 0
    return reference.pack(codes, scale, zero, sub, *fmt.options)


def qkv_rotary(
    fmt: Format,
    rows: tuple[int, int],
    heads: tuple[int, int, int],
    d: int,
    k: int = 96,
    *,
    values: str = "normal",
    r: int | None = None,
    interleaved: bool = False,
    shared: bool = True,
    norms: str = "",
    offset: float = 0.0,
    bias: torch.dtype | None = None,
    perm: bool = False,
) -> Case:
    """`r`: rotated elements, all by default; `norms`: "", "head", "full", "mixed" or "q"."""

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        source = torch.Generator().manual_seed(7)
        n = sum(heads) * d
        x = random_values(values, (*rows, k), seed=1).to(dtype)
        width = d if r is None else r
        table = (1 if shared else rows[0], rows[1], width)
        cos, sin = (random_values("normal", table, seed) for seed in (2, 3))
        widths = {
            "": (0, 0),
            "head": (d, d),
            "full": (heads[0] * d, heads[1] * d),
            "mixed": (d, heads[1] * d),
            "q": (d, 0),
        }[norms]
        q_norm, k_norm = (
            random_values("normal", (size,), 4).to(dtype) if size else None for size in widths
        )
        b = None if bias is None else torch.randn(n, generator=source).to(bias)
        order = torch.randperm(k, generator=source) if perm else None
        tables = (cos, sin) if width else (None, None)
        return (
            x,
            random_packed(fmt, n, k),
            list(heads),
            d,
            b,
            q_norm,
            k_norm,
            1e-6,
            offset,
            *tables,
            interleaved,
            order,
        )

    words = [str(fmt), "x".join(map(str, (*rows, *heads, d, k))), values, norms]
    words += [f"r{r}"] * (r is not None) + ["interleaved"] * interleaved + ["own"] * (not shared)
    words += [f"offset{offset:g}"] * bool(offset) + [f"bias-{bias}"] * bool(bias) + ["perm"] * perm
    return Case("qkv_rotary", "-".join(word for word in words if word), arguments)


def swiglu(
    gate_up: Format,
    down: Format,
    rows: tuple[int, ...],
    hidden: int,
    n: int = 40,
    k: int = 96,
    *,
    values: str = "normal",
    activation: str = "silu",
    biases: torch.dtype | None = None,
) -> Case:
    """`biases`: their dtype, if there are any."""

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        source = torch.Generator().manual_seed(8)
        x = random_values(values, (*rows, k), seed=1).to(dtype)
        inner, outer = (
            None if biases is None else torch.randn(size, generator=source).to(biases)
            for size in (2 * hidden, n)
        )
        first = random_gate_up(gate_up, hidden, k, seed=9)
        return x, first, random_packed(down, n, hidden), hidden, n, activation, inner, outer

    words = [str(gate_up), str(down), "x".join(map(str, (*rows, hidden, n, k))), values, activation]
    words += [f"biases-{biases}"] * bool(biases)
    return Case("swiglu", "-".join(words), arguments)


GQA = (3, 1, 1)
SUB16, GROUP, INT8, FLOAT = FORMATS[1], FORMATS[6], FORMATS[14], FORMATS[22]
FUSED_CASES = [
    *(qkv_rotary(fmt, (2, 3), GQA, 20) for fmt in FORMATS if whole_k_only(fmt, 96)),
    *(qkv_rotary(SUB16, rows, (2, 2, 2), d) for rows in ((1, 1), (2, 9)) for d in (64, 80, 96)),
    *(qkv_rotary(GROUP, (1, 60), GQA, d) for d in (128, 256)),
    *(qkv_rotary(fmt, (2, 35), (16, 9, 9), 32, norms="head") for fmt in (SUB16, INT8)),
    qkv_rotary(SUB16, (0, 4), GQA, 16),
    qkv_rotary(SUB16, (1, 1), (1, 1, 1), 2, k=32),
    *(qkv_rotary(INT8, (2, 5), GQA, 40, values=values) for values in VALUES[1:]),
    *(
        qkv_rotary(fmt, (2, 5), (4, 2, 2), 40, r=r, interleaved=interleaved, shared=False)
        for fmt in (SUB16, FLOAT)
        for r in (0, 16, 36)
        for interleaved in (False, True)
    ),
    *(
        qkv_rotary(fmt, (2, 30), (4, 2, 2), 24, norms=norms, offset=offset, bias=bias, perm=True)
        for fmt in (SUB16, INT8)
        for norms in ("head", "full", "mixed", "q")
        for offset, bias in ((0.0, torch.float32), (1.0, torch.bfloat16))
    ),
    *(
        swiglu(gate_up, down, (2, 3), 160)
        for gate_up in (SUB16, GROUP, INT8, FLOAT)
        for down in FORMATS
        if whole_k_only(down, 160)
    ),
    *(
        swiglu(SUB16, down, (7,), hidden)
        for down in (FORMATS[0], SUB16, INT8, FLOAT)
        for hidden in (1, 31, 33, 64, 200)
    ),
    *(swiglu(GROUP, INT8, (3,), 70, values=values) for values in VALUES[1:]),
    *(swiglu(GROUP, FLOAT, (3,), 70, values=values) for values in VALUES[1:]),
    *(
        swiglu(SUB16, FORMATS[3], rows, 96, activation=activation, biases=biases)
        for rows in ((), (1, 60))
        for activation in ("silu", "gelu_tanh", "gelu", "relu2")
        for biases in (None, *FLOATS)
    ),
    swiglu(SUB16, SUB16, (0,), 64),
]
