"""Fuses a decoder that is written by hand in plain PyTorch: two rows describe it.

    python examples/custom_model.py

The model has random weights and the names of the first Llama code (wq, wk, wv, wo, w1, w2, w3):
no family that torch_slmops knows has those. `register_family` tells what they are; `optimize`
compares that with what the modules compute, and fuses them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import torch_slmops
from torch_slmops.families import Attention, GatedMLP

VOCABULARY, WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS = 500, 192, 520, 4, 6, 2
HEAD_DIM = WIDTH // HEADS
LENGTH = 128


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-5
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return (wide * scale * self.weight).to(x.dtype)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head_dim = HEAD_DIM
        self.wq = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.wk = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.wv = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, bias=False)
        self.wo = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.wq, self.wk, self.wv)
        )
        return attend(self, rotate(q, cos, sin), rotate(k, cos, sin), v)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.w2 = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.w3 = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.w2(functional.silu(self.w1(x)) * self.w3(x))
        return y


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention": SelfAttention(),
                    "feed_forward": FeedForward(),
                    "attention_norm": Norm(),
                    "feed_forward_norm": Norm(),
                }
            )
            for _ in range(LAYERS)
        )
        self.norm = Norm()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        angles = torch.arange(LENGTH)[:, None] * 10000.0 ** (-torch.arange(0, 1, 2 / HEAD_DIM))
        angles = torch.cat([angles, angles], -1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.layers:
            x = x + layer["attention"](layer["attention_norm"](x), cos, sin)
            x = x + layer["feed_forward"](layer["feed_forward_norm"](x))
        y: Tensor = self.head(self.norm(x))
        return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates element i with element i + HEAD_DIM / 2, for x of [B, L, heads, HEAD_DIM]."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The rest of the attention: [B, L, WIDTH] from [B, L, heads, HEAD_DIM]."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    out: Tensor = module.wo(y.transpose(1, 2).flatten(2))
    return out


# How to describe it -------------------------------------------------------------------------------


def fused_forward(
    module: Any, qkv: Callable[..., tuple[Tensor, ...]], x: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """SelfAttention.forward, with q, k and v from the fused op: already rotated."""
    q, k, v = qkv(x, (cos, sin))
    return attend(module, q, k, v)


def probe_inputs(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments on which optimize compares SelfAttention.forward with fused_forward."""
    x, angles = torch.linspace(-1, 1, 3 * WIDTH).view(1, 3, WIDTH), torch.rand(3, HEAD_DIM)
    return (x.sin(), angles.cos(), angles.sin()), {}


def register() -> None:
    torch_slmops.register_family(
        Attention(
            "first llama",
            projections=("wq", "wk", "wv"),
            output="wo",
            forward=fused_forward,
            inputs=probe_inputs,
        ),
        GatedMLP("first llama MLP", gate_up=("w1", "w3"), down="w2", activation="silu"),
    )


def make_model() -> Decoder:
    """Returns the model in float32, with random weights that are always the same."""
    torch.manual_seed(0)
    return Decoder().eval()


def main() -> None:
    register()
    model = make_model()
    optimized = torch_slmops.optimize(copy.deepcopy(model))
    print(torch_slmops.report(optimized))
    ids = torch.randint(VOCABULARY, (2, 64))
    with torch.inference_mode():
        log_p, log_q = (m(ids).log_softmax(-1) for m in (model, optimized))
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    print(f"\nagainst float32, mean over {ids.numel()} tokens: KL {divergence:.6f} nats")


if __name__ == "__main__":
    main()
