"""Packed linears that share an input, such as q, k and v, become one product: the same bits."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import gcd

import torch
from torch.fx import Node

from torch_slmops.passes.graph import Graph, LinearCall, fake
from torch_slmops.passes.joined import JoinedWeight, can_join, join, join_biases, join_rows

__all__ = ["join_linears"]

_MOST = 3  # parts of the result of qkv_rotary
# The op finishes heads one by one, so narrow ones cost more than the joint product saves.
_WIDTHS = range(128, 15, -1)


def join_linears(graph: Graph) -> list[JoinedWeight]:
    """Rewrites all groups of linears that share an input; returns the weights made for them."""
    groups: dict[Node, list[LinearCall]] = {}
    for node in graph.module.graph.nodes:
        call = graph.linear(node)
        if call is not None:
            groups.setdefault(call.x, []).append(call)
    joined = []
    for rest in groups.values():
        while len(rest) > 1:
            taken = rest[:1]
            for call in rest[1:]:
                if len(taken) < _MOST and _fit(graph, [*taken, call]):
                    taken.append(call)
            if len(taken) > 1:
                joined.append(_place(graph, taken))
            rest = [call for call in rest if call not in taken]
    return joined


def _width(linears: Sequence[LinearCall]) -> int | None:
    common = gcd(*(call.out_features for call in linears))
    return next((width for width in _WIDTHS if common % width == 0), None)


def _fit(graph: Graph, linears: Sequence[LinearCall]) -> bool:
    x = fake(linears[0].x)
    return (
        x is not None
        and x.dim() in (2, 3)
        and _width(linears) is not None
        and can_join(graph, linears)
        and graph.undisturbed([call.node for call in linears])
    )


def _place(graph: Graph, linears: Sequence[LinearCall]) -> JoinedWeight:
    """Heads of q, k and v without norms and rotary embedding, seen as the results of linears."""
    nodes, width = graph.module.graph, _width(linears)
    assert width is not None
    heads = [call.out_features // width for call in linears] + [0] * (_MOST - len(linears))
    x = linears[0].x
    flat = fake(x).dim() == 2
    results: list[Node] = []
    with nodes.inserting_before(linears[0].node):
        weight, packed = join(graph, linears, join_rows)
        bias = join_biases(graph, linears)
        if flat:
            x = nodes.call_method("unsqueeze", (x, 0))
        parts = nodes.call_function(
            torch.ops.slmops.qkv_rotary.default,
            (x, packed, heads, width, bias, None, None, 0.0, 0.0, None, None, False),
        )
        for i in range(len(linears)):
            part = nodes.call_function(operator.getitem, (parts, i))
            part = nodes.call_method("flatten", (part, 2))
            results.append(nodes.call_method("squeeze", (part, 0)) if flat else part)
    for call, result in zip(linears, results, strict=True):
        graph.replace(call.node, result)
    return weight
