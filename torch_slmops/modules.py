"""Modules whose weight is packed: drop-in replacements of `nn.Linear` and `nn.Embedding`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops import memory, ops
from torch_slmops.weight_view import WeightView, dequantize
from torch_slmops.weights import quantize_weight

__all__ = ["Embedding", "Linear", "PackedModule", "packed_linear"]

_linear: Any = torch.ops.slmops.linear.default
_embedding: Any = torch.ops.slmops.embedding.default


class _InputGradient(torch.autograd.Function):
    """y = x w^T + bias with a packed w, and the gradient of x, as if x were not rounded to int8."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, n: int, bias: Tensor | None, perm: Tensor | None
    ) -> Tensor:
        ctx.packed, ctx.shape, ctx.perm = packed, (n, x.shape[-1]), perm
        y: Tensor = _linear(x, packed, n, bias, perm)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = grad @ dequantize(ctx.packed, ctx.shape, grad.dtype, perm=ctx.perm)
        if ctx.needs_input_grad[3]:
            of_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return of_x, None, None, of_bias, None


def packed_linear(
    x: Tensor, packed: Tensor, n: int, bias: Tensor | None, perm: Tensor | None
) -> Tensor:
    """Returns `ops.linear` of these; where gradients are recorded, x and bias get theirs."""
    wanted = x.requires_grad or (bias is not None and bias.requires_grad)
    if wanted and torch.is_grad_enabled():
        apply: Any = _InputGradient.apply
        y: Tensor = apply(x, packed, n, bias, perm)
        return y
    y = _linear(x, packed, n, bias, perm)
    return y


class PackedModule(nn.Module):
    """What `Linear` and `Embedding` share: a buffer `packed` in place of a parameter `weight`.

    `weight` can still be read: its shape, dtype and device cost nothing, its values are dequantized
    at each use. Assigning a float tensor to it packs that tensor in the same format; assigning the
    weight of another packed module shares that module's buffer.

    Attributes:
        packed: The packed weight, uint8 [bytes] (docs/packed-format.md); empty until one is loaded
            or assigned.
        dtype: The floating dtype that the module stands for: that of `weight`. `.to(dtype)` changes
            it and leaves `packed` alone.
        perm: The input that each packed column belongs to, int64 [K], for weights that came with an
            order of their own (GPTQ's act-order); None where they are in order.
        calibrated: Whether `optimize` chose the codes for inputs that the module got.
        origin: Which format of another tool the codes come from, and what that cost; "" if they
            were chosen here.
    """

    packed: Tensor
    perm: Tensor | None
    dtype: torch.dtype
    calibrated: bool = False
    origin: str = ""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("packed", memory.empty(0))
        self.register_buffer("perm", None)

    def _weight_shape(self) -> tuple[int, int]:
        raise NotImplementedError

    def _set_weight_shape(self, n: int, k: int) -> None:
        raise NotImplementedError

    def _packed_shape(self) -> tuple[int, int]:
        """Rows and columns of `packed`."""
        return self._weight_shape()

    @property
    def weight(self) -> Tensor:
        """The weight [N, K] as a read-only tensor that dequantizes when its values are used."""
        if torch.compiler.is_compiling():  # A graph drops values that nothing uses.
            return self.dequantize()
        return WeightView(self.packed, self._weight_shape(), self.dtype, perm=self.perm)

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register a Parameter under this name instead of calling a setter.
        if name == "weight":
            self._assign_weight(value)
        else:
            super().__setattr__(name, value)

    def _assign_weight(self, value: Tensor) -> None:
        if isinstance(value, WeightView):
            self.packed, self.perm = value.packed, value.perm
        else:
            self.packed, self.perm = self._like_packed(value), None
        self._set_weight_shape(*value.shape)
        self.dtype = value.dtype
        self.calibrated, self.origin = False, ""

    def _like_packed(self, value: Tensor) -> Tensor:
        """Packs `value`, [N, K], in the format of the present weight."""
        header = ops.describe(self.packed)
        quantized = quantize_weight(
            value,
            header.bits,
            header.scale_kind,
            header.group_size,
            symmetric=header.zero_kind == "none",
        )
        act_group = header.act_group if header.act_group in (32, 64, 128) else -1
        return quantized.pack(act_group, header.activations)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the weight that the codes stand for, [N, K], of `dtype` or the module's dtype."""
        return dequantize(self.packed, self._weight_shape(), dtype or self.dtype, perm=self.perm)

    def format(self) -> str:
        """Returns the packed format in words, such as "int4 sub16, int8 activations per 128"."""
        return str(ops.describe(self.packed)) if self.packed.numel() else "no weight yet"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        result: PackedModule = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return result

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + "packed"
        new = state_dict.get(key)
        wrong = None if new is None else self._misfit(new)
        if wrong is not None:
            error_msgs.append(f"{key}: {wrong}")
            return
        if new is not None and new.shape != self.packed.shape:
            self.packed = memory.empty(new.numel())  # another format: the copy needs other room
        if new is not None:
            order = state_dict.get(prefix + "perm")
            self.perm = None if order is None else torch.empty_like(order)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _misfit(self, packed: Any) -> str | None:
        """What is wrong with `packed` as the weight of this module, or None."""
        if not isinstance(packed, Tensor):
            return f"expected a packed weight (a uint8 tensor), got a {type(packed).__name__}"
        try:
            header = ops.describe(packed)
        except RuntimeError as error:
            return str(error)
        if (header.n, header.k) != self._packed_shape():
            n, k = self._packed_shape()
            return f"expected a packed weight of {n} x {k}, got one of {header.n} x {header.k}"
        return None


