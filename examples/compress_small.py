"""Makes a smaller model out of examples/tiny_llama, and shows what that gains and costs.

    python examples/compress_small.py [--layers 4] [--mlp 768] [--steps 200] [--save FOLDER]

The student keeps some layers of the float32 model, evenly spaced, and of each MLP the hidden units
with the largest weights; it then learns to predict what the float32 model predicts, on the source
files of the standard library. Size, speed and divergence from the float32 model, on held-out
tokens, are shown for both, in float32 and as `optimize` quantizes them.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import NamedTuple

import torch
from distillation import distill, training_tokens
from quickstart import MODEL, complete, held_out_tokens, load_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import torch_slmops


class Row(NamedTuple):
    """A row of the table."""

    name: str
    megabytes: float
    tokens_per_second: float
    top1: float
    kl: float

    def __str__(self) -> str:
        return (
            f"| {self.name} | {self.megabytes:.2f} | {self.tokens_per_second:.0f} "
            f"| {self.top1:.4f} | {self.kl:.4f} |"
        )


def shrink(teacher: PreTrainedModel, layers: int, hidden: int) -> PreTrainedModel:
    """Returns a model of `layers` layers and `hidden` units per MLP with weights of `teacher`.

    Raises:
        ValueError: The teacher has fewer layers or units, or less than two layers are asked for.
    """
    most, widest = teacher.config.num_hidden_layers, teacher.config.intermediate_size
    if not 2 <= layers <= most or not 1 <= hidden <= widest:
        raise ValueError(
            f"expected 2 to {most} layers and 1 to {widest} hidden units, got {layers} and {hidden}"
        )
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers, config.intermediate_size = layers, hidden
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    kept = [round(i * (most - 1) / (layers - 1)) for i in range(layers)]
    weights = student.state_dict()
    for name, value in teacher.state_dict().items():
        parts = name.split(".")
        if parts[1] != "layers":
            weights[name].copy_(value)
        elif int(parts[2]) in kept:
            parts[2] = str(kept.index(int(parts[2])))
            if "mlp" in parts:
                units = strongest_units(teacher.model.layers[int(name.split(".")[2])].mlp, hidden)
                value = value.index_select(1 if "down_proj" in parts else 0, units)
            weights[".".join(parts)].copy_(value)
    return student


def strongest_units(mlp: torch.nn.Module, count: int) -> Tensor:
    """Returns the hidden units of a gated MLP whose weights have the largest product of norms."""
    strength = mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1)
    strength = strength * mlp.down_proj.weight.norm(dim=0)
    return strength.topk(count).indices.sort().values


def main(argv: list[str] | None = None) -> list[Row]:
    """Runs the command line; returns the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="layers of the student, 2 or more")
    parser.add_argument("--mlp", type=int, default=768, help="hidden units of its MLPs")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of 256 tokens per step")
    parser.add_argument("--rate", type=float, default=1e-3, help="the largest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-files", type=int, help="train on no more files than this")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows, 1 to 64")
    parser.add_argument(
        "--new-tokens", type=int, default=32, help="tokens per prompt for the speed"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--save", type=Path, help="folder for the student, float32")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    teacher = load_model()
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    held_out = held_out_tokens()[: args.windows]
    student = shrink(teacher, args.layers, args.mlp)
    start = time.perf_counter()
    distill(
        student,
        teacher,
        training_tokens(args.max_files),
        steps=args.steps,
        batch_size=args.batch_size,
        rate=args.rate,
        seed=args.seed,
    )
    print(f"{args.steps} steps took {(time.perf_counter() - start) / 60:.1f} minutes\n")
    if args.save is not None:
        student.save_pretrained(args.save)
        tokenizer.save_pretrained(args.save)

    print(
        "| model | MB | tokens/s | same first choice | KL, nats per token |\n|---|---|---|---|---|"
    )
    rows = []
    for name, original in (("teacher", teacher), ("student", student)):
        for kind in ("float32", "int8", "int4"):
            model = copy.deepcopy(original)
            if kind != "float32":
                torch_slmops.optimize(model, weights=kind, progress=False)
            _, speed = complete(model, tokenizer, args.new_tokens)
            found = torch_slmops.evaluate(
                model, teacher, texts=held_out, layers=False, progress=False
            )
            assert found.top1 is not None and found.kl_mean is not None
            top1, kl = found.top1.value, found.kl_mean.value
            rows.append(Row(f"{name}, {kind}", found.bytes / 1e6, speed, top1, kl))
            print(rows[-1])
    return rows


if __name__ == "__main__":
    main()
