"""Writing: one message of a stream of tiles, made in place.

A message is one ``bytes`` object, allocated whole before a pixel is read. The caller gathers pixels into arrays that lie in it;
what costs anything is that gather and nothing else::

    writer = TileWriter(BatchFormat.of(...))
    yield writer.opening(header)
    for tiles in batches:
        message = writer.batch(tiles)
        for tile, block in zip(tiles, message.pixels):
            gather(tile, out=block)
        yield message.finish(gather_us=...)
    yield writer.closing()

The trick (CPython): ``io.BytesIO(b)``, where nobody else has ``b``, takes over the only reference to those bytes;
``getbuffer()`` lends them writable; ``getvalue()`` hands out the very object once nothing is lent any more. A test pins that
nothing is copied. The bytes begin uninitialised, since clearing a MiB that is about to be written takes a tenth of the
gather's time; everything but the pixels is cleared.
"""

from __future__ import annotations

import ctypes
import io
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from xxhash import xxh3_64, xxh3_64_intdigest

from ome_tensor.errors import InvalidArgument, LimitExceeded
from ome_tensor.slabs import Slab
from ome_tensor.tiling import Tile

from .batch_format import COLUMNS, Array, BatchFormat, physical_dtype
from .envelope import head, write_fixed
from .ipc import ALIGNMENT, END_OF_STREAM, pad_to
from .v1 import tensor_service_pb2

__all__ = ["MessageWriter", "TileWriter", "bare", "row_of"]

Header: TypeAlias = tensor_service_pb2.ReadTilesHeader

# Streams of one format have few kinds of message (the usual one, the first, the last); their layouts are kept.
_LAYOUTS_KEPT = 32

# Offsets of Arrow's lists are int32.
_MAX_ELEMENTS = 2**31 - 1

# https://docs.python.org/3/c-api/bytes.html: with no source the contents are uninitialised.
_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.argtypes, _new_bytes.restype = (ctypes.c_char_p, ctypes.c_ssize_t), ctypes.py_object

# A compressed buffer begins with its length before compression, or with this where it is not compressed after all.
_LENGTH = struct.Struct("<q")
_NOT_COMPRESSED = -1

