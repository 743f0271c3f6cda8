"""optimize(calibration=...): which inputs count, what the codes gain, and that a model survives."""

from __future__ import annotations

import copy
import logging
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor, nn

from torch_slmops import calibrate, optimize, report
from torch_slmops.calibrate import make_batches
from torch_slmops.modules import Embedding, PackedModule

transformers = pytest.importorskip("transformers")

from small_models import logits, small, tokens  # noqa: E402

from examples import quickstart  # noqa: E402

BATCHES = [tokens(3, 17), tokens(2, 9)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread for all tests here: on a busy machine, waiting for others outweighs their help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def values(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """Of packed and fused layers alike."""
    return {name: model.get_submodule(name).weight + 0 for name in names}


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def quantized(model: nn.Module, **options: Any) -> Any:
    return optimize(copy.deepcopy(model), progress=False, **options)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "bert", "modernbert", "qwen3_moe"])
def test_every_layer_is_calibrated(family: str, caplog: pytest.LogCaptureFixture) -> None:
    original = small(family)
    with caplog.at_level(logging.INFO, logger="torch_slmops"):
        model = quantized(original, calibration=BATCHES)
    assert "whole forwards" not in caplog.text
    packed = {n: m for n, m in model.named_modules() if isinstance(m, PackedModule)}
    plain = [name for name, module in packed.items() if not module.calibrated]
    assert all(isinstance(packed[n], Embedding) or "experts" in n for n in plain), plain
    assert sum("calibrated" in row.now for row in report(model).packed) >= 3
    assert not any("calibrated" in row.now for row in report(quantized(original)).packed)
    assert logits(model, BATCHES[0]).isfinite().all()


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_fused_layers_have_the_codes_of_single_ones(family: str) -> None:
    original = small(family)
    names = linear_names(original)
    plain = values(quantized(original), names)
    fused = values(quantized(original, calibration=BATCHES), names)
    alone = values(quantized(original, calibration=BATCHES, fuse=False), names)
    for name in names:
        assert_same_bits(fused[name], alone[name], name)
        assert not torch.equal(fused[name], plain[name]), name


