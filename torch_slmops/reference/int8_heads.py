"""Keys and values as int8: one scale per head and slot, in blocks of 16 slots."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_slmops.reference.compute import quantize_rows

__all__ = ["read_int8", "round_heads", "store_int8_"]

_BLOCK = 16


def round_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int64 [..., D] in -127..127 and scales float32 [...] of heads [..., D]."""
    d = x.shape[-1]
    codes, scale = quantize_rows(x.reshape(-1, d), d, d)
    return codes.view(x.shape), scale.view(x.shape[:-1])


def store_int8_(x: Tensor, codes: Tensor, scale: Tensor, start: int, values: bool) -> None:
    """Heads as keys or values from slot `start` on: `torch_slmops.ops.store_int8_`.

    Arguments as there.
    """
    rounded, found = round_heads(x.transpose(1, 2))
    slots = slice(start, start + x.shape[1])
    scale[:, :, slots] = found
    plain = _plain(codes, values).contiguous()
    plain[:, :, slots] = 128
    plain[:, :, slots, : x.shape[3]] = (rounded + 128).to(torch.uint8)
    batch, heads, blocks = codes.shape[:3]
    parts = (4, 4, plain.shape[3]) if values else (_BLOCK, plain.shape[3] // 4, 4)
    order = (0, 1, 2, 3, 5, 4) if values else (0, 1, 2, 4, 3, 5)
    codes.copy_(plain.view(batch, heads, blocks, *parts).permute(order))


def read_int8(codes: Tensor, values: bool, d: int) -> Tensor:
    """Codes int64 [B, H, slots, d] in -127..127 of blocks; what was never stored may be -128."""
    return _plain(codes, values)[..., :d].to(torch.int64) - 128


def _plain(codes: Tensor, values: bool) -> Tensor:
    """Bytes [B, H, slots, padded head] of keys [B, H, blocks, P / 4, 16, 4] or values [.. 4, P, 4].

    In a block of keys 4 elements of each of 16 slots lie together, in one of values 4 slots of each
    element.
    """
    in_order = codes.transpose(4, 5) if values else codes.transpose(3, 4)
    batch, heads, blocks = codes.shape[:3]
    width = codes.shape[4] if values else 4 * codes.shape[3]
    return in_order.reshape(batch, heads, blocks * _BLOCK, width)
