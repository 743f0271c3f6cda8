"""optimize on models that torchao quantized: the codes stay, the blocks are fused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoint_files import assert_computes, assert_weights, projections
from small_models import logits, small, tokens
from torch import Tensor, nn

from torch_slmops import optimize, report
from torch_slmops.fused import FusedAttention, FusedMLP
from torch_slmops.modules import PackedModule

torchao = pytest.importorskip("torchao")

from torchao.quantization import (  # noqa: E402
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    quantize_,
)
from torchao.quantization.qat import QATConfig  # noqa: E402
from torchao.quantization.quantize_.workflows import Int4Tensor  # noqa: E402

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_bias": False,
    "mlp_bias": False,
}


def blocks_only(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def half(dtype: torch.dtype) -> Any:
    return small("llama", **SIZES, dtype=dtype)


CONFIGS: dict[str, Callable[[], Any]] = {
    "intx-4-group": lambda: IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
    "intx-8-axis": lambda: IntxWeightOnlyConfig(torch.int8, PerAxis(0)),
    "intx-3-group": lambda: IntxWeightOnlyConfig(torch.int3, PerGroup(64)),
    "dynamic-4": lambda: Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(32)
    ),
}


def meant(module: Any) -> Tensor:
    """The weight by torchao's formula, float32."""
    weight = module.weight
    n, k = weight.shape
    scale, zero = (
        x.float().reshape(n, -1).repeat_interleave(weight.block_size[1], 1)[:, :k]
        for x in (weight.scale, weight.zero_point)
    )
    return (weight.qdata.float() - zero) * scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", CONFIGS)
def test_intx(config: str, dtype: torch.dtype) -> None:
    model = half(dtype)
    quantize_(model, CONFIGS[config](), blocks_only)
    expected = {name: meant(module) for name, module in projections(model).items()}
    optimize(model, lm_head=None, activations="float")
    model.float()
    assert_weights(model, expected)
    assert sum(isinstance(m, FusedAttention | FusedMLP) for m in model.modules()) == 4
    origin = model.model.layers[0].mlp.down_proj.origin
    assert origin == "from torchao IntxUnpackedToInt8Tensor"


@pytest.mark.parametrize(
    "config",
    [Int8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig],
    ids=lambda c: c.__name__,
)
def test_int8(config: Any) -> None:
    original = small("llama", **SIZES)
    model = copy.deepcopy(original)
    quantize_(model, config(version=2), blocks_only)
    expected = {
        name: module.weight.qdata.float() * module.weight.scale.float()
        for name, module in projections(model).items()
    }
    optimize(model, lm_head=None, activations="float")
    # float32 scales of float32 weights: rounded to 16 bits, and the loss is said.
    for name, values in expected.items():
        found = model.get_submodule(name).weight
        assert (found - values).norm() <= 2.0**-11 * values.norm()
    assert "from torchao Int8Tensor, relative error" in str(report(model))
    assert_computes(model, original, {name: m.weight + 0 for name, m in packed(model).items()})


def packed(model: nn.Module) -> dict[str, Any]:
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    return {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in names}


