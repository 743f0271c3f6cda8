"""One reply of a model, as it comes, with its speed; for `generate` and `chat`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch_slmops.cli.screen import USAGE, UserError

__all__ = ["Reply", "add_reply_options", "encode", "reply"]


@dataclass(frozen=True)
class Reply:
    """What was generated; times count from the call.

    Attributes:
        text: Without special tokens.
        tokens: Prompt and reply, int64 [1, L].
        prompt_tokens: How many tokens the prompt has.
        cached_tokens: How many of them a cache already had.
        first_seconds: Until the first new token.
        seconds: Until the last one.
    """

    text: str
    tokens: Any
    prompt_tokens: int
    cached_tokens: int
    first_seconds: float
    seconds: float

    @property
    def new_tokens(self) -> int:
        return int(self.tokens.shape[1]) - self.prompt_tokens

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second."""
        return (self.prompt_tokens - self.cached_tokens) / max(self.first_seconds, 1e-9)

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first one; None for a reply of one token."""
        if self.new_tokens < 2:
            return None
        return (self.new_tokens - 1) / max(self.seconds - self.first_seconds, 1e-9)

    def summary(self) -> str:
        rate = "" if self.rate is None else f" at {self.rate:.1f} tokens/s"
        prompt = f"{self.prompt_tokens} prompt tokens at {self.prompt_rate:.0f} tokens/s"
        return f"{prompt}, {self.new_tokens} new tokens{rate}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "new_tokens": self.new_tokens,
            "first_token_seconds": self.first_seconds,
            "seconds": self.seconds,
            "prompt_tokens_per_second": self.prompt_rate,
            "tokens_per_second": self.rate,
        }


def add_reply_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says how to generate."""
    group = parser.add_argument_group("generation")
    group.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    group.add_argument(
        "--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token"
    )
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--top-k", type=int, default=0, metavar="N", help="0: all")
    group.add_argument("--seed", type=int, help="of sampling")
    group.add_argument("--system", metavar="TEXT", help="system message of the chat template")


def check_reply_options(args: argparse.Namespace) -> None:
    """Raises a UserError for values that make no sense."""
    for name, wrong, expected in (
        ("max-new-tokens", args.max_new_tokens < 1, "at least 1"),
        ("temperature", args.temperature < 0, "0 or more"),
        ("top-p", not 0 < args.top_p <= 1, "more than 0 and at most 1"),
        ("top-k", args.top_k < 0, "0 or more"),
    ):
        if wrong:
            value = getattr(args, name.replace("-", "_"))
            raise UserError(f"--{name}: expected {expected}, got {value}", USAGE)


def check_generates(model: Any, name: str) -> None:
    """Raises a UserError for a model that is not for generating text."""
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise UserError(f"{name}: {type(model).__name__} does not generate text")


def encode(tokenizer: Any, messages: list[dict[str, str]]) -> Any:
    """The tokens of a conversation by the chat template, int64 [1, L]."""
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def reply(
    model: Any,
    tokenizer: Any,
    ids: Any,
    args: argparse.Namespace,
    emit: Callable[[str], None],
    cache: Any = None,
    cached_tokens: int = 0,
) -> Reply:
    """Generates a reply to the tokens `ids`, int64 [1, L], and emits its text as it comes.

    `cache` has the keys and values of the first `cached_tokens` tokens, and grows.
    """
    import torch
    from transformers import TextStreamer

    times: list[float] = []
    parts: list[str] = []

    class Streamer(TextStreamer):
        def put(self, value: Any) -> None:
            times.append(time.perf_counter())  # the first is the prompt's
            super().put(value)  # type: ignore[no-untyped-call]

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            parts.append(text)
            emit(text)

    if args.seed is not None:
        torch.manual_seed(args.seed)
    options = _sampling(args) | ({} if cache is None else {"past_key_values": cache})
    start = time.perf_counter()
    tokens = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.max_new_tokens,
        pad_token_id=_pad_token(model, tokenizer),
        streamer=Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **options,
    )
    first, last = times[min(1, len(times) - 1)] - start, times[-1] - start
    return Reply("".join(parts), tokens, ids.shape[1], cached_tokens, first, last)


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    if args.temperature == 0:  # None: what the model's own settings have would be warned about
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {
        "do_sample": True,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
    }


def _pad_token(model: Any, tokenizer: Any) -> int:
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    return 0
