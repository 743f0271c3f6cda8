"""Which layer hurts: the noise that each layer of a quantized model adds to its own output.

Every layer is called with what the same layer of the float model gets, so the figures know nothing
of the noise of the layers before: 10 log10(sum y^2 / sum (y - y')^2) decibels, 20 for int4 weights
and 40 for int8 as a rule of thumb.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops.fused_experts import FusedExperts
from torch_slmops.modules import PackedModule
from torch_slmops.packed_rows import Rows

__all__ = ["LayerNoise", "Noise"]


@dataclass(frozen=True)
class LayerNoise:
    """The signal-to-noise ratio of one layer's output, in decibels, and its format."""

    name: str
    snr_db: float
    format: str


@dataclass
class _Sums:
    signal: float = 0.0
    noise: float = 0.0


class Noise:
    """Compares layers of `model` with those of the same name in `reference`, while it is called."""

    def __init__(self, model: nn.Module, reference: nn.Module) -> None:
        found = dict(model.named_modules())
        self._pairs: dict[str, tuple[nn.Module, nn.Module]] = {}
        for name, module in reference.named_modules():
            other = found.get(name)
            ours = isinstance(other, PackedModule | Rows | FusedExperts)
            if ours or type(other) in (nn.Linear, nn.Embedding):
                assert other is not None
                if other is not module and not isinstance(module, PackedModule | Rows):
                    self._pairs[name] = (module, other)
        self._sums: dict[str, _Sums] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Forwards of the reference count inside."""
        with ExitStack() as stack:
            for name, (module, other) in self._pairs.items():
                see = partial(self._see, name, other)
                handle = module.register_forward_hook(see, with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _see(
        self, name: str, other: nn.Module, module: nn.Module, args: Any, kwargs: Any, output: Any
    ) -> None:
        if type(other) is nn.Linear:  # takes its own dtype only
            args = tuple(_cast(x, other.weight.dtype) for x in args)
        expected, got = _first(output), _first(other(*args, **kwargs))
        if not (isinstance(expected, Tensor) and isinstance(got, Tensor)):
            return
        if expected.shape != got.shape:  # layers that only share a name
            return
        sums = self._sums.setdefault(name, _Sums())
        expected, got = expected.detach().float(), got.detach().float()
        sums.signal += float(expected.square().sum(dtype=torch.float64))
        sums.noise += float((expected - got).square().sum(dtype=torch.float64))

    def result(self) -> tuple[LayerNoise, ...]:
        """Of every layer that was called, the noisiest first."""
        rows = [
            LayerNoise(name, _decibels(sums), _format(self._pairs[name][1]))
            for name, sums in self._sums.items()
        ]
        return tuple(sorted(rows, key=lambda row: row.snr_db))


def _decibels(sums: _Sums) -> float:
    if sums.noise == 0:
        return math.inf
    return 10 * math.log10(sums.signal / sums.noise) if sums.signal > 0 else -math.inf


def _format(module: nn.Module) -> str:
    if isinstance(module, PackedModule):
        return module.format()
    if isinstance(module, Rows):
        return module._source.format()
    if isinstance(module, FusedExperts):
        return module.describe()
    return str(next(module.parameters()).dtype).removeprefix("torch.")


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) and output else output


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
