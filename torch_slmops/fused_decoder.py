"""Decoder layers by the op `decoder_layers`: one layer, or a run of like layers at once."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from torch_slmops import _C, ops
from torch_slmops.attention import NAME
from torch_slmops.families import DecoderLayer
from torch_slmops.fused import (
    SNAPSHOT,
    Fused,
    FusedAttention,
    FusedMLP,
    NormSpec,
    read,
    scaling_of,
)
from torch_slmops.hooks import HOOKS, any_acts, has_hooks, hooks_are_global, records_outputs
from torch_slmops.last_positions import positions_wanted
from torch_slmops.modules import Linear
from torch_slmops.packed_rows import GateUp
from torch_slmops.slots import KeptSlots, Slots

__all__ = ["FusedDecoderLayer", "LayerSpec", "Run"]

# Looked up here at each call, so that a test can put the reference in its place.
_decoder_layers = ops.decoder_layers

_uses_library: Any = torch.ops.slmops._uses_library.default
_FEW_ROWS = 8  # below, it is not asked: it would cost a decode step more than it could bring

_NORMS = ("pre_attention_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm")
_UNUSED = ("use_cache", "cache_position")  # arguments of a layer that the op does without
_NEXT = "_slmops_next"  # an attribute of a run's result: the next layer, which passes it on


@dataclass(frozen=True)
class LayerSpec:
    """A decoder layer, as far as it does not change from call to call.

    Attributes:
        row: Its row.
        norm: All of its norms, or None where it has none.
        parameters: Names of the positional parameters of the original forward.
        layer_type: Its entry of the config's `layer_types`, or None.
    """

    row: DecoderLayer
    norm: NormSpec | None
    parameters: tuple[str, ...]
    layer_type: str | None


@dataclass(frozen=True, eq=False)
class Run:
    """Consecutive layers of one list that can be computed together.

    Attributes:
        parent: The module whose forward calls them one after the other, with nothing between.
        name: Its `nn.ModuleList`.
        start: The place of the first one.
        layers: The layers.
        bounded: Whether the forward stops at `config.num_hidden_layers`.
    """

    parent: Any
    name: str
    start: int
    layers: tuple[FusedDecoderLayer, ...]
    bounded: bool

    def holds(self) -> bool:
        """Whether the layers are still where they were."""
        stop = self.start + len(self.layers)
        children = self.parent._modules[self.name]
        if self.bounded and self.parent.config.num_hidden_layers < stop:
            return False
        return tuple(children._modules.values())[self.start : stop] == self.layers


@dataclass
class _Call:
    """Arguments of a layer that the op can take."""

    x: Tensor
    tables: tuple[Any, Any]
    mask: Tensor | None
    position_ids: Tensor | None
    cache: Any


class FusedDecoderLayer(Fused):
    """A decoder layer by the op `decoder_layers`."""

    slmops: LayerSpec
    slmops_run: tuple[Run, int] | None = None

    def describe(self) -> str:
        words = f"decoder_layers ({self.slmops.row.name})"
        if self.slmops_run is None:
            return words
        return f"{words}, {len(self.slmops_run[0].layers)} at once"

    def _inner(self) -> tuple[str, ...]:
        row = self.slmops.row
        return (row.attention, row.mlp, *(n for n in row.norms if n is not None), *row.dropouts)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As any module's, but what its run has computed passes without what such a call costs."""
        if args and getattr(args[0], _NEXT, None) is self:
            assert self.slmops_run is not None
            return _pass_on(args[0], *self.slmops_run)
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.slmops_run is not None and not torch.compiler.is_compiling():
            run, number = self.slmops_run
            if number == 0 and run.holds():
                y = self._compute(run.layers, args, kwargs)
                if y is not None:
                    return _pass_on(y, run, 0)
        y = self._compute((self,), args, kwargs)
        return super().forward(*args, **kwargs) if y is None else y

    def _compute(
        self, layers: tuple[FusedDecoderLayer, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor | None:
        """What `layers`, this one first, make of the arguments; None if the op cannot do it."""
        call = self._call(args, kwargs)
        if call is None or self._goes_through_torch(call.x):
            return None
        weights = self._weights(layers, call.x.dtype)
        if weights is None:
            return None
        attention: Any = self._modules[self.slmops.row.attention]
        mlp: Any = self._modules[self.slmops.row.mlp]
        slots = self._slots(layers, call)
        if slots is None:
            return None
        inner, norm, row = attention.slmops, self.slmops.norm, self.slmops.row
        softcap = dict(inner.row.options).get("softcap")
        y = _decoder_layers(
            call.x,
            weights,
            slots.tensors,
            slots.start,
            *call.tables,
            call.mask,
            call.position_ids,
            inner.heads,
            inner.head_dim,
            mlp._modules[mlp.slmops.packed].hidden,
            mlp.slmops.activation,
            0.0 if norm is None else norm.eps,
            0.0 if norm is None else norm.row.offset,
            norm is not None and norm.row.cast_before_weight,
            0.0 if inner.norm is None else inner.norm.eps,
            0.0 if inner.norm is None else inner.norm.row.offset,
            inner.row.rotary == "interleaved",
            scaling_of(attention, inner),
            0.0 if softcap is None else read(attention, softcap) or 0.0,
            1.0 if row.multiplier is None else read(self, row.multiplier),
            positions_wanted(layers[-1], call.x.shape[1]),
        )
        slots.advance(call.x.shape[1])
        return y

    def _goes_through_torch(self, x: Tensor) -> bool:
        """Whether for so many tokens torch multiplies "float_fast" weights: not inside the op."""
        rows = x.shape[0] * x.shape[1]
        if torch.compiler.is_compiling() or rows < _FEW_ROWS:
            return False
        attention = self._attention()
        qkv: Any = attention._modules[attention.slmops.packed]
        return bool(_uses_library(qkv.packed, rows))

    def _attention(self) -> FusedAttention:
        attention = self._modules[self.slmops.row.attention]
        assert isinstance(attention, FusedAttention)
        return attention

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        """The arguments if the op can take them, else None."""
        spec = self.slmops
        attention = self._modules[spec.row.attention]
        if len(args) > len(spec.parameters) or not isinstance(attention, FusedAttention):
            return None
        kwargs = kwargs | dict(zip(spec.parameters, args, strict=False))
        inner = attention.slmops
        x, tables = kwargs.pop("hidden_states", None), kwargs.pop("position_embeddings", None)
        mask, ids = kwargs.pop("attention_mask", None), kwargs.pop("position_ids", None)
        cache = kwargs.pop(inner.cache, None)
        if any(value is not None for name, value in kwargs.items() if name not in _UNUSED):
            return None
        config: Any = attention.config
        if config._attn_implementation != NAME or not attention.may_take(x, tables):
            return None
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
            return None
        if mask is not None and mask.shape[2] != x.shape[1]:  # for all queries
            return None
        if ids is not None and not (isinstance(ids, Tensor) and ids.dim() == 2):
            return None
        wide = (None, None)
        if inner.rotary_width != 0:
            wide = tables[0].float(), tables[1].float()
        return _Call(x, wide, mask, ids, cache)

    def _weights(
        self, layers: tuple[FusedDecoderLayer, ...], dtype: torch.dtype
    ) -> Sequence[Tensor] | None:
        """The tensors of all layers as the op takes them; None if a layer has to compute itself."""
        if torch.compiler.is_compiling():  # whose guards do it
            return self._parts(dtype) if layers == (self,) else None
        if hooks_are_global():
            return None
        known: _Snapshot | None = vars(self).get(SNAPSHOT)
        if known is None or not known.holds(layers, dtype):
            if len(layers) > 1 and any(has_hooks(layer) for layer in layers):
                return None
            found = [layer._parts(dtype) for layer in layers]
            weights: list[Tensor] = []
            for parts in found:
                if parts is None:
                    return None
                weights += parts
            known = vars(self)[SNAPSHOT] = _Snapshot(layers, dtype, weights)
        return known.weights

    def _slots(
        self, layers: tuple[FusedDecoderLayer, ...], call: _Call
    ) -> Slots | KeptSlots | None:
        """Where the keys and values of `layers` go; None where the op cannot use the cache."""
        known: _Snapshot | None = None
        if len(layers) > 1:
            known = vars(self)[SNAPSHOT]
            kept = known.slots  # read once: another thread may put its own there
            if kept is not None and kept.serve(call.x, call.cache):
                return kept
        name = self.slmops.row.attention
        slots = Slots.of(call.x, call.cache, [layer._modules[name] for layer in layers])
        if slots is None or known is None:
            return slots
        kept = known.slots = KeptSlots.of(call.x, call.cache, slots, known)
        return kept or slots

    def _parts(self, dtype: torch.dtype) -> list[Tensor] | None:
        """The layer's tensors in the order of `ops.LAYER_PARTS`; None if they are others now."""
        children: Any = self._modules
        row = self.slmops.row
        attention, mlp = children[row.attention], children[row.mlp]
        if not isinstance(attention, FusedAttention) or not isinstance(mlp, FusedMLP):
            return None
        if any(block.training or not block.is_bare() for block in (self, attention, mlp)):
            return None
        inner, outer = attention.slmops, mlp.slmops
        assert inner.row.output is not None
        qkv, output = attention._modules[inner.packed], attention._modules[inner.row.output]
        gate_up, down = mlp._modules[outer.packed], mlp._modules[outer.row.down]
        if type(output) is not Linear or type(down) is not Linear or has_hooks(output):
            return None
        assert isinstance(qkv, Linear) and isinstance(gate_up, GateUp)
        if any(part.perm is not None for part in (qkv, output, gate_up, down)):
            return None
        found: dict[str, Any] = {
            "qkv": qkv._buffers["packed"],
            "qkv_bias": qkv._parameters["bias"],
            "output": output._buffers["packed"],
            "output_bias": output._parameters["bias"],
            "gate_up": gate_up._buffers["packed"],
            "gate_up_bias": gate_up._parameters["bias"],
            "down": down._buffers["packed"],
            "down_bias": down._parameters["bias"],
        }
        for part, name in zip(_NORMS, row.norms, strict=True):
            if name is not None:
                found[part] = children[name]._parameters["weight"]
                if found[part].dtype != dtype:
                    return None
        if inner.row.norms is not None:
            for part, name in zip(("q_norm", "k_norm"), inner.row.norms, strict=True):
                norm: Any = attention._modules[name]
                found[part] = norm._parameters["weight"]
        parts = (found.get(name) for name in ops.LAYER_PARTS)
        return [_ABSENT if part is None else part for part in parts]


_ABSENT = torch.empty(0)


class _Snapshot:
    """What layers are made of, as it was found: to see quickly that it has not changed."""

    def __init__(
        self, layers: tuple[FusedDecoderLayer, ...], dtype: torch.dtype, weights: list[Tensor]
    ) -> None:
        self.layers, self.dtype, self.weights = layers, dtype, ops.Kept(weights)
        self.slots: KeptSlots | None = None
        everything = list(itertools.chain.from_iterable(layer.modules() for layer in layers))
        # A layer that is called itself calls its own hooks.
        passed_by = everything if len(layers) > 1 else everything[1:]
        self.own = [vars(m) for m in passed_by]
        self.blocks = [vars(m) for m in everything if isinstance(m, Fused)]
        self.hooks = [own[name] for own in self.own for name in HOOKS]
        self.added, self.has_idle = -1, False
        tables: Any = [(m._modules, m._parameters, m._buffers) for m in everything]
        self.tables = [table for table in itertools.chain.from_iterable(tables) if table]
        self.objects = list(itertools.chain.from_iterable(map(dict.values, self.tables)))
        count = len(ops.LAYER_PARTS)
        norms = [i for i, name in enumerate(ops.LAYER_PARTS) if name in _NORMS]
        self.norms = [weights[i + j] for i in range(0, len(weights), count) for j in norms]
        self.norms = [norm for norm in self.norms if norm is not _ABSENT]

    def _is_unhooked(self) -> bool:
        """Whether no hook acts: each is looked at only after one was added anywhere."""
        added = RemovableHandle.next_id
        if added != self.added:
            found = [hooks for hooks in self.hooks if hooks]
            if any(map(any_acts, found)):
                return False
            self.added, self.has_idle = added, bool(found)
        return not self.has_idle or not records_outputs()

    def holds(self, layers: tuple[FusedDecoderLayer, ...], dtype: torch.dtype) -> bool:
        """Whether nothing has changed, and nobody looks at what the op passes by."""
        return (
            dtype == self.dtype
            and layers == self.layers
            and self._is_unhooked()
            and _C.lack(self.own, "forward")
            and _C.values_are(self.tables, self.objects)
            and {norm.dtype for norm in self.norms} <= {dtype}
            and not any(map(operator.itemgetter("training"), self.blocks))
        )


def _pass_on(x: Tensor, run: Run, number: int) -> Tensor:
    """`x`, the result of the run, for the layer after `number`."""
    if number + 1 < len(run.layers):
        setattr(x, _NEXT, run.layers[number + 1])
    else:
        delattr(x, _NEXT)
    return x
