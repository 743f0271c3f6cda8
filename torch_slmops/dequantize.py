"""dequantize: the float model that an optimized one stands for, in its place."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from torch_slmops.attention import NAME
from torch_slmops.fused import SNAPSHOT, AttentionSpec, Derived, ExpertsSpec, Fused, MLPSpec
from torch_slmops.modules import Embedding, PackedModule
from torch_slmops.packed_rows import Rows
from torch_slmops.stack import Layers

__all__ = ["dequantize"]

Model = TypeVar("Model", bound=nn.Module)


def dequantize(model: Model, *, dtype: torch.dtype | None = None) -> Model:
    """Makes an optimized model a float one again, in place: plain layers, the original classes.

    A weight is exactly what its codes and scales say, rounded once to its dtype. Layers that shared
    a packed weight share a parameter. Parameters stay frozen (`requires_grad_(True)` trains them).

    Args:
        model: Any module; what is not packed or fused in it stays as it is.
        dtype: That of the weights that were packed; by default what each was.

    Returns:
        The model.

    Raises:
        TypeError: `model` is no module, or `dtype` is not floating.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"dequantize: expected an nn.Module, got a {type(model).__name__}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dequantize: expected a floating dtype, got {dtype}")
    blocks = [module for module in model.modules() if isinstance(module, Fused)]
    inner = {block: _inner(block) for block in blocks}
    gone = {
        module
        for block, names in inner.items()
        for name in names
        for module in block.get_submodule(name).modules()
    }
    with torch.no_grad():
        layers = _layers(model, gone, dtype)
        experts = {b: _experts(b, dtype) for b in blocks if isinstance(b.slmops, ExpertsSpec)}
    for block, names in inner.items():
        for name in names:
            del block._modules[name]
        block._parameters.update(experts.get(block, {}))
    for parent in list(model.modules()):
        if isinstance(parent, Derived):
            for name in ("slmops", "slmops_run", "slmops_stack", SNAPSHOT):
                vars(parent).pop(name, None)
            parent.__class__ = type(parent).__bases__[1]
        if type(parent) is Layers:
            layer_list: Any = parent
            layer_list.__class__ = nn.ModuleList
        for name, child in parent._modules.items():
            if child in layers:
                parent._modules[name] = layers[child]
    _forget(model, bool(blocks))
    return model


def _inner(block: Fused) -> tuple[str, ...]:
    """The children that fusing added."""
    spec = block.slmops
    if isinstance(spec, ExpertsSpec):
        return ("gate_up", "down")
    own: tuple[str, ...] = ()
    if isinstance(spec, AttentionSpec):
        own = spec.row.projections
    elif isinstance(spec, MLPSpec):
        own = spec.row.gate_up
    return (spec.packed,) if own and spec.packed not in own else ()


def _layers(
    model: nn.Module, gone: set[nn.Module], dtype: torch.dtype | None
) -> dict[nn.Module, nn.Module]:
    """The float layers in the places of packed ones and of views of them."""
    found: dict[nn.Module, nn.Module] = {}
    shared: dict[tuple[object, ...], nn.Parameter] = {}
    for module in model.modules():
        if module in gone or not isinstance(module, PackedModule | Rows):
            continue
        wide = module.dtype if dtype is None else dtype
        key: tuple[object, ...] = (id(module),)
        if isinstance(module, PackedModule):
            key = (module.packed.data_ptr(), tuple(module.weight.shape), wide)
        if key not in shared:
            shared[key] = _parameter(_values(module, wide))
        found[module] = _layer(module, shared[key], dtype)
    return found


def _values(module: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(module, Rows):
        return module.weight.dequantize().to(dtype)
    dequantized: Tensor = module.dequantize(dtype)
    return dequantized


def _layer(module: Any, weight: nn.Parameter, dtype: torch.dtype | None) -> nn.Module:
    n, k = weight.shape
    made: nn.Embedding | nn.Linear
    if isinstance(module, Embedding):
        made = nn.Embedding(n, k, module.padding_idx, device="meta")
    else:
        made = nn.Linear(k, n, bias=False, device="meta")
        if module.bias is not None:
            bias = module.bias.detach()
            made.register_parameter(
                "bias", _parameter(bias.clone() if dtype is None else bias.to(dtype))
            )
    made._parameters["weight"] = weight
    return made.train(module.training)


def _experts(block: Any, dtype: torch.dtype | None) -> dict[str, nn.Parameter]:
    row = block.slmops.row
    parts = {row.gate_up: block.gate_up, row.down: block.down}
    return {
        name: _parameter(torch.stack([expert.dequantize(dtype) for expert in experts]))
        for name, experts in parts.items()
    }


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _forget(model: nn.Module, blocks: bool) -> None:
    """Removes the notes of `optimize`, and what it told transformers; `blocks`: some were fused."""
    for module in model.modules():
        known: Any = module
        for note in ("_slmops_left", "_slmops_options"):
            vars(module).pop(note, None)
        if hasattr(module, "get_expanded_tied_weights_keys"):
            if "_slmops_ties" in vars(module):
                vars(module)["_tied_weights_keys"] = vars(module).pop("_slmops_ties")
            known.all_tied_weights_keys = known.get_expanded_tied_weights_keys(all_submodels=True)
        config: Any = getattr(module, "config", None)
        change = getattr(module, "set_attn_implementation", None)
        if blocks and change and getattr(config, "_attn_implementation", None) == NAME:
            change("sdpa")  # in whose place ours was put
        quantizer: Any = getattr(module, "hf_quantizer", None)
        if getattr(quantizer, "is_slmops", False):
            quantizer.remove_quantization_config(module)
