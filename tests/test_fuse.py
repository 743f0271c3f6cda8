"""Fused blocks in a model: what is left alone, what falls back, and everything around them."""

from __future__ import annotations

import copy
import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from small_models import by_reference, logits, small, tokens, transformers
from torch import Tensor, nn

from torch_slmops import load, optimize, report, save
from torch_slmops.fused import Fused, FusedAttention, FusedMLP, FusedRMSNorm
from torch_slmops.fused_experts import FusedExperts
from torch_slmops.modules import PackedModule
from torch_slmops.packed_rows import GateUp, Rows, interleaved_rows
from torch_slmops.weight_view import WeightView

# See test_families.py: the order of fp32 sums.
LOGITS_BOUND = 3e-3


def llama_class(name: str) -> Any:
    return getattr(transformers.models.llama.modeling_llama, name)


def subclassed(module: nn.Module, **members: Any) -> nn.Module:
    """`module`, of a subclass of its class."""
    module.__class__ = type("Changed" + type(module).__name__, (type(module),), members)
    return module


def extra_parameter(layer: Any) -> None:
    subclassed(layer.self_attn).extra = nn.Parameter(torch.ones(3))


def other_forward(layer: Any) -> None:
    forward = llama_class("LlamaAttention").forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights = forward(self, *args, **kwargs)
        return 2 * output, weights

    subclassed(layer.self_attn, forward=doubled)


def rewritten(layer: Any, old: str, new: str) -> None:
    """Gives the attention the forward of Llama with one change in its source."""
    forward = inspect.unwrap(llama_class("LlamaAttention").forward)
    source = textwrap.dedent(inspect.getsource(forward))
    source = source[source.index("def ") :]  # without decorators
    assert old in source
    names = dict(forward.__globals__)
    exec(source.replace(old, new), names)
    subclassed(layer.self_attn, forward=names["forward"])


def other_scaling(layer: Any) -> None:
    rewritten(layer, "scaling=self.scaling", "scaling=2 * self.scaling")


def other_values(layer: Any) -> None:
    rewritten(layer, "self.v_proj(hidden_states)", "(self.v_proj(hidden_states) + 1e-3)")


def other_option(layer: Any) -> None:
    rewritten(layer, "scaling=self.scaling", "scaling=self.scaling, position_bias=1")


def other_output(layer: Any) -> None:
    rewritten(layer, "return attn_output,", "return 1.001 * attn_output,")


def other_activation(layer: Any) -> None:
    layer.mlp.act_fn = nn.Mish().eval()


def other_mlp(layer: Any) -> None:
    forward = llama_class("LlamaMLP").forward
    subclassed(layer.mlp, forward=lambda self, x: forward(self, x) + x)


def replaced_forward(layer: Any) -> None:
    layer.mlp.forward = lambda x: x


def hooked(layer: Any) -> None:
    layer.self_attn.q_proj.register_forward_hook(lambda *args: None)


def one_bias(layer: Any) -> None:
    layer.self_attn.q_proj.bias = None


def linear_subclass(layer: Any) -> None:
    subclassed(layer.mlp.up_proj)


def shared_projection(layer: Any) -> None:
    layer.self_attn.k_proj = layer.self_attn.v_proj


def name_taken(layer: Any) -> None:
    layer.mlp.gate_up = 3


