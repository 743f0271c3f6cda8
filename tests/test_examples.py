"""The shipped model, the quickstart's figures on it, and the script that trains its like."""

from __future__ import annotations

import copy
import io
import math
import re
import runpy
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import torch_slmops

transformers = pytest.importorskip("transformers")

import train_tiny_llama  # noqa: E402
import train_tiny_qwen3  # noqa: E402
import training  # noqa: E402

from examples import quickstart  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread for all tests here: on a busy machine, waiting for others outweighs their help."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def original() -> transformers.PreTrainedModel:
    return quickstart.load_model()


@pytest.fixture(scope="module")
def reference(original: transformers.PreTrainedModel) -> list[torch.Tensor]:
    return quickstart.held_out_logits(original, quickstart.held_out_tokens())


def test_agreement_of_known_distributions() -> None:
    # Token 0: the same; token 1: another first choice. p_ref = (3/4, 1/4), p = (1/4, 3/4).
    expected = torch.tensor([[[0.0, 5.0], [math.log(3), 0.0]]])
    got = torch.tensor([[[1.0, 6.0], [0.0, math.log(3)]]])
    top1, kl = quickstart.agreement([expected], [got])
    assert top1 == 0.5
    # KL of token 1 is (3/4 - 1/4) log 3; a handful of float32 roundings of terms below 2.
    assert abs(kl - 0.5 * 0.5 * math.log(3)) < 16 * torch.finfo(torch.float32).eps


def test_shipped_model_is_the_trained_one(reference: list[torch.Tensor]) -> None:
    # An untrained model scores log(4096) = 8.3; tiny_llama/README.md says 2.86.
    tokens = quickstart.held_out_tokens()
    logits = torch.cat([batch[:, :-1] for batch in reference]).flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    assert f"{loss:.2f}" == "2.86"


# The project's goals for this model (docs/accuracy.md), not bounds of an error analysis.
@pytest.mark.parametrize(
    ("weights", "least_top1", "most_kl"), [("int4", 0.945, 0.006), ("int8", 0.985, 0.0004)]
)
def test_quantized_model_agrees(
    original: transformers.PreTrainedModel,
    reference: list[torch.Tensor],
    weights: str,
    least_top1: float,
    most_kl: float,
) -> None:
    model = torch_slmops.optimize(copy.deepcopy(original), weights=weights, progress=False)
    logits = quickstart.held_out_logits(model, quickstart.held_out_tokens())
    top1, kl = quickstart.agreement(reference, logits)
    assert top1 >= least_top1
    assert 0 < kl <= most_kl


def test_quickstart_prints_what_it_promises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["quickstart.py", "--windows", "1", "--new-tokens", "3"])
    quickstart.main()
    printed = capsys.readouterr().out
    assert f"ISA row {torch_slmops.isa()}" in printed
    for name in ("float32", "int8", "int4"):
        assert f"=== {name}: " in printed
    assert printed.count("on 256 held-out tokens") == 2
    for prompt in quickstart.PROMPTS:
        assert printed.count(prompt) == 3


def test_accuracy_table_has_the_rows_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(quickstart.__file__).parent
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr("sys.argv", ["accuracy.py", "--windows", "2", "--only", "default"])
    runpy.run_path(str(folder / "accuracy.py"), run_name="__main__")
    header, _, *rows = capsys.readouterr().out.splitlines()
    assert header.count("|") == 6
    names = [row.split("|")[1].strip() for row in rows]
    assert names == [
        "int4 sub16 (default)",
        "int8 group 32 (default)",
        "bfloat16, not quantized",
        "bfloat16 model, int4 sub16",
        "float32",
    ]


def test_readme_example_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(quickstart.__file__).parents[1]
    code = re.findall(r"```python\n(.*?)```", (root / "README.md").read_text(), re.DOTALL)[0]
    monkeypatch.chdir(root)
    exec(compile(code, "README.md", "exec"), {})
    assert "def __eq__(self, other):" in capsys.readouterr().out


TRAINED = ("model.safetensors", "tokenizer.json", "val_tokens.npy", "calibration_tokens.npy")


def test_training_script_makes_a_model_that_loads(tmp_path: Path) -> None:
    arguments = ["--steps", "6", "--batch-size", "1", "--max-files", "100", "--threads", "1"]
    losses = [train_tiny_llama.main([str(tmp_path / run), *arguments]) for run in "ab"]
    assert losses[0] == losses[1]
    assert losses[0] < math.log(training.VOCABULARY)  # better than every token alike
    for name in TRAINED:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    shipped = transformers.AutoConfig.from_pretrained(quickstart.MODEL)
    assert model.config.to_diff_dict() == shipped.to_diff_dict()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    text = "def f(x):\n    return 'ä' + x\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    held_out = np.load(tmp_path / "a" / "val_tokens.npy")
    assert held_out.dtype == np.int64
    assert held_out.shape == (64, 256)


@pytest.fixture
def manuals(tmp_path: Path) -> Path:
    """Archives like those that train_tiny_qwen3 reads, each with two manuals and another file."""
    folder = tmp_path / "text"
    folder.mkdir()
    for archive, pattern in train_tiny_qwen3.MANUALS.items():
        with tarfile.open(folder / archive, "w:gz") as tar:
            for name in (pattern.replace("*", "a"), pattern.replace("*", "b/c"), "other.py"):
                words = " ".join(f"{name} {i * i}" for i in range(200)).encode()
                member = tarfile.TarInfo(name)
                member.size = len(words)
                tar.addfile(member, io.BytesIO(words))
    return folder


def test_interrupted_training_goes_on(
    manuals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = train_tiny_qwen3.manuals(manuals)
    assert len(texts) == 4
    assert not any("other.py" in text for text in texts)
    arguments = ["--text", str(manuals), "--steps", "5", "--batch-size", "1", "--threads", "1"]
    arguments += ["--save-every", "2"]
    train_tiny_qwen3.main([str(tmp_path / "whole"), *arguments])

    out, loss_of = tmp_path / "parts", training.loss_of
    calls = iter(range(4))

    def cut_off(*given: Any) -> torch.Tensor:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return loss_of(*given)

    monkeypatch.setattr(training, "loss_of", cut_off)
    with pytest.raises(KeyboardInterrupt):
        train_tiny_qwen3.main([str(out), *arguments])
    monkeypatch.setattr(training, "loss_of", loss_of)
    with pytest.raises(ValueError, match="delete it"):
        train_tiny_qwen3.main([str(out), *arguments, "--batch-size", "2"])
    train_tiny_qwen3.main([str(out), *arguments])
    for name in TRAINED:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (out / "checkpoint.pt").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.model_type == "qwen3"
