"""What the measurements say: rates, and ratios within rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from benchmarks.engines.session import MOST_OTHERS, Case

OURS = "slmops int4"


@dataclass(frozen=True)
class Spread:
    """Measurements of one thing."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def text(self, digits: int) -> str:
        low, high = min(self.values), max(self.values)
        return f"{self.median:.{digits}f} [{low:.{digits}f}-{high:.{digits}f}]"


def rate(record: dict[str, Any]) -> float:
    """Tokens per second: of generating, or where nothing was generated, of reading the prompt."""
    if record["new"]:
        return record["new"] * record["batch"] / record["rest_s"]
    return record["context"] * record["batch"] / record["first_s"]


def case_of(record: dict[str, Any]) -> str:
    return Case(record["context"], record["new"], record["batch"]).name


def quiet(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records during which no other process computed."""
    return [record for record in records if record["others"] <= MOST_OTHERS]


def rates(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Spread]]:
    """Tokens per second by case and engine, of quiet records."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in quiet(records):
        engines = found.setdefault(case_of(record), {})
        engines.setdefault(record["engine"], []).append(rate(record))
    return {
        case: {engine: Spread(tuple(values)) for engine, values in engines.items()}
        for case, engines in found.items()
    }


def ratios(records: Sequence[dict[str, Any]], ours: str = OURS) -> dict[str, dict[str, Spread]]:
    """How many times an engine's rate ours is, of one round at a time, by case and engine."""
    by_round: dict[tuple[str, Any], dict[str, float]] = {}
    for record in quiet(records):
        engines = by_round.setdefault((case_of(record), record["round"]), {})
        engines[record["engine"]] = rate(record)
    found: dict[str, dict[str, list[float]]] = {}
    for (case, _), engines in by_round.items():
        for engine, value in engines.items():
            if ours in engines:
                found.setdefault(case, {}).setdefault(engine, []).append(engines[ours] / value)
    return {
        case: {engine: Spread(tuple(values)) for engine, values in engines.items()}
        for case, engines in found.items()
    }


def tables(records: Sequence[dict[str, Any]], loads: Sequence[dict[str, Any]]) -> list[Table]:
    """Of one model: a table of rates for each case, and one of loading and memory."""
    by_ratio, made = ratios(records), []
    model = records[0]["model"] if records else ""
    for case, engines in rates(records).items():
        table = Table(title=f"{model}, {case}")
        for column in ("engine", "tokens/s", f"{OURS} is x times as fast"):
            table.add_column(column, justify="left" if column == "engine" else "right")
        for engine, spread in engines.items():
            ratio = by_ratio.get(case, {}).get(engine)
            digits = 1 if spread.median < 1000 else 0
            table.add_row(engine, spread.text(digits), ratio.text(2) if ratio else "")
        limits = [r["limits"] for r in quiet(records) if case_of(r) == case]
        bandwidth = Spread(tuple(limit["bandwidth"] / 1e9 for limit in limits))
        peak = Spread(tuple(limit["int8_peak"] / 1e9 for limit in limits))
        table.caption = f"{bandwidth.text(1)} GB/s, {peak.text(0)} GOPS"
        left = sum(case_of(record) == case for record in records) - sum(
            len(spread.values) for spread in engines.values()
        )
        if left:
            table.caption += f"; {left} measurements left out, during which other processes ran"
        made.append(table)
    table = Table(title=f"{model}: load")
    for column in ("engine", "s", "of it preparing", "peak MB", "peak MB at the end", "score"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    peaks: dict[str, int] = {}
    for record in records:
        peaks[record["engine"]] = max(peaks.get(record["engine"], 0), record["peak_resident"])
    for load in loads:
        engine = load["engine"]
        table.add_row(
            engine,
            f"{load['seconds']:.1f}",
            f"{load.get('prepare_s', 0):.1f}",
            f"{load['peak_resident'] / 1e6:.0f}",
            f"{peaks.get(engine, load['peak_resident']) / 1e6:.0f}",
            f"{load.get('score', float('nan')):.2f}",
        )
    return [*made, table]
