"""A fused model in use: fallbacks, recorded outputs, copies, state dicts, conversions."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from small_models import by_reference, dequantized, logits, record, small, tokens, transformers
from torch import Tensor

from torch_slmops import optimize, report
from torch_slmops.fused import FusedAttention, FusedMLP

LLAMA = transformers.models.llama.modeling_llama.LlamaAttention
# See test_families.py: the order of fp32 sums.
LOGITS_BOUND = 3e-3


class TestFallback:
    """What a fused op cannot do goes to the original forward, on the packed projections."""

    def unhooked(self, model: Any) -> Tensor:
        return logits(model, tokens(2, 5))

    @pytest.mark.parametrize(
        "name",
        ["self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.act_fn", "self_attn.k_norm"],
    )
    def test_hooks_on_inner_modules_are_called(self, name: str) -> None:
        model = optimize(small("qwen3"), activations="float")
        want, calls = self.unhooked(model), []
        module = model.get_submodule(f"model.layers.1.{name}")
        handle = module.register_forward_hook(lambda *args: calls.append(1))
        got = self.unhooked(model)
        assert calls == [1]
        assert float((got - want).abs().max()) < LOGITS_BOUND
        handle.remove()
        assert_same_bits(self.unhooked(model), want)
        assert calls == [1]

    def test_hooks_on_the_block_and_its_output_layer(self) -> None:
        model, calls = optimize(small("llama")), []
        want = self.unhooked(model)
        for name in ("self_attn", "self_attn.o_proj", "mlp"):
            module = model.get_submodule(f"model.layers.0.{name}")
            module.register_forward_hook(lambda *args: calls.append(1))
        assert_same_bits(self.unhooked(model), want)
        assert calls == [1, 1, 1]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_training_mode(self, dtype: torch.dtype) -> None:
        model = optimize(small("llama", dtype=dtype, attention_dropout=0.5), activations="float")
        want = self.unhooked(model)
        model.train()
        dropped = self.unhooked(model)
        for module in model.modules():
            if isinstance(module, FusedAttention):
                module.attention_dropout = 0.0
        got = self.unhooked(model)
        # bfloat16: the original forward rounds between the parts, to 8 bits.
        assert float((got - want).abs().max()) < (LOGITS_BOUND if dtype.itemsize == 4 else 1)
        assert float((dropped - want).abs().max()) > 2

    @pytest.mark.parametrize("family", ["llama", "bert", "phi3"])
    def test_gradients_go_through_packed_layers(self, family: str) -> None:
        original = small(family)
        model = optimize(small(family), activations="float", lm_head=None)
        plain = dequantized(original, model)
        embeds = torch.randn(1, 3, 96)

        def gradient(one: Any, dtype: torch.dtype) -> Tensor:
            x = embeds.to(dtype, copy=True).requires_grad_(True)
            one(inputs_embeds=x).logits.square().mean().backward()
            assert x.grad is not None
            return x.grad.double()

        packed, floating = gradient(model, torch.float32), gradient(plain, torch.float32)
        exact = gradient(plain.double(), torch.float64)
        # Both round at every step to float32, in other orders: their errors are of one size.
        assert (packed - exact).norm() <= 4 * (floating - exact).norm()

    def test_gradients_through_experts_are_refused_by_a_clear_error(self) -> None:
        model = optimize(small("qwen3_moe"))
        with pytest.raises(RuntimeError, match="no_grad"):
            model(inputs_embeds=torch.randn(1, 3, 96, requires_grad=True))

    def test_norm_gives_gradients(self) -> None:
        norm, x = optimize(small("llama")).model.norm, torch.randn(2, 96, requires_grad=True)
        norm(x).sum().backward()
        assert x.grad is not None

    def test_positional_arguments(self) -> None:
        model = optimize(small("llama"))
        calls = record(model, FusedAttention, lambda: self.unhooked(model))
        module, args, kwargs, (output, _) = calls[0]
        assert args == ()
        x, tables = kwargs["hidden_states"], kwargs["position_embeddings"]
        with torch.no_grad():
            assert_same_bits(module(x, tables, kwargs["attention_mask"])[0], output)

    def test_unknown_tables_go_to_the_original(self) -> None:
        model = optimize(small("phi3"), activations="float")
        calls = record(model, FusedAttention, lambda: self.unhooked(model))
        module, _, kwargs, _ = calls[0]
        cos, sin = kwargs["position_embeddings"]
        broadcast = [table[:, :1].expand_as(table)[:, :1] for table in (cos, sin)]
        same = kwargs | {"position_embeddings": (broadcast[0], broadcast[1])}
        with torch.no_grad():  # [1, 1, R] is no table, but the original broadcasts it
            got = module(**same)[0]
        full = tuple(table.expand(1, cos.shape[1], -1).contiguous() for table in broadcast)
        with torch.no_grad():
            want = module(**(kwargs | {"position_embeddings": full}))[0]
        assert float((got - want).abs().max()) < LOGITS_BOUND


class TestOutputs:
    """transformers' recording of hidden states and attentions."""

    @pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
    def test_are_recorded(self, family: str) -> None:
        model = optimize(small(family), activations="float")
        plain = optimize(small(family), activations="float", fuse=False)
        found = []
        for one in (model, plain):
            one.set_attn_implementation("eager")
            with torch.inference_mode():
                found.append(one(tokens(2, 5), output_attentions=True, output_hidden_states=True))
        for kind in ("attentions", "hidden_states"):
            ours, theirs = (getattr(output, kind) for output in found)
            assert len(ours) == len(theirs) == 2 + (kind == "hidden_states")
            for a, b in zip(ours, theirs, strict=True):
                assert float((a - b).abs().max()) < LOGITS_BOUND * float(b.abs().max())

    def test_hooks_of_the_recording_survive_fusing(self) -> None:
        model = small("llama")
        with torch.inference_mode():
            model(tokens(1, 4), output_hidden_states=True)  # installs its hooks
        optimize(model)
        with torch.inference_mode():
            assert len(model(tokens(1, 4), output_hidden_states=True).hidden_states) == 3


