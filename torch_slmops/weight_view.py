"""The `weight` of a packed module: a tensor that has a shape and a dtype, and values when used.

Model code reads `proj.weight.dtype` or `.device` on every step; some reads values. The former costs
nothing here; the latter dequantizes the packed weight, correct and slow, each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torch_slmops import ops

__all__ = ["WeightView", "dequantize"]


def dequantize(
    packed: Tensor,
    shape: tuple[int, int],
    dtype: torch.dtype,
    rows: Tensor | None = None,
    perm: Tensor | None = None,
) -> Tensor:
    """Returns the values of a packed weight, of `shape` (N, K) and `dtype`.

    `rows`, int64 [N], names the packed rows, where they are not 0..N-1. `perm`, int64 [K], is the
    input that each packed column belongs to, where they are not in order.
    """
    rows = torch.arange(shape[0]) if rows is None else rows
    values = ops.embedding(rows, packed, shape[1], dtype)
    return values if perm is None else values.index_select(1, torch.argsort(perm))


# Writes that reach no mutating op of the view itself: they would change a dequantized copy.
_WRITES = (torch.Tensor.__setitem__, torch.Tensor.data.__set__)  # type: ignore[attr-defined]


def _read_only(func: object) -> RuntimeError:
    return RuntimeError(
        f"{func}: a packed weight is read-only. Change the float model and optimize it again, or "
        "assign a new tensor to the module's weight, which packs it."
    )


class WeightView(torch.Tensor):
    """A packed weight [N, K] seen as a tensor of `dtype`; read-only, without a gradient.

    Attributes:
        packed: The packed weight, uint8 [bytes].
        rows: Which of its rows, int64 [N], or None for 0..N-1.
        perm: The input of each packed column, int64 [K], or None for 0..K-1.
    """

    packed: Tensor
    rows: Tensor | None
    perm: Tensor | None
    # torch.nn.Parameter's instance check asks for this mark. A module's `weight` has to pass it:
    # transformers' tie_weights looks for parameters.
    _is_param = True
    # And its initialization of weights that a checkpoint lacks asks for this one.
    _is_hf_initialized = True

    @staticmethod
    def __new__(
        cls,
        packed: Tensor,
        shape: tuple[int, int],
        dtype: torch.dtype,
        rows: Tensor | None = None,
        perm: Tensor | None = None,
    ) -> WeightView:
        make: Any = torch.Tensor._make_wrapper_subclass
        view: WeightView = make(cls, shape, dtype=dtype, device=packed.device)
        view.packed = packed
        view.rows = rows
        view.perm = perm
        return view

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"WeightView({tuple(self.shape)}, {self.dtype}, packed in {self.packed.numel()} bytes)"
        )

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        return WeightView, (self.packed, tuple(self.shape), self.dtype, self.rows, self.perm)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightView:
        return self  # read-only

    def dequantize(self) -> Tensor:
        """Returns the values, [N, K] of this dtype."""
        shape = (self.shape[0], self.shape[1])
        return dequantize(self.packed, shape, self.dtype, self.rows, self.perm)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _WRITES and isinstance(args[0], WeightView):
            raise _read_only(func)
        # The default turns every result into this class. Being a tensor with this method at all
        # keeps torch's fused encoder layers from taking the weight past the packed module.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            view: WeightView = args[0]
            shape = (view.shape[0], view.shape[1])
            return WeightView(view.packed, shape, view.dtype, view.rows, view.perm)
        if func._schema.is_mutable and args and isinstance(args[0], WeightView):
            raise _read_only(func)
        values = tree_map_only(WeightView, WeightView.dequantize, (args, dict(kwargs or {})))
        return func(*values[0], **values[1])
