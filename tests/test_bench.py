"""What the benchmarks share: they time what they say, and refuse what is wrong."""

from __future__ import annotations

import time

import pytest
import torch

from torch_slmops.bench import linear, probes
from torch_slmops.bench.shapes import LinearShape, ModelShape
from torch_slmops.bench.timing import interleaved

SMALL_LINEARS = (LinearShape(96, 128, "small"),) * 3
SMALL_MODELS = {"tiny": ModelShape("tiny", 64, 2, 4, 2, 16, 128, 300)}


def test_probes_measure() -> None:
    assert 1e8 < probes.read_bandwidth(8 << 20) < 1e13
    assert 1e7 < probes.float_multiply_adds(64) < 1e14
    assert 1e-8 < probes.call_seconds(10) < 1


def test_interleaved_calls_all_alike() -> None:
    indices: dict[str, list[int]] = {"quick": [], "slow": []}

    def slow(i: int) -> None:
        indices["slow"].append(i)
        time.sleep(0.03)

    found = interleaved({"quick": indices["quick"].append, "slow": slow}, budget=0, rounds=3)
    assert indices["slow"] == [0, 1, 2, 3]  # one to warm up, then one per round
    assert len(found["slow"].samples) == 3
    assert found["slow"].best >= 0.03 > found["quick"].median
    assert indices["quick"] == list(range(len(indices["quick"])))


def test_rotated_copies_fill_what_was_asked_for() -> None:
    copies = linear.rotated(torch.zeros(1 << 10, dtype=torch.uint8), total=10 << 10)
    assert len(copies) == 10
    assert len({copy.data_ptr() for copy in copies}) == 10


def test_wrong_kernels_are_not_timed() -> None:
    kernel = linear.KERNELS[0]
    weight = torch.randn(40, 128)
    assert set(linear.ours(weight, total=1)) == {kernel.name for kernel in linear.KERNELS}
    quantized = torch.randn(40, 128)
    right = linear.quantize_weight(quantized).pack()
    linear.assert_right(kernel, linear.quantize_weight(quantized).dequantize(), right)
    with pytest.raises(RuntimeError, match="output is wrong"):
        linear.assert_right(kernel, quantized * 1.5, right)
