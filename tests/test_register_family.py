"""register_family and the example of a model written by hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import nn

import torch_slmops
from torch_slmops import families, optimize, register_family, report
from torch_slmops.families import Attention, GatedMLP, RMSNorm
from torch_slmops.fused import FusedAttention, FusedMLP, FusedRMSNorm

EXAMPLE = Path(__file__).parent.parent / "examples" / "custom_model.py"


@pytest.fixture
def example() -> Any:
    spec = importlib.util.spec_from_file_location("custom_model", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Takes back what a test registers."""
    before = families.rows()
    yield
    families._ROWS[:] = before


def counts(model: nn.Module) -> tuple[int, ...]:
    kinds = (FusedAttention, FusedMLP, FusedRMSNorm)
    return tuple(sum(isinstance(m, kind) for m in model.modules()) for kind in kinds)


def test_unregistered_model_is_packed_and_reported(example: Any) -> None:
    model = optimize(example.make_model())
    assert counts(model) == (0, 0, 2 * example.LAYERS + 1)
    assert {row.name for row in report(model).unfused} == {
        "layers.*.attention",
        "layers.*.feed_forward",
    }
    with pytest.raises(ValueError, match="no family has its structure"):
        optimize(example.make_model(), strict=True)


def test_registered_model_is_fused(example: Any) -> None:
    example.register()
    model = optimize(example.make_model(), activations="float", strict=True)
    assert counts(model) == (example.LAYERS, example.LAYERS, 2 * example.LAYERS + 1)
    alone = optimize(example.make_model(), activations="float", fuse=False)
    ids = torch.randint(example.VOCABULARY, (2, 19))
    with torch.inference_mode():
        got, want = model(ids), alone(ids)
    # Sums of 520 fp32 terms in another order, over 28 projections of values of order 1.
    assert float((got - want).abs().max()) < 28 * 520 * 2.0**-24


def test_hooks_on_a_registered_model_are_called(example: Any) -> None:
    example.register()
    model, calls = optimize(example.make_model()), []
    ids = torch.randint(example.VOCABULARY, (1, 7))
    with torch.inference_mode():
        want = model(ids)
        handle = model.layers[0]["attention"].wk.register_forward_hook(
            lambda *args: calls.append(1)
        )
        model(ids)
        handle.remove()
        assert_same_bits(model(ids), want)
    assert calls == [1]


def test_wrong_description_is_found_out(example: Any) -> None:
    register_family(
        Attention(
            "wrong rotary",
            projections=("wq", "wk", "wv"),
            output="wo",
            rotary="interleaved",
            forward=example.fused_forward,
            inputs=example.probe_inputs,
        ),
        GatedMLP("swapped", gate_up=("w3", "w1"), down="w2", activation="silu"),
    )
    model = optimize(example.make_model())
    assert counts(model)[:2] == (0, 0)
    reasons = {row.name: row.reason for row in report(model).unfused}
    assert reasons["layers.*.attention"] == "not wrong rotary: output differs"
    assert reasons["layers.*.feed_forward"] == "not swapped: output differs"


def test_example_runs(example: Any, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    text = capsys.readouterr().out
    assert "qkv_rotary (first llama): 6 + 2 + 2 heads of 32, rotary" in text
    divergence = float(text.split("KL ")[1].split()[0])
    assert 0 < divergence < 0.01


@pytest.mark.parametrize(
    ("row", "error", "words"),
    [
        ("llama", TypeError, "expected rows"),
        (RMSNorm("llama norm"), ValueError, "named 'llama norm' already"),
        (Attention("mine", forward=print), ValueError, "both forward and inputs"),
    ],
)
def test_refuses(row: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        register_family(row)
    assert torch_slmops.register_family is register_family
