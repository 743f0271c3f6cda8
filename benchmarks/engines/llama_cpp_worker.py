"""llama.cpp as an engine, through the C functions that llama-cpp-python declares."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import worker

CONTEXT = 4352  # tokens of a sequence


class LlamaCpp:
    """A GGUF file on the CPU, read as llama-bench reads it."""

    def load(self, path: Path, threads: int, options: dict[str, Any]) -> dict[str, float]:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), model)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not read {path}")
        self.threads, self.context, self.sequences = threads, None, 0
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )
        self._open(1)
        return {}

    def _open(self, sequences: int) -> None:
        """Makes an empty context for so many sequences."""
        if sequences != self.sequences:
            if self.context is not None:
                llama_cpp.llama_free(self.context)
            parameters = llama_cpp.llama_context_default_params()
            parameters.n_ctx = CONTEXT * sequences
            parameters.n_batch = 2048
            parameters.n_seq_max = sequences
            parameters.n_threads = parameters.n_threads_batch = self.threads
            parameters.no_perf = True
            self.context = llama_cpp.llama_init_from_model(self.model, parameters)
            self.sequences = sequences
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), False)

    def _decode(self, columns: list[list[int]], start: int, last: bool) -> None:
        """One call of llama_decode for the tokens of each sequence from position `start`."""
        count = sum(map(len, columns))
        batch = llama_cpp.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        i = 0
        for sequence, ids in enumerate(columns):
            for offset, token in enumerate(ids):
                batch.token[i], batch.pos[i] = token, start + offset
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
                batch.logits[i] = int(last and offset + 1 == len(ids))
                i += 1
        code = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        if code != 0:
            raise RuntimeError(f"llama_decode gave {code}")

    def _greedy(self, row: int) -> int:
        """The greedy token of the row of logits; negative rows count from the end."""
        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())

    def _prompt(self, prompts: list[list[int]]) -> list[int]:
        length, step = len(prompts[0]), 2048 // len(prompts)
        for start in range(0, length, step):
            part = [prompt[start : start + step] for prompt in prompts]
            self._decode(part, start, start + step >= length)
        width = len(part[0])
        return [self._greedy((i + 1) * width - 1) for i in range(len(prompts))]

    def first(self, prompt: list[int]) -> int:
        self._open(1)
        return self._prompt([prompt])[0]

    def run(self, prompts: list[list[int]], new: int) -> tuple[float, float]:
        self._open(len(prompts))
        begin = time.perf_counter()
        chosen = self._prompt(prompts)
        first = time.perf_counter()
        for i in range(new):
            self._decode([[token] for token in chosen], len(prompts[0]) + i, True)
            chosen = [self._greedy(row) for row in range(len(prompts))]
        return first - begin, time.perf_counter() - first


if __name__ == "__main__":
    worker.serve(LlamaCpp())
