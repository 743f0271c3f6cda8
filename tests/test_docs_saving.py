"""The code blocks of docs/save-and-load.md run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.builds import ROOT

pytest.importorskip("transformers")


def test_blocks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "save-and-load.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    assert text.count("```") == 2 * len(blocks)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, "docs/save-and-load.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "torch_slmops report: LlamaForCausalLM" in printed
    assert "damaged.safetensors: 3.packed: expected bytes with the checksum" in printed
