"""Arrow IPC metadata without Arrow: written from a template, read with a few bounded loads.

An encapsulated record batch message is a length prefix, a flatbuffer that says where each buffer lies in the body, and the
body. For one kind of schema the flatbuffer's layout never changes, only the numbers in it do. So pyarrow makes one for a batch
of a single row, the places of the numbers are found by walking it, and from then on a batch of any size costs one small copy
and one ``struct.pack_into``: no array is built, and the pixels need not be there yet.

Reading is the same walk over a received flatbuffer. Every load is checked against the metadata's end, so that damaged bytes raise
:class:`BrokenStream` and nothing else.

Layout of the flatbuffer: https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format and Message.fbs.
Little-endian only, as Arrow streams are in practice.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import pyarrow as pa

from ome_tensor.errors import BrokenStream

__all__ = ["ALIGNMENT", "CONTINUATION", "END_OF_STREAM", "RECORD_BATCH", "SCHEMA", "BatchTemplate", "Located", "locate", "pad_to"]

#: Alignment of buffers in a body, as Arrow recommends.
ALIGNMENT: Final = 64

#: First four bytes of every encapsulated message.
CONTINUATION: Final = b"\xff\xff\xff\xff"

#: The end-of-stream marker.
END_OF_STREAM: Final = CONTINUATION + b"\0\0\0\0"

#: Kinds of message (the union ``MessageHeader``).
SCHEMA: Final = 1
RECORD_BATCH: Final = 3

_INT64 = struct.Struct("<q")
_UINT32 = struct.Struct("<I")
_INT32 = struct.Struct("<i")
_UINT16 = struct.Struct("<H")


def pad_to(size: int, alignment: int) -> int:
    """``size`` rounded up to a multiple of ``alignment``."""
    return -(-size // alignment) * alignment


@dataclass(frozen=True, slots=True)
class Located:
    """Where the numbers of one message's metadata lie.

    Attributes:
        kind: :data:`SCHEMA`, :data:`RECORD_BATCH` or another.
        end: Where the metadata end and the body begins.
        body_length_at: Place of the body's length, or ``None`` where it is left out (it is then 0).
        rows_at: Place of the number of rows, or ``None`` where it is left out.
        nodes_at, node_count: The field nodes, pairs of int64 (length, null count).
        buffers_at, buffer_count: The buffers, pairs of int64 (offset in the body, length).
        compressed: Whether the body's buffers are compressed.
    """

    kind: int
    end: int
    body_length_at: int | None
    rows_at: int | None = None
    nodes_at: int = 0
    node_count: int = 0
    buffers_at: int = 0
    buffer_count: int = 0
    compressed: bool = False


class _Table:
    """A flatbuffer table within ``data[:end]``; absent fields are ``None``."""

    __slots__ = ("at", "data", "end", "size", "vtable")

    def __init__(self, data: bytes | memoryview, at: int, start: int, end: int) -> None:
        if not start <= at <= end - 4:
            raise BrokenStream("Arrow metadata are damaged: a table lies outside them")
        vtable = at - _INT32.unpack_from(data, at)[0]
        if not start <= vtable <= end - 4:
            raise BrokenStream("Arrow metadata are damaged: a table has no layout")
        self.data, self.at, self.end, self.vtable = data, at, end, vtable
        self.size: int = _UINT16.unpack_from(data, vtable)[0]
        if vtable + self.size > end:
            raise BrokenStream("Arrow metadata are damaged: a table's layout is cut")

    def field(self, index: int, width: int) -> int | None:
        """Place of a field of that width."""
        slot = 4 + 2 * index
        if slot + 2 > self.size:
            return None
        offset: int = _UINT16.unpack_from(self.data, self.vtable + slot)[0]
        if offset == 0:
            return None
        if self.at + offset + width > self.end:
            raise BrokenStream("Arrow metadata are damaged: a field lies outside them")
        return self.at + offset

    def follow(self, index: int) -> int | None:
        """Place that an offset field points at."""
        at = self.field(index, 4)
        return None if at is None else at + int(_UINT32.unpack_from(self.data, at)[0])

    def pairs(self, index: int) -> tuple[int, int]:
        """Place and number of the entries of a vector of pairs of int64."""
        at = self.follow(index)
        if at is None:
            return 0, 0
        if at + 4 > self.end:
            raise BrokenStream("Arrow metadata are damaged: a list lies outside them")
        count: int = _UINT32.unpack_from(self.data, at)[0]
        if at + 4 + 16 * count > self.end:
            raise BrokenStream("Arrow metadata are damaged: a list is cut")
        return at + 4, count


def locate(data: bytes | memoryview, at: int, limit: int) -> Located | None:
    """Find the numbers in the encapsulated message that begins at ``data[at]``.

    Args:
        data: Bytes that hold the message, and perhaps more on either side.
        at: Where it begins.
        limit: Where the bytes that belong to it or to later messages end.

    Returns:
        The places, or ``None`` for the end-of-stream marker.

    Raises:
        BrokenStream: the bytes are no such message, or are cut inside its metadata.
    """
    if at + 8 > limit or bytes(data[at : at + 4]) != CONTINUATION:
        raise BrokenStream("an Arrow message is cut or does not begin as one")
    length: int = _INT32.unpack_from(data, at + 4)[0]
    if length == 0:
        return None
    start, end = at + 8, at + 8 + length
    if length < 8 or length % 8 or end > limit:
        raise BrokenStream(f"Arrow metadata of {length} bytes are cut or damaged")
    message = _Table(data, start + int(_UINT32.unpack_from(data, start)[0]), start, end)
    kind_at = message.field(1, 1)
    kind = 0 if kind_at is None else data[kind_at]
    body_length_at = message.field(3, 8)
    header_at = message.follow(2)
    if kind != RECORD_BATCH or header_at is None:
        return Located(kind, end, body_length_at)
    batch = _Table(data, header_at, start, end)
    return Located(
        kind,
        end,
        body_length_at,
        batch.field(0, 8),
        *batch.pairs(1),
        *batch.pairs(2),
        compressed=batch.field(3, 4) is not None,
    )


class BatchTemplate:
    """The metadata of a record batch, its numbers blank.

    Args:
        batch: Any batch of the schema's physical kind (nesting and number of columns count; types, names and sizes do not) with
            at least one row and a body, so that no number is left out of its metadata.
        codec: ``lz4`` or ``zstd``: the metadata of a batch whose buffers are compressed so; ``None``: of one whose are not.

    Attributes:
        size: Bytes of the metadata, length prefix included; a multiple of 8.
        node_count, buffer_count: Numbers to fill in.
    """

    def __init__(self, batch: pa.RecordBatch, codec: str | None = None) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
            writer.write_batch(batch)
        data = sink.getvalue().to_pybytes()
        schema = locate(data, 0, len(data))
        assert schema is not None
        data = data[schema.end :]
        found = locate(data, 0, len(data))
        # These hold by construction: pyarrow wrote it just now.
        assert found is not None
        assert found.rows_at is not None
        assert found.body_length_at is not None
        self.size = found.end
        self.node_count, self.buffer_count = found.node_count, found.buffer_count
        self._blank = data[: found.end]
        self._rows_at, self._body_length_at = found.rows_at, found.body_length_at
        self._nodes_at, self._buffers_at = found.nodes_at, found.buffers_at
        self._nodes = struct.Struct(f"<{2 * found.node_count}q")
        self._buffers = struct.Struct(f"<{2 * found.buffer_count}q")
        # What lies between the numbers is the same in every batch of this kind.
        blanks = sorted(
            (
                (self._rows_at, 8),
                (self._body_length_at, 8),
                (self._nodes_at, self._nodes.size),
                (self._buffers_at, self._buffers.size),
            )
        )
        ends = [0, *(at + size for at, size in blanks)]
        starts = [*(at for at, _ in blanks), self.size]
        self._fixed = [(end, start, self._blank[end:start]) for end, start in zip(ends, starts, strict=True) if end < start]
        self._compressed = found.compressed

    def find(self, data: bytes, at: int, limit: int) -> Located | None:
        """What :func:`locate` finds, where the message is of this very kind; ``None`` for any other, which may be as good."""
        if at + self.size > limit or any(data[at + start : at + end] != fixed for start, end, fixed in self._fixed):
            return None
        return Located(
            RECORD_BATCH,
            at + self.size,
            at + self._body_length_at,
            at + self._rows_at,
            at + self._nodes_at,
            self.node_count,
            at + self._buffers_at,
            self.buffer_count,
            self._compressed,
        )

    def fill(self, rows: int, lengths: list[int], buffers: list[int], body_length: int) -> bytes:
        """The metadata of one batch.

        Args:
            rows: Number of rows.
            lengths: Length of each field node. There are no nulls.
            buffers: Offset in the body and length in bytes of each buffer, alternating.
            body_length: Bytes of the body; a multiple of 8.

        Returns:
            :attr:`size` bytes; the body follows them.
        """
        metadata = bytearray(self._blank)
        nodes = [0] * (2 * self.node_count)
        nodes[::2] = lengths
        _INT64.pack_into(metadata, self._rows_at, rows)
        _INT64.pack_into(metadata, self._body_length_at, body_length)
        self._nodes.pack_into(metadata, self._nodes_at, *nodes)
        self._buffers.pack_into(metadata, self._buffers_at, *buffers)
        return bytes(metadata)
