"""Plots of the results of `python -m benchmarks engines`: rates by engine, and a roofline.

python -m benchmarks.plots build/benchmarks.jsonl docs/images
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from benchmarks.engines.results import OURS, Spread, case_of, rates
from torch_slmops.bench.shapes import MODELS, ModelShape

# The default format's: 4 bits, and a sub-scale of 4 bits for 16 of them.
BITS = 4.25
OUR_COLOR, THEIR_COLORS = "#c0392b", ("#34495e", "#7f8c8d", "#2980b9", "#16a085", "#d68910")


def multiply_adds(shape: ModelShape) -> tuple[int, int]:
    """Of the matrices of all layers, and of the head, for one token."""
    attention = shape.hidden * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    layers = shape.layers * (attention + 3 * shape.hidden * shape.intermediate)
    return layers, shape.vocab * shape.hidden


def read(path: Path) -> list[dict[str, Any]]:
    """The measurements of engines in a file of results."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [r for r in records if "engine" in r and "first_s" in r]


def color(engine: str, engines: Sequence[str]) -> str:
    if engine == OURS:
        return OUR_COLOR
    return THEIR_COLORS[[e for e in engines if e != OURS].index(engine) % len(THEIR_COLORS)]


def bars(records: Sequence[dict[str, Any]], cases: Sequence[str], out: Path) -> None:
    """Tokens per second: a row of plots for each model, one for each case; whiskers: all rounds."""
    models = list(dict.fromkeys(r["model"] for r in records))
    size = (4.5 * len(cases) + 1.5, 2.4 * len(models))
    figure, axes = pyplot.subplots(len(models), len(cases), figsize=size, squeeze=False)
    for row, model in zip(axes, models, strict=True):
        found = rates([r for r in records if r["model"] == model])
        for axis, case in zip(row, cases, strict=True):
            engines = found.get(case, {})
            _bars(axis, engines)
            axis.set_title(f"{model}, {case}, tokens/s", fontsize=9)
    figure.tight_layout()
    _save(figure, out)


def _bars(axis: Any, engines: dict[str, Spread]) -> None:
    names = sorted(engines, key=lambda name: engines[name].median)
    for i, name in enumerate(names):
        spread = engines[name]
        low, high = spread.median - min(spread.values), max(spread.values) - spread.median
        filling = OUR_COLOR if name.startswith("slmops") else THEIR_COLORS[0]
        axis.barh(i, spread.median, xerr=[[low], [high]], color=filling, ecolor="#999999")
        axis.text(max(spread.values), i, f" {spread.median:.0f}", va="center", fontsize=8)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_xmargin(0.15)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def roofline(records: Sequence[dict[str, Any]], model: str, out: Path) -> None:
    """Tokens per second of one model over tokens per pass, under the machine's limits."""
    chosen = [r for r in records if r["model"] == model]
    layers, head = multiply_adds(MODELS[model])
    bandwidth = statistics.median(r["limits"]["bandwidth"] for r in chosen)
    peak = statistics.median(r["limits"]["int8_peak"] for r in chosen)
    rows = [2**i for i in range(12)]
    read_s = (layers + head) * BITS / 8 / bandwidth
    figure, axis = pyplot.subplots(figsize=(7, 4.2))
    label = f"limit: {bandwidth / 1e9:.0f} GB/s of {BITS} bits a weight, {peak / 1e9:.0f} GOPS"
    roof = [m / max(read_s, 2 * m * layers / peak) for m in rows]
    axis.plot(rows, roof, color="black", linewidth=1, label=label)
    points: dict[str, list[tuple[int, float]]] = {}
    by_case = {case_of(r): r for r in chosen}
    for case, engines in rates(chosen).items():
        record = by_case[case]
        tokens = record["batch"] * (1 if record["new"] else record["context"])
        if record["new"] and record["context"] > 512:  # attention counts there
            continue
        for engine, spread in engines.items():
            points.setdefault(engine, []).append((tokens, spread.median))
    for engine, values in points.items():
        xs, ys = zip(*sorted(values), strict=True)
        axis.plot(xs, ys, "o-", color=color(engine, list(points)), markersize=4, label=engine)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("tokens per pass")
    axis.set_ylabel("tokens/s")
    axis.set_title(model, fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    figure.tight_layout()
    _save(figure, out)


def _save(figure: Any, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def draw(results: Path, folder: Path) -> list[Path]:
    """Draws what there are measurements for; returns the files."""
    records = read(results)
    models = list(dict.fromkeys(r["model"] for r in records))
    cases = [c for c in ("decode at 8", "prefill 512") if any(case_of(r) == c for r in records)]
    files = [folder / "engines.png"]
    bars(records, cases, files[0])
    for model in models:
        files.append(folder / f"roofline-{model}.png")
        roofline(records, model, files[-1])
    return files


if __name__ == "__main__":
    for path in draw(Path(sys.argv[1]), Path(sys.argv[2])):
        print(path)
