"""Weights that another tool quantized, on their way into a model's packed modules.

A layer whose weight is still in another format is an `nn.Linear` (or `nn.Embedding`) with a weight
on the meta device, which has a shape and no memory, and a `Source`, which reads the codes.
`optimize` takes such a layer as any other; it reads the codes when it packs them, one weight at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops.weights import QuantizedWeight

__all__ = [
    "Imported",
    "Parts",
    "Source",
    "apart",
    "attach",
    "is_foreign",
    "order_of",
    "read",
    "source_of",
]

_ATTRIBUTE = "slmops_source"
_MIDDLE = {4: 8, 8: 128}
_CHUNK = 1 << 22  # weights compared at a time


@dataclass(frozen=True, eq=False)
class Parts:
    """Codes and scales of a weight [N, K] as a format defines them; G = ceil(K / group_size).

    `w[n,k] = scale[n,g] * (codes[n,k] - zero_point[n,g])`, a missing zero point being 8 (4 bits) or
    128 (8 bits), or `w[n,k] = scale[n,g] * codes[n,k] + minimum[n,g]`; all in float32.

    Attributes:
        codes: uint8 [N, K], 0..15 or 0..255.
        scale: [N, G], any floating dtype.
        zero_point: [N, G], integer or floating, or None.
        minimum: [N, G], floating, or None; not beside a zero point.
        bits: 4 or 8.
        group_size: Inputs that share a scale; -1 for all.
        reference: Gives rows [start, stop) of the weight that the format means, float32, where that
            is not what the formulas above give.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group_size: int
    minimum: Tensor | None = None
    reference: Callable[[int, int], Tensor] | None = None

    def meant(self, start: int, stop: int) -> Tensor:
        """Returns rows [start, stop) of the weight that the format means, float32."""
        if self.reference is not None:
            return self.reference(start, stop)
        k = self.codes.shape[1]
        group = k if self.group_size == -1 else self.group_size

        def spread(x: Tensor) -> Tensor:
            return x[start:stop].float().repeat_interleave(group, 1)[:, :k]

        codes, scale = self.codes[start:stop].float(), spread(self.scale)
        if self.minimum is not None:
            return codes * scale + spread(self.minimum)
        if self.zero_point is None:
            return (codes - _MIDDLE[self.bits]) * scale
        return (codes - spread(self.zero_point)) * scale

    def quantized(self) -> tuple[QuantizedWeight, float]:
        """Returns the weight as a packed buffer can hold it, and what that loses.

        The loss is the root of the mean squared error over the root of the mean square: 0.0 where
        every value is what the format means.
        """
        weight = QuantizedWeight.from_parts(
            self.codes,
            self.scale,
            self.zero_point if self.minimum is None else self.minimum,
            bits=self.bits,
            group_size=self.group_size,
            round_scales=True,
            offset=self.minimum is not None,
        )
        return weight, self._loss(weight)

    def _loss(self, weight: QuantizedWeight) -> float:
        error = total = 0.0
        n, k = weight.shape
        rows = max(1, _CHUNK // k)
        for start in range(0, n, rows):
            stop = min(start + rows, n)
            meant = self.meant(start, stop).double()
            error += float((_rows(weight, start, stop).dequantize() - meant).square().sum())
            total += float(meant.square().sum())
        return (error / total) ** 0.5 if error else 0.0

    def as_8_bits(self) -> Parts:
        """Returns the same weight with codes of 8 bits."""
        if self.bits == 8:
            return self
        shift = 120 if self.zero_point is None and self.minimum is None else 0
        return replace(self, codes=self.codes + shift, bits=8)

    def per_group(self, group_size: int) -> Parts:
        """Returns the same weight with a scale per `group_size` inputs, a divisor of its group."""
        k = self.codes.shape[1]
        groups = -(-k // group_size)
        times = groups if self.group_size == -1 else self.group_size // group_size

        def spread(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.repeat_interleave(times, 1)[:, :groups]

        scale = spread(self.scale)
        assert scale is not None
        zero, minimum = spread(self.zero_point), spread(self.minimum)
        return replace(self, scale=scale, zero_point=zero, minimum=minimum, group_size=group_size)


def _rows(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Some rows of a weight of kind "group"."""
    zero = weight.zero_point
    return replace(
        weight,
        codes=weight.codes[start:stop],
        scale=weight.scale[start:stop],
        zero_point=None if zero is None else zero[start:stop],
        shape=(stop - start, weight.shape[1]),
    )


@dataclass(frozen=True, eq=False)
class Source:
    """A weight [N, K] in another format: what it is, and how it is read.

    Attributes:
        origin: The format in a few words, such as "GGUF Q4_0".
        where: The file and the tensor, or the parameter, for errors.
        read: Reads it; raises a ValueError that names the file and the tensor if it cannot.
        perm: The input that each column of its codes belongs to, int64 [K], or None for 0..K-1.
    """

    origin: str
    where: str
    read: Callable[[], Parts]
    perm: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Imported:
    """A weight that was read: its quantized form, its order of inputs, and where it came from."""

    weight: QuantizedWeight
    perm: Tensor | None
    origin: str
    loss: float


def attach(module: nn.Module, source: Source, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Gives `module` a weight of `shape` and `dtype` without memory, that `source` reads."""
    weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
    setattr(weight, _ATTRIBUTE, source)
    module._parameters["weight"] = weight


def source_of(weight: Any) -> Source | None:
    """Returns the source of a parameter that `attach` made, or None."""
    source: Source | None = getattr(weight, _ATTRIBUTE, None)
    return source


def is_foreign(module: nn.Module) -> bool:
    """Whether the weight of `module` has to be read from another format."""
    return source_of(module._parameters.get("weight")) is not None


def order_of(module: nn.Module | None) -> Tensor | None:
    """Returns the order in which the weight of `module`, packed or not, takes inputs, or None."""
    if module is None:
        return None
    perm = module._buffers.get("perm")
    source = source_of(module._parameters.get("weight"))
    return source.perm if perm is None and source is not None else perm


def apart(modules: Sequence[nn.Module]) -> str | None:
    """Returns why the weights of these modules cannot be one packed weight, or None."""
    sources = [source_of(module._parameters.get("weight")) for module in modules]
    if all(source is None for source in sources):
        return None
    if None in sources:
        return "some of its projections are quantized already and others are not"
    first, *others = [source.perm for source in sources if source is not None]
    for perm in others:
        if (first is None) != (perm is None) or (
            first is not None and perm is not None and not torch.equal(first, perm)
        ):
            return "its projections take their inputs in different orders (act-order)"
    return None


def read(modules: Sequence[nn.Module]) -> Imported | None:
    """Reads the weights of modules, stacked; None if they are not in another format.

    Weights of different formats are brought to the one that holds all of them, without a loss: the
    longer codes, the shorter groups.

    Raises:
        ValueError: A weight cannot be read.
    """
    sources = [source_of(module._parameters.get("weight")) for module in modules]
    known = [source for source in sources if source is not None]
    if len(known) < len(modules) or not modules:
        return None
    weight, loss = _stack([_checked(source) for source in known]).quantized()
    origin = "from " + " + ".join(dict.fromkeys(source.origin for source in known))
    if loss:
        origin += f", relative error {loss:.1e}"
    return Imported(weight, known[0].perm, origin, loss)


def _checked(source: Source) -> Parts:
    """What a source reads, if its scales can be those of a weight."""
    parts = source.read()
    for name in ("scale", "zero_point", "minimum"):
        values: Tensor | None = getattr(parts, name)
        if values is not None and not bool(values.isfinite().all()):
            raise ValueError(f"{source.where}: expected finite {name}s, got an infinity or a NaN")
    return parts


def _stack(parts: Sequence[Parts]) -> Parts:
    if len(parts) == 1:
        return parts[0]
    if len({part.bits for part in parts}) > 1:
        parts = [part.as_8_bits() for part in parts]
    sizes = {part.group_size for part in parts}
    if len(sizes) > 1:
        smallest = min(size for size in sizes if size != -1)
        parts = [
            part if part.group_size == smallest else part.per_group(smallest) for part in parts
        ]
    bits, group_size = parts[0].bits, parts[0].group_size
    zero, minimum = _stack_zeros(parts)
    stops = torch.tensor([len(part.codes) for part in parts]).cumsum(0).tolist()

    def meant(start: int, stop: int) -> Tensor:
        found = []
        for part, end in zip(parts, stops, strict=True):
            begin = end - len(part.codes)
            low, high = max(start, begin), min(stop, end)
            if low < high:
                found.append(part.meant(low - begin, high - begin))
        return torch.cat(found)

    # torch.cat promotes: scales of several dtypes become float32.
    return Parts(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        zero,
        bits,
        group_size,
        minimum,
        meant,
    )


def _stack_zeros(parts: Sequence[Parts]) -> tuple[Tensor | None, Tensor | None]:
    """The zero points and the minimums of stacked parts."""
    if any(part.minimum is not None for part in parts):
        return None, torch.cat([_minimum(part) for part in parts])
    if all(part.zero_point is None for part in parts):
        return None, None
    zeros = [
        torch.full(part.scale.shape, _MIDDLE[part.bits], dtype=torch.int16)
        if part.zero_point is None
        else part.zero_point
        for part in parts
    ]
    return torch.cat(zeros), None


def _minimum(part: Parts) -> Tensor:
    if part.minimum is not None:
        return part.minimum
    zero = _MIDDLE[part.bits] if part.zero_point is None else part.zero_point.float()
    return part.scale.float() * -zero
