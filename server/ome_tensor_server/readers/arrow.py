"""Arrow IPC files and streams: an uncompressed file is served as it is, all else is converted a record batch at a time."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import IO, ClassVar

import pyarrow as pa

from ome_tensor.arrow_file import ArrowImages, is_arrow
from ome_tensor.blocks import ChunkCache
from ome_tensor.columns import ImageColumn
from ome_tensor.tables import level_columns, split_columns

from .arrow_writer import write_images
from .base import PIXELS, InPlace, Progress
from .files import FileSource
from .plain import check_names, checked, plain_schema

__all__ = ["ArrowSource", "is_arrow_stream"]

#: How a stream begins that is not one of old: a marker, and the length of its schema message.
_CONTINUATION = b"\xff\xff\xff\xff"

_WHAT = "Arrow file"

#: No schema is as long.
_LONGEST_SCHEMA = 64 << 20


def is_arrow_stream(head: bytes) -> bool:
    """Whether a file that begins so is an Arrow IPC stream."""
    return head[:4] == _CONTINUATION and 0 < int.from_bytes(head[4:8], "little") < _LONGEST_SCHEMA


class ArrowSource(FileSource):
    """An Arrow IPC file or stream, mapped. See :class:`OpenedSource`.

    Args:
        location: Its path.

    Raises:
        InvalidRecord: not readable, or none of its columns holds OME-Arrow images; names the file.
        OSError: it cannot be opened.
    """

    format: ClassVar[str] = "arrow"

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self._images: ArrowImages | None = None
        self._is_mapped = False
        self.nbytes = self._stat.st_size
        if is_arrow(self.file):
            self._images = ArrowImages(self.path, self.file.fileno())
            schema = self._images.file_schema
            self._look_at_batches(self._images)
        else:
            with self.readable(_WHAT):
                self._memory = pa.py_buffer(mmap.mmap(self.file.fileno(), 0, prot=mmap.PROT_READ))
                stream = pa.ipc.open_stream(pa.BufferReader(self._memory))
                schema = stream.schema
                self.rows = sum(batch.num_rows for batch in stream)
        check_names(schema, self.path.name)
        self.images, self.others = split_columns(schema, self.path)
        self.schema = schema if self._is_mapped else plain_schema(schema, self.path.name)
        if not self._is_mapped:
            what = "a stream" if self._images is None else "compressed"
            self.not_in_place = f"it is {what}; write it as an uncompressed Arrow IPC file"

    def _look_at_batches(self, images: ArrowImages) -> None:
        """Whether a file can be mapped, its rows, and about the bytes that it takes. Decompresses one record batch at most."""
        rows = 0
        for batch in images.batches():
            if not images.holds(batch):
                break
            rows += batch.num_rows
        else:
            self._is_mapped, self.rows = True, rows
            return
        from pyarrow import dataset

        self.file.seek(0)
        with self.readable(_WHAT):
            self.rows = int(dataset.IpcFileFormat().make_fragment(self.file).count_rows())
        self.nbytes = max(self.nbytes, batch.nbytes * self.rows // max(batch.num_rows, 1))

    @property
    def is_mapped(self) -> bool:
        """See :attr:`OpenedSource.is_mapped`."""
        return self._is_mapped

    def validate(self) -> None:
        """Look at every offset and length of a file that is served as it is. Raises InvalidRecord where one leads nowhere."""
        for _ in self._tables():
            pass

    def write(self, file: IO[bytes], progress: Progress) -> None:
        """See :meth:`OpenedSource.write`."""
        self.rows = write_images(self.schema, self._tables(), file, progress)

    def _tables(self) -> Iterator[pa.Table]:
        """All record batches, each looked through."""
        batches = self._stream() if self._images is None else self._images.batches()
        while True:
            with self.readable(_WHAT):
                batch = next(batches, None)
                if batch is None:
                    return
                table = checked(batch, self.schema, self.path.name)
            del batch
            yield table
            del table

    def _stream(self) -> Iterator[pa.RecordBatch]:
        yield from pa.ipc.open_stream(pa.BufferReader(self._memory))

    def in_place(self, version: str, cache: ChunkCache) -> InPlace:
        """See :meth:`OpenedSource.in_place`: the file, mapped."""
        if self._images is None or not self._is_mapped:
            raise NotImplementedError(self.not_in_place)
        table = self._images.load(version)
        columns = {name: ImageColumn(array, cache, table.levels.get(name, ())) for name, array in table.images.items()}
        records = {
            self._column(name, level): _without_pixels(array)
            for name in table.images
            for level, array in enumerate((table.images[name], *table.levels.get(name, ())))
        }
        return InPlace(table.without_images(), columns, records)

    def _column(self, name: str, level: int) -> str:
        """The column of a level of an image column."""
        return level_columns(self.schema, name)[level - 1] if level else name


def _without_pixels(records: pa.ChunkedArray) -> pa.ChunkedArray:
    """Records without their planes and chunks."""
    kept = [field for field in records.type if field.name not in PIXELS]
    chunks = [
        pa.StructArray.from_arrays([chunk.field(field.name) for field in kept], fields=kept, mask=chunk.is_null())
        for chunk in records.chunks
    ]
    return pa.chunked_array(chunks, pa.struct(kept))
