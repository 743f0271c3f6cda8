"""from_checkpoint: a transformers model straight from a quantized checkpoint, packed and fused."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torch_slmops.checkpoints import awq, bitsandbytes, compressed_tensors, gptq
from torch_slmops.checkpoints.files import Folder, Layer, Reader
from torch_slmops.checkpoints.gguf import GGUF
from torch_slmops.foreign import attach, read, source_of
from torch_slmops.optimize import optimize

__all__ = ["from_checkpoint"]


class Format(Protocol):
    """A module that knows a format.

    Attributes:
        MARKS: Names of tensors that only quantized layers have.
    """

    MARKS: tuple[str, ...]

    def reader(self, model: nn.Module, settings: Mapping[str, Any]) -> Reader:
        """Returns what gives the source of a layer's weight.

        Args:
            model: The model, without weights yet.
            settings: The checkpoint's `quantization_config`.

        Raises:
            ValueError: Settings that are not known.
            ImportError: A package that the format needs is missing.
        """


# By quant_method.
_FORMATS: dict[str, Format] = {
    "gptq": gptq,
    "awq": awq,
    "compressed-tensors": compressed_tensors,
    "bitsandbytes": bitsandbytes,
}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_logger = logging.getLogger("torch_slmops")


def from_checkpoint(
    path: str | Path, *, dtype: torch.dtype | str | None = None, **options: Any
) -> Any:
    """Loads a quantized checkpoint of another tool into an optimized transformers model.

    The codes go from the file into packed weights, one layer at a time, without floats in between;
    docs/checkpoints.md lists the formats and which of them are taken over exactly. What the
    checkpoint has in float (often the head and the embeddings) is quantized as `optimize` does, and
    blocks are fused as there. `torch_slmops.report` shows for each layer where it came from.

    Args:
        path: A folder with config.json and safetensors files, the id of such a repository on the
            Hugging Face hub, or a .gguf file.
        dtype: The dtype of activations and of what stays in float; by default the checkpoint's, or
            float32 where it names none (GGUF).
        **options: Those of `optimize`, except `calibration` and `tokenizer`. Layers that `exclude`
            names become float ones, dequantized.

    Returns:
        The model, in eval mode, of the class that the checkpoint names.

    Raises:
        ImportError: A package that reads this format is missing.
        ValueError: The checkpoint is damaged, incomplete, not quantized, or in a format that is not
            known; the message names the file and the tensor.
    """
    place = Path(path)
    if place.suffix == ".gguf" and place.is_file():
        model = _from_gguf(GGUF(place), dtype)
    else:
        model = _from_folder(_folder(path), dtype)
    optimize(model, **options)
    _make_floats(model)
    return model


def _folder(path: str | Path) -> Path:
    place = Path(path)
    if place.is_dir():
        return place
    if place.exists() or place.suffix == ".gguf" or str(path).count("/") != 1:
        raise ValueError(
            f"{path}: expected a folder with config.json and safetensors files, a .gguf file, or "
            "the id of a repository on the Hugging Face hub"
        )
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))


def _from_gguf(file: GGUF, dtype: torch.dtype | str | None) -> Any:
    config = file.config()
    kind = torch.float32 if dtype in (None, "auto") else _dtype(dtype)
    model = _without_weights(config, kind)
    empty = list(model.parameters())
    file.fill(model, kind)
    _check_complete(model, empty, str(file.path))
    return model.eval()


def _from_folder(path: Path, dtype: torch.dtype | str | None) -> Any:
    from transformers import AutoConfig, GenerationConfig

    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: expected a folder with config.json and safetensors files")
    config = AutoConfig.from_pretrained(path)
    settings = _quantization(config, path)
    method = str(settings.get("quant_method", "")).lower()
    if method not in _FORMATS:
        raise ValueError(
            f"{path / 'config.json'}: expected a quant_method of {', '.join(_FORMATS)}, got "
            f"{method!r}"
        )
    kind = getattr(config, "dtype", None) or torch.float32
    kind = _dtype(kind) if dtype in (None, "auto") else _dtype(dtype)
    model = _without_weights(config, kind)
    empty = list(model.parameters())
    folder = Folder(path)
    try:
        read_layer = _FORMATS[method].reader(model, settings)
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: quantization_config: {error}") from error
    _fill(model, folder, _FORMATS[method], read_layer, kind)
    _check_complete(model, empty, str(path))
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def _quantization(config: Any, path: Path) -> Mapping[str, Any]:
    """Takes the quantization out of a configuration."""
    found = vars(config).pop("quantization_config", None)
    if found is None:
        raise ValueError(
            f"{path / 'config.json'}: expected a quantized checkpoint, found no "
            "quantization_config; load it with transformers and call torch_slmops.optimize"
        )
    settings: Mapping[str, Any] = found if isinstance(found, Mapping) else found.to_dict()
    return settings


def _dtype(dtype: Any) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in _FLOATS:
        raise ValueError(
            f"from_checkpoint: expected dtype float32, bfloat16 or float16, got {dtype!r}"
        )
    return found  # type: ignore[no-any-return]


class _EmptyOnMeta(TorchFunctionMode):
    """Inside it, `torch.empty` gives tensors without memory: what layers make their weights by."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            kwargs = kwargs | {"device": "meta"}
        return func(*args, **kwargs)


