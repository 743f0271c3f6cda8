"""save and load: optimized models of any class in one safetensors file."""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from torch import Tensor, nn

from torch_slmops.attention import use_own_attention
from torch_slmops.files import Checkpoint, taken, weight_files
from torch_slmops.fuse import put
from torch_slmops.fused import Fused
from torch_slmops.modules import PackedModule
from torch_slmops.notes import note_saved
from torch_slmops.rebuild import Structure, plan_structure
from torch_slmops.recipe import SavedModelError, recipe_of

__all__ = ["load", "save"]

Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the weights of an optimized model, and what `load` needs to know, into one file.

    For transformers models `model.save_pretrained(folder)` is the usual way: it writes the config
    too. A file that exists is replaced once the new one is complete.

    Args:
        model: Any module, on the CPU; what is not packed is saved as it is.
        path: The file, by custom with the suffix .safetensors.

    Raises:
        TypeError: `model` is no module, or its state dict holds something else than CPU tensors.
        OSError: The file cannot be written.
    """
    from safetensors.torch import save_file

    if not isinstance(model, nn.Module):
        raise TypeError(f"save: expected an nn.Module, got a {type(model).__name__}")
    recipe, tensors = recipe_of(model, model.state_dict())
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    target = os.fspath(path)
    partial = f"{target}.partial"
    try:
        save_file(plain, partial, metadata=recipe.metadata())
        os.replace(partial, target)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def load(path: str | os.PathLike[str], into: Model) -> Model:
    """Turns a float model into the optimized one that was saved; nothing is quantized or packed.

    Every tensor is compared with its checksum. Packed weights are copied once, into huge pages;
    other tensors keep the dtype that they were saved with.

    Args:
        path: A file that `save` wrote, or a folder that `save_pretrained` wrote.
        into: The float model that was optimized, as its class makes it: its weights do not count
            and may be on the meta device, as long as buffers that are not saved are not.

    Returns:
        `into`, in eval mode.

    Raises:
        SavedModelError: The file is damaged, of a newer version or no such file, or `into` is not
            the model that it was made from. `into` is then what it was.
        TypeError: `into` is no module.
        ValueError: `into` is optimized already.
    """
    if not isinstance(into, nn.Module):
        raise TypeError(f"load: expected an nn.Module, got a {type(into).__name__}")
    for name, module in into.named_modules():
        if isinstance(module, PackedModule | Fused):
            raise ValueError(
                f"load: expected a float model, but {name or 'it'} is a {type(module).__name__}; "
                "make a new one, or use load_state_dict"
            )
    checkpoint = Checkpoint(weight_files(path))
    recipe, file = checkpoint.recipe, checkpoint.name
    structure = plan_structure(into, recipe, file)
    rotary = structure.rotary_swaps()
    _check_names(structure, checkpoint)
    tensors = _tensors(checkpoint, structure.packed)
    structure.apply()
    put(rotary)
    if structure.swaps:
        use_own_attention(into)
    _assign(into, tensors, recipe.shared)
    for name, module in structure.packed.items():
        module.dtype = getattr(torch, recipe.layers[name].dtype)
    note_saved(into, recipe.left, recipe.options)
    return into.eval()


def _check_names(structure: Structure, checkpoint: Checkpoint) -> None:
    """Compares the names and shapes of all tensors with those that the model is going to have."""
    recipe, file = checkpoint.recipe, checkpoint.name
    state = structure.state_after()
    for name in sorted(checkpoint.files.keys() - recipe.tensors.keys()):
        raise SavedModelError(f"{checkpoint.files[name]}: {name}: expected no such tensor")
    saved = {name: recipe.tensors[recipe.shared.get(name, name)] for name in recipe.names()}
    for name in sorted(state.keys() | saved.keys()):
        if name not in saved:
            raise SavedModelError(f"{file}: {name}: the model has such a tensor, the file none")
        if name not in state:
            raise SavedModelError(f"{file}: {name}: expected a model with such a tensor, got none")
        shape = tuple(state[name].shape)
        if shape != saved[name].shape and name not in recipe.shared:
            raise SavedModelError(
                f"{file}: {name}: the model has the shape {list(shape)} there, the file "
                f"{list(saved[name].shape)}"
            )


def _assign(model: nn.Module, tensors: dict[str, Tensor], shared: dict[str, str]) -> None:
    """Puts tensors in place; what shares a tensor shares the parameter."""
    parameters: dict[str, nn.Parameter] = {}
    for name in (*tensors, *shared):
        source = shared.get(name, name)
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = tensors[source]
            module._non_persistent_buffers_set.discard(leaf)
            continue
        if source not in parameters:
            parameters[source] = nn.Parameter(tensors[source], requires_grad=False)
        module._parameters[leaf] = parameters[source]


def _tensors(checkpoint: Checkpoint, packed: dict[str, PackedModule]) -> dict[str, Tensor]:
    """All tensors, checked, in memory of their own."""
    found: dict[str, Tensor] = {}
    for name in checkpoint.recipe.tensors:
        mapped, file = checkpoint.tensor(name), str(checkpoint.files[name])
        found[name] = taken(mapped, name, checkpoint.recipe.tensors[name], file)
        module = packed.get(name.removesuffix(".packed"))
        if module is not None and name.endswith(".packed"):
            wrong = module._misfit(found[name])
            if wrong is not None:
                raise SavedModelError(f"{file}: {name}: {wrong}")
    return found
