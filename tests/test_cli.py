"""The command line: what commands print and return, and that a user's mistake is one line."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_models
import torch
from bits import assert_same_bits
from cli_models import CommandLine
from test_bench import SMALL_LINEARS, SMALL_MODELS

import torch_slmops
from torch_slmops.cli import bench, info, models
from torch_slmops.cli.main import COMMANDS, _parser, main
from torch_slmops.cli.screen import FAILED, USAGE, Screen, UserError
from torch_slmops.selfcheck import expected

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
isa_module = import_module("torch_slmops.isa")  # the name in the package is a function


def test_module_and_script_are_the_same() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch_slmops", "info", "--json", "--threads", "2"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["threads"]["torch"] == 2
    script = re.search(r'^torch-slmops = "(.+):(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)
    assert script is not None
    assert getattr(import_module(script[1]), script[2]) is main


def test_help_names_every_command(cli: CommandLine) -> None:
    code, out, _ = cli.run("--help")
    assert code == 0
    for command in COMMANDS:
        name = command.__name__.rsplit(".", 1)[1]
        assert re.search(rf"^ +{name}\b", out, re.MULTILINE)
        assert cli.run(name, "--help")[0] == 0
    code, out, _ = cli.run("--version")
    assert out.strip() == f"torch_slmops {torch_slmops.__version__}"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], USAGE, "required: COMMAND"),
        (["dance"], USAGE, "invalid choice: 'dance'"),
        (["report", "x", "--weights", "int3"], USAGE, "--weights: invalid choice: 'int3'"),
        (["info", "--isa", "abacus"], USAGE, "--isa: set_isa: expected one of .*, got 'abacus'"),
        (["info", "--threads", "0"], USAGE, "--threads: expected at least 1, got 0"),
        (["info", "--threads", "two"], USAGE, "--threads: invalid int value: 'two'"),
        (["report", "./absent"], FAILED, r"\./absent: no such folder or file"),
        (["report", "absent.gguf"], FAILED, "absent.gguf: no such folder or file"),
        (["report", "a b"], FAILED, "a b: no such folder or file"),
        (["report", "{root}/docs"], FAILED, "expected a folder with a config.json"),
        (["report", "{root}/README.md"], FAILED, "a hub id or a .gguf file, got another file"),
        (["generate", "x", " "], USAGE, "expected a prompt"),
        (["generate", "x", "y", "--max-new-tokens", "0"], USAGE, "--max-new-tokens: expected at"),
        (["generate", "x", "y", "--temperature", "-1"], USAGE, "--temperature: expected 0 or more"),
        (["chat", "x", "--top-p", "2"], USAGE, "--top-p: expected more than 0 and at most 1"),
        (["bench", "--rows", "0"], FAILED, "--rows of at least 1"),
        (["quantize", "x", "y", "--no-optimize"], USAGE, "nothing to save"),
        (["quantize", "x", "{root}/docs"], FAILED, "the folder has files; --force"),
        (["quantize", "x", "{root}/README.md"], FAILED, "expected a folder to write"),
        (["report", "x", "--calibration", "absent.txt"], FAILED, "--calibration: expected text"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    cli: CommandLine, arguments: list[str], code: int, message: str
) -> None:
    arguments = [argument.format(root=ROOT) for argument in arguments]
    got, out, err = cli.run(*arguments)
    assert got == code
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert "error: " in last
    assert re.search(message, last), last


def test_mistakes_with_json_are_a_document(cli: CommandLine) -> None:
    code, out, err = cli.run("report", "./absent", "--json")
    assert code == FAILED
    assert json.loads(out) == {"error": "./absent: no such folder or file"}
    assert "error: ./absent" in err


def test_debug_shows_where_an_error_comes_from() -> None:
    with pytest.raises(UserError, match="no such folder"):
        main(["report", "./absent", "--debug"])


def test_a_damaged_model_is_one_line(cli: CommandLine, llama: Path, tmp_path: Path) -> None:
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    code, _, err = cli.run("report", tmp_path)
    assert code == FAILED
    assert err.startswith(f"error: {tmp_path}: ")
    (tmp_path / "config.json").write_text("{}")
    code, _, err = cli.run("report", tmp_path)
    assert code == FAILED
    assert err.startswith(f"error: {tmp_path}: ")


def test_hub_without_network_is_one_line(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, err = cli.run("report", "nobody/nothing")
    assert code == FAILED
    assert "as a hub id it cannot be had" in err


def test_interrupt_ends_with_130(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "_cpu", interrupt)
    assert cli.run("info")[0] == 130


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-m", "torch_slmops", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode in (0, 1)
    assert said == b""


def test_info(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cli.json("info")
    assert found["isa"]["used"] == torch_slmops.isa()
    assert [row["row"] for row in found["isa"]["rows"] if row["runs_here"]] == torch_slmops.isas()
    assert set(isa_module.features()) <= set(found["cpu"]["features"])
    assert found["threads"]["torch"] == 1
    assert found["memory"]["total_bytes"] >= found["memory"]["available_bytes"] > 0
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert "read_bytes_per_second" not in found["memory"]
    code, out, _ = cli.run("info", "--isa", "scalar", "--bandwidth")
    assert code == 0
    assert re.search(r"memory reads +│ [\d.]+ GB/s on 1 threads", out)
    for row in torch_slmops.isas()[:-1]:
        assert re.search(rf"{row} +│ can run here; --isa chose scalar", out)
    # A CPU without AVX-512 says what is missing.
    monkeypatch.setattr(isa_module, "isas", lambda: ["scalar"])
    monkeypatch.setattr(
        isa_module, "missing_features", lambda: {"best": ["avx9", "abc"], "scalar": []}
    )
    _, out, _ = cli.run("info", "--isa", "scalar")
    assert re.search(r"best +│ this CPU lacks avx9, abc", out)


def test_rows_need_exactly_the_features_that_are_named() -> None:
    select = torch.ops.slmops._select
    for row in torch.ops.slmops._isa_rows().split(", "):
        needed = torch.ops.slmops._isa_requires(row).split(", ")
        assert select(", ".join(needed), row) == row
        for i, feature in enumerate(needed):
            if feature:
                with pytest.raises(RuntimeError, match="expected one of"):
                    select(", ".join(needed[:i] + needed[i + 1 :]), row)
    with pytest.raises(RuntimeError, match=r"isa_requires: expected one of .*got 'abacus'"):
        torch.ops.slmops._isa_requires("abacus")


def test_selfcheck(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = cli.run("selfcheck", "--isa", "scalar", "--threads", "1")
    assert code == 0
    assert f"logits  {expected.LOGITS} as published" in out
    assert "DIFFERS" not in out
    monkeypatch.setattr(expected, "LOGITS", "0" * 64)
    code, out, _ = cli.run("selfcheck", "--isa", "scalar", "--threads", "1")
    assert code == FAILED
    assert "DIFFERS from 000" in out and "logits: reference differs" in out and "FAILED" in out
    code, out, _ = cli.run("selfcheck", "--isa", "scalar", "--threads", "1", "--json")
    assert code == FAILED
    found = json.loads(out)
    assert not found["passed"] and found["rows"] == ["scalar"] and found["threads"] == [1]


def test_report(cli: CommandLine, llama: Path) -> None:
    found = cli.json("report", llama, "--weights", "int8", "--exclude", "model.layers.1.*")
    assert {row["reason"] for row in found["left"]} == {
        "not chosen (include, exclude, lm_head=None), or optimize was not called"
    }
    assert all(row["now"].startswith("int8") for row in found["packed"])
    assert found["bytes_after"] < found["bytes_before"]
    code, out, _ = cli.run("report", llama)
    assert code == 0
    for text in ("model.layers.*.mlp", "int4 sub16", "x smaller)", "same bits on every CPU"):
        assert text in out
    code, _, err = cli.run("report", llama, "--group-size", "5", "--scale-kind", "group")
    assert code == USAGE
    assert "multiple of 32, got 5" in err


def test_quantize_and_load(cli: CommandLine, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    found = cli.json("quantize", llama, out, "--weights", "int8")
    assert found["bytes_after"] < found["bytes_before"]
    assert set(found["files"]) == {file.name for file in out.iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(found["files"])
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    torch_slmops.optimize(model, weights="int8", progress=False)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = small_models.tokens(2, 9)
    assert_same_bits(small_models.logits(loaded, ids), small_models.logits(model, ids))
    # Its folder is a MODEL like any other; options of quantization have no use there.
    assert (
        cli.json("report", out)["packed"]
        == cli.json("report", llama, "--weights", "int8")["packed"]
    )
    text = cli.json("generate", out, "w1 w2", "--max-new-tokens", 6)["text"]
    want = cli.json("generate", llama, "w1 w2", "--max-new-tokens", 6, "--weights", "int8")["text"]
    assert text == want
    code, _, err = cli.run("quantize", out, tmp_path / "again")
    assert code == FAILED
    assert "is packed already" in err.splitlines()[-1]
    code, _, err = cli.run("quantize", llama, out)
    assert code == FAILED
    assert "the folder has files; --force" in err
    assert cli.run("quantize", llama, out, "--force")[0] == 0
    assert cli.json("report", out)["packed"][0]["now"].startswith("int8")  # the embedding
    assert any(row["now"].startswith("int4") for row in cli.json("report", out)["packed"])


def test_quantize_with_calibration(cli: CommandLine, llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * i % 120}" for i in range(400)))
    cli.json("quantize", llama, tmp_path / "packed", "--calibration", text)
    found = cli.json("report", tmp_path / "packed")
    assert any(row["now"].endswith(", calibrated") for row in found["packed"])


def test_packing_on_the_way_gives_what_optimize_gives(llama: Path, bert: Path) -> None:
    for folder, left in ((llama, "*.down_proj"), (bert, "*.decoder")):
        args = _parser().parse_args(["report", str(folder), "--exclude", left])
        loaded = models.load(args, Screen(as_json=True))
        model = models.load_float(str(folder), "auto")
        torch_slmops.optimize(model, exclude=[left], progress=False)
        assert torch_slmops.report(loaded.model) == torch_slmops.report(model)
        ids = small_models.tokens(1, 8)
        got, want = (small_models.logits(m, ids) for m in (loaded.model, model))
        assert_same_bits(got, want)


def test_evaluate(cli: CommandLine, llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i * i % 120}" for i in range(400)))
    options = ("--texts", text, "--window", 64, "--worst", 2)
    found = cli.json("evaluate", llama, *options)
    assert found["tokens"] == 400 and found["kl_mean"]["value"] > 0 and len(found["worst"]) == 2
    cli.json("quantize", llama, tmp_path / "packed")
    assert cli.json("evaluate", tmp_path / "packed", *options)["kl_mean"] is None
    again = cli.json("evaluate", tmp_path / "packed", *options, "--reference", llama)
    assert again["kl_mean"] == found["kl_mean"]
    code, out, _ = cli.run("evaluate", llama, *options)
    assert code == 0 and "KL, mean" in out
    code, _, err = cli.run("evaluate", llama, "--texts", tmp_path / "absent.txt")
    assert code == FAILED and "absent.txt" in err
    code, _, err = cli.run("evaluate", llama, "--worst", "-1")
    assert code == FAILED and "expected worst >= 0" in err


def test_serve_says_what_it_needs(
    cli: CommandLine, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    absent = {"fastapi", "uvicorn"}
    present = {"openai", "accelerate"}

    def found(name: str) -> Any:
        return None if name in absent else name if name in present else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", found)
    code, _, err = cli.run("serve", llama)
    assert code == FAILED
    assert "serve needs fastapi, uvicorn: pip install" in err
    absent.clear()
    present |= {"fastapi", "uvicorn"}
    code, _, err = cli.run("serve", "./absent", "--port", "1")
    assert code == FAILED
    assert "no such folder" in err
    # What is left is transformers' own command line.
    given: list[list[str]] = []
    theirs = SimpleNamespace(main=lambda: given.append(sys.argv))
    monkeypatch.setitem(sys.modules, "transformers.cli.transformers", theirs)
    monkeypatch.setattr(sys, "argv", ["torch-slmops"])
    assert cli.run("serve", llama, "--port", "8001")[0] == 0
    assert given == [["transformers", "serve", str(llama), "--device", "cpu", "--port", "8001"]]


def test_bench(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LINEARS", SMALL_LINEARS)
    monkeypatch.setattr(bench, "MODELS", SMALL_MODELS)
    monkeypatch.setattr(bench, "_COPIES_BYTES", 1 << 20)
    monkeypatch.setattr("torch_slmops.bench.probes._READ_BYTES", 4 << 20)
    options = ("--model", "tiny", "--budget", 0.01, "--rows", 1, 3)
    found = cli.json("bench", *options)
    assert all(value > 0 for value in found["machine"].values())
    kernels = {(cell["rows"], cell["kernel"]) for cell in found["ops"]}
    assert {rows for rows, _ in kernels} == {1, 3}
    assert {kernel for _, kernel in kernels} >= {"sub16 a128", "int8 g32 a32", "torch bf16"}
    sizes = {cell["weights"]: cell["bytes"] for cell in found["model"]}
    assert sizes["int4"] < sizes["int8"] < sizes["bfloat16"]
    code, out, _ = cli.run("bench", "model", *options)
    assert code == 0
    assert "tiny, random weights" in out and "memory reads" not in out


def test_bench_of_engines(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[object], int]] = []

    def run(shapes: list[object], output: Path, **options: Any) -> list[dict[str, object]]:
        asked.append((shapes, options["threads"]))
        options["show"]("[bold]a table[/]")
        return [{"engine": "x"}]

    monkeypatch.setitem(sys.modules, "benchmarks.engines", SimpleNamespace(run=run))
    monkeypatch.setattr(bench, "MODELS", SMALL_MODELS)
    assert cli.json("bench", "engines", "--model", "tiny")["engines"] == [{"engine": "x"}]
    assert asked == [([SMALL_MODELS["tiny"]], torch.get_num_threads())]
    monkeypatch.setattr(bench, "_ENGINES", "benchmarks.absent")
    code, _, err = cli.run("bench", "engines", "--model", "tiny")
    assert code == FAILED and "part of the repository" in err
