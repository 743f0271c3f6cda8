"""AWQ checkpoints of version "gemm", as AutoAWQ writes them.

A layer of N outputs, K inputs and G groups has `qweight` int32 [K, N / 8] and `qzeros` int32
[G, N / 8], 8 outputs to a word in the order 0, 2, 4, 6, 1, 3, 5, 7, the lowest bits first, and
`scales` [G, N]: w[n,k] = scales[g,n] * (code[n,k] - zero[g,n]).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops.checkpoints.bits import unpack_words
from torch_slmops.checkpoints.files import Layer, Reader
from torch_slmops.foreign import Parts, Source

__all__ = ["MARKS", "reader"]

_CODES = "qweight"
MARKS: tuple[str, ...] = (_CODES,)  # tensors that a quantized layer has
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where the codes of outputs 0, 1, ... are in a word
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


def reader(model: nn.Module, settings: Mapping[str, Any]) -> Reader:
    """Returns what gives the source of a layer's weight; see `load.Format`."""
    return partial(_source, dict(settings))


def _source(config: dict[str, Any], layer: Layer, shape: tuple[int, int]) -> Source:
    version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", 4)
    if version != "gemm" or bits != 4:
        raise ValueError(
            f'{layer.where(_CODES)}: expected AWQ of version "gemm" with 4 bits, got '
            f"{version!r} with {bits} bits"
        )
    n, k = shape
    layer.expect(_CODES, [torch.int32], (k, n // 8))
    groups = len(layer.expect("scales", _SCALES, (None, n)))
    layer.expect("qzeros", [torch.int32], (groups, n // 8))
    size = -1 if groups == 1 else k // groups
    if size != -1 and size * groups != k:
        raise ValueError(
            f"{layer.where('scales')}: expected groups that divide {k} inputs, got {groups} groups"
        )
    return Source("AWQ int4", layer.where(_CODES), partial(_read, layer, size))


def _read(layer: Layer, size: int) -> Parts:
    codes, zeros = (_unpack(layer.get(name)) for name in (_CODES, "qzeros"))
    return Parts(codes.T, layer.get("scales").T, zeros.T.to(torch.int16), 4, size)


def _unpack(words: Tensor) -> Tensor:
    codes = unpack_words(words, 4, words.shape[1] * 8)
    return codes.view(len(words), -1, 8)[:, :, list(_ORDER)].flatten(1)
