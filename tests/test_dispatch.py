"""Which row a CPU gets: `select` on imaginary CPUs, caps, the environment, errors."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import torch_slmops
from torch_slmops.isa import HOW_TESTED, _describe, describe, features, isa, isas, set_isa

AVX2 = ["avx2", "fma3", "f16c"]
AVX_VNNI = [*AVX2, "avx_vnni"]
AVX512_VNNI = [*AVX2, "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_vnni"]
AMX = [*AVX512_VNNI, "amx_tile", "amx_int8"]

# In cpuinfo's spelling, with some of the features that no row asks for.
IMAGINARY_CPUS = {
    "Core 2": ("sse2, ssse3", "scalar"),
    "Sandy Bridge": ("sse4_2, avx", "scalar"),
    "Ivy Bridge": ("avx, f16c", "scalar"),
    "Piledriver": ("avx, f16c, fma3, fma4", "scalar"),
    "AVX2 without FMA": ("avx, avx2, f16c", "scalar"),
    "Haswell": (", ".join(["avx", "bmi2", *AVX2]), "avx2"),
    "Zen 3": (", ".join([*AVX2, "sha", "clwb"]), "avx2"),
    "Alder Lake": (", ".join(AVX_VNNI), "avx_vnni"),
    "Lunar Lake": (", ".join([*AVX_VNNI, "avx_vnni_int8", "avx_ne_convert"]), "avx_vnni"),
    "AVX-VNNI without FMA": ("avx, avx2, f16c, avx_vnni", "scalar"),
    "Skylake-X": (", ".join(AVX512_VNNI[:-1]), "avx2"),
    "Knights Mill": (", ".join([*AVX2, "avx512_f", "avx512_4vnniw"]), "avx2"),
    "Cascade Lake": (", ".join(AVX512_VNNI), "avx512_vnni"),
    "Zen 4": (", ".join([*AVX512_VNNI, "avx512_bf16"]), "avx512_vnni"),
    "Zen 5": (", ".join([*AVX512_VNNI, "avx512_bf16", "avx_vnni"]), "avx512_vnni"),
    "Sapphire Rapids": (", ".join([*AMX, "avx_vnni", "amx_bf16", "avx512_fp16"]), "amx"),
    "Sapphire Rapids, tiles of bf16 only": (
        ", ".join([*AVX512_VNNI, "avx_vnni", "amx_tile", "amx_bf16"]),
        "avx512_vnni",
    ),
    "AMX without AVX-512": (", ".join([*AVX_VNNI, "amx_tile", "amx_int8"]), "avx_vnni"),
}

select = torch.ops.slmops._select
x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="features of x86 CPUs")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Puts the features and the row back, whatever a test did to them."""
    row, given = isa(), features()
    yield
    torch.ops.slmops._set_features(", ".join(given))
    set_isa(row)


@x86_only
@pytest.mark.parametrize("cpu", IMAGINARY_CPUS)
def test_best_row(cpu: str) -> None:
    cpu_features, row = IMAGINARY_CPUS[cpu]
    assert select(cpu_features, "") == row


@x86_only
@pytest.mark.parametrize("missing", AMX)
def test_every_required_feature_counts(missing: str) -> None:
    lower = {**dict.fromkeys(AMX, "avx512_vnni"), **dict.fromkeys(AVX512_VNNI, "avx2")}
    lower |= dict.fromkeys(AVX2, "scalar")
    assert select(", ".join(name for name in AMX if name != missing), "") == lower[missing]


@x86_only
@pytest.mark.parametrize("missing", AVX_VNNI)
def test_every_required_feature_of_avx_vnni_counts(missing: str) -> None:
    rest = ", ".join(name for name in AVX_VNNI if name != missing)
    assert select(rest, "") == ("scalar" if missing in AVX2 else "avx2")


@x86_only
@pytest.mark.parametrize("cap", ["amx", "avx512_vnni", "avx_vnni", "avx2", "scalar"])
def test_cap(cap: str) -> None:
    assert select(", ".join([*AMX, "avx_vnni"]), cap) == cap


@x86_only
def test_tiles_need_the_kernels_permission() -> None:
    """Features that the CPU is said to have, but of whose use the kernel knows nothing."""
    allowed = "amx_tile" in torch.ops.slmops._isa_features(True).split(", ")
    torch.ops.slmops._set_features(", ".join(AMX))
    assert ("amx_int8" in features()) == ("amx" in isas()) == allowed
    assert isa() == ("amx" if allowed else "avx512_vnni")


