"""Images whose chunks are rows of Parquet files, served in place: the row groups of the chunks that are asked for are read, and kept for a while."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from ome_tensor.blocks import Blocks, ChunkCache
from ome_tensor.index import PixelIndex
from ome_tensor.pixels import Pixels
from ome_tensor.record import ImageMeta
from ome_tensor.selection import Selection

from .chunk_rows import ChunkRows, Entries
from .known import KnownColumn

__all__ = ["ChunkColumn"]

#: Indexes kept, some 100 bytes a chunk each.
_INDEXES_KEPT = 64


class _Group:
    """The bytes of a row group's chunks. Its ``nbytes`` are what a cache counts."""

    def __init__(self, pieces: list[pa.Array]) -> None:
        self.array = pa.chunked_array(pieces, None if pieces else pa.binary())
        self.nbytes = self.array.nbytes


class _Groups:
    """The row groups of a dataset, read when they are asked for; the cache forgets them."""

    def __init__(self, chunks: ChunkRows, cache: ChunkCache) -> None:
        self.chunks = chunks
        self._cache = cache
        self._owners = [cache.new_owner() for _ in chunks.files]
        self._locks = [threading.Lock() for _ in chunks.files]
        # Where one is larger than what the cache keeps, chunks are read one after the other all the same.
        self._last: tuple[Any, _Group] | None = None

    def payload(self, row: int) -> pa.Buffer:
        """The bytes of a chunk. Raises InvalidRecord where they are damaged, or the file was changed."""
        file, group, inside = self.chunks.place(row)
        key = (self._owners[file], group)
        found: Any = self._cache.get(key)
        if found is None:
            # One file, one reader.
            with self._locks[file]:
                found = self._cache.get(key) or (self._last[1] if self._last is not None and self._last[0] == key else None)
                if found is None:
                    self._last = None
                    opened = self.chunks.files[file]
                    try:
                        found = _Group(list(self.chunks.pieces(file, range(group, group + 1))))
                    finally:
                        # Afterwards: of a file that is half one and half another anything may be said.
                        opened.check_unchanged()
                    self._cache.put(key, found)
                    self._last = key, found
        if inside >= len(found.array):
            raise self.chunks.damaged(row, "is missing: its row group ends before it")
        return self.chunks.checked(found.array[inside], row)


class ChunkColumn(KnownColumn):
    """The image column of a dataset that is served in place. See :class:`Column`.

    Args:
        records: The images' records without their chunks.
        entries_of: The chunks of an image, by its row; raises InvalidRecord where it has none.
        chunks: All chunks.
        cache: Where decoded row groups are kept.
    """

    def __init__(
        self, records: pa.StructArray, entries_of: Callable[[int], Entries], chunks: ChunkRows, cache: ChunkCache
    ) -> None:
        super().__init__(pa.chunked_array([records]))
        self._records = records
        self._entries_of = entries_of
        self._groups = _Groups(chunks, cache)
        self._indexes: OrderedDict[int, PixelIndex] = OrderedDict()
        self._lock = threading.Lock()

    def pixels(self, row: int, level: int = 0) -> Pixels:
        """See :meth:`Column.pixels`."""
        return _ImagePixels(self.meta(row), row, self)

    def index(self, row: int) -> PixelIndex:
        """The index of an image. Raises InvalidRecord where its chunks are damaged."""
        with self._lock:
            index = self._indexes.get(row)
            if index is None:
                meta, entries = self.meta(row), self._entries_of(row)
                blocks = Blocks("chunks", entries.geometry, _EntryPayload(entries, self._groups), meta)
                blocks.check_geometry(meta)
                index = self._indexes[row] = PixelIndex(self._records[row], meta, blocks=blocks)
                if len(self._indexes) > _INDEXES_KEPT:
                    self._indexes.popitem(last=False)
            else:
                self._indexes.move_to_end(row)
            return index


class _EntryPayload:
    """The bytes of an image's chunks, by number. See :class:`ome_tensor.payloads.Payload`."""

    bytes_backed = True

    def __init__(self, entries: Entries, groups: _Groups) -> None:
        self._entries = entries
        self._groups = groups
        chunks = groups.chunks
        self._kinds = chunks.kind[entries.row]
        kinds = np.unique(self._kinds)
        self.dtype: np.dtype | None = chunks.dtypes[kinds[0]] if len(kinds) == 1 else None

    def length(self, block: int) -> None:
        """Only reading them can tell."""

    def values(self, block: int, expected: int) -> np.ndarray:
        """The values of a chunk's part."""
        entries = self._entries
        size = int(entries.nbytes[block])
        start = int(entries.part[block]) * size
        raw = self._groups.payload(int(entries.row[block])).slice(start, size)
        return np.frombuffer(raw, self._groups.chunks.dtypes[self._kinds[block]])

    def addresses(self) -> None:
        """They do not lie in one memory."""


class _ImagePixels:
    """The pixels of an image, whose index is made when it is needed and not kept by whoever keeps this. See :class:`Pixels`."""

    def __init__(self, meta: ImageMeta, row: int, column: ChunkColumn) -> None:
        self.meta = meta
        self._row, self._column = row, column

    @property
    def stored_dtype(self) -> np.dtype | None:
        """See :attr:`Pixels.stored_dtype`."""
        return self._column.index(self._row).stored_dtype

    def gather(self, selection: Selection, out: np.ndarray) -> None:
        """See :meth:`Pixels.gather`."""
        self._column.index(self._row).gather(selection, out)

    def flat_values(self, selection: Selection) -> np.ndarray:
        """See :meth:`Pixels.flat_values`."""
        return self._column.index(self._row).flat_values(selection)
