"""save_pretrained and from_pretrained of optimized models, and quantizing while loading."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import ENCODERS, FAMILIES, logits, small, tokens, transformers
from torch import Tensor, nn

import torch_slmops
from torch_slmops import SavedModelError, SlmopsConfig, load, optimize, report
from torch_slmops import rebuild as rebuild_module
from torch_slmops.fused import Fused
from torch_slmops.hf_quantizer import SlmopsQuantizer
from torch_slmops.modules import PackedModule

IDS = tokens(2, 5)


def folder_of(path: Path, family: str, **options: Any) -> Path:
    """A folder with the float model of a family."""
    small(family, **options).save_pretrained(path / "float")
    return path / "float"


def auto(folder: Path, family: str = "llama", **options: Any) -> Any:
    kind = "AutoModelForMaskedLM" if family in ENCODERS else "AutoModelForCausalLM"
    if family == "gemma2":
        options["attn_implementation"] = "eager"  # sdpa knows no softcap
    model, info = getattr(transformers, kind).from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """The folder of an optimized llama."""
    optimize(small("llama")).save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back(family: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, family, dtype=torch.bfloat16)
    model = optimize(auto(folder, family))
    want = logits(model, IDS)
    model.save_pretrained(tmp_path / "packed")
    for other in (
        auto(tmp_path / "packed", family),
        auto(folder, family, quantization_config=SlmopsConfig()),
    ):
        assert_same_bits(logits(other, IDS), want)
        assert str(report(other)) == str(report(model))
        assert not other.training
        assert not any(parameter.requires_grad for parameter in other.parameters())


@pytest.mark.parametrize("options", [{"fuse": False}, {"lm_head": None}, {"weights": "int8"}])
def test_options(options: dict[str, Any], tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama")
    model = optimize(auto(folder), **options)
    model.save_pretrained(tmp_path / "packed")
    streamed = auto(folder, quantization_config=SlmopsConfig(**options))
    for other in (auto(tmp_path / "packed"), streamed):
        assert_same_bits(logits(other, IDS), logits(model, IDS))
        assert str(report(other)) == str(report(model))
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "slmops"
    assert config["format_version"] == 1
    assert config.items() >= options.items()


def test_calibrated_layers_are_known_as_such(tmp_path: Path) -> None:
    model = optimize(small("llama"), calibration=tokens(2, 20), progress=False)
    model.save_pretrained(tmp_path)
    assert "calibrated" in str(report(auto(tmp_path)))


def test_files_are_safetensors_alone(packed: Path) -> None:
    names = {file.name for file in packed.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    with safe_open(packed / "model.safetensors", framework="pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
    assert "lm_head.packed" not in keys  # tied
    assert {"model.embed_tokens.packed", "model.layers.0.self_attn.qkv.packed"} <= keys
    assert metadata["slmops_format"] == "1"
    assert "AttentionSpec" in metadata["slmops_recipe"]


def test_tied_weights_stay_tied(packed: Path) -> None:
    model = auto(packed)
    assert model.lm_head.packed is model.model.embed_tokens.packed
    assert model.all_tied_weights_keys == {}
    model.tie_weights()
    assert model.lm_head.packed is model.model.embed_tokens.packed


def test_sharded_files(tmp_path: Path) -> None:
    model = optimize(small("qwen3_moe"))
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_same_bits(logits(auto(tmp_path), IDS), logits(model, IDS))
    assert_same_bits(logits(load(tmp_path, into=small("qwen3_moe", 1)), IDS), logits(model, IDS))


def test_saved_again_and_generating(packed: Path, tmp_path: Path) -> None:
    model = auto(packed)
    model.save_pretrained(tmp_path / "again")
    other = auto(tmp_path / "again")
    options = {"max_new_tokens": 4, "do_sample": False}
    assert other.generate(IDS, **options).equal(model.generate(IDS, **options))
    assert optimize(other) is other  # nothing left to do
    assert_same_bits(logits(other, IDS), logits(model, IDS))


def test_dtype_that_is_asked_for(packed: Path) -> None:
    model = auto(packed, dtype=torch.bfloat16)
    assert model.dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert_same_bits(logits(model, IDS), logits(auto(packed).to(torch.bfloat16), IDS))


def test_load_reads_such_a_folder(packed: Path) -> None:
    model = load(packed, into=small("llama", seed=1))
    assert_same_bits(logits(model, IDS), logits(auto(packed), IDS))
    model.save_pretrained(packed.parent / "again")
    assert_same_bits(logits(auto(packed.parent / "again"), IDS), logits(model, IDS))


def test_models_inside_others_save_themselves(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small("bert")

        def forward(self, ids: Tensor) -> Tensor:
            return logits(self.inner, ids)

    model = optimize(Wrapper().eval())
    model.inner.save_pretrained(tmp_path)
    assert_same_bits(logits(auto(tmp_path, "bert"), IDS), model(IDS))


class TestWhatIsProbed:
    """The float model is compared with its row again only if its code may be another one."""

    def probes(self, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
        from torch_slmops import probe

        found: list[nn.Module] = []
        original = probe._probe
        monkeypatch.setattr(
            probe, "_probe", lambda m, spec: (found.append(m), original(m, spec))[1]
        )
        probe._probed.clear()
        return found

    def test_not_with_the_same_version(self, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.probes(monkeypatch)
        auto(packed)
        assert found == []

    def test_with_another_one(self, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.probes(monkeypatch)
        monkeypatch.setattr(rebuild_module, "package_version", lambda name: "another")
        want = logits(auto(packed), IDS)
        assert len(found) >= 3  # norm, MLP, attention
        monkeypatch.undo()
        assert_same_bits(logits(auto(packed), IDS), want)

    def test_code_that_computes_something_else_is_refused(
        self, packed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.probes(monkeypatch)
        monkeypatch.setattr(rebuild_module, "package_version", lambda name: "another")
        mlp = transformers.models.llama.modeling_llama.LlamaMLP
        monkeypatch.setattr(mlp, "forward", lambda self, x: self.down_proj(self.up_proj(x)))
        with pytest.raises(
            SavedModelError, match=r"model\.safetensors: model\.layers\.0\.mlp: expected a LlamaMLP"
        ):
            auto(packed)


class TestErrors:
    """Files that are not what they should be."""

    def edit(self, packed: Path, **changes: Any) -> None:
        file = packed / "config.json"
        config = json.loads(file.read_text())
        for name, value in changes.items():
            holder = (
                config["quantization_config"] if name in config["quantization_config"] else config
            )
            holder[name] = value
        file.write_text(json.dumps(config))

    def test_newer(self, packed: Path) -> None:
        self.edit(packed, format_version=2)
        with pytest.raises(SavedModelError, match=r"expected format 1, .*got format 2.*upgrade"):
            auto(packed)

    def test_truncated(self, packed: Path) -> None:
        file = packed / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[:-100])
        with pytest.raises(SavedModelError, match=rf"{file}: expected {len(data)} bytes"):
            auto(packed)

    def test_damaged_tensors(self, packed: Path) -> None:
        file = packed / "model.safetensors"
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata()
        for name in ("model.norm.weight", "model.layers.1.mlp.down_proj.packed"):
            tensors = load_file(file)
            tensors[name].view(torch.uint8)[70] ^= 1
            save_file(tensors, packed / "model.safetensors", metadata=metadata)
            with pytest.raises(SavedModelError, match=rf"{file}: {name}: expected bytes with the"):
                auto(packed)
            tensors[name].view(torch.uint8)[70] ^= 1
            save_file(tensors, packed / "model.safetensors", metadata=metadata)
        auto(packed)

    @pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.down_proj.packed"])
    def test_missing_tensors(self, packed: Path, name: str) -> None:
        file = packed / "model.safetensors"
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata()
        tensors = load_file(file)
        del tensors[name]
        save_file(tensors, file, metadata=metadata)
        with pytest.raises(SavedModelError, match=rf"{file}: {name}: expected such a tensor"):
            auto(packed)

    def test_foreign(self, packed: Path) -> None:
        small("llama").save_pretrained(packed.parent / "float")
        (packed.parent / "float" / "model.safetensors").replace(packed / "model.safetensors")
        with pytest.raises(SavedModelError, match=r"model\.safetensors: expected a file that torc"):
            auto(packed)

    def test_config_of_another_model(self, packed: Path) -> None:
        self.edit(packed, rms_norm_eps=0.5)
        with pytest.raises(SavedModelError, match=r"norm: expected .*its eps is 0\.5, was 1e-06"):
            auto(packed)

    def test_shards_of_two_models(self, tmp_path: Path) -> None:
        for seed, name in enumerate("ab"):
            optimize(small("llama", seed)).save_pretrained(tmp_path / name, max_shard_size="30KB")
        file = sorted((tmp_path / "a").glob("model-*.safetensors"))[1]
        (tmp_path / "b" / file.name).replace(file)
        with pytest.raises(SavedModelError, match="the files are of different models"):
            auto(tmp_path / "a")

    def test_options(self) -> None:
        for options, error in (
            ({"weights": "int5"}, ValueError),
            ({"group_size": 7}, ValueError),
            ({"groups": 7}, TypeError),
        ):
            with pytest.raises(error):
                SlmopsConfig(**options)

    def test_other_devices(self) -> None:
        quantizer = SlmopsQuantizer(SlmopsConfig())
        quantizer.validate_environment(device_map={"": "cpu"})
        assert quantizer.update_device_map("auto") == {"": "cpu"}
        with pytest.raises(ValueError, match='expected device_map="cpu", got'):
            quantizer.validate_environment(device_map={"": "cuda"})


class TestOtherDtypes:
    """Converting a packed model changes what is still float, and leaves the codes alone."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_to(self, dtype: torch.dtype, packed: Path) -> None:
        model, want = auto(packed).to(dtype), auto(packed, dtype=dtype)
        assert_same_bits(logits(model, IDS), logits(want, IDS))
        assert {p.dtype for p in model.parameters()} == {dtype}
        for module in model.modules():
            if isinstance(module, PackedModule):
                assert (module.dtype, module.packed.dtype) == (dtype, torch.uint8)
        assert logits(model, IDS).dtype == dtype

    def test_saved_and_loaded(self, packed: Path, tmp_path: Path) -> None:
        model = auto(packed).to(torch.bfloat16)
        model.save_pretrained(tmp_path / "again")
        again = auto(tmp_path / "again")
        assert again.dtype == torch.bfloat16
        assert_same_bits(logits(again, IDS), logits(model, IDS))

    @pytest.mark.parametrize("name", ["half", "float"])
    def test_methods(self, name: str, packed: Path) -> None:
        """transformers refuses them for every model that was loaded quantized."""
        model = auto(packed)
        want = logits(model, IDS)
        with pytest.raises(ValueError, match="not supported for quantized model"):
            getattr(model, name)()
        assert_same_bits(logits(model, IDS), want)
        optimized = optimize(small("llama"))
        dtype = torch.float16 if name == "half" else torch.float32
        assert_same_bits(
            logits(getattr(copy.deepcopy(optimized), name)(), IDS), logits(optimized.to(dtype), IDS)
        )


