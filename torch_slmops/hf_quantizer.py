"""transformers' quantizer "slmops": `save_pretrained`, `from_pretrained`, quantizing on the way.

A checkpoint that is packed already is given to its structure tensor by tensor (`rebuild.py`); a
float one is quantized while it is loaded (`stream.py`). Importing this module registers it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from torch_slmops import moving
from torch_slmops.attention import check_kv_cache
from torch_slmops.dequantize import dequantize
from torch_slmops.files import Checkpoint, check, taken
from torch_slmops.notes import note_saved
from torch_slmops.plan import make_formats
from torch_slmops.rebuild import Structure, plan_structure
from torch_slmops.recipe import (
    FORMAT_VERSION,
    Recipe,
    SavedModelError,
    check_version,
    recipe_of,
)
from torch_slmops.stream import Stream

__all__ = ["SlmopsConfig", "SlmopsQuantizer", "attach"]

NAME = "slmops"


class SlmopsConfig(QuantizationConfigMixin):
    """How `from_pretrained(..., quantization_config=...)` quantizes a float checkpoint.

    Every argument is one of `torch_slmops.optimize`. In the config.json of a packed checkpoint they
    only tell how it was made: what is in it stands in the metadata of its files.
    """

    def __init__(
        self,
        weights: Literal["int4", "int8"] = "int4",
        scale_kind: Literal["sub16", "group"] | None = None,
        group_size: int | None = None,
        symmetric: bool = True,
        activations: Literal["int8", "float", "float_fast"] | None = None,
        act_group: int | None = None,
        lm_head: Literal["int4", "int8"] | None = "int8",
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        fuse: bool = True,
        strict: bool = False,
        kv_cache: Literal["int8"] | None = None,
        format_version: int = FORMAT_VERSION,
        **others: Any,
    ) -> None:
        """Takes the arguments; `format_version` and `quant_method` are there to be saved.

        Raises:
            ValueError: An argument that `optimize` would refuse, or a config of a newer version.
            TypeError: An argument of another name.
        """
        others.pop("quant_method", None)
        check_version(format_version, "quantization_config")
        if others:
            raise TypeError(f"SlmopsConfig: unexpected arguments {', '.join(sorted(others))}")
        check_kv_cache(kv_cache)
        make_formats(weights, scale_kind, group_size, symmetric, activations, act_group, lm_head)
        self.quant_method: Any = NAME
        self.format_version = format_version
        self.weights = weights
        self.scale_kind = scale_kind
        self.group_size = group_size
        self.symmetric = symmetric
        self.activations = activations
        self.act_group = act_group
        self.lm_head = lm_head
        self.include = _patterns(include)
        self.exclude = _patterns(exclude)
        self.fuse = fuse
        self.strict = strict
        self.kv_cache = kv_cache

    def options(self) -> dict[str, Any]:
        """Returns the arguments of `optimize`."""
        found = self.to_dict()
        del found["quant_method"], found["format_version"]
        return found


def _patterns(given: str | Iterable[str] | None) -> str | list[str] | None:
    return given if given is None or isinstance(given, str) else list(given)


class SlmopsQuantizer(HfQuantizer):
    """What transformers asks while it loads and saves; made by `from_pretrained` or `optimize`."""

    is_slmops = True
    quantization_config: SlmopsConfig

    def __init__(self, quantization_config: SlmopsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._packed: tuple[Structure, dict[str, str]] | None = None
        self._stream: Stream | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuses devices other than the CPU."""
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        for device in devices:
            if device not in (None, "auto", "cpu", torch.device("cpu")):
                raise ValueError(
                    'quantization with torch_slmops is for the CPU: expected device_map="cpu", '
                    f"got {device_map!r}"
                )

    def update_device_map(self, device_map: Any) -> Any:
        """Chooses the CPU where the choice is left to us."""
        return {"": "cpu"} if device_map == "auto" else device_map

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        if not self.pre_quantized:
            self._stream = Stream(model, self.quantization_config.options())
            return model
        if not checkpoint_files:
            raise SavedModelError(
                "a packed model is loaded from its safetensors files; expected no state_dict="
            )
        checkpoint = Checkpoint(checkpoint_files)
        structure = plan_structure(model, checkpoint.recipe, checkpoint.name)
        structure.apply()
        _settle(model, structure)
        self._packed = structure, {name: str(file) for name, file in checkpoint.files.items()}
        return model

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is quantized as soon as it is loaded."""
        return self._stream is not None and param_name in self._stream.units

    def get_quantize_ops(self) -> Any:
        """Returns what gets the parameters for which the above holds."""
        return self._stream

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._packed is not None:
            _take_over(model, *self._packed)
            self._packed = None
        if self._stream is not None:
            self._stream.finish(model)
            self._stream = None
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns what `save_pretrained` writes; the config of the model is told of us."""
        moving.finish_moving()
        ignored = model._keys_to_ignore_on_save or ()
        state = {name: t for name, t in model.state_dict().items() if name not in ignored}
        recipe, tensors = recipe_of(model, state)
        model.config.quantization_config = self.quantization_config
        return tensors, recipe.metadata()

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return dequantize(model, dtype=dtype)

    def is_serializable(self) -> bool:
        """Returns True: safetensors hold all there is."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: packed weights give no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """True: our ops have fakes."""
        return True


def attach(model: Any, options: dict[str, Any]) -> None:
    """Gives an optimized transformers model the quantizer with which it saves itself."""
    model.hf_quantizer = SlmopsQuantizer(SlmopsConfig(**options), pre_quantized=True)


def _settle(model: Any, structure: Structure) -> None:
    """Keeps transformers from tying and initializing what is packed."""
    for swap in structure.swaps:
        if swap.removed:  # their class would initialize parameters that are gone
            vars(swap.module)["_is_hf_initialized"] = True
    packed = {f"{name}.weight" for name in structure.packed}
    ties = getattr(model, "all_tied_weights_keys", {})
    model.all_tied_weights_keys = {
        name: source for name, source in ties.items() if not {name, source} & packed
    }


def _take_over(model: nn.Module, structure: Structure, files: dict[str, str]) -> None:
    """Checks what was loaded, and copies it out of the mapped files, now or (`moving.py`) later."""
    recipe = structure.recipe
    sizes = [recipe.tensors.get(f"{name}.packed") for name in structure.packed]
    later = sum(stored.shape[0] for stored in sizes if stored is not None) >= moving.LARGE
    in_files: list[Tensor] = []
    for name, module in structure.packed.items():
        for key, buffer in list(module._buffers.items()):
            full = f"{name}.{key}"
            if full in recipe.tensors and buffer is not None:
                stays = later and key == "packed"
                made = _taken(buffer, full, recipe, files, structure.file, stays)
                module._buffers[key] = made
                if made is buffer:
                    in_files.append(made)
        wrong = None if f"{name}.packed" in recipe.shared else module._misfit(module.packed)
        if wrong is not None:
            raise SavedModelError(f"{files.get(f'{name}.packed')}: {name}.packed: {wrong}")
    structure.finish()
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    for name in recipe.tensors:
        if name.rpartition(".")[0] in structure.packed and not isinstance(
            state.get(name), nn.Parameter
        ):
            continue
        if name not in state:
            raise SavedModelError(f"{structure.file}: {name}: the model has no such tensor")
        state[name].data = _taken(state[name].data, name, recipe, files, structure.file)
    for name, source in recipe.shared.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        if leaf in owner._parameters:
            owner._parameters[leaf] = state[source]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    note_saved(model, recipe.left, recipe.options)
    if in_files:
        moving.move_later(model, in_files)


def _taken(
    tensor: Tensor,
    name: str,
    recipe: Recipe,
    files: dict[str, str],
    first: str,
    stays: bool = False,
) -> Tensor:
    """A copy of a loaded tensor that is what was saved, as far as its dtype lets one see.

    `stays`: the tensor itself, if it has the dtype that it was saved with.
    """
    dtype = getattr(torch, recipe.tensors[name].dtype)
    # A wider dtype that the caller asked for holds the same values, a narrower one does not.
    stored, file = recipe.tensors[name], files.get(name, first)
    if tensor.device.type == "meta":
        raise _missing(first, name)
    try:
        if tensor.dtype == dtype and stays:
            check(tensor, name, stored, file)
            return tensor
        if tensor.dtype == dtype:
            return taken(tensor, name, stored, file)
        if torch.promote_types(tensor.dtype, dtype) == tensor.dtype:
            check(tensor.to(dtype), name, stored, file)
    except SavedModelError:
        if name in files:
            raise
        raise _missing(first, name) from None
    return tensor.clone()


def _missing(file: str, name: str) -> SavedModelError:
    return SavedModelError(f"{file}: {name}: expected such a tensor, there is none")


if NAME not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(NAME)(SlmopsConfig)
    register_quantizer(NAME)(SlmopsQuantizer)
