"""Messages whose rows have several columns of pixels: tiles, and the same regions of other image columns beside them.

Laid out by pyarrow and not by hand: the pixels are gathered into arrays of their own and copied into the message once. That costs a copy, and spares
a second way of laying a message out by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from xxhash import xxh3_64_intdigest

from ome_tensor.errors import InvalidArgument
from ome_tensor.tiling import Tile

from .batch_format import COLUMNS, PIXELS, Array, BatchFormat, beside_name, physical_dtype
from .batches import bare, row_of
from .envelope import head, write_fixed
from .ipc import END_OF_STREAM
from .v1 import tensor_service_pb2

__all__ = ["BesideMessage", "BesideWriter"]

Header = tensor_service_pb2.ReadTilesHeader


class BesideWriter:
    """Makes the messages of one stream, as :class:`TileWriter` does.

    Args:
        format: What the stream's batches have in common; of the tiles' own pixels.
        beside: The same of each column that comes beside.
        checksum: Whether each message brings a checksum of its payload.
    """

    def __init__(self, format: BatchFormat, beside: Sequence[BatchFormat], *, checksum: bool = False) -> None:
        self.format = format
        self.checksum = checksum
        self.beside = list(beside)
        fields = [one.schema.field(PIXELS).with_name(beside_name(number)) for number, one in enumerate(beside)]
        schema = format.schema
        self.schema = pa.schema([*schema, *fields], metadata=schema.metadata)
        self._schema = self.schema.serialize().to_pybytes()

    def opening(self, header: Header, *, last: bool = False) -> bytes:
        """See :meth:`TileWriter.opening`."""
        return bare(header, self._schema + END_OF_STREAM if last else self._schema, checksum=self.checksum)

    def batch(
        self, tiles: Sequence[Tile], beside: Sequence[Sequence[Tile]], *, header: Header | None = None, last: bool = False
    ) -> BesideMessage:
        """A message for whole tiles, one row each.

        Args:
            tiles: At least one; their positions follow each other.
            beside: Of each column beside the tiles in it, as many.
            header, last: As in :meth:`TileWriter.batch`.

        Raises:
            InvalidArgument: a tile of another shape than its format's where that is uniform.
        """
        blocks = [_blocks(self.format, tiles), *(_blocks(one, some) for one, some in zip(self.beside, beside, strict=True))]
        return BesideMessage(self, list(tiles), blocks, header, last)

    def assemble(
        self, tiles: Sequence[Tile], blocks: Sequence[Array | list[Array]], header: Header | None, last: bool, codec: str | None
    ) -> tuple[bytearray, int, int]:
        """A message's bytes, where its fixed fields are, and the payload's checksum (0 for none)."""
        table = np.array([row_of(tile, 0) for tile in tiles], np.int64)
        arrays: list[Any] = [
            pa.array(np.ascontiguousarray(table[:, place].astype(dtype))) for place, dtype in enumerate(COLUMNS.values())
        ]
        formats = [self.format, *self.beside]
        for one, some, kind in zip(formats, blocks, self.schema.types[len(COLUMNS) :], strict=True):
            arrays.append(_column(one, some, kind))
        batch = pa.RecordBatch.from_arrays(arrays, schema=self.schema)
        options = pa.ipc.IpcWriteOptions(compression=codec)
        sink = pa.BufferOutputStream()
        # Without the schema, which stands in the stream's first message.
        sink.write(self._schema if header is not None else b"")
        sink.write(_serialized(batch, options))
        sink.write(END_OF_STREAM if last else b"")
        payload = sink.getvalue()
        before, fixed_at = head(header, payload.size, len(self._schema) if header is not None else 0)
        return bytearray(before) + bytearray(payload), fixed_at, xxh3_64_intdigest(payload) if self.checksum else 0


def _serialized(batch: pa.RecordBatch, options: pa.ipc.IpcWriteOptions) -> pa.Buffer:
    if options.compression is None:
        return batch.serialize()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=options) as writer:
        writer.write_batch(batch)
    messages = pa.ipc.MessageReader.open_stream(sink.getvalue())
    messages.read_next_message()  # The schema.
    return messages.read_next_message().serialize()


def _blocks(format: BatchFormat, tiles: Sequence[Tile]) -> Array | list[Array]:
    """Where the tiles' pixels belong."""
    if format.variable:
        return [np.empty(tile.shape, format.dtype) for tile in tiles]
    if any(tile.shape != format.tile_shape for tile in tiles):
        wrong = next(tile.shape for tile in tiles if tile.shape != format.tile_shape)
        raise InvalidArgument(f"a tile of shape {wrong} in a stream of {format.tile_shape}", field="tiles")
    return np.empty((len(tiles), *format.tile_shape), format.dtype)


def _column(format: BatchFormat, blocks: Array | list[Array], kind: pa.DataType) -> pa.Array:
    """A column of pixels."""
    values, trailing = physical_dtype(format.dtype)
    if isinstance(blocks, np.ndarray):
        flat = pa.array(blocks.reshape(-1).view(values))
        storage = pa.FixedSizeListArray.from_arrays(flat, format.wire_elements(format.tile_shape))
        return pa.ExtensionArray.from_storage(kind, storage.cast(kind.storage_type))
    ends = np.cumsum([0, *(format.wire_elements(block.shape) for block in blocks)])
    flat = pa.array(np.concatenate([block.reshape(-1).view(values) for block in blocks]))
    shapes = np.array([(*block.shape, *trailing) for block in blocks], np.int32)
    data = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), flat).cast(kind.field("data").type)
    shape = pa.FixedSizeListArray.from_arrays(pa.array(shapes.reshape(-1)), shapes.shape[1]).cast(kind.field("shape").type)
    return pa.StructArray.from_arrays([data, shape], fields=[kind.field("data"), kind.field("shape")])


@dataclass(slots=True)
class BesideMessage:
    """One message, its pixels still to come. Made by :class:`BesideWriter`; used as :class:`MessageWriter`.

    Attributes:
        blocks: Of the tiles, and of each column beside, where the pixels belong: ``blocks[k][i]`` is row ``i``'s.
    """

    _writer: BesideWriter
    _tiles: list[Tile]
    blocks: list[Array | list[Array]]
    _header: Header | None
    _last: bool
    _codec: str | None = field(default=None)

    @property
    def size(self) -> int:
        """About the bytes of the message."""
        return sum(block.nbytes if isinstance(block, np.ndarray) else sum(part.nbytes for part in block) for block in self.blocks)

    def compress(self, codec: str) -> None:
        """Compress all buffers.

        Args:
            codec: ``lz4`` or ``zstd``.
        """
        self._codec = codec

    def finish(self, *, queue_us: int = 0, gather_us: int = 0, encode_us: int = 0) -> bytes:
        """The message. Call it once.

        Args:
            queue_us, gather_us, encode_us: What it cost, in microseconds.
        """
        message, fixed_at, checksum = self._writer.assemble(self._tiles, self.blocks, self._header, self._last, self._codec)
        self.blocks = []
        write_fixed(
            message,
            fixed_at,
            first_position=self._tiles[0].position,
            tile_count=len(self._tiles),
            slab=0,
            queue_us=queue_us,
            gather_us=gather_us,
            encode_us=encode_us,
            xxh3=checksum,
        )
        return bytes(message)
