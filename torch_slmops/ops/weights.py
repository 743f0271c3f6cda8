"""Ops that make packed weights and take them apart."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

from torch_slmops.ops.common import OPS, fake

__all__ = [
    "Header",
    "checksum",
    "copy_checksum",
    "describe",
    "pack_",
    "packed_bytes",
    "quantize",
    "unpack",
]

_SUB_GROUP = 16


def quantize(
    w: Tensor,
    bits: int,
    scale_kind: str,
    group_size: int,
    symmetric: bool,
    search: str,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chooses codes and scales so that `scale * (code - zero_point)` is near `w`.

    docs/arithmetic.md, section "Choosing codes", defines the choice. `quantize_weight` is the
    friendlier form.

    Args:
        w: Weight [N, K], float32, bfloat16 or float16, finite.
        bits: 4 (codes 0..15) or 8 (0..255).
        scale_kind: "group" (one 16-bit scale per `group_size` inputs) or "sub16" (one fp32 scale
            per output times a 4-bit one per 16 inputs; 4 bits, symmetric).
        group_size: Inputs that share a scale, or -1 for all K; 16 or -1 for "sub16".
        symmetric: The zero point is 8 (128 for 8 bits); otherwise a code is chosen per group.
        search: "mse" (least squared error) or "absmax" (from the largest |w| of a group).
        importance: Weights of the squared errors per input, float32 [K], not negative.

    Returns:
        `codes` uint8 [N, K]; `scale` float16, or bfloat16 where float16 lacks the range, [N, G]
        with G = ceil(K / group_size), or float32 [N] for "sub16"; `zero_point` int16 [N, G], empty
        if symmetric; `sub_scale` uint8 [N, ceil(K / 16)] with 0..15, empty for "group".
    """
    parts: tuple[Tensor, Tensor, Tensor, Tensor] = OPS.quantize.default(
        w, bits, scale_kind, group_size, symmetric, search, importance
    )
    return parts


@fake("quantize")
def _quantize_fake(
    w: Tensor,
    bits: int,
    scale_kind: str,
    group_size: int,
    symmetric: bool,
    search: str,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if scale_kind != "sub16":  # whether the scales are float16 or bfloat16 is up to the values
        raise DataDependentOutputException(OPS.quantize.default)
    n, k = w.shape
    return (
        w.new_empty((n, k), dtype=torch.uint8),
        w.new_empty((n,), dtype=torch.float32),
        w.new_empty((0,), dtype=torch.int16),
        w.new_empty((n, (k + _SUB_GROUP - 1) // _SUB_GROUP), dtype=torch.uint8),
    )


def pack_(
    out: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    sub_scale: Tensor | None,
    bits: int,
    group_size: int,
    act_group: int,
    activations: str,
    offset: bool = False,
) -> None:
    """Writes a weight in the packed layout (docs/packed-format.md) into `out`.

    Args:
        out: uint8 [`packed_bytes(...)`], contiguous. Overwritten; after an error it holds no
            packed weight.
        codes: uint8 [N, K], 0..15 or 0..255.
        scale: float16 or bfloat16 [N, ceil(K / group_size)]; float32 [N] beside `sub_scale`.
        zero_point: Like `scale`, int16 (0..15 or 0..255) or of the scale's dtype; None or empty
            for the symmetric 8 or 128.
        sub_scale: uint8 [N, ceil(K / 16)], 0..15, for scale kind "sub16"; else None or empty.
        bits: 4 or 8.
        group_size: A multiple of 32, or -1 for all K; 16 or -1 beside `sub_scale`.
        act_group: Inputs that share an activation scale: 32, 64, 128 or -1 (all K); a multiple or
            a divisor of the group.
        activations: "int8", "float" or "float_fast": how `linear` treats its input.
        offset: `zero_point`, of the scale's dtype, is the m of `w = scale * code + m`.
    """
    OPS.pack_.default(
        out, codes, scale, zero_point, sub_scale, bits, group_size, act_group, activations, offset
    )


@fake("pack_")
def _pack_fake(
    out: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    sub_scale: Tensor | None,
    bits: int,
    group_size: int,
    act_group: int,
    activations: str,
    offset: bool = False,
) -> None:
    return None


def unpack(packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the plain tensors of a packed weight, as `pack_` took them.

    Args:
        packed: uint8 [bytes], a packed weight.

    Returns:
        `codes`, `scale`, `zero_point`, `sub_scale` as in `quantize`; a floating `zero_point` has
        the scale's dtype. What the weight does not have is empty, of shape [0].
    """
    parts: tuple[Tensor, Tensor, Tensor, Tensor] = OPS.unpack.default(packed)
    return parts


@fake("unpack")
def _unpack_fake(packed: Tensor) -> NoReturn:
    raise DataDependentOutputException(OPS.unpack.default)  # shapes and dtypes are in the header


class Header(NamedTuple):
    """What a packed weight says about itself; the sizes are numbers of weights."""

    bits: int
    scale_kind: str
    scale_dtype: torch.dtype
    zero_kind: str
    activations: str
    n: int
    k: int
    group_size: int
    act_group: int
    total_bytes: int

    def __str__(self) -> str:
        kind = "sub16" if self.scale_kind == "sub16" else f"group {self.group_size}"
        zero = {
            "none": "",
            "int16": ", zero points",
            "float": ", float zero points",
            "offset": ", offsets",
        }
        act = f"int8 activations per {self.act_group}"
        rest = act if self.activations == "int8" else f"{self.activations} activations"
        return f"int{self.bits} {kind}{zero[self.zero_kind]}, {rest}"


def describe(packed: Tensor) -> Header:
    """Returns the header of a packed weight, uint8 [bytes], after checking all of it."""
    bits, kind, dtype, zero, activations, *sizes = OPS._describe.default(packed)
    return Header(
        bits,
        ("group", "sub16")[kind],
        (torch.float16, torch.bfloat16, torch.float32)[dtype],
        ("none", "int16", "float", "offset")[zero],
        ("int8", "float", "float_fast")[activations],
        *sizes,
    )


def packed_bytes(
    n: int,
    k: int,
    bits: int,
    scale_kind: str,
    has_zero_point: bool,
    group_size: int,
    act_group: int,
) -> int:
    """Returns the length of the buffer that `pack_` wants for a weight of `n` x `k`.

    The arguments are those of `quantize` and `pack_`.
    """
    size: int = OPS._packed_bytes.default(
        n, k, bits, scale_kind, has_zero_point, group_size, act_group
    )
    return size


def checksum(tensor: Tensor) -> int:
    """Returns 64 bits that say whether bytes are those that were saved (csrc/pack/checksum.h).

    Args:
        tensor: Of any shape and dtype, on the CPU; its values in their order are summed.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    found: int = OPS._checksum.default(flat)
    return found % (1 << 64)


def copy_checksum(out: Tensor, values: Tensor) -> int:
    """Copies `values` to `out`, both uint8 [bytes], and returns what `checksum` says of them."""
    found: int = OPS._copy_checksum.default(out, values)
    return found % (1 << 64)
