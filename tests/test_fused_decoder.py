"""Whole decoder layers as one op: the bits of their parts, and when the parts run instead."""

from __future__ import annotations

import copy
import gc
import itertools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from small_models import CACHE, logits, small, tokens, transformers
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from torch_slmops import dequantize, fused_decoder, ops, optimize, report
from torch_slmops.fused_decoder import FusedDecoderLayer

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma3", "granite", "olmo2")
MASKS = {
    "none": [[1] * 9] * 2,
    "left padding": [[0] * 4 + [1] * 5, [1] * 9],
}


def layers_of(model: nn.Module) -> list[FusedDecoderLayer]:
    return [module for module in model.modules() if isinstance(module, FusedDecoderLayer)]


class Calls:
    """Notes how many layers each call of the op computes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layers: list[int] = []

        def count(x: Tensor, weights: list[Tensor], *args: Any) -> Tensor:
            self.layers.append(len(weights) // len(ops.LAYER_PARTS))
            return ops.decoder_layers(x, weights, *args)

        monkeypatch.setattr(fused_decoder, "_decoder_layers", count)


def steps(model: Any, mask: Tensor, **options: Any) -> Tensor:
    """Logits of a prompt of 7 tokens and of 2 that follow one by one."""
    ids, found = tokens(2, 9), []
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = transformers.DynamicCache(config=model.config)
    for part in torch.arange(9).split([7, 1, 1]):
        found.append(
            logits(
                model,
                ids[:, part],
                attention_mask=mask[:, : int(part[-1]) + 1],
                position_ids=positions[:, part],
                **{CACHE: cache},
                **options,
            )
        )
    return torch.cat(found, 1)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", DECODERS)
def test_same_bits_as_the_parts(
    family: str, dtype: torch.dtype, mask: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = optimize(small(family, dtype=dtype)), torch.tensor(MASKS[mask])
    calls = Calls(monkeypatch)
    whole = steps(model, seen)
    assert sum(calls.layers) == 6
    for layer in layers_of(model):
        layer.slmops_run = None
    assert_same_bits(steps(model, seen), whole, "one by one")
    assert calls.layers[-6:] == [1] * 6
    for layer in layers_of(model):
        layer.mlp.register_forward_hook(lambda *args: None)
    assert_same_bits(steps(model, seen), whole, "part by part")
    assert sum(calls.layers) == 12


@pytest.mark.parametrize("family", DECODERS)
def test_padding_batch_and_prefill_change_nothing(family: str) -> None:
    model, mask = optimize(small(family)), torch.tensor(MASKS["left padding"])
    together = steps(model, mask)
    ids = tokens(2, 9)
    alone = logits(model, ids[:1, 4:], use_cache=False)
    assert_same_bits(together[:1, 4:].contiguous(), alone)
    assert_same_bits(together[1:].contiguous(), logits(model, ids[1:], use_cache=False))


def test_a_mask_for_all_queries() -> None:
    model, ids = optimize(small("llama")), tokens(2, 5)
    mask = torch.rand(2, 1, 1, 5) < 0.7
    mask[..., 0] = True
    got = logits(model, ids, attention_mask=mask, use_cache=False)
    whole = mask.expand(-1, -1, 5, -1).contiguous()
    assert_same_bits(got, logits(model, ids, attention_mask=whole, use_cache=False))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_layers_that_are_alike_run_at_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    model = optimize(small(family, num_hidden_layers=5))
    want = logits(model, tokens(1, 4), use_cache=False)
    assert calls.layers == [5]
    model.model.layers[2].register_forward_hook(lambda *args: None)
    assert_same_bits(logits(model, tokens(1, 4), use_cache=False), want)
    assert calls.layers == [5] + [1] * 5


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *args: None)


def _own_forward(module: nn.Module) -> None:
    vars(module)["forward"] = module.forward


def _train(module: nn.Module) -> None:
    module.train()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("", _hook),
        ("", _own_forward),
        ("", _train),
        ("mlp", _train),
        *itertools.product(("self_attn", "self_attn.q_proj", "mlp"), (_hook, _own_forward)),
        ("input_layernorm", _own_forward),
        ("mlp.act_fn", _hook),
    ],
)
def test_what_looks_into_a_run_ends_it(
    name: str, change: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a step that found it whole; the original forwards round a little otherwise."""
    model = optimize(small("llama", num_hidden_layers=4))
    calls = Calls(monkeypatch)
    want = logits(model, tokens(1, 4), use_cache=False)
    change(model.model.layers[2].get_submodule(name))
    calls.layers.clear()
    assert float((logits(model, tokens(1, 4), use_cache=False) - want).abs().max()) < 3e-3
    itself = name == "" and change is not _train  # its own call does what was added
    assert calls.layers == [1] * (4 if itself else 3)


