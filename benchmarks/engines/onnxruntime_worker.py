"""onnxruntime-genai as an engine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
import worker


class OnnxRuntime:
    """A model folder that onnxruntime-genai's builder wrote."""

    def load(self, path: Path, threads: int, options: dict[str, Any]) -> dict[str, float]:
        config = onnxruntime_genai.Config(str(path))
        session = f'{{"intra_op_num_threads": {threads}, "inter_op_num_threads": 1}}'
        config.overlay(f'{{"model": {{"decoder": {{"session_options": {session}}}}}}}')
        self.model = onnxruntime_genai.Model(config)
        return {}

    def _generator(self, prompts: list[list[int]], new: int) -> Any:
        length = len(prompts[0]) + new
        parameters = onnxruntime_genai.GeneratorParams(self.model)
        parameters.set_search_options(
            max_length=length, min_length=length, batch_size=len(prompts), do_sample=False
        )
        return onnxruntime_genai.Generator(self.model, parameters)

    def first(self, prompt: list[int]) -> int:
        generator = self._generator([prompt], 1)
        generator.append_tokens(np.array([prompt], dtype=np.int32))
        generator.generate_next_token()
        return int(generator.get_sequence(0)[-1])

    def run(self, prompts: list[list[int]], new: int) -> tuple[float, float]:
        generator = self._generator(prompts, new + 2)
        ids = np.array(prompts, dtype=np.int32)
        start = time.perf_counter()
        generator.append_tokens(ids)
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        return first - start, time.perf_counter() - first


if __name__ == "__main__":
    worker.serve(OnnxRuntime())