class TestCopies:
    """Copies, state dicts and conversions of a fused model."""

    def test_deepcopy_is_independent(self) -> None:
        model = optimize(small("qwen3_moe"))
        twin = copy.deepcopy(model)
        ids = tokens(2, 5)
        assert_same_bits(logits(twin, ids), logits(model, ids))
        attention, other = model.model.layers[0].self_attn, twin.model.layers[0].self_attn
        assert type(attention) is type(other)
        assert other.q_proj._source is other.qkv is not attention.qkv
        with torch.no_grad():
            other.q_norm.weight.mul_(2)
        assert not logits(twin, ids).equal(logits(model, ids))

    def test_save_and_pickle(self) -> None:
        model = optimize(small("gemma3"))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for other in (
            torch.load(file, weights_only=False),
            pickle.loads(pickle.dumps(model)),
        ):
            assert_same_bits(logits(other, tokens(2, 5)), logits(model, tokens(2, 5)))
            assert isinstance(other.model.layers[0].mlp, FusedMLP)
            assert report(other).fused == report(model).fused

    @pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe"])
    def test_state_dict_round_trip(self, family: str) -> None:
        model, other = optimize(small(family)), optimize(small(family, seed=1))
        assert not logits(other, tokens(2, 5)).equal(logits(model, tokens(2, 5)))
        other.load_state_dict(model.state_dict())
        assert_same_bits(logits(other, tokens(2, 5)), logits(model, tokens(2, 5)))

    def test_state_dict_of_another_kind_is_refused(self) -> None:
        model = optimize(small("llama"))
        for other in (small("llama"), optimize(small("llama"), fuse=False)):
            with pytest.raises(RuntimeError, match=r"(?s)qkv\.packed.*q_proj"):
                model.load_state_dict(other.state_dict())

    @pytest.mark.parametrize("family", ["qwen3", "gemma3", "qwen3_moe", "modernbert"])
    def test_conversion(self, family: str) -> None:
        model = optimize(small(family)).to(torch.bfloat16)
        got = logits(model, tokens(2, 5))
        assert got.dtype == torch.bfloat16
        with by_reference():
            assert_same_bits(logits(model, tokens(2, 5)), got)
        attention = next(m for m in model.modules() if isinstance(m, FusedAttention))
        name = attention.slmops.row.projections[0]
        assert getattr(attention, name).weight.dtype == torch.bfloat16

    def test_class_is_a_subclass_of_the_original(self) -> None:
        attention = optimize(small("llama")).model.layers[0].self_attn
        assert isinstance(attention, LLAMA)
        assert type(attention).__name__ == "FusedLlamaAttention"
        assert type(small("llama").model.layers[0].self_attn) is LLAMA
