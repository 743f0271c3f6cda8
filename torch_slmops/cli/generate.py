"""generate: a model's continuation of, or answer to, one prompt."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from torch_slmops.cli import models, replies
from torch_slmops.cli.screen import OK, USAGE, Screen, UserError

__all__ = ["add"]


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "generate",
        parents=[common],
        help="print what a model makes of a prompt, as it comes",
        description="The text goes to stdout, the speed to stderr. A model with a chat template "
        "gets the prompt as a user's message.",
    )
    models.add_model_options(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="text, or - to read it from stdin")
    replies.add_reply_options(parser)
    parser.add_argument("--raw", action="store_true", help="no chat template")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, screen: Screen) -> int:
    replies.check_reply_options(args)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    if not prompt.strip():
        raise UserError("generate: expected a prompt, got no text", USAGE)
    loaded = models.load(args, screen)
    replies.check_generates(loaded.model, args.model)
    ids = _encode(loaded, prompt, args)
    if ids.shape[1] == 0:
        raise UserError("generate: the tokenizer makes no token of this prompt")
    found = replies.reply(loaded.model, loaded.tokenizer, ids, args, screen.write)
    screen.write("\n")
    screen.note(found.summary())
    screen.result(
        {"model": args.model, "prompt": prompt} | found.as_dict() | {"load_seconds": loaded.seconds}
    )
    return OK


def _encode(loaded: models.Loaded, prompt: str, args: argparse.Namespace) -> Any:
    if args.raw or not loaded.tokenizer.chat_template:
        if args.system is not None:
            raise UserError("--system: there is no chat template for it here", USAGE)
        return loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return replies.encode(loaded.tokenizer, [*system, {"role": "user", "content": prompt}])
