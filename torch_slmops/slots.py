"""Where decoder layers put keys and values: slots of a cache, for a run found once."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_slmops import ops
from torch_slmops.cache_memory import Memory

__all__ = ["KeptSlots", "Slots"]


@dataclass
class Slots:
    """Where a call's keys and values go: tensors of its layers, and how many keys they hold."""

    layers: list[Any]
    tensors: Sequence[Tensor]
    start: Tensor

    @classmethod
    def of(cls, x: Tensor, cache: Any, attentions: list[Any]) -> Slots | None:
        """None where the op cannot use the cache.

        Args:
            x: [B, L, K], the input of the layers.
            cache: Or None.
            attentions: The fused attentions of the layers.
        """
        dtype = None if torch.compiler.is_compiling() else attentions[0].slmops_kv_cache
        if cache is None and dtype is None:
            return cls([], [], torch.tensor(0))
        from transformers.cache_utils import StaticLayer

        from torch_slmops.cache import Cache, Int8Layer, layers_of

        if cache is None:  # rounded all the same: a cache does not change what a model computes
            cache = Cache(dtype=dtype)
        layers = layers_of(cache, [attention.layer_idx for attention in attentions], dtype)
        if layers is None:
            return None
        tensors: list[Tensor] = []
        starts: list[Any] = []
        sizes: set[int] = set()
        parts: Any
        start: Any
        spec = attentions[0].slmops
        shape = (x.shape[0], spec.heads[1], x.shape[1], spec.head_dim)
        states = x.new_empty(1).expand(shape)
        for layer in layers:
            if type(layer) is Int8Layer:  # and not isinstance, which is slow for abstract classes
                parts, start = layer.reserve_int8(states, states)
            elif type(layer) is not StaticLayer:
                *parts, start = layer.reserve(states, states, blocked=True)
            else:
                if not layer.is_initialized:
                    layer.lazy_initialization(states, states)
                parts, start = (layer.keys, layer.values), layer.cumulative_length
            if len(parts) == 2 and parts[0].dtype != states.dtype:
                return None
            tensors += parts
            starts.append(start)
            sizes.add(len(parts))
        start = starts[0]
        if len(starts) > 1 and len(set(map(int, starts))) > 1:
            return None
        if len(sizes) > 1:  # some layers are int8, others not
            return None
        return cls(layers, tensors, start if isinstance(start, Tensor) else torch.tensor(start))

    def advance(self, new: int) -> None:
        """Counts `new` keys as there."""
        for layer in self.layers:
            if hasattr(layer, "advance"):
                layer.advance(new)
            else:
                layer.cumulative_length.add_(new)


class KeptSlots:
    """Those of a run of layers, for the next calls too, as long as nothing else changes a cache."""

    def __init__(self, x: Tensor, cache: Any, slots: Slots) -> None:
        memories = [vars(layer)[name] for layer in slots.layers for name in ("_keys", "_values")]
        self.tensors = ops.Kept(slots.tensors)
        self._used = int(slots.start)
        self._free = min(memory.slots - memory.stop for memory in memories)
        self._counts = [vars(memory) for memory in memories]
        self._layers = list(cache.layers)
        self._kind = self._kind_of(x)
        self._changes = Memory.changes
        self._cache: weakref.ref[Any] | None = None

    @classmethod
    def of(cls, x: Tensor, cache: Any, slots: Slots, holder: Any) -> KeptSlots | None:
        """None for layers that count in another way.

        Args:
            x, cache: As of `Slots.of`.
            slots: What that gave.
            holder: Whose `slots` this becomes; with the cache it is None again.
        """
        from torch_slmops.cache import GrowingLayer, Int8Layer

        if cache is None or not {GrowingLayer, Int8Layer}.issuperset(map(type, slots.layers)):
            return None
        made = cls(x, cache, slots)
        owner = weakref.ref(holder)

        def let_go(dead: object) -> None:
            alive = owner()
            if alive is None:
                return
            kept = alive.slots  # read once: another thread may put its own there
            if kept is not None and kept._cache is dead:
                alive.slots = None

        made._cache = weakref.ref(cache, let_go)
        return made

    @staticmethod
    def _kind_of(x: Tensor) -> tuple[object, ...]:
        return x.shape[0], x.dtype, torch.is_inference_mode_enabled()

    @property
    def start(self) -> Tensor:
        return torch.tensor(self._used)

    def serve(self, x: Tensor, cache: Any) -> bool:
        """Whether the keys and values of `x` go here."""
        mine: Any = None if self._cache is None else self._cache()
        return (
            mine is not None
            and cache is mine
            and Memory.changes == self._changes
            and cache.layers == self._layers
            and x.shape[1] <= self._free
            and self._kind_of(x) == self._kind
        )

    def advance(self, new: int) -> None:
        """Counts `new` keys as there."""
        for own in self._counts:  # and not by attribute, which would note a change
            own["stop"] += new
        self._used += new
        self._free -= new
