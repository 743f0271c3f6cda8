"""Trains examples/tiny_llama: a 7.3 M-parameter Llama on the Python sources installed with it.

    python examples/train_tiny_llama.py OUT [--steps 2120] [--seed 0] [--bf16]

Everything comes from this environment: the text is the Python standard library and the packages
of `PACKAGES` that are installed; the tokenizer is trained on the same text. Steps, seed, thread
count, torch version and source files fix the model. The shipped one took 42 minutes on 2 cores
with --bf16. OUT receives the model (bf16), the tokenizer and val_tokens.npy, held-out tokens.
"""

from __future__ import annotations

import argparse
import math
import random
import sysconfig
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGES = ("torch", "numpy", "sympy", "transformers", "huggingface_hub", "networkx", "jinja2")
# Tests, tables and machine-written code teach a model of this size little.
SKIP_STDLIB = (
    "/site-packages/", "/test/", "/tests/", "/idlelib/", "/lib2to3/", "/pydoc_data/", "/encodings/",
    "/turtledemo/", "_test",
)  # fmt: skip
SKIP_PACKAGES = ("/tests/", "/testing/_internal/", "generated", "_meta_registr")
MAX_FILE_BYTES = 200_000

VOCABULARY = 4096
END_OF_TEXT = "<|endoftext|>"  # token 0: ends every file
WINDOW = 256
HELD_OUT_WINDOWS = 64

Tokens = npt.NDArray[np.uint16]


def source_files(max_files: int | None, seed: int) -> tuple[list[Path], list[Path]]:
    """Returns the files to train on and, one in twenty (at least one), those to hold out."""
    paths = sysconfig.get_paths()
    files = [
        path
        for path in sorted(Path(paths["stdlib"]).rglob("*.py"))
        if not any(part in str(path) for part in SKIP_STDLIB)
    ]
    for package in PACKAGES:
        files += [
            path
            for path in sorted((Path(paths["purelib"]) / package).rglob("*.py"))
            if not any(part in str(path) for part in SKIP_PACKAGES)
            and path.stat().st_size < MAX_FILE_BYTES
        ]
    random.Random(seed).shuffle(files)
    files = files[:max_files]
    held_out = max(1, len(files) // 20)
    return files[held_out:], files[:held_out]


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


def build_model() -> LlamaForCausalLM:
    """Returns the untrained model."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def windows(tokens: Tokens, starts: npt.NDArray[np.int64], length: int) -> torch.Tensor:
    """Returns `tokens[start : start + length]` for every start, int64 [len(starts), length]."""
    picked = tokens[starts[:, None] + np.arange(length)]
    return torch.from_numpy(picked.astype(np.int64))


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Returns the mean cross-entropy in nats of predicting each next token of `batch`."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=batch[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def train(model: LlamaForCausalLM, tokens: Tokens, args: argparse.Namespace) -> None:
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
    model.train()
    progress = tqdm(range(steps), desc="train", unit="step")
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
    model.eval()


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, tokens: Tokens, bf16: bool) -> float:
    """Returns the mean loss over every eighth window of the held-out tokens."""
    starts = np.arange(0, len(tokens) - WINDOW, WINDOW * 8)
    batches = windows(tokens, starts, WINDOW + 1).split(16)
    losses = [loss_of(model, b, bf16).item() * len(b) for b in tqdm(batches, "evaluate")]
    return sum(losses) / len(starts)


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, held_out: Tokens, out: Path) -> None:
    """Writes model (bf16), tokenizer and `HELD_OUT_WINDOWS` evenly spaced held-out windows."""
    model.to(torch.bfloat16).save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    ).save_pretrained(out)
    starts = np.linspace(0, len(held_out) - WINDOW, HELD_OUT_WINDOWS).astype(np.int64)
    np.save(out / "val_tokens.npy", windows(held_out, starts, WINDOW).numpy())


def main(argv: list[str] | None = None) -> float:
    """Runs the command line; returns the held-out loss in nats per token."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--steps", type=int, default=2120, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=16, help="windows per step")
    parser.add_argument("--max-files", type=int, help="take no more source files than this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument(
        "--bf16",
        action="store_true",
        help="mixed precision: faster on a CPU with bf16 instructions, far slower on others",
    )
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    train_files, held_out_files = source_files(args.max_files, args.seed)
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in train_files]
    held_out_texts = [path.read_text(encoding="utf-8", errors="ignore") for path in held_out_files]
    tokenizer = train_tokenizer(texts)
    tokens, held_out = encode(tokenizer, texts), encode(tokenizer, held_out_texts)
    print(f"{len(train_files)} files, {len(tokens)} tokens; held out {len(held_out)} tokens")

    model = build_model()
    train(model, tokens, args)
    loss = held_out_loss(model, held_out, args.bf16)
    save(model, tokenizer, held_out, args.out)
    print(f"held-out loss {loss:.3f} nats per token; written to {args.out}")
    return loss


if __name__ == "__main__":
    main()
