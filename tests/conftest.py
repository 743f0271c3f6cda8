"""Fixtures and settings that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import torch_slmops

# The same examples every time, so that a failure is the change's. `explore` looks for new ones.
_COMMON = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.register_profile("repeatable", parent=_COMMON, derandomize=True)
settings.register_profile("explore", parent=_COMMON, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Makes torch's random numbers those of the test, whatever ran before."""
    torch.manual_seed(20261123)


@pytest.fixture(params=torch_slmops.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each ISA row that can run here, in use."""
    before = torch_slmops.isa()
    torch_slmops.set_isa(request.param)
    yield request.param
    torch_slmops.set_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts torch's number of threads back after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], threads: None) -> Iterator[Any]:
    """The command line, on one thread; the row and number of threads are put back."""
    from cli_models import CommandLine

    before = torch_slmops.isa()
    torch.set_num_threads(1)
    yield CommandLine(capsys)
    torch_slmops.set_isa(before)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small llama, a tokenizer and a chat template."""
    from cli_models import save_model

    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small BERT and a tokenizer."""
    from cli_models import save_model

    return save_model(tmp_path_factory.mktemp("bert"), "bert", template=None)
