"""Caches of keys and values that grow in place, for transformers.

transformers' dynamic layers concatenate: each token copies all that came before. Ours write new
keys and values behind the old ones, into memory that doubles when it is full. They are subclasses
with the same interface; `keys` and `values` are views of the slots in use.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
)

__all__ = ["Cache", "GrowingLayer", "GrowingSlidingWindowLayer", "adopt", "layer_of"]

_LEAST_SLOTS = 64
_BLOCK = 16


class _Memory:
    """A tensor [B, H, slots, D] of which slots [first, stop) are in use."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.first, self.stop = tensor, 0, tensor.shape[2]

    @classmethod
    def of(cls, states: Tensor, slots: int) -> _Memory:
        """Free slots for `states`."""
        made = cls(states.new_empty(*states.shape[:2], slots, states.shape[3]))
        made.stop = 0
        return made

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
        if self.stop + new <= self.tensor.shape[2]:
            return
        used, kept = self.stop - self.first, self.view()
        slots = max(2 * (used + new), _LEAST_SLOTS)
        if slots > self.tensor.shape[2]:
            batch, heads, _, width = self.tensor.shape
            self.tensor = self.tensor.new_empty(batch, heads, slots, width)
        else:
            kept = kept.clone()
        self.tensor[:, :, :used] = kept
        self.first, self.stop = 0, used

    def reorder(self, beam_idx: Tensor) -> None:
        tensor, used = torch.empty_like(self.tensor), slice(self.first, self.stop)
        tensor[:, :, used] = self.tensor[:, :, used].index_select(0, beam_idx)
        self.tensor = tensor


