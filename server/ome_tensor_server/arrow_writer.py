"""Writing a dataset as an uncompressed Arrow IPC file, without ever having it in memory whole."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa

__all__ = ["write_images"]

#: Written, and given back to the system, at a time.
_SLICE = 16 << 20


def write_images(schema: pa.Schema, tables: Iterator[pa.Table], file: IO[bytes]) -> int:
    """Write image columns as an uncompressed Arrow IPC file, a row group at a time. Gives the number of rows."""
    sink = _Sink(file)
    rows = 0
    with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), schema) as writer:
        for table in tables:
            rows += table.num_rows
            # Then each buffer is written once and belongs to this table alone: what is written can go.
            sink.releases = all(column.num_chunks <= 1 for column in table.columns)
            batches = table.to_batches()
            del table
            while batches:
                writer.write_batch(batches.pop(0))
    return rows


class _Sink:
    """A file for Arrow to write to that gives the memory of large buffers back as they are written.

    A record of one image is decoded whole; without this, at the end of writing it to shared memory it would be there twice.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.releases = False
        self.closed = False

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if not self.releases or len(view) < 2 * _SLICE:
            self._file.write(view)
            return len(view)
        address = pa.py_buffer(data).address
        for at in range(0, len(view), _SLICE):
            part = view[at : at + _SLICE]
            self._file.write(part)
            _give_back(address + at, len(part))
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self.closed = True


def _give_back(address: int, size: int) -> None:
    """Give the whole pages of memory that will not be read again back to the system; it reads as zeros then."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        ctypes.CDLL(None, use_errno=True).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
