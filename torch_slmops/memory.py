"""Memory for packed weights: huge pages where the system has them, plain memory elsewhere.

A decode step reads every weight once, so it walks more 4 KiB pages than a CPU's translation cache
holds; 2 MiB pages spare it those misses. Only tensors made here lie in huge pages: a copy, a
`torch.load` or a `.clone()` is as usable, in plain memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap

import torch
from torch import Tensor

__all__ = ["HUGE_PAGE", "empty", "give_back"]

HUGE_PAGE = 2 << 20


def empty(size: int) -> Tensor:
    """Returns uninitialized memory as a tensor, in huge pages if it is long enough for one.

    Args:
        size: Length in bytes, not negative.

    Returns:
        uint8 [size], contiguous, with storage offset 0 and a storage of exactly `size` bytes. From
        2 MiB it begins at a multiple of 2 MiB. The memory is freed with the tensor's storage.
    """
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    # One page more than needed, so that a multiple of HUGE_PAGE is inside; what is never touched
    # takes address space only.
    region = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(region, dtype=torch.uint8).data_ptr() % HUGE_PAGE
    # A rest of less than half a page stays in small pages: rounding it up would waste more.
    rounded = (size + HUGE_PAGE // 2) // HUGE_PAGE * HUGE_PAGE
    with contextlib.suppress(OSError):  # A kernel without huge pages: slower, as good otherwise.
        region.madvise(mmap.MADV_HUGEPAGE, start, min(rounded, len(region) - start))
    return torch.frombuffer(region, dtype=torch.uint8, count=size, offset=start)


def give_back() -> None:
    """Returns freed memory to the system, where the C library keeps it (glibc does).

    Packing frees codes and float weights of some 30 MB each; glibc holds on to such pieces, 280 MB
    in the end for a Llama-3.2-1B.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
