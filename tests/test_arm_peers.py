"""On AArch64: our products are at least as near to exact ones as those of the kernels in torch.

KleidiAI, inside torch, multiplies rows of float32 by int4 weights, its activations rounded to int8
per row; the Arm Compute Library makes torch's dense products there. All have the same weights.
"""

from __future__ import annotations

import platform

import pytest
import torch
from torch import Tensor

from torch_slmops import ops, reference

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("aarch64", "arm64"), reason="peers of AArch64"
)

N, K = 256, 1024


def weight(group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scales that float16 and bfloat16 both hold, the exact weight in float64)."""
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    scale = (torch.rand(N, K // group) / 32 + 1 / 64).bfloat16()
    exact = (codes.double() - 8) * scale.double().repeat_interleave(group, 1)
    return codes, scale, exact


def activations(rows: int, massive: bool) -> Tensor:
    """float32 [rows, K]; a massive channel is what language models have."""
    x = torch.randn(rows, K)
    if massive:
        x[:, 77] *= 60
    return x


def error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


def ours(x: Tensor, codes: Tensor, scale: Tensor, group: int, mode: str) -> Tensor:
    packed = reference.pack(codes, scale.half(), None, None, 4, group, 128, mode)
    return ops.linear(x, packed, N)


@pytest.mark.skipif(not torch.backends.kleidiai.is_available(), reason="torch without KleidiAI")
@pytest.mark.parametrize("massive", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 19])
@pytest.mark.parametrize("group", [32, 128])
def test_int8_activations_against_kleidiai(isa: str, group: int, rows: int, massive: bool) -> None:
    codes, scale, exact = weight(group)
    x = activations(rows, massive)
    halves = codes[:, 1::2] << 4 | codes[:, ::2]
    packed = torch.ops.aten._dyn_quant_pack_4bit_weight(halves, scale, None, group, K, N)
    theirs = torch.ops.aten._dyn_quant_matmul_4bit(x, packed, group, K, N)
    product = x.double() @ exact.T
    their_error = error(theirs, product)
    assert 0 < their_error < 0.05  # it has computed the same thing
    assert error(ours(x, codes, scale, group, "int8"), product) <= their_error


@pytest.mark.skipif(not torch.backends.mkldnn.is_acl_available(), reason="torch without ACL")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 19])
def test_float_activations_against_the_arm_compute_library(
    isa: str, rows: int, dtype: torch.dtype
) -> None:
    codes, scale, exact = weight(32)
    x = activations(rows, massive=False).to(dtype)
    product = x.double() @ exact.T
    theirs = torch.nn.functional.linear(x, exact.to(dtype))
    their_error = error(theirs, product)
    assert 0 < their_error < 0.01
    y = ours(x, codes, scale, 32, "float")
    assert y.dtype == dtype
    assert error(y, product) <= their_error
