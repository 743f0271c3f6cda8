"""Every family: all blocks fused, the same bits as the reference, the answers of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bits import assert_same_bits
from small_models import (
    CACHE,
    DECODERS,
    ENCODERS,
    FAMILIES,
    LAYERS,
    LEFT,
    by_reference,
    dequantized,
    logits,
    record,
    small,
    tokens,
    transformers,
)
from torch import Tensor

import torch_slmops
from torch_slmops import optimize, reference, report
from torch_slmops.fused import Fused, FusedAttention, FusedMLP, FusedRMSNorm
from torch_slmops.fused_decoder import FusedDecoderLayer
from torch_slmops.fused_experts import FusedExperts
from torch_slmops.fused_rotary import FusedRotary

SEEDS = (0, 1)
NORMS = {  # per layer, and in the whole model
    **dict.fromkeys(("llama", "mistral", "qwen2", "smollm3", "phi3", "granite"), (2, 1)),
    "qwen3": (4, 1),
    "gemma2": (4, 1),
    "gemma3": (6, 1),
    "olmo2": (4, 1),
    "qwen3_moe": (4, 1),
    "granite_moe": (2, 1),
}
# Layer norms, experts, encoders: their layers stay, with fused blocks.
WITHOUT_LAYERS = ("stablelm", "cohere", "qwen3_moe", "granite_moe", "bert", "modernbert")


@pytest.mark.parametrize("family", FAMILIES)
def test_all_blocks_are_fused(family: str) -> None:
    model = small(family)
    optimize(model, strict=True, exclude=[name.replace("*", "?") for name in LEFT.get(family, [])])
    found = report(model)
    counts = dict.fromkeys((FusedAttention, FusedMLP, FusedExperts, FusedRMSNorm), 0)
    for module in model.modules():
        for kind in counts:
            counts[kind] += isinstance(module, kind)
    norms, last = NORMS.get(family, (0, 0))
    sparse = family.endswith("_moe")
    gated = not sparse and family != "bert"
    assert counts == {
        FusedAttention: LAYERS,
        FusedMLP: LAYERS * gated,
        FusedExperts: LAYERS * sparse,
        FusedRMSNorm: LAYERS * norms + last,
    }
    tables = {"cohere": 0, "bert": 0}.get(family, 1)
    assert sum(isinstance(m, FusedRotary) for m in model.modules()) == tables
    unfused = [row.name for row in found.unfused]
    assert unfused == (["model.rotary_emb"] if family == "cohere" else [])
    assert [row.name for row in found.left] == LEFT.get(family, [])
    layers = 0 if family in WITHOUT_LAYERS else LAYERS
    assert sum(isinstance(m, FusedDecoderLayer) for m in model.modules()) == layers
    assert sum(row.count for row in found.fused) == sum(counts.values()) + tables + layers


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_as_the_reference(family: str, seed: int) -> None:
    dtype = (torch.float32, torch.bfloat16)[seed]
    model = optimize(small(family, seed, dtype))
    ids = tokens(2, 7)
    with by_reference():
        expected = logits(model, ids)
    assert_same_bits(logits(model, ids), expected)


def test_rows_and_threads_agree(threads: None) -> None:
    """Calls of every fused module, on every ISA row and for several numbers of threads."""
    model, best = optimize(small("gemma3", dtype=torch.bfloat16)), torch_slmops.isa()
    for module, args, kwargs, _ in record(model, Fused, lambda: logits(model, tokens(2, 5))):
        run = module.project if isinstance(module, FusedAttention) else module
        if isinstance(module, FusedAttention):
            args, kwargs = (kwargs["hidden_states"], kwargs["position_embeddings"]), {}
        if isinstance(module, FusedDecoderLayer):
            kwargs = kwargs | {CACHE: None}
        found = []
        for name in torch_slmops.isas():
            torch_slmops.set_isa(name)
            for count in (1, 3):
                torch.set_num_threads(count)
                with torch.inference_mode():
                    result = run(*args, **kwargs)
                found.append(result if isinstance(result, tuple) else (result,))
        torch_slmops.set_isa(best)
        for other in found[1:]:
            for one, two in zip(found[0], other, strict=True):
                assert_same_bits(one, two)


# With activations that are not rounded, only the order of fp32 sums differs from the float model
# with dequantized weights: a projection of K <= 304 terms of order 1 is off by at most K 2^-24,
# 2e-5, of the sum of their magnitudes (about 10 times its own). 15 projections in a row give less
# than 3e-3 in logits of standard deviation 2. The mean of exp(d) over a distribution exceeds
# exp(mean d) by at most exp(range^2 / 8) (Hoeffding's lemma), so the divergence is below
# (2 * 3e-3)^2 / 8.
LOGITS_BOUND = 3e-3
KL_BOUND = (2 * LOGITS_BOUND) ** 2 / 8


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dequantized_model(family: str, seed: int) -> None:
    model = small(family, seed)
    expected, ids = optimize(small(family, seed), activations="float"), tokens(2, 11)
    plain = dequantized(model, expected)
    got, want = logits(expected, ids), logits(plain, ids)
    assert float((got - want).abs().max()) < LOGITS_BOUND
    p, q = want.double().log_softmax(-1), got.double().log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).max()) < KL_BOUND < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_remain_and_agree_with_the_fused_op(family: str) -> None:
    """In float32 nothing is rounded between the parts: the fused op is their composition."""
    model = optimize(small(family))
    calls = record(model, FusedAttention, lambda: logits(model, tokens(2, 5)))
    assert len(calls) == LAYERS
    for module, args, kwargs, _ in calls:
        x = args[0] if args else kwargs["hidden_states"]
        tables = kwargs.get("position_embeddings")
        spec = module.slmops
        found = module.project(x, tables)
        y = torch.cat([getattr(module, name)(x) for name in spec.row.projections], -1)
        parts = y.split([heads * spec.head_dim for heads in spec.heads], -1)
        for i, (part, heads) in enumerate(zip(parts, spec.heads, strict=True)):
            shape = (*x.shape[:2], heads, spec.head_dim)
            if spec.norm is not None and i < 2:
                norm = getattr(module, spec.row.norms[i])
                part = part.reshape(shape) if norm.weight.numel() == spec.head_dim else part
                row = spec.norm.row
                part = reference.rms_norm(
                    part, norm.weight, spec.norm.eps, row.offset, row.cast_before_weight
                )
            part = part.reshape(shape)
            if spec.rotary_width and i < 2:
                part = reference.rotary(part, *tables, spec.row.rotary == "interleaved")
            assert_same_bits(found[i], part.contiguous(), f"{family}, {'qkv'[i]}")


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_do_not_depend_on_their_neighbours(family: str) -> None:
    model = optimize(small(family, dtype=torch.bfloat16))
    calls = record(model, Fused, lambda: logits(model, tokens(3, 5)))
    for module, args, kwargs, output in calls:
        if isinstance(module, FusedMLP | FusedRMSNorm) and args[0].dim() == 3:
            part = args[0][1:2, 2:4]
            assert_same_bits(module(part), output[1:2, 2:4])
        elif isinstance(module, FusedExperts):
            some = [a[4:9] for a in (*args, *kwargs.values())]
            assert_same_bits(module(*some), output[4:9])
        elif isinstance(module, FusedAttention):
            x = args[0] if args else kwargs["hidden_states"]
            tables = kwargs.get("position_embeddings")
            whole = module.project(x, tables)
            some = tables and [table[-1:, 2:4] for table in tables]
            for one, other in zip(module.project(x[1:2, 2:4], some), whole, strict=True):
                assert_same_bits(one, other[1:2, 2:4].contiguous())


@pytest.mark.parametrize("family", DECODERS)
def test_prefill_then_decode(family: str) -> None:
    model, ids = optimize(small(family), activations="float"), tokens(2, 9)
    cache, found = transformers.DynamicCache(config=model.config), []
    for part in ids.split([4, 3, 1, 1], dim=1):
        found.append(logits(model, part, **{CACHE: cache}))
    whole = logits(model, ids, use_cache=False)
    if family in ("stablelm", "cohere", "gemma2"):  # torch's layer norm or attention
        assert float((torch.cat(found, 1) - whole).abs().max()) < LOGITS_BOUND
    else:
        assert_same_bits(torch.cat(found, 1), whole)


def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(5)
    mask = (ids != 1).long()
    found: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=8, **options)
    return found


def pair(family: str) -> tuple[Any, Any]:
    """An optimized model, and the float model with the same weights."""
    model = small(family)
    optimized = optimize(small(family), activations="float")
    return optimized, dequantized(model, optimized)


@pytest.mark.parametrize("family", DECODERS)
def test_generates_what_transformers_does_from_a_left_padded_batch(family: str) -> None:
    optimized, plain = pair(family)
    ids = tokens(3, 9)
    ids[0, :4] = 1  # padding
    ids[2, :7] = 1
    got = generate(optimized, ids, do_sample=False)
    assert_same_bits(got, generate(plain, ids, do_sample=False))


WAYS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beam": {"num_beams": 3, "do_sample": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
    "static cache": {"cache_implementation": "static", "do_sample": False},
    "no cache": {"use_cache": False, "do_sample": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_ways_to_generate(family: str, way: str) -> None:
    optimized, plain = pair(family)
    prompt = tokens(1, 4).repeat(1, 3)  # repeats, so that lookup finds something
    got = generate(optimized, prompt, **WAYS[way])
    assert got.shape[1] == prompt.shape[1] + 8
    assert_same_bits(got, generate(plain, prompt, **WAYS[way]))


def test_assisted_decoding() -> None:
    optimized, plain = pair("qwen3")
    assistant = optimize(small("qwen3", seed=1))
    prompt = tokens(1, 6)
    got = generate(optimized, prompt, do_sample=False, assistant_model=assistant)
    assert_same_bits(got, generate(plain, prompt, do_sample=False))


@pytest.mark.parametrize("family", ENCODERS)
def test_encoder_with_padding(family: str) -> None:
    optimized, plain = pair(family)
    ids = tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    got = logits(optimized, ids, attention_mask=mask)[mask.bool()]
    want = logits(plain, ids, attention_mask=mask)[mask.bool()]
    assert float((got - want).abs().max()) < LOGITS_BOUND


class TestTracing:
    """torch.compile and torch.export see one graph."""

    @pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
    @pytest.mark.parametrize("family", FAMILIES)
    def test_compile(self, family: str) -> None:
        torch.compiler.reset()
        model = optimize(small(family, num_hidden_layers=1, layer_types=None), lm_head=None)
        options = {} if family in ENCODERS else {"use_cache": False}
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
        with torch.no_grad():
            for length in (5, 9):
                ids = tokens(2, length)
                got = compiled(input_ids=ids, **options).logits
                assert_same_bits(got, model(input_ids=ids, **options).logits)

    @pytest.mark.filterwarnings("ignore")
    def test_fakes_have_the_shapes_of_the_ops(self) -> None:
        torch.compiler.reset()
        model = optimize(small("qwen3", num_hidden_layers=1))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            got = compiled(input_ids=tokens(2, 6), use_cache=False).logits
        assert_same_bits(got, logits(model, tokens(2, 6), use_cache=False))

    @pytest.mark.filterwarnings("ignore")
    def test_compiled_decoding_with_a_static_cache(self) -> None:
        torch.compiler.reset()
        model = optimize(small("llama"))
        caches = [transformers.StaticCache(config=model.config, max_cache_len=16) for _ in "ab"]
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            for part in tokens(1, 8).split([5, 1, 1, 1], dim=1):
                got = compiled(input_ids=part, **{CACHE: caches[0]}).logits
                want = model(input_ids=part, **{CACHE: caches[1]}).logits
                assert float((got - want).abs().max()) < LOGITS_BOUND

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("family", ["gemma3", "bert"])
    def test_export(self, family: str) -> None:
        model = optimize(small(family))
        options = {} if family in ENCODERS else {"use_cache": False}

        class Logits(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, ids: Tensor) -> Tensor:
                found: Tensor = self.model(input_ids=ids, **options).logits
                return found

        length = torch.export.Dim("length", min=2, max=64)
        program = torch.export.export(Logits(), (tokens(1, 5),), dynamic_shapes=({1: length},))
        for size in (5, 17):
            assert_same_bits(program.module()(tokens(1, size)), logits(model, tokens(1, size)))
