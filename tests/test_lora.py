"""peft's LoRA beside packed layers: it runs, loads, trains, and does not merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from small_models import dequantized, logits, small, tokens

from torch_slmops import lora_config, optimize
from torch_slmops.fused import FusedAttention, FusedMLP

peft = pytest.importorskip("peft")

# peft 0.21 asks transformers 5.23 under a name that is going to go.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def config(**options: Any) -> Any:
    options = {"r": 4, "target_modules": TARGETS, "init_lora_weights": False} | options
    return lora_config(peft.LoraConfig(**options))


def base(family: str = "llama", **options: Any) -> Any:
    return optimize(small(family), **options)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("targets", [TARGETS, ["q_proj"], ["gate_proj"], ["down_proj"], ["o_proj"]])
def test_computes_what_the_float_model_does(targets: list[str], fuse: bool) -> None:
    original = small("llama")
    model = base(activations="float", fuse=fuse)
    twin = dequantized(original, model)
    torch.manual_seed(1)
    packed = peft.get_peft_model(model, config(target_modules=targets)).eval()
    wanted = peft.get_peft_model(twin, peft.LoraConfig(r=4, target_modules=targets)).eval()
    adapters = peft.get_peft_model_state_dict(packed)
    peft.set_peft_model_state_dict(wanted, adapters)
    ids = tokens(2, 7)
    expected = logits(wanted, ids)
    assert (logits(packed, ids) - expected).abs().max() <= 2e-4 * expected.abs().max()
    with packed.disable_adapter():
        plain = logits(packed, ids)
    assert (plain - expected).abs().max() > 0.05 * expected.abs().max()


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_other_blocks_stay_fused(family: str) -> None:
    model = base(family)
    before = logits(model, tokens(1, 5))
    name = "q_proj" if family == "llama" else "qkv_proj"
    wrapped = peft.get_peft_model(
        model, config(target_modules=[name], layers_to_transform=[0], init_lora_weights=True)
    )
    attentions = [m for m in model.modules() if isinstance(m, FusedAttention)]
    assert [m.is_bare() for m in attentions] == [False, True]
    assert all(m.is_bare() for m in model.modules() if isinstance(m, FusedMLP))
    # Adapters begin as zero; unfused blocks round int8 activations elsewhere.
    after = logits(wrapped.eval(), tokens(1, 5))
    assert (after - before).abs().max() <= 0.05 * before.abs().max()


def test_trains_and_leaves_the_base_alone() -> None:
    model = peft.get_peft_model(base(), config(init_lora_weights=True))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name for name in trainable)
    buffers = {name: b.clone() for name, b in model.named_buffers() if b.dtype == torch.uint8}
    optimizer = torch.optim.Adam(trainable.values(), lr=3e-3)
    ids = tokens(4, 12)
    losses = []
    model.train()
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None for p in trainable.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    for name, before in buffers.items():
        assert torch.equal(model.get_buffer(name), before)


def test_saves_and_loads(tmp_path: Path) -> None:
    model = peft.get_peft_model(base(), config()).eval()
    expected = logits(model, tokens(1, 6))
    model.save_pretrained(tmp_path)
    again = lora_config(peft.PeftConfig.from_pretrained(tmp_path))
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path, config=again).eval()
    assert_same_bits(logits(loaded, tokens(1, 6)), expected)


def test_merging_is_refused() -> None:
    model = peft.get_peft_model(base(), config()).eval()
    expected = logits(model, tokens(1, 6))
    with pytest.raises(RuntimeError, match="merging an adapter into a packed weight would round"):
        model.merge_and_unload()
    with pytest.raises(RuntimeError, match="merging an adapter"):
        model.merge_adapter()
    assert_same_bits(logits(model, tokens(1, 6)), expected)


def test_unload_gives_the_optimized_model_back() -> None:
    model = base()
    expected = logits(model, tokens(1, 6))
    unloaded = peft.get_peft_model(model, config()).unload()
    assert_same_bits(logits(unloaded.eval(), tokens(1, 6)), expected)


def test_only_lora_configs() -> None:
    with pytest.raises(TypeError, match=r"expected a peft.LoraConfig, got a dict"):
        lora_config({})
