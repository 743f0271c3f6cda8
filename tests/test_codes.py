"""benchmarks.codes: its baseline is the project's own int4, and its search is as good."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.bits import assert_same_bits
from torch_slmops import dequantize, optimize
from torch_slmops.feedback import factorize
from torch_slmops.weights import quantize_weight

pytest.importorskip("transformers")

from benchmarks import codes
from examples import quickstart


def weight(n: int = 32, k: int = 1024) -> Tensor:
    """Normal numbers, each 16 with a size of their own."""
    generator = torch.Generator().manual_seed(3)
    sizes = 0.2 + torch.rand(n, k // 16, generator=generator)
    return torch.randn(n, k, generator=generator) * sizes.repeat_interleave(16, 1)


def error(w: Tensor, made: Tensor) -> float:
    return float((made - w).square().sum() / w.square().sum())


def test_baseline_is_what_optimize_packs() -> None:
    original = quickstart.load_model()
    made = codes.rounded(original, codes.own("sub16"))
    packed = dequantize(optimize(copy.deepcopy(original), progress=False))
    expected = packed.state_dict()
    assert made.state_dict().keys() == expected.keys()
    for name, values in made.state_dict().items():
        assert_same_bits(values, expected[name], name)
    layers = codes.linear_layers(made)
    assert len(layers) == 8 * 7
    for name, layer in codes.linear_layers(original).items():
        assert_same_bits(layers[name].weight, quantize_weight(layer.weight).dequantize(), name)


@pytest.mark.parametrize(
    ("kind", "told"), [("sub16", "4 bits per 16"), ("group", "float16 per 32")]
)
def test_search_is_as_good_as_the_ops(kind: str, told: str) -> None:
    w = weight()
    made = codes.round_weight(w, codes.UNIFORM, codes.SCALES[told])
    assert error(w, made) == pytest.approx(error(w, codes.own(kind)(w)), rel=0.01)


@pytest.mark.parametrize("told", [name for name, s in codes.SCALES.items() if s.bits < 16])
def test_sub_scales_are_as_many_as_their_bits_allow(told: str) -> None:
    scales = codes.SCALES[told]
    w = weight(k=8192)
    w[5] = 0
    found = codes.scales_of(w, codes.UNIFORM, scales, None)
    assert max(len(row.unique()) for row in found) <= 1 << scales.bits
    assert bool((found < 0).any()) == scales.signed
    made = codes.round_weight(w, codes.UNIFORM, scales)
    assert_same_bits(made[5].abs(), torch.zeros(8192))
    assert float((made - w).abs().max()) < float(w.abs().max()) / 4


def test_more_scale_is_no_worse() -> None:
    w = weight()
    errors = [
        error(w, codes.round_weight(w, codes.nf4(), codes.Scales(16, bits, False)))
        for bits in (3, 4, 6, 16)
    ]
    assert errors == sorted(errors, reverse=True)


def test_nf4_is_the_published_table() -> None:
    table = codes.nf4()
    published = {
        0: -1.0,
        1: -0.6961928,
        6: -0.0910500,
        7: 0.0,
        8: 0.0795803,
        14: 0.7229568,
        15: 1.0,
    }
    for index, value in published.items():
        assert float(table[index]) / 8 == pytest.approx(value, abs=0.5 / 127 + 1e-6)


def test_small_integers_are_exact_in_int8_and_int16() -> None:
    assert len(codes.SMALL) == 16
    assert list(codes.SMALL) == sorted(set(codes.SMALL))
    most = codes.SMALL_SCALES.most
    assert most is not None
    assert 16 * max(map(abs, codes.SMALL)) * 127 < 1 << 15
    assert all(-128 <= most * entry <= 127 for entry in codes.SMALL)
    w = weight()
    table = codes.as_integers(torch.tensor(codes.SMALL), max(codes.SMALL))
    assert_same_bits(torch.round(table * max(codes.SMALL) / 8), torch.tensor(codes.SMALL).float())
    made = codes.round_weight(w, table, codes.SMALL_SCALES)
    uniform = codes.round_weight(w, codes.UNIFORM, codes.SCALES["4 bits per 16"])
    assert error(w, made) < 0.95 * error(w, uniform)
    s = codes.scales_of(w, table, codes.SMALL_SCALES, None)
    assert max(len(row.unique()) for row in s) <= most + 1


@pytest.mark.parametrize("signed", [False, True])
def test_fitted_table_rises_and_is_better_than_those_it_is_not_fitted_to(signed: bool) -> None:
    w = weight(64)
    scales = codes.Scales(16, 16, signed)
    table = codes.fit([w], 16, signed)
    assert table.shape == (16,)
    assert (table.diff() > 0).all()
    assert float(table.abs().max()) == 8
    entries = codes.as_integers(table) * (127 / 8)
    assert (entries.diff() > 0).all()
    assert torch.allclose(entries, entries.round(), atol=1e-4)
    fitted = error(w, codes.round_weight(w, table, scales))
    for other in (codes.UNIFORM, codes.nf4()):
        assert fitted < error(w, codes.round_weight(w, other, scales))


def test_tables_are_fitted_to_every_weight_alike() -> None:
    w, other = weight(), weight().square() * weight().sign()
    alone, both, scaled = (
        codes.fit(pair, 16, True) for pair in ([w], [w, other], [w, other * 1024])
    )
    assert not torch.equal(alone, both)
    assert_same_bits(scaled, both)


def test_noise_is_the_mean_over_layers_in_db() -> None:
    one, two = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    with torch.no_grad():
        for a, b, off in zip(one, two, (0.1, 0.01), strict=True):
            a.weight.fill_(1.0)
            b.weight.fill_(1.0 + off)
    assert codes.signal_to_noise(one, two) == pytest.approx(30, abs=0.1)


def test_feedback_without_correlations_is_rounding() -> None:
    w, scales = weight(k=256), codes.SCALES["4 bits per 16"]
    plain = codes.Inputs(torch.ones(256), factorize(torch.eye(256)))
    made = codes.round_with_feedback(w, plain, codes.nf4(), scales)
    assert_same_bits(made.contiguous(), codes.round_weight(w, codes.nf4(), scales))


def test_feedback_makes_up_for_errors() -> None:
    w, scales = weight(k=256), codes.SCALES["4 bits per 16"]
    inputs = torch.randn(4096, 16, generator=torch.Generator().manual_seed(5)) @ torch.randn(
        16, 256
    )
    h = inputs.t() @ inputs / 4096 + 0.1 * torch.eye(256)
    known = codes.Inputs(h.diagonal().clone(), factorize(h))
    errors = [
        float(((made - w) @ h * (made - w)).sum())
        for made in (
            codes.round_weight(w, codes.nf4(), scales),
            codes.round_with_feedback(w, known, codes.nf4(), scales),
        )
    ]
    assert errors[1] < 0.5 * errors[0]


def test_inputs_are_those_of_the_layers() -> None:
    original = quickstart.load_model()
    windows = torch.arange(96).view(3, 32)
    seen: list[Tensor] = []
    layer = original.model.layers[1].mlp.down_proj
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = codes.inputs_of(original, windows)
    handle.remove()
    assert found.keys() == codes.linear_layers(original).keys()
    rows = torch.cat(seen).flatten(0, 1)
    expected = rows.square().mean(0)
    torch.testing.assert_close(found["model.layers.1.mlp.down_proj"].mean_square, expected)
