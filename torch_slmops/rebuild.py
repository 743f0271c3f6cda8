"""The structure of a saved model, put into its float skeleton: weights come afterwards.

A module of the skeleton that was fused has to be the row of `families.py` that it was when it was
saved, with the same numbers. Whether it still computes what the row says is probed again if its
code comes from another version of its package, or from none. Anything else is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops import families
from torch_slmops.attention import use_own_attention
from torch_slmops.carry_out import remaining_ties, swap
from torch_slmops.families import Attention
from torch_slmops.fuse import Swap, children, put
from torch_slmops.fused import AttentionSpec, ExpertsSpec, MLPSpec, NormSpec
from torch_slmops.fused_decoder import LayerSpec
from torch_slmops.fused_rotary import match_rotary
from torch_slmops.match import match_attention, match_experts, match_layer, match_mlp, match_norm
from torch_slmops.modules import Embedding, Linear, PackedModule
from torch_slmops.packed_rows import GateUp
from torch_slmops.probe import expecting
from torch_slmops.recipe import Recipe, SavedModelError, facts, package_version

__all__ = ["Structure", "plan_structure", "real_tensors"]

_ROTARY = "RotarySpec"
_LAYER = "LayerSpec"
_MATCH: dict[str, Callable[[nn.Module, Mapping[nn.Module, object]], Any]] = {
    "NormSpec": lambda module, specs: match_norm(module),
    "MLPSpec": lambda module, specs: match_mlp(module),
    "ExpertsSpec": lambda module, specs: match_experts(module),
    "AttentionSpec": lambda module, specs: match_attention(module),
    _LAYER: match_layer,
}
_PACKED = ".packed"


@contextmanager
def real_tensors() -> Iterator[None]:
    """Inside it, new tensors are on the CPU and of float32, whatever a caller has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    """Inside it, no module is in training mode, where dropout would blur what it computes."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@dataclass
class Structure:
    """What `apply` does to a skeleton, and the rest once the weights are there.

    Attributes:
        model: The skeleton.
        recipe: What it becomes.
        file: Where that is from, for errors.
        swaps: Its fused blocks, without rotary tables.
        replacements: Packed modules in the place of single layers.
        packed: All packed modules by name.
    """

    model: nn.Module
    recipe: Recipe
    file: str
    swaps: list[Swap]
    replacements: dict[nn.Module, PackedModule]
    packed: dict[str, PackedModule]

    def apply(self) -> None:
        """Changes the model; its packed modules have tensors on the meta device."""
        ties = remaining_ties(self.model, self.replacements)
        swap(self.model, self.replacements, ties, self.swaps)

    def state_after(self) -> dict[str, Tensor]:
        """Returns the tensors of the state dict that the model has once this is applied, by name.

        What is packed is on the meta device, and empty where it is shared.
        """
        swaps = {swap.module: swap for swap in self.swaps}
        found: dict[str, Tensor] = {}

        def visit(module: nn.Module, prefix: str) -> None:
            module = self.replacements.get(module, module)
            temporary = module._non_persistent_buffers_set
            ours = isinstance(module, PackedModule)
            children_of, removed = dict(module._modules), tuple[str, ...]()
            if module in swaps:
                children_of |= swaps[module].children
                removed = swaps[module].removed
            for name, parameter in module._parameters.items():
                if parameter is not None and name not in removed:
                    found[prefix + name] = parameter
            for name, buffer in module._buffers.items():
                if buffer is not None and (ours or name not in temporary):
                    found[prefix + name] = buffer
            for name, child in children_of.items():
                if child is not None:
                    visit(child, f"{prefix}{name}.")

        visit(self.model, "")
        return found

    def rotary_swaps(self) -> list[Swap]:
        """Finds the rotary tables that are ours; their buffers must not be on the meta device."""
        found = []
        for name, block in self.recipe.blocks.items():
            if block["kind"] == _ROTARY:
                module = _module(self.model, name, self.file)
                with real_tensors():
                    spec = match_rotary(module)
                if isinstance(spec, str):
                    raise _refused(self.file, name, module, block, spec)
                found.append(Swap(module, spec, {}))
        return found

    def finish(self) -> None:
        """Puts rotary tables in place and lets modules share what they shared."""
        put(self.rotary_swaps())
        if self.swaps:
            use_own_attention(self.model)
        for name, source in self.recipe.shared.items():
            module = self.packed.get(name.removesuffix(_PACKED))
            if module is not None and name.endswith(_PACKED):  # else an alias of the same module
                module.packed = self.packed[source.removesuffix(_PACKED)].packed
                module._non_persistent_buffers_set.discard("packed")


def plan_structure(model: nn.Module, recipe: Recipe, file: str) -> Structure:
    """Finds what has to be changed in a float model; changes nothing.

    Args:
        model: The skeleton; its weights may be on the meta device.
        recipe: What it is to become.
        file: Where that is from, for errors.

    Raises:
        SavedModelError: The skeleton is not that of the model that was saved.
    """
    swaps: list[Swap] = []
    specs: dict[nn.Module, object] = {}
    packed: dict[str, PackedModule] = {}
    # Layers last: what they are depends on the blocks in them.
    for name, block in sorted(recipe.blocks.items(), key=lambda item: item[1]["kind"] == _LAYER):
        if block["kind"] == _ROTARY:
            continue
        found = _block(model, name, block, recipe, specs, file)
        specs[found.module] = found.spec
        swaps.append(found)
        for child_name, child in found.children.items():
            for inner_name, inner in child.named_modules():
                if isinstance(inner, PackedModule):
                    packed[".".join(filter(None, (name, child_name, inner_name)))] = inner
    replacements: dict[nn.Module, PackedModule] = {}
    for name, layer in recipe.layers.items():
        if name not in packed:
            old = _module(model, name, file)
            packed[name] = replacements[old] = _replacement(old, name, layer.kind, file)
        if type(packed[name]).__name__ != layer.kind:
            raise _mismatch(file, name, layer.kind, type(packed[name]).__name__)
        packed[name].calibrated, packed[name].origin = layer.calibrated, layer.origin
    if unknown := packed.keys() - recipe.layers.keys():
        raise _mismatch(file, min(unknown), "no packed layer", "one")
    for name, module in packed.items():
        _add_tensors(name, module, recipe, file)
    for name, source in recipe.shared.items():
        owners = [key.removesuffix(_PACKED) for key in (name, source) if key.endswith(_PACKED)]
        if len(owners) == 1 or (owners and owners[1] not in packed):
            raise SavedModelError(
                f"{file}: {name}: expected to share a packed weight, not {source}"
            )
        if len(owners) < 2:
            continue
        # A module that is used twice has a second name, which is not in `packed`.
        own = packed.get(owners[0]) or replacements.get(_module(model, owners[0], file))
        if own is not None and own._packed_shape() != packed[owners[1]]._packed_shape():
            raise SavedModelError(
                f"{file}: {name}: expected to share a weight of {own._packed_shape()}, {source} is "
                f"one of {packed[owners[1]]._packed_shape()}"
            )
    return Structure(model, recipe, file, swaps, replacements, packed)


def _module(model: nn.Module, name: str, file: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise SavedModelError(
            f"{file}: {name}: expected a model with such a module, got a {type(model).__name__} "
            "without; it has to be the float model that was optimized"
        ) from None


def _mismatch(file: str, name: str, expected: str, got: str) -> SavedModelError:
    return SavedModelError(
        f"{file}: {name}: the file has {expected} there, the model {got}; it has to be the float "
        "model that was optimized"
    )


def _refused(
    file: str, name: str, module: nn.Module, block: Mapping[str, Any], why: str
) -> SavedModelError:
    return SavedModelError(
        f"{file}: {name}: expected a {type(module).__name__} that can be fused as when it was "
        f"saved ({block.get('row', block['kind'])!r} of torch_slmops.families), but {why}; load "
        "it with the versions that saved it, or optimize the float model again"
    )


def _block(
    model: nn.Module,
    name: str,
    block: Mapping[str, Any],
    recipe: Recipe,
    specs: Mapping[nn.Module, object],
    file: str,
) -> Swap:
    """What fusing one block puts into the model, its packed weights empty.

    `specs`: of the blocks that were found before.
    """
    match = _MATCH.get(block["kind"])
    if match is None:
        raise SavedModelError(
            f"{file}: {name}: expected one of the blocks {', '.join(_MATCH)}, {_ROTARY}, got "
            f"{block['kind']!r}, which this version does not know"
        )
    module = _module(model, name, file)
    package = type(module).__module__.partition(".")[0]
    version = package_version(package)
    known = version is not None and recipe.made_by.get(package) == version
    expected = expecting(_expected_rows(module, block), probe=not known)
    with real_tensors(), _in_eval(module), expected:
        spec = match(module, specs)
    if isinstance(spec, str):
        raise _refused(file, name, module, block, spec)
    now = facts(spec)
    if now != dict(block):
        differ = sorted(key for key in now | dict(block) if now.get(key) != block.get(key))
        pairs = ", ".join(f"{key} is {now.get(key)}, was {block.get(key)}" for key in differ)
        raise _refused(file, name, module, block, f"its {pairs}")
    with torch.device("meta"):
        return _swap_of(module, spec)


def _expected_rows(module: nn.Module, block: Mapping[str, Any]) -> dict[nn.Module, str]:
    """The names of the rows of a block and of the norms in it."""
    name, norm = str(block.get("row")), block.get("norm")
    found = {module: name}
    for row in families.rows():
        if isinstance(norm, dict) and isinstance(row, Attention) and row.name == name:
            norms = (module._modules.get(name) for name in row.norms or ())
            found.update({child: str(norm.get("row")) for child in norms if child is not None})
    return found


def _swap_of(module: nn.Module, spec: Any) -> Swap:
    if isinstance(spec, NormSpec | LayerSpec):
        return Swap(module, spec, {})
    if isinstance(spec, ExpertsSpec):
        return _experts(module, spec)
    assert isinstance(spec, MLPSpec | AttentionSpec)
    names = spec.row.gate_up if isinstance(spec, MLPSpec) else spec.row.projections
    if isinstance(spec, AttentionSpec) and len(names) == 1:
        return Swap(module, spec, {})  # packed in place, as any other layer
    layers: list[Any] = [module._modules[name] for name in names]
    sizes = [layer.out_features for layer in layers]
    first, rows = layers[0], sum(sizes)
    bias = None if first.bias is None else _parameter((rows,), first.bias.dtype)
    source: Linear | GateUp
    if isinstance(spec, MLPSpec):
        source = GateUp(first.in_features, rows // 2, bias, first.weight.dtype)
    else:
        source = Linear(first.in_features, rows, bias=False, dtype=first.weight.dtype)
        source.register_parameter("bias", bias)
    return Swap(module, spec, children(spec, source.eval(), sizes))


def _experts(module: nn.Module, spec: ExpertsSpec) -> Swap:
    gate_up, down = (module._parameters[name] for name in (spec.row.gate_up, spec.row.down))
    assert gate_up is not None and down is not None
    count, rows, k = gate_up.shape
    first = nn.ModuleList(GateUp(k, rows // 2, None, gate_up.dtype) for _ in range(count))
    second = nn.ModuleList(
        Linear(down.shape[2], down.shape[1], bias=False, dtype=down.dtype) for _ in range(count)
    )
    parts: dict[str, nn.Module] = {"gate_up": first.eval(), "down": second.eval()}
    return Swap(module, spec, parts, (spec.row.gate_up, spec.row.down))


def _parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def _replacement(old: nn.Module, name: str, kind: str, file: str) -> PackedModule:
    """The packed module, empty, for one layer."""
    with torch.device("meta"):
        made: PackedModule
        if type(old) is nn.Embedding and kind == "Embedding":
            n, k = old.weight.shape
            made = Embedding(n, k, old.padding_idx, old.weight.dtype)
        elif type(old) is nn.Linear and kind == "Linear":
            made = Linear(old.in_features, old.out_features, bias=False, dtype=old.weight.dtype)
            bias = old._parameters["bias"]
            made.register_parameter(
                "bias", None if bias is None else _parameter(tuple(bias.shape), bias.dtype)
            )
        else:
            raise _mismatch(file, name, f"a packed {kind}", f"a {type(old).__name__}")
        return made.eval()


def _add_tensors(name: str, module: PackedModule, recipe: Recipe, file: str) -> None:
    """Gives a packed module buffers of the sizes that the file has."""
    for key in ("packed", *(key for key in module._buffers if key != "packed")):
        stored = recipe.tensors.get(f"{name}.{key}")
        if stored is not None:
            dtype = getattr(torch, stored.dtype)
            module._buffers[key] = torch.empty(stored.shape, dtype=dtype, device="meta")
        elif key == "packed" and f"{name}{_PACKED}" in recipe.shared:
            module._non_persistent_buffers_set.add("packed")  # until it is there: `finish`
        elif key == "packed":
            raise SavedModelError(f"{file}: {name}{_PACKED}: expected such a tensor, there is none")
