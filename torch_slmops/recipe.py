"""What a saved model is made of, as text: enough to build it from its float skeleton.

A safetensors file of ours has three entries in its metadata: the format's version, the recipe as
JSON, and a SHA-256 of that JSON. docs/save-and-load.md describes the recipe.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops import ops
from torch_slmops.fused import Fused
from torch_slmops.modules import PackedModule
from torch_slmops.notes import check_options, left_of, options_of
from torch_slmops.survey import weight_key

__all__ = ["FORMAT_VERSION", "Layer", "Recipe", "SavedModelError", "Stored", "facts", "recipe_of"]

FORMAT_VERSION = 1
VERSION_KEY, RECIPE_KEY, DIGEST_KEY = "slmops_format", "slmops_recipe", "slmops_recipe_sha256"
_MOST_ELEMENTS = 1 << 59  # whose bytes a 64-bit number counts
# What reading a recipe raises where it is none.
_NO_RECIPE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)
_ORDERS = (".perm", ".order")  # of the inputs or rows of packed modules
# Fields of a spec that come from the code of a module, and are found again when it is loaded.
_OF_THE_CODE = ("parameters", "cache", "eager", "tables")


class SavedModelError(ValueError):
    """A file that is not what it should be: which one, which tensor, what was expected."""


@dataclass(frozen=True)
class Layer:
    """A packed module: its class, its dtype (as torch says it), whether it was calibrated.

    `origin`: which format of another tool its codes come from, in words.
    """

    kind: str
    dtype: str
    calibrated: bool
    origin: str = ""


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: dtype, shape, and `ops.checksum` in hexadecimal."""

    dtype: str
    shape: tuple[int, ...]
    checksum: str

    @classmethod
    def of(cls, tensor: Tensor) -> Stored:
        """Describes a tensor."""
        return cls(_name(tensor.dtype), tuple(tensor.shape), f"{ops.checksum(tensor):016x}")


@dataclass(frozen=True)
class Recipe:
    """What was saved.

    Attributes:
        layers: The packed modules by name.
        blocks: The fused blocks by name, and what `facts` says of them.
        tensors: What the file holds, by name.
        shared: Names that a tensor has besides the one that it is stored by.
        left: Blocks that are not fused: class and reason; None where fusing was not tried.
        options: The arguments of `optimize`, for people.
        made_by: Versions of the packages that the blocks' code came from, and of this one.
    """

    layers: dict[str, Layer]
    blocks: dict[str, dict[str, Any]]
    tensors: dict[str, Stored]
    shared: dict[str, str]
    left: dict[str, tuple[str, str]] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    made_by: dict[str, str] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Returns the names of all tensors, those too that another name is stored for."""
        return [*self.tensors, *self.shared]

    def metadata(self) -> dict[str, str]:
        """Returns what goes into the metadata of each file."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()
        return {
            VERSION_KEY: str(FORMAT_VERSION),
            RECIPE_KEY: text,
            DIGEST_KEY: digest,
            "format": "pt",
        }

    @classmethod
    def parse(cls, metadata: Mapping[str, str] | None, file: str) -> Recipe:
        """Reads what `metadata` gave.

        Args:
            metadata: Of a safetensors file.
            file: Its name, for errors.

        Raises:
            SavedModelError: It is not there, newer than this package, or damaged.
        """
        metadata = metadata or {}
        version = metadata.get(VERSION_KEY)
        if version is None:
            raise SavedModelError(
                f"{file}: expected a file that torch_slmops saved, with {VERSION_KEY!r} in its "
                f"metadata, which has {sorted(metadata) or 'nothing'}"
            )
        check_version(version, file)
        text, digest = metadata.get(RECIPE_KEY, ""), metadata.get(DIGEST_KEY)
        if hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() != digest:
            raise SavedModelError(
                f"{file}: its metadata is damaged: {RECIPE_KEY!r} does not match {DIGEST_KEY!r}"
            )
        try:
            return _from_plain(json.loads(text))
        except _NO_RECIPE as error:
            raise SavedModelError(
                f"{file}: expected a recipe as of format {FORMAT_VERSION} in its metadata, got "
                f"another ({type(error).__name__}: {error})"
            ) from error