def test_a_hook_that_is_gone_or_elsewhere_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = optimize(small("llama", num_hidden_layers=3))
    calls = Calls(monkeypatch)
    want = logits(model, tokens(1, 4), use_cache=False)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *args: None)
    logits(model, tokens(1, 4), use_cache=False)
    handle.remove()
    nn.Linear(1, 1).register_forward_hook(lambda *args: None)
    assert_same_bits(logits(model, tokens(1, 4), use_cache=False), want)
    assert (calls.layers[0], calls.layers[-1]) == (3, 3)


def test_hooks_of_all_modules_see_every_layer() -> None:
    model = optimize(small("llama", num_hidden_layers=3))
    want = logits(model, tokens(1, 4), use_cache=False)
    seen: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        got = logits(model, tokens(1, 4), use_cache=False)
    finally:
        handle.remove()
    assert float((got - want).abs().max()) < 3e-3
    for layer in model.model.layers:
        assert {layer, layer.self_attn, layer.self_attn.q_proj, layer.mlp.act_fn} <= set(seen)
    seen.clear()
    assert_same_bits(logits(model, tokens(1, 4), use_cache=False), want)
    assert not seen


def test_a_forward_of_an_instance_is_called() -> None:
    model = optimize(small("llama", num_hidden_layers=3))
    want = logits(model, tokens(1, 4), use_cache=False)
    seen: list[int] = []
    for number, name in ((1, ""), (1, "mlp"), (2, "self_attn.o_proj")):
        module = model.model.layers[number].get_submodule(name)
        forward = module.forward

        def noted(*args: Any, forward: Any = forward, number: int = len(seen), **kw: Any) -> Any:
            seen.append(number)
            return forward(*args, **kw)

        module.forward = noted
        before = len(seen)
        assert_same_bits(logits(model, tokens(1, 4), use_cache=False), want)
        assert len(seen) > before, name


@pytest.mark.parametrize("part", ["weight", "module", "bias", "last"])
def test_a_part_of_a_run_is_another_one(part: str) -> None:
    """As a model is computed that had it from the start."""
    model, other = (optimize(small("llama", num_hidden_layers=3)) for _ in "ab")
    source = optimize(small("llama", num_hidden_layers=3)).model.layers[0]
    want = logits(model, tokens(1, 4), use_cache=False)
    for changed in (model, other):
        layer = changed.model.layers[2]
        if part == "weight":
            layer.self_attn.o_proj.packed = source.self_attn.o_proj.packed
        elif part == "module":
            layer.mlp = source.mlp
        elif part == "bias":
            layer.mlp.down_proj.bias = nn.Parameter(torch.ones(96), requires_grad=False)
        else:
            changed.model.layers[2] = source
    assert "_slmops_snapshot" in vars(model.model.layers[0])
    assert "_slmops_snapshot" not in vars(other.model.layers[0])
    got = logits(model, tokens(1, 4), use_cache=False)
    assert not got.equal(want)
    assert_same_bits(got, logits(other, tokens(1, 4), use_cache=False))


