"""The commands that generate text: what they print is what `generate` of the model gives."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_models import CommandLine, save_model

import torch_slmops
from torch_slmops.cli.screen import FAILED, USAGE

transformers = pytest.importorskip("transformers")


def expected_text(folder: Path, ids: torch.Tensor, count: int) -> str:
    """What the optimized model makes of the tokens, by transformers alone."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    torch_slmops.optimize(model, progress=False)
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text: str = tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def test_generate(cli: CommandLine, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    raw = tokenizer("w1 w2 w3", return_tensors="pt")["input_ids"]
    arguments = ("generate", llama, "w1 w2 w3", "--max-new-tokens", 7)
    code, out, err = cli.run(*arguments, "--raw")
    assert code == 0
    assert out.strip() == expected_text(llama, raw, 7).strip()
    assert re.search(r"3 prompt tokens at \d+ tokens/s, \d new tokens at [\d.]+ tokens/s", err)

    chat = tokenizer("<system> w9 <user> w1 w2 w3 <assistant>", return_tensors="pt")["input_ids"]
    found = cli.json(*arguments, "--system", "w9")
    assert found["text"].strip() == expected_text(llama, chat, 7).strip()
    assert found["prompt_tokens"] == 7 and found["new_tokens"] <= 7
    assert found["tokens_per_second"] > 0

    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2 w3"))
    assert (
        cli.json("generate", llama, "-", "--max-new-tokens", 7, "--system", "w9")["text"]
        == (found["text"])
    )
    sampled = [
        cli.json(*arguments, "--temperature", 2, "--top-k", 50, "--seed", seed)["text"]
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_generate_refuses_what_cannot(cli: CommandLine, llama: Path, bert: Path) -> None:
    code, _, err = cli.run("generate", bert, "w1")
    assert code == FAILED
    assert "BertForMaskedLM does not generate text" in err
    code, _, err = cli.run("generate", llama, "w1", "--raw", "--system", "w2")
    assert code == USAGE
    assert "no chat template" in err


def chat_replies(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, folder: Path, lines: str
) -> list[Any]:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code, out, _ = cli.run("chat", folder, "--max-new-tokens", 5, "--json")
    assert code == 0
    return [json.loads(line) for line in out.splitlines()]


def test_chat(cli: CommandLine, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, again = chat_replies(
        cli, monkeypatch, llama, "w1 w2\n\nw3 w4\n/help\n/reset\nw1 w2\n/exit\nw5\n"
    )
    assert first["prompt_tokens"] == 4 and first["cached_tokens"] == 0
    assert second["cached_tokens"] == first["prompt_tokens"] + first["new_tokens"] - 1
    assert (again["text"], again["cached_tokens"]) == (first["text"], 0)
    # The same as without a cache: one prompt with the whole conversation.
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    whole = f"<user> w1 w2 <assistant> {first['text']} <eos> <user> w3 w4 <assistant>"
    ids = tokenizer(whole, return_tensors="pt")["input_ids"]
    assert second["prompt_tokens"] == ids.shape[1]
    assert second["text"].strip() == expected_text(llama, ids, 5).strip()


def test_chat_needs_a_template(cli: CommandLine, tmp_path: Path) -> None:
    code, _, err = cli.run("chat", save_model(tmp_path, template=None))
    assert code == FAILED
    assert "has no chat template; try the command generate" in err


def test_an_interrupted_reply_is_forgotten(
    cli: CommandLine, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_slmops.cli import replies

    reply, calls = replies.reply, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return reply(*arguments)

    monkeypatch.setattr(replies, "reply", interrupted)
    first, third = chat_replies(cli, monkeypatch, llama, "w1\nw2\nw3\n")
    assert third["prompt_tokens"] == first["prompt_tokens"] + first["new_tokens"] + 4
