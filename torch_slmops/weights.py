"""Quantized weights as plain tensors: w[n,k] = scale[n,g] * (code[n,k] - zero_point[n,g]).

`quantize_weight` makes them from a float weight, `QuantizedWeight.from_parts` from codes and scales
that another tool made, and `QuantizedWeight.pack` gives the one tensor that the ops read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_slmops import memory, ops

__all__ = ["QuantizedWeight", "quantize_weight"]

DEFAULT_GROUP = 32
SUB_GROUP = 16
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# torch's stubs lack torch.int4, hence names.
_BITS = {"torch.int4": 4, "torch.int8": 8}
# Non-zero scales in this range keep all bits of float16.
_FLOAT16_RANGE = (2.0**-14, 65504.0)


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedWeight:
    """A quantized weight of N outputs and K inputs; G = ceil(K / group_size).

    Scale kind "group": `w[n,k] = scale[n,g] * (codes[n,k] - zero_point[n,g])` with g = k's group;
    a missing zero point is 8 (4 bits) or 128 (8 bits); or `scale * codes + zero_point` if that is
    an offset. Scale kind "sub16": `w[n,k] = scale[n] * (sub_scale[n, k // 16] * (codes[n,k] - 8))`.

    Attributes:
        codes: uint8 [N, K], in 0..15 or 0..255.
        scale: float16 or bfloat16 [N, G]; float32 [N] for "sub16".
        zero_point: None if symmetric; int16 [N, G], or [N, G] of the scale's dtype.
        sub_scale: uint8 [N, ceil(K / 16)], in 0..15, for "sub16"; else None.
        bits: 4 or 8.
        group_size: Inputs that share a scale, or -1 for all K; 16 for "sub16".
        shape: (N, K).
        offset: `zero_point` is added after the scale; it is of the scale's dtype.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    sub_scale: Tensor | None
    bits: int
    group_size: int
    shape: tuple[int, int]
    offset: bool = False

    @property
    def scale_kind(self) -> str:
        """ "sub16" or "group"."""
        return "group" if self.sub_scale is None else "sub16"

    def __repr__(self) -> str:
        kind = "sub16" if self.scale_kind == "sub16" else f"group_size={self.group_size}"
        name = "offset" if self.offset else "zero_point"
        zero = "symmetric" if self.zero_point is None else f"{name}={self.zero_point.dtype}"
        return f"QuantizedWeight({self.shape}, int{self.bits}, {kind}, {self.scale.dtype}, {zero})"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the weight [N, K] that the codes stand for.

        Each value is computed in float32 with one rounding (two with a floating zero point), then
        rounded to `dtype`: the same bits as `torch_slmops.ops.embedding` gives for every row.
        """
        k = self.shape[1]
        if self.sub_scale is not None:
            sub = self.sub_scale.repeat_interleave(SUB_GROUP, dim=1)[:, :k].to(torch.int32)
            value = (sub * (self.codes.to(torch.int32) - _middle(4))).float()
            return (value * self.scale[:, None]).to(dtype)
        group = k if self.group_size == -1 else self.group_size
        scale = self.scale.float().repeat_interleave(group, dim=1)[:, :k]
        if self.zero_point is None:
            value = (self.codes.to(torch.int32) - _middle(self.bits)).float()
        else:
            zero = self.zero_point.float().repeat_interleave(group, dim=1)[:, :k]
            if self.offset:
                # The product has 19 bits or fewer, so the sum alone is rounded.
                return (self.codes.float() * scale + zero).to(dtype)
            value = self.codes.float() - zero
        return (value * scale).to(dtype)

    def pack(self, act_group: int | None = None, activations: str = "int8") -> Tensor:
        """Returns the packed weight: uint8 [bytes], in huge pages if it fills one.

        Args:
            act_group: Inputs that share an activation scale: 32, 64, 128 or -1 (all K); a multiple
                or a divisor of `group_size`. By default the largest of 128, 64, 32 that fits the
                group and divides K for 4 bits, 32 for 8 bits.
            activations: "int8" (activations are rounded to int8 per `act_group`), "float" (they
                are taken as they are) or "float_fast" (in bfloat16, outside of the promise of
                bits).

        Raises:
            RuntimeError: The layout cannot hold the weight (a group that is not a multiple of 32),
                or an argument is not one of the above.
        """
        if act_group is None:
            act_group = default_act_group(self.bits, self.group_size, self.shape[1])
        n, k = self.shape
        zero = self.zero_point is not None
        out = memory.empty(
            ops.packed_bytes(n, k, self.bits, self.scale_kind, zero, self.group_size, act_group)
        )
        ops.pack_(
            out,
            self.codes,
            self.scale,
            self.zero_point,
            self.sub_scale,
            self.bits,
            self.group_size,
            act_group,
            activations,
            self.offset,
        )
        return out

    @staticmethod
    def unpack(packed: Tensor) -> QuantizedWeight:
        """Returns the weight in `packed`, uint8 [bytes]: what `pack` was given.

        Only a `group_size` of -1 comes back as the number it stands for, K rounded up to 32.

        Raises:
            RuntimeError: `packed` is not a packed weight, or a damaged one.
        """
        header = ops.describe(packed)
        codes, scale, zero_point, sub_scale = ops.unpack(packed)
        return QuantizedWeight(
            codes,
            scale,
            None if header.zero_kind == "none" else zero_point,
            sub_scale if header.scale_kind == "sub16" else None,
            header.bits,
            header.group_size,
            (header.n, header.k),
            header.zero_kind == "offset",
        )

    @staticmethod
    def from_parts(
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None = None,
        sub_scale: Tensor | None = None,
        *,
        bits: int,
        group_size: int,
        round_scales: bool = False,
        offset: bool = False,
    ) -> QuantizedWeight:
        """Takes over codes and scales that were made elsewhere; the values stay what they were.

        Args:
            codes: [N, K]. uint8: unsigned codes, 0..15 or 0..255, whose symmetric zero point is 8
                or 128. int8: signed codes, -8..7 or -128..127, whose symmetric zero point is 0;
                they and `zero_point` are shifted by 8 or 128.
            scale: [N, G] with G = ceil(K / group_size), float16, bfloat16 or float32; float32
                [N] beside `sub_scale`. float32 is stored as float16, else bfloat16, if that is
                exact.
            zero_point: [N, G], integer (after the shift in 0..15 or 0..255) or floating. None for
                symmetric.
            sub_scale: uint8 [N, ceil(K / 16)], 0..15, for scale kind "sub16"; else None.
            bits: 4 or 8.
            group_size: Inputs that share a scale, or -1 for all K; 16 beside `sub_scale`.
            round_scales: Rounds float32 scales (and floating zero points) that no 16-bit type holds
                to the nearest, in float16 if all non-zero ones lie in 2^-14..65504, else bfloat16.
                The weight then differs from the original by up to 2^-11 (2^-8) of each value.
            offset: `zero_point`, floating, is the m of `w = scale * codes + m`; codes are unsigned.

        Raises:
            ValueError: A shape, a range or a value that is not as above.
            TypeError: A dtype that is not as above.
        """
        n, k, groups = _check_geometry(codes, bits, group_size)
        signed = codes.dtype == torch.int8
        if codes.dtype not in (torch.uint8, torch.int8):
            raise TypeError(f"codes: expected uint8 or int8, got {codes.dtype}")
        shift = _middle(bits) if signed else 0
        codes = _unsigned(codes, shift, bits)
        if offset and (signed or zero_point is None or not zero_point.is_floating_point()):
            raise ValueError("offset: expected uint8 codes and a floating zero_point beside it")
        if sub_scale is not None:
            return _sub16_parts(codes, scale, zero_point, sub_scale, bits, group_size)
        _expect_shape("scale", scale, (n, groups))
        if not scale.is_floating_point():
            raise TypeError(f"scale: expected float16, bfloat16 or float32, got {scale.dtype}")
        zero = _zero_points(zero_point, shift, bits, (n, groups))
        # One 16-bit type has to hold scales and floating zero points alike.
        floats = [scale] if zero is None or zero.dtype == torch.int16 else [scale, zero]
        dtype = _scale_dtype(floats, round_scales)
        if zero is not None and zero.is_floating_point():
            zero = zero.to(dtype)
        return QuantizedWeight(codes, scale.to(dtype), zero, None, bits, group_size, (n, k), offset)

    @staticmethod
    def from_torchao(tensor: Any, *, round_scales: bool = False) -> QuantizedWeight:
        """Takes over a weight of torchao: an `IntxUnpackedToInt8Tensor` of 4 or 8 bits.

        Such a tensor has `qdata` int8 [N, K], `scale` and `zero_point` [N, G], `target_dtype`
        (`torch.int4` or `torch.int8`) and `block_size` (1, K / G). Its activation quantization, if
        any, is not taken over: `pack` decides that.

        Args:
            tensor: The weight of a Linear that `torchao.quantization.quantize_` changed.
            round_scales: As in `from_parts`.

        Raises:
            TypeError: `tensor` has not those attributes or is of another number of bits.
        """
        names = ("qdata", "scale", "zero_point", "target_dtype", "block_size")
        missing = [name for name in names if not hasattr(tensor, name)]
        bits = _BITS.get(str(getattr(tensor, "target_dtype", None)))
        if missing or bits is None:
            what = f"without {', '.join(missing)}" if missing else f"of {tensor.target_dtype}"
            raise TypeError(
                "from_torchao: expected an IntxUnpackedToInt8Tensor of torch.int4 or torch.int8, "
                f"got a {type(tensor).__name__} {what}"
            )
        return QuantizedWeight.from_parts(
            tensor.qdata,
            tensor.scale,
            tensor.zero_point,
            bits=bits,
            group_size=tensor.block_size[1],
            round_scales=round_scales,
        )


def quantize_weight(
    w: Tensor,
    bits: int = 4,
    scale_kind: str | None = None,
    group_size: int | None = None,
    symmetric: bool = True,
    search: str = "mse",
    importance: Tensor | None = None,
) -> QuantizedWeight:
    """Quantizes a float weight; the same codes on every CPU.

    Args:
        w: [N, K], float32, bfloat16 or float16, finite, on the CPU.
        bits: 4 or 8.
        scale_kind: "sub16" (4 bits, symmetric; a fp32 scale per output times a 4-bit one per 16
            inputs: 4.25 bits per weight) or "group" (a 16-bit scale per `group_size` inputs). By
            default "sub16" where it can be and no `group_size` is given.
        group_size: Inputs that share a scale in kind "group", 32 by default; -1 for all K. Only
            multiples of 32 can be packed.
        symmetric: Without zero points; else each group gets an integer one.
        search: "mse" tries several scales for the least squared error, "absmax" takes the one that
            the largest |w| of a group gives.
        importance: Weights of the squared errors per input (the mean square of the activation is
            the usual one), [K], finite and not negative.

    Raises:
        ValueError: An option, a shape, or a value that is not finite.
        TypeError: A dtype.
    """
    if not isinstance(w, Tensor) or w.dtype not in FLOAT_DTYPES:
        got = w.dtype if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(f"quantize_weight: expected float32, bfloat16 or float16, got {got}")
    if w.dim() != 2 or w.numel() == 0 or w.device.type != "cpu":
        raise ValueError(
            "quantize_weight: expected a non-empty 2-D weight on the CPU, got "
            f"shape {tuple(w.shape)} on {w.device}"
        )
    scale_kind, group_size = resolve_scales(bits, scale_kind, group_size, symmetric)
    if importance is not None:
        importance = importance.detach().to(torch.float32)
    try:
        codes, scale, zero_point, sub_scale = ops.quantize(
            w.detach(), bits, scale_kind, group_size, symmetric, search, importance
        )
    except RuntimeError as error:  # The op's checks know no other exception type.
        raise ValueError(str(error)) from error
    return QuantizedWeight(
        codes,
        scale,
        None if symmetric else zero_point,
        sub_scale if scale_kind == "sub16" else None,
        bits,
        group_size,
        (w.shape[0], w.shape[1]),
    )


def default_act_group(bits: int, group_size: int, k: int) -> int:
    """Returns what `pack` takes for `act_group` if it is given none."""
    group = -(-k // 32) * 32 if group_size == -1 else group_size
    candidates = (128, 64, 32) if bits == 4 else (32,)
    for size in candidates:
        if k % size == 0 and (size % group == 0 or group % size == 0):
            return size
    return 32


def resolve_scales(
    bits: int, scale_kind: str | None, group_size: int | None, symmetric: bool
) -> tuple[str, int]:
    """Returns the scale kind and the group size that these options of `quantize_weight` mean."""
    if bits not in (4, 8):
        raise ValueError(f"expected bits 4 or 8, got {bits!r}")
    sub16_possible = bits == 4 and symmetric
    if scale_kind is None:
        scale_kind = "sub16" if sub16_possible and group_size is None else "group"
    if scale_kind not in ("group", "sub16"):
        raise ValueError(f'expected scale_kind "group" or "sub16", got {scale_kind!r}')
    if scale_kind == "sub16":
        if not sub16_possible or group_size not in (None, SUB_GROUP):
            raise ValueError(
                'scale_kind "sub16" is for 4-bit symmetric weights and has no group_size; use '
                f'scale_kind "group", or leave the others out. Got bits {bits}, symmetric '
                f"{symmetric}, group_size {group_size}"
            )
        return scale_kind, SUB_GROUP
    group_size = DEFAULT_GROUP if group_size is None else group_size
    if group_size != -1 and group_size < 1:
        raise ValueError(f"expected group_size to be positive or -1 (all inputs), got {group_size}")
    return scale_kind, group_size


def _middle(bits: int) -> int:
    """The symmetric zero point of unsigned codes."""
    return 1 << (bits - 1)


def _check_geometry(codes: Tensor, bits: int, group_size: int) -> tuple[int, int, int]:
    if bits not in (4, 8):
        raise ValueError(f"bits: expected 4 or 8, got {bits!r}")
    if codes.dim() != 2 or codes.numel() == 0:
        raise ValueError(f"codes: expected a non-empty [N, K], got shape {tuple(codes.shape)}")
    n, k = codes.shape
    if group_size != -1 and group_size < 1:
        raise ValueError(f"group_size: expected a positive number or -1, got {group_size!r}")
    return n, k, 1 if group_size == -1 else -(-k // group_size)


def _expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")


def _unsigned(codes: Tensor, shift: int, bits: int) -> Tensor:
    """uint8 codes after the shift; refuses those that `bits` bits don't hold."""
    moved = codes.to(torch.int16) + shift
    least, largest = int(moved.min()), int(moved.max())
    if least < 0 or largest >= 1 << bits:
        raise ValueError(
            f"codes: expected {-shift}..{(1 << bits) - 1 - shift} ({codes.dtype}, {bits} bits), "
            f"got {least - shift}..{largest - shift}"
        )
    return moved.to(torch.uint8)


