"""Fake quantization in training gives the bits of the packed layers; the examples that train."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor, nn

from torch_slmops import evaluate, ops, optimize
from torch_slmops.qat import ActivationQuantizer, WeightQuantizer, use_own_quantizers
from torch_slmops.weights import QuantizedWeight, default_act_group

pytest.importorskip("torchao")
pytest.importorskip("transformers")

from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

from examples import quickstart

FORMATS: dict[str, dict[str, Any]] = {
    "default": {},
    "group": {"scale_kind": "group", "group_size": 32},
    "zero-points": {"group_size": 64, "symmetric": False, "act_group": 32},
    "int8": {"weights": "int8"},
    "int8-per-output": {"weights": "int8", "group_size": -1, "act_group": -1},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports an example as a script does: with its folder on the path."""
    monkeypatch.syspath_prepend(str(Path(quickstart.__file__).parent))
    return importlib.import_module


def linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def prepared(model: nn.Module, **options: Any) -> nn.Module:
    config = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True)
    quantize_(model, QATConfig(weight_config=config), linear)
    return use_own_quantizers(model, **options)


def shaken(model: nn.Module) -> nn.Module:
    """Moves every matrix, so that no weight is as it was shipped."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn_like(parameter) * 1e-3)
    return model


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
def test_weights_in_training_are_those_of_the_packed_layers(options: dict[str, Any]) -> None:
    student = shaken(prepared(quickstart.load_model(), **options))
    used: dict[str, tuple[QuantizedWeight, Tensor]] = {}
    for name, module in student.named_modules():
        if isinstance(module, nn.Linear) and hasattr(module, "weight_fake_quantizer"):
            quantizer = module.weight_fake_quantizer
            used[name] = (quantizer.quantize(module.weight), quantizer(module.weight).detach())
    assert len(used) == 8 * 7
    quantize_(student, QATConfig(step="convert"))
    model = optimize(student.eval(), progress=False, **options)
    layers = dict(model.named_modules())
    for name, (quantized, values) in used.items():
        view: Any = layers[name].weight
        packed = QuantizedWeight.unpack(view.packed)
        rows = torch.arange(packed.shape[0]) if view.rows is None else view.rows
        assert torch.equal(packed.codes[rows], quantized.codes)
        assert_same_bits(packed.scale[rows], quantized.scale)
        for ours, theirs in (
            (packed.sub_scale, quantized.sub_scale),
            (packed.zero_point, quantized.zero_point),
        ):
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours[rows], theirs)
        assert_same_bits(ops.embedding(rows, view.packed, view.shape[1], torch.float32), values)


# An identity in int8 with scale 1: `linear` gives code * s_a of every input, rounded once.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("k", "act_group"), [(256, 128), (300, 32), (192, 64), (160, -1)])
def test_activations_in_training_are_those_of_linear(
    k: int, act_group: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 9, k) * torch.logspace(-6, 4, 9)[:, None]
    x[0, 0] = 0
    x[0, 1, :40] = 0
    x[1, 2] *= 2.0**-125
    x[1, 3, 7] *= 1e6
    x = x.to(dtype).nan_to_num(posinf=6e4, neginf=-6e4)
    codes = (torch.eye(k) + 128).to(torch.uint8)
    scale = torch.ones(k, -(-k // 32))
    identity = QuantizedWeight.from_parts(codes, scale, bits=8, group_size=32)
    expected = ops.linear(x, identity.pack(act_group), k)
    assert_same_bits(ActivationQuantizer(act_group)(x), expected)


@pytest.mark.parametrize("quantizer", [WeightQuantizer(), ActivationQuantizer(64)])
def test_gradient_goes_straight_through(quantizer: nn.Module) -> None:
    torch.manual_seed(2)
    x, upstream = torch.randn(64, 128, requires_grad=True), torch.randn(64, 128)
    y = quantizer(x)
    assert not torch.equal(y, x)
    y.backward(upstream)
    assert x.grad is not None
    assert torch.equal(x.grad, upstream)
    quantizer.enabled = False
    assert quantizer(x) is x
    quantizer.enabled = True


def test_a_forward_in_training_predicts_what_the_optimized_model_does() -> None:
    original = quickstart.load_model()
    student = prepared(copy.deepcopy(original)).eval()
    groups = {
        (m.in_features, m.activation_fake_quantizer.act_group)
        for m in student.modules()
        if isinstance(m, nn.Linear) and hasattr(m, "activation_fake_quantizer")
    }
    assert groups == {(k, default_act_group(4, 16, k)) for k in (256, 768)}
    model = optimize(copy.deepcopy(original), lm_head=None, progress=False)
    tokens = quickstart.held_out_tokens()[:2]
    to_student, to_original = (
        evaluate(model, other, texts=tokens, layers=False, progress=False).kl_mean
        for other in (student, original)
    )
    assert to_student is not None
    assert to_original is not None
    # They sum in another order, which flips an int8 code now and then, and nothing else.
    assert to_student.value < to_original.value / 20


def test_what_is_refused() -> None:
    model = quickstart.load_model()
    with pytest.raises(ValueError, match="no linear layer has fake quantizers"):
        use_own_quantizers(model)
    wrong: Any
    for wrong in ({"weights": "int3"}, {"activations": "int4"}, {"act_group": 48}):
        with pytest.raises(ValueError, match="use_own_quantizers: expected"):
            use_own_quantizers(model, **wrong)


def test_distill_qat_runs(example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--steps 2 --batch-size 1 --max-files 9 --windows 2 --threads 1".split()
    found = example("distill_qat").main([*arguments, "--save", str(tmp_path)])
    assert list(found) == ["int4", "int4, calibrated", "int4, trained"]
    assert 0 < found["int4, calibrated"] < found["int4"]
    assert found["int4, trained"] not in (0, found["int4"])
    assert "2 steps in" in capsys.readouterr().out
    transformers = pytest.importorskip("transformers")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again = evaluate(
        optimize(saved, progress=False),
        quickstart.load_model(),
        texts=quickstart.held_out_tokens()[:2],
        layers=False,
        progress=False,
    )
    assert again.kl_mean is not None
    assert again.kl_mean.value == found["int4, trained"]


def test_distillation_learns(example: Any) -> None:
    distillation, compress = example("distillation"), example("compress_small")
    teacher = quickstart.load_model()
    student = compress.shrink(teacher, 2, 384)
    tokens = distillation.training_tokens(3)
    losses = distillation.distill(student, teacher, tokens, steps=8, batch_size=1, rate=1e-3)
    assert losses[-1] < losses[0]
    # The same logits diverge by nothing; shifted ones neither.
    logits = torch.randn(2, 3, 5)
    assert abs(float(distillation.divergence(logits, logits + 1))) < 1e-6


def test_a_student_of_all_layers_and_units_is_the_teacher(example: Any) -> None:
    compress = example("compress_small")
    teacher = quickstart.load_model()
    tokens = quickstart.held_out_tokens()[:1, :64]
    with torch.no_grad():
        expected = teacher(tokens).logits
        assert torch.equal(compress.shrink(teacher, 8, 768)(tokens).logits, expected)
    for wrong in ((9, 768), (1, 768), (8, 769), (8, 0)):
        with pytest.raises(ValueError, match="expected 2 to 8 layers"):
            compress.shrink(teacher, *wrong)


def test_compress_small_runs(example: Any) -> None:
    arguments = "--layers 3 --mlp 256 --steps 2 --batch-size 1 --max-files 9 --windows 1".split()
    rows = example("compress_small").main([*arguments, "--new-tokens", "2", "--threads", "1"])
    names = [
        f"{who}, {kind}" for who in ("teacher", "student") for kind in ("float32", "int8", "int4")
    ]
    assert [row.name for row in rows] == names
    teacher, student = rows[:3], rows[3:]
    assert teacher[0].kl == 0
    for large, small in zip(teacher, student, strict=True):
        assert small.megabytes < large.megabytes
        assert small.kl > large.kl
        assert small.tokens_per_second > 0
