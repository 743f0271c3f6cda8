"""Tensors in a folder of safetensors files, and those of one layer; errors name file and tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from torch_slmops.foreign import Source

__all__ = ["Folder", "Layer", "Reader"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


class Folder:
    """The safetensors files of a model's folder; tensors are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Opens the files.

        Raises:
            ValueError: There are none, or one is missing, truncated or damaged.
        """
        from safetensors import safe_open

        self.path = path
        self._open: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        for file in _file_names(path):
            try:
                handle: Any = safe_open(path / file, framework="pt")
                names = list(handle.keys())
            except Exception as error:  # safetensors raises classes of its own
                raise ValueError(
                    f"{path / file}: expected a complete safetensors file: {error}"
                ) from error
            self._open[file] = handle
            self._file_of.update(dict.fromkeys(names, file))
        self._of_layer: dict[str, list[str]] = {}
        for name in self._file_of:
            owner, _, own = name.rpartition(".")
            self._of_layer.setdefault(owner, []).append(own)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        """Returns the names of all tensors."""
        return list(self._file_of)

    def where(self, name: str) -> str:
        """Returns the file and the tensor, as errors name them."""
        return f"{self.path / self._file_of.get(name, '')}: {name}"

    def get(self, name: str) -> Tensor:
        """Returns a tensor; its memory is that of the file where safetensors maps it."""
        try:
            tensor: Tensor = self._open[self._file_of[name]].get_tensor(name)
        except KeyError as error:
            raise ValueError(f"{self.path}: expected a tensor {name!r}, found none") from error
        except Exception as error:
            raise ValueError(f"{self.where(name)}: it cannot be read: {error}") from error
        return tensor

    def layer(self, name: str) -> Layer:
        """Returns the tensors of a layer: those named by `name`, a dot, and one more word."""
        prefix = f"{name}." if name else ""
        return Layer(
            name,
            frozenset(self._of_layer.get(name, ())),
            lambda suffix: self.get(prefix + suffix),
            lambda suffix: self.where(prefix + suffix),
        )


def _file_names(path: Path) -> list[str]:
    if (path / _INDEX).is_file():
        try:
            index = json.loads((path / _INDEX).read_text())
            files = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path / _INDEX}: expected JSON with a weight_map, got {error!r}"
            ) from error
        missing = [file for file in files if not (path / file).is_file()]
        if missing:
            raise ValueError(
                f"{path}: expected the files that {_INDEX} names, {missing[0]} is missing"
            )
        return files
    if (path / _SINGLE).is_file():
        return [_SINGLE]
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if len(found) == 1:
        return found
    raise ValueError(
        f"{path}: expected {_SINGLE} or {_INDEX}, found {', '.join(found) or 'no safetensors file'}"
    )


@dataclass(frozen=True, eq=False)
class Layer:
    """The tensors of one layer.

    Attributes:
        name: Its name in the model.
        names: The names of its tensors, such as "qweight".
        get: Gives the tensor of a name.
        where: Gives the file and the full name of a tensor, for errors.
    """

    name: str
    names: frozenset[str]
    get: Callable[[str], Tensor]
    where: Callable[[str], str]

    def expect(
        self, name: str, dtypes: Sequence[torch.dtype], shape: tuple[int | None, ...] | None = None
    ) -> Tensor:
        """Returns a tensor of one of `dtypes` and of `shape` (None: any size).

        Raises:
            ValueError: There is none, or it is another.
        """
        if name not in self.names:
            raise ValueError(f"{self.where(name)}: expected this tensor, found none")
        tensor = self.get(name)
        fits = shape is None or (
            len(shape) == tensor.dim()
            and all(n is None or n == m for n, m in zip(shape, tensor.shape, strict=True))
        )
        if tensor.dtype not in dtypes or not fits:
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            sizes = (
                ""
                if shape is None
                else f" of shape {tuple('any' if n is None else n for n in shape)}"
            )
            raise ValueError(
                f"{self.where(name)}: expected {kinds}{sizes}, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}"
            )
        return tensor


# Gives the source of a layer's weight of a shape (N, K). Raises a ValueError that names the file
# and the tensor if that is not of the format.
Reader: TypeAlias = Callable[[Layer, tuple[int, int]], Source]