def _readers(layer: Any) -> list[tuple[Any, list[Any]]]:
    """The norms of a decoder layer whose outputs linear layers read, with these layers."""
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(attention, "qkv_proj"):
        first, second = [attention.qkv_proj], [mlp.gate_up_proj]
    else:
        first = [attention.q_proj, attention.k_proj, attention.v_proj]
        second = [mlp.gate_proj, mlp.up_proj]
    middle = getattr(layer, "pre_feedforward_layernorm", layer.post_attention_layernorm)
    return [(layer.input_layernorm, first), (middle, second)]


class TestStream:
    """What is special about quantizing while loading."""

    def test_strict_and_choices(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, "llama")
        options = {"include": ["model.layers.*"], "exclude": "*.1.self_attn.q_proj"}
        want = optimize(auto(folder), **options)
        got = auto(folder, quantization_config=SlmopsConfig(**options))
        assert str(report(got)) == str(report(want))
        assert_same_bits(logits(got, IDS), logits(want, IDS))
        folder = folder_of(tmp_path / "moe", "qwen3_moe")
        with pytest.raises(ValueError, match=r"strict=True.*\n.*mlp\.gate"):
            auto(folder, quantization_config=SlmopsConfig(strict=True))
        with pytest.raises(ValueError, match="expected patterns"):
            auto(folder, quantization_config=SlmopsConfig(include="nothing.*"))

    @pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
    def test_inputs_with_outliers(self, family: str, tmp_path: Path) -> None:
        model = small(family)
        with torch.no_grad():
            for layer in model.model.layers:  # of all the readers' inputs, and of no output
                for norm, readers in _readers(layer):
                    norm.weight[5] *= 2.0**9
                    for reader in readers:
                        reader.weight[:, 5] /= 2.0**9
        model.save_pretrained(tmp_path)
        want = optimize(auto(tmp_path, family))
        got = auto(tmp_path, family, quantization_config=SlmopsConfig())
        assert "float activations" in str(report(want))
        assert str(report(got)) == str(report(want))
        assert_same_bits(logits(got, IDS), logits(want, IDS))
        plain = auto(tmp_path, family, quantization_config=SlmopsConfig(activations="int8"))
        assert "float activations" not in str(report(plain))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_dtype_that_is_asked_for(self, dtype: torch.dtype, tmp_path: Path) -> None:
        other = torch.bfloat16 if dtype == torch.float32 else torch.float32
        folder = folder_of(tmp_path, "qwen3_moe", dtype=other)
        want = optimize(auto(folder, dtype=dtype))
        got = auto(folder, dtype=dtype, quantization_config=SlmopsConfig())
        assert got.dtype == dtype
        assert_same_bits(logits(got, IDS), logits(want, IDS))

    def test_weights_that_are_not_finite(self, tmp_path: Path) -> None:
        model = small("llama")
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp: .*finite"):
            auto(tmp_path, quantization_config=SlmopsConfig())

    def test_a_tensor_of_another_shape(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, "llama")
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name][1:].contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"{name}: expected the shape \(152, 96\), got \(151"):
            auto(folder, quantization_config=SlmopsConfig())

    def test_names_by_a_function(self, tmp_path: Path) -> None:
        """Saved as the names that it chose, with which the float model is quantized alike."""
        folder = folder_of(tmp_path, "llama")
        model = optimize(
            auto(folder), include=lambda n: "layers" in n, exclude=lambda n: n.endswith("1.mlp")
        )
        model.save_pretrained(tmp_path / "packed")
        options = auto(tmp_path / "packed").config.quantization_config
        assert options.exclude == ["model.layers.1.mlp"]
        assert "model.layers.0.self_attn.q_proj" in options.include
        assert not any("embed" in name for name in options.include)
        again = auto(folder, quantization_config=SlmopsConfig(**options.options()))
        assert str(report(again)) == str(report(model))
        assert_same_bits(logits(again, IDS), logits(model, IDS))

    def test_a_head_that_the_checkpoint_lacks(self, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, "llama")
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, quantization_config=SlmopsConfig()
        )
        assert isinstance(model.score, PackedModule)
        assert isinstance(model.model.layers[0].self_attn, Fused)
        with torch.no_grad():
            assert bool(torch.isfinite(model(IDS[:1]).logits).all())