CHANGES: dict[str, tuple[Callable[[Any], None], str, str]] = {
    "extra parameter": (extra_parameter, "self_attn", "no family has its structure"),
    "other forward": (other_forward, "self_attn", "takes arguments that are not known"),
    "other scaling": (other_scaling, "self_attn", r"attention \(scaling\) differs"),
    "other values": (other_values, "self_attn", "to its cache or to attention differs"),
    "other option": (other_option, "self_attn", "differs in position_bias"),
    "other output": (other_output, "self_attn", "output differs"),
    "activation": (other_activation, "mlp", "activation is none of silu"),
    "other MLP": (other_mlp, "mlp", "output differs"),
    "replaced forward": (replaced_forward, "mlp", "was replaced"),
    "hook": (hooked, "self_attn", "q_proj: it has hooks"),
    "one bias": (one_bias, "self_attn", "biases"),
    "Linear subclass": (linear_subclass, "mlp", "not an nn.Linear"),
    "shared": (shared_projection, "self_attn", "shared"),
    "name taken": (name_taken, "mlp", "gate_up"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_leaves_what_is_not_exactly_known(change: str) -> None:
    alter, block, words = CHANGES[change]
    model = small("llama")
    alter(model.model.layers[1])
    plain = copy.deepcopy(model)
    name = f"model.layers.1.{block}"
    with pytest.raises(ValueError, match=rf"(?s)strict.*{name}: .*({words})"):
        optimize(model, strict=True)
    assert not any(isinstance(m, Fused) for m in model.modules())
    optimize(model, activations="float")
    assert not isinstance(model.get_submodule(name), Fused)
    assert isinstance(model.get_submodule(name.replace("1", "0")), Fused)
    reasons = {row.name: row.reason for row in report(model).unfused}
    assert re.search(words, reasons[name])
    optimize(plain, activations="float", fuse=False)
    got, want = logits(model, tokens(2, 6)), logits(plain, tokens(2, 6))
    assert float((got - want).abs().max()) < LOGITS_BOUND


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("silu", "silu"),
        ("swish", "silu"),
        ("gelu", "gelu"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu_new", "gelu_tanh"),  # the same function in other words
        ("relu2", "relu2"),
        ("relu", None),
        ("quick_gelu", None),
        ("mish", None),
        ("gelu_10", None),  # clipped
    ],
)
def test_activations_are_known_by_their_values(name: str, kind: str | None) -> None:
    model = optimize(small("llama", hidden_act=name), activations="float")
    mlp = model.model.layers[0].mlp
    assert (mlp.slmops.activation if isinstance(mlp, FusedMLP) else None) == kind
    alone = optimize(small("llama", hidden_act=name), activations="float", fuse=False)
    got, want = logits(model, tokens(2, 5)), logits(alone, tokens(2, 5))
    assert float((got - want).abs().max()) < LOGITS_BOUND


def test_a_norm_that_computes_something_else_is_left() -> None:
    model = small("llama")

    def centered(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(-1, keepdim=True))

    norm = subclassed(model.model.norm, forward=centered)
    optimize(model)
    assert not isinstance(norm, Fused)
    assert isinstance(model.model.layers[0].input_layernorm, FusedRMSNorm)


def test_norms_differ_by_where_they_round() -> None:
    """Llama rounds before the weight, OLMo 2 after; only 16 bits show it."""
    names = [
        optimize(small(family)).model.norm.slmops.row.name
        for family in ("llama", "olmo2", "gemma3")
    ]
    assert names == ["llama norm", "olmo2 norm", "gemma norm"]


def test_torch_rms_norm_is_known() -> None:
    norm = nn.RMSNorm(48, eps=1e-5)
    nn.init.uniform_(norm.weight)
    model = nn.Sequential(nn.Linear(32, 48), norm, nn.RMSNorm(48)).eval()
    x = torch.randn(5, 48)
    with torch.no_grad():
        expected = norm(x)
    optimize(model)
    assert isinstance(model[1], FusedRMSNorm)
    assert not isinstance(model[2], Fused)  # eps=None depends on the dtype
    assert float((model[1](x) - expected).abs().max()) < 1e-5


def test_stablelm_with_head_norms_keeps_its_attention_and_tables() -> None:
    model = optimize(small("stablelm", qk_layernorm=True))
    assert not any(isinstance(m, FusedAttention) for m in model.modules())
    assert sum(isinstance(m, FusedMLP) for m in model.modules()) == 2
    reasons = {row.name: row.reason for row in report(model).unfused}
    assert "StableLmAttention uses them" in reasons["model.rotary_emb"]
    assert "no family" in reasons["model.layers.*.self_attn"]


def test_foreign_attention_is_left() -> None:
    """GLM pairs neighbours and spreads the tables itself: no row does that."""
    config = transformers.GlmConfig(
        vocab_size=131,
        hidden_size=96,
        intermediate_size=152,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=1,
    )
    model = transformers.GlmForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"(?s)strict.*self_attn: GlmAttention cannot be fused"):
        optimize(model, strict=True)
    optimize(model)
    assert not any(isinstance(m, FusedAttention) for m in model.modules())
    assert isinstance(model.model.layers[0].mlp, FusedMLP)


