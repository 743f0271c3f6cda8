"""Generating again and again takes no more memory.

`make soak` runs 10,000 calls for each: SLMOPS_SOAK_CALLS is their number.
"""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path

import pytest
import torch

import torch_slmops

pytest.importorskip("transformers")

from small_models import small, tokens

CALLS = int(os.environ.get("SLMOPS_SOAK_CALLS", "80"))
PAGE = os.sysconf("SC_PAGE_SIZE")
# What the allocator's fragments may add after a quarter of the calls.
MOST_GROWTH = 3 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


@pytest.mark.parametrize("attention", ["sdpa", "slmops"])
def test_generate_does_not_grow(attention: str) -> None:
    torch_slmops.register_attention()
    model = torch_slmops.optimize(small("llama"), progress=False)
    model.set_attn_implementation(attention)
    draw = random.Random(7)

    def call() -> None:
        ids = tokens(draw.randint(1, 3), draw.randint(1, 40))
        model.generate(ids, do_sample=draw.random() < 0.5, max_new_tokens=draw.randint(1, 12))

    for _ in range(CALLS // 4):
        call()
    tensors, resident = live_tensors(), resident_bytes()
    for _ in range(CALLS - CALLS // 4):
        call()
    assert live_tensors() <= tensors
    assert resident_bytes() - resident < MOST_GROWTH