# What a process that only loads needs of memory, as the kernel counts it.
MEMORY = """
import sys, threading, time
import torch, torch_slmops
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.disable_progress_bar()

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return sum(int(x.split()[1]) for x in lines if x.startswith("RssAnon")) * 1024

AutoModelForCausalLM.from_pretrained(sys.argv[1])  # imports what it needs
torch.set_num_threads(1)
before, peak, done = anonymous(), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
config = torch_slmops.SlmopsConfig() if sys.argv[3] == "stream" else None
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=config)
done = True
watcher.join()
packed = torch_slmops.report(model).bytes_after
print(packed, peak - before, anonymous() - before)
"""


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model of 67 million weights in layers of 1 million, as float and as packed files."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16}
    sizes |= {"num_attention_heads": 8}
    folder = tmp_path_factory.mktemp("larger")
    small("llama").save_pretrained(folder / "small")
    model = small("llama", dtype=torch.bfloat16, head_dim=64, **sizes)
    model.save_pretrained(folder / "float", max_shard_size="30MB")
    del model
    largest = 2 * sizes["hidden_size"] * sizes["intermediate_size"] * 2  # gate and up, bfloat16
    return {"folder": folder, "largest": largest}


def memory_of(larger: dict[str, Any], name: str, how: str) -> tuple[int, int, int]:
    folder = larger["folder"]
    command = [sys.executable, "-W", "ignore", "-c", MEMORY, folder / "small", folder / name, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    packed, peak, after = map(int, done.stdout.split())
    return packed, peak, after


def test_memory_while_quantizing_and_loading(larger: dict[str, Any]) -> None:
    # Beyond what is packed: the weights of one unit together, twice their codes, and what Python
    # and the allocator take; far less than the 134 MB of the float model.
    packed, peak, _ = memory_of(larger, "float", "stream")
    assert packed < 40e6
    assert peak < packed + 3 * larger["largest"] + 20e6
    model = auto(larger["folder"] / "float", quantization_config=SlmopsConfig())
    model.save_pretrained(larger["folder"] / "packed")
    packed, peak, after = memory_of(larger, "packed", "load")
    assert after < 1.1 * packed + 10e6
    assert peak < 1.1 * packed + 10e6


class TestDequantize:
    """The float model back, with the exact values of the codes."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_values_and_classes(self, family: str) -> None:
        from small_models import dequantized

        original = small(family)
        model = optimize(copy.deepcopy(original))
        want = dequantized(original, model)
        assert torch_slmops.dequantize(model) is model
        assert [(n, type(m)) for n, m in model.named_modules()] == [
            (n, type(m)) for n, m in original.named_modules()
        ]
        state = model.state_dict()
        assert list(state) == list(original.state_dict())
        for name, tensor in want.state_dict().items():
            assert state[name].equal(tensor)  # bits, but for the sign of zeros
        assert_same_bits(logits(model, IDS), logits(want, IDS))
        assert not hasattr(model.config, "quantization_config")

    def test_ties_and_saving(self, packed: Path) -> None:
        model = auto(packed)
        want = model.lm_head.dequantize()
        assert model.dequantize() is None or True  # transformers' own way to ours
        assert type(model.lm_head) is nn.Linear
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert_same_bits(model.lm_head.weight, want)
        model.tie_weights()
        model.save_pretrained(packed.parent / "float")
        other = auto(packed.parent / "float")
        assert_same_bits(logits(other, IDS), logits(model, IDS))
        optimize(other)

    def test_dtype(self) -> None:
        model = torch_slmops.dequantize(optimize(small("llama")), dtype=torch.bfloat16)
        attention = model.model.layers[0].self_attn
        assert attention.q_proj.weight.dtype == attention.q_proj.bias.dtype == torch.bfloat16

    def test_other_modules(self) -> None:
        model = nn.Sequential(nn.Linear(8, 4), nn.ReLU()).eval()
        torch_slmops.dequantize(optimize(model))
        assert [type(child) for child in model] == [nn.Linear, nn.ReLU]
        with pytest.raises(TypeError, match=r"expected an nn\.Module"):
            torch_slmops.dequantize(3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="expected a floating dtype"):
            torch_slmops.dequantize(model, dtype=torch.int8)


@pytest.mark.parametrize("first", ["torch_slmops", "transformers"])
def test_whichever_is_imported_first(first: str, packed: Path) -> None:
    second = {"torch_slmops": "transformers", "transformers": "torch_slmops"}[first]
    code = (
        f"import sys, {first}, {second}\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.layers[0].mlp).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, packed],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "FusedLlamaMLP"
