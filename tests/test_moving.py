"""Weights that are moved out of the file after loading, and what may happen meanwhile."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from bits import assert_same_bits
from small_models import logits, small, tokens, transformers
from torch import Tensor

from torch_slmops import moving, optimize
from torch_slmops.modules import PackedModule

IDS = tokens(2, 5)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of an optimized llama, which is large enough to be moved later."""
    monkeypatch.setattr(moving, "LARGE", 0)
    optimize(small("llama")).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An event before which no weight is copied."""
    event, copied = threading.Event(), moving._copied

    def waiting(tensor: Tensor) -> Tensor | None:
        event.wait()
        return copied(tensor)

    monkeypatch.setattr(moving, "_copied", waiting)
    yield event
    event.set()


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def in_the_file(model: Any) -> set[str]:
    """Names of the packed weights whose memory is a file's, as the system says."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [
        [int(part, 16) for part in line.split()[0].split("-")]
        for line in lines
        if line.endswith(".safetensors")
    ]
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, PackedModule)
        and any(start <= module.packed.data_ptr() < end for start, end in ranges)
    }


def test_a_model_computes_the_same_before_and_after(folder: Path, gate: Any) -> None:
    want, model = logits(optimize(small("llama")), IDS), load(folder)
    assert in_the_file(model)
    assert_same_bits(logits(model, IDS), want)
    gate.set()
    moving.finish_moving()
    assert not in_the_file(model)
    assert_same_bits(logits(model, IDS), want)


def test_forwards_meanwhile(folder: Path) -> None:
    want = logits(optimize(small("llama")), IDS)
    for _ in range(5):
        model = load(folder)
        while in_the_file(model):
            assert_same_bits(logits(model, IDS), want)
    assert_same_bits(logits(model, IDS), want)


def test_tied_weights_stay_one(folder: Path) -> None:
    model = load(folder)
    moving.finish_moving()
    assert model.lm_head.packed is model.model.embed_tokens.packed


def test_small_models_are_copied_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert not in_the_file(load(folder))


def test_saving_over_the_file(folder: Path, gate: Any) -> None:
    model = load(folder)
    want = logits(model, IDS)
    threading.Timer(0.05, gate.set).start()
    model.save_pretrained(folder)
    assert not in_the_file(model)
    assert_same_bits(logits(model, IDS), want)
    assert_same_bits(logits(load(folder), IDS), want)


def test_a_model_that_is_gone(folder: Path, gate: Any) -> None:
    model = load(folder)
    (thread,) = [t for t in threading.enumerate() if t.name.startswith("torch_slmops")]
    del model
    gc.collect()
    gate.set()
    thread.join(10)
    assert not thread.is_alive()


def test_no_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(tensor: Tensor) -> Tensor:
        raise OSError("Cannot allocate memory")

    want = logits(load(folder), IDS)
    moving.finish_moving()
    monkeypatch.setattr(moving, "_copied", fail)
    with caplog.at_level(logging.WARNING, "torch_slmops"):
        model = load(folder)
        for thread, _ in list(moving._moving.values()):
            thread.join()
    assert in_the_file(model)
    assert "stay in the file" in caplog.text
    assert_same_bits(logits(model, IDS), want)


def test_a_process_that_ends_meanwhile(folder: Path) -> None:
    program = f"""
import time, torch_slmops, transformers
from torch_slmops import moving
moving.LARGE, moving._CHUNK = 0, 1
model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r})
print(any(thread.is_alive() for thread, _ in moving._moving.values()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split() == ["True"]
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_meanwhile(folder: Path, gate: Any) -> None:
    """The child has no thread that moves, and moves what is left itself when it has to."""
    model = load(folder)
    child = os.fork()
    if child == 0:
        gate.set()
        moving.finish_moving()
        os._exit(len(in_the_file(model)))
    assert os.waitpid(child, 0)[1] == 0
    assert in_the_file(model)