def test_fuse_false_replaces_layers_alone() -> None:
    model = optimize(small("llama"), fuse=False, strict=True)
    assert not any(isinstance(m, Fused | Rows | GateUp) for m in model.modules())
    assert report(model).fused == ()
    assert {row.name for row in report(model).unfused} == {
        "model.layers.*.self_attn",
        "model.layers.*.mlp",
    }


@pytest.mark.parametrize(
    ("options", "unfused"),
    [
        ({"exclude": "*.1.self_attn.k_proj"}, {"model.layers.1.self_attn"}),
        ({"exclude": "model.layers.0.mlp"}, {"model.layers.0.mlp"}),
        ({"exclude": "*.down_proj"}, {"model.layers.0.mlp", "model.layers.1.mlp"}),
        ({"include": "*_proj"}, set()),
        ({"include": "*.0.*"}, {"model.layers.1.mlp", "model.layers.1.self_attn"}),
    ],
)
def test_include_and_exclude(options: dict[str, Any], unfused: set[str]) -> None:
    model = optimize(small("llama"), strict=True, **options)
    blocks = {
        name: isinstance(module, Fused)
        for name, module in model.named_modules()
        if name.endswith((".self_attn", ".mlp"))
    }
    assert {name for name, fused in blocks.items() if not fused} == unfused
    assert isinstance(model.model.norm, FusedRMSNorm) == ("include" not in options)


def test_blocks_packed_before_are_left() -> None:
    model = optimize(optimize(small("llama"), fuse=False))
    assert not any(isinstance(m, FusedAttention | FusedMLP) for m in model.modules())
    assert {row.reason for row in report(model).unfused} >= {
        "its q_proj was packed before, without fusing"
    }


def test_is_idempotent() -> None:
    model = optimize(small("qwen3"))
    before = [(name, id(module), type(module)) for name, module in model.named_modules()]
    optimize(model, weights="int8")
    assert [(n, id(m), type(m)) for n, m in model.named_modules()] == before
    assert report(model).unfused == ()


@pytest.mark.parametrize("where", ["self_attn.v_proj", "mlp.up_proj"])
def test_a_failure_changes_nothing_and_names_the_block(where: str) -> None:
    model = small("llama")
    model.get_submodule(f"model.layers.1.{where}").weight.data[3, 5] = float("nan")
    before = [(name, id(module), type(module)) for name, module in model.named_modules()]
    keys = {name: id(value) for name, value in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.{where.split('.')[0]}.*finite"):
        optimize(model)
    assert [(n, id(m), type(m)) for n, m in model.named_modules()] == before
    assert {name: id(value) for name, value in model.named_parameters()} == keys


FORMATS: dict[str, dict[str, Any]] = {
    "int4": {},
    "int4-zero": {"group_size": 64, "symmetric": False, "act_group": 32},
    "int8": {"weights": "int8"},
    "int8-one": {"weights": "int8", "group_size": -1, "symmetric": False, "act_group": -1},
    "int4-float": {"activations": "float"},
}


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, family: str) -> None:
    model = optimize(small(family), **FORMATS[name])
    got = logits(model, tokens(2, 5))
    with by_reference():
        assert_same_bits(logits(model, tokens(2, 5)), got)
    alone = optimize(small(family), fuse=False, **FORMATS[name])
    for path, module in alone.named_modules():
        if isinstance(module, PackedModule):
            assert_same_bits(model.get_submodule(path).weight + 0, module.weight + 0, path)


