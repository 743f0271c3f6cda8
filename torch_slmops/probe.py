"""What a module computes, compared with what a row of `families.py` says that it does.

A float32 copy with random parameters runs beside a plain evaluation of the row, on random input,
once per class and configuration in a process.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops.families import ACTIVATIONS
from torch_slmops.fused import AttentionSpec, ExpertsSpec, MLPSpec, NormSpec, attend, read
from torch_slmops.fused_decoder import LayerSpec

__all__ = ["activation_kind", "difference", "expecting", "plain_forward"]

# float32 sums of the same terms, in whatever order; relative to the largest value.
_TOLERANCE = 2e-5
_PROBE_EXPERTS = 3
_HALF = 0.5
# What a decoder layer hands on to its attention.
_PASSED_ON = ("attention_mask", "position_embeddings", "past_key_values", "cache")
_Spec = NormSpec | MLPSpec | ExpertsSpec | AttentionSpec | LayerSpec

_probed: dict[Hashable, str | None] = {}


class _Differs(Exception):
    """What a module computes differently from what its row says."""


@dataclass(frozen=True)
class _Expected:
    """The names of the rows that modules were found to be before, and whether to probe again."""

    rows: Mapping[nn.Module, str]
    probe: bool


_expected: ContextVar[_Expected | None] = ContextVar("expected", default=None)


@contextmanager
def expecting(rows: Mapping[nn.Module, str], probe: bool) -> Iterator[None]:
    """Inside it, a module of `rows` is the row of that name or none.

    Without `probe` it is not compared again: for modules whose very code was compared before.
    """
    token = _expected.set(_Expected(rows, probe))
    try:
        yield
    finally:
        _expected.reset(token)


def difference(module: nn.Module, spec: _Spec, extras: Hashable = ()) -> str | None:
    """Returns what `module` computes differently from `spec`, or None; remembered for its likes.

    `extras`: what the outcome depends on besides the class, the parameters' shapes, the config and
    attributes of simple types.
    """
    expected = _expected.get()
    if expected is not None and module in expected.rows:
        if spec.row.name != expected.rows[module]:
            return f"it was a {expected.rows[module]} before"
        if not expected.probe:
            return None
    config = vars(module).get("config")
    config = repr(getattr(config, "__dict__", config))
    scalars = tuple(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, int | float | str | None) and name != "layer_idx"
    )
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    kinds = tuple(type(child) for child in module.modules())
    key = (spec, kinds, type(module).forward, shapes, scalars, config, extras)
    if key not in _probed:
        try:
            with torch.no_grad():
                _probe(module, spec)
            _probed[key] = None
        except _Differs as difference:
            _probed[key] = str(difference)
        except Exception as error:  # code of others: whatever it raises, it is not what we know
            _probed[key] = f"it fails on a probe input ({type(error).__name__}: {error})"
    return _probed[key]


def _probe(module: nn.Module, spec: _Spec) -> None:
    if isinstance(spec, NormSpec):
        _probe_norm(module, spec)
    elif isinstance(spec, MLPSpec):
        _probe_mlp(module, spec)
    elif isinstance(spec, ExpertsSpec):
        _probe_experts(module, spec)
    elif isinstance(spec, LayerSpec):
        _probe_layer(module, spec)
    else:
        _probe_attention(module, spec)


def activation_kind(module: nn.Module, source: str) -> str | None:
    """Returns the kind of the activation function at `source`, by its values, or None."""
    if source in ACTIVATIONS:
        return source
    function = getattr(module, source, None)
    if not callable(function) or (isinstance(function, nn.Module) and "forward" in vars(function)):
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


def _probe_mlp(module: nn.Module, spec: MLPSpec) -> None:
    source = _source()
    clone: Any = _clone(module, source)
    x = _uniform(source, 2, 3, getattr(clone, spec.row.gate_up[0]).in_features)
    rows_ = torch.cat([getattr(clone, name)(x) for name in spec.row.gate_up], -1)
    gate, up = rows_.chunk(2, -1)
    expected = getattr(clone, spec.row.down)(_activate(spec.activation, gate) * up)
    _compare("output", expected, clone(x))


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

    def update(self, k: Tensor, v: Tensor, layer: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.calls.append((k, v, layer, copy.copy(kwargs)))
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
        spec.cache: original,
    }
    own = {name: value for name, value in own.items() if name in spec.parameters}
    forward = _with_functions(plain_forward(clone), original)
    expected = forward(clone, **own, position_ids=positions)
    if original.eager is not spec.eager:
        raise _Differs("it falls back on another attention function")
    cache = ours if spec.cache in own else None
    qkv = _qkv(clone, spec, x, tables)
    got = attend(clone, spec, qkv, mask, cache, ours, {"position_ids": positions})
    if len(original.calls) != len(ours.calls):
        raise _Differs("it does not use its cache and the attention function once")
    for i, call in enumerate(ours.calls):
        _compare("what it gives to its cache or to attention", call, original.calls[i])
    _compare("output", got, expected)


class _Stub(nn.Module):
    """Stands in for a child of a layer: some function, and a note of the arguments."""

    def __init__(self, number: int, pair: bool) -> None:
        super().__init__()
        self.number, self.pair = number, pair
        self.calls: list[dict[str, Any]] = []

    def compute(self, x: Tensor) -> Tensor:
        return x.roll(self.number, -1) * (0.5 + self.number) + self.number

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        self.calls.append(kwargs)
        y = self.compute(hidden_states)
        return (y, None) if self.pair else y


def _probe_layer(module: nn.Module, spec: LayerSpec) -> None:
    row = spec.row
    clone: Any = copy.copy(module)
    clone._modules = dict(module._modules)
    names = (row.attention, row.mlp, *(name for name in row.norms if name is not None))
    stubs = {name: _Stub(i + 1, name == row.attention) for i, name in enumerate(names)}
    clone._modules.update(stubs)

    def part(name: str | None, x: Tensor) -> Tensor:
        return x if name is None else stubs[name].compute(x)

    x = _uniform(_source(), 2, 3, 8)
    given = {name: object() for name in _PASSED_ON if name in spec.parameters}
    y = clone(x, **given)
    pre_attention, post_attention, pre_mlp, post_mlp = row.norms
    factor = 1.0 if row.multiplier is None else read(module, row.multiplier)
    attended = part(post_attention, part(row.attention, part(pre_attention, x)))
    h = x + factor * attended
    _compare("output", h + factor * part(post_mlp, part(row.mlp, part(pre_mlp, h))), y)
    got = [{k: v for k, v in call.items() if k in given} for call in stubs[row.attention].calls]
    _compare("what it gives to its attention", got, [given])


def plain_forward(module: nn.Module) -> FunctionType | None:
    """Returns the forward of the module's class; None if something unknown is wrapped around it."""
    forward = type(module).forward
    names = getattr(forward, "__globals__", {})
    if names.get("__name__") == "transformers.utils.deprecation":  # it renames an argument
        forward = getattr(forward, "__wrapped__", forward)
    plain = isinstance(forward, FunctionType) and not hasattr(forward, "__wrapped__")
    return forward if plain else None  # type: ignore[return-value]


