"""Int8Tensor: keys or values that are int8, for code that expects a tensor of floats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torch_slmops import ops

__all__ = ["Int8Tensor"]


class Int8Tensor(Tensor):
    """[B, H, L, D] of a float dtype, kept as int8 codes with a scale per head and slot.

    Attention "slmops" reads the codes; any other op gets the floats that they stand for.

    Args:
        codes: As `ops.store_int8_` fills them.
        scale: float32 [B, H, L].
        head_dim: D.
        values: Whether they are values and not keys.
        dtype: Of the floats.
    """

    codes: Tensor
    scale: Tensor
    of_values: bool

    @staticmethod
    def __new__(
        cls, codes: Tensor, scale: Tensor, head_dim: int, values: bool, dtype: torch.dtype
    ) -> Int8Tensor:
        make: Any = Tensor._make_wrapper_subclass
        made: Int8Tensor = make(cls, (*scale.shape, head_dim), dtype=dtype, device=codes.device)
        made.codes, made.scale, made.of_values = codes, scale, values
        return made

    def floats(self) -> Tensor:
        """Returns the floats."""
        return ops.read_int8(self.codes, self.scale, self.shape[3], self.of_values, self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[Any, Any] | None = None,
    ) -> Any:
        args, kwargs = tree_map_only(cls, cls.floats, (args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Int8Tensor({self.floats()!r})"
