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

from torch_slmops.attention import check_kv_cache
from torch_slmops.cache_memory import LEAST_SLOTS, BlockedKeys, Blocks, Int8Heads, Memory

__all__ = [
    "Cache",
    "GrowingLayer",
    "GrowingSlidingWindowLayer",
    "Int8Layer",
    "adopt",
    "layer_of",
    "layers_of",
]


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A `DynamicLayer` that grows in place.

    Keys that only `ops.decoder_layers` has seen lie in blocks; reading `keys` then copies them.
    """

    can_block = True

    def _memory(self, name: str) -> Memory | None:
        memory = vars(self).get(name)
        return memory if isinstance(memory, Memory) else None

    def _view(self, name: str) -> Tensor | None:
        memory = vars(self).get(name)
        return memory.view() if isinstance(memory, Memory) else memory

    def _assign(self, name: str, value: Tensor | None) -> None:
        memory = self._memory(name)
        if value is None or value.dim() != 4:  # none yet, or what torch.cat takes for nothing
            vars(self)[name] = value
            Memory.note_change()
        elif memory is not None and memory.is_part(value):
            memory.use(value)
        else:
            vars(self)[name] = Memory(value)

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
        if isinstance(self._memory("_keys"), BlockedKeys):
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
        own = vars(self)
        keys, values = own.get("_keys"), own.get("_values")
        if not isinstance(keys, Memory) or not isinstance(values, Memory):
            slots = max(2 * new, LEAST_SLOTS)
            if blocked and self.can_block:
                keys = BlockedKeys(key_states, slots)
            else:
                keys = Memory.of(key_states, slots)
            values = Memory.of(value_states, slots)
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
        own = vars(self)
        own["_keys"].stop += new
        own["_values"].stop += new

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens."""
        keys, values = self._memory("_keys"), self._memory("_values")
        if tokens_to_remove < 0 and isinstance(keys, Blocks) and values is not None:
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

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence `repeats` times."""
        self.reorder_cache(self._rows().repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the sequences `indices`, in this order."""
        self.reorder_cache(self._rows()[indices])

    def _rows(self) -> Tensor:
        """Numbers of the sequences."""
        keys = self._memory("_keys")
        return torch.arange(0 if keys is None else keys.batch)


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


class Int8Layer(GrowingLayer):  # type: ignore[no-untyped-call]
    """A `GrowingLayer` that keeps keys and values as int8 with a scale per head and token.

    Attention "slmops" computes on the int8 codes. Everything else gets the floats that they stand
    for, each time anew: `keys` and `values`, and the tensors that `update` returns as soon as an op
    reads them.
    """

    def _assign(self, name: str, value: Tensor | None) -> None:
        super()._assign(name, value)
        memory = self._memory(name)
        if memory is not None and value is not None:
            rounded = Int8Heads(value, value.shape[2], name == "_values")
            rounded.store(value)
            rounded.stop = value.shape[2]
            vars(self)[name] = rounded

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns the keys and values that the new queries may see, the new ones last."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError(
                "cache: expected keys and values that do not require gradients, as int8 gives "
                "none; call the model under torch.no_grad() or use a cache of floats"
            )
        keys, values = self._room(key_states, value_states)
        keys.store(key_states)
        values.store(value_states)
        self.advance(key_states.shape[2])
        if torch.compiler.is_compiling():
            return keys.view(), values.view()
        return keys.part(), values.part()

    def reserve_int8(
        self, key_states: Tensor, value_states: Tensor
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], int]:
        """Makes room as `reserve` does.

        Returns:
            The codes of keys and of values and the scales of both, as `ops.decoder_layers` takes
            them, and how many slots are in use.
        """
        keys, values = self._room(key_states, value_states)
        return (keys.codes, values.codes, keys.scale, values.scale), keys.stop

    def _room(self, key_states: Tensor, value_states: Tensor) -> tuple[Int8Heads, Int8Heads]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        found = []
        for name, states in (("_keys", key_states), ("_values", value_states)):
            memory = self._memory(name)
            if not isinstance(memory, Int8Heads):
                slots = max(2 * states.shape[2], LEAST_SLOTS)
                memory = vars(self)[name] = Int8Heads(states, slots, name == "_values")
            memory.make_room(states.shape[2])
            found.append(memory)
        return found[0], found[1]


_OURS: dict[type, type] = {
    DynamicLayer: GrowingLayer,
    DynamicSlidingWindowLayer: GrowingSlidingWindowLayer,
}
_IN_PLACE = (GrowingLayer, GrowingSlidingWindowLayer, Int8Layer)


def adopt(layer: Any, dtype: Any = None) -> Any:
    """Makes a dynamic layer of transformers one of ours, the same object; others stay.

    Args:
        layer: A layer of a cache.
        dtype: "int8" for an `Int8Layer` where `layer` has no sliding window.
    """
    ours = _OURS.get(type(layer))
    if ours is GrowingLayer and dtype is not None:
        ours = Int8Layer
    if ours is not None:
        keys, values = (vars(layer).pop(name) for name in ("keys", "values"))
        layer.__class__ = ours
        layer.keys, layer.values = keys, values
    return layer


def layer_of(cache: Any, index: int, dtype: Any = None) -> Any:
    """Returns the layer of a cache, as `layers_of` does, or None."""
    found = layers_of(cache, [index], dtype)
    return None if found is None else found[0]


def layers_of(cache: Any, indices: list[int], dtype: Any = None) -> list[Any] | None:
    """Returns layers of a cache that new keys can be written into in place; None if one cannot.

    Each is a `GrowingLayer`, which a dynamic layer becomes here (with `dtype` "int8" an
    `Int8Layer`), or a `StaticLayer`.
    """
    if getattr(type(cache), "update", None) is not cache_utils.Cache.update or cache.offloading:
        return None
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= max(indices):
            cache.layers.append(cache.layer_class_to_replicate())
    found = [cache.layers[index] for index in indices]
    for layer in found:
        if type(layer) is StaticLayer:
            continue
        if torch.compiler.is_compiling():  # lengths would be constants of the graph
            return None
        if type(layer) not in _IN_PLACE and type(adopt(layer, dtype)) not in _IN_PLACE:
            return None
    return found


class Cache(DynamicCache):
    """A `DynamicCache` whose layers grow in place: `past_key_values=torch_slmops.Cache()`.

    Models that `torch_slmops.optimize` has fused use its layers in any `DynamicCache`, and so in
    `generate`; this class serves other models.

    Args:
        config: The model's config; with it layers with a sliding window keep no more than that.
        dtype: "int8" keeps keys and values as int8 with a scale per head and token, in half the
            memory of bf16; layers with a sliding window keep their dtype. None: that of the model.

    Raises:
        ValueError: Another `dtype`.
    """

    def __init__(self, config: Any = None, dtype: Any = None) -> None:
        check_kv_cache(dtype)
        super().__init__(config=config)
        for layer in self.layers:
            adopt(layer, dtype)
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = GrowingLayer if dtype is None else Int8Layer
