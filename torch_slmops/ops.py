"""The ops of `torch.ops.slmops`: for each a typed wrapper and, beside it, its fake for tracing.

The ops run on CPU tensors and are for inference: they have no gradient. `torch_slmops.reference`
defines each of them in plain torch, bit for bit; docs/arithmetic.md says it in words. All errors
are `RuntimeError`s that say what was expected and what came, except where noted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException

import torch_slmops.isa  # noqa: F401 - loads the extension, which defines the ops

__all__ = [
    "Header",
    "describe",
    "embedding",
    "linear",
    "pack_",
    "packed_bytes",
    "qkv_rotary",
    "quantize",
    "rms_norm",
    "rotary",
    "swiglu",
    "unpack",
]

_Function = TypeVar("_Function", bound=Callable[..., object])

_ops: Any = torch.ops.slmops
_SUB_GROUP = 16


def _fake(op: str) -> Callable[[_Function], _Function]:
    """Makes a function the fake of `slmops::<op>`: the shapes and dtypes without the values."""
    if not hasattr(_ops, op):  # no C++ yet: tests/python_ops.py defines it
        return lambda function: function
    register: Any = torch.library.register_fake
    decorator: Callable[[_Function], _Function] = register(f"slmops::{op}")
    return decorator


def quantize(
    w: Tensor,
    bits: int,
    scale_kind: str,
    group_size: int,
    symmetric: bool,
    search: str,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chooses codes and scales so that `scale * (code - zero_point)` is near `w`.

    docs/arithmetic.md, section "Choosing codes", defines the choice. `quantize_weight` is the
    friendlier form.

    Args:
        w: Weight [N, K], float32, bfloat16 or float16, finite.
        bits: 4 (codes 0..15) or 8 (0..255).
        scale_kind: "group" (one 16-bit scale per `group_size` inputs) or "sub16" (one fp32 scale
            per output times a 4-bit one per 16 inputs; 4 bits, symmetric).
        group_size: Inputs that share a scale, or -1 for all K; 16 or -1 for "sub16".
        symmetric: The zero point is 8 (128 for 8 bits); otherwise a code is chosen per group.
        search: "mse" (least squared error) or "absmax" (from the largest |w| of a group).
        importance: Weights of the squared errors per input, float32 [K], not negative.

    Returns:
        `codes` uint8 [N, K]; `scale` float16, or bfloat16 where float16 lacks the range, [N, G]
        with G = ceil(K / group_size), or float32 [N] for "sub16"; `zero_point` int16 [N, G], empty
        if symmetric; `sub_scale` uint8 [N, ceil(K / 16)] with 0..15, empty for "group".
    """
    parts: tuple[Tensor, Tensor, Tensor, Tensor] = _ops.quantize.default(
        w, bits, scale_kind, group_size, symmetric, search, importance
    )
    return parts


