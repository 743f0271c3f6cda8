"""The code blocks of docs/save-and-load.md and README.md run as they stand, in their order."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.builds import ROOT

pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("file", "count", "printed"),
    [
        (
            "docs/save-and-load.md",
            6,
            [
                "torch_slmops report: LlamaForCausalLM",
                "damaged.safetensors: 3.packed: expected bytes with the checksum",
            ],
        ),
        ("README.md", 2, ["torch_slmops report: LlamaForCausalLM"]),
    ],
)
def test_blocks_run(
    file: str,
    count: int,
    printed: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / file).read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == count
    assert text.count("```") == 2 * len(blocks)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, file, "exec"), names)
    out = capsys.readouterr().out
    for words in printed:
        assert words in out