def test_copies_of_a_model_that_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = optimize(small("llama", num_hidden_layers=3))
    want = logits(model, tokens(1, 4), use_cache=False)
    calls = Calls(monkeypatch)
    again = copy.deepcopy(model)
    assert_same_bits(logits(again, tokens(1, 4), use_cache=False), want)
    again.model.layers[1].self_attn.o_proj.packed = again.model.layers[0].self_attn.o_proj.packed
    assert not logits(again, tokens(1, 4), use_cache=False).equal(want)
    assert_same_bits(logits(model, tokens(1, 4), use_cache=False), want)
    assert calls.layers == [3] * 3


def test_another_dtype_after_a_step() -> None:
    model, other = (optimize(small("llama", num_hidden_layers=3)) for _ in "ab")
    logits(model, tokens(1, 4), use_cache=False)
    got = logits(model.to(torch.bfloat16), tokens(1, 4), use_cache=False)
    assert_same_bits(got, logits(other.to(torch.bfloat16), tokens(1, 4), use_cache=False))


def test_slices_of_the_list_of_layers() -> None:
    model = optimize(small("llama", num_hidden_layers=5))
    layers = model.model.layers
    for cut in (slice(3), slice(1, 4), slice(None, None, -2), slice(9)):
        part = layers[cut]
        assert isinstance(part, nn.ModuleList)
        assert list(part) == list(layers)[cut]
        assert [name for name, _ in part.named_children()] == [str(i) for i in range(len(part))]
    assert layers[-1] is list(layers)[4]
    part = layers[:2].append(layers[4])
    assert len(part) == 3 and len(layers) == 5
    assert type(dequantize(model).model.layers) is nn.ModuleList


def test_layers_of_several_types(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    types = ["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 2
    model = optimize(small("gemma3", num_hidden_layers=6, layer_types=types))
    logits(model, tokens(1, 12))
    assert calls.layers == [3, 1, 2]


def test_hidden_states_are_recorded() -> None:
    model = optimize(small("llama", num_hidden_layers=4))
    want = logits(model, tokens(1, 5))
    with torch.inference_mode():
        found = model(tokens(1, 5), output_hidden_states=True)
    assert len(found.hidden_states) == 5
    assert_same_bits(found.logits, want)
    assert not any(a.equal(b) for a, b in itertools.pairwise(found.hidden_states))


def test_layers_run_at_once_again_after_outputs_were_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers' hooks for it stay."""
    model, ids = optimize(small("llama", num_hidden_layers=4)), tokens(1, 5)
    want = logits(model, ids, use_cache=False)
    calls = Calls(monkeypatch)
    for _ in "ab":
        with torch.inference_mode():
            found = model(ids, use_cache=False, output_hidden_states=True)
        assert len(found.hidden_states) == 5
        assert 4 not in calls.layers
        for _ in "ab":
            assert_same_bits(logits(model, ids, use_cache=False), want)
        assert calls.layers[-2:] == [4, 4]
        calls.layers.clear()
    model.model.layers[1].register_forward_hook(lambda *args: None)
    logits(model, ids, use_cache=False)
    assert 4 not in calls.layers


def test_a_model_that_stops_early() -> None:
    """As assisted decoding by an early exit does."""
    model = optimize(small("llama", num_hidden_layers=4))
    shorter = optimize(small("llama", num_hidden_layers=4))
    shorter.model.layers = shorter.model.layers[:2]
    want = logits(shorter, tokens(1, 5), use_cache=False)
    model.config.num_hidden_layers = 2
    assert_same_bits(logits(model, tokens(1, 5), use_cache=False), want)


def test_layers_in_another_order() -> None:
    model = optimize(small("llama", num_hidden_layers=3))
    want = logits(model, tokens(1, 5), use_cache=False)
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in (0, 2, 1)])
    got = logits(model, tokens(1, 5), use_cache=False)
    assert not got.equal(want)
    for layer in layers_of(model):
        layer.slmops_run = None
    assert_same_bits(logits(model, tokens(1, 5), use_cache=False), got)


