"""Modules that no family row knows, spelled in several ways, for tests of the graph rewrites."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_slmops import optimize

K, HIDDEN = 96, 72

Activation = Callable[[Tensor], Tensor]
# Name: kind of our op, and a way to spell it.
ACTIVATIONS: dict[str, tuple[str, Activation]] = {
    "silu": ("silu", F.silu),
    "SiLU": ("silu", nn.SiLU()),
    "sigmoid": ("silu", lambda x: x * torch.sigmoid(x)),
    "sigmoid method": ("silu", lambda x: x.sigmoid().mul(x)),
    "gelu": ("gelu", F.gelu),
    "gelu_tanh": ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
}


class MLP(nn.Module):
    """w2(activation(w1(x)) * w3(x)); with `whole`, w1 gives both factors."""

    def __init__(self, activation: Activation, whole: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.w1 = nn.Linear(K, 2 * HIDDEN if whole else HIDDEN, bias)
        self.w3 = None if whole else nn.Linear(K, HIDDEN, bias)
        self.w2 = nn.Linear(HIDDEN, K, bias)
        self.activation = activation

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.w3 is None:
            gate, up = self.w1(x).chunk(2, dim=-1)
            return gate, up
        return self.w1(x), self.w3(x)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.factors(x)
        y: Tensor = self.w2(up * self.activation(gate))
        return y


class Parallel(nn.Module):
    """Several linears with one input."""

    def __init__(self, *sizes: int, bias: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(K, size, bias) for size in sizes)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def rotate_by_slices(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate_by_chunks(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([second.neg(), first], -1)


class Decoder(nn.Module):
    """A layer with q, k, v, rotary embedding, attention and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(K, K), nn.Linear(K, 32), nn.Linear(K, 32)
        self.out = nn.Linear(K, K)
        self.mlp = MLP(F.silu)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = [y.view(batch, length, -1, 16).transpose(1, 2) for y in map_all(self, x)]
        q, k = (y * cos + rotate_by_slices(y) * sin for y in heads[:2])
        y = F.scaled_dot_product_attention(q, k, heads[2], is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, -1))
        z: Tensor = x + self.mlp(x)
        return z


def map_all(module: Decoder, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return module.a(x), module.b(x), module.c(x)


def packed(module: nn.Module, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    """The module with its linears packed and nothing fused."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return optimize(module.eval().to(dtype), fuse=False, progress=False, **options)  # type: ignore
