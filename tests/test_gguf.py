"""GGUF files: every weight is what the format says, and the model computes with it."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_files import assert_computes, assert_weights, with_weights
from small_models import logits, small, tokens
from torch import Tensor, nn

import torch_slmops
from torch_slmops import foreign, from_checkpoint
from torch_slmops.fused import FusedAttention, FusedMLP
from torch_slmops.modules import PackedModule

gguf = pytest.importorskip("gguf")

from gguf_files import Kind, write  # noqa: E402

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


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_layers_of_several_types(activations: str, tmp_path: Path) -> None:
    """As in files of type Q4_K_M; a run of decoder layers is then computed with several formats."""
    original = llama(num_hidden_layers=3)

    def kind_of(layer: str) -> Any:
        longer = (layer.endswith("v_proj") and ".1." in layer) or layer.endswith("embed_tokens")
        return Kind["Q6_K" if longer else "Q4_K"]

    write(tmp_path / "m.gguf", original, kind_of)
    loaded = from_checkpoint(tmp_path / "m.gguf", activations=activations)
    formats = [layer.self_attn.qkv.format()[:21] for layer in loaded.model.layers]
    assert formats == ["int4 group 32, offset", "int8 group 32, offset", "int4 group 32, offset"]
    expected = {
        name: loaded.get_submodule(name).weight + 0
        for name, module in original.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    wanted = logits(with_weights(original, expected), tokens(2, 9))
    got = logits(loaded, tokens(2, 9))
    most = 2e-4 if activations == "float" else 0.05
    assert (got - wanted).abs().max() <= most * wanted.abs().max()


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


def test_activations_are_int8_by_default(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", llama(), always("Q4_0"))
    loaded = from_checkpoint(tmp_path / "m.gguf")
    assert (
        loaded.model.layers[0].mlp.down_proj.format() == "int4 group 32, int8 activations per 128"
    )
    assert not loaded.training
    assert loaded.generate(tokens(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_bfloat16_activations(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", llama(), always("Q8_0"))
    loaded = from_checkpoint(tmp_path / "m.gguf", dtype="bfloat16")
    assert loaded.model.norm.weight.dtype == torch.bfloat16
    assert logits(loaded, tokens(1, 4)).dtype == torch.bfloat16


def test_rotary_factors_of_llama_3(tmp_path: Path) -> None:
    rope = ROPE | {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    original = llama(rope_parameters=rope)
    plain = llama().model.rotary_emb.inv_freq
    factors = (plain / original.model.rotary_emb.inv_freq).numpy()
    assert factors.max() == 4
    extra = {"rope_freqs.weight": factors}
    expected = write(tmp_path / "m.gguf", original, always("Q8_0"), extra=extra)
    loaded = from_checkpoint(tmp_path / "m.gguf", activations="float")
    assert_computes(loaded, original, expected | {"lm_head": expected["model.embed_tokens"]})


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rotary_scaling(kind: str, tmp_path: Path) -> None:
    rope = ROPE | {"rope_type": kind, "factor": 4.0}
    fields = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0}
    if kind == "yarn":
        rope |= {"original_max_position_embeddings": 32}
        fields |= {"llama.rope.scaling.original_context_length": 32}
    original = llama(rope_parameters=rope)
    expected = write(tmp_path / "m.gguf", original, always("Q8_0"), fields=fields)
    loaded = from_checkpoint(tmp_path / "m.gguf", activations="float")
    assert_computes(loaded, original, expected | {"lm_head": expected["model.embed_tokens"]})


def test_reads_one_weight_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m.gguf", llama(), always("Q4_0"))
    alive: list[weakref.ref[Tensor]] = []
    quantized = foreign.Parts.quantized

    def counting(parts: foreign.Parts) -> tuple[torch_slmops.QuantizedWeight, float]:
        assert all(codes() is None for codes in alive)
        alive.append(weakref.ref(parts.codes))
        return quantized(parts)

    monkeypatch.setattr(foreign.Parts, "quantized", counting)
    from_checkpoint(tmp_path / "m.gguf")
    # An embedding, and per layer qkv, the output projection, gate_up and down.
    assert len(alive) == 1 + 2 * 4


class TestRefused:
    def test_no_such_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"none\.gguf: expected a folder with config.json"):
            from_checkpoint(tmp_path / "none.gguf")

    @pytest.mark.parametrize("data", [b"", b"GGUF", b"PK\3\4" * 100])
    def test_another_file(self, data: bytes, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_bytes(data)
        with pytest.raises(ValueError, match=r"m\.gguf: expected a complete GGUF file"):
            from_checkpoint(tmp_path / "m.gguf")

    @pytest.mark.parametrize("part", [0.0005, 0.5, 0.999])
    def test_truncated(self, part: float, tmp_path: Path) -> None:
        write(tmp_path / "m.gguf", llama(), always("Q8_0"))
        whole = (tmp_path / "m.gguf").read_bytes()
        (tmp_path / "m.gguf").write_bytes(whole[: int(len(whole) * part)])
        tensor = r" tensor '[a-z0-9_.]+weight':" if part > 0.1 else ""
        with pytest.raises(ValueError, match=rf"m\.gguf:{tensor} expected a complete GGUF file"):
            from_checkpoint(tmp_path / "m.gguf")

    def test_architecture(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        writer = gguf.GGUFWriter(path, "whisper9")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ValueError, match=r"m\.gguf: its metadata describe no known model"):
            from_checkpoint(path)

    def test_tensor_without_a_place(self, tmp_path: Path) -> None:
        extra = {"blk.0.ffn_gate_exps.weight": np.zeros((4, 4), dtype=np.float32)}
        write(tmp_path / "m.gguf", llama(), always("Q8_0"), extra=extra)
        with pytest.raises(ValueError, match=r"tensor 'blk.0.ffn_gate_exps.weight' has no place"):
            from_checkpoint(tmp_path / "m.gguf")

    def test_missing_tensor(self, tmp_path: Path) -> None:
        original = llama(num_hidden_layers=1)
        write(tmp_path / "m.gguf", original, always("Q8_0"), fields={"llama.block_count": 2})
        with pytest.raises(ValueError, match=r"expected a tensor 'model.layers.1.+', found none"):
            from_checkpoint(tmp_path / "m.gguf")

    def test_shape(self, tmp_path: Path) -> None:
        fields = {"llama.feed_forward_length": 256}
        write(tmp_path / "m.gguf", llama(), always("Q8_0"), fields=fields)
        with pytest.raises(ValueError, match=r"tensor 'blk.0.ffn_.+weight': expected \(256, 256\)"):
            from_checkpoint(tmp_path / "m.gguf")

    def test_scales_that_are_not_finite(self, tmp_path: Path) -> None:
        original = llama(num_hidden_layers=1)
        with torch.no_grad():
            original.model.layers[0].mlp.up_proj.weight[3, 5] = math.inf
        with np.errstate(invalid="ignore"):
            write(tmp_path / "m.gguf", original, always("Q8_0"))
        with pytest.raises(
            ValueError, match=r"tensor 'blk.0.ffn_up.weight': expected finite scales"
        ):
            from_checkpoint(tmp_path / "m.gguf")

    def test_rotary_scaling(self, tmp_path: Path) -> None:
        fields = {"llama.rope.scaling.type": "longrope"}
        write(tmp_path / "m.gguf", llama(), always("Q8_0"), fields=fields)
        with pytest.raises(
            ValueError, match=r"m\.gguf: expected llama.rope.scaling.type to be none"
        ):
            from_checkpoint(tmp_path / "m.gguf")

    def test_calibration(self, tmp_path: Path) -> None:
        write(tmp_path / "m.gguf", llama(), always("Q8_0"))
        with pytest.raises(ValueError, match="has codes already"):
            from_checkpoint(tmp_path / "m.gguf", calibration=tokens(1, 8))

    def test_without_the_package(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path / "m.gguf", llama(), always("Q8_0"))
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(ImportError, match=r'pip install "torch_slmops\[gguf\]"'):
            from_checkpoint(tmp_path / "m.gguf")
