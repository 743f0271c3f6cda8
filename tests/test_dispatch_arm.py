"""Which row an AArch64 CPU gets: `select` on imaginary CPUs, and what this one offers."""

from __future__ import annotations

import platform

import pytest
import torch

import torch_slmops
from torch_slmops.isa import features

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("aarch64", "arm64"), reason="rows of AArch64"
)

# In cpuinfo's spelling, with some of the features that no row asks for.
IMAGINARY_CPUS = {
    "Cortex-A72": ("neon, crc32, aes", "scalar"),
    "A64FX": ("neon, atomics, rdm, sve, fp16_arith", "scalar"),
    "Cortex-A76": ("neon, atomics, rdm, fp16_arith, dot", "neon_dotprod"),
    "Neoverse N1": ("neon, atomics, rdm, fp16_arith, dot", "neon_dotprod"),
    "Neoverse V1": ("neon, dot, i8mm, bf16, sve", "neon_i8mm"),
    "Neoverse V2": ("neon, dot, i8mm, bf16, sve, sve2", "neon_i8mm"),
    "i8mm without dot": ("neon, i8mm", "scalar"),
}


@pytest.mark.parametrize("cpu", IMAGINARY_CPUS)
def test_best_row(cpu: str) -> None:
    cpu_features, row = IMAGINARY_CPUS[cpu]
    assert torch.ops.slmops._select(cpu_features, "") == row


@pytest.mark.parametrize("cap", ["neon_i8mm", "neon_dotprod", "scalar"])
def test_cap(cap: str) -> None:
    assert torch.ops.slmops._select("dot, i8mm", cap) == cap


@pytest.mark.parametrize("cap", ["neon_i8mm", "neon", "avx2"])
def test_bad_cap_lists_what_can_run(cap: str) -> None:
    with pytest.raises(
        RuntimeError, match=rf"expected one of neon_dotprod, scalar .*, got '{cap}'"
    ):
        torch.ops.slmops._select("dot", cap)


def test_rows_follow_the_features() -> None:
    wanted = {"dot": "neon_dotprod", "i8mm": "neon_i8mm"}
    offered = {row for name, row in wanted.items() if name in features()}
    assert set(torch_slmops.isas()) == offered | {"scalar"}
    assert torch_slmops.isa() == torch_slmops.isas()[0]


def test_cpuinfo_and_system_agree() -> None:
    assert torch.ops.slmops._isa_features(False) == torch.ops.slmops._isa_features(True)
