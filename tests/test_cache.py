"""Caches that grow in place do what transformers' own do."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from small_models import CACHE, logits, small, tokens, transformers

import torch_slmops
from torch_slmops import optimize
from torch_slmops.cache import GrowingLayer, GrowingSlidingWindowLayer, adopt

layers = pytest.importorskip("transformers.cache_utils")


def both(pair: tuple[Any, Any], method: str, *args: Any) -> list[Any]:
    """What a method of both gives, or the class of the error that it raises."""
    found = []
    for layer in pair:
        try:
            found.append(getattr(layer, method)(*args))
        except Exception as error:  # the same one is expected of both
            found.append(type(error))
    return found


def assert_alike(found: list[Any], what: str) -> None:
    theirs, ours = found
    if isinstance(theirs, tuple) and isinstance(theirs[0], torch.Tensor):
        for a, b in zip(theirs, ours, strict=True):
            assert_same_bits(b.contiguous(), a.contiguous(), what)
    else:
        assert theirs == ours, what


@pytest.mark.parametrize("seed", range(60))
def test_any_sequence_of_calls(seed: int) -> None:
    dice = random.Random(seed)
    torch.manual_seed(seed)

    def new() -> Any:
        window = 2 + seed % 7
        sliding = layers.DynamicSlidingWindowLayer(sliding_window=window)
        return sliding if seed % 2 else layers.DynamicLayer()

    theirs, ours = new(), adopt(new())
    if dice.random() < 0.5 and hasattr(theirs, "activate_past_recording"):
        theirs.activate_past_recording()
        ours.activate_past_recording()
    batch, pair = 2, (theirs, ours)
    for step in range(40):
        what, length = f"seed {seed}, step {step}", dice.randint(1, 12)
        action = dice.choice(["update"] * 5 + ["reorder", "crop", "select", "repeat", "copy"])
        if action == "update":
            k, v = torch.randn(2, batch, 3, length, 4)
            assert theirs.get_mask_sizes(length) == ours.get_mask_sizes(length), what
            assert_alike(both(pair, "update", k, v), what)
        elif action == "reorder":
            order = torch.randint(0, batch, (batch,))
            both(pair, "reorder_cache", order)
        elif action == "crop" and theirs.get_seq_length() > 4:
            count = -dice.randint(0, 3)
            assert_alike(both(pair, "crop", count), what)
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
            assert_alike([(theirs.keys, theirs.values), (ours.keys, ours.values)], what)


def test_tokens_are_not_copied_each_time() -> None:
    layer, places = adopt(layers.DynamicLayer()), set()
    for _ in range(1000):
        k = torch.zeros(1, 2, 1, 8)
        layer.update(k, k)
        places.add(layer.keys.data_ptr())
    assert len(places) <= 6  # 64, 128, 256, 512, 1024
    window = adopt(layers.DynamicSlidingWindowLayer(sliding_window=50))
    for _ in range(1000):
        window.update(k, k)
    assert window._keys.tensor.shape[2] <= 200


def test_a_layer_with_tokens_is_adopted() -> None:
    theirs = layers.DynamicLayer()
    k = torch.randn(1, 2, 5, 8)
    theirs.update(k, k)
    ours = adopt(theirs)
    assert ours is theirs and type(ours) is GrowingLayer
    more = torch.randn(1, 2, 1, 8)
    assert_same_bits(ours.update(more, more)[0].contiguous(), torch.cat([k, more], 2))
    static = layers.StaticLayer(max_cache_len=4)
    assert adopt(static) is static and type(static) is layers.StaticLayer


def test_memory_of_inference_mode_is_used_outside() -> None:
    layer = adopt(layers.DynamicLayer())
    with torch.inference_mode():
        k = torch.randn(1, 2, 5, 8)
        layer.update(k, k)
    more = torch.randn(1, 2, 1, 8)
    assert_same_bits(layer.update(more, more)[0].contiguous(), torch.cat([k, more], 2))


@pytest.mark.parametrize("sliding", [False, True])
def test_gradients_go_through(sliding: bool) -> None:
    layer = layers.DynamicSlidingWindowLayer(sliding_window=4) if sliding else layers.DynamicLayer()
    adopt(layer)
    parts = [torch.randn(1, 2, 3, 8, requires_grad=True) for _ in range(3)]
    total = sum(layer.update(part, part)[0].sum() for part in parts)
    total.backward()
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in parts)


@pytest.mark.parametrize("seed", range(20))
def test_keys_in_blocks(seed: int) -> None:
    """As the op fills them, then as other code reads and changes them."""
    dice = random.Random(seed)
    torch.manual_seed(seed)
    theirs, ours = layers.DynamicLayer(), adopt(layers.DynamicLayer())
    pair, batch = (theirs, ours), 2
    for _ in range(15):
        k, v = torch.randn(2, batch, 3, dice.randint(1, 20), 4)
        keys, values, start = ours.reserve(k, v, blocked=True)
        theirs.update(k, v)
        if keys.dim() == 5:
            for i in range(k.shape[2]):
                keys[:, :, (start + i) // 16, :, (start + i) % 16] = k[:, :, i]
        else:
            keys[:, :, start : start + k.shape[2]] = k
        values[:, :, start : start + k.shape[2]] = v
        ours.advance(k.shape[2])
        action = dice.choice(["read", "reorder", "crop", "crop", "copy", "update", "select"])
        if action == "reorder":
            both(pair, "reorder_cache", torch.randint(0, batch, (batch,)))
        elif action == "crop":
            both(pair, "crop", -dice.randint(0, theirs.get_seq_length() - 1))
        elif action == "copy":
            ours = copy.deepcopy(ours)
            pair = (theirs, ours)
        elif action == "update" and seed % 2:
            assert_alike(both(pair, "update", k, v), "update")
        elif action == "select" and seed % 3 == 0:
            both(pair, "batch_select_indices", torch.tensor([1, 0]))
        assert theirs.get_seq_length() == ours.get_seq_length()
        assert_alike([(theirs.keys, theirs.values), (ours.keys, ours.values)], action)


def test_generate_uses_growing_layers() -> None:
    model = optimize(small("gemma3"))
    found = model.generate(tokens(1, 5), max_new_tokens=3, return_dict_in_generate=True)
    cache = found["past_key_values" if "past_key_values" in found else "cache"]
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [GrowingSlidingWindowLayer, GrowingLayer]


def test_cache_for_any_model() -> None:
    model, ids = small("gemma3"), tokens(2, 12)
    for config in (model.config, None):
        theirs = transformers.DynamicCache(config=config)
        ours = torch_slmops.Cache(config=config)
        for part in ids.split([6, 3, 1, 1, 1], dim=1):
            expected = logits(model, part, **{CACHE: theirs})
            assert_same_bits(logits(model, part, **{CACHE: ours}), expected)
        assert isinstance(ours.layers[1], GrowingLayer)
        assert ours.get_seq_length() == 12
