"""Reading: from received messages to arrays that lie in them.

:class:`BatchReader` is fed the messages of one stream in order and gives a :class:`TileBatch` for each that holds one. Nothing
is copied: pixels are NumPy views on the message's bytes, writable because a received message is nobody else's memory (and
DLPack's consumers want writable memory). A server is not trusted: every count, offset and shape is checked against what has
arrived before an array is built on it.

A record batch laid out as this project's servers do is read by :mod:`.ipc`; any other valid one (compressed, more columns) by
pyarrow.
"""

from __future__ import annotations

import math
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from xxhash import xxh3_64_intdigest

from ome_tensor.errors import BrokenStream

from .batch_format import COLUMNS, PIXELS, Array, BatchFormat, beside_name, physical_dtype
from .envelope import Envelope, parse_envelope
from .ipc import RECORD_BATCH, SCHEMA, Located, locate
from .v1 import tensor_service_pb2

__all__ = ["BatchReader", "TileBatch"]

# Where the columns' values stand among a record batch's buffers: each has a validity bitmap before them.
_COLUMN_BUFFERS = {name: 2 * place + 1 for place, name in enumerate(COLUMNS)}
# The same of the pixels: a fixed_size_list (bitmap; bitmap, values), or a struct (bitmap) of a list (bitmap, offsets; bitmap,
# values) and a fixed_size_list (bitmap; bitmap, values).
_UNIFORM_DATA = 2 * len(COLUMNS) + 2
_VARIABLE_OFFSETS = 2 * len(COLUMNS) + 2
_VARIABLE_DATA = 2 * len(COLUMNS) + 4
_VARIABLE_SHAPES = 2 * len(COLUMNS) + 7

#: Twice the largest message that any server may be set to send.
_MOST_UNPACKED = 512 << 20

_EMPTY: Array = np.empty(0, np.uint8)

# What damaged bytes can provoke in NumPy, pyarrow and struct where no check of ours has noticed them before.
_DAMAGE = (struct.error, ValueError, TypeError, LookupError, OverflowError, MemoryError, OSError, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class TileBatch:
    """The rows of one message: whole tiles, or one slab of a tile.

    Attributes:
        first_position: Position in the read of the first row's tile.
        tile_count: Number of tiles that end in this message.
        slab: Which slab of its tile the row is; 0 without slabs.
        columns: The columns of ``ReadTilesResponse`` (``tile``, ``image``, ``t`` ...) as arrays of one entry a row.
        pixels: ``pixels[i]`` is the (T, Z, C, H, W) block of row ``i`` in the view's dtype: one (N, T, Z, C, H, W) array where
            the stream is uniform, else a list of arrays. They lie in the received message, keep it alive, and are writable.
        timings: What the message cost the server, in microseconds.
        beside: Of each image column that comes beside, the same regions' pixels, as ``pixels``.
    """

    first_position: int
    tile_count: int
    slab: int
    columns: Columns
    pixels: Array | list[Array]
    timings: tensor_service_pb2.ReadTilesTimings
    beside: tuple[Array | list[Array], ...] = ()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.pixels)


