"""ReadTiles: from a checked request to the messages of its stream, pixels gathered straight into them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ome_tensor.errors import InvalidArgument, LimitExceeded, OmeTensorError
from ome_tensor.plan import ResolvedPlan
from ome_tensor.slabs import Slab, SlabSequence, split_into_slabs
from ome_tensor.tables import Image
from ome_tensor.tiling import Order, Tile, TileSequence, Tiling
from ome_tensor.view import TensorView, gather_slab, gather_tile
from ome_tensor_proto.batch_format import BatchFormat
from ome_tensor_proto.batches import MessageWriter, TileWriter
from ome_tensor_proto.v1 import tensor_service_pb2 as pb

from .rpc import Call
from .settings import Settings

__all__ = ["TileRead", "check_tiles"]

T = TypeVar("T")

#: The first batches are small and each is twice the one before: the first tile does not wait for a whole message of small tiles.
_FIRST_BATCH_TILES = 8

#: Most tiles in a batch: a row costs about 50 bytes and some microseconds whatever its pixels.
_MOST_BATCH_TILES = 4096

#: Most tiles in a batch that a client may ask for.
_MOST_ROWS = 65_536


def check_tiles(tiles: TileSequence, dtype: np.dtype, settings: Settings) -> None:
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
    points = len(tiles.selection.t)
    if tiles.order.shuffle and points > settings.max_tiles:
        raise LimitExceeded(
            f"the view has {points} time points; this server shuffles at most {settings.max_tiles}",
            field="order.shuffle",
            value=points,
        )
    if tiles.tiling.edge == "pad":
        tiles.tiling.pad_value(dtype)
    nbytes = math.prod(tiles.shape) * dtype.itemsize
    if tiles.tiling.kind in ("tiles", "tiles_3d", "windows") and nbytes > settings.max_tile_bytes:
        raise LimitExceeded(
            f"a tile of shape {tiles.shape} is {nbytes} bytes; this server sends at most {settings.max_tile_bytes} (max_tile_bytes)",
            field="tiling",
            value=tiles.shape,
        )


@dataclass(frozen=True, slots=True)
class TileRead:
    """One read, checked: nothing left that could be refused but damaged pixels.

    Attributes:
        image: The image.
        view: The view.
        resolved: What it shows: with ``arrow`` in the stored dtype.
        tiling, order: How it is cut.
        arrow: Whether the flat stored values are wanted.
        start_slab: Slabs of the first tile to skip.
        tiles_per_batch: As asked; 0 for the server's choice.
        message_bytes: Aim of a message's size.
        compression: ``none``, ``lz4`` or ``zstd``.
    """

    image: Image
    view: TensorView
    resolved: ResolvedPlan
    tiling: Tiling
    order: Order
    arrow: bool
    start_slab: int
    tiles_per_batch: int
    message_bytes: int
    compression: str = "none"

    @property
    def nbytes(self) -> int:
        """Bytes of its pixels; at most, where tiles at the edge are smaller."""
        tiles = TileSequence(self.resolved.selection if self.arrow else self.resolved.shown, self.tiling, self.order)
        return len(tiles) * math.prod(tiles.shape) * self.resolved.dtype.itemsize

    def messages(self, call: Call, settings: Settings) -> Iterator[bytes]:
        """The stream's messages. Ends early, without the end-of-stream marker, when nobody wants it any more."""
        call.tiles = 0
        # Stored values need the selection as it is: a channel policy does not make one chunk of several.
        tiles = TileSequence(self.resolved.selection if self.arrow else self.resolved.shown, self.tiling, self.order)
        itemsize = self.resolved.dtype.itemsize
        check_tiles(tiles, self.resolved.dtype, settings)
        if self.arrow:
            for tile in tiles:
                self.view.stored_values(tile.selection)
        largest = tiles.tile(0).shape if tiles.total else tiles.shape
        # A client that names a batch size wants each batch in one message, however large; one tile of it may be, too.
        bound = settings.max_message_bytes if self.tiles_per_batch else self.message_bytes
        in_slabs = math.prod(largest) * itemsize > bound
        rows = min(self.tiles_per_batch, len(tiles))
        if rows > 1 and (in_slabs or rows > _MOST_ROWS or rows * math.prod(largest) * itemsize > settings.max_message_bytes):
            raise LimitExceeded(
                f"tiles_per_batch (batch_size) {self.tiles_per_batch} is too many for tiles of shape {largest}: that is "
                f"{rows * math.prod(largest) * itemsize} bytes, and a batch is one message, of at most "
                f"{settings.max_message_bytes} bytes (max_message_bytes) and {_MOST_ROWS} tiles",
                field="tiles_per_batch",
                value=self.tiles_per_batch,
            )
        if self.start_slab and not in_slabs:
            raise InvalidArgument(
                "order.start_slab: these tiles do not come in slabs", field="order.start_slab", value=self.start_slab
            )
        writer = TileWriter(
            BatchFormat.of(
                largest,
                self.resolved.dtype,
                variable=in_slabs or not tiles.uniform,
                layout=self.resolved.layout,
                shape=self.resolved.shape if self.resolved.fits else (),
                key=self.image.key,
                dataset_version=self.image.dataset.version,
            )
        )
        # A view without elements has no record batches: its reader makes the empty tiles from their count.
        count = len(tiles) if tiles.total and math.prod(largest) else 0
        header = pb.ReadTilesHeader(
            dataset_version=self.image.dataset.version,
            tile_count=count,
            total_tiles=tiles.total,
            tile_shape=largest,
            dtype=self.resolved.dtype.name,
            slabs=in_slabs,
            slab_bytes=self.message_bytes if in_slabs else 0,
        )
        if count == 0:
            yield writer.opening(header, last=True)
            return
        first: pb.ReadTilesHeader | None = header
        queued = time.perf_counter()
        units: Iterator[_Batch | _Slab] = self._slabs(tiles) if in_slabs else self._batches(tiles, itemsize)
        # The end-of-stream marker rides with the last tile: a single read is a single message.
        for unit, is_last in _marked(units):
            began = time.perf_counter()
            message = unit.allocate(writer, first, is_last)
            made = time.perf_counter()
            try:
                unit.gather(self, message)
            except _DamagedTileError as damaged:
                # What was read before the damage is good, and its reader is owed it as if it had asked for one tile at a time.
                del message
                if damaged.good:
                    message = _Batch(damaged.good).allocate(writer, first, last=False)
                    _Batch(damaged.good).gather(self, message)
                    call.tiles += len(damaged.good)
                    yield message.finish()
                raise damaged.error from None
            # Whatever was written to the file meanwhile may be among what was gathered.
            self.image.dataset.check_unchanged()
            gathered = time.perf_counter()
            encoding = made - began
            if self.compression != "none":
                message.compress(self.compression)
                encoding += time.perf_counter() - gathered
            data = message.finish(queue_us=_us(began - queued), gather_us=_us(gathered - made), encode_us=_us(encoding))
            del message
            call.tiles += unit.tile_count
            first = None
            yield data
            if not call.is_active:
                return
            queued = time.perf_counter()

    def _batches(self, tiles: TileSequence, itemsize: int) -> Iterator[_Batch]:
        """Tiles in runs that fill a message, the first runs shorter."""
        batch: list[Tile] = []
        nbytes = 0
        most = self.tiles_per_batch or _FIRST_BATCH_TILES
        for tile in tiles:
            size = math.prod(tile.shape) * itemsize
            if batch and (len(batch) >= most or (not self.tiles_per_batch and nbytes + size > self.message_bytes)):
                yield _Batch(batch)
                if not self.tiles_per_batch:
                    most = min(2 * most, _MOST_BATCH_TILES)
                batch, nbytes = [], 0
            batch.append(tile)
            nbytes += size
        yield _Batch(batch)

    def _slabs(self, tiles: TileSequence) -> Iterator[_Slab]:
        """Every slab of every tile, in C order."""
        skip = self.start_slab
        for tile in tiles:
            slabs = split_into_slabs(tile.shape, self.resolved.dtype.itemsize, self.message_bytes)
            if skip >= len(slabs):
                raise InvalidArgument(f"order.start_slab: {skip} of {len(slabs)} slabs", field="order.start_slab", value=skip)
            for number in range(skip, len(slabs)):
                yield _Slab(tile, slabs, number)
            skip = 0

    def write_tile(self, tile: Tile, out: np.ndarray) -> None:
        """Write one whole tile into ``out``, a TZCYX array."""
        if self.arrow:
            out[...] = self.view.stored_values(tile.selection).reshape(out.shape)
        else:
            gather_tile(self.image.pixels, tile, self.tiling, out)

    def write_slab(self, tile: Tile, slab: Slab, out: np.ndarray) -> None:
        """Write one slab of a tile into ``out``, a TZCYX array."""
        if self.arrow:
            out[...] = self.view.stored_values(tile.selection)[slab.offset : slab.offset + out.size].reshape(out.shape)
        else:
            gather_slab(self.image.pixels, tile, self.tiling, slab, out)


