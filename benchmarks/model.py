"""Times prefill and decode of a real-size model before and after `optimize`, interleaved."""

from __future__ import annotations

import copy
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import torch_slmops
from benchmarks.machine import cpu_name, probe
from benchmarks.shapes import ModelShape
from torch_slmops import memory

PROMPT, GENERATED, ROUNDS = 512, 32, 3


def random_llama(shape: ModelShape) -> LlamaForCausalLM:
    """A bf16 Llama of `shape` with random weights."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocab,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(previous)


@torch.inference_mode()
def measure(model: LlamaForCausalLM, prompt: torch.Tensor) -> tuple[float, float]:
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


def run(shape: ModelShape, output: Path, *, threads: int) -> None:
    """Prints rates of the float, int8 and int4 model; appends JSON lines to `output`."""
    torch.set_num_threads(threads)
    base = random_llama(shape)
    models = {"bf16 eager": base}
    seconds: dict[str, float] = {"bf16 eager": 0.0}
    for name, options in (
        ("int8", {"weights": "int8"}),
        ("int4", {"weights": "int4"}),
        ("int4, int4 head", {"weights": "int4", "lm_head": "int4"}),
    ):
        clone = copy.deepcopy(base)
        start = time.perf_counter()
        models[name] = torch_slmops.optimize(clone, **options)
        seconds[name] = time.perf_counter() - start
    prompt = torch.randint(3, shape.vocab, (1, PROMPT))
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            results[name].append(measure(model, prompt))
    limits = probe(memory.empty(512 << 20).zero_())
    table = Table(title=f"{shape.name}, random weights, {cpu_name()}, {torch_slmops.isa()}")
    for column in ("model", "optimize s", f"prefill {PROMPT} tok/s", "decode tok/s"):
        table.add_column(column, justify="right")
    table.add_column("prefill x", justify="right")
    table.add_column("decode x", justify="right")
    base_rates = [statistics.median(values) for values in zip(*results["bf16 eager"], strict=True)]
    for name, pairs in results.items():
        prefill, decode = (statistics.median(values) for values in zip(*pairs, strict=True))
        cells = [name, f"{seconds[name]:.1f}", f"{prefill:.1f}", f"{decode:.2f}"]
        table.add_row(*cells, f"{prefill / base_rates[0]:.2f}", f"{decode / base_rates[1]:.2f}")
        record = {"model": shape.name, "variant": name, "prefill": prefill, "decode": decode}
        record |= {"optimize_s": seconds[name], "limits": asdict(limits)}
        record |= {"isa": torch_slmops.isa(), "threads": threads}
        with output.open("a") as lines:
            lines.write(json.dumps(record) + "\n")
    table.caption = str(limits)
    Console(width=110).print(table)
