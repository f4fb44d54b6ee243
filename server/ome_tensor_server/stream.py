"""ReadTiles: from a checked request to the messages of its stream, pixels gathered straight into them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
from xxhash import xxh3_64_intdigest

from ome_tensor.errors import InvalidArgument, LimitExceeded, OmeTensorError
from ome_tensor.image_tiles import tiles_of
from ome_tensor.slabs import Slab, SlabSequence, split_into_slabs
from ome_tensor.tiling import Order, OrderedTiles, Tile, TileSequence, Tiling
from ome_tensor.view import gather_slab, gather_tile
from ome_tensor_proto.batch_format import BatchFormat
from ome_tensor_proto.batches import MessageWriter, TileWriter
from ome_tensor_proto.beside import BesideMessage, BesideWriter
from ome_tensor_proto.v1 import tensor_service_pb2 as pb

from .calls import Call
from .reads import ReadImages
from .settings import Settings
from .turns import Turn

__all__ = ["TileRead", "check_tiles"]

T = TypeVar("T")

#: The first batches are small and each is twice the one before: the first tile does not wait for a whole message of small tiles.
_FIRST_BATCH_TILES = 8

#: Most tiles in a batch: a row costs about 50 bytes and some microseconds whatever its pixels.
_MOST_BATCH_TILES = 4096

#: Most tiles in a batch that a client may ask for.
_MOST_ROWS = 65_536


Writer: TypeAlias = TileWriter | BesideWriter
Message: TypeAlias = MessageWriter | BesideMessage


def check_tiles(tiles: OrderedTiles, dtype: np.dtype, settings: Settings) -> None:
    """LimitExceeded where there are more tiles than the server enumerates, or larger ones than it sends.

    A whole view is one tile too, but the one that comes in slabs anyway; it is bounded by the image.
    """
    if tiles.total > settings.max_tiles:
        if tiles.tiling.origins is not None:
            raise LimitExceeded(
                f"the request lists {tiles.total} windows; this server reads at most {settings.max_tiles} at once (max_tiles)",
                field="tiling.windows",
                value=tiles.total,
            )
        raise LimitExceeded(
            f"the view has {tiles.total} tiles; this server reads at most {settings.max_tiles} at once",
            field="tiling",
            value=tiles.total,
        )
    points = len(tiles.selection.t) if isinstance(tiles, TileSequence) else 0
    if tiles.order.shuffle and points > settings.max_tiles:
        raise LimitExceeded(
            f"the view has {points} time points; this server shuffles at most {settings.max_tiles}",
            field="order.shuffle",
            value=points,
        )
    if tiles.tiling.edge == "pad":
        tiles.tiling.pad_value(dtype)
    # Of a view without elements, too: no format has a place for a side of 2**63.
    nbytes = math.prod(max(1, side) for side in tiles.shape) * dtype.itemsize
    if tiles.tiling.kind in ("tiles", "tiles_3d", "windows", "centred") and nbytes > settings.max_tile_bytes:
        raise LimitExceeded(
            f"a tile of shape {tiles.shape} is {nbytes} bytes; this server sends at most {settings.max_tile_bytes} (max_tile_bytes)",
            field="tiling",
            value=tiles.shape,
        )


@dataclass(frozen=True, slots=True)
class TileRead:
    """One read, checked: nothing left that could be refused but damaged pixels.

    Attributes:
        images: Its images, and what is to be seen of them.
        tiling, order: How they are cut.
        start_slab: Slabs of the first tile to skip.
        tiles_per_batch: As asked; 0 for the server's choice.
        message_bytes: Aim of a message's size.
        compression: ``none``, ``lz4`` or ``zstd``.
        checksum: Whether each message brings one, and the first one that of the request.
    """

    images: ReadImages
    tiling: Tiling
    order: Order
    start_slab: int
    tiles_per_batch: int
    message_bytes: int
    compression: str = "none"
    checksum: bool = False

    @property
    def dtype(self) -> np.dtype:
        """Of the pixels."""
        return self.images.dtype

    @property
    def arrow(self) -> bool:
        """Whether the flat stored values are wanted."""
        return self.images.arrow

    def tiles(self) -> OrderedTiles:
        """Its tiles."""
        return tiles_of(self.images.selections, self.images.of, self.tiling, self.order)

    @property
    def nbytes(self) -> int:
        """Bytes of its pixels; at most, where tiles differ in size."""
        tiles = self.tiles()
        return len(tiles) * math.prod(tiles.largest) * self.dtype.itemsize

    def messages(self, call: Call, settings: Settings, turn: Turn) -> Iterator[bytes]:
        """The stream's messages. Ends early, without the end-of-stream marker, when nobody wants it any more.

        Args:
            call: The call.
            settings: The server's limits.
            turn: The stream's place in line.
        """
        call.tiles = 0
        images, tiles = self.images, self.tiles()
        check_tiles(tiles, self.dtype, settings)
        if self.arrow:
            for tile in tiles:
                values = images.view(tile.image).stored_values(tile.selection)
                if len(images) > 1 and values.dtype != self.dtype:
                    raise InvalidArgument(
                        f"{images.key(tile.image)} stores {values.dtype}, and {images.key(0)} {self.dtype}: a stream has one dtype",
                        field="view.mode",
                        value=values.dtype.name,
                    )
        largest = tiles.largest
        shapes = [largest, *(self._shape_beside(number, largest) for number in range(len(images.beside)))]
        # Of one tile, with what comes beside it.
        tile_bytes = sum(
            math.prod(shape) * dtype.itemsize
            for shape, dtype in zip(shapes, (self.dtype, *(one.dtype for one in images.beside)), strict=True)
        )
        # A client that names a batch size wants each batch in one message, however large; one tile of it may be, too.
        bound = settings.max_message_bytes if self.tiles_per_batch else self.message_bytes
        in_slabs = tile_bytes > bound and not (images.beside and tile_bytes <= settings.max_message_bytes)
        if in_slabs and images.beside:
            raise LimitExceeded(
                f"a tile of shape {largest} is {tile_bytes} bytes with what comes beside it; this server sends at most "
                f"{settings.max_message_bytes} (max_message_bytes) in one piece: ask for smaller tiles",
                field="beside",
                value=tile_bytes,
            )
        rows = min(self.tiles_per_batch, len(tiles))
        if rows > 1 and (in_slabs or rows > _MOST_ROWS or rows * tile_bytes > settings.max_message_bytes):
            raise LimitExceeded(
                f"tiles_per_batch (batch_size) {self.tiles_per_batch} is too many for tiles of shape {largest}: that is "
                f"{rows * tile_bytes} bytes, and a batch is one message, of at most "
                f"{settings.max_message_bytes} bytes (max_message_bytes) and {_MOST_ROWS} tiles",
                field="tiles_per_batch",
                value=self.tiles_per_batch,
            )
        if self.start_slab and not in_slabs:
            raise InvalidArgument(
                "order.start_slab: these tiles do not come in slabs", field="order.start_slab", value=self.start_slab
            )
        resolved = images.views[0]
        format = BatchFormat.of(
            largest,
            self.dtype,
            variable=in_slabs or not tiles.uniform,
            layout=resolved.layout,
            shape=resolved.shape if resolved.fits and len(images) == 1 else (),
            key=images.key(0),
            dataset_version=images.dataset.version,
        )
        writer: Writer = TileWriter(format, checksum=self.checksum)
        if images.beside:
            writer = BesideWriter(
                format,
                [self._format_beside(number, shapes[1 + number], tiles) for number in range(len(images.beside))],
                checksum=self.checksum,
            )
        # A view without elements has no record batches: its reader makes the empty tiles from their count.
        count = len(tiles) if tiles.total and math.prod(largest) else 0
        header = pb.ReadTilesHeader(
            dataset_version=images.dataset.version,
            tile_count=count,
            total_tiles=tiles.total,
            tile_shape=largest,
            dtype=self.dtype.name,
            slabs=in_slabs,
            slab_bytes=self.message_bytes if in_slabs else 0,
            beside=[
                pb.Beside(column=one.column, dtype=one.dtype.name, tile_shape=shape)
                for one, shape in zip(images.beside, shapes[1:], strict=True)
            ],
            request_xxh3=xxh3_64_intdigest(call.request) if self.checksum else 0,
        )
        if count == 0:
            yield writer.opening(header, last=True)
            return
        first: pb.ReadTilesHeader | None = header
        queued = time.perf_counter()
        units: Iterator[_Batch | _Slab] = (
            self._slabs(tiles) if in_slabs else self._batches(tiles, tile_bytes / max(1, math.prod(largest)))
        )
        # The end-of-stream marker rides with the last tile: a single read is a single message.
        for unit, is_last in _marked(units):
            turn.begin(unit.size(tile_bytes, self.message_bytes), lambda: call.is_active)
            began = time.perf_counter()
            message = unit.allocate(self, writer, first, is_last)
            made = time.perf_counter()
            try:
                unit.gather(self, message)
            except _DamagedTileError as damaged:
                # What was read before the damage is good, and its reader is owed it as if it had asked for one tile at a time.
                del message
                data = self._rescued(damaged.good, writer, first)
                if data is not None:
                    call.tiles += len(damaged.good)
                    turn.made()
                    _count(call, data, len(damaged.good))
                    yield data
                raise damaged.error from None
            # Whatever was written to the file meanwhile may be among what was gathered.
            images.dataset.check_unchanged()
            gathered = time.perf_counter()
            encoding = made - began
            if self.compression != "none":
                message.compress(self.compression)
                encoding += time.perf_counter() - gathered
            data = message.finish(queue_us=_us(began - queued), gather_us=_us(gathered - made), encode_us=_us(encoding))
            del message
            turn.made()
            call.tiles += unit.tile_count
            first = None
            _count(call, data, unit.tile_count)
            offered = time.perf_counter()
            yield data
            del data
            turn.taken()
            taken = time.perf_counter()
            phases = (("queue", began - queued), ("gather", gathered - made), ("encode", encoding), ("send", taken - offered))
            call.meters.observe_all("phase_seconds", phases)
            if not call.is_active:
                return
            queued = taken

    def _rescued(self, tiles: list[Tile], writer: Writer, first: pb.ReadTilesHeader | None) -> bytes | None:
        """A message of the tiles before a damaged one; ``None`` where there are none, or where by now they cannot be read either: a source that has
        changed is damaged as a whole.
        """
        if not tiles:
            return None
        batch = _Batch(tiles)
        message = batch.allocate(self, writer, first, last=False)
        try:
            batch.gather(self, message)
        except _DamagedTileError:
            return None
        return message.finish()

    def _shape_beside(self, number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The largest shape of what comes beside a tile of a shape."""
        t, z, c, h, w = shape
        return t, z, c if (self.images.beside[number].channels != 1).any() else 1, h, w

    def _format_beside(self, number: int, shape: tuple[int, ...], tiles: OrderedTiles) -> BatchFormat:
        """The format of a column that comes beside: its tiles differ in shape where its images differ in having one channel."""
        one = self.images.beside[number]
        is_single = one.channels == 1
        return BatchFormat(shape, one.dtype, not tiles.uniform or bool(is_single.any() and not is_single.all() and shape[2] != 1))

    def _batches(self, tiles: OrderedTiles, itemsize: float) -> Iterator[_Batch]:
        """Tiles in runs that fill a message, the first runs shorter.

        Args:
            tiles: The tiles.
            itemsize: Bytes of an element, with what comes beside it.
        """
        batch: list[Tile] = []
        nbytes = 0.0
        most = self.tiles_per_batch or _FIRST_BATCH_TILES
        for tile in tiles:
            size = math.prod(tile.shape) * itemsize
            if batch and (len(batch) >= most or (not self.tiles_per_batch and nbytes + size > self.message_bytes)):
                yield _Batch(batch)
                if not self.tiles_per_batch:
                    most = min(2 * most, _MOST_BATCH_TILES)
                batch, nbytes = [], 0.0
            batch.append(tile)
            nbytes += size
        yield _Batch(batch)

    def _slabs(self, tiles: OrderedTiles) -> Iterator[_Slab]:
        """Every slab of every tile, in C order."""
        skip = self.start_slab
        for tile in tiles:
            slabs = split_into_slabs(tile.shape, self.dtype.itemsize, self.message_bytes)
            if skip >= len(slabs):
                raise InvalidArgument(f"order.start_slab: {skip} of {len(slabs)} slabs", field="order.start_slab", value=skip)
            for number in range(skip, len(slabs)):
                yield _Slab(tile, slabs, number)
            skip = 0

    def write_tile(self, tile: Tile, out: np.ndarray) -> None:
        """Write one whole tile into ``out``, a TZCYX array."""
        if self.arrow:
            out[...] = self.images.view(tile.image).stored_values(tile.selection).reshape(out.shape)
        else:
            gather_tile(self.images.pixels(tile.image), tile, self.tiling, out)

    def write_beside(self, number: int, tile: Tile, out: np.ndarray) -> None:
        """Write what comes beside a tile into ``out``, a TZCYX array."""
        gather_tile(self.images.pixels_beside(number, tile.image), self.images.tile_beside(number, tile), self.tiling, out)

    def write_slab(self, tile: Tile, slab: Slab, out: np.ndarray) -> None:
        """Write one slab of a tile into ``out``, a TZCYX array."""
        if self.arrow:
            values = self.images.view(tile.image).stored_values(tile.selection)
            out[...] = values[slab.offset : slab.offset + out.size].reshape(out.shape)
        else:
            gather_slab(self.images.pixels(tile.image), tile, self.tiling, slab, out)

    def named(self, tile: Tile, error: OmeTensorError) -> OmeTensorError:
        """An error of a tile, saying of which image it is where there are several."""
        if len(self.images) == 1:
            return error
        return type(error)(f"{self.images.key(tile.image)}: {error.message}", field=error.field, value=error.value)


