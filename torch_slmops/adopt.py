"""Models that other tools quantized in memory: their layers made `foreign` for `optimize`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torch_slmops.checkpoints import bitsandbytes, compressed_tensors, torchao
from torch_slmops.foreign import Source, attach

__all__ = ["adopted"]

_FORMATS = (torchao.from_module, compressed_tensors.from_module, bitsandbytes.from_module)
# What transformers' quantizers leave on a model.
_MARKS = ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_8bit")
_CONFIG_MARK = "quantization_config"
_CT_HOOK = "ct_decompress_hook"  # compressed-tensors': it makes the model float at its first call


@contextmanager
def adopted(model: Any) -> Iterator[None]:
    """Inside it, layers of formats that are known are plain ones with a foreign weight.

    Those that are still in the model at the end, or all of them after an exception, are put back.
    What says that the model is quantized goes if none is.
    """
    places = _places(model) if isinstance(model, nn.Module) else []
    marks = _take_marks(model) if places else []
    try:
        for parent, name, _, made in places:
            parent._modules[name] = made
        yield
    except BaseException:
        for parent, name, original, _ in places:
            parent._modules[name] = original
        for holder, key, value in marks:
            holder[key] = value
        raise
    left = [place for place in places if place[0]._modules.get(place[1]) is place[3]]
    for parent, name, original, _ in left:
        parent._modules[name] = original
    for holder, key, value in marks:
        if left:
            holder[key] = value
        elif key == _CT_HOOK:
            value.remove()


def _places(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module, nn.Module]]:
    """Parents and names of the layers of known formats, the layers, and what replaces them."""
    made: dict[nn.Module, nn.Module | None] = {}
    places = []
    for path, parent in list(model.named_modules()):
        for name, child in parent._modules.items():
            if child is None:
                continue
            if child not in made:
                made[child] = _plain(f"{path}.{name}" if path else name, child)
            plain = made[child]
            if plain is not None:
                places.append((parent, name, child, plain))
    return places


def _plain(name: str, module: nn.Module) -> nn.Module | None:
    """A plain layer with the weight of `module` as its source, or None."""
    for find in _FORMATS:
        source = find(name, module)
        if source is not None:
            return _twin(module, source)
    return None


def _twin(module: nn.Module, source: Source) -> nn.Module:
    twin: nn.Linear | nn.Embedding
    with torch.device("meta"):
        if isinstance(module, nn.Embedding):
            shape = (module.num_embeddings, module.embedding_dim)
            twin = nn.Embedding(*shape, module.padding_idx, module.max_norm)
        else:
            assert isinstance(module, nn.Linear)
            shape = (module.out_features, module.in_features)
            twin = nn.Linear(shape[1], shape[0], bias=False)
            twin.register_parameter("bias", module._parameters.get("bias"))
    attach(twin, source, shape, _dtype(module))
    return twin.train(module.training)


def _dtype(module: nn.Module) -> torch.dtype:
    """The dtype of what the weight stands for."""
    candidates = [module._parameters.get(name) for name in ("weight", "bias", "weight_scale")]
    for tensor in candidates:
        if tensor is not None and tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def _take_marks(model: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """Takes away what says that the model is quantized; returns it, with where it was."""
    taken = []
    for module in model.modules():
        holders = [(vars(module), key) for key in (*_MARKS, _CT_HOOK)]
        config = vars(module).get("config")
        if config is not None:
            holders.append((vars(config), _CONFIG_MARK))
        for holder, key in holders:
            if key in holder:
                taken.append((holder, key, holder.pop(key)))
    return taken
