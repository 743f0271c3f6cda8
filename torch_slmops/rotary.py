"""Rotary tables of our own in the place of a model's: float32, the same bits on every CPU.

transformers computes its tables with torch's cos and sin, which differ between CPUs, and rounds
them to the dtype of the activations.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops.fused import Fused

__all__ = ["FusedRotary", "RotarySpec", "match_rotary", "rotary_table"]

_KNOWN = ("default", "linear", "llama3", "yarn")
# The frequencies of a model may have been rounded to float32, or by .to(bfloat16) to that.
_FLOAT32, _BFLOAT16 = 1e-4, 2.0**-7
_SOME_POSITIONS = 4


@dataclass(frozen=True, eq=False)
class _Table:
    """Frequencies, float64 [R / 2], and the factor of cos and sin."""

    inv_freq: Tensor
    scaling: float


@dataclass(frozen=True, eq=False)
class RotarySpec:
    """The tables of a rotary module per type of layer; the key None where there are no types."""

    tables: Mapping[str | None, _Table]


class FusedRotary(Fused):
    """A model's rotary module that gives tables of ours: cos, sin, float32 [B, L, R]."""

    slmops: RotarySpec

    def describe(self) -> str:
        return "tables in float32"

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        table = self.slmops.tables[layer_type]
        return rotary_table(position_ids, table.inv_freq, table.scaling)


def rotary_table(positions: Tensor, inv_freq: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Returns cos and sin, float32 [B, L, R], of the angles of positions, [B, L].

    Args:
        positions: int64.
        inv_freq: float64 [R / 2]; elements i and i + R / 2 have the angle position * inv_freq[i].
        scaling: A factor of cos and sin.
    """
    angles = positions[..., None].double() * inv_freq
    angles = torch.cat([angles, angles], -1)
    return (angles.cos() * scaling).float(), (angles.sin() * scaling).float()


def match_rotary(module: nn.Module) -> RotarySpec | str:
    """Returns the tables of a transformers rotary module, or why they stay transformers' own."""
    known: Any = module
    kinds = getattr(module, "rope_type", None)
    config = getattr(module, "config", None)
    if config is None or not isinstance(kinds, str | dict) or "forward" in vars(module):
        return "not a rotary module of a known structure"
    parameters = list(inspect.signature(known.forward).parameters)
    expected = ["x", "position_ids", "layer_type"]
    if parameters != expected and (isinstance(kinds, dict) or parameters != expected[:2]):
        return "its forward takes arguments that are not known"
    tables: dict[str | None, _Table] = {}
    for layer_type, kind in kinds.items() if isinstance(kinds, dict) else [(None, kinds)]:
        prefix = "" if layer_type is None else f"{layer_type}_"
        if kind not in _KNOWN:
            return f"rope type {kind!r} has transformers' tables"
        theirs = getattr(module, f"{prefix}inv_freq", None)
        scaling = getattr(module, f"{prefix}attention_scaling", None)
        if not isinstance(theirs, Tensor) or not isinstance(scaling, int | float):
            return "not a rotary module of a known structure"
        options = (
            config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
        )
        try:
            inv_freq = _frequencies(kind, options, config, 2 * theirs.numel())
        except (KeyError, TypeError, ZeroDivisionError) as error:
            return f"its config lacks what rope type {kind!r} needs ({error})"
        table = _Table(inv_freq, float(scaling))
        if not _agree(known, table, theirs, layer_type):
            return f"its tables are not those of rope type {kind!r}"
        tables[layer_type] = table
    return RotarySpec(tables)


def _agree(module: Any, table: _Table, theirs: Tensor, layer_type: str | None) -> bool:
    """Whether frequencies and tables of a few positions are nearly those of the module."""
    tolerance = _FLOAT32 if theirs.dtype == torch.float32 else _BFLOAT16
    close = (theirs.double() - table.inv_freq).abs() <= tolerance * table.inv_freq
    if theirs.dim() != 1 or not bool(close.all()):
        return False
    positions = torch.arange(_SOME_POSITIONS)[None]
    kwargs = {} if layer_type is None else {"layer_type": layer_type}
    with torch.no_grad():
        original = module(torch.zeros(1), positions, **kwargs)
        ours = rotary_table(positions, table.inv_freq, table.scaling)
    return all(
        a.shape == b.shape and bool(((a - b).abs() <= _SOME_POSITIONS * tolerance).all())
        for a, b in zip(original, ours, strict=True)
    )


def _frequencies(kind: str, options: Mapping[str, Any], config: Any, width: int) -> Tensor:
    """The inverse frequencies, float64 [width / 2], of a rope type.

    "llama3" slows long waves down by `factor` (Llama 3.1); "yarn" interpolates between slowed and
    plain frequencies by a ramp over the dimensions (Peng et al., "YaRN", 2023, equations 18-23).
    """
    base = float(options["rope_theta"])
    plain = [base ** (-2 * i / width) for i in range(width // 2)]
    if kind == "default":
        return torch.tensor(plain, dtype=torch.float64)
    factor = options["factor"]
    if kind == "linear":
        return torch.tensor([f / factor for f in plain], dtype=torch.float64)
    context = options["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = options["low_freq_factor"], options["high_freq_factor"]
        found = [_llama3(f, factor, context * f / (2 * math.pi), low, high) for f in plain]
        return torch.tensor(found, dtype=torch.float64)
    if factor is None:
        factor = config.max_position_embeddings / context

    def dimension(turns: float) -> float:
        """Where a wave makes this number of turns within the original context."""
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    first = dimension(options.get("beta_fast") or 32)
    last = dimension(options.get("beta_slow") or 1)
    if config.rope_parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    span = last - first if last != first else 1e-3
    slowed = [min(max((i - first) / span, 0), 1) for i in range(width // 2)]
    found = [f / factor * share + f * (1 - share) for f, share in zip(plain, slowed, strict=True)]
    return torch.tensor(found, dtype=torch.float64)


def _llama3(f: float, factor: float, turns: float, low: float, high: float) -> float:
    """The frequency of a wave that makes `turns` turns within the original context."""
    if turns < low:
        return f / factor
    if turns > high:
        return f
    share = (turns - low) / (high - low)
    return (1 - share) * f / factor + share * f
