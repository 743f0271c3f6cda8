"""Whole transformers models: the same bits as with reference.py, and everything around a model."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor, nn

import torch_slmops
from torch_slmops import fused, modules, optimize, reference, report
from torch_slmops.modules import Embedding, Linear, PackedModule

transformers = pytest.importorskip("transformers")

SHIPPED = Path(__file__).parent.parent / "examples" / "tiny_llama"
VOCABULARY = 131
FORMATS: dict[str, dict[str, Any]] = {
    "int4": {},
    "int4-g64-zero": {"group_size": 64, "symmetric": False, "act_group": 32},
    "int8": {"weights": "int8"},
    "int4-float": {"activations": "float", "lm_head": "int4"},
}


def small_llama(dtype: torch.dtype = torch.float32, layers: int = 2, **changes: Any) -> nn.Module:
    """A Llama with random weights, odd sizes, biases, grouped heads and a tied head."""
    config = transformers.LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 96,
            "intermediate_size": 200,
            "num_hidden_layers": layers,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "bos_token_id": 0,
            "eos_token_id": None,
            "pad_token_id": 1,
        }
        | changes
    )
    torch.manual_seed(0)
    model: nn.Module = transformers.LlamaForCausalLM(config).eval().to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def tokens(batch: int, length: int, vocabulary: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(batch * 100 + length)
    return torch.randint(2, vocabulary, (batch, length), generator=generator)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids).logits
    return found


class by_reference:
    """Inside it, packed modules compute with reference.py."""

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(modules, "_linear", reference.linear)
        self.patch.setattr(modules, "_embedding", reference.embedding)
        for op in ("rms_norm", "qkv_rotary", "swiglu"):
            self.patch.setattr(fused, f"_{op}", getattr(reference, op))

    def __exit__(self, *error: object) -> None:
        self.patch.undo()


@pytest.fixture(scope="module")
def shipped() -> nn.Module:
    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    return optimize(load(SHIPPED, dtype=torch.float32).eval())


class TestBits:
    """The optimized model is the same model with reference.py in its packed modules."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("name", FORMATS)
    def test_prefill(self, name: str, dtype: torch.dtype, isa: str) -> None:
        model = optimize(small_llama(dtype), **FORMATS[name])
        got = logits(model, tokens(3, 11))
        with by_reference():
            expected = logits(model, tokens(3, 11))
        assert_same_bits(got, expected)

    def test_decode_with_a_cache(self, isa: str) -> None:
        model = optimize(small_llama(torch.bfloat16))

        def step_by_step() -> Tensor:
            found, cache = [], transformers.DynamicCache()
            with torch.inference_mode():
                for ids in tokens(2, 6).split([3, 1, 1, 1], dim=1):
                    found.append(model(input_ids=ids, past_key_values=cache).logits)
            return torch.cat(found, dim=1)

        got = step_by_step()
        with by_reference():
            assert_same_bits(got, step_by_step())

    def test_shipped_model(self, shipped: nn.Module, isa: str) -> None:
        ids = tokens(1, 6, 4096)
        got = logits(shipped, ids)
        with by_reference():
            assert_same_bits(got, logits(shipped, ids))

    def test_rows_agree(self) -> None:
        model, before, found = optimize(small_llama()), torch_slmops.isa(), []
        for name in torch_slmops.isas():
            torch_slmops.set_isa(name)
            found.append(logits(model, tokens(2, 9)))
        torch_slmops.set_isa(before)
        for other in found[1:]:
            assert_same_bits(found[0], other)

    def test_encoder(self, isa: str) -> None:
        config = transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=96,
            max_position_embeddings=32,
        )
        torch.manual_seed(1)
        model = optimize(transformers.BertForMaskedLM(config).eval(), strict=True)
        got = logits(model, tokens(2, 7))
        with by_reference():
            assert_same_bits(got, logits(model, tokens(2, 7)))

    def test_packed_layers_do_not_depend_on_batch_or_threads(self, threads: None) -> None:
        model, before = optimize(small_llama()), torch.get_num_threads()
        x = torch.randn(5, 7, 200, generator=torch.Generator().manual_seed(3))
        ids = tokens(5, 7)
        for module in model.modules():
            if not isinstance(module, Linear | Embedding):
                continue
            batch = ids if isinstance(module, Embedding) else x[..., : module.in_features]
            whole = module(batch)
            assert_same_bits(module(batch[3:4, 2:3]), whole[3:4, 2:3])
            assert_same_bits(module(batch.flip(0)), whole.flip(0))
            for count in (1, 2, 3, 8, before):
                torch.set_num_threads(count)
                assert_same_bits(module(batch), whole)


