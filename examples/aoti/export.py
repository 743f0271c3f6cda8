"""Compiles a causal language model into a package that examples/aoti/main.cpp runs without Python.

    python examples/aoti/export.py build/aoti [--model DIR] [--prompt TEXT] [--tokens 256]

Writes into the folder model.pt2, an AOTInductor package with the packed weights; vocabulary.bin,
the bytes of each token; and prompt.txt, the tokens of the prompt. The ops of torch_slmops choose
their instruction set where the package runs; what inductor compiles itself is kept to the baseline
of the architecture, so that the package runs there at all.
"""

from __future__ import annotations

import argparse
import platform
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache
from transformers.convert_slow_tokenizer import bytes_to_unicode

import torch_slmops

MODEL = Path(__file__).parents[1] / "tiny_llama"
BASELINE = {"x86_64": "x86-64", "aarch64": "armv8-a"}  # as -march


class Decoder(nn.Module):
    """A step of generation with a static cache whose keys and values are buffers.

    Attributes:
        model: A causal language model of transformers.
    """

    def __init__(self, model: Any, tokens: int) -> None:
        """Makes room for `tokens` tokens of one sequence."""
        super().__init__()
        self.model = model
        config = model.config
        self._cache = StaticCache(config=config, max_cache_len=tokens)
        heads, width = config.num_key_value_heads, config.head_dim
        self._cache.early_initialization(1, heads, width, model.dtype, torch.device("cpu"))
        for i, layer in enumerate(self._cache.layers):
            self.register_buffer(f"keys_{i}", layer.keys)
            self.register_buffer(f"values_{i}", layer.values)

    def forward(self, ids: Tensor, position: Tensor) -> Tensor:
        """Returns the logits of the next token, [1, vocabulary].

        Args:
            ids: int64 [1, L]: the prompt, or the last token.
            position: int64 []: the number of tokens before `ids`.
        """
        for i, layer in enumerate(self._cache.layers):
            layer.keys, layer.values = getattr(self, f"keys_{i}"), getattr(self, f"values_{i}")
            layer.cumulative_length = position.clone()
        result = self.model(
            input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        logits: Tensor = result.logits
        return logits[:, -1]


def load(path: Path) -> Any:
    """Returns the model at `path`, optimized, with the attention of torch_slmops."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    torch_slmops.optimize(model, progress=False)
    torch_slmops.register_attention()
    model.set_attn_implementation("slmops")  # it reads the cache in place, where sdpa copies it
    return model


def compile_package(model: Any, tokens: int, package: Path) -> None:
    """Compiles `model` for up to `tokens` tokens, with prompts of any length."""
    length = torch.export.Dim("length", min=1, max=tokens)
    example = (torch.zeros(1, 5, dtype=torch.int64), torch.tensor(0))
    with torch.no_grad():
        program = torch.export.export(
            Decoder(model, tokens).eval(), example, dynamic_shapes=({1: length}, None)
        )
    portable: dict[str, Any] = {"cpp.simdlen": 1}
    if hasattr(inductor_config.cpp, "march"):  # before, inductor compiled for its own machine only
        portable["cpp.march"] = BASELINE[platform.machine()]
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(package), inductor_configs=portable
    )


def vocabulary_bytes(tokenizer: Any) -> bytes:
    """Returns for each token the number of its bytes, 4 bytes little endian, and its bytes."""
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    packed = bytearray()
    for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer))):
        text = b"".join(
            bytes([byte_of[character]]) if character in byte_of else character.encode()
            for character in token
        )
        packed += struct.pack("<I", len(text)) + text
    return bytes(packed)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--prompt", default="def __eq__(self, other):")
    parser.add_argument("--tokens", type=int, default=256, help="room of the cache")
    args = parser.parse_args(arguments)

    args.folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    (args.folder / "vocabulary.bin").write_bytes(vocabulary_bytes(tokenizer))
    ids = tokenizer(args.prompt)["input_ids"]
    (args.folder / "prompt.txt").write_text(" ".join(map(str, ids)) + "\n")
    compile_package(load(args.model), args.tokens, args.folder / "model.pt2")


if __name__ == "__main__":
    main()
