"""OME-Arrow Parquet files: read row group by row group, very large ones in pieces, or row by row where they lie."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from typing import IO, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ome_tensor.blocks import ChunkCache
from ome_tensor.columns import Column
from ome_tensor.errors import InvalidRecord, OmeTensorError
from ome_tensor.pixel_types import dtype_of_pixel_type
from ome_tensor.pixels import Pixels, StoredPixels
from ome_tensor.record import ImageMeta
from ome_tensor.selection import Selection
from ome_tensor.tables import LoadedTable, split_columns

from .arrow_writer import write_images
from .base import PIXELS, InPlace, Progress
from .files import FileSource
from .known import KnownColumn
from .plain import checked, plain_schema

__all__ = ["ParquetSource"]

_WHAT = "Parquet file"

#: About the decoded bytes that are held at a time, and the rows: a footer may say anything.
_PIECE, _PIECE_ROWS = 64 << 20, 1 << 20

_SIZES = ("size_t", "size_z", "size_c", "size_y", "size_x")

#: A row group that takes more when it is decoded is not read over and over for single rows.
_LARGEST_GROUP = 512 << 20


#: Rows of a group whose indexes are kept: some 10 KiB each, which no cache counts.
_INDEXES_KEPT = 1024


class _GroupInfo(NamedTuple):
    """A row group: its rows, and about what it takes when it is decoded."""

    rows: int
    nbytes: int


class ParquetSource(FileSource):
    """A Parquet file. See :class:`OpenedSource`.

    Args:
        location: Its path.

    Raises:
        InvalidRecord: not a readable Parquet file, or none of its columns holds OME-Arrow images; names the file.
        OSError: it cannot be opened.
    """

    format: ClassVar[str] = "parquet"

    def __init__(self, location: str) -> None:
        super().__init__(location)
        with self.readable(_WHAT):
            # Page buffers that are not wanted yet are not worth reading ahead.
            self._file = pq.ParquetFile(self.file, pre_buffer=False)
            schema = self._file.schema_arrow
        self.images, self.others = split_columns(schema, self.path)
        self.schema = plain_schema(schema, self.path.name)
        self.rows = self._file.metadata.num_rows
        self._groups = list(self._look_at_groups())
        if (
            min([self.rows, *(group.rows for group in self._groups)]) < 0
            or sum(group.rows for group in self._groups) != self.rows
        ):
            raise self.unreadable(_WHAT, f"its footer says {self.rows} rows, and others of its row groups")
        self.nbytes = sum(group.nbytes for group in self._groups)
        largest = max((group.nbytes for group in self._groups), default=0)
        if largest > _LARGEST_GROUP:
            self.not_in_place = (
                f"its largest row group takes {largest >> 20} MiB when it is read; write it with smaller ones "
                f"(at most {_LARGEST_GROUP >> 20} MiB)"
            )
        elif any("." in name and (name in self.images or name.partition(".")[0] in schema.names) for name in schema.names):
            self.not_in_place = "a dot in the name of a column makes it ambiguous"

    def _look_at_groups(self) -> Iterator[_GroupInfo]:
        """By the footer's numbers, and by the images' sizes where those do not tell."""
        metadata = self._file.metadata
        widths = [_width(leaf) for field in self._file.schema_arrow for leaf in _leaves(field.type)]
        if len(widths) != metadata.num_columns:
            widths = [0.0] * metadata.num_columns
        for number in range(metadata.num_row_groups):
            group, nbytes, by_image = metadata.row_group(number), 0, dict.fromkeys(self.images, 0)
            for place, width in enumerate(widths):
                column = group.column(place)
                # A dictionary or runs may stand for many times their bytes; variable lengths are not in the footer.
                size = max(column.total_uncompressed_size, int(column.num_values * width), 0)
                nbytes += size
                if (image := column.path_in_schema.partition(".")[0]) in by_image:
                    by_image[image] += size
            for image, size in by_image.items():
                if _may_stand_for_more(group, image):
                    nbytes += max(0, self._pixel_bytes(number, image) - size)
            yield _GroupInfo(group.num_rows, nbytes)

    def _pixel_bytes(self, group: int, image: str) -> int:
        """Bytes of the images of a row group, by what their metadata say; 0 where that cannot be read, which whoever reads them is told."""
        try:
            parts = [f"{image}.pixels_meta.{name}" for name in (*_SIZES, "type")]
            meta = self._file.read_row_group(group, columns=parts).column(0).combine_chunks().field("pixels_meta")
            total = np.ones(len(meta))
            for name in _SIZES:
                # No size is negative, whatever a file says.
                total *= np.maximum(0.0, np.nan_to_num(meta.field(name).cast(pa.float64()).to_numpy(zero_copy_only=False)))
            kinds = meta.field("type").cast(pa.string()).dictionary_encode(null_encoding="encode")
            items = np.array([_item_bytes(kind) for kind in kinds.dictionary.to_pylist()] or [0])
            total *= items[kinds.indices.to_numpy(zero_copy_only=False)]
        except (pa.ArrowException, OSError, KeyError, ValueError):
            return 0
        return int(min(total.sum(), float(1 << 60)))

    def write(self, file: IO[bytes], progress: Progress) -> None:
        """See :meth:`OpenedSource.write`."""
        rows = write_images(self.schema, self._pieces(), file, progress)
        if rows != self.rows:
            raise self.unreadable(_WHAT, f"it has {rows} rows where its footer says {self.rows}")

    def _pieces(self) -> Iterator[pa.Table]:
        """All columns, a part of a row group at a time."""
        for number, group in enumerate(self._groups):
            step = max(1, min(group.rows, group.rows * _PIECE // max(group.nbytes, 1), _PIECE_ROWS))
            if step > 1:
                with self.readable(_WHAT):
                    first = next(self._file.iter_batches(1, row_groups=[number]), None)
                step = step if first is None else max(1, min(step, _PIECE // max(first.nbytes, 1)))
            done: int | None = 0
            while done is not None:
                # From where it has come to, in smaller steps: those before were larger than was to be seen.
                done = yield from self._steps(number, step, done)
                step = max(1, step // 8)

    def _steps(self, number: int, step: int, done: int) -> Generator[pa.Table, None, int | None]:
        """A row group's rows from one on, so many at a time; ``None`` at its end, or how many are through where that is too much at a time."""
        seen = 0
        batches = self._file.iter_batches(step, row_groups=[number])
        while True:
            try:
                with self.readable(_WHAT):
                    batch = next(batches, None)
                    if batch is None:
                        return None
                    known, seen = done - seen, seen + batch.num_rows
                    if known >= batch.num_rows:
                        continue
                    batch = batch.slice(known)
                    is_large = step > 1 and batch.nbytes > 4 * _PIECE
                    table = checked(batch, self.schema, self.path.name)
            except MemoryError:
                if step == 1:
                    raise
                return done
            done += batch.num_rows
            del batch
            yield table
            del table
            if is_large:
                return done

    def in_place(self, version: str, cache: ChunkCache) -> InPlace:
        """See :meth:`OpenedSource.in_place`: the row groups of rows that are asked for are read and kept for a while."""
        if self.not_in_place:
            raise NotImplementedError(self.not_in_place)
        others = [name for name, _ in self.others]
        with self.readable(_WHAT):
            metadata = self._file.read(columns=others) if others else pa.table({})
            metadata.validate(full=True)
            metadata = metadata.cast(pa.schema([self.schema.field(name) for name in others]))
        groups = _Groups(self, cache)
        records = {name: self._records(name) for name in self.images}
        columns: dict[str, Column] = {name: _ParquetColumn(name, records[name], groups) for name in self.images}
        return InPlace(LoadedTable({}, tuple(self.others), self.rows, version, metadata=metadata), columns, records)

    def _records(self, name: str) -> pa.ChunkedArray:
        """A column's records without their pixels."""
        kind = self.schema.field(name).type
        parts = [f"{name}.{field.name}" for field in kind if field.name not in PIXELS]
        with self.readable(_WHAT):
            return self._file.read(columns=parts).column(0)

    def read_group(self, group: int, name: str) -> pa.ChunkedArray:
        """A column of a row group. One thread at a time. Raises InvalidRecord where it cannot be decoded, or the file was changed."""
        try:
            with self.readable(_WHAT):
                found = self._file.read_row_group(group, columns=[name]).column(0)
        except InvalidRecord:
            self.check_read()
            raise
        self.check_read()
        return found

    @property
    def group_rows(self) -> list[int]:
        """Rows of each row group."""
        return [group.rows for group in self._groups]

    def close(self) -> None:
        """See :meth:`OpenedSource.close`."""
        self._file.close()
        super().close()


