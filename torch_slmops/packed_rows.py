"""Several projections in one packed weight, and modules that stand for each of them.

A fused block computes with one packed buffer. The projections that were there before stay usable as
`Rows`: views that hold no weight of their own. They serve code that calls or reads them; the fused
block does not go through them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops.modules import Linear, PackedModule, packed_linear
from torch_slmops.weight_view import WeightView, dequantize
from torch_slmops.weights import QuantizedWeight

__all__ = ["GateUp", "Rows", "interleave", "interleaved_rows"]

TILE = 32


def interleaved_rows(hidden: int) -> Tensor:
    """Returns, int64 [2 * hidden], where rows of gate, then of up, lie in a packed gate_up.

    Tiles of 32 rows alternate: gate, up, gate, up; the last two may be partly padding.
    """
    j = torch.arange(hidden)
    gate = j // TILE * (2 * TILE) + j % TILE
    return torch.cat([gate, gate + TILE])


def padded_rows(hidden: int) -> int:
    """Returns the number of rows of a packed gate_up."""
    return 2 * TILE * (-(-hidden // TILE))


def places(hidden: int, order: Tensor | None) -> Tensor:
    """Returns where rows of gate, then of up, lie where they are in `order`; see `GateUp`."""
    rows = interleaved_rows(hidden)
    if order is None:
        return rows
    own = torch.argsort(order)
    return rows[torch.cat([own, own + hidden])]


def interleave(weight: QuantizedWeight, order: Tensor | None = None) -> QuantizedWeight:
    """Returns a quantized [gate; up] with its rows as `swiglu` wants them.

    Rows that pad a tile have the scale 0 and the zero point as their code.

    Args:
        weight: [2 * hidden, K].
        order: The order of rows; see `GateUp`.
    """
    n, k = weight.shape
    hidden = n // 2
    rows, at = padded_rows(hidden), places(hidden, order)

    def spread(part: Tensor, fill: int) -> Tensor:
        out = part.new_full((rows, *part.shape[1:]), fill)
        out[at] = part
        return out

    middle = 1 << (weight.bits - 1)
    zero, sub = weight.zero_point, weight.sub_scale
    return QuantizedWeight(
        spread(weight.codes, middle if zero is None else 0),
        spread(weight.scale, 0),
        None if zero is None else spread(zero, 0),
        None if sub is None else spread(sub, 0),
        weight.bits,
        weight.group_size,
        (rows, k),
        weight.offset,
    )


class GateUp(PackedModule):
    """Gate and up of a gated MLP, packed as `swiglu` wants them; called, it gives [gate, up].

    Attributes:
        in_features: K.
        hidden: Rows of the gate, and of up.
        bias: [2 * hidden], the gate's, then up's; or None.
        order: The order of the rows of gate, and of up, in `packed`, int64 [hidden]: that in which
            the down projection takes its inputs (its `perm`); None where it has none.
    """

    bias: nn.Parameter | None
    order: Tensor | None

    def __init__(
        self,
        in_features: int,
        hidden: int,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Makes a module without a weight yet: to load a state dict into, or to assign `packed`."""
        super().__init__(dtype)
        self.in_features = in_features
        self.hidden = hidden
        self.register_parameter("bias", bias)
        self.register_buffer("order", None)

    @property
    def out_features(self) -> int:
        return 2 * self.hidden

    def places(self) -> Tensor:
        """Returns, int64 [2 * hidden], where in `packed` the rows of gate, then of up, are."""
        return places(self.hidden, self.order)

    def ordered_bias(self) -> Tensor | None:
        """Returns the bias in the order of the rows of `packed`."""
        if self.bias is None or self.order is None:
            return self.bias
        return self.bias[torch.cat([self.order, self.order + self.hidden])]

    def _weight_shape(self) -> tuple[int, int]:
        return 2 * self.hidden, self.in_features

    def _packed_shape(self) -> tuple[int, int]:
        return padded_rows(self.hidden), self.in_features

    @property
    def weight(self) -> Tensor:
        """The weight [2 * hidden, K], rows of the gate first; see `PackedModule.weight`."""
        rows = self.places()
        if torch.compiler.is_compiling():
            return dequantize(self.packed, self._weight_shape(), self.dtype, rows, self.perm)
        return WeightView(self.packed, self._weight_shape(), self.dtype, rows, self.perm)

    def _assign_weight(self, value: Tensor) -> None:
        raise _read_only("gate and up")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}packed" in state_dict:
            order = state_dict.get(f"{prefix}order")
            self.order = None if order is None else torch.empty_like(order)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns [2 * hidden, K] of `dtype` or the module's dtype, rows of the gate first."""
        rows = self.places()
        return dequantize(self.packed, self._weight_shape(), dtype or self.dtype, rows, self.perm)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., 2 * hidden] for x of [..., K]: the slow path, for others than `swiglu`."""
        rows, bias = self.places(), None
        if self.bias is not None:
            bias = self.bias.new_zeros(padded_rows(self.hidden))
            bias[rows] = self.bias.detach()
        y = packed_linear(x, self.packed, padded_rows(self.hidden), bias, self.perm)
        return y[..., rows]

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_features}, 2 x {self.hidden}, bias={bias}, {self.format()}"


class Rows(nn.Module):
    """A projection that is some rows of a packed module: what stands where an `nn.Linear` was.

    Called, it computes all rows of its source and gives its own: slow, and the same bits as a
    packed `Linear` of its own would give.

    Attributes:
        in_features: K.
        out_features: N.
    """

    _source: Linear | GateUp

    def __init__(self, source: Linear | GateUp, start: int, stop: int) -> None:
        super().__init__()
        # Not a child: the source belongs to the fused block.
        object.__setattr__(self, "_source", source)
        self.start, self.stop = start, stop

    @property
    def in_features(self) -> int:
        return self._source.in_features

    @property
    def out_features(self) -> int:
        return self.stop - self.start

    @property
    def dtype(self) -> torch.dtype:
        return self._source.dtype

    @property
    def bias(self) -> Tensor | None:
        """[N], a view of the source's; or None."""
        bias = self._source.bias
        return None if bias is None else bias[self.start : self.stop]

    @property
    def weight(self) -> Tensor:
        """The weight [N, K], read-only, whose values are dequantized at each use."""
        source = self._source
        rows = torch.arange(self.start, self.stop)
        if isinstance(source, GateUp):
            rows = source.places()[self.start : self.stop]
        shape = (self.out_features, self.in_features)
        if torch.compiler.is_compiling():
            return dequantize(source.packed, shape, source.dtype, rows, source.perm)
        return WeightView(source.packed, shape, source.dtype, rows, source.perm)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise _read_only("this projection")
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., N] for x of [..., K]."""
        y: Tensor = self._source(x)[..., self.start : self.stop]
        return y.contiguous()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rows of a fused weight"


def _read_only(what: str) -> RuntimeError:
    return RuntimeError(
        f"the weight of {what} is part of a fused block and read-only: change the float model and "
        "optimize it again, or optimize it with fuse=False"
    )
