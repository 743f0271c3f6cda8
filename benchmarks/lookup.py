"""Prompt-lookup decoding beside plain decoding, on a text that is written again with edits.

The model has the shape and the work of a real one, but what it writes is made: its layers add
nothing to the embedding, and its head's rows are the embedding's in another order, so each token
has one successor. The prompt is a text of the model whose every `EDIT`-th token is another one.
The model writes that text without the edits: lookup proposes what the prompt has, and is right up
to the next edit, as when code is changed at places.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import torch_slmops
from benchmarks.machine import probe
from torch_slmops import memory
from torch_slmops.bench.model import random_model
from torch_slmops.bench.shapes import ModelShape

EDIT, TEXT, NEW, ROUNDS = 12, 256, 96, 3
PROPOSED = (0, 3, 7, 10, 15)


def model_with_successors(shape: ModelShape) -> tuple[Any, torch.Tensor]:
    """A packed model, and the token that it writes after each token."""
    model = random_model(replace(shape, tied=False))
    order = torch.randperm(shape.vocab, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight[order] = model.model.embed_tokens.weight.clone()
    torch_slmops.optimize(model, lm_head="int4", progress=False)
    return model, order


def edited_text(successors: torch.Tensor, edit: int) -> torch.Tensor:
    """[1, TEXT + 1] ids: a text whose every `edit`-th token is another, then its first token."""
    draw = torch.Generator().manual_seed(2)
    ids = [int(torch.randint(len(successors), (), generator=draw))]
    while len(ids) < TEXT:
        ids.append(int(successors[ids[-1]]))
    first = ids[0]
    for i in range(edit, TEXT, edit):
        ids[i] = int(torch.randint(len(successors), (), generator=draw))
    return torch.tensor([[*ids, first]])


@torch.inference_mode()
def generate(model: Any, ids: torch.Tensor, new: int, proposed: int) -> torch.Tensor:
    """The `new` tokens after `ids`, with so many tokens of the prompt proposed per pass."""
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    if proposed:
        options["prompt_lookup_num_tokens"] = proposed
    out: torch.Tensor = model.generate(ids, max_new_tokens=new, **options)
    return out[:, ids.shape[1] :]


def run(shape: ModelShape, output: Path, *, threads: int) -> None:
    """Prints rates for each number of proposed tokens; appends JSON lines to `output`."""
    torch.set_num_threads(threads)
    model, successors = model_with_successors(shape)
    ids = edited_text(successors, EDIT)
    plain = generate(model, ids, NEW, 0)
    for proposed in PROPOSED[1:]:
        if not torch.equal(generate(model, ids, NEW, proposed), plain):
            raise RuntimeError(f"lookup of {proposed} gives other tokens; not timed")
    buffer = memory.empty(256 << 20).zero_()
    rates: dict[int, list[float]] = {proposed: [] for proposed in PROPOSED}
    for number in range(1, ROUNDS + 1):
        for proposed in PROPOSED:
            limits, start = probe(buffer), time.perf_counter()
            generate(model, ids, 1, proposed)
            first = time.perf_counter()
            generate(model, ids, NEW, proposed)
            seconds = time.perf_counter() - first - (first - start)
            rates[proposed].append((NEW - 1) / seconds)
            record = {"lookup": proposed, "model": shape.name, "edit": EDIT, "round": number}
            record |= {"rate": rates[proposed][-1], "limits": asdict(limits), "threads": threads}
            with output.open("a") as lines:
                lines.write(json.dumps(record | {"isa": torch_slmops.isa()}) + "\n")
    table = Table(title=f"{shape.name}, a text written again, every {EDIT}th token edited")
    for column in ("tokens proposed", "tokens/s", "x plain"):
        table.add_column(column, justify="right")
    for proposed, values in rates.items():
        times = [a / b for a, b in zip(values, rates[0], strict=True)]
        spread = f"{statistics.median(times):.2f} [{min(times):.2f}-{max(times):.2f}]"
        table.add_row(str(proposed), f"{statistics.median(values):.1f}", spread)
    Console(width=110).print(table)
