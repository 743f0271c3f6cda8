"""Writes the file system that a kernel starts from: `initrd.py OUT NAME=FILE ...`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import BinaryIO

DIRECTORY, CHARACTER_DEVICE, EXECUTABLE = 0o40755, 0o20600, 0o100755


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def entry(out: BinaryIO, name: str, mode: int, data: bytes = b"", device: int = 0) -> None:
    """Appends a file in cpio's "newc" format; a device's number is major * 256 + minor."""
    path = name.encode() + b"\0"
    major, minor = divmod(device, 256)
    fields = (out.tell(), mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(path), 0)
    header = b"070701" + b"".join(b"%08x" % field for field in fields)
    out.write(padded(header + path) + padded(data))


def main() -> None:
    target, *files = sys.argv[1:]
    with Path(target).open("wb") as out:
        entry(out, "dev", DIRECTORY)
        entry(out, "dev/console", CHARACTER_DEVICE, device=5 * 256 + 1)
        for file in files:
            name, _, path = file.partition("=")
            entry(out, name, EXECUTABLE, Path(path).read_bytes())
        entry(out, "TRAILER!!!", 0)


if __name__ == "__main__":
    main()
