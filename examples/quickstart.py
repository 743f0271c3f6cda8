"""Completes Python code with a small Llama before and after `torch_slmops.optimize`, and compares.

    python examples/quickstart.py [--windows 64] [--new-tokens 32]

The model in examples/tiny_llama runs in float32, then with its linear layers, embedding and head
in int8 and in int4. How well those agree with float32 is measured on held-out tokens
(tiny_llama/val_tokens.npy: 64 windows of 256 tokens, from files that were not trained on).
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

import torch_slmops

MODEL = Path(__file__).parent / "tiny_llama"
PROMPTS = (
    "def __eq__(self, other):",
    "    if not isinstance(x, torch.Tensor):\n        raise",
    "import torch\nimport torch.nn as nn\n\nclass",
)
WINDOWS_PER_BATCH = 8


def load_model() -> PreTrainedModel:
    """Returns examples/tiny_llama in float32, ready for inference."""
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def held_out_tokens() -> torch.Tensor:
    """Returns the held-out tokens, int64 [64, 256]."""
    return torch.from_numpy(np.load(MODEL / "val_tokens.npy"))


@torch.inference_mode()
def held_out_logits(model: PreTrainedModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Returns the model's logits for every token, float32 [up to 8, 256, vocabulary] per batch."""
    return [model(input_ids=batch).logits.float() for batch in tokens.split(WINDOWS_PER_BATCH)]


def agreement(reference: list[torch.Tensor], logits: list[torch.Tensor]) -> tuple[float, float]:
    """Returns how well `logits` agree with `reference`, both as `held_out_logits` gives them.

    Returns:
        The share of tokens where both put the same token first, and the mean over tokens of the
        divergence KL(reference || other) = sum p_ref (log p_ref - log p), in nats.
    """
    same, divergence, count = 0, 0.0, 0
    for expected, got in zip(reference, logits, strict=True):
        same += int((expected.argmax(-1) == got.argmax(-1)).sum())
        log_ref, log_p = expected.log_softmax(-1), got.log_softmax(-1)
        divergence += float((log_ref.exp() * (log_ref - log_p)).sum(dtype=torch.float64))
        count += expected.shape[0] * expected.shape[1]
    return same / count, divergence / count


def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new_tokens: int
) -> tuple[list[str], float]:
    """Returns a greedy completion of each prompt and the generated tokens per second."""
    model.generate(torch.tensor([[0]]), max_new_tokens=4, do_sample=False)  # warm up
    texts, generated, seconds = [], 0, 0.0
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        start = time.perf_counter()
        output = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        seconds += time.perf_counter() - start
        generated += output.shape[1] - inputs["input_ids"].shape[1]
        texts.append(tokenizer.decode(output[0]))
    return texts, generated / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=64, help="held-out windows to compare on")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to add to each prompt")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokens = held_out_tokens()[: args.windows]
    original = load_model()
    reference = held_out_logits(original, tokens)
    print(f"ISA row {torch_slmops.isa()} (of {', '.join(torch_slmops.isas())})")
    for name in ("float32", "int8", "int4"):
        model = original
        if name != "float32":
            model = torch_slmops.optimize(copy.deepcopy(original), weights=name)
        texts, speed = complete(model, tokenizer, args.new_tokens)
        megabytes = torch_slmops.report(model).bytes_after / 1e6
        print(f"\n=== {name}: {megabytes:.2f} MB, {speed:.0f} tokens/s")
        if model is not original:
            top1, kl = agreement(reference, held_out_logits(model, tokens))
            print(f"    on {tokens.numel()} held-out tokens, against float32: ", end="")
            print(f"same first choice {top1:.4f}, KL {kl:.5f} nats per token")
        for text in texts:
            print("-" * 60, text, sep="\n")
    print("\n", torch_slmops.report(model), sep="")


if __name__ == "__main__":
    main()
