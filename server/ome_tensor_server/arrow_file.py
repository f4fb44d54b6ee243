"""Arrow IPC files: mapped, so that their pixels are the page cache's and any number of processes share one copy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from ome_tensor.errors import InvalidRecord

from .table import LoadedTable, first_line, split_columns

__all__ = ["ArrowImages", "is_arrow_file", "map_arrow_file"]

_MAGIC = b"ARROW1"


def is_arrow_file(path: Path) -> bool:
    """Whether a file begins as an Arrow IPC file does; its name does not count."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


class ArrowImages:
    """The image columns of an Arrow IPC file, mapped read-only.

    Args:
        path: The file.

    Attributes:
        names: The image columns.
        others: Name and Arrow type of the other columns.
        rows: Number of rows.
        schema: The image columns' schema.
        table: The image columns. Uncompressed buffers lie in the file; compressed ones have been decompressed into memory.

    Raises:
        InvalidRecord: not a readable Arrow IPC file, or none of its columns holds OME-Arrow images; names the file.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = pa.memory_map(str(path))
            whole = pa.ipc.open_file(self._file).read_all()
        except pa.ArrowException as error:
            message = f"{path.name} is not a readable Arrow file: {first_line(error)}"
            raise InvalidRecord(message, field="path", value=path.name) from error
        self.names, self.others = split_columns(whole.schema, path)
        self.rows = whole.num_rows
        self.table: pa.Table = whole.select(self.names)
        self.schema = pa.schema([whole.schema.field(name) for name in self.names])

    @property
    def is_mapped(self) -> bool:
        """Whether all of it lies in the file, so that mapping it costs no memory."""
        self._file.seek(0)
        file = self._file.read_buffer()
        return all(
            buffer is None or buffer.size == 0 or file.address <= buffer.address < file.address + file.size
            for column in self.table.columns
            for chunk in column.chunks
            for buffer in chunk.buffers()
        )

    def row_groups(self) -> Iterator[pa.Table]:
        """The image columns, a record batch at a time."""
        for batch in self.table.to_batches():
            yield pa.Table.from_batches([batch])

    def close(self) -> None:
        """Nothing: what was handed out keeps the mapping alive."""


def map_arrow_file(path: Path, version: str) -> LoadedTable:
    """The image columns of an Arrow IPC file, mapped; reads metadata only where they are not compressed.

    Args:
        path: The file.
        version: What its contents are called.

    Raises:
        InvalidRecord, OSError: as :class:`ArrowImages`.
    """
    images = ArrowImages(path)
    return LoadedTable({name: images.table.column(name) for name in images.names}, images.others, images.rows, version)