class TestGenerate:
    """generate gives what it gives with reference.py, in every way of decoding."""

    WAYS: dict[str, dict[str, Any]] = {  # noqa: RUF012
        "greedy": {"do_sample": False},
        "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
        "beam": {"num_beams": 3, "do_sample": False},
        "prompt lookup": {"prompt_lookup_num_tokens": 3, "do_sample": False},
        "static cache": {"cache_implementation": "static", "do_sample": False},
    }

    @staticmethod
    def generate(model: Any, ids: Tensor, **options: Any) -> Tensor:
        torch.manual_seed(5)
        mask = (ids != 1).long()
        found: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=8, **options)
        return found

    @pytest.mark.parametrize("way", WAYS)
    def test_way(self, way: str) -> None:
        model = optimize(small_llama())
        prompt = tokens(1, 4).repeat(1, 3)  # repeats, so that lookup finds something
        got = self.generate(model, prompt, **self.WAYS[way])
        assert got.shape == (1, 20)
        with by_reference():
            assert_same_bits(got, self.generate(model, prompt, **self.WAYS[way]))

    def test_left_padded_batch(self) -> None:
        model = optimize(small_llama())
        ids = tokens(3, 9)
        ids[0, :4] = 1  # padding
        ids[2, :7] = 1
        got = self.generate(model, ids, do_sample=False)
        assert got.shape == (3, 17)
        with by_reference():
            assert_same_bits(got, self.generate(model, ids, do_sample=False))

    def test_shipped_model_continues_code(self, shipped: nn.Module) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(SHIPPED)
        ids = tokenizer("import os\n\ndef", return_tensors="pt")["input_ids"]
        got = self.generate(shipped, ids, do_sample=False)
        assert got.shape[1] > ids.shape[1]
        assert tokenizer.decode(got[0]).startswith("import os\n\ndef")


class TestTracing:
    """torch.compile and torch.export see one graph, for every length."""

    @pytest.mark.filterwarnings("ignore")  # torch's own, while it traces
    @pytest.mark.parametrize("lm_head", ["int8", None], ids=str)
    def test_compile_without_graph_breaks(self, lm_head: Any) -> None:
        torch.compiler.reset()
        model = optimize(small_llama(layers=1), lm_head=lm_head)
        graphs: list[torch.fx.GraphModule] = []

        def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            graphs.append(graph)
            return graph.forward

        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        with torch.no_grad():
            for length in (5, 9, 23):
                ids = tokens(2, length)
                got = compiled(input_ids=ids, use_cache=False).logits
                assert_same_bits(got, model(input_ids=ids, use_cache=False).logits)
        assert len(graphs) == 1

    @pytest.mark.filterwarnings("ignore")
    def test_compile_of_code_that_reads_the_weight(self) -> None:
        class Reads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.proj = nn.Linear(32, 16)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.proj(x.to(self.proj.weight.dtype))
                return y + self.proj.weight.sum(1)

        torch.compiler.reset()
        torch.manual_seed(0)
        model = optimize(Reads().eval())
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        x = torch.randn(3, 32)
        with torch.no_grad():
            assert_same_bits(compiled(x), model(x))

    @pytest.mark.full
    @pytest.mark.filterwarnings("ignore")
    def test_inductor(self) -> None:
        torch.compiler.reset()
        torch.manual_seed(0)
        model = optimize(nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 50)).eval())
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        with torch.no_grad():
            for length in (1, 5, 9):
                x = torch.randn(2, length, 96)
                assert_same_bits(compiled(x), model(x))

    @pytest.mark.filterwarnings("ignore")
    def test_export(self) -> None:
        class Logits(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = optimize(small_llama(layers=1))

            def forward(self, ids: Tensor) -> Tensor:
                found: Tensor = self.model(input_ids=ids, use_cache=False).logits
                return found

        model = Logits().eval()
        length = torch.export.Dim("length", min=2, max=64)
        program = torch.export.export(model, (tokens(1, 5),), dynamic_shapes=({1: length},))
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file)
        for size in (5, 31):
            assert_same_bits(loaded.module()(tokens(1, size)), model(tokens(1, size)))


