"""A small language model that needs no file: its weights come from `Numbers`, its ops are ours.

Two layers of the structure of Llama, 24 tokens, bfloat16, int4 layers with int8 embedding and head.
Nothing but the ops of this package computes in it, so its logits are the same bits on every CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_slmops import ops
from torch_slmops.packed_rows import interleave
from torch_slmops.selfcheck.numbers import Numbers
from torch_slmops.weights import quantize_weight

__all__ = ["TOKENS", "VOCABULARY", "Model"]

TOKENS, VOCABULARY = 24, 320
_LAYERS, _WIDTH, _HIDDEN = 2, 128, 224
_HEADS, _HEAD_DIM = [8, 4, 4], 16
_EPS = 2.0**-20


class Model:
    """The model; `compute` is `torch_slmops.ops` or `torch_slmops.reference`."""

    def __init__(self) -> None:
        numbers = Numbers(10)

        def weight(n: int, k: int) -> Tensor:
            return numbers.values(n, k) / 8

        def norm() -> Tensor:
            return (numbers.values(_WIDTH) / 4 + 1).bfloat16()

        self.embedding = quantize_weight(weight(VOCABULARY, _WIDTH), 8).pack()
        self.layers = [
            {
                "input_norm": norm(),
                "qkv": quantize_weight(weight(sum(_HEADS) * _HEAD_DIM, _WIDTH)).pack(),
                "out": quantize_weight(weight(_WIDTH, _HEADS[0] * _HEAD_DIM)).pack(),
                "norm": norm(),
                "gate_up": interleave(quantize_weight(weight(2 * _HIDDEN, _WIDTH))).pack(),
                "down": quantize_weight(weight(_WIDTH, _HIDDEN)).pack(),
            }
            for _ in range(_LAYERS)
        ]
        self.norm = norm()
        self.ids = numbers.integers(VOCABULARY - 1, 1, TOKENS)

    def prefill(self, compute: Any = ops) -> Tensor:
        """float32 [TOKENS, VOCABULARY]: the logits, all tokens in one call of each op."""
        return self._run(compute, self.ids, 0, [None] * _LAYERS)

    def decode(self, compute: Any = ops) -> Tensor:
        """The same, token by token with a cache."""
        cache: list[Any] = [None] * _LAYERS
        tokens = [self.ids[:, i : i + 1] for i in range(TOKENS)]
        return torch.cat([self._run(compute, ids, i, cache) for i, ids in enumerate(tokens)])

    def _run(self, compute: Any, ids: Tensor, start: int, cache: list[Any]) -> Tensor:
        positions = torch.arange(start, start + ids.shape[1])[None]
        inv_freq = torch.tensor([2.0**-i for i in range(_HEAD_DIM // 2)], dtype=torch.float64)
        tables = compute.rotary_table(positions, inv_freq, 1.0, False)
        total = compute.embedding(ids, self.embedding, _WIDTH, torch.bfloat16)
        step = None
        for i, layer in enumerate(self.layers):
            x, total = _norm(compute, step, total, layer["input_norm"])
            q, k, v = compute.qkv_rotary(
                x, layer["qkv"], _HEADS, _HEAD_DIM, None, None, None, 0.0, 0.0, *tables, False
            )
            if cache[i] is not None:
                k, v = (torch.cat(pair, 1) for pair in zip(cache[i], (k, v), strict=True))
            cache[i] = k, v
            mixed = compute.attention(q, k, v, None, None, True, 0, _HEAD_DIM**-0.5)
            step = compute.linear(mixed.flatten(2), layer["out"], _WIDTH)
            x, total = _norm(compute, step, total, layer["norm"])
            step = compute.swiglu(x, layer["gate_up"], layer["down"], _HIDDEN, _WIDTH, "silu")
        x, total = _norm(compute, step, total, self.norm)
        head = compute.linear(x, self.embedding, VOCABULARY, None, None, torch.float32)
        logits: Tensor = head[0]
        return logits


def _norm(
    compute: Any, step: Tensor | None, total: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Adds what a block gave, if any, and norms: (normed, sum)."""
    if step is None:
        return compute.rms_norm(total, weight, _EPS, 0.0, True), total
    normed, total = compute.add_rms_norm(step, total, weight, _EPS, 0.0, True)
    return normed, total
