"""Gets back accuracy that int4 costs, by training with the rounded weights and activations.

    python examples/distill_qat.py [--steps 150] [--save FOLDER]

The student is examples/tiny_llama with torchao's QATConfig and the quantizers of `torch_slmops.qat`
in its linear layers: its forward computes with the very int4 weights and int8 activations that
`optimize` will give it. It learns to predict what the float32 model predicts, on the source files
of the standard library. The divergence from the float32 model is measured on held-out tokens, for
the model as `optimize` quantizes it, with calibration, and after training.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from accuracy import calibration_windows
from distillation import distill, training_tokens
from quickstart import MODEL, held_out_tokens, load_model
from torch import nn
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from transformers import AutoTokenizer, PreTrainedModel

import torch_slmops
from torch_slmops.qat import use_own_quantizers


def in_a_block(module: nn.Module, name: str) -> bool:
    """Whether a module is a linear layer other than the head."""
    return isinstance(module, nn.Linear) and "lm_head" not in name


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy to train: rounded weights and activations, embedding and head frozen."""
    student = copy.deepcopy(model)
    config = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True)
    quantize_(student, QATConfig(weight_config=config), in_a_block)
    use_own_quantizers(student)
    student.get_input_embeddings().weight.requires_grad_(False)  # the head has the same weight
    return student


def finish(student: PreTrainedModel) -> PreTrainedModel:
    """Returns a trained student with ordinary layers again, in place; `optimize` takes it."""
    quantize_(student, QATConfig(step="convert"))
    return student.eval()  # torchao's new layers are in training mode


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Runs the command line; returns the mean KL in nats per token by row of the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of 256 tokens per step")
    parser.add_argument("--rate", type=float, default=5e-5, help="the largest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-files", type=int, help="train on no more files than this")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows, 1 to 64")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--save", type=Path, help="folder for the trained float32 model")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    teacher = load_model()
    tokens = training_tokens(args.max_files)
    held_out = held_out_tokens()[: args.windows]
    found: dict[str, float] = {}

    def show(name: str, model: PreTrainedModel) -> None:
        result = torch_slmops.evaluate(model, teacher, texts=held_out, layers=False, progress=False)
        assert result.kl_mean is not None and result.top1 is not None
        found[name] = result.kl_mean.value
        print(f"{name:22} KL {result.kl_mean.value * 1e3:.3f}e-3, ", end="")
        print(f"same first choice {result.top1.value:.4f}, {result.bytes / 1e6:.2f} MB")

    show("int4", torch_slmops.optimize(copy.deepcopy(teacher), progress=False))
    calibrated = torch_slmops.optimize(
        copy.deepcopy(teacher), calibration=calibration_windows().split(8), progress=False
    )
    show("int4, calibrated", calibrated)

    student = prepare(teacher)
    start = time.perf_counter()
    distill(
        student,
        teacher,
        tokens,
        steps=args.steps,
        batch_size=args.batch_size,
        rate=args.rate,
        seed=args.seed,
    )
    minutes = (time.perf_counter() - start) / 60
    finish(student)
    if args.save is not None:
        student.save_pretrained(args.save)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(args.save)
    show("int4, trained", torch_slmops.optimize(student, progress=False))
    closed = 1 - found["int4, trained"] / found["int4"]
    print(f"{args.steps} steps in {minutes:.1f} minutes took {closed:.0%} of the divergence away")
    return found


if __name__ == "__main__":
    main()