class _BlockedKeys(_Memory):
    """Keys as `ops.decoder_layers` reads them fastest: [B, H, blocks, D, 16]; see there."""

    def __init__(self, states: Tensor, slots: int) -> None:
        batch, heads, _, width = states.shape
        self.tensor = states.new_empty(batch, heads, -(-slots // _BLOCK), width, _BLOCK)
        self.first = self.stop = 0

    def view(self) -> Tensor:
        """A copy, in the order of `keys`."""
        return self.tensor.transpose(3, 4).flatten(2, 3)[:, :, : self.stop]

    def last(self, count: int) -> Tensor:
        assert count == self.stop
        return self.tensor

    def is_part(self, value: Tensor) -> bool:
        return False

    def make_room(self, new: int) -> None:
        if self.tensor.is_inference() and not torch.is_inference_mode_enabled():
            self.tensor = self.tensor.clone()
        if self.stop + new <= self.tensor.shape[2] * _BLOCK:
            return
        old, used = self.tensor, -(-self.stop // _BLOCK)
        blocks = -(-2 * (self.stop + new) // _BLOCK)
        self.tensor = old.new_empty(*old.shape[:2], blocks, *old.shape[3:])
        self.tensor[:, :, :used] = old[:, :, :used]

    def reorder(self, beam_idx: Tensor) -> None:
        tensor, used = torch.empty_like(self.tensor), slice(-(-self.stop // _BLOCK))
        tensor[:, :, used] = self.tensor[:, :, used].index_select(0, beam_idx)
        self.tensor = tensor


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A `DynamicLayer` that grows in place.

    Keys that only `ops.decoder_layers` has seen lie in blocks; reading `keys` then copies them.
    """

    can_block = True

    def _memory(self, name: str) -> _Memory | None:
        memory = vars(self).get(name)
        return memory if isinstance(memory, _Memory) else None

    def _view(self, name: str) -> Tensor | None:
        memory = vars(self).get(name)
        return memory.view() if isinstance(memory, _Memory) else memory

    def _assign(self, name: str, value: Tensor | None) -> None:
        memory = self._memory(name)
        if value is None or value.dim() != 4:  # none yet, or what torch.cat takes for nothing
            vars(self)[name] = value
        elif memory is not None and memory.is_part(value):
            memory.use(value)
        else:
            vars(self)[name] = _Memory(value)

    @property
    def keys(self) -> Tensor | None:
        """[B, H, L, D], a view of what is in use; None or empty before the first update."""
        return self._view("_keys")

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._assign("_keys", value)

    @property
    def values(self) -> Tensor | None:
        """Likewise."""
        return self._view("_values")

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._assign("_values", value)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns the keys and values that the new queries may see, the new ones last."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        if isinstance(self._memory("_keys"), _BlockedKeys):
            self.keys = self.keys
        keys, values, start = self.reserve(key_states, value_states)
        stop = start + key_states.shape[2]
        keys[:, :, start:stop] = key_states
        values[:, :, start:stop] = value_states
        self.advance(key_states.shape[2])
        return keys[:, :, :stop], values[:, :, :stop]

    def reserve(
        self, key_states: Tensor, value_states: Tensor, blocked: bool = False
    ) -> tuple[Tensor, Tensor, int]:
        """Makes room for new keys and values, whose shapes and dtype count, not the values.

        Args:
            key_states: [B, H, L, D].
            value_states: [B, H, L, Dv].
            blocked: Whether keys may lie in blocks, if there are none yet.

        Returns:
            keys and values, [B, H, at least start + L, D], and `start`: slots before it hold what
            new queries may see, the new ones go to the L slots from there. They count as there
            after `advance(L)`. Keys may be blocks, [B, H, blocks, D, 16].
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[2]
        slots = max(2 * new, _LEAST_SLOTS)
        own = vars(self)
        keys, values = own.get("_keys"), own.get("_values")
        if not isinstance(keys, _Memory) or not isinstance(values, _Memory):
            if blocked and self.can_block:
                keys = _BlockedKeys(key_states, slots)
            else:
                keys = _Memory.of(key_states, slots)
            values = _Memory.of(value_states, slots)
            own["_keys"], own["_values"] = keys, values
        keys.make_room(new)
        values.make_room(new)
        visible = self._visible(keys.stop - keys.first)
        return keys.last(visible), values.last(visible), visible

    def _visible(self, used: int) -> int:
        """How many of the slots in use new queries may see."""
        return used

    def advance(self, new: int) -> None:
        """Counts the `new` slots behind those in use as used."""
        for name in ("_keys", "_values"):
            memory = self._memory(name)
            assert memory is not None
            memory.stop += new

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens."""
        keys, values = self._memory("_keys"), self._memory("_values")
        if tokens_to_remove < 0 and isinstance(keys, _BlockedKeys) and values is not None:
            keys.stop = values.stop = max(keys.stop + tokens_to_remove, 0)
        else:
            super().crop(tokens_to_remove)

    def get_seq_length(self) -> int:
        """Returns the number of tokens seen."""
        memory = self._memory("_keys")
        return 0 if memory is None else memory.stop - memory.first

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the sequences for beam search."""
        for name in ("_keys", "_values"):
            memory = self._memory(name)
            if memory is not None:
                memory.reorder(beam_idx)


class GrowingSlidingWindowLayer(  # type: ignore[no-untyped-call]
    GrowingLayer, DynamicSlidingWindowLayer
):
    """A `DynamicSlidingWindowLayer` that grows in place, to about twice its window."""

    can_block = False

    def _visible(self, used: int) -> int:
        return min(used, self.sliding_window - 1)

    def advance(self, new: int) -> None:
        super().advance(new)
        self.cumulative_length += new
        if getattr(self, "record_past", False):  # since transformers 5.23
            return
        for name in ("_keys", "_values"):
            memory = self._memory(name)
            assert memory is not None
            memory.first = max(memory.first, memory.stop - (self.sliding_window - 1))

    def get_seq_length(self) -> int:
        """Returns the number of tokens seen."""
        return int(self.cumulative_length)


_OURS: dict[type, type] = {
    DynamicLayer: GrowingLayer,
    DynamicSlidingWindowLayer: GrowingSlidingWindowLayer,
}


def adopt(layer: Any) -> Any:
    """Makes a dynamic layer of transformers one of ours, the same object; others stay."""
    ours = _OURS.get(type(layer))
    if ours is not None:
        keys, values = (vars(layer).pop(name) for name in ("keys", "values"))
        layer.__class__ = ours
        layer.keys, layer.values = keys, values
    return layer


def layer_of(cache: Any, index: int) -> Any:
    """Returns a layer of a cache that new keys can be written into in place, or None.

    It is a `GrowingLayer`, which a dynamic layer becomes here, or a `StaticLayer`.
    """
    if getattr(type(cache), "update", None) is not cache_utils.Cache.update or cache.offloading:
        return None
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if type(layer) is StaticLayer:
        return layer
    if torch.compiler.is_compiling():  # lengths would be constants of the graph
        return None
    layer = adopt(layer)
    return layer if type(layer) in _OURS.values() else None


class Cache(DynamicCache):
    """A `DynamicCache` whose layers grow in place: `past_key_values=torch_slmops.Cache()`.

    Models that `torch_slmops.optimize` has fused use its layers in any `DynamicCache`, and so in
    `generate`; this class serves other models.

    Args:
        config: The model's config; with it layers with a sliding window keep no more than that.
    """

    def __init__(self, config: Any = None) -> None:
        super().__init__(config=config)
        for layer in self.layers:
            adopt(layer)
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = GrowingLayer
