"""Rotary tables: sin and cos against 60 digits, frequencies and tables against transformers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import mpmath
import pytest
import torch
from bits import assert_same_bits
from torch import Tensor

from torch_slmops import ops, reference
from torch_slmops.rotary_tables import scaled_frequencies

transformers = pytest.importorskip("transformers")

U = 2.0**-24
LARGEST = 1 << 30
LENGTH = 131072


def inverse_frequencies(config: Any, layer_type: str | None = None) -> tuple[Tensor, float]:
    """Those of a config, or of its layers of one type, and the factor of cos and sin."""
    parameters = config.rope_parameters
    if layer_type is not None:
        parameters = parameters[layer_type]
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        head_dim = config.hidden_size // config.num_attention_heads
    width = int(head_dim * (parameters.get("partial_rotary_factor") or 1.0))
    kind = parameters.get("rope_type") or "default"
    return scaled_frequencies(kind, parameters, config, width)


PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 10000.0},
    "linear": {"rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {
        "rope_theta": 1000000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
    "yarn, all options": {
        "rope_theta": 10000.0,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
        "partial_rotary_factor": 0.5,
    },
    "yarn, attention factor": {
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 4096,
        "attention_factor": 1.25,
    },
}


def config_of(name: str) -> Any:
    parameters = PARAMETERS[name] | {"rope_type": name.split(",")[0]}
    return transformers.LlamaConfig(
        hidden_size=1024,
        num_attention_heads=8,
        max_position_embeddings=LENGTH,
        rope_parameters=parameters,
    )


def theirs(config: Any) -> tuple[Tensor, float]:
    """transformers' inverse frequencies and scaling."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))


def angle_error(config: Any) -> float:
    """Bound of the relative error of transformers' float32 angles.

    inv_freq: the rounded exponent moves theta^e by e ln(theta) U; pow, the reciprocal, and at most
    9 operations of the scaling follow (for llama3 and yarn two of them on a term that cancels by
    no more than its share of the sum); the product with the position is the last.
    """
    return (math.log(config.rope_parameters["rope_theta"]) + 2 + 1 + 9 + 1) * U


@pytest.mark.parametrize("name", PARAMETERS)
def test_frequencies_agree_with_transformers(name: str) -> None:
    config = config_of(name)
    inv_freq, scaling = inverse_frequencies(config)
    expected, expected_scaling = theirs(config)
    assert inv_freq.dtype == torch.float64 and inv_freq.shape == expected.shape
    relative = (expected.double() - inv_freq).abs() / inv_freq
    assert relative.max() <= angle_error(config)
    assert scaling == pytest.approx(expected_scaling, rel=1e-15)


@pytest.mark.parametrize("name", PARAMETERS)
def test_tables_agree_with_transformers(name: str) -> None:
    config = config_of(name)
    positions = torch.tensor([[*range(300), 1000, 4096, 8191, 32767, LENGTH - 1]])
    ours = ops.rotary_table(positions, *inverse_frequencies(config))
    inv_freq, scaling = theirs(config)
    angles = positions[..., None].float() * inv_freq
    exact = inverse_frequencies(config)[0] * positions[..., None]
    # cos is never steeper than 1; then cos itself, its product with the scaling, our rounding.
    bound = scaling * (exact.abs() * angle_error(config) + 4 * U)
    for table, function in zip(ours, (torch.cos, torch.sin), strict=True):
        expected = function(torch.cat((angles, angles), -1)) * scaling
        assert table.shape == expected.shape and table.dtype == torch.float32
        error = (table.double() - expected.double()).abs()
        assert (error <= torch.cat((bound, bound), -1)).all()


def test_frequencies_are_correctly_rounded() -> None:
    inv_freq, scaling = inverse_frequencies(config_of("llama3"))
    with mpmath.workdps(60):
        for i, actual in enumerate(inv_freq.tolist()):
            f = mpmath.mpf(500000) ** (-mpmath.mpf(2 * i) / 128)
            waves = 8192 * f / (2 * mpmath.pi)
            smooth = min(max((waves - 1) / 3, 0), 1)
            assert actual == float((1 - smooth) * f / 32 + smooth * f)
    assert scaling == 1.0


def test_yarn_scaling_of_its_paper() -> None:
    _, scaling = inverse_frequencies(config_of("yarn"))
    assert scaling == pytest.approx(0.1 * math.log(4) + 1, rel=1e-15)


def test_layer_types_have_their_own() -> None:
    parameters = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config = SimpleNamespace(head_dim=64, rope_parameters=parameters)
    full, _ = inverse_frequencies(config, "full_attention")
    sliding, _ = inverse_frequencies(config, "sliding_attention")
    assert full[0] == 0.125 and sliding[0] == 1.0
    assert sliding[16] == 0.01  # 10000^(-1/2)


