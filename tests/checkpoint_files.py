"""What tests of foreign checkpoints share: folders of safetensors, and what must come of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bits import assert_same_bits
from safetensors.torch import save_file
from small_models import logits, tokens
from torch import Tensor, nn

# Of a small Llama whose layers every format can hold.
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_bias": False,
    "mlp_bias": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def projections(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in PROJECTIONS
    }


def save_folder(
    path: Path, model: Any, settings: Mapping[str, Any], layers: Mapping[str, Mapping[str, Tensor]]
) -> Path:
    """Writes a checkpoint of `model` whose `layers` are quantized; settings: their config."""
    tensors = {
        name: value
        for name, value in model.state_dict().items()
        if not (name.endswith(".weight") and name[: -len(".weight")] in layers)
    }
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    for name, parts in layers.items():
        tensors.update({f"{name}.{key}": value for key, value in parts.items()})
    path.mkdir(exist_ok=True)
    save_file(
        {key: value.contiguous() for key, value in tensors.items()}, path / "model.safetensors"
    )
    config = model.config.to_dict() | {
        "quantization_config": dict(settings),
        "architectures": [type(model).__name__],
        "dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def assert_weights(loaded: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """Asserts that the weights of layers are these, float32, bit by bit."""
    for name, values in expected.items():
        found = loaded.get_submodule(name).weight
        assert isinstance(found, Tensor)
        assert_same_bits(found.float() + 0.0, values.float() + 0.0, name)


def with_weights(original: Any, expected: Mapping[str, Tensor]) -> Any:
    """The float model with these weights."""
    model = copy.deepcopy(original)
    with torch.no_grad():
        for name, values in expected.items():
            model.get_submodule(name).weight = nn.Parameter(values.clone())
    return model


def assert_computes(loaded: Any, original: Any, expected: Mapping[str, Tensor]) -> None:
    """Asserts that a model packed with activations="float" computes what the float one does."""
    ids = tokens(2, 9)
    wanted = logits(with_weights(original, expected), ids)
    got = logits(loaded, ids)
    assert (got - wanted).abs().max() <= 2e-4 * wanted.abs().max()
