"""One abi3 wheel comes out of the source distribution, and it works where nothing else is."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import torch_slmops
from tests.builds import ROOT, load_setup

# Rows of the identity pick columns of the weight, so the outputs are its values: no rounding.
SMOKE_TEST = """
import torch
import torch_slmops

weight = torch.randn(48, 100, generator=torch.Generator().manual_seed(0))
for name in torch_slmops.isas():
    torch_slmops.set_isa(name)
    for bits in (4, 8):
        quantized = torch_slmops.quantize_weight(weight, bits=bits)
        packed = quantized.pack(activations="float")
        out = torch.ops.slmops.linear(torch.eye(100), packed, 48)
        assert torch.equal(out, quantized.dequantize().T), (name, bits)
print("passed on", torch_slmops.isas())
"""


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True)
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution as on a user's machine."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder, cwd=ROOT)
    (source,) = folder.glob("torch_slmops-*.tar.gz")
    pip_wheel = ["wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(folder), str(source)]
    run(sys.executable, "-m", "pip", *pip_wheel, cwd=folder)
    wheels = list(folder.glob("*.whl"))
    assert len(wheels) == 1
    return wheels[0]


@pytest.mark.parametrize(
    ("macros", "error"),
    [
        (
            "#define __GNUC__ 10",
            r"expected g\+\+ 11 or clang\+\+ 14 or later, .* g\+\+ 10: install",
        ),
        ("#define __GNUC__ 4\n#define __clang_major__ 13", r"which is clang\+\+ 13: install"),
        ("", r"which is g\+\+ 0: install"),
    ],
)
def test_build_refuses_old_compilers(
    macros: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\necho '{macros}'\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(RuntimeError, match=error):
        load_setup().compiler_name()
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    with pytest.raises(RuntimeError, match=r"expected a C\+\+ compiler, .*absent"):
        load_setup().compiler_name()


def test_flags_of_msvc(monkeypatch: pytest.MonkeyPatch) -> None:
    """No flag of g++ reaches MSVC, and it has the rows of x86-64; nothing was built with it."""
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    build = load_setup()
    assert list(build.rows()) == ["amx", "avx512_vnni", "avx_vnni", "avx2", "scalar"]
    flags = [*build.COMMON_FLAGS, *build.ROW_FLAGS, *build.BASELINE_FLAGS]
    flags += [flag for row in build.rows().values() for flag in row]
    assert "/fp:precise" in flags and "/arch:AVX512" in flags
    assert all(flag.startswith("/") for flag in flags)
    assert build.extension().extra_link_args == []


@pytest.mark.full
def test_wheel_is_abi3_and_complete(wheel: Path) -> None:
    version = torch_slmops.__version__
    assert wheel.name == f"torch_slmops-{version}-cp310-abi3-linux_{platform.machine()}.whl"
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = ROOT / "torch_slmops"
    kinds = ("*.py", "*.pyi", "*.txt", "py.typed", "_C.abi3.so")
    expected = [file for kind in kinds for file in package.rglob(kind)]
    assert files == {str(file.relative_to(ROOT)) for file in expected}


@pytest.mark.full
def test_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    index = os.environ.get("TORCH_INDEX")
    torch_pin = f"torch=={torch.__version__.split('+')[0]}"
    torch_index = ["--index-url", index] if index else []
    run(python, "-m", "pip", "install", "-q", *torch_index, torch_pin, cwd=tmp_path)
    run(python, "-m", "pip", "install", "-q", wheel, cwd=tmp_path)
    assert "passed on" in run(python, "-c", SMOKE_TEST, cwd=tmp_path)
