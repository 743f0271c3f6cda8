"""The repeated blocks of a model as a chain: run one by one, with what the model calls them with.

A transformer's blocks hand a hidden state on. One forward of the model records, for each block,
everything else that it is called with (masks, rotary tables); then block after block can be run on
many batches, with one state per batch in memory. Blocks that do anything else are no chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Chain", "block_lists"]

_STATE = "hidden_states"  # what transformers calls it where it is passed by name


@dataclass(frozen=True)
class _Call:
    """How a block was called: what came with the state, and whether that had a name."""

    named: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Chain:
    """Blocks that hand one state on, and for each batch what else they are called with.

    Attributes:
        blocks: In order.
        states: Per batch, the input of the block that comes next.
        broken: Why they are no such chain, or None.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks
        self.states: list[Tensor] = []
        self.broken: str | None = None
        self._calls: list[list[_Call]] = []
        self._output: Tensor | None = None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Records the calls of the blocks."""
        handles: list[Any] = []
        try:
            for i, block in enumerate(self.blocks):
                enter = partial(self._enter, i)
                handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
                handles.append(block.register_forward_hook(self._leave))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._output = None

    def begin(self) -> None:
        """A batch begins."""
        self._calls.append([])

    @property
    def complete(self) -> bool:
        """Whether the last block was called with this batch, or nothing is recorded any more."""
        return self.broken is not None or len(self._calls[-1]) == len(self.blocks)

    def _enter(
        self, i: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self.broken is not None:
            return
        named = not args
        rest = {key: v for key, v in kwargs.items() if not (named and key == _STATE)}
        state = kwargs.get(_STATE) if named else args[0]
        if i != len(self._calls[-1]):
            self.broken = "are not called once each, in order"
        elif not isinstance(state, Tensor):
            self.broken = "take no hidden state first"
        elif not _is_plain((*args, *rest.values())):
            self.broken = "take objects that may change, such as a cache"
        elif i > 0 and not _same(state, self._output):
            self.broken = "do not get what the one before gave"
        else:
            if i == 0:
                self.states.append(state.clone())
            self._calls[-1].append(_Call(named, args[1:], rest))

    def _leave(self, block: nn.Module, args: object, output: Any) -> None:
        self._output = _state_of(output)

    def advance(self, i: int, batch: int) -> None:
        """Takes the state of a batch through block i."""
        call, state = self._calls[batch][i], self.states[batch]
        if call.named:
            output = self.blocks[i](**{_STATE: state}, **call.kwargs)
        else:
            output = self.blocks[i](state, *call.args, **call.kwargs)
        found = _state_of(output)
        if found is not None:  # Only the last block's was not asked for when it was recorded.
            self.states[batch] = found


def _state_of(output: Any) -> Tensor | None:
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def _same(a: Tensor, b: Tensor | None) -> bool:
    return b is not None and (a is b or torch.equal(a, b))


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, Tensor | bool | int | float | str)


def block_lists(model: nn.Module) -> list[list[nn.Module]]:
    """The outermost module lists of modules that have layers inside."""
    found: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in found)
        if not isinstance(module, nn.ModuleList) or nested or len(module) == 0:
            continue
        if all(any(True for _ in block.children()) for block in module):
            found[name] = list(module)
    return list(found.values())
