"""The end of the last layer for wanted positions alone: the same logits, and nobody sees less."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from small_models import CACHE, logits, small, tokens, transformers
from test_fused_decoder import DECODERS, MASKS, layers_of
from torch import Tensor, nn

from torch_slmops import dequantize, fused_decoder, ops, optimize
from torch_slmops.last_positions import LastPositions
from torch_slmops.modules import Linear


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many positions each call of the op returns."""
    found: list[int] = []

    def note(x: Tensor, *args: Any) -> Tensor:
        y = ops.decoder_layers(x, *args)
        found.append(y.shape[1])
        return y

    monkeypatch.setattr(fused_decoder, "_decoder_layers", note)
    return found


def llama(**options: Any) -> Any:
    return optimize(small("llama", **options))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("family", DECODERS)
def test_same_bits_as_those_of_all(family: str, count: int, mask: str, kept: list[int]) -> None:
    model, ids, seen = optimize(small(family)), tokens(2, 9), torch.tensor(MASKS[mask])
    options = {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0)}
    whole = logits(model, ids, use_cache=False, **options)
    assert set(kept) == {9}
    got = logits(model, ids, use_cache=False, logits_to_keep=count, **options)
    assert_same_bits(got, whole[:, -count:].contiguous())
    assert kept[-1] == count


def test_a_prompt_in_parts(kept: list[int]) -> None:
    model, ids = llama(), tokens(2, 9)
    whole = logits(model, ids, use_cache=False)
    cache = {CACHE: transformers.DynamicCache(config=model.config)}
    for start, end in ((0, 5), (5, 8), (8, 9)):
        got = logits(model, ids[:, start:end], logits_to_keep=1, **cache)
        assert_same_bits(got, whole[:, end - 1 : end].contiguous())
    assert kept[1:] == [1, 1, 1]


def test_generate(kept: list[int]) -> None:
    model = llama()
    model.generate(tokens(1, 6), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert kept == [1, 1, 1]


@pytest.mark.parametrize("count", [0, 9, 20, torch.tensor([2, 7]), None])
def test_what_is_no_number_of_last_positions(count: Any, kept: list[int]) -> None:
    model, ids = llama(), tokens(2, 9)
    whole = logits(model, ids, use_cache=False)
    if count is not None:
        got = logits(model, ids, use_cache=False, logits_to_keep=count)
        part = whole[:, count] if isinstance(count, Tensor) else whole
        assert_same_bits(got, part.contiguous())
    assert set(kept) == {9}


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *args: None)


def _own_forward(module: nn.Module) -> None:
    vars(module)["forward"] = module.forward


def _other_norm(module: Any) -> None:
    module.norm = nn.LayerNorm(module.norm.weight.shape[0])


def _wrapped(model: Any) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **arguments: Any) -> Any:
            return self.inner(**arguments)

    model.model = Wrapper(model.model)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, _hook) for name in ("", "model", "model.norm", "model.layers.2")),
        *((name, _own_forward) for name in ("", "model", "model.norm", "model.layers.2")),
        ("model", _other_norm),
        ("", _wrapped),
    ],
)
def test_who_may_look_at_the_last_layer_sees_all(
    name: str, change: Callable[[nn.Module], None], kept: list[int]
) -> None:
    model, ids = llama(num_hidden_layers=3), tokens(1, 6)
    change(model.get_submodule(name))
    whole = logits(model, ids, use_cache=False)
    assert_same_bits(logits(model, ids, use_cache=False, logits_to_keep=1), whole[:, -1:])
    assert set(kept) == {6}


def test_hidden_states_are_those_of_all_positions(kept: list[int]) -> None:
    model, ids = llama(), tokens(1, 6)
    with torch.inference_mode():
        want = model(ids, output_hidden_states=True).hidden_states
        got = model(ids, output_hidden_states=True, logits_to_keep=1).hidden_states
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)
    logits(model, ids, logits_to_keep=1)
    assert kept[-1] == 1


def test_the_layers_alone_know_of_no_logits() -> None:
    model, ids = llama(), tokens(1, 6)
    with torch.inference_mode():
        assert model.model(ids).last_hidden_state.shape[1] == 6


def test_an_interrupted_call_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = llama(), tokens(1, 6)

    def interrupt(*args: Any) -> Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fused_decoder, "_decoder_layers", interrupt)
        with pytest.raises(KeyboardInterrupt):
            logits(model, ids, logits_to_keep=1)
    with torch.inference_mode():
        assert model.model(ids).last_hidden_state.shape[1] == 6


def test_a_call_within_a_call(kept: list[int]) -> None:
    model, other = llama(), llama()
    ids = tokens(1, 6)
    inner: list[Tensor] = []
    embed = model.model.embed_tokens.register_forward_hook(
        lambda *args: inner.append(logits(other, ids, use_cache=False))
    )
    logits(model, ids, logits_to_keep=2)
    assert kept == [6, 2]
    embed.remove()
    assert_same_bits(inner[0], logits(other, ids, use_cache=False))


