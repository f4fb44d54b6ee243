"""Image columns of a table: by row their metadata, and their pixels, wherever those lie."""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from .blocks import ChunkCache
from .errors import OmeTensorError
from .listing import Level
from .pixel_types import dtype_of_pixel_type
from .pixels import Pixels, StoredPixels
from .record import LARGEST_SIZE, ImageMeta, read_meta

__all__ = ["Column", "ImageColumn", "Sizes", "sizes_of"]

#: Indexes kept for each image column. An index costs about 100 bytes a chunk; a table of single cells has many small images.
_INDEXES_KEPT = 16_384


@dataclass(frozen=True, slots=True)
class Sizes:
    """What many images are, without their pixels.

    Attributes:
        extents: (n, 5) int64: sizes in elements, TZCYX; 0 where an image cannot be read.
        dtypes: NumPy name of each one's dtype; ``""`` where it cannot be read.
        problems: Why, by place among the n.
    """

    extents: np.ndarray
    dtypes: list[str]
    problems: dict[int, str]


class Column(Protocol):
    """An image column. Rows given to its methods exist."""

    #: Number of rows.
    row_count: int
    #: Number of rows that hold an image.
    image_count: int

    def is_image(self, row: int) -> bool:
        """Whether a row holds an image."""

    def is_valid(self) -> np.ndarray:
        """For each row, whether it holds an image."""

    def only_row(self) -> int | None:
        """The row of the only image, or ``None`` where there are several or none."""

    def meta(self, row: int) -> ImageMeta:
        """The metadata of a row that holds an image. Raises InvalidRecord where they are damaged."""

    def levels(self, row: int) -> tuple[Level, ...]:
        """The levels of an image's pyramid that are stored, the image itself first; ``()`` where its metadata are damaged."""

    def sizes(self, rows: np.ndarray) -> Sizes:
        """What the images of rows are that hold one."""

    def pixels(self, row: int, level: int = 0) -> Pixels:
        """The pixels of a row that holds an image, of a level that is stored. Raises InvalidRecord where its metadata are damaged."""


def sizes_of(column: Column, rows: np.ndarray) -> Sizes:
    """:meth:`Column.sizes` by looking at one row after the other."""
    sizes = Sizes(np.zeros((len(rows), 5), np.int64), [""] * len(rows), {})
    for place, row in enumerate(rows.tolist()):
        _look(sizes, place, column, row)
    return sizes


def _look(sizes: Sizes, place: int, column: Column, row: int) -> None:
    try:
        meta = column.meta(row)
    except OmeTensorError as error:
        sizes.extents[place], sizes.dtypes[place], sizes.problems[place] = 0, "", error.message
    else:
        sizes.extents[place], sizes.dtypes[place] = meta.extent, meta.dtype.name


