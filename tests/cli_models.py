"""Folders with small models and tokenizers, and the command line in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small_models
import tokenizers
import transformers

from torch_slmops.cli.main import main

WORDS = [f"w{i}" for i in range(small_models.VOCABULARY - 6)]
SPECIAL = ["<bos>", "<pad>", "<eos>", "<user>", "<assistant>", "<system>"]
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '> ' + message['content'] }}"
    "{{ ' <eos> ' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    """One token per word: w0, w1, ..."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def save_model(folder: Path, family: str = "llama", template: str | None = TEMPLATE) -> Path:
    """A small random model of the family, with its tokenizer."""
    model = small_models.small(family)
    if model.can_generate():
        model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    save_tokenizer(folder, template)
    return folder


class CommandLine:
    """Runs commands in this process and gives what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def run(self, *arguments: Any) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self._capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as error:  # argparse's
            assert isinstance(error.code, int)
            code = error.code
        out, err = self._capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    def json(self, *arguments: Any) -> Any:
        """The document of a command that succeeds with --json."""
        code, out, err = self.run(*arguments, "--json")
        assert code == 0, err
        return json.loads(out)
