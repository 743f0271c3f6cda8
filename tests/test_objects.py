"""The compiled objects keep the build rules: nothing of one ISA row reaches a CPU without it.

A weak symbol, a static initialiser or a leaked compiler flag in a row's object crashes older CPUs,
and only those; so the objects themselves are read.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_slmops  # noqa: F401 - registers the ops
from tests.builds import ROOT, load_setup

# Compiles the named rows and the torch-free baseline files with setup.py's own commands.
BUILD_SOME = """
import importlib.util, glob, sys
spec = importlib.util.spec_from_file_location("slmops_setup", "setup.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
build.ISAS = {row: build.ISAS[row] for row in ("avx_vnni", "avx2", "scalar")}
build.sources = lambda: ["csrc/isa/isa.cpp", *glob.glob("csrc/pack/*.cpp")]
build.main()
"""
HOSTILE_CFLAGS = "-O1 -mavx512f -mavx512vl -mavx512vnni -mbmi2 -mpopcnt -mlzcnt -ffast-math -flto"

KERNEL_IMPORTS = {"fmaf", "memcpy", "memmove", "memset"}
ABOVE_BASELINE = set(
    "andn bextr blsi blsmsk blsr bzhi lzcnt movbe mulx pdep pext popcnt rorx sarx shlx shrx".split()
)

x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="flags and mnemonics of x86")


build = load_setup()


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def row_object(row: str) -> Path:
    path = ROOT / "build" / "objects" / row / "csrc" / "isa" / f"{row}.o"
    assert path.exists(), f"expected {path.relative_to(ROOT)}, got no such file: run `make build`"
    return path


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(type letter, demangled name) of each symbol that `nm` lists."""
    lines = output("nm", "--demangle", "--format=posix", *options, path).splitlines()
    return [(m[2], m[1]) for line in lines if (m := re.match(r"(.+?) ([A-Za-z])(?: |$)", line))]


def instructions(path: Path) -> list[tuple[str, str]]:
    """(mnemonic, operands) of each instruction."""
    lines = output("objdump", "--disassemble", "--no-show-raw-insn", path).splitlines()
    fields = (re.match(r"\s+[0-9a-f]+:\s+(\S+)\s*(.*)", line) for line in lines)
    found = [(field[1], field[2]) for field in fields if field]
    assert len(found) > 100, f"objdump shows no code in {path}"
    return found


def test_rows_of_setup_table_and_files_agree() -> None:
    files = {path.stem for path in (ROOT / "csrc" / "isa").glob("*.cpp")} - {"isa"}
    assert files == set(build.ISAS) | set(build.EXTRAS)
    assert torch.ops.slmops._isa_rows().split(", ") == list(build.rows())


@pytest.mark.parametrize("row", build.objects())
def test_row_defines_its_table_and_nothing_else(row: str) -> None:
    assert symbols(row_object(row), "--defined-only", "--extern-only") == [
        ("D", f"slmops::{row}::kernels")
    ]


@pytest.mark.parametrize("row", build.objects())
def test_row_needs_only_the_c_library(row: str) -> None:
    needed = {name for _, name in symbols(row_object(row), "--undefined-only")}
    assert needed - {"_GLOBAL_OFFSET_TABLE_"} <= KERNEL_IMPORTS


@pytest.mark.parametrize("row", build.objects())
def test_row_runs_nothing_at_load(row: str) -> None:
    sections = set(
        re.findall(r"\] (\.\S+)", output("readelf", "--sections", "-W", row_object(row)))
    )
    assert ".text" in sections
    assert not {s for s in sections if s.startswith((".init_array", ".ctors", ".fini_array"))}


@pytest.mark.parametrize("row", build.objects())
def test_row_has_every_kernel(row: str) -> None:
    """Each pointer of the table is a relocation; a null one would be none."""
    listing = output("nm", "--demangle", "--print-size", row_object(row))
    table = re.search(r"^([0-9a-f]+) ([0-9a-f]+) D slmops::\w+::kernels$", listing, re.MULTILINE)
    assert table is not None
    begin, size = int(table[1], 16), int(table[2], 16)
    sections = output("readelf", "--relocs", "-W", row_object(row)).split("Relocation section ")
    offsets = [
        int(offset, 16)
        for section in sections
        if section.startswith("'.rela.data.rel.ro")
        for offset in re.findall(r"^([0-9a-f]{16}) ", section, re.MULTILINE)
    ]
    assert size > 0
    assert sorted(offsets) == list(range(begin, begin + size, 8))


def test_extension_uses_the_stable_abi_only() -> None:
    extension = ROOT / "torch_slmops" / "_C.abi3.so"
    foreign = re.compile(r"\b(at|c10|torch|pybind11)::")
    assert [n for _, n in symbols(extension, "-D", "--undefined-only") if foreign.search(n)] == []
    assert "slmops" not in output("nm", "-D", "--demangle", "--defined-only", extension)
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", output("readelf", "--dynamic", extension))
    assert "libtorch_cpu.so" in needed
    assert [
        name for name in needed if re.match(r"lib(gomp|omp|iomp5|python|torch_python)", name)
    ] == []


@x86_only
@pytest.mark.parametrize("row", build.objects())
def test_flags_win_over_a_users(row: str) -> None:
    command = [*shlex.split(os.environ.get("CXX", "c++")), *HOSTILE_CFLAGS.split()]
    command += [*build.COMMON_FLAGS, *build.BASELINE_FLAGS, *build.objects()[row]]
    macros = set(
        re.findall(r"#define (\w+)", output(*command, "-dM", "-E", "-x", "c++", os.devnull))
    )
    assert "__SSE2__" in macros
    assert "__FAST_MATH__" not in macros
    assert ("__AVX512F__" in macros) == row.startswith(("amx", "avx512"))
    assert ("__AVX512BF16__" in macros) == (row == "avx512_bf16")
    assert ("__AMX_INT8__" in macros) == (row == "amx")
    assert ("__AVXVNNI__" in macros) == (row == "avx_vnni")
    assert ("__AVX__" in macros) == ("__SSE3__" in macros) == (row != "scalar")
    assert "__BMI2__" not in macros


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Objects built by setup.py under a user's CFLAGS that ask for more than any CPU has."""
    folder = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, "-c", BUILD_SOME, "-q", "build_ext"]
    command += ["--build-temp", str(folder / "objects"), "--build-lib", str(folder / "lib")]
    subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"CFLAGS": HOSTILE_CFLAGS, "CXXFLAGS": HOSTILE_CFLAGS},
        check=True,
    )
    return folder / "objects"


