"""chat: a conversation with a model, line by line."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from torch_slmops.cli import models, replies
from torch_slmops.cli.screen import OK, Screen, UserError

__all__ = ["add"]

_HELP = "/reset begins a new conversation, /exit or Ctrl-D ends, Ctrl-C stops a reply"


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "chat",
        parents=[common],
        help="talk with a model that has a chat template",
        description=f"Each line is a message; {_HELP}. With --json each reply is one line of JSON.",
    )
    models.add_model_options(parser)
    replies.add_reply_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, screen: Screen) -> int:
    replies.check_reply_options(args)
    loaded = models.load(args, screen)
    replies.check_generates(loaded.model, args.model)
    if not loaded.tokenizer.chat_template:
        raise UserError(f"{args.model} has no chat template; try the command generate")
    talk = Conversation(loaded, args)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - input() edits lines and keeps a history with it
        screen.note(_HELP)
    while True:
        line = _read_line()
        if line is None or line == "/exit":
            return OK
        if line == "/reset":
            talk = Conversation(loaded, args)
        elif line.startswith("/"):
            screen.note(_HELP)
        elif line:
            _answer(talk, line, screen)


def _read_line() -> str | None:
    """The next line, without blanks around it; None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _answer(talk: Conversation, line: str, screen: Screen) -> None:
    try:
        found = talk.say(line, screen.write)
    except KeyboardInterrupt:
        screen.write("\n")
        screen.note("stopped; the message and the reply are forgotten")
        return
    screen.write("\n")
    screen.note(found.summary())
    screen.result(found.as_dict(), indent=None)


class Conversation:
    """Messages, and the cache of their keys and values where the next prompt continues them."""

    def __init__(self, loaded: models.Loaded, args: argparse.Namespace) -> None:
        self._loaded = loaded
        self._args = args
        system = args.system
        self._messages = [] if system is None else [{"role": "system", "content": system}]
        self._cache: Any = None
        self._cached: Any = None  # the tokens in it, int64 [1, L]

    def say(self, text: str, emit: Any) -> replies.Reply:
        """Answers a message; after an exception the conversation is as it was before."""
        from transformers import DynamicCache

        messages = [*self._messages, {"role": "user", "content": text}]
        ids = replies.encode(self._loaded.tokenizer, messages)
        model = self._loaded.model
        cache, count = self._cache, self._continued(ids)
        self._cache = self._cached = None  # an interrupted reply leaves it in any state
        if count == 0:
            cache = DynamicCache(config=model.config)
        found = replies.reply(model, self._loaded.tokenizer, ids, self._args, emit, cache, count)
        self._messages = [*messages, {"role": "assistant", "content": found.text}]
        self._cache, self._cached = cache, found.tokens[:, : cache.get_seq_length()]
        return found

    def _continued(self, ids: Any) -> int:
        """How many tokens the cache has, if the prompt `ids` begins with them; else 0."""
        import torch

        if self._cached is None:
            return 0
        count = int(self._cached.shape[1])
        begins = count < ids.shape[1] and torch.equal(ids[:, :count], self._cached)
        return count if begins else 0
