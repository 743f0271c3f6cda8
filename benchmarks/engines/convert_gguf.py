"""Writes a transformers checkpoint as a GGUF file for llama.cpp, matrices in one quantized type.

    python convert_gguf.py FOLDER OUT.gguf q4_0

It has no tokenizer: benchmarks feed token ids. Runs in the environment of llama.cpp, without torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
}


def bf16_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a folder's safetensors files, one at a time, as float32."""
    for path in sorted(folder.glob("*.safetensors")):
        raw = np.memmap(path, np.uint8, "r")
        length = int(raw[:8].view(np.uint64)[0])
        header = json.loads(raw[8 : 8 + length].tobytes())
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "BF16":
                raise ValueError(f"{name}: expected bfloat16, got {entry['dtype']}")
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            words = raw[begin:end].view(np.uint16).astype(np.uint32) << 16
            yield name, words.view(np.float32).reshape(entry["shape"])


def interleave_rotary(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's rotary embedding wants them, whose pairs are neighbours."""
    pairs = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def llama3_factors(config: dict[str, Any]) -> np.ndarray | None:
    """What each frequency is divided by where a config has rotary scaling of type llama3."""
    rope = config["rope_parameters"]
    if rope.get("rope_type") != "llama3":
        return None
    dim = config["head_dim"]
    wavelength = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    turns = rope["original_max_position_embeddings"] / wavelength
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def describe(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    """Writes what llama.cpp reads of a config."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    if config["model_type"] in ("gemma3_text", "phi3"):
        writer.add_sliding_window(config["sliding_window"])
    if config["model_type"] == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config["original_max_position_embeddings"])
    writer.add_tokenizer_model("none")


def convert(folder: Path, out: Path, kind: str) -> None:
    """Writes `out`, with all matrices of type `kind` and all else in float32."""
    config = json.loads((folder / "config.json").read_text())
    model_type, layers = config["model_type"], config["num_hidden_layers"]
    architecture = ARCHITECTURES[model_type]
    names = gguf.get_tensor_name_map(architecture, layers)
    matrix_type = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[architecture], use_temp_file=True)
    describe(writer, config)
    factors = llama3_factors(config)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, values in bf16_tensors(folder):
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ValueError(f"no name for {name} in {model_type}")
        if model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
            values = interleave_rotary(values, config[key])
        if model_type == "gemma3_text" and name.endswith("norm.weight"):
            values = values + 1
        if values.ndim == 1:
            writer.add_tensor(new, values)
        else:
            packed = gguf.quants.quantize(values, matrix_type)
            writer.add_tensor(new, packed, raw_dtype=matrix_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
