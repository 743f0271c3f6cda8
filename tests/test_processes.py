"""Forked and spawned processes, Ctrl-C, and memory that runs out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor, nn

import torch_slmops
from torch_slmops import modules, optimize, processes
from torch_slmops.modules import PackedModule

ROOT = Path(torch_slmops.__file__).parents[1]

# A model, an input for which all of its ops are cut into shares, and the result of the parent.
PREPARE = """
import os, sys, multiprocessing, torch
import torch_slmops

class Data(torch.utils.data.Dataset):
    def __init__(self, model, x): self.model, self.x = model, x
    def __len__(self): return 8
    def __getitem__(self, i):
        with torch.no_grad(): return self.model(self.x[i])

def compute(arguments):
    model, x = arguments
    with torch.no_grad(): return model(x).numpy().tobytes()

def make():
    torch.manual_seed(0)
    torch.set_num_threads(4)
    layers = torch.nn.Linear(512, 1024), torch.nn.SiLU(), torch.nn.Linear(1024, 512)
    model = torch_slmops.optimize(torch.nn.Sequential(*layers).eval(), progress=False)
    with torch.no_grad(): x = torch.randn(8, 128, 512); return model, x, model(x)
"""
FORK = """
model, x, expected = make()
assert len(os.listdir("/proc/self/task")) > 1, "the pool has not started"
child = os.fork()
if child == 0:
    with torch.no_grad(): y = model(x)
    torch.ones(1 << 22).sum()
    os._exit(0 if torch.equal(y, expected) and torch.get_num_threads() == 1 else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.get_num_threads() == 4
print("as expected")
"""
FORK_WITHOUT_THREADS = """
from torch_slmops import processes
processes._TASKS = sys.argv[1]  # a folder with one entry: setting the number starts threads, too
torch.set_num_threads(4)
child = os.fork()
if child == 0:
    os._exit(0 if torch.get_num_threads() == 4 else 1)
assert os.waitpid(child, 0)[1] == 0
print("as expected")
"""
WORKERS = """
if __name__ == "__main__":
    model, x, expected = make()
    loader = torch.utils.data.DataLoader(Data(model, x), 4, num_workers=2,
                                         multiprocessing_context=sys.argv[1])
    assert torch.equal(torch.cat(list(loader)), expected)
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        found = pool.map(compute, [(model, row) for row in x])
    assert found == [row.numpy().tobytes() for row in expected]
    print("as expected")
"""


def run(tmp_path: Path, code: str, *arguments: str) -> None:
    """Runs code in a new process, 60 s at most: a lost pool would wait forever."""
    file = tmp_path / "script.py"
    file.write_text(PREPARE + code)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "4"}
    done = subprocess.run(
        [sys.executable, str(file), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "as expected\n"


def test_fork_after_the_pool_has_started(tmp_path: Path) -> None:
    run(tmp_path, FORK)


def test_fork_before_keeps_the_threads(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    (tasks / "1").mkdir(parents=True)
    run(tmp_path, FORK_WITHOUT_THREADS, str(tasks))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers(method: str, tmp_path: Path) -> None:
    run(tmp_path, WORKERS, method)


def small_model() -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)]
    return nn.Sequential(*layers).eval()


class Failing:
    """quantize_weight that does something else instead at the call with this number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, what: Any) -> None:
        self.calls, self.at, self.what = 0, at, what
        module: Any = sys.modules["torch_slmops.formats"]
        self.original = module.quantize_weight
        monkeypatch.setattr(module, "quantize_weight", self)

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            self.what()
        return self.original(*args)