def int4_tensor(weight: Tensor, group: int, symmetric: bool) -> Tensor:
    """What `Int4WeightOnlyConfig` makes; the package that does it needs a GPU."""
    n, k = weight.shape
    parts = weight.view(n, k // group, group)
    low, high = parts.amin(2), parts.amax(2)
    if symmetric:
        scale, offset = parts.abs().amax(2) / 7, torch.zeros_like(low)
    else:
        scale = (high - low) / 15
        offset = low + scale * 8
    scale, offset = scale.bfloat16(), offset.bfloat16()
    codes = ((parts - offset[:, :, None].float()) / scale[:, :, None].float()).round()
    codes = codes.clamp(-8, 7).to(torch.int8).view(n, k)
    both = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    kind: Any = Int4Tensor
    made: Tensor = kind(both, scale.T.contiguous(), offset.T.contiguous(), [1, group], (n, k))
    return made


@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_tensor(symmetric: bool) -> None:
    model = half(torch.bfloat16)
    expected = {}
    for name, module in projections(model).items():
        weight = int4_tensor(module.weight.detach().float(), 32, symmetric)
        module.weight = nn.Parameter(weight, requires_grad=False)
        tensor: Any = weight
        low, high = (tensor.qdata << 4) >> 4, tensor.qdata >> 4
        codes = torch.stack([low, high], 2).flatten(1).float()
        scale, offset = (
            x.T.float().repeat_interleave(32, 1) for x in (tensor.scale, tensor.zero_point)
        )
        expected[name] = codes * scale + offset
    optimize(model, lm_head=None, activations="float")
    model.float()
    if symmetric:
        assert_weights(model, expected)
    for name, values in expected.items():
        found = model.get_submodule(name).weight
        # An offset of bfloat16, moved by 8 scales, is rounded to bfloat16.
        assert (found - values).norm() <= (0 if symmetric else 2.0**-8) * values.norm() * 3
    assert sum(isinstance(m, FusedAttention | FusedMLP) for m in model.modules()) == 4


def test_embeddings() -> None:
    model = half(torch.bfloat16)
    config = IntxWeightOnlyConfig(torch.int8, PerGroup(32))
    quantize_(model, config, lambda module, name: isinstance(module, nn.Embedding))
    expected = {"model.embed_tokens": meant(model.model.embed_tokens)}
    optimize(model)
    model.float()
    assert_weights(model, expected)
    assert model.model.embed_tokens.origin == "from torchao IntxUnpackedToInt8Tensor"


def test_converted_after_quantization_aware_training() -> None:
    model = small("llama", **SIZES).train()
    base = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(32)
    )
    quantize_(model, QATConfig(base, step="prepare"), blocks_only)
    model(tokens(1, 6), labels=tokens(1, 6)).loss.backward()
    quantize_(model, QATConfig(base, step="convert"), blocks_only)
    model.eval()
    expected = {name: meant(module) for name, module in projections(model).items()}
    optimize(model, lm_head=None, activations="float")
    for name, values in expected.items():
        assert (model.get_submodule(name).weight - values).norm() <= 2.0**-11 * values.norm()


def test_what_is_left_stays_torchao() -> None:
    model = half(torch.bfloat16)
    quantize_(model, CONFIGS["intx-4-group"](), blocks_only)
    left = model.model.layers[0].mlp.down_proj
    optimize(model, exclude="*.layers.0.mlp.down_proj", lm_head=None)
    assert model.model.layers[0].mlp.down_proj is left
    assert logits(model, tokens(1, 4)).isfinite().all()
    optimize(model)
    assert isinstance(model.model.layers[0].mlp.down_proj, PackedModule)


def test_a_failure_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = half(torch.bfloat16)
    quantize_(model, CONFIGS["intx-4-group"](), blocks_only)
    before = {name: id(module) for name, module in model.named_modules()}
    broken: Any = model.model.layers[1].mlp.down_proj.weight
    broken.scale[3, 1] = torch.inf
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj.weight: expected finite scales"):
        optimize(model)
    assert {name: id(module) for name, module in model.named_modules()} == before


class TestRefused:
    def model(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(64, 64)).eval()

    def test_scaled_inputs(self) -> None:
        model = self.model()
        weight: Any = int4_tensor(model[0].weight.detach(), 32, True)
        weight.act_pre_scale = torch.ones(64)
        model[0].weight = nn.Parameter(weight, requires_grad=False)
        with pytest.raises(ValueError, match=r"0.weight: a Int4Tensor with act_pre_scale"):
            optimize(model)

    def test_other_tensors_of_torchao(self) -> None:
        from torchao.quantization import Float8WeightOnlyConfig

        model = self.model()
        quantize_(model, Float8WeightOnlyConfig())
        with pytest.raises(ValueError, match=r"0.weight is a Float8Tensor, not a plain parameter"):
            optimize(model)