class _Group:
    """A column of a row group, decoded, and the pixels of its rows that have been asked for."""

    def __init__(self, array: pa.ChunkedArray) -> None:
        self.array = array
        self.nbytes = array.nbytes
        self._pixels: dict[int, StoredPixels] = {}

    def pixels(self, row: int, chunks: ChunkCache) -> StoredPixels:
        """Of a row, counted in the group."""
        found = self._pixels.get(row)
        if found is None:
            found = self._pixels[row] = StoredPixels(self.array[row], chunks)
            if len(self._pixels) > _INDEXES_KEPT:
                self._pixels.pop(next(iter(self._pixels)))
        return found


class _Groups:
    """The row groups of a file, read when they are asked for; the cache forgets them."""

    def __init__(self, source: ParquetSource, cache: ChunkCache) -> None:
        self._source = source
        self._cache = cache
        self._owners = {name: cache.new_owner() for name in source.images}
        self._starts = np.concatenate([[0], np.cumsum(source.group_rows)])
        self._lock = threading.Lock()
        # Where one is larger than what the cache keeps, rows are read one after the other all the same.
        self._last: tuple[Any, _Group] | None = None

    def pixels(self, name: str, row: int) -> StoredPixels:
        """The pixels of a row's record."""
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        key = (self._owners[name], group)
        found: Any = self._cache.get(key)
        if found is None:
            # One file, one reader.
            with self._lock:
                found = self._cache.get(key) or (self._last[1] if self._last is not None and self._last[0] == key else None)
                if found is None:
                    self._last = None
                    found = _Group(self._source.read_group(group, name))
                    self._cache.put(key, found)
                    self._last = key, found
        pixels: StoredPixels = found.pixels(row - int(self._starts[group]), self._cache)
        return pixels