@dataclass(frozen=True, slots=True)
class _Batch:
    """A message of whole tiles."""

    tiles: list[Tile]

    @property
    def tile_count(self) -> int:
        return len(self.tiles)

    def size(self, tile_bytes: int, slab_bytes: int) -> int:
        return len(self.tiles) * tile_bytes

    def allocate(self, read: TileRead, writer: Writer, header: pb.ReadTilesHeader | None, last: bool) -> Message:
        if isinstance(writer, TileWriter):
            return writer.batch(self.tiles, header=header, last=last)
        beside = [[read.images.tile_beside(number, tile) for tile in self.tiles] for number in range(len(writer.beside))]
        return writer.batch(self.tiles, beside, header=header, last=last)

    def gather(self, read: TileRead, message: Message) -> None:
        blocks = [message.pixels] if isinstance(message, MessageWriter) else message.blocks
        for place, tile in enumerate(self.tiles):
            try:
                read.write_tile(tile, blocks[0][place])
                for number, beside in enumerate(blocks[1:]):
                    read.write_beside(number, tile, beside[place])
            except OmeTensorError as error:
                raise _DamagedTileError(self.tiles[:place], read.named(tile, error)) from error


@dataclass(frozen=True, slots=True)
class _Slab:
    """A message of one slab."""

    tile: Tile
    slabs: SlabSequence
    number: int

    @property
    def tile_count(self) -> int:
        return int(self.number == len(self.slabs) - 1)

    def size(self, tile_bytes: int, slab_bytes: int) -> int:
        return min(tile_bytes, slab_bytes)

    def allocate(self, read: TileRead, writer: Writer, header: pb.ReadTilesHeader | None, last: bool) -> Message:
        assert isinstance(writer, TileWriter)
        ends_tile = bool(self.tile_count)
        return writer.slab(self.tile, self.slabs[self.number], self.number, ends_tile=ends_tile, header=header, last=last)

    def gather(self, read: TileRead, message: Message) -> None:
        assert isinstance(message, MessageWriter)
        try:
            read.write_slab(self.tile, self.slabs[self.number], message.pixels[0])
        except OmeTensorError as error:
            raise _DamagedTileError([], read.named(self.tile, error)) from error


class _DamagedTileError(Exception):
    """A tile of a message cannot be read.

    Attributes:
        good: The tiles before it.
        error: Why.
    """

    def __init__(self, good: list[Tile], error: OmeTensorError) -> None:
        super().__init__(str(error))
        self.good = good
        self.error = error


def _marked(units: Iterator[T]) -> Iterator[tuple[T, bool]]:
    """Each unit, and whether it is the last."""
    try:
        unit = next(units)
    except StopIteration:
        return
    for following in units:
        yield unit, False
        unit = following
    yield unit, True


def _count(call: Call, data: bytes, tiles: int) -> None:
    call.meters.add_all(messages=1, tiles=tiles, sent_bytes=len(data))


def _us(seconds: float) -> int:
    return min(int(seconds * 1e6), 2**32 - 1)