def test_threads_want_their_own() -> None:
    model, ids = llama(), tokens(1, 6)
    whole = logits(model, ids, use_cache=False)
    wrong: list[int] = []

    def work(count: int) -> None:
        for _ in range(20):
            got = logits(model, ids, use_cache=False, logits_to_keep=count)
            if not torch.equal(got, whole[:, -count:]):
                wrong.append(count)

    workers = [threading.Thread(target=work, args=(count,)) for count in (1, 2, 3, 6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_model_that_stops_early(kept: list[int]) -> None:
    model, ids = llama(num_hidden_layers=4), tokens(1, 6)
    model.config.num_hidden_layers = 3
    whole = logits(model, ids, use_cache=False)
    assert_same_bits(logits(model, ids, use_cache=False, logits_to_keep=1), whole[:, -1:])
    assert kept == [6, 6, 6, 6, 6, 1]


def test_compiled() -> None:
    torch.compiler.reset()
    model, targets = llama(), []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
        layers = [n for n in graph.graph.nodes if "decoder_layers" in str(n.target)]
        targets.append([layer.args[-1] for layer in layers])
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for length in (6, 6, 9):
        ids = tokens(1, length)
        want = logits(model, ids, use_cache=False, logits_to_keep=1)
        assert_same_bits(logits(compiled, ids, use_cache=False, logits_to_keep=1), want)
    assert targets == [[0, 1], [0, 1]]  # for 6, and for any length
    whole = logits(model, ids, use_cache=False)
    assert_same_bits(logits(compiled, ids, use_cache=False), whole)
    assert targets[2:] == [[0, 0]]


def test_exported() -> None:
    model, ids = llama(), tokens(1, 6)
    options = {"use_cache": False, "logits_to_keep": 1}
    with torch.inference_mode():
        want = model(ids, **options).logits
    exported = torch.export.export(model, (ids,), options).module()
    assert_same_bits(exported(ids, **options).logits, want)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_want_the_same(copied: Callable[[Any], Any], kept: list[int]) -> None:
    model, ids = copied(llama()), tokens(1, 6)
    logits(model, ids, logits_to_keep=1)
    assert kept == [1]
    assert layers_of(model)


def test_the_class_keeps_its_name_and_comes_back() -> None:
    model = llama()
    kind = transformers.LlamaForCausalLM
    assert isinstance(model, LastPositions) and isinstance(model, kind)
    assert type(model).__name__ == kind.__name__ and type(model).forward is kind.forward
    assert type(dequantize(model)) is kind
    assert "slmops_stack" not in vars(model)


def test_a_new_model_of_the_class(kept: list[int]) -> None:
    model = type(llama())(small("llama").config).eval()
    optimize(model.model)
    logits(model, tokens(1, 6), logits_to_keep=1)
    optimize(model)
    logits(model, tokens(1, 6), logits_to_keep=1)
    assert kept[0] == 6 and kept[-1] == 1


def _sees_every_state(self: Any, input_ids: Tensor, logits_to_keep: int = 0, **rest: Any) -> Any:
    outputs = self.model(input_ids, **rest)
    assert outputs.last_hidden_state.shape[:2] == input_ids.shape
    hidden_states = outputs.last_hidden_state
    hidden_states = slice_logits_to_keep(hidden_states, logits_to_keep)  # noqa: F821
    return self.lm_head(hidden_states)


def _uses_the_state_twice(self: Any, input_ids: Tensor, logits_to_keep: int = 0) -> Any:
    outputs = self.model(input_ids)
    hidden_states = outputs.last_hidden_state
    hidden_states = hidden_states.cumsum(1)
    hidden_states = slice_logits_to_keep(hidden_states, logits_to_keep)  # noqa: F821
    return self.lm_head(hidden_states)


def _hands_the_state_on(self: Any, input_ids: Tensor, logits_to_keep: int = 0) -> Any:
    outputs = self.model(input_ids)
    hidden_states = outputs.last_hidden_state
    hidden_states = slice_logits_to_keep(hidden_states, logits_to_keep)  # noqa: F821
    return self.lm_head(hidden_states), outputs


@pytest.mark.parametrize("forward", [_sees_every_state, _uses_the_state_twice, _hands_the_state_on])
def test_a_forward_that_does_more(forward: Callable[..., Any]) -> None:
    model = small("llama")
    model.__class__ = type("Changed", (type(model),), {"forward": forward})
    assert not isinstance(optimize(model), LastPositions)


def _ends_with_the_loop(self: Any, input_ids: Tensor, **kwargs: Any) -> None:
    hidden_states = self.embed_tokens(input_ids)
    for layer in self.layers:
        hidden_states = layer(hidden_states, **kwargs)


def _norms_a_part(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
    hidden_states = self.embed_tokens(input_ids)
    for layer in self.layers:
        hidden_states = layer(hidden_states, **kwargs)
    hidden_states = self.norm(hidden_states[:, 1:])
    return BaseModelOutputWithPast(last_hidden_state=hidden_states)  # noqa: F821


def _returns_the_state_twice(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
    hidden_states = self.embed_tokens(input_ids)
    for layer in self.layers:
        hidden_states = layer(hidden_states, **kwargs)
    hidden_states = self.norm(hidden_states)
    return BaseModelOutputWithPast(  # noqa: F821
        last_hidden_state=hidden_states, hidden_states=hidden_states
    )


@pytest.mark.parametrize("forward", [_ends_with_the_loop, _norms_a_part, _returns_the_state_twice])
def test_a_parent_that_does_more(forward: Callable[..., Any]) -> None:
    model = small("llama")
    model.model.__class__ = type("Changed", (type(model.model),), {"forward": forward})
    assert not isinstance(optimize(model, activations="int8"), LastPositions)


def test_layers_that_are_not_fused_want_nothing() -> None:
    model = optimize(small("llama"), fuse=False)
    assert type(model) is transformers.LlamaForCausalLM
    assert isinstance(model.lm_head, Linear)
