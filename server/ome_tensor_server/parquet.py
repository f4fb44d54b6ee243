"""Reading OME-Arrow Parquet files, whole or row group by row group."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from ome_tensor.errors import InvalidRecord
from ome_tensor.tables import LoadedTable, first_line, split_columns

__all__ = ["ParquetImages", "is_parquet", "read_parquet"]

_MAGIC = b"PAR1"


def is_parquet(path: Path) -> bool:
    """Whether a file begins as Parquet does; its name does not count."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


class ParquetImages:
    """The image columns of a Parquet file.

    Args:
        path: The file.
        file: The same file, opened, which is then the one that is read, whatever its path names by now.

    Attributes:
        names: The image columns.
        others: Name and Arrow type of the other columns.
        rows: Number of rows.
        schema: The image columns' schema.

    Raises:
        InvalidRecord: not a readable Parquet file, or none of its columns holds OME-Arrow images; names the file.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, file: IO[bytes] | None = None) -> None:
        self.path = path
        try:
            # Page buffers of columns that are not images are not worth decoding; pre_buffer would read them all the same.
            self._file = pq.ParquetFile(path if file is None else file, pre_buffer=False)
            schema = self._file.schema_arrow
        except pa.ArrowException as error:
            raise self._unreadable(error) from error
        except OSError as error:
            # Arrow's own errors of this kind, as of a file that ends too early, carry no number.
            if error.errno is not None:
                raise
            raise self._unreadable(error) from error
        self.names, self.others = split_columns(schema, path)
        self.rows = self._file.metadata.num_rows
        # The schema's own metadata (pandas', mostly) speaks of columns that are left behind.
        self.schema = pa.schema([schema.field(name) for name in self.names])
        # A dot in a column's name would be read as a path into a struct; then everything is read and the rest dropped.
        self._wanted = None if any("." in name for name in self.names) else self.names

    @property
    def decoded_bytes(self) -> int:
        """About what the image columns take when decoded: by the footer's numbers, without reading them."""
        widths = [_width(leaf) for field in self._file.schema_arrow for leaf in _leaves(field.type)]
        metadata = self._file.metadata
        total = 0
        for group in range(metadata.num_row_groups):
            for number in range(metadata.num_columns):
                column = metadata.row_group(group).column(number)
                if column.path_in_schema.startswith(tuple(f"{name}." for name in self.names)):
                    # A dictionary or runs may stand for many times their bytes; variable lengths are not in the footer.
                    width = widths[number] if len(widths) == metadata.num_columns else 0.0
                    total += max(column.total_uncompressed_size, int(column.num_values * width))
        return total

    def row_groups(self) -> Iterator[pa.Table]:
        """The image columns, a row group at a time. Raises InvalidRecord where one cannot be decoded."""
        for number in range(self._file.num_row_groups):
            try:
                yield self._file.read_row_group(number, columns=self._wanted).select(self.names)
            except (pa.ArrowException, OSError) as error:
                raise self._unreadable(error) from error

    def read(self) -> pa.Table:
        """The image columns, whole. Raises InvalidRecord where they cannot be decoded."""
        try:
            return self._file.read(columns=self._wanted).select(self.names)
        except (pa.ArrowException, OSError) as error:
            raise self._unreadable(error) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _unreadable(self, error: Exception) -> InvalidRecord:
        name = self.path.name
        return InvalidRecord(f"{name} is not a readable Parquet file: {first_line(error)}", field="path", value=name)


def read_parquet(path: Path, file: IO[bytes], version: str) -> LoadedTable:
    """Load the image columns of an open Parquet file, as ``version``. Raises what :class:`ParquetImages` does."""
    images = ParquetImages(path, file)
    try:
        table = images.read()
    finally:
        images.close()
    return LoadedTable({name: table.column(name) for name in images.names}, images.others, images.rows, version)


def _leaves(kind: pa.DataType) -> Iterator[pa.DataType]:
    """The types that Parquet has a column for each, in its order."""
    if kind.num_fields == 0:
        yield kind
    for number in range(kind.num_fields):
        yield from _leaves(kind.field(number).type)


def _width(kind: pa.DataType) -> float:
    """Bytes of a value in memory; 0 where that differs from value to value."""
    try:
        return float(kind.bit_width) / 8
    except ValueError:
        return 0.0