@dataclass(frozen=True, slots=True)
class _Batch:
    """A message of whole tiles."""

    tiles: list[Tile]

    @property
    def tile_count(self) -> int:
        return len(self.tiles)

    def allocate(self, writer: TileWriter, header: pb.ReadTilesHeader | None, last: bool) -> MessageWriter:
        return writer.batch(self.tiles, header=header, last=last)

    def gather(self, read: TileRead, message: MessageWriter) -> None:
        for place, (tile, block) in enumerate(zip(self.tiles, message.pixels, strict=True)):
            try:
                read.write_tile(tile, block)
            except OmeTensorError as error:
                raise _DamagedTileError(self.tiles[:place], error) from error


@dataclass(frozen=True, slots=True)
class _Slab:
    """A message of one slab."""

    tile: Tile
    slabs: SlabSequence
    number: int

    @property
    def tile_count(self) -> int:
        return int(self.number == len(self.slabs) - 1)

    def allocate(self, writer: TileWriter, header: pb.ReadTilesHeader | None, last: bool) -> MessageWriter:
        ends_tile = bool(self.tile_count)
        return writer.slab(self.tile, self.slabs[self.number], self.number, ends_tile=ends_tile, header=header, last=last)

    def gather(self, read: TileRead, message: MessageWriter) -> None:
        try:
            read.write_slab(self.tile, self.slabs[self.number], message.pixels[0])
        except OmeTensorError as error:
            raise _DamagedTileError([], error) from error


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


def _us(seconds: float) -> int:
    return min(int(seconds * 1e6), 2**32 - 1)
