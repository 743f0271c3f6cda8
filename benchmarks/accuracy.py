"""What every format costs in accuracy: `python -m benchmarks.accuracy [section ...]`.

Each row is a format of the same trained model, compared by `torch_slmops.evaluate` with float32
on the model's held-out tokens (`val_tokens.npy` beside it, else the built-in texts); the interval
of the divergence is the 95 % one. Sections: weights, head, activations, gguf, budget, massive.
`gguf` needs the package of that name: llama.cpp's Q4_0 and Q8_0 as its numpy code quantizes them,
dequantized, and evaluated here with float activations.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import torch_slmops
from torch_slmops.evaluate import Evaluation
from torch_slmops.plot import plot_kl

MODEL = Path(__file__).parents[1] / "examples" / "tiny_llama"
WEIGHTS: dict[str, dict[str, Any]] = {
    "int4 sub16": {},
    "int4 group 32": {"scale_kind": "group"},
    "int4 group 64": {"group_size": 64},
    "int4 group 128": {"group_size": 128},
    "int4 group 32, zero points": {"symmetric": False},
    "int4 group 64, zero points": {"symmetric": False, "group_size": 64},
    "int4 group 128, zero points": {"symmetric": False, "group_size": 128},
    "int8 per output": {"weights": "int8", "group_size": -1},
    "int8 group 128": {"weights": "int8", "group_size": 128},
    "int8 group 32": {"weights": "int8"},
}
HEADS: dict[str, dict[str, Any]] = {
    "int4 sub16, int4 head": {"lm_head": "int4"},
    "int4 sub16, float head": {"lm_head": None},
    "int8 group 32, float head": {"weights": "int8", "lm_head": None},
}
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "per 32": {"act_group": 32},
    "per 64": {"act_group": 64},
    "per 128": {"act_group": 128},
    "per token": {"act_group": -1},
    "float": {"activations": "float"},
    "float_fast": {"activations": "float_fast"},
}
BUDGETS = (0.01, 0.005, 0.002, 0.001, 0.0005)


def massive(model: nn.Module, exponent: int, seed: int = 0) -> nn.Module:
    """Returns a copy of a Llama with one massive channel in the input of most of its layers.

    In every layer one channel of each norm and of the MLP's `up` is multiplied by 2^exponent, and
    what reads it is divided by that: both are exact, so the model computes the same bits.
    """
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    factor = 2.0**exponent

    def scale(weight: nn.Parameter, readers: tuple[nn.Linear, ...]) -> None:
        channel = int(torch.randint(len(weight), (), generator=generator))
        weight[channel] *= factor
        for reader in readers:
            reader.weight[:, channel] /= factor

    with torch.no_grad():
        for layer in changed.get_submodule("model.layers").children():
            attention: Any = layer.get_submodule("self_attn")
            mlp: Any = layer.get_submodule("mlp")
            norms: list[Any] = [layer.input_layernorm, layer.post_attention_layernorm]
            scale(norms[0].weight, (attention.q_proj, attention.k_proj, attention.v_proj))
            scale(norms[1].weight, (mlp.gate_proj, mlp.up_proj))
            scale(mlp.up_proj.weight, (mlp.down_proj,))
    return changed


def like_gguf(model: nn.Module, layers: str, head: str | None) -> tuple[nn.Module, int]:
    """Returns a copy with all matrices as GGUF's types have them, and the bytes in such a file.

    Args:
        model: A float32 model with tied embeddings.
        layers: The type of the linear layers, such as "Q4_0".
        head: That of the embedding; None leaves it in float32.
    """
    from gguf import GGMLQuantizationType, quants

    changed = copy.deepcopy(model)
    size = 0
    with torch.no_grad():
        for name, parameter in changed.named_parameters():  # tied ones come once
            kind = head if "embed_tokens" in name else layers
            if parameter.dim() != 2 or kind is None:
                size += parameter.numel() * parameter.element_size()
                continue
            stored = quants.quantize(parameter.numpy(), GGMLQuantizationType[kind])
            parameter.copy_(torch.from_numpy(quants.dequantize(stored, GGMLQuantizationType[kind])))
            size += stored.nbytes
    return changed, size


class Table:
    """Measures and prints rows.

    Attributes:
        found: The evaluations, by name.
    """

    def __init__(self, original: nn.Module, texts: Any, tokenizer: Any) -> None:
        self.original, self.texts, self.tokenizer = original, texts, tokenizer
        self.found: dict[str, Evaluation] = {}

    def head(self, title: str) -> None:
        print(f"\n{title}\n")
        print("| format | same first choice | KL, 10⁻³ nats per token | perplexity | MB |")
        print("|---|---|---|---|---|", flush=True)

    def row(self, name: str, model: nn.Module, size: int | None = None) -> Evaluation:
        found = torch_slmops.evaluate(
            model,
            self.original,
            texts=self.texts,
            tokenizer=self.tokenizer,
            layers=False,
            progress=False,
        )
        kl, top1 = found.kl_mean, found.top1
        assert kl is not None
        assert top1 is not None
        divergence = f"{kl.value * 1e3:.3f} ± {(kl.high - kl.value) * 1e3:.3f}"
        megabytes = (found.bytes if size is None else size) / 1e6
        cells = (name, f"{top1.value:.4f}", divergence, f"{found.perplexity.value:.3f}")
        print(f"| {' | '.join(cells)} | {megabytes:.2f} |", flush=True)
        self.found[name] = found
        return found

    def optimized(self, name: str, model: nn.Module | None = None, **options: Any) -> Evaluation:
        made = copy.deepcopy(self.original if model is None else model)
        return self.row(name, torch_slmops.optimize(made, progress=False, **options))


def weights(table: Table) -> None:
    table.head("Weights; head int8, activations by default")
    for name, options in WEIGHTS.items():
        table.optimized(name, **options)


def head(table: Table) -> None:
    table.head("Head and embedding")
    for name, options in HEADS.items():
        table.optimized(name, **options)


def activations(table: Table) -> None:
    for kind, options in (("int4 sub16", {}), ("int8 group 32", {"weights": "int8"})):
        table.head(f"Activations of {kind}")
        for name, more in ACTIVATIONS.items():
            table.optimized(f"{kind}, {name}", **options, **more)


def gguf(table: Table) -> None:
    table.head("llama.cpp's formats, float activations")
    for name, layers, head in (
        ("Q4_0, head too", "Q4_0", "Q4_0"),
        ("Q4_0, head Q8_0", "Q4_0", "Q8_0"),
        ("Q4_0, head float", "Q4_0", None),
        ("Q8_0", "Q8_0", "Q8_0"),
    ):
        table.row(name, *like_gguf(table.original, layers, head))


def budget(table: Table) -> None:
    texts = table.texts
    assert isinstance(texts, torch.Tensor), "the budget is spent on every other window"
    table.head("Budgets, spent on the even windows and measured on the odd ones")
    table.texts = texts[1::2]
    for most in BUDGETS:
        model = copy.deepcopy(table.original)
        torch_slmops.optimize(model, max_kl=most, texts=texts[::2], progress=False)
        spent = torch_slmops.report(model).budget
        assert spent is not None
        told = f"predicted {spent.predicted * 1e3:.3f}, measured {spent.measured.value * 1e3:.3f}"
        table.row(f"max_kl={most:g} ({told})", model)
    table.texts = texts


def massive_activations(table: Table) -> None:
    for exponent in (5, 6, 7, 8):
        table.head(f"One channel per layer times 2^{exponent}")
        changed = massive(table.original, exponent)
        for name, options in (
            ("float activations", {"activations": "float"}),
            ("default", {}),
            ('activations="int8", per 128', {"activations": "int8"}),
            ("per token", {"act_group": -1}),
        ):
            table.optimized(f"2^{exponent}: {name}", changed, **options)


def _texts(folder: Path, windows: int) -> tuple[Any, Any]:
    """Held-out tokens, or None and a tokenizer for the built-in texts."""
    tokens = folder / "val_tokens.npy"
    if tokens.exists():
        return torch.from_numpy(np.load(tokens))[:windows], None
    return None, AutoTokenizer.from_pretrained(folder)


RUN = {
    "weights": weights,
    "head": head,
    "activations": activations,
    "gguf": gguf,
    "budget": budget,
    "massive": massive_activations,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(RUN)}; by default all")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a Llama")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows")
    parser.add_argument("--plot", type=Path, help="write KL against bits per weight to this file")
    args = parser.parse_args()
    original = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    table = Table(original, *_texts(args.model, args.windows))
    for section in args.sections or RUN:
        RUN[section](table)
    if args.plot is not None:
        plot_kl({n: f for n, f in table.found.items() if n in WEIGHTS | HEADS}, args.plot)


if __name__ == "__main__":
    main()