class Linear(PackedModule):
    """y = x w^T + bias with a packed w: what `optimize` puts in the place of an `nn.Linear`.

    The weight is frozen; x gets a gradient, for adapters that are trained beside it. The result has
    the dtype of x; how x is treated (rounded to int8 per group or not) was decided when w was
    packed.

    Attributes:
        in_features: K.
        out_features: N.
        bias: [N], float32, bfloat16 or float16, or None.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Makes a module without a weight yet, to load a state dict into; see `from_packed`."""
        super().__init__(dtype)
        self.in_features = in_features
        self.out_features = out_features
        values = nn.Parameter(torch.zeros(out_features, dtype=dtype), False) if bias else None
        self.register_parameter("bias", values)

    @classmethod
    def from_packed(
        cls,
        packed: Tensor,
        bias: nn.Parameter | None = None,
        dtype: torch.dtype = torch.float32,
        perm: Tensor | None = None,
    ) -> Linear:
        """Returns a module that computes with `packed`, uint8 [bytes], and shares it.

        Args:
            packed: A packed weight.
            bias: [N], float32, bfloat16 or float16; shared too.
            dtype: What `weight.dtype` says: that of the weight that was packed.
            perm: See the attribute; shared too.
        """
        header = ops.describe(packed)
        module = cls(header.k, header.n, bias=False, dtype=dtype)
        module.packed, module.perm = packed, perm
        module.register_parameter("bias", bias)
        return module.eval()

    def _weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def _set_weight_shape(self, n: int, k: int) -> None:
        self.out_features, self.in_features = n, k

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., N] for x of [..., K]; any leading dimensions."""
        return packed_linear(x, self.packed, self.out_features, self.bias, self.perm)

    def extra_repr(self) -> str:
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, bias={bias}, {self.format()}"


class Embedding(PackedModule):
    """y = w[ids] with a packed w: what `optimize` puts in the place of an `nn.Embedding`.

    A tied output layer shares `packed`. Rows are dequantized as they are looked up.

    Attributes:
        num_embeddings: N.
        embedding_dim: K.
        padding_idx: As in `nn.Embedding`, where it concerns gradients alone: kept for code that
            reads it.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Makes a module without a weight yet, to load a state dict into; see `from_packed`."""
        super().__init__(dtype)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx

    @classmethod
    def from_packed(
        cls, packed: Tensor, padding_idx: int | None = None, dtype: torch.dtype = torch.float32
    ) -> Embedding:
        """Returns a module that looks up rows of `packed`, uint8 [bytes], and shares it.

        Args:
            packed: A packed weight.
            padding_idx: See the attribute.
            dtype: That of the result.
        """
        header = ops.describe(packed)
        module = cls(header.n, header.k, padding_idx, dtype)
        module.packed = packed
        return module.eval()

    def _weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def _set_weight_shape(self, n: int, k: int) -> None:
        self.num_embeddings, self.embedding_dim = n, k

    def forward(self, ids: Tensor) -> Tensor:
        """Returns [..., K] for ids of [...], int64 or int32."""
        y: Tensor = _embedding(ids, self.packed, self.embedding_dim, self.dtype)
        return y

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self.format()}"
