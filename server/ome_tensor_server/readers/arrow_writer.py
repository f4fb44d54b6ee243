"""Writing a dataset as an uncompressed Arrow IPC file, without ever having it in memory whole."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa

from ome_tensor.late import is_late

from .sinks import Sink

__all__ = ["LateTable", "write_images"]

#: Written, and given back to the system, at a time.
_SLICE = 16 << 20


@dataclass(frozen=True, slots=True)
class LateTable:
    """A table, one buffer of which is made only while it is written: pixels that memory has no room for.

    Attributes:
        table: The table.
        buffer: What stands for that buffer in it, by :func:`ome_tensor.late.late_buffer`.
        parts: Its bytes, piece by piece.
    """

    table: pa.Table
    buffer: pa.Buffer
    parts: Iterable[Any]


def write_images(
    schema: pa.Schema,
    tables: Iterator[pa.Table | LateTable],
    file: IO[bytes],
    progress: Callable[[int], None] = lambda _: None,
    *,
    releases: bool = True,
) -> int:
    """Write tables as an uncompressed Arrow IPC file, one at a time. Gives the number of rows.

    Args:
        schema: Theirs.
        tables: What to write.
        file: Where to.
        progress: Told how many bytes have been written so far; may raise, which ends it.
        releases: Whether the tables' memory is nobody else's, so that it can go as soon as it is written.
    """
    sink = _ReleasingFile(file, progress)
    rows = 0
    with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), schema) as writer:
        for item in tables:
            table = item.table if isinstance(item, LateTable) else item
            sink.late = item if isinstance(item, LateTable) else None
            rows += table.num_rows
            # Then each buffer is written once and belongs to this table alone: what is written can go.
            sink.releases = releases and sink.late is None and all(column.num_chunks <= 1 for column in table.columns)
            batches = table.to_batches()
            del table, item
            while batches:
                writer.write_batch(batches.pop(0))
    return rows


class _ReleasingFile(Sink):
    """A file for Arrow to write to that gives the memory of large buffers back as they are written.

    A record of one image is decoded whole; without this, at the end of writing it to shared memory it would be there twice.
    """

    def __init__(self, file: IO[bytes], progress: Callable[[int], None]) -> None:
        super().__init__(file)
        self._progress = progress
        self.releases = False
        self.late: LateTable | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self.late is not None and is_late(data, self.late.buffer):
            self._write_late(len(view), self.late.parts)
        elif len(view) < 2 * _SLICE:
            self._file.write(view)
        else:
            address = pa.py_buffer(data).address
            for at in range(0, len(view), _SLICE):
                part = view[at : at + _SLICE]
                self._file.write(part)
                if self.releases:
                    _give_back(address + at, len(part))
                self._progress(self._file.tell())
        self._progress(self._file.tell())
        return len(view)

    def _write_late(self, size: int, parts: Iterable[Any]) -> None:
        end = self._file.tell() + size
        for part in parts:
            self._file.write(part)
            self._progress(self._file.tell())
        assert self._file.tell() == end, "a late buffer of another size than was said"


def _give_back(address: int, size: int) -> None:
    """Give the whole pages of memory that will not be read again back to the system; it reads as zeros then."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        ctypes.CDLL(None, use_errno=True).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
