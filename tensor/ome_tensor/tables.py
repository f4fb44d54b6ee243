"""Tables of images: which columns hold images, and how one is found by column and row."""

from __future__ import annotations

import bisect
import hashlib
import os
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

import numpy as np
import pyarrow as pa

from .blocks import ChunkCache
from .errors import DatasetChanged, ImageNotFound, InvalidRecord
from .keys import format_key
from .listing import ImageInfo
from .pixels import StoredPixels

__all__ = [
    "Image",
    "ImageTable",
    "LoadedTable",
    "MappedFile",
    "OpenedFile",
    "digest",
    "first_line",
    "is_image_type",
    "split_columns",
]

#: Indexes kept for each image column. An index costs about 100 bytes a chunk; a table of single cells has many small images.
_INDEXES_KEPT = 4096


class OpenedFile:
    """A file kept open for as long as this object lives, whatever becomes of its path.

    Args:
        descriptor: The file, opened; it stays its owner's.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = os.dup(descriptor)
        weakref.finalize(self, os.close, self._descriptor)

    def stat(self) -> os.stat_result:
        """What the file system says of it now."""
        return os.fstat(self._descriptor)


@dataclass(frozen=True, slots=True)
class MappedFile:
    """An Arrow IPC file, and what tells it from another at the same path. Two are equal where that is the same, opened or not.

    Attributes:
        path: Absolute.
        inode, size, modified_ns: As the file system says.
        opened: The file itself, where this process has it mapped.
    """

    path: Path
    inode: int
    size: int
    modified_ns: int
    opened: OpenedFile | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, path: Path, stat: os.stat_result, opened: OpenedFile | None = None) -> MappedFile:
        """With what ``stat`` says."""
        return cls(path.absolute(), stat.st_ino, stat.st_size, stat.st_mtime_ns, opened)

    @property
    def is_there(self) -> bool:
        """Whether it still is what its path names, unchanged."""
        try:
            return self._describes(os.stat(self.path))
        except OSError:
            return False

    @property
    def is_unchanged(self) -> bool:
        """Whether nobody has written to it or truncated it since; renamed or unlinked it may be. One fstat."""
        return self.opened is None or self._describes(self.opened.stat())

    def is_opened(self, descriptor: int) -> bool:
        """Whether a descriptor is of this file, unchanged and still what its path names.

        The number of its links would not tell: the same file may have a name elsewhere.
        """
        stat = os.fstat(descriptor)
        try:
            named = os.stat(self.path)
        except OSError:
            return False
        return os.path.samestat(stat, named) and self._describes(stat)

    def _describes(self, stat: os.stat_result) -> bool:
        return (stat.st_ino, stat.st_size, stat.st_mtime_ns) == (self.inode, self.size, self.modified_ns)


@dataclass(frozen=True, slots=True)
class LoadedTable:
    """A file's images in memory.

    Attributes:
        images: The image columns, by name, in the file's order.
        others: Name and Arrow type of the other columns.
        rows: Number of rows.
        version: Digest of the source file's bytes: the same file is the same version on every server and after every restart.
        file: What ``images`` are mapped from; ``None`` where they are in this process's own memory.
    """

    images: dict[str, pa.ChunkedArray]
    others: tuple[tuple[str, str], ...]
    rows: int
    version: str
    file: MappedFile | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the image columns in memory; mapped ones count, since they occupy the page cache."""
        return sum(column.nbytes for column in self.images.values())


def digest(file: BufferedReader) -> str:
    """The version of an open file: 16 hexadecimal digits of the SHA-256 of its bytes. Reads it from its beginning to its end."""
    file.seek(0)
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


@dataclass(frozen=True, slots=True)
class Image:
    """An image found by its key.

    Attributes:
        dataset: The table it is in.
        key: Its canonical key.
        column, row: The key's parts.
        pixels: Its pixels, indexed when first read.
    """

    dataset: ImageTable
    key: str
    column: str
    row: int
    pixels: StoredPixels

    @property
    def info(self) -> ImageInfo:
        """What is said of it to a client."""
        return ImageInfo(self.key, self.dataset.name, self.column, self.row, self.pixels.meta)


