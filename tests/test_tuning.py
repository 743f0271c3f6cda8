"""tune and what it keeps: choices from injected times, the file, defaults, the same bits."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from cases import FORMATS, random_packed, random_values
from cli_models import CommandLine

import torch_slmops
from torch_slmops import machine, ops, tuning
from torch_slmops.bench.timing import Timing
from torch_slmops.cache_memory import Int8Heads
from torch_slmops.cli.screen import FAILED
from torch_slmops.tuning import Settings

tune_module: Any = import_module("torch_slmops.tune")  # the name in the package is a function
NEVER = tune_module._NEVER


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: None) -> Iterator[Path]:
    """A cache folder of the test's own, no choice in the environment, all as before afterwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path / "torch_slmops" / "tuning.json"
    monkeypatch.undo()
    tuning.start()


def count(rows: int) -> int:
    """Threads for a product of so many rows."""
    return int(torch.ops.slmops._thread_count(rows))


class TestFile:
    def test_settings_come_back(self, cache: Path) -> None:
        assert tuning.load() is None
        settings = Settings(2, 3, 4, 4096, 64, NEVER)
        assert tuning.save(settings) == cache
        assert tuning.load() == settings
        assert list(json.loads(cache.read_text())) == [tuning.key()]
        assert [path.name for path in cache.parent.iterdir()] == ["tuning.json"]

    def test_other_machines_stay(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tuning.save(Settings(1))
        monkeypatch.setattr(machine, "cpu_name", lambda: "another CPU")
        assert tuning.load() is None
        tuning.save(Settings(2))
        assert tuning.load() == Settings(2)
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))
        assert tuning.load() == Settings(1)

    def test_another_version_is_another_machine(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tuning.save(Settings(1))
        monkeypatch.setattr(torch_slmops, "__version__", "999")
        assert tuning.load() is None

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"a"', "\x00"])
    def test_a_damaged_file_is_ignored(
        self, text: str, cache: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache.parent.mkdir()
        cache.write_text(text)
        with caplog.at_level(logging.WARNING, "torch_slmops"):
            assert tuning.load() is None
        assert "tune again" in caplog.text
        tuning.save(Settings(1))
        assert tuning.load() == Settings(1)

    @pytest.mark.parametrize("found", [[], {"decode_threads": 1}, "x", None, 1])
    def test_unknown_settings_are_ignored(
        self, found: object, cache: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        tuning.save(Settings(1))
        cache.write_text(json.dumps({tuning.key(): found}))
        with caplog.at_level(logging.WARNING, "torch_slmops"):
            assert tuning.load() is None
        assert ("tune again" in caplog.text) == (found is not None)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            *(("decode_threads", value) for value in (-1, 1.5, True, "2", None)),
            ("read_ahead", (1 << 20) + 1),
        ],
    )
    def test_values_of_other_kinds_are_ignored(self, name: str, value: object, cache: Path) -> None:
        tuning.save(Settings(1))
        kept = json.loads(cache.read_text())
        kept[tuning.key()][name] = value
        cache.write_text(json.dumps(kept))
        assert tuning.load() is None

    @pytest.mark.parametrize("error", [PermissionError("not yours"), RuntimeError("no home")])
    def test_a_folder_that_cannot_be_seen_is_none(
        self, error: Exception, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(self: Path) -> Any:
            raise error

        monkeypatch.setattr(Path, "exists" if isinstance(error, OSError) else "expanduser", fail)
        assert tuning.load() is None

    def test_a_failed_write_leaves_the_file(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tuning.save(Settings(1))

        def fail(source: str, target: Path) -> None:
            raise OSError("no space left")

        monkeypatch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            tuning.save(Settings(2))
        assert tuning.load() == Settings(1)
        assert [path.name for path in cache.parent.iterdir()] == ["tuning.json"]


class TestLimits:
    def test_hold_while_torch_has_its_number(self) -> None:
        torch.set_num_threads(4)
        tuning.apply(Settings(2, 3, 4))
        assert (count(1), count(16), count(17), count(4096)) == (2, 2, 3, 3)
        torch.set_num_threads(8)  # the user's choice
        assert (count(1), count(17)) == (8, 8)
        torch.set_num_threads(4)
        assert count(1) == 2
        tuning.apply(Settings())
        assert count(1) == 4

    def test_start_takes_the_file(self) -> None:
        torch.set_num_threads(4)
        tuning.save(Settings(2, 3, 4))
        tuning.start()
        assert (count(1), count(17)) == (2, 3)

    @pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
    def test_the_environment_wins(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.set_num_threads(4)
        tuning.save(Settings(2, 3, 4))
        monkeypatch.setenv(name, "4")
        tuning.start()
        assert (count(1), count(17)) == (4, 4)

    @pytest.mark.parametrize(
        ("fast", "physical", "quota", "expected"),
        [
            (8, 8, None, Settings()),
            (6, 8, None, Settings(6, 6, 8)),  # slow cores, or another node
            (8, 8, 2.5, Settings(2, 2, 8)),
            (8, 8, 0.5, Settings(1, 1, 8)),
            (8, 8, 16.0, Settings()),
            (6, 24, None, Settings()),  # somebody gave torch fewer threads than it takes itself
        ],
    )
    def test_defaults(
        self,
        fast: int,
        physical: int,
        quota: float | None,
        expected: Settings,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        torch.set_num_threads(8)
        monkeypatch.setattr(machine, "fast_cores", lambda: fast)
        monkeypatch.setattr(machine, "physical_cores", lambda: physical)
        monkeypatch.setattr(machine, "cpus_of_quota", lambda: quota)
        monkeypatch.setattr(machine, "cpu_family", lambda: ("AuthenticAMD", 25))
        assert tuning.default_settings() == expected
        monkeypatch.setattr(machine, "cpu_family", lambda: ("AuthenticAMD", 26))
        assert tuning.default_settings() == replace(expected, read_ahead=8192)


def siblings(cpu: int) -> str:
    return f"cpu/cpu{cpu}/topology/thread_siblings_list"


class TestCores:
    """`machine.fast_cores` on the files of imaginary machines."""

    @pytest.fixture
    def files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        monkeypatch.setattr(machine, "_CPUS", tmp_path / "cpu")
        monkeypatch.setattr(machine, "_NODES", tmp_path / "node")
        monkeypatch.setattr(machine, "_HYBRID", tmp_path / "hybrid")

        def write(cpus: int, texts: Mapping[str, str]) -> None:
            allowed = set(range(cpus))
            monkeypatch.setattr(os, "sched_getaffinity", lambda pid: allowed, raising=False)
            for name, text in texts.items():
                path = tmp_path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text + "\n")

        return write

    def test_unknown(self, files: Callable[..., None]) -> None:
        files(6, {})
        assert machine.fast_cores() == machine.physical_cores() == 6

    def test_hyperthreads(self, files: Callable[..., None]) -> None:
        pairs = {
            f"cpu/cpu{i}/topology/thread_siblings_list": f"{i % 4},{i % 4 + 4}" for i in range(8)
        }
        files(8, pairs)
        assert machine.fast_cores() == machine.physical_cores() == 4

    def test_performance_cores_of_intel(self, files: Callable[..., None]) -> None:
        pairs = {
            f"cpu/cpu{i}/topology/thread_siblings_list": f"{i // 2 * 2}-{i // 2 * 2 + 1}"
            for i in range(4)
        }
        files(12, {"hybrid": "0-3", **pairs})
        assert machine.fast_cores() == 2
        assert machine.physical_cores() == 10

    def test_large_cores_of_arm(self, files: Callable[..., None]) -> None:
        files(8, {f"cpu/cpu{i}/cpu_capacity": "1024" if i >= 6 else "400" for i in range(8)})
        assert machine.fast_cores() == 2

    def test_the_callers_node(
        self, files: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files(8, {"node/node0/cpulist": "0-2", "node/node1/cpulist": "3-7"})
        monkeypatch.setattr(machine, "_here", lambda: 4)
        assert machine.fast_cores() == 5
        monkeypatch.setattr(machine, "_here", lambda: 1)
        assert machine.fast_cores() == 3


class TestReadAhead:
    @pytest.mark.parametrize("fmt", FORMATS, ids=str)
    def test_same_bits(self, fmt: Any) -> None:
        n, k = 96, 384
        packed = random_packed(fmt, n, k)
        inputs = [random_values("normal", (rows, k), seed=rows) for rows in (1, 2, 3, 5, 40)]
        found = []
        for bytes_ahead in (0, 64, 8192, 1 << 20):
            torch.ops.slmops._set_read_ahead(bytes_ahead)
            found.append([ops.linear(x, packed, n) for x in inputs])
        for others in found[1:]:
            for got, expected in zip(others, found[0], strict=True):
                assert_same_bits(got, expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
    def test_same_bits_of_attention(self, dtype: torch.dtype) -> None:
        q = random_values("normal", (2, 2, 4, 64), seed=1)
        keys, values = (random_values("normal", (2, 300, 2, 64), seed=n).bfloat16() for n in (2, 3))
        scales: list[torch.Tensor] = []
        if dtype == torch.int8:
            stored = [Int8Heads(x.transpose(1, 2), 300, x is values) for x in (keys, values)]
            for made, x in zip(stored, (keys, values), strict=True):
                made.store(x.transpose(1, 2))
            keys, values = (made.codes for made in stored)
            scales = [made.scale[:, :, :300] for made in stored]
        found = []
        for bytes_ahead in (0, 64, 8192):
            torch.ops.slmops._set_read_ahead(bytes_ahead)
            rest = (None, None, True, 0, 0.125, 0.0)
            found.append(ops.attention(q, keys, values, *rest, *scales))
        for other in found[1:]:
            assert_same_bits(other, found[0])

    @pytest.mark.parametrize("value", [-1, (1 << 20) + 1, -(1 << 63)])
    def test_other_numbers_are_refused(self, value: int) -> None:
        torch.ops.slmops._set_read_ahead(64)
        with pytest.raises(RuntimeError, match="number of bytes in 0"):
            torch.ops.slmops._set_read_ahead(value)
        assert torch.ops.slmops._read_ahead() == 64

    def test_start_takes_the_file(self) -> None:
        tuning.save(Settings(read_ahead=2048))
        tuning.start()
        assert torch.ops.slmops._read_ahead() == 2048

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2\n", ("AuthenticAMD", 26)),
            ("processor\t: 0\nBogoMIPS\t: 2000.00\n", ("", 0)),  # Arm
            ("", ("", 0)),
        ],
    )
    def test_family(
        self, text: str, expected: tuple[str, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(machine, "_read", lambda path: text)
        assert machine.cpu_family() == expected


def fake_times(seconds: Mapping[str, float]) -> Callable[..., Mapping[str, Timing]]:
    """What replaces the measuring: `seconds` of a choice, or of a choice at so many rows."""

    def timed(budget: float, calls: Mapping[str, Callable[[int], object]]) -> Mapping[str, Timing]:
        for call in calls.values():
            call(0)
        return {name: Timing((seconds[name],)) for name in calls}

    return timed


class TestTune:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tune_module, "_SIZE", (64, 64))
        monkeypatch.setattr(tune_module, "_BYTES", 1)
        monkeypatch.setattr(tune_module, "_LIBRARY_ROWS", (8, 64))
        monkeypatch.setattr(tune_module, "thread_candidates", lambda threads: [4, 2, 1])
        torch.set_num_threads(4)

    def use(self, monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
        names = {f"t{n}": f"{n} threads" for n in (1, 2, 4)}
        names |= {f"b{n}": f"{n} bytes" for n in (0, 2048, 4096, 8192, 16384)}
        names |= {"own": "own kernels", "torch": "torch"}
        times = {name: seconds.get(short, 1.0) for short, name in names.items()}
        monkeypatch.setattr(tune_module, "_timed", fake_times(times))

    def test_the_fastest_is_used_and_kept(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.use(monkeypatch, t2=0.5, b4096=0.5, own=2.0)
        found = torch_slmops.tune(progress=False)
        assert found.settings == Settings(2, 2, 4, 4096, 8, 8)
        assert found.path == cache
        assert tuning.load() == found.settings
        assert (count(1), count(100)) == (2, 2)
        assert torch.ops.slmops._read_ahead() == 4096
        used = [(m.what, m.choice) for m in found.measured if m.chosen]
        assert used[:3] == [
            ("decode", "2 threads"),
            ("prefill", "2 threads"),
            ("decode, read ahead", "4096 bytes"),
        ]
        assert ("float_fast, int8, 64 rows", "torch") in used
        packed = random_packed(FORMATS[-2], 32, 32)
        assert torch.ops.slmops._uses_library(packed, 8) is False  # "float" never does

    def test_the_default_stays_where_others_are_hardly_faster(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.use(monkeypatch, t2=0.98, b16384=0.98, own=1.02)
        found = torch_slmops.tune(keep=False, progress=False)
        default = tuning.default_settings().read_ahead
        assert found.settings == Settings(4, 4, 4, default, NEVER, NEVER)
        assert found.path is None
        assert tuning.load() is None

    def test_a_model_gives_its_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.use(monkeypatch, t1=0.5)
        model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 32)).eval()
        with pytest.raises(ValueError, match="optimize first"):
            torch_slmops.tune(model, keep=False, progress=False)
        torch_slmops.optimize(model)
        found = torch_slmops.tune(model, keep=False, progress=False)
        assert found.settings.decode_threads == 1

    def test_an_interrupt_leaves_what_was(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tuning.save(Settings(3, 3, 4))
        tuning.start()

        def interrupted(budget: float, calls: Mapping[str, Any]) -> Mapping[str, Timing]:
            calls["1 threads"](0)
            raise KeyboardInterrupt

        monkeypatch.setattr(tune_module, "_timed", interrupted)
        with pytest.raises(KeyboardInterrupt):
            torch_slmops.tune(progress=False)
        assert count(1) == 3

    @pytest.mark.parametrize("fmt", FORMATS[::4], ids=str)
    def test_same_bits_before_and_after(self, fmt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        n, k = 2080, 256
        packed = random_packed(fmt, n, k)
        inputs = [random_values("normal", (rows, k), seed=rows) for rows in (1, 40)]
        before = [ops.linear(x, packed, n) for x in inputs]
        self.use(monkeypatch, t2=0.5, own=2.0)
        torch_slmops.tune(keep=False, progress=False)
        for x, expected in zip(inputs, before, strict=True):
            assert_same_bits(ops.linear(x, packed, n), expected)

    def test_command(self, cli: CommandLine, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.use(monkeypatch, t1=0.5)
        code, out, _ = cli.run("tune", "--threads", "4")
        assert code == 0
        assert "1 threads" in out
        assert str(cache) in out
        code, out, _ = cli.run("tune", "--json", "--dry-run", "--threads", "4")
        found = json.loads(out)
        assert found["settings"]["decode_threads"] == 1
        assert found["path"] is None
        cache.unlink()
        cache.parent.rmdir()
        cache.parent.write_text("a file where the folder goes")
        code, _, err = cli.run("tune", "--threads", "4")
        assert code == FAILED
        assert "cannot be kept" in err


def test_thread_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "fast_cores", lambda: 6)
    monkeypatch.setattr(machine, "physical_cores", lambda: 12)
    assert tune_module.thread_candidates(16) == [16, 12, 8, 6, 4]
    assert tune_module.thread_candidates(4) == [4, 3, 2, 1]
    assert tune_module.thread_candidates(1) == [1]


def test_crossing() -> None:
    crossing = tune_module.crossing
    assert crossing({8: (2.0, 1.0), 16: (2.0, 1.0)}) == 8
    assert crossing({8: (1.0, 2.0), 16: (2.0, 1.0)}) == 16
    assert crossing({8: (2.0, 1.0), 16: (1.1, 1.0), 32: (2.0, 1.0)}) == 32
    assert crossing({8: (2.0, 1.0), 16: (1.0, 1.0)}) == NEVER
