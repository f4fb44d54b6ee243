"""Tables of chunks, a row each, as upstream's typed chunk datasets have them: where the chunks lie in their images, and their bytes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ome_tensor.errors import InvalidRecord
from ome_tensor.pixel_types import payload_dtype
from ome_tensor.tables import first_line
from ome_tensor_server.file_system import file_identity

__all__ = ["ORIGINS", "SHAPES", "ChunkFile", "ChunkRows", "Entries"]

ORIGINS = ("t", "c", "z", "y", "x")
SHAPES = tuple(f"shape_{axis}" for axis in ORIGINS)
_GEOMETRY = (*ORIGINS, *SHAPES)
_PLACES = ("image_id", *_GEOMETRY)

#: Of some chunks the images, the names of the dtypes, and where they lie.
_Part: TypeAlias = tuple[np.ndarray, pa.Array, dict[str, np.ndarray]]

#: About the decoded bytes that are held at a time.
_PIECE = 64 << 20

#: Planes and volumes that one image's chunks may be made of beyond what it has chunks: a header may say anything.
_MOST_ENTRIES = 1 << 20

#: No memory has so many bytes, and sums of sizes would wrap.
_LARGEST = 2.0**46


class ChunkFile:
    """A Parquet file of chunks, opened.

    Args:
        path: The file.
        dataset: The dataset's name, for errors.

    Attributes:
        starts: The number of the first row of each row group, and that of all rows.

    Raises:
        InvalidRecord: it is damaged, or columns are missing.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, dataset: str) -> None:
        self.path = path
        self._dataset = dataset
        self._file = path.open("rb")
        weakref.finalize(self, self._file.close)
        self._identity = file_identity(os.fstat(self._file.fileno()))
        try:
            self._parquet = pq.ParquetFile(self._file, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from None
        groups = [self._parquet.metadata.row_group(number).num_rows for number in range(self._parquet.num_row_groups)]
        if min(groups, default=0) < 0 or sum(groups) != self._parquet.metadata.num_rows:
            raise self.unreadable("its footer contradicts itself")
        self.starts = np.concatenate([[0], np.cumsum(groups, dtype=np.int64)])

    def unreadable(self, why: str) -> InvalidRecord:
        """The error of a file that is not what it should be."""
        return InvalidRecord(f"{self._dataset} cannot be read: {self.path.name}: {why}", field="path", value=self._dataset)

    def _damaged(self, error: BaseException) -> BaseException:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            return error
        return self.unreadable(first_line(error))

    @property
    def names(self) -> list[str]:
        """Its columns."""
        names: list[str] = self._parquet.schema_arrow.names
        return names

    def table(self, columns: Sequence[str]) -> pa.Table:
        """Some of its columns, all rows."""
        missing = [name for name in columns if name not in self.names]
        if missing:
            raise self.unreadable(f"it has no column {missing[0]!r}")
        try:
            table = self._parquet.read(columns=list(columns))
            table.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from None
        return table

    def integers(self, table: pa.Table | pa.RecordBatch, name: str) -> np.ndarray:
        """A column of it as int64."""
        column = table.column(name)
        if not pa.types.is_integer(column.type) or column.null_count:
            raise self.unreadable(f"{name} must be integers, none missing")
        try:
            values: np.ndarray = np.asarray(column.cast(pa.int64()))
        except pa.ArrowException:
            raise self.unreadable(f"{name} has a number beyond 64 bits") from None
        return values

    def check_unchanged(self) -> None:
        """InvalidRecord where it is not the file that was opened any more."""
        try:
            is_same = file_identity(os.fstat(self._file.fileno())) == file_identity(os.stat(self.path)) == self._identity
        except OSError:
            is_same = False
        if not is_same:
            raise self.unreadable("it was changed while it is served; refresh the dataset")

    def batches(self, groups: range, columns: Sequence[str], row_bytes: int) -> Iterator[pa.RecordBatch]:
        """Some columns of row groups, in pieces.

        Args:
            groups: Their numbers.
            columns: Of these, which there are.
            row_bytes: About the bytes of a row.
        """
        rows = int(self.starts[groups.stop] - self.starts[groups.start])
        try:
            step = max(1, min(rows, _PIECE // max(row_bytes, 1)))
            yield from self._parquet.iter_batches(step, row_groups=list(groups), columns=list(columns))
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from None

    def close(self) -> None:
        """Close it."""
        self._parquet.close()
        self._file.close()


def _flat(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    if not isinstance(column, pa.ChunkedArray):
        return column
    # Without a chunk Arrow (as of 16) has nothing to combine.
    return column.combine_chunks() if column.num_chunks else pa.array([], column.type)


@dataclass(frozen=True, slots=True)
class Entries:
    """Chunks of one t and one c each: parts of stored chunks, which may have several.

    Attributes:
        row: The stored chunk that each is part of.
        part: Which part of it.
        geometry: Origins and shapes by name, those of t and c without the latter.
        nbytes: Bytes of each.
    """

    row: np.ndarray
    part: np.ndarray
    geometry: dict[str, np.ndarray]
    nbytes: np.ndarray


class ChunkRows:
    """Where all chunks of a dataset lie, in their images and in their files.

    Args:
        files: The files, in order.
        images: Identifier of each image.
        extents: Their sizes, TCZYX, (n, 5).
        dtypes: Their dtypes' names.
        index: An index of all chunks, which says where they lie without a look at them: that is had when they are read.
        fragments: The files as the index names them.

    Attributes:
        image: The image of each chunk, by place.
        kind: The name of each chunk's dtype, by place in ``kinds``.
        kinds: Those names.
        dtypes: What they mean, byte order kept.
        nbytes: Bytes of each chunk.

    Raises:
        InvalidRecord: a chunk is of no image, or does not lie in it, or has an unknown dtype.
    """

    def __init__(
        self,
        files: Sequence[ChunkFile],
        images: pa.Array,
        extents: np.ndarray,
        dtypes: pa.Array,
        index: ChunkFile | None = None,
        fragments: Sequence[str] = (),
    ) -> None:
        self.files = files
        self._images = images
        # What names none at all is uint16, as everywhere in OME-Arrow.
        self._image_dtypes = pc.fill_null(dtypes, "uint16")
        self._starts = np.cumsum([0, *(int(file.starts[-1]) for file in files)])
        indexed = None if index is None else self._from_index(index, fragments)
        self._index = None if indexed is None else index
        parts = [indexed] if indexed is not None else [self._part(file, file.table((*_PLACES, "dtype"))) for file in files]
        self.image: np.ndarray = np.concatenate([image for image, _, _ in parts])
        kinds = pa.chunked_array([kinds for _, kinds, _ in parts]).combine_chunks().dictionary_encode()
        self.kind: np.ndarray = kinds.indices.to_numpy()
        self.kinds: list[str] = kinds.dictionary.to_pylist()
        self.dtypes = [payload_dtype(name, np.dtype(np.uint16)) for name in self.kinds]
        self._geometry = {name: np.concatenate([part[name] for _, _, part in parts]) for name in _GEOMETRY}
        self._check(extents)
        sizes = np.array([dtype.itemsize for dtype in self.dtypes], np.int64)
        self.nbytes: np.ndarray = sizes[self.kind] * np.prod([self._geometry[name] for name in SHAPES], axis=0)

    def __len__(self) -> int:
        return len(self.image)

    def _part(self, file: ChunkFile, table: pa.Table | pa.RecordBatch) -> _Part:
        """What the chunks of a file say of themselves, or an index of them."""
        try:
            names = _flat(table.column("image_id")).cast(pa.string())
            kinds = _flat(table.column("dtype")).cast(pa.string()) if "dtype" in table.schema.names else None
        except pa.ArrowException:
            raise file.unreadable("image_id and dtype must be text") from None
        places = pc.index_in(names, value_set=self._images)
        if places.null_count:
            stranger = names.filter(places.is_null())[0].as_py()
            raise file.unreadable(f"it has a chunk of image {stranger!r}, which is not in images.parquet")
        usual = self._image_dtypes.take(places)
        geometry = {name: file.integers(table, name) for name in _GEOMETRY}
        return np.asarray(places).astype(np.int64), usual if kinds is None else pc.coalesce(kinds, usual), geometry

    def _from_index(self, index: ChunkFile, fragments: Sequence[str]) -> _Part | None:
        """What the index says, in the order of the chunks; ``None`` where it does not say where they lie."""
        table = index.table((*_PLACES, "row_group_id", "row_index_in_group", "fragment_path"))
        if table.column("row_group_id").null_count or table.column("row_index_in_group").null_count:
            return None
        files = pc.index_in(
            _flat(table.column("fragment_path").fill_null(fragments[0])), value_set=pa.array(fragments)
        ).to_numpy()
        groups, rows = index.integers(table, "row_group_id"), index.integers(table, "row_index_in_group")
        order = np.lexsort((rows, groups, files))
        counts = [np.diff(file.starts) for file in self.files]
        every = np.concatenate(counts)
        if not (
            len(table) == every.sum()
            and np.array_equal(files[order], np.repeat(np.arange(len(counts)), [int(count.sum()) for count in counts]))
            and np.array_equal(groups[order], np.repeat(np.concatenate([np.arange(len(count)) for count in counts]), every))
            and np.array_equal(rows[order], np.arange(len(table)) - np.repeat(np.cumsum(every) - every, every))
        ):
            raise index.unreadable("it does not list the chunks that there are; it can be removed")
        image, kinds, geometry = self._part(index, table)
        return image[order], kinds.take(pa.array(order)), {name: values[order] for name, values in geometry.items()}

    def _check(self, extents: np.ndarray) -> None:
        """InvalidRecord where a chunk lies outside of its image, or is larger than anything can be."""
        bad = np.zeros(len(self), bool)
        for axis, (origin, shape) in enumerate(zip(ORIGINS, SHAPES, strict=True)):
            at, count, size = self._geometry[origin], self._geometry[shape], extents[self.image, axis]
            bad |= (at < 0) | (count <= 0) | (count > size) | (at > size - count)
        volume = np.prod([self._geometry[name].astype(np.float64) for name in SHAPES], axis=0)
        bad |= volume > _LARGEST
        if bad.any():
            row = int(bad.argmax())
            raise self.damaged(
                row, f"of shape {self._shape(row)} has an invalid shape or origin: it is out of range of the image"
            )

    def _shape(self, row: int) -> tuple[int, ...]:
        return tuple(int(self._geometry[name][row]) for name in SHAPES)

    def name(self, row: int) -> str:
        """A chunk for an error message."""
        return "chunk (" + ", ".join(f"{axis}={self._geometry[axis][row]}" for axis in ("t", "z", "c", "y", "x")) + ")"

    def damaged(self, row: int, why: str) -> InvalidRecord:
        """The error of a chunk."""
        return self.files[self.place(row)[0]].unreadable(f"{self.name(row)} {why}")

    def place(self, row: int) -> tuple[int, int, int]:
        """The file, the row group and the row in it."""
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        inside = row - int(self._starts[file])
        starts = self.files[file].starts
        group = int(np.searchsorted(starts, inside, side="right")) - 1
        return file, group, inside - int(starts[group])

    def entries(self, rows: np.ndarray) -> Entries:
        """These chunks, in order, in parts of one t and one c. Raises InvalidRecord where there would be too many."""
        chosen = {name: values[rows] for name, values in self._geometry.items()}
        counts = chosen["shape_t"] * chosen["shape_c"]
        if float(counts.astype(np.float64).sum()) > len(rows) * 4.0 + _MOST_ENTRIES:
            raise self.damaged(int(rows[counts.argmax()]), "stands for more planes than can be served")
        which = np.repeat(np.arange(len(rows)), counts)
        part = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
        geometry = {name: values[which] for name, values in chosen.items()}
        channels = geometry.pop("shape_c")
        del geometry["shape_t"]
        geometry["t"] += part // channels
        geometry["c"] += part % channels
        return Entries(rows[which], part, geometry, (self.nbytes[rows] // counts)[which])

    def pieces(self, file: int, groups: range) -> Iterator[pa.Array]:
        """The bytes of the chunks of row groups, in pieces. Raises InvalidRecord where they are damaged, or others than the index says."""
        opened = self.files[file]
        first = int(self._starts[file] + opened.starts[groups.start])
        end = int(self._starts[file] + opened.starts[groups.stop])
        wanted = ["pixel_bytes"] if self._index is None else [*_PLACES, "dtype", "pixel_bytes"]
        for batch in opened.batches(groups, wanted, int(self.nbytes[first:end].max(initial=0))):
            missing = [name for name in wanted if name not in batch.schema.names]
            if missing:
                raise opened.unreadable(f"it has no column {missing[0]!r}")
            if self._index is not None:
                self._compare(opened, batch, slice(first, first + len(batch)))
            array = batch.column("pixel_bytes")
            if not (pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type)):
                raise opened.unreadable(f"pixel_bytes must be bytes, not {array.type}")
            yield array
            first += len(batch)

    def _compare(self, file: ChunkFile, batch: pa.RecordBatch, rows: slice) -> None:
        assert self._index is not None
        image, kinds, geometry = self._part(file, batch)
        if not (
            np.array_equal(image, self.image[rows])
            and kinds.to_pylist() == [self.kinds[kind] for kind in self.kind[rows].tolist()]
            and all(np.array_equal(geometry[name], self._geometry[name][rows]) for name in _GEOMETRY)
        ):
            raise self._index.unreadable(f"it contradicts {file.path.name}; it can be removed")

    def payloads(self, rows: np.ndarray) -> Iterator[pa.Buffer]:
        """The bytes of these chunks, one after the other. Raises InvalidRecord where one has more or fewer than its shape wants."""
        first = end = 0  # The rows of the groups that are being read; ``first`` goes on with the pieces.
        piece = pa.array([], pa.binary())
        pieces: Iterator[pa.Array] = iter(())
        for row in rows.tolist():
            if not first <= row < end:
                file, group, inside = self.place(row)
                groups = self._together(file, group)
                pieces, piece = self.pieces(file, groups), pa.array([], pa.binary())
                first, end = row - inside, int(self._starts[file] + self.files[file].starts[groups.stop])
            while row >= first + len(piece):
                first += len(piece)
                # The one before can go.
                piece = None
                piece = next(pieces, None)
                if piece is None:
                    raise self.damaged(row, "is missing: its row group ends before it")
            yield self.checked(piece[row - first], row)

    def _together(self, file: int, group: int) -> range:
        """Row groups from one on that are read in one go, since each alone is small."""
        starts = self._starts[file] + self.files[file].starts
        stop, total = group + 1, self.nbytes[starts[group] : starts[group + 1]].sum(dtype=np.float64)
        while stop < len(starts) - 1 and total < _PIECE:
            total += self.nbytes[starts[stop] : starts[stop + 1]].sum(dtype=np.float64)
            stop += 1
        return range(group, stop)

    def checked(self, value: pa.Scalar, row: int) -> pa.Buffer:
        """The bytes of a chunk. Raises InvalidRecord where they are not as many as its shape wants."""
        buffer = value.as_buffer() if value.is_valid else pa.py_buffer(b"")
        if buffer.size != self.nbytes[row]:
            raise self.damaged(
                row,
                f"of shape {self._shape(row)} as {self.kinds[self.kind[row]]}: pixels length != expected: "
                f"it has {buffer.size} bytes, not {self.nbytes[row]}",
            )
        return buffer

    def largest_group(self) -> int:
        """Bytes of the chunks of the row group that has most, by their shapes."""
        if not len(self):
            return 0
        starts = np.concatenate([self._starts[place] + file.starts[:-1] for place, file in enumerate(self.files)])
        # Groups without a row would add the next one's first.
        totals = np.concatenate([[0.0], np.cumsum(self.nbytes, dtype=np.float64)])
        return int(np.diff(totals[np.append(starts, len(self))]).max())
