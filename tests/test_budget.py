"""optimize(max_kl=...): the allocation, the trials, and what comes of a budget."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor, nn

from torch_slmops import budget, evaluate, optimize, report
from torch_slmops.allocate import allocate
from torch_slmops.formats import CANDIDATES
from torch_slmops.modules import PackedModule
from torch_slmops.trial import Trials, divergence, replaced

transformers = pytest.importorskip("transformers")

from small_models import VOCABULARY, logits, small, tokens  # noqa: E402

from examples import quickstart  # noqa: E402

TEXTS = tokens(6, 40)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread for all tests here: on a busy machine, waiting for others outweighs their help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def quantized(model: nn.Module, **options: Any) -> Any:
    return optimize(copy.deepcopy(model), progress=False, **options)


def state_of(model: nn.Module) -> tuple[Any, ...]:
    parameters = {name: (id(p), p._version) for name, p in model.named_parameters()}
    modules = [(name, id(m), type(m), "forward" in vars(m)) for name, m in model.named_modules()]
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return parameters, modules, hooks


def test_allocation_is_the_cheapest() -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(50):
        costs = torch.rand(5, 3, generator=generator).tolist()
        prices = torch.rand(5, 3, generator=generator).tolist()
        limit = 1.5

        def sums(choice: Any, costs: Any = costs, prices: Any = prices) -> tuple[float, float]:
            return (
                sum(row[i] for row, i in zip(costs, choice, strict=True)),
                sum(row[i] for row, i in zip(prices, choice, strict=True)),
            )

        every = [sums(choice) for choice in itertools.product(range(3), repeat=5)]
        within = [price for cost, price in every if cost <= limit]
        clearly = [price for cost, price in every if cost <= limit * (1 - 5 / 8192)]
        found = allocate(costs, prices, limit)
        if found is None:
            assert not clearly
            continue
        cost, price = sums(found)
        assert cost <= limit
        assert min(within) <= price <= min(clearly, default=price)


def test_allocation_without_a_choice() -> None:
    assert allocate([[2.0, 3.0]], [[1.0, 1.0]], 1.0) is None
    assert allocate([[2.0, 0.0]], [[1.0, 9.0]], 1.0) == [1]


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_trials_skip_blocks_and_see_the_same(family: str) -> None:
    model = small(family)
    before = state_of(model)
    layers = {n: m for n, m in model.named_modules() if type(m) is nn.Linear}
    trials = Trials(model, [TEXTS[:2], TEXTS[2:, :30]], set(layers.values()))
    assert trials.skips
    assert trials.tokens == 2 * 40 + 4 * 30
    whole = Trials(model, trials.batches, set())  # watches nothing, so it cannot skip
    for name, layer in layers.items():

        def noisy(x: Tensor, layer: Any = layer) -> Tensor:
            return torch.nn.functional.linear(x, layer.weight.roll(1, 0), layer.bias)

        found = trials.kl({layer: noisy})
        assert found == whole.kl({layer: noisy}), name
        assert found > 0
    assert state_of(model) == before


def test_trials_compute_what_is_left() -> None:
    model = small("llama")
    last = model.model.layers[1].mlp.down_proj
    calls: list[int] = []
    trials = Trials(model, [TEXTS[:1]], {last})
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append(0))
    trials.kl({last: last.forward})
    assert calls == []
    trials.kl({model.lm_head: model.lm_head.forward})
    assert calls == [0]
    handle.remove()


class Leaving(nn.Module):
    """A block that leaves something behind besides its output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.left: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.left = [2 * x]
        y: Tensor = self.inner(x)
        return y


