"""Fused blocks: classes that a block's class is replaced by, on the instance, when it is fused.

The new class derives from the old one, so code that asks for the old class still finds it, and the
old forward is a `super()` away: it runs, on the packed projections, whatever a fused op cannot do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torch_slmops import ops
from torch_slmops.families import Attention, Experts, GatedMLP, RMSNorm
from torch_slmops.hooks import has_hooks, hooks_are_global
from torch_slmops.modules import Linear
from torch_slmops.packed_rows import GateUp, Rows

__all__ = [
    "SNAPSHOT",
    "AttentionSpec",
    "Derived",
    "ExpertsSpec",
    "Fused",
    "FusedAttention",
    "FusedMLP",
    "FusedRMSNorm",
    "MLPSpec",
    "NormSpec",
    "attend",
    "derived_class",
    "read",
    "scaling_of",
]

# Looked up here at each call, so that a test can put the reference in their places.
_rms_norm = ops.rms_norm
_qkv_rotary = ops.qkv_rotary
_swiglu = ops.swiglu

# What projections are that a fused op stands for; anything else, an adapter say, does more.
_PROJECTIONS = (Rows, Linear, GateUp)

Tables = tuple[Tensor, Tensor]
SNAPSHOT = "_slmops_snapshot"  # an attribute that copies do without
_OWN = ("hidden_states", "position_embeddings", "attention_mask")
_OLD_CACHE = "past_key_values"


@dataclass(frozen=True)
class NormSpec:
    """An RMS norm: its row and its eps."""

    row: RMSNorm
    eps: float


@dataclass(frozen=True)
class MLPSpec:
    """A gated MLP: its row, the kind of its activation, and the child with the packed gate_up."""

    row: GatedMLP
    activation: str
    packed: str = "gate_up"


@dataclass(frozen=True)
class ExpertsSpec:
    """Experts: their row and the kind of their activation."""

    row: Experts
    activation: str


@dataclass(frozen=True)
class AttentionSpec:
    """An attention block, as far as it does not change from call to call.

    Attributes:
        row: Its row.
        heads: The numbers of q, k and v.
        head_dim: Width of a head.
        norm: That of q and k, or None.
        rotary_width: The rotated elements of a head; 0 for none, -1 for the tables' width.
        parameters: Names of the positional parameters of the original forward.
        cache: That of the cache: "past_key_values" until transformers 5.23, then "cache".
        eager: The attention function that the original falls back on.
        packed: The child with the packed q, k and v.
    """

    row: Attention
    heads: tuple[int, int, int]
    head_dim: int
    norm: NormSpec | None
    rotary_width: int
    parameters: tuple[str, ...]
    cache: str
    eager: Callable[..., Any] | None
    packed: str = "qkv"


class Derived(nn.Module):
    """What replaces the class of a module, on the instance, is a subclass of this and of it."""

    _prefix: ClassVar[str] = ""  # of its name

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made on the fly; pickle could not find it.
        kind, base = type(self).__bases__
        state = {name: value for name, value in vars(self).items() if name != SNAPSHOT}
        return _bare, (kind, base), state


class Fused(Derived):
    """What fused blocks share; `slmops` says what was fused."""

    _prefix = "Fused"
    slmops: Any

    def describe(self) -> str:
        """Returns in a few words what was fused."""
        raise NotImplementedError

    def _inner(self) -> tuple[str, ...]:
        """Children that the fused forward passes by."""
        return ()

    def _projections(self) -> tuple[str, ...]:
        """Those of the children that are rows of a packed weight."""
        return ()

    def is_bare(self) -> bool:
        """Whether what the fused forward passes by is as it was, and has no hooks."""
        children = self._modules
        if not torch.compiler.is_compiling() and hooks_are_global():
            return False
        if any(type(children[name]) not in _PROJECTIONS for name in self._projections()):
            return False
        return not any(has_hooks(children[name]) for name in self._inner())

    def _passes(self, x: object) -> bool:
        """Whether the fused forward may take x: no gradient, no hook on what it passes by."""
        if self.training or not isinstance(x, Tensor) or not x.is_floating_point():
            return False
        if x.requires_grad and torch.is_grad_enabled():
            return False
        return self.is_bare()


_classes: dict[tuple[type, type], type[Derived]] = {}


def derived_class(kind: type[Derived], base: type[nn.Module]) -> type[Derived]:
    """Returns the subclass of both whose methods are first those of `kind`."""
    made = _classes.get((kind, base))
    if made is None:
        name = kind._prefix + base.__name__
        made = type(name, (kind, base), {"__module__": base.__module__})
        _classes[kind, base] = made
    return made


def _bare(kind: type[Derived], base: type[nn.Module]) -> Derived:
    made = derived_class(kind, base)
    return made.__new__(made)


class FusedRMSNorm(Fused):
    """An RMS norm by the op `rms_norm`; the weight stays where it was."""

    weight: Tensor
    slmops: NormSpec

    def describe(self) -> str:
        return f"rms_norm ({self.slmops.row.name})"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not self._passes(args[0]):
            return super().forward(*args, **kwargs)
        x: Tensor = args[0]
        if x.dtype != self.weight.dtype:  # the original's result may have either dtype
            return super().forward(x)
        row = self.slmops.row
        return _rms_norm(x, self.weight, self.slmops.eps, row.offset, row.cast_before_weight)


class FusedMLP(Fused):
    """A gated MLP by the op `swiglu`."""

    slmops: MLPSpec

    def describe(self) -> str:
        gate_up = self._modules[self.slmops.packed]
        assert isinstance(gate_up, GateUp)
        return f"swiglu ({self.slmops.row.name}): {self.slmops.activation}, {gate_up.hidden} wide"

    def _projections(self) -> tuple[str, ...]:
        return self.slmops.row.gate_up

    def _inner(self) -> tuple[str, ...]:
        row = self.slmops.row
        activation = (row.activation,) if row.activation in self._modules else ()
        return (*row.gate_up, row.down, *row.dropouts, *activation)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        down = self._modules[self.slmops.row.down]
        if len(args) != 1 or kwargs or not isinstance(down, Linear) or not self._passes(args[0]):
            return super().forward(*args, **kwargs)
        gate_up = self._modules[self.slmops.packed]
        assert isinstance(gate_up, GateUp)
        if not _in_one_order(gate_up, down):
            return super().forward(*args)
        x: Tensor = args[0]
        return _swiglu(
            x if gate_up.perm is None else x.index_select(-1, gate_up.perm),
            gate_up.packed,
            down.packed,
            gate_up.hidden,
            down.out_features,
            self.slmops.activation,
            gate_up.ordered_bias(),
            down.bias,
        )


def _in_one_order(gate_up: GateUp, down: Linear) -> bool:
    """Whether what `gate_up` gives is in the order in which `down` takes it."""
    if gate_up.order is None or down.perm is None:
        return gate_up.order is down.perm
    return torch.compiler.is_compiling() or torch.equal(gate_up.order, down.perm)


class FusedAttention(Fused):
    """Attention whose q, k and v come from the op `qkv_rotary`; the rest is as it was.

    `slmops_kv_cache` is the dtype that keys and values are kept in, None for their own.
    """

    slmops: AttentionSpec
    slmops_kv_cache: str | None = None

    def describe(self) -> str:
        spec = self.slmops
        q, k, v = spec.heads
        words = [f"qkv_rotary ({spec.row.name}): {q} + {k} + {v} heads of {spec.head_dim}"]
        if spec.norm is not None:
            words.append("norms of q and k")
        if spec.rotary_width:
            words.append("rotary" + (" interleaved" if spec.row.rotary == "interleaved" else ""))
        if self.slmops_kv_cache is not None:
            words.append(f"{self.slmops_kv_cache} keys and values")
        return ", ".join(words)

    def _projections(self) -> tuple[str, ...]:
        return self.slmops.row.projections

    def _inner(self) -> tuple[str, ...]:
        row = self.slmops.row
        return (*row.projections, *(row.norms or ()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        spec = self.slmops
        if spec.row.forward is not None:
            tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
            if all(self._passes(x) for x in tensors if x.is_floating_point()):
                return spec.row.forward(self, self.project, *args, **kwargs)
            return super().forward(*args, **kwargs)
        if len(args) > len(spec.parameters):
            return super().forward(*args, **kwargs)
        kwargs.update(zip(spec.parameters, args, strict=False))
        x: Any = kwargs.get("hidden_states")
        tables, cache = kwargs.get("position_embeddings"), kwargs.get(spec.cache)
        if (
            (spec.cache != _OLD_CACHE and _OLD_CACHE in kwargs)  # deprecated, renamed by theirs
            or not self.may_take(x, tables)
            or hasattr(cache, "self_attention_cache")  # an encoder-decoder's two caches
        ):
            return super().forward(**_rounded_tables(kwargs))
        if not torch.compiler.is_compiling():
            cache = self._growing(cache)
        q, k, v = self.project(x, tables)
        consumed = (*_OWN, spec.cache, *spec.row.drops)
        rest = {name: kwargs[name] for name in kwargs if name not in consumed}
        mask = kwargs.get("attention_mask")
        return attend(self, spec, (q, k, v), mask, cache, _attention_functions(), rest)

    def _growing(self, cache: Any) -> Any:
        """The cache, which grows in place then; a new one where keys and values are rounded."""
        if cache is None and self.slmops_kv_cache is None:
            return None
        from torch_slmops.cache import Cache, layer_of

        if cache is None:  # rounded all the same: a cache does not change what a model computes
            return Cache(dtype=self.slmops_kv_cache)
        layer_of(cache, read(self, "layer_idx"), self.slmops_kv_cache)
        return cache

    def may_take(self, x: Any, tables: Any) -> bool:
        """Whether x is [B, L, K] and the tables are (cos, sin), [B or 1, L, R], if needed."""
        width = self.slmops.rotary_width
        if not self._passes(x) or x.dim() != 3:
            return False
        if width == 0:
            return True
        if not isinstance(tables, tuple | list) or len(tables) != 2:
            return False
        cos, sin = tables
        if not isinstance(cos, Tensor) or not isinstance(sin, Tensor) or cos.dim() != 3:
            return False
        if cos.requires_grad and torch.is_grad_enabled():
            return False
        r = cos.shape[2]
        fits = r == width if width > 0 else r % 2 == 0 and r <= self.slmops.head_dim
        fits = fits and cos.shape[1] == x.shape[1] and cos.shape[0] in (1, x.shape[0])
        return fits and cos.shape == sin.shape

    def project(self, x: Tensor, tables: Tables | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns q, k, v, each [B, L, heads, head_dim], for x of [B, L, K].

        `tables`: cos and sin, [B, L, R], [1, L, R] or [L, R].
        """
        spec = self.slmops
        qkv = self._modules[spec.packed]
        assert isinstance(qkv, Linear)
        norms: list[Any] = [None, None]
        eps, offset = 0.0, 0.0
        if spec.norm is not None and spec.row.norms is not None:
            norms = [getattr(self, name).weight for name in spec.row.norms]
            eps, offset = spec.norm.eps, spec.norm.row.offset
        cos = sin = None
        if spec.rotary_width != 0 and tables is not None:
            cos, sin = (table.float() for table in tables)
            if cos.dim() == 2:
                cos, sin = cos[None], sin[None]
        return _qkv_rotary(
            x,
            qkv.packed,
            spec.heads,
            spec.head_dim,
            qkv.bias,
            norms[0],
            norms[1],
            eps,
            offset,
            cos,
            sin,
            spec.row.rotary == "interleaved",
            qkv.perm,
        )


