"""Caches whose keys and values are int8: what they hold, and what models make of them."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from int8_kv import int8_heads
from small_models import CACHE, logits, small, tokens
from test_cache import both
from test_fused_decoder import DECODERS, MASKS, Calls, layers_of
from torch import Tensor

import torch_slmops
from torch_slmops import attention, ops, optimize, report
from torch_slmops.cache import GrowingLayer, GrowingSlidingWindowLayer, Int8Layer, adopt
from torch_slmops.int8_tensor import Int8Tensor

layers = pytest.importorskip("transformers.cache_utils")
KEPT = [family for family in DECODERS if family != "mistral"]  # all of whose layers slide


def rounded(x: Tensor, values: bool) -> Tensor:
    """[B, H, L, D] as int8 has it."""
    codes, scale = int8_heads(x.transpose(1, 2), values)
    return ops.read_int8(codes, scale[:, :, : x.shape[2]], x.shape[3], values, x.dtype)


@pytest.mark.parametrize("seed", range(30))
def test_any_sequence_of_calls(seed: int) -> None:
    """What a dynamic layer holds that was given the rounded keys and values."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    theirs, ours = layers.DynamicLayer(), adopt(layers.DynamicLayer(), "int8")
    batch, pair = 2, (theirs, ours)
    d = (4, 20)[seed % 2]
    for step in range(40):
        what, length = f"seed {seed}, step {step}", dice.randint(1, 40)
        actions = ["update"] * 5 + ["reserve", "reorder", "crop", "select", "repeat", "copy"]
        action = dice.choice(actions)
        if action in ("update", "reserve"):
            k, v = torch.randn(2, batch, 3, length, d).to((torch.float32, torch.bfloat16)[seed % 2])
            assert theirs.get_mask_sizes(length) == ours.get_mask_sizes(length), what
            theirs.update(rounded(k, False), rounded(v, True))
            if action == "update":
                found = ours.update(k, v)
                assert_same_bits(found[0].contiguous(), theirs.keys, what)
                assert_same_bits(found[1].contiguous(), theirs.values, what)
            else:
                parts, start = ours.reserve_int8(k, v)
                for x, codes, scale, kind in zip(
                    (k, v), parts[:2], parts[2:], (False, True), strict=True
                ):
                    ops.store_int8_(x.transpose(1, 2), codes, scale, start, kind)
                ours.advance(length)
        elif action == "reorder":
            both(pair, "reorder_cache", torch.randint(0, batch, (batch,)))
        elif action == "crop" and theirs.get_seq_length() > 4:
            both(pair, "crop", -dice.randint(0, 3))
        elif action == "select" and theirs.get_seq_length() > 0:
            some = torch.randint(0, batch, (dice.randint(1, 3),))
            batch = len(some)
            both(pair, "batch_select_indices", some)
        elif action == "repeat" and theirs.get_seq_length() > 0 and batch < 4:
            batch *= 2
            both(pair, "batch_repeat_interleave", 2)
        elif action == "copy":
            ours = copy.deepcopy(ours)
            pair = (theirs, ours)
            if dice.random() < 0.3:
                both(pair, "reset")
        assert theirs.get_seq_length() == ours.get_seq_length(), what
        if theirs.get_seq_length() > 0:
            assert_same_bits(ours.keys.contiguous(), theirs.keys.contiguous(), what)
            assert_same_bits(ours.values.contiguous(), theirs.values.contiguous(), what)
    assert type(ours) is Int8Layer


def test_tokens_are_not_copied_each_time() -> None:
    layer, places, k = adopt(layers.DynamicLayer(), "int8"), set(), torch.zeros(1, 2, 1, 64)
    for _ in range(1000):
        layer.update(k, k)
        places.add(layer._keys.codes.data_ptr())
    assert len(places) <= 6
    memory = [part for name in ("_keys", "_values") for part in vars(layer)[name].parts]
    size = sum(part.numel() * part.element_size() for part in memory)
    assert size <= 2 * 1024 * 2 * 2 * (64 + 4)  # twice the slots, heads, keys and values


def test_floats_that_are_there_are_rounded() -> None:
    layer, k = layers.DynamicLayer(), torch.randn(1, 2, 5, 8)
    layer.update(k, k)
    assert type(adopt(layer, "int8")) is Int8Layer
    assert_same_bits(layer.keys, rounded(k, False))
    more = torch.randn(1, 2, 1, 8)
    expected = torch.cat([rounded(k, True), rounded(more, True)], 2)
    assert_same_bits(layer.update(more, more)[1].contiguous(), expected)


def test_memory_of_inference_mode_is_used_outside() -> None:
    layer = adopt(layers.DynamicLayer(), "int8")
    with torch.inference_mode():
        k = torch.randn(1, 2, 5, 8)
        layer.update(k, k)
    more = torch.randn(1, 2, 1, 8)
    expected = torch.cat([rounded(k, False), rounded(more, False)], 2)
    assert_same_bits(layer.update(more, more)[0].contiguous(), expected)


def test_gradients_are_refused() -> None:
    k = torch.randn(1, 2, 5, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="gradients"):
        adopt(layers.DynamicLayer(), "int8").update(k, k)


def test_a_tensor_of_int8_is_one_of_floats() -> None:
    k = torch.randn(2, 3, 7, 20).bfloat16()
    layer = adopt(layers.DynamicLayer(), "int8")
    keys, values = layer.update(k, k)
    assert isinstance(keys, Int8Tensor)
    assert (keys.shape, keys.dtype, keys.device) == (k.shape, k.dtype, k.device)
    assert_same_bits(keys.transpose(1, 2).contiguous(), rounded(k, False).transpose(1, 2))
    assert_same_bits((values + 0)[:, 1], rounded(k, True)[:, 1] + 0)
    assert "Int8Tensor" in repr(values)


