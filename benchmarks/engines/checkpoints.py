"""One random model per shape, on disk, and what each engine makes of it."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from torch_slmops.bench.model import random_model
from torch_slmops.bench.shapes import ModelShape

HERE = Path(__file__).parent


def write_float(shape: ModelShape, folder: Path) -> None:
    """Writes the bf16 model, and a tokenizer of made-up words, which some engines insist on."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = random_model(shape)
    if model.config.eos_token_id != 1:
        raise ValueError(f"{shape.name}: expected 1 as the token that ends a text")
    model.save_pretrained(folder / "float", max_shard_size="20GB")
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = {word: i for i, word in enumerate([*special.values(), "<unk>"])}
    words |= {f"t{i}": i for i in range(len(words), 1000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", **special
    ).save_pretrained(folder / "float")


def write_gguf(kind: str) -> Callable[[Path, Path], None]:
    """Returns what writes a GGUF file whose matrices are all of type `kind`."""

    def write(folder: Path, python: Path) -> None:
        out = folder / f"{kind}.gguf"
        _run(python, HERE / "convert_gguf.py", folder / "float", out, kind)

    return write


def write_openvino(folder: Path, python: Path) -> None:
    """int4 of all matrices, symmetric, per 128 or what divides the widths: OpenVINO's fastest."""
    config = json.loads((folder / "float" / "config.json").read_text())
    width = math.gcd(config["hidden_size"], config["intermediate_size"])
    group = next(size for size in (128, 64, 32) if width % size == 0)
    command = [python.with_name("optimum-cli"), "export", "openvino", "-m", folder / "float"]
    command += ["--task", "text-generation-with-past", "--weight-format", "int4", "--sym"]
    command += ["--group-size", str(group), "--ratio", "1.0", "--all-layers"]
    _run(*command, folder / "openvino")


def write_onnx(folder: Path, python: Path) -> None:
    """int4 per 32, activations rounded to int8: what onnxruntime-genai runs fastest."""
    command = [python, "-m", "onnxruntime_genai.models.builder", "-i", folder / "float"]
    command += ["-o", folder / "onnxruntime", "-p", "int4", "-e", "cpu", "-c", folder / "cache"]
    _run(*command, "--extra_options", "int4_accuracy_level=4", "int4_block_size=32")


def _run(*command: Path | str) -> None:
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        printed = done.stdout.decode(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(map(str, command[:3]))} ... failed:\n{printed}")


def prepare(
    shape: ModelShape,
    folder: Path,
    product: str,
    write: Callable[[Path, Path], None] | None,
    python: Path,
) -> float:
    """Makes what an engine reads, unless it is there; returns the seconds that took.

    Args:
        shape: The model.
        folder: Its folder.
        product: The file or folder in it that the engine reads.
        write: Makes it from the float model; None where that is what the engine reads.
        python: Interpreter of the engine's environment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if not (folder / "float" / "tokenizer.json").exists():
        write_float(shape, folder)
        start = time.perf_counter()
    done = folder / f"{product}.done"
    if write is None or done.exists():
        return 0.0
    write(folder, python)
    done.touch()
    return time.perf_counter() - start
