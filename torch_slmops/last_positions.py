"""Causal language models that compute the end of their last layer for wanted positions alone.

`generate` asks for the logits of a prompt's last position. The others need nothing of the last
layer but their keys and values, which are a few percent of it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torch_slmops.fused import Derived, FusedRMSNorm
from torch_slmops.hooks import has_hooks, hooks_are_global

__all__ = ["LastPositions", "Stack", "positions_wanted"]


@dataclass(frozen=True, eq=False)
class Stack:
    """Layers whose result a model uses for nothing but the logits that it is asked for.

    Attributes:
        child: The child of the model that calls the layers.
        parent: This child.
        layers: Its list of them.
        bounded: Whether it stops at `config.num_hidden_layers`.
        norm: Its child that alone gets what the last of them makes.
    """

    child: str
    parent: Any
    layers: str
    bounded: bool
    norm: str


class _Wanted:
    """What the call in progress wants: 0 for all positions."""

    def __init__(self) -> None:
        self.model: LastPositions | None = None
        self.count = 0


class _WantedInThread(_Wanted, threading.local):
    """The same of a thread."""


_wanted, _traced = _WantedInThread(), _Wanted()


def _of_this_call() -> _Wanted:
    """What torch.compile traces, a thread at a time, it could not read from a thread's own."""
    return _traced if torch.compiler.is_compiling() else _wanted


class LastPositions(Derived):
    """A causal language model that says how many positions its `logits_to_keep` are."""

    slmops_stack: Stack | None = None  # none of a new model of an old one's class

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wanted = _of_this_call()
        before = wanted.model, wanted.count
        count = kwargs.get("logits_to_keep")
        wanted.model, wanted.count = self, count if type(count) is int else 0
        try:
            return super().__call__(*args, **kwargs)
        finally:
            wanted.model, wanted.count = before

    def ends_with(self, layer: nn.Module) -> bool:
        """Whether nobody but the norm and the logits sees what `layer` makes."""
        stack = self.slmops_stack
        if stack is None or self._modules.get(stack.child) != stack.parent:
            return False
        parent: Any = stack.parent
        layers = list(parent._modules[stack.layers]._modules.values())
        if stack.bounded:
            layers = layers[: parent.config.num_hidden_layers]
        norm = parent._modules[stack.norm]
        if not layers or layers[-1] is not layer or not isinstance(norm, FusedRMSNorm):
            return False
        if not torch.compiler.is_compiling() and hooks_are_global():
            return False
        return not any(has_hooks(module) for module in (self, parent, layer, norm))


def positions_wanted(layer: nn.Module, length: int) -> int:
    """How many of `length` positions, the last ones, are wanted of a decoder layer; 0: all."""
    wanted = _of_this_call()
    model, count = wanted.model, wanted.count
    if model is None or not 0 < count < length:
        return 0
    return count if model.ends_with(layer) else 0