def caches(model: Any) -> dict[str, Any]:
    return {
        "config": torch_slmops.Cache(model.config, dtype="int8"),
        "plain": torch_slmops.Cache(dtype="int8"),
    }


@pytest.mark.parametrize("own", ["slmops", "sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3"])
def test_models_that_are_not_optimized(family: str, own: str) -> None:
    """Attention "slmops" computes on int8, others on the floats that it stands for."""
    attention.register_attention()
    model, ids = small(family), tokens(2, 12)
    model.set_attn_implementation(own)
    exact = logits(model, ids)
    for cache in caches(model).values():
        parts = [logits(model, part, **{CACHE: cache}) for part in ids.split([6, 3, 1, 1, 1], 1)]
        error = (torch.cat(parts, 1) - exact).abs().max()
        assert 0 < error < 0.05 * exact.abs().max()
        assert cache.get_seq_length() == 12
        sliding = [isinstance(layer, GrowingSlidingWindowLayer) for layer in cache.layers]
        assert [type(x) is Int8Layer for x in cache.layers] == [not s for s in sliding]


def steps(model: Any, mask: Tensor, cache: Any) -> Tensor:
    """Logits of a prompt of 7 tokens and of 2 that follow one by one."""
    ids, found = tokens(2, 9), []
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for part in torch.arange(9).split([7, 1, 1]):
        options = {"attention_mask": mask[:, : int(part[-1]) + 1], CACHE: cache}
        found.append(logits(model, ids[:, part], position_ids=positions[:, part], **options))
    return torch.cat(found, 1)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", KEPT)
def test_whole_layers_give_the_bits_of_their_parts(
    family: str, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = optimize(small(family, dtype=torch.bfloat16), kv_cache="int8")
    seen = torch.tensor(MASKS[mask])
    calls = Calls(monkeypatch)
    cache = layers.DynamicCache(config=model.config)
    whole = steps(model, seen, cache)
    assert any(isinstance(layer, Int8Layer) for layer in cache.layers)
    assert sum(calls.layers) == 6
    for layer in layers_of(model):
        layer.mlp.register_forward_hook(lambda *args: None)
    again = steps(model, seen, layers.DynamicCache(config=model.config))
    assert_same_bits(again, whole, "part by part")
    assert sum(calls.layers) == 6
    own = steps(model, seen, torch_slmops.Cache(model.config, dtype="int8"))
    assert_same_bits(own, whole, "a cache handed in")
    without = logits(model, tokens(2, 9), attention_mask=seen, use_cache=False)
    if mask == "none":
        assert_same_bits(without, whole, "no cache")
    floats = steps(model, seen, torch_slmops.Cache(model.config))
    assert not torch.equal(floats, whole)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_padding_and_prefill_change_nothing(family: str) -> None:
    model = optimize(small(family), kv_cache="int8")
    mask = torch.tensor(MASKS["left padding"])
    together = steps(model, mask, torch_slmops.Cache(model.config, dtype="int8"))
    ids = tokens(2, 9)
    alone = logits(model, ids[:1, 4:], **{CACHE: torch_slmops.Cache(model.config, dtype="int8")})
    assert_same_bits(together[:1, 4:].contiguous(), alone)


def test_generate() -> None:
    """Greedy, with beams, with a cache handed in; who hands in another one, gets that."""
    model = optimize(small("llama"), kv_cache="int8")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    options |= {"return_dict_in_generate": True}
    found = model.generate(tokens(2, 9), **options)
    name = "past_key_values" if "past_key_values" in found else "cache"
    assert all(type(layer) is Int8Layer for layer in found[name].layers)
    cache = torch_slmops.Cache(model.config, dtype="int8")
    own = model.generate(tokens(2, 9), past_key_values=cache, **options)
    assert torch.equal(own.sequences, found.sequences)
    beams = model.generate(tokens(2, 9), num_beams=3, **options)
    assert beams.sequences.shape == (2, 17)
    floats = torch_slmops.Cache(model.config)
    model.generate(tokens(2, 9), past_key_values=floats, **options)
    assert all(type(layer) is GrowingLayer for layer in floats.layers)
    options |= {"cache_implementation": "static", "disable_compile": True}
    assert model.generate(tokens(2, 9), **options).sequences.shape == (2, 17)
    lookup = model.generate(tokens(1, 9), prompt_lookup_num_tokens=3, max_new_tokens=8)
    plain = model.generate(tokens(1, 9), max_new_tokens=8, do_sample=False)
    assert torch.equal(lookup, plain)


def test_report_and_options(tmp_path: Any) -> None:
    model = optimize(small("gemma3"), kv_cache="int8")
    words = [row.now for row in report(model).fused if "qkv_rotary" in row.now]
    assert sorted("int8 keys and values" in text for text in words) == [False, True]
    assert "int8 keys and values" in str(report(model))
    torch_slmops.save(model, tmp_path / "model.safetensors")
    again = torch_slmops.load(tmp_path / "model.safetensors", small("gemma3"))
    assert str(report(again)) == str(report(model))
    assert "int8 keys" in str(report(copy.deepcopy(model)))
    with pytest.raises(ValueError, match="kv_cache"):
        optimize(small("llama"), kv_cache="int4")
    with pytest.raises(ValueError, match="kv_cache"):
        torch_slmops.Cache(dtype="int4")
