"""Builds `torch_slmops._C`: one stable-ABI extension whose ISA rows each have their own flags."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
# Windows calls it AMD64, macOS arm64.
MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
MSVC = platform.system() == "Windows"

# torch 2.10, the first whose stable ABI has parallel_for and const data pointers.
TORCH_TARGET_VERSION = "0x020a000000000000"
MINIMUM_COMPILERS = {"g++": 11, "clang++": 14}

# They follow a user's CFLAGS on the command line and so win over them: fast-math, contraction or
# an architecture above the baseline would break the promise of equal bits or crash older CPUs.
# MSVC's have not been tried by anybody yet; its /fp:precise contracts nothing (Visual Studio 2022),
# and it does not know the pragmas that unroll.
MSVC_COMMON_FLAGS = "/std:c++20 /O2 /fp:precise /GL- /W3 /wd4068".split()
GNU_COMMON_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-fast-math",
    "-fno-lto",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    f"-ffile-prefix-map={ROOT}=.",
    "-Wall",
]
COMMON_FLAGS = MSVC_COMMON_FLAGS if MSVC else GNU_COMMON_FLAGS
GNU_BASELINE_FLAGS = {
    # -march alone leaves an earlier -mavx512f in force; switching SSE3 off takes all that builds
    # on it (SSE4, AVX, AVX-512, FMA, F16C) with it.
    "x86_64": (
        "-march=x86-64 -mtune=generic"
        " -mno-sse3 -mno-popcnt -mno-lzcnt -mno-bmi -mno-bmi2 -mno-movbe"
    ).split(),
    "aarch64": ["-march=armv8-a"],
}.get(MACHINE, [])
BASELINE_FLAGS = [] if MSVC else GNU_BASELINE_FLAGS

# Every ISA row: the machine it is for (None: all), its flags, and MSVC's. The file is
# csrc/isa/<row>.cpp.
AVX2_FLAGS = "-mavx2 -mfma -mf16c".split()
AVX512_FLAGS = [
    *"-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni".split(),
    *AVX2_FLAGS,
]
ISAS: dict[str, tuple[str | None, list[str], list[str]]] = {
    "amx": ("x86_64", ["-mamx-tile", "-mamx-int8", *AVX512_FLAGS], ["/arch:AVX512"]),
    "avx512_vnni": ("x86_64", AVX512_FLAGS, ["/arch:AVX512"]),
    "avx_vnni": ("x86_64", ["-mavxvnni", *AVX2_FLAGS], ["/arch:AVX2"]),
    "avx2": ("x86_64", AVX2_FLAGS, ["/arch:AVX2"]),
    "neon_i8mm": ("aarch64", ["-march=armv8.2-a+dotprod+i8mm"], []),
    "neon_dotprod": ("aarch64", ["-march=armv8.2-a+dotprod"], []),
    "scalar": (None, [], []),
}
# Compiled as a row is, but no row: kernels that stand beside one, for CPUs that have more.
EXTRAS: dict[str, tuple[str | None, list[str]]] = {
    "avx512_bf16": ("x86_64", ["-mavx512bf16", *AVX512_FLAGS]),
}
# No exceptions, type information or guarded statics: each would bring weak symbols, which the
# linker may keep for everybody although they were compiled for one row's CPU.
GNU_ROW_FLAGS = [
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-threadsafe-statics",
    "-fno-math-errno",
    "-Wextra",
]
ROW_FLAGS = "/GR- /Zc:threadSafeInit-".split() if MSVC else GNU_ROW_FLAGS
GCC_ROW_FLAGS = [
    # g++ would gather a block's additions after all its products, whose 64 results then go through
    # the stack: 4.6 instead of 3.4 instructions per product (avx2, int4).
    "-fno-tree-ter",
    "-fno-tree-reassoc",
    # Its scheduler would read a tile's lines out of order, which the CPU's own prefetching takes
    # badly: 1.3 to 1.4 times the time of 4 rows (avx512_vnni, sub16 and int8, Zen 4).
    "-fno-schedule-insns2",
    # The one before register allocation, which g++ runs on AArch64 only, would have all of a
    # block's lines in registers at once: 1.7 times the instructions (neon_dotprod, sub16).
    "-fno-schedule-insns",
    # g++ 12 warns about its own AVX-512 headers.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]


def rows() -> dict[str, list[str]]:
    """Flags of each ISA row of this machine, best row first."""
    mine = {row: flags for row, (machine, *flags) in ISAS.items() if machine in (None, MACHINE)}
    return {row: msvc if MSVC else gnu for row, (gnu, msvc) in mine.items()}


def objects() -> dict[str, list[str]]:
    """Flags of each file of csrc/isa/ that this machine compiles on its own."""
    extras = {name: flags for name, (machine, flags) in EXTRAS.items() if machine == MACHINE}
    return rows() | extras


def sources() -> list[str]:
    """The files compiled with baseline flags, relative to the root."""
    folders = [ROOT / "csrc" / folder for folder in ("pack", "kernels", "ops")]
    files = [file for folder in folders for file in folder.glob("*.cpp")]
    files.append(ROOT / "csrc" / "isa" / "isa.cpp")
    return sorted(str(file.relative_to(ROOT)) for file in files)


def headers() -> list[str]:
    """All headers, relative to the root."""
    files = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.inl")]
    return sorted(str(file.relative_to(ROOT)) for file in files)


def compiler_name() -> str:
    """What $CXX, else c++, is: "g++" or "clang++"; RuntimeError if it is missing or too old."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    wanted = " or ".join(f"{name} {version}" for name, version in MINIMUM_COMPILERS.items())
    try:
        macros = subprocess.run(
            [*command, "-dM", "-E", "-x", "c++", os.devnull],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"expected a C++ compiler, {wanted} or later, got {command} ({error}): "
            "install one or set CXX"
        ) from error
    found = dict(re.findall(r"#define (__clang_major__|__GNUC__) (\d+)", macros))
    name, key = (
        ("clang++", "__clang_major__") if "__clang_major__" in found else ("g++", "__GNUC__")
    )
    version = int(found.get(key, 0))
    if version < MINIMUM_COMPILERS[name]:
        raise RuntimeError(
            f"expected {wanted} or later, got {command} which is {name} {version}: "
            "install a newer compiler or set CXX"
        )
    return name


