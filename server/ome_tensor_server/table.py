"""A file's images in memory, whatever kind of file it was."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ome_tensor.errors import InvalidRecord

__all__ = ["LoadedTable", "digest", "first_line", "is_image_type", "split_columns"]


@dataclass(frozen=True, slots=True)
class LoadedTable:
    """A file's images in memory.

    Attributes:
        images: The image columns, by name, in the file's order.
        others: Name and Arrow type of the other columns.
        rows: Number of rows.
        version: Digest of the source file's bytes: the same file is the same version on every server and after every restart.
    """

    images: dict[str, pa.ChunkedArray]
    others: tuple[tuple[str, str], ...]
    rows: int
    version: str

    @property
    def nbytes(self) -> int:
        """Bytes of the image columns in memory; mapped ones count, since they occupy the page cache."""
        return sum(column.nbytes for column in self.images.values())


def digest(path: Path) -> str:
    """The version of a file: 16 hexadecimal digits of the SHA-256 of its bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


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


def split_columns(schema: pa.Schema, path: Path) -> tuple[list[str], tuple[tuple[str, str], ...]]:
    """Names of the columns that hold images, and name and Arrow type of the others. Raises InvalidRecord where none does."""
    names = [field.name for field in schema if is_image_type(field.type)]
    if not names:
        raise InvalidRecord(
            f"{path.name} has no OME-Arrow image column; its columns are: {', '.join(schema.names) or 'none'}",
            field="path",
            value=path.name,
        )
    return names, tuple((field.name, str(field.type)) for field in schema if field.name not in names)


def first_line(error: BaseException) -> str:
    """An Arrow error's first line: what is wrong, without its trace."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
