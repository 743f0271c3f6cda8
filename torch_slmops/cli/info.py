"""info: this machine and this installation, as far as they matter here."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch_slmops.cli.screen import OK, Screen, make_table

__all__ = ["add"]

_PACKAGES = (
    "torch_slmops",
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "torchao",
    "gguf",
    "numpy",
    "rich",
    "tqdm",
)
_VARIABLES = ("SLMOPS_ISA", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "info",
        parents=[common],
        help="the CPU, the ISA row in use and why no better one is, threads, memory, versions",
        description="Shows what of this machine and installation matters for speed.",
    )
    parser.add_argument(
        "--bandwidth",
        action="store_true",
        help="measure how fast memory is read: the limit of generation (about 2 s, 512 MB)",
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace, screen: Screen) -> int:
    found = {
        "cpu": _cpu(),
        "isa": _isa(asked=args.isa),
        "threads": _threads(),
        "memory": _memory(),
        "versions": _versions(),
    }
    if args.bandwidth:
        from torch_slmops.bench.probes import read_bandwidth

        found["memory"]["read_bytes_per_second"] = read_bandwidth()
    _show(found, screen)
    screen.result(found)
    return OK


def _cpu() -> dict[str, Any]:
    import torch

    from torch_slmops import machine
    from torch_slmops.isa import features

    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    names = [name for name, value in capabilities.items() if value is True]
    return {
        "name": machine.cpu_name(),
        "architecture": platform.machine(),
        "source": "cpuinfo" if names else "operating system",
        "features": names or features(),
    }


def _isa(asked: str | None) -> dict[str, Any]:
    from torch_slmops.isa import describe, features, isa, isas, missing_features

    used, runnable = isa(), isas()
    missing = missing_features()
    rows = []
    for row, lacks in missing.items():
        if row == used:
            note = "in use"
        elif lacks:
            note = f"this CPU lacks {', '.join(lacks)}"
        elif runnable.index(row) < runnable.index(used):
            cause = "--isa" if asked is not None else f"SLMOPS_ISA={os.environ.get('SLMOPS_ISA')}"
            note = f"can run here; {cause} chose {used}"
        else:
            note = "can run here; a better one is in use"
        rows.append({"row": row, "runs_here": row in runnable, "note": note})
    return {
        "used": used,
        "description": describe(),
        "rows": rows,
        "features_used": features(),
    }


def _threads() -> dict[str, Any]:
    import torch

    from torch_slmops import machine, tuning

    of = torch.ops.slmops._thread_count
    count, allowed, quota = torch.get_num_threads(), machine.cpus_allowed(), machine.cpus_of_quota()
    notes = []
    if count > allowed:
        notes.append(f"more threads than the {allowed} CPUs of this process: use --threads")
    if quota is not None and count > quota:
        notes.append(f"more threads than the container's {quota:g} CPUs: use --threads")
    return {
        "torch": count,
        "decode": of(1),
        "prefill": of(512),
        "tuned": tuning.load() is not None,
        "cpus": os.cpu_count(),
        "cpus_allowed": allowed,
        "container_cpus": quota,
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "notes": notes,
    }


def _memory() -> dict[str, Any]:
    from torch_slmops import machine

    sizes = machine.memory_bytes()
    return {
        "total_bytes": None if sizes is None else sizes[0],
        "available_bytes": None if sizes is None else sizes[1],
        "huge_page_mode": machine.huge_page_mode() or None,
        "packed_weights_in_huge_pages": machine.in_huge_pages(),
    }


def _versions() -> dict[str, Any]:
    from torch_slmops import _C, __version__

    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["torch_slmops"] = __version__
    found["extension"] = _C.__file__
    found["executable"] = sys.executable
    return found


def _show(found: dict[str, Any], screen: Screen) -> None:
    cpu, threads, memory = found["cpu"], found["threads"], found["memory"]
    yes = {True: "yes", False: "no: reading them is slower", None: "unknown on this system"}
    environment = " ".join(f"{name}={value}" for name, value in threads["environment"].items())
    rows = [
        ("CPU", f"{cpu['name']} ({cpu['architecture']})"),
        (f"features ({cpu['source']})", " ".join(cpu["features"]) or "none that matter here"),
        ("ISA row", found["isa"]["used"]),
        *(("", f"{words}.") for words in found["isa"]["description"].rstrip(".").split(". ")),
        ("threads", f"{threads['torch']}, on {threads['cpus_allowed']} CPUs of {threads['cpus']}"),
        *(("", note) for note in threads["notes"]),
        (
            "of them used",
            f"{threads['decode']} for decoding, {threads['prefill']} for the prefill, "
            f"{'tuned' if threads['tuned'] else 'not tuned'}",
        ),
    ]
    if environment:
        rows.append(("environment", environment))
    if memory["total_bytes"] is not None:
        sizes = (memory["available_bytes"] / 2**30, memory["total_bytes"] / 2**30)
        rows.append(("memory", "{:.1f} GiB available of {:.1f} GiB".format(*sizes)))
    rows.append(("huge pages", memory["huge_page_mode"] or "none"))
    rows.append(("packed weights in them", yes[memory["packed_weights_in_huge_pages"]]))
    if "read_bytes_per_second" in memory:
        rate = memory["read_bytes_per_second"] / 1e9
        rows.append(("memory reads", f"{rate:.1f} GB/s on {threads['torch']} threads"))
    screen.show(make_table("machine", ("", ""), rows))
    isa_rows = [(row["row"], row["note"]) for row in found["isa"]["rows"]]
    screen.show(make_table("ISA rows of this build, best first", ("row", ""), isa_rows))
    versions = [(name, value or "not installed") for name, value in found["versions"].items()]
    screen.show(make_table("versions", ("", ""), versions))