class BatchReader:
    """The state of one stream. Feed it every message in order, then :meth:`finish` once gRPC reports status OK.

    Args:
        start: The position at which the read was asked to begin (``Order.start``).
        start_slab: The slab of that position's tile at which it was asked to begin (``start_slab``).
        pixels_only: Leave ``columns`` empty, for a read of a single tile, whose place is known. There must be no slabs then.
        request: The bytes of the request, where it asked for checksums: what comes must be the answer to just these, and undamaged.

    Attributes:
        header: The stream's header, once the first message has arrived.
        format: What its batches have in common, likewise.
        tiles: Number of whole tiles that have arrived.
        complete: Whether the end-of-stream marker has arrived.
    """

    def __init__(self, *, start: int = 0, start_slab: int = 0, pixels_only: bool = False, request: bytes | None = None) -> None:
        self._request = request
        self._columns = {} if pixels_only else COLUMNS
        self.header: tensor_service_pb2.ReadTilesHeader | None = None
        self.format: BatchFormat | None = None
        self._beside: list[BatchFormat] = []
        self.tiles = 0
        self.complete = False
        self._schema: pa.Schema = None
        self._is_plain = False
        # What must come next: a tile's position, one of its slabs, and the slab's first element (of a resumed read's first slab only the
        # server can know that).
        self._position, self._slab = start, start_slab
        self._offset: int | None = None if start_slab else 0
        self._inside_tile = False

    def feed(self, message: bytes) -> TileBatch | None:
        """Take in the next message.

        Args:
            message: Its bytes as received. They become the arrays' memory: nobody else may use them.

        Returns:
            Its rows, or ``None`` for a message without a record batch (an opening or a closing one).

        Raises:
            BrokenStream: it is cut, damaged, out of order, or not of this contract. The stream cannot be read on.
        """
        if self.complete:
            raise BrokenStream("a message came after the end of the stream")
        try:
            envelope = parse_envelope(message)
            if envelope.fields.HasField("header") != (self.header is None):
                raise BrokenStream("the stream has no header" if self.header is None else "the stream has a second header")
            if self._request is not None:
                _check_sums(message, envelope, self._request)
            batch = self._payload(message, envelope)
        except BrokenStream:
            raise
        except _DAMAGE as error:
            raise BrokenStream(f"a message is damaged: {error}") from error
        fields = envelope.fields
        if batch is None:
            if fields.tile_count:
                raise BrokenStream(f"a message announces {fields.tile_count} tiles and holds none")
        else:
            self._follow(batch)
        return batch

    def finish(self) -> None:
        """Check that the read was complete: end-of-stream marker seen, announced tiles delivered.

        Raises:
            BrokenStream: it was not.
        """
        if self.header is None:
            raise BrokenStream("the stream ended before its header")
        if not self.complete:
            raise BrokenStream(f"the stream was cut: {self.tiles} of {self.header.tile_count} tiles and no end-of-stream marker")
        if self.tiles != self.header.tile_count or self._inside_tile:
            raise BrokenStream(f"the stream announced {self.header.tile_count} tiles and brought {self.tiles}")

    def _payload(self, message: bytes, envelope: Envelope) -> TileBatch | None:
        at, limit = envelope.payload_at, envelope.payload_at + envelope.payload_size
        batch = None
        while at < limit:
            # Most messages are record batches of the usual kind: no need to follow their tables.
            found = self.format.template.find(message, at, limit) if self._is_plain and self.format is not None else None
            found = found or locate(message, at, limit)
            if found is None:
                self.complete = True
                if at + 8 != limit:
                    raise BrokenStream("bytes follow the end-of-stream marker")
                break
            body = 0 if found.body_length_at is None else struct.unpack_from("<q", message, found.body_length_at)[0]
            end = found.end + body
            if not found.end <= end <= limit:
                raise BrokenStream("an Arrow message is cut inside its body")
            if found.kind == SCHEMA and self.format is None:
                self._begin(pa.py_buffer(message).slice(at, end - at), envelope.fields.header)
            elif found.kind == RECORD_BATCH and self.format is not None and batch is None:
                batch = self._batch(self.format, message, at, end, found, envelope.fields)
            else:
                raise BrokenStream(f"an Arrow message of kind {found.kind} stands where none may")
            at = end
        if self.format is None:
            raise BrokenStream("the stream has no schema")
        return batch

    def _begin(self, schema: pa.Buffer, header: tensor_service_pb2.ReadTilesHeader) -> None:
        self._schema, format = _read_schema(schema.to_pybytes(), tuple(header.tile_shape))
        self.format = format
        if header.dtype != format.dtype.name:
            raise BrokenStream(f"the header's dtype is {header.dtype}, the schema's {format.dtype.name}")
        if header.slabs and not self._columns:
            raise BrokenStream("slabs came where none may")
        if header.slabs and not format.variable:
            raise BrokenStream("slabs came with a schema for whole tiles")
        self._beside = [
            BatchFormat.of_beside(self._schema, number, tuple(one.tile_shape), one.dtype)
            for number, one in enumerate(header.beside)
        ]
        if header.slabs and self._beside:
            raise BrokenStream("slabs came with other columns beside them")
        # The very columns we would write (their types are checked): then every buffer's place among the others is known.
        self._is_plain = self._schema.names == [*COLUMNS, PIXELS]
        self.header = header

    def _batch(
        self,
        format: BatchFormat,
        message: bytes,
        at: int,
        end: int,
        found: Located,
        fields: tensor_service_pb2.ReadTilesResponse,
    ) -> TileBatch:
        template = format.template
        counts = template.node_count, template.buffer_count
        buffers: _Buffers
        if self._is_plain and not found.compressed and (found.node_count, found.buffer_count) == counts:
            buffers = _MessageBuffers(message, end, found)
        else:
            if found.compressed:
                _check_sizes(message, end, found)
            buffers = _ArrowBuffers(pa.py_buffer(message).slice(at, end - at), self._schema, len(self._beside))
        columns = Columns(buffers, self._columns)
        beside = []
        skip = _pixel_buffers(format)
        for one in self._beside:
            beside.append(_pixels(one, buffers, skip))
            skip += _pixel_buffers(one)
        return TileBatch(
            fields.first_position,
            fields.tile_count,
            fields.slab,
            columns,
            _pixels(format, buffers),
            fields.timings,
            tuple(beside),
        )

    def _follow(self, batch: TileBatch) -> None:
        """Check that the batch is what comes next, and count it."""
        assert self.header is not None
        position, tiles = batch.first_position, batch.tile_count
        if position != self._position:
            raise BrokenStream(f"tiles from position {position} on came where {self._position} was due")
        if not self.header.slabs:
            if len(batch) != tiles:
                raise BrokenStream(f"a message announces {tiles} tiles and holds {len(batch)}")
        else:
            if len(batch) != 1 or tiles > 1:
                raise BrokenStream(f"a message of {len(batch)} slabs and {tiles} tiles, not of one slab")
            offset = int(batch.columns["offset"][0])
            if batch.slab != self._slab or offset != (offset if self._offset is None else self._offset):
                raise BrokenStream(
                    f"slab {batch.slab} from element {offset} on came where slab {self._slab} from {self._offset} on was due"
                )
            self._inside_tile = not tiles
            self._slab = 0 if tiles else batch.slab + 1
            self._offset = 0 if tiles else offset + batch.pixels[0].size
        self._position = position + tiles
        self.tiles += tiles
        if self.tiles > self.header.tile_count:
            raise BrokenStream(f"the stream announced {self.header.tile_count} tiles and brings more")


