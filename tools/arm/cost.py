"""Cost of the hot loops on AArch64: executed instructions, and llvm-mca's predicted cycles.

One call of a kernel runs under emulation, which logs the address of every instruction executed; the
instructions of the row, in the order of execution, are then what llvm-mca simulates. Loads are
taken to hit the first-level cache. A prediction, not a measurement. The same of KleidiAI's products
inside torch's wheel, whose rows and weights were packed before.

usage: tools/arm/cost.py [ROW KERNEL M]   without arguments: the tables of docs/performance.md
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARM = ROOT / ".arm"
PROGRAM, PEER = ARM / "tests" / "cost", ARM / "tests" / "peer"
LLVM = ARM / "llvm" / "usr" / "lib"
TORCH = ARM / "site" / "torch" / "lib"
CPUS = ["neoverse-n1", "neoverse-n2", "neoverse-v1", "neoverse-v2", "apple-m1"]
K, OUTPUTS, KEYS, DIM = 1024, 32, 256, 64  # as in cost.cpp and peer.cpp

# (row, kernel, rows of activations)
LINEAR = [
    (row, kernel, m)
    for kernel in ("int4-sub16", "int4-g32", "int4-g128", "int8-g32", "int8-g128")
    for row, m in (
        ("neon_dotprod", 1),
        ("neon_dotprod", 16),
        ("neon_i8mm", 16),
        ("neon_i8mm", 64),
    )
]
ATTENTION = [("neon_dotprod", "attention", m) for m in (1, 16)]
I8MM_CPUS = CPUS[1:4]
KLEIDI = "kai_run_matmul_clamp_f32_qai8dxp"
PEERS = [
    ("KleidiAI, dot products", f"{KLEIDI}1x8_qsi4c32p8x8_1x8x32_neon_dotprod", 1, CPUS),
    ("KleidiAI, i8mm", f"{KLEIDI}4x8_qsi4c32p8x8_4x8x32_neon_i8mm", 16, I8MM_CPUS),
]


@dataclass(frozen=True)
class Cost:
    """Executed instructions of a call, and predicted cycles by CPU."""

    instructions: int
    cycles: dict[str, int]


def output(*command: str | Path, **options: object) -> str:
    return subprocess.run(command, check=True, text=True, capture_output=True, **options).stdout  # type: ignore[call-overload, no-any-return]


@cache
def listing(program: Path, begin: int, end: int) -> dict[int, str]:
    """A program's instructions by address."""
    limits = [f"--start-address={begin:#x}", f"--stop-address={end:#x}"]
    command = ["aarch64-linux-gnu-objdump", "--disassemble", "--no-show-raw-insn", *limits]
    lines = re.findall(r"^\s+([0-9a-f]+):\t(.+)$", output(*command, program), re.MULTILINE)
    return {int(address, 16): line for address, line in lines}


def row_range(row: str) -> tuple[int, int]:
    """Addresses of a row's code: one object's."""
    symbols = output("aarch64-linux-gnu-nm", "--demangle", PROGRAM).splitlines()
    mine = [int(s.split()[0], 16) for s in symbols if re.match(rf"\w+ t .*slmops::{row}::", s)]
    ends = sorted(int(s.split()[0], 16) for s in symbols if re.match(r"\w+ [tT] ", s))
    return min(mine), next(end for end in ends if end > max(mine))


def trace(begin: int, end: int, *command: str | Path) -> list[int]:
    """Addresses in [begin, end) of the instructions that a program executes."""
    log = ARM / "trace.log"
    emulator = [ARM / "qemu-aarch64", "-cpu", "max", "-one-insn-per-tb", "-d", "exec,nochain"]
    emulator += ["-dfilter", f"{begin:#x}+{end - begin:#x}", "-D", log]
    output(*emulator, *command)
    return [int(a, 16) for a in re.findall(r"^Trace .*/([0-9a-f]{16})/", log.read_text(), re.M)]


def assembly(addresses: list[int], lines: dict[int, str]) -> str:
    """The text of instructions, with targets that llvm-mca can read."""
    text = []
    for address in addresses:
        line = re.sub(r"\s*(<.*>)?\s*(//.*)?$", "", lines[address])
        if re.match(r"(b|bl|b\.\w+|cbn?z|tbn?z|adrp?)\t", line):
            line = re.sub(r"[0-9a-f]+$", ".", line)
        text.append(line)
    return "\n".join(text) + "\n"


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
    begin, end = row_range(row)
    addresses = trace(begin, end, PROGRAM, row, kernel, str(m))
    text = assembly(addresses, listing(PROGRAM, begin, end))
    return Cost(len(addresses), {cpu: predicted(text, cpu) for cpu in cpus})


def peer_costs() -> Iterator[tuple[str, str, int, Cost]]:
    """KleidiAI's (kernel, name, M, cost) for groups of 32 and 128; one load of torch for all."""
    library = TORCH / "libtorch_cpu.so"
    symbols = output("aarch64-linux-gnu-nm", "-D", "--defined-only", library).splitlines()
    places = {name: int(address, 16) for address, _, name in (s.split() for s in symbols)}
    calls = [(name, run, m, cpus, g) for name, run, m, cpus in PEERS for g in (32, 128)]
    words = [word for _, run, m, _, g in calls for word in (run, str(m), str(g))]
    environment = f"LD_LIBRARY_PATH={TORCH}"
    start: list[str | Path] = ["-E", environment, "-L", ARM / "root", PEER, *words]
    # The library lies where its file says, moved by what the first entry says.
    entries = output(ARM / "qemu-aarch64", "-cpu", "max", *start).split()
    moved = int(entries[0], 16) - places[calls[0][1]]
    theirs = sorted(place for name, place in places.items() if name.startswith("kai_"))
    begin, end = theirs[0], theirs[-1] + 0x2000
    addresses = [a - moved for a in trace(begin + moved, end + moved, *start)]
    lines = listing(library, begin, end)
    firsts = [i for i, a in enumerate(addresses) if a in {places[run] for _, run, *_ in calls}]
    for call, i, j in zip(calls, firsts, [*firsts[1:], len(addresses)], strict=True):
        name, _, m, cpus, group = call
        text = assembly(addresses[i:j], lines)
        yield f"int4-g{group}", name, m, Cost(j - i, {cpu: predicted(text, cpu) for cpu in cpus})


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
    for kernel, name, m, found in peer_costs():
        show(name, kernel, m, found, K * OUTPUTS * m / 64)
    for row, kernel, m in ATTENTION:
        show(row, kernel, m, cost(row, kernel, m, CPUS), 2 * KEYS * DIM * m / 64)


def show(row: str, kernel: str, m: int, found: Cost, units: float) -> None:
    """A line of the table, per 64 products of a weight (a key's, a value's element) and a row."""
    cycles = [f"{found.cycles[cpu] / units:.2f}" if cpu in found.cycles else "" for cpu in CPUS]
    counted = f"{found.instructions / units:.2f}"
    print(f"| {kernel} | {row} | {m} | {counted} | {' | '.join(cycles)} |", flush=True)


if __name__ == "__main__":
    main()
