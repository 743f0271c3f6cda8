"""8-bit weights of bitsandbytes (LLM.int8()): `weight` int8 [N, K], `SCB` float32 [N].

w[n,k] = weight[n,k] * (SCB[n] / 127). That scale is float32; it is rounded to 16 bits. The outlier
columns of LLM.int8() are a matter of activations, and not taken over.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops.checkpoints.files import Layer, Reader
from torch_slmops.foreign import Parts, Source

__all__ = ["MARKS", "from_module", "reader"]

MARKS: tuple[str, ...] = ("SCB",)
_ORIGIN = "bitsandbytes int8"


def reader(model: nn.Module, settings: Mapping[str, Any]) -> Reader:
    """Returns what gives the source of a layer's weight; see `load.Format`."""
    if not settings.get("load_in_8bit") and not settings.get("_load_in_8bit"):
        raise ValueError("expected load_in_8bit; 4-bit weights of bitsandbytes are not supported")
    return _source


def _source(layer: Layer, shape: tuple[int, int]) -> Source:
    n, k = shape
    layer.expect("weight", [torch.int8], (n, k))
    layer.expect("SCB", [torch.float32], (n,))
    if "weight_format" in layer.names and int(layer.get("weight_format")) != 0:
        raise ValueError(
            f"{layer.where('weight_format')}: expected 0 (rows), got "
            f"{int(layer.get('weight_format'))}; save it with a newer bitsandbytes"
        )
    where = layer.where("weight")
    return Source(_ORIGIN, where, lambda: _parts(layer.get("weight"), layer.get("SCB")))


def from_module(name: str, module: nn.Module) -> Source | None:
    """Returns the source of a `bitsandbytes.nn.Linear8bitLt` that is quantized, or None."""
    kind = type(module)
    if kind.__name__ != "Linear8bitLt" or not kind.__module__.startswith("bitsandbytes."):
        return None
    # Before its first call the weight has them, after it the state.
    holders: tuple[Any, ...] = (module.weight, module.state)
    for holder in holders:
        codes, scale = getattr(holder, "CB", None), getattr(holder, "SCB", None)
        if codes is not None and scale is not None:
            read = partial(_parts, codes.detach(), scale.detach())
            return Source(_ORIGIN, f"{name}.weight", read)
    return None


def _parts(codes: Tensor, scale: Tensor) -> Parts:
    unsigned = codes.view(torch.uint8) ^ 128
    return Parts(unsigned, (scale / 127).view(-1, 1), None, 8, -1)