def _check_sums(message: bytes, envelope: Envelope, request: bytes) -> None:
    fields = envelope.fields
    if fields.HasField("header") and fields.header.request_xxh3 != xxh3_64_intdigest(request):
        raise BrokenStream("the request did not arrive as it was sent (its checksum differs)")
    with memoryview(message)[envelope.payload_at : envelope.payload_at + envelope.payload_size] as payload:
        if fields.xxh3 != xxh3_64_intdigest(payload):
            raise BrokenStream("a message did not arrive as it was sent (its checksum differs)")


@lru_cache(maxsize=256)
def _read_schema(data: bytes, tile_shape: tuple[int, ...]) -> tuple[pa.Schema, BatchFormat]:
    # Kept, since this takes longer than all else about a small read, and reads of one image are alike.
    schema = pa.ipc.read_schema(pa.py_buffer(data))
    return schema, BatchFormat.from_schema(schema, tile_shape)


class _Memory:
    """Memory of ``owner`` for NumPy, writable."""

    __slots__ = ("__array_interface__", "owner")

    def __init__(self, address: int, size: int, owner: object) -> None:
        self.__array_interface__ = {"version": 3, "shape": (size,), "typestr": "|u1", "data": (address, False)}
        self.owner = owner


def _writable(buffer: pa.Buffer) -> Array:
    """The bytes of a buffer as a writable array that keeps it alive. The memory must be the reader's own."""
    return np.asarray(_Memory(buffer.address, buffer.size, buffer))


class _Buffers(ABC):
    """The buffers of a record batch of the contract's columns, in Arrow's order."""

    __slots__ = ("rows",)
    rows: int

    @abstractmethod
    def place(self, index: int) -> tuple[Array, int, int]:
        """Memory that holds a buffer, where in it the buffer begins, and the buffer's size; within the memory."""

    def values(self, index: int, dtype: np.dtype[Any], shape: tuple[int, ...], skip: int = 0) -> Array:
        """A buffer's values from byte ``skip`` on, as an array on it. A buffer may be longer, never shorter."""
        memory, at, size = self.place(index)
        count = math.prod(shape)
        if count < 0 or skip + count * dtype.itemsize > size:
            raise BrokenStream(f"a record batch of {self.rows} rows needs {count} values in a buffer of {size} bytes")
        return np.ndarray(shape, dtype, memory, at + skip)


class _MessageBuffers(_Buffers):
    """Those of an uncompressed record batch, in the message."""

    __slots__ = ("_body", "_memory", "_places", "_size")

    def __init__(self, message: bytes, end: int, found: Located) -> None:
        self.rows = 0 if found.rows_at is None else struct.unpack_from("<q", message, found.rows_at)[0]
        nodes = struct.unpack_from(f"<{2 * found.node_count}q", message, found.nodes_at)
        if self.rows < 0 or any(nodes[1::2]):
            raise BrokenStream("a record batch has a negative size or holds nulls")
        self._places = struct.unpack_from(f"<{2 * found.buffer_count}q", message, found.buffers_at)
        self._memory = _writable(pa.py_buffer(message))
        self._body, self._size = found.end, end - found.end

    def place(self, index: int) -> tuple[Array, int, int]:
        offset, size = self._places[2 * index], self._places[2 * index + 1]
        if offset < 0 or size < 0 or offset + size > self._size:
            raise BrokenStream("a record batch's buffer lies outside its body")
        return self._memory, self._body + offset, size


