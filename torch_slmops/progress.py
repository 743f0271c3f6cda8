"""Progress bars of work that may take more than a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["progress_bar"]

_DELAY_S = 1.0


@contextmanager
def progress_bar(total: int, progress: bool, title: str) -> Iterator[Any]:
    """A function that advances a progress bar over `total` things."""
    if not progress:
        yield lambda count: None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]  # here, so that importing us is quick

    with tqdm(total=total, desc=title, unit="", unit_scale=True, delay=_DELAY_S) as bar:
        yield bar.update
