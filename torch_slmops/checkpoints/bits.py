"""What formats share: codes packed into 32-bit words, and groups of inputs in any order."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["order_of_groups", "unpack_words"]


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Returns the codes of a stream of bits, uint8 [rows, count].

    Args:
        words: int32 [rows, W]; code i is bits i * `bits` and on of its row, the lowest first.
        bits: Of a code, 1 to 8.
        count: Codes of a row; W * 32 >= count * bits.
    """
    rows = len(words)
    stream = words.contiguous().view(torch.uint8)
    if bits == 8:
        return stream[:, :count]
    if bits == 4:
        return torch.stack([stream & 15, stream >> 4], 2).view(rows, -1)[:, :count]
    single = np.unpackbits(stream.numpy(), axis=1, count=count * bits, bitorder="little")
    weights = torch.tensor([1 << i for i in range(bits)], dtype=torch.uint8)
    return (torch.from_numpy(single).view(rows, count, bits) * weights).sum(2, dtype=torch.uint8)


def order_of_groups(index: Tensor, groups: int, size: int, where: str) -> Tensor | None:
    """Returns the order of inputs that makes groups consecutive, int64 [K]; None if they are.

    Args:
        index: The group of each input, integers [K].
        groups: Their number.
        size: Inputs of a group, the last one perhaps excepted; -1 for all.
        where: The file and the tensor, for errors.

    Raises:
        ValueError: The groups have other numbers or sizes.
    """
    k = len(index)
    expected = torch.zeros(k, dtype=torch.int64) if size == -1 else torch.arange(k) // size
    index = index.long()
    if torch.equal(index, expected):
        return None
    perm = torch.argsort(index, stable=True)
    if not torch.equal(index[perm], expected):
        sizes = sorted(set(torch.bincount(index.clamp(min=0)).tolist()))
        raise ValueError(
            f"{where}: expected {groups} groups of {size} inputs, got groups of "
            f"{', '.join(map(str, sizes))}"
        )
    return perm
