"""How a weight is quantized and packed, and the formats that a budget is spent on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torch_slmops.weights import QuantizedWeight, quantize_weight

__all__ = ["CANDIDATES", "Candidate", "Format"]


@dataclass(frozen=True)
class Format:
    """How weights are quantized and packed: arguments of `quantize_weight` and `pack`."""

    bits: int
    scale_kind: str
    group_size: int
    symmetric: bool
    act_group: int | None
    activations: str

    def quantize(self, weight: Tensor, importance: Tensor | None = None) -> QuantizedWeight:
        return quantize_weight(
            weight,
            self.bits,
            self.scale_kind,
            self.group_size,
            self.symmetric,
            "mse",
            importance,
        )

    def pack(self, quantized: QuantizedWeight) -> Tensor:
        return quantized.pack(self.act_group, self.activations)

    @property
    def codes(self) -> tuple[int, str, int, bool]:
        """What the codes depend on: formats that agree in it differ in activations alone."""
        return self.bits, self.scale_kind, self.group_size, self.symmetric


@dataclass(frozen=True)
class Candidate:
    """A format that a budget may be spent on.

    Attributes:
        name: As it is kept in a file of measurements.
        format: The format.
        price: What one of its bytes counts: more than 1 where it is slower than its bytes say.
    """

    name: str
    format: Format
    price: float = 1.0


# Float activations cost most for many tokens at a time, activations per 32 a little there. What is
# not here never wins: groups of 64 (sub16 is better at the same bytes), zero points (some layers in
# int8 are better).
CANDIDATES = (
    Candidate("int4 group 128", Format(4, "group", 128, True, None, "int8")),
    Candidate("int4 sub16", Format(4, "sub16", 16, True, None, "int8")),
    Candidate("int4 sub16, activations per 32", Format(4, "sub16", 16, True, 32, "int8"), 1.01),
    Candidate("int4 sub16, float activations", Format(4, "sub16", 16, True, None, "float"), 1.1),
    Candidate("int8 per output", Format(8, "group", -1, True, None, "int8")),
    Candidate("int8 group 32", Format(8, "group", 32, True, None, "int8")),
    Candidate("int8 group 32, float activations", Format(8, "group", 32, True, None, "float"), 1.1),
)