class TwoBlocks(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.table = nn.Embedding(VOCABULARY, 64)
        self.blocks = nn.ModuleList([Leaving(), Leaving()])
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        first, second = self.blocks
        x = first(self.table(ids))
        if self.how == "leaving":
            assert isinstance(first, Leaving)
            x = x + first.left.pop()
        y: Tensor = second(first(x) if self.how == "twice" else x)
        return y


@pytest.mark.parametrize("how", ["plain", "leaving", "twice"])
def test_blocks_are_skipped_only_where_that_is_exact(how: str) -> None:
    model = TwoBlocks(how)
    inner = model.blocks[1].inner
    trials = Trials(model, [TEXTS[:1]], {inner})
    assert trials.skips == (how == "plain")
    assert trials.kl({inner: lambda x: 2 * x}) > 0
    assert abs(trials.kl({inner: inner.forward})) < 1e-6


def test_divergence_is_that_of_evaluate() -> None:
    model, other = small("llama"), quantized(small("llama"))
    sums = divergence(logits(model, TEXTS), logits(other, TEXTS))
    found = evaluate(other, model, texts=TEXTS, progress=False)
    assert found.kl_mean is not None
    assert abs(sum(sums) / TEXTS.numel() - found.kl_mean.value) < 1e-6


@pytest.fixture(scope="module")
def original() -> transformers.PreTrainedModel:
    return quickstart.load_model()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("budget") / "measured.json"


@pytest.mark.parametrize("max_kl", [0.008, 0.0008])
def test_shipped_model_meets_its_budget(original: Any, measured: Path, max_kl: float) -> None:
    texts = quickstart.held_out_tokens()[::8]
    model = quantized(original, max_kl=max_kl, texts=texts, measurements=measured)
    found = report(model).budget
    assert found is not None
    assert 0.8 * max_kl < found.measured.value <= max_kl
    assert abs(found.predicted - found.measured.value) < 0.3 * max_kl
    # What was measured is the finished model; `evaluate` adds up in another order.
    again = evaluate(model, original, texts=texts, progress=False)
    assert again.kl_mean is not None
    assert abs(again.kl_mean.value - found.measured.value) < 1e-6
    # Other text of the same kind: the budget is met there up to its uncertainty.
    other = evaluate(model, original, texts=quickstart.held_out_tokens()[1::8], progress=False)
    assert other.kl_mean is not None
    assert other.kl_mean.low < max_kl
    text = str(report(model))
    assert f"mean KL at most {max_kl:g} nats per token; predicted {found.predicted:.3g}" in text
    packed = {m.format() for m in model.modules() if isinstance(m, PackedModule)}
    assert packed == {choice.format for choice in found.choices}
    assert len(packed) > 1


def test_a_budget_is_cheaper_than_one_format(original: Any, measured: Path) -> None:
    texts = quickstart.held_out_tokens()[::8]
    plain = quantized(original)
    kl = evaluate(plain, original, texts=texts, progress=False).kl_mean
    assert kl is not None
    model = quantized(original, max_kl=kl.value, texts=texts, measurements=measured)
    assert report(model).bytes_after < report(plain).bytes_after


def test_budget_that_cannot_be_met(original: Any, measured: Path) -> None:
    model = copy.deepcopy(original)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"cannot be met(.|\n)*embed_tokens: (.|\n)*lm_head=None"):
        texts = quickstart.held_out_tokens()[::8]
        optimize(model, max_kl=1e-6, texts=texts, measurements=measured, progress=False)
    assert state_of(model) == before
    assert report(model).budget is None


@pytest.mark.parametrize("family", ["phi3", "gemma3", "qwen3_moe"])
def test_other_families(family: str) -> None:
    original = small(family)
    model = quantized(original, max_kl=0.05, texts=TEXTS)
    found = report(model).budget
    assert found is not None
    assert found.measured.value <= 0.05
    left = [n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Embedding)]
    assert left == []
    assert any("experts" in choice.name for choice in found.choices) == (family == "qwen3_moe")
    kl = evaluate(model, original, texts=TEXTS, progress=False).kl_mean
    assert kl is not None
    assert abs(kl.value - found.measured.value) < 1e-6
    assert model.generate(TEXTS[:1, :3], max_new_tokens=2, do_sample=False).shape == (1, 5)


