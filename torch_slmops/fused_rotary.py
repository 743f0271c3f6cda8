"""Rotary tables of our own in the place of a model's: float32, the same bits on every CPU.

transformers computes its tables with torch's cos and sin, which differ between CPUs, and rounds
them to the dtype of the activations.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops import ops
from torch_slmops.fused import Fused
from torch_slmops.rotary_tables import scaled_frequencies

__all__ = ["FusedRotary", "RotarySpec", "match_rotary"]

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
        return ops.rotary_table(position_ids, table.inv_freq, table.scaling)


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
        if not isinstance(theirs, Tensor):
            return "not a rotary module of a known structure"
        if theirs.device.type == "meta":
            return "they have no values yet"
        options = (
            config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
        )
        try:
            table = _Table(*scaled_frequencies(kind, options, config, 2 * theirs.numel()))
        except (KeyError, TypeError, ArithmeticError) as error:
            return f"its config lacks what rope type {kind!r} needs ({error})"
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
        ours = ops.rotary_table(positions, table.inv_freq, table.scaling)
    return all(
        a.shape == b.shape and bool(((a - b).abs() <= _SOME_POSITIONS * tolerance).all())
        for a, b in zip(original, ours, strict=True)
    )
