"""Calibration: the codes of a model's linear layers, chosen for the inputs that they really get.

One pass goes through the float model block by block. It keeps the state of every batch between two
blocks, and the second moments H = E[x x^T] of the inputs of one block's layers at a time. Layers
outside the blocks, and models without a plain chain of blocks, are watched in whole forwards, as
many layers at a time as memory allows. The model gets hooks, which go again; nothing else changes.

The inputs are those of the float model. Inputs from layers that are quantized already, as GPTQ's
authors take them, cost a second forward and gave no smaller divergence (docs/accuracy.md).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torch_slmops.chain import Chain, block_lists
from torch_slmops.feedback import Factor, factorize, feed_back
from torch_slmops.weights import QuantizedWeight

__all__ = ["Batch", "Unit", "calibrate", "make_batches"]

# Arguments of one forward call: the first positional one, or all by name.
Batch: TypeAlias = Tensor | Mapping[str, Any]
# Quantizes a unit by the moments of its inputs; None: it was not called.
Finish: TypeAlias = Callable[["Unit", "_Moments | None"], None]

WINDOW = 256
MOST_WINDOWS = 128
_WINDOWS_PER_BATCH = 8
_WHOLE_MODEL_BYTES = 1 << 30  # of second moments at a time, where there are no blocks
_logger = logging.getLogger("torch_slmops")


@dataclass(frozen=True, eq=False)
class Unit:
    """Linear layers that go into one packed weight, and how that is made.

    Attributes:
        name: Of its first layer.
        layers: Their rows are stacked; they get the same input.
        twins: Others that have the same weight as a unit's only layer (a tied head).
        quantize: Gives scales for a float weight [N, K] and an importance [K].
        pack: Packs such a weight.
    """

    name: str
    layers: tuple[nn.Module, ...]
    twins: tuple[nn.Module, ...]
    quantize: Callable[[Tensor, Tensor], QuantizedWeight]
    pack: Callable[[QuantizedWeight], Tensor]

    def weight(self) -> Tensor:
        """The float weight, [N, K]."""
        weights = [layer._parameters["weight"] for layer in self.layers]
        detached = [weight.detach() for weight in weights if weight is not None]
        return detached[0] if len(detached) == 1 else torch.cat(detached)

    @property
    def size(self) -> int:
        """The number of weights."""
        weights = [layer._parameters["weight"] for layer in self.layers]
        return sum(weight.numel() for weight in weights if weight is not None)

    def watched(self) -> list[nn.Module]:
        """The layers whose inputs count."""
        return [m for m in (self.layers[0], *self.twins) if isinstance(m, nn.Linear)]


def make_batches(calibration: Any, tokenizer: Any) -> list[Batch]:
    """Returns what `optimize(calibration=..., tokenizer=...)` was given as batches; see there.

    Raises:
        TypeError: `calibration` is none of what is described there, or text without a tokenizer.
        ValueError: It is empty.
    """
    if isinstance(calibration, Tensor | Mapping | str):
        calibration = [calibration]
    if not isinstance(calibration, Iterable):
        raise TypeError(
            "calibration: expected batches (tensors or dicts of tensors) or texts, "
            f"got a {type(calibration).__name__}"
        )
    items = list(calibration)
    if not items:
        raise ValueError("calibration: expected at least one batch or text, got none")
    if all(isinstance(item, str) for item in items):
        if tokenizer is None:
            raise TypeError("calibration: texts need tokenizer=, the tokenizer of the model")
        return _batches_of_texts(items, tokenizer)
    for item in items:
        if not isinstance(item, Tensor | Mapping):
            raise TypeError(
                "calibration: expected every batch to be a tensor or a dict of tensors, or all to "
                f"be texts, got a {type(item).__name__}"
            )
    return items


def _batches_of_texts(texts: list[str], tokenizer: Any) -> list[Batch]:
    """Windows of tokens, those of equal length together, so that nothing has to be padded."""
    windows: list[list[int]] = []
    for text in texts:
        ids = list(tokenizer(text, verbose=False)["input_ids"])
        whole = len(ids) // WINDOW * WINDOW  # the rest of a long text would be a batch of its own
        windows += [ids[i : i + WINDOW] for i in range(0, whole or len(ids), WINDOW)]
    if not windows:
        raise ValueError("calibration: expected texts of at least one token, got none")
    count = min(len(windows), MOST_WINDOWS)
    chosen = [windows[i * len(windows) // count] for i in range(count)]
    by_length: dict[int, list[list[int]]] = {}
    for window in chosen:
        by_length.setdefault(len(window), []).append(window)
    batches = [torch.tensor(same) for same in by_length.values()]
    return [part for batch in batches for part in torch.split(batch, _WINDOWS_PER_BATCH)]


def calibrate(
    model: nn.Module,
    units: Sequence[Unit],
    batches: Sequence[Batch],
    advance: Callable[[int], object],
) -> dict[nn.Module, Tensor]:
    """Chooses the codes of `units` by error feedback on the inputs that `batches` give them.

    Args:
        model: A float model in eval mode; it is the same before and after, after an exception too.
        units: What to quantize; each has layers to watch.
        batches: What to call the model with.
        advance: Told the number of weights of every unit that is done.

    Returns:
        The packed weight of each unit, rows in natural order, by its first layer. Units whose
        layers were never called are not among them.

    Raises:
        ValueError: No unit's layer was called, or activations are not finite.
    """
    done: dict[nn.Module, Tensor] = {}

    def finish(unit: Unit, moments: _Moments | None) -> None:
        if moments is not None:
            done[unit.layers[0]] = unit.pack(_choose(unit, moments))
        advance(unit.size)

    with torch.no_grad():
        _calibrate(model, units, batches, finish)
    unseen = [unit.name for unit in units if unit.layers[0] not in done]
    if units and not done:
        raise ValueError(
            "calibration: none of the layers to quantize was called with a calibration batch; is "
            "it one that this model computes with?"
        )
    if unseen:
        names = ", ".join(unseen)
        _logger.warning("calibration: never called, so rounded without feedback: %s", names)
    return done


def _calibrate(
    model: nn.Module, units: Sequence[Unit], batches: Sequence[Batch], finish: Finish
) -> None:
    chains = [Chain(blocks) for blocks in block_lists(model)]
    placed = {chain: _placed(chain, units) for chain in chains}
    chains = [chain for chain in chains if placed[chain]]
    inside = {unit for chain in chains for unit in placed[chain]}
    first, *portions = _portions([unit for unit in units if unit not in inside])
    _watch_model(model, first, batches, chains, finish)
    for chain in chains:
        if chain.broken is None:
            _stream(chain, placed[chain], batches, finish)
        else:
            _logger.info("calibration: whole forwards for blocks that %s", chain.broken)
            portions += _portions(list(placed[chain]))
    for portion in portions:
        _watch_model(model, portion, batches, [], finish)


def _choose(unit: Unit, moments: _Moments) -> QuantizedWeight:
    weight = unit.weight()
    try:
        mean_square, factor = moments.result()
        start = unit.quantize(weight, mean_square)
    except ValueError as error:
        raise ValueError(f"optimize: {unit.name}: {error}") from error
    return feed_back(weight, start, factor)


class _Moments:
    """The second moments of what layers with the same input got."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0
        self._result: tuple[Tensor, Factor] | None = None

    def add(self, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        if self._sum is None:
            self._sum = rows.new_zeros(x.shape[-1], x.shape[-1])
        self._sum.addmm_(rows.t(), rows)
        self._count += len(rows)

    def result(self) -> tuple[Tensor, Factor]:
        """E[x^2], float32 [K], and the factor of H; the sums are given up for it."""
        if self._result is None:
            assert self._sum is not None
            hessian, self._sum = self._sum.div_(max(self._count, 1)), None
            self._result = hessian.diagonal().clone(), factorize(hessian)
        return self._result


class _Watch:
    """While entered, collects the moments of what the layers of units get.

    Attributes:
        moments: By unit; units called one after the other with the same tensor share them.
        seen: Units called since this set was last cleared.
        mask: bool [...], which positions of the inputs count; None: all.
    """

    def __init__(self, units: Iterable[Unit]) -> None:
        self.units = tuple(units)
        self.moments: dict[Unit, _Moments] = {}
        self.seen: set[Unit] = set()
        self.mask: Tensor | None = None
        self._last: tuple[Tensor | None, _Moments] = (None, _Moments())
        self._handles: list[Any] = []

    def __enter__(self) -> _Watch:
        for unit in self.units:
            for module in unit.watched():
                hook = partial(self._see, unit)
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._last = (None, _Moments())

    def _see(
        self, unit: Unit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        self.seen.add(unit)
        if x is self._last[0]:
            shared = self.moments.setdefault(unit, self._last[1])
            if shared is self._last[1]:
                return
        moments = self.moments.setdefault(unit, _Moments())
        self._last = (x, moments)
        if self.mask is not None and x.shape[:-1] == self.mask.shape:
            x = x[self.mask]
        moments.add(x)


def _placed(chain: Chain, units: Iterable[Unit]) -> dict[Unit, int]:
    """The units that lie in one block of the chain, and which."""
    where = {module: i for i, block in enumerate(chain.blocks) for module in block.modules()}
    places = {unit: {where.get(module) for module in (*unit.layers, *unit.twins)} for unit in units}
    return {
        unit: i for unit, at in places.items() if len(at) == 1 and (i := next(iter(at))) is not None
    }


def _portions(units: list[Unit]) -> list[list[Unit]]:
    """`units` in lists, at least one, whose moments fit in memory together."""
    portions: list[list[Unit]] = [[]]
    size = 0
    for unit in units:
        own = 4 * _inputs(unit) ** 2
        if portions[-1] and size + own > _WHOLE_MODEL_BYTES:
            portions.append([])
            size = 0
        portions[-1].append(unit)
        size += own
    return portions


class _Stop(Exception):
    """Raised in a hook: a forward has shown all that was wanted of it."""


def _watch_model(
    model: nn.Module,
    units: Sequence[Unit],
    batches: Sequence[Batch],
    chains: Sequence[Chain],
    finish: Finish,
) -> None:
    """Quantizes `units` by what they get in whole forwards, in which `chains` are recorded."""
    head = _head(model)

    with _Watch(units) as watch, ExitStack() as stack:

        def stop(module: nn.Module, args: object) -> None:
            if len(watch.seen) == len(units) and all(chain.complete for chain in chains):
                raise _Stop

        for chain in chains:
            stack.enter_context(chain.recorded())
        if head is not None:  # Its output is large, and nothing needs it.
            stack.callback(head.register_forward_pre_hook(stop).remove)
        for batch in batches:
            watch.mask = _mask(batch)
            watch.seen.clear()
            for chain in chains:
                chain.begin()
            with suppress(_Stop):
                _call(model, batch)
            for chain in chains:
                if not chain.complete:
                    chain.broken = "are not all called"
    for unit in units:
        finish(unit, watch.moments.pop(unit, None))


def _stream(
    chain: Chain, placed: Mapping[Unit, int], batches: Sequence[Batch], finish: Finish
) -> None:
    """Quantizes the units of a chain block by block."""
    for i in range(len(chain.blocks)):
        with _Watch(unit for unit, at in placed.items() if at == i) as watch:
            for b, batch in enumerate(batches):
                watch.mask = _mask(batch)
                chain.advance(i, b)
        for unit in watch.units:
            finish(unit, watch.moments.pop(unit, None))


def _call(model: nn.Module, batch: Batch) -> None:
    options = {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    if isinstance(batch, Tensor):
        model(batch, **options)
    else:
        model(**{**options, **batch})


def _mask(batch: Batch) -> Tensor | None:
    """Which tokens are no padding, bool [B, T]."""
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _head(model: nn.Module) -> nn.Module | None:
    """The layer that gives the logits of transformers' models."""
    get = getattr(model, "get_output_embeddings", None)
    try:
        head = None if get is None else get()
    except (AttributeError, NotImplementedError):
        return None
    return head if isinstance(head, nn.Module) else None


def _inputs(unit: Unit) -> int:
    weight = unit.layers[0]._parameters["weight"]
    assert weight is not None
    return weight.shape[1]
