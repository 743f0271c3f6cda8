"""What is known of the machine: its CPU, cores, memory and huge pages, as the system tells it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import subprocess
from pathlib import Path

from torch import Tensor

from torch_slmops import memory

__all__ = [
    "cpu_family",
    "cpu_name",
    "cpus_allowed",
    "cpus_of_quota",
    "fast_cores",
    "huge_page_mode",
    "in_huge_pages",
    "memory_bytes",
    "physical_cores",
]

_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_CPUS = Path("/sys/devices/system/cpu")
_NODES = Path("/sys/devices/system/node")
_HYBRID = Path("/sys/devices/cpu_core/cpus")
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


def cpu_family() -> tuple[str, int]:
    """Returns the vendor and family of /proc/cpuinfo, ("AuthenticAMD", 26) say; ("", 0) without."""
    text = _read(Path("/proc/cpuinfo"))
    vendor = re.search(r"^vendor_id\s*:\s*(\S+)$", text, re.MULTILINE)
    family = re.search(r"^cpu family\s*:\s*(\d+)$", text, re.MULTILINE)
    return ("", 0) if vendor is None or family is None else (vendor[1], int(family[1]))


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


def physical_cores() -> int:
    """Returns the cores that this process may run on; hyperthreads of one count once."""
    if not hasattr(os, "sched_getaffinity"):
        return cpus_allowed()
    return len(_cores(os.sched_getaffinity(0)))


def fast_cores() -> int:
    """Returns the performance cores that this process may use, on the NUMA node it runs on.

    Hyperthreads of a core count once. Where the system does not say (no Linux), all CPUs count.
    """
    if not hasattr(os, "sched_getaffinity"):
        return cpus_allowed()
    cpus = os.sched_getaffinity(0)
    return len(_cores(_largest(_of_node(cpus, _node_cpus()))))


def _cpu_list(text: str) -> set[int]:
    """The CPUs of a list as Linux writes it, such as "0-3,8"."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            found.update(range(int(first), int(last or first) + 1))
    return found


def _node_cpus() -> set[int]:
    """The CPUs of the node that the caller runs on; none where it is unknown or the only one."""
    here = _here()
    for node in _NODES.glob("node[0-9]*"):
        cpus = _cpu_list(_read(node / "cpulist"))
        if here in cpus:
            return cpus
    return set()


def _here() -> int:
    """The CPU that the caller runs on; -1 where the system does not say."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        here: int = ctypes.CDLL(None).sched_getcpu()
        return here
    return -1


def _of_node(cpus: set[int], node: set[int]) -> set[int]:
    return cpus & node or cpus


def _largest(cpus: set[int]) -> set[int]:
    """Those of the fastest kind: Intel's cpu_core, or of the largest capacity (Arm)."""
    fast = cpus & _cpu_list(_read(_HYBRID))
    if fast:
        return fast
    capacity = {cpu: _read(_CPUS / f"cpu{cpu}" / "cpu_capacity").strip() for cpu in cpus}
    known = {cpu: int(text) for cpu, text in capacity.items() if text.isdigit()}
    if len(known) != len(cpus):
        return cpus
    return {cpu for cpu, value in known.items() if value == max(known.values())}


def _cores(cpus: set[int]) -> set[str]:
    """What hyperthreads share: the list of their siblings."""
    return {
        _read(_CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").strip() or str(cpu)
        for cpu in cpus
    }


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
