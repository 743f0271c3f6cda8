"""8-bit models of bitsandbytes, from disk and in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import SIZES, assert_computes, projections, save_folder
from small_models import logits, small, tokens
from torch import Tensor, nn

from torch_slmops import from_checkpoint, optimize
from torch_slmops.fused import FusedAttention, FusedMLP

bnb = pytest.importorskip("bitsandbytes")

SETTINGS = {"quant_method": "bitsandbytes", "load_in_8bit": True}


def quantized(module: nn.Linear) -> Any:
    layer = bnb.nn.Linear8bitLt(
        module.in_features, module.out_features, bias=False, has_fp16_weights=False
    )
    layer.weight = bnb.nn.Int8Params(module.weight.detach().half(), requires_grad=False)
    return layer.to("cpu")  # where it quantizes


def make(path: Path) -> tuple[Path, Any, dict[str, Tensor]]:
    original = small("llama", **SIZES)
    parts, expected = {}, {}
    for name, module in projections(original).items():
        state = quantized(module).state_dict()
        parts[name] = state
        expected[name] = state["weight"].float() * (state["SCB"] / 127)[:, None]
    return save_folder(path / "model", original, SETTINGS, parts), original, expected


def assert_near(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, values in expected.items():
        error: Tensor = model.get_submodule(name).weight - values
        assert (error.abs() <= 2.0**-11 * values.abs()).all(), name


def test_from_disk(tmp_path: Path) -> None:
    path, original, expected = make(tmp_path)
    loaded = from_checkpoint(path, lm_head=None, activations="float")
    assert_near(loaded, expected)
    assert_computes(
        loaded, original, {name: loaded.get_submodule(name).weight + 0 for name in expected}
    )
    assert sum(isinstance(m, FusedAttention | FusedMLP) for m in loaded.modules()) == 4
    origin = loaded.model.layers[0].mlp.down_proj.origin
    assert origin.startswith("from bitsandbytes int8, relative error ")


def test_in_memory_before_and_after_its_first_call() -> None:
    layer = nn.Linear(128, 64, bias=False)
    model = nn.Sequential(quantized(layer)).eval()
    codes, scale = model[0].weight.CB.clone(), model[0].weight.SCB.clone()
    expected = codes.float() * (scale / 127)[:, None]
    x = torch.randn(2, 128).half()
    before = model(x).float()
    assert model[0].state.CB is not None
    optimize(model, activations="float")
    assert_near(model, {"0": expected})
    assert (model(x).float() - before).abs().max() <= 0.03 * before.abs().max()


def test_loaded_by_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path, _, expected = make(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu")
    optimize(model, lm_head=None)
    assert_near(model, expected)
    assert logits(model, tokens(1, 4)).isfinite().all()


def test_4_bit_is_refused(tmp_path: Path) -> None:
    original = small("llama", **SIZES)
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path = save_folder(tmp_path / "model", original, settings, {})
    with pytest.raises(ValueError, match="expected load_in_8bit; 4-bit weights of bitsandbytes"):
        from_checkpoint(path)
