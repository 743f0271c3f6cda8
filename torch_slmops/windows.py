"""Texts as windows of tokens, and what a model says about them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

__all__ = ["Texts", "Window", "batched", "logits_of", "make_windows", "sample_texts"]

# None: the built-in texts; a path of one file; texts; windows of token ids, int64 [C, T].
Texts: TypeAlias = str | os.PathLike[str] | Iterable[str] | Tensor | None

_SAMPLE = Path(__file__).with_name("sample_texts.txt")
_SEPARATOR = "\n%%\n"
_BATCH = 8  # windows of a forward, at most
_BATCH_LOGITS = 1 << 25  # of a forward, at most, unless one window has more: 128 MB in float32
_VOCABULARY = 1 << 15  # where the config does not tell


@dataclass(frozen=True)
class Window:
    """Some tokens of one text.

    Attributes:
        text: Which text, counted from 0.
        start: The first token's place in it.
        ids: int64 [T].
    """

    text: int
    start: int
    ids: Tensor


def sample_texts() -> list[str]:
    """Returns the built-in texts: a few kinds of prose, dialogue, tables and source code."""
    return _SAMPLE.read_text(encoding="utf-8").split(_SEPARATOR)


def make_windows(
    texts: Texts, tokenizer: Any, size: int, most: int | None = None, min_size: int = 2
) -> list[Window]:
    """Cuts texts into windows of `size` tokens; the last of a text may be shorter.

    Args:
        texts: See `Texts`. A str is the path of a file, texts come in a list.
        tokenizer: The model's, for all but token ids.
        size: Tokens of a window.
        most: Windows to take, spread over all of them; None: all.
        min_size: Shorter windows are left out.

    Raises:
        TypeError: `texts` is none of what is described there, or there is no tokenizer for them.
        ValueError: No window is left, or `size` or `most` is no positive number.
        OSError: The file cannot be read.
    """
    if size < min_size or (most is not None and most < 1):
        raise ValueError(f"texts: expected window >= {min_size} and max_windows >= 1 (or None)")
    windows = [
        Window(i, start, ids[start : start + size])
        for i, ids in enumerate(_token_ids(texts, tokenizer))
        for start in range(0, len(ids) - min_size + 1, size)
    ]
    if not windows:
        raise ValueError(f"texts: expected a text of at least {min_size} tokens, got none")
    count = len(windows) if most is None else min(len(windows), most)
    return [windows[i * len(windows) // count] for i in range(count)]


def _token_ids(texts: Texts, tokenizer: Any) -> list[Tensor]:
    if isinstance(texts, Tensor):
        if texts.dim() != 2 or texts.is_floating_point():
            raise TypeError(f"texts: expected token ids [C, T], got {texts.dtype} {texts.shape}")
        return list(texts.long())
    if texts is None:
        texts = sample_texts()
    elif isinstance(texts, str | os.PathLike):
        texts = [Path(texts).read_text(encoding="utf-8")]
    if not isinstance(texts, Iterable):
        raise TypeError(f"texts: expected texts or a path, got a {type(texts).__name__}")
    listed = list(texts)
    wrong = [text for text in listed if not isinstance(text, str)]
    if wrong:
        raise TypeError(f"texts: expected every text to be a str, got a {type(wrong[0]).__name__}")
    if tokenizer is None:
        raise TypeError("texts: they need tokenizer=, the tokenizer of the model")
    return [torch.tensor(tokenizer(text, verbose=False)["input_ids"]).long() for text in listed]


def batched(windows: list[Window], model: nn.Module) -> Iterator[list[int]]:
    """Groups windows of equal length, by index, for forwards of bounded size."""
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or _VOCABULARY
    by_length: dict[int, list[int]] = {}
    for i, window in enumerate(windows):
        by_length.setdefault(len(window.ids), []).append(i)
    for length, members in by_length.items():
        size = min(_BATCH, max(1, _BATCH_LOGITS // (length * vocabulary)))
        for start in range(0, len(members), size):
            yield members[start : start + size]


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Returns the logits of a causal language model, float32 [B, T, V], for ids [B, T].

    Raises:
        TypeError: The model gives none.
    """
    options: dict[str, Any] = {}
    if "use_cache" in inspect.signature(model.forward).parameters:
        options["use_cache"] = False
    output = model(input_ids=ids, **options) if hasattr(model, "config") else model(ids)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape or logits.dim() != 3:
        raise TypeError(
            f"expected a causal language model, whose output has logits [B, T, V], got a "
            f"{type(model).__name__} that gives a {type(output).__name__}"
        )
    return logits.float()
