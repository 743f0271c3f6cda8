"""Denormals survive every flush setting, of the calling thread and of torch's pool."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bits import assert_same_bits
from cases import Format, random_packed
from torch import Tensor

import torch_slmops
from torch_slmops import ops

N, K = 2080, 256  # enough for a share on each of 4 threads at one row, too
FORMATS = [Format(4, 32, 32, "none", "float"), Format(4, 16, 32, "none", "float")]

# A pool thread keeps the flush setting of its birth, whatever the main thread sets afterwards.
SCRIPT = """
import sys, torch
torch.set_flush_denormal(True)
torch.set_num_threads(4)
torch.ones(1 << 22).add_(1)  # the pool is born
torch.set_flush_denormal(False)
small = torch.full((1 << 22,), 2.0**-130) * 1.0
half = int((small == 0).sum())
assert 0 < half < small.numel(), f"the trap is open: {half} flushed"
import torch_slmops
folder, isa = sys.argv[1:]
torch_slmops.set_isa(isa)
ops = torch_slmops.ops
x, w, packed = torch.load(folder + "/in.pt")
results = [ops.linear(x, p, p_n) for p, p_n in packed]
results += [ops.embedding(torch.arange(p_n), p, x.shape[1], torch.float32) for p, p_n in packed]
results += ops.quantize(w, 4, "sub16", 16, True, "mse")
tiny = torch.full((1, len(w), 4, 64), 1 << 19, dtype=torch.int32).view(torch.float32)
half = torch.full((1, len(w), 64), 0.5)
results += [
    ops.rms_norm(w, tiny.flatten()[:x.shape[1]], 1e-6, 0.0, True),
    *ops.add_rms_norm(w, w, tiny.flatten()[:x.shape[1]], 1e-6, 0.0, True),
    ops.rotary(tiny, half, half, False),
    torch.ops.slmops._activation(torch.full((1 << 18,), -100.0), "exp"),
]
torch.save(results, folder + "/out.pt")
"""


def small_arguments() -> tuple[Tensor, Tensor, list[tuple[Tensor, int]]]:
    """Denormal activations, scales of all sizes, and weights of all sizes."""
    x = torch.randn(5, K) * 2.0**-138
    packed = [(random_packed(fmt, N, K), N) for fmt in FORMATS]
    packed.append((random_packed(FORMATS[1], N, K, scales="extreme"), N))
    w = torch.randn(N, K) * 2.0 ** torch.randint(-99, 0, (N, 1))
    w[:, ::3] *= 2.0**-40
    return x, w, packed


def results(x: Tensor, w: Tensor, packed: list[tuple[Tensor, int]]) -> list[Tensor]:
    found = [ops.linear(x, weight, n) for weight, n in packed]
    ids = torch.arange(N)
    found += [ops.embedding(ids, weight, K, torch.float32) for weight, _ in packed]
    found += ops.quantize(w, 4, "sub16", 16, True, "mse")
    tiny = torch.full((1, N, 4, 64), 1 << 19, dtype=torch.int32).view(torch.float32)  # 2^-130
    half = torch.full((1, N, 64), 0.5)
    vectors = [
        ops.rms_norm(w, tiny.flatten()[:K], 1e-6, 0.0, True),
        *ops.add_rms_norm(w, w, tiny.flatten()[:K], 1e-6, 0.0, True),
        ops.rotary(tiny, half, half, False),
        torch.ops.slmops._activation(torch.full((1 << 18,), -100.0), "exp"),
    ]
    return [*found, *vectors]


def count_denormals(x: Tensor) -> int:
    return int(((x != 0) & (x.abs() < 2.0**-126)).sum())


def test_pool_that_was_born_flushing(isa: str, tmp_path: Path) -> None:
    arguments = small_arguments()
    expected = results(*arguments)
    for linear in expected[:2]:
        assert count_denormals(linear) > linear.numel() // 2, "little here would be flushed"
    for i in (-5, -4, -2, -1):  # all vector ops but the sum; many rows of w are too small for eps
        assert count_denormals(expected[i]) > expected[i].numel() // 10, "little to flush"
    torch.save(arguments, tmp_path / "in.pt")
    subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT, str(tmp_path), isa],
        check=True,
        cwd=Path(torch_slmops.__file__).parents[1],
    )
    for i, (a, b) in enumerate(zip(torch.load(tmp_path / "out.pt"), expected, strict=True)):
        assert_same_bits(a, b, f"result {i}")


@pytest.mark.parametrize("count", [1, 4])
def test_caller_that_flushes(isa: str, count: int, threads: None) -> None:
    arguments = small_arguments()
    torch.set_num_threads(count)
    expected = results(*arguments)
    assert torch.set_flush_denormal(True)
    try:
        actual = results(*arguments)
        still = float(torch.tensor(2.0**-130) * 1.0)
    finally:
        torch.set_flush_denormal(False)
    assert still == 0.0, "the caller's setting was not restored"
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(a, b, f"result {i}")
