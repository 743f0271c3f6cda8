"""The shapes that benchmarks use: dimensions of real models, no ad-hoc ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LinearShape:
    """Output and input features of one linear layer and where it is found."""

    out_features: int
    in_features: int
    role: str


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a decoder-only model.

    Attributes:
        model_type: What transformers calls the architecture.
        tied: Embedding and head share a weight.
        options: What else its config has.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    model_type: str = "llama"
    tied: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)


LINEARS = (
    LinearShape(2048, 2048, "attention projection"),
    LinearShape(8192, 2048, "gate or up projection"),
    LinearShape(2048, 8192, "down projection"),
    LinearShape(128256, 2048, "lm_head"),
)

ROWS = (1, 4, 16, 64, 512)


def _theta(value: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value}}


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

_SHAPES = (
    ModelShape(
        "llama-3.2-1b", 2048, 16, 32, 8, 64, 8192, 128256, options={"rope_parameters": _LLAMA3}
    ),
    ModelShape(
        "qwen2.5-0.5b", 896, 24, 14, 2, 64, 4864, 151936, "qwen2", options=_theta(1000000.0)
    ),
    ModelShape("smollm2-135m", 576, 30, 9, 3, 64, 1536, 49152, options=_theta(100000.0)),
    ModelShape("smollm2-360m", 960, 32, 15, 5, 64, 2560, 49152, options=_theta(100000.0)),
    ModelShape("smollm2-1.7b", 2048, 24, 32, 32, 64, 8192, 49152, options=_theta(130000.0)),
    ModelShape(
        "qwen3-0.6b", 1024, 28, 16, 8, 128, 3072, 151936, "qwen3", options=_theta(1000000.0)
    ),
    ModelShape(
        "qwen3-1.7b", 2048, 28, 16, 8, 128, 6144, 151936, "qwen3", options=_theta(1000000.0)
    ),
    ModelShape(
        "gemma-3-1b",
        1152,
        26,
        4,
        1,
        256,
        6912,
        262144,
        "gemma3_text",
        options={"sliding_window": 512, "query_pre_attn_scalar": 256},
    ),
    ModelShape(
        "phi-3-mini", 3072, 32, 32, 32, 96, 8192, 32064, "phi3", False, {"sliding_window": 2047}
    ),
)

MODELS = {shape.name: shape for shape in _SHAPES}