def test_tiny_llama_is_nearer_to_float(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(quickstart.__file__).parent
    monkeypatch.syspath_prepend(str(folder))
    calibration_windows = runpy.run_path(str(folder / "accuracy.py"))["calibration_windows"]
    held_out = quickstart.held_out_tokens()[::4]
    original = quickstart.load_model()
    reference = quickstart.held_out_logits(original, held_out)
    windows = calibration_windows(16).split(8)
    found = {}
    for name, calibration in (("plain", None), ("calibrated", windows)):
        model = quantized(original, calibration=calibration)
        found[name] = quickstart.agreement(reference, quickstart.held_out_logits(model, held_out))
    assert found["calibrated"][1] < 0.6 * found["plain"][1]
    assert found["calibrated"][0] > found["plain"][0]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + torch.tanh(self.inner(x))
        return y


class Stack(nn.Module):
    """Three blocks, whose chain may be hidden in one of several ways."""

    def __init__(self, how: str = "chain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.first = nn.Linear(64, 64)
        blocks = [Residual() for _ in range(3)]
        self.blocks = nn.Sequential(*blocks) if how == "no list" else nn.ModuleList(blocks)
        self.unused = nn.Linear(64, 32)
        self.eval()

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.first(x)
        blocks = list(self.blocks)
        for block in reversed(blocks) if self.how == "backwards" else blocks:
            x = block(2 * x if self.how == "between" else x)
        return x


INPUTS = [torch.randn(4, 11, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]
LAYERS = ["first", *(f"blocks.{i}.inner" for i in range(3))]


@pytest.mark.parametrize("how", ["no list", "backwards", "between"])
def test_other_models_are_watched_as_a_whole(how: str, caplog: pytest.LogCaptureFixture) -> None:
    original = Stack(how)
    with caplog.at_level(logging.INFO, logger="torch_slmops"):
        found = values(quantized(original, calibration=INPUTS), LAYERS)
    assert ("whole forwards" in caplog.text) == (how != "no list")
    # The same model as a chain: blocks in the order of their calls, the factor in the weights.
    chain = Stack()
    order = {name: name for name in LAYERS}
    if how == "backwards":
        chain.blocks = nn.ModuleList(reversed(list(chain.blocks))).eval()
        order = {"first": "first"} | {LAYERS[1 + i]: LAYERS[3 - i] for i in range(3)}
    expected = values(quantized(chain, calibration=INPUTS), LAYERS)
    names = LAYERS[:2] if how == "between" else LAYERS
    for name in names:  # "between": H of the first block is four times as large, alike otherwise
        assert_same_bits(found[name], expected[order[name]], name)


def test_memory_bound_only_splits_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Stack("no list")
    expected = values(quantized(original, calibration=INPUTS), LAYERS)
    monkeypatch.setattr(calibrate, "_WHOLE_MODEL_BYTES", 1)
    found = values(quantized(original, calibration=INPUTS), LAYERS)
    for name in LAYERS:
        assert_same_bits(found[name], expected[name], name)


def test_padding_does_not_count() -> None:
    padded = [torch.cat([x, torch.full((4, 5, 64), 1e3)], dim=1) for x in INPUTS]
    mask = torch.cat([torch.ones(4, 11), torch.zeros(4, 5)], dim=1)
    batches = [{"x": x, "attention_mask": mask} for x in padded]
    expected = values(quantized(Stack(), calibration=INPUTS), LAYERS)
    found = values(quantized(Stack(), calibration=batches), LAYERS)
    for name in LAYERS:
        assert_same_bits(found[name], expected[name], name)


def test_layers_that_are_not_called_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = quantized(Stack(), calibration=INPUTS)
    assert "unused" in caplog.text
    assert "first" not in caplog.text
    assert model.first.calibrated
    assert not model.unused.calibrated
    with pytest.raises(ValueError, match="none of the layers"):
        quantized(Stack(), calibration=INPUTS, include="unused")


def test_a_new_weight_is_not_calibrated() -> None:
    model = quantized(Stack(), calibration=INPUTS)
    assert copy.deepcopy(model).first.calibrated
    model.first.weight = torch.randn(64, 64)
    assert not model.first.calibrated


@pytest.mark.parametrize("call", [1, 3, 7])
def test_failure_leaves_the_model(call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("llama")
    before = logits(model, BATCHES[0])
    state = {name: (id(p), p._version) for name, p in model.named_parameters()}
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    calls = []

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            raise MemoryError("in the middle")
        return real(*args)

    real = calibrate.feed_back
    monkeypatch.setattr(calibrate, "feed_back", failing)
    with pytest.raises(MemoryError, match="in the middle"):
        optimize(model, calibration=BATCHES, progress=False)
    assert len(calls) == call
    assert {name: (id(p), p._version) for name, p in model.named_parameters()} == state
    assert [(name, id(m), type(m)) for name, m in model.named_modules()] == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert_same_bits(logits(model, BATCHES[0]), before)


def test_infinite_activations_are_an_error() -> None:
    model = Stack()
    with pytest.raises(ValueError, match=r"first: calibration: expected finite activations"):
        optimize(model, calibration=torch.full((1, 2, 64), torch.inf), progress=False)
    assert type(model.first) is nn.Linear


@pytest.mark.parametrize(
    ("calibration", "error", "text"),
    [
        ([], ValueError, "at least one"),
        (7, TypeError, "got a int"),
        ([1, 2], TypeError, "got a int"),
        ("def f(): pass", TypeError, "tokenizer="),
        (["def f(): pass", tokens(1, 3)], TypeError, "got a str"),
    ],
    ids=["empty", "number", "numbers", "no tokenizer", "mixed"],
)
def test_wrong_calibration(calibration: Any, error: type[Exception], text: str) -> None:
    model = small("llama")
    with pytest.raises(error, match=text):
        optimize(model, calibration=calibration)
    assert type(model.lm_head) is nn.Linear


class Words:
    """A tokenizer that gives each word its length."""

    def __call__(self, text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def test_texts_become_windows() -> None:
    found = make_batches(["a bb", "ccc", "dddd e"], Words())
    assert [batch.tolist() for batch in found] == [[[1, 2], [4, 1]], [[3]]]
    long = make_batches("a " * 256 + "bb " * 256 + "ccc", Words())
    assert [batch.shape for batch in long] == [(2, 256)]
    assert long[0].float().mean(1).tolist() == [1.0, 2.0]
    many = make_batches("a " * 256 * 300, Words())
    assert sum(len(batch) for batch in many) == 128
    with pytest.raises(ValueError, match="one token"):
        make_batches(["", " "], Words())


def test_texts_and_their_tokens_give_the_same_codes() -> None:
    original = small("llama")
    names = linear_names(original)
    text = " ".join("w" * int(n) for n in tokens(1, 40)[0])
    by_text = quantized(original, calibration=text, tokenizer=Words())
    by_tokens = quantized(original, calibration=tokens(1, 40))
    for name in names:
        first, second = (m.get_submodule(name).weight + 0 for m in (by_text, by_tokens))
        assert_same_bits(first, second, name)