def test_unknown_type_is_an_error() -> None:
    parameters = {"rope_type": "longrope", "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="'longrope'"):
        inverse_frequencies(SimpleNamespace(head_dim=64, rope_parameters=parameters))


def angles_to_try() -> list[tuple[int, float]]:
    """(position, inv_freq) over the whole domain, and near multiples of pi / 2."""
    source = torch.Generator().manual_seed(7)
    tries = [(p, f) for p in (0, 1, -1, 3, 1 << 20) for f in (1.0, 0.7, 2.0**-40, 1e-3)]
    positions = torch.randint(-LARGEST, LARGEST, (400,), generator=source).tolist()
    tries += [(p, 0.999) for p in positions]
    tries += [(p % 65536, 10000.0 ** -(i % 64 / 64)) for i, p in enumerate(positions)]
    for n in (1, 2, 3, 7, 1000, 12345, 99999, 683565275):  # the float64 nearest to n pi / 2
        tries += [(s, math.nextafter(n * math.pi / 2, math.inf)) for s in (1, -1)]
        tries.append((1, n * math.pi / 2))
    tries += [(LARGEST, 1.0), (-LARGEST, 1.0), (1, float(LARGEST))]
    return tries


def test_sin_and_cos_against_60_digits() -> None:
    """Within 2^-51 and one rounding to float32; where cos or sin is near 0, the 2^-51 shows."""
    for position, frequency in angles_to_try():
        cos, sin = ops.rotary_table(
            torch.tensor([position]), torch.tensor([frequency], dtype=torch.float64), 1.0
        )
        with mpmath.workdps(60):
            angle = mpmath.mpf(position * frequency)  # the product is rounded, as in the op
            for table, exact in ((cos, mpmath.cos(angle)), (sin, mpmath.sin(angle))):
                error = abs(mpmath.mpf(table[0, 0].item()) - exact)
                assert error <= abs(exact) * U * (1 + 2.0**-20) + 2.0**-51, (position, frequency)


@pytest.mark.parametrize("interleaved", [False, True])
def test_op_equals_reference(interleaved: bool) -> None:
    tries = angles_to_try()
    for position, frequency in tries:
        arguments = (torch.tensor([position]), torch.tensor([frequency], dtype=torch.float64))
        actual = ops.rotary_table(*arguments, 1.1, interleaved)
        expected = reference.rotary_table(*arguments, 1.1, interleaved)
        for left, right in zip(actual, expected, strict=True):
            assert_same_bits(left, right)


def test_tables_do_not_depend_on_threads(threads: None) -> None:
    positions = torch.arange(4000).view(4, 1000)
    inv_freq, scaling = inverse_frequencies(config_of("llama3"))
    torch.set_num_threads(1)
    expected = ops.rotary_table(positions, inv_freq, scaling)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        for left, right in zip(
            ops.rotary_table(positions, inv_freq, scaling), expected, strict=True
        ):
            assert_same_bits(left, right)


@pytest.mark.parametrize(
    ("positions", "inv_freq", "words"),
    [
        (torch.zeros(2), torch.ones(4, dtype=torch.float64), "positions of dtype int64"),
        (torch.zeros(2, dtype=torch.int64), torch.ones(4), "inv_freq of dtype float64"),
        (torch.zeros(2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.float64), "one dimension"),
        (torch.tensor([LARGEST + 1]), torch.ones(4, dtype=torch.float64), "at most 2\\^30"),
        (torch.tensor([-(1 << 63)]), torch.zeros(4, dtype=torch.float64), "at most 2\\^30"),
        (torch.tensor([1]), torch.tensor([math.inf], dtype=torch.float64), "at most 2\\^30"),
        (torch.tensor([1]), torch.tensor([math.nan], dtype=torch.float64), "at most 2\\^30"),
    ],
)
def test_refuses(positions: Tensor, inv_freq: Tensor, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        ops.rotary_table(positions, inv_freq, 1.0)


def test_attention_of_a_head_sees_relative_positions() -> None:
    """Turned q . k depends on the distance of their positions alone, up to float32 rounding."""
    q, k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 1, 64)
    config = config_of("default")
    inv_freq = inverse_frequencies(config)[0][::2]

    def dot(p: int, at: int) -> float:
        turned = [
            ops.rotary(x, *ops.rotary_table(torch.tensor([[n]]), inv_freq, 1.0), False)
            for x, n in ((q, p), (k, at))
        ]
        return float((turned[0].double() * turned[1].double()).sum())

    bound = float(q.norm() * k.norm()) * 8 * U
    assert abs(dot(100, 90) - dot(30010, 30000)) <= bound
    assert abs(dot(100, 90) - dot(100, 91)) > 1000 * bound
