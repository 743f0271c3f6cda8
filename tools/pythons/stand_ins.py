"""Stand-ins for the CUDA libraries that PyPI's torch for x86-64 Linux is linked with.

They take gigabytes, and a test on a CPU calls none of them. A stand-in has the functions that torch
asks of a library, with their versions; nearly all return 100, cudaErrorNoDevice.
Without them torch does not even load. They go beside torch's own libraries, in an environment made
for tests: the one of the interpreter that runs this, without importing torch.
"""

from __future__ import annotations

import re
import subprocess
import sysconfig
from collections import defaultdict
from pathlib import Path

# What these libraries call their functions.
PREFIXES = ("cu", "nccl", "nv", "__cuda")
# torch puts what these return into the text of an error.
TEXT = 'const char *{name}(void) {{ return "a stand-in"; }}\n'
NO_DEVICE = "int {name}(void) {{ return 100; }}\n"


def read(*command: str | Path) -> str:
    """What a command prints."""
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def wanted(library: Path) -> list[str]:
    """The names of the libraries that it is linked with."""
    return re.findall(r"\(NEEDED\).*\[(.*)\]", read("readelf", "-d", library))


def versions(library: Path) -> dict[str, str]:
    """Which library each version of a symbol that it asks for belongs to."""
    found, file = {}, ""
    for line in read("readelf", "-VW", library).splitlines():
        if match := re.search(r"File: (\S+)", line):
            file = match[1]
        if match := re.search(r"Name: (\S+) +Flags", line):
            found[match[1]] = file
    return found


def symbols(library: Path, flag: str) -> list[tuple[str, str]]:
    """Names and versions (or "") of what it defines or asks for, but need not have."""
    found = []
    for line in read("nm", "-D", flag, library).splitlines():
        kind, name = line.split()[-2:]
        if kind != "w":
            plain, _, version = name.partition("@")
            found.append((plain, version.lstrip("@")))
    return found


def body(function: str) -> str:
    """What a stand-in does."""
    return TEXT if function.endswith(("String", "ErrorName")) else NO_DEVICE


def stand_in(folder: Path, name: str, functions: dict[str, set[str]]) -> None:
    """Compiles a library. `functions`: names by version."""
    source = folder / f"{name}.c"
    every = sorted(set[str]().union(*functions.values()))
    source.write_text("".join(body(function).format(name=function) for function in every))
    command: list[str | Path] = ["cc", "-shared", "-nostdlib", f"-Wl,-soname,{name}"]
    nodes = folder / f"{name}.map"
    versioned = {version: names for version, names in functions.items() if version}
    if versioned:
        nodes.write_text(
            "".join(
                f"{version} {{ global: {'; '.join(sorted(names))}; }};\n"
                for version, names in sorted(versioned.items())
            )
        )
        command.append(f"-Wl,--version-script,{nodes}")
    subprocess.run([*command, "-o", folder / name, source], check=True)
    source.unlink()
    nodes.unlink(missing_ok=True)


def main() -> None:
    """Makes those that are missing."""
    folder = Path(sysconfig.get_path("purelib")) / "torch" / "lib"
    libraries = sorted(folder.glob("*.so*"))
    cached = read("ldconfig", "-p")
    missing = {
        name
        for library in libraries
        for name in wanted(library)
        if not (folder / name).exists() and f"\t{name} " not in cached
    }
    if not missing:
        return
    functions: dict[str, dict[str, set[str]]] = {name: defaultdict(set) for name in missing}
    for library in libraries:
        owners, own = versions(library), missing & set(wanted(library))
        for name, version in symbols(library, "--undefined-only"):
            if owners.get(version) in missing:
                functions[owners[version]][version].add(name)
            elif own and not version and name.startswith(PREFIXES):
                functions[min(own)][""].add(name)  # in any of them it is found
    for name, its in functions.items():
        stand_in(folder, name, its)
    print(f"stand-ins for {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main()
