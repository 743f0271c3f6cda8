"""`SlmopsWeightOnlyConfig`: packed layers by torchao's `quantize_`.

    from torchao.quantization import quantize_
    quantize_(model, SlmopsWeightOnlyConfig())

Importing this module imports torchao. `optimize` does more: embeddings, shared weights, fused
blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import nn

from torch_slmops.modules import Linear
from torch_slmops.weights import quantize_weight

__all__ = ["SlmopsWeightOnlyConfig"]

_BITS = {"int4": 4, "int8": 8}
_base: Any = import_module("torchao.core.config").AOBaseConfig
_register: Any = import_module(
    "torchao.quantization.transform_module"
).register_quantize_module_handler


@dataclass
class SlmopsWeightOnlyConfig(_base):  # type: ignore[misc]
    """How `quantize_` packs linear layers; the arguments are those of `torch_slmops.optimize`.

    By default activations are rounded to int8 as they come in; activations="float" is weight-only
    in the narrow sense.
    """

    weights: Literal["int4", "int8"] = "int4"
    scale_kind: Literal["sub16", "group"] | None = None
    group_size: int | None = None
    symmetric: bool = True
    activations: Literal["int8", "float", "float_fast"] = "int8"
    act_group: int | None = None

    def __post_init__(self) -> None:
        if self.weights not in _BITS:
            raise ValueError(
                f'SlmopsWeightOnlyConfig: expected weights "int4" or "int8", got {self.weights!r}'
            )


@_register(SlmopsWeightOnlyConfig)  # type: ignore[untyped-decorator]
def _pack(
    module: nn.Module, config: SlmopsWeightOnlyConfig, *, parameter_name: str = "weight"
) -> nn.Module:
    if type(module) is not nn.Linear or parameter_name != "weight":
        raise TypeError(
            "SlmopsWeightOnlyConfig: expected the weight of an nn.Linear, got "
            f"{parameter_name} of a {type(module).__name__}; let filter_fn choose linear layers"
        )
    weight = module.weight.detach()
    quantized = quantize_weight(
        weight, _BITS[config.weights], config.scale_kind, config.group_size, config.symmetric
    )
    packed = quantized.pack(config.act_group, config.activations)
    bias = module._parameters["bias"]
    frozen = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    with torch.no_grad():
        return Linear.from_packed(packed, frozen, weight.dtype)