class TestTransformers:
    """What transformers does with a model besides running it."""

    @pytest.mark.parametrize("lm_head", ["int8", None], ids=str)
    def test_tie_weights_changes_nothing(self, lm_head: Any) -> None:
        model: Any = optimize(small_llama(), lm_head=lm_head)
        before = logits(model, tokens(1, 6))
        model.tie_weights()
        assert_same_bits(logits(model, tokens(1, 6)), before)
        embed, head = model.get_input_embeddings(), model.get_output_embeddings()
        shared = "weight" if lm_head is None else "packed"
        assert getattr(embed, shared) is getattr(head, shared)

    def test_tie_weights_of_a_masked_model(self) -> None:
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        model = optimize(transformers.BertForMaskedLM(config).eval())
        bias = model.cls.predictions.decoder.bias
        model.tie_weights()
        assert model.cls.predictions.decoder.bias is bias is model.cls.predictions.bias

    def test_state_dict_of_an_optimized_model(self) -> None:
        model = optimize(small_llama())
        other = optimize(small_llama(initializer_range=0.1))
        other.load_state_dict(model.state_dict())
        assert_same_bits(logits(other, tokens(1, 6)), logits(model, tokens(1, 6)))

    def test_copies(self) -> None:
        model = optimize(small_llama())
        assert_same_bits(logits(copy.deepcopy(model), tokens(1, 6)), logits(model, tokens(1, 6)))

    def test_untied_head(self) -> None:
        model: Any = optimize(small_llama(tie_word_embeddings=False), strict=True)
        embed, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert (type(embed), type(head)) == (Embedding, Linear)
        assert embed.packed is not head.packed
        assert "int8" in embed.format()
        assert "int8" in head.format()

    def test_scaled_embeddings_are_left(self) -> None:
        config = transformers.Gemma3TextConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
        )
        torch.manual_seed(2)
        model = optimize(transformers.Gemma3ForCausalLM(config).eval())
        assert isinstance(model.lm_head, PackedModule)
        left = {row.name: row.reason for row in report(model).left}
        assert list(left) == ["model.embed_tokens"]
        assert "subclass of nn.Embedding" in left["model.embed_tokens"]
        before = logits(model, tokens(1, 6))
        model.tie_weights()
        assert_same_bits(logits(model, tokens(1, 6)), before)

    def test_code_that_asks_for_the_weight_dtype(self) -> None:
        # T5's feed-forward layer converts its input to wo.weight.dtype.
        config = transformers.T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
        )
        torch.manual_seed(3)
        model = transformers.T5ForConditionalGeneration(config).eval()
        optimize(model, fuse=False, strict=True)
        dtypes: list[torch.dtype] = []
        model.encoder.block[0].layer[1].DenseReluDense.wo.register_forward_pre_hook(
            lambda module, args: dtypes.append(args[0].dtype)
        )
        with torch.inference_mode():
            model(input_ids=tokens(1, 5), decoder_input_ids=tokens(1, 2))
            model.bfloat16()(input_ids=tokens(1, 5), decoder_input_ids=tokens(1, 2))
        assert dtypes == [torch.float32, torch.bfloat16]

    def test_resizing_embeddings_is_refused(self) -> None:
        model: Any = optimize(small_llama())
        with pytest.raises(TypeError, match="Embedding"):
            model.resize_token_embeddings(VOCABULARY + 1)

    def test_parameters_are_frozen(self) -> None:
        model: Any = optimize(small_llama())
        assert not any(p.requires_grad for p in model.parameters())
        embeds = torch.randn(1, 3, 96, requires_grad=True)
        model(inputs_embeds=embeds).logits.sum().backward()
        assert embeds.grad is not None
        assert all(p.grad is None for p in model.parameters())
