"""The cheapest choice of one option per piece whose costs together stay within a limit."""

from __future__ import annotations

import numpy as np

__all__ = ["allocate"]

_STEPS = 1 << 13  # that the limit is divided into; costs are rounded up to them


def allocate(costs: list[list[float]], prices: list[list[float]], limit: float) -> list[int] | None:
    """Chooses an option for each piece: the least sum of prices with a sum of costs <= limit.

    A multiple-choice knapsack, solved by dynamic programming over costs in steps of limit / 8192.
    Costs are rounded up to steps, so the result is within the limit, and it may miss one that is
    cheaper and comes within (pieces / 8192) of it.

    Args:
        costs: Of every option of every piece, not negative.
        prices: Likewise.
        limit: Positive.

    Returns:
        The option of each piece, or None if no choice is within the limit.
    """
    best = np.zeros(_STEPS + 1)  # the least price of the pieces so far, by steps used at most
    taken = []
    for piece_costs, piece_prices in zip(costs, prices, strict=True):
        options = np.full((len(piece_costs), _STEPS + 1), np.inf)
        for i, (cost, price) in enumerate(zip(piece_costs, piece_prices, strict=True)):
            steps = np.ceil(cost / limit * _STEPS)
            if steps <= _STEPS:
                used = int(steps)
                options[i, used:] = best[: _STEPS + 1 - used] + price
        taken.append(options.argmin(0))
        best = options.min(0)
    if not np.isfinite(best[-1]):
        return None
    chosen, left = [], _STEPS
    for piece_costs, options_taken in zip(reversed(costs), reversed(taken), strict=True):
        option = int(options_taken[left])
        chosen.append(option)
        left -= int(np.ceil(piece_costs[option] / limit * _STEPS))
    return chosen[::-1]
