"""evaluate: figures against their definitions, what goes wrong, and what is written."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torch_slmops import evaluate, optimize
from torch_slmops.compare import compare, mean_of_chunks
from torch_slmops.evaluate import bits_per_weight
from torch_slmops.layer_noise import Noise
from torch_slmops.modules import PackedModule
from torch_slmops.windows import logits_of, make_windows, sample_texts

transformers = pytest.importorskip("transformers")

from small_models import small, tokens  # noqa: E402

from examples import quickstart  # noqa: E402

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread for all tests here: on a busy machine, waiting for others outweighs their help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quantized(model: nn.Module, **options: Any) -> Any:
    return optimize(copy.deepcopy(model), progress=False, **options)


class Table(nn.Module):
    """A language model whose logits depend on the last token alone."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(rows)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.table(ids)
        return y


def test_known_distributions() -> None:
    # After token 0 the same; after token 1 another first choice: (3/4, 1/4) against (1/4, 3/4).
    reference = torch.tensor([[0.0, 5.0], [math.log(3), 0.0]])
    model = torch.tensor([[1.0, 6.0], [0.0, math.log(3)]])
    found = compare(reference, model)
    assert found.choice.tolist() == [1, 1]
    assert found.reference_choice.tolist() == [1, 0]
    assert found.shared.tolist() == [2, 2]
    assert abs(float(found.kl[0])) < 16 * EPS
    assert abs(float(found.kl[1]) - 0.5 * math.log(3)) < 16 * EPS
    ids = torch.tensor([[0, 1, 1], [1, 0, 0]])
    result = evaluate(Table(model), Table(reference), texts=ids, progress=False)
    assert result.kl_mean is not None
    assert result.top1 is not None
    assert (result.chunks, result.tokens) == (2, 6)
    assert result.top1.value == 0.5
    assert abs(result.kl_mean.value - 0.25 * math.log(3)) < 16 * EPS
    assert result.worst[0].kl == max(t.kl for t in result.worst)
    assert {(t.reference_choice, t.choice) for t in result.worst[:3]} == {("0", "1")}
    assert [(t.chunk, t.position) for t in result.worst[:3]] == [(0, 1), (0, 2), (1, 0)]
    # Predicted: 1 after 0, 1 after 1; then 0 after 1, 0 after 0.
    p = [1 / (1 + math.exp(-5)), 3 / 4, 1 / 4, math.exp(-5) / (1 + math.exp(-5))]
    expected = math.exp(-sum(math.log(x) for x in p) / 4)
    assert abs(result.perplexity.value - expected) < 64 * EPS * expected


def test_first_five() -> None:
    reference = torch.arange(10.0)[None]
    model = reference.clone()
    model[0, 9], model[0, 0] = 0, 9
    assert compare(reference, model).shared.tolist() == [4]


def test_intervals_are_students() -> None:
    # Equal chunks: the textbook interval of the mean of 4 values, t = 3.182 with 3 degrees.
    found = mean_of_chunks([10.0, 12.0, 14.0, 20.0], [2, 2, 2, 2])
    assert found.value == 7
    values = torch.tensor([5.0, 6.0, 7.0, 10.0]).double()
    half = 3.18245 * float(values.std()) / 2
    assert abs(found.high - 7 - half) < 2e-2 * half
    assert abs(7 - found.low - half) < 2e-2 * half
    # A chunk of no weight that differs changes nothing; one alone says nothing.
    assert mean_of_chunks([3.0], [3]).high == math.inf
    same = mean_of_chunks([2.0, 4.0, 8.0], [1, 2, 4])
    assert same.low == same.value == same.high == 2


def test_the_interval_holds_as_often_as_it_says() -> None:
    # 400 experiments of 12 normal chunks: 95 % +- 4 standard errors of that share.
    hits = 0
    for _ in range(400):
        sums = torch.randn(12).tolist()
        found = mean_of_chunks(sums, [1] * 12)
        hits += found.low <= 0 <= found.high
    assert abs(hits / 400 - 0.95) < 4 * (0.95 * 0.05 / 400) ** 0.5


def test_shipped_model() -> None:
    original = quickstart.load_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(quickstart.MODEL)
    held_out = quickstart.held_out_tokens()[::4]
    model = quantized(original)
    found = evaluate(model, original, texts=held_out, worst=3, progress=False)
    logits = [quickstart.held_out_logits(m, held_out) for m in (original, model)]
    top1, kl = quickstart.agreement(*logits)
    assert found.kl_mean is not None
    assert found.top1 is not None
    assert found.kl_median is not None
    assert found.kl_99 is not None
    assert abs(found.kl_mean.value - kl) < 1e-3 * kl
    assert found.top1.value == top1
    assert found.kl_mean.low < kl < found.kl_mean.high
    assert found.kl_median < kl < found.kl_99 < found.worst[-1].kl
    assert abs(found.bits_per_weight - 4.95) < 0.01
    # int4 weights are about 20 dB and more, int8 ones 40 and more; the head is int8 here.
    assert all(18 < row.snr_db < 40 for row in found.layers if "int4" in row.format)
    heads = [row for row in found.layers if "int8 group" in row.format]
    assert {row.name for row in heads} == {"model.embed_tokens", "lm_head"}
    assert all(row.snr_db > 38 for row in heads)
    assert len(found.layers) == 8 * 7 + 2
    shown = evaluate(model, original, tokenizer=tokenizer, worst=2, progress=False)
    assert shown.tokens > 2000
    text = str(shown)
    assert all(repr(token.context) in text for token in shown.worst)
    assert shown.worst[0].context in "".join(sample_texts())


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "qwen3_moe"])
def test_every_layer_has_a_figure(family: str) -> None:
    original = small(family)
    found = evaluate(quantized(original), original, texts=tokens(2, 17), progress=False)
    linear = {n for n, m in original.named_modules() if type(m) in (nn.Linear, nn.Embedding)}
    assert linear <= {row.name for row in found.layers}
    assert any("experts" in row.name for row in found.layers) == (family == "qwen3_moe")
    assert not any(m._forward_hooks for m in original.modules())


