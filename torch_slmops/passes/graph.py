"""A graph from Dynamo with the values of its inputs, and the questions that the rewrites ask."""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

__all__ = [
    "Graph",
    "LinearCall",
    "arguments",
    "calls",
    "fake",
    "halves",
    "is_product",
    "known_size",
    "same_size",
]

_LINEAR = torch.ops.slmops.linear.default
# Functions of `operator` that change their first argument: iadd, isub, ...
_INPLACE = {
    operator.setitem,
    *(getattr(operator, f"i{name}") for name in dir(operator) if hasattr(operator, f"i{name}")),
} - {operator.is_, operator.inv}


@dataclass(frozen=True)
class LinearCall:
    """A call of `slmops::linear` without permutation, whose result has the dtype of x."""

    node: Node
    x: Node
    packed: Node
    out_features: int
    bias: Node | None


class Graph:
    """The graph of `module`, with the values of its inputs and the positions of its nodes."""

    def __init__(self, module: GraphModule, inputs: Sequence[Any]) -> None:
        self.module = module
        self.inputs = inputs
        nodes = list(module.graph.nodes)
        self._input = {n: i for i, n in enumerate(n for n in nodes if n.op == "placeholder")}
        self._position = {node: i for i, node in enumerate(nodes)}
        self._changes = [i for i, node in enumerate(nodes) if _changes_a_tensor(node)]

    def input_of(self, node: Node) -> int:
        """Returns which input a placeholder is."""
        return self._input[node]

    def value(self, node: Node) -> Tensor:
        """Returns the value of a placeholder that is a tensor."""
        found: Tensor = self.inputs[self._input[node]]
        return found

    def linear(self, node: Any) -> LinearCall | None:
        """Returns what a node is as a packed linear with its weight and bias among the inputs."""
        if not isinstance(node, Node) or node.target is not _LINEAR or node not in self._position:
            return None
        names = ("x", "packed", "out_features", "bias", "perm", "out_dtype")
        given = arguments(node, names)
        if given.get("perm") is not None or given.get("out_dtype") is not None:
            return None
        packed, bias = given["packed"], given.get("bias")
        if packed not in self._input or (bias is not None and bias not in self._input):
            return None
        value = self.inputs[self._input[packed]]
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return None
        return LinearCall(node, given["x"], packed, given["out_features"], bias)

    def undisturbed(self, nodes: Sequence[Node]) -> bool:
        """Whether no tensor is changed from the first to the last of these nodes."""
        at = [self._position[node] for node in nodes]
        return bisect_left(self._changes, min(at)) == bisect_left(self._changes, max(at) + 1)

    def replace(self, old: Node, new: Node, others: Sequence[Node] = ()) -> None:
        """Puts `new` in the place of `old`; erases `old`, and those of `others` without users."""
        new.meta["example_value"] = fake(old)
        old.replace_all_uses_with(new)
        for node in (old, *sorted(others, key=self._position.__getitem__, reverse=True)):
            if not node.users:
                self.module.graph.erase_node(node)


def _changes_a_tensor(node: Node) -> bool:
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    if node.op != "call_function":
        return False
    if node.target in _INPLACE or node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    return getattr(node.target, "__name__", "").endswith("_")


def fake(node: Node) -> Any:
    """Returns the fake tensor that a node gives, or None if it gives something else."""
    value = node.meta.get("example_value")
    return value if isinstance(value, Tensor) else None


def arguments(node: Node, names: Sequence[str]) -> dict[str, Any]:
    """Returns the arguments of a call whose positional parameters have these names."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def calls(node: Any, *targets: Any) -> bool:
    """Whether a node calls one of these functions or, where it is a string, methods."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return False
    return any(node.target == target for target in targets)


def is_product(node: Any) -> bool:
    """Whether a node multiplies two things."""
    two = isinstance(node, Node) and len(node.args) == 2 and not node.kwargs
    return two and calls(node, operator.mul, torch.mul, "mul")


def halves(first: Any, second: Any) -> tuple[Node, Node] | None:
    """Returns what is cut into `first` and `second` in its last dimension, and the cutting node."""
    if not (calls(first, operator.getitem) and calls(second, operator.getitem)):
        return None
    cut = first.args[0]
    if (first.args[1], second.args[1]) != (0, 1) or second.args[0] is not cut:
        return None
    if not calls(cut, torch.chunk, "chunk"):
        return None
    given = arguments(cut, ("input", "chunks", "dim"))
    whole = given["input"]
    if given["chunks"] != 2 or given.get("dim", 0) not in (-1, fake(whole).dim() - 1):
        return None
    return whole, cut


def known_size(size: Any) -> Any:
    """Returns a size as an int if it is the same for every input, else as an expression."""
    if not isinstance(size, torch.SymInt):
        return size
    known = size.node.maybe_as_int()
    return size.node.expr if known is None else known


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every input; to compare SymInts would add a guard."""
    return bool(known_size(a) == known_size(b))
