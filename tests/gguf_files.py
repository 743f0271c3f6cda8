"""GGUF files of small models, written by the gguf package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor

Kind = gguf.GGMLQuantizationType
Array = Any
# The rows of q and k in files of these: pairs that rotate with each other are neighbours.
_INTERLEAVED = ("llama",)
_NORM_PLUS_ONE = ("gemma2", "gemma3")


def interleaved(name: str, values: Array, config: Any) -> Array:
    """The rows of q and k as llama.cpp's converter orders them."""
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    parts = values.reshape(heads, 2, len(values) // heads // 2, -1)
    return parts.swapaxes(1, 2).reshape(values.shape)


def random_blocks(kind: Any, shape: tuple[int, int], seed: int) -> Array:
    """Blocks of a type that gguf cannot quantize to: random codes with scales of a usual size."""
    n, k = shape
    source = np.random.default_rng(seed)
    per_block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = source.integers(0, 256, (n, k // per_block, size), dtype=np.uint8)
    at = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82)}
    for byte in at[kind.name]:
        scales = source.uniform(0.5e-3, 2e-3, (n, k // per_block, 1)).astype(np.float16)
        blocks[:, :, byte : byte + 2] = scales.view(np.uint8)
    return blocks.reshape(n, -1)


def write(
    path: Path,
    model: Any,
    kind_of: Callable[[str], Any],
    arch: str = "llama",
    fields: Mapping[str, Any] | None = None,
    extra: Mapping[str, Array] | None = None,
) -> dict[str, Tensor]:
    """Writes `model` as a file; returns the matrices that it means, by their layers' names."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters.get("rope_theta", 10000.0))
    writer.add_vocab_size(config.vocab_size)
    if arch == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    for key, value in (fields or {}).items():
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, _value_type(value))
    expected = _add_tensors(writer, model, kind_of, arch)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def _value_type(value: Any) -> Any:
    kinds = {str: "STRING", int: "UINT32", float: "FLOAT32"}
    return gguf.GGUFValueType[kinds[type(value)]]


def _add_tensors(
    writer: Any, model: Any, kind_of: Callable[[str], Any], arch: str
) -> dict[str, Tensor]:
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[arch], model.config.num_hidden_layers)
    expected: dict[str, Tensor] = {}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    for i, (name, tensor) in enumerate(model.state_dict().items()):
        if name in tied:
            continue
        layer, _, suffix = name.rpartition(".")
        values = tensor.float().numpy()
        turned = arch in _INTERLEAVED and ("q_proj" in name or "k_proj" in name)
        target = f"{names.get_name(layer)}.{suffix}"
        if values.ndim == 1:
            values = interleaved(name, values, model.config) if turned else values
            plus = 1 if arch in _NORM_PLUS_ONE and layer.endswith("norm") else 0
            writer.add_tensor(target, np.ascontiguousarray(values + np.float32(plus)))
            continue
        kind = kind_of(layer)
        if kind.name.endswith("_K"):
            data = random_blocks(kind, values.shape, i)
        else:
            data = quantize(values, kind)
        expected[layer] = torch.from_numpy(np.array(dequantize(data, kind), dtype=np.float32))
        data = np.ascontiguousarray(interleaved(name, data, model.config) if turned else data)
        writer.add_tensor(target, data, raw_dtype=kind)
    return expected