def test_calibrated_codes(original: Any) -> None:
    texts = quickstart.held_out_tokens()
    options = {"texts": texts[::16], "max_kl": 0.00015, "include": "model.layers.[12].mlp.*"}
    plain = quantized(original, **options)
    model = quantized(original, calibration=list(texts[1::8].split(4)), **options)
    found = report(model)
    assert found.budget is not None
    assert found.budget.measured.value <= 0.00015
    assert found.bytes_after < report(plain).bytes_after
    assert all("calibrated" in row.now for row in found.packed)


def test_the_head_may_be_left() -> None:
    original = small("qwen3")  # not tied
    model = quantized(original, max_kl=0.05, texts=TEXTS, lm_head=None)
    assert type(model.lm_head) is nn.Linear
    found = report(model).budget
    assert found is not None
    assert not any("lm_head" in choice.name for choice in found.choices)


def count_trials(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> list[int]:
    calls: list[int] = []
    real = Trials.kl

    def counted(self: Trials, forwards: Any) -> float:
        calls.append(len(forwards))
        if len(calls) == fail_at:
            with replaced(forwards):
                raise KeyboardInterrupt
        return real(self, forwards)

    monkeypatch.setattr(Trials, "kl", counted)
    return calls


def test_interrupted_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "measured.json"
    original = small("llama")
    expected = quantized(original, max_kl=0.05, texts=TEXTS)
    model = copy.deepcopy(original)
    before = state_of(model)
    count_trials(monkeypatch, fail_at=10)
    with pytest.raises(KeyboardInterrupt):
        optimize(model, max_kl=0.05, texts=TEXTS, measurements=path, progress=False)
    assert state_of(model) == before
    assert len(json.loads(path.read_text())["rows"]) == 9
    monkeypatch.undo()
    calls = count_trials(monkeypatch)
    optimize(model, max_kl=0.05, texts=TEXTS, measurements=path, progress=False)
    pieces = 2 * 4 + 1  # q/k/v, o, gate/up, down of two layers; the tied head
    assert len(calls) == pieces * len(CANDIDATES) - 9
    assert report(model).budget == report(expected).budget
    assert_same_bits(logits(model, TEXTS), logits(expected, TEXTS))
    calls.clear()
    quantized(original, max_kl=0.1, texts=TEXTS, measurements=path)
    assert calls == []
    quantized(original, max_kl=0.05, texts=TEXTS[1:], measurements=path)  # other text: all again
    assert len(calls) == pieces * len(CANDIDATES)


@pytest.mark.parametrize("call", [1, 3])
def test_failure_leaves_the_model(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("llama")
    before = state_of(model)
    calls: list[int] = []
    real = budget._Search.measure

    def failing(self: Any, choice: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise MemoryError("in the middle")
        return real(self, choice)

    monkeypatch.setattr(budget._Search, "measure", failing)
    with pytest.raises(MemoryError, match="in the middle"):
        optimize(model, max_kl=0.001, texts=TEXTS, progress=False)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"max_kl": 0}, ValueError, "positive"),
        ({"max_kl": "0.1"}, ValueError, "positive"),
        ({"max_kl": 0.1, "weights": "int8"}, ValueError, "leave out weights"),
        ({"texts": TEXTS}, ValueError, "are for max_kl"),
        ({"measurements": "file"}, ValueError, "are for max_kl"),
        ({"max_kl": 0.1, "texts": ["a text"]}, TypeError, "tokenizer="),
        ({"max_kl": 0.1, "texts": TEXTS, "measurements": __file__}, ValueError, "not a file of"),
        ({"max_kl": 0.1, "texts": TEXTS, "include": "model.norm"}, ValueError, "no layer"),
    ],
    ids=["zero", "text", "format", "texts", "measurements", "tokenizer", "file", "nothing"],
)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], text: str) -> None:
    model = small("llama")
    with pytest.raises(error, match=text):
        optimize(model, progress=False, **options)
    assert type(model.lm_head) is nn.Linear
