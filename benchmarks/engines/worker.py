"""What every engine's process shares: it reads a request per line and answers in JSON.

An engine's script runs in the environment of its engine, so this file needs nothing but Python.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any, Protocol


class Engine(Protocol):
    """A model in an engine."""

    def load(self, path: Path, threads: int, options: dict[str, Any]) -> dict[str, float]:
        """Reads the model at `path`; returns the seconds of each step by name."""

    def first(self, prompt: list[int]) -> int:
        """Returns the greedy token after `prompt`."""

    def run(self, prompts: list[list[int]], new: int) -> tuple[float, float]:
        """Generates greedily after prompts of one length.

        Returns:
            The seconds until the first token, and those of the `new` tokens after it.
        """


def tokens(seed: int, batch: int, length: int, vocabulary: int) -> list[list[int]]:
    """Random prompts, the same for all engines; none begins as one of another length or batch does.

    Engines that keep what they have read would not read such a beginning again.
    """
    draw = random.Random(f"{seed} {batch} {length}")
    return [[draw.randrange(4, vocabulary) for _ in range(length)] for _ in range(batch)]


def memory_bytes() -> dict[str, int]:
    """Resident memory of this process: the most there was, what is now, and of it no file's."""
    found = {}
    names = {"VmHWM": "peak_resident", "VmRSS": "resident", "RssAnon": "anonymous"}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in names:
            found[names[name]] = int(rest.split()[0]) * 1024
    return found


def answer(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    """Does what a request asks for."""
    what = request.pop("do")
    if what == "load":
        start = time.perf_counter()
        steps = engine.load(Path(request["path"]), request["threads"], request["options"])
        return {"seconds": time.perf_counter() - start, **steps, **memory_bytes()}
    if what == "first":
        return {"tokens": [engine.first(prompt) for prompt in request["prompts"]]}
    if what == "run":
        prompts = tokens(*(request[key] for key in ("seed", "batch", "context", "vocabulary")))
        first, rest = engine.run(prompts, request["new"])
        return {"first_s": first, "rest_s": rest, **memory_bytes()}
    extra = getattr(engine, what, None)
    if extra is None:
        raise ValueError(f"no request {what!r}")
    result: dict[str, Any] = extra(**request)
    return result


def end_with_parent() -> None:
    """Has this process killed when its parent ends: a stopped one would not see that."""
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)


def serve(engine: Engine) -> None:
    """Answers requests until there are no more; what libraries print goes to stderr."""
    end_with_parent()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            reply = answer(engine, json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()
