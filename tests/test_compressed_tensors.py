"""compressed-tensors checkpoints that its own compressors wrote, from disk and in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import SIZES, assert_computes, assert_weights, projections, save_folder
from small_models import logits, small, tokens
from torch import Tensor

import torch_slmops
from torch_slmops import from_checkpoint, optimize
from torch_slmops.fused import FusedAttention, FusedMLP

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme


def weights(bits: int, group: int | None = None, symmetric: bool = True, **more: Any) -> Any:
    strategy = "group" if group else "channel"
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group,
        **more,
    }


TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
PACKED = "pack-quantized"
CASES = {
    "int4-group": (PACKED, {"weights": weights(4, 32)}),
    "int4-group-asymmetric": (PACKED, {"weights": weights(4, 64, False)}),
    "int4-channel": (PACKED, {"weights": weights(4)}),
    "int4-tensor": (PACKED, {"weights": weights(4) | {"strategy": "tensor"}}),
    "int3-group": (PACKED, {"weights": weights(3, 32, False)}),
    "int8-group": (PACKED, {"weights": weights(8, 64)}),
    "int6-channel": (PACKED, {"weights": weights(6, None, False)}),
    "w8a8": ("int-quantized", {"weights": weights(8), "input_activations": TOKEN}),
    "w8a8-asymmetric": (
        "int-quantized",
        {"weights": weights(8, None, False), "input_activations": TOKEN},
    ),
    "w4a8": (PACKED, {"weights": weights(4, 32), "input_activations": TOKEN}),
}


def compressed(
    module: Any, name: str, scheme: Any, scale_dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """What the compressor makes of a layer, and what the package dequantizes it to, in float32."""
    args = scheme.weights
    weight = module.weight.detach()
    n, k = weight.shape
    groups = k // args.group_size if args.strategy == "group" else 1
    rows = 1 if args.strategy == "tensor" else n
    parts = weight.view(rows, -1) if rows == 1 else weight.view(n, groups, -1)
    low, high = (getattr(parts, f"a{which}")(-1).view(rows, groups) for which in ("min", "max"))
    top = 2 ** (args.num_bits - 1)
    scale = torch.maximum(high, -low) / (top - 0.5)
    zero = torch.zeros(rows, groups, dtype=torch.int8)
    if not args.symmetric:
        scale = (high - low) / (2 * top - 1)
        zero = (-top - low / scale).round().clamp(-top, top - 1).to(torch.int8)
    scale = scale.to(scale_dtype).float()
    state: dict[str, Tensor] = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    if rows == 1:
        state["weight_scale"], state["weight_zero_point"] = scale.view(1), zero.view(1)
    made = BaseCompressor.get_value_from_registry(name).compress(state, scheme)
    back = BaseCompressor.get_value_from_registry(name).decompress(made, scheme)["weight"]
    made["weight_scale"] = made["weight_scale"].to(scale_dtype)
    return made, back


def make(path: Path, case: str, dtype: torch.dtype = torch.float16) -> tuple[Any, ...]:
    kind, group = CASES[case]
    scheme = QuantizationScheme(targets=["Linear"], **group)
    original = small("llama", **SIZES)
    parts, expected = {}, {}
    for name, module in projections(original).items():
        parts[name], expected[name] = compressed(module, kind, scheme, dtype)
    settings = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": {"targets": ["Linear"], **group}},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }
    return save_folder(path / "model", original, settings, parts), original, expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_from_disk(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path, original, expected = make(tmp_path, case, dtype)
    loaded = from_checkpoint(path, lm_head=None, activations="float")
    assert_weights(loaded, expected)
    assert_computes(loaded, original, expected)
    assert sum(isinstance(m, FusedAttention | FusedMLP) for m in loaded.modules()) == 4
    bits = CASES[case][1]["weights"]["num_bits"]
    origin = loaded.model.layers[0].mlp.down_proj.origin
    assert origin == f"from compressed-tensors {CASES[case][0]} int{bits}"


def test_float32_scales_are_rounded_and_the_loss_is_said(tmp_path: Path) -> None:
    path, _, expected = make(tmp_path, "w8a8", torch.float32)
    loaded = from_checkpoint(path, lm_head=None)
    down = loaded.model.layers[0].mlp.down_proj
    meant = expected["model.layers.0.mlp.down_proj"]
    loss = (down.weight - meant).norm() / meant.norm()
    assert 0 < loss < 2.0**-11
    assert down.origin.endswith(f"relative error {float(loss):.1e}")


def test_act_order(tmp_path: Path) -> None:
    path, original, expected = make(tmp_path, "int4-group")
    name = "model.layers.0.mlp.down_proj"
    folder = torch_slmops.checkpoints.files.Folder(path)
    tensors = {key: folder.get(key).clone() for key in folder.names()}
    perm = torch.randperm(192)
    index = torch.empty(192, dtype=torch.int32)
    index[perm] = (torch.arange(192) // 32).int()
    tensors[f"{name}.weight_g_idx"] = index
    from safetensors.torch import save_file

    save_file(tensors, path / "model.safetensors")
    scheme = QuantizationScheme(targets=["Linear"], **CASES["int4-group"][1])
    helpers = BaseCompressor.get_value_from_registry(PACKED)
    layer = {key: folder.get(f"{name}.{key}") for key in folder.layer(name).names}
    ones = helpers.decompress(layer | {"weight_scale": torch.ones(128, 6)}, scheme)["weight"]
    expected[name] = ones * layer["weight_scale"].float()[:, index.long()]
    loaded = from_checkpoint(path, lm_head=None, activations="float")
    assert_weights(loaded, expected)
    assert_computes(loaded, original, expected)


@pytest.mark.parametrize("case", ["int4-group", "int8-group", "w8a8"])
def test_loaded_by_transformers(case: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path, original, expected = make(tmp_path, case)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert model.is_quantized
    optimize(model, lm_head=None, activations="float")
    assert_weights(model, expected)
    assert_computes(model, original, expected)
    assert not getattr(model, "is_quantized", False)
    assert sum(isinstance(m, FusedAttention | FusedMLP) for m in model.modules()) == 4


def test_a_refused_model_is_as_it_was(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path, _, _ = make(tmp_path, "int4-group")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="expected patterns"):
        optimize(model, include="nothing")
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert model.is_quantized
    assert model.config.quantization_config is not None
    assert logits(model, tokens(1, 4)).isfinite().all()


class TestRefused:
    def load(self, path: Path, **changes: Any) -> Any:
        import json

        folder, _, _ = make(path, "int4-group")
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= changes
        (folder / "config.json").write_text(json.dumps(config))
        return from_checkpoint(folder)

    def group(self, **changes: Any) -> Any:
        return {"group_0": {"targets": ["Linear"], "weights": weights(4, 32) | changes}}

    def test_transforms(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"config.json: quantization_config: transforms"):
            self.load(tmp_path, transform_config={"config_groups": {"u": {"type": "hadamard"}}})

    def test_float_weights(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"q_proj.weight_packed: expected integer weights"):
            self.load(tmp_path, config_groups=self.group(type="float"))

    def test_layers_in_no_group(self, tmp_path: Path) -> None:
        groups = {"group_0": {"targets": ["re:.*mlp.*"], "weights": weights(4, 32)}}
        with pytest.raises(ValueError, match=r"q_proj.weight_packed: no group of quantization_co"):
            self.load(tmp_path, config_groups=groups)

    def test_other_bits(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"q_proj.weight_packed: expected int32 of shape"):
            self.load(tmp_path, config_groups=self.group(num_bits=8))

    def test_other_groups(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"q_proj.weight_scale: expected scales per group"):
            self.load(tmp_path, config_groups=self.group(group_size=64))

    def test_settings_that_the_package_refuses(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"config.json: quantization_config: .*validation"):
            self.load(tmp_path, config_groups=3)
