"""How one model's predictions differ from another's, token by token, and how sure a mean is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Estimate", "Tokens", "compare", "cross_entropy", "mean_of_chunks"]

_POSITIONS = 256  # compared at a time: what is computed on the way is as large as the logits
_TOP = 5
_Z95 = 1.959963984540054
# Two-sided 95 % points of Student's t with 1 and 2 degrees of freedom, where the series is poor.
_T95 = {1: 12.706, 2: 4.303}


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % confidence interval, over chunks of text."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.5g} [{self.low:.5g}, {self.high:.5g}]"


@dataclass(frozen=True)
class Tokens:
    """What two models say after each of T tokens.

    Attributes:
        kl: KL(reference || model) = sum p_ref (log p_ref - log p), in nats, float64 [T].
        choice: The model's first choice, int64 [T].
        reference_choice: The reference's.
        shared: How many of the reference's first five are among the model's, int64 [T].
        p: What the model gives the reference's first choice, float32 [T].
        reference_p: What the reference gives it.
    """

    kl: Tensor
    choice: Tensor
    reference_choice: Tensor
    shared: Tensor
    p: Tensor
    reference_p: Tensor


def compare(reference: Tensor, logits: Tensor) -> Tokens:
    """Compares logits, float32 [T, V] each; rounding makes a `kl` off by some 1e-7."""
    parts: list[tuple[Tensor, ...]] = []
    for r, x in zip(_pieces(reference), _pieces(logits), strict=True):
        log_r, log_p = r.log_softmax(-1), x.log_softmax(-1)
        kl = (log_r.exp() * (log_r - log_p)).sum(-1, dtype=torch.float64)
        top = min(_TOP, r.shape[-1])
        firsts, others = r.topk(top).indices, x.topk(top).indices
        shared = (firsts[:, :, None] == others[:, None, :]).sum((1, 2))
        choice = r.argmax(-1, keepdim=True)
        p, reference_p = (log.gather(-1, choice).exp()[:, 0] for log in (log_p, log_r))
        parts.append((kl, x.argmax(-1), choice[:, 0], shared, p, reference_p))
    return Tokens(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _pieces(logits: Tensor) -> tuple[Tensor, ...]:
    return torch.split(logits, _POSITIONS)


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Returns, float64 [T - 1], what each next token of ids [T] costs in nats."""
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    return loss.double()


def mean_of_chunks(sums: list[float], counts: list[int]) -> Estimate:
    """The mean over all tokens, given the sum and the number of tokens of every chunk.

    The tokens of a chunk depend on each other, chunks do not: the interval is that of a ratio of
    sums over chunks, with Student's t. One chunk has no interval: it is infinite.
    """
    total, n = sum(counts), len(sums)
    mean = sum(sums) / total
    if n < 2:
        return Estimate(mean, -float("inf"), float("inf"))
    squares = sum((s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True))
    error = (squares * n / (n - 1)) ** 0.5 / total
    half = _t95(n - 1) * error
    return Estimate(mean, mean - half, mean + half)


def _t95(freedom: int) -> float:
    """The two-sided 95 % point of Student's t (Abramowitz and Stegun, 26.7.5)."""
    if freedom in _T95:
        return _T95[freedom]
    z, v = _Z95, float(freedom)
    series = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    series += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return series