class BuildRows(BuildExtension):
    """BuildExtension that compiles each row's file with that row's flags and links the objects.

    Objects stay in `build/objects/<row>/` unless --build-temp says otherwise.
    """

    def finalize_options(self) -> None:
        if self.build_temp is None:
            # One place for in-place builds, editable installs and wheels: nothing compiles twice.
            self.build_temp = os.path.join("build", "objects")
        super().finalize_options()

    def build_extension(self, ext: Extension) -> None:
        if not self.use_ninja:
            raise RuntimeError("expected ninja on PATH, found none: `pip install ninja`")
        self.row_flags = [*COMMON_FLAGS, *ROW_FLAGS]
        if not MSVC and compiler_name() == "g++":
            self.row_flags += GCC_ROW_FLAGS
        # Threads, because every row is a ninja run of its own and would wait for the one before.
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            compiled = pool.map(self.compile_row, objects(), objects().values())
            ext.extra_objects = [objects for row in compiled for objects in row]
        super().build_extension(ext)

    def compile_row(self, row: str, flags: list[str]) -> list[str]:
        """Compiles csrc/isa/<row>.cpp into a directory of its own, for ninja's sake."""
        objects: list[str] = self.compiler.compile(
            [f"csrc/isa/{row}.cpp"],
            output_dir=os.path.join(self.build_temp, row),
            extra_postargs=[*self.row_flags, *BASELINE_FLAGS, *flags],
        )
        return objects


def extension() -> Extension:
    """The extension module."""
    return CppExtension(
        name="torch_slmops._C",
        sources=sources(),
        depends=headers(),
        py_limited_api=True,
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args=[*COMMON_FLAGS, *BASELINE_FLAGS],
        # A user's -ffast-math would link code that switches denormals off for the whole process.
        extra_link_args=[] if MSVC else ["-fno-fast-math", "-fno-lto"],
    )


def main() -> None:
    """Hands the extension to setuptools, which acts on sys.argv."""
    # Where `pip install ninja` puts it, also for an environment that is not activated.
    os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
    setup(
        ext_modules=[extension()],
        cmdclass={"build_ext": BuildRows},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()
