"""Trains a small language model from nothing on texts, with a tokenizer of its own.

For the scripts that train the models of this folder: each brings its texts and a model. A run that
was cut off goes on from its last checkpoint, and gives the bits of a run that was not.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"  # token 0: ends every text
WINDOW = 256
HELD_OUT_WINDOWS = 64
CALIBRATION_WINDOWS = 32

Tokens = npt.NDArray[np.uint16]


@dataclasses.dataclass(frozen=True)
class Texts:
    """What to train on, and what to hold out."""

    train: list[str]
    held_out: list[str]


def split(names: list[Any], most: int | None, seed: int) -> tuple[list[Any], list[Any]]:
    """Shuffles `names`, takes the first `most`, and holds out one in twenty, at least one.

    Returns:
        Those to train on, and those held out.
    """
    names = list(names)
    random.Random(seed).shuffle(names)
    names = names[:most]
    held_out = max(1, len(names) // 20)
    return names[held_out:], names[:held_out]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Returns a byte-level BPE tokenizer of up to `VOCABULARY` tokens learned from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tokens:
    """Returns the tokens of all texts in a row, each ended by token 0."""
    ids: list[int] = []
    for text in tqdm(texts, desc="tokenize", unit="file"):
        ids += [*tokenizer.encode(text).ids, 0]
    if len(ids) <= WINDOW + 1:
        raise ValueError(
            f"expected more than {WINDOW + 1} tokens of text, got {len(ids)}: use more files"
        )
    return np.array(ids, dtype=np.uint16)


def windows(tokens: Tokens, starts: npt.NDArray[np.int64], length: int) -> torch.Tensor:
    """Returns `tokens[start : start + length]` for every start, int64 [len(starts), length]."""
    picked = tokens[starts[:, None] + np.arange(length)]
    return torch.from_numpy(picked.astype(np.int64))


def evenly(tokens: Tokens, count: int) -> torch.Tensor:
    """Returns `count` windows spread evenly over `tokens`, int64 [count, WINDOW]."""
    return windows(tokens, np.linspace(0, len(tokens) - WINDOW, count).astype(np.int64), WINDOW)


def loss_of(model: PreTrainedModel, batch: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Returns the mean cross-entropy in nats of predicting each next token of `batch`."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=batch[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


class _Checkpoint:
    """A file with the state of a training run; it belongs to the settings that wrote it."""

    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        self.path, self.every = path, args.save_every
        self.settings = {
            name: getattr(args, name)
            for name in ("steps", "batch_size", "max_files", "seed", "threads", "bf16")
        }

    def load(self, model: Any, optimizer: Any, rng: np.random.Generator) -> int:
        """Puts the state back, if there is one; returns the number of steps done."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path)
        if state["settings"] != self.settings:
            raise ValueError(
                f"expected a checkpoint of {self.settings}, {self.path} has {state['settings']}: "
                "give the options it was begun with, or delete it"
            )
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rng.bit_generator.state = state["rng"]
        return int(state["step"])

    def save(self, step: int, model: Any, optimizer: Any, rng: np.random.Generator) -> None:
        """Writes the state after `step` steps, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        state = {
            "settings": self.settings,
            "step": step,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": rng.bit_generator.state,
        }
        torch.save(state, partial)
        partial.replace(self.path)


def train(model: PreTrainedModel, tokens: Tokens, args: argparse.Namespace) -> None:
    """Trains in place with AdamW on random windows: a short warm-up, then a cosine to a tenth."""
    steps, peak, warm_up = args.steps, 2e-3, max(1, min(100, args.steps // 10))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.95),
    )
    rng = np.random.default_rng(args.seed)
    checkpoint = _Checkpoint(args.out / "checkpoint.pt", args)
    done = checkpoint.load(model, optimizer, rng)
    model.train()
    progress = tqdm(range(done, steps), desc="train", unit="step", initial=done, total=steps)
    for step in progress:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        rate = peak * min(1.0, (step + 1) / warm_up) * (0.1 + 0.9 * cosine)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = rng.integers(0, len(tokens) - WINDOW, args.batch_size)
        loss = loss_of(model, windows(tokens, starts, WINDOW + 1), args.bf16)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", lr=f"{rate:.1e}")
        if (step + 1) % checkpoint.every == 0:
            checkpoint.save(step + 1, model, optimizer, rng)
    model.eval()


@torch.inference_mode()
def held_out_loss(model: PreTrainedModel, tokens: Tokens, bf16: bool) -> float:
    """Returns the mean loss over every eighth window of the held-out tokens."""
    starts = np.arange(0, len(tokens) - WINDOW, WINDOW * 8)
    batches = windows(tokens, starts, WINDOW + 1).split(16)
    losses = [loss_of(model, b, bf16).item() * len(b) for b in tqdm(batches, "evaluate")]
    return sum(losses) / len(starts)


def save(
    model: PreTrainedModel, tokenizer: Tokenizer, tokens: Tokens, held_out: Tokens, out: Path
) -> None:
    """Writes model (bf16), tokenizer, and evenly spaced windows of both kinds of tokens.

    Args:
        model: The trained model; it is left in bf16.
        tokenizer: Its tokenizer.
        tokens: Those it was trained on, to calibrate with: calibration_tokens.npy.
        held_out: Those held out, to evaluate on: val_tokens.npy.
        out: The folder.
    """
    model.to(torch.bfloat16).save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    ).save_pretrained(out)
    np.save(out / "val_tokens.npy", evenly(held_out, HELD_OUT_WINDOWS).numpy())
    np.save(out / "calibration_tokens.npy", evenly(tokens, CALIBRATION_WINDOWS).numpy())


def parser_of(description: str, *, steps: int) -> argparse.ArgumentParser:
    """Returns a parser with the options that all the scripts have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=steps, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=16, help="windows per step")
    parser.add_argument("--max-files", type=int, help="take no more files than this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument(
        "--save-every", type=int, default=50, help="steps between checkpoints, to go on from"
    )
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="mixed precision: faster on a CPU with bf16 instructions, far slower on others",
    )
    return parser


def run(args: argparse.Namespace, texts: Texts, build: Callable[[], PreTrainedModel]) -> float:
    """Trains tokenizer and model and writes them; returns the held-out loss in nats per token."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = train_tokenizer(texts.train)
    tokens, held_out = encode(tokenizer, texts.train), encode(tokenizer, texts.held_out)
    print(f"{len(texts.train)} files, {len(tokens)} tokens; held out {len(held_out)} tokens")
    model = build()
    train(model, tokens, args)
    loss = held_out_loss(model, held_out, args.bf16)
    save(model, tokenizer, tokens, held_out, args.out)
    (args.out / "checkpoint.pt").unlink(missing_ok=True)
    print(f"held-out loss {loss:.3f} nats per token; written to {args.out}")
    return loss
