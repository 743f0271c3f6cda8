"""What `optimize` is going to do to a model: formats, layers, blocks. Nothing is changed here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

from torch_slmops import foreign
from torch_slmops.activation_check import Layers
from torch_slmops.calibrate import Unit
from torch_slmops.formats import Format
from torch_slmops.fuse import Block, Left, Plan, find_blocks, possible_blocks
from torch_slmops.survey import Patterns, Site, chooser, find_sites, weight_key
from torch_slmops.weights import FLOAT_DTYPES, resolve_scales

__all__ = [
    "Formats",
    "Work",
    "by_weight",
    "count",
    "layers_of",
    "make_formats",
    "plan_work",
    "units_of",
    "weight_of",
]

Formats: TypeAlias = "dict[bool, Format | None]"

_BITS = {"int4": 4, "int8": 8}


@dataclass(frozen=True)
class Work:
    """What `optimize` is going to do to a model.

    Attributes:
        formats: As `make_formats` gives them.
        todo: What is packed, with what goes into blocks.
        alone: What of that is packed on its own.
        blocks: What is fused.
        left: Blocks that are not.
        names: What patterns could name: layers and blocks.
    """

    formats: Formats
    todo: list[Site]
    alone: list[Site]
    blocks: list[Block]
    left: dict[str, Left]
    names: tuple[str, ...]

    @property
    def size(self) -> int:
        """The number of weights in `todo`, shared ones once."""
        return count(self.todo)


def plan_work(
    model: nn.Module,
    formats: Formats,
    include: Patterns | None,
    exclude: Patterns | None,
    fuse: bool,
    strict: bool,
) -> Work:
    """Decides what `optimize` with these arguments does; changes nothing.

    Weights may be on the meta device; rotary tables on it are left.
    """
    sites = find_sites(model)
    blocks = possible_blocks(model) if fuse else []
    included, excluded = chooser(sites, blocks, include, exclude)
    chosen = [s for s in sites if included(*s.names) and not excluded(*s.names) and not s.is_packed]
    chosen = [s for s in chosen if formats[s.is_head] is not None or foreign.is_foreign(s.module)]
    todo = [site for site in chosen if site.obstacle is None]
    plan = find_blocks(model, sites, todo, included, excluded) if fuse else Plan()
    experts = {block.module for block in plan.blocks if not block.sites}
    if strict:
        _refuse_leftovers([site for site in chosen if site.module not in experts], plan.left)
    for site in todo:
        _check_dtype(site)
    taken = {site.module for block in plan.blocks for site in block.sites}
    alone = [site for site in todo if site.module not in taken]
    names = (*(name for site in sites for name in site.names), *blocks)
    return Work(formats, todo, alone, plan.blocks, plan.left, tuple(dict.fromkeys(names)))


def make_formats(
    weights: str,
    scale_kind: str | None,
    group_size: int | None,
    symmetric: bool,
    activations: str | None,
    act_group: int | None,
    lm_head: str | None,
) -> Formats:
    """Returns the formats of other layers (False) and of head and embeddings (True; None: left)."""
    if weights not in _BITS:
        raise ValueError(f'optimize: expected weights "int4" or "int8", got {weights!r}')
    if lm_head is not None and lm_head not in _BITS:
        raise ValueError(f'optimize: expected lm_head "int4", "int8" or None, got {lm_head!r}')
    activations = activations or "int8"
    if activations not in ("int8", "float", "float_fast"):
        raise ValueError(
            f'optimize: expected activations "int8", "float" or "float_fast", got {activations!r}'
        )
    if act_group not in (None, 32, 64, 128, -1):
        raise ValueError(f"optimize: expected act_group 32, 64, 128 or -1, got {act_group!r}")

    def make(bits: int, scale_kind: str | None, group: int | None, symmetric: bool) -> Format:
        kind, size = resolve_scales(bits, scale_kind, group, symmetric)
        if kind == "group" and size != -1 and size % 32 != 0:
            raise ValueError(f"optimize: expected group_size to be a multiple of 32, got {size}")
        return Format(bits, kind, size, symmetric, act_group, activations)

    layers = make(_BITS[weights], scale_kind, group_size, symmetric)
    if lm_head is None:
        return {False: layers, True: None}
    head = layers if lm_head == weights else make(_BITS[lm_head], None, None, True)
    return {False: layers, True: head}


def _refuse_leftovers(chosen: list[Site], blocks: dict[str, Left]) -> None:
    left = [f"{site.name}: {site.obstacle}" for site in chosen if site.obstacle is not None]
    left += [
        f"{name}: {block.what} cannot be fused, {block.reason}"
        for name, block in blocks.items()
        if not block.asked
    ]
    if left:
        raise ValueError(
            "optimize: strict=True, and these layers cannot be packed or fused (name them in "
            "exclude, use fuse=False, or drop strict):\n  " + "\n  ".join(left)
        )


def weight_of(site: Site) -> Tensor:
    weight = site.module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _key(site: Site) -> tuple[object, ...]:
    weight = site.module.weight
    assert isinstance(weight, Tensor)
    return weight_key(weight)


def _check_dtype(site: Site) -> None:
    dtype = weight_of(site).dtype
    if dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"optimize: expected weights of float32, bfloat16 or float16, got {dtype} in "
            f"{site.name}; convert the model (model.to(torch.float32)) or name the layer in exclude"
        )


def count(todo: list[Site]) -> int:
    """The number of weights in `todo`, shared ones once."""
    return sum({_key(site): weight_of(site).numel() for site in todo}.values())


def by_weight(todo: list[Site]) -> list[list[Site]]:
    """The sites that share a weight, together."""
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in todo:
        groups.setdefault(_key(site), []).append(site)
    return list(groups.values())


def units_of(work: Work) -> list[Unit]:
    """What is calibrated together: the layers of a fused weight, or those that share one."""
    units = []
    for first, *twins in by_weight(work.alone):
        how = work.formats[first.is_head]
        assert how is not None
        others = tuple(site.module for site in twins)
        units.append(Unit(first.name, (first.module,), others, how.quantize, how.pack))
    how = work.formats[False]
    assert how is not None
    for block in work.blocks:
        if block.sites:
            layers = tuple(site.module for site in block.sites)
            units.append(Unit(block.sites[0].name, layers, (), how.quantize, how.pack))
    return [unit for unit in units if unit.watched()]


def layers_of(work: Work) -> list[Layers]:
    """What goes into one weight, for a look at its inputs."""
    found = []
    for sites in by_weight(work.alone):
        how = work.formats[sites[0].is_head]
        linear = [site.module for site in sites if isinstance(site.module, nn.Linear)]
        assert how is not None
        found.append(Layers(sites[0].module, tuple(linear[:1]), how))
    for block in work.blocks:
        how = work.formats[False]
        assert how is not None
        if block.sites:
            modules = tuple(site.module for site in block.sites)
            found.append(Layers(modules[0], modules, how))
    return found
