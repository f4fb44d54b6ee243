"""Reading a source that is served in place: in a reader's process, which keeps some sources open and has the cache of what it decodes.

The other side is :mod:`.in_place`.
"""

from __future__ import annotations

import mmap
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa

from ome_tensor.blocks import ChunkCache
from ome_tensor.errors import LimitExceeded
from ome_tensor.pixels import Pixels
from ome_tensor.selection import Selection
from ome_tensor.tables import ImageTable

from .budget import human_bytes
from .readers.base import InPlace, OpenedSource, changed
from .readers.detect import open_source
from .readers.sinks import Sink

__all__ = ["InPlaceJobs"]

#: Sources open at one time.
_MOST_OPEN = 4


@dataclass(frozen=True, slots=True)
class _Open:
    """A source that is open, what is served of it, and the images that have been asked for: blocks are kept for each."""

    source: OpenedSource
    served: InPlace
    images: ImageTable


class InPlaceJobs:
    """Does the jobs, one at a time."""

    def __init__(self) -> None:
        self._cache: ChunkCache | None = None
        self._open: OrderedDict[tuple[str, str, str], _Open] = OrderedDict()

    @property
    def jobs(self) -> dict[str, Callable[[dict[str, Any], int], dict[str, Any]]]:
        """The jobs by name: functions of what is wanted and of a descriptor to write to."""
        return {"outline": self.outline, "gather": self.gather, "values": self.values, "stored_dtype": self.stored_dtype}

    def outline(self, job: dict[str, Any], descriptor: int) -> dict[str, Any]:
        """Write all but the pixels as an Arrow IPC file."""
        found = self._source(job)
        table = found.served.table.metadata
        columns: dict[str, Any] = {} if table is None else {name: table.column(name) for name in table.schema.names}
        marks = found.source.schema
        fields = [
            pa.field(name, records.type, metadata=marks.field(name).metadata) for name, records in found.served.records.items()
        ]
        fields += [] if table is None else list(table.schema)
        schema = pa.schema(fields)
        whole = pa.Table.from_arrays([*found.served.records.values(), *columns.values()], schema=schema)
        # What goes on from here is taken for what it says.
        whole.validate(full=True)
        with (
            _emptied(descriptor) as file,
            pa.ipc.new_file(pa.PythonFile(_Bounded(file, job["limit"]), mode="w"), schema) as writer,
        ):
            writer.write_table(whole)
        found.source.check_read()
        return {
            "rows": found.source.rows,
            "images": list(found.source.images),
            "others": [list(other) for other in found.source.others],
        }

    def gather(self, job: dict[str, Any], descriptor: int) -> dict[str, Any]:
        """Write chosen pixels, TZCYX in C order."""
        shape, dtype = job["shape"], np.dtype(job["dtype"])
        memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        cache = self._cache_of(job)
        hits, misses = cache.hits, cache.misses
        self._read(job, lambda pixels: pixels.gather(_selection(job), np.frombuffer(memory, dtype).reshape(shape)))
        memory.close()
        return {"hits": cache.hits - hits, "misses": cache.misses - misses}

    def values(self, job: dict[str, Any], descriptor: int) -> dict[str, Any]:
        """Write stored values as they are."""
        values = self._read(job, lambda pixels: pixels.flat_values(_selection(job)))
        with _emptied(descriptor) as file:
            _Bounded(file, job["limit"]).write(np.ascontiguousarray(values).view(np.uint8))
        return {"dtype": values.dtype.str}

    def stored_dtype(self, job: dict[str, Any], _: int) -> dict[str, Any]:
        """The dtype of the stored values."""
        dtype = self._read(job, lambda pixels: pixels.stored_dtype)
        return {"dtype": None if dtype is None else dtype.str}

    def _read(self, job: dict[str, Any], read: Callable[[Pixels], Any]) -> Any:
        found = self._source(job)
        try:
            made = read(found.images.image(job["column"], job["row"], job["level"]).pixels)
            if found.source.is_mapped:
                # Nothing was read of it that could have been looked at.
                found.source.check_read()
            return made
        except BaseException:
            if not found.source.is_unchanged():
                # Whoever comes next is told so at once.
                self._close(next(key for key, one in self._open.items() if one is found))
            raise

    def _cache_of(self, job: dict[str, Any]) -> ChunkCache:
        if self._cache is None:
            self._cache = ChunkCache(job["cache_bytes"], job["max_chunk_bytes"])
        return self._cache

    def _source(self, job: dict[str, Any]) -> _Open:
        """The source, opened if it is not. Raises InvalidRecord where it is not what it was when it was looked at."""
        key = job["location"], job["fingerprint"], job["version"]
        found = self._open.get(key)
        if found is None:
            try:
                source = open_source(job["location"])
            except (FileNotFoundError, NotADirectoryError):
                raise changed(job["location"]) from None
            try:
                if source.fingerprint() != job["fingerprint"]:
                    raise source.changed()
                served = source.in_place(job["version"], self._cache_of(job))
                images = ImageTable("", served.table, columns=served.columns)
                found = self._open[key] = _Open(source, served, images)
            except BaseException:
                source.close()
                raise
            while len(self._open) > _MOST_OPEN:
                self._close(next(iter(self._open)))
        self._open.move_to_end(key)
        return found

    def _close(self, key: tuple[str, str, str]) -> None:
        self._open.pop(key).source.close()


def _selection(job: dict[str, Any]) -> Selection:
    t, z, c, x, y, w, h = job["selection"]
    return Selection(tuple(t), tuple(z), tuple(c), x, y, w, h)


def _emptied(descriptor: int) -> IO[bytes]:
    """A file to write to: a reader that has died in the middle of the same job may have left a part."""
    os.ftruncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return open(descriptor, "wb", closefd=False)


class _Bounded(Sink):
    """A file that takes so many bytes and no more: memory files count as nobody's memory."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        super().__init__(file)
        self._left = self._limit = limit

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self._left -= size
        if self._left < 0:
            raise LimitExceeded(
                f"what is to be known of it takes more than {human_bytes(self._limit)}", field="memory_limit", value=self._limit
            )
        self._file.write(data)
        return size
