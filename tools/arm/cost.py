"""The cost of the hot loops on AArch64: executed instructions, and llvm-mca's predicted cycles.

One call of a kernel runs under emulation, which logs the address of every instruction executed; the
instructions of the row, in the order of execution, are then what llvm-mca simulates. Loads are
taken to hit the first-level cache. A prediction, not a measurement.

usage: tools/arm/cost.py [ROW KERNEL M]   without arguments: the tables of docs/performance.md
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARM = ROOT / ".arm"
PROGRAM = ARM / "tests" / "cost"
LLVM = ARM / "llvm" / "usr" / "lib"
CPUS = ["neoverse-n1", "neoverse-n2", "neoverse-v1", "neoverse-v2", "apple-m1"]
K, OUTPUTS, KEYS, DIM = 1024, 32, 256, 64  # as in cost.cpp

# (row, kernel, rows of activations)
LINEAR = [
    (row, kernel, m)
    for kernel in ("int4-sub16", "int4-g32", "int4-g128", "int8-g32", "int8-g128")
    for row, m in (("neon_dotprod", 1), ("neon_dotprod", 16), ("neon_i8mm", 16))
]
ATTENTION = [("neon_dotprod", "attention", m) for m in (1, 16)]
I8MM_CPUS = CPUS[1:4]


@dataclass(frozen=True)
class Cost:
    """Executed instructions of a call, and predicted cycles by CPU."""

    instructions: int
    cycles: dict[str, int]


def output(*command: str | Path, **options: object) -> str:
    return subprocess.run(command, check=True, text=True, capture_output=True, **options).stdout  # type: ignore[call-overload, no-any-return]


@cache
def listing() -> dict[int, str]:
    """The program's instructions by address."""
    text = output("aarch64-linux-gnu-objdump", "--disassemble", "--no-show-raw-insn", PROGRAM)
    lines = re.findall(r"^\s+([0-9a-f]+):\t(.+)$", text, re.MULTILINE)
    return {int(address, 16): line for address, line in lines}


def row_range(row: str) -> tuple[int, int]:
    """Addresses of a row's code: one object's."""
    symbols = output("aarch64-linux-gnu-nm", "--demangle", PROGRAM).splitlines()
    mine = [int(s.split()[0], 16) for s in symbols if re.match(rf"\w+ t .*slmops::{row}::", s)]
    ends = sorted(int(s.split()[0], 16) for s in symbols if re.match(r"\w+ [tT] ", s))
    return min(mine), next(end for end in ends if end > max(mine))


def trace(row: str, kernel: str, m: int) -> list[int]:
    """Addresses of the row's instructions, as executed."""
    begin, end = row_range(row)
    log = ARM / "trace.log"
    emulator = [ARM / "qemu-aarch64", "-cpu", "max", "-one-insn-per-tb", "-d", "exec,nochain"]
    emulator += ["-dfilter", f"{begin:#x}+{end - begin:#x}", "-D", log]
    output(*emulator, PROGRAM, row, kernel, str(m))
    return [int(a, 16) for a in re.findall(r"^Trace .*/([0-9a-f]{16})/", log.read_text(), re.M)]


def assembly(addresses: list[int]) -> str:
    """The text of instructions, with targets that llvm-mca can read."""
    lines = []
    for address in addresses:
        line = re.sub(r"\s*(<.*>)?\s*(//.*)?$", "", listing()[address])
        if re.match(r"(b|bl|b\.\w+|cbn?z|tbn?z|adrp?)\t", line):
            line = re.sub(r"[0-9a-f]+$", ".", line)
        lines.append(line)
    return "\n".join(lines) + "\n"


def predicted(text: str, cpu: str) -> int:
    """llvm-mca's cycles of the instructions, executed once."""
    library = f"{LLVM}/x86_64-linux-gnu:{LLVM}/llvm-19/lib"
    command = [LLVM / "llvm-19" / "bin" / "llvm-mca", "-mtriple=aarch64", f"-mcpu={cpu}"]
    command += ["-mattr=+dotprod,+i8mm", "-iterations=1", "-all-stats=false", "-all-views=false"]
    found = output(
        *command, "-summary-view", input=text, env={**os.environ, "LD_LIBRARY_PATH": library}
    )
    match = re.search(r"Total Cycles:\s+(\d+)", found)
    assert match is not None
    return int(match[1])


def cost(row: str, kernel: str, m: int, cpus: list[str]) -> Cost:
    addresses = trace(row, kernel, m)
    text = assembly(addresses)
    return Cost(len(addresses), {cpu: predicted(text, cpu) for cpu in cpus})


def main() -> None:
    if len(sys.argv) == 4:
        row, kernel, m = sys.argv[1], sys.argv[2], int(sys.argv[3])
        print(cost(row, kernel, m, CPUS))
        return
    print(f"| weights | row | M | instructions | {' | '.join(CPUS)} |")
    print("|---" * (len(CPUS) + 4) + "|")
    for row, kernel, m in LINEAR:
        cpus = I8MM_CPUS if row == "neon_i8mm" else CPUS
        show(row, kernel, m, cost(row, kernel, m, cpus), K * OUTPUTS * m / 64)
    for row, kernel, m in ATTENTION:
        show(row, kernel, m, cost(row, kernel, m, CPUS), 2 * KEYS * DIM * m / 64)


def show(row: str, kernel: str, m: int, found: Cost, units: float) -> None:
    """A line of the table, per 64 products of a weight (a key's, a value's element) and a row."""
    cycles = [f"{found.cycles[cpu] / units:.2f}" if cpu in found.cycles else "" for cpu in CPUS]
    counted = f"{found.instructions / units:.2f}"
    print(f"| {kernel} | {row} | {m} | {counted} | {' | '.join(cycles)} |", flush=True)


if __name__ == "__main__":
    main()
