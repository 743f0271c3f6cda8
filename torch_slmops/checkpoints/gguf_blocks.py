"""Blocks of GGUF's quantized types, taken apart into codes and scales.

A row of a tensor is a sequence of blocks of 32 weights, or (K types) of 256 in 8 sub-blocks of 32:

    Q4_0, Q5_0, Q8_0    w = d * (q - 8), d * (q - 16), d * q
    Q4_1, Q5_1          w = d * q + m
    Q4_K, Q5_K          w = (d * scale[j]) * q - dmin * min[j] in sub-block j, 6 bits each

d, m and dmin are float16. Other types are dequantized and rounded to 8 bits again.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from torch_slmops.foreign import Parts
from torch_slmops.weights import quantize_weight

__all__ = ["EXACT", "ROUNDED", "read_blocks"]

_Array: TypeAlias = "np.ndarray[Any, Any]"
_GROUP = 32
_CHUNK = 1 << 22  # weights dequantized at a time

# Types whose codes and scales are kept. The scales of ROUNDED ones have more bits than float16.
EXACT = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
ROUNDED = ("Q4_K", "Q5_K")


def read_blocks(data: _Array, kind: Any) -> Parts:
    """Returns the weight [N, K] in rows of blocks, uint8 [N, bytes].

    Args:
        data: As `gguf.GGUFReader` gives it.
        kind: The tensor's `gguf.GGMLQuantizationType`.

    Raises:
        NotImplementedError: The gguf package cannot dequantize this type.
        ValueError: The scales are not finite.
    """
    decode = _DECODERS.get(kind.name)
    return _requantized(data, kind) if decode is None else decode(data)


def _half(block: _Array, at: int) -> _Array:
    """The float16 at a byte of each block, [N, blocks]."""
    found: _Array = np.ascontiguousarray(block[:, :, at : at + 2]).view(np.float16)[:, :, 0]
    return found


def _nibbles(block: _Array, at: int) -> _Array:
    """32 codes of each block: the low nibbles of 16 bytes, then the high ones."""
    packed = block[:, :, at : at + 16]
    return np.concatenate([packed & 15, packed >> 4], axis=2)


def _fifth_bits(block: _Array, at: int) -> _Array:
    """Bit 4 of 32 codes of each block: bit i of 4 bytes is code i's."""
    bits = np.unpackbits(block[:, :, at : at + 4], axis=2, bitorder="little")
    return (bits << 4).astype(np.uint8)


def _blocks(data: _Array, size: int) -> _Array:
    return np.asarray(data).reshape(len(data), -1, size)


def _parts(codes: _Array, scale: _Array, bits: int, minimum: _Array | None = None) -> Parts:
    n = len(codes)
    return Parts(
        torch.from_numpy(np.ascontiguousarray(codes).reshape(n, -1)),
        torch.from_numpy(np.ascontiguousarray(scale).reshape(n, -1)),
        None,
        bits,
        _GROUP,
        None if minimum is None else torch.from_numpy(minimum.reshape(n, -1)),
    )


def _q4_0(data: _Array) -> Parts:
    block = _blocks(data, 18)
    return _parts(_nibbles(block, 2), _half(block, 0), 4)


def _q4_1(data: _Array) -> Parts:
    block = _blocks(data, 20)
    return _parts(_nibbles(block, 4), _half(block, 0), 4, _half(block, 2))


def _q5_0(data: _Array) -> Parts:
    block = _blocks(data, 22)
    codes = _nibbles(block, 6) | _fifth_bits(block, 2)
    return _parts(codes + np.uint8(128 - 16), _half(block, 0), 8)


def _q5_1(data: _Array) -> Parts:
    block = _blocks(data, 24)
    codes = _nibbles(block, 8) | _fifth_bits(block, 4)
    return _parts(codes, _half(block, 0), 8, _half(block, 2))


def _q8_0(data: _Array) -> Parts:
    block = _blocks(data, 34)
    return _parts(block[:, :, 2:] ^ np.uint8(128), _half(block, 0), 8)


def _q4_k(data: _Array) -> Parts:
    block = _blocks(data, 144)
    return _parts(_k_nibbles(block, 16), *_k_scales(block, 4))


def _q5_k(data: _Array) -> Parts:
    block = _blocks(data, 176)
    # Bit j of byte i belongs to code i of sub-block j.
    bits = np.unpackbits(block[:, :, 16:48], axis=2, bitorder="little")
    bits = bits.reshape(*block.shape[:2], 32, 8).swapaxes(2, 3).reshape(*block.shape[:2], 256)
    codes = _k_nibbles(block, 48) | (bits << 4).astype(np.uint8)
    return _parts(codes, *_k_scales(block, 8))


def _k_nibbles(block: _Array, at: int) -> _Array:
    """256 codes: of each 32 bytes the low nibbles, then the high ones."""
    packed = block[:, :, at:].reshape(*block.shape[:2], 4, 1, 32)
    return np.concatenate([packed & 15, packed >> 4], axis=3).reshape(*block.shape[:2], 256)


def _k_scales(block: _Array, bits: int) -> tuple[_Array, int, _Array]:
    """Scale and minimum of each sub-block: exact in float32."""
    quants: Any = import_module("gguf.quants")
    packed = np.ascontiguousarray(block[:, :, 4:16]).reshape(-1, 12)
    scales, minimums = (
        x.reshape(*block.shape[:2], 8).astype(np.float32) for x in quants.Q4_K.get_scale_min(packed)
    )
    d, dmin = (_half(block, at).astype(np.float32)[:, :, None] for at in (0, 2))
    return d * scales, bits, -(dmin * minimums)


def _requantized(data: _Array, kind: Any) -> Parts:
    dequantize: Any = import_module("gguf.quants").dequantize

    def meant(start: int, stop: int) -> Tensor:
        return torch.from_numpy(dequantize(np.asarray(data[start:stop]), kind))

    n, k = len(data), meant(0, 1).shape[1]
    rows = max(1, _CHUNK // k)
    chunks = [quantize_weight(meant(i, min(i + rows, n)), 8) for i in range(0, n, rows)]
    return Parts(
        torch.cat([chunk.codes for chunk in chunks]),
        torch.cat([chunk.scale for chunk in chunks]),
        None,
        8,
        _GROUP,
        reference=meant,
    )


_DECODERS: dict[str, Callable[[_Array], Parts]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
}
