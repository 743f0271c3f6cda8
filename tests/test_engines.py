"""The comparison of engines: what it times, what it refuses, and what it makes of the numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks import engines
from benchmarks.engines import session as sessions
from benchmarks.engines.registry import BY_NAME, ENGINES, EngineKind
from benchmarks.engines.results import rates, ratios, tables
from benchmarks.engines.worker import tokens
from torch_slmops.bench.shapes import ModelShape

TINY = ModelShape("tiny", 64, 2, 4, 2, 16, 128, 1200, "qwen2", tied=False)
CASES = (engines.Case(16, 0), engines.Case(8, 3), engines.Case(8, 3, batch=2))


def test_engines_in_turns(tmp_path: Path) -> None:
    names = ("slmops int4", "transformers bf16", "llama.cpp Q4_0")
    found = engines.run(
        [TINY],
        tmp_path / "out.jsonl",
        cases=CASES,
        engines=names,
        rounds=2,
        threads=1,
        build=tmp_path,
    )
    assert [r["engine"] for r in found] == list(names[:2]) * 6  # llama.cpp is not set up there
    assert [r["context"] for r in found[::2]] == [16, 8, 8] * 2
    assert all(r["first_s"] > 0 and r["limits"]["bandwidth"] > 1e8 for r in found)
    assert all((r["rest_s"] > 0) == (r["new"] > 0) for r in found)
    assert all(0 <= r["others"] <= 1 for r in found)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(lines) == 2 + len(found)
    by_engine = {line["engine"]: line for line in lines[:2]}
    assert by_engine["transformers bf16"]["score"] == pytest.approx(1, abs=1e-6)
    assert 0.5 < by_engine["slmops int4"]["score"] <= 1
    assert len(tables(found, lines[:2])) == len(CASES) + 1


def _other_weights(folder: Path, python: Path) -> None:
    """A model like that of `folder`, whose head has its rows in another order."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "float")
    model.lm_head.weight.data = model.lm_head.weight.flip(0)
    model.save_pretrained(folder / "wrong")


def test_wrong_engines_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = EngineKind("wrong", "torch_worker.py", "wrong", {"kind": "bf16"}, _other_weights)
    broken = replace(BY_NAME["transformers bf16"], name="broken", options={"kind": "none"})
    monkeypatch.setitem(BY_NAME, "wrong", wrong)
    right = BY_NAME["transformers bf16"]
    with sessions.Session(TINY, [right, wrong, broken], tmp_path, threads=1) as session:
        session.prepare()
        session.load()
        assert session.engines == [right]
        assert set(session.running) == {right.name}
    assert "output is wrong" in session.wrong["wrong"]
    assert "unknown kind" in session.wrong["broken"]


def test_ratios_are_of_one_round() -> None:
    def record(engine: str, number: int, seconds: float) -> dict[str, object]:
        made = {"engine": engine, "round": number, "context": 8, "new": 10, "batch": 2}
        made |= {"others": 0.0 if number < 3 else 0.5}
        return made | {"rest_s": seconds, "first_s": 1.0, "model": "m"}

    records = [record("slmops int4", 1, 1.0), record("x", 1, 2.0)]
    records += [record("slmops int4", 2, 4.0), record("x", 2, 4.0)]
    records += [record("slmops int4", 3, 1.0), record("x", 3, 9.0)]  # others computed meanwhile
    assert rates(records)["decode at 8 x 2"]["x"].values == (10, 5)
    assert ratios(records)["decode at 8 x 2"]["x"].values == (2, 1)


def test_registry_names_scripts_that_are_there() -> None:
    assert len(BY_NAME) == len(ENGINES)
    for engine in ENGINES:
        assert (sessions.checkpoints.HERE / engine.script).exists()
        assert (engine.environment is None) == (engine.script == "torch_worker.py")


def test_prompts_are_the_same_for_all() -> None:
    assert tokens(3, 2, 5, 100) == tokens(3, 2, 5, 100) != tokens(4, 2, 5, 100)
    assert {len(prompt) for prompt in tokens(3, 2, 5, 100)} == {5}
    # An engine that keeps what it has read has read no part of it.
    assert tokens(3, 2, 5, 100)[0] != tokens(3, 2, 9, 100)[0][:5]
    assert tokens(3, 2, 5, 100)[0] != tokens(3, 4, 5, 100)[0]


def test_plots_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    lines = []
    for number in (1, 2):
        for engine, seconds in (("slmops int4", 1.0), ("x", 2.0 * number)):
            line = {"engine": engine, "model": "smollm2-135m", "round": number, "others": 0.0}
            line |= {"limits": {"bandwidth": 3e10, "int8_peak": 9e11}, "batch": 1}
            lines += [line | {"context": 512, "new": 0, "first_s": seconds, "rest_s": 0.0}]
            lines += [line | {"context": 8, "new": 64, "first_s": 0.1, "rest_s": seconds}]
    results = tmp_path / "results.jsonl"
    results.write_text("\n".join(json.dumps(line) for line in [*lines, {"op": "linear"}]))
    files = plots.draw(results, tmp_path / "images")
    assert [file.name for file in files] == ["engines.png", "roofline-smollm2-135m.png"]
    assert all(1000 < file.stat().st_size < 200_000 for file in files)
