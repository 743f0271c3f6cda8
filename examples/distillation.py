"""Trains a model to predict what another one predicts: for distill_qat and compress_small."""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import numpy as np
import torch
from accuracy import HELD_OUT
from quickstart import MODEL
from torch import Tensor
from tqdm import tqdm
from train_tiny_llama import MAX_FILE_BYTES, SKIP_STDLIB
from training import WINDOW, Tokens, windows
from transformers import AutoTokenizer, PreTrainedModel

_WARM_UP = 0.05  # the share of all steps


def training_tokens(max_files: int | None = None) -> Tokens:
    """Returns the tokens of the standard library, less the file that val_tokens.npy has a part of.

    Every file ends with token 0. `max_files` takes the first ones only.
    """
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    paths = [
        path
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
        if path.name != HELD_OUT
        and not any(part in str(path) for part in SKIP_STDLIB)
        and path.stat().st_size < MAX_FILE_BYTES
    ]
    ids: list[int] = []
    for path in tqdm(paths[:max_files], desc="tokenize", unit="file"):
        text = path.read_text(encoding="utf-8", errors="ignore")
        ids += [*tokenizer(text, verbose=False)["input_ids"], 0]
    return np.array(ids, dtype=np.uint16)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Returns the mean over tokens of KL(teacher || student), both logits [..., vocabulary]."""
    expected, got = (logits.flatten(0, -2).log_softmax(-1) for logits in (teacher, student))
    return torch.nn.functional.kl_div(got, expected, reduction="batchmean", log_target=True)


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokens: Tokens,
    *,
    steps: int,
    batch_size: int,
    rate: float,
    seed: int = 0,
) -> list[float]:
    """Trains in place the parameters of `student` that require a gradient.

    AdamW on random windows of `tokens`, with the divergence from the teacher as loss; the rate
    rises over the first twentieth of the steps and falls to zero by a cosine.

    Returns:
        The loss of every step, in nats per token.
    """
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    rng = np.random.default_rng(seed)
    losses: list[float] = []
    progress = tqdm(range(steps), desc="distill", unit="step")
    for step in progress:
        rise = min(1.0, (step + 1) / max(1.0, _WARM_UP * steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * rise * 0.5 * (1 + math.cos(math.pi * step / steps))
        starts = rng.integers(0, len(tokens) - WINDOW, batch_size)
        batch = windows(tokens, starts, WINDOW)
        with torch.no_grad():
            expected = teacher(input_ids=batch, use_cache=False).logits
        loss = divergence(expected, student(input_ids=batch, use_cache=False).logits)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(loss.item())
        progress.set_postfix(kl=f"{losses[-1]:.5f}")
    return losses
