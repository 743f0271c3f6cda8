"""Measures what each quantization format costs the model of examples/tiny_llama.

    python examples/accuracy.py [--windows 64] [--only TEXT] [--folder PATH]

Prints the table of docs/accuracy.md: for each set of `optimize` options the share of held-out
tokens for which the quantized model puts the same token first as the float32 one, the mean
divergence from it, each with its standard error over the windows, and the loss. The float32 model
is torch's, whose bits differ between CPUs, so on another one the last digits may differ.
"""

from __future__ import annotations

import argparse
import copy
import sysconfig
from pathlib import Path
from typing import Any

import torch
from quickstart import MODEL, agreement, held_out_logits, held_out_tokens, load_model
from train_tiny_llama import SKIP_STDLIB
from transformers import AutoTokenizer, PreTrainedModel

import torch_slmops

WINDOW = 256
FORMATS: dict[str, dict[str, Any]] = {
    "int4 sub16 (default)": {},
    "int4 sub16, float activations": {"activations": "float"},
    "int4 sub16, activations per 32": {"act_group": 32},
    "int4 sub16, activations per row": {"act_group": -1},
    "int4 sub16, int4 head": {"lm_head": "int4"},
    "int4 sub16, float head": {"lm_head": None},
    "int4 group 32": {"scale_kind": "group", "group_size": 32},
    "int4 group 32, zero points": {"group_size": 32, "symmetric": False},
    "int4 group 64": {"group_size": 64},
    "int4 group 128": {"group_size": 128},
    "int8 group 32 (default)": {"weights": "int8"},
    "int8 group 32, float activations": {"weights": "int8", "activations": "float"},
    "int8 per output": {"weights": "int8", "group_size": -1},
    "int8 per output, activations per row": {"weights": "int8", "group_size": -1, "act_group": -1},
}


CALIBRATED: dict[str, dict[str, Any]] = {
    "int4 sub16": {},
    "int4 sub16, int4 head": {"lm_head": "int4"},
    "int4 group 32": {"scale_kind": "group", "group_size": 32},
    "int4 group 32, zero points": {"group_size": 32, "symmetric": False},
    "int4 group 128": {"group_size": 128},
    "int8 group 32": {"weights": "int8"},
    "int8 per output": {"weights": "int8", "group_size": -1},
}
# The one file of the standard library that val_tokens.npy has a part of.
HELD_OUT = "tokenize.py"


def calibration_windows(count: int = 32) -> torch.Tensor:
    """Returns windows of `count` files, spread over the standard library; see `windows_of`."""
    paths = [
        path
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
        if path.name != HELD_OUT and not any(part in str(path) for part in SKIP_STDLIB)
    ]
    return _windows(paths[:: max(1, len(paths) // (2 * count))], count)


def windows_of(folder: Path, count: int) -> torch.Tensor:
    """Returns a window of 256 tokens from the middle of each of `count` Python files, int64."""
    windows = _windows(sorted(folder.rglob("*.py")), count)
    if len(windows) < count:
        raise ValueError(
            f"expected {count} Python files of {WINDOW} tokens or more in {folder}, "
            f"got {len(windows)}: name another folder or ask for fewer --windows"
        )
    return windows


def _windows(paths: list[Path], count: int) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    windows: list[list[int]] = []
    for path in paths:
        ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
        start = (len(ids) - WINDOW) // 2
        if start >= 0 and len(windows) < count:
            windows.append(ids[start : start + WINDOW])
    return torch.tensor(windows)


def megabytes(model: torch.nn.Module) -> float:
    """Returns the size of all parameters and buffers, shared ones counted once."""
    return torch_slmops.report(model).bytes_after / 1e6


def over_windows(reference: list[torch.Tensor], logits: list[torch.Tensor]) -> str:
    """Returns two cells, first choice and divergence: mean and standard error over the windows."""
    pairs = zip(torch.cat(reference).split(1), torch.cat(logits).split(1), strict=True)
    values = torch.tensor([agreement([expected], [got]) for expected, got in pairs])
    top1, kl = values.double().mean(0).tolist()
    top1_error, kl_error = (values.double().std(0) / len(values) ** 0.5).tolist()
    return f"{top1:.4f} ± {top1_error:.4f} | {kl * 1e3:.3f} ± {kl_error * 1e3:.3f}"


def mean_loss(logits: list[torch.Tensor], tokens: torch.Tensor) -> float:
    """Returns the mean cross-entropy of predicting each next token of every window, in nats."""
    predicted = torch.cat([batch[:, :-1] for batch in logits]).flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(predicted, tokens[:, 1:].flatten()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=64, help="held-out windows, 2 or more")
    parser.add_argument("--only", default="", help="only the formats whose name has this in it")
    parser.add_argument("--folder", type=Path, help="take windows from its Python files instead")
    args = parser.parse_args()

    if args.folder is None:
        tokens = held_out_tokens()[: args.windows]
    else:
        tokens = windows_of(args.folder, args.windows)
    original = load_model()
    reference = held_out_logits(original, tokens)
    print("| format | same first choice | KL, 10⁻³ nats per token | loss | MB |")
    print("|---|---|---|---|---|")

    def show(name: str, model: PreTrainedModel) -> None:
        logits = held_out_logits(model, tokens)
        cells = over_windows(reference, logits)
        print(f"| {name} | {cells} | {mean_loss(logits, tokens):.4f} | {megabytes(model):.2f} |")

    for name, options in FORMATS.items():
        if args.only in name:
            model = copy.deepcopy(original)
            show(name, torch_slmops.optimize(model, progress=False, **options))
    texts = calibration_windows().split(8)
    for name, options in CALIBRATED.items():
        if args.only in f"{name}, calibrated":
            model = torch_slmops.optimize(
                copy.deepcopy(original), calibration=texts, progress=False, **options
            )
            show(f"{name}, calibrated", model)
    bf16 = copy.deepcopy(original).to(torch.bfloat16)
    show("bfloat16, not quantized", bf16)
    show("bfloat16 model, int4 sub16", torch_slmops.optimize(bf16, progress=False))
    print(f"| float32 | 1 | 0 | {mean_loss(reference, tokens):.4f} | {megabytes(original):.2f} |")


if __name__ == "__main__":
    main()