@_fake("quantize")
def _quantize_fake(
    w: Tensor,
    bits: int,
    scale_kind: str,
    group_size: int,
    symmetric: bool,
    search: str,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if scale_kind != "sub16":  # whether the scales are float16 or bfloat16 is up to the values
        raise DataDependentOutputException(_ops.quantize.default)
    n, k = w.shape
    return (
        w.new_empty((n, k), dtype=torch.uint8),
        w.new_empty((n,), dtype=torch.float32),
        w.new_empty((0,), dtype=torch.int16),
        w.new_empty((n, (k + _SUB_GROUP - 1) // _SUB_GROUP), dtype=torch.uint8),
    )


def pack_(
    out: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    sub_scale: Tensor | None,
    bits: int,
    group_size: int,
    act_group: int,
    activations: str,
) -> None:
    """Writes a weight in the packed layout (docs/packed-format.md) into `out`.

    Args:
        out: uint8 [`packed_bytes(...)`], contiguous. Overwritten; after an error it holds no
            packed weight.
        codes: uint8 [N, K], 0..15 or 0..255.
        scale: float16 or bfloat16 [N, ceil(K / group_size)]; float32 [N] beside `sub_scale`.
        zero_point: Like `scale`, int16 (0..15 or 0..255) or of the scale's dtype; None or empty
            for the symmetric 8 or 128.
        sub_scale: uint8 [N, ceil(K / 16)], 0..15, for scale kind "sub16"; else None or empty.
        bits: 4 or 8.
        group_size: A multiple of 32, or -1 for all K; 16 or -1 beside `sub_scale`.
        act_group: Inputs that share an activation scale: 32, 64, 128 or -1 (all K); a multiple or
            a divisor of the group.
        activations: "int8" or "float": how `linear` treats its input.
    """
    _ops.pack_.default(
        out, codes, scale, zero_point, sub_scale, bits, group_size, act_group, activations
    )


@_fake("pack_")
def _pack_fake(
    out: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    sub_scale: Tensor | None,
    bits: int,
    group_size: int,
    act_group: int,
    activations: str,
) -> None:
    return None


def unpack(packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the plain tensors of a packed weight, as `pack_` took them.

    Args:
        packed: uint8 [bytes], a packed weight.

    Returns:
        `codes`, `scale`, `zero_point`, `sub_scale` as in `quantize`; a floating `zero_point` has
        the scale's dtype. What the weight does not have is empty, of shape [0].
    """
    parts: tuple[Tensor, Tensor, Tensor, Tensor] = _ops.unpack.default(packed)
    return parts


@_fake("unpack")
def _unpack_fake(packed: Tensor) -> NoReturn:
    raise DataDependentOutputException(_ops.unpack.default)  # shapes and dtypes are in the header


def linear(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    perm: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y[..., n] = sum over k of x[..., k] * w[n, k] + bias[n], with w packed.

    For a weight packed with activations "int8", x is rounded to int8 per activation group and the
    products are summed as integers; with "float" x is taken as it is. The sums are float32 in a
    fixed order, rounded once to the result's dtype: the same bits on every CPU, for every number
    of threads and rows. A row with a NaN or an infinity gives NaN in "int8" mode.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides.
        packed: uint8 [bytes], a packed weight of N outputs and K inputs.
        out_features: N.
        bias: [N], float32, bfloat16 or float16.
        perm: int64 [K], the input that each column of w belongs to: x[..., perm] is multiplied.
        out_dtype: dtype of the result; that of `x` by default.

    Returns:
        [..., N], contiguous.
    """
    if x.requires_grad and torch.is_grad_enabled():
        refuse_gradient("linear")
    y: Tensor = _ops.linear.default(x, packed, out_features, bias, perm, out_dtype)
    return y


@_fake("linear")
def _linear_fake(
    x: Tensor,
    packed: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    perm: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _same_device("linear", "x", x, packed)
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype or x.dtype)


def embedding(ids: Tensor, packed: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """y[..., k] = w[ids[...], k], with w packed; one rounding to `dtype`.

    Args:
        ids: [...], int64 or int32, each in 0..N-1.
        packed: uint8 [bytes], a packed weight of N rows and K columns.
        dim: K.
        dtype: dtype of the result: float32, bfloat16 or float16.

    Returns:
        [..., K], contiguous.
    """
    y: Tensor = _ops.embedding.default(ids, packed, dim, dtype)
    return y


@_fake("embedding")
def _embedding_fake(ids: Tensor, packed: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    _same_device("embedding", "ids", ids, packed)
    return ids.new_empty((*ids.shape, dim), dtype=dtype)


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (offset + weight), over the last dimension.

    Args:
        x: [..., K], float32, bfloat16 or float16.
        weight: [K], float32, bfloat16 or float16.
        eps: Added to the mean of the squares.
        offset: Added to the weight: 1 for models that store the weight minus one, else 0.
        cast_before_weight: Rounds to the dtype of x before the multiplication by the weight.
        out_dtype: dtype of the result; that of `x` by default.

    Returns:
        [..., K], contiguous.
    """
    y: Tensor = _ops.rms_norm.default(x, weight, eps, offset, cast_before_weight, out_dtype)
    return y


@_fake("rms_norm")
def _rms_norm_fake(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return x.new_empty(x.shape, dtype=out_dtype or x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary position embedding: y_i = x_i cos_i - x_j sin_i, y_j = x_j cos_j + x_i sin_j.

    Args:
        x: [B, L, H, D], float32, bfloat16 or float16.
        cos: [B or 1, L, R], float32; R is even and at most D: what is beyond passes through.
        sin: Likewise.
        interleaved: The pairs (i, j) are (2p, 2p + 1); otherwise (p, p + R / 2).

    Returns:
        [B, L, H, D] of the dtype of x, contiguous.
    """
    y: Tensor = _ops.rotary.default(x, cos, sin, interleaved)
    return y


@_fake("rotary")
def _rotary_fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return x.new_empty(x.shape)


def qkv_rotary(
    x: Tensor,
    packed: Tensor,
    heads_q_k_v: Sequence[int],
    head_dim: int,
    bias: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    perm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v = linear(x), then norm and rotary of q and k; all in float32, rounded once.

    Args:
        x: [B, L, K], float32, bfloat16 or float16.
        packed: uint8 [bytes], a packed weight whose rows are those of q, k and v in this order.
        heads_q_k_v: The numbers of heads.
        head_dim: D.
        bias: [N] with N = the sum of the heads times D, or None.
        q_norm: RMS norm weight of each head, [D], or of all of q, [heads * D]; None for no norm.
        k_norm: Likewise.
        eps, offset, cast_before_weight: As in `rms_norm`, whose x is float32 here: nothing is
            rounded in between.
        cos, sin, interleaved: As in `rotary`; None for no rotary embedding.
        perm: As in `linear`.

    Returns:
        q, k, v: [B, L, heads, D] of the dtype of x, contiguous.
    """
    parts: tuple[Tensor, Tensor, Tensor] = _ops.qkv_rotary.default(
        x,
        packed,
        heads_q_k_v,
        head_dim,
        bias,
        q_norm,
        k_norm,
        eps,
        offset,
        cast_before_weight,
        cos,
        sin,
        interleaved,
        perm,
    )
    return parts


@_fake("qkv_rotary")
def _qkv_rotary_fake(
    x: Tensor,
    packed: Tensor,
    heads_q_k_v: Sequence[int],
    head_dim: int,
    bias: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    offset: float,
    cast_before_weight: bool,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    perm: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _same_device("qkv_rotary", "x", x, packed)
    q, k, v = (x.new_empty((*x.shape[:-1], heads, head_dim)) for heads in heads_q_k_v)
    return q, k, v


def swiglu(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    hidden: int,
    out_features: int,
    activation: str,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """y = down(activation(gate(x)) * up(x)); float32 between the projections, rounded once.

    Args:
        x: [..., K], float32, bfloat16 or float16.
        gate_up: uint8 [bytes], a packed weight of 64 * ceil(hidden / 32) rows: 32 of the gate, 32
            of up, alternating; what pads each to a multiple of 32 has the scale 0.
        down: uint8 [bytes], a packed weight of `out_features` rows and `hidden` inputs.
        hidden: Rows of the gate, and of up.
        out_features: N.
        activation: "silu", "gelu_tanh", "gelu" or "relu2".
        gate_up_bias: [2 * hidden], the gate's, then up's.
        down_bias: [N].

    Returns:
        [..., N] of the dtype of x, contiguous.
    """
    y: Tensor = _ops.swiglu.default(
        x, gate_up, down, hidden, out_features, activation, gate_up_bias, down_bias
    )
    return y


@_fake("swiglu")
def _swiglu_fake(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    hidden: int,
    out_features: int,
    activation: str,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    _same_device("swiglu", "x", x, gate_up)
    return x.new_empty((*x.shape[:-1], out_features))


class Header(NamedTuple):
    """What a packed weight says about itself; the sizes are numbers of weights."""

    bits: int
    scale_kind: str
    scale_dtype: torch.dtype
    zero_kind: str
    activations: str
    n: int
    k: int
    group_size: int
    act_group: int
    total_bytes: int

    def __str__(self) -> str:
        kind = "sub16" if self.scale_kind == "sub16" else f"group {self.group_size}"
        zero = {"none": "", "int16": ", zero points", "float": ", float zero points"}
        act = f"int8 activations per {self.act_group}"
        rest = act if self.activations == "int8" else f"{self.activations} activations"
        return f"int{self.bits} {kind}{zero[self.zero_kind]}, {rest}"


def describe(packed: Tensor) -> Header:
    """Returns the header of a packed weight, uint8 [bytes], after checking all of it."""
    bits, kind, dtype, zero, activations, *sizes = _ops._describe.default(packed)
    return Header(
        bits,
        ("group", "sub16")[kind],
        (torch.float16, torch.bfloat16, torch.float32)[dtype],
        ("none", "int16", "float")[zero],
        ("int8", "float", "float_fast")[activations],
        *sizes,
    )


def packed_bytes(
    n: int,
    k: int,
    bits: int,
    scale_kind: str,
    has_zero_point: bool,
    group_size: int,
    act_group: int,
) -> int:
    """Returns the length of the buffer that `pack_` wants for a weight of `n` x `k`.

    The arguments are those of `quantize` and `pack_`.
    """
    size: int = _ops._packed_bytes.default(
        n, k, bits, scale_kind, has_zero_point, group_size, act_group
    )
    return size


def refuse_gradient(op: str) -> NoReturn:
    """Raises the error of an input that wants a gradient.

    The callers ask, not the op: an autograd kernel in Python would cost more than a small matmul.
    """
    raise RuntimeError(
        f"{op}: expected an x that does not require a gradient, as packed weights are for "
        "inference and give none. Call it under torch.no_grad() or torch.inference_mode(), or "
        "freeze what comes before with .requires_grad_(False)"
    )


def _same_device(op: str, name: str, x: Tensor, packed: Tensor) -> None:
    if x.device != packed.device:
        raise RuntimeError(
            f"{op}: expected {name} and packed on one device, got {x.device} and {packed.device}"
        )


def _refuse_device(op: str, device: str) -> Callable[..., NoReturn]:
    """The kernel of `op` for tensors on `device`: an error that says what to do."""

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(
            f"{op}: expected CPU tensors, got one on {device}: packed weights run on the CPU only. "
            'Move the model and its inputs back with .to("cpu"), or run the model that '
            "torch_slmops.optimize has not changed there."
        )

    return refuse


_library: Any = torch.library.Library("slmops", "IMPL")  # type: ignore[no-untyped-call]
for _op in ("linear", "embedding", "rms_norm", "rotary", "qkv_rotary", "swiglu"):
    for _device in ("CUDA", "MPS", "XPU"):
        _library.impl(_op, _refuse_device(_op, _device), _device)
