"""Keys and values as int8: the op `store_int8_`, and the shapes of what it fills."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_slmops.ops.common import OPS, fake, refuse_devices, same_device

__all__ = ["int8_shape", "read_int8", "store_int8_"]

_BLOCK = 16


def int8_shape(slots: int, head_dim: int, values: bool) -> tuple[int, int, int, int]:
    """Returns the shape of one head's codes of at least `slots` slots.

    With P = `head_dim` rounded up to 16: keys [blocks, P / 4, 16, 4], 4 elements of each of 16
    slots together; values [blocks, 4, P, 4], 4 slots of each element together. The integer dots
    read them so.
    """
    padded, blocks = -(-head_dim // _BLOCK) * _BLOCK, -(-slots // _BLOCK)
    return (blocks, 4, padded, 4) if values else (blocks, padded // 4, _BLOCK, 4)


def store_int8_(x: Tensor, codes: Tensor, scale: Tensor, start: int, values: bool) -> None:
    """codes[slot, d] = 128 + rne(x[d] * (127 / amax)), scale[slot] = amax / 127, amax = max |x[d]|.

    A head that is not finite gets codes of 0 and the scale NaN; one of (nearly) zeros the scale 0.

    Args:
        x: [B, L, H, D], float32, bfloat16 or float16; any strides; D is at most 256.
        codes: uint8 [B, H, *int8_shape(slots, D, values)], that of a head contiguous; slots `start`
            to `start + L` are written.
        scale: float32 [B, H, slots], the last dimension contiguous; likewise.
        start: The first slot.
        values: Whether they are values and not keys.
    """
    OPS.store_int8_.default(x, codes, scale, start, values)


def read_int8(
    codes: Tensor, scale: Tensor, head_dim: int, values: bool, dtype: torch.dtype
) -> Tensor:
    """Returns (codes - 128) * scale, rounded once to `dtype`.

    Args:
        codes: As `store_int8_` fills them.
        scale: float32 [B, H, L].
        head_dim: D.
        values: Whether they are values and not keys.
        dtype: float32, bfloat16 or float16.

    Returns:
        [B, H, L, D], for the slots that `scale` has.
    """
    in_order = codes.transpose(4, 5) if values else codes.transpose(3, 4)
    batch, heads, blocks = codes.shape[:3]
    width = codes.shape[4] if values else 4 * codes.shape[3]
    plain = in_order.reshape(batch, heads, blocks * _BLOCK, width)
    plain = plain[:, :, : scale.shape[2], :head_dim]
    return ((plain.float() - 128.0) * scale[..., None]).to(dtype)


@fake("store_int8_")
def _store_int8_fake(x: Tensor, codes: Tensor, scale: Tensor, start: int, values: bool) -> None:
    same_device("store_int8_", "x", x, codes, "codes")
    same_device("store_int8_", "x", x, scale, "scale")


refuse_devices("store_int8_")
