"""Safetensors files: opened with errors that say what is wrong with which file, and checked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torch_slmops import memory, ops
from torch_slmops.recipe import Recipe, SavedModelError, Stored

__all__ = ["Checkpoint", "check", "taken", "weight_files"]

_NAMES = ("model.safetensors", "model.safetensors.index.json")
_LENGTH_BYTES = 8


def weight_files(path: str | os.PathLike[str]) -> list[Path]:
    """Returns the safetensors files of a saved model.

    Args:
        path: One file, or a folder as `save_pretrained` writes it.

    Raises:
        SavedModelError: There are none, or the index of a folder is damaged.
    """
    given = Path(path)
    if not given.is_dir():
        return [given]
    single, index = (given / name for name in _NAMES)
    if single.is_file():
        return [single]
    if not index.is_file():
        raise SavedModelError(f"{given}: expected {' or '.join(_NAMES)} in this folder")
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        return [given / os.path.basename(name) for name in names]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SavedModelError(
            f"{index}: expected JSON with a weight_map of file names ({error})"
        ) from error


class Checkpoint:
    """The tensors of a saved model, in one file or more; nothing is read before it is asked for.

    Attributes:
        recipe: What was saved.
        files: The file of each tensor.
    """

    recipe: Recipe
    files: dict[str, Path]

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        """Opens the files.

        Raises:
            SavedModelError: A file is missing, damaged, or not one that torch_slmops saved.
        """
        self._open: dict[Path, Any] = {}
        self.files = {}
        recipes = []
        for path in map(Path, paths):
            handle = self._open[path] = _opened(path)
            recipes.append((path, Recipe.parse(handle.metadata(), str(path))))
            for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
                if name in self.files:
                    raise SavedModelError(f"{path}: {name}: is in {self.files[name]} too")
                self.files[name] = path
        if not recipes:
            raise SavedModelError("expected at least one safetensors file, got none")
        self.recipe = recipes[0][1]
        for path, recipe in recipes[1:]:
            if recipe != self.recipe:
                raise SavedModelError(
                    f"{path}: expected a part of the model in {recipes[0][0]}, but their recipes "
                    "differ: the files are of different models"
                )

    @property
    def name(self) -> str:
        """The first file, for errors about the whole."""
        return str(next(iter(self._open)))

    def tensor(self, name: str) -> Tensor:
        """Returns a tensor of the recipe; its memory is the file, mapped. `taken` checks it.

        Raises:
            SavedModelError: It is not there.
        """
        path = self.files.get(name)
        if path is None:
            raise SavedModelError(f"{self.name}: {name}: expected such a tensor, there is none")
        found: Tensor = self._open[path].get_tensor(name)
        return found


def check(tensor: Tensor, name: str, stored: Stored, file: str) -> None:
    """Compares a tensor with what was saved.

    Raises:
        SavedModelError: They differ.
    """
    _check_shape(tensor, name, stored, file)
    _check_bytes(ops.checksum(tensor), name, stored, file)


def taken(tensor: Tensor, name: str, stored: Stored, file: str) -> Tensor:
    """Returns a checked copy of a tensor in a mapped file; of bytes, in huge pages.

    Bytes are read once, by all of torch's threads: memory that a virtual machine has to provide
    first takes them longer than the copying.

    Raises:
        SavedModelError: It is not what was saved.
    """
    _check_shape(tensor, name, stored, file)
    if tensor.dtype == torch.uint8 and tensor.dim() == 1 and tensor.is_contiguous():
        copy = memory.empty(tensor.numel())
        found = ops.copy_checksum(copy, tensor)
    else:
        copy = tensor.clone()
        found = ops.checksum(copy)
    _check_bytes(found, name, stored, file)
    return copy


def _check_shape(tensor: Tensor, name: str, stored: Stored, file: str) -> None:
    expected = getattr(torch, stored.dtype)
    if tensor.dtype != expected or tuple(tensor.shape) != stored.shape:
        raise SavedModelError(
            f"{file}: {name}: expected {stored.dtype} {list(stored.shape)}, got "
            f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        )


def _check_bytes(checksum: int, name: str, stored: Stored, file: str) -> None:
    found = f"{checksum:016x}"
    if found != stored.checksum:
        raise SavedModelError(
            f"{file}: {name}: expected bytes with the checksum {stored.checksum}, got {found}; the "
            "file is damaged"
        )


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise SavedModelError(f"{path}: expected a safetensors file, there is none") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise SavedModelError(f"{path}: {_diagnosis(path)} ({error})") from error


def _diagnosis(path: Path) -> str:
    """What is wrong with a file that the safetensors package refuses."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
                return (
                    f"expected a safetensors file, whose first {_LENGTH_BYTES} bytes are the "
                    f"length of its header, got {length} in a file of {size} bytes: it is cut, or "
                    "something else"
                )
            entries = json.loads(file.read(length))
        start = _LENGTH_BYTES + length
        ends = {
            name: start + entry["data_offsets"][1]
            for name, entry in entries.items()
            if name != "__metadata__"
        }
        if ends and size != max(ends.values()):
            cut = sorted(name for name, end in ends.items() if end > size)
            where = f"; it is cut in {cut[0]} and {len(cut) - 1} more" if cut else ""
            return f"expected {max(ends.values())} bytes by its header, got {size}{where}"
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OSError):
        pass  # not even a header: the package's own words have to do
    return "expected a safetensors file, but its header is damaged"
