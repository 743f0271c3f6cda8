"""Which row of `families.py` a module is: by its structure, then by what it computes.

Each match_* function gives a spec, or the reason why there is none: a str.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from torch_slmops.families import (
    ACTIVATIONS,
    Attention,
    DecoderLayer,
    Experts,
    GatedMLP,
    RMSNorm,
    rows,
)
from torch_slmops.fused import AttentionSpec, ExpertsSpec, MLPSpec, NormSpec, read
from torch_slmops.fused_decoder import LayerSpec
from torch_slmops.modules import Linear
from torch_slmops.probe import activation_kind, difference, plain_forward

__all__ = ["match_attention", "match_experts", "match_layer", "match_mlp", "match_norm"]

_Row = TypeVar("_Row", Attention, GatedMLP, Experts, RMSNorm, DecoderLayer)
_Gated = TypeVar("_Gated", GatedMLP, Experts)
_GatedSpec = TypeVar("_GatedSpec", MLPSpec, ExpertsSpec)
_UNKNOWN = "no family has its structure"
# What an attention's forward may take by name: everything else would be a feature unknown here.
_PARAMETERS = {
    "hidden_states",
    "position_embeddings",
    "attention_mask",
    "past_key_values",
    "cache",
    "position_ids",
    "output_attentions",
    "use_cache",
}
# Options of attention that masks, or the op of a whole layer, take into account.
_LAYER_OPTIONS = {"sliding_window", "softcap"}


def _rows_of(kind: type[_Row]) -> Iterable[_Row]:
    return (row for row in rows() if isinstance(row, kind))


def _children(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module._modules.items() if child is not None}


def _has_parts(module: nn.Module, children: Iterable[str], parameters: Iterable[str] = ()) -> bool:
    own = {name for name, p in module._parameters.items() if p is not None}
    buffers = {name for name, b in module._buffers.items() if b is not None}
    return set(_children(module)) == set(children) and own == set(parameters) and not buffers


def _replaced(module: nn.Module) -> bool:
    """Whether a method was replaced on the instance."""
    return any(
        callable(value) and callable(getattr(type(module), name, None))
        for name, value in vars(module).items()
    )


def _are_linear(module: nn.Module, names: Iterable[str]) -> bool:
    return all(type(module._modules[name]) is nn.Linear for name in names)


def _are_dropouts(module: nn.Module, names: Iterable[str]) -> bool:
    """Whether they do nothing in eval mode."""
    children = [module._modules[name] for name in names]
    return all(
        type(child) in (nn.Dropout, nn.Identity) and "forward" not in vars(child)
        for child in children
    )


def _missing(module: nn.Module, sources: Iterable[str | None]) -> str | None:
    """The first of the sources that gives no value, not even None; or None."""
    for source in sources:
        try:
            if source is not None:
                read(module, source)
        except AttributeError:
            return source
    return None


def match_norm(module: nn.Module) -> NormSpec | str:
    """Returns what RMS norm `module` is, or why none."""
    tried: list[str] = []
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or not _has_parts(module, (), ("weight",)):
        return _UNKNOWN
    if _replaced(module):
        return "a method of it was replaced"
    for row in _rows_of(RMSNorm):
        eps = getattr(module, row.eps, None)
        if not isinstance(eps, float) or eps <= 0:
            continue
        spec = NormSpec(row, eps)
        found = difference(module, spec)
        if found is None:
            return spec
        tried.append(f"not {row.name}: {found}")
    return "; ".join(tried) or _UNKNOWN


def match_mlp(module: nn.Module) -> MLPSpec | str:
    """Returns what gated MLP `module` is, or why none."""

    def structure(row: GatedMLP) -> str | None:
        if not _has_parts(module, (*row.gate_up, row.down, *row.dropouts, *_function(module, row))):
            return _UNKNOWN
        if not _are_linear(module, (*row.gate_up, row.down)):
            return "a projection is not an nn.Linear"
        if not _are_dropouts(module, row.dropouts):
            return "a dropout is something else"
        return None

    def spec(row: GatedMLP, kind: str) -> MLPSpec:
        return MLPSpec(row, kind, "gate_up" if len(row.gate_up) == 2 else row.gate_up[0])

    return _match_gated(module, GatedMLP, structure, spec)


def match_experts(module: nn.Module) -> ExpertsSpec | str:
    """Returns what experts `module` is, or why none."""

    def structure(row: Experts) -> str | None:
        if not _has_parts(module, _function(module, row), (row.gate_up, row.down)):
            return _UNKNOWN
        gate_up, down = (module._parameters[name] for name in (row.gate_up, row.down))
        assert gate_up is not None and down is not None
        if gate_up.dim() != 3 or down.dim() != 3 or 2 * down.shape[2] != gate_up.shape[1]:
            return _UNKNOWN
        count = getattr(module, row.count, None)
        return None if count == len(gate_up) == len(down) else _UNKNOWN

    return _match_gated(module, Experts, structure, ExpertsSpec)


def _function(module: nn.Module, row: GatedMLP | Experts) -> tuple[str, ...]:
    """The name of the activation, where it is a child."""
    return (row.activation,) if row.activation in _children(module) else ()


def _match_gated(
    module: nn.Module,
    kind: type[_Gated],
    structure: Callable[[_Gated], str | None],
    spec: Callable[[_Gated, str], _GatedSpec],
) -> _GatedSpec | str:
    """The spec of the row of `kind` that `module` is, or why none.

    `structure` says what of a module's parts is not as a row has them.
    """
    tried: list[str] = []
    for row in _rows_of(kind):
        wrong = structure(row)
        if wrong is None and _replaced(module):
            return "a method of it was replaced"
        function = None if wrong else activation_kind(module, row.activation)
        if wrong is None and function is None:
            wrong = f"its activation is none of {', '.join(ACTIVATIONS)}"
        if wrong is None and function is not None:
            found = spec(row, function)
            wrong = difference(module, found)
            if wrong is None:
                return found
        if wrong != _UNKNOWN:
            tried.append(f"not {row.name}: {wrong}")
    return "; ".join(tried) or _UNKNOWN


def match_attention(module: nn.Module) -> AttentionSpec | str:
    """Returns what attention `module` is, or why none."""
    tried: list[str] = []
    mismatches: list[str] = []  # of less interest than a row whose structure it has
    for row in _rows_of(Attention):
        linears = (*row.projections, *((row.output,) if row.output else ()))
        if not _has_parts(module, (*linears, *(row.norms or ()), *row.dropouts, *row.children), ()):
            continue
        spec = _attention_spec(module, row)
        if isinstance(spec, str):
            mismatches.append(f"not {row.name}: {spec}")
            continue
        extras = repr([read(module, source) for _, source in row.options])
        found = difference(module, spec, extras)
        if found is None:
            return spec
        tried.append(f"not {row.name}: {found}")
    return "; ".join(tried or sorted(mismatches, key=_lacks)[:1]) or _UNKNOWN


def match_layer(module: nn.Module, specs: Mapping[nn.Module, object]) -> LayerSpec | str:
    """Returns what decoder layer `module` is, or why none; `specs`: of the blocks in it."""
    tried: list[str] = []
    for row in _rows_of(DecoderLayer):
        names = [name for name in row.norms if name is not None]
        if not _has_parts(module, (row.attention, row.mlp, *names, *row.dropouts), ()):
            continue
        spec = _layer_spec(module, row, specs)
        if not isinstance(spec, str):
            found = difference(module, spec, repr(row.multiplier and read(module, row.multiplier)))
            if found is None:
                return spec
            spec = found
        tried.append(f"not {row.name}: {spec}")
    return "; ".join(tried) or _UNKNOWN


def _layer_spec(
    module: nn.Module, row: DecoderLayer, specs: Mapping[nn.Module, object]
) -> LayerSpec | str:
    """What `module` is if it is `row`, or what of its structure is not that of the row."""
    children = _children(module)
    attention: Any = children[row.attention]
    spec = specs.get(attention)
    if not isinstance(spec, AttentionSpec) or not isinstance(specs.get(children[row.mlp]), MLPSpec):
        return "its attention or its MLP is not fused"
    if spec.row.forward is not None or spec.row.output is None or spec.heads[1] != spec.heads[2]:
        return "its attention does more than that"
    if not {name for name, _ in spec.row.options} <= _LAYER_OPTIONS or not attention.is_causal:
        return "its attention is of another kind"
    norms = [specs.get(children[name]) for name in row.norms if name is not None]
    if not all(isinstance(norm, NormSpec) and norm == norms[0] for norm in norms):
        return "its norms are not fused, or not alike"
    if not _are_dropouts(module, row.dropouts) or _replaced(module):
        return "a dropout is something else, or a method was replaced"
    missing = _missing(module, [row.multiplier])
    if missing is not None:
        return f"it lacks {missing}"
    parameters = list(inspect.signature(inspect.unwrap(type(module).forward)).parameters.values())
    named = tuple(p.name for p in parameters[1:] if p.kind == p.POSITIONAL_OR_KEYWORD)
    if not named or named[0] != "hidden_states" or not set(named) <= _PARAMETERS:
        return "its forward takes arguments that are not known"
    types = getattr(attention.config, "layer_types", None)
    layer_type = types[attention.layer_idx] if types else None
    norm = norms[0] if norms else None
    assert norm is None or isinstance(norm, NormSpec)
    return LayerSpec(row, norm, named, layer_type)


def _lacks(reason: str) -> bool:
    return " it lacks " in reason


def _attention_spec(module: nn.Module, row: Attention) -> AttentionSpec | str:
    """What `module` is if it is `row`, or what of its structure is not that of the row."""
    output = None if row.output is None else module._modules[row.output]
    if not _are_linear(module, row.projections) or not (
        output is None or type(output) in (nn.Linear, Linear)
    ):
        return "a projection is not an nn.Linear"
    if not _are_dropouts(module, row.dropouts):
        return "a dropout is something else"
    if _replaced(module):
        return "a method of it was replaced"
    width = None if row.rotary is None or row.rotary_width == "*" else row.rotary_width
    scaling = None if row.forward is not None else row.scaling
    sources = [row.head_dim, scaling, width, row.rotary_flag, *(row.heads or ())]
    missing = _missing(module, [*sources, *(source for _, source in row.options)])
    if missing is not None:
        return f"it lacks {missing}"
    parameters, eager = _conventions(module, row)
    if parameters is None:
        return "its forward takes arguments that are not known"
    head_dim = read(module, row.head_dim)
    heads = _heads(module, row, head_dim)
    if heads is None:
        return "its projections are not heads of equal width"
    rotary_width = -1
    if row.rotary is None or (row.rotary_flag is not None and not read(module, row.rotary_flag)):
        rotary_width = 0
    elif width is not None:
        rotary_width = read(module, width)
        if rotary_width % 2 or not 0 < rotary_width <= head_dim:
            return f"{rotary_width} of {head_dim} elements cannot be rotated in pairs"
    norm = _qk_norm(module, row, heads, head_dim)
    if isinstance(norm, str):
        return norm
    packed = "qkv" if len(row.projections) == 3 else row.projections[0]
    cache = "cache" if "cache" in parameters else "past_key_values"
    return AttentionSpec(row, heads, head_dim, norm, rotary_width, parameters, cache, eager, packed)


def _heads(module: Any, row: Attention, head_dim: int) -> tuple[int, int, int] | None:
    outputs = [getattr(module, name).out_features for name in row.projections]
    if row.heads is not None:
        hq, hk = (read(module, source) for source in row.heads)
        if not isinstance(hq, int) or not isinstance(hk, int):
            return None
        heads = (hq, hk, hk)
        return heads if sum(heads) * head_dim == sum(outputs) else None
    if len(outputs) != 3 or any(size % head_dim for size in outputs) or outputs[1] != outputs[2]:
        return None
    heads = (outputs[0] // head_dim, outputs[1] // head_dim, outputs[2] // head_dim)
    return heads if heads[0] % heads[1] == 0 else None


def _qk_norm(
    module: nn.Module, row: Attention, heads: tuple[int, int, int], head_dim: int
) -> NormSpec | str | None:
    if row.norms is None:
        return None
    found = []
    for name, count in zip(row.norms, heads[:2], strict=True):
        child = module._modules[name]
        assert child is not None
        spec = match_norm(child)
        if isinstance(spec, str):
            return f"its {name} is no RMS norm ({spec})"
        size = child._parameters["weight"].numel()  # type: ignore[union-attr]
        if size not in (head_dim, count * head_dim):
            return f"its {name} is {size} wide"
        found.append(spec)
    return found[0] if found[0] == found[1] else "the norms of q and k differ"


def _conventions(
    module: nn.Module, row: Attention
) -> tuple[tuple[str, ...] | None, Callable[..., Any] | None]:
    """The positional parameters of the forward, or None if unknown; and the eager function."""
    if row.forward is not None:
        return (), None
    forward = plain_forward(module)
    if forward is None:
        return None, None
    names = forward.__globals__
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    named = tuple(p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD)
    others = [p.kind for p in parameters if p.kind != p.POSITIONAL_OR_KEYWORD]
    if not set(named) <= _PARAMETERS or others != [inspect.Parameter.VAR_KEYWORD]:
        return None, None
    if not {"ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"} <= set(names):
        return None, None
    return named, names["eager_attention_forward"]