class ImageColumn:
    """One column of OME-Arrow records.

    Args:
        array: The records.
        cache: Where decompressed chunks are kept.
    """

    def __init__(self, array: pa.ChunkedArray, cache: ChunkCache | None) -> None:
        self._chunks: list[pa.StructArray] = array.chunks
        self._starts: list[int] = []
        rows = 0
        for chunk in self._chunks:
            self._starts.append(rows)
            rows += len(chunk)
        self.image_count = rows - array.null_count
        self.row_count = rows
        self._cache = cache
        self._indexes: OrderedDict[int, StoredPixels] = OrderedDict()
        self._lock = threading.Lock()

    def record(self, row: int) -> pa.StructScalar:
        """The record at a row that exists; may be null."""
        chunk = bisect.bisect_right(self._starts, row) - 1
        return self._chunks[chunk][row - self._starts[chunk]]

    def pixels(self, row: int) -> StoredPixels:
        """The pixels at a row that holds an image. Raises InvalidRecord where its metadata is damaged."""
        with self._lock:
            pixels = self._indexes.get(row)
            if pixels is None:
                pixels = self._indexes[row] = StoredPixels(self.record(row), self._cache)
                if len(self._indexes) > _INDEXES_KEPT:
                    self._indexes.popitem(last=False)
            else:
                self._indexes.move_to_end(row)
            return pixels

    def is_valid(self) -> np.ndarray:
        """For each row, whether it holds an image."""
        return np.concatenate([chunk.is_valid().to_numpy(zero_copy_only=False) for chunk in self._chunks])

    def only_row(self) -> int | None:
        """The row of the only image, or ``None`` where there are several or none."""
        if self.image_count != 1:
            return None
        return int(np.argmax(self.is_valid()))


class ImageTable:
    """Images by column and row.

    Args:
        name: The dataset's name.
        table: Its image columns.
        cache: Where decompressed chunks are kept.

    Attributes:
        name, version: The dataset's.
        file: What it is mapped from, or ``None``.
        columns: The image columns by name.
    """

    def __init__(self, name: str, table: LoadedTable, cache: ChunkCache | None = None) -> None:
        self.name = name
        self.version = table.version
        self.file = table.file
        self.columns = {column: ImageColumn(array, cache) for column, array in table.images.items()}
        self._found: dict[tuple[str | None, int | None], Image] = {}

    def check_unchanged(self) -> None:
        """Check that the pixels still are this version's: to be called before a read, and before its file is named to anybody. One fstat.

        Only a file that is mapped where its owner may still write to it can fail: an Arrow file served as it lies, or by a hard link in the
        store. One that is truncated *while* it is read cannot be caught so: touching what is no longer there ends the process (SIGBUS). Nothing
        of the kind can happen to a dataset whose store holds a copy of its own: that of a Parquet file, of a compressed Arrow file, or of any
        Arrow file where store and source lie on one file system that can share blocks (XFS, Btrfs).

        Raises:
            DatasetChanged: the file was written to or truncated after it had been mapped.
        """
        if self.file is not None and not self.file.is_unchanged:
            raise DatasetChanged(
                f"the file of dataset {self.name!r} was changed in place while it was being served: what it holds now is not version "
                f"{self.version}; restart the server, and replace files by renaming new ones over them",
                field="key",
                value=self.name,
            )

    def column(self, name: str | None) -> tuple[str, ImageColumn]:
        """The named image column, or the only one. Raises ImageNotFound."""
        if name is None:
            if len(self.columns) > 1:
                raise ImageNotFound(
                    f"dataset {self.name!r} has {len(self.columns)} image columns; name one in the key, as "
                    f"'{format_key(self.name, next(iter(self.columns)), 0)}' (columns: {', '.join(self.columns)})",
                    field="key",
                    value=self.name,
                )
            name = next(iter(self.columns))
        if name not in self.columns:
            raise ImageNotFound(
                f"dataset {self.name!r} has no image column {name!r}; it has: {', '.join(self.columns)}", field="key", value=name
            )
        return name, self.columns[name]

    def image(self, column: str | None, row: int | None) -> Image:
        """One image. Raises ImageNotFound, or InvalidRecord where its metadata is damaged."""
        found = self._found.get((column, row))
        if found is None:
            found = self._look_up(column, row)
            if len(self._found) >= _INDEXES_KEPT:
                self._found.clear()
            self._found[column, row] = found
        return found

    def _look_up(self, column: str | None, row: int | None) -> Image:
        name, images = self.column(column)
        if row is None:
            row = images.only_row()
            if row is None:
                raise ImageNotFound(
                    f"dataset {self.name!r} has {images.image_count} images in column {name!r}; name a row in the key, as "
                    f"'{format_key(self.name, None if len(self.columns) == 1 else name, 0)}'",
                    field="key",
                    value=self.name,
                )
        if row >= images.row_count or not images.record(row).is_valid:
            why = (
                f"it has rows 0 to {images.row_count - 1}"
                if row >= images.row_count
                else "that row holds no image in this column"
            )
            raise ImageNotFound(
                f"no image at row {row} of column {name!r} of dataset {self.name!r}: {why}",
                field="key",
                value=format_key(self.name, name, row),
            )
        return Image(self, format_key(self.name, name, row), name, row, images.pixels(row))
