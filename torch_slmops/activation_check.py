"""Which layers get inputs that int8 does not serve, seen in one forward of a few tokens.

A channel that is much larger than the others takes the resolution of its whole activation group:
the others round to a handful of codes. Per row x of a layer's input, rounding it to x' adds noise
of |(x' - x) W^T|^2 / |x W^T|^2 to its output; the mean over rows tells which groups a layer bears.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops import ops
from torch_slmops.formats import Format
from torch_slmops.modules import Linear, PackedModule
from torch_slmops.packed_rows import GateUp, Rows, interleaved_rows
from torch_slmops.weight_view import dequantize
from torch_slmops.weights import QuantizedWeight, default_act_group

__all__ = ["Layers", "input_noise", "random_ids", "refine", "suited_formats"]

# int4 weights make some 20 to 30 dB of noise of their own, int8 ones 45 and their activations 40.
# Measured (docs/accuracy.md, massive activations): at 32 dB in many layers the divergence of int4
# weights grows by a fifth. A model without outliers is at 36 dB and more.
MOST_NOISE = {4: 10**-3.4, 8: 10**-3.6}
_SHAPE = (1, 48)
_ROWS = 64
_OUTPUTS = 2048
_FALLBACK = 32
_logger = logging.getLogger("torch_slmops")


@dataclass(frozen=True, eq=False)
class Layers:
    """Linear layers that get the same input and go into one weight.

    Attributes:
        key: The module that stands for them.
        modules: The layers.
        format: What is meant for them.
    """

    key: nn.Module
    modules: tuple[nn.Module, ...]
    format: Format

    def weight(self) -> Tensor:
        """The rows of the weight that are looked at."""
        weights = [module._parameters["weight"] for module in self.modules]
        found = [weight.detach() for weight in weights if weight is not None]
        whole = found[0] if len(found) == 1 else torch.cat(found)  # a head is not copied
        return whole[:: _every(len(whole))].float()


def suited_formats(
    model: nn.Module, layers: Sequence[Layers], example: Any = None
) -> dict[nn.Module, Format]:
    """Finds layers for which the activations of their format are too coarse.

    Args:
        model: A float model in eval mode; it stays as it is.
        layers: What to look at.
        example: Arguments of a forward, a tensor or a dict; by default random token ids, where
            the model takes such. Without either nothing is found.

    Returns:
        By key, for those layers: the format with activation groups of 32 inputs if that
        does, else with float activations.
    """
    example = random_ids(model) if example is None else example
    found: dict[nn.Module, Format] = {}
    if example is None:
        return found
    done: set[Layers] = set()

    def see(group: Layers, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs.get("input")
        if group in done or not isinstance(x, Tensor):
            return
        done.add(group)
        better = _better(group.format, x.detach(), group.weight())
        if better is not None:
            found[group.key] = better

    with torch.no_grad(), ExitStack() as stack:
        for group in layers:
            if group.modules and group.format.activations == "int8":
                hook = partial(see, group)
                handle = group.modules[0].register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
        _call(model, example)
    if found:
        _logger.info("optimize: finer activations for %d of %d weights", len(found), len(layers))
    return found


def random_ids(model: nn.Module) -> Tensor | None:
    """A start token and random ones, for models of transformers that take token ids and no more."""
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    takes = "input_ids" in inspect.signature(model.forward).parameters
    if not isinstance(size, int) or not takes or getattr(config, "is_encoder_decoder", False):
        return None
    ids = torch.randint(size, _SHAPE, generator=torch.Generator().manual_seed(0))
    start = getattr(config, "bos_token_id", None)
    if isinstance(start, int) and 0 <= start < size:
        ids[:, 0] = start
    return ids


def _call(model: nn.Module, example: Any) -> None:
    if not isinstance(example, Mapping):
        example = {"input_ids": example} if hasattr(model, "config") else (example,)
    try:
        model(**example) if isinstance(example, Mapping) else model(*example)
    except Exception as error:  # a model that wants other inputs, which nobody has given
        _logger.info("optimize: activations not looked at: %s", error)


def refine(model: nn.Module) -> int:
    """Does for a model that is packed already what `suited_formats` does for one that will be.

    It looks at the inputs that the packed layers get, which hooks keep from being fused meanwhile,
    and the weights that their codes stand for. The codes stay; only how activations are rounded
    changes.

    Returns:
        The number of weights that are packed anew.
    """
    example = random_ids(model)
    if example is None:
        return 0
    found: dict[int, Tensor] = {}  # by address of the packed weight

    def see(source: Linear | GateUp, module: nn.Module, args: tuple[Any, ...]) -> None:
        address = source.packed.data_ptr()
        header = ops.describe(source.packed)
        if address in found or not args or header.activations != "int8":
            return
        found[address] = source.packed
        how = Format(header.bits, header.scale_kind, header.group_size, True, None, "int8")
        better = _better(how, args[0].detach(), _some_rows(source))
        if better is not None:
            found[address] = better.pack(QuantizedWeight.unpack(source.packed))

    with torch.no_grad(), ExitStack() as stack:
        for module in list(model.modules()):
            source = module._source if isinstance(module, Rows) else module
            if isinstance(source, Linear | GateUp):
                handle = module.register_forward_pre_hook(partial(see, source))
                stack.callback(handle.remove)
        _call(model, example)
    changed = 0
    for module in model.modules():
        if isinstance(module, PackedModule):
            better = found.get(module.packed.data_ptr(), module.packed)
            changed += better is not module.packed
            module.packed = better
    return changed


def _every(rows: int) -> int:
    return -(-rows // _OUTPUTS)


def _some_rows(source: Linear | GateUp) -> Tensor:
    """Those that `Layers.weight` gives, of what the codes stand for."""
    if isinstance(source, GateUp):
        rows = interleaved_rows(source.hidden)
    else:
        rows = torch.arange(source.out_features)
    rows = rows[:: _every(len(rows))]
    shape = (len(rows), source.in_features)
    return dequantize(source.packed, shape, torch.float32, rows, source.perm)


def _better(how: Format, x: Tensor, weight: Tensor) -> Format | None:
    """A format whose activations are fine enough for the inputs x, or None if `how` is."""
    most = MOST_NOISE[how.bits]
    size = how.act_group or default_act_group(how.bits, how.group_size, weight.shape[1])
    if not bool(input_noise(x, weight, size) > most):  # a NaN has nothing to be saved
        return None
    finer = replace(how, act_group=_FALLBACK)
    if size != _FALLBACK and input_noise(x, weight, _FALLBACK) <= most:
        return finer
    return replace(how, activations="float")


def input_noise(x: Tensor, weight: Tensor, act_group: int) -> float:
    """The mean over rows of |(x' - x) W^T|^2 / |x W^T|^2, x' being x rounded to int8.

    Args:
        x: [..., K]; of many rows, some are taken.
        weight: W, float32 [N, K].
        act_group: Inputs that share a scale, or -1 for all.
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    rows = rows[:: max(1, len(rows) // _ROWS)]
    k = rows.shape[1]
    size = k if act_group == -1 else act_group
    groups = nn.functional.pad(rows, (0, -k % size)).reshape(len(rows), -1, size)
    step = groups.abs().amax(2, keepdim=True) / 127
    codes = (groups / torch.where(step == 0, 1, step)).round()
    error = (codes * step - groups).flatten(1)[:, :k]
    noise, signal = ((part @ weight.t()).square().sum(1) for part in (error, rows))
    heard = signal > 0
    return float((noise[heard] / signal[heard]).mean()) if bool(heard.any()) else 0.0