def check_version(version: object, file: str) -> None:
    """Refuses a format that this package does not know."""
    if str(version) == str(FORMAT_VERSION):
        return
    from torch_slmops import __version__

    newer = str(version).isdecimal() and int(str(version)) > FORMAT_VERSION
    advice = "it was saved by a newer torch_slmops: upgrade" if newer else "the file is damaged"
    raise SavedModelError(
        f"{file}: expected format {FORMAT_VERSION}, which is what torch_slmops {__version__} "
        f"reads, got format {version!r}; {advice}"
    )


def recipe_of(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[Recipe, dict[str, Tensor]]:
    """Describes a model for saving.

    Args:
        model: An optimized model, or one without anything packed.
        tensors: Its state dict.

    Returns:
        The recipe, and `tensors` with what is shared once only.

    Raises:
        TypeError: Something that cannot be saved this way.
    """
    kept, shared = _once(tensors)
    layers: dict[str, Layer] = {}
    blocks: dict[str, dict[str, Any]] = {}
    packages: set[str] = set()
    for name, module in model.named_modules():
        if isinstance(module, PackedModule):
            kind, dtype = type(module).__name__, _name(module.dtype)
            layers[name] = Layer(kind, dtype, module.calibrated, module.origin)
        if isinstance(module, Fused):
            blocks[name] = facts(module.slmops)
            packages.add(type(module).__bases__[1].__module__.partition(".")[0])
    stored = {name: Stored.of(tensor) for name, tensor in kept.items()}
    made_by = {name: version for name in packages if (version := package_version(name))}
    return Recipe(layers, blocks, stored, shared, left_of(model), options_of(model), made_by), kept


def package_version(package: str) -> str | None:
    """Returns the version of an imported package that is installed as such, or None."""
    found = getattr(sys.modules.get(package), "__version__", None)
    return found if isinstance(found, str) else None


def facts(spec: Any) -> dict[str, Any]:
    """Returns what a spec of a fused block says, as far as it is data: what JSON can hold."""
    found: dict[str, Any] = {"kind": type(spec).__name__}
    for item in dataclasses.fields(spec):
        value = getattr(spec, item.name)
        if item.name in _OF_THE_CODE:
            continue
        if item.name == "row":
            value = value.name
        elif dataclasses.is_dataclass(value):
            value = facts(value)
        found[item.name] = list(value) if isinstance(value, tuple) else value
    return found


def _once(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor by its first name, and that name by each of its others."""
    kept: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[object, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.device.type != "cpu":
            what = f"on {tensor.device}" if isinstance(tensor, Tensor) else f"a {type(tensor)}"
            raise TypeError(f"{name}: expected a tensor on the CPU to save, got one {what}")
        if name.endswith(_ORDERS):
            kept[name] = tensor.clone()  # each module has its own, whoever else has the same
            continue
        key = weight_key(tensor) if tensor.numel() else name
        if key in first:
            shared[name] = first[key]
        else:
            first[key] = name
            kept[name] = tensor
    return kept, shared


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(sizes: Any) -> tuple[int, ...]:
    """Sizes of which a tensor can be, filled or not."""
    shape = tuple(int(size) for size in sizes)
    if min(shape, default=0) < 0 or math.prod(max(size, 1) for size in shape) > _MOST_ELEMENTS:
        raise ValueError(f"shape {list(shape)}")
    return shape


def _from_plain(plain: Any) -> Recipe:
    layers = {name: Layer(**layer) for name, layer in plain["layers"].items()}
    tensors = {
        name: Stored(stored["dtype"], _shape(stored["shape"]), stored["checksum"])
        for name, stored in plain["tensors"].items()
    }
    every: list[Layer | Stored] = [*layers.values(), *tensors.values()]
    for described in every:
        if not isinstance(getattr(torch, described.dtype, None), torch.dtype):
            raise ValueError(f"dtype {described.dtype!r}")
    for layer in layers.values():
        if not isinstance(layer.origin, str):
            raise ValueError(f"origin {layer.origin!r}")
    left = plain["left"]
    if left is not None:
        left = {name: (str(what), str(why)) for name, (what, why) in left.items()}
    blocks = {name: dict(block) for name, block in plain["blocks"].items()}
    for block in blocks.values():
        if not isinstance(block.get("kind"), str):
            raise ValueError(f"a block of kind {block.get('kind')!r}")
    shared = dict(plain["shared"])
    if not set(shared.values()) <= tensors.keys() or tensors.keys() & shared.keys():
        raise ValueError("shared tensors that are not there")
    options = dict(plain["options"])
    check_options(options)
    return Recipe(layers, blocks, tensors, shared, left, options, dict(plain["made_by"]))
