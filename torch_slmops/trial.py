"""Trials: how far a float model moves when some of its modules compute something else.

A trial puts other forwards in the places of those modules and takes them out again. Blocks that are
done before the first of them is called give what they gave before and are not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from torch_slmops.chain import block_lists
from torch_slmops.windows import logits_of

__all__ = ["Forwards", "Trials", "divergence", "replaced"]

Forwards: TypeAlias = Mapping[nn.Module, Callable[..., Any]]
_POSITIONS = 256


def divergence(reference: Tensor, logits: Tensor) -> list[float]:
    """The sums over each window's tokens of KL(reference || other), for logits [B, T, V]."""
    sums = []
    for expected, got in zip(reference, logits, strict=True):
        total = 0.0
        parts = zip(torch.split(expected, _POSITIONS), torch.split(got, _POSITIONS), strict=True)
        for r, x in parts:
            log_r = r.log_softmax(-1)
            total += float((log_r.exp() * (log_r - x.log_softmax(-1))).sum(dtype=torch.float64))
        sums.append(total)
    return sums


@contextmanager
def replaced(forwards: Forwards) -> Iterator[None]:
    """Modules compute with other forwards inside; what they had comes back."""
    with ExitStack() as stack:
        for module, forward in forwards.items():
            stack.callback(_restore, module, vars(module).get("forward"))
            vars(module)["forward"] = forward
        yield


def _restore(module: nn.Module, forward: Any) -> None:
    if forward is None:
        vars(module).pop("forward", None)
    else:
        vars(module)["forward"] = forward


class Trials:
    """Measures changes of `model` on a few windows, whose logits are kept.

    Attributes:
        tokens: In all windows.
        skips: Whether blocks are skipped: they are if that gives the same bits.
    """

    def __init__(self, model: nn.Module, batches: list[Tensor], watched: set[nn.Module]) -> None:
        """Runs the model once, and once more to see whether its blocks may be skipped.

        Args:
            model: In eval mode.
            batches: Token ids, int64 [B, T] each.
            watched: What `kl` may be asked about.
        """
        self.model = model
        self.batches = batches
        self.tokens = sum(ids.numel() for ids in batches)
        self._blocks = [block for blocks in block_lists(model) for block in blocks]
        self._outputs: list[dict[nn.Module, Any]] = []
        self._done_before: dict[nn.Module, set[nn.Module]] = {}
        self._repeated = False
        with ExitStack() as stack:
            for block in self._blocks:
                stack.callback(block.register_forward_hook(self._keep).remove)
            for module in watched:
                stack.callback(module.register_forward_pre_hook(self._note).remove)
            self._reference = [self._recorded(ids) for ids in batches]
        self.skips = not self._repeated and self._skipping_is_exact()

    @torch.no_grad()
    def _recorded(self, ids: Tensor) -> Tensor:
        self._outputs.append({})
        return logits_of(self.model, ids)

    def _keep(self, block: nn.Module, args: Any, output: Any) -> None:
        self._repeated = self._repeated or block in self._outputs[-1]
        self._outputs[-1][block] = output

    def _note(self, module: nn.Module, args: Any) -> None:
        done = set(self._outputs[-1])
        self._done_before[module] = self._done_before.get(module, done) & done

    def _skipping_is_exact(self) -> bool:
        try:
            found = [self._logits(b, {}, set(outputs)) for b, outputs in enumerate(self._outputs)]
        except Exception:  # a foreign forward that relies on what its blocks do besides
            return False
        return all(torch.equal(x, y) for x, y in zip(found, self._reference, strict=True))

    @torch.no_grad()
    def _logits(self, batch: int, forwards: Forwards, skipped: set[nn.Module]) -> Tensor:
        outputs = self._outputs[batch]
        constant = {block: partial(_give, outputs[block]) for block in skipped}
        with replaced({**constant, **forwards}):
            return logits_of(self.model, self.batches[batch])

    def kl(self, forwards: Forwards) -> float:
        """The mean KL per token from the model to one with other `forwards`, in nats."""
        known = [self._done_before.get(module, set()) for module in forwards]
        skipped = set.intersection(*known) if self.skips and known else set()
        total = 0.0
        for b, reference in enumerate(self._reference):
            total += sum(divergence(reference, self._logits(b, forwards, skipped)))
        return total / self.tokens


def _give(output: Any, *args: Any, **kwargs: Any) -> Any:
    return output
