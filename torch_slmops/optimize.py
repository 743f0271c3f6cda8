"""optimize: replaces the linear layers and embeddings of a model by packed ones, in place."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from torch_slmops import budget, foreign, memory
from torch_slmops.activation_check import Layers, suited_formats
from torch_slmops.adopt import adopted
from torch_slmops.attention import use_own_attention
from torch_slmops.calibrate import Unit, calibrate, make_batches
from torch_slmops.formats import Format as _Format
from torch_slmops.fuse import Block, Left, Plan, Swap, build, find_blocks, possible_blocks, put
from torch_slmops.modules import Embedding, Linear, PackedModule
from torch_slmops.notes import note_budget, note_left, note_options
from torch_slmops.pieces import pieces_of
from torch_slmops.processes import uninterrupted
from torch_slmops.progress import progress_bar
from torch_slmops.stack import link_runs
from torch_slmops.survey import Patterns, Site, check_model, chooser, find_sites, weight_key
from torch_slmops.weights import FLOAT_DTYPES, QuantizedWeight, resolve_scales
from torch_slmops.windows import Texts

__all__ = ["optimize"]

Model = TypeVar("Model", bound=nn.Module)

Formats: TypeAlias = "dict[bool, _Format | None]"

_BITS = {"int4": 4, "int8": 8}
_UNNAMED = ("int4", None, None, True, None, None)  # the defaults of the arguments of a format
_logger = logging.getLogger("torch_slmops")


def optimize(
    model: Model,
    *,
    weights: Literal["int4", "int8"] = "int4",
    scale_kind: Literal["sub16", "group"] | None = None,
    group_size: int | None = None,
    symmetric: bool = True,
    activations: Literal["int8", "float", "float_fast"] | None = None,
    act_group: int | None = None,
    lm_head: Literal["int4", "int8"] | None = "int8",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    fuse: bool = True,
    strict: bool = False,
    calibration: Any = None,
    tokenizer: Any = None,
    max_kl: float | None = None,
    texts: Texts = None,
    measurements: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Model:
    """Quantizes and packs the weights of a model in place, for inference on the CPU.

    Every `nn.Linear` becomes a `torch_slmops.modules.Linear`, every `nn.Embedding` an `Embedding`.
    Modules that share a weight share one packed buffer. What is not exactly one of the two classes,
    or has hooks, is left alone: `torch_slmops.report(model)` shows what was done and what was left.
    The remaining parameters are frozen (`requires_grad_(False)`). Called again, it packs what has
    not been packed yet. Layers that torchao, compressed-tensors or bitsandbytes (8 bits) quantized
    keep their codes (docs/checkpoints.md); `from_checkpoint` reads such models from disk.

    Attention, gated MLPs, experts and RMS norms of known families (`torch_slmops.families`) are
    fused: one op computes q, k and v with norms and rotary embedding, one an MLP. Their modules
    stay where they are and get a subclass of their class; projections that went into a fused weight
    remain as views of it.

    All packed weights are built before the first module is replaced: an exception (Ctrl-C, memory
    that runs out) leaves the model as it was. At the peak memory holds the model, its packed
    weights and one layer.

    Args:
        model: Any module in eval mode with its weights on the CPU, such as a transformers model.
        weights: The codes of the linear layers.
        scale_kind: Of the linear layers; see `quantize_weight`.
        group_size: Likewise.
        symmetric: Likewise.
        activations: "int8" rounds activations to int8 per `act_group`, "float" takes them as they
            are (weight-only quantization; slower for many tokens). By default int8, except for
            layers whose inputs have outliers that take the resolution of their group, as a forward
            of 48 random tokens shows (of the first calibration batch, if there is one): these get
            groups of 32 inputs if that helps, else float activations. "float_fast" rounds them to
            bfloat16 and multiplies by whatever is fastest here: bfloat16 dots, for many tokens
            torch's matrix product; not the same bits everywhere (docs/arithmetic.md has the bound).
        act_group: Inputs that share an activation scale, 32, 64, 128 or -1 (all); by default
            whatever suits the layer, see `QuantizedWeight.pack`.
        lm_head: The codes of the embeddings and of the output layer (the model's
            `get_output_embeddings()`, and each layer that shares its weight with an embedding).
            None leaves all of them as they are. The format is the default one of its number of
            bits; where it has the same codes as `weights`, it is that format.
        include: Names of layers to replace (fnmatch patterns such as "model.layers.*", or a
            function of the name); by default all.
        exclude: Names of layers to leave, or of blocks not to fuse. A block is fused if its layers
            are packed, one without layers (a norm) if `include` names it.
        fuse: Fuses blocks; False only replaces layers one by one.
        strict: Raises if a layer would be left that no argument asks to leave, or with `fuse` a
            block that looks like an attention, an MLP or experts.
        calibration: Text or batches of what the model will be used for: the codes of linear layers
            are then chosen for the inputs that they get (error feedback, `calibrate`), for the same
            bytes. One or more batches, each an `input_ids` tensor or a dict of arguments of the
            model; or with `tokenizer` one or more texts, cut into up to 128 windows of 256 tokens.
            32 windows of text like that of the use serve well. Experts with 3-D weights are rounded
            plainly. The codes depend on torch's matrix products, so they may differ between
            machines; the packed model computes the same bits on all. Takes memory for the second
            moments of one block's inputs (4 K^2 bytes each), and about 5 times that of the largest.
        tokenizer: The model's tokenizer, for texts.
        max_kl: A budget in the place of a format: the mean KL(float model || packed model) per
            token, in nats, on `texts`. For each layer (q/k/v together, gate/up together) the codes,
            the groups and the activations (int8, or float where they pay) are chosen so that it is
            met with the fewest bytes; a layer with float activations counts as a tenth larger.
            `report` shows the choice. Takes at most a forward of 512 tokens per layer and format,
            half of one on average: seconds for a model of some million weights. For causal language
            models. The arguments from `weights` to `act_group` stay out; `lm_head=None` leaves the
            head, else its format is chosen too. With `calibration`, on other text, the codes of
            all formats are calibrated, which takes twice the model's memory.
        texts: For `max_kl`: a list of texts, the path of a text file, or token ids, int64 [C, T];
            up to 64 windows of 256 tokens are used. By default a few built-in texts, see
            `evaluate`; text like that of the use is better.
        measurements: For `max_kl`: a file to keep what was measured of single layers; an
            interrupted call, or one with another budget, goes on from it.
        progress: Shows a progress bar where it takes more than a second.

    Returns:
        The model.

    Raises:
        TypeError: `model` is no module, a weight's dtype is not float32, bfloat16 or float16, or
            `calibration` is not as above.
        ValueError: An argument is none of the above; the model is in training mode, on a device
            other than the CPU, quantized already; a weight is not finite; `strict` and something
            would be left; `max_kl` cannot be met (the error says what can, and why).
    """
    named = (weights, scale_kind, group_size, symmetric, activations, act_group)
    with adopted(model):
        _check_budget(max_kl, named == _UNNAMED, texts is not None or measurements is not None)
        check_model(model)
        batches = None if calibration is None else make_batches(calibration, tokenizer)
        formats = make_formats(
            weights, scale_kind, group_size, symmetric, activations, act_group, lm_head
        )
        work = plan_work(model, formats, include, exclude, fuse, strict)
        codes = Codes()
        found = None
        fixed = next((s.name for s in work.todo if foreign.is_foreign(s.module)), None)
        if fixed is not None and (batches is not None or max_kl is not None):
            raise ValueError(
                f"optimize: calibration and max_kl choose codes, and {fixed} has codes already; "
                "leave them out"
            )
        if max_kl is not None:
            pieces = pieces_of(_by_weight(work.alone), work.blocks)
            found = budget.choose(
                model, pieces, max_kl, texts, tokenizer, batches, measurements, progress
            )
            codes.formats, codes.packed = found.formats, found.packed
        elif activations is None and act_group is None and fixed is None:
            codes.formats = suited_formats(model, _layers(work), batches[0] if batches else None)
        if found is None and batches is not None:
            units = _units(work)
            total = sum(unit.size for unit in units)
            with progress_bar(total, progress, "calibrating") as advance:
                codes.packed = calibrate(model, units, batches, advance)
        with progress_bar(work.size, progress, "packing weights") as advance:
            carry_out(model, work, codes, advance)
    if fuse:
        use_own_attention(model)
        note_left(model, work.left)
    note_budget(model, None if found is None else found.budget)
    options = {
        "weights": weights,
        "scale_kind": scale_kind,
        "group_size": group_size,
        "symmetric": symmetric,
        "activations": activations or "int8",
        "act_group": act_group,
        "lm_head": lm_head,
        "include": include,
        "exclude": exclude,
        "fuse": fuse,
    }
    note_options(model, options)
    count = len(work.todo)
    _logger.info("optimize: packed %d layers, fused %d blocks", count, len(work.blocks))
    return model


@dataclass(frozen=True)
class Work:
    """What `optimize` is going to do to a model.

    Attributes:
        formats: As `make_formats` gives them.
        todo: What is packed, with what goes into blocks.
        alone: What of that is packed on its own.
        blocks: What is fused.
        left: Blocks that are not.
    """

    formats: Formats
    todo: list[Site]
    alone: list[Site]
    blocks: list[Block]
    left: dict[str, Left]

    @property
    def size(self) -> int:
        """The number of weights in `todo`, shared ones once."""
        return _count(self.todo)


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
    return Work(formats, todo, alone, plan.blocks, plan.left)


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
    memory.give_back()
    return replacements


def _check_budget(max_kl: Any, formats_are_unnamed: bool, others_are_named: bool) -> None:
    if max_kl is None:
        if others_are_named:
            raise ValueError("optimize: texts and measurements are for max_kl, which is not given")
        return
    if not (isinstance(max_kl, float | int) and 0 < max_kl < math.inf):
        raise ValueError(f"optimize: expected max_kl to be positive and finite, got {max_kl!r}")
    if not formats_are_unnamed:
        raise ValueError(
            "optimize: max_kl chooses the format of each layer: leave out weights, scale_kind, "
            "group_size, symmetric, activations and act_group, or max_kl"
        )


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

    def make(bits: int, scale_kind: str | None, group: int | None, symmetric: bool) -> _Format:
        kind, size = resolve_scales(bits, scale_kind, group, symmetric)
        if kind == "group" and size != -1 and size % 32 != 0:
            raise ValueError(f"optimize: expected group_size to be a multiple of 32, got {size}")
        return _Format(bits, kind, size, symmetric, act_group, activations)

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


def _weight(site: Site) -> Tensor:
    weight = site.module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _key(site: Site) -> tuple[object, ...]:
    weight = site.module.weight
    assert isinstance(weight, Tensor)
    return weight_key(weight)


def _check_dtype(site: Site) -> None:
    dtype = _weight(site).dtype
    if dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"optimize: expected weights of float32, bfloat16 or float16, got {dtype} in "
            f"{site.name}; convert the model (model.to(torch.float32)) or name the layer in exclude"
        )


def _count(todo: list[Site]) -> int:
    """The number of weights in `todo`, shared ones once."""
    return sum({_key(site): _weight(site).numel() for site in todo}.values())


def _by_weight(todo: list[Site]) -> list[list[Site]]:
    """The sites that share a weight, together."""
    groups: dict[tuple[object, ...], list[Site]] = {}
    for site in todo:
        groups.setdefault(_key(site), []).append(site)
    return list(groups.values())


def _units(work: Work) -> list[Unit]:
    """What is calibrated together: the layers of a fused weight, or those that share one."""
    units = []
    for first, *twins in _by_weight(work.alone):
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


def _layers(work: Work) -> list[Layers]:
    """What goes into one weight, for a look at its inputs."""
    found = []
    for sites in _by_weight(work.alone):
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


@dataclass
class Codes:
    """Weights that calibration has packed, and formats other than those of the work.

    Both by first module; none where neither was asked for.
    """

    packed: dict[nn.Module, Tensor] = field(default_factory=dict)
    formats: dict[nn.Module, _Format] = field(default_factory=dict)

    def quantize(self, module: nn.Module, how: _Format, weight: Tensor) -> QuantizedWeight:
        """The calibrated weight, which is given away, or the plainly rounded one."""
        found = self.packed.pop(module, None)
        return how.quantize(weight) if found is None else QuantizedWeight.unpack(found)


def _build(
    todo: list[Site],
    formats: Formats,
    codes: Codes,
    advance: Callable[[int], object],
) -> dict[nn.Module, PackedModule]:
    """The packed modules that take the places of those of `todo`; nothing is replaced yet."""
    replacements: dict[nn.Module, PackedModule] = {}
    for sites in _by_weight(todo):
        first, weight = sites[0], _weight(sites[0])
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
        advance(weight.numel())
    return replacements


def _pack(
    module: nn.Module, how: _Format, codes: Codes, weight: Tensor
) -> tuple[Tensor, Tensor | None, str]:
    """The packed weight of a module, the order of its inputs, and where its codes come from."""
    found = foreign.read([module])
    if found is None:
        return how.pack(codes.quantize(module, how, weight)), None, ""
    return how.pack(found.weight), found.perm, found.origin


def _build_blocks(
    blocks: list[Block], how: _Format | None, codes: Codes, advance: Callable[[int], object]
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
        advance(_count(list(block.sites)))
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
    link_runs(model)
    for module, kept in ties.items():
        vars(module).setdefault("_slmops_ties", getattr(module, "_tied_weights_keys", None))
        vars(module)["_tied_weights_keys"] = kept
    for parameter in model.parameters():
        parameter.requires_grad_(False)
