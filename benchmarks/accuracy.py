"""What every format costs in accuracy: `python -m benchmarks.accuracy [section ...]`.

Each row is a format of the same trained model, compared by `torch_slmops.evaluate` with float32
on the model's held-out tokens (`val_tokens.npy` beside it, else the built-in texts); the interval
of the divergence is the 95 % one. `calibrated` takes the windows in `calibration_tokens.npy`.

`make accuracy` runs all sections on both trained decoders, and the encoder's two on a model of
their own. `gguf` needs the package of that name: llama.cpp's Q4_0 and Q8_0 as its numpy code
quantizes them, dequantized, and evaluated here with float activations. `llama.cpp` is llama.cpp
itself, where `benchmarks/engines/setup.sh llama.cpp` has set it up.
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
from benchmarks import codes, encoder
from benchmarks.llama_cpp import LlamaCpp
from benchmarks.recorded import recorded
from torch_slmops.evaluate import Evaluation
from torch_slmops.plot import plot_kl

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "tiny_llama"
ENGINES = ROOT / "build" / "engines"
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
ENCODER: dict[str, dict[str, Any]] = {  # its activations, in the one table that it has
    f"{kind}, activations {name}": {**options, **more}
    for kind, options in (("int4 sub16", {}), ("int8 group 32", {"weights": "int8"}))
    for name, more in ACTIVATIONS.items()
}
CALIBRATED = {
    name: {**WEIGHTS, **HEADS}[name]
    for name in (
        "int4 sub16",
        "int4 group 32",
        "int4 group 32, zero points",
        "int4 group 128",
        "int8 per output",
        "int8 group 32",
        "int4 sub16, int4 head",
    )
}
# Type, whether with the importance matrix, type of embedding and head if not llama.cpp's choice.
LLAMA_CPP: tuple[tuple[str, bool, str | None], ...] = (
    ("F32", False, None),
    ("Q4_0", False, None),
    ("Q4_0", False, "Q8_0"),
    ("Q4_0", True, None),
    ("Q4_K_S", True, None),
    ("Q4_K_M", False, None),
    ("Q4_K_M", True, None),
    ("Q4_K_M", True, "Q8_0"),
    ("Q8_0", False, None),
)
COLUMNS = ("same first choice", "KL, 10⁻³ nats per token", "perplexity")
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
        calibration: Windows of token ids, or None.
        folder: Of the model.
        engines: Folder of the environments of other engines.
    """

    def __init__(
        self,
        original: nn.Module,
        texts: Any,
        tokenizer: Any,
        calibration: torch.Tensor | None = None,
        folder: Path = MODEL,
        engines: Path = ENGINES,
    ) -> None:
        self.original, self.texts, self.tokenizer = original, texts, tokenizer
        self.calibration, self.folder, self.engines = calibration, folder, engines
        self.reference = recorded(original, texts) if isinstance(texts, torch.Tensor) else original
        self.found: dict[str, Evaluation] = {}

    def head(self, title: str) -> None:
        print(f"\n{title}\n")
        print(f"| format | {' | '.join(COLUMNS)} | MB |")
        print("|---|---|---|---|---|", flush=True)

    def row(self, name: str, model: nn.Module, size: int | None = None) -> Evaluation:
        found, cells = self.measure(model)
        megabytes = (found.bytes if size is None else size) / 1e6
        print(f"| {name} | {' | '.join(cells)} | {megabytes:.2f} |", flush=True)
        self.found[name] = found
        return found

    def measure(self, model: nn.Module) -> tuple[Evaluation, tuple[str, ...]]:
        """The evaluation, and its cells in the order of `COLUMNS`."""
        found = torch_slmops.evaluate(
            model,
            self.reference,
            texts=self.texts,
            tokenizer=self.tokenizer,
            layers=False,
            progress=False,
        )
        kl, top1 = found.kl_mean, found.top1
        assert kl is not None
        assert top1 is not None
        divergence = f"{kl.value * 1e3:.3f} ± {(kl.high - kl.value) * 1e3:.3f}"
        return found, (f"{top1.value:.4f}", divergence, f"{found.perplexity.value:.3f}")

    def optimized(self, name: str, model: nn.Module | None = None, **options: Any) -> Evaluation:
        made = copy.deepcopy(self.original if model is None else model)
        return self.row(name, torch_slmops.optimize(made, progress=False, **options))


def weights(table: Table) -> None:
    table.head("Weights; head int8, activations by default")
    for name, options in WEIGHTS.items():
        table.optimized(name, **options)
    table.row("bfloat16, not quantized", copy.deepcopy(table.original).to(torch.bfloat16))


