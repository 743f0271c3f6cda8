"""Carrying out what `plan.py` decided: packed weights are built first, then modules replaced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from torch_slmops import foreign, memory
from torch_slmops.formats import Format
from torch_slmops.fuse import Block, Swap, build, put
from torch_slmops.modules import Embedding, Linear, PackedModule
from torch_slmops.plan import Formats, Work, by_weight, count, weight_of
from torch_slmops.processes import uninterrupted
from torch_slmops.stack import link_layers
from torch_slmops.survey import Site
from torch_slmops.weights import QuantizedWeight

__all__ = ["Codes", "carry_out", "remaining_ties", "swap"]


@dataclass
class Codes:
    """Weights that calibration has packed, and formats other than those of the work.

    Both by first module; none where neither was asked for.
    """

    packed: dict[nn.Module, Tensor] = field(default_factory=dict)
    formats: dict[nn.Module, Format] = field(default_factory=dict)

    def quantize(self, module: nn.Module, how: Format, weight: Tensor) -> QuantizedWeight:
        """The calibrated weight, which is given away, or the plainly rounded one."""
        found = self.packed.pop(module, None)
        return how.quantize(weight) if found is None else QuantizedWeight.unpack(found)


def carry_out(
    model: nn.Module, work: Work, codes: Codes, advance: Callable[[int], object]
) -> dict[nn.Module, PackedModule]:
    """Packs and fuses what `work` says; an exception leaves the model as it was.

    Returns:
        What replaced the modules of `work.alone`.
    """
    with torch.no_grad():
        replacements = _build(work.alone, work.formats, codes, advance)
        swaps = _build_blocks(work.blocks, work.formats[False], codes, advance)
    ties = remaining_ties(model, replacements)
    with uninterrupted():
        swap(model, replacements, ties, swaps)
    return replacements


def _build(
    todo: list[Site],
    formats: Formats,
    codes: Codes,
    advance: Callable[[int], object],
) -> dict[nn.Module, PackedModule]:
    """The packed modules that take the places of those of `todo`; nothing is replaced yet."""
    replacements: dict[nn.Module, PackedModule] = {}
    for sites in by_weight(todo):
        first, weight = sites[0], weight_of(sites[0])
        how = codes.formats.get(first.module, formats[first.is_head] or formats[False])
        assert how is not None
        calibrated = first.module in codes.packed
        with _named(first.name):
            packed, perm, origin = _pack(first.module, how, codes, weight)
        for site in sites:
            made = _replacement(site.module, packed, weight.dtype)
            made.calibrated, made.perm, made.origin = calibrated, perm, origin
            if perm is not None and isinstance(made, Embedding):
                raise ValueError(f"optimize: {site.name}: an embedding cannot have act-order")
            replacements[site.module] = made
        memory.give_back()
        advance(weight.numel())
    return replacements


def _pack(
    module: nn.Module, how: Format, codes: Codes, weight: Tensor
) -> tuple[Tensor, Tensor | None, str]:
    """The packed weight of a module, the order of its inputs, and where its codes come from."""
    found = foreign.read([module])
    if found is None:
        return how.pack(codes.quantize(module, how, weight)), None, ""
    return how.pack(found.weight), found.perm, found.origin


def _build_blocks(
    blocks: list[Block], how: Format | None, codes: Codes, advance: Callable[[int], object]
) -> list[Swap]:
    """What fusing the blocks puts in place; nothing is changed yet."""
    assert how is not None
    swaps = []
    for block in blocks:
        first = block.sites[0].module if block.sites else block.module
        own = codes.formats.get(first, how)
        calibrated = first in codes.packed
        with _named(block.name):
            made = build(block, partial(codes.quantize, first, own), own.pack)
        for child in made.children.values():
            if isinstance(child, PackedModule):
                child.calibrated = calibrated
        swaps.append(made)
        memory.give_back()
        advance(count(list(block.sites)))
    return swaps


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Says in an error which module it is about."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"optimize: {name}: {error}") from error


def _replacement(module: nn.Module, packed: Tensor, dtype: torch.dtype) -> PackedModule:
    if isinstance(module, nn.Embedding):
        return Embedding.from_packed(packed, module.padding_idx, dtype)
    assert isinstance(module, nn.Linear)
    return Linear.from_packed(packed, module._parameters["bias"], dtype)


def remaining_ties(
    model: nn.Module, replacements: dict[nn.Module, PackedModule]
) -> dict[nn.Module, dict[str, str]]:
    """For transformers' models in `model`: which of their tied weights are still parameters.

    Packed modules that were tied share a buffer, and nothing can untie them; but tie_weights()
    looks for all tied weights among the parameters and raises where it finds none.
    """
    remaining: dict[nn.Module, dict[str, str]] = {}
    for module in model.modules():
        expand = getattr(module, "get_expanded_tied_weights_keys", None)
        if expand is None:
            continue
        members = module.named_modules(remove_duplicate=False)
        packed = {f"{name}.weight" for name, child in members if child in replacements}
        ties: dict[str, str] = expand(all_submodels=False)
        kept = {key: source for key, source in ties.items() if not {key, source} & packed}
        if kept != ties:
            remaining[module] = kept
    return remaining


def swap(
    model: nn.Module,
    replacements: dict[nn.Module, PackedModule],
    ties: dict[nn.Module, dict[str, str]],
    swaps: list[Swap],
) -> None:
    """Puts the replacements in place, by assignments that cannot fail, and freezes the rest."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    put(swaps)
    link_layers(model)
    for module, kept in ties.items():
        vars(module).setdefault("_slmops_ties", getattr(module, "_tied_weights_keys", None))
        vars(module)["_tied_weights_keys"] = kept
    for parameter in model.parameters():
        parameter.requires_grad_(False)
