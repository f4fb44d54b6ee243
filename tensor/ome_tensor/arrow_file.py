"""Arrow IPC files: mapped, so that their pixels are the page cache's and any number of processes share one copy."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa

from .errors import InvalidRecord
from .late import NORESERVE
from .tables import LoadedTable, MappedFile, OpenedFile, first_line, level_columns, split_columns

__all__ = ["ArrowImages", "is_arrow", "is_arrow_file", "map_arrow_file"]

_MAGIC = b"ARROW1"

# A private mapping counts as memory that may be written, all of it, unless the system is told not to set it aside: a dataset may well be larger
# than what this machine has.
_PRIVATE = getattr(mmap, "MAP_PRIVATE", 0) | NORESERVE


def is_arrow(file: IO[bytes]) -> bool:
    """Whether an open file begins as an Arrow IPC file does."""
    file.seek(0)
    return file.read(len(_MAGIC)) == _MAGIC


def is_arrow_file(path: Path) -> bool:
    """Whether a file begins as an Arrow IPC file does; its name does not count."""
    with path.open("rb") as file:
        return is_arrow(file)


class ArrowImages:
    """The image columns of an Arrow IPC file, mapped. Making one reads metadata only.

    Args:
        path: The file.
        descriptor: The same file, opened for reading, which is then the one that is mapped, whatever its path names by now.
        copy_on_write: A write to the mapped memory is to stay in this process; one to a read-only mapping would kill it.
        expected: What the file must be.

    Attributes:
        file: The file that was mapped, kept open.
        names: The image columns.
        others: Name and Arrow type of the other columns.
        file_schema: The schema of all columns, those of pyramids' levels included.

    Raises:
        InvalidRecord: not a readable Arrow IPC file, none of its columns holds OME-Arrow images, or it is not the file that was expected; names
            the file.
        OSError: the file cannot be opened.
    """

    def __init__(
        self,
        path: Path,
        descriptor: int | None = None,
        *,
        copy_on_write: bool = False,
        expected: MappedFile | None = None,
    ) -> None:
        self.path = path
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if descriptor is None else descriptor
        try:
            self.file = MappedFile.of(path, os.fstat(opened), OpenedFile(opened))
            if expected is not None and self.file != expected:
                message = f"{path} is not the file that was loaded: it was replaced or changed since"
                raise InvalidRecord(message, field="path", value=str(path))
            protection = mmap.PROT_READ | mmap.PROT_WRITE if copy_on_write else mmap.PROT_READ
            flags = _PRIVATE if copy_on_write else mmap.MAP_SHARED
            # An empty file cannot be mapped, and is no Arrow file.
            self._memory = pa.py_buffer(mmap.mmap(opened, 0, flags=flags, prot=protection) if self.file.size else b"")
        finally:
            if descriptor is None:
                os.close(opened)
        with self._readable():
            reader = pa.ipc.open_file(pa.BufferReader(self._memory))
            self.file_schema = reader.schema
        self.names, self.others = split_columns(self.file_schema, path)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, MemoryError):
                raise
            name = self.path.name
            raise InvalidRecord(f"{name} is not a readable Arrow file: {first_line(error)}", field="path", value=name) from error

    def _reader(self) -> pa.ipc.RecordBatchFileReader:
        # Of all columns: where only some are asked for, Arrow (as of 26) copies what it could point to.
        return pa.ipc.open_file(pa.BufferReader(self._memory))

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The record batches of all columns, one at a time. Raises InvalidRecord where one cannot be read."""
        with self._readable():
            reader = self._reader()
            count = reader.num_record_batches
        for number in range(count):
            with self._readable():
                batch = reader.get_batch(number)
            yield batch

    def holds(self, batch: pa.RecordBatch) -> bool:
        """Whether all of a record batch lies in the file, so that mapping it costs no memory; else it was compressed."""
        file = self._memory
        return all(
            buffer is None or buffer.size == 0 or file.address <= buffer.address < file.address + file.size
            for column in batch.columns
            for buffer in column.buffers()
        )

    def load(self, version: str) -> LoadedTable:
        """The images, as ``version``. Uncompressed buffers lie in the file; compressed ones are decompressed into memory.

        Raises:
            InvalidRecord: they cannot be read.
        """
        with self._readable():
            table = self._reader().read_all()
        is_mapped = all(self.holds(batch) for batch in table.to_batches())
        return LoadedTable(
            {name: table.column(name) for name in self.names},
            self.others,
            table.num_rows,
            version,
            self.file if is_mapped else None,
            {name: levels for name in self.names if (levels := tuple(map(table.column, level_columns(self.file_schema, name))))},
            table.select([name for name, _ in self.others]),
        )


def map_arrow_file(path: Path, version: str, descriptor: int | None = None) -> LoadedTable:
    """An Arrow IPC file, mapped; reads metadata only where it is not compressed.

    Args:
        path: The file.
        version: What its contents are called.
        descriptor: The same file, opened for reading: it is then mapped copy-on-write. A write to such memory stays in this process, where one
            to a read-only mapping would kill it.

    Raises:
        InvalidRecord, OSError: as :class:`ArrowImages`.
    """
    return ArrowImages(path, descriptor, copy_on_write=descriptor is not None).load(version)
