"""Engines with one model each, timed in turns."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.engines import checkpoints
from benchmarks.engines.process import EngineError, EngineProcess
from benchmarks.engines.registry import BY_NAME, EngineKind
from benchmarks.engines.worker import tokens
from benchmarks.machine import Limits, probe
from torch_slmops import memory
from torch_slmops.bench.shapes import ModelShape

REFERENCE = "transformers bf16"
# Prompts whose next token is compared, and how far above the mean of the float model's scores, as
# a share of how far its own choice is, that of an engine must be on average. A model with a wrong
# weight or position chooses as good as at random, which gives 0 +- 0.1.
CHECKS, CHECK_LENGTH, LEAST_SCORE = 8, 24, 0.5
PROBED_BYTES = 256 << 20
# The share of the machine that other processes may take while an engine is timed.
MOST_OTHERS = 0.08
# A turn generates no more tokens than take so many seconds, but some.
TURN_SECONDS, LEAST_TOKENS = 4.0, 8


@dataclass(frozen=True)
class Case:
    """A prompt of `context` tokens per sequence, then `new` tokens after the first."""

    context: int
    new: int
    batch: int = 1

    @property
    def name(self) -> str:
        suffix = f" x {self.batch}" if self.batch > 1 else ""
        return f"{'decode at' if self.new else 'prefill'} {self.context}{suffix}"


def busy_seconds() -> float:
    """CPU time that all processes of the machine have used."""
    fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    user, nice, system, _, _, irq, softirq, stolen = map(int, fields)
    busy = user + nice + system + irq + softirq + stolen
    return busy / os.sysconf("SC_CLK_TCK")


class Session:
    """The processes of the engines that are there, with one model.

    Use it in a `with` statement. `loads` has a record for each engine, `wrong` what an engine that
    is not timed did.

    Args:
        shape: The model.
        engines: The engines; what has not been set up is left out.
        build: Folder with `engines` and `models`.
        threads: Of every engine.
    """

    def __init__(
        self, shape: ModelShape, engines: Sequence[EngineKind], build: Path, threads: int
    ) -> None:
        self.shape, self.threads = shape, threads
        self.build = build.absolute()
        self.environments, self.folder = self.build / "engines", self.build / "models" / shape.name
        self.engines = [engine for engine in engines if engine.is_there(self.environments)]
        self.missing = [engine.name for engine in engines if engine not in self.engines]
        self.running: dict[str, EngineProcess] = {}
        self.loads: list[dict[str, Any]] = []
        self.wrong: dict[str, str] = {}
        self._pace: dict[tuple[str, int, int], float] = {}
        self._buffer = memory.empty(PROBED_BYTES).zero_()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running.values():
            process.close()
        self.running.clear()

    def prepare(self) -> None:
        """Writes what the engines read, where it is missing."""
        for engine in list(self.engines):
            python = engine.python(self.environments).absolute()
            try:
                checkpoints.prepare(self.shape, self.folder, engine.product, engine.write, python)
            except RuntimeError as error:
                self._drop(engine, str(error))

    def load(self) -> None:
        """Starts the engines one after the other, and stops those whose output is wrong."""
        for engine in list(self.engines):
            log = self.folder / "logs" / f"{engine.name.replace(' ', '-')}.log"
            process = EngineProcess(engine, self.environments, log)
            self.running[engine.name] = process
            try:
                with process.awake():
                    record = process.ask(
                        "load",
                        path=str(self.folder / engine.product),
                        threads=self.threads,
                        options=dict(engine.options),
                    )
                self.loads.append({"engine": engine.name, **record})
            except EngineError as error:
                self._drop(engine, str(error))
        self._check()

    def _drop(self, engine: EngineKind, why: str) -> None:
        self.wrong[engine.name] = why
        self.engines.remove(engine)
        if engine.name in self.running:
            self.running.pop(engine.name).close()

    def _check(self) -> None:
        """Drops engines that don't choose what the float model finds likely."""
        prompts = [tokens(i, 1, CHECK_LENGTH, self.shape.vocab)[0] for i in range(CHECKS)]
        chosen = {}
        for engine in list(self.engines):
            process = self.running[engine.name]
            try:
                with process.awake():
                    chosen[engine.name] = process.ask("first", prompts=prompts)["tokens"]
            except EngineError as error:
                self._drop(engine, str(error))
        with self._reference() as process:
            scores = process.ask("scores", prompts=prompts, chosen=chosen)
        best = sum(scores.pop("best"))
        for name, found in scores.items():
            share = sum(found) / best
            for record in self.loads:
                if record["engine"] == name:
                    record["score"] = share
            if not share >= LEAST_SCORE:
                self._drop(BY_NAME[name], f"output is wrong (score {share:.2f}); not timed")

    @contextlib.contextmanager
    def _reference(self) -> Iterator[EngineProcess]:
        """The float model, which is started here if it is not one of the engines."""
        if REFERENCE in self.running:
            with self.running[REFERENCE].awake() as process:
                yield process
            return
        engine = BY_NAME[REFERENCE]
        process = EngineProcess(engine, self.environments, self.folder / "logs" / "reference.log")
        try:
            process.ask(
                "load",
                path=str(self.folder / "float"),
                threads=self.threads,
                options=dict(engine.options),
            )
            yield process
        finally:
            process.close()

    def probe(self) -> Limits:
        """What the machine can do now."""
        torch.set_num_threads(self.threads)
        return probe(self._buffer)

    def time(self, engine: str, case: Case, seed: int) -> dict[str, Any]:
        """One measurement: the record of a line of the results."""
        process, new = self.running[engine], case.new
        if new and (pace := self._pace.get((engine, case.context, case.batch))):
            new = min(new, max(LEAST_TOKENS, int(TURN_SECONDS / pace)))
        start, busy, own = time.perf_counter(), busy_seconds(), process.cpu_seconds()
        with process.awake():
            found = process.ask(
                "run",
                seed=seed,
                batch=case.batch,
                context=case.context,
                vocabulary=self.shape.vocab,
                new=new,
            )
        cpus = (time.perf_counter() - start) * (os.cpu_count() or 1)
        others = busy_seconds() - busy - (process.cpu_seconds() - own)
        found["others"] = min(1.0, max(0.0, others / cpus))
        if new:
            self._pace[engine, case.context, case.batch] = found["rest_s"] / new
        return {"engine": engine, **asdict(case), "new": new, **found}

    def warm(self, cases: Sequence[Case]) -> None:
        """Runs each case with each engine once, for what engines do the first time only."""
        for case in cases:
            for engine in list(self.engines):
                try:
                    self.time(engine.name, replace(case, new=min(case.new, 2)), 0)
                except EngineError as error:
                    self._drop(engine, str(error))

    def round(self, cases: Sequence[Case], number: int) -> list[dict[str, Any]]:
        """Each case once, with all engines in turns and a probe of the machine before each."""
        records = []
        for case in cases:
            for engine in list(self.engines):
                limits = self.probe()
                try:
                    record = self.time(engine.name, case, number)
                    if record["others"] > MOST_OTHERS:
                        # Not the same prompt again: some engines keep what they have read.
                        limits, record = self.probe(), self.time(engine.name, case, -number)
                except EngineError as error:
                    print(error, file=sys.stderr)
                    self._drop(engine, str(error))
                    continue
                record |= {"model": self.shape.name, "round": number, "threads": self.threads}
                records.append(record | {"limits": asdict(limits)})
        return records
