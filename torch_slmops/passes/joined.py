"""Packed weights that are made of those of several layers, and follow them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch.fx import Node

from torch_slmops import ops
from torch_slmops.packed_rows import interleave
from torch_slmops.passes.graph import Graph, LinearCall, fake
from torch_slmops.weights import QuantizedWeight

__all__ = ["JoinedWeight", "can_join", "join", "join_biases", "join_gate_up", "join_rows"]


class JoinedWeight:
    """A packed weight made of several, which are inputs of a graph.

    Attributes:
        packed: uint8 [bytes]; always the same tensor, as compiled code holds it.
    """

    def __init__(
        self, inputs: Sequence[Any], sources: Sequence[int], make: Callable[..., Tensor]
    ) -> None:
        """Joins the inputs whose numbers are `sources`."""
        self._sources, self._make = sources, make
        self.packed = make(*(inputs[i] for i in sources))
        self._seen = [_state(inputs[i]) for i in sources]

    def refresh(self, inputs: Sequence[Any]) -> None:
        """Joins the weights again if one of them is another tensor, or was written to.

        Raises:
            RuntimeError: They no longer have a common format.
        """
        now = [inputs[i] for i in self._sources]
        if all(_is_as_seen(tensor, seen) for tensor, seen in zip(now, self._seen, strict=True)):
            return
        joined = self._make(*now) if _alike(now) else None
        if joined is None or joined.shape != self.packed.shape:
            raise RuntimeError(
                "slmops backend: packed weights that were compiled as one have other formats now; "
                "call torch.compiler.reset() and compile again"
            )
        with torch.no_grad():
            self.packed.copy_(joined)
        self._seen = [_state(tensor) for tensor in now]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _state(tensor: Tensor) -> tuple[Callable[[], Tensor | None], int]:
    return weakref.ref(tensor), _version(tensor)


def _is_as_seen(tensor: Tensor, seen: tuple[Callable[[], Tensor | None], int]) -> bool:
    return seen[0]() is tensor and seen[1] == _version(tensor)


def join(
    graph: Graph, linears: Sequence[LinearCall], make: Callable[..., Tensor]
) -> tuple[JoinedWeight, Node]:
    """Makes one weight of those of `linears`: a buffer of the graph's module.

    Returns:
        The weight, and the node that stands for it where the graph's insertion point is.
    """
    weight = JoinedWeight(graph.inputs, [graph.input_of(call.packed) for call in linears], make)
    name = f"slmops_joined_{sum(1 for _ in graph.module.buffers())}"
    graph.module.register_buffer(name, weight.packed)
    origins = getattr(graph.module, "_param_name_to_source", None)
    if isinstance(origins, dict):  # AOTAutograd wants to know where each buffer comes from
        origins[name] = ConstantSource(source_name=name)
    return weight, graph.module.graph.get_attr(name)


def can_join(graph: Graph, linears: Sequence[LinearCall]) -> bool:
    """Whether rows and biases of these linears could be those of one."""
    biases = [None if call.bias is None else fake(call.bias).dtype for call in linears]
    one_kind = all(dtype == biases[0] for dtype in biases)
    return one_kind and _alike([graph.value(call.packed) for call in linears])


def _alike(packed: Sequence[Tensor]) -> bool:
    headers = [ops.describe(p)._replace(n=0, total_bytes=0) for p in packed]
    return all(header == headers[0] for header in headers)


def join_biases(graph: Graph, linears: Sequence[LinearCall]) -> Node | None:
    """Returns the node of the biases in a row, or None if there are none."""
    biases = [call.bias for call in linears]
    if biases[0] is None or len(biases) == 1:
        return biases[0]
    return graph.module.graph.call_function(torch.cat, (biases,))


def join_rows(*packed: Tensor) -> Tensor:
    """Returns a packed weight with the rows of all."""
    return _pack_like(packed[0], _stack(packed))


def join_gate_up(*packed: Tensor) -> Tensor:
    """Returns what `swiglu` takes, made of gate and up, or of one weight that has both."""
    return _pack_like(packed[0], interleave(_stack(packed)))


def _stack(packed: Sequence[Tensor]) -> QuantizedWeight:
    parts = [QuantizedWeight.unpack(p) for p in packed]
    first = parts[0]

    def rows(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return QuantizedWeight(
        rows("codes"),
        rows("scale"),
        rows("zero_point"),
        rows("sub_scale"),
        first.bits,
        first.group_size,
        (sum(part.shape[0] for part in parts), first.shape[1]),
    )


def _pack_like(like: Tensor, weight: QuantizedWeight) -> Tensor:
    header = ops.describe(like)
    act_group = header.act_group if header.act_group in (32, 64, 128) else -1
    return weight.pack(act_group, header.activations)
