"""Sources that are one file: opened once, so that what is said of it and what is made of it are the same bytes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from ome_tensor.errors import InvalidRecord
from ome_tensor.tables import digest, first_line
from ome_tensor_server.file_system import file_identity

from .base import OpenedSource

__all__ = ["FileSource", "changing", "check_unchanged", "file_fingerprint"]


def file_fingerprint(stat: os.stat_result) -> str:
    """What differs once a file was written to."""
    return f"{stat.st_size}-{stat.st_mtime_ns}"


def changing(location: str) -> InvalidRecord:
    """The error of a source that does not hold still."""
    name = os.path.basename(location.rstrip("/"))
    return InvalidRecord(
        f"{name} is being changed while it is read; put a new file in its place by renaming it there", field="path", value=name
    )


def check_unchanged(stat: os.stat_result, fingerprint: str, path: Path) -> None:
    """Check that a file is the one that was read. Raises InvalidRecord."""
    if file_fingerprint(stat) != fingerprint:
        raise changing(str(path))


class FileSource(OpenedSource):
    """A file, opened.

    Args:
        location: Its path.

    Attributes:
        path: Its path.
        file: The file, whatever its path names by now.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self.path = Path(location)
        self.file = self.path.open("rb")
        # One that is served in place is open until nobody reads from it any more.
        weakref.finalize(self, self.file.close)
        self._stat = os.fstat(self.file.fileno())

    def version(self) -> str:
        """See :meth:`OpenedSource.version`: of the file's bytes."""
        return digest(self.file)

    def fingerprint(self) -> str:
        """See :meth:`OpenedSource.fingerprint`."""
        return file_fingerprint(self._stat)

    def is_unchanged(self) -> bool:
        """See :meth:`OpenedSource.is_unchanged`: its path still names it, and nobody has written to it."""
        before = file_identity(self._stat)
        try:
            return file_identity(os.fstat(self.file.fileno())) == file_identity(os.stat(self.path)) == before
        except OSError:
            return False

    def unreadable(self, what: str, why: str) -> InvalidRecord:
        """The error of a file that is not what it seems to be."""
        return InvalidRecord(f"{self.path.name} is not a readable {what}: {why}", field="path", value=self.path.name)

    @contextmanager
    def readable(self, what: str) -> Iterator[None]:
        """Arrow's errors become :meth:`unreadable`, but for what is not the file's fault: that memory is short, or the disk broken."""
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            # Arrow's own errors of this kind, as of a file that ends too early, carry no number.
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
                raise
            raise self.unreadable(what, first_line(error)) from error

    def close(self) -> None:
        """See :meth:`OpenedSource.close`."""
        self.file.close()
