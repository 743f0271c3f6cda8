"""OpenVINO GenAI as an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
import worker


class OpenVino:
    """An LLMPipeline; `options` are properties of the CPU plugin."""

    def load(self, path: Path, threads: int, options: dict[str, Any]) -> dict[str, float]:
        properties = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **options}
        self.pipeline = openvino_genai.LLMPipeline(path, "CPU", **properties)
        return {}

    def _generate(self, prompts: list[list[int]], new: int) -> Any:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos, config.do_sample = True, False
        ids = np.array(prompts, dtype=np.int64)
        inputs = openvino_genai.TokenizedInputs(
            openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids))
        )
        return self.pipeline.generate(inputs, config)

    def first(self, prompt: list[int]) -> int:
        return int(self._generate([prompt], 1).tokens[0][0])

    def run(self, prompts: list[list[int]], new: int) -> tuple[float, float]:
        metrics = self._generate(prompts, new + 1).perf_metrics
        # A step's time is divided by the sequences that it makes a token of.
        rest = metrics.get_tpot().mean / 1e3 * len(prompts) * new if new else 0.0
        return metrics.get_ttft().mean / 1e3, rest


if __name__ == "__main__":
    worker.serve(OpenVino())