class _ParquetColumn(KnownColumn):
    """An image column that is read from its file row group by row group. See :class:`Column`."""

    def __init__(self, name: str, records: pa.ChunkedArray, groups: _Groups) -> None:
        super().__init__(records)
        self._name = name
        self._groups = groups

    def pixels(self, row: int, level: int = 0) -> Pixels:
        """See :meth:`Column.pixels`."""
        return _RowPixels(self.meta(row), self._name, row, self._groups)


class _RowPixels:
    """The pixels of a record that is read when they are wanted, and not kept by whoever keeps this. See :class:`Pixels`."""

    def __init__(self, meta: ImageMeta, name: str, row: int, groups: _Groups) -> None:
        self.meta = meta
        self._name, self._row, self._groups = name, row, groups

    @property
    def _stored(self) -> StoredPixels:
        return self._groups.pixels(self._name, self._row)

    @property
    def stored_dtype(self) -> np.dtype | None:
        """See :attr:`Pixels.stored_dtype`."""
        return self._stored.stored_dtype

    def gather(self, selection: Selection, out: np.ndarray) -> None:
        """See :meth:`Pixels.gather`."""
        self._stored.gather(selection, out)

    def flat_values(self, selection: Selection) -> np.ndarray:
        """See :meth:`Pixels.flat_values`."""
        return self._stored.flat_values(selection)


def _may_stand_for_more(group: pq.RowGroupMetaData, image: str) -> bool:
    """Whether an image column has pixels as bytes that are stored once for many values; compressed by OME-Arrow itself they are no measure."""
    is_repeated = False
    for place in range(group.num_columns):
        column = group.column(place)
        owner, _, path = column.path_in_schema.partition(".")
        if owner != image:
            continue
        leaf = path.rpartition(".")[2]
        if leaf == "pixel_bytes":
            is_repeated = any("DICTIONARY" in encoding for encoding in column.encodings)
        elif leaf == "compression" and not (column.is_stats_set and column.statistics.null_count == column.num_values):
            return False
    return is_repeated


def _item_bytes(pixel_type: str | None) -> int:
    try:
        return dtype_of_pixel_type(pixel_type).itemsize
    except OmeTensorError:
        return 0


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
