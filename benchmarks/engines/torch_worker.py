"""transformers' `generate` as an engine: as it is, compiled, with torchao, or optimized by us."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
import worker
from torch import Tensor
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


class Clock(StoppingCriteria):
    """Never stops `generate`; notes when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Transformers:
    """A model of transformers; option `kind` is "bf16", "compiled", "torchao" or "slmops"."""

    def load(self, path: Path, threads: int, options: dict[str, Any]) -> dict[str, float]:
        torch.set_num_threads(threads)
        kind, start = options.pop("kind"), time.perf_counter()
        self.model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="bfloat16")
        self.model.eval()
        self.options: dict[str, Any] = {"do_sample": False, "pad_token_id": 2, "eos_token_id": None}
        loaded = time.perf_counter()
        if kind == "slmops":
            import torch_slmops

            torch_slmops.optimize(self.model, progress=False, **options)
        elif kind == "torchao":
            self._torchao()
        elif kind == "compiled":
            self.options |= {"cache_implementation": "static"}
            self.model.forward = torch.compile(self.model.forward, dynamic=False)
        elif kind != "bf16":
            raise ValueError(f"unknown kind {kind!r}")
        return {"read_s": loaded - start, "prepare_s": time.perf_counter() - loaded}

    def _torchao(self) -> None:
        """int4 weights of all linear layers, the head's too; bf16 activations.

        Per 128, or what divides the widths: torchao leaves other layers as they are.
        """
        from torchao.prototype.quantization.int4.inference_workflow import (
            PrototypeInt4WeightOnlyConfig,
        )
        from torchao.quantization import quantize_

        config, head = self.model.config, self.model.get_output_embeddings()
        if head.weight is self.model.get_input_embeddings().weight:
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
            config.tie_word_embeddings = False
        width = math.gcd(config.hidden_size, config.intermediate_size)
        group = next(size for size in (128, 64, 32) if width % size == 0)
        quantize_(self.model, PrototypeInt4WeightOnlyConfig(group_size=group))
        linears = [m for m in self.model.modules() if isinstance(m, torch.nn.Linear)]
        left = sum(type(m.weight) is torch.nn.Parameter for m in linears)
        if left:
            raise RuntimeError(f"torchao left {left} of {len(linears)} layers as they were")

    @torch.inference_mode()
    def first(self, prompt: list[int]) -> int:
        logits = self.model(torch.tensor([prompt]), logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    @torch.inference_mode()
    def scores(self, prompts: list[list[int]], chosen: dict[str, list[int]]) -> dict[str, Any]:
        """How far above the mean, in standard deviations, tokens that engines chose are here."""
        found: dict[str, list[float]] = {name: [] for name in chosen}
        for i, prompt in enumerate(prompts):
            logits = self.model(torch.tensor([prompt]), logits_to_keep=1).logits[0, -1].float()
            for name, picked in chosen.items():
                found[name].append(float((logits[picked[i]] - logits.mean()) / logits.std()))
            found.setdefault("best", []).append(
                float((logits.max() - logits.mean()) / logits.std())
            )
        return found

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], new: int) -> tuple[float, float]:
        clock = Clock()
        start = time.perf_counter()
        self.model.generate(
            torch.tensor(prompts),
            max_new_tokens=new + 1,
            stopping_criteria=StoppingCriteriaList([clock]),
            **self.options,
        )
        return clock.times[0] - start, clock.times[-1] - clock.times[0]


if __name__ == "__main__":
    worker.serve(Transformers())
