"""A budget of divergence instead of a format: the fewest bytes whose KL stays within it.

1. Each piece (what is packed together: q/k/v, gate/up, a tied head) is quantized alone, in each
   candidate format, and the KL of the model with it is measured on a few windows of the text.
2. Errors of different pieces are nearly independent, so their KLs nearly add up. The choice of one
   format per piece with the least bytes and a sum within the limit is a knapsack (`allocate`).
3. The chosen model is measured on all windows, and the limit of step 2 corrected by what was found
   there, until the KL of a choice is just within the budget.

Step 1 runs in the float model, with packed layers in the places of its own, step 3 in a finished
model, with its fused blocks, that is made for each choice: the KL that the report shows is that of
the model that `optimize` gives, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torch_slmops.allocate import allocate
from torch_slmops.calibrate import Batch
from torch_slmops.compare import Estimate, mean_of_chunks
from torch_slmops.formats import CANDIDATES, Candidate, Format
from torch_slmops.measurements import Measurements, fingerprint
from torch_slmops.pieces import Maker, Piece
from torch_slmops.progress import progress_bar
from torch_slmops.trial import Trials, divergence
from torch_slmops.windows import Texts, Window, batched, logits_of, make_windows

__all__ = ["Budget", "Choice", "Chosen", "choose"]

# A packed model from formats and calibrated weights, both by first module.
Finish: TypeAlias = Callable[[dict[nn.Module, Format], dict[nn.Module, Tensor]], nn.Module]

PROBE_WINDOW = 128
PROBES = 4  # windows that single pieces are measured on
WINDOW = 256
MOST_WINDOWS = 64  # that a choice is verified on
_ROUNDS = 6
_NEAR = 0.97  # of the budget: near enough to stop
_KEPT_LOGITS = 1 << 27  # of the reference, at most, instead of computing them in each round


@dataclass(frozen=True)
class Choice:
    """What was chosen for a piece: its name, format, bytes, and its KL when quantized alone."""

    name: str
    format: str
    bytes: int
    kl: float


@dataclass(frozen=True)
class Budget:
    """How a budget was spent: a part of the report.

    Attributes:
        max_kl: The budget, mean KL per token in nats.
        predicted: The sum of the pieces' KLs.
        measured: The KL of the whole, with its 95 % interval over windows.
        tokens: That it was measured on.
        choices: Per piece.
    """

    max_kl: float
    predicted: float
    measured: Estimate
    tokens: int
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Chosen:
    """Formats by first module, calibrated weights likewise, and what the report shows."""

    formats: dict[nn.Module, Format]
    packed: dict[nn.Module, Tensor]
    budget: Budget


def choose(
    model: nn.Module,
    pieces: list[Piece],
    max_kl: float,
    finish: Finish,
    texts: Texts,
    tokenizer: Any,
    batches: list[Batch] | None = None,
    measurements: Any = None,
    progress: bool = True,
) -> Chosen:
    """Finds formats for `pieces` whose mean KL is at most `max_kl`; `model` stays as it is.

    Args:
        model: A float model in eval mode.
        pieces: What to choose formats for.
        max_kl: The budget, in nats per token.
        finish: Makes what `optimize` would make of the model; the model stays as it is.
        texts: To measure on; see `windows.Texts`.
        tokenizer: For texts.
        batches: Calibration batches: the codes of all candidates are chosen for them.
        measurements: A path: measurements are kept there and taken from there.
        progress: Shows progress bars.

    Raises:
        ValueError: The budget cannot be met, or there is nothing to choose.
    """
    if not pieces:
        raise ValueError("optimize: max_kl: there is no layer to choose a format for")
    windows = make_windows(texts, tokenizer, WINDOW, MOST_WINDOWS)
    probe = make_windows(texts, tokenizer, PROBE_WINDOW, PROBES)
    maker = Maker()
    with torch.no_grad():
        if batches is not None:
            maker.calibrate(model, pieces, batches, progress)
        store = Measurements(measurements, fingerprint(model, pieces, probe, batches))
        options = _measure(model, pieces, probe, maker, store, progress)
        with progress_bar(0, progress, "verifying") as advance:
            reference = _Reference(model, windows)
            search = _Search(pieces, options, maker, reference, finish, advance)
            return search.run(max_kl)


@dataclass(frozen=True)
class _Option:
    """A format of a piece, measured."""

    candidate: Candidate
    name: str  # the packed format in words
    bytes: int
    kl: float

    @property
    def price(self) -> float:
        return self.bytes * self.candidate.price


def _measure(
    model: nn.Module,
    pieces: list[Piece],
    probe: list[Window],
    maker: Maker,
    store: Measurements,
    progress: bool,
) -> list[list[_Option]]:
    """Every piece in every candidate format."""
    watched = {module for piece in pieces for module in (*piece.layers, *piece.twins)}
    batches = [torch.stack([probe[i].ids for i in some]) for some in batched(probe, model)]
    trials: Trials | None = None
    options = []
    with progress_bar(len(pieces) * len(CANDIDATES), progress, "measuring layers") as advance:
        for piece in pieces:
            row = []
            for candidate in CANDIDATES:
                key = f"{piece.name} | {candidate.name}"
                known = store.get(key)
                if known is None:
                    if trials is None:
                        trials = Trials(model, batches, watched)
                    made = maker.make(piece, candidate.format)
                    kl = max(trials.kl(made.forwards), 0.0)  # rounding, where it is next to 0
                    known = store.put(key, (made.name, made.bytes, kl))
                row.append(_Option(candidate, *known))
                advance(1)
            options.append(row)
    return options


class _Reference:
    """The model's logits for all windows, kept if they are few, else computed each time."""

    def __init__(self, model: nn.Module, windows: list[Window]) -> None:
        self.model, self.windows = model, windows
        self.batches = list(batched(windows, model))
        self.tokens = sum(len(window.ids) for window in windows)
        self._kept: dict[int, Tensor] = {}
        self._room = _KEPT_LOGITS

    def kl(self, other: nn.Module) -> Estimate:
        """The mean KL to another model."""
        sums, counts = [], []
        for b, members in enumerate(self.batches):
            ids = torch.stack([self.windows[i].ids for i in members])
            reference = self._kept.get(b)
            if reference is None:
                reference = logits_of(self.model, ids)
                if reference.numel() <= self._room:
                    self._room -= reference.numel()
                    self._kept[b] = reference
            sums += divergence(reference, logits_of(other, ids))
            counts += [ids.shape[1]] * len(ids)
        return mean_of_chunks(sums, counts)


