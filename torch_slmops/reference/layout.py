"""`pack` and `unpack`: the layout of docs/packed-format.md as index formulas.

Written independently of the C++, one formula per kind of byte; arrays are indexed by (n, k).
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Layout", "pack", "unpack"]

TILE = 32  # outputs of a tile
HEADER = struct.Struct("<4sHBBBBB5xqqqqq")  # followed by the checksum, u64
HEADER_BYTES = 64
_SCALE_TYPES = (torch.float16, torch.bfloat16, torch.float32)
_ACTIVATIONS = ("int8", "float", "float_fast")


class Layout(NamedTuple):
    """A header's fields, sizes in elements."""

    bits: int
    sub16: bool
    scale_type: torch.dtype
    zero_kind: int  # 0 none, 1 int16, 2 of the scale's type, 3 an offset of that type
    activations: str
    n: int
    k: int
    group: int
    act_group: int

    @property
    def block(self) -> int:
        """k between two places with scales in a tile."""
        return 64 if self.sub16 else self.group

    @property
    def k_padded(self) -> int:
        return _round_up(self.k, math.lcm(self.block, self.act_group))

    @property
    def block_bytes(self) -> int:
        lines = self.block * TILE * self.bits // 8
        return lines + 64 + (64 if self.zero_kind else 0)

    @property
    def tile_bytes(self) -> int:
        tail = TILE * 4 if self.sub16 else 0
        return self.k_padded // self.block * self.block_bytes + tail

    @property
    def total_bytes(self) -> int:
        return HEADER_BYTES + -(-self.n // TILE) * self.tile_bytes

    @property
    def middle(self) -> int:
        """The zero point where none is stored."""
        return 1 << (self.bits - 1)


def pack(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    sub_scale: Tensor | None,
    bits: int,
    group_size: int,
    act_group: int,
    activations: str,
    offset: bool = False,
) -> Tensor:
    """Returns the packed weight, uint8 [bytes]: what `torch_slmops.ops.pack_` writes.

    Arguments as there.

    Raises:
        ValueError: A combination that the layout cannot hold.
    """
    n, k = codes.shape
    sub16 = sub_scale is not None and sub_scale.numel() > 0
    zero_kind = 0
    if zero_point is not None and zero_point.numel() > 0:
        zero_kind = 3 if offset else 1 if zero_point.dtype == torch.int16 else 2
    group = group_size
    if group == -1:
        group = 16 if sub16 else _round_up(k, 32)
    block = 64 if sub16 else group
    act = _round_up(k, block) if act_group == -1 else act_group
    layout = Layout(bits, sub16, scale.dtype, zero_kind, activations, n, k, group, act)
    _check(layout)
    out = torch.zeros(layout.total_bytes, dtype=torch.uint8)
    out[:HEADER_BYTES] = torch.frombuffer(bytearray(_header(layout)), dtype=torch.uint8)
    padded = _padded_codes(layout, codes, zero_point)
    at = _code_bytes(layout)
    if bits == 8:
        out[at] = padded
    else:
        low = _low_nibble(layout)
        out[at[:, low]] = padded[:, low] | padded[:, ~low] << 4
    if sub16:
        assert sub_scale is not None
        even, odd = _sub_pairs(layout, sub_scale)
        out[_sub_bytes(layout)] = even | odd << 4
        out[_scale_bytes(layout)] = _bytes(scale[:, None])[:, 0]
        return out
    out[_scale_bytes(layout)[:, : scale.shape[1]]] = _bytes(scale)
    if zero_kind:
        assert zero_point is not None
        out[_scale_bytes(layout)[:, : scale.shape[1]] + 64] = _bytes(zero_point)
    return out


def unpack(packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns codes, scale, zero_point, sub_scale of a packed weight: `torch_slmops.ops.unpack`.

    Raises:
        ValueError: `packed` is not a packed weight.
    """
    layout = read_header(packed)
    at = _code_bytes(layout)[:, : layout.k]
    codes = packed[at]
    if layout.bits == 4:
        codes = torch.where(_low_nibble(layout)[: layout.k], codes & 15, codes >> 4)
    none = torch.empty(0, dtype=torch.int16), torch.empty(0, dtype=torch.uint8)
    groups = -(-layout.k // layout.group)
    if layout.sub16:
        scale = packed[_scale_bytes(layout)].view(torch.float32)[:, 0]
        pairs = packed[_sub_bytes(layout)]
        sub_scale = torch.stack((pairs & 15, pairs >> 4), 2).flatten(1)[:, :groups]
        return codes, scale.contiguous(), none[0], sub_scale.contiguous()
    at = _scale_bytes(layout)[:, :groups]
    scale = packed[at].view(layout.scale_type)[..., 0].contiguous()
    if not layout.zero_kind:
        return codes, scale, *none
    dtype = torch.int16 if layout.zero_kind == 1 else layout.scale_type
    return codes, scale, packed[at + 64].view(dtype)[..., 0].contiguous(), none[1]


def read_header(packed: Tensor) -> Layout:
    """Reads and checks the header of a packed weight, uint8 [bytes]."""
    data = bytes(packed[:HEADER_BYTES].tolist())
    if len(data) < HEADER_BYTES:
        raise ValueError(f"expected a header of 64 bytes, got {len(data)} bytes")
    magic, version, bits, kind, scale, zero, activations, n, k, group, act, total = HEADER.unpack(
        data[: HEADER.size]
    )
    if magic != b"SLMO" or version != 1 or data != data[: HEADER.size] + _checksum(data):
        raise ValueError("expected a header of version 1 with a matching checksum")
    scale_type, mode = _SCALE_TYPES[scale], _ACTIVATIONS[activations]
    layout = Layout(bits, kind == 1, scale_type, zero, mode, n, k, group, act)
    if not total == layout.total_bytes == packed.numel():
        raise ValueError(f"expected {layout.total_bytes} bytes, got {packed.numel()}")
    return layout


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def _check(layout: Layout) -> None:
    group, act = layout.group, layout.act_group
    if layout.bits not in (4, 8) or layout.activations not in _ACTIVATIONS:
        raise ValueError(f"pack: expected 4 or 8 bits and a known activation mode, got {layout}")
    if layout.sub16:
        if layout.bits != 4 or layout.zero_kind or group != 16:
            raise ValueError(f"pack: expected 4 bits, symmetric, group 16 for sub16, got {layout}")
    elif group % 32 or layout.scale_type == torch.float32:
        raise ValueError(f"pack: expected a group of 32s and 16-bit scales, got {layout}")
    if act not in (32, 64, 128, _round_up(layout.k, layout.block)):
        raise ValueError(f"pack: expected act_group 32, 64, 128 or all of K, got {act}")
    if act % group and group % act:
        raise ValueError(f"pack: expected act_group to divide or hold group {group}, got {act}")


def _header(layout: Layout) -> bytes:
    fields = HEADER.pack(
        b"SLMO",
        1,
        layout.bits,
        int(layout.sub16),
        _SCALE_TYPES.index(layout.scale_type),
        layout.zero_kind,
        _ACTIVATIONS.index(layout.activations),
        layout.n,
        layout.k,
        layout.group,
        layout.act_group,
        layout.total_bytes,
    )
    return fields + _checksum(fields)


def _checksum(header: bytes) -> bytes:
    """FNV-1a of the bytes before the checksum."""
    value = 0xCBF29CE484222325
    for byte in header[: HEADER.size]:
        value = (value ^ byte) * 0x100000001B3 % (1 << 64)
    return struct.pack("<Q", value)


def _padded_codes(layout: Layout, codes: Tensor, zero_point: Tensor | None) -> Tensor:
    """codes [N, k_padded]; inputs from K on have the code that stands for zero."""
    n, k = codes.shape
    fill = torch.zeros(n, layout.k_padded, dtype=torch.uint8)
    if layout.zero_kind == 0:
        fill += layout.middle
    elif layout.zero_kind == 1:
        assert zero_point is not None
        spread = zero_point.to(torch.uint8).repeat_interleave(layout.group, 1)
        fill[:, : spread.shape[1]] = spread
    fill[:, :k] = codes
    return fill


def _tile_start(layout: Layout) -> Tensor:
    """Byte [N, 1] where output n's tile begins."""
    n = torch.arange(layout.n)[:, None]
    return HEADER_BYTES + n // TILE * layout.tile_bytes


def _code_bytes(layout: Layout) -> Tensor:
    """Byte [N, k_padded] that holds code (n, k)."""
    n, k = torch.arange(layout.n)[:, None], torch.arange(layout.k_padded)
    k_of_line = 8 if layout.bits == 4 else 4
    line = k % layout.block // k_of_line
    within = line * 128 + n % TILE // 16 * 64 + n % 16 * 4 + k % 4
    return _tile_start(layout) + k // layout.block * layout.block_bytes + within


def _low_nibble(layout: Layout) -> Tensor:
    return torch.arange(layout.k_padded) % layout.block % 8 < 4


def _scale_bytes(layout: Layout) -> Tensor:
    """Bytes of scale (n, g): [N, groups, 2]; for sub16 those of S, [N, 4]."""
    n = torch.arange(layout.n)[:, None]
    if layout.sub16:
        start = _tile_start(layout) + layout.tile_bytes - TILE * 4
        return start + n % TILE * 4 + torch.arange(4)
    g = torch.arange(layout.k_padded // layout.group)
    lines = layout.group * TILE * layout.bits // 8
    at = _tile_start(layout) + g * layout.block_bytes + lines + n % TILE * 2
    return at[:, :, None] + torch.arange(2)


def _sub_bytes(layout: Layout) -> Tensor:
    """Byte [N, k_padded / 32] of two sub-scales of output n."""
    n, pair = torch.arange(layout.n)[:, None], torch.arange(layout.k_padded // 32)
    within = 1024 + n % TILE * 2 + pair % 2
    return _tile_start(layout) + pair // 2 * layout.block_bytes + within


def _sub_pairs(layout: Layout, sub_scale: Tensor) -> tuple[Tensor, Tensor]:
    missing = layout.k_padded // 16 - sub_scale.shape[1]
    padded = torch.nn.functional.pad(sub_scale, (0, missing))
    return padded[:, ::2], padded[:, 1::2]


def _bytes(x: Tensor) -> Tensor:
    """The bytes of each element, in a new last dimension."""
    return x.contiguous()[..., None].view(torch.uint8)