@x86_only
@pytest.mark.parametrize("name", ["scalar/csrc/isa/scalar", "csrc/isa/isa", "csrc/pack/tiles"])
def test_baseline_objects_have_no_leaked_instructions(hostile: Path, name: str) -> None:
    leaked = {
        mnemonic
        for mnemonic, operands in instructions(hostile / f"{name}.o")
        if mnemonic.startswith("v") or mnemonic in ABOVE_BASELINE or re.search("%[yz]mm", operands)
    }
    assert leaked == set()


# What only EVEX can encode: masks, the wider registers, the upper half of the others. Without these
# an instruction that both encodings have is one of VEX unless its line says {evex}.
EVEX = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])\b|\{evex\}|\{1to")


def dots(code: list[tuple[str, str]]) -> dict[str, int]:
    """How many there are of each integer dot product instruction."""
    # objdump writes the prefix of a VEX-encoded vpdpbusd in the place of the mnemonic.
    found = [
        f"{name} {operands.split()[0]}" if name == "{vex}" else name for name, operands in code
    ]
    return {name: found.count(name) for name in set(found) if re.search("vpdp|tdp", name)}


@x86_only
@pytest.mark.parametrize("row", ["avx2", "avx_vnni"])
def test_avx2_objects_have_no_avx512(hostile: Path, row: str) -> None:
    code = instructions(hostile / row / "csrc" / "isa" / f"{row}.o")
    assert any("%ymm" in operands for _, operands in code)
    assert [line for line in code if EVEX.search(" ".join(line))] == []


@x86_only
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("amx", {"tdpbsud", "vpdpbusd", "vpdpwssd"}),
        ("avx512_vnni", {"vpdpbusd", "vpdpwssd"}),
        ("avx_vnni", {"{vex} vpdpbusd", "{vex} vpdpwssd"}),
        ("avx2", set()),
        ("scalar", set()),
    ],
)
def test_row_has_its_integer_dots(row: str, expected: set[str]) -> None:
    found = dots(instructions(row_object(row)))
    assert set(found) == expected
    assert all(count >= 10 for count in found.values())


@x86_only
def test_dots_of_bf16_are_in_one_object() -> None:
    for row in build.objects():
        found = [name for name, _ in instructions(row_object(row)) if name == "vdpbf16ps"]
        assert (len(found) >= 10) == (row == "avx512_bf16")


@x86_only
def test_tiles_are_configured_and_released() -> None:
    """In one place each: what configures them has one way out."""
    names = [name for name, _ in instructions(row_object("amx"))]
    assert names.count("ldtilecfg") == names.count("tilerelease") == 1
