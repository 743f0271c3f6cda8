"""Cases of attention, for the registry in `cases.py`'s form."""

from __future__ import annotations

import math
from typing import Any

import torch
from cases import FLOATS, VALUES, Case, random_values
from int8_kv import int8_arguments
from torch import Tensor


def random_mask(kind: str, shape: tuple[int, ...], seed: int = 5) -> Tensor | None:
    """ "none"; "bool", with rows that see nothing; "padding"; or "add", with some -inf."""
    source = torch.Generator().manual_seed(seed)
    if kind == "none":
        return None
    if kind == "padding":  # on the left, as transformers' masks have it
        hidden = torch.arange(shape[0])[:, None, None, None] * 3 + shape[3] // 3
        return (torch.arange(shape[3]) >= hidden).expand(shape)
    some = torch.rand(shape, generator=source)
    if kind == "bool":
        return (some < 0.7) & (torch.rand((*shape[:3], 1), generator=source) < 0.9)
    return torch.where(some < 0.2, -math.inf, torch.randn(shape, generator=source))


def attention(
    lengths: tuple[int, int],
    heads: tuple[int, int] = (4, 2),
    d: int = 16,
    *,
    batch: int = 2,
    dv: int | None = None,
    values: str = "normal",
    mask: str = "none",
    mask_shape: tuple[bool, bool] = (True, False),
    mask_dtype: torch.dtype = torch.float32,
    first: tuple[int, ...] | None = None,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    kv_dtype: torch.dtype | None = None,
    heads_first: bool = False,
    int8: bool = False,
) -> Case:
    """`lengths` and `heads`: of q and of k; `mask_shape`: whether it has a batch, has heads."""

    def arguments(dtype: torch.dtype) -> tuple[Any, ...]:
        sizes = [
            (batch, lengths[0], heads[0], d),
            (batch, lengths[1], heads[1], d),
            (batch, lengths[1], heads[1], d if dv is None else dv),
        ]
        kinds = [dtype, kv_dtype or dtype, kv_dtype or dtype]
        q, k, v = (
            random_values(values, size, seed).to(kind)
            for seed, (size, kind) in enumerate(zip(sizes, kinds, strict=True))
        )
        if heads_first:
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        shape = (batch if mask_shape[0] else 1, heads[0] if mask_shape[1] else 1, *lengths)
        seen = random_mask(mask, shape)
        if mask == "add" and seen is not None:
            seen = seen.to(mask_dtype)
        position = None if first is None else torch.tensor(first)
        found = (q, k, v, seen, position, causal, window, d**-0.5, softcap)
        return int8_arguments(found) if int8 else found

    words = ["x".join(map(str, (batch, *lengths, *heads, d))), values, mask]
    words += [f"dv{dv}"] * (dv is not None) + ["full"] * (not causal)
    words += [f"window{window}"] * bool(window) + [f"softcap{softcap:g}"] * bool(softcap)
    words += [f"from{first}"] * (first is not None) + ["heads-first"] * heads_first
    words += [f"mask{mask_shape}-{mask_dtype}"] * (mask == "add")
    words += [f"kv-{kv_dtype}"] * (kv_dtype is not None) + ["int8"] * int8
    return Case("attention", "-".join(words), arguments)


INT8_CASES = [
    *(attention((5, 40), d=d, int8=True) for d in (1, 8, 20, 64, 80, 128, 256)),
    *(attention((3, 20), heads, int8=True) for heads in ((1, 1), (7, 1), (6, 2), (16, 2))),
    *(attention(lengths, int8=True) for lengths in ((1, 1), (1, 33), (40, 9), (0, 5), (3, 0))),
    *(attention((2, keys), first=(0, -1), int8=True) for keys in (15, 255, 256, 257, 530)),
    *(
        attention((2, 300), first=first, int8=True)
        for first in ((-1, 1), (-255, 255), (-256, 257), (7, -700))
    ),
    *(attention((35, 35), values=values, d=24, int8=True) for values in VALUES[1:]),
    *(attention((9, 35), values="special", mask=mask, int8=True) for mask in ("bool", "add")),
    *(
        attention((6, 300), mask=mask, causal=causal, first=(-40, 3), int8=True)
        for mask in ("bool", "padding", "add")
        for causal in (True, False)
    ),
    *(attention((20, 290), window=window, first=(5, -6), int8=True) for window in (1, 7, 270)),
    *(
        attention((9, 40), softcap=softcap, values=values, int8=True)
        for softcap in (0.5, 50.0)
        for values in ("normal", "huge", "special")
    ),
    attention((70, 300), (8, 2), 64, batch=1, heads_first=True, int8=True),
    attention((40, 40), (32, 8), 64, batch=1, int8=True),
    attention((2, 20), batch=0, int8=True),
]
ATTENTION_CASES = [
    *INT8_CASES,
    *(attention((5, 40), d=d) for d in (1, 8, 20, 64, 80, 128, 256)),
    *(attention((3, 20), heads) for heads in ((1, 1), (8, 8), (7, 1), (6, 2), (16, 2))),
    *(attention(lengths) for lengths in ((1, 1), (1, 33), (17, 17), (40, 9), (0, 5), (3, 0))),
    *(attention((2, keys), first=(0, -1)) for keys in (15, 255, 256, 257, 530)),
    *(attention((2, 300), first=first) for first in ((-1, 1), (-255, 255), (-256, 257), (7, -700))),
    *(attention((35, 35), values=values, d=24) for values in VALUES[1:]),
    *(attention((9, 35), values="special", d=24, mask=mask) for mask in ("bool", "add")),
    *(
        attention((6, 300), mask=mask, mask_shape=shape, causal=causal, first=(-40, 3))
        for mask in ("bool", "padding", "add")
        for shape in ((True, False), (False, True))
        for causal in (True, False)
    ),
    *(attention((6, 30), mask="add", mask_dtype=dtype) for dtype in FLOATS[1:]),
    *(
        attention((20, 290), window=window, causal=causal, first=(5, -6))
        for window in (1, 7, 270)
        for causal in (True, False)
    ),
    *(
        attention((9, 40), softcap=softcap, values=values)
        for softcap in (0.5, 50.0)
        for values in ("normal", "huge", "special")
    ),
    *(attention((5, 20), d=16, dv=dv) for dv in (8, 40)),
    *(attention((5, 20), d=40, kv_dtype=dtype) for dtype in FLOATS),
    attention((70, 300), (8, 2), 64, batch=1, heads_first=True),
    attention((40, 40), (32, 8), 64, batch=1),
    attention((2, 20), batch=0),
]
