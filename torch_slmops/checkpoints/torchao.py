"""Weights that `torchao.quantization.quantize_` made, in memory.

    IntxUnpackedToInt8Tensor, Int8Tensor    w[n,k] = scale[n,g] * (qdata[n,k] - zero_point[n,g])
    Int4Tensor                              w[n,k] = scale[g,n] * qdata[n,k] + zero_point[g,n]

How they round activations is not taken over: `act_group` and `activations` of `optimize` say how
that is done here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops.foreign import Parts, Source

__all__ = ["from_module"]

_INTX_BITS = {f"torch.int{bits}": bits for bits in range(1, 9)}


def from_module(name: str, module: nn.Module) -> Source | None:
    """Returns the source of a layer with such a weight, or None.

    Raises:
        ValueError: The weight scales its inputs, or has an arrangement that is not known.
    """
    weight: Any = module._parameters.get("weight")
    kind = type(weight)
    read = _READERS.get(kind.__name__)
    if read is None or not kind.__module__.startswith("torchao."):
        return None
    if getattr(weight, "act_pre_scale", None) is not None:
        raise ValueError(f"{name}.weight: a {kind.__name__} with act_pre_scale is not supported")
    block = tuple(weight.block_size)
    if weight.dim() != 2 or block[0] not in (1, len(weight)):
        raise ValueError(
            f"{name}.weight: expected a scale per group of inputs, row or tensor, got blocks of "
            f"{block} in {tuple(weight.shape)}"
        )
    return Source(f"torchao {kind.__name__}", f"{name}.weight", partial(read, weight))


def _intx(weight: Any) -> Parts:
    bits = 4 if _INTX_BITS[str(weight.target_dtype)] <= 4 else 8
    return _signed(weight, bits)


def _int8(weight: Any) -> Parts:
    return _signed(weight, 8)


def _signed(weight: Any, bits: int) -> Parts:
    n, k = weight.shape
    groups = -(-k // weight.block_size[1])
    middle = 1 << (bits - 1)
    codes = (weight.qdata.to(torch.int16) + middle).to(torch.uint8)
    zero: Tensor | None = getattr(weight, "zero_point", None)
    if zero is not None:
        zero = _per_row(zero, n, groups)
        zero = zero.double() + middle if zero.is_floating_point() else zero.long() + middle
    return Parts(codes, _per_row(weight.scale, n, groups), zero, bits, _group(weight))


def _int4(weight: Any) -> Parts:
    packed = weight.qdata.view(torch.uint8)
    # Two's complement nibbles, the first of a pair low; XOR 8 makes them unsigned.
    codes = torch.stack([packed & 15, packed >> 4], 2).flatten(1) ^ 8
    scale, offset = weight.scale.T.float(), weight.zero_point.T.float()
    if not bool(offset.any()):
        return Parts(codes, scale, None, 4, _group(weight))
    return Parts(codes, scale, None, 4, _group(weight), minimum=offset - 8 * scale)


def _per_row(x: Tensor, n: int, groups: int) -> Tensor:
    return x.detach().reshape(-1, groups).expand(n, groups)


def _group(weight: Any) -> int:
    size = int(weight.block_size[1])
    return -1 if size == weight.shape[1] else size


_READERS = {
    "IntxUnpackedToInt8Tensor": _intx,
    "Int8Tensor": _int8,
    "Int4Tensor": _int4,
}
