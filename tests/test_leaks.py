"""Calling an op again and again allocates nothing that stays."""

from __future__ import annotations

import ctypes
import gc
import sys

import pytest
import torch
from attention_cases import ATTENTION_CASES
from cases import CASES, Case
from fused_cases import FUSED_CASES
from test_decoder_layers import CASES as LAYERS

import torch_slmops
from torch_slmops import ops

CALLS = 200
# Less than the least that malloc gives, 32 bytes, more than lists and caches grow by.
MOST_PER_CALL = 24

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks glibc"
)


class Mallinfo2(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks".split()
    ] + [("keepcost", ctypes.c_size_t)]


def used_bytes() -> int:
    """Bytes that the process has from malloc."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Mallinfo2
    found = mallinfo2()
    return int(found.uordblks + found.hblkhd)


def assert_keeps_nothing(call: object) -> None:
    assert callable(call)
    gc.collect()
    for _ in range(CALLS // 4):
        call()
    # Lists and caches grow now and then, so the least of some tries counts.
    grown = []
    for _ in range(3):
        before = used_bytes()
        for _ in range(CALLS):
            call()
        grown.append(used_bytes() - before)
    assert min(grown) < MOST_PER_CALL * CALLS, grown


def first_of_each() -> list[Case]:
    found: dict[str, Case] = {}
    for case in [*CASES, *FUSED_CASES, *ATTENTION_CASES]:
        found.setdefault(case.op, case)
    return list(found.values())


@pytest.mark.parametrize("case", first_of_each(), ids=lambda case: case.op)
def test_op(case: Case) -> None:
    arguments, op = case.arguments(torch.float32), getattr(ops, case.op)
    if isinstance(arguments, dict):
        assert_keeps_nothing(lambda: op(**arguments))
    else:
        assert_keeps_nothing(lambda: op(*arguments))


def test_decoder_layers() -> None:
    arguments = LAYERS[0].arguments(torch.float32)
    assert_keeps_nothing(lambda: ops.decoder_layers(**arguments))


def test_rows_and_headers() -> None:
    """Not so an op that returns a string: torch keeps 48 bytes of each (`isa()`, `isas()`)."""
    name = torch_slmops.isa()
    packed = torch_slmops.quantize_weight(torch.randn(8, 64)).pack()
    bytes_, copy = torch.zeros(100, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8)

    def call() -> None:
        torch.ops.slmops._set_isa.default(name)
        ops.describe(packed)
        ops.copy_checksum(copy, bytes_)

    assert_keeps_nothing(call)


def test_refused_calls() -> None:
    """What an op was given is freed where it refuses it, too."""
    x, packed = torch.randn(2, 64), torch_slmops.quantize_weight(torch.randn(8, 64)).pack()

    def call() -> None:
        with pytest.raises(RuntimeError, match="activation"):
            ops.swiglu(x, packed, packed, 3, 8, "no such activation")

    assert_keeps_nothing(call)
