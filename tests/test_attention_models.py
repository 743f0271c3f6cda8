"""Attention "slmops" in transformers models that are not optimized otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bits import assert_same_bits
from small_models import DECODERS, FAMILIES, logits, small, tokens
from torch import Tensor, nn

from torch_slmops import attention

transformers = pytest.importorskip("transformers")
sdpa_mask = pytest.importorskip("transformers.masking_utils").sdpa_mask


def exact_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """All in the dtype of the inputs, where transformers' eager attention has a float32 softmax."""
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if attention_mask is None:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool)
        attention_mask = attention_mask.tril() if module.is_causal else attention_mask
    p = scores.masked_fill(~attention_mask, -torch.inf).softmax(-1).nan_to_num(0.0)
    return (p @ value).transpose(1, 2), None


@pytest.fixture(autouse=True)
def registered() -> None:
    attention.register_attention()
    transformers.AttentionInterface.register("exact", exact_attention)
    transformers.AttentionMaskInterface.register("exact", sdpa_mask)


def padded(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask with 0, 2, 4, ... tokens of padding on the left."""
    ids = tokens(batch, length)
    hidden = torch.arange(batch)[:, None] * 2 > torch.arange(length)
    return ids.masked_fill(hidden, 1), (~hidden).long()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_as_exact_as_those_of_transformers(family: str) -> None:
    """Both are backward stable sums of the same terms in other orders, so both miss the float64
    model by errors of one size; the largest of a few hundred errors varies by less than 4 times.
    """
    model = small(family)
    ids, mask = padded(3, 11)
    options = {"attention_mask": mask}
    theirs = logits(model, ids, **options)
    wide = small(family, dtype=torch.float64)
    wide.set_attn_implementation("exact")
    if family.endswith("_moe"):
        wide.set_experts_implementation("eager")  # the others know no float64
    exact = logits(wide, ids, **options)
    model.set_attn_implementation("slmops")
    ours = logits(model, ids, **options)
    real = mask.bool()
    error = (ours.double() - exact)[real].abs().max()
    assert error <= 4 * (theirs.double() - exact)[real].abs().max() + 2.0**-24 * exact.abs().max()


class Calls:
    """Counts the calls of `ops.attention`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        real = attention.ops.attention

        def counted(*arguments: Any) -> Tensor:
            self.count += 1
            return real(*arguments)

        monkeypatch.setattr(attention.ops, "attention", counted)


@pytest.mark.parametrize("family", DECODERS)
def test_generate_with_left_padding(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that the model's own implementation gives: sliding windows, softcaps, and all."""
    model = small(family)
    ids, mask = padded(3, 9)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)
    model.set_attn_implementation("slmops")
    calls = Calls(monkeypatch)
    assert torch.equal(model.generate(ids, **options), expected)
    assert calls.count == 6 * 2


def test_generate_with_a_static_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("llama")
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(tokens(2, 9), **options)
    model.set_attn_implementation("slmops")
    calls = Calls(monkeypatch)
    options |= {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(tokens(2, 9), **options), expected)
    assert calls.count > 0


def test_attention_does_not_depend_on_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The results of the op in a padded batch are those of the sequence alone, given equal inputs.

    The first layer's: later ones, and its own inputs, come from torch's matmul, whose bits may
    depend on the batch. So q, k and v of the batch are given to both.
    """
    model = small("llama")
    model.set_attn_implementation("slmops")
    seen: list[tuple[Any, ...]] = []
    real = attention.ops.attention

    def recorded(*arguments: Any) -> Tensor:
        seen.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(attention.ops, "attention", recorded)
    ids, mask = padded(3, 11)
    positions = (mask.cumsum(1) - 1).clamp_min(0)  # as generate has them
    logits(model, ids, attention_mask=mask, position_ids=positions)
    q, k, v, _, first, *_ = seen[0]
    assert first is not None
    assert first.tolist() == [0, -2, -4]
    whole = real(*seen[0])
    for b in range(3):
        alone = (x[b : b + 1, 2 * b :] for x in (q, k, v))
        expected = real(*alone, None, None, True, *seen[0][6:])
        assert_same_bits(whole[b : b + 1, 2 * b :], expected)


def test_training_is_sdpa() -> None:
    model, ids = small("llama", attention_dropout=0.1), tokens(1, 5)
    losses = []
    for way in ("sdpa", "slmops"):
        model.set_attn_implementation(way)
        model.train().zero_grad()
        torch.manual_seed(1)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append((loss.detach(), model.model.layers[0].self_attn.q_proj.weight.grad.clone()))
    for one, other in zip(*losses, strict=True):
        assert_same_bits(one, other)


def test_sinks_are_refused() -> None:
    model = small("llama")
    q = torch.zeros(1, 2, 3, 8)
    with pytest.raises(RuntimeError, match="sinks"):
        attention.attention_forward(model, q, q, q, None, s_aux=torch.zeros(2))
