"""Reading OME-Arrow Parquet files: which columns hold images, and their records in memory."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ome_tensor.errors import InvalidRecord

__all__ = ["LoadedTable", "is_image_type", "is_parquet", "read_table"]

_MAGIC = b"PAR1"


@dataclass(frozen=True, slots=True)
class LoadedTable:
    """A file's images in memory.

    Attributes:
        images: The image columns, by name, in the file's order.
        others: Name and Arrow type of the other columns.
        rows: Number of rows.
        version: Digest of the file's bytes: the same file is the same version on every server and after every restart.
    """

    images: dict[str, pa.ChunkedArray]
    others: tuple[tuple[str, str], ...]
    rows: int
    version: str

    @property
    def nbytes(self) -> int:
        """Bytes of the image columns in memory."""
        return sum(column.nbytes for column in self.images.values())


def is_parquet(path: Path) -> bool:
    """Whether a file begins as Parquet does; its name does not count."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def is_image_type(kind: pa.DataType) -> bool:
    """Whether a column of that type holds OME-Arrow records: a struct with ``pixels_meta`` and planes or chunks."""
    if not pa.types.is_struct(kind):
        return False
    names = {field.name: field.type for field in kind}
    pixels = names.get("pixels_meta")
    return (
        pixels is not None
        and pa.types.is_struct(pixels)
        and {"size_x", "size_y"} <= {field.name for field in pixels}
        and bool({"planes", "chunks"} & names.keys())
    )


def read_table(path: Path) -> LoadedTable:
    """Load the image columns of a Parquet file.

    Raises:
        InvalidRecord: not a readable Parquet file, or none of its columns holds OME-Arrow images; names the file.
        OSError: the file cannot be opened.
    """
    with path.open("rb") as file:
        version = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        file.seek(0)
        try:
            # Page buffers of columns that are not images are not worth decoding; pre_buffer would read them all the same.
            parquet = pq.ParquetFile(file, pre_buffer=False)
            schema = parquet.schema_arrow
            names = [field.name for field in schema if is_image_type(field.type)]
            if not names:
                raise InvalidRecord(
                    f"{path.name} has no OME-Arrow image column; its columns are: {', '.join(schema.names) or 'none'}",
                    field="path",
                    value=path.name,
                )
            # A dot in a column's name would be read as a path into a struct; then everything is read and the rest dropped.
            dotted = any("." in name for name in names)
            table = parquet.read(columns=None if dotted else names).select(names)
        except (pa.ArrowException, OSError) as error:
            raise InvalidRecord(
                f"{path.name} is not a readable Parquet file: {_first_line(error)}", field="path", value=path.name
            ) from error
    others = tuple((field.name, str(field.type)) for field in schema if field.name not in names)
    return LoadedTable({name: table.column(name) for name in names}, others, table.num_rows, version)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