def _check_sizes(message: bytes, end: int, found: Located) -> None:
    """Compressed buffers say how large they will be: a few bytes must not make their receiver allocate any amount of memory."""
    places = struct.unpack_from(f"<{2 * found.buffer_count}q", message, found.buffers_at)
    total = 0
    for offset, size in zip(places[::2], places[1::2], strict=True):
        if size >= 8 and 0 <= offset <= end - found.end - 8:
            total += max(0, struct.unpack_from("<q", message, found.end + offset)[0])
    if total > _MOST_UNPACKED:
        raise BrokenStream(f"a record batch would unpack to {total} bytes")


class Columns(Mapping[str, Array]):
    """The columns of a record batch, each made an array when asked for; that they are there is checked at once."""

    __slots__ = ("_buffers", "_made", "_types")

    def __init__(self, buffers: _Buffers, types: Mapping[str, np.dtype[Any]]) -> None:
        self._buffers, self._types = buffers, types
        self._made: dict[str, Array] = {}
        for name, dtype in types.items():
            if buffers.place(_COLUMN_BUFFERS[name])[2] < buffers.rows * dtype.itemsize:
                raise BrokenStream(f"column {name} of a record batch of {buffers.rows} rows is cut")

    def __getitem__(self, name: str) -> Array:
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = self._buffers.values(_COLUMN_BUFFERS[name], self._types[name], (self._buffers.rows,))
        return made

    def listed(self, name: str) -> tuple[int, ...]:
        """A column as integers; of a few rows that takes a third of the time that an array does."""
        memory, at, _ = self._buffers.place(_COLUMN_BUFFERS[name])
        return struct.unpack_from(f"<{self._buffers.rows}" + {8: "q", 4: "i"}[self._types[name].itemsize], memory.data, at)

    def __iter__(self) -> Iterator[str]:
        return iter(self._types)

    def __len__(self) -> int:
        return len(self._types)


class _ArrowBuffers(_Buffers):
    """Those of any record batch, read by pyarrow: decompressed where need be, the contract's columns picked."""

    __slots__ = ("_buffers",)

    def __init__(self, data: pa.Buffer, schema: pa.Schema, beside: int = 0) -> None:
        batch = pa.ipc.read_record_batch(data, schema)
        batch.validate()
        self.rows = batch.num_rows
        self._buffers: list[Array] = []
        for name in (*COLUMNS, PIXELS, *map(beside_name, range(beside))):
            column = batch.column(name)
            if column.null_count or column.offset:
                raise BrokenStream(f"column {name} holds nulls")
            self._buffers += [_EMPTY if buffer is None else _writable(buffer) for buffer in column.buffers()]

    def place(self, index: int) -> tuple[Array, int, int]:
        buffer = self._buffers[index]
        return buffer, 0, buffer.size


def _pixel_buffers(format: BatchFormat) -> int:
    """Number of buffers of a column of pixels."""
    return 8 if format.variable else 3


def _pixels(format: BatchFormat, buffers: _Buffers, skip: int = 0) -> Array | list[Array]:
    """A column of pixels; ``skip`` buffers lie between the first one's place and its own."""
    if format.variable:
        return _blocks(format, buffers, skip)
    return buffers.values(_UNIFORM_DATA + skip, format.dtype, (buffers.rows, *format.tile_shape))


def _blocks(format: BatchFormat, buffers: _Buffers, skip: int) -> list[Array]:
    """The rows' blocks of a stream of variable shapes."""
    values, trailing = physical_dtype(format.dtype)
    rows, int32 = buffers.rows, np.dtype(np.int32)
    if not rows:
        return []
    shapes = buffers.values(_VARIABLE_SHAPES + skip, int32, (rows, 5 + len(trailing))).tolist()
    ends = buffers.values(_VARIABLE_OFFSETS + skip, int32, (rows + 1,)).tolist()
    blocks = []
    for shape, start, end in zip(shapes, ends, ends[1:], strict=False):
        if min(shape) < 0 or tuple(shape[5:]) != trailing or not 0 <= start <= end or math.prod(shape) != end - start:
            raise BrokenStream(f"a tile of shape {tuple(shape)} has {end - start} values")
        blocks.append(buffers.values(_VARIABLE_DATA + skip, format.dtype, tuple(shape[:5]), start * values.itemsize))
    return blocks
