"""Small random models of every family, of their real transformers classes, with odd sizes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_slmops import fused, fused_decoder, modules, reference
from torch_slmops.fused_experts import FusedExperts

transformers = pytest.importorskip("transformers")

# What forward calls its cache; renamed in transformers 5.24.
_PARAMETERS = inspect.signature(inspect.unwrap(transformers.LlamaModel.forward)).parameters
CACHE = "cache" if "cache" in _PARAMETERS else "past_key_values"

VOCABULARY = 131
LAYERS = 2
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 152,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": None,
}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2}
_SLIDING = ["sliding_attention", "full_attention"]


def _rope(kind: str = "default", **options: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **options}


# Name: class, config class, changes of _COMMON.
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            "head_dim": 16,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": _rope(
                "llama3",
                factor=4.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=32,
            ),
        },
    ),
    "mistral": (
        "MistralForCausalLM",
        "MistralConfig",
        {"head_dim": 20, "sliding_window": 5, "num_key_value_heads": 1},
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {
            "head_dim": 20,
            "rope_parameters": _rope("yarn", factor=4.0, original_max_position_embeddings=32),
        },
    ),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", {"no_rope_layer_interval": 2}),
    "phi3": (
        "Phi3ForCausalLM",
        "Phi3Config",
        {"rope_parameters": _rope(partial_rotary_factor=0.5), "resid_pdrop": 0.1},
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
            "attn_implementation": "eager",  # sdpa knows no softcap
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 5,
            "query_pre_attn_scalar": 20,
            "layer_types": _SLIDING,
            "rope_parameters": {
                "sliding_attention": _rope(),
                "full_attention": _rope("linear", factor=8.0),
            },
        },
    ),
    "granite": (
        "GraniteForCausalLM",
        "GraniteConfig",
        {
            "attention_multiplier": 0.3,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {"num_key_value_heads": 3}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", {"use_qkv_bias": True}),
    "cohere": ("CohereForCausalLM", "CohereConfig", {"logit_scale": 1.0}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _MOE | {"head_dim": 16, "moe_intermediate_size": 40, "num_experts": 5},
    ),
    "granite_moe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", _MOE | {"num_local_experts": 5}),
    "bert": ("BertForMaskedLM", "BertConfig", {}),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {
            "layer_types": _SLIDING,
            "local_attention": 6,
            "cls_token_id": 2,
            "sep_token_id": 3,
            "attention_bias": True,
        },
    ),
}
FAMILIES = tuple(_FAMILIES)
ENCODERS = ("bert", "modernbert")
DECODERS = tuple(name for name in FAMILIES if name not in ENCODERS)
# What optimize leaves in float in some families: scaled embeddings, routers.
LEFT = {
    "gemma2": ["model.embed_tokens"],
    "gemma3": ["model.embed_tokens"],
    "qwen3_moe": ["model.layers.*.mlp.gate"],
    "granite_moe": ["model.layers.*.block_sparse_moe.router"],
}


def small(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of the family with random weights; its norms and biases are random too."""
    model_class, config_class, own = _FAMILIES[family]
    config = getattr(transformers, config_class)(**_COMMON | own | changes)
    torch.manual_seed(seed)
    model: nn.Module = getattr(transformers, model_class)._from_config(
        config, attn_implementation=own.get("attn_implementation", "sdpa")
    )
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, -0.5, 1.5)
    return model.eval().to(dtype)


def tokens(batch: int, length: int, vocabulary: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return torch.randint(4, vocabulary, (batch, length), generator=generator)


def logits(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids, **options).logits
    return found


def dequantized(original: Any, optimized: Any) -> Any:
    """The float model with the weights that the codes of the optimized one stand for."""
    model: Any = copy.deepcopy(original)
    with torch.no_grad():
        for name, module in model.named_modules():
            twin = optimized.get_submodule(name)
            if type(module) in (nn.Linear, nn.Embedding) and type(twin) is not type(module):
                module.weight = nn.Parameter(twin.weight + 0)  # not the tied one
            if isinstance(twin, FusedExperts):
                module.gate_up_proj.copy_(torch.stack([e.dequantize() for e in twin.gate_up]))
                module.down_proj.copy_(torch.stack([e.dequantize() for e in twin.down]))
    return model


class by_reference:
    """Inside it, packed and fused modules compute with reference.py."""

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(modules, "_linear", reference.linear)
        self.patch.setattr(modules, "_embedding", reference.embedding)
        for op in ("rms_norm", "qkv_rotary", "swiglu"):
            self.patch.setattr(fused, f"_{op}", getattr(reference, op))
        self.patch.setattr(fused_decoder, "_decoder_layers", reference.decoder_layers)

    def __exit__(self, *error: object) -> None:
        self.patch.undo()


def record(model: nn.Module, kind: type[nn.Module], run: Callable[[], object]) -> list[Any]:
    """Calls (module, args, kwargs, output) of the modules of a class while `run` runs."""
    calls: list[Any] = []
    handles = [
        module.register_forward_hook(
            lambda module, args, kwargs, output: calls.append((module, args, kwargs, output)),
            with_kwargs=True,
        )
        for module in model.modules()
        if isinstance(module, kind)
    ]
    with torch.inference_mode():
        run()
    for handle in handles:
        handle.remove()
    return calls
