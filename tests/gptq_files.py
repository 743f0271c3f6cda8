"""GPTQ and AWQ checkpoints by their documented layouts: the packages that write them need a GPU.

Codes, scales and zero points are random, so that every code and every zero point occurs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output whose code nibble i of a word is


def words(codes: Tensor, bits: int) -> Tensor:
    """Each row of codes as a stream of bits, the lowest first: int32 [rows, codes * bits / 32]."""
    rows = len(codes)
    single = (codes.numpy()[:, :, None] >> np.arange(bits)) & 1
    stream = np.packbits(single.reshape(rows, -1).astype(np.uint8), axis=1, bitorder="little")
    return torch.from_numpy(np.pad(stream, ((0, 0), (0, -stream.shape[1] % 4)))).view(torch.int32)


def random_layer(
    shape: tuple[int, int], bits: int, group: int, symmetric: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K], scales float16 [N, G] and zero points [N, G], both int64."""
    n, k = shape
    source = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else -(-k // group)
    codes = torch.randint(0, 1 << bits, (n, k), generator=source)
    scales = (torch.rand(n, groups, generator=source) * 0.05 + 1e-3).half()
    zeros = torch.full((n, groups), 1 << (bits - 1))
    if not symmetric:
        zeros = torch.randint(0, 1 << bits, (n, groups), generator=source)
    return codes, scales, zeros


def values(codes: Tensor, scales: Tensor, zeros: Tensor, index: Tensor) -> Tensor:
    """The weight, float32 [N, K]; index: the group of each input."""
    return (codes - zeros[:, index]).float() * scales.float()[:, index]


def gptq_layer(
    shape: tuple[int, int],
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    act_order: bool = False,
    version: int = 1,
    seed: int = 0,
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a layer, and the weight that they mean."""
    k = shape[1]
    codes, scales, zeros = random_layer(shape, bits, group, symmetric, seed)
    index = torch.zeros(k, dtype=torch.int64) if group == -1 else torch.arange(k) // group
    if act_order:
        # Layers with one input have one order: seeds of a block differ by less than 10.
        order = torch.randperm(k, generator=torch.Generator().manual_seed(seed // 10))
        index = index[order]
    if version == 1 and not symmetric:
        zeros = zeros + 1  # 1..16: what version 1 can say
    stored = zeros - 1 if version == 1 else zeros
    parts = {
        "qweight": words(codes, bits).T,
        "qzeros": words(stored.T, bits),
        "scales": scales.T,
        "g_idx": index.int(),
    }
    return parts, values(codes, scales, zeros, index)


def awq_layer(shape: tuple[int, int], group: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a layer, and the weight that they mean."""
    codes, scales, zeros = random_layer(shape, 4, group, False, seed)

    def packed(x: Tensor) -> Tensor:  # [N, ...] to [..., N / 8]
        return words(x.T.reshape(x.shape[1], -1, 8)[:, :, list(AWQ_ORDER)].flatten(1), 4)

    parts = {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales.T}
    index = torch.arange(shape[1]) // (shape[1] if group == -1 else group)
    return parts, values(codes, scales, zeros, index)
