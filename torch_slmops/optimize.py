"""optimize: replaces the linear layers and embeddings of a model by packed ones, in place."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from torch_slmops import budget, foreign, memory
from torch_slmops.activation_check import suited_formats
from torch_slmops.adopt import adopted
from torch_slmops.attention import check_kv_cache, use_own_attention
from torch_slmops.calibrate import calibrate, make_batches
from torch_slmops.carry_out import Codes, carry_out
from torch_slmops.formats import Format
from torch_slmops.fuse import Left
from torch_slmops.notes import note_budget, note_left, note_options
from torch_slmops.pieces import pieces_of
from torch_slmops.plan import by_weight, layers_of, make_formats, plan_work, units_of
from torch_slmops.progress import progress_bar
from torch_slmops.survey import Patterns, check_model, listed, spelled
from torch_slmops.twin import twin
from torch_slmops.windows import Texts

__all__ = ["optimize"]

Model = TypeVar("Model", bound=nn.Module)

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
    kv_cache: Literal["int8"] | None = None,
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
        kv_cache: "int8" keeps the keys and values of fused attention as int8 with a scale per head
            and token, in half the memory of bf16: in `generate`, in every `DynamicCache`, and where
            there is no cache, for the same result. Layers with a sliding window keep their dtype,
            as do static caches and compiled calls.
            `torch_slmops.Cache(dtype="int8")` does it for models that are not fused.
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
    include, exclude = listed(include), listed(exclude)
    check_kv_cache(kv_cache)
    with adopted(model):
        _check_budget(max_kl, named == _UNNAMED, texts is not None or measurements is not None)
        check_model(model)
        batches = None if calibration is None else make_batches(calibration, tokenizer)
        formats = make_formats(
            weights, scale_kind, group_size, symmetric, activations, act_group, lm_head
        )
        arguments = (formats, include, exclude, fuse, strict)
        any_activations = activations is None and act_group is None
        budgeted = None if max_kl is None else (max_kl, texts, tokenizer, measurements)
        done = _pack_and_swap(model, arguments, batches, any_activations, budgeted, progress)
    memory.give_back()
    if fuse:
        use_own_attention(model)
        note_left(model, done.left)
    note_budget(model, done.budget)
    options = {
        "weights": weights,
        "scale_kind": scale_kind,
        "group_size": group_size,
        "symmetric": symmetric,
        "activations": activations or "int8",
        "act_group": act_group,
        "lm_head": lm_head,
        "include": spelled(include, done.names),
        "exclude": spelled(exclude, done.names),
        "fuse": fuse,
        "kv_cache": kv_cache,
    }
    note_options(model, options)
    _logger.info("optimize: packed %d layers, fused %d blocks", done.layers, done.blocks)
    return model


@dataclass(frozen=True)
class _Done:
    """What is known of the work after the weights that it took are freed."""

    names: tuple[str, ...]
    left: dict[str, Left]
    layers: int
    blocks: int
    budget: budget.Budget | None


def _pack_and_swap(
    model: nn.Module,
    arguments: tuple[Any, ...],
    batches: list[Any] | None,
    any_activations: bool,
    budgeted: tuple[Any, ...] | None,
    progress: bool,
) -> _Done:
    """Chooses formats and codes, and carries the work out.

    Args:
        arguments: Those of `plan_work`.
        batches: Of calibration.
        any_activations: Whether layers whose inputs int8 does not suit may get others.
        budgeted: max_kl, texts, tokenizer and measurements, where a budget is asked for.
    """
    work = plan_work(model, *arguments)
    codes = Codes()
    found = None
    fixed = next((s.name for s in work.todo if foreign.is_foreign(s.module)), None)
    if fixed is not None and (batches is not None or budgeted is not None):
        raise ValueError(
            f"optimize: calibration and max_kl choose codes, and {fixed} has codes already; "
            "leave them out"
        )
    if budgeted is not None:
        max_kl, texts, tokenizer, measurements = budgeted
        pieces = pieces_of(by_weight(work.alone), work.blocks)
        finish = partial(_finished, model, arguments)
        found = budget.choose(
            model, pieces, max_kl, finish, texts, tokenizer, batches, measurements, progress
        )
        codes.formats, codes.packed = found.formats, found.packed
    elif any_activations and fixed is None:
        codes.formats = suited_formats(model, layers_of(work), batches[0] if batches else None)
    if found is None and batches is not None:
        units = units_of(work)
        total = sum(unit.size for unit in units)
        with progress_bar(total, progress, "calibrating") as advance:
            codes.packed = calibrate(model, units, batches, advance)
    with progress_bar(work.size, progress, "packing weights") as advance:
        carry_out(model, work, codes, advance)
    spent = None if found is None else found.budget
    return _Done(work.names, work.left, len(work.todo), len(work.blocks), spent)


def _finished(
    model: nn.Module,
    arguments: tuple[Any, ...],
    formats: dict[nn.Module, Format],
    packed: dict[nn.Module, Tensor],
) -> nn.Module:
    """What `optimize` makes of a model with these formats; the model stays as it is.

    `arguments`: those of `plan_work`.
    """
    made, others = twin(model)
    work = plan_work(made, *arguments)
    codes = Codes(
        {others[module]: weight for module, weight in packed.items()},
        {others[module]: how for module, how in formats.items()},
    )
    carry_out(made, work, codes, lambda count: None)
    use_own_attention(made)
    return made


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
