"""Interleaved timing: candidates take turns, so that a drifting machine drifts for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def best(self) -> float:
        return min(self.samples)


def interleaved(
    candidates: Mapping[str, Callable[[int], object]], *, budget: float, rounds: int = 5
) -> dict[str, Timing]:
    """Times `candidates`, each called with a running index (to rotate its weights), in turns.

    A candidate's turn is one call or about 20 ms of calls, so that a round costs all of them alike.

    Args:
        candidates: name to function of a call index.
        budget: seconds for all rounds of all candidates together.
        rounds: least number of rounds.
    """
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    index = dict.fromkeys(candidates, 1)
    for call in candidates.values():
        call(0)
    end = time.perf_counter() + budget
    while time.perf_counter() < end or min(map(len, samples.values())) < rounds:
        for name, call in candidates.items():
            turn_end = time.perf_counter() + 0.02
            while True:
                start = time.perf_counter()
                call(index[name])
                now = time.perf_counter()
                samples[name].append(now - start)
                index[name] += 1
                if now > turn_end:
                    break
    return {name: Timing(tuple(times)) for name, times in samples.items()}
