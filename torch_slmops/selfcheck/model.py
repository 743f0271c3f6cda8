"""A small language model that needs no file: its weights come from `Numbers`, its ops are ours.

Two layers of the structure of Llama, 24 tokens, bfloat16, int4 layers with int8 embedding and head.
Nothing but the ops of this package computes in it, so its logits are the same bits on every CPU and
in each of the three ways of computing them.
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
        self.blocks = [
            {
                "pre_attention_norm": norm(),
                "qkv": quantize_weight(weight(sum(_HEADS) * _HEAD_DIM, _WIDTH)).pack(),
                "output": quantize_weight(weight(_WIDTH, _HEADS[0] * _HEAD_DIM)).pack(),
                "pre_mlp_norm": norm(),
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

    def layers(self, compute: Any = ops) -> Tensor:
        """The same by the op of whole layers: half of the tokens at once, then one by one."""
        shape = (1, _HEADS[1], TOKENS, _HEAD_DIM)
        cache = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2 * _LAYERS)]
        parts = [
            layer.get(name, torch.empty(0)) for layer in self.blocks for name in ops.LAYER_PARTS
        ]
        half = TOKENS // 2
        logits: list[Tensor] = []
        for start, end in [(0, half), *((i, i + 1) for i in range(half, TOKENS))]:
            ids = self.ids[:, start:end]
            cos, sin = _tables(compute, start, ids.shape[1])
            x = compute.decoder_layers(
                compute.embedding(ids, self.embedding, _WIDTH, torch.bfloat16),
                parts,
                cache,
                torch.tensor(start),
                cos,
                sin,
                mask=None,
                position_ids=None,
                heads_q_k_v=_HEADS,
                head_dim=_HEAD_DIM,
                hidden=_HIDDEN,
                activation="silu",
                eps=_EPS,
                offset=0.0,
                cast_before_weight=True,
                qk_eps=0.0,
                qk_offset=0.0,
                interleaved=False,
                scale=_HEAD_DIM**-0.5,
            )
            x = compute.rms_norm(x, self.norm, _EPS, 0.0, True)
            logits.append(self._head(compute, x))
        return torch.cat(logits)

    def _head(self, compute: Any, x: Tensor) -> Tensor:
        logits: Tensor = compute.linear(x[0], self.embedding, VOCABULARY, None, None, torch.float32)
        return logits

    def _run(self, compute: Any, ids: Tensor, start: int, cache: list[Any]) -> Tensor:
        tables = _tables(compute, start, ids.shape[1])
        total = compute.embedding(ids, self.embedding, _WIDTH, torch.bfloat16)
        step = None
        for i, layer in enumerate(self.blocks):
            x, total = _norm(compute, step, total, layer["pre_attention_norm"])
            q, k, v = compute.qkv_rotary(
                x, layer["qkv"], _HEADS, _HEAD_DIM, None, None, None, 0.0, 0.0, *tables, False
            )
            if cache[i] is not None:
                k, v = (torch.cat(pair, 1) for pair in zip(cache[i], (k, v), strict=True))
            cache[i] = k, v
            mixed = compute.attention(q, k, v, None, None, True, 0, _HEAD_DIM**-0.5)
            step = compute.linear(mixed.flatten(2), layer["output"], _WIDTH)
            x, total = _norm(compute, step, total, layer["pre_mlp_norm"])
            step = compute.swiglu(x, layer["gate_up"], layer["down"], _HIDDEN, _WIDTH, "silu")
        x, total = _norm(compute, step, total, self.norm)
        return self._head(compute, x)


def _tables(compute: Any, start: int, length: int) -> tuple[Tensor, Tensor]:
    positions = torch.arange(start, start + length)[None]
    inv_freq = torch.tensor([2.0**-i for i in range(_HEAD_DIM // 2)], dtype=torch.float64)
    tables: tuple[Tensor, Tensor] = compute.rotary_table(positions, inv_freq, 1.0, False)
    return tables


def _norm(
    compute: Any, step: Tensor | None, total: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Adds what a block gave, if any, and norms: (normed, sum)."""
    if step is None:
        return compute.rms_norm(total, weight, _EPS, 0.0, True), total
    normed, total = compute.add_rms_norm(step, total, weight, _EPS, 0.0, True)
    return normed, total
