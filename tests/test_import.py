"""Importing torch_slmops is quick and silent and needs nothing but torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import torch_slmops

OPTIONAL = ("rich", "safetensors", "torchao", "tqdm", "transformers")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )


def test_prints_nothing() -> None:
    # Imported first: what torch itself may say is not ours.
    quiet = run("import torch")
    done = run("import torch; import torch_slmops")
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == (quiet.stdout, quiet.stderr)


def test_takes_less_than_300_ms_beyond_torch() -> None:
    done = run(
        "import time, torch\n"
        "start = time.process_time()\n"
        "import torch_slmops\n"
        "print(time.process_time() - start)"
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.3


def test_imports_no_optional_package() -> None:
    done = run(
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import torch_slmops\n"
        f"print(sorted(set({OPTIONAL!r}) & (set(sys.modules) - before)))"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_works_without_optional_packages() -> None:
    done = run(
        "import sys\n"
        f"for name in {OPTIONAL!r}: sys.modules[name] = None  # an import of it raises\n"
        "import torch, torch_slmops\n"
        "model = torch.nn.Sequential(torch.nn.Embedding(7, 8), torch.nn.Linear(8, 5)).eval()\n"
        "torch_slmops.optimize(model, progress=False)\n"
        "assert model(torch.tensor([1, 2])).shape == (2, 5)\n"
        "print(torch_slmops.report(model))"
    )
    assert done.returncode == 0, done.stderr
    assert "torch_slmops report: Sequential" in done.stdout


OF_TRANSFORMERS = {"Cache", "SlmopsConfig"}


def test_exports_what_it_names() -> None:
    for name in set(torch_slmops.__all__) - OF_TRANSFORMERS:
        assert hasattr(torch_slmops, name), name


@pytest.mark.parametrize("name", sorted(OF_TRANSFORMERS))
def test_exports_what_needs_transformers(name: str) -> None:
    assert name in torch_slmops.__all__
    pytest.importorskip("transformers")
    assert hasattr(torch_slmops, name)