def _with_functions(forward: Any, functions: Any) -> Callable[..., Any]:
    """A copy of `forward` for which the global `ALL_ATTENTION_FUNCTIONS` is `functions`."""
    names = forward.__globals__ | {"ALL_ATTENTION_FUNCTIONS": functions}
    made = FunctionType(
        forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _qkv(module: Any, spec: AttentionSpec, x: Tensor, tables: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What `qkv_rotary` computes, on the float projections."""
    row = spec.row
    y = torch.cat([getattr(module, name)(x) for name in row.projections], -1)
    parts = torch.split(y, [heads * spec.head_dim for heads in spec.heads], -1)
    found: list[Tensor] = []
    for i, (part, heads) in enumerate(zip(parts, spec.heads, strict=True)):
        shape = (*part.shape[:-1], heads, spec.head_dim)
        if i < 2 and spec.norm is not None and row.norms is not None:
            norm = getattr(module, row.norms[i])
            part = part.view(shape) if norm.weight.numel() == spec.head_dim else part
            part = _norm(norm, part, spec.norm)
        part = part.reshape(shape)
        if i < 2 and spec.rotary_width and tables is not None:
            cos, sin = (table if table.dim() == 3 else table[None] for table in tables)
            part = _rotate(part, cos, sin, row.rotary == "interleaved")
        found.append(part)
    q, k, v = found
    return q, k, v


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    if interleaved:
        partner = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    else:
        partner = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], -1)
    rotated = turned * cos[:, :, None] + partner * sin[:, :, None]
    return torch.cat([rotated, rest], -1)


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
