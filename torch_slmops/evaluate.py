"""evaluate: what a quantized model predicts, beside the model that it was made from."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops.compare import Estimate, Tokens, compare, cross_entropy, mean_of_chunks
from torch_slmops.layer_noise import LayerNoise, Noise
from torch_slmops.modules import PackedModule
from torch_slmops.progress import progress_bar
from torch_slmops.survey import find_sites
from torch_slmops.windows import Texts, Window, batched, logits_of, make_windows

__all__ = ["Evaluation", "WorstToken", "bits_per_weight", "evaluate"]

WINDOW = 256
_CONTEXT = 16  # tokens shown before a bad one
_NOISE_TOKENS = (
    2048  # that the layers' noise is measured on: the sums are over thousands of outputs
)
_LAYERS_SHOWN = 8


@dataclass(frozen=True)
class WorstToken:
    """A place where the model differs most from the reference.

    Attributes:
        chunk: The chunk, counted from 0.
        position: The place in it of the last token of `context`.
        kl: KL(reference || model) of what follows, in nats.
        context: The tokens before, as text, or as ids without a tokenizer.
        actual: What follows in the text, or None at the end of the chunk.
        reference_choice: The reference's first choice.
        choice: The model's.
        reference_p: What the reference gives its own first choice.
        p: What the model gives that.
    """

    chunk: int
    position: int
    kl: float
    context: str
    actual: str | None
    reference_choice: str
    choice: str
    reference_p: float
    p: float


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; `str()` is a table. All but the first five need a reference.

    KL is KL(reference || model) per token in nats. Agreement is a share of all tokens.

    Attributes:
        chunks: Windows of text.
        tokens: In all of them.
        perplexity: Of the model on the tokens after the first of every window.
        bytes: Of the model's parameters and buffers.
        bits_per_weight: Of its weight matrices, scales included.
        reference_perplexity: Of the reference.
        kl_mean: The mean.
        kl_median: The median.
        kl_99: The 99 % quantile: one token in a hundred is worse.
        top1: How often both put the same token first.
        top5: The share of the reference's first five that are among the model's, in any order.
        worst: The tokens of the largest KL.
        layers: Per layer the signal-to-noise ratio of its output on the reference's activations,
            the noisiest first.
    """

    chunks: int
    tokens: int
    perplexity: Estimate
    bytes: int
    bits_per_weight: float
    reference_perplexity: Estimate | None = None
    kl_mean: Estimate | None = None
    kl_median: float | None = None
    kl_99: float | None = None
    top1: Estimate | None = None
    top5: Estimate | None = None
    worst: tuple[WorstToken, ...] = ()
    layers: tuple[LayerNoise, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the figures as plain numbers, strings, lists and dicts; infinities as None."""
        plain: dict[str, Any] = _finite(dataclasses.asdict(self))
        return plain

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the figures as JSON."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def __str__(self) -> str:
        rows = [("", "value", "95 % interval")]

        def add(name: str, value: Estimate | float | None) -> None:
            if isinstance(value, Estimate):
                rows.append((name, f"{value.value:.5g}", f"{value.low:.5g} .. {value.high:.5g}"))
            elif value is not None:
                rows.append((name, f"{value:.5g}", ""))

        add("perplexity", self.perplexity)
        add("perplexity of the reference", self.reference_perplexity)
        add("KL, mean", self.kl_mean)
        add("KL, median", self.kl_median)
        add("KL, 99 %", self.kl_99)
        add("same first choice", self.top1)
        add("shared first five", self.top5)
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            f"{self.tokens} tokens in {self.chunks} chunks; {self.bytes / 1e6:.2f} MB, "
            f"{self.bits_per_weight:.2f} bits per weight",
            "",
        ]
        lines += [f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows]
        if self.layers:
            lines += ["", "noisiest layers (signal to noise of the output, dB)"]
            lines += [
                f"  {r.snr_db:5.1f}  {r.name}  ({r.format})" for r in self.layers[:_LAYERS_SHOWN]
            ]
        if self.worst:
            lines += ["", "worst tokens"]
            lines += [_told(token) for token in self.worst]
        return "\n".join(lines)


def _told(t: WorstToken) -> str:
    actual = "the end" if t.actual is None else repr(t.actual)
    return (
        f"  KL {t.kl:.3f}  ...{t.context!r} -> {t.reference_choice!r} ({t.reference_p:.2f}), "
        f"now {t.choice!r} ({t.p:.2f} for the former); in the text: {actual}"
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def evaluate(
    model: nn.Module,
    reference: nn.Module | None = None,
    *,
    texts: Texts = None,
    tokenizer: Any = None,
    window: int = WINDOW,
    max_windows: int | None = None,
    worst: int = 10,
    layers: bool = True,
    progress: bool = True,
) -> Evaluation:
    """Measures a causal language model on texts, alone and against a reference.

    Both models run on the same windows of the texts, one batch at a time; the logits of one batch
    are in memory. Intervals are over windows, whose tokens depend on each other.

    Args:
        model: The model, in eval mode; such as one that `optimize` has packed.
        reference: What it stands for, such as a copy of it from before. Both have one vocabulary.
        texts: A list of texts, the path of a text file, or token ids, int64 [C, T]; by default a
            few built-in texts (English, German, French, Python, C, JSON; some 3000 tokens), which
            serve to compare formats and are too few to tell small differences.
        tokenizer: The model's, for all but token ids.
        window: Tokens of a window.
        max_windows: Windows to take, spread over all texts; by default all.
        worst: Tokens to show, those with the largest KL.
        layers: Measures the noise of each layer.
        progress: Shows a progress bar where it takes more than a second.

    Raises:
        TypeError: A model is none, or gives no logits; `texts` is not as above, or has no
            tokenizer.
        ValueError: A model is in training mode, both are the same, or their vocabularies differ; no
            text has two tokens; an argument is out of range.
        OSError: The file of texts cannot be read.
    """
    for which in (model,) if reference is None else (model, reference):
        if not isinstance(which, nn.Module):
            raise TypeError(f"evaluate: expected an nn.Module, got a {type(which).__name__}")
        if any(module.training for module in which.modules()):
            raise ValueError("evaluate: a model is in training mode: call .eval() first")
    if model is reference:
        raise ValueError(
            "evaluate: model and reference are one object (optimize works in place): compare with "
            "a copy.deepcopy of the model made before, or with one loaded again"
        )
    if worst < 0:
        raise ValueError(f"evaluate: expected worst >= 0, got {worst}")
    windows = make_windows(texts, tokenizer, window, max_windows)
    noise = Noise(model, reference) if layers and reference is not None else None
    found = _Collected(windows, worst)
    total = sum(len(w.ids) for w in windows)
    with torch.no_grad(), progress_bar(total, progress, "evaluating") as advance:
        seen = 0
        for members in batched(windows, model):
            ids = torch.stack([windows[i].ids for i in members])
            expected = None
            if reference is not None:
                listen = noise is not None and seen < _NOISE_TOKENS
                with noise.listening() if noise is not None and listen else nullcontext():
                    expected = logits_of(reference, ids)
            found.add(members, expected, logits_of(model, ids))
            seen += ids.numel()
            advance(ids.numel())
    return found.result(model, tokenizer, () if noise is None else noise.result())


class _Collected:
    """What is known of each window so far."""

    def __init__(self, windows: list[Window], worst: int) -> None:
        self.windows = windows
        self.most = worst
        self.loss: dict[int, float] = {}
        self.reference_loss: dict[int, float] = {}
        self.kl: dict[int, Tensor] = {}
        self.same: dict[int, int] = {}
        self.shared: dict[int, float] = {}
        self.worst: list[tuple[float, int, int, int, int, float, float]] = []

    def add(self, members: list[int], reference: Tensor | None, logits: Tensor) -> None:
        """Takes the logits of a batch, [B, T, V] each."""
        if reference is not None and reference.shape != logits.shape:
            raise ValueError(
                f"evaluate: the models have vocabularies of {reference.shape[-1]} and "
                f"{logits.shape[-1]} tokens and cannot be compared"
            )
        for row, i in enumerate(members):
            ids = self.windows[i].ids
            self.loss[i] = float(cross_entropy(logits[row], ids).sum())
            if reference is None:
                continue
            self.reference_loss[i] = float(cross_entropy(reference[row], ids).sum())
            tokens = compare(reference[row], logits[row])
            self.kl[i] = tokens.kl
            self.same[i] = int((tokens.choice == tokens.reference_choice).sum())
            self.shared[i] = float(tokens.shared.sum()) / min(5, logits.shape[-1])
            self._keep_worst(i, tokens)

    def _keep_worst(self, i: int, t: Tokens) -> None:
        values, places = t.kl.topk(min(self.most, len(t.kl)))
        for kl, at in zip(values.tolist(), places.tolist(), strict=True):
            choices = int(t.reference_choice[at]), int(t.choice[at])
            found = (kl, i, at, *choices, float(t.reference_p[at]), float(t.p[at]))
            self.worst.append(found)
        self.worst = sorted(self.worst, key=lambda found: (-found[0], *found[1:3]))[: self.most]

    def result(
        self, model: nn.Module, tokenizer: Any, layers: tuple[LayerNoise, ...]
    ) -> Evaluation:
        order = range(len(self.windows))
        lengths = [len(window.ids) for window in self.windows]

        def mean(sums: dict[int, Any], less: int = 0) -> Estimate:
            return mean_of_chunks([sums[i] for i in order], [n - less for n in lengths])

        loss = mean(self.loss, 1)
        made = Evaluation(
            len(lengths), sum(lengths), _exp(loss), _bytes(model), bits_per_weight(model)
        )
        if not self.kl:
            return made
        kl = torch.cat([self.kl[i] for i in order])
        quantiles = torch.quantile(kl, torch.tensor([0.5, 0.99], dtype=kl.dtype)).tolist()
        sums = {i: float(values.sum()) for i, values in self.kl.items()}
        return dataclasses.replace(
            made,
            reference_perplexity=_exp(mean(self.reference_loss, 1)),
            kl_mean=mean(sums),
            kl_median=quantiles[0],
            kl_99=quantiles[1],
            top1=mean(self.same),
            top5=mean(self.shared),
            worst=tuple(self._worst_token(found, tokenizer) for found in self.worst),
            layers=layers,
        )

    def _worst_token(
        self, found: tuple[float, int, int, int, int, float, float], tokenizer: Any
    ) -> WorstToken:
        kl, chunk, at, reference_choice, choice, reference_p, p = found
        ids = self.windows[chunk].ids.tolist()

        def text(*tokens: int) -> str:
            if tokenizer is None:
                return " ".join(str(token) for token in tokens)
            return str(tokenizer.decode(list(tokens)))

        return WorstToken(
            chunk,
            at,
            kl,
            text(*ids[max(0, at + 1 - _CONTEXT) : at + 1]),
            text(ids[at + 1]) if at + 1 < len(ids) else None,
            text(reference_choice),
            text(choice),
            reference_p,
            p,
        )


def _exp(loss: Estimate) -> Estimate:
    # exp of an interval without end (one chunk) is 0..inf; a hopeless model's may overflow too.
    low, value, high = (
        math.exp(x) if x < 700 else math.inf for x in (loss.low, loss.value, loss.high)
    )
    return Estimate(value, low, high)


def _bytes(model: nn.Module) -> int:
    """Of all parameters and buffers, shared memory once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors}.values())


def bits_per_weight(model: nn.Module) -> float:
    """Returns the bits of the weight matrices per weight, scales included, shared ones once."""
    bits, weights = 0, 0
    seen: set[int] = set()
    for site in find_sites(model):
        module = site.module
        if isinstance(module, PackedModule):
            stored = [(module.packed, math.prod(module.weight.shape))]
        else:
            matrices = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
            stored = [(p, p.numel()) for p in matrices]
        for tensor, count in stored:
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                bits += 8 * tensor.numel() * tensor.element_size()
                weights += count
    return bits / max(weights, 1)
