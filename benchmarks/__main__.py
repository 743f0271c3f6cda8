"""Benchmarks: `python -m benchmarks ops`, `attention`, `norms`, `fused`, `model` and `loading`."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks import attention, fused, loading, model, norms, ops
from torch_slmops.bench.shapes import MODELS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    what = ("ops", "attention", "norms", "fused", "model", "loading", "all")
    parser.add_argument("what", choices=what, nargs="?", default="all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--budget", type=float, default=3.0, help="seconds per cell of the op tables"
    )
    parser.add_argument("--full", action="store_true", help="ops: the lm_head shape too")
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-3.2-1b")
    parser.add_argument("--output", type=Path, default=Path("build/benchmarks.jsonl"))
    args = parser.parse_args()
    if args.what in ("ops", "all"):
        ops.run(args.output, budget=args.budget, threads=args.threads, full=args.full)
    if args.what in ("attention", "all"):
        attention.run(args.output, budget=args.budget, threads=args.threads)
    if args.what in ("norms", "all"):
        norms.run(args.output, budget=min(args.budget, 1.0), threads=args.threads)
    if args.what in ("fused", "all"):
        fused.run(args.output, budget=args.budget, threads=args.threads)
    if args.what in ("model", "all"):
        model.run(MODELS[args.model], args.output, threads=args.threads)
    if args.what in ("loading", "all"):
        loading.run(MODELS[args.model], args.output, threads=args.threads)


if __name__ == "__main__":
    main()
