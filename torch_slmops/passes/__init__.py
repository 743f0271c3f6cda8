"""Rewrites of graphs that torch.compile hands to a backend: several ops become one of ours.

Packed linears of a gated MLP become `swiglu`, packed linears that share an input one product, and
a rotary embedding that model code spells out becomes `rotary`. `optimize` does the like for model
families that it knows; here the graph says what a module computes, whatever its structure.

Nothing is rewritten across a node that changes a tensor in place, and what is spelled otherwise is
left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule

from torch_slmops.passes.graph import Graph
from torch_slmops.passes.joined import JoinedWeight
from torch_slmops.passes.rotary import fuse_rotary
from torch_slmops.passes.shared_input import join_linears
from torch_slmops.passes.swiglu import fuse_swiglu

__all__ = ["JoinedWeight", "fuse_graph"]


def fuse_graph(graph_module: GraphModule, inputs: Sequence[Any]) -> list[JoinedWeight]:
    """Rewrites a graph from Dynamo in place.

    Args:
        graph_module: The graph, of torch functions, with the weights among its inputs.
        inputs: The values of its inputs, real tensors.

    Returns:
        The weights that were made for it. They are buffers of `graph_module` now; `refresh(inputs)`
        of each has to be called before the graph runs.
    """
    graph = Graph(graph_module, inputs)
    joined: list[JoinedWeight] = []
    for node in list(graph_module.graph.nodes):
        fuse_rotary(graph, node)
        joined += fuse_swiglu(graph, node)
    joined += join_linears(graph)
    graph_module.graph.lint()
    graph_module.recompile()
    return joined
