"""optimize: what is replaced, what is left, and that a failure changes nothing."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor, nn

import torch_slmops
from torch_slmops import formats as formats_module
from torch_slmops import ops, optimize, report
from torch_slmops.modules import Embedding, Linear, PackedModule
from torch_slmops.notes import options_of


class Tied(nn.Module):
    """An embedding, two layers, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64, padding_idx=3)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        y: Tensor = self.head(self.norm(x))
        return y


def tied() -> Tied:
    torch.manual_seed(0)
    return Tied().eval()


IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """What must not change when optimize fails: modules, tensors, flags."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    tensors = {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()}
    return modules, tensors, {name: t.clone() for name, t in model.state_dict().items()}.keys()


def formats(model: nn.Module) -> dict[str, str]:
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            header = ops.describe(module.packed)
            found[name] = f"int{header.bits} {header.scale_kind} {header.group_size}"
    return found


def test_replaces_every_linear_and_embedding() -> None:
    model = tied()
    assert optimize(model) is model
    assert formats(model) == {
        "embed": "int8 group 32",
        "layers.0": "int4 sub16 16",
        "layers.1": "int4 sub16 16",
        "head": "int8 group 32",
    }
    assert type(model.embed) is Embedding
    assert type(model.head) is Linear
    assert model.embed.padding_idx == 3
    assert not model(IDS).requires_grad


def test_tied_modules_share_one_buffer() -> None:
    model = optimize(tied())
    assert model.embed.packed is model.head.packed
    again = copy.deepcopy(model)
    assert again.embed.packed is again.head.packed
    assert_same_bits(again(IDS), model(IDS))


def test_output_is_that_of_the_dequantized_model() -> None:
    model = tied()
    plain = copy.deepcopy(model)
    optimize(model, activations="float")
    with torch.no_grad():
        for name in ("embed", "layers.0", "layers.1"):
            plain.get_submodule(name).weight.copy_(model.get_submodule(name).dequantize())
        got, expected = model(IDS), plain.double()(IDS)
    # Each of 3 matmuls of 64 terms has a relative error of at most 66 * 2^-24 of the sum of its
    # terms' magnitudes; values here are of order 1, sums of magnitudes below 64.
    assert float((got - expected).abs().max()) < 3 * 66 * 2.0**-24 * 64


@pytest.mark.parametrize(
    ("options", "layer", "head"),
    [
        ({"weights": "int8"}, "int8 group 32", "int8 group 32"),
        ({"weights": "int8", "group_size": 64}, "int8 group 64", "int8 group 64"),
        ({"group_size": 64}, "int4 group 64", "int8 group 32"),
        ({"scale_kind": "group"}, "int4 group 32", "int8 group 32"),
        ({"lm_head": "int4"}, "int4 sub16 16", "int4 sub16 16"),
        ({"symmetric": False}, "int4 group 32", "int8 group 32"),
        ({"group_size": -1}, "int4 group 64", "int8 group 32"),
    ],
)
def test_options(options: dict[str, Any], layer: str, head: str) -> None:
    found = formats(optimize(tied(), **options))
    assert (found["layers.0"], found["head"]) == (layer, head)


def test_activation_options_reach_the_header() -> None:
    model = optimize(tied(), activations="float", act_group=64)
    header = ops.describe(model.layers[0].packed)
    assert (header.activations, header.act_group) == ("float", 64)


def test_lm_head_none_leaves_head_and_embedding() -> None:
    model = optimize(tied(), lm_head=None)
    assert set(formats(model)) == {"layers.0", "layers.1"}
    assert model.head.weight is model.embed.weight


def test_is_idempotent() -> None:
    model = optimize(tied())
    before = snapshot(model)
    optimize(model, weights="int8")
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("options", "packed"),
    [
        ({"include": "layers.*"}, {"layers.0", "layers.1"}),
        ({"include": ["layers.0", "head"]}, {"layers.0", "head"}),
        ({"exclude": "layers.?"}, {"embed", "head"}),
        ({"include": "layers.*", "exclude": "*.1"}, {"layers.0"}),
        ({"exclude": lambda name: name.startswith("layers")}, {"embed", "head"}),
    ],
)
def test_include_and_exclude(options: dict[str, Any], packed: set[str]) -> None:
    assert set(formats(optimize(tied(), **options))) == packed


def test_the_rest_can_follow_later() -> None:
    model = optimize(tied(), include="layers.0")
    optimize(model, weights="int8", exclude="head")
    assert formats(model) == {
        "embed": "int8 group 32",
        "layers.0": "int4 sub16 16",
        "layers.1": "int8 group 32",
    }


def test_shared_modules_and_weights_are_packed_once() -> None:
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    model[4].weight = model[3].weight
    optimize(model)
    assert model[0] is model[2]
    assert model[3].packed is model[4].packed
    assert model[3].bias is not model[4].bias
    assert model[0].packed is not model[3].packed


def test_keeps_the_bias_and_its_name() -> None:
    model = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 4, bias=False)).eval()
    bias = model[0].bias
    optimize(model)
    assert model[0].bias is bias
    assert list(dict(model.named_parameters())) == ["0.bias"]


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 2


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def with_hook(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda module, args: None)
    return module


def with_forward(module: nn.Module) -> nn.Module:
    module.forward = lambda x: x  # type: ignore[method-assign]
    return module


def parametrized(module: nn.Module) -> nn.Module:
    return torch.nn.utils.parametrizations.weight_norm(module)


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Linear subclass": (lambda: Doubled(32, 32), "subclass of nn.Linear"),
    "Embedding subclass": (lambda: Scaled(8, 32), "subclass of nn.Embedding"),
    "hook": (lambda: with_hook(nn.Linear(32, 32)), "hooks"),
    "forward": (lambda: with_forward(nn.Linear(32, 32)), "forward was replaced"),
    "parametrization": (lambda: parametrized(nn.Linear(32, 32)), "subclass of nn.Linear"),
    "max_norm": (lambda: nn.Embedding(8, 32, max_norm=1.0), "max_norm"),
    "bias dtype": (lambda: float64_bias(nn.Linear(32, 32)), "float64"),
    "empty": (lambda: nn.Linear(32, 0, bias=False), "empty"),
    "Conv1d": (lambda: nn.Conv1d(4, 4, 1), "not an nn.Linear"),
}


def float64_bias(module: nn.Linear) -> nn.Linear:
    module.bias = nn.Parameter(module.bias.double())
    return module


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", LEFT)
def test_leaves_what_it_does_not_know(name: str) -> None:
    make, words = LEFT[name]
    odd = make()
    model = nn.ModuleDict({"odd": odd, "plain": nn.Linear(32, 32)}).eval()
    with pytest.raises(ValueError, match=rf"(?s)strict.*odd: .*{words}"):
        optimize(model, strict=True)
    assert type(model["plain"]) is nn.Linear
    optimize(model)
    assert model["odd"] is odd
    assert type(model["plain"]) is Linear
    assert any(row.name == "odd" and words in row.reason for row in report(model).left)


def test_strict_allows_what_was_asked_for() -> None:
    model = nn.Sequential(Doubled(32, 32), nn.Linear(32, 32)).eval()
    optimize(model, strict=True, exclude="0")
    assert type(model[0]) is Doubled


def test_names_may_be_an_iterator() -> None:
    model = optimize(tied(), include=iter(["layers.*", "embed"]), exclude=iter(["*.1"]))
    assert set(formats(model)) == {"layers.0", "embed"}
    assert options_of(model)["include"] == ["embed", "layers.*"]


def test_head_of_a_left_embedding_is_packed_as_a_head() -> None:
    model = nn.Sequential(Scaled(8, 32), nn.Linear(32, 8, bias=False)).eval()
    model[1].weight = model[0].weight
    optimize(model)
    assert formats(model) == {"1": "int8 group 32"}


def quantized_elsewhere() -> nn.Module:
    model = tied()
    model.hf_quantizer = object()
    return model


def with_buffer_subclass() -> nn.Module:
    class Codes(Tensor):
        pass

    model = nn.Sequential(nn.Linear(32, 32)).eval()
    model[0]._parameters["weight"] = torch.ones(32, 32).as_subclass(Codes)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no module": (lambda: "model", TypeError, "nn.Module"),
    "lone Linear": (lambda: nn.Linear(4, 4).eval(), ValueError, "Sequential"),
    "training": (lambda: tied().train(), ValueError, r"model\.eval\(\)"),
    "meta": (lambda: tied().to("meta"), ValueError, "meta"),
    "quantizer": (quantized_elsewhere, ValueError, "quantized already"),
    "subclass": (with_buffer_subclass, ValueError, "Codes"),
    "float64": (lambda: tied().double(), TypeError, "float64"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_models(name: str) -> None:
    make, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        optimize(make())


@pytest.mark.parametrize("package", ["gptqmodel.nn_modules.qlinear.torch", "awq.modules.linear"])
def test_tells_where_the_codes_of_other_tools_can_be_read(package: str) -> None:
    class Quantized(nn.Module):
        """A layer as gptqmodel and AutoAWQ leave it; its codes may lie in the order of a kernel."""

    Quantized.__module__ = package
    model = nn.Sequential(nn.Linear(32, 32), Quantized()).eval()
    with pytest.raises(ValueError, match=r"1 is a .*Quantized.*torch_slmops\.from_checkpoint"):
        optimize(model)
    model = tied()
    model.quantization_method = "gptq"
    with pytest.raises(ValueError, match=r"quantized already.*torch_slmops\.from_checkpoint"):
        optimize(model)
    assert not isinstance(model.embed, PackedModule)


@pytest.mark.filterwarnings("ignore")  # torchao's own, at import
def test_refuses_torchao_tensors_that_are_not_known() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    quantization.quantize_(model, quantization.Float8WeightOnlyConfig())
    with pytest.raises(ValueError, match="quantized"):
        optimize(model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "int3"}, "weights"),
        ({"lm_head": "fp8"}, "lm_head"),
        ({"activations": "int4"}, "activations"),
        ({"act_group": 48}, "act_group"),
        ({"group_size": 40}, "multiple of 32"),
        ({"weights": "int8", "scale_kind": "sub16"}, "sub16"),
        ({"include": "layer.*"}, "include.*match"),
        ({"exclude": ["nothing"]}, "exclude.*match"),
    ],
)
def test_refuses_options_and_changes_nothing(options: dict[str, Any], words: str) -> None:
    model = tied()
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        optimize(model, **options)
    assert snapshot(model) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_failure_changes_nothing_and_names_the_layer(value: float) -> None:
    model = tied()
    with torch.no_grad():
        model.layers[1].weight[5, 7] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layers\.1.*finite"):
        optimize(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("calibration", [None, IDS], ids=["plain", "calibrated"])
def test_holds_the_codes_of_one_layer_at_a_time(
    calibration: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []

    def counting(*args: Any) -> torch_slmops.QuantizedWeight:
        assert all(codes() is None for codes in made)
        quantized = torch_slmops.quantize_weight(*args)
        made.append(weakref.ref(quantized.codes))
        return quantized

    monkeypatch.setattr(formats_module, "quantize_weight", counting)
    optimize(tied(), calibration=calibration)
    assert len(made) == 3


def test_holds_no_float_weight_afterwards() -> None:
    model = tied()
    weights = [weakref.ref(p) for p in model.parameters() if p.dim() == 2]
    optimize(model)
    assert all(ref() is None for ref in weights)


class TestReport:
    """report tells what is packed, what is left, and how large."""

    def test_counts_bytes_once(self) -> None:
        model = tied()
        before = sum(p.numel() * 4 for p in model.parameters())
        optimize(model)
        got = report(model)
        packed = [model.embed.packed, *(layer.packed for layer in model.layers)]
        rest = sum(p.numel() * 4 for p in model.parameters())
        assert got.bytes_before == before
        assert got.bytes_after == rest + sum(p.numel() for p in packed)

    def test_groups_layers_that_are_alike(self) -> None:
        rows = {row.name: row for row in report(optimize(tied())).packed}
        assert list(rows) == ["embed", "layers.*", "head"]
        assert rows["layers.*"].count == 2
        assert "shared" in rows["head"].now

    def test_before_optimize_everything_is_left(self) -> None:
        got = report(tied())
        assert got.packed == ()
        assert {row.name for row in got.left} == {"embed", "layers.*", "head"}

    def test_promises_bits_only_where_nothing_else_computes(self) -> None:
        exact = nn.Sequential(nn.Embedding(9, 32), nn.Linear(32, 32), nn.ReLU()).eval()
        assert report(optimize(exact)).bit_portable
        got = report(optimize(tied()))
        assert not got.bit_portable
        assert ("LayerNorm", 1) in got.not_portable

    def test_prints_a_table(self) -> None:
        text = str(report(optimize(tied(), exclude="layers.1")))
        for words in (torch_slmops.isa(), "layers.0", "layers.1", "int4 sub16", "not chosen"):
            assert words in text

    def test_refuses_others(self) -> None:
        with pytest.raises(TypeError, match=r"nn\.Module"):
            report("model")  # type: ignore[arg-type]
