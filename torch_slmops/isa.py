"""Which kernels run: the instruction-set (ISA) rows of this build and the choice among them.

Features come from cpuinfo through torch where torch offers them, else from the operating system.
The best row that they allow is used; the environment variable `SLMOPS_ISA` caps it from the start
of the process, `set_isa` at any time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

try:
    import torch_slmops._C  # noqa: F401 - registers torch.ops.slmops
except ImportError as error:
    raise ImportError(
        f"expected the compiled extension torch_slmops._C, got: {error}. In a source checkout, "
        "`make build` compiles it; otherwise reinstall torch_slmops."
    ) from error

__all__ = ["HOW_TESTED", "describe", "features", "isa", "isas", "missing_features", "set_isa"]

#: How each row's kernels have been run and compared with the scalar row, bit for bit.
HOW_TESTED = {
    "amx": "emulated instructions; emulated CPU (Bochs), without negative codes; no hardware",
    "avx512_vnni": "hardware (Zen 4)",
    "avx_vnni": "emulated CPU (Bochs) and, with its dots re-encoded, hardware (Zen 4)",
    "avx2": "hardware",
    "neon_dotprod": "emulated CPUs (qemu: Neoverse N1, V1, N2); no hardware",
    "neon_i8mm": "emulated CPUs (qemu: Neoverse V1, N2); no hardware",
    "scalar": "hardware (x86-64); emulated CPU (qemu: Cortex-A72)",
}


def _names(joined: str) -> list[str]:
    return joined.split(", ") if joined else []


def isas() -> list[str]:
    """Returns the ISA rows that can run here, best first; the last one is "scalar"."""
    return _names(torch.ops.slmops._isas())


def isa() -> str:
    """Returns the name of the ISA row in use."""
    name: str = torch.ops.slmops._isa()
    return name


def set_isa(name: str) -> None:
    """Makes the row `name` the one in use, for every thread from its next op on.

    Results do not depend on it: all rows give the same bits.

    Args:
        name: One of `isas()`.

    Raises:
        ValueError: `name` is no row of this build, or one that this CPU cannot run.
    """
    if name not in isas():
        raise ValueError(f"set_isa: expected one of {', '.join(isas())}, got {name!r}")
    torch.ops.slmops._set_isa(name)


def features() -> list[str]:
    """Returns the CPU features in use, of those that some row asks for, in cpuinfo's spelling."""
    return _names(torch.ops.slmops._isa_features(False))


def missing_features() -> dict[str, list[str]]:
    """Returns the rows of this build, best first, each with the features that this CPU lacks."""
    offered = set(features())
    needed = {row: _names(torch.ops.slmops._isa_requires(row)) for row in _rows()}
    return {row: [name for name in names if name not in offered] for row, names in needed.items()}


def _rows() -> list[str]:
    return _names(torch.ops.slmops._isa_rows())


def _describe(row: str, missing: dict[str, list[str]], cpu: list[str]) -> str:
    """`describe` of any machine; `cpu` are its features before the kernel was asked."""
    runnable = [name for name in missing if not missing[name]]
    if runnable == ["scalar"]:
        least = list(missing.values())[-2:][0]
        lacks = f" lacks {', '.join(least)} and" if least else ""
        text = f"This CPU{lacks} runs no vector row: scalar is used, which is correct but slow."
    elif row == runnable[0]:
        text = f"Row {row}, the best that this CPU runs."
    else:
        text = f"Row {row}, as asked for; the best that this CPU runs is {runnable[0]}."
    if {"amx_tile", "amx_int8"} & set(cpu) & set(missing.get("amx", ())):
        text += " It has AMX, but the operating system does not let this process use it."
    return text + f" Tested on: {HOW_TESTED.get(row, 'see the documentation')}."


def describe() -> str:
    """Returns in a few sentences which row is used, why, and how it was tested."""
    return _describe(isa(), missing_features(), _cpuinfo())


def _cpuinfo() -> list[str]:
    """The CPU's features as torch reports them; none where torch has no such API (2.10)."""
    get_capabilities = getattr(torch.cpu, "get_capabilities", None)
    found = {} if get_capabilities is None else get_capabilities()
    return [name for name in found if found[name] is True]


def _use_cpuinfo() -> None:
    """Hands cpuinfo's features to C++; where torch has none to report, C++ asks the system."""
    found = _cpuinfo()
    if found:
        torch.ops.slmops._set_features(", ".join(found))


def _check_environment() -> None:
    """Makes a wrong SLMOPS_ISA an error of the import, not of the first op.

    The command line imports this package before any code of its own runs: there it is one line.
    """
    try:
        isa()
    except RuntimeError as error:
        if not _is_command_line():
            raise
        from torch_slmops.cli.screen import USAGE, Screen

        Screen("--json" in sys.argv).error(str(error).splitlines()[0])
        raise SystemExit(USAGE) from None


def _is_command_line() -> bool:
    """Whether this process is `torch-slmops` or `python -m torch_slmops`."""
    module = sys.argv[:1] == ["-m"] and ["-m", "torch_slmops"] in (
        sys.orig_argv[i : i + 2] for i in range(len(sys.orig_argv))
    )
    return module or Path(sys.argv[0] if sys.argv else "").name == "torch-slmops"


_use_cpuinfo()
_check_environment()
