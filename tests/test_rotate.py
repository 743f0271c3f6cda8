"""rotate: the same logits from other weights where that is exact; else no change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import nn

import torch_slmops
from torch_slmops.rotate import rotation

transformers = pytest.importorskip("transformers")

from small_models import FAMILIES, VOCABULARY, logits, small, tokens  # noqa: E402

ROTATED = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "granite")


@pytest.mark.parametrize("width", [1, 2, 64, 96, 576, 7])
def test_rotation_is_orthogonal_and_flat(width: int) -> None:
    q = rotation(width)
    assert torch.allclose(q @ q.t(), torch.eye(width, dtype=torch.float64), atol=1e-13)
    power = width & -width
    if power == width:
        assert torch.allclose(q.abs(), torch.full_like(q, width**-0.5), rtol=1e-15)
    assert torch.equal(q, rotation(width))
    assert width < 3 or not torch.equal(q, rotation(width, seed=1))


@pytest.mark.parametrize("family", ROTATED)
def test_logits_stay_and_weights_do_not(family: str) -> None:
    original = small(family)
    model = copy.deepcopy(original)
    assert torch_slmops.rotate(model) is model
    ids = tokens(2, 17)
    expected, got = logits(original, ids), logits(model, ids)
    # Two models of some ten roundings each per layer: measured 3e-6 of the largest logit.
    assert float((got - expected).abs().max()) <= 3e-5 * float(expected.abs().max())
    before = dict(original.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters():
        inside = name.endswith(("q_norm.weight", "k_norm.weight"))
        biases = name.endswith(".bias") and not name.endswith(("o_proj.bias", "down_proj.bias"))
        assert torch.equal(parameter, before[name]) == (inside or biases), name
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight


def test_what_is_not_exact_is_refused_and_left() -> None:
    for family in set(FAMILIES) - set(ROTATED):
        model = small(family)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="rotate: expected"):
            torch_slmops.rotate(model)
        for name, value in model.state_dict().items():
            assert_same_bits(value, before[name])


class Peeking(nn.Module):
    """A rotary module that lets the values of the stream into what it gives: no family does."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cos, sin = self.inner(x, *args, **kwargs)
        return cos + x.amax(), sin


def test_a_model_that_would_change_is_put_back() -> None:
    model = small("qwen3")
    model.model.rotary_emb = Peeking(model.model.rotary_emb).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="would change"):
        torch_slmops.rotate(model)
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name])
    assert not torch_slmops.report(model).rotated


def test_refuses_packed_models_and_other_modules() -> None:
    with pytest.raises(ValueError, match="packed ones"):
        torch_slmops.rotate(torch_slmops.optimize(small("llama")))
    with pytest.raises(ValueError, match="rotate: expected"):
        torch_slmops.rotate(nn.Sequential(nn.Linear(8, 8)).eval())
    with pytest.raises(TypeError):
        torch_slmops.rotate("model")  # type: ignore[type-var]


def test_optimized_saved_and_reported(tmp_path: Path) -> None:
    ids = tokens(1, 9)
    model = torch_slmops.rotate(small("llama"))
    model.save_pretrained(tmp_path / "float")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    assert_same_bits(logits(again, ids), logits(model, ids))
    torch_slmops.optimize(model, strict=True)
    found = torch_slmops.report(model)
    assert found.rotated
    assert "rotated" in str(found)
    assert "rotated" not in str(torch_slmops.report(torch_slmops.optimize(small("llama"))))
    model.save_pretrained(tmp_path / "packed")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert_same_bits(logits(again, ids), logits(model, ids))


def test_outliers_are_spread() -> None:
    # Large channels of the norms cost most of the accuracy of int8 per token; not after rotating.
    original = small("llama", hidden_size=192)
    with torch.no_grad():
        for layer in original.model.layers:
            layer.input_layernorm.weight[3] *= 200
            layer.post_attention_layernorm.weight[5] *= 200
    ids = torch.randint(4, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(0))

    def kl(model: nn.Module) -> float:
        torch_slmops.optimize(model, weights="int8", act_group=-1, exclude="*.down_proj")
        found = torch_slmops.evaluate(model, original, texts=ids, layers=False).kl_mean
        assert found is not None
        return found.value

    plain = kl(copy.deepcopy(original))
    assert kl(torch_slmops.rotate(copy.deepcopy(original))) < 0.5 * plain
