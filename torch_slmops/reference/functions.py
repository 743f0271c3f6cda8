"""exp, sigmoid and the activations in plain torch, operation by operation as in csrc/simd/math.h.

docs/arithmetic.md, section "Functions", has the formulas and the errors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_slmops.reference.arithmetic import canonical_nan, fma32

__all__ = ["activate", "exp", "gelu_erf", "gelu_tanh", "relu2", "sigmoid", "silu", "tanh"]

_LOG2E = float.fromhex("0x1.715476p+0")
_LN2_HIGH = float.fromhex("0x1.62e430p-1")
_LN2_LOW = float.fromhex("-0x1.05c610p-29")
# (e^r - 1 - r) / r^2 on |r| <= ln(2) / 2, coefficients of r^0, r^1, ...
_EXP = [
    float.fromhex(text)
    for text in (
        "0x1.fffffcp-2",
        "0x1.555492p-3",
        "0x1.5558f2p-5",
        "0x1.123a20p-7",
        "0x1.6a23cep-10",
    )
]
# Phi(-a) * e^(a^2 / 2) / t, t = 1 / (1 + 0.3125 a), on 0 <= a <= 14.6, the same way
_TAIL = [
    float.fromhex(text)
    for text in (
        "0x1.fea13cp-4",
        "0x1.fef7b6p-4",
        "0x1.ca5b68p-4",
        "0x1.709db0p-4",
        "0x1.c9517ep-5",
        "-0x1.948124p-9",
        "0x1.33110ap-4",
        "-0x1.367f4ap-3",
        "0x1.7770aep-4",
        "-0x1.38679cp-6",
    )
]
_TAIL_SLOPE = 0.3125
_TANH_LINEAR = float.fromhex("0x1.988454p+0")  # 2 sqrt(2 / pi)
_TANH_CUBIC = float.fromhex("0x1.2444f2p-4")  # that times 0.044715

_EXP_LEAST, _EXP_LARGEST = -104.0, 89.0  # beyond: 0 and infinity
_SILU_END, _GELU_TANH_END, _GELU_ERF_END, _TANH_END = 104.0, 10.8, 14.6, 10.0


def exp(x: Tensor) -> Tensor:
    """e^x of float32 `x`."""
    inside = x.clamp(_EXP_LEAST, _EXP_LARGEST).nan_to_num(0.0)
    return canonical_nan(torch.where(x.isnan(), x, _exp_inside(inside)))


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x) of float32 `x`."""
    e = _exp_inside(-_magnitude(x, _SILU_END))
    y = torch.where(x < 0, e, torch.ones_like(e)) / (1.0 + e)
    return canonical_nan(torch.where(x.isnan(), x, y))


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x) of float32 `x`."""
    a = _magnitude(x, _SILU_END)
    return _less_tail(x, a, _sigmoid_tail(a))


def gelu_tanh(x: Tensor) -> Tensor:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) of float32 `x`."""
    a = _magnitude(x, _GELU_TANH_END)
    cubic = fma32(a * a, _of(_TANH_CUBIC), _of(_TANH_LINEAR))
    return _less_tail(x, a, _sigmoid_tail(a * cubic))


def gelu_erf(x: Tensor) -> Tensor:
    """x / 2 * (1 + erf(x / sqrt(2))) of float32 `x`."""
    a = _magnitude(x, _GELU_ERF_END)
    t = torch.ones_like(a) / fma32(a, _of(_TAIL_SLOPE), _of(1.0))
    square = a * a
    lost = fma32(a, a, -square)
    e = _exp_inside(square * -0.5)
    e = fma32(e * -0.5, lost, e)
    return _less_tail(x, a, e * (t * _polynomial(_TAIL, t)))


def tanh(x: Tensor) -> Tensor:
    """tanh(x) of float32 `x`, by t / (t + 2) with t = e^2|x| - 1."""
    a = _magnitude(x, _TANH_END)
    n, rest = _reduce(a + a)
    power = torch.exp2(n.double()).float()
    t = fma32(power, rest, power - 1.0)
    return canonical_nan(torch.where(x.isnan(), x, torch.copysign(t / (t + 2.0), x)))


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 of float32 `x`, NaN for NaN."""
    y = _positive(x)
    return canonical_nan(y * y)


def activate(name: str, x: Tensor) -> Tensor:
    """The function `name` of float32 x.

    Args:
        name: "silu", "gelu_tanh", "gelu" or "relu2", as ops take them; "sigmoid", "exp" or
            "tanh".
        x: float32.

    Raises:
        ValueError: Another name.
    """
    if name not in _FUNCTIONS:
        raise ValueError(f"activate: expected one of {', '.join(_FUNCTIONS)}, got {name!r}")
    return _FUNCTIONS[name](x)


def _of(value: float) -> Tensor:
    return torch.tensor(value)


def _polynomial(coefficients: list[float], x: Tensor) -> Tensor:
    """Horner's scheme with fma."""
    y = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        y = fma32(y, x, _of(c))
    return y


def _reduce(x: Tensor) -> tuple[Tensor, Tensor]:
    """n and rest of e^x = 2^n (1 + rest)."""
    n = torch.round(x * _LOG2E)
    r = fma32(-n, _of(_LN2_HIGH), x)
    r = fma32(-n, _of(_LN2_LOW), r)
    return n, fma32(r * r, _polynomial(_EXP, r), r)


def _exp_inside(x: Tensor) -> Tensor:
    """e^x for -170 <= x <= 89; what is less than 2^-126 is rounded a second time, to a denormal."""
    n, rest = _reduce(x)
    e = rest + 1.0
    # Two factors, as 2^n itself leaves float32 at both ends.
    half = torch.floor(n / 2)
    return e * torch.exp2(half.double()).float() * torch.exp2((n - half).double()).float()


def _magnitude(x: Tensor, end: float) -> Tensor:
    """min(|x|, end), and `end` for NaN."""
    a = x.abs()
    return torch.where(a < end, a, _of(end))


def _positive(x: Tensor) -> Tensor:
    return torch.where(x < 0, torch.zeros_like(x), x)


def _sigmoid_tail(a: Tensor) -> Tensor:
    """sigmoid(-a) for a >= 0."""
    e = _exp_inside(-a)
    return e / (1.0 + e)


def _less_tail(x: Tensor, a: Tensor, tail: Tensor) -> Tensor:
    """max(x, 0) - a * tail: x * F(x) for F(x) + F(-x) = 1, tail = F(-a) and a = |x|."""
    return canonical_nan(fma32(-a, tail, _positive(x)))


_FUNCTIONS = {
    "silu": silu,
    "gelu_tanh": gelu_tanh,
    "gelu": gelu_erf,
    "relu2": relu2,
    "sigmoid": sigmoid,
    "exp": exp,
    "tanh": tanh,
}
