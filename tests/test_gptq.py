"""GPTQ and AWQ checkpoints: every weight is what the format says, act-order included."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from checkpoint_files import SIZES, assert_computes, assert_weights, projections, save_folder
from gptq_files import awq_layer, gptq_layer
from small_models import logits, small, tokens, transformers
from torch import Tensor, nn

import torch_slmops
from torch_slmops import from_checkpoint, ops, quantize_weight, reference
from torch_slmops.fused import FusedAttention, FusedMLP
from torch_slmops.modules import Linear

# Layers with one input have one act-order.
BLOCKS = {"q_proj": 1, "k_proj": 2, "v_proj": 3, "o_proj": 11, "gate_proj": 21, "up_proj": 22}
Made = tuple[Path, Any, dict[str, Tensor]]


def seed_of(name: str) -> int:
    return BLOCKS.get(name.rpartition(".")[2], 31)


def make(
    path: Path, settings: dict[str, Any], layer: Callable[..., tuple[dict[str, Tensor], Tensor]]
) -> Made:
    """A checkpoint whose projections `layer(shape, seed=...)` gives."""
    original = small("llama", **SIZES)
    parts, expected = {}, {}
    for name, module in projections(original).items():
        shape = (module.out_features, module.in_features)
        parts[name], expected[name] = layer(shape, seed=seed_of(name))
    return save_folder(path / "model", original, settings, parts), original, expected


def gptq(path: Path, **options: Any) -> Made:
    settings = {
        "quant_method": "gptq",
        "bits": options.get("bits", 4),
        "group_size": options.get("group", 32),
        "desc_act": options.get("act_order", False),
        "checkpoint_format": "gptq_v2" if options.get("version") == 2 else "gptq",
    }
    return make(path, settings, lambda shape, seed: gptq_layer(shape, seed=seed, **options))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, -1), (8, 64), (2, 32), (3, 64)])
def test_gptq(
    version: int, symmetric: bool, act_order: bool, bits: int, group: int, tmp_path: Path
) -> None:
    options = {"version": version, "symmetric": symmetric, "act_order": act_order}
    path, original, expected = gptq(tmp_path, bits=bits, group=group, **options)
    loaded = from_checkpoint(path, lm_head=None, activations="float")
    assert_weights(loaded, expected)
    assert_computes(loaded, original, expected)
    ordered = " act-order" if act_order and group != -1 else ""
    assert loaded.model.layers[0].self_attn.o_proj.origin == f"from GPTQ int{bits}{ordered}"


def test_blocks_are_fused(tmp_path: Path) -> None:
    path, _, _ = gptq(tmp_path)
    loaded = from_checkpoint(path)
    assert sum(isinstance(m, FusedAttention) for m in loaded.modules()) == 2
    assert sum(isinstance(m, FusedMLP) for m in loaded.modules()) == 2
    assert loaded.model.layers[0].mlp.gate_up.format().startswith("int4 group 32")


class TestActOrder:
    """Attention and MLPs are fused; gate and up give their rows as the down projection wants."""

    def loaded(self, path: Path, **options: Any) -> tuple[Any, dict[str, Tensor]]:
        folder, _, expected = gptq(path, act_order=True)
        return from_checkpoint(folder, **options), expected

    def test_what_is_fused(self, tmp_path: Path) -> None:
        model, _ = self.loaded(tmp_path)
        assert sum(isinstance(m, FusedAttention) for m in model.modules()) == 2
        assert sum(isinstance(m, FusedMLP) for m in model.modules()) == 2
        assert not torch_slmops.report(model).unfused

    @pytest.mark.parametrize("bias", [False, True])
    def test_a_fused_mlp_gives_the_bits_of_its_layers(self, bias: bool, tmp_path: Path) -> None:
        model, expected = self.loaded(tmp_path, lm_head=None)
        mlp = model.model.layers[0].mlp
        if bias:
            mlp.gate_up.bias = nn.Parameter(torch.randn(2 * mlp.gate_up.hidden))
        assert torch.equal(mlp.gate_up.order, mlp.down_proj.perm)
        x = torch.randn(2, 5, 128)
        with torch.no_grad():
            h = torch.ops.slmops._activation(mlp.gate_proj(x), "silu") * mlp.up_proj(x)
            assert_same_bits(mlp(x), mlp.down_proj(h))
            assert_same_bits(mlp.gate_up(x), torch.cat([mlp.gate_proj(x), mlp.up_proj(x)], -1))
        name = "model.layers.0.mlp"
        both = torch.cat([expected[f"{name}.gate_proj"], expected[f"{name}.up_proj"]])
        assert_same_bits(mlp.gate_up.dequantize() + 0, both + 0)
        assert_same_bits(mlp.gate_up.weight + 0, both + 0)

    def test_another_order_of_the_down_projection(self, tmp_path: Path) -> None:
        """A weight that is assigned takes its inputs as they come, or in an order of its own."""
        model, _ = self.loaded(tmp_path)
        mlp, x = model.model.layers[0].mlp, torch.randn(3, 128)
        other = Linear.from_packed(mlp.down_proj.packed, perm=mlp.down_proj.perm.flip(0))
        weight = torch.randn(mlp.down_proj.out_features, mlp.gate_up.hidden)
        for value in (other.weight, weight):
            mlp.down_proj.weight = value
            h = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
            assert_same_bits(mlp(x), mlp.down_proj(h))

    def test_linear_is_the_reference_bits(self, tmp_path: Path) -> None:
        model, _ = self.loaded(tmp_path)
        down = model.model.layers[0].mlp.down_proj
        x = torch.randn(3, down.in_features)
        wanted = reference.linear(x, down.packed, down.out_features, None, down.perm)
        assert_same_bits(down(x), wanted)

    def test_fused_gives_the_bits_of_layers(self, tmp_path: Path) -> None:
        fused, _ = self.loaded(tmp_path, fuse=True)
        attention = fused.model.layers[0].self_attn
        x = torch.randn(2, 5, 128)
        q, k, v = attention.project(x, None)
        for name, part in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
            assert_same_bits(part.flatten(2), attention.get_submodule(name)(x), name)

    def test_only_up_and_gate_with_an_order(self, tmp_path: Path) -> None:
        settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}

        def layer(shape: tuple[int, int], seed: int) -> tuple[dict[str, Tensor], Tensor]:
            return gptq_layer(shape, seed=seed, act_order=seed in (21, 22))

        path, original, expected = make(tmp_path, settings, layer)
        model = from_checkpoint(path, lm_head=None, activations="float")
        assert isinstance(model.model.layers[0].mlp, FusedMLP)
        assert_weights(model, expected)
        assert_computes(model, original, expected)
        mlp = model.model.layers[0].mlp
        x = torch.randn(2, 128)
        gate, up = mlp.gate_up(x).chunk(2, -1)
        assert_same_bits(gate, mlp.gate_proj(x))
        assert_same_bits(up, mlp.up_proj(x))

    def test_different_orders_are_not_fused(self, tmp_path: Path) -> None:
        settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}

        def layer(shape: tuple[int, int], seed: int) -> tuple[dict[str, Tensor], Tensor]:
            return gptq_layer(shape, seed=10 * seed, act_order=True)

        path, original, expected = make(tmp_path, settings, layer)
        model = from_checkpoint(path, lm_head=None, activations="float")
        assert not any(isinstance(m, FusedAttention) for m in model.modules())
        assert_weights(model, expected)
        assert_computes(model, original, expected)

    def test_copies(self, tmp_path: Path) -> None:
        model, _ = self.loaded(tmp_path)
        ids = tokens(1, 5)
        wanted = logits(model, ids)
        assert_same_bits(logits(copy.deepcopy(model), ids), wanted)
        down = pickle.loads(pickle.dumps(model.model.layers[0].mlp.down_proj))
        assert torch.equal(down.perm, model.model.layers[0].mlp.down_proj.perm)

    def test_state_dict(self, tmp_path: Path) -> None:
        model, expected = self.loaded(tmp_path)
        name = "model.layers.0.mlp.down_proj"
        down = model.get_submodule(name)
        twin = Linear(down.in_features, down.out_features, bias=False)
        twin.load_state_dict(down.state_dict())
        assert_same_bits(twin.weight + 0, expected[name])
        x = torch.randn(2, down.in_features)
        assert_same_bits(twin(x), down(x))
        plain = torch_slmops.quantize_weight(expected[name]).pack()
        twin.load_state_dict({"packed": plain})
        assert twin.perm is None

    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        model, _ = self.loaded(tmp_path)
        model.save_pretrained(tmp_path / "saved")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        ids = tokens(2, 7)
        assert_same_bits(logits(again, ids), logits(model, ids))
        down = again.model.layers[1].mlp.down_proj
        assert torch.equal(down.perm, model.model.layers[1].mlp.down_proj.perm)
        assert down.origin == "from GPTQ int4 act-order"

    def test_dequantized(self, tmp_path: Path) -> None:
        model, expected = self.loaded(tmp_path, lm_head=None)
        assert_weights(torch_slmops.dequantize(model), expected)

    def test_assigning_a_weight_forgets_the_order(self, tmp_path: Path) -> None:
        model, expected = self.loaded(tmp_path)
        name = "model.layers.0.mlp.down_proj"
        down = model.get_submodule(name)
        other = Linear.from_packed(down.packed)
        other.weight = down.weight
        assert_same_bits(other.weight + 0, expected[name])
        down.weight = expected[name]
        assert down.perm is None
        assert down.origin == ""
        header = ops.describe(down.packed)
        symmetric = header.zero_kind == "none"
        again = quantize_weight(
            expected[name], header.bits, header.scale_kind, header.group_size, symmetric=symmetric
        )
        assert_same_bits(down.weight + 0, again.dequantize() + 0)


@pytest.mark.parametrize("group", [32, 64, -1])
def test_awq(group: int, tmp_path: Path) -> None:
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    path, original, expected = make(
        tmp_path, settings, lambda shape, seed: awq_layer(shape, group, seed)
    )
    loaded = from_checkpoint(path, lm_head=None, activations="float")
    assert_weights(loaded, expected)
    assert_computes(loaded, original, expected)
    assert isinstance(loaded.model.layers[0].self_attn, FusedAttention)
    assert "from AWQ int4" in str(torch_slmops.report(loaded))


def test_excluded_layers_become_float(tmp_path: Path) -> None:
    path, original, expected = gptq(tmp_path, act_order=True)
    loaded = from_checkpoint(path, exclude="*.layers.0.*", lm_head=None, activations="float")
    kept = loaded.model.layers[0].mlp.down_proj
    assert type(kept) is nn.Linear
    assert_weights(loaded, expected)
    assert_computes(loaded, original, expected)


def test_head_and_embeddings_are_quantized_as_by_optimize(tmp_path: Path) -> None:
    path, original, _ = gptq(tmp_path)
    loaded = from_checkpoint(path)
    quantized = torch_slmops.quantize_weight(original.lm_head.weight, 8)
    assert_same_bits(loaded.lm_head.weight + 0, quantized.dequantize() + 0)
    assert loaded.lm_head.packed.data_ptr() == loaded.model.embed_tokens.packed.data_ptr()


def test_biases_that_the_model_does_not_have(tmp_path: Path) -> None:
    """AutoGPTQ writes a bias for every layer: zeros where there is none."""
    path, _, expected = gptq(tmp_path)
    folder = torch_slmops.checkpoints.files.Folder(path)
    tensors = {name: folder.get(name).clone() for name in folder.names()}
    names = list(expected)
    for name in names:
        tensors[f"{name}.bias"] = torch.zeros(expected[name].shape[0])
    tensors[f"{names[-1]}.bias"] += 1
    from safetensors.torch import save_file

    save_file(tensors, path / "model.safetensors")
    loaded = from_checkpoint(path, lm_head=None, activations="float", fuse=False)
    assert loaded.get_submodule(names[0]).bias is None
    assert torch.equal(loaded.get_submodule(names[-1]).bias, tensors[f"{names[-1]}.bias"])


class TestRefused:
    def edited(self, path: Path, **changes: Any) -> Path:
        folder, _, _ = gptq(path)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def with_tensor(self, path: Path, name: str, value: Tensor | None) -> Path:
        from safetensors.torch import save_file

        folder, _, _ = gptq(path)
        files = torch_slmops.checkpoints.files.Folder(folder)
        tensors = {key: files.get(key).clone() for key in files.names()}
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
        save_file(tensors, folder / "model.safetensors")
        return folder

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"checkpoint_format": "marlin"}, "q_proj.qweight: expected a checkpoint_format"),
            ({"quant_method": "hqq"}, r"config.json: expected a quant_method of gptq, awq"),
            ({"quant_method": "awq"}, r"qweight: expected int32 of shape \(128, 16\)"),
            ({"quant_method": "awq", "version": "gemv"}, 'expected AWQ of version "gemm"'),
        ],
    )
    def test_settings(self, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            from_checkpoint(self.edited(tmp_path, **changes))

    Q = "model.layers.1.self_attn.q_proj"

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            (f"{Q}.scales", None, r"model: .+q_proj.scales: expected this tensor, found none"),
            (f"{Q}.scales", torch.ones(4, 127), r"q_proj.scales: expected .+ got .+\(4, 127\)"),
            (f"{Q}.scales", torch.full((4, 128), torch.nan), r"q_proj.qweight: expected finite sc"),
            (f"{Q}.qweight", torch.ones(17, 128).int(), "expected codes of 2, 3, 4 or 8 bits"),
            (f"{Q}.qweight", torch.ones(16, 128), "qweight: expected int32 of shape"),
            (f"{Q}.g_idx", torch.zeros(128).int(), "g_idx: expected 4 groups of 32 inputs, got"),
            (f"{Q}.g_idx", torch.full((128,), -5).int(), "g_idx: expected 4 groups of 32 inputs"),
            ("model.norm.weight", None, "expected a tensor 'model.norm.weight', found none"),
            ("model.norm.weight", torch.ones(3), r"norm.weight: expected float.+\(128,\)"),
            ("model.experts.0.qweight", torch.ones(1), "has no linear layer of this name"),
        ],
    )
    def test_tensors(self, name: str, value: Tensor | None, message: str, tmp_path: Path) -> None:
        folder = self.with_tensor(tmp_path, name, value)
        with pytest.raises(ValueError, match=message):
            from_checkpoint(folder)

    @pytest.mark.parametrize("part", [0.0, 0.0005, 0.5, 0.999])
    def test_truncated(self, part: float, tmp_path: Path) -> None:
        folder, _, _ = gptq(tmp_path)
        file = folder / "model.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(ValueError, match=r"model.safetensors: expected a complete safetensors"):
            from_checkpoint(folder)

    def test_missing_shard(self, tmp_path: Path) -> None:
        folder, _, _ = gptq(tmp_path)
        index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        with pytest.raises(ValueError, match=r"model-2.safetensors is missing"):
            from_checkpoint(folder)

    @pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
    def test_damaged_index(self, text: str, tmp_path: Path) -> None:
        folder, _, _ = gptq(tmp_path)
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=r"index.json: expected JSON with a weight_map"):
            from_checkpoint(folder)

    def test_no_weights(self, tmp_path: Path) -> None:
        folder, _, _ = gptq(tmp_path)
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"expected model.safetensors or .+, found no safeten"):
            from_checkpoint(folder)

    def test_float_checkpoint(self, tmp_path: Path) -> None:
        small("llama").save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="found no quantization_config"):
            from_checkpoint(tmp_path)

    def test_no_config(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"expected a folder with config.json"):
            from_checkpoint(tmp_path)

    def test_dtype(self, tmp_path: Path) -> None:
        folder, _, _ = gptq(tmp_path)
        with pytest.raises(ValueError, match="expected dtype float32, bfloat16 or float16"):
            from_checkpoint(folder, dtype="int8")


def test_sharded(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder, original, expected = gptq(tmp_path)
    files = torch_slmops.checkpoints.files.Folder(folder)
    tensors = {key: files.get(key).clone() for key in files.names()}
    weight_map = {}
    for i, part in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        save_file({key: tensors[key] for key in part}, folder / f"model-{i}.safetensors")
        weight_map.update(dict.fromkeys(part, f"model-{i}.safetensors"))
    (folder / "model.safetensors").unlink()
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    loaded = from_checkpoint(folder, lm_head=None, activations="float")
    assert_computes(loaded, original, expected)


def test_repository_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder, _, expected = gptq(tmp_path)
    asked = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = from_checkpoint("someone/model-GPTQ", lm_head=None)
    assert_weights(loaded, expected)
    assert asked == [("someone/model-GPTQ", ["*.json", "*.safetensors"])]


def test_generation_config(tmp_path: Path) -> None:
    folder, _, _ = gptq(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    assert from_checkpoint(folder).generation_config.max_new_tokens == 7
