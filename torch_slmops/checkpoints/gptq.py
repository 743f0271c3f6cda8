"""GPTQ checkpoints, as AutoGPTQ (version 1) and GPTQModel (1 and 2) write them.

A layer of N outputs and K inputs, b bits and G groups has `qweight` int32 [K * b / 32, N] and
`qzeros` int32 [G, N * b / 32], streams of codes along their packed dimension, `scales` [G, N], and
`g_idx` int32 [K], the group of each input: w[n,k] = scales[g,n] * (code[n,k] - zero[g,n]), g the
group of k. Version 1 stores zero - 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops.checkpoints.bits import order_of_groups, unpack_words
from torch_slmops.checkpoints.files import Layer, Reader
from torch_slmops.foreign import Parts, Source

__all__ = ["MARKS", "reader"]

_CODES = "qweight"
MARKS: tuple[str, ...] = (_CODES,)  # tensors that a quantized layer has
_VERSIONS = ("gptq", "gptq_v2")
_BITS = (2, 3, 4, 8)
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


def reader(model: nn.Module, settings: Mapping[str, Any]) -> Reader:
    """Returns what gives the source of a layer's weight; see `load.Format`."""
    return partial(_source, dict(settings))


def _source(config: dict[str, Any], layer: Layer, shape: tuple[int, int]) -> Source:
    version = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if version not in _VERSIONS:
        raise ValueError(
            f"{layer.where(_CODES)}: expected a checkpoint_format of {' or '.join(_VERSIONS)}, got "
            f"{version!r}"
        )
    n, k = shape
    words = len(layer.expect(_CODES, [torch.int32], (None, n)))
    bits = words * 32 // k
    if bits not in _BITS or words * 32 != bits * k:
        raise ValueError(
            f"{layer.where(_CODES)}: expected codes of 2, 3, 4 or 8 bits for {k} inputs, that is "
            f"{k * 4 // 32} rows for 4 bits, got {words}"
        )
    groups = len(layer.expect("scales", _SCALES, (None, n)))
    layer.expect("qzeros", [torch.int32], (groups, -(-n * bits // 32)))
    size, perm = _groups(layer, k, groups, config)
    read = partial(_read, layer, shape, bits, size, perm, version)
    order = "" if perm is None else " act-order"
    return Source(f"GPTQ int{bits}{order}", layer.where(_CODES), read, perm)


def _groups(layer: Layer, k: int, groups: int, config: dict[str, Any]) -> tuple[int, Tensor | None]:
    """The group size and the order of inputs that makes groups consecutive."""
    size = int(config.get("group_size", -1))
    if groups == 1:
        size = -1
    elif size <= 0 or -(-k // size) != groups:  # another one for this layer
        size = k // groups
    if "g_idx" not in layer.names:
        return size, None
    index = layer.expect("g_idx", [torch.int32, torch.int64], (k,))
    return size, order_of_groups(index, groups, size, layer.where("g_idx"))


def _read(
    layer: Layer,
    shape: tuple[int, int],
    bits: int,
    size: int,
    perm: Tensor | None,
    version: str,
) -> Parts:
    n, k = shape
    codes = unpack_words(layer.get(_CODES).T, bits, k)
    if perm is not None:
        codes = codes[:, perm]
    zeros = unpack_words(layer.get("qzeros"), bits, n).T.to(torch.int16)
    if version == "gptq":
        zeros = zeros + 1
    width = 8 if bits == 8 else 4
    # Version 1 can say 16 (256), which is no code: as a floating zero point it is exact.
    zero = zeros.half() if int(zeros.max()) >= 1 << width else zeros
    return Parts(codes, layer.get("scales").T, zero, width, size)
