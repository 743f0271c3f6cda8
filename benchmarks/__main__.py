"""Benchmarks: `python -m benchmarks ops`, `attention`, `norms`, `fused`, `engines`, ..."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import (
    attention,
    engines,
    float_fast,
    fused,
    loading,
    lookup,
    norms,
    ops,
    read_ahead,
)
from torch_slmops.bench.shapes import MODELS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parts = (
        "ops",
        "read_ahead",
        "float_fast",
        "attention",
        "norms",
        "fused",
        "engines",
        "lookup",
        "loading",
    )
    parser.add_argument("what", choices=(*parts, "all"), nargs="?", default="all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--budget", type=float, default=3.0, help="seconds per cell of the op tables"
    )
    parser.add_argument("--full", action="store_true", help="ops: the lm_head shape too")
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-3.2-1b")
    parser.add_argument(
        "--models", choices=sorted(MODELS), nargs="+", help="engines: several of them"
    )
    parser.add_argument(
        "--engines", choices=sorted(engines.BY_NAME), nargs="+", help="engines: these, if there"
    )
    parser.add_argument("--rounds", type=int, default=3, help="engines: how often")
    parser.add_argument(
        "--long", action="store_true", help="engines: more prompts, long contexts, batches"
    )
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks.jsonl"))
    args = parser.parse_args()
    if args.what in ("ops", "all"):
        ops.run(args.output, budget=args.budget, threads=args.threads, full=args.full)
    if args.what in ("read_ahead", "all"):
        read_ahead.run(args.output, budget=min(args.budget, 2.0), threads=args.threads)
    if args.what in ("float_fast", "all"):
        float_fast.run(args.output, budget=args.budget, threads=args.threads)
    if args.what in ("attention", "all"):
        attention.run(args.output, budget=args.budget, threads=args.threads)
    if args.what in ("norms", "all"):
        norms.run(args.output, budget=min(args.budget, 1.0), threads=args.threads)
    if args.what in ("fused", "all"):
        fused.run(args.output, budget=args.budget, threads=args.threads)
    if args.what in ("engines", "all"):
        engines.run(
            [MODELS[name] for name in args.models or [args.model]],
            args.output,
            cases=engines.LONG if args.long else engines.SHORT,
            engines=args.engines or engines.USUAL,
            rounds=args.rounds,
            threads=args.threads,
        )
    if args.what in ("lookup", "all"):
        lookup.run(MODELS[args.model], args.output, threads=args.threads)
    if args.what in ("loading", "all"):
        loading.run(MODELS[args.model], args.output, threads=args.threads)


if __name__ == "__main__":
    main()