class ImageColumn:
    """One column of OME-Arrow records in memory. See :class:`Column`.

    Args:
        array: The records.
        cache: Where decompressed chunks are kept.
        levels: Pyramid levels of the same rows, from level 1 on; null where an image has none.
    """

    def __init__(self, array: pa.ChunkedArray, cache: ChunkCache | None, levels: Sequence[pa.ChunkedArray] = ()) -> None:
        self._levels = [_Records(array), *map(_Records, levels)]
        self.row_count = len(array)
        self.image_count = len(array) - array.null_count
        self._chunks = array.chunks
        self._cache = cache
        self._indexes: OrderedDict[tuple[int, int], StoredPixels] = OrderedDict()
        self._lock = threading.Lock()
        self._sizes: tuple[np.ndarray, list[str]] | None = None

    def record(self, row: int, level: int = 0) -> pa.StructScalar:
        """The record at a row that exists; may be null."""
        return self._levels[level][row]

    def is_image(self, row: int) -> bool:
        """See :meth:`Column.is_image`."""
        return bool(self.record(row).is_valid)

    def is_valid(self) -> np.ndarray:
        """See :meth:`Column.is_valid`."""
        if not self._chunks:
            return np.zeros(0, bool)
        return np.concatenate([chunk.is_valid().to_numpy(zero_copy_only=False) for chunk in self._chunks])

    def only_row(self) -> int | None:
        """See :meth:`Column.only_row`."""
        if self.image_count != 1:
            return None
        return int(np.argmax(self.is_valid()))

    def meta(self, row: int) -> ImageMeta:
        """See :meth:`Column.meta`."""
        with self._lock:
            known = self._indexes.get((row, 0))
        return read_meta(self.record(row)) if known is None else known.meta

    def sizes(self, rows: np.ndarray) -> Sizes:
        """See :meth:`Column.sizes`: read column by column; only what is odd is looked at row by row."""
        known, names = self._known_sizes()
        sizes = Sizes(known[rows, :5], [names[code] for code in known[rows, 5].tolist()], {})
        for place in np.flatnonzero(known[rows, 5] == 0).tolist():
            _look(sizes, place, self, int(rows[place]))
        return sizes

    def _known_sizes(self) -> tuple[np.ndarray, list[str]]:
        """For each row TZCYX and the number of its dtype's name, 0 where a look at the record has to tell; and the names."""
        if self._sizes is None:
            names = [""]
            parts = [_sizes_of_chunk(chunk, names) for chunk in self._chunks]
            self._sizes = np.concatenate(parts) if parts else np.zeros((0, 6), np.int64), names
        return self._sizes

    def levels(self, row: int) -> tuple[Level, ...]:
        """See :meth:`Column.levels`."""
        records = [records[row] for records in self._levels]
        return tuple(Level(tuple(read_meta(record).extent)) for record in records if record.is_valid)  # type: ignore[arg-type]

    def pixels(self, row: int, level: int = 0) -> StoredPixels:
        """See :meth:`Column.pixels`."""
        with self._lock:
            pixels = self._indexes.get((row, level))
            if pixels is None:
                pixels = self._indexes[row, level] = StoredPixels(self.record(row, level), self._cache)
                if len(self._indexes) > _INDEXES_KEPT:
                    self._indexes.popitem(last=False)
            else:
                self._indexes.move_to_end((row, level))
            return pixels


def _sizes_of_chunk(chunk: pa.StructArray, names: list[str]) -> np.ndarray:
    """A chunk's part of :meth:`ImageColumn._known_sizes`; dtypes' names are added where they are new."""
    known = np.zeros((len(chunk), 6), np.int64)
    try:
        pixels = chunk.field("pixels_meta")
        usable = np.asarray(pixels.is_valid()) & np.asarray(chunk.is_valid())
        for place, axis in enumerate("tzcyx"):
            sizes = pixels.field(f"size_{axis}")
            if not pa.types.is_integer(sizes.type):
                return known
            usable &= np.asarray(sizes.is_valid())
            known[:, place] = sizes.fill_null(0).to_numpy(zero_copy_only=False)
        kinds = pixels.field("type").cast(pa.string()).dictionary_encode(null_encoding="encode")
        codes = kinds.indices.to_numpy(zero_copy_only=False)
    except (KeyError, pa.ArrowException, OverflowError):
        return np.zeros((len(chunk), 6), np.int64)
    usable &= (known[:, :5] > 0).all(axis=1) & (known[:, :5] <= LARGEST_SIZE).all(axis=1)
    for code, kind in enumerate(kinds.dictionary.to_pylist()):
        try:
            name = dtype_of_pixel_type(kind).name
        except OmeTensorError:
            continue
        if name not in names:
            names.append(name)
        known[codes == code, 5] = names.index(name)
    known[~usable, 5] = 0
    return known


class _Records:
    """The records of a chunked array by row."""

    def __init__(self, array: pa.ChunkedArray) -> None:
        self._chunks: list[pa.StructArray] = array.chunks
        self._starts: list[int] = []
        rows = 0
        for chunk in self._chunks:
            self._starts.append(rows)
            rows += len(chunk)

    def __getitem__(self, row: int) -> pa.StructScalar:
        chunk = bisect.bisect_right(self._starts, row) - 1
        return self._chunks[chunk][row - self._starts[chunk]]
