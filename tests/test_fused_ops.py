"""Properties of the fused ops: batch, threads and strides change no bit."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from bits import assert_same_bits
from cases import FORMATS, Format, random_packed, random_values
from fused_cases import random_gate_up
from torch import Tensor

from torch_slmops import ops

K, HEADS, D, HIDDEN, N = 256, [8, 4, 4], 64, 576, 1088
FUSED_FORMATS = [FORMATS[1], FORMATS[4], FORMATS[6], FORMATS[14], FORMATS[22]]

Fused = Callable[[Tensor], tuple[Tensor, ...]]


def fused_ops(fmt: Format, length: int, full_width: bool = False) -> dict[str, Fused]:
    """Each fused op as a function of x, [B, length, K]."""
    qkv = random_packed(fmt, sum(HEADS) * D, K)
    gate_up, down = random_gate_up(fmt, HIDDEN, K, 1), random_packed(fmt, N, HIDDEN)
    cos, sin = (random_values("normal", (1, length, D), seed) for seed in (2, 3))
    norms = [random_values("normal", (h * D if full_width else D,), 4) for h in HEADS[:2]]
    return {
        "qkv_rotary": lambda x: ops.qkv_rotary(
            x, qkv, HEADS, D, None, *norms, 1e-6, 0.0, cos, sin, False
        ),
        "swiglu": lambda x: (ops.swiglu(x, gate_up, down, HIDDEN, N, "silu"),),
    }


def assert_all_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str) -> None:
    for i, (left, right) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(left, right, f"{what}, result {i}")


@pytest.mark.parametrize("fmt", FUSED_FORMATS, ids=str)
def test_a_row_does_not_know_its_batch(fmt: Format, isa: str) -> None:
    x = random_values("outliers", (70, 2, K), seed=5).to(torch.bfloat16)
    for name, run in fused_ops(fmt, 2).items():
        one_by_one = zip(*(run(x[i : i + 1]) for i in range(len(x))), strict=True)
        assert_all_same(run(x), tuple(torch.cat(parts) for parts in one_by_one), name)


@pytest.mark.parametrize("full_width", [False, True])
@pytest.mark.parametrize("fmt", FUSED_FORMATS, ids=str)
def test_number_of_threads(fmt: Format, full_width: bool, threads: None) -> None:
    x = random_values("outliers", (1, 60, K), seed=6)
    for name, run in fused_ops(fmt, 60, full_width).items():
        torch.set_num_threads(1)
        expected = run(x)
        for count in range(2, 9):
            torch.set_num_threads(count)
            assert_all_same(run(x), expected, f"{name}, {count} threads")


def test_calls_from_many_threads_at_once() -> None:
    x = random_values("normal", (1, 20, K), seed=7)
    for name, run in fused_ops(FORMATS[1], 20).items():
        expected = run(x)
        results: list[tuple[Tensor, ...]] = []

        def work(run: Fused = run, results: list[tuple[Tensor, ...]] = results) -> None:
            results.extend(run(x) for _ in range(10))

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(results) == 40
        for result in results:
            assert_all_same(result, expected, name)


def test_strides_of_activations(isa: str) -> None:
    x = random_values("normal", (2, 3, K), seed=8)
    wide = torch.randn(2, 3, 2 * K)
    wide[..., 5 : K + 5] = x
    layouts = {
        "slice of a row": wide[..., 5 : K + 5],
        "transposed rows": x.transpose(0, 1).contiguous().transpose(0, 1),
        "columns first": x.movedim(-1, 0).contiguous().movedim(0, -1),
    }
    for name, run in fused_ops(FORMATS[1], 3).items():
        for layout, view in layouts.items():
            assert_all_same(run(view), run(x), f"{name}, {layout}")


def test_gradients_are_refused() -> None:
    x = torch.randn(1, 2, K, requires_grad=True)
    for name, run in fused_ops(FORMATS[1], 2).items():
        with pytest.raises(RuntimeError, match=f"{name}: .*does not require a gradient"):
            run(x)
        with torch.no_grad():
            run(x)
