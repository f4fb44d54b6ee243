"""Tables of images: which columns hold images, and how one is found by column and row."""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path

import pyarrow as pa

from .blocks import ChunkCache
from .columns import Column, ImageColumn
from .errors import DatasetChanged, ImageNotFound, InvalidArgument, InvalidRecord
from .keys import format_key
from .listing import ImageInfo, Level
from .pixels import Pixels

__all__ = [
    "LEVEL",
    "LEVEL_OF",
    "Image",
    "ImageTable",
    "LoadedTable",
    "MappedFile",
    "OpenedFile",
    "digest",
    "first_line",
    "is_image_type",
    "level_columns",
    "split_columns",
]

#: Images that are remembered by their keys.
_IMAGES_KEPT = 16_384

#: Metadata of a field of an Arrow file that is no image column of its own: which level of which column's pyramids it holds.
LEVEL, LEVEL_OF = b"ome_tensor.level", b"ome_tensor.level_of"


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
        levels: For an image column whose source has pyramids: their levels from 1 on, each with as many rows; null where an image has no such level.
        metadata: The other columns, ``rows`` rows each; without columns where they are not kept. ``others`` says what they are in the source, which
            may be another type than they have here.
    """

    images: dict[str, pa.ChunkedArray]
    others: tuple[tuple[str, str], ...]
    rows: int
    version: str
    file: MappedFile | None = None
    levels: Mapping[str, tuple[pa.ChunkedArray, ...]] = field(default_factory=dict)
    metadata: pa.Table | None = None

    def without_images(self) -> LoadedTable:
        """The same table without its image columns."""
        return replace(self, images={}, levels={})

    def unnamed(self, others: tuple[tuple[str, str], ...]) -> LoadedTable:
        """The same table, of a file that nobody else can open, and with the other columns' types as they are in the source."""
        return replace(self, file=None, others=others)

    @property
    def nbytes(self) -> int:
        """Bytes of all columns in memory; mapped ones count, since they occupy the page cache."""
        images = sum(column.nbytes for column in self.images.values())
        levels = sum(level.nbytes for column in self.levels.values() for level in column)
        return int(images + levels) + (0 if self.metadata is None else self.metadata.nbytes)


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


def level_columns(schema: pa.Schema, of: str) -> list[str]:
    """Names of the columns that hold the levels of an image column's pyramids, from level 1 on."""
    found = {}
    for column in schema:
        kept = column.metadata or {}
        if kept.get(LEVEL_OF) == of.encode() and kept.get(LEVEL, b"").isdigit():
            found[int(kept[LEVEL])] = column.name
    return [found[level] for level in sorted(found)]


def split_columns(schema: pa.Schema, path: Path) -> tuple[list[str], tuple[tuple[str, str], ...]]:
    """Names of the columns that hold images, and name and Arrow type of the others; columns of pyramids' levels are neither.

    Raises:
        InvalidRecord: none holds images, or two columns have one name.
    """
    levels = {field.name for field in schema if LEVEL_OF in (field.metadata or {})}
    names = [field.name for field in schema if is_image_type(field.type) and field.name not in levels]
    if not names:
        raise InvalidRecord(
            f"{path.name} has no OME-Arrow image column; its columns are: {', '.join(schema.names) or 'none'}",
            field="path",
            value=path.name,
        )
    twice = [name for name in schema.names if schema.names.count(name) > 1] if len(set(schema.names)) < len(schema.names) else []
    if twice:
        raise InvalidRecord(f"{path.name} has two columns named {twice[0]!r}", field="path", value=path.name)
    others = [field for field in schema if field.name not in names and field.name not in levels]
    return names, tuple((field.name, str(field.type)) for field in others)


def first_line(error: BaseException) -> str:
    """The first line of what a library says: what is wrong, without its trace."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True, slots=True)
class Image:
    """An image found by its key.

    Attributes:
        dataset: The table it is in.
        key: Its canonical key.
        column, row: The key's parts.
        pixels: Its pixels, indexed when first read: those of its pyramid's ``level``.
        level: Of its pyramid; 0 for full resolution.
    """

    dataset: ImageTable
    key: str
    column: str
    row: int
    pixels: Pixels
    level: int = 0

    @property
    def info(self) -> ImageInfo:
        """What is said of it to a client."""
        levels = self.dataset.levels(self.column, self.row)
        return ImageInfo(self.key, self.dataset.name, self.column, self.row, self.pixels.meta, levels=levels)


class ImageTable:
    """Images by column and row.

    Args:
        name: The dataset's name.
        table: Its image columns.
        cache: Where decompressed chunks are kept.
        columns: The image columns themselves, where they are not in ``table``: those of a dataset that is served in place.

    Attributes:
        name, version: The dataset's.
        file: What it is mapped from, or ``None``.
        rows: Number of rows.
        columns: The image columns by name.
        metadata: The other columns, or ``None`` where they are not kept.
    """

    def __init__(
        self, name: str, table: LoadedTable, cache: ChunkCache | None = None, columns: Mapping[str, Column] | None = None
    ) -> None:
        self.name = name
        self.version = table.version
        self.file = table.file
        self.rows = table.rows
        self.metadata = table.metadata
        self.columns: dict[str, Column] = dict(columns or {})
        for column, array in table.images.items():
            self.columns[column] = ImageColumn(array, cache, table.levels.get(column, ()))
        self._found: dict[tuple[str | None, int | None, int], Image] = {}

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

    def column(self, name: str | None) -> tuple[str, Column]:
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

    def image(self, column: str | None, row: int | None, level: int = 0) -> Image:
        """One image.

        Raises:
            ImageNotFound: there is none.
            InvalidRecord: its metadata is damaged.
            InvalidArgument: it has no such level.
        """
        found = self._found.get((column, row, level))
        if found is None:
            found = self._look_up(column, row, level)
            if self._may_keep(found):
                if len(self._found) >= _IMAGES_KEPT:
                    self._found.clear()
                self._found[column, row, level] = found
        return found

    def _may_keep(self, image: Image) -> bool:
        """Whether an image may be kept for the next who asks: its pixels are where they are for as long as this is."""
        return True

    def forget(self) -> None:
        """Let go of what refers to itself in a circle: it leaves memory with its last reader, and not when somebody collects garbage."""
        self._found.clear()

    def levels(self, column: str, row: int) -> tuple[Level, ...]:
        """The levels of an image's pyramid, the image itself first."""
        return self.columns[column].levels(row)

    def _look_up(self, column: str | None, row: int | None, level: int) -> Image:
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
        if row >= images.row_count or not images.is_image(row):
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
        pixels = images.pixels(row) if level == 0 else self._level(name, row, level)
        return Image(self, format_key(self.name, name, row), name, row, pixels, level)

    def _level(self, column: str, row: int, level: int) -> Pixels:
        """The pixels of a level above 0. Raises InvalidArgument where there is none."""
        last = len(self.levels(column, row)) - 1
        if level > last:
            raise InvalidArgument(
                f"{format_key(self.name, column, row)} has levels 0 to {last}, not {level}", field="pyramid_level", value=level
            )
        return self.columns[column].pixels(row, level)
