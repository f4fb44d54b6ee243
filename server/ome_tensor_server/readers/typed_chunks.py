"""Upstream's typed chunk datasets: a folder with a table of images, one of their chunks as bytes, and perhaps an index of where those lie.

``images.parquet`` has a row an image, ``chunks.parquet`` a row a chunk of any number of times, channels, planes, rows and columns, its bytes in TCZYX
order. Written by ``ome_arrow.dataset.write_ome_arrow_dataset`` (ome-arrow 0.1).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar

import numpy as np
import pyarrow as pa

from ome_tensor.blocks import ChunkCache
from ome_tensor.columns import Column
from ome_tensor.errors import InvalidRecord
from ome_tensor.late import late_buffer
from ome_tensor.tables import LoadedTable

from .arrow_writer import LateTable, write_images
from .base import InPlace, Progress
from .chunk_columns import ChunkColumn
from .chunk_rows import ChunkFile, ChunkRows, Entries
from .folders import FolderSource
from .plain import plain_schema

__all__ = ["TypedChunksSource"]

_MARK = "_ome_arrow_dataset.json"
_LAYOUT = "typed-chunk-dataset"
_LARGEST_MARK = 1 << 20

#: Of images.parquet, what goes into the records.
_OWN = frozenset(
    [
        *("image_id", "name", "image_type", "dtype", "size_t", "size_c", "size_z", "size_y", "size_x", "layout"),
        *("chunk_t", "chunk_c", "chunk_z", "chunk_y", "chunk_x", "compression", "channels_json"),
    ]
)

#: Images go together into a record batch until it has so many bytes, or rows.
_BATCH, _BATCH_ROWS = 64 << 20, 4096

#: No memory has so many bytes.
_LARGEST = 2.0**46

#: A row group that takes more when it is decoded is not read over and over for single chunks.
_LARGEST_GROUP = 512 << 20

_CHANNEL = pa.struct(
    [
        pa.field("id", pa.string()),
        pa.field("name", pa.string()),
        pa.field("emission_um", pa.float64()),
        pa.field("excitation_um", pa.float64()),
        pa.field("illumination", pa.string()),
        pa.field("color_rgba", pa.uint32()),
    ]
)

_CHUNK = pa.struct(
    [
        *(pa.field(name, pa.int32()) for name in ("t", "c", "z", "y", "x", "shape_z", "shape_y", "shape_x")),
        pa.field("dtype", pa.string()),
        pa.field("compression", pa.string()),
        pa.field("pixel_bytes", pa.large_binary()),
    ]
)


class TypedChunksSource(FolderSource):
    """A typed chunk dataset. See :class:`OpenedSource`. Its images are the column ``image``; columns that upstream does not write are other columns.

    Args:
        location: The folder.

    Raises:
        InvalidRecord: it is damaged, or names a file that does not lie in it; names the folder.
        OSError: it cannot be opened.
    """

    format: ClassVar[str] = "typed-chunks"

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._files: list[ChunkFile] = []
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        name = self.path.name
        self._check_mark()
        images = self._chunk_file("images.parquet")
        table = images.table(images.names)
        self.rows = len(table)
        self._ids = self._texts(table, "image_id")
        if self._ids.null_count or len(self._ids.unique()) < len(self._ids):
            raise self.unreadable("images.parquet: image_id must differ from row to row, none missing")
        dtypes = self._texts(table, "dtype")
        sizes = np.stack([images.integers(table, f"size_{axis}") for axis in "tczyx"], axis=1)
        fragments, index = ["chunks.parquet"], None
        if (self.path / "index.parquet").exists():
            index = self._chunk_file("index.parquet")
            fragments = index.table(["fragment_path"]).column(0).fill_null(fragments[0]).unique().to_pylist() or fragments
        files = [self._chunk_file(fragment) for fragment in fragments]
        self._chunks = ChunkRows(files, self._ids, sizes, dtypes, index, fragments)
        # The chunks of each image, in the order of the files.
        self._order = np.argsort(self._chunks.image, kind="stable")
        self._starts = np.searchsorted(self._chunks.image[self._order], np.arange(self.rows + 1))

        others = [other for other in table.schema if other.name not in _OWN]
        self.others = tuple((other.name, str(other.type)) for other in others)
        plain = plain_schema(pa.schema(others), name)
        self._metadata = table.select([other.name for other in others]).cast(plain)
        column = "image"
        while column in plain.names:
            column += "_"
        self.images = [column]
        self._records = self._made_records(table, sizes, dtypes)
        kind = pa.struct([*self._records.type, pa.field("chunks", pa.list_(_CHUNK))])
        self.schema = pa.schema([pa.field(column, kind), *plain])
        self.nbytes = int(self._chunks.nbytes.sum(dtype=np.float64)) + 100 * len(self._chunks) + self._metadata.nbytes
        largest = self._chunks.largest_group()
        if largest > _LARGEST_GROUP:
            self.not_in_place = (
                f"its largest row group takes {largest >> 20} MiB when it is read; write it with smaller ones "
                f"(at most {_LARGEST_GROUP >> 20} MiB)"
            )

    def _check_mark(self) -> None:
        with (self.path / _MARK).open("rb") as file:
            text = file.read(_LARGEST_MARK + 1)
        try:
            said = json.loads(text) if len(text) <= _LARGEST_MARK else None
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict) or said.get("layout") != _LAYOUT:
            raise self.unreadable(f"{_MARK} does not say that its layout is {_LAYOUT}")

    def _chunk_file(self, fragment: str) -> ChunkFile:
        """A file of the folder, opened. Raises InvalidRecord where it is none."""
        path = PurePosixPath(fragment)
        inside = not path.is_absolute() and ".." not in path.parts and "\0" not in fragment and bool(path.parts)
        real = os.path.realpath(self.path)
        if not inside or not Path(os.path.realpath(self.path / path)).is_relative_to(real):
            raise self.unreadable(f"it names a file that does not lie in it: {fragment!r}")
        if not (self.path / path).is_file():
            raise self.unreadable(f"it has no file {fragment!r}")
        opened = ChunkFile(self.path / path, self.path.name)
        self._files.append(opened)
        return opened

    def _texts(self, table: pa.Table, name: str) -> pa.Array:
        """A column of images.parquet as text, null where it is none; all null where it is missing."""
        if name not in table.schema.names:
            return pa.nulls(len(table), pa.string())
        try:
            return table.column(name).cast(pa.string()).combine_chunks()
        except pa.ArrowException:
            raise self.unreadable(f"images.parquet: {name} must be text") from None

    def _made_records(self, table: pa.Table, sizes: np.ndarray, dtypes: pa.Array) -> pa.StructArray:
        """The images' records without their chunks."""
        pixels = {
            "dimension_order": pa.array(["XYZCT"] * len(table), pa.string()),
            "type": dtypes,
            **{f"size_{axis}": pa.array(sizes[:, place]) for place, axis in enumerate("tczyx")},
            "channels": pa.array(
                [_channels(text) for text in self._texts(table, "channels_json").to_pylist()], pa.list_(_CHANNEL)
            ),
        }
        grid = {"order": pa.array(["TCZYX"] * len(table), pa.string())}
        for axis in "tczyx":
            name = f"chunk_{axis}"
            if name in table.schema.names and pa.types.is_integer(table.schema.field(name).type):
                grid[name] = table.column(name).combine_chunks()
        grid["chunk_order"] = pa.array(["ZYX"] * len(table), pa.string())
        return _struct(
            {
                "type": pa.array(["ome.arrow"] * len(table), pa.string()),
                "id": self._ids,
                "name": self._texts(table, "name"),
                "image_type": self._texts(table, "image_type"),
                "pixels_meta": _struct(pixels),
                "chunk_grid": _struct(grid),
            }
        )

    def _rows_of(self, first: int, last: int) -> np.ndarray:
        """The chunks of images from ``first`` to before ``last``, image by image."""
        return self._order[self._starts[first] : self._starts[last]]

    def write(self, file: IO[bytes], progress: Progress) -> None:
        """See :meth:`OpenedSource.write`."""
        write_images(self.schema, self._tables(), file, progress)

    def _tables(self) -> Iterator[LateTable]:
        totals = np.concatenate([[0.0], np.cumsum(self._chunks.nbytes[self._order], dtype=np.float64)])[self._starts]
        first = 0
        while first < self.rows:
            last = first + 1
            while last < min(self.rows, first + _BATCH_ROWS) and totals[last + 1] - totals[first] <= _BATCH:
                last += 1
            if totals[last] - totals[first] > _LARGEST:
                raise self.unreadable(f"image {self._ids[first].as_py()!r} takes {totals[last] - totals[first]:.3g} bytes")
            yield self._table(first, last)
            first = last

    def _table(self, first: int, last: int) -> LateTable:
        rows = self._rows_of(first, last)
        entries = self._chunks.entries(rows)
        size = int(entries.nbytes.sum())
        buffer = late_buffer(size)
        offsets = np.concatenate([[0], np.cumsum(entries.nbytes)])
        kinds = pa.DictionaryArray.from_arrays(self._chunks.kind[entries.row], pa.array(self._chunks.kinds, pa.string()))
        chunks = {
            **{name: pa.array(values.astype(np.int32)) for name, values in entries.geometry.items()},
            "dtype": kinds.cast(pa.string()),
            "compression": pa.nulls(len(entries.row), pa.string()),
            "pixel_bytes": pa.Array.from_buffers(
                pa.large_binary(), len(entries.row), [None, pa.py_buffer(offsets.astype(np.int64)), buffer]
            ),
        }
        flat = pa.StructArray.from_arrays([chunks[field.name] for field in _CHUNK], fields=list(_CHUNK))
        bounds = np.searchsorted(self._chunks.image[entries.row], np.arange(first, last + 1)).astype(np.int32)
        lists = pa.ListArray.from_arrays(pa.array(bounds), flat)
        records = self._records.slice(first, last - first)
        kind = self.schema.field(0).type
        image = pa.StructArray.from_arrays([*records.flatten(), lists], fields=list(kind))
        metadata = self._metadata.slice(first, last - first).combine_chunks()
        table = pa.Table.from_arrays([image, *metadata.columns], schema=self.schema)
        return LateTable(table, buffer, self._chunks.payloads(rows))

    def in_place(self, version: str, cache: ChunkCache) -> InPlace:
        """See :meth:`OpenedSource.in_place`: the row groups of chunks that are asked for are read and kept for a while."""
        if self.not_in_place:
            raise NotImplementedError(self.not_in_place)
        column: Column = ChunkColumn(self._records, self._entries_of, self._chunks, cache)
        table = LoadedTable({}, tuple(self.others), self.rows, version, metadata=self._metadata)
        return InPlace(table, {self.images[0]: column}, {self.images[0]: pa.chunked_array([self._records])})

    def _entries_of(self, image: int) -> Entries:
        """The chunks of an image. Raises InvalidRecord where it has none."""
        rows = self._rows_of(image, image + 1)
        if not len(rows):
            raise InvalidRecord("the OME-Arrow record holds no pixels: neither planes nor chunks", field="chunks")
        return self._chunks.entries(rows)

    def close(self) -> None:
        """See :meth:`OpenedSource.close`."""
        for file in self._files:
            file.close()


def _struct(fields: Mapping[str, pa.Array]) -> pa.StructArray:
    return pa.StructArray.from_arrays(list(fields.values()), names=list(fields))


def _channels(text: str | None) -> list[dict[str, Any]]:
    """What ``channels_json`` says, as far as it is what it should be."""
    try:
        said = json.loads(text or "[]")
    except (ValueError, RecursionError):
        return []
    return [
        {
            **{name: _text(entry.get(name)) for name in ("id", "name", "illumination")},
            **{name: _number(entry.get(name)) for name in ("emission_um", "excitation_um")},
            "color_rgba": color & 0xFFFFFFFF if isinstance(color := entry.get("color_rgba"), int) else None,
        }
        for entry in (said if isinstance(said, list) else ())
        if isinstance(entry, dict)
    ]


def _text(value: object) -> str | None:
    # JSON can say what is no text: half of a surrogate pair.
    return value.encode(errors="replace").decode() if isinstance(value, str) else None


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
    except OverflowError:
        return None