def test_noise_is_that_of_the_layer_alone() -> None:
    torch.manual_seed(3)
    original = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)).eval()
    model = copy.deepcopy(original)
    optimize(model, include="1", progress=False)
    with torch.no_grad():
        assert isinstance(model[0], nn.Linear)
        model[0].weight.mul_(2)
    noise = Noise(model, original)
    x = torch.randn(50, 64)
    with torch.no_grad(), noise.listening():
        original(x)
        h = original[0](x)
        expected, got = original[1](h).double(), model[1](h).double()
    found = {row.name: row.snr_db for row in noise.result()}
    exact = 10 * math.log10(float(expected.square().sum() / (expected - got).square().sum()))
    # Sums of 1600 squares of float32 differences: rounding is far below 1e-3 dB.
    assert abs(found["1"] - exact) < 1e-3
    assert found["0"] < 1  # noise as large as the signal, up to the bias


def test_json_and_plot(tmp_path: Path) -> None:
    original = small("llama")
    found = evaluate(quantized(original), original, texts=tokens(1, 17), progress=False)
    found.save(tmp_path / "found.json")
    read = json.loads((tmp_path / "found.json").read_text())
    assert found.kl_mean is not None
    assert read["kl_mean"]["value"] == found.kl_mean.value
    assert read["kl_mean"]["high"] is None  # one chunk: no interval
    assert read["layers"][0]["name"] == found.layers[0].name
    pytest.importorskip("matplotlib")
    from torch_slmops.plot import plot_kl

    many = evaluate(quantized(original), original, texts=tokens(4, 17), progress=False)
    plot_kl({"one": found, "many": many}, tmp_path / "kl.svg")
    assert "bits per weight" in (tmp_path / "kl.svg").read_text()
    with pytest.raises(ValueError, match="at least one"):
        plot_kl({}, tmp_path / "none.svg")
    alone = evaluate(original, texts=tokens(2, 9), progress=False)
    with pytest.raises(ValueError, match="'alone'"):
        plot_kl({"alone": alone}, tmp_path / "none.svg")


def test_without_a_reference() -> None:
    original = small("llama")
    alone = evaluate(original, texts=tokens(2, 9), progress=False)
    assert alone.kl_mean is None
    assert alone.layers == alone.worst == ()
    both = evaluate(quantized(original), original, texts=tokens(2, 9), progress=False)
    assert both.reference_perplexity == alone.perplexity
    assert alone.bits_per_weight == 32


def test_bits_count_shared_weights_once() -> None:
    tied = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).eval()
    tied[1].weight = tied[0].weight
    optimize(tied, weights="int8", progress=False)
    packed = [module.packed for module in tied.modules() if isinstance(module, PackedModule)]
    assert packed[0] is packed[1]
    assert bits_per_weight(tied) == 8 * packed[0].numel() / 64**2


class Words:
    """A tokenizer that gives each word its length."""

    def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def test_windows(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("a bb ccc dddd eeeee")
    found = make_windows(path, Words(), 2)
    assert [(w.start, w.ids.tolist()) for w in found] == [(0, [1, 2]), (2, [3, 4])]
    assert [w.ids.tolist() for w in make_windows(str(path), Words(), 4)] == [[1, 2, 3, 4]]
    listed = make_windows(["a bb", "c", "dd e f"], Words(), 8)
    assert [(w.text, w.ids.tolist()) for w in listed] == [(0, [1, 2]), (2, [2, 1, 1])]
    many = make_windows(torch.zeros(100, 4, dtype=torch.int64), None, 4, most=10)
    assert [w.text for w in many] == list(range(0, 100, 10))
    assert len(sample_texts()) >= 10


@pytest.mark.parametrize(
    ("texts", "error", "text"),
    [
        ("no such file", FileNotFoundError, "no such file"),
        (["a text"], TypeError, "tokenizer="),
        ([3], TypeError, "got a int"),
        (3, TypeError, "got a int"),
        (torch.zeros(2, 1, dtype=torch.int64), ValueError, "at least 2 tokens"),
        (torch.zeros(2, 3), TypeError, "token ids"),
    ],
    ids=["path", "no tokenizer", "numbers", "number", "short", "floats"],
)
def test_wrong_texts(texts: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        evaluate(small("llama"), texts=texts, progress=False)


def test_wrong_models() -> None:
    model = small("llama")
    ids = tokens(1, 5)
    with pytest.raises(ValueError, match="one object"):
        evaluate(model, model, texts=ids)
    with pytest.raises(ValueError, match="training mode"):
        evaluate(copy.deepcopy(model).train(), texts=ids)
    with pytest.raises(TypeError, match="got a str"):
        evaluate("model", texts=ids)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="vocabularies"):
        evaluate(Table(torch.zeros(9, 9)), Table(torch.zeros(9, 8)), texts=ids % 8)
    with pytest.raises(TypeError, match="causal language model"):
        logits_of(model.model, ids)
    with pytest.raises(ValueError, match="worst"):
        evaluate(model, texts=ids, worst=-1)
