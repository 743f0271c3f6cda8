"""twin: another model with the same weights in memory, to pack while the first stays as it is."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

__all__ = ["twin"]

Model = TypeVar("Model", bound=nn.Module)


def twin(model: Model) -> tuple[Model, dict[nn.Module, nn.Module]]:
    """Copies the modules of a model, but not its weights.

    Returns:
        The copy, whose parameters and buffers are those of `model` seen once more, and for each
        module of `model` that of the copy.
    """
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    made = copy.deepcopy(model, memo)
    return made, dict(zip(model.modules(), made.modules(), strict=True))
