"""Checkpoints that another tool quantized as the MODEL of a command; budgets; SLMOPS_ISA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_models import CommandLine, save_tokenizer

from torch_slmops.cli import models
from torch_slmops.cli.main import _parser
from torch_slmops.cli.screen import FAILED, USAGE, Screen

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

from checkpoint_files import assert_weights  # noqa: E402
from gguf_files import Kind, write  # noqa: E402
from small_models import small  # noqa: E402
from test_gguf import LLAMA  # noqa: E402
from test_gptq import gptq  # noqa: E402

from torch_slmops.checkpoints.load import _FORMATS  # noqa: E402
from torch_slmops.modules import PackedModule  # noqa: E402


def load(*arguments: object) -> models.Loaded:
    args = _parser().parse_args(["report", *map(str, arguments)])
    return models.load(args, Screen(as_json=True), wants_tokenizer=False)


def test_gguf_codes_are_kept(tmp_path: Path, cli: CommandLine) -> None:
    path = tmp_path / "m.gguf"
    expected = write(path, small("llama", **LLAMA), lambda layer: Kind.Q4_0)
    loaded = load(path)
    assert not loaded.was_packed
    assert_weights(loaded.model, expected)
    # Their values as floats are what the codes are compared with, or chosen anew from.
    floating = models.load_float(str(path), "float32")
    assert not any(isinstance(module, PackedModule) for module in floating.modules())
    assert_weights(floating, expected)


def test_gptq_codes_are_kept(tmp_path: Path, cli: CommandLine) -> None:
    path, _, expected = gptq(tmp_path)
    save_tokenizer(path)
    assert_weights(load(path).model, expected)
    found = cli.json("quantize", path, tmp_path / "packed")
    assert found["left"] == []
    again = cli.json("report", tmp_path / "packed")
    assert again["packed"] == cli.json("report", path)["packed"]
    text = cli.json("generate", tmp_path / "packed", "w1 w2", "--max-new-tokens", 3)
    assert text["new_tokens"] >= 1
    code, _, err = cli.run("quantize", path, tmp_path / "other", "--max-kl", "0.1")
    assert code == USAGE
    assert "choose codes, and this checkpoint has codes already" in err


def test_methods_are_those_of_from_checkpoint() -> None:
    assert set(models.METHODS) == set(_FORMATS)


def test_quantize_with_a_budget(cli: CommandLine, llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * i % 120}" for i in range(600)))
    arguments = ("--max-kl", 0.5, "--texts", text, "--measurements", tmp_path / "measured.json")
    cli.json("quantize", llama, tmp_path / "packed", *arguments)
    assert (tmp_path / "measured.json").is_file()
    assert cli.json("report", tmp_path / "packed")["packed"]
    code, _, err = cli.run("quantize", llama, tmp_path / "other", *arguments, "--weights", "int8")
    assert code == USAGE
    assert "max_kl chooses the format of each layer" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--texts", "text.txt"], USAGE, "--texts and --measurements are for --max-kl"),
        (["--max-kl", "-1"], USAGE, "expected max_kl to be positive and finite, got -1.0"),
        (["--max-kl", "1", "--texts", "absent"], FAILED, "--texts: expected text files in UTF-8"),
        (["--max-kl", "much"], USAGE, "--max-kl: invalid float value: 'much'"),
    ],
)
def test_mistakes_with_a_budget(
    arguments: list[str], code: int, message: str, cli: CommandLine, llama: Path, tmp_path: Path
) -> None:
    found, _, err = cli.run("quantize", llama, tmp_path / "packed", *arguments)
    assert found == code
    assert message in err


@pytest.mark.parametrize("command", ["module", "script"])
def test_wrong_slmops_isa_is_one_line(command: str, tmp_path: Path) -> None:
    script = tmp_path / "torch-slmops"
    script.write_text("from torch_slmops.cli.main import main\nraise SystemExit(main())\n")
    start = ["-m", "torch_slmops"] if command == "module" else [str(script)]
    done = subprocess.run(
        [sys.executable, *start, "info", "--json"],
        env=os.environ | {"SLMOPS_ISA": "abacus", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == USAGE
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: SLMOPS_ISA: expected one of ")
    assert done.stderr.endswith("got 'abacus'\n")
    assert done.stdout.startswith('{\n  "error": "SLMOPS_ISA: expected one of ')


def test_info_describes_the_row(cli: CommandLine) -> None:
    found = cli.json("info", "--isa", "scalar")["isa"]["description"]
    code, out, _ = cli.run("info", "--isa", "scalar")
    assert code == 0
    for words in found.rstrip(".").split(". "):
        assert words in out
    assert torch.ops.slmops._isa() == "scalar"
