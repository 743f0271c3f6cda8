"""What `tune` found for this machine: kept in a file, put in use at import; defaults without it.

Nothing here changes a result of activations "int8" or "float": only how many threads share a
product, how far ahead it reads, and from how many rows on "float_fast" goes through torch.
"""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from torch_slmops import machine

__all__ = ["Settings", "apply", "cache_path", "default_settings", "key", "load", "save", "start"]

# Measured (docs/performance.md): on Zen 5 products of few rows become up to 1.5 times as fast; on
# Zen 4 asking ahead costs more than it brings.
_ZEN5, _ZEN5_READ_AHEAD = 26, 8192
_MOST_READ_AHEAD = 1 << 20  # that the op takes
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_logger = logging.getLogger("torch_slmops")


@dataclass(frozen=True)
class Settings:
    """What is tuned; 0 leaves a thing to torch or to the package.

    Attributes:
        decode_threads: Threads that share a product of up to 16 rows, at most.
        prefill_threads: Of more rows.
        torch_threads: The two hold while torch has so many threads: its number when it was tuned.
            Who calls `torch.set_num_threads` with another one has chosen, and is obeyed.
        read_ahead: Bytes: a product of few rows, and attention of few queries, asks memory for what
            stands so far behind that which it reads; 0 leaves that to the CPU.
        int4_library_rows: Rows from which int4 weights with activations "float_fast" are multiplied
            by torch.
        int8_library_rows: Likewise int8 weights.
    """

    decode_threads: int = 0
    prefill_threads: int = 0
    torch_threads: int = 0
    read_ahead: int = 0
    int4_library_rows: int = 0
    int8_library_rows: int = 0


def cache_path() -> Path:
    """Returns the file: torch_slmops/tuning.json in $XDG_CACHE_HOME, by default ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "torch_slmops" / "tuning.json"


def key() -> str:
    """Returns what settings hold for: the CPU, how much of it, and this version."""
    from torch_slmops import __version__

    quota = machine.cpus_of_quota()
    cpus = f"{machine.cpus_allowed()} CPUs"
    if quota is not None:
        cpus += f" ({quota:g} of a container)"
    return f"{machine.cpu_name()}, {cpus}, torch_slmops {__version__}"


def load(path: Path | None = None) -> Settings | None:
    """Returns the settings kept for this machine and version; None where there are none.

    A file that cannot be read is ignored, with a warning of the logger "torch_slmops".
    """
    try:
        path = path or cache_path()
        if not path.exists():
            return None
    except (OSError, RuntimeError):  # a folder that may not be seen, a user without a home
        return None
    return _settings(_read(path).get(key()), path)


def save(settings: Settings, path: Path | None = None) -> Path:
    """Keeps the settings of this machine, beside those of others; returns the file.

    Raises:
        OSError: The file cannot be written.
    """
    path = path or cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = _read(path) if path.exists() else {}
    text = json.dumps(kept | {key(): asdict(settings)}, indent=2) + "\n"
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)  # whoever reads meanwhile sees the old file or the new one
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    return path


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        _logger.warning("tuning: %s cannot be read (%s) and is ignored; tune again", path, error)
        return {}
    return found


def _settings(found: Any, path: Path) -> Settings | None:
    if found is None:
        return None
    names = {field.name for field in fields(Settings)}
    if (
        not isinstance(found, dict)
        or set(found) != names
        or any(type(value) is not int or value < 0 for value in found.values())
        or found["read_ahead"] > _MOST_READ_AHEAD
    ):
        _logger.warning("tuning: %s has unknown settings, which are ignored; tune again", path)
        return None
    return Settings(**found)


def apply(settings: Settings) -> None:
    """Puts settings in use, for all threads, from their next op on."""
    torch.ops.slmops._set_thread_limits(
        settings.decode_threads, settings.prefill_threads, settings.torch_threads
    )
    torch.ops.slmops._set_read_ahead(settings.read_ahead)
    torch.ops.slmops._set_library_rows(settings.int4_library_rows, settings.int8_library_rows)


def default_settings() -> Settings:
    """Returns what is used where nothing was tuned: no more threads than there are fast cores.

    These are the performance cores that this process may run on, one for each pair of
    hyperthreads, of the NUMA node that it runs on, and no more than a container's share of time.
    AMD's CPUs from Zen 5 on are asked to read ahead.
    """
    vendor, family = machine.cpu_family()
    ahead = _ZEN5_READ_AHEAD if vendor == "AuthenticAMD" and family >= _ZEN5 else 0
    cores, threads = machine.fast_cores(), torch.get_num_threads()
    quota = machine.cpus_of_quota()
    if quota is not None:
        cores = min(cores, max(1, math.floor(quota)))
    if cores >= threads or threads < machine.physical_cores():  # torch's own number is no less
        return Settings(read_ahead=ahead)
    return Settings(cores, cores, threads, ahead)


def start() -> None:
    """What the import of the package does: settings from the file, else the default ones.

    A number of threads in the environment is the user's choice; no limit is put on it.
    """
    settings = load() or default_settings()
    if any(os.environ.get(name) for name in _VARIABLES):
        settings = replace(settings, torch_threads=0)
    apply(settings)