def _without_weights(config: Any, dtype: torch.dtype) -> Any:
    """A model whose matrices have no memory yet; buffers and vectors are real."""
    import transformers

    names = getattr(config, "architectures", None) or [None]
    kind = getattr(transformers, names[0], None) if names[0] else None
    with _EmptyOnMeta():
        if kind is not None:
            return kind._from_config(config, dtype=dtype)
        auto: Any = transformers.AutoModelForCausalLM
        return auto.from_config(config, dtype=dtype)


def _fill(
    model: nn.Module, folder: Folder, kind: Format, read_layer: Reader, dtype: torch.dtype
) -> None:
    """Gives `model` the weights of `folder`: floats as they are, quantized ones as sources."""
    used: set[str] = set()
    for name, module in model.named_modules():
        layer = folder.layer(name)
        if any(mark in layer.names for mark in kind.MARKS):
            if type(module) is not nn.Linear:
                what = layer.where(next(mark for mark in kind.MARKS if mark in layer.names))
                raise ValueError(f"{what}: expected a linear layer, the model has {module}")
            shape = (module.out_features, module.in_features)
            attach(module, read_layer(layer, shape), shape, dtype)
            _take_bias(module, layer, dtype)
            used.update(f"{name}.{own}" for own in layer.names)
            continue
        for registry in (module._parameters, module._buffers):
            for own, tensor in registry.items():
                if tensor is not None and own in layer.names:
                    values = layer.expect(own, _FLOATS, tuple(tensor.shape))
                    used.add(f"{name}.{own}" if name else own)
                    registry[own] = _placed(values, tensor, dtype)
    _look_at_rest([name for name in folder.names() if name not in used], folder, kind)


def _placed(values: Tensor, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(values.to(dtype), requires_grad=False)
    return values.to(tensor.dtype)


def _take_bias(module: nn.Linear, layer: Layer, dtype: torch.dtype) -> None:
    """Takes the bias of a quantized layer; some tools write zeros where a model has none."""
    if "bias" not in layer.names:
        return
    bias = layer.expect("bias", _FLOATS, (module.out_features,))
    if module.bias is not None or bool(bias.any()):
        module._parameters["bias"] = nn.Parameter(bias.to(dtype), requires_grad=False)


def _look_at_rest(left: list[str], folder: Folder, kind: Format) -> None:
    """Raises if quantized weights are among the tensors that found no place."""
    quantized = [name for name in left if name.rpartition(".")[2] in kind.MARKS]
    if quantized:
        raise ValueError(
            f"{folder.where(quantized[0])}: the model has no linear layer of this name "
            f"({len(quantized)} such tensors; sparse models' experts are not supported)"
        )
    if left:
        _logger.info("from_checkpoint: not used: %s", ", ".join(left))


def _check_complete(model: Any, empty: list[nn.Parameter], where: str) -> None:
    """Ties tied weights; raises if a parameter is one of `empty` or a tensor has no values."""
    model.tie_weights()
    unfilled = {id(parameter) for parameter in empty}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        without = tensor.device.type == "meta" and source_of(tensor) is None
        if id(tensor) in unfilled or without:
            raise ValueError(f"{where}: expected a tensor {name!r}, found none")


def _make_floats(model: nn.Module) -> None:
    """Dequantizes what was not chosen to be packed."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        found = read([module]) if source_of(weight) is not None else None
        if weight is None or found is None:
            continue
        if id(weight) not in made:
            values = found.weight.dequantize(weight.dtype)
            if found.perm is not None:
                values = values[:, torch.argsort(found.perm)]
            made[id(weight)] = nn.Parameter(values, requires_grad=False)
        module._parameters["weight"] = made[id(weight)]
