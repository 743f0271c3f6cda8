"""Measurements that outlive an interruption: a JSON file, written after each of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torch_slmops.calibrate import Batch
from torch_slmops.formats import CANDIDATES
from torch_slmops.pieces import Piece
from torch_slmops.windows import Window

__all__ = ["Measurements", "fingerprint"]

Row = tuple[str, int, float]
_SAMPLE = 4096  # values of a weight that tell whether it is the same


class Measurements:
    """Rows (format in words, bytes, KL) by key, of one model and text.

    A file of another model or text is not read, and overwritten with the first measurement.
    """

    def __init__(self, path: str | os.PathLike[str] | None, owner: str) -> None:
        """Reads what is there.

        Args:
            path: The file, or None to keep nothing.
            owner: What the measurements are of, see `fingerprint`.

        Raises:
            ValueError: The file holds something else.
        """
        self._path = None if path is None else Path(path)
        self._owner = owner
        self._rows: dict[str, Row] = {}
        if self._path is not None and self._path.exists():
            try:
                found = json.loads(self._path.read_text(encoding="utf-8"))
                if found["owner"] == owner:
                    self._rows = {k: (str(a), int(b), float(c)) for k, (a, b, c) in found["rows"]}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"measurements: {self._path} is not a file of measurements; name another one"
                ) from error

    def get(self, key: str) -> Row | None:
        return self._rows.get(key)

    def put(self, key: str, row: Row) -> Row:
        """Keeps a row, and returns it."""
        self._rows[key] = row
        if self._path is not None:
            # Replaced as a whole: an interruption leaves the old file or the new one.
            other = self._path.with_name(self._path.name + ".new")
            text = json.dumps({"owner": self._owner, "rows": list(self._rows.items())})
            other.write_text(text, encoding="utf-8")
            other.replace(self._path)
        return row


def fingerprint(
    model: nn.Module,
    pieces: Sequence[Piece],
    probe: Sequence[Window],
    batches: Sequence[Batch] | None,
) -> str:
    """Tells models, texts, calibration and candidates apart; of long weights it reads a sample."""
    digest = hashlib.sha256()
    digest.update(repr((type(model).__name__, CANDIDATES)).encode())
    for piece in pieces:
        digest.update(piece.name.encode())
        for weight in piece.weights():
            _add(digest, weight)
    for window in probe:
        _add(digest, window.ids)
    for tensor in _tensors(batches):
        _add(digest, tensor)
    return digest.hexdigest()


def _add(digest: Any, tensor: Tensor) -> None:
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLE)
    digest.update(repr((tuple(tensor.shape), tensor.dtype, flat[::step].tolist())).encode())


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
