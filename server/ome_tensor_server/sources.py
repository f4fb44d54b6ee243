"""Reading a source file so that what is said of it and what is made of it are the same bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import TypeVar

from ome_tensor.errors import InvalidRecord

__all__ = ["Source", "read_source"]

T = TypeVar("T")


class Source:
    """A source file, opened once: digested, read and linked by that, whatever its path names meanwhile.

    Args:
        path: Its path.
        file: The file.

    Attributes:
        path, file: As given.
        stat: What the file system said of it at the beginning.
    """

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path = path
        self.file = file
        self.stat = os.fstat(file.fileno())

    @property
    def is_unchanged(self) -> bool:
        """Whether its path still names it, and nobody has written to it."""
        before = _identity(self.stat)
        try:
            return _identity(os.fstat(self.file.fileno())) == _identity(os.stat(self.path)) == before
        except OSError:
            return False

    def check(self) -> None:
        """Before anything that was made of it is made known. Raises InvalidRecord where it is no longer what it was."""
        if not self.is_unchanged:
            raise _changing(self.path)


def _changing(path: Path) -> InvalidRecord:
    return InvalidRecord(
        f"{path.name} is being changed while it is read; put a new file in its place by renaming it there",
        field="path",
        value=path.name,
    )


def _identity(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def read_source(path: Path, read: Callable[[Source], T]) -> T:
    """What ``read`` makes of a source; tried once more where the source was changed meanwhile.

    Args:
        path: The file.
        read: Calls :meth:`Source.check` when it has read everything, and before it makes anything known.

    Raises:
        InvalidRecord: it was changed the second time too, or what ``read`` raises.
        OSError: it cannot be opened, or what ``read`` raises.
    """
    for _ in range(2):
        with path.open("rb") as file:
            source = Source(path, file)
            try:
                return read(source)
            except (InvalidRecord, OSError):
                # Of a file that is half one and half another anything may be said.
                if source.is_unchanged:
                    raise
    raise _changing(path)
