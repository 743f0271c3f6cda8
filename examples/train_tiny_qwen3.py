"""Trains a 4.2 M-parameter Qwen3 on English text: the manuals of Django and SQLAlchemy.

    python -m pip download --no-deps --no-binary :all: -d TEXT Django==5.2.8 SQLAlchemy==2.0.44
    python examples/train_tiny_qwen3.py OUT --text TEXT [--steps 1200] [--seed 0] [--bf16]

`make tiny-qwen3` does both, in build/. The text is what `MANUALS` names in the two packages' source
archives on PyPI: 827 files, 11 MB, mostly prose. The model is a second one to measure accuracy on:
another family than examples/tiny_llama, trained on another kind of text. Steps, seed, thread count
and torch version fix it. OUT receives the model (bf16), the tokenizer, val_tokens.npy, held-out
tokens, and calibration_tokens.npy, some of those it was trained on. The one that docs/accuracy.md
measures was trained with --bf16 and one thread; its held-out loss is 2.99 nats per token.
"""

from __future__ import annotations

import fnmatch
import tarfile
from pathlib import Path

from training import VOCABULARY, Texts, parser_of, run, split
from transformers import Qwen3Config, Qwen3ForCausalLM

MANUALS = {  # archive: its files
    "django-5.2.8.tar.gz": "django-5.2.8/docs/*.txt",
    "sqlalchemy-2.0.44.tar.gz": "sqlalchemy-2.0.44/doc/build/*.rst",
}


def manuals(folder: Path) -> list[str]:
    """Returns the text of every file of `MANUALS`, in order of archive and name."""
    texts: list[str] = []
    for archive, pattern in MANUALS.items():
        path = folder / archive
        if not path.exists():
            raise FileNotFoundError(f"expected {path}: see the pip command in {__file__}")
        with tarfile.open(path) as tar:
            members = {m.name: m for m in tar if fnmatch.fnmatchcase(m.name, pattern)}
            for name in sorted(members):
                file = tar.extractfile(members[name])
                if file is not None:
                    texts.append(file.read().decode("utf-8", errors="ignore"))
    return texts


def build_model() -> Qwen3ForCausalLM:
    """Returns the untrained model: q/k norm, two query heads per key/value head, tied head."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
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
    return Qwen3ForCausalLM(config)


def main(argv: list[str] | None = None) -> float:
    """Runs the command line; returns the held-out loss in nats per token."""
    parser = parser_of(str(__doc__).splitlines()[0], steps=1200)
    parser.add_argument("--text", type=Path, required=True, help="folder of the source archives")
    args = parser.parse_args(argv)
    texts = Texts(*split(manuals(args.text), args.max_files, args.seed))
    return run(args, texts, build_model)


if __name__ == "__main__":
    main()