class _Search:
    """Step 3: choices, measured as a whole, until one is just within the budget."""

    def __init__(
        self,
        pieces: list[Piece],
        options: list[list[_Option]],
        maker: Maker,
        reference: _Reference,
        finish: Finish,
        advance: Callable[[int], object],
    ) -> None:
        self.pieces, self.options, self.maker = pieces, options, maker
        self.reference, self.finish, self.advance = reference, finish, advance
        self._measured: dict[tuple[int, ...], Estimate] = {}

    def run(self, max_kl: float) -> Chosen:
        costs = [[option.kl for option in row] for row in self.options]
        prices = [[option.price for option in row] for row in self.options]
        limit, low, high = max_kl, 0.0, float("inf")  # low was within the budget, high was not
        best: tuple[int, ...] | None = None
        for _ in range(_ROUNDS):
            found = allocate(costs, prices, limit)
            if found is None:
                break
            choice = tuple(found)
            kl = self.measure(choice).value
            within = kl <= max_kl
            if within and (best is None or self._price(choice) < self._price(best)):
                best = choice
            low, high = (limit, high) if within else (low, limit)
            if _NEAR * max_kl <= kl <= max_kl:
                break
            wanted = limit * max_kl / max(kl, 1e-3 * max_kl) * 0.99
            inside = low < wanted < high
            limit = wanted if inside else (low + high) / 2 if high < float("inf") else 2 * limit
            if high - low < 0.01 * low:
                break
        if best is None:
            best = self._most_accurate(max_kl)
        return self._chosen(best, max_kl)

    def measure(self, choice: tuple[int, ...]) -> Estimate:
        """The KL of the whole in these formats."""
        if choice not in self._measured:
            self._measured[choice] = self.reference.kl(self.finish(*self._codes(choice)))
            self.advance(1)
        return self._measured[choice]

    def _codes(
        self, choice: tuple[int, ...]
    ) -> tuple[dict[nn.Module, Format], dict[nn.Module, Tensor]]:
        """Formats, and weights that were calibrated for them, by first module."""
        rows = zip(self.pieces, self.options, choice, strict=True)
        formats = {piece.first: row[i].candidate.format for piece, row, i in rows}
        packed = {
            first: self.maker.packed[first, how.codes]
            for first, how in formats.items()
            if (first, how.codes) in self.maker.packed
        }
        return formats, packed

    def _price(self, choice: tuple[int, ...]) -> float:
        return sum(row[i].price for row, i in zip(self.options, choice, strict=True))

    def _most_accurate(self, max_kl: float) -> tuple[int, ...]:
        """The most accurate choice, if it is within the budget; or an error that says why not."""
        best = tuple(min(range(len(row)), key=lambda i: row[i].kl) for row in self.options)
        kl = self.measure(best)
        if kl.value <= max_kl:
            return best
        chosen = [
            (row[i].kl, piece.name, row[i].name)
            for piece, row, i in zip(self.pieces, self.options, best, strict=True)
        ]
        most = "".join(
            f"\n  {name}: {own:.3g} ({how})" for own, name, how in sorted(chosen, reverse=True)[:5]
        )
        raise ValueError(
            f"optimize: max_kl={max_kl:g} cannot be met: with the most accurate format of every "
            f"layer the mean KL is {kl.value:.3g} (95 % interval {kl.low:.3g} to {kl.high:.3g}, "
            f"{self.reference.tokens} tokens). Most of it comes from{most}\n"
            "Raise max_kl, or leave such layers as they are (exclude=, lm_head=None)."
        )

    def _chosen(self, choice: tuple[int, ...], max_kl: float) -> Chosen:
        rows = [row[i] for row, i in zip(self.options, choice, strict=True)]
        choices = tuple(
            Choice(piece.name, row.name, row.bytes, row.kl)
            for piece, row in zip(self.pieces, rows, strict=True)
        )
        predicted = sum(row.kl for row in rows)
        tokens = self.reference.tokens
        budget = Budget(max_kl, predicted, self.measure(choice), tokens, choices)
        return Chosen(*self._codes(choice), budget)
