"""Rotary tables in a model: those of transformers, in float32, where they can be taken over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bits import assert_same_bits
from small_models import logits, small, tokens

from torch_slmops import optimize, report
from torch_slmops.fused_rotary import FusedRotary, match_rotary

POSITIONS = torch.tensor([[0, 1, 2, 17, 63, 127], [5, 6, 7, 8, 9, 10]])


def rotary_of(**parameters: Any) -> Any:
    rope = {"rope_theta": 10000.0, **parameters}
    return small("llama", rope_parameters=rope, num_hidden_layers=1)


KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn of its own": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16,
        "beta_slow": 2,
        "attention_factor": 0.7,
        "truncate": False,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_those_of_transformers(kind: str) -> None:
    model = rotary_of(**KINDS[kind])
    want = model.model.rotary_emb(torch.zeros(1), POSITIONS)
    optimize(model)
    assert isinstance(model.model.rotary_emb, FusedRotary)
    got = model.model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), POSITIONS)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.float32
        # An fp32 angle below 128 is off by 2^-18 at most: its frequency and it are rounded.
        assert float((ours - theirs).abs().max()) < 2 * 128 * 2.0**-24


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_other_kinds_keep_the_tables_of_transformers(kind: str) -> None:
    options: dict[str, Any] = {"factor": 2.0}
    if kind == "longrope":
        ones = [1.0] * 8
        options |= {
            "short_factor": ones,
            "long_factor": ones,
            "original_max_position_embeddings": 64,
        }
    model = optimize(rotary_of(rope_type=kind, **options), strict=True)
    assert not isinstance(model.model.rotary_emb, FusedRotary)
    found = report(model)
    reasons = {row.name: row.reason for row in found.unfused}
    assert f"rope type '{kind}'" in reasons["model.rotary_emb"]
    assert ("LlamaRotaryEmbedding", 1) in found.not_portable
    assert logits(model, tokens(1, 5)).isfinite().all()


def test_tables_of_each_type_of_layer() -> None:
    model = small("gemma3")
    rotary = model.model.rotary_emb
    want = {kind: rotary(torch.zeros(1), POSITIONS, kind) for kind in rotary.layer_types}
    optimize(model)
    for kind, theirs in want.items():
        for one, other in zip(rotary(torch.zeros(1), POSITIONS, kind), theirs, strict=True):
            assert float((one - other).abs().max()) < 2 * 128 * 2.0**-24


def test_conversion_does_not_round_the_frequencies() -> None:
    model = optimize(small("llama"))
    before = model.model.rotary_emb(torch.zeros(1), POSITIONS)
    model.to(torch.bfloat16)
    for one, other in zip(model.model.rotary_emb(torch.zeros(1), POSITIONS), before, strict=True):
        assert_same_bits(one, other)


def test_frequencies_that_a_conversion_rounded_are_restored() -> None:
    """model.to(bfloat16) rounds transformers' buffer; the config still has what it came from."""
    model = small("llama")
    want = optimize(small("llama")).model.rotary_emb(torch.zeros(1), POSITIONS)
    optimize(model.to(torch.bfloat16))
    got = model.model.rotary_emb(torch.zeros(1), POSITIONS)
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)


def test_other_frequencies_are_left() -> None:
    model = small("llama")
    model.model.rotary_emb.inv_freq.mul_(1.01)
    assert "are not those of rope type" in str(match_rotary(model.model.rotary_emb))
    optimize(model)
    assert not isinstance(model.model.rotary_emb, FusedRotary)


def test_tables_stay_where_an_attention_is_not_fused() -> None:
    model = optimize(small("llama"), exclude="model.layers.1.self_attn")
    assert not isinstance(model.model.rotary_emb, FusedRotary)
    reasons = {row.name: row.reason for row in report(model).unfused}
    assert "LlamaAttention uses them" in reasons["model.rotary_emb"]
