"""SlmopsWeightOnlyConfig: torchao's quantize_ packs layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import nn

import torch_slmops
from torch_slmops.modules import Linear

pytest.importorskip("torchao")

from torchao.quantization import quantize_

from torch_slmops.torchao import SlmopsWeightOnlyConfig


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 40, bias=False)).eval()


OPTIONS: list[dict[str, Any]] = [
    {},
    {"weights": "int8", "activations": "float"},
    {"group_size": 32, "symmetric": False, "act_group": 64},
    {"scale_kind": "group"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gives_the_bits_of_optimize(options: dict[str, Any]) -> None:
    plain = model()
    ours = torch_slmops.optimize(copy.deepcopy(plain), **options)
    quantize_(plain, SlmopsWeightOnlyConfig(**options))
    x = torch.randn(3, 96)
    assert type(plain[0]) is type(plain[2]) is Linear
    with torch.no_grad():
        assert_same_bits(plain(x), ours(x))


def test_filter_chooses_layers() -> None:
    plain = model()
    quantize_(plain, SlmopsWeightOnlyConfig(), filter_fn=lambda module, name: name == "2")
    assert [type(module) for module in plain] == [nn.Linear, nn.ReLU, Linear]


def test_dtype_of_the_weight_is_kept() -> None:
    plain = model().bfloat16()
    quantize_(plain, SlmopsWeightOnlyConfig())
    assert plain[0].weight.dtype == torch.bfloat16
    assert plain(torch.randn(2, 96).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int3"}, 'expected weights "int4" or "int8"'),
        ({"scale_kind": "sub16", "symmetric": False}, "is for 4-bit symmetric weights"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_(model(), SlmopsWeightOnlyConfig(**options))


def test_other_modules_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"expected the weight of an nn.Linear, got weight of a ReLU"
    ):
        quantize_(model(), SlmopsWeightOnlyConfig(), filter_fn=lambda module, name: name == "1")
