"""Rounding with error feedback: later inputs of an output make up for the errors of earlier ones.

For an output's weights w, inputs x and H = E[x x^T] = R R^T with R upper triangular, the error of
the output, E[((w - q) x)^2] = |(w - q) R|^2, has one term per column of R. Column by column,

    q_i = round(w_i + sum_{j<i} (w_j - q_j) R[j,i] / R[i,i])

makes each term as small as the codes allow. This is GPTQ (Frantar et al., 2022, arXiv:2210.17323)
written with the factor of H instead of that of its inverse; the codes are the same.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_slmops.weights import SUB_GROUP, QuantizedWeight

__all__ = ["Factor", "factorize", "feed_back"]

# Measured (docs/accuracy.md): the decoder likes 0.03 to 0.1, the encoder 0.1 or more.
DAMPING = 0.1
_COLUMNS = 128  # that one matrix product serves
_ROWS = 2048  # their columns of one block, in float64, fit the second-level cache
_ATTEMPTS = 8


@dataclass(frozen=True)
class Factor:
    """What feedback needs of H.

    Attributes:
        order: int64 [K], the inputs in the order in which they are rounded.
        ratio: float64 [K, K], R[j,i] / R[i,i] in that order; used where j < i.
    """

    order: Tensor
    ratio: Tensor


def factorize(hessian: Tensor, damping: float = DAMPING) -> Factor:
    """Factorizes H with `damping` times its mean diagonal added to the diagonal.

    Inputs with a larger mean square are rounded first: all others can make up for their errors.

    Args:
        hessian: H = E[x x^T], float32 or float64 [K, K], symmetric and finite. An input that is
            always 0 takes no part.
        damping: Not negative. More is tried where H is too singular for float64.

    Raises:
        ValueError: H is not finite.
    """
    if not bool(hessian.isfinite().all()):
        raise ValueError("calibration: expected finite activations, got an infinity or a NaN")
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True)
    mean = float(diagonal.double().mean()) or 1.0
    # A lower Cholesky factor of H in reversed order is R, reversed in both directions.
    backwards = order.flip(0)
    work = hessian[backwards][:, backwards].double()
    work.diagonal().masked_fill_(work.diagonal() <= 0, mean)
    extra = damping * mean
    for _ in range(_ATTEMPTS):
        work.diagonal().add_(extra)
        lower, failed = torch.linalg.cholesky_ex(work)
        if not bool(failed):
            break
        extra = 10 * max(extra, 1e-6 * mean)
    else:
        raise ValueError("calibration: the second moments of the activations are not positive")
    del work
    lower.div_(lower.diagonal().clone())
    return Factor(order, lower.flip(0, 1))


@dataclass(frozen=True)
class _Grid:
    """The values that codes stand for: step * (code - zero), per group and output, [G, N]."""

    group: int
    step: Tensor  # float64
    reciprocal: Tensor  # float32, as "Choosing codes" computes it
    zero: Tensor  # float32
    least: Tensor  # of code - zero, float32
    largest: Tensor

    @staticmethod
    def of(weight: QuantizedWeight) -> _Grid:
        top = (1 << weight.bits) - 1
        group = weight.shape[1] if weight.group_size == -1 else weight.group_size
        if weight.sub_scale is not None:
            step = weight.scale[:, None] * weight.sub_scale.float()
            exact = weight.scale.double()[:, None] * weight.sub_scale.double()
            group = SUB_GROUP
        else:
            step = weight.scale.float()
            exact = step.double()
        middle = float(1 << (weight.bits - 1))
        zero = torch.full_like(step, middle)
        if weight.zero_point is not None:
            zero = weight.zero_point.float()
        reciprocal = torch.where(step == 0, torch.zeros_like(step), 1 / step)
        parts = (exact, reciprocal, zero, -zero, top - zero)
        return _Grid(group, *(part.t().contiguous() for part in parts))

    def rows(self, start: int, stop: int) -> _Grid:
        """The grid of outputs start..stop-1."""
        parts = (self.step, self.reciprocal, self.zero, self.least, self.largest)
        return _Grid(self.group, *(part[:, start:stop].contiguous() for part in parts))


def feed_back(w: Tensor, start: QuantizedWeight, factor: Factor) -> QuantizedWeight:
    """Returns `start` with codes chosen by error feedback; scales and zero points stay.

    With H a multiple of the identity the codes are those that `quantize_weight` chooses.

    Args:
        w: The weight, [N, K], float.
        start: `w` quantized: its scales, sub-scales and integer zero points are used.
        factor: Of H.
    """
    grid = _Grid.of(start)
    codes = torch.empty_like(start.codes)
    for first in range(0, w.shape[0], _ROWS):
        last = min(first + _ROWS, w.shape[0])
        codes[first:last] = _round_rows(w[first:last], grid.rows(first, last), factor)
    return dataclasses.replace(start, codes=codes)


def _round_rows(w: Tensor, grid: _Grid, factor: Factor) -> Tensor:
    """Codes, uint8 [N, K]."""
    order, ratio = factor.order, factor.ratio
    columns = w.t().double()[order]
    error = torch.empty_like(columns)
    codes = torch.empty(columns.shape, dtype=torch.uint8)
    inputs = order.tolist()
    for a in range(0, len(inputs), _COLUMNS):
        b = min(a + _COLUMNS, len(inputs))
        wanted = torch.addmm(columns[a:b], ratio[:a, a:b].t(), error[:a])
        inner = ratio[a:b, a:b].t().contiguous()
        for i in range(a, b):
            g = inputs[i] // grid.group
            target = torch.addmv(wanted[i - a], error[a:i].t(), inner[i - a, : i - a])
            q = (target.float() * grid.reciprocal[g]).round_()
            q = q.clamp_(grid.least[g], grid.largest[g])
            torch.addcmul(columns[i], grid.step[g], q.double(), value=-1, out=error[i])
            codes[inputs[i]] = q.add_(grid.zero[g]).to(torch.uint8)
    return codes.t()
