"""GGUF files: the model that one describes, and where each of its weights comes from.

The gguf package parses the file, transformers knows the configurations and the names of tensors.
What transformers ignores and the result depends on (heads narrower than the model says, scaled
rotary frequencies) is read here.
"""

from __future__ import annotations

from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_slmops.checkpoints.gguf_blocks import EXACT, ROUNDED, read_blocks
from torch_slmops.foreign import Parts, Source, attach

__all__ = ["GGUF"]

_TRANSFORMERS = "transformers.modeling_gguf_pytorch_utils"
_FLOATS = ("F32", "F16", "BF16", "F64")
_FREQUENCIES = "rope_freqs.weight"
_IGNORED = (_FREQUENCIES,)
_NO_SCALING = ("none", "")


class GGUF:
    """An open GGUF file."""

    def __init__(self, path: Path) -> None:
        """Reads the metadata.

        Raises:
            ImportError: There is no gguf or no transformers package.
            ValueError: It is no complete GGUF file, or one of an architecture that transformers
                does not know.
        """
        try:
            gguf: Any = import_module("gguf")
            transformers: Any = import_module(_TRANSFORMERS)
        except ImportError as error:
            raise ImportError(
                f"{path}: reading GGUF files needs the packages gguf and transformers: "
                'pip install "torch_slmops[gguf]"'
            ) from error
        self.path = path
        current = ""

        class Reader(gguf.GGUFReader):  # type: ignore[misc]
            tensors: list[Any]

            def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
                nonlocal current
                built: dict[str, Any] = {}
                for field in fields:
                    current = f" tensor {field.name!r}:"
                    super()._build_tensors(start_offs, [field])
                    built[field.name] = self.tensors[0]
                if len(built) != len(fields):
                    raise ValueError("some tensors have the same name")
                self.tensors = list(built.values())

        try:
            self._reader = Reader(path)
        except OSError:
            raise
        except Exception as error:  # a damaged file may raise anything
            raise ValueError(f"{path}:{current} expected a complete GGUF file: {error}") from error
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        try:
            self._config: dict[str, Any] = transformers.load_gguf_checkpoint(str(path))["config"]
        except Exception as error:  # likewise
            raise ValueError(f"{path}: its metadata describe no known model: {error}") from error

    @cached_property
    def architecture(self) -> str:
        """What the file calls its model type."""
        return str(self._field("general.architecture"))

    def _field(self, name: str) -> Any:
        field = self._reader.fields.get(name)
        return None if field is None else field.contents()

    def config(self) -> Any:
        """Returns the configuration of the model, as transformers has it."""
        from transformers import AutoConfig

        settings = dict(self._config)
        width = self._field(f"{self.architecture}.attention.key_length")
        if width is not None:
            settings["head_dim"] = int(width)
        scaling = self._rope_scaling()
        if scaling is not None:
            settings["rope_scaling"] = scaling
        return AutoConfig.for_model(**settings)

    def _rope_scaling(self) -> dict[str, Any] | None:
        prefix = f"{self.architecture}.rope.scaling"
        kind = self._field(f"{prefix}.type")
        if kind is None or kind in _NO_SCALING:
            return None
        factor = float(self._field(f"{prefix}.factor") or 1.0)
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        length = self._field(f"{prefix}.original_context_length")
        if kind == "yarn" and length is not None:
            original = {"original_max_position_embeddings": int(length)}
            return {"rope_type": "yarn", "factor": factor, **original}
        raise ValueError(
            f"{self.path}: expected {prefix}.type to be none, linear or yarn, got {kind!r}"
        )

    def fill(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Gives a model without weights those of the file: floats as they are, the rest as sources.

        Args:
            model: Of `config()`, its matrices on the meta device.
            dtype: Of what the file has in float.

        Raises:
            ValueError: A tensor that is not in the model, has another shape, or a type or an
                arrangement that cannot be taken over.
        """
        transformers: Any = import_module(_TRANSFORMERS)
        kinds: Any = transformers.TENSOR_PROCESSORS
        processor = kinds.get(self.architecture, transformers.TensorProcessor)(config=self._config)
        names: dict[str, str] = transformers.get_gguf_hf_weights_map(
            model, processor, self.architecture
        )
        unknown = [n for n in self.tensors if n not in names and n not in _IGNORED]
        if unknown:
            raise ValueError(
                f"{self.path}: tensor {unknown[0]!r} has no place in a {type(model).__name__} "
                f"({len(unknown)} such tensors)"
            )
        for name, tensor in self.tensors.items():
            if name not in _IGNORED:
                self._place(model, names[name], tensor, processor, dtype)
        if _FREQUENCIES in self.tensors:
            self._scale_frequencies(model)

    def _place(
        self, model: nn.Module, target: str, tensor: Any, processor: Any, dtype: torch.dtype
    ) -> None:
        owner, _, leaf = target.rpartition(".")
        module = model.get_submodule(owner)
        parameter = module._parameters.get(leaf)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        if parameter is None or tuple(parameter.shape) != shape:
            expected = "no such parameter" if parameter is None else tuple(parameter.shape)
            raise ValueError(f"{self._where(tensor)}: expected {expected} ({target}), got {shape}")
        rows = self._row_order(tensor, shape, processor) if len(shape) == 2 else None
        kind = tensor.tensor_type.name
        plain = type(module) in (nn.Linear, nn.Embedding) and leaf == "weight"
        if kind in _FLOATS or not plain:
            values = self._floats(tensor, processor, rows)
            module._parameters[leaf] = nn.Parameter(values.to(dtype), requires_grad=False)
            return
        note = "" if kind in EXACT + ROUNDED else ", as int8"
        source = Source(
            f"GGUF {kind}{note}", self._where(tensor), partial(self._read, tensor, rows)
        )
        attach(module, source, (shape[0], shape[1]), dtype)

    def _where(self, tensor: Any) -> str:
        return f"{self.path}: tensor {tensor.name!r}"

    def _row_order(self, tensor: Any, shape: tuple[int, ...], processor: Any) -> Any:
        """Which row of the file is each row of the model's weight; None for the same.

        transformers' processor of the architecture rearranges values; shown row numbers in the
        place of values, it tells where they go.
        """
        numbers = np.arange(shape[0] * 2, dtype=np.float64).reshape(shape[0], 2)
        moved = processor.process(
            weights=numbers, name=tensor.name, tensor_key_mapping={}, parsed_parameters={}
        ).weights
        if moved.shape == numbers.shape:
            rows = (moved[:, 0] / 2).astype(np.int64)
            if np.array_equal(moved, numbers):
                return None
            if np.array_equal(moved, numbers[rows]):
                return rows
        raise ValueError(
            f"{self._where(tensor)}: models of architecture {self.architecture!r} keep it in an "
            "arrangement that packed weights cannot have"
        )

    def _floats(self, tensor: Any, processor: Any, rows: Any) -> Tensor:
        values = import_module("gguf.quants").dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 2:
            values = values if rows is None else values[rows]
        else:
            values = processor.process(
                weights=values, name=tensor.name, tensor_key_mapping={}, parsed_parameters={}
            ).weights
        return torch.from_numpy(np.array(values, dtype=np.float32))

    def _read(self, tensor: Any, rows: Any) -> Parts:
        data = tensor.data if rows is None else tensor.data[rows]
        try:
            return read_blocks(data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(f"{self._where(tensor)}: {error}") from error

    def _scale_frequencies(self, model: nn.Module) -> None:
        """Divides the rotary frequencies by the file's factors (Llama 3's scaling)."""
        factors = torch.from_numpy(np.array(self.tensors[_FREQUENCIES].data, dtype=np.float32))
        for module in model.modules():
            for name in ("inv_freq", "original_inv_freq"):
                found = module._buffers.get(name)
                if found is not None and found.shape == factors.shape:
                    module._buffers[name] = found / factors
