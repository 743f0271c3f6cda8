"""Checkpoints of compressed-tensors (llm-compressor, vLLM) with integer weights.

Formats "pack-quantized" (`weight_packed` int32, codes of 1 to 8 bits as a stream, `weight_shape`)
and "int-quantized" or "naive-quantized" (`weight` int8); `weight_scale` [N, G], `weight_zero_point`
[N, G] or packed along N, `weight_g_idx` [K]: w[n,k] = scale[n,g] * (code[n,k] - zero_point[n,g]),
codes signed. How the checkpoint rounds activations is not taken over: `act_group` and `activations`
of `optimize` say how that is done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops.checkpoints.bits import order_of_groups
from torch_slmops.checkpoints.files import Layer, Reader
from torch_slmops.foreign import Parts, Source

__all__ = ["MARKS", "from_module", "reader"]

MARKS: tuple[str, ...] = ("weight_packed", "weight_scale")
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_INTEGERS = (torch.int8, torch.int32, torch.int64)
_STRATEGIES = ("group", "channel", "tensor")


def reader(model: nn.Module, settings: Mapping[str, Any]) -> Reader:
    """Returns what gives the source of a layer's weight; see `load.Format`."""
    try:
        quantization: Any = import_module("compressed_tensors.quantization")
        match: Any = import_module("compressed_tensors.utils.match")
    except ImportError as error:
        raise ImportError(
            "reading compressed-tensors checkpoints needs that package: "
            'pip install "torch_slmops[compressed-tensors]"'
        ) from error
    settings = dict(settings)
    if settings.pop("transform_config", None) or settings.pop("sparsity_config", None):
        raise ValueError("transforms and sparsity are not supported")
    config = quantization.QuantizationConfig.model_validate(settings)
    schemes: dict[str, Any] = {}
    for scheme in config.config_groups.values():
        named = match.match_named_modules(model, scheme.targets, config.ignore)
        schemes.update((name, scheme) for name, _ in named)

    def source(layer: Layer, shape: tuple[int, int]) -> Source:
        if layer.name not in schemes:
            where = layer.where(next(mark for mark in MARKS if mark in layer.names))
            raise ValueError(f"{where}: no group of quantization_config has this layer")
        return _source(schemes[layer.name], layer, shape)

    return source


def from_module(name: str, module: nn.Module) -> Source | None:
    """Returns the source of a layer that compressed-tensors keeps compressed in memory, or None."""
    scheme = vars(module).get("quantization_scheme")
    tensors = (*module._parameters.items(), *module._buffers.items())
    own: dict[str, Tensor] = {key: tensor for key, tensor in tensors if tensor is not None}
    weight = own.get("weight")
    packed = "weight_packed" in own or (weight is not None and weight.dtype == torch.int8)
    if scheme is None or not packed or not isinstance(module, nn.Linear):
        return None
    layer = Layer(
        name,
        frozenset(own),
        lambda suffix: own[suffix].detach(),
        lambda suffix: f"{name}.{suffix}",
    )
    return _source(scheme, layer, (module.out_features, module.in_features))


def _source(scheme: Any, layer: Layer, shape: tuple[int, int]) -> Source:
    weights = scheme.weights
    packed = "weight_packed" in layer.names
    where = layer.where("weight_packed" if packed else "weight")
    if weights is None or weights.type != "int" or weights.strategy not in _STRATEGIES:
        what = "none" if weights is None else f"{weights.type} per {weights.strategy}"
        raise ValueError(
            f"{where}: expected integer weights per group, channel or tensor, got {what}"
        )
    n, k = shape
    bits = int(weights.num_bits) if packed else 8
    if packed:
        layer.expect("weight_packed", [torch.int32], (n, -(-k * bits // 32)))
        sizes = (
            layer.expect("weight_shape", _INTEGERS, (2,)).tolist() if _has_shape(layer) else [n, k]
        )
        if sizes != [n, k]:
            raise ValueError(f"{layer.where('weight_shape')}: expected {[n, k]}, got {sizes}")
    else:
        layer.expect("weight", [torch.int8], (n, k))
    scale = layer.expect("weight_scale", _SCALES)
    groups = scale.shape[1] if scale.dim() == 2 else 1
    size = int(weights.group_size) if weights.strategy == "group" else -1
    fits = groups == (1 if size == -1 else -(-k // size))
    if not fits or scale.numel() not in (1, n * groups):
        raise ValueError(
            f"{layer.where('weight_scale')}: expected scales per {weights.strategy} (group size "
            f"{weights.group_size}) of {n} x {k} weights, got shape {tuple(scale.shape)}"
        )
    perm = None
    if "weight_g_idx" in layer.names:
        index = layer.expect("weight_g_idx", [torch.int32, torch.int64], (k,))
        perm = order_of_groups(index, groups, size, layer.where("weight_g_idx"))
    kind = "pack-quantized" if packed else "int-quantized"
    origin = f"compressed-tensors {kind} int{bits}" + ("" if perm is None else " act-order")
    return Source(origin, where, partial(_read, layer, shape, bits, groups, size, perm), perm)


def _has_shape(layer: Layer) -> bool:
    return "weight_shape" in layer.names


def _read(
    layer: Layer, shape: tuple[int, int], bits: int, groups: int, size: int, perm: Tensor | None
) -> Parts:
    n = shape[0]
    width = 4 if bits <= 4 else 8
    if "weight_packed" in layer.names:
        codes = _unpack(layer.get("weight_packed"), bits, shape)
    else:
        codes = layer.expect("weight", [torch.int8], shape)
    if perm is not None:
        codes = codes[:, perm]
    zero = None
    if "weight_zero_point" in layer.names:
        zero = layer.expect("weight_zero_point", _INTEGERS)
        if zero.dtype == torch.int32 and "weight_packed" in layer.names:
            zero = _unpack(zero, bits, (n, groups), 0)
        zero = zero.reshape(-1, groups).expand(n, groups).to(torch.int16) + (1 << (width - 1))
    scale = layer.get("weight_scale").reshape(-1, groups).expand(n, groups)
    unsigned = (codes.to(torch.int16) + (1 << (width - 1))).to(torch.uint8)
    return Parts(unsigned, scale, zero, width, size)


def _unpack(words: Tensor, bits: int, shape: tuple[int, int], dim: int = 1) -> Tensor:
    helpers: Any = import_module("compressed_tensors.compressors.pack_quantized")
    codes: Tensor = helpers.unpack_from_int32(words, bits, torch.Size(shape), packed_dim=dim)
    return codes
