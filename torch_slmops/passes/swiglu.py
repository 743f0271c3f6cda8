"""down(activation(gate(x)) * up(x)) with packed linears becomes `swiglu`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from torch_slmops import ops
from torch_slmops.passes.graph import Graph, LinearCall, calls, halves, is_product
from torch_slmops.passes.joined import JoinedWeight, can_join, join, join_biases, join_gate_up

__all__ = ["fuse_swiglu"]


def fuse_swiglu(graph: Graph, node: Node) -> list[JoinedWeight]:
    """Rewrites the MLP that ends in `node`, if one does; returns the weight made for it.

    Gate and up are two linears, or the halves of the result of one.
    """
    down = graph.linear(node)
    if down is None or not is_product(down.x):
        return []
    for a, up in (down.x.args, down.x.args[::-1]):
        found = _activation(a)
        if found is None:
            continue
        kind, gate, inner = found
        inner = [down.x, *inner]
        cut = halves(gate, up)
        if cut is not None:
            inner += [gate, up, cut[1]]  # type: ignore[list-item]
        calls_ = [graph.linear(n) for n in ((gate, up) if cut is None else cut[:1])]
        linears = [call for call in calls_ if call is not None]
        if len(linears) == len(calls_):
            return _place(graph, down, kind, linears, inner)
    return []


def _activation(node: Any) -> tuple[str, Node, list[Node]] | None:
    """The kind of an activation, its argument, and the nodes that compute it."""
    if is_product(node):
        for x, gate in (node.args, node.args[::-1]):
            if calls(gate, torch.sigmoid, F.sigmoid, "sigmoid") and gate.args == (x,):
                return "silu", x, [node, gate]
    if not isinstance(node, Node) or len(node.args) != 1:
        return None
    x = node.args[0]
    if not isinstance(x, Node):
        return None
    if calls(node, F.silu, torch.ops.aten.silu.default):
        return "silu", x, [node]
    if calls(node, F.gelu):
        kind = "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
        return kind, x, [node]
    return None


def _place(
    graph: Graph, down: LinearCall, kind: str, linears: Sequence[LinearCall], inner: Sequence[Node]
) -> list[JoinedWeight]:
    rows = [call.out_features for call in linears]
    hidden = sum(rows) // 2
    nodes = [*inner, *(call.node for call in linears)]
    together = {down.node, *nodes}
    fits = (
        rows in ([hidden, hidden], [2 * hidden])
        and ops.describe(graph.value(down.packed)).k == hidden
        and len({call.x for call in linears}) == 1
        and can_join(graph, linears)
        and all(user in together for node in nodes for user in node.users)
        and graph.undisturbed([down.node, *nodes])
    )
    if not fits:
        return []
    with graph.module.graph.inserting_before(down.node):
        weight, gate_up = join(graph, linears, join_gate_up)
        bias = join_biases(graph, linears)
        fused = graph.module.graph.call_function(
            torch.ops.slmops.swiglu.default,
            (
                linears[0].x,
                gate_up,
                down.packed,
                hidden,
                down.out_features,
                kind,
                bias,
                down.bias,
            ),
        )
    graph.replace(down.node, fused, nodes)
    return [weight]