def head(table: Table) -> None:
    table.head("Head and embedding")
    for name, options in HEADS.items():
        table.optimized(name, **options)


def activations(table: Table) -> None:
    for kind, options in (("int4 sub16", {}), ("int8 group 32", {"weights": "int8"})):
        table.head(f"Activations of {kind}")
        for name, more in ACTIVATIONS.items():
            table.optimized(f"{kind}, {name}", **options, **more)


def calibrated(table: Table) -> None:
    table.head("With calibration")
    if table.calibration is None:
        print(f"(not measured: no calibration_tokens.npy in {table.folder})")
        return
    for name, options in CALIBRATED.items():
        batches = table.calibration.split(8)
        table.optimized(f"{name}, calibrated", calibration=batches, **options)


def rotation(table: Table) -> None:
    table.head("With a rotated residual stream")
    rotated = torch_slmops.rotate(copy.deepcopy(table.original))
    table.row("float32, rotated", rotated)
    per_token = {"act_group": -1}
    for name, options in (
        ("int4 sub16", {}),
        ("int4 sub16, float activations", {"activations": "float"}),
        ("int4 sub16, activations per token", per_token),
        ("int4 group 128", {"group_size": 128}),
        ("int8 group 32", {"weights": "int8"}),
        ("int8 per output, activations per token", {**WEIGHTS["int8 per output"], **per_token}),
    ):
        table.optimized(f"{name}, rotated", rotated, **options)
    if table.calibration is not None:
        batches = table.calibration.split(8)
        table.optimized("int4 sub16, rotated, calibrated", rotated, calibration=batches)


def llama_cpp(table: Table) -> None:
    table.head("llama.cpp itself")
    try:
        engine = LlamaCpp(table.folder, table.engines, table.engines.parent / "accuracy")
    except FileNotFoundError as error:
        print(f"(not measured: {error})")
        return
    assert isinstance(table.texts, torch.Tensor)
    importance = None
    if table.calibration is not None:
        importance = engine.keep_importance(table.original, table.calibration)
    for kind, weighted, head in LLAMA_CPP:
        if weighted and importance is None:
            continue
        matrix = importance if weighted else None
        model, size, types = engine.run(kind, table.texts, matrix, head)
        told = ", ".join(f"{count} {name}" for name, count in types.items() if name != "F32")
        name = kind + ", importance matrix" * weighted + (f", head {head}" if head else "")
        table.row(f"{name} ({told})" if told else name, model, size)


def keys_and_values(table: Table) -> None:
    table.head("Keys and values")
    for name, options in (("int4 sub16", {}), ("int8 group 32", {"weights": "int8"})):
        table.optimized(f"{name}, bf16 model", _bf16(table.original), **options)
        table.optimized(
            f"{name}, bf16 model, int8 keys and values",
            _bf16(table.original),
            kv_cache="int8",
            **options,
        )


def _bf16(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(torch.bfloat16)


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


def other_codes(table: Table) -> None:
    codes.table(table.original, COLUMNS, lambda model: table.measure(model)[1], table.calibration)


def sentence_encoder(table: Table) -> None:
    encoder.table({**WEIGHTS, **ENCODER}, CALIBRATED)


def encoder_codes(table: Table) -> None:
    encoder.codes_table()


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
    "calibrated": calibrated,
    "rotation": rotation,
    "keys": keys_and_values,
    "gguf": gguf,
    "llama.cpp": llama_cpp,
    "budget": budget,
    "massive": massive_activations,
    "codes": other_codes,
    "encoder": sentence_encoder,
    "encoder-codes": encoder_codes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "sections", nargs="*", help=f"of {', '.join(RUN)}; by default all but the encoder's"
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a Llama or Qwen3")
    parser.add_argument("--engines", type=Path, default=ENGINES, help="where setup.sh put them")
    parser.add_argument("--windows", type=int, default=64, help="held-out windows")
    parser.add_argument("--plot", type=Path, help="write KL against bits per weight to this file")
    args = parser.parse_args()
    original = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    calibration = args.model / "calibration_tokens.npy"
    known = torch.from_numpy(np.load(calibration)) if calibration.exists() else None
    texts = _texts(args.model, args.windows)
    table = Table(original, *texts, calibration=known, folder=args.model, engines=args.engines)
    for section in args.sections or [name for name in RUN if "encoder" not in name]:
        RUN[section](table)
    if args.plot is not None:
        plot_kl({n: f for n, f in table.found.items() if n in WEIGHTS | HEADS}, args.plot)


if __name__ == "__main__":
    main()