def attend(
    module: Any,
    spec: AttentionSpec,
    qkv: tuple[Tensor, Tensor, Tensor],
    mask: Any,
    cache: Any,
    functions: Any,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Any]:
    """What transformers' attention modules do once they have q, k and v.

    Args:
        module: The attention module.
        spec: What it is.
        qkv: [B, L, heads, head_dim] each.
        mask: Passed on.
        cache: What has `update(k, v, layer_idx)`, since transformers 5.24 with `kwargs`, or None.
        functions: What gives the attention function that the config names: transformers'
            `ALL_ATTENTION_FUNCTIONS`.
        kwargs: Passed on.

    Returns:
        [B, L, N] and the attention weights, if the attention function gives any.
    """
    q, k, v = (part.transpose(1, 2) for part in qkv)
    batch, length = q.shape[0], q.shape[2]
    named = {name: kwargs.pop(name) for name in spec.parameters if name in kwargs}
    if cache is not None and spec.cache == _OLD_CACHE:
        k, v = cache.update(k, v, module.layer_idx)
    elif cache is not None:
        k, v = cache.update(k, v, module.layer_idx, kwargs=kwargs)
    row = spec.row
    function = functions.get_interface(module.config._attn_implementation, spec.eager)
    options = named | {name: read(module, source) for name, source in row.options}
    scaling = scaling_of(module, spec)
    y, weights = function(module, q, k, v, mask, dropout=0.0, scaling=scaling, **options, **kwargs)
    y = y.reshape(batch, length, -1).contiguous()
    if row.output is not None:
        y = getattr(module, row.output)(y)
    return y, weights


def scaling_of(module: Any, spec: AttentionSpec) -> float:
    """Returns the factor of q k^T of an attention module."""
    source = spec.row.scaling
    return spec.head_dim**-0.5 if source is None else float(read(module, source))


def read(module: Any, source: str) -> Any:
    """Returns the value at a path such as "scaling" or "config.sliding_window" (None if absent)."""
    if source.startswith("config."):
        return getattr(module.config, source[len("config.") :], None)
    return getattr(module, source)


def _rounded_tables(kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` with rotary tables of the dtype of the activations, as transformers has them."""
    x, tables = kwargs.get("hidden_states"), kwargs.get("position_embeddings")
    if isinstance(x, Tensor) and isinstance(tables, tuple | list):
        rounded = tuple(table.to(x.dtype) for table in tables)
        return kwargs | {"position_embeddings": rounded}
    return kwargs


def _attention_functions() -> Any:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS
