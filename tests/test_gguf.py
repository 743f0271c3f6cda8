"""GGUF files: every weight is what the format says, and the model computes with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import assert_computes, assert_weights
from small_models import small
from torch import nn

import torch_slmops
from torch_slmops import from_checkpoint
from torch_slmops.fused import FusedAttention, FusedMLP
from torch_slmops.modules import PackedModule

pytest.importorskip("gguf")

from gguf_files import Kind, write

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rope_parameters": ROPE,
}
LLAMA = SIZES | {"head_dim": 32, "attention_bias": False, "mlp_bias": False}
EXACT = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
ROUNDED = ["Q4_K", "Q5_K"]
REQUANTIZED = ["Q6_K", "Q3_K", "Q2_K"]


def always(kind: str) -> Callable[[str], Any]:
    return lambda layer: Kind[kind]


def llama(**changes: Any) -> Any:
    return small("llama", **(LLAMA | changes))


def origins(model: nn.Module) -> set[str]:
    return {m.origin for m in model.modules() if isinstance(m, PackedModule)}


@pytest.mark.parametrize("kind", EXACT)
def test_exact_types(kind: str, tmp_path: Path) -> None:
    original = llama()
    expected = write(tmp_path / "m.gguf", original, always(kind))
    loaded = from_checkpoint(tmp_path / "m.gguf", activations="float")
    assert_weights(loaded, expected | {"lm_head": expected["model.embed_tokens"]})
    assert_computes(loaded, original, expected | {"lm_head": expected["model.embed_tokens"]})
    assert origins(loaded) == {f"from GGUF {kind}"}
    assert sum(isinstance(m, FusedAttention | FusedMLP) for m in loaded.modules()) == 4
    assert loaded.lm_head.packed.data_ptr() == loaded.model.embed_tokens.packed.data_ptr()


@pytest.mark.parametrize(
    ("kind", "most"), [(k, 4e-4) for k in ROUNDED] + [(k, 8e-3) for k in REQUANTIZED]
)
def test_other_types_say_what_they_lose(kind: str, most: float, tmp_path: Path) -> None:
    original = llama(num_hidden_layers=1)
    expected = write(tmp_path / "m.gguf", original, always(kind))
    loaded = from_checkpoint(tmp_path / "m.gguf", activations="float")
    for name in ("model.layers.0.mlp.down_proj", "model.embed_tokens"):
        meant = expected[name]
        loss = (loaded.get_submodule(name).weight - meant).norm() / meant.norm()
        assert 0 < loss < most
        module = loaded.get_submodule(name)
        note = ", as int8" if kind in REQUANTIZED else ""
        assert module.origin == f"from GGUF {kind}{note}, relative error {float(loss):.1e}"
    assert "relative error" in str(torch_slmops.report(loaded))


def test_projections_of_several_types_are_fused_without_a_loss(tmp_path: Path) -> None:
    original = llama()
    kinds = {"q_proj": "Q4_0", "k_proj": "Q8_0", "v_proj": "Q5_0", "gate_proj": "Q8_0"}
    kind_of = lambda layer: Kind[kinds.get(layer.rpartition(".")[2], "Q4_0")]  # noqa: E731
    expected = write(tmp_path / "m.gguf", original, kind_of)
    loaded = from_checkpoint(tmp_path / "m.gguf", activations="float")
    assert_weights(loaded, expected)
    attention = loaded.model.layers[0].self_attn
    assert isinstance(attention, FusedAttention)
    assert attention.qkv.origin == "from GGUF Q4_0 + GGUF Q8_0 + GGUF Q5_0"
    assert attention.o_proj.format().startswith("int4")


def test_float_tensors_and_a_head_of_its_own(tmp_path: Path) -> None:
    original = llama(tie_word_embeddings=False)
    kinds = {"embed_tokens": "F16", "lm_head": "BF16", "o_proj": "F32"}
    kind_of = lambda layer: Kind[kinds.get(layer.rpartition(".")[2], "Q8_0")]  # noqa: E731
    expected = write(tmp_path / "m.gguf", original, kind_of)
    loaded = from_checkpoint(
        tmp_path / "m.gguf", lm_head=None, exclude="*.o_proj", activations="float"
    )
    assert_weights(loaded, expected)
    assert type(loaded.lm_head) is nn.Linear
    assert_computes(loaded, original, expected)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3", "mistral"])
def test_families(family: str, tmp_path: Path) -> None:
    changes = SIZES | {"sliding_window": None}
    fields: dict[str, Any] = {}
    arch = "llama" if family == "mistral" else family
    if family == "qwen2":
        changes |= {"use_sliding_window": False}
    if family in ("qwen3", "gemma2", "gemma3"):
        changes |= {"head_dim": 48, "tie_word_embeddings": family != "qwen3"}
        fields = {f"{arch}.attention.key_length": 48}
    if family in ("gemma2", "gemma3"):
        changes |= {"query_pre_attn_scalar": 256, "sliding_window": 8}
        fields |= {f"{arch}.attention.sliding_window": 8}
    if family == "gemma3":
        rope = {"full_attention": ROPE, "sliding_attention": ROPE}
        changes |= {"rope_parameters": rope, "layer_types": ["sliding_attention"] * 2}
    if family == "gemma2":
        changes |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if family == "mistral":
        changes |= {"head_dim": 32}
        fields = {"general.name": "mistral"}
    original = small(family, **changes)
    expected = write(tmp_path / "m.gguf", original, always("Q8_0"), arch, fields)
    loaded = from_checkpoint(tmp_path / "m.gguf", activations="float")
    assert type(loaded).__name__ == type(original).__name__
    tied = {"lm_head": expected["model.embed_tokens"]} if "lm_head" not in expected else {}
    assert_computes(loaded, original, expected | tied)
