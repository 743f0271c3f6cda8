"""`linear` in the formats that matter, on copies of a weight that no cache holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from torch_slmops import memory
from torch_slmops.weights import QuantizedWeight, quantize_weight

__all__ = ["KERNELS", "ROTATED_BYTES", "Candidate", "Kernel", "dense", "ours", "rotated"]

ROTATED_BYTES = 512 << 20

Call = Callable[[Tensor, int], object]


@dataclass(frozen=True)
class Kernel:
    """One of our weight formats."""

    name: str
    bits: int
    scale_kind: str
    group_size: int
    act_group: int


KERNELS = (
    Kernel("sub16 a128", 4, "sub16", 16, 128),
    Kernel("int4 g32 a128", 4, "group", 32, 128),
    Kernel("int8 g32 a32", 8, "group", 32, 32),
    Kernel("int8 per output", 8, "group", -1, -1),
)


@dataclass(frozen=True)
class Candidate:
    """Something to time on `[rows, k]` bf16 activations; `bytes` of its weight where it is ours."""

    call: Call
    most_rows: int = 512
    bytes: int | None = None


def rotated(
    weight: Tensor,
    clone: Callable[[Tensor], Tensor] = Tensor.clone,
    total: int = ROTATED_BYTES,
) -> list[Tensor]:
    """Copies of a weight, `total` bytes in all, so that no call finds its weight in a cache."""
    count = max(1, total // (weight.numel() * weight.element_size()))
    return [weight, *(clone(weight) for _ in range(count - 1))]


def dense(weight: Tensor, total: int = ROTATED_BYTES) -> Candidate:
    """torch's bf16 `linear` on copies of `weight`."""
    copies = rotated(weight.bfloat16(), total=total)
    return Candidate(lambda x, i: torch.nn.functional.linear(x, copies[i % len(copies)]))


def assert_right(kernel: Kernel, quantized: Tensor, packed: Tensor) -> None:
    """Refuses a kernel whose output leaves the bound of its activation rounding.

    A code is off by at most half a step, s_a / 2, so an output is off by at most the sum over k of
    |w| * s_a / 2, plus fp32 rounding, for which a hundredth of that is ample.
    """
    n, k = quantized.shape
    x = torch.randn(3, k)
    y = torch.ops.slmops.linear(x, packed, n).double()
    act_group = kernel.act_group if kernel.act_group > 0 else x.shape[1]
    groups = x.double().view(len(x), -1, act_group)
    half_step = groups.abs().amax(2, keepdim=True) / 254
    bound = half_step.expand_as(groups).flatten(1) @ quantized.double().abs().T
    error = (y - x.double() @ quantized.double().T).abs()
    if not bool((error <= 1.01 * bound).all()):
        raise RuntimeError(f"{kernel.name}: output is wrong (error {error.max():.3g}); not timed")


def ours(weight: Tensor, total: int = ROTATED_BYTES) -> dict[str, Candidate]:
    """Our kernels on copies of `weight`, `total` bytes each, and each checked."""

    def clone(packed: Tensor) -> Tensor:
        return memory.empty(packed.numel()).copy_(packed)

    def call(copies: list[Tensor], x: Tensor, index: int) -> object:
        return torch.ops.slmops.linear(x, copies[index % len(copies)], weight.shape[0])

    candidates = {}
    for kernel in KERNELS:
        quantized = quantize_weight(weight, kernel.bits, kernel.scale_kind, kernel.group_size)
        packed = quantized.pack(act_group=kernel.act_group)
        assert_right(kernel, quantized.dequantize()[:1024], _first_rows(quantized, kernel))
        run = partial(call, rotated(packed, clone, total))
        candidates[kernel.name] = Candidate(run, bytes=packed.numel())
    return candidates


def _first_rows(quantized: QuantizedWeight, kernel: Kernel) -> Tensor:
    part = QuantizedWeight.from_parts(
        quantized.codes[:1024].contiguous(),
        quantized.scale[:1024].contiguous(),
        sub_scale=None if quantized.sub_scale is None else quantized.sub_scale[:1024].contiguous(),
        bits=kernel.bits,
        group_size=kernel.group_size,
    )
    return part.pack(act_group=kernel.act_group)
