"""The shapes that benchmarks use: dimensions of real models, no ad-hoc ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearShape:
    """Output and input features of one linear layer and where it is found."""

    out_features: int
    in_features: int
    role: str


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a Llama-like model."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int


LINEARS = (
    LinearShape(2048, 2048, "attention projection"),
    LinearShape(8192, 2048, "gate or up projection"),
    LinearShape(2048, 8192, "down projection"),
    LinearShape(128256, 2048, "lm_head"),
)

ROWS = (1, 4, 16, 64, 512)

MODELS = {
    "llama-3.2-1b": ModelShape("llama-3.2-1b", 2048, 16, 32, 8, 64, 8192, 128256),
    "qwen2.5-0.5b": ModelShape("qwen2.5-0.5b", 896, 24, 14, 2, 64, 4864, 151936),
    "smollm2-135m": ModelShape("smollm2-135m", 576, 30, 9, 3, 64, 1536, 49152),
}