def test_scalar_runs_on_nothing() -> None:
    assert select("", "") == "scalar"
    assert select("no_such_feature, avx2x", "") == "scalar"


@x86_only
@pytest.mark.parametrize("cap", ["avx512_vnni", "avx", "AVX2", "avx2 "])
def test_bad_cap_lists_what_can_run(cap: str) -> None:
    with pytest.raises(RuntimeError, match=rf"expected one of avx2, scalar .*, got '{cap}'"):
        select(", ".join(AVX2), cap)


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="torch without cpuinfo API")
def test_cpuinfo_and_system_agree() -> None:
    assert torch.ops.slmops._isa_features(False) == torch.ops.slmops._isa_features(True)


def test_rows_here_run_on_features_here() -> None:
    assert isas()[-1] == "scalar"
    assert isas() == [row for row in torch.ops.slmops._isa_rows().split(", ") if row in isas()]
    assert isas()[0] == select(", ".join(features()), "")


def test_set_isa_reaches_every_row() -> None:
    for row in isas():
        torch_slmops.set_isa(row)
        assert torch_slmops.isa() == row


@pytest.mark.parametrize("name", ["", "sse9", "SCALAR"])
def test_set_isa_refuses_unknown_names(name: str) -> None:
    before = isa()
    with pytest.raises(ValueError, match=f"expected one of .*scalar, got '{name}'"):
        set_isa(name)
    with pytest.raises(RuntimeError, match=f"expected one of .*scalar .*, got '{name}'"):
        torch.ops.slmops._set_isa(name)
    assert isa() == before


def test_new_features_forget_the_row() -> None:
    torch.ops.slmops._set_features("")
    assert (isa(), isas(), features()) == ("scalar", ["scalar"], [])


def test_description_names_the_row_and_how_it_was_tested() -> None:
    for row in isas():
        set_isa(row)
        best = row == isas()[0]
        assert describe().startswith(f"Row {row}, the best" if best else f"Row {row}, as asked for")
        assert describe().endswith(f"Tested on: {HOW_TESTED[row]}.")
    assert set(torch.ops.slmops._isa_rows().split(", ")) <= set(HOW_TESTED)


def test_description_of_a_cpu_without_avx2() -> None:
    missing = {"avx512_vnni": AVX512_VNNI, "avx2": ["avx2", "fma3"], "scalar": []}
    text = _describe("scalar", missing, ["f16c", "avx"])
    assert text.startswith("This CPU lacks avx2, fma3 and runs no vector row: scalar is used")


def test_description_of_tiles_that_the_kernel_forbids() -> None:
    missing = {"amx": ["amx_tile", "amx_int8"], "avx512_vnni": [], "avx2": [], "scalar": []}
    text = _describe("avx512_vnni", missing, AMX)
    assert "It has AMX, but the operating system does not let" in text
    assert "AMX" not in _describe("avx512_vnni", missing, AVX512_VNNI)


def in_new_process(isa_variable: str | None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "SLMOPS_ISA"}
    if isa_variable is not None:
        environment["SLMOPS_ISA"] = isa_variable
    program = "import torch_slmops; print(torch_slmops.isa())"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("variable", [None, "", *isas()])
def test_environment_caps(variable: str | None) -> None:
    result = in_new_process(variable)
    assert (result.returncode, result.stdout.split()) == (0, [variable or isas()[0]])


@pytest.mark.parametrize("variable", ["sse9", "avx2,scalar"])
def test_environment_error(variable: str) -> None:
    result = in_new_process(variable)
    assert result.returncode == 1
    valid = ", ".join(isas())
    assert f"SLMOPS_ISA: expected one of {valid} (the rows that can run" in result.stderr
    assert result.stderr.rstrip().endswith(f"got '{variable}'")


def test_environment_error_for_a_row_above_this_cpu() -> None:
    rows = torch.ops.slmops._isa_rows().split(", ")
    above = [row for row in rows if row not in isas()]
    if not above:
        pytest.skip("this CPU runs every row")
    assert f"got '{above[0]}'" in in_new_process(above[0]).stderr


def test_library_loads_without_the_package() -> None:
    """The extension is also a plain operator library, which asks the system for features."""
    path = torch_slmops.__path__[0] + "/_C.abi3.so"
    program = f"import torch; torch.ops.load_library({path!r}); print(torch.ops.slmops._isas())"
    environment = {name: value for name, value in os.environ.items() if name != "SLMOPS_ISA"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ", ".join(isas())
