"""x * cos + cat(-second half of x, first half of x) * sin becomes `rotary`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from torch_slmops.passes.graph import (
    Graph,
    arguments,
    calls,
    fake,
    halves,
    is_product,
    known_size,
    same_size,
)
from torch_slmops.weights import FLOAT_DTYPES

__all__ = ["fuse_rotary"]


def fuse_rotary(graph: Graph, node: Node) -> None:
    """Rewrites the rotary embedding that ends in `node`, if one does."""
    if not calls(node, operator.add, torch.add, "add") or len(node.args) != 2 or node.kwargs:
        return
    for straight, turned in (node.args, node.args[::-1]):
        if not (is_product(straight) and is_product(turned)):
            return
        assert isinstance(straight, Node) and isinstance(turned, Node)
        for half, sin in (turned.args, turned.args[::-1]):
            found = _rotated(half)
            if found is None or found[0] not in straight.args:
                continue
            x, inner = found
            cos = straight.args[1] if straight.args[0] is x else straight.args[0]
            if isinstance(cos, Node) and isinstance(sin, Node):
                _place(graph, node, (x, cos, sin), [straight, turned, *inner])
            return


def _rotated(node: Any) -> tuple[Node, list[Node]] | None:
    """x and all nodes after it, if a node is cat(-second half of x, first half of x)."""
    if not calls(node, torch.cat, torch.concat) or fake(node) is None:
        return None
    given = arguments(node, ("tensors", "dim"))
    parts = given["tensors"]
    if len(parts) != 2 or given.get("dim", 0) not in (-1, fake(node).dim() - 1):
        return None
    minus, first = parts
    if not calls(minus, operator.neg, torch.neg, "neg") or len(minus.args) != 1:
        return None
    second = minus.args[0]
    inner = [node, minus, first, second]
    cut = halves(first, second)
    if cut is not None:
        return cut[0], [*inner, cut[1]]
    return _sliced(fake(node), first, second, inner)


def _sliced(
    whole: Tensor, first: Any, second: Any, inner: list[Node]
) -> tuple[Node, list[Node]] | None:
    """The same for halves taken as x[..., : R // 2] and x[..., R // 2 :]."""
    if not (calls(first, operator.getitem) and calls(second, operator.getitem)):
        return None
    x, middle = first.args[0], whole.shape[-1] // 2
    if second.args[0] is not x or fake(x) is None or fake(x).dim() != whole.dim():
        return None
    for part, want in ((first, (None, middle)), (second, (middle, None))):
        at = part.args[1]
        if not isinstance(at, tuple) or len(at) != 2 or at[0] is not Ellipsis:
            return None
        if not isinstance(at[1], slice) or at[1].step not in (None, 1):
            return None
        start = None if at[1].start == 0 else at[1].start
        if not (same_size(start, want[0]) and same_size(at[1].stop, want[1])):
            return None
    return (x, inner) if same_size(fake(x).shape[-1], whole.shape[-1]) else None


def _place(
    graph: Graph, node: Node, sources: tuple[Node, Node, Node], nodes: Sequence[Node]
) -> None:
    x, cos, sin = sources
    fakes = [fake(n) for n in (*sources, node)]
    if any(f is None or f.dtype not in FLOAT_DTYPES or f.device.type != "cpu" for f in fakes):
        return
    if torch.is_grad_enabled() and any(f.requires_grad for f in fakes):
        return
    of_x, of_cos, of_sin, result = fakes
    heads = _heads_dimension(of_x, of_cos)
    if heads is None or heads != _heads_dimension(of_x, of_sin) or of_cos.dtype != of_sin.dtype:
        return
    if of_cos.dim() != of_sin.dim() or not same_size(of_cos.shape[0], of_sin.shape[0]):
        return
    if result.dtype != of_x.dtype or not graph.undisturbed([node, *nodes]):
        return
    new = graph.module.graph
    with new.inserting_before(node):
        tables = [_table(new, table, heads) for table in (cos, sin)]
        flipped = x if heads == 2 else new.call_method("transpose", (x, 1, 2))
        fused = new.call_function(torch.ops.slmops.rotary.default, (flipped, *tables, False))
        if heads == 1:
            fused = new.call_method("transpose", (fused, 1, 2))
    graph.replace(node, fused, nodes)


def _table(graph: torch.fx.Graph, table: Node, heads: int) -> Node:
    """cos or sin as the op takes it, [B or 1, L, R]."""
    dims = fake(table).dim()
    if dims == 4:
        return graph.call_method("squeeze", (table, heads))
    return table if dims == 3 else graph.call_method("unsqueeze", (table, 0))


def _heads_dimension(x: Tensor, table: Tensor) -> int | None:
    """The dimension of x, 4-D, that is the heads': 1 or 2; None if the table does not fit x."""
    if x.dim() != 4 or table.dim() not in (2, 3, 4):
        return None
    sizes = [1] * (4 - table.dim()) + list(table.shape)
    width = known_size(sizes[3])
    if not isinstance(width, int) or width % 2 or not same_size(width, x.shape[3]):
        return None
    if not (same_size(sizes[0], 1) or same_size(sizes[0], x.shape[0])):
        return None
    if same_size(sizes[1], 1) and same_size(sizes[2], x.shape[2]):
        return 1
    if same_size(sizes[2], 1) and same_size(sizes[1], x.shape[1]) and table.dim() == 4:
        return 2
    return None
