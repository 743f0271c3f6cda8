"""What commands print: tables and text for people, or with --json one document for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["FAILED", "OK", "USAGE", "Screen", "UserError", "make_table"]

# Exit codes; argparse ends with USAGE too, and an interrupt with 130, as shells have it.
OK, FAILED, USAGE = 0, 1, 2

_BAR_DELAY_S = 1.0
_WIDTH_OF_FILES = 160  # columns of tables that go to a file or a pipe


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, without a traceback.

    Attributes:
        code: The exit code.
    """

    def __init__(self, message: str, code: int = FAILED) -> None:
        super().__init__(message)
        self.code = code


class Screen:
    """Results go to stdout, what is said on the way and progress to stderr.

    Attributes:
        as_json: Whether the result is one JSON document, and nothing else goes to stdout.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        width = None if sys.stdout.isatty() else _WIDTH_OF_FILES
        self._out = Console(soft_wrap=True, width=width)
        self._notes = Console(stderr=True, soft_wrap=True)

    def show(self, *parts: Any) -> None:
        """Prints tables and text (rich's markup counts), but not with --json."""
        if not self.as_json:
            for part in parts:
                self._out.print(part, highlight=False)

    def write(self, text: str) -> None:
        """Writes text as it is, at once, but not with --json."""
        if not self.as_json:
            sys.stdout.write(text)
            sys.stdout.flush()

    def result(self, data: Mapping[str, Any], *, indent: int | None = 2) -> None:
        """Prints the result for programs, with --json only."""
        if self.as_json:
            print(json.dumps(data, indent=indent, ensure_ascii=False), flush=True)

    def note(self, text: str) -> None:
        """Says something on stderr."""
        self._notes.print(escape(text), style="dim", highlight=False)

    def error(self, text: str) -> None:
        """Says what went wrong, on stderr; with --json also as the document."""
        self.result({"error": text})
        self._notes.print(f"[bold red]error:[/] {escape(text)}", highlight=False)

    @contextmanager
    def progress(self, total: int, title: str) -> Iterator[Callable[[int], Any]]:
        """A function that advances a bar on stderr, shown from the second second on."""
        from tqdm import tqdm  # type: ignore[import-untyped]

        # disable=None: no bar where stderr is a file or a pipe.
        with tqdm(total=total, desc=title, delay=_BAR_DELAY_S, disable=None, leave=False) as bar:
            yield bar.update


def make_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> Table:
    """A table of plain text; a column whose cells are all numbers stands on the right."""
    columns = tuple(columns)
    table = Table(title=escape(title), title_justify="left", show_header=any(columns))
    cells = [[str(cell) for cell in row] for row in rows]
    for i, column in enumerate(columns):
        numeric = bool(cells) and all(_is_number(row[i]) for row in cells)
        table.add_column(escape(column), justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _is_number(cell: str) -> bool:
    return not cell or cell.lstrip("+-").rstrip("%")[:1].isdigit()
