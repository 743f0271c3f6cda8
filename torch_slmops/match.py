"""Which row of `families.py` a module is: by its structure, then by what it computes.

Each match_* function gives a spec, or the reason why there is none: a str. A module's computation
is compared on a float32 copy with random parameters, once per class and configuration in a process.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Iterable
from types import FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torch_slmops.families import ACTIVATIONS, Attention, Experts, GatedMLP, RMSNorm, rows
from torch_slmops.fused import AttentionSpec, ExpertsSpec, MLPSpec, NormSpec, attend, read
from torch_slmops.modules import Linear

__all__ = ["match_attention", "match_experts", "match_mlp", "match_norm"]

_Row = TypeVar("_Row", Attention, GatedMLP, Experts, RMSNorm)
_UNKNOWN = "no family has its structure"
# float32 sums of the same terms, in whatever order; relative to the largest value.
_TOLERANCE = 2e-5
_PROBE_EXPERTS = 3
_HALF = 0.5
# What an attention's forward may take by name: everything else would be a feature unknown here.
_PARAMETERS = {
    "hidden_states",
    "position_embeddings",
    "attention_mask",
    "past_key_values",
    "position_ids",
    "output_attentions",
    "use_cache",
}

_probed: dict[Hashable, str | None] = {}


class _Differs(Exception):
    """What a module computes differently from what its row says."""


def _rows_of(kind: type[_Row]) -> Iterable[_Row]:
    return (row for row in rows() if isinstance(row, kind))


# Structure ------------------------------------------------------------------------------------------


def _children(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module._modules.items() if child is not None}


def _has_parts(module: nn.Module, children: Iterable[str], parameters: Iterable[str]) -> bool:
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
    return all(type(module._modules[name]) in (nn.Linear, Linear) for name in names)


def _are_dropouts(module: nn.Module, names: Iterable[str]) -> bool:
    return all(isinstance(module._modules[name], nn.Dropout | nn.Identity) for name in names)


def _sources_exist(module: nn.Module, sources: Iterable[str | None]) -> bool:
    try:
        for source in sources:
            if source is not None:
                read(module, source)
    except AttributeError:
        return False
    return True


# Norms ----------------------------------------------------------------------------------------------


def match_norm(module: nn.Module) -> NormSpec | str:
    """Returns what RMS norm `module` is, or why none."""
    reason = _UNKNOWN
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or not _has_parts(module, (), ("weight",)):
        return reason
    if _replaced(module):
        return "a method of it was replaced"
    for row in _rows_of(RMSNorm):
        eps = getattr(module, row.eps, None)
        if not isinstance(eps, float) or eps <= 0:
            continue
        spec = NormSpec(row, eps)
        found = _probe(module, spec, (eps,), lambda: _probe_norm(module, spec))  # noqa: B023
        if found is None:
            return spec
        reason = f"not {row.name}: {found}"
    return reason


def _probe_norm(module: nn.Module, spec: NormSpec) -> None:
    source = _source()
    clone = _clone(module, source)
    k = clone._parameters["weight"].numel()  # type: ignore[union-attr]
    # Rows of several sizes, so that eps has an effect.
    sizes = spec.eps**0.5 * torch.tensor([[1e4], [1.0], [0.1], [30.0]])
    x = _uniform(source, 4, k) * sizes
    _compare("output", _norm(clone, x, spec), clone(x))
    # Roundings show in 16 bits only. An ulp of the reciprocal root may move a few of them.
    clone.to(torch.bfloat16)
    x = (_uniform(source, 2048 // k + 4, k)).bfloat16()
    y = clone(x)
    if y.dtype != x.dtype:
        raise _Differs(f"its result is {y.dtype} for {x.dtype}")
    same = _norm(clone, x, spec).eq(y).float().mean()
    if same < 0.98:
        raise _Differs("it rounds elsewhere")


def _norm(module: nn.Module, x: Tensor, spec: NormSpec) -> Tensor:
    wide, weight = x.float(), module._parameters["weight"]
    assert weight is not None
    y = wide / (wide.square().mean(-1, keepdim=True) + spec.eps).sqrt()
    if spec.row.cast_before_weight:
        y = y.to(x.dtype).float()
    return (y * (spec.row.offset + weight.float())).to(x.dtype)


# Activations ----------------------------------------------------------------------------------------


def _activation(module: nn.Module, source: str) -> str | None:
    """The kind of the activation function at `source`, by its values; None if it is no known one."""
    if source in ACTIVATIONS:
        return source
    function = getattr(module, source, None)
    if not callable(function) or (isinstance(function, nn.Module) and _replaced(function)):
        return None
    if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
        return None
    x = torch.linspace(-12, 12, 769)
    try:
        with torch.no_grad():
            y = function(x)
    except Exception:  # whatever it is, it is no elementwise function
        return None
    for kind in ACTIVATIONS:
        if isinstance(y, Tensor) and y.shape == x.shape:
            expected = _activate(kind, x)
            if bool(((y - expected).abs() <= 1e-5 * (1 + expected.abs())).all()):
                return kind
    return None


def _activate(kind: str, x: Tensor) -> Tensor:
    functional = torch.nn.functional
    if kind == "silu":
        return functional.silu(x)
    if kind == "relu2":
        return functional.relu(x).square()
    return functional.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


# Gated MLPs -----------------------------------------------------------------------------------------


def match_mlp(module: nn.Module) -> MLPSpec | str:
    """Returns what gated MLP `module` is, or why none."""
    reason = _UNKNOWN
    for row in _rows_of(GatedMLP):
        function = (row.activation,) if row.activation in _children(module) else ()
        linears = (*row.gate_up, row.down)
        if not _has_parts(module, (*linears, *row.dropouts, *function), ()):
            continue
        if not _are_linear(module, linears) or not _are_dropouts(module, row.dropouts):
            reason = f"not {row.name}: a projection is not an nn.Linear"
            continue
        if _replaced(module):
            return "a method of it was replaced"
        kind = _activation(module, row.activation)
        if kind is None:
            reason = f"not {row.name}: its activation is none of {', '.join(ACTIVATIONS)}"
            continue
        packed = "gate_up" if len(row.gate_up) == 2 else row.gate_up[0]
        spec = MLPSpec(row, kind, packed)
        found = _probe(module, spec, (), lambda: _probe_mlp(module, spec))  # noqa: B023
        if found is None:
            return spec
        reason = f"not {row.name}: {found}"
    return reason


def _probe_mlp(module: nn.Module, spec: MLPSpec) -> None:
    source = _source()
    clone: Any = _clone(module, source)
    x = _uniform(source, 2, 3, getattr(clone, spec.row.gate_up[0]).in_features)
    rows_ = torch.cat([getattr(clone, name)(x) for name in spec.row.gate_up], -1)
    gate, up = rows_.chunk(2, -1)
    expected = getattr(clone, spec.row.down)(_activate(spec.activation, gate) * up)
    _compare("output", expected, clone(x))


# Experts --------------------------------------------------------------------------------------------


def match_experts(module: nn.Module) -> ExpertsSpec | str:
    """Returns what experts `module` is, or why none."""
    reason = _UNKNOWN
    for row in _rows_of(Experts):
        function = (row.activation,) if row.activation in _children(module) else ()
        if not _has_parts(module, function, (row.gate_up, row.down)):
            continue
        gate_up, down = (module._parameters[name] for name in (row.gate_up, row.down))
        assert gate_up is not None and down is not None
        if gate_up.dim() != 3 or down.dim() != 3 or 2 * down.shape[2] != gate_up.shape[1]:
            continue
        if getattr(module, row.count, None) != len(gate_up) or len(down) != len(gate_up):
            continue
        if _replaced(module):
            return "a method of it was replaced"
        kind = _activation(module, row.activation)
        if kind is None:
            reason = f"not {row.name}: its activation is none of {', '.join(ACTIVATIONS)}"
            continue
        spec = ExpertsSpec(row, kind)
        found = _probe(module, spec, (), lambda: _probe_experts(module, spec))  # noqa: B023
        if found is None:
            return spec
        reason = f"not {row.name}: {found}"
    return reason


def _probe_experts(module: nn.Module, spec: ExpertsSpec) -> None:
    source, row = _source(), spec.row
    few = copy.copy(module)  # the first few of the experts: all of them may be gigabytes
    count = min(_PROBE_EXPERTS, getattr(module, row.count))
    few._parameters = dict(module._parameters)
    for name in (row.gate_up, row.down):
        values = module._parameters[name]
        assert values is not None
        few._parameters[name] = nn.Parameter(values.detach()[:count], requires_grad=False)
    vars(few)[row.count] = count
    clone: Any = _clone(few, source)
    gate_up, down = getattr(clone, row.gate_up), getattr(clone, row.down)
    x = _uniform(source, 5, gate_up.shape[2])
    order = torch.argsort(_uniform(source, 5, count), dim=-1)[:, : max(count - 1, 1)]
    weights = _uniform(source, *order.shape).abs()
    expected = torch.zeros(5, down.shape[1])
    for token, slot in torch.cartesian_prod(torch.arange(5), torch.arange(order.shape[1])).tolist():
        e = int(order[token, slot])
        gate, up = (gate_up[e] @ x[token]).chunk(2)
        inner = _activate(spec.activation, gate) * up
        expected[token] += (down[e] @ inner) * weights[token, slot]
    # transformers' decorator chooses an implementation by the config; this is the plain one.
    forward = inspect.unwrap(type(module).forward)
    _compare("output", expected, forward(clone, x, order, weights))


# Attention ------------------------------------------------------------------------------------------


def match_attention(module: nn.Module) -> AttentionSpec | str:
    """Returns what attention `module` is, or why none."""
    reason = _UNKNOWN
    for row in _rows_of(Attention):
        linears = (*row.projections, *((row.output,) if row.output else ()))
        if not _has_parts(module, (*linears, *(row.norms or ()), *row.dropouts), ()):
            continue
        spec = _attention_spec(module, row, linears)
        if isinstance(spec, str):
            reason = f"not {row.name}: {spec}"
            continue
        extras = tuple(read(module, source) for _, source in row.options)
        found = _probe(module, spec, extras, lambda: _probe_attention(module, spec))  # noqa: B023
        if found is None:
            return spec
        reason = f"not {row.name}: {found}"
    return reason


def _attention_spec(
    module: nn.Module, row: Attention, linears: tuple[str, ...]
) -> AttentionSpec | str:
    """What `module` is if it is `row`, or what of its structure is not that of the row."""
    if not _are_linear(module, linears) or not _are_dropouts(module, row.dropouts):
        return "a projection is not an nn.Linear"
    if _replaced(module):
        return "a method of it was replaced"
    width = None if row.rotary is None or row.rotary_width == "*" else row.rotary_width
    sources = [row.head_dim, row.scaling, width, row.rotary_flag]
    if not _sources_exist(module, [*sources, *(row.heads or ()), *(o for _, o in row.options)]):
        return "it lacks an attribute of that family"
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
    return AttentionSpec(row, heads, head_dim, norm, rotary_width, parameters, eager, packed)


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
    """The positional parameters of the forward, None if they are unknown; and the eager function."""
    if row.forward is not None:
        return (), None
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or hasattr(forward, "__wrapped__"):
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


class _Recorder:
    """Stands in for `ALL_ATTENTION_FUNCTIONS` and for a cache: notes what it is given."""

    def __init__(self, output: Tensor) -> None:
        self.output = output
        self.calls: list[tuple[Any, ...]] = []
        self.eager: Any = None

    def get_interface(self, name: Any, eager: Any) -> Callable[..., Any]:
        self.eager = eager
        return self._attend

    def _attend(self, module: Any, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        self.calls.append((q, k, v, mask, kwargs))
        return self.output, self.output[0]

    def update(self, k: Tensor, v: Tensor, layer: Any) -> tuple[Tensor, Tensor]:
        self.calls.append((k, v, layer))
        return k + 1, v - 1


def _probe_attention(module: nn.Module, spec: AttentionSpec) -> None:
    source, row = _source(), spec.row
    clone: Any = _clone(module, source)
    if row.forward is not None:
        assert row.inputs is not None
        args, kwargs = row.inputs(clone)

        def project(x: Tensor, tables: Any = None) -> tuple[Tensor, Tensor, Tensor]:
            return _qkv(clone, spec, x, tables)

        _compare("output", row.forward(clone, project, *args, **kwargs), clone(*args, **kwargs))
        return
    batch, length = 2, 3
    x = _uniform(source, batch, length, getattr(clone, row.projections[0]).in_features)
    width = spec.rotary_width
    if width == -1:
        width = max(spec.head_dim // 4 * 2, 2)
    tables = tuple(_uniform(source, batch, length, width) for _ in "cs") if width else None
    y = _uniform(source, batch, length, spec.heads[0], spec.head_dim)
    mask, positions = object(), object()
    original, ours = _Recorder(y), _Recorder(y)
    own = {
        "hidden_states": x,
        "position_embeddings": tables,
        "attention_mask": mask,
        "past_key_values": original,
    }
    own = {name: value for name, value in own.items() if name in spec.parameters}
    forward = _with_functions(type(clone).forward, original)
    expected = forward(clone, **own, position_ids=positions)
    if original.eager is not spec.eager:
        raise _Differs("it falls back on another attention function")
    cache = ours if "past_key_values" in own else None
    qkv = _qkv(clone, spec, x, tables)
    got = attend(clone, spec, qkv, mask, cache, ours, {"position_ids": positions})
    if len(original.calls) != len(ours.calls):
        raise _Differs("it does not use its cache and the attention function once")
    for i, call in enumerate(ours.calls):
        _compare("what it gives to its cache or to attention", call, original.calls[i])
    _compare("output", got, expected)


def _with_functions(forward: Any, functions: Any) -> Callable[..., Any]:
    """`forward` where the global `ALL_ATTENTION_FUNCTIONS` is `functions`; the module is untouched."""
    names = forward.__globals__ | {"ALL_ATTENTION_FUNCTIONS": functions}
    made = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _qkv(module: Any, spec: AttentionSpec, x: Tensor, tables: Any) -> tuple[Tensor, ...]:
    """What `qkv_rotary` computes, on the float projections."""
    row = spec.row
    y = torch.cat([getattr(module, name)(x) for name in row.projections], -1)
    parts = y.split([heads * spec.head_dim for heads in spec.heads], -1)
    found = []
    for i, (part, heads) in enumerate(zip(parts, spec.heads, strict=True)):
        shape = (*part.shape[:-1], heads, spec.head_dim)
        if i < 2 and spec.norm is not None and row.norms is not None:
            norm = getattr(module, row.norms[i])
            part = part.view(shape) if norm.weight.numel() == spec.head_dim else part
            part = _norm(norm, part, spec.norm)
        part = part.reshape(shape)
        if i < 2 and spec.rotary_width and tables is not None:
            part = _rotate(part, *tables, row.rotary == "interleaved")
        found.append(part)
    return tuple(found)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        partner = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    else:
        partner = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], -1)
    rotated = turned * cos[:, :, None] + partner * sin[:, :, None]
    return torch.cat([rotated, rest], -1)


# Probing --------------------------------------------------------------------------------------------


def _probe(
    module: nn.Module, spec: Hashable, extras: tuple[Any, ...], run: Callable[[], None]
) -> str | None:
    """What `run` finds different, or None; remembered for modules that are alike."""
    scalars = tuple(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, int | float | str | None) and name != "layer_idx"
    )
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    kinds = tuple(type(child) for child in module.modules())
    key = (spec, kinds, type(module).forward, shapes, scalars, repr(extras))
    if key not in _probed:
        try:
            with torch.no_grad():
                run()
            _probed[key] = None
        except _Differs as difference:
            _probed[key] = str(difference)
        except Exception as error:  # code of others: whatever it raises, it is not what we know
            _probed[key] = f"it fails on a probe input ({type(error).__name__}: {error})"
    return _probed[key]


def _source() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _uniform(source: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=source) - _HALF


def _clone(module: nn.Module, source: torch.Generator) -> nn.Module:
    """A float32 copy with random parameters; its config is shared."""
    memo: dict[int, Any] = {}
    for child in module.modules():
        config = vars(child).get("config")
        if config is not None:
            memo[id(config)] = config
        for parameter in child._parameters.values():
            if parameter is not None:
                values = _uniform(source, *parameter.shape) * 2
                memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
    return copy.deepcopy(module, memo)


def _compare(what: str, got: Any, expected: Any) -> None:
    """Raises unless both are alike: tensors nearly, everything else equal."""
    if isinstance(expected, Tensor) and isinstance(got, Tensor):
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise _Differs(f"{what}: {tuple(expected.shape)} {expected.dtype}")
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        if not bool(((got - expected).abs() <= _TOLERANCE * scale).all()):
            raise _Differs(f"{what} differs")
    elif isinstance(expected, tuple | list) and isinstance(got, tuple | list):
        if len(got) != len(expected):
            raise _Differs(f"{what}: {len(expected)} values")
        for one, other in zip(got, expected, strict=True):
            _compare(what, one, other)
    elif isinstance(expected, dict) and isinstance(got, dict):
        if got.keys() != expected.keys():
            names = ", ".join(sorted(set(expected) ^ set(got)))
            raise _Differs(f"{what} differs in {names}")
        for name in expected:
            _compare(f"{what} ({name})", got[name], expected[name])
    elif got is not expected and got != expected:
        raise _Differs(f"{what} differs")
