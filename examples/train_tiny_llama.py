"""Trains examples/tiny_llama: a 7.3 M-parameter Llama on the Python sources installed with it.

    python examples/train_tiny_llama.py OUT [--steps 2120] [--seed 0] [--bf16]

Everything comes from this environment: the text is the Python standard library and the packages
of `PACKAGES` that are installed; the tokenizer is trained on the same text. Steps, seed, thread
count, torch version and source files fix the model. The shipped one took 42 minutes on 2 cores
with --bf16. OUT receives the model (bf16), the tokenizer, val_tokens.npy, held-out tokens, and
calibration_tokens.npy, some of those it was trained on.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from training import VOCABULARY, Texts, parser_of, run, split
from transformers import LlamaConfig, LlamaForCausalLM

PACKAGES = ("torch", "numpy", "sympy", "transformers", "huggingface_hub", "networkx", "jinja2")
# Tests, tables and machine-written code teach a model of this size little.
SKIP_STDLIB = (
    "/site-packages/", "/test/", "/tests/", "/idlelib/", "/lib2to3/", "/pydoc_data/", "/encodings/",
    "/turtledemo/", "_test",
)  # fmt: skip
SKIP_PACKAGES = ("/tests/", "/testing/_internal/", "generated", "_meta_registr")
MAX_FILE_BYTES = 200_000


def source_files(max_files: int | None, seed: int) -> tuple[list[Path], list[Path]]:
    """Returns the files to train on and, one in twenty (at least one), those to hold out."""
    paths = sysconfig.get_paths()
    files = [
        path
        for path in sorted(Path(paths["stdlib"]).rglob("*.py"))
        if not any(part in str(path) for part in SKIP_STDLIB)
    ]
    for package in PACKAGES:
        files += [
            path
            for path in sorted((Path(paths["purelib"]) / package).rglob("*.py"))
            if not any(part in str(path) for part in SKIP_PACKAGES)
            and path.stat().st_size < MAX_FILE_BYTES
        ]
    return split(files, max_files, seed)


def build_model() -> LlamaForCausalLM:
    """Returns the untrained model."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def main(argv: list[str] | None = None) -> float:
    """Runs the command line; returns the held-out loss in nats per token."""
    args = parser_of(str(__doc__).splitlines()[0], steps=2120).parse_args(argv)
    train_files, held_out_files = (
        [path.read_text(encoding="utf-8", errors="ignore") for path in paths]
        for paths in source_files(args.max_files, args.seed)
    )
    return run(args, Texts(train_files, held_out_files), build_model)


if __name__ == "__main__":
    main()
