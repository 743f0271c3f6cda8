"""exp and the activations: every row has the bits of the reference, which is near float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from bits import assert_same_bits, from_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torch_slmops
from torch_slmops import reference

FUNCTIONS = ("exp", "sigmoid", "silu", "gelu_tanh", "gelu", "relu2", "tanh")


def activation(x: Tensor, name: str) -> Tensor:
    y: Tensor = torch.ops.slmops._activation(x, name)
    return y


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_bfloat16(name: str, isa: str) -> None:
    x = from_bits(torch.arange(1 << 16), torch.bfloat16).float()
    assert_same_bits(activation(x, name), reference.activate(name, x))


@given(
    st.lists(st.integers(0, (1 << 32) - 1), min_size=1, max_size=100),
    st.sampled_from(FUNCTIONS),
    st.sampled_from(torch_slmops.isas()),
)
@settings(max_examples=200)
def test_any_bits(patterns: list[int], name: str, isa: str) -> None:
    x = from_bits(torch.tensor(patterns), torch.float32)
    before = torch_slmops.isa()
    torch_slmops.set_isa(isa)
    try:
        actual = activation(x, name)
    finally:
        torch_slmops.set_isa(before)
    assert_same_bits(actual, reference.activate(name, x))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dense_sweep(name: str, isa: str) -> None:
    """Where the functions change, with all exponents of small and large arguments around."""
    x = torch.cat((torch.linspace(-110, 95, 400001), torch.linspace(-6, 6, 400001)))
    patterns = torch.randint(0, 1 << 32, (200000,))
    x = torch.cat((x, from_bits(patterns, torch.float32)))
    assert_same_bits(activation(x, name), reference.activate(name, x))


def _sigmoid(x: Tensor) -> Tensor:
    """In float64, without cancellation."""
    return torch.where(x < 0, x.exp() / (1 + x.exp()), 1 / (1 + (-x).exp()))


def _gelu_tanh(x: Tensor) -> Tensor:
    return x * _sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "gelu_tanh": _gelu_tanh,
    "gelu": lambda x: x / 2 * torch.erfc(-x / math.sqrt(2)),
    "tanh": torch.tanh,
}
# docs/arithmetic.md has these numbers: (function, from, to, units in the last place)
ERRORS = [
    ("exp", -87.3, 88.7, 1.1),
    ("sigmoid", -87.3, 200.0, 2.5),
    ("silu", -87.3, 200.0, 3.3),
    ("gelu", -13.0, 200.0, 7.0),
    ("tanh", -200.0, 200.0, 2.5),
    ("gelu_tanh", -1.0, 200.0, 4.0),
    ("gelu_tanh", -3.0, -1.0, 15.0),
    ("gelu_tanh", -5.0, -3.0, 36.0),
    ("gelu_tanh", -10.0, -5.0, 220.0),
]


def ulp(exact: Tensor) -> Tensor:
    """The distance of float32 values around float64 ones."""
    _, exponent = torch.frexp(exact.abs())
    return torch.ldexp(torch.ones_like(exact), (exponent - 24).clamp_min(-149))


@pytest.mark.parametrize(("name", "low", "high", "limit"), ERRORS, ids=str)
def test_error_against_float64(name: str, low: float, high: float, limit: float) -> None:
    small = torch.randn(1 << 18) * 2.0 ** torch.randint(-120, 0, (1 << 18,))
    x = torch.cat((torch.linspace(low, high, 1 << 20), torch.linspace(-13, 13, 1 << 20), small))
    x = x[(x >= low) & (x <= high)]
    exact = EXACT[name](x.double())
    error = (activation(x, name).double() - exact).abs() / ulp(exact)
    worst = int(error.argmax())
    assert error[worst] <= limit, f"{float(error[worst])} ulp at x = {float(x[worst])!r}"
    assert error[worst] >= limit / 2, "the documented error is far above what is there"


@pytest.mark.parametrize("name", [name for name in EXACT if name != "tanh"])
def test_error_of_tiny_results(name: str) -> None:
    """Where results are denormal or nearly: absolute error below 2^-125."""
    x = torch.linspace(-110, -5, 1 << 20)
    exact = EXACT[name](x.double())
    tiny = exact.abs() < 2.0**-118
    assert tiny.any()
    error = (activation(x, name).double() - exact).abs()[tiny]
    assert error.max() <= 2.0**-125


def test_exp_of_denormal_results() -> None:
    x = torch.linspace(-103.9, -87.4, 1 << 18)
    y = activation(x, "exp")
    assert ((y > 0) & (y < 2.0**-126)).all(), "flushed"
    assert (y.double() - x.double().exp()).abs().max() <= 2.0**-149


INF, NAN = math.inf, math.nan
SPECIAL = {
    #          inf  -inf  nan  0    -0    huge     -huge
    "exp": (INF, 0.0, NAN, 1.0, 1.0, INF, 0.0),
    "sigmoid": (1.0, 0.0, NAN, 0.5, 0.5, 1.0, 0.0),
    "silu": (INF, 0.0, NAN, 0.0, -0.0, 3e38, 0.0),
    "gelu_tanh": (INF, 0.0, NAN, 0.0, -0.0, 3e38, 0.0),
    "gelu": (INF, 0.0, NAN, 0.0, -0.0, 3e38, 0.0),
    "relu2": (INF, 0.0, NAN, 0.0, 0.0, INF, 0.0),
    "tanh": (1.0, -1.0, NAN, 0.0, -0.0, 1.0, -1.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_special_values(name: str, isa: str) -> None:
    x = torch.tensor([INF, -INF, NAN, 0.0, -0.0, 3e38, -3e38])
    expected = reference.canonical_nan(torch.tensor(SPECIAL[name]))
    assert_same_bits(activation(x, name), expected)


@pytest.mark.parametrize("name", ["silu", "gelu_tanh", "gelu"])
def test_difference_of_both_signs_is_x(name: str) -> None:
    """f(x) - f(-x) = x: the rounding of two results of at most |x|."""
    x = torch.randn(1 << 16) * 4
    error = activation(x, name).double() - activation(-x, name).double() - x.double()
    assert (error.abs() <= 2 * x.abs() * 2.0**-24).all()


def test_sizes_and_threads(isa: str, threads: None) -> None:
    x = torch.randn(70000)
    whole = reference.activate("silu", x)
    for size in (0, 1, 15, 16, 17, 33, 70000):
        for count in (1, 3):
            torch.set_num_threads(count)
            assert_same_bits(activation(x[:size], "silu"), whole[:size])


def test_names_that_are_no_activations() -> None:
    with pytest.raises(RuntimeError, match=r'"gelu_tanh".*got "swish"'):
        activation(torch.ones(3), "swish")
    with pytest.raises(ValueError, match=r"gelu_tanh.*got 'swish'"):
        reference.activate("swish", torch.ones(3))
    with pytest.raises(RuntimeError, match="float32"):
        activation(torch.ones(3, dtype=torch.float16), "silu")