# Pixels that shrink by less are sent as they are: their receiver then need not copy them.
_WORTHWHILE = 0.95


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where everything lies in a message, in bytes from its beginning.

    Attributes:
        prefix: The message's bytes before the record batch's body.
        fixed_at: The envelope's numbers.
        payload_at: The payload, which goes on to the end.
        columns_at: The body: the first column.
        narrow, wide: Distance from an int32 (int64) column to the next, padding included.
        offsets_at: The rows' offsets in the list of values (variable shapes only).
        pixels_at, pixels_end: The first pixel, and the end of the last.
        shapes_at: The rows' shapes (variable shapes only).
        size: The message's end.
        lengths, buffers: Lengths of the nodes, and offset and size of each buffer in the body, as the record batch's metadata say.
    """

    prefix: bytes
    fixed_at: int
    payload_at: int
    columns_at: int
    narrow: int
    wide: int
    offsets_at: int
    pixels_at: int
    pixels_end: int
    shapes_at: int
    size: int
    lengths: Sequence[int]
    buffers: Sequence[int]


class TileWriter:
    """Makes the messages of one stream. Not for several threads at once.

    Args:
        format: What the stream's batches have in common.
        checksum: Whether each message brings a checksum of its payload.
    """

    def __init__(self, format: BatchFormat, *, checksum: bool = False) -> None:
        self.format = format
        self.checksum = checksum
        self._schema = format.schema_bytes
        self._codec: pa.Codec | None = None

    def opening(self, header: Header, *, last: bool = False) -> bytes:
        """A message with the header and the schema and no batch: what to send first where the first batch takes its time.

        Args:
            header: The stream's header.
            last: Whether the stream ends here (a read without tiles).
        """
        return bare(header, self._schema + END_OF_STREAM if last else self._schema, checksum=self.checksum)

    def closing(self) -> bytes:
        """A message with the end-of-stream marker alone."""
        return bare(None, END_OF_STREAM, checksum=self.checksum)

    def batch(self, tiles: Sequence[Tile], *, header: Header | None = None, last: bool = False) -> MessageWriter:
        """A message for whole tiles, one row each.

        Args:
            tiles: At least one; their positions follow each other.
            header: For the stream's first message: puts header and schema before the batch.
            last: Whether to put the end-of-stream marker behind the batch.

        Raises:
            InvalidArgument: no tiles, or a tile of another shape than the format's where that is uniform.
            LimitExceeded: more elements than a record batch can hold.
        """
        if not tiles:
            raise InvalidArgument("a batch needs a tile", field="tiles")
        rows = [row_of(tile, 0) for tile in tiles]
        message = self._message(rows, [tile.shape for tile in tiles], header, last)
        message._first_position, message._tile_count = tiles[0].position, len(tiles)
        return message

    def slab(
        self,
        tile: Tile,
        slab: Slab,
        number: int,
        *,
        ends_tile: bool,
        header: Header | None = None,
        last: bool = False,
    ) -> MessageWriter:
        """A message for one slab of a tile; its ``pixels[0]`` has the slab's shape. The format must be variable.

        Args:
            tile: The tile.
            slab: Which part of the tile's delivered block.
            number: Which of its slabs, from 0.
            ends_tile: Whether it is the tile's last.
            header, last: As in :meth:`batch`.

        Raises:
            InvalidArgument: the format is uniform.
            LimitExceeded: more elements than a record batch can hold.
        """
        if not self.format.variable:
            raise InvalidArgument("slabs need a format of variable shapes", field="slab")
        message = self._message([row_of(tile, slab.offset)], [slab.shape], header, last)
        message._first_position, message._tile_count, message._slab = tile.position, int(ends_tile), number
        return message

    def _message(
        self, rows: list[tuple[int, ...]], shapes: list[tuple[int, ...]], header: Header | None, last: bool
    ) -> MessageWriter:
        format = self.format
        count = len(rows)
        ends: list[int] = []
        if format.variable:
            ends = list(accumulate(map(format.wire_elements, shapes)))
            layout = self._layout(count, ends[-1], header, last)
        else:
            if any(shape != format.tile_shape for shape in shapes):
                wrong = next(shape for shape in shapes if shape != format.tile_shape)
                raise InvalidArgument(f"a tile of shape {wrong} in a stream of {format.tile_shape}", field="tiles")
            encoded = b"" if header is None else header.SerializeToString()
            kept = format.layouts.get((count, encoded, last))
            if kept is None:
                kept = self._layout(count, count * format.wire_elements(format.tile_shape), header, last)
                if len(format.layouts) < _LAYOUTS_KEPT:
                    format.layouts[count, encoded, last] = kept
            layout = kept
        # See the module's docstring: no other reference to these bytes may exist.
        stream = io.BytesIO(_uninitialised(layout.size))
        buffer = stream.getbuffer()
        # All but the pixels, padding included: nobody is to be sent what this process's memory held before.
        buffer[: layout.pixels_at] = layout.prefix.ljust(layout.pixels_at, b"\0")
        buffer[layout.pixels_end :] = bytes(layout.size - layout.pixels_end)
        if last:
            buffer[-len(END_OF_STREAM) :] = END_OF_STREAM
        table = np.array(rows, dtype=np.int64)
        at = layout.columns_at
        np.ndarray((count,), np.int64, buffer, at)[:] = table[:, 0]
        at += layout.wide
        # The eight int32 columns are one block; its rows end in padding.
        np.ndarray((8, layout.narrow // 4), np.int32, buffer, at)[:, :count] = table[:, 1:9].T
        at += 8 * layout.narrow
        np.ndarray((count,), np.int64, buffer, at)[:] = table[:, 9]
        pixels: Array | list[Array]
        if not format.variable:
            pixels = np.ndarray((count, *format.tile_shape), format.dtype, buffer, layout.pixels_at)
        else:
            starts = [0, *ends]
            trailing = physical_dtype(format.dtype)[1]
            np.ndarray((count + 1,), np.int32, buffer, layout.offsets_at)[:] = starts
            np.ndarray((count, 5 + len(trailing)), np.int32, buffer, layout.shapes_at)[:] = [
                (*shape, *trailing) for shape in shapes
            ]
            itemsize = physical_dtype(format.dtype)[0].itemsize
            pixels = [
                np.ndarray(shape, format.dtype, buffer, layout.pixels_at + start * itemsize)
                for shape, start in zip(shapes, starts, strict=False)
            ]
        return MessageWriter(self, layout, stream, buffer, pixels, header, last)

    def _layout(self, rows: int, elements: int, header: Header | None, last: bool) -> _Layout:
        format = self.format
        if elements > _MAX_ELEMENTS:
            raise LimitExceeded(f"{elements} elements are too many for one message", field="tiles", value=elements)
        values, trailing = physical_dtype(format.dtype)
        narrow, wide = pad_to(4 * rows, ALIGNMENT), pad_to(8 * rows, ALIGNMENT)
        lengths = [rows] * len(COLUMNS)
        buffers: list[int] = []
        end = 0
        for dtype in COLUMNS.values():
            # Every array has a validity bitmap of no bytes: nothing is null.
            buffers += (end, 0, end, dtype.itemsize * rows)
            end += wide if dtype.itemsize == 8 else narrow
        offsets = shapes = end
        pixel_bytes = elements * values.itemsize
        if format.variable:
            pixels = offsets + pad_to(4 * (rows + 1), ALIGNMENT)
            shapes = pixels + pad_to(pixel_bytes, ALIGNMENT)
            dimensions = 5 + len(trailing)
            # In Arrow's order: struct; data, its items; shape, its items.
            lengths += (rows, rows, elements, rows, dimensions * rows)
            buffers += (offsets, 0, offsets, 0, offsets, 4 * (rows + 1), pixels, 0, pixels, pixel_bytes)
            buffers += (shapes, 0, shapes, 0, shapes, 4 * dimensions * rows)
            body = pad_to(shapes + 4 * dimensions * rows, 8)
        else:
            pixels = end
            lengths += (rows, elements)
            buffers += (pixels, 0, pixels, 0, pixels, pixel_bytes)
            body = pad_to(pixels + pixel_bytes, 8)
        metadata = format.template.fill(rows, lengths, buffers, body)
        if header is not None:
            metadata = self._schema + metadata
        tail = len(END_OF_STREAM) if last else 0
        before, fixed_at = head(header, len(metadata) + body + tail, len(metadata) + pixels)
        at = len(before) + len(metadata)
        return _Layout(
            before + metadata,
            fixed_at,
            len(before),
            at,
            narrow,
            wide,
            at + offsets,
            at + pixels,
            at + pixels + pixel_bytes,
            at + shapes,
            at + body + tail,
            lengths,
            buffers,
        )

    def packed(
        self, body: memoryview, layout: _Layout, codec: str, header: Header | None, last: bool
    ) -> tuple[bytearray, list[Any], int] | None:
        """A message's parts with its pixels compressed: everything before the body, the body's pieces, where the payload begins; ``None`` where that
        is no smaller.

        Only pixels are worth it: the columns stay as they are, which Arrow allows buffer by buffer.
        """
        places = list(zip(layout.buffers[::2], layout.buffers[1::2], strict=True))
        pixels_at = layout.pixels_at - layout.columns_at
        size = max(length for offset, length in places if offset == pixels_at)
        if self._codec is None or self._codec.name != codec:
            self._codec = pa.Codec(codec)
        squeezed = self._codec.compress(body[pixels_at : pixels_at + size])
        if len(squeezed) > _WORTHWHILE * size:
            return None
        pieces: list[Any] = []
        buffers: list[int] = []
        end = 0
        for offset, length in places:
            if not length:
                buffers += (end, 0)
                continue
            is_pixels = offset == pixels_at
            content = squeezed if is_pixels else body[offset : offset + length]
            total = _LENGTH.size + len(content)
            buffers += (end, total)
            pieces += (_LENGTH.pack(length if is_pixels else _NOT_COMPRESSED), content, bytes(-total % 8))
            end += pad_to(total, 8)
        metadata = self.format.compressed_template(codec).fill(layout.lengths[0], list(layout.lengths), buffers, end)
        if header is not None:
            metadata = self._schema + metadata
        tail = END_OF_STREAM if last else b""
        before, _ = head(header, len(metadata) + end + len(tail), len(metadata))
        return bytearray(before + metadata), [*pieces, tail], len(before)


class MessageWriter:
    """One message, its pixels still to come. Made by :class:`TileWriter`.

    Attributes:
        pixels: Where the pixels belong, all of which must be written before :meth:`finish` (they hold anything until then):
            ``pixels[i]`` is the (T, Z, C, H, W) block of row ``i``, in the view's dtype. One (N, T, Z, C, H, W) array where
            the stream is uniform, else a list of arrays. They lie in the message: after :meth:`finish` they must not be
            written any more.
        size: Bytes of the message.
    """

    __slots__ = (
        "_buffer",
        "_first_position",
        "_header",
        "_last",
        "_layout",
        "_packed",
        "_slab",
        "_stream",
        "_tile_count",
        "_writer",
        "pixels",
        "size",
    )

    def __init__(
        self,
        writer: TileWriter,
        layout: _Layout,
        stream: io.BytesIO,
        buffer: memoryview,
        pixels: Array | list[Array],
        header: Header | None,
        last: bool,
    ) -> None:
        self._stream: io.BytesIO | None = stream
        self._writer, self._layout, self._buffer = writer, layout, buffer
        self._header, self._last = header, last
        self._packed: tuple[bytearray, list[Any], int] | None = None
        self._first_position = self._tile_count = self._slab = 0
        self.pixels = pixels
        self.size = len(buffer)

    def compress(self, codec: str) -> None:
        """Compress the pixels, once they are all written, where that makes the message smaller; otherwise it stays as it is.

        Args:
            codec: ``lz4`` or ``zstd``.
        """
        body = self._buffer[self._layout.columns_at :]
        self._packed = self._writer.packed(body, self._layout, codec, self._header, self._last)
        body.release()

    def finish(self, *, queue_us: int = 0, gather_us: int = 0, encode_us: int = 0) -> bytes:
        """The message; uncopied where it is not compressed. Call it once.

        Args:
            queue_us, gather_us, encode_us: What it cost, in microseconds.
        """
        stream, self._stream = self._stream, None
        if stream is None:
            raise RuntimeError("the message is finished")
        checksum = 0
        if self._writer.checksum:
            began = time.perf_counter()
            checksum = self._checksum()
            encode_us += int((time.perf_counter() - began) * 1e6)
        write_fixed(
            self._buffer if self._packed is None else self._packed[0],
            self._layout.fixed_at,
            first_position=self._first_position,
            tile_count=self._tile_count,
            slab=self._slab,
            queue_us=queue_us,
            gather_us=gather_us,
            encode_us=encode_us,
            xxh3=checksum,
        )
        self.pixels = []
        if self._packed is not None:
            before, pieces, _ = self._packed
            self._packed = None
            return b"".join((before, *pieces))
        # getvalue() copies while the buffer is lent out. NumPy's arrays keep the BytesIO alive without borrowing from it, so this works
        # while a caller still holds some; were that to change, a copy would be slower and still right.
        with suppress(BufferError):
            self._buffer.release()
        return stream.getvalue()

    def _checksum(self) -> int:
        if self._packed is None:
            with self._buffer[self._layout.payload_at :] as payload:
                return xxh3_64_intdigest(payload)
        before, pieces, payload_at = self._packed
        hasher = xxh3_64(bytes(before[payload_at:]))
        for piece in pieces:
            hasher.update(piece)
        return hasher.intdigest()


def _uninitialised(size: int) -> bytes:
    """New bytes of any content."""
    return _new_bytes(None, size)  # type: ignore[no-any-return]


def row_of(tile: Tile, offset: int) -> tuple[int, ...]:
    """A row's numbers in the order of the columns.

    Args:
        tile: The row's tile.
        offset: Where in the tile its pixels begin.
    """
    chosen = tile.selection
    return (tile.number, tile.image, *tile.origin, len(chosen.z), chosen.h, chosen.w, offset)


def bare(header: Header | None, payload: bytes, *, checksum: bool) -> bytes:
    """A message without a batch."""
    before, fixed_at = head(header, len(payload), 0)
    message = bytearray(before + payload)
    write_fixed(
        message,
        fixed_at,
        first_position=0,
        tile_count=0,
        slab=0,
        queue_us=0,
        gather_us=0,
        encode_us=0,
        xxh3=xxh3_64_intdigest(payload) if checksum else 0,
    )
    return bytes(message)
