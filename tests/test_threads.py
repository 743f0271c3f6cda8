"""Many Python threads on one model and the same weights: the bits that one thread gets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor

import torch_slmops
from torch_slmops import ops, quantize_weight

N, K, HIDDEN, THREADS, ROUNDS = 1056, 256, 320, 6, 8


def run_in_threads(work: Callable[[int], Any]) -> list[Any]:
    """work(0), work(1), ..., each in a thread of its own, begun together."""
    barrier = threading.Barrier(THREADS)

    def begin(i: int) -> Any:
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


def results(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Ops with packed weights and without, all of them cut into shares for torch's threads."""
    first, gate_up, down = weights
    q, k, v = ops.qkv_rotary(
        x[None], first, (7, 2, 2), 96, None, None, None, 0.0, 0.0, None, None, False
    )
    return [
        ops.linear(x, first, N),
        ops.rms_norm(x, torch.ones(K), 1e-6, 0.0, True),
        ops.swiglu(x, gate_up, down, HIDDEN, K, "silu"),
        q,
        ops.attention(q[:, :, :6], k, v, None, None, True, 0, 0.1),
    ]


@pytest.mark.parametrize("torch_threads", [1, 4])
def test_ops(torch_threads: int, threads: None) -> None:
    torch.set_num_threads(torch_threads)
    weights = [
        quantize_weight(torch.randn(shape)).pack()
        for shape in ((N, K), (2 * HIDDEN, K), (K, HIDDEN))
    ]
    inputs = [torch.randn(33 + i, K) for i in range(THREADS)]
    expected = [results(x, weights) for x in inputs]

    def work(i: int) -> list[list[Tensor]]:
        torch.set_num_threads(torch_threads)  # each Python thread has a pool of its own
        return [results(inputs[i], weights) for _ in range(ROUNDS)]

    for got, want in zip(run_in_threads(work), expected, strict=True):
        for found in got:
            for a, b in zip(found, want, strict=True):
                assert_same_bits(a, b)


def test_ops_while_the_row_is_switched() -> None:
    weight = quantize_weight(torch.randn(N, K)).pack()
    inputs = [torch.randn(5 + i, K) for i in range(THREADS)]
    expected = [ops.linear(x, weight, N) for x in inputs]
    before, done = torch_slmops.isa(), threading.Event()

    def switch() -> None:
        while not done.is_set():
            for name in torch_slmops.isas():
                torch_slmops.set_isa(name)

    switcher = threading.Thread(target=switch)
    switcher.start()
    found = run_in_threads(lambda i: [ops.linear(inputs[i], weight, N) for _ in range(ROUNDS)])
    done.set()
    switcher.join()
    torch_slmops.set_isa(before)
    for got, want in zip(found, expected, strict=True):
        for y in got:
            assert_same_bits(y, want)


@pytest.mark.parametrize("attention", ["sdpa", "slmops"])
def test_generate(attention: str) -> None:
    pytest.importorskip("transformers")
    from small_models import small, tokens

    torch_slmops.register_attention()
    model = torch_slmops.optimize(small("llama"), progress=False)
    model.set_attn_implementation(attention)
    prompts = [tokens(1 + i % 3, 4 + 3 * i) for i in range(THREADS)]

    def work(i: int) -> tuple[Tensor, ...]:
        options = {"do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True}
        found = model.generate(prompts[i], output_logits=True, **options)
        return found.sequences, *found.logits

    expected = [work(i) for i in range(THREADS)]
    for got, want in zip(run_in_threads(work), expected, strict=True):
        for a, b in zip(got, want, strict=True):
            assert_same_bits(a, b)
