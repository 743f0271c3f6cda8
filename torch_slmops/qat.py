"""Fake quantization for training: a forward gets the values that the packed model computes with.

    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    from torch_slmops.qat import use_own_quantizers

    quantize_(model, QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32)))
    use_own_quantizers(model)
    ...  # train
    quantize_(model, QATConfig(step="convert"))
    torch_slmops.optimize(model.eval())

torchao's own quantizers choose other scales (the largest |w| over 7.5, float32) and know neither
sub-scales nor int8 activations per group: codes trained for them are not the codes that `optimize`
chooses. This module does not need torchao itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from torch_slmops.reference import quantize_rows
from torch_slmops.weights import QuantizedWeight, default_act_group, quantize_weight, resolve_scales

__all__ = ["ActivationQuantizer", "WeightQuantizer", "use_own_quantizers"]

Model = TypeVar("Model", bound=nn.Module)

_BITS = {"int4": 4, "int8": 8}
_QUANTIZERS = ("weight_fake_quantizer", "activation_fake_quantizer")


class _StraightThrough(torch.autograd.Function):
    """quantizer(x), with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantizer: Callable[[Tensor], Tensor]) -> Tensor:
        return quantizer(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Quantizer(nn.Module):
    """What torchao expects of a fake quantizer: `enabled` and `config`."""

    config = None

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True

    def values(self, x: Tensor) -> Tensor:
        """Returns what x is rounded to."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        rounded: Tensor = _StraightThrough.apply(x, self.values)  # type: ignore[no-untyped-call]
        return rounded


class WeightQuantizer(_Quantizer):
    """Rounds a weight [N, K] to what its codes stand for, by the op that `optimize` uses.

    Args:
        bits: As for `quantize_weight`.
        scale_kind: Likewise.
        group_size: Likewise.
        symmetric: Likewise.
    """

    def __init__(
        self,
        bits: int = 4,
        scale_kind: str | None = None,
        group_size: int | None = None,
        symmetric: bool = True,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.scale_kind, self.group_size = resolve_scales(bits, scale_kind, group_size, symmetric)
        self.symmetric = symmetric

    def quantize(self, weight: Tensor) -> QuantizedWeight:
        """Returns the codes and scales of a weight [N, K]."""
        return quantize_weight(weight, self.bits, self.scale_kind, self.group_size, self.symmetric)

    def values(self, x: Tensor) -> Tensor:
        return self.quantize(x).dequantize(x.dtype)


class ActivationQuantizer(_Quantizer):
    """Rounds activations [..., K] to int8 as `linear` does, by its reference.

    Args:
        act_group: Inputs that share a scale, or -1 for all.
    """

    def __init__(self, act_group: int) -> None:
        super().__init__()
        self.act_group = act_group

    def values(self, x: Tensor) -> Tensor:
        k = x.shape[-1]
        group = -(-k // 32) * 32 if self.act_group == -1 else self.act_group
        codes, scale = quantize_rows(x.reshape(-1, k), -(-k // group) * group, group)
        rounded = (codes.float() * scale[..., None]).flatten(1)[:, :k]
        return rounded.to(x.dtype).view(x.shape)


def use_own_quantizers(
    model: Model,
    *,
    weights: Literal["int4", "int8"] = "int4",
    scale_kind: Literal["sub16", "group"] | None = None,
    group_size: int | None = None,
    symmetric: bool = True,
    activations: Literal["int8", "float"] = "int8",
    act_group: int | None = None,
) -> Model:
    """Puts our quantizers into the linear layers that torchao's QATConfig prepared, in place.

    `optimize` with the same arguments then packs the codes of the last forward, scales included.
    Two limits: with float16 scales, one tiny or huge scale in a fused weight (q, k and v; gate and
    up) gives bfloat16 scales to all of it; and weights should be float32 in training, since in a
    shorter type the rounded values themselves are rounded to it.

    Args:
        model: A model after `quantize_(model, QATConfig(..., step="prepare"))`.
        weights: As for `optimize`, like the others.
        scale_kind: Likewise.
        group_size: Likewise.
        symmetric: Likewise.
        activations: Likewise; without a look at the inputs, though: int8 is int8.
        act_group: Likewise.

    Returns:
        The model.

    Raises:
        ValueError: No linear layer of the model has fake quantizers, or an option is none of the
            above.
    """
    if weights not in _BITS:
        raise ValueError(f'use_own_quantizers: expected "int4" or "int8", got {weights!r}')
    if activations not in ("int8", "float"):
        raise ValueError(f'use_own_quantizers: expected "int8" or "float", got {activations!r}')
    if act_group not in (None, 32, 64, 128, -1):
        raise ValueError(
            f"use_own_quantizers: expected act_group 32, 64, 128 or -1, got {act_group!r}"
        )
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and all(hasattr(module, name) for name in _QUANTIZERS)
    ]
    if not layers:
        raise ValueError(
            "use_own_quantizers: no linear layer has fake quantizers: call torchao's "
            'quantize_(model, QATConfig(weight_config=..., step="prepare")) first'
        )
    for layer in layers:
        own = WeightQuantizer(_BITS[weights], scale_kind, group_size, symmetric)
        layer.weight_fake_quantizer = own
        size = act_group or default_act_group(own.bits, own.group_size, layer.in_features)
        rounded: Any = ActivationQuantizer(size) if activations == "int8" else None
        layer.activation_fake_quantizer = rounded
    return model
