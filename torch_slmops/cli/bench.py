"""bench: the limits of this machine, and how near the ops and a whole model come to them."""

from __future__ import annotations

import argparse
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from torch_slmops.bench.shapes import LINEARS, MODELS, ROWS
from torch_slmops.cli.screen import OK, Screen, UserError, make_table

if TYPE_CHECKING:
    from torch_slmops.bench.shapes import LinearShape

__all__ = ["add"]

_PARTS = ("machine", "ops", "model")
# Copies of each weight: more than caches hold, and not more than small machines have.
_COPIES_BYTES = 192 << 20
_VARIANTS: dict[str, dict[str, Any] | None] = {
    "bfloat16": None,
    "int8": {"weights": "int8"},
    "int4": {"weights": "int4"},
}


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "bench",
        parents=[common],
        help="time the ops and a model of random weights, beside the machine's limits",
        description="Times on this machine as it is now: close what else computes. The "
        "repository's benchmarks (python -m benchmarks) measure more and need a compiler.",
    )
    parser.add_argument("part", nargs="?", choices=(*_PARTS, "all"), default="all")
    parser.add_argument("--model", choices=sorted(MODELS), default="smollm2-135m")
    parser.add_argument(
        "--rows", type=int, nargs="+", metavar="M", default=list(ROWS), help="of the ops: tokens"
    )
    parser.add_argument(
        "--budget", type=float, default=1.0, metavar="S", help="seconds per shape and M"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, screen: Screen) -> int:
    import torch

    from torch_slmops.isa import isa
    from torch_slmops.machine import cpu_name

    if min(args.rows) < 1 or args.budget <= 0:
        raise UserError("bench: expected --rows of at least 1 and a positive --budget")
    parts = _PARTS if args.part == "all" else (args.part,)
    found: dict[str, Any] = {"cpu": cpu_name(), "isa": isa(), "threads": torch.get_num_threads()}
    screen.show(f"{found['cpu']}, ISA row {found['isa']}, {found['threads']} threads")
    if os.getloadavg()[0] > 0.3 * (os.cpu_count() or 1):
        screen.note("the machine is busy with other work: times will be too long")
    for part in parts:
        found[part] = {"machine": _machine, "ops": _ops, "model": _model}[part](args, screen)
    screen.result(found)
    return OK


def _machine(args: argparse.Namespace, screen: Screen) -> dict[str, float]:
    from torch_slmops.bench import probes

    probing = {
        "read_bytes_per_second": probes.read_bandwidth,
        "float_multiply_adds_per_second": probes.float_multiply_adds,
        "seconds_per_call": probes.call_seconds,
    }
    found = {}
    with screen.progress(len(probing), "machine") as advance:
        for name, probe in probing.items():
            found[name] = probe()
            advance(1)
    rows = [
        ("memory reads", f"{found['read_bytes_per_second'] / 1e9:.1f} GB/s"),
        ("fp32 matrix product", f"{found['float_multiply_adds_per_second'] / 1e9:.0f} GFMA/s"),
        ("smallest op", f"{found['seconds_per_call'] * 1e6:.1f} us"),
    ]
    screen.show(make_table("machine", ("", ""), rows))
    return found


def _ops(args: argparse.Namespace, screen: Screen) -> list[dict[str, Any]]:
    shapes = LINEARS[:3]
    found = []
    with screen.progress(len(shapes) * len(args.rows), "linear") as advance:
        for shape in shapes:
            cells = _shape(shape, args, advance)
            screen.show(_shape_table(shape, cells))
            found += cells
    return found


def _shape(shape: LinearShape, args: argparse.Namespace, advance: Any) -> list[dict[str, Any]]:
    """Times one shape with every number of rows, all formats in turns."""
    import torch

    from torch_slmops.bench.linear import dense, ours
    from torch_slmops.bench.probes import read_bandwidth
    from torch_slmops.bench.timing import interleaved

    torch.manual_seed(0)
    n, k = shape.out_features, shape.in_features
    weight = torch.randn(n, k) / k**0.5
    candidates = ours(weight, _COPIES_BYTES) | {"torch bf16": dense(weight, _COPIES_BYTES)}
    cells = []
    for rows in args.rows:
        x = torch.randn(rows, k).bfloat16()
        calls = {name: partial(candidate.call, x) for name, candidate in candidates.items()}
        bandwidth = read_bandwidth()
        timings = interleaved(calls, budget=args.budget)
        base = timings["torch bf16"].median
        for name, timing in timings.items():
            size = candidates[name].bytes or 2 * n * k
            cells.append(
                {
                    "n": n,
                    "k": k,
                    "rows": rows,
                    "kernel": name,
                    "seconds": timing.median,
                    "best_seconds": timing.best,
                    "bytes": size,
                    "read_bytes_per_second": bandwidth,
                    "of_bandwidth": size / timing.median / bandwidth,
                    "operations_per_second": 2 * rows * n * k / timing.median,
                    "times_torch_bf16": base / timing.median,
                }
            )
        advance(1)
    return cells


def _shape_table(shape: LinearShape, cells: list[dict[str, Any]]) -> Any:
    rows = [
        (
            cell["rows"],
            cell["kernel"],
            f"{cell['seconds'] * 1e6:.0f}",
            f"{cell['bytes'] / cell['seconds'] / 1e9:.1f}",
            f"{cell['of_bandwidth']:.0%}",
            f"{cell['operations_per_second'] / 1e9:.0f}",
            f"{cell['times_torch_bf16']:.2f}",
        )
        for cell in cells
    ]
    columns = ("rows", "kernel", "us", "GB/s", "of reads", "GOPS", "x torch bf16")
    title = f"linear, {shape.out_features} x {shape.in_features} ({shape.role})"
    return make_table(title, columns, rows)


def _model(args: argparse.Namespace, screen: Screen) -> list[dict[str, Any]]:
    import torch

    from torch_slmops.bench.model import PROMPT, measure, random_llama
    from torch_slmops.cli.models import prepare_transformers
    from torch_slmops.optimize import optimize
    from torch_slmops.report import report

    prepare_transformers()
    shape = MODELS[args.model]
    found: list[dict[str, Any]] = []
    with screen.progress(len(_VARIANTS), shape.name) as advance:
        for name, options in _VARIANTS.items():
            model = random_llama(shape)
            if options is not None:
                optimize(model, progress=False, **options)
            prompt = torch.randint(3, shape.vocab, (1, PROMPT))
            measure(model, prompt[:, :16])  # warm up
            prefill, decode = measure(model, prompt)
            size = report(model).bytes_after
            found.append(
                {
                    "model": shape.name,
                    "weights": name,
                    "bytes": size,
                    "prompt_tokens_per_second": prefill,
                    "tokens_per_second": decode,
                }
            )
            advance(1)
    rows = [
        (
            cell["weights"],
            f"{cell['bytes'] / 1e6:.0f}",
            f"{cell['prompt_tokens_per_second']:.0f}",
            f"{cell['tokens_per_second']:.1f}",
            f"{cell['tokens_per_second'] / found[0]['tokens_per_second']:.2f}",
        )
        for cell in found
    ]
    title = f"{shape.name}, random weights, prompt of {PROMPT} tokens"
    columns = ("weights", "MB", "prompt tokens/s", "tokens/s", "x bfloat16")
    screen.show(make_table(title, columns, rows))
    return found
