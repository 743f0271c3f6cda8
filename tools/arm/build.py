"""Cross-builds for AArch64, with setup.py's own flags, what the checks under emulation run.

usage: tools/arm/build.py tests|cost|extension|wheel
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import setuptools
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[2]
ARM = ROOT / ".arm"
TORCH = ARM / "site" / "torch"
CXX = "aarch64-linux-gnu-g++"


def load_setup() -> ModuleType:
    """Returns setup.py as it is on AArch64."""
    platform.machine = lambda: "aarch64"
    spec = importlib.util.spec_from_file_location("slmops_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup = load_setup()


class Build:
    """Objects in .arm/objects, compiled again when a file that they were made of is newer."""

    def __init__(self) -> None:
        self.folder = ARM / "objects"
        self.flags = [*setup.COMMON_FLAGS, "-fPIC"]
        self.jobs: list[tuple[Path, list[str]]] = []

    def add(self, source: str, flags: list[str]) -> None:
        """Adds a source relative to the root, with flags of its own."""
        target = self.folder / f"{source.replace('/', '_')}.o"
        self.jobs.append(
            (target, [CXX, *self.flags, *flags, "-MD", "-c", "-o", str(target), source])
        )

    def compile(self) -> list[str]:
        """Compiles what is out of date and returns all objects."""
        self.folder.mkdir(parents=True, exist_ok=True)
        old = [command for target, command in self.jobs if not up_to_date(target)]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            for _ in pool.map(lambda command: subprocess.run(command, check=True, cwd=ROOT), old):
                pass
        return [str(target) for target, _ in self.jobs]

    def link(self, output: Path, flags: list[str]) -> None:
        output.parent.mkdir(exist_ok=True)
        subprocess.run([CXX, "-o", str(output), *self.compile(), *flags], check=True)


def up_to_date(target: Path) -> bool:
    """Whether an object is newer than setup.py and all files that its compiler listed."""
    listed = target.with_suffix(".d")
    if not target.exists() or not listed.exists():
        return False
    names = listed.read_text().replace("\\\n", " ").split()[1:]
    files = [ROOT / name for name in ["setup.py", *names]]
    return all(file.exists() and file.stat().st_mtime < target.stat().st_mtime for file in files)


def add_rows(build: Build) -> None:
    for row, flags in setup.rows().items():
        build.add(
            f"csrc/isa/{row}.cpp",
            [*setup.ROW_FLAGS, *setup.GCC_ROW_FLAGS, *setup.BASELINE_FLAGS, *flags],
        )


def program(name: str, sources: list[str]) -> None:
    """A torch-free program on all rows, linked statically: .arm/tests/NAME."""
    build = Build()
    add_rows(build)
    for source in [*below("csrc/pack"), "csrc/isa/isa.cpp", *sources]:
        build.add(source, setup.BASELINE_FLAGS)
    build.link(ARM / "tests" / name, ["-static"])


def below(folder: str) -> list[str]:
    """C++ files of a folder, but those that emulate x86."""
    files = sorted((ROOT / folder).glob("*.cpp"))
    return [str(file.relative_to(ROOT)) for file in files if "_emulated" not in file.name]


def tests() -> None:
    """The tests of tests/cpp."""
    program("tests", below("tests/cpp"))


def cost() -> None:
    """What cost.py counts the instructions of: our kernels, and those of a peer."""
    program("cost", ["tests/cpp/testing.cpp", "tests/cpp/rows.cpp", "tools/arm/cost.cpp"])
    build = Build()
    build.add("tools/arm/peer.cpp", setup.BASELINE_FLAGS)
    build.link(ARM / "tests" / "peer", ["-ldl"])


def extension() -> Path:
    """The extension against torch's AArch64 wheel, beside links to the Python files."""
    # The headers of the torch that the host builds with; its stable ABI is the same everywhere.
    include = [f"-I{path}" for path in include_paths()]
    include += [f"-idirafter{ARM}/root/usr/include", f"-I{ARM}/root/usr/include/python3.11"]
    macros = ["-DPy_LIMITED_API=0x030A0000", f"-DTORCH_TARGET_VERSION={setup.TORCH_TARGET_VERSION}"]
    build = Build()
    add_rows(build)
    for source in setup.sources():
        needs_torch = source.startswith("csrc/ops/")
        build.add(source, [*(include + macros if needs_torch else []), *setup.BASELINE_FLAGS])
    package = ARM / "package" / "torch_slmops"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for file in (ROOT / "torch_slmops").iterdir():
        if file.suffix != ".so" and file.name != "__pycache__":
            (package / file.name).symlink_to(file)
    output = package / "_C.abi3.so"
    build.link(output, ["-shared", f"-L{TORCH}/lib", "-ltorch", "-ltorch_cpu", "-lc10"])
    return output


def wheel() -> None:
    """A wheel with the extension, in .arm/dist/, tagged linux_aarch64."""
    library = extension()

    class Prebuilt(setup.BuildExtension):  # type: ignore[misc, name-defined]
        def build_extension(self, ext: setuptools.Extension) -> None:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, target)

    os.chdir(ROOT)
    setuptools.setup(
        script_args=[
            *["-q", "bdist_wheel", "--plat-name", "linux_aarch64"],
            *["--dist-dir", str(ARM / "dist")],
        ],
        ext_modules=[setup.extension()],
        cmdclass={"build_ext": Prebuilt},
        options={"bdist_wheel": {"py_limited_api": "cp310"}, "build": {"build_base": ".arm/wheel"}},
    )


if __name__ == "__main__":
    {"tests": tests, "cost": cost, "extension": extension, "wheel": wheel}[sys.argv[1]]()
