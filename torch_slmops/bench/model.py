"""A model of real size with random weights, and how fast it reads a prompt and generates."""

from __future__ import annotations

import time
from typing import Any

import torch

from torch_slmops.bench.shapes import ModelShape

__all__ = ["GENERATED", "PROMPT", "measure", "random_model"]

PROMPT, GENERATED = 512, 32


def random_model(shape: ModelShape, positions: int = 16384) -> Any:
    """A bf16 model of `shape`, of its class in transformers, with random weights.

    Args:
        shape: Its dimensions.
        positions: `max_position_embeddings`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        shape.model_type,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **shape.options,
    )
    torch.manual_seed(0)
    auto: Any = AutoModelForCausalLM
    return auto.from_config(config, dtype=torch.bfloat16).eval()


@torch.inference_mode()
def measure(model: Any, prompt: torch.Tensor) -> tuple[float, float]:
    """Prompt tokens per second and generated tokens per second of one greedy `generate`."""
    start = time.perf_counter()
    model(prompt, use_cache=True, logits_to_keep=1)
    prefill = prompt.shape[1] / (time.perf_counter() - start)
    short = prompt[:, :8]
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    start = time.perf_counter()
    model.generate(short, max_new_tokens=1, **options)
    first = time.perf_counter() - start
    start = time.perf_counter()
    model.generate(short, max_new_tokens=1 + GENERATED, **options)
    return prefill, GENERATED / (time.perf_counter() - start - first)
