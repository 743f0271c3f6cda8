"""The pieces of a model that each get one format, and what their modules compute in one."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops.calibrate import Batch, Unit, calibrate
from torch_slmops.formats import CANDIDATES, Format
from torch_slmops.fuse import Block, build, put
from torch_slmops.modules import Embedding, Linear, PackedModule
from torch_slmops.progress import progress_bar
from torch_slmops.survey import Site
from torch_slmops.trial import Forwards
from torch_slmops.weights import QuantizedWeight

__all__ = ["Made", "Maker", "Piece", "pieces_of"]


@dataclass(frozen=True, eq=False)
class Piece:
    """What gets one format.

    Attributes:
        name: Of its first module.
        layers: Linear layers or an embedding, whose rows go into one weight; or experts.
        twins: Others that have the same weight as the only layer.
        experts: The block, for experts with 3-D weights.
    """

    name: str
    layers: tuple[nn.Module, ...]
    twins: tuple[nn.Module, ...] = ()
    experts: Block | None = None

    @property
    def first(self) -> nn.Module:
        return self.layers[0]

    def weights(self) -> list[Tensor]:
        """Its parameters with two or more dimensions."""
        found = [p for layer in self.layers for p in layer._parameters.values() if p is not None]
        return [p.detach() for p in found if p.dim() >= 2]


def pieces_of(groups: Sequence[Sequence[Site]], blocks: Sequence[Block]) -> list[Piece]:
    """The pieces of a model: layers that share a weight, and blocks with weights of their own."""
    pieces = [
        Piece(first.name, (first.module,), tuple(site.module for site in twins))
        for first, *twins in groups
    ]
    for block in blocks:
        if block.sites:
            layers = tuple(site.module for site in block.sites)
            pieces.append(Piece(block.sites[0].name, layers))
        elif any(p is not None and p.dim() >= 3 for p in block.module._parameters.values()):
            pieces.append(Piece(block.name, (block.module,), experts=block))
    return pieces


@dataclass
class Made:
    """A piece in some format: what its modules compute, the bytes, the format in words."""

    forwards: Forwards
    bytes: int
    name: str


@dataclass
class Maker:
    """Packs pieces, with calibrated codes where there are any."""

    packed: dict[tuple[nn.Module, object], Tensor] = field(default_factory=dict)
    _last: tuple[object, QuantizedWeight | None] = (None, None)

    def calibrate(
        self, model: nn.Module, pieces: list[Piece], batches: list[Batch], progress: bool
    ) -> None:
        """Chooses the codes of every piece in every kind of codes, in one pass over the batches."""
        kinds = {candidate.format.codes: candidate.format for candidate in CANDIDATES}
        units = [
            Unit(
                piece.name,
                piece.layers,
                piece.twins,
                how.quantize,
                partial(self._store, piece.first, codes),
            )
            for piece in pieces
            if piece.experts is None
            for codes, how in kinds.items()
        ]
        units = [unit for unit in units if unit.watched()]
        with progress_bar(sum(unit.size for unit in units), progress, "calibrating") as advance:
            calibrate(model, units, batches, advance)

    def _store(self, first: nn.Module, codes: object, quantized: QuantizedWeight) -> Tensor:
        packed = self.packed[first, codes] = quantized.pack(32 if quantized.bits == 8 else None)
        return packed

    def make(self, piece: Piece, how: Format) -> Made:
        if piece.experts is not None:
            return _make_experts(piece.experts, how)
        quantized = self._quantized(piece, how)
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        size, start, name = 0, 0, ""
        for layer in piece.layers:
            weight = layer._parameters["weight"]
            assert weight is not None
            stop = start + weight.shape[0]
            packed = how.pack(_rows(quantized, start, stop))
            for module in (layer, *piece.twins):
                made = _module(module, packed, weight.dtype)
                forwards[module] = made.forward
                name = made.format()
            size += packed.numel()
            start = stop
        return Made(forwards, size, name)

    def _quantized(self, piece: Piece, how: Format) -> QuantizedWeight:
        """All rows of the piece. Candidates with the same codes come one after the other."""
        key = (piece, how.codes)
        if self._last[0] != key or self._last[1] is None:
            found = self.packed.get((piece.first, how.codes))
            if found is not None:
                self._last = key, QuantizedWeight.unpack(found)
            else:
                weights = piece.weights()
                self._last = key, how.quantize(torch.cat(weights) if weights[1:] else weights[0])
        quantized = self._last[1]
        assert quantized is not None
        return quantized


def _rows(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    zero, sub = weight.zero_point, weight.sub_scale
    return dataclasses.replace(
        weight,
        codes=weight.codes[start:stop],
        scale=weight.scale[start:stop],
        zero_point=None if zero is None else zero[start:stop],
        sub_scale=None if sub is None else sub[start:stop],
        shape=(stop - start, weight.shape[1]),
    )


def _module(module: nn.Module, packed: Tensor, dtype: torch.dtype) -> PackedModule:
    if isinstance(module, nn.Embedding):
        return Embedding.from_packed(packed, module.padding_idx, dtype)
    return Linear.from_packed(packed, module._parameters["bias"], dtype)


def _make_experts(block: Block, how: Format) -> Made:
    """Fuses a copy of the module that shares all it has."""
    clone = copy.copy(block.module)
    vars(clone)["_modules"] = dict(block.module._modules)
    vars(clone)["_parameters"] = dict(block.module._parameters)
    put([build(dataclasses.replace(block, module=clone), how.quantize, how.pack)])
    packed = [module for module in clone.modules() if isinstance(module, PackedModule)]
    size = sum(module.packed.numel() for module in packed)
    return Made({block.module: clone.__call__}, size, packed[0].format())
