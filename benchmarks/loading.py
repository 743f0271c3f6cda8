"""Saves a model of a real size and times loading it.

Its weights are moved into huge pages after it is ready (the default), copied there before, or left
in the mapped file. Each row is a process of its own, with the files in the page cache: seconds
until the model is ready, and until it lies where it stays; resident and anonymous memory in the
end; the rate of decoding then.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from torch_slmops.bench.shapes import ModelShape

GENERATED = 32
WAYS = ("moved", "copied", "mapped")


def prepare(shape: ModelShape, folder: Path) -> None:
    """Writes the float model and, from it, the packed one, unless they are there."""
    from torch_slmops.bench.model import random_model

    if not (folder / "float" / "config.json").exists():
        random_model(shape).save_pretrained(folder / "float")
    if not (folder / "packed" / "config.json").exists():
        record = measure(folder, "quantized")
        print(json.dumps({"model": shape.name, **record}))


def status(name: str) -> int:
    """Bytes of a row of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(name)


@contextmanager
def peak(name: str) -> Iterator[list[int]]:
    """The largest value of a row of /proc/self/status while it is active, in a list of one."""
    found, done = [status(name)], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            found[0] = max(found[0], status(name))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def measure(folder: Path, way: str, threads: int = 1) -> dict[str, float]:
    """Loads in a new process."""
    command = [sys.executable, "-m", "benchmarks.loading", str(folder), way, str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    record: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return record


def child(folder: Path, way: str, threads: int) -> dict[str, float | str]:
    """What `measure` starts."""
    from transformers import LlamaForCausalLM

    import torch_slmops
    from torch_slmops import SlmopsConfig, moving

    torch.set_num_threads(threads)
    if way == "mapped":
        moving.move_later = lambda model, tensors: None
    if way == "copied":
        moving.LARGE = sys.maxsize
    config = SlmopsConfig() if way == "quantized" else None
    source = folder / ("float" if way == "quantized" else "packed")
    before = status("RssAnon")
    start = time.perf_counter()
    with peak("RssAnon") as most:
        model = LlamaForCausalLM.from_pretrained(source, quantization_config=config)
    record: dict[str, float | str] = {"way": way, "seconds": time.perf_counter() - start}
    moving.finish_moving()
    record["settled"] = time.perf_counter() - start
    record |= {"peak_anonymous": most[0] - before, "anonymous": status("RssAnon") - before}
    record |= {"resident": status("VmRSS"), "packed": torch_slmops.report(model).bytes_after}
    if way == "quantized":
        model.save_pretrained(folder / "packed")
        return record
    prompt = torch.arange(8)[None] + 3
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model.generate(prompt, max_new_tokens=2, **options)
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=GENERATED, **options)
        rates.append(GENERATED / (time.perf_counter() - start))
    record["decode"] = max(rates)
    return record


def run(shape: ModelShape, output: Path, *, threads: int) -> None:
    """Prints a row for each way of loading; appends JSON lines to `output`."""
    folder = output.parent / "loading" / shape.name
    prepare(shape, folder)
    table = Table(title=f"loading {shape.name}, {threads} threads")
    for column in (
        "",
        "ready s",
        "settled s",
        "packed MB",
        "resident MB",
        "anonymous MB",
        "decode tok/s",
    ):
        table.add_column(column, justify="right")
    for way in WAYS * 3:
        record = measure(folder, way, threads)
        sizes = (record[name] / 1e6 for name in ("packed", "resident", "anonymous"))
        cells = [f"{size:.0f}" for size in sizes]
        times = (f"{record[name]:.2f}" for name in ("seconds", "settled"))
        table.add_row(way, *times, *cells, f"{record['decode']:.1f}")
        with output.open("a") as lines:
            lines.write(json.dumps({"model": shape.name, "threads": threads, **record}) + "\n")
    Console(width=100).print(table)


if __name__ == "__main__":
    print(json.dumps(child(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
