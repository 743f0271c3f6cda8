"""tune: measures on this machine what is better measured than guessed, and keeps it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_slmops import machine, ops, tuning
from torch_slmops.bench.linear import rotated
from torch_slmops.bench.timing import Timing, interleaved
from torch_slmops.modules import Embedding, PackedModule
from torch_slmops.progress import progress_bar
from torch_slmops.tuning import Settings
from torch_slmops.weights import QuantizedWeight, quantize_weight

__all__ = ["Measurement", "Tuned", "tune"]

_WORTH = 1.03  # a choice other than the default has to be so much faster
_WORTH_LEAVING = 1.15  # torch's product: the ops of whole layers are left for it
_BYTES = 128 << 20  # read by a decode step, so that no cache holds them
_PREFILL_ROWS = 256
_READ_AHEAD = (0, 2048, 4096, 8192, 16384)
_LIBRARY_ROWS = (8, 16, 32, 64, 128, 256, 512)
_NEVER = 1 << 40
_SIZE = (2048, 2048)  # of the weight where no model is given


@dataclass(frozen=True)
class Measurement:
    """One choice, timed in turns with the others of its thing.

    Attributes:
        what: "decode", "prefill", "decode, read ahead" or "float_fast, n rows".
        choice: "n threads", "n bytes", "own kernels" or "torch".
        microseconds: Of one product, the median.
        chosen: Whether it is in use from now on.
    """

    what: str
    choice: str
    microseconds: float
    chosen: bool


@dataclass(frozen=True)
class Tuned:
    """What `tune` found.

    Attributes:
        settings: What is in use from now on.
        measured: All that was timed.
        seconds: How long it took.
        path: The file that keeps the settings, or None.
    """

    settings: Settings
    measured: tuple[Measurement, ...]
    seconds: float
    path: Path | None


Times = Callable[[Mapping[str, Callable[[int], object]]], Mapping[str, Timing]]


def tune(
    model: nn.Module | None = None,
    *,
    seconds: float = 20.0,
    keep: bool = True,
    progress: bool = True,
) -> Tuned:
    """Measures what is fastest on this machine, puts it in use, and keeps it for later processes.

    Measured are the number of threads for decoding and for the prefill (up to torch's number at the
    time), how far ahead decoding asks memory for weights, and from how many rows on activations
    "float_fast" go through torch's matrix product. What differs from the default must be 3 %
    faster, torch's product 15 %. Other work on the machine meanwhile would be measured too. The
    results of activations "int8" and "float" stay the same bits.

    The settings lie in `torch_slmops/tuning.json` in $XDG_CACHE_HOME (by default ~/.cache), for the
    CPU, its number of cores and this version; the import of the package reads them. The numbers of
    threads hold as long as torch has as many threads as now: after `torch.set_num_threads` with
    another number that one is used, and with OMP_NUM_THREADS or MKL_NUM_THREADS set, theirs.

    Args:
        model: A model that `optimize` has packed: its weights are used. By default a weight of
            2048 x 2048.
        seconds: About how long to measure, all together.
        keep: Whether the settings are kept for later processes.
        progress: Shows a progress bar.

    Returns:
        The settings and what was measured.

    Raises:
        ValueError: `model` has no packed layer.
        OSError: The file cannot be written.
    """
    start = time.perf_counter()
    weights = _own_weights() if model is None else _weights_of(model)
    candidates = thread_candidates(torch.get_num_threads())
    steps = 2 * (len(candidates) > 1) + 1 + 2 * len(_LIBRARY_ROWS)
    with progress_bar(steps, progress, "tuning") as advance, torch.inference_mode():
        try:
            timed = partial(_timed, seconds / steps)
            settings, measured = _measure(weights, candidates, timed, advance)
        except BaseException:
            tuning.start()
            raise
    tuning.apply(settings)
    path = tuning.save(settings) if keep else None
    return Tuned(settings, tuple(measured), time.perf_counter() - start, path)


def thread_candidates(threads: int) -> list[int]:
    """Returns the numbers of threads to measure, torch's own first."""
    found = {threads, machine.fast_cores(), machine.physical_cores()}
    found.update(threads * part // 4 for part in (1, 2, 3))
    return sorted((n for n in found if 1 <= n <= threads), reverse=True)


def _timed(budget: float, calls: Mapping[str, Callable[[int], object]]) -> Mapping[str, Timing]:
    return interleaved(calls, budget=budget)


@dataclass(frozen=True)
class _Weights:
    """Packed weights [n, k] of more bytes than caches hold, and some for "float_fast"."""

    packed: list[tuple[Tensor, int, int]]
    fast: Mapping[int, Tensor]  # by bits


def _own_weights() -> _Weights:
    values = torch.randn(_SIZE) / _SIZE[1] ** 0.5
    weight = quantize_weight(values)
    packed = [(copy, *_SIZE) for copy in rotated(weight.pack(), total=_BYTES)]
    return _Weights(packed, _fast(values, {4: weight}))


def _fast(values: Tensor, known: Mapping[int, QuantizedWeight]) -> dict[int, Tensor]:
    quantized = {bits: known.get(bits) or quantize_weight(values, bits) for bits in (4, 8)}
    return {bits: weight.pack(activations="float_fast") for bits, weight in quantized.items()}


def _weights_of(model: nn.Module) -> _Weights:
    found: dict[int, tuple[Tensor, int, int]] = {}
    size = 0
    for module in model.modules():
        if not isinstance(module, PackedModule) or isinstance(module, Embedding):
            continue
        packed = module.packed
        header = ops.describe(packed)
        if size < 2 * _BYTES and packed.data_ptr() not in found:
            found[packed.data_ptr()] = packed, header.n, header.k
            size += packed.numel()
    if not found:
        raise ValueError("tune: expected a model with packed layers; call optimize first")
    weight = QuantizedWeight.unpack(next(iter(found.values()))[0])
    fast = _fast(weight.dequantize(), {weight.bits: weight})
    return _Weights(list(found.values()), fast)


def _measure(
    weights: _Weights, candidates: list[int], timed: Times, advance: Callable[[int], object]
) -> tuple[Settings, list[Measurement]]:
    threads, ahead = candidates[0], tuning.default_settings().read_ahead
    settings = Settings(torch_threads=threads, read_ahead=ahead)
    torch.ops.slmops._set_read_ahead(ahead)
    measured: list[Measurement] = []
    if len(candidates) > 1:
        for what, rows, field in (
            ("decode", 1, "decode_threads"),
            ("prefill", _PREFILL_ROWS, "prefill_threads"),
        ):
            calls = {f"{n} threads": _product(weights, rows, n, threads) for n in candidates}
            times = timed(calls)
            best = fastest({name: time.median for name, time in times.items()})
            measured += _rows(what, times, best)
            settings = replace(settings, **{field: int(best.split()[0])})
            advance(1)
    choices = sorted({ahead, *_READ_AHEAD}, key=lambda n: (n != ahead, n))
    decode = settings.decode_threads or threads
    calls = {f"{n} bytes": _product(weights, 1, decode, threads, n) for n in choices}
    times = timed(calls)
    best = fastest({name: time.median for name, time in times.items()})
    measured += _rows("decode, read ahead", times, best)
    settings = replace(settings, read_ahead=int(best.split()[0]))
    advance(1)
    for bits, field in ((4, "int4_library_rows"), (8, "int8_library_rows")):
        found, more = _measure_library(weights.fast[bits], bits, settings, timed, advance)
        settings = replace(settings, **{field: found})
        measured += more
    return settings, measured


def fastest(seconds: Mapping[str, float]) -> str:
    """Returns the fastest choice, or the first one where no other is 3 % faster than it."""
    default = next(iter(seconds))
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[default] >= _WORTH * seconds[best] else default


def _product(
    weights: _Weights, rows: int, threads: int, of: int, ahead: int | None = None
) -> Callable[[int], object]:
    """Products of `rows` rows with one weight after the other."""
    inputs = {k: torch.randn(rows, k).bfloat16() for _, _, k in weights.packed}

    def run(index: int) -> object:
        torch.ops.slmops._set_thread_limits(threads, threads, of)
        if ahead is not None:
            torch.ops.slmops._set_read_ahead(ahead)
        packed, n, k = weights.packed[index % len(weights.packed)]
        return torch.ops.slmops.linear(inputs[k], packed, n)

    return run


def _measure_library(
    packed: Tensor, bits: int, settings: Settings, timed: Times, advance: Callable[[int], object]
) -> tuple[int, list[Measurement]]:
    """The number of rows from which torch is faster, and what was measured."""
    tuning.apply(settings)
    header: Any = ops.describe(packed)
    seconds: dict[int, Mapping[str, Timing]] = {}
    for rows in _LIBRARY_ROWS:
        x = torch.randn(rows, header.k).bfloat16()
        own, library = (partial(_by_library, x, packed, header.n, limit) for limit in (_NEVER, 1))
        seconds[rows] = timed({"own kernels": own, "torch": library})
        advance(1)
    found = crossing({n: (t["own kernels"].median, t["torch"].median) for n, t in seconds.items()})
    measured = []
    for rows, times in seconds.items():
        used = "torch" if rows >= found else "own kernels"
        measured += _rows(f"float_fast, int{bits}, {rows} rows", times, used)
    return found, measured


def _by_library(x: Tensor, packed: Tensor, n: int, limit: int, index: int) -> object:
    torch.ops.slmops._set_library_rows(limit, limit)
    return torch.ops.slmops.linear(x, packed, n)


def crossing(seconds: Mapping[int, tuple[float, float]]) -> int:
    """Returns the least number of rows from which on torch's product is always 15 % faster.

    Args:
        seconds: Rows to the seconds of our kernels and of torch, rows ascending.
    """
    found = _NEVER
    for rows, (own, library) in reversed(list(seconds.items())):
        if own < _WORTH_LEAVING * library:
            break
        found = rows
    return found


def _rows(what: str, times: Mapping[str, Timing], chosen: str) -> list[Measurement]:
    return [
        Measurement(what, name, time.median * 1e6, name == chosen) for name, time in times.items()
    ]
