"""The torch.compile backend "slmops": inductor, after our rewrites of the graph.

    torch.compile(model, backend="slmops")

The name is an entry point of the installed package, so nothing needs to be imported for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from torch_slmops.passes import JoinedWeight, fuse_graph

__all__ = ["backend"]


def backend(
    graph_module: GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles a graph with inductor, after fusing what our ops compute in one.

    Weights that were fused are copies: memory for the layers concerned doubles. Assigning another
    weight to a layer, or writing into it, is noticed at the next call.

    Args:
        graph_module: What Dynamo traced; changed.
        inputs: Its example inputs.
        mode: As in `torch.compile`.
        options: As in `torch.compile`: settings of inductor. `inner_compile`, a callable, takes
            inductor's place.
    """
    options = dict(options or {})
    inner: Callable[..., Any] = options.pop("inner_compile", _inductor)
    weights = fuse_graph(graph_module, inputs)
    patches = (torch._inductor.list_mode_options(mode) if mode else {}) | options
    compiled = inner(graph_module, inputs, config_patches=patches)
    return _Refreshed(compiled, weights) if weights else compiled


def _inductor(graph_module: GraphModule, inputs: Sequence[Any], **kwargs: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx  # here, as it takes a second to import

    return compile_fx(graph_module, inputs, **kwargs)


class _Refreshed:
    """A compiled graph whose fused weights follow those they were made of."""

    def __init__(self, compiled: Callable[..., Any], weights: Sequence[JoinedWeight]) -> None:
        self._compiled, self._weights = compiled, weights

    def __call__(self, *inputs: Any) -> Any:
        for weight in self._weights:
            weight.refresh(inputs)
        return self._compiled(*inputs)
