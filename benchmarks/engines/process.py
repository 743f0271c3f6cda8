"""An engine in a process of its own, stopped while another one is timed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.engines.registry import EngineKind

HERE = Path(__file__).parent


class EngineError(RuntimeError):
    """An engine could not do what was asked."""


class EngineProcess:
    """A running worker.

    Args:
        kind: What to run.
        environments: Folder of the engines' environments.
        log: Where its messages go.
    """

    def __init__(self, kind: EngineKind, environments: Path, log: Path) -> None:
        self.kind = kind
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        python = kind.python(environments).absolute()
        # With a limit from outside the threads that `load` gets would not be had.
        inherited = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        with log.open("w") as messages:
            self._process = subprocess.Popen(
                [python, str(HERE / kind.script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                env=inherited | kind.variables(environments.absolute()),
                text=True,
            )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer.

        Raises:
            EngineError: It failed, or the process ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            tail = self.log.read_text(errors="replace")[-1000:]
            raise EngineError(f"{self.kind.name} ended at {do!r}; it said:\n{tail}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise EngineError(f"{self.kind.name}, {do!r}: {reply['error']}")
        return reply

    @contextlib.contextmanager
    def awake(self) -> Iterator[EngineProcess]:
        """Lets the process run; at other times none of its threads does."""
        self._process.send_signal(signal.SIGCONT)
        try:
            yield self
        finally:
            self._process.send_signal(signal.SIGSTOP)

    def cpu_seconds(self) -> float:
        """CPU time that the process has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
