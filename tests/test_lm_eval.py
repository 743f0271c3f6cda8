"""lm-eval works on an optimized model, with a task that lies beside it; see `make test-lm-eval`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import torch_slmops

transformers = pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

from examples import quickstart  # noqa: E402

# lm-eval and what it stands on warn of things that are no matter of ours.
pytestmark = pytest.mark.filterwarnings("default")

ROWS = [
    {"text": "import os\nimport", "choices": [" sys", " banana"], "answer": 0},
    {"text": "def f(self", "choices": ["):", "]["], "answer": 0},
    {"text": "for i in range", "choices": [" of", "("], "answer": 1},
    {"text": "    return", "choices": [" None", " zebra"], "answer": 0},
    {"text": "if __name__ ==", "choices": [" 3", ' "__main__"'], "answer": 1},
]
TASK = """task: python_next
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def run(model: Any, tokenizer: Any, folder: Path) -> tuple[float, list[float]]:
    """The accuracy, and the log probability of every choice."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2),
        tasks=["python_next"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    samples = found["samples"]["python_next"]
    logs = [response[0][0] for sample in samples for response in sample["resps"]]
    return found["results"]["python_next"]["acc,none"], logs


def log_probability(model: Any, tokenizer: Any, text: str, choice: str) -> float:
    """What lm-eval means by it, one sequence at a time."""
    context, whole = (tokenizer(t)["input_ids"] for t in (text, text + choice))
    with torch.no_grad():
        logs = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
    places = range(len(context) - 1, len(whole) - 1)
    return sum(float(logs[at, whole[at + 1]]) for at in places)


def test_hflm_takes_an_optimized_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "python_next.yaml").write_text(TASK.format(rows=rows))
    original = quickstart.load_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(quickstart.MODEL)
    expected, float_logs = run(original, tokenizer, tmp_path)
    model = torch_slmops.optimize(copy.deepcopy(original), progress=False)
    accuracy, logs = run(model, tokenizer, tmp_path)
    assert accuracy == expected > 0.5
    assert logs != float_logs
    wanted = [
        log_probability(model, tokenizer, str(row["text"]), choice)
        for row in ROWS
        for choice in row["choices"]
    ]
    # Padding and batches change roundings of torch's attention, which flip an int8 code at most.
    assert max(abs(a - b) for a, b in zip(logs, wanted, strict=True)) < 0.05
    assert max(abs(a - b) for a, b in zip(logs, float_logs, strict=True)) > 0.05
