"""Inverse frequencies of rotary tables of our own, from a transformers-style config.

A frequency is computed with 40 decimal digits and rounded once to float64, because `pow` and `log`
differ between C libraries; `ops.rotary_table` keeps the rest the same on every CPU. transformers
works in float32: its tables differ from these by the rounding of its angles.

The scalings are those of transformers' `ROPE_INIT_FUNCTIONS`: linear (position interpolation, Chen
et al. 2023), llama3 (the Llama 3.1 release), yarn (Peng et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, localcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["scaled_frequencies"]

_Parameters = Mapping[str, Any]

_CONTEXT = Context(prec=40)
_TWO_PI = Decimal("6.283185307179586476925286766559005768394")


def scaled_frequencies(
    kind: str, parameters: Mapping[str, Any], config: Any, width: int
) -> tuple[Tensor, float]:
    """Returns the angles per position, and the factor of cos and sin.

    Args:
        kind: The rotary type.
        parameters: Its `rope_parameters`: "rope_theta" and what the type needs.
        config: A transformers config, or what has its attributes; read for
            `max_position_embeddings` where `parameters` lack a length or a factor.
        width: R, how many elements of a head are rotated.

    Returns:
        inv_freq, float64 [R / 2] in radians, and the scaling.

    Raises:
        ValueError: A rotary type other than "default", "linear", "llama3" and "yarn".
    """
    if kind not in _SCALINGS:
        raise ValueError(
            f"rotary tables: expected a rope_type of {', '.join(_SCALINGS)}, got {kind!r}; its "
            "tables have to come from transformers"
        )
    with localcontext(_CONTEXT):
        theta = Decimal(parameters["rope_theta"])
        plain = [theta ** (Decimal(-i) / width) for i in range(0, width, 2)]
        scaled, scaling = _SCALINGS[kind](plain, parameters, config)
        return torch.tensor([float(f) for f in scaled], dtype=torch.float64), float(scaling)


_Scaled = tuple[list[Decimal], Decimal]


def _default(plain: list[Decimal], parameters: _Parameters, config: Any) -> _Scaled:
    return plain, Decimal(1)


def _linear(plain: list[Decimal], parameters: _Parameters, config: Any) -> _Scaled:
    factor = Decimal(parameters["factor"])
    return [f / factor for f in plain], Decimal(1)


def _llama3(plain: list[Decimal], parameters: _Parameters, config: Any) -> _Scaled:
    """Long waves are stretched by the factor, short ones kept, those between interpolated."""
    factor = Decimal(parameters["factor"])
    low = Decimal(parameters["low_freq_factor"])
    high = Decimal(parameters["high_freq_factor"])
    length = _trained_length(parameters, config)

    def scaled(f: Decimal) -> Decimal:
        waves = length * f / _TWO_PI  # in the length that was trained
        if waves > high:
            return f
        if waves < low:
            return f / factor
        smooth = (waves - low) / (high - low)
        return (1 - smooth) * f / factor + smooth * f

    return [scaled(f) for f in plain], Decimal(1)


def _yarn(plain: list[Decimal], parameters: _Parameters, config: Any) -> _Scaled:
    """A ramp over the pairs from kept to stretched frequencies, and a factor for attention."""
    width, theta = 2 * len(plain), Decimal(parameters["rope_theta"])
    length = _trained_length(parameters, config)
    given = parameters.get("factor")
    factor = Decimal(config.max_position_embeddings) / length if given is None else Decimal(given)

    def pair_of(rotations: float) -> Decimal:
        """The pair that turns so often in the trained length."""
        return width * (length / (Decimal(rotations) * _TWO_PI)).ln() / (2 * theta.ln())

    low = pair_of(parameters.get("beta_fast") or 32)
    high = pair_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low = low.to_integral_value(ROUND_FLOOR)
        high = high.to_integral_value(ROUND_CEILING)
    low, high = max(low, Decimal(0)), min(high, Decimal(width - 1))
    if low == high:
        high += Decimal("0.001")

    def scaled(i: int, f: Decimal) -> Decimal:
        stretched = min(max((i - low) / (high - low), Decimal(0)), Decimal(1))
        return f / factor * stretched + f * (1 - stretched)

    return [scaled(i, f) for i, f in enumerate(plain)], _yarn_scaling(parameters, factor)


def _yarn_scaling(parameters: _Parameters, factor: Decimal) -> Decimal:
    given = parameters.get("attention_factor")
    if given is not None:
        return Decimal(given)

    def scale(by: float) -> Decimal:
        if factor <= 1:
            return Decimal(1)
        return Decimal(by) * factor.ln() / 10 + 1

    mscale, all_dims = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return scale(mscale) / scale(all_dims) if mscale and all_dims else scale(1)


def _trained_length(parameters: _Parameters, config: Any) -> Decimal:
    name = "original_max_position_embeddings"
    given = parameters.get(name) or getattr(config, name, None)
    return Decimal(given or config.max_position_embeddings)


_SCALINGS: dict[str, Callable[[list[Decimal], _Parameters, Any], _Scaled]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
