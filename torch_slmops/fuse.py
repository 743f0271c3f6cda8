"""Which blocks of a model are fused: found, built, and put in place in three separate steps."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torch_slmops import foreign
from torch_slmops.fused import (
    AttentionSpec,
    ExpertsSpec,
    Fused,
    FusedAttention,
    FusedMLP,
    FusedRMSNorm,
    MLPSpec,
    NormSpec,
    derived_class,
)
from torch_slmops.fused_decoder import FusedDecoderLayer, LayerSpec
from torch_slmops.fused_experts import FusedExperts
from torch_slmops.fused_rotary import FusedRotary, RotarySpec, match_rotary
from torch_slmops.match import match_attention, match_experts, match_layer, match_mlp, match_norm
from torch_slmops.modules import Linear, PackedModule
from torch_slmops.packed_rows import GateUp, Rows, interleave
from torch_slmops.survey import Site, weight_key
from torch_slmops.weights import FLOAT_DTYPES, QuantizedWeight

__all__ = [
    "TABLES",
    "Block",
    "Left",
    "Plan",
    "Swap",
    "build",
    "children",
    "find_blocks",
    "looks_like_a_block",
    "possible_blocks",
    "put",
]

Spec: TypeAlias = NormSpec | MLPSpec | ExpertsSpec | AttentionSpec | LayerSpec | RotarySpec
Quantize: TypeAlias = Callable[[Tensor], QuantizedWeight]
Pack: TypeAlias = Callable[[QuantizedWeight], Tensor]

_CLASSES: dict[type, type[Fused]] = {
    NormSpec: FusedRMSNorm,
    MLPSpec: FusedMLP,
    ExpertsSpec: FusedExperts,
    AttentionSpec: FusedAttention,
    LayerSpec: FusedDecoderLayer,
    RotarySpec: FusedRotary,
}
TABLES = "rotary_emb"  # what transformers calls the module with the rotary tables
# Names of classes that compute what a fused op might: used to tell what was left, and why.
_BLOCK = re.compile(r"Attention|Attn|MLP|FeedForward|FFN|Experts")


@dataclass(frozen=True, eq=False)
class Block:
    """A block to fuse.

    Attributes:
        name: Its qualified name.
        module: The module.
        spec: What it is.
        sites: The linear layers that go into its packed weight; they are not packed on their own.
    """

    name: str
    module: nn.Module
    spec: Spec
    sites: tuple[Site, ...] = ()


@dataclass(frozen=True)
class Left:
    """A block that is not fused: its class, the reason, and whether an argument asked for it."""

    what: str
    reason: str
    asked: bool = False


@dataclass
class Plan:
    """The blocks to fuse, and by name those that are left."""

    blocks: list[Block] = field(default_factory=list)
    left: dict[str, Left] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Swap:
    """What `put` changes of a module, all of it made beforehand."""

    module: nn.Module
    spec: Spec
    children: dict[str, nn.Module]
    removed: tuple[str, ...] = ()  # parameters


def looks_like_a_block(module: nn.Module) -> bool:
    """Whether a module that no family knows may be an attention, an MLP, or experts."""
    if not _BLOCK.search(type(module).__name__):
        return False
    linears = sum(isinstance(c, nn.Linear | PackedModule) for c in module._modules.values())
    return linears >= 2 or any(p is not None and p.dim() >= 3 for p in module._parameters.values())


def possible_blocks(model: nn.Module) -> list[str]:
    """Returns the names of all modules that may be blocks: they hold layers or parameters."""
    return [
        name
        for name, module in model.named_modules()
        if module._parameters
        or name.split(".")[-1] == TABLES
        or any(_BLOCK.search(type(child).__name__) for child in module._modules.values())
        or any(isinstance(c, nn.Linear | PackedModule) for c in module._modules.values())
    ]


def find_blocks(
    model: nn.Module,
    sites: list[Site],
    todo: list[Site],
    included: Callable[..., bool],
    excluded: Callable[..., bool],
) -> Plan:
    """Finds the blocks of `model` that can be fused.

    Args:
        model: The model.
        sites: All that can be packed, and what cannot.
        todo: Those that will be packed.
        included: Whether a block of this name, that has no layers among `todo`, may be fused.
        excluded: Whether a block of this name may not be fused.
    """
    finder = _Finder(model, sites, todo, included, excluded)
    for name, module in model.named_modules():
        finder.look_at(name, module)
    finder.look_at_layers()
    finder.look_at_rotary_tables()
    return finder.plan


class _Finder:
    def __init__(
        self,
        model: nn.Module,
        sites: list[Site],
        todo: list[Site],
        included: Callable[..., bool],
        excluded: Callable[..., bool],
    ) -> None:
        self.model = model
        self.included, self.excluded = included, excluded
        self.plan = Plan()
        self.sites = {site.module: site for site in todo if not site.is_head}
        self.obstacles = {site.module: site.obstacle for site in sites}
        self.parents = Counter(
            child for module in model.modules() for child in module._modules.values()
        )
        self.owners = Counter(
            weight_key(site.module.weight)
            for site in todo
            if isinstance(site.module.weight, Tensor)
        )

    def look_at(self, name: str, module: nn.Module) -> None:
        if isinstance(module, Fused | PackedModule):
            return
        spec: Spec | str = match_norm(module)
        for match in (match_mlp, match_experts, match_attention):
            if not isinstance(spec, str):
                break
            found = match(module)
            # The first word of a reason tells whether a row had this structure.
            if not isinstance(found, str) or not found.startswith("no family"):
                spec = found
        if isinstance(spec, str):
            if not name:  # the model itself, whatever its class is called
                return
            packed = [n for n, c in module._modules.items() if isinstance(c, PackedModule)]
            if looks_like_a_block(module) and packed:
                why = f"its {packed[0]} was packed before, without fusing"
                self._leave(name, module, why, asked=True)
            elif looks_like_a_block(module):
                self._leave(name, module, spec)
            return
        alone = isinstance(spec, NormSpec | ExpertsSpec)
        if self.excluded(name) or (alone and not self.included(name)):
            self._leave(name, module, "not chosen (include, exclude)", asked=True)
            return
        if isinstance(spec, ExpertsSpec):
            weights = [module._parameters[n] for n in (spec.row.gate_up, spec.row.down)]
            if any(w is None or w.dtype not in FLOAT_DTYPES for w in weights):
                self._leave(name, module, "its weights are not float32, bfloat16 or float16")
                return
        block = self._with_sites(name, module, spec)
        if isinstance(block, Left):
            self.plan.left[name] = block
        else:
            self.plan.blocks.append(block)

    def _leave(self, name: str, module: nn.Module, reason: str, asked: bool = False) -> None:
        self.plan.left[name] = Left(type(module).__name__, reason, asked)

    def _with_sites(self, name: str, module: nn.Module, spec: Spec) -> Block | Left:
        """The block with the layers that it takes over, or why it cannot have them."""
        what = type(module).__name__
        names: tuple[str, ...] = ()
        if isinstance(spec, AttentionSpec):
            names = spec.row.projections
        if isinstance(spec, MLPSpec):
            names = (*spec.row.gate_up, spec.row.down)
        children = [module._modules[n] for n in names]
        for n, child in zip(names, children, strict=True):
            assert child is not None
            if child not in self.sites:
                why = self.obstacles[child] or "not chosen (include, exclude, lm_head)"
                return Left(what, f"its {n}: {why}", asked=self.obstacles[child] is None)
            if self.parents[child] > 1 or self.owners[weight_key(self._weight(child))] > 1:
                return Left(what, f"its {n} is shared with another module")
        taken = children[:-1] if isinstance(spec, MLPSpec) else children
        if isinstance(spec, AttentionSpec) and len(names) == 1:
            taken = []  # it is packed in place, as any other
        layers: list[Any] = taken
        if len({self._weight(layer).dtype for layer in layers}) > 1:
            return Left(what, "its projections have weights of several dtypes")
        biases = {None if layer.bias is None else layer.bias.dtype for layer in layers}
        if len(biases) > 1:
            return Left(what, "its projections have biases and none, or of several dtypes")
        apart = foreign.apart(layers)
        if apart is not None:
            return Left(what, apart)
        packed = getattr(spec, "packed", None)
        if packed is not None and packed not in names and hasattr(module, packed):
            return Left(what, f"it has an attribute {packed!r}, where fused weights go")
        return Block(name, module, spec, tuple(self.sites[layer] for layer in layers))

    @staticmethod
    def _weight(layer: Any) -> Tensor:
        weight: Tensor = layer.weight
        return weight

    def look_at_layers(self) -> None:
        """Takes decoder layers whose blocks are all fused and whose projections are packed."""
        specs: dict[nn.Module, object] = {block.module: block.spec for block in self.plan.blocks}
        for module in self.model.modules():
            if isinstance(module, Fused):
                specs[module] = module.slmops
        for name, module in self.model.named_modules():
            if isinstance(module, Fused) or self.excluded(name):
                continue
            if any(foreign.order_of(inner) is not None for inner in module.modules()):
                continue  # the op takes inputs as they come
            inner = [c for c in module._modules.values() if isinstance(specs.get(c), AttentionSpec)]
            if len(inner) != 1 or not self._has_packed_output(inner[0], specs[inner[0]]):
                continue
            spec = match_layer(module, specs)
            if not isinstance(spec, str):
                self.plan.blocks.append(Block(name, module, spec))

    def _has_packed_output(self, attention: nn.Module | None, spec: object) -> bool:
        assert attention is not None and isinstance(spec, AttentionSpec)
        output = None if spec.row.output is None else attention._modules[spec.row.output]
        return output in self.sites or isinstance(output, Linear)

    def look_at_rotary_tables(self) -> None:
        """Takes over rotary tables that no other module than fused attentions can see."""
        fused = {b.module for b in self.plan.blocks if isinstance(b.spec, AttentionSpec)}
        fused.update(m for m in self.model.modules() if isinstance(m, FusedAttention))
        for name, parent in self.model.named_modules():
            module = parent._modules.get(TABLES)
            if module is None or isinstance(module, Fused):
                continue
            path = f"{name}.{TABLES}" if name else TABLES
            spec: RotarySpec | str = match_rotary(module)
            others = [m for m in parent.modules() if m is not parent and _may_use_tables(m, fused)]
            if not isinstance(spec, str) and others:
                spec = f"{type(others[-1]).__name__} uses them and is not fused"
            if not isinstance(spec, str) and self.parents[module] > 1:
                spec = "it is shared"
            if isinstance(spec, str):
                # "asked": the tables cost portability, no speed; `strict` is about blocks.
                self._leave(path, module, f"tables not bit-portable: {spec}", asked=True)
            elif self.excluded(path) or not self.included(path):
                self._leave(path, module, "not chosen (include, exclude)", asked=True)
            else:
                self.plan.blocks.append(Block(path, module, spec))


def _may_use_tables(module: nn.Module, fused: set[nn.Module]) -> bool:
    """Whether rotary tables may reach `module`, and no fused attention inside it."""
    named = "Attention" in type(module).__name__
    takes = "position_embeddings" in inspect.signature(type(module).forward).parameters
    return (named or takes) and not any(inner in fused for inner in module.modules())


def build(block: Block, quantize: Quantize, pack: Pack) -> Swap:
    """Makes everything that fusing `block` puts into the model; changes nothing."""
    module, spec = block.module, block.spec
    layers: list[Any] = [site.module for site in block.sites]
    if isinstance(spec, ExpertsSpec):
        return _build_experts(module, spec, quantize, pack)
    if not layers:
        return Swap(module, spec, {})
    weights = [layer.weight.detach() for layer in layers]
    dtype = reduce(torch.promote_types, (weight.dtype for weight in weights))
    bias = None
    if layers[0].bias is not None:
        values = torch.cat([layer.bias.detach() for layer in layers])
        bias = nn.Parameter(values, requires_grad=False)
    imported = foreign.read(layers)
    # The joined weight has no name, so that it is freed before the codes are packed.
    quantized = quantize(torch.cat(weights)) if imported is None else imported.weight
    source: Linear | GateUp
    if isinstance(spec, MLPSpec):
        order = foreign.order_of(module._modules[spec.row.down])
        source = _gate_up(pack(interleave(quantized, order)), quantized.shape, dtype, bias, order)
    else:
        source = Linear.from_packed(pack(quantized), bias, dtype)
    if imported is not None:
        source.perm, source.origin = imported.perm, imported.origin
    assert isinstance(spec, MLPSpec | AttentionSpec)
    return Swap(module, spec, children(spec, source, [layer.out_features for layer in layers]))


def children(
    spec: MLPSpec | AttentionSpec, source: Linear | GateUp, sizes: list[int]
) -> dict[str, nn.Module]:
    """Returns the packed child of a fused block, and views of its rows for the old projections.

    `sizes`: how many rows each of them has.
    """
    found: dict[str, nn.Module] = {spec.packed: source}
    names = spec.row.gate_up if isinstance(spec, MLPSpec) else spec.row.projections
    start = 0
    for name, size in zip(names, sizes, strict=True):
        if name != spec.packed:
            found[name] = Rows(source, start, start + size).eval()
        start += size
    return found


def _gate_up(
    packed: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    bias: nn.Parameter | None = None,
    order: Tensor | None = None,
) -> GateUp:
    module = GateUp(shape[1], shape[0] // 2, bias, dtype).eval()
    module.packed, module.order = packed, order
    return module


def _build_experts(module: nn.Module, spec: ExpertsSpec, quantize: Quantize, pack: Pack) -> Swap:
    gate_up, down = (module._parameters[n] for n in (spec.row.gate_up, spec.row.down))
    assert gate_up is not None and down is not None
    first, second = nn.ModuleList(), nn.ModuleList()
    for e in range(len(gate_up)):
        weight = gate_up[e].detach()
        quantized = interleave(quantize(weight))
        first.append(_gate_up(pack(quantized), weight.shape, weight.dtype))
        packed = pack(quantize(down[e].detach()))
        second.append(Linear.from_packed(packed, None, down.dtype))
    experts: dict[str, nn.Module] = {"gate_up": first.eval(), "down": second.eval()}
    return Swap(module, spec, experts, (spec.row.gate_up, spec.row.down))


def put(swaps: list[Swap]) -> None:
    """Fuses the blocks, by assignments that cannot fail."""
    for swap in swaps:
        for name in swap.removed:
            del swap.module._parameters[name]
        swap.module._modules.update(swap.children)
        vars(swap.module)["slmops"] = swap.spec
        swap.module.__class__ = derived_class(_CLASSES[type(swap.spec)], type(swap.module))