def _sub16_parts(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    sub_scale: Tensor,
    bits: int,
    group_size: int,
) -> QuantizedWeight:
    n, k = codes.shape
    if bits != 4 or zero_point is not None or group_size not in (SUB_GROUP, -1):
        raise ValueError(
            "sub_scale: expected bits=4, no zero_point and group_size=16, "
            f"got bits={bits}, group_size={group_size}"
            + ("" if zero_point is None else " and a zero_point")
        )
    _expect_shape("scale", scale, (n,))
    _expect_shape("sub_scale", sub_scale, (n, -(-k // SUB_GROUP)))
    if scale.dtype != torch.float32 or sub_scale.dtype != torch.uint8:
        raise TypeError(
            f"expected scale float32 and sub_scale uint8, got {scale.dtype} and {sub_scale.dtype}"
        )
    if int(sub_scale.max()) > 15:
        raise ValueError(f"sub_scale: expected 0..15, got {int(sub_scale.max())}")
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("scale: expected finite values, got an infinity or a NaN")
    return QuantizedWeight(codes, scale, None, sub_scale, bits, SUB_GROUP, (n, k))


def _zero_points(
    zero_point: Tensor | None, shift: int, bits: int, shape: tuple[int, int]
) -> Tensor | None:
    """The zero points of unsigned codes: int16, floating, or None where all are symmetric."""
    if zero_point is None:
        return None
    _expect_shape("zero_point", zero_point, shape)
    if zero_point.is_floating_point():
        shifted = zero_point.double() + shift
        if not torch.equal(shifted.float().double(), shifted):
            raise ValueError(
                f"zero_point: adding {shift}, for signed codes, is not exact in float32; give "
                "unsigned codes (uint8) and the zero points that belong to them"
            )
        return zero_point if shift == 0 else shifted.float()
    if zero_point.dtype not in _INTEGER_DTYPES:
        raise TypeError(
            f"zero_point: expected an integer or floating dtype, got {zero_point.dtype}"
        )
    moved = zero_point.to(torch.int64) + shift
    least, largest = int(moved.min()), int(moved.max())
    if least < 0 or largest >= 1 << bits:
        raise ValueError(
            f"zero_point: expected {-shift}..{(1 << bits) - 1 - shift}, "
            f"got {least - shift}..{largest - shift}"
        )
    return None if least == largest == _middle(bits) else moved.to(torch.int16)


def _scale_dtype(tensors: list[Tensor], round_scales: bool) -> torch.dtype:
    """The 16-bit type that holds all values: exactly, or rounded where the caller allows it."""
    values = torch.cat([t.detach().reshape(-1) for t in tensors]).double()
    if not bool(torch.isfinite(values).all()):
        raise ValueError("scale and zero_point: expected finite values, got an infinity or a NaN")
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(values.to(dtype).double(), values):
            return dtype
    if not round_scales:
        raise ValueError(
            "scale: expected values that float16 or bfloat16 holds exactly, got others (in "
            f"{tensors[0].dtype}). round_scales=True rounds them, which changes the weight a little"
        )
    scales = tensors[0].detach().double().abs()
    scales = scales[scales > 0]
    low, high = _FLOAT16_RANGE
    fits = scales.numel() == 0 or (float(scales.min()) >= low and float(values.abs().max()) <= high)
    return torch.float16 if fits else torch.bfloat16
