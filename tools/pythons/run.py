"""One abi3 wheel on several Pythons, and on the oldest torch: `tools/pythons/run.py CASE...`.

A case is a version of Python, such as 3.12, whose tests are those that need no transformers, or
torch-2.10, the whole suite with the Python that runs this. Each case has an environment of its own
in build/pythons/, where tests run from a copy, so that they import the wheel. An interpreter that
is not here (neither on PATH nor in pyenv) is skipped, and the last lines say so; with none it is an
error. What follows -- goes to pytest. torch comes from $TORCH_INDEX, else from PyPI with stand-ins
for its CUDA libraries.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "pythons"
TORCH = "2.13.0"
OLDEST_TORCH = "2.10.0"
# Tests of the repository, of other programs, or of an extension that was built in place.
NOT_OF_A_WHEEL = (
    "test_docs.py",
    "test_engines.py",
    "test_environment.py",
    "test_examples.py",
    "test_objects.py",
    "test_packaging.py",
)
# Needed at import by packages of requirements-dev.txt, which come without their dependencies
# because torch is one.
ADDED = ("accelerate==1.15.0", "loguru==0.7.3", "psutil==7.2.2", "pydantic==2.14.4")


def works(command: str) -> str | None:
    """The path of a command that runs, or None: pyenv has shims of versions that are not in use."""
    found = shutil.which(command)
    if (
        found
        and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0
    ):
        return found
    return None


def interpreter(version: str) -> str | None:
    """Python `version`, from PATH or of pyenv."""
    found = works(f"python{version}")
    if found or not shutil.which("pyenv"):
        return found
    listed = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True)
    for name in listed.stdout.split():
        if re.fullmatch(rf"{re.escape(version)}\.\d+", name):
            prefix = subprocess.run(["pyenv", "prefix", name], capture_output=True, text=True)
            return works(f"{prefix.stdout.strip()}/bin/python")
    return None


def build_wheel() -> Path:
    """The wheel, from the objects of `make build` where they are new enough."""
    out = WORK / "wheel"
    shutil.rmtree(out, ignore_errors=True)
    options = ["-q", "--no-build-isolation", "--no-deps", "-w", str(out), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options], check=True)
    (wheel,) = out.glob("*.whl")
    return wheel


def environment(name: str, python: str, torch: str, wheel: Path) -> Path:
    """An environment with torch, the wheel and what their tests need; returns its Python."""
    folder = WORK / name
    made = folder / "bin" / "python"
    if not made.exists():
        subprocess.run([python, "-m", "venv", folder], check=True)

    def install(*what: str | Path) -> None:
        subprocess.run(
            [made, "-m", "pip", "install", "-q", "--no-warn-conflicts", *what], check=True
        )

    index = os.environ.get("TORCH_INDEX")
    stamp = folder / f"torch-{torch}"
    if not stamp.exists():
        install(*(["--index-url", index] if index else ["--no-deps"]), f"torch=={torch}")
        stamp.touch()
    install("-r", ROOT / "requirements-pythons.txt")
    if name.startswith("torch-"):
        without_torch = folder / "requirements.txt"
        lines = [
            line
            for file in ("requirements.txt", "requirements-dev.txt")
            for line in (ROOT / file).read_text().splitlines()
            if not line.startswith(("torch==", "clang-format", "mypy", "ruff"))
        ]
        apart = ("compressed-tensors", "peft", "torchao")
        without_torch.write_text("\n".join(line for line in lines if not line.startswith(apart)))
        install("-r", without_torch)
        install("--no-deps", *(line for line in lines if line.startswith(apart)))
        install(*ADDED[1:])
        install("--no-deps", ADDED[0])
    if not index:
        subprocess.run([made, ROOT / "tools" / "pythons" / "stand_ins.py"], check=True)
    install("--no-deps", "--force-reinstall", wheel)
    return made


def copy_tests() -> Path:
    """The tests and what they read, without the package."""
    tree = WORK / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for name in ("benchmarks", "csrc", "docs", "examples", "tests", "tools"):
        ignored = shutil.ignore_patterns("build", "__pycache__")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for file in ("README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / file, tree / file)
    return tree


def run_tests(python: Path, tree: Path) -> bool:
    """Whether the tests pass; the package must be the wheel's."""
    show = "import torch_slmops, torch, sys; print(sys.version.split()[0], torch.__version__, "
    show += "torch_slmops.__file__)"
    shown = subprocess.run(
        [python, "-c", show], cwd=tree, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    print(shown.strip(), flush=True)
    assert "site-packages" in shown, shown
    ignored = [f"--ignore=tests/{name}" for name in NOT_OF_A_WHEEL]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *ignored]
    command += sys.argv[1:][sys.argv[1:].index("--") + 1 :] if "--" in sys.argv else []
    # 5: no test was selected
    return subprocess.run(command, cwd=tree).returncode in (0, 5)


def main() -> None:
    """Runs the cases in turn, the remaining ones too after a failure."""
    arguments = sys.argv[1:]
    cases = arguments[: arguments.index("--")] if "--" in arguments else arguments
    wheel, tree = build_wheel(), copy_tests()
    outcome: dict[str, str] = {}
    for case in cases:
        oldest = case.startswith("torch-")
        python = sys.executable if oldest else interpreter(case)
        if python is None:
            outcome[case] = "SKIPPED, no such interpreter here"
            continue
        made = environment(case, python, OLDEST_TORCH if oldest else TORCH, wheel)
        outcome[case] = "passed" if run_tests(made, tree) else "FAILED"
    for case, what in outcome.items():
        print(f"{case}: {what}")
    if "passed" not in outcome.values() or "FAILED" in outcome.values():
        sys.exit(1)


if __name__ == "__main__":
    main()