class TestRows:
    """Projections whose weight lies in a fused one."""

    def attention(self) -> tuple[Any, Any]:
        model, alone = optimize(small("llama")), optimize(small("llama"), fuse=False)
        return model.model.layers[0], alone.model.layers[0]

    @pytest.mark.parametrize(
        "name", ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]
    )
    def test_is_the_layer_it_was(self, name: str) -> None:
        fused, alone = self.attention()
        one, other = fused.get_submodule(name), alone.get_submodule(name)
        assert isinstance(one, Rows)
        x = torch.randn(3, 96)
        with torch.no_grad():
            assert_same_bits(one(x), other(x))
        assert isinstance(one.weight, WeightView)
        assert_same_bits(one.weight + 0, other.weight + 0)
        assert_same_bits(one.bias + 0, other.bias + 0)
        assert (one.in_features, one.out_features) == (other.in_features, other.out_features)
        assert one.weight.dtype == other.weight.dtype

    def test_holds_no_bytes(self) -> None:
        fused, alone = self.attention()
        assert not list(fused.self_attn.q_proj.buffers())
        sizes = [
            sum(m.packed.numel() for m in layer.modules() if isinstance(m, PackedModule))
            for layer in (fused, alone)
        ]
        assert sizes[0] <= sizes[1]

    def test_is_read_only(self) -> None:
        fused, _ = self.attention()
        for module in (fused.self_attn.q_proj, fused.mlp.gate_up):
            with pytest.raises(RuntimeError, match="fuse=False"):
                module.weight = nn.Parameter(torch.zeros(3, 3))
        with pytest.raises(RuntimeError, match="read-only"):
            fused.mlp.up_proj.weight.zero_()

    def test_gate_and_up_alternate_in_tiles(self) -> None:
        assert interleaved_rows(34).tolist() == [
            *range(32),
            *(64, 65),
            *range(32, 64),
            *(96, 97),
        ]


class TestExperts:
    """Experts packed one by one."""

    def test_routing(self) -> None:
        experts = next(
            m for m in optimize(small("qwen3_moe")).modules() if isinstance(m, FusedExperts)
        )
        x = torch.randn(7, 96)
        index = torch.tensor([[0, 3]] * 3 + [[3, 4]] * 3 + [[5, 5]])  # 5 is nobody
        weights = torch.rand(7, 2)
        with torch.no_grad():
            got = experts(x, index, weights)
            parts = {e: experts._expert(e, x) for e in (0, 3, 4)}
        first = weights[:3, :1] * parts[0][:3] + weights[:3, 1:] * parts[3][:3]
        assert_same_bits(got[:3], first)
        second = weights[3:6, :1] * parts[3][3:6] + weights[3:6, 1:] * parts[4][3:6]
        assert_same_bits(got[3:6], second)
        assert not got[6].any()

    def test_float_weights_are_gone(self) -> None:
        model = optimize(small("granite_moe"))
        assert not any(p.dim() == 3 for p in model.parameters())
        assert report(model).bytes_after < 0.4 * report(model).bytes_before

    def test_excluded_experts_stay(self) -> None:
        model = optimize(small("qwen3_moe"), exclude=["*.mlp.experts", "*.gate"], strict=True)
        assert not any(isinstance(m, FusedExperts) for m in model.modules())
        assert any(p.dim() == 3 for p in model.parameters())


def test_a_block_that_is_the_model_itself(tmp_path: Path) -> None:
    """It keeps its identity, and is saved and loaded as any other."""
    whole, x = small("llama"), torch.randn(2, 3, 96)
    mlp, norm = copy.deepcopy(whole.model.layers[0].mlp), copy.deepcopy(whole.model.norm)
    want = optimize(whole).model.layers[0].mlp(x)
    assert optimize(mlp) is mlp
    assert isinstance(mlp, FusedMLP)
    assert_same_bits(mlp(x), want)
    assert [row.name for row in report(mlp).fused] == ["(the model)"]
    save(mlp, tmp_path / "mlp.safetensors")
    other = load(
        tmp_path / "mlp.safetensors", into=copy.deepcopy(small("llama").model.layers[0].mlp)
    )
    assert isinstance(other, FusedMLP)
    assert_same_bits(other(x), want)
    assert isinstance(optimize(norm), FusedRMSNorm)
    assert type(optimize(small("llama").model.layers[0].mlp, fuse=False)) is type(
        small("llama").model.layers[0].mlp
    )


def test_a_model_named_like_a_block_is_no_block() -> None:
    class MLP(nn.Module):
        """Of two layers, as in many tutorials."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(torch.relu(self.first(x)))
            return y

    assert not report(optimize(MLP().eval(), strict=True)).unfused
