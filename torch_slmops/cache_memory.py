"""Where caches keep keys and values: slots in use and free ones, plain, in blocks, or as int8."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torch_slmops import memory, ops
from torch_slmops.int8_tensor import Int8Tensor

__all__ = ["LEAST_SLOTS", "BlockedKeys", "Blocks", "Int8Heads", "Memory"]

LEAST_SLOTS = 64
_BLOCK = 16


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Memory like `like`, in huge pages where it is long: each step reads all of it."""
    dtype = dtype or like.dtype
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return like.new_empty(shape, dtype=dtype)
    return memory.empty(math.prod(shape) * dtype.itemsize).view(dtype).view(*shape)


_numbers = itertools.count(1)


class Memory:
    """A tensor [B, H, slots, D] of which slots [first, stop) are in use.

    Attributes:
        changes: Another number after every change of any memory.
    """

    changes = 0

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.first, self.stop = tensor, 0, tensor.shape[2]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        Memory.note_change()

    @staticmethod
    def note_change() -> None:
        """Gives `changes` a new number."""
        Memory.changes = next(_numbers)

    @classmethod
    def of(cls, states: Tensor, slots: int) -> Memory:
        """Free slots for `states`."""
        made = cls(_empty(states, (*states.shape[:2], slots, states.shape[3])))
        made.stop = 0
        return made

    @property
    def batch(self) -> int:
        return self.tensor.shape[0]

    @property
    def slots(self) -> int:
        """Those in use and the free ones."""
        return self.tensor.shape[2]

    def view(self) -> Tensor:
        return self.tensor[:, :, self.first : self.stop]

    def last(self, count: int) -> Tensor:
        """The last `count` slots in use, and the free ones behind them."""
        first = self.stop - count
        return self.tensor if first == 0 else self.tensor[:, :, first:]

    def is_part(self, value: Tensor) -> bool:
        """Whether `value` is a view of some of the slots."""
        own = self.tensor
        return (
            value.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
            and value.stride() == own.stride()
            and (*value.shape[:2], value.shape[3]) == (*own.shape[:2], own.shape[3])
        )

    def use(self, part: Tensor) -> None:
        """Makes the slots that `part` is a view of those in use."""
        distance = part.storage_offset() - self.tensor.storage_offset()
        self.first = distance // self.tensor.stride(2)
        self.stop = self.first + part.shape[2]

    def make_room(self, new: int) -> None:
        """Makes sure that `new` slots are free behind those in use, and may be written."""
        if self.tensor.is_inference() and not torch.is_inference_mode_enabled():
            self.tensor = self.tensor.clone()
        if self.stop + new <= self.slots:
            return
        used, kept = self.stop - self.first, self.view()
        slots = max(2 * (used + new), LEAST_SLOTS)
        if slots > self.slots:
            batch, heads, _, width = self.tensor.shape
            self.tensor = _empty(self.tensor, (batch, heads, slots, width))
        else:
            kept = kept.clone()
        self.tensor[:, :, :used] = kept
        self.first, self.stop = 0, used

    def reorder(self, rows: Tensor) -> None:
        """Makes `rows` of the batch, in this order, its rows."""
        self.tensor = _rows(self.tensor, rows, slice(self.first, self.stop))


def _rows(tensor: Tensor, rows: Tensor, used: slice) -> Tensor:
    """Rows of the batch; what is not in `used` is left out."""
    found = _empty(tensor, (len(rows), *tensor.shape[1:]))
    found[:, :, used] = tensor[:, :, used].index_select(0, rows)
    return found


class Blocks(Memory):
    """Slots in blocks of 16: `parts` are tensors [B, H, blocks, ...]. The first slot is in use."""

    def __init__(self, parts: list[Tensor]) -> None:
        self.parts = parts
        self.first = self.stop = 0

    @property
    def batch(self) -> int:
        return self.parts[0].shape[0]

    @property
    def slots(self) -> int:
        return self.parts[0].shape[2] * _BLOCK

    def last(self, count: int) -> Tensor:
        assert count == self.stop
        return self.parts[0]

    def is_part(self, value: Tensor) -> bool:
        return False

    def make_room(self, new: int) -> None:
        if self.parts[0].is_inference() and not torch.is_inference_mode_enabled():
            self.parts = [part.clone() for part in self.parts]
        if self.stop + new <= self.slots:
            return
        used, blocks = -(-self.stop // _BLOCK), -(-2 * (self.stop + new) // _BLOCK)
        parts = [_empty(old, (*old.shape[:2], blocks, *old.shape[3:])) for old in self.parts]
        for new_part, old in zip(parts, self.parts, strict=True):
            new_part[:, :, :used] = old[:, :, :used]
        self.parts = parts

    def reorder(self, rows: Tensor) -> None:
        used = slice(-(-self.stop // _BLOCK))
        self.parts = [_rows(part, rows, used) for part in self.parts]


class BlockedKeys(Blocks):
    """Keys as `ops.decoder_layers` reads them fastest: [B, H, blocks, D, 16]; see there."""

    def __init__(self, states: Tensor, slots: int) -> None:
        batch, heads, _, width = states.shape
        super().__init__([_empty(states, (batch, heads, -(-slots // _BLOCK), width, _BLOCK))])

    def view(self) -> Tensor:
        """A copy, in the order of `keys`."""
        return self.parts[0].transpose(3, 4).flatten(2, 3)[:, :, : self.stop]


class Int8Heads(Blocks):
    """Keys or values as int8 with a scale per head and slot: see `ops.store_int8_`.

    Args:
        states: [B, H, L, D], of which shape and dtype count.
        slots: How many there is room for.
        values: Whether they are values and not keys.
    """

    def __init__(self, states: Tensor, slots: int, values: bool) -> None:
        batch, heads, _, self.head_dim = states.shape
        shape = ops.int8_shape(slots, self.head_dim, values)
        codes = _empty(states, (batch, heads, *shape), torch.uint8)
        scale = _empty(states, (batch, heads, shape[0], _BLOCK), torch.float32)
        super().__init__([codes, scale])
        self.dtype, self.values = states.dtype, values

    @property
    def codes(self) -> Tensor:
        """As `ops.store_int8_` takes them."""
        return self.parts[0]

    @property
    def scale(self) -> Tensor:
        """[B, H, slots]."""
        return self.parts[1].flatten(2)

    def store(self, states: Tensor) -> None:
        """Writes `states` behind what is in use; there is room."""
        ops.store_int8_(states.transpose(1, 2), self.codes, self.scale, self.stop, self.values)

    def part(self) -> Int8Tensor:
        """What is in use, as it is."""
        scale = self.scale[:, :, : self.stop]
        return Int8Tensor(self.codes, scale, self.head_dim, self.values, self.dtype)

    def view(self) -> Tensor:
        """What is in use, as floats."""
        return self.part().floats()
