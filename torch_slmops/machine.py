"""What is known of the machine: its CPU, cores, memory and huge pages, as the system tells it."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from pathlib import Path

from torch import Tensor

from torch_slmops import memory

__all__ = [
    "cpu_name",
    "cpus_allowed",
    "cpus_of_quota",
    "huge_page_mode",
    "in_huge_pages",
    "memory_bytes",
]

_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def _read(path: Path) -> str:
    """The text of a file, empty where there is none."""
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


def cpu_name() -> str:
    """Returns the processor's name: of /proc/cpuinfo, lscpu (Arm) or sysctl (macOS)."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    commands = (
        (["lscpu"], r"^Model name:\s*(.+)$"),
        (["sysctl", "-n", "machdep.cpu.brand_string"], r"^(.+)$"),
    )
    for command, pattern in commands:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            printed = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
            found = re.search(pattern, printed, re.MULTILINE)
            if found is not None:
                return found.group(1).strip()
    return platform.processor() or platform.machine()


def cpus_allowed() -> int:
    """Returns the number of CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpus_of_quota() -> float | None:
    """Returns how many CPUs' time the container (cgroup v2) may use, None without such a limit."""
    words = _read(_QUOTA).split()
    if len(words) != 2 or words[0] == "max":
        return None
    return int(words[0]) / int(words[1])


def huge_page_mode() -> str:
    """Returns Linux' setting of transparent huge pages: "always", "madvise", "never", or ""."""
    found = re.search(r"\[(\w+)\]", _read(_THP))
    return "" if found is None else found.group(1)


def in_huge_pages() -> bool | None:
    """Returns whether a new packed weight lies in huge pages; None if the system doesn't say."""
    region = memory.empty(2 * memory.HUGE_PAGE).fill_(1)
    return _lies_in_huge_pages(region)


def _lies_in_huge_pages(x: Tensor) -> bool | None:
    address = x.data_ptr()
    inside = False
    for line in _read(Path("/proc/self/smaps")).splitlines():
        limits = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if limits is not None:
            first, end = (int(limit, 16) for limit in limits.groups())
            inside = first <= address < end
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) > 0
    return None


def memory_bytes() -> tuple[int, int] | None:
    """Returns the machine's memory and what of it is available, in bytes; None if not Linux."""
    sizes = dict(re.findall(r"^(\w+):\s*(\d+) kB$", _read(Path("/proc/meminfo")), re.MULTILINE))
    if "MemTotal" not in sizes or "MemAvailable" not in sizes:
        return None
    return int(sizes["MemTotal"]) * 1024, int(sizes["MemAvailable"]) * 1024