def check_unchanged(model: nn.Module, x: Tensor, before: Tensor) -> None:
    assert not any(isinstance(module, PackedModule) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert_same_bits(model(x).detach(), before)


@pytest.fixture
def python_interrupts() -> Iterator[None]:
    """Python's own handler, where the process was started with interrupts ignored too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("python_interrupts")
class TestInterrupt:
    @pytest.mark.parametrize("at", [1, 3])
    def test_while_packing_leaves_the_model(self, at: int, monkeypatch: Any) -> None:
        model, x = small_model(), torch.randn(4, 96)
        before = model(x).detach()
        failing = Failing(monkeypatch, at, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            optimize(model, progress=False)
        assert failing.calls == at
        check_unchanged(model, x, before)
        optimize(model, progress=False)
        assert all(isinstance(model[i], PackedModule) for i in (0, 2, 4))

    def test_while_swapping_waits_for_the_end(self, monkeypatch: Any) -> None:
        model = small_model()
        module: Any = sys.modules["torch_slmops.carry_out"]
        put = module.put

        def interrupted(swaps: Any) -> None:
            signal.raise_signal(signal.SIGINT)
            put(swaps)

        monkeypatch.setattr(module, "put", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimize(model, progress=False)
        assert all(isinstance(model[i], PackedModule) for i in (0, 2, 4))
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def test_ignored_ones_stay_ignored(self) -> None:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with processes.uninterrupted():
                signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        finally:
            signal.signal(signal.SIGINT, before)

    @pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs setitimer")
    def test_while_generating_leaves_the_process_sane(self) -> None:
        pytest.importorskip("transformers")
        from small_models import logits, small, tokens

        model, ids = optimize(small("llama"), progress=False), tokens(2, 9)
        expected = logits(model, ids)
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            for delay in (0.02, 0.035, 0.05, 0.08):
                with pytest.raises(KeyboardInterrupt):
                    signal.setitimer(signal.ITIMER_REAL, delay)
                    while True:
                        model.generate(ids, do_sample=False, max_new_tokens=64)
                assert_same_bits(logits(model, ids), expected)
        finally:
            signal.signal(signal.SIGALRM, before)


class TestOutOfMemory:
    @pytest.mark.parametrize("at", [1, 3])
    def test_leaves_the_model(self, at: int, monkeypatch: Any) -> None:
        model, x = small_model(), torch.randn(4, 96)
        before = model(x).detach()

        def fail() -> None:
            raise MemoryError("no memory left")

        Failing(monkeypatch, at, fail)
        with pytest.raises(MemoryError):
            optimize(model, progress=False)
        check_unchanged(model, x, before)

    LIMITED = """
import resource
torch.set_num_threads(1)
model = torch.nn.Sequential(*(torch.nn.Linear(2048, 2048, bias=False) for _ in range(8))).eval()
x = torch.randn(4, 2048)
with torch.no_grad(): before = model(x)
first = torch.nn.Sequential(torch.nn.Linear(2048, 2048, bias=False)).eval()
torch_slmops.optimize(first, progress=False)  # what is needed once is there
(size,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize"))
limit = int(size) * 1024 + (8 << 20)  # room for two packed weights
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
try:
    torch_slmops.optimize(model, progress=False)
except (MemoryError, OSError, ValueError) as error:
    assert "memory" in str(error) or "alloc" in str(error), error
else:
    raise AssertionError("the limit was not reached")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert all(type(layer) is torch.nn.Linear for layer in model)
with torch.no_grad(): assert torch.equal(model(x), before)
torch_slmops.optimize(model, progress=False)
print("as expected")
"""

    def test_of_the_system(self, tmp_path: Path) -> None:
        run(tmp_path, self.LIMITED)


def test_weights_that_cannot_be_allocated(monkeypatch: Any) -> None:
    """A module's weight stays when packing its successor fails."""
    layer: Any = optimize(nn.Sequential(nn.Linear(64, 32)).eval(), progress=False)[0]
    packed = layer.packed

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("no memory left")

    monkeypatch.setattr(modules, "quantize_weight", fail)
    with pytest.raises(MemoryError):
        layer.weight = torch.randn(32, 64)
    assert layer.packed is packed
