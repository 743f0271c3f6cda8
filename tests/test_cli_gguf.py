"""A .gguf file as the MODEL of a command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import small_models
import torch
from cli_models import SPECIAL, WORDS, CommandLine

transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

WIDTH, HIDDEN, HEADS, KV_HEADS, LAYERS = 96, 160, 6, 2, 2


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_file(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def save_file(path: Path) -> Path:
    """A llama of random weights in Q8_0, with a tokenizer, as the format's own writer makes it."""
    kind = gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(small_models.VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*SPECIAL, *WORDS])
    writer.add_token_types([3] * len(SPECIAL) + [1] * len(WORDS))
    writer.add_token_scores([-float(i) for i in range(small_models.VOCABULARY)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    source = np.random.default_rng(0)
    for name, shape in shapes().items():
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
            continue
        values = source.standard_normal(shape).astype(np.float32) * np.float32(0.1)
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shapes() -> dict[str, tuple[int, ...]]:
    keys = WIDTH // HEADS * KV_HEADS
    layer = {
        "attn_norm": (WIDTH,),
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (keys, WIDTH),
        "attn_v": (keys, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_norm": (WIDTH,),
        "ffn_gate": (HIDDEN, WIDTH),
        "ffn_up": (HIDDEN, WIDTH),
        "ffn_down": (WIDTH, HIDDEN),
    }
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (small_models.VOCABULARY, WIDTH),
        "output_norm.weight": (WIDTH,),
        "output.weight": (small_models.VOCABULARY, WIDTH),
    }
    for i in range(LAYERS):
        found |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found


def test_report_of_a_gguf_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = CommandLine(capsys).json("report", file)
    assert found["model"] == "LlamaForCausalLM"
    assert found["left"] == []
    assert {row["now"] for row in found["fused"]} >= {"swiglu (gated MLP): silu, 160 wide"}


def test_generate_from_a_gguf_file(
    file: Path, capsys: pytest.CaptureFixture[str], threads: None
) -> None:
    torch.set_num_threads(1)
    found = CommandLine(capsys).json("generate", file, "w1w2", "--max-new-tokens", 4)
    assert 1 <= found["new_tokens"] <= 4
    assert found["prompt_tokens"] >= 1


def test_a_damaged_gguf_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    code, _, err = CommandLine(capsys).run("report", path)
    assert code == 1
    assert err.startswith(f"error: {path}: ")
