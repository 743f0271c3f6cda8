"""`torch-slmops serve`: a packed model answers requests of OpenAI's protocol on the loopback.

The packages that this needs are not among those of `make test`: `make test-serve` brings them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_models import save_model

from torch_slmops.cli.main import main

transformers = pytest.importorskip("transformers")
openai = pytest.importorskip("openai")
for name in ("accelerate", "fastapi", "uvicorn"):
    pytest.importorskip(name)

START_SECONDS = 120
MESSAGES = [{"role": "user", "content": "w1 w2 w3"}]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `quantize` wrote."""
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "float")
    assert main(["quantize", str(folder / "float"), str(folder / "packed")]) == 0
    return folder / "packed"


@pytest.fixture(scope="module")
def client(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of a server that runs the packed model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.log"
    command = [sys.executable, "-m", "torch_slmops", "serve", str(packed)]
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    try:
        wait_for(port, server, log)
        # No proxy of the environment between the test and its own machine.
        http = openai.DefaultHttpxClient(trust_env=False)
        url = f"http://127.0.0.1:{port}/v1"
        yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, http_client=http)
        http.close()
    finally:
        server.terminate()
        server.wait(timeout=30)


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"no server after {START_SECONDS} s:\n{log.read_text()}")


def expected(folder: Path, count: int) -> str:
    """What the packed model answers by `generate`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    text: str = tokenizer.decode(new, skip_special_tokens=True)
    return text


def test_chat_completion(client: Any, packed: Path) -> None:
    found = client.chat.completions.create(model=str(packed), messages=MESSAGES, max_tokens=8)
    assert found.choices[0].message.content.strip() == expected(packed, 8).strip()
    assert found.usage.prompt_tokens == 5


def test_streamed_chat_completion(client: Any, packed: Path) -> None:
    stream = client.chat.completions.create(
        model=str(packed), messages=MESSAGES, max_tokens=8, stream=True
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(parts) > 1
    assert "".join(parts).strip() == expected(packed, 8).strip()
