"""The checks of `selfcheck`: every op on every row against its definition, and two digests."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torch_slmops import reference
from torch_slmops.isa import isa, isas, set_isa
from torch_slmops.selfcheck import expected
from torch_slmops.selfcheck.cases import Case, cases
from torch_slmops.selfcheck.model import Model

__all__ = ["OpResult", "Result", "selfcheck"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_HALF_DIGEST = 16  # hexadecimal digits that are published per op


@dataclass(frozen=True)
class OpResult:
    """What the calls of one op gave.

    Attributes:
        op: Its name.
        cases: How many calls there are; each runs on every row with every number of threads.
        wrong: Where a result was not the definition's: "row avx2, threads 2: case 3", ...
        digest: First 16 digits of the SHA-256 of the definition's results.
        published: The digest that other machines gave.
    """

    op: str
    cases: int
    wrong: tuple[str, ...]
    digest: str
    published: str

    @property
    def passed(self) -> bool:
        return not self.wrong and self.digest == self.published


@dataclass(frozen=True)
class Result:
    """What `selfcheck` found.

    Attributes:
        rows: ISA rows that ran, best first.
        threads: Numbers of threads that ran.
        ops: One result per op.
        vectors: SHA-256 of the definition's results of all cases.
        logits: SHA-256 of the small model's logits, by how they were computed: "reference", and
            "avx2, threads 2, prefill" and so on.
        seconds: How long it took.
    """

    rows: tuple[str, ...]
    threads: tuple[int, ...]
    ops: tuple[OpResult, ...]
    vectors: str
    logits: dict[str, str]
    seconds: float

    @property
    def wrong_logits(self) -> tuple[str, ...]:
        """The ways of computing the logits that gave other bits than those published."""
        return tuple(how for how, digest in self.logits.items() if digest != expected.LOGITS)

    @property
    def passed(self) -> bool:
        vectors = self.vectors == expected.VECTORS
        return vectors and not self.wrong_logits and all(op.passed for op in self.ops)


def selfcheck(
    rows: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> Result:
    """Compares every op with its definition on this CPU, and both with what other CPUs gave.

    The definitions are those of `torch_slmops.reference`; all comparisons are of bits. The ISA row
    and torch's number of threads are put back afterwards.

    Args:
        rows: ISA rows to run; by default all that can run here.
        threads: Numbers of threads; by default 1, 2, and as many as torch uses now.
        advance: Called with 1 after each case and each run of the model, `steps(rows, threads)`
            times.

    Returns:
        The result; `passed` says whether everything agreed.

    Raises:
        ValueError: A row is unknown or cannot run here.
    """
    start = time.perf_counter()
    rows = tuple(rows or isas())
    threads = tuple(threads or default_threads())
    found: dict[str, list[tuple[str, list[str]]]] = {}
    everything = hashlib.sha256()
    with _restored(), torch.inference_mode():
        for case in _checked(cases(), rows, threads, everything):
            found.setdefault(case.op, []).append((case.digest, case.wrong))
            advance(1)
        logits = {}
        for how, digest in _logits(rows, threads):
            logits[how] = digest
            advance(1)
    results = tuple(_summary(op, entries) for op, entries in sorted(found.items()))
    seconds = time.perf_counter() - start
    return Result(rows, threads, results, everything.hexdigest(), logits, seconds)


def default_threads() -> tuple[int, ...]:
    """1, 2 and torch's present number of threads."""
    return tuple(sorted({1, 2, torch.get_num_threads()}))


def steps(rows: Sequence[str], threads: Sequence[int]) -> int:
    """How many steps `selfcheck` reports with these arguments."""
    return sum(1 for _ in cases()) + 1 + 3 * len(rows) * len(threads)


@contextmanager
def _restored() -> Iterator[None]:
    row, threads = isa(), torch.get_num_threads()
    try:
        yield
    finally:
        set_isa(row)
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class _Checked:
    op: str
    digest: str
    wrong: list[str]


def _checked(
    todo: Iterator[Case], rows: Sequence[str], threads: Sequence[int], everything: Any
) -> Iterator[_Checked]:
    counts: dict[str, int] = {}
    for case in todo:
        counts[case.op] = number = counts.get(case.op, 0) + 1
        definition = _tensors(case.expected())
        digest = _digest(definition)
        everything.update(digest.encode())
        wrong = [
            f"row {row}, threads {count}: case {number}"
            for row, count in _settings(rows, threads)
            if not _same_bits(_tensors(case.actual()), definition)
        ]
        yield _Checked(case.op, digest, wrong)


def _settings(rows: Sequence[str], threads: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Puts each row and number of threads in use, in turn."""
    for row in rows:
        set_isa(row)
        for count in threads:
            torch.set_num_threads(count)
            yield row, count


def _logits(rows: Sequence[str], threads: Sequence[int]) -> Iterator[tuple[str, str]]:
    model = Model()
    yield "reference", _digest([model.prefill(reference)])
    for row, count in _settings(rows, threads):
        for way in (model.prefill, model.decode, model.layers):
            yield f"{row}, threads {count}, {way.__name__}", _digest([way()])


def _summary(op: str, entries: list[tuple[str, list[str]]]) -> OpResult:
    joined = hashlib.sha256("".join(digest for digest, _ in entries).encode())
    wrong = tuple(where for _, places in entries for where in places)
    digest = joined.hexdigest()[:_HALF_DIGEST]
    return OpResult(op, len(entries), wrong, digest, expected.OPS.get(op, ""))


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(_INTEGERS[x.element_size()])


def _same_bits(actual: list[Tensor], definition: list[Tensor]) -> bool:
    if len(actual) != len(definition):
        return False
    return all(
        a.dtype == d.dtype and a.shape == d.shape and torch.equal(_bits(a), _bits(d))
        for a, d in zip(actual, definition, strict=True)
    )


def _digest(tensors: list[Tensor]) -> str:
    """SHA-256 over dtype, shape and little-endian bytes of each tensor."""
    total = hashlib.sha256()
    for x in tensors:
        total.update(f"{x.dtype} {list(x.shape)} ".encode())
        words = _bits(x).numpy()
        total.update(words.astype(words.dtype.newbyteorder("<")).tobytes())
    return total.hexdigest()
