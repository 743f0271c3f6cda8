"""llama.cpp on the windows that `benchmarks.accuracy` measures on, for a table with ours.

It quantizes and computes by itself, in its own process and environment (`engines/setup.sh
llama.cpp`). Its importance matrix is the mean square of each input of each linear layer of the
float model over the calibration windows: what its tool `llama-imatrix` collects.
"""

from __future__ import annotations

import json
import os
import subprocess
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.engines.registry import BY_NAME
from benchmarks.recorded import BATCH, Recorded

SCRIPT = Path(__file__).parent / "engines" / "llama_cpp_logits.py"


def mean_squares(model: nn.Module, windows: Tensor) -> dict[str, np.ndarray]:
    """Returns the mean square of each input of each linear layer but the head, by its name."""
    sums: dict[str, Tensor] = {}

    def add(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        squares = args[0].double().square().flatten(0, -2).sum(0)
        sums[name] = sums.get(name, torch.zeros_like(squares)) + squares

    with torch.no_grad(), ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                handle = module.register_forward_pre_hook(partial(add, name))
                stack.callback(handle.remove)
        for batch in windows.split(BATCH):
            model(batch)
    return {name: (total / windows.numel()).float().numpy() for name, total in sums.items()}


class LlamaCpp:
    """llama.cpp with one model.

    Args:
        folder: The checkpoint, in bfloat16.
        environments: Folder of the engines' environments.
        work: Folder for what is handed over.

    Raises:
        FileNotFoundError: It has not been set up.
    """

    def __init__(self, folder: Path, environments: Path, work: Path) -> None:
        self.kind = BY_NAME["llama.cpp Q4_0"]
        if not self.kind.is_there(environments):
            raise FileNotFoundError(
                f"llama.cpp is not in {environments}: run benchmarks/engines/setup.sh llama.cpp"
            )
        self.folder, self.environments, self.work = folder, environments.absolute(), work
        work.mkdir(parents=True, exist_ok=True)

    def keep_importance(self, model: nn.Module, windows: Tensor) -> Path:
        """Writes the importance matrix of the float model."""
        path = self.work / "importance.npz"
        np.savez(path, **mean_squares(model, windows))  # type: ignore[arg-type]
        return path

    def run(
        self, kind: str, windows: Tensor, importance: Path | None = None, head: str | None = None
    ) -> tuple[Recorded, int, dict[str, int]]:
        """Quantizes, and computes the logits of `windows`.

        Returns:
            The logits as a model, the bytes of all tensors, and how many have which type.
        """
        tokens, out = self.work / "tokens.npy", self.work / "logits.npy"
        np.save(tokens, windows.numpy())
        arguments = [self.folder, kind, tokens, out]
        if importance is not None:
            arguments += ["--importance", importance]
        if head is not None:
            arguments += ["--head", head]
        environment: dict[str, Any] = os.environ | self.kind.variables(self.environments)
        done = subprocess.run(
            [self.kind.python(self.environments), SCRIPT, *arguments],
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"llama.cpp, {kind}:\n{done.stderr[-3000:]}")
        told = json.loads(done.stdout.splitlines()[-1])
        return Recorded(windows, np.load(out, mmap_mode="r")), told["bytes"], told["types"]
