"""The code blocks of README.md and docs/ run as they stand, in the order of their page.

A block of Python or of `torch-slmops` commands that cannot run here has a line before it,
`<!-- not run: why -->`, and is a skipped test of its own.
"""

from __future__ import annotations

import re
import runpy
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_slmops
from tests.builds import ROOT
from torch_slmops import families

pytest.importorskip("transformers")

_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]*) -->\n+)?```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# What would be a block that no test sees.
_HIDDEN = re.compile(r"^    .*(torch_slmops\.|torch-slmops|\bimport |\bpython |\bmake \w)", re.M)
_PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_SLOW = ("docs/compile.md",)  # inductor compiles
# Printed by the blocks of a page.
_PRINTED = {
    "README.md": ["torch_slmops report: LlamaForCausalLM"],
    "docs/save-and-load.md": [
        "torch_slmops report: LlamaForCausalLM",
        "damaged.safetensors: 3.packed: expected bytes with the checksum",
    ],
    "docs/how-to/gguf.md": ["torch_slmops report: LlamaForCausalLM"],
    "docs/how-to/gptq-awq.md": ["torch_slmops report: LlamaForCausalLM"],
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: The page's path in the repository.
        line: Where it begins.
        language: What stands behind the fence: "python" or "sh"; "text" is no code.
        code: Its lines.
        reason: Why it is not run, or None.
    """

    page: str
    line: int
    language: str
    code: str
    reason: str | None


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text("utf-8")
    page = path.relative_to(ROOT).as_posix()
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        if match["language"] != "text":
            found.append(Block(page, line, match["language"], match["code"], match["reason"]))
    count = len(_BLOCK.findall(text))
    assert text.count("```") == 2 * count, f"{page}: a fence that does not end"
    return found


_BLOCKS = [block for path in _PAGES for block in blocks_of(path)]
_RUN = [block for block in _BLOCKS if block.reason is None]


def pages() -> list[Any]:
    names = dict.fromkeys(block.page for block in _RUN)
    slow = (pytest.mark.full, pytest.mark.filterwarnings("ignore"))  # torch's, while it compiles
    return [pytest.param(name, marks=slow if name in _SLOW else ()) for name in names]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft's
@pytest.mark.parametrize("page", pages())
def test_blocks_run(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    threads: None,
) -> None:
    prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, "_ROWS", list(families._ROWS))
    row = torch_slmops.isa()
    names: dict[str, Any] = {"__name__": "docs"}
    for block in _RUN:
        if block.page == page:
            run(block, names)
    torch_slmops.set_isa(row)
    out = capsys.readouterr().out
    for words in _PRINTED.get(page, []):
        assert words in out


def run(block: Block, names: dict[str, Any]) -> None:
    """Runs Python in `names`, commands of `torch-slmops` one by one."""
    if block.language == "python":
        lines = "\n" * block.line + block.code  # so that a traceback shows the page's line
        exec(compile(lines, block.page, "exec"), names)
        return
    from torch_slmops.cli.main import main

    assert block.language == "sh", f"{block.page}:{block.line}: {block.language!r} cannot be run"
    for line in block.code.splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] == "torch-slmops", f"{block.page}: mark {line!r} as not run"
            assert main(words[1:]) == 0, line


def prepare(folder: Path) -> None:
    """Makes the files that the pages speak of."""
    from cli_models import save_tokenizer
    from test_cli_gguf import save_file
    from test_gptq import gptq

    (folder / "examples").symlink_to(ROOT / "examples")
    save_file(folder / "model.gguf")
    gptq(folder)
    (folder / "model").rename(folder / "model-gptq")
    save_tokenizer(folder / "model-gptq")
    lines = (ROOT / "torch_slmops" / "processes.py").read_text("utf-8").splitlines()
    (folder / "my_texts.txt").write_text("\n".join(lines[:24]), "utf-8")
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "block",
    [block for block in _BLOCKS if block.reason is not None],
    ids=lambda block: f"{block.page}:{block.line}",
)
def test_blocks_that_do_not_run(block: Block) -> None:
    if block.language == "python":
        compile(block.code, block.page, "exec")
    pytest.skip(str(block.reason))


def test_no_code_is_hidden_from_these_tests() -> None:
    for path in _PAGES:
        text = _BLOCK.sub("", path.read_text("utf-8"))
        assert _HIDDEN.search(text) is None, path


def test_links_lead_somewhere() -> None:
    for path in _PAGES:
        text = _BLOCK.sub("", path.read_text("utf-8"))
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not target.startswith(("http://", "https://")):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text("utf-8")
    for path in sorted((ROOT / "docs").rglob("*.md")):
        name = path.relative_to(ROOT / "docs").as_posix()
        assert name == "README.md" or f"({name})" in index, name


def test_reference_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "tools" / "write_reference.py"))
    assert made["PATH"].read_text("utf-8") == made["text"](), "run tools/write_reference.py"


def test_changes_begin_with_this_version() -> None:
    found = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert found is not None and found[1] == torch_slmops.__version__
