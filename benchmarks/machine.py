"""Probes of the machine, taken beside every measurement: its limits drift with its neighbours."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from torch_slmops.bench.timing import Timing, interleaved


@dataclass(frozen=True)
class Limits:
    """What the machine can do at best, on all threads of torch.

    Attributes:
        bandwidth: Bytes per second of reading huge pages, best of three access patterns.
        int8_peak: int8 operations per second (2 per multiply-add) of dot instructions in registers:
            vpdpbusd, or where the CPU lacks it what does the same: vpmaddubsw, vpmaddwd, vpaddd.
    """

    bandwidth: float
    int8_peak: float

    def best(self, other: Limits) -> Limits:
        """The higher of each limit."""
        bandwidth = max(self.bandwidth, other.bandwidth)
        return Limits(bandwidth, max(self.int8_peak, other.int8_peak))

    def __str__(self) -> str:
        return f"{self.bandwidth / 1e9:.1f} GB/s, {self.int8_peak / 1e9:.0f} GOPS"


@cache
def _library() -> ctypes.CDLL:
    target = Path(tempfile.mkdtemp(prefix="slmops-probes-")) / "probes.so"
    source = Path(__file__).with_name("probes.cpp")
    flags = ["-O3", "-march=native", "-std=c++20", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["g++", *flags, str(source), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    library.read_bandwidth.restype = ctypes.c_double
    library.read_bandwidth.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    library.int8_peak.restype = ctypes.c_double
    library.int8_peak.argtypes = [ctypes.c_int]
    library.fp32_peak.restype = ctypes.c_double
    library.fp32_peak.argtypes = [ctypes.c_int]
    return library


def probe(buffer: torch.Tensor) -> Limits:
    """Measures the limits; `buffer` is what is read, far larger than the caches."""
    threads = torch.get_num_threads()
    size = buffer.numel() * buffer.element_size()
    return Limits(
        _library().read_bandwidth(buffer.data_ptr(), size, threads), _library().int8_peak(threads)
    )


def interleaved_with_limits(
    candidates: Mapping[str, Callable[[int], object]], buffer: torch.Tensor, *, budget: float
) -> tuple[dict[str, Timing], Limits]:
    """As `interleaved`, with the machine's limits taking their turns: the median bandwidth of these
    and the highest peak. The bandwidth jumps within minutes, so one from before or after is not
    that of the calls.
    """
    found: list[Limits] = []
    calls = {**candidates, "limits": lambda _: found.append(probe(buffer))}
    timings = interleaved(calls, budget=budget)
    del timings["limits"]
    bandwidth = statistics.median(limits.bandwidth for limits in found)
    return timings, Limits(bandwidth, max(limits.int8_peak for limits in found))


def fp32_peak(threads: int) -> float:
    """fp32 multiply-adds per second of FMA instructions in registers."""
    peak: float = _library().fp32_peak(threads)
    return peak