def test_a_subclass_that_looks_at_every_layer() -> None:
    """Its loop does more than to call the layers: they are computed one by one."""

    class Steered(transformers.LlamaModel):
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            x = self.embed_tokens(input_ids)
            tables = self.rotary_emb(x, torch.arange(x.shape[1])[None])
            for layer in self.layers:
                x = layer(x, position_embeddings=tables) * 1.5
            return x

    torch.manual_seed(0)
    model = optimize(Steered(small("llama").config).eval())
    assert len(layers_of(model)) == 2
    assert all(layer.slmops_run is None for layer in layers_of(model))


@pytest.mark.parametrize("family", DECODERS)
def test_whole_models_are_bit_portable(family: str) -> None:
    found = report(optimize(small(family)))
    if family == "gemma3":  # a scaled embedding, and a softcap of the logits by torch's tanh
        others = ["Gemma3ForCausalLM", "Gemma3TextModel", "Gemma3TextScaledWordEmbedding"]
        assert [name for name, _ in found.not_portable] == others
    else:
        assert found.bit_portable
    other = optimize(small(family))
    other.set_attn_implementation("sdpa")
    assert not report(other).bit_portable


@pytest.mark.parametrize("way", ["sdpa", "eager"])
def test_another_attention_is_honoured(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = optimize(small("llama"))
    assert model.config._attn_implementation == "slmops"
    want = logits(model, tokens(1, 5))
    calls = Calls(monkeypatch)
    model.set_attn_implementation(way)
    assert float((logits(model, tokens(1, 5)) - want).abs().max()) < 3e-3
    assert calls.layers == []


def test_who_chose_eager_keeps_it() -> None:
    model = small("llama")
    model.set_attn_implementation("eager")
    assert optimize(model).config._attn_implementation == "eager"


def test_a_projection_that_is_left_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    model = optimize(small("llama"), exclude="*.0.self_attn.o_proj")
    assert len(layers_of(model)) == 1
    logits(model, tokens(1, 5))
    assert calls.layers == [1]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_static_cache(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, found = optimize(small(family)), tokens(2, 9), []
    calls = Calls(monkeypatch)
    cache = transformers.StaticCache(config=model.config, max_cache_len=20)
    for part in ids.split([4, 3, 1, 1], dim=1):
        found.append(logits(model, part, **{CACHE: cache}))
    # The sliding window's own static layer is left to the parts.
    assert sum(calls.layers) == (8 if family == "llama" else 4)
    got, want = torch.cat(found, 1), logits(model, ids, use_cache=False)
    assert float((got - want).abs().max()) < 3e-3
    if family == "llama":
        assert_same_bits(got, want)


@pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
def test_compiled_with_a_static_cache() -> None:
    torch.compiler.reset()
    model = optimize(small("llama"))
    caches = [transformers.StaticCache(config=model.config, max_cache_len=16) for _ in "ab"]
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        for part in tokens(1, 8).split([5, 1, 1, 1], dim=1):
            got = compiled(input_ids=part, **{CACHE: caches[0]}).logits
            assert_same_bits(got, model(input_ids=part, **{CACHE: caches[1]}).logits)
    names = [str(node.target) for node in graphs[-1].graph.nodes]
    assert sum("decoder_layers" in name for name in names) == 2


def test_many_threads_generate_at_once() -> None:
    model = optimize(small("llama"))
    prompts = [tokens(1, length) for length in (3, 5, 7, 9)]

    def generate(ids: Tensor) -> Tensor:
        found: Tensor = model.generate(ids, max_new_tokens=12, do_sample=False)
        return found

    expected = [generate(ids) for ids in prompts]
    results: list[Tensor | None] = [None] * 4

    def work(i: int) -> None:
        for _ in range(3):
            results[i] = generate(prompts[i])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # between any two lines
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for got, want in zip(results, expected, strict=True):
        assert got is not None
        assert_same_bits(got, want)


class Steps:
    """A model that is called token by token with a cache."""

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache = model, cache

    @property
    def layers(self) -> list[Any]:
        return list(self.cache.layers)

    def __call__(self, ids: Tensor) -> Tensor:
        return logits(self.model, ids, **{CACHE: self.cache})


def _crop(steps: Steps) -> None:
    steps.cache.crop(-3)


def _reorder(steps: Steps) -> None:
    steps.cache.reorder_cache(torch.tensor([1, 1]))


def _assign(steps: Steps) -> None:
    for layer in steps.layers:
        layer.keys, layer.values = layer.keys * 2, layer.values * 2


def _write(steps: Steps) -> None:
    for layer in steps.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        layer.values.zero_()


def _swap_layers(steps: Steps) -> None:
    layers = steps.cache.layers
    layers[0], layers[1] = layers[1], layers[0]


def _empty(steps: Steps) -> None:
    for layer in steps.layers:
        layer.keys = layer.values = None


def _another_cache(steps: Steps) -> None:
    steps.cache = copy.deepcopy(steps.cache)


def _many_tokens(steps: Steps) -> None:
    steps(tokens(2, 90))


def _one_by_one(steps: Steps) -> None:
    handle = steps.model.model.layers[1].register_forward_hook(lambda *args: None)
    steps(tokens(2, 2))
    handle.remove()


def _inference_mode(steps: Steps) -> None:
    with torch.inference_mode():
        steps(tokens(2, 70))


@pytest.mark.parametrize("kv_cache", [None, "int8"])
@pytest.mark.parametrize(
    "change",
    [
        _crop,
        _reorder,
        _assign,
        _write,
        _swap_layers,
        _empty,
        _another_cache,
        _many_tokens,
        _one_by_one,
        _inference_mode,
    ],
)
def test_a_run_sees_what_happens_to_its_cache(
    change: Callable[[Steps], None], kv_cache: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where keys and values go is found once for many steps."""
    model = optimize(small("llama", num_hidden_layers=3), kv_cache=kv_cache)
    alone = optimize(small("llama", num_hidden_layers=3), kv_cache=kv_cache)
    calls = Calls(monkeypatch)
    both = [Steps(m, transformers.DynamicCache(config=m.config)) for m in (model, alone)]

    def step(count: int) -> None:
        for layer in layers_of(alone):
            layer.slmops_run = None
        got, want = (steps(tokens(2, count)) for steps in both)
        assert_same_bits(got, want)

    for count in (5, 1, 1):
        step(count)
    assert calls.layers == [3, 1, 1, 1] * 3
    for steps in both:
        change(steps)
    for count in (1, 1, 3):
        step(count)


def test_a_run_finds_the_slots_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = optimize(small("llama", num_hidden_layers=3))
    steps = Steps(model, transformers.DynamicCache(config=model.config))
    kept: list[Any] = []

    def note(x: Tensor, weights: Any, cache: Any, *args: Any) -> Tensor:
        kept.append((weights, cache))
        return ops.decoder_layers(x, weights, cache, *args)

    monkeypatch.setattr(fused_decoder, "_decoder_layers", note)
    for count in (5, 1, 1, 2):
        steps(tokens(2, count))
    assert all(isinstance(part, ops.Kept) for parts in kept for part in parts)
    assert len({id(weights) for weights, _ in kept}) == len({id(cache) for _, cache in kept}) == 1


def test_a_run_lets_go_of_caches() -> None:
    """At once, not when Python looks for cycles."""
    model = optimize(small("llama", num_hidden_layers=3))
    alive: list[weakref.ref[Tensor]] = []
    gc.collect()
    gc.disable()
    try:
        one, two = (Steps(model, transformers.DynamicCache(config=model.config)) for _ in "ab")
        for steps in (one, two, one, two):
            steps(tokens(1, 4))
            alive += [weakref.ref(vars(layer)["_values"].tensor) for layer in steps.layers]
        del steps, one, two
        assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()
