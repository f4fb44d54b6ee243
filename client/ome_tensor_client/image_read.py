"""One read of many images: its request, and what arrives as tiles or batches."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ome_tensor.batches import ImageBatch, batch_in_layout
from ome_tensor.errors import InvalidArgument, InvalidSelection, LimitExceeded
from ome_tensor.exports import in_layout
from ome_tensor.image_tiles import tiles_of
from ome_tensor.image_views import resolve_views
from ome_tensor.iteration import ImageTileArray
from ome_tensor.plan import PLAN_ARGUMENTS, Plan
from ome_tensor.prefetch import Prefetcher
from ome_tensor.tiling import Order, OrderedTiles, Tile, Tiling
from ome_tensor_proto.codec import compression_to_proto, order_to_proto, plan_to_proto, tiling_to_proto
from ome_tensor_proto.v1 import tensor_service_pb2 as pb

from .read_stats import ReadStats
from .received import uniform_batches, whole_tiles
from .running import Running
from .tile_stream import TileStream

if TYPE_CHECKING:
    from .image_set import ImageSet

__all__ = ["ImageRead"]

T = TypeVar("T", ImageTileArray, ImageBatch)

#: A request lists its rows, and servers take 4 MiB: so many take 3 MiB at most, those of a usual table much less.
_MOST_IMAGES = 600_000


def _nbytes(item: ImageTileArray | ImageBatch) -> int:
    """Bytes of pixels, with what came beside them."""
    return int(item.array.nbytes) + sum(part.nbytes for part in item.beside.values())


class ImageRead:
    """One read of a set of images, its arguments checked.

    Args:
        images: The images.
        tiling, order: How they are cut.
        beside: Columns that come beside.
        selection: The plan's arguments.
        stats: Where to add what reading costs.

    Attributes:
        enumeration: All its tiles, in row-major order; ``None`` where there are no images.
    """

    def __init__(
        self,
        images: ImageSet,
        tiling: Tiling,
        order: Order,
        beside: Sequence[str],
        selection: dict[str, Any],
        stats: ReadStats | None = None,
    ) -> None:
        unknown = selection.keys() - set(PLAN_ARGUMENTS)
        if unknown:
            raise TypeError(f"unexpected keyword argument {sorted(unknown)[0]!r}")
        if selection.get("tile") is not None:
            raise InvalidArgument("tile= is of one image's chunk grid; use roi=", field="tile", value=selection["tile"])
        if isinstance(beside, str) or not all(isinstance(name, str) for name in beside):
            raise InvalidArgument(f"beside must be a list of column names, not {beside!r}", field="beside", value=beside)
        if len(images) > _MOST_IMAGES:
            raise LimitExceeded(
                f"one read takes at most {_MOST_IMAGES} images, not {len(images)}: read parts of the set (images[:n])",
                field="rows",
                value=len(images),
            )
        if order.shuffle and order.seed is None:
            # A random order that can be resumed is one whose seed is known.
            order = replace(order, seed=secrets.randbits(64))
        self._images = images
        self._plan = Plan.of(dict.fromkeys(PLAN_ARGUMENTS) | {"channel_policy": "error"} | selection)
        self._beside = list(beside)
        self._tiling, self._order = tiling, order
        self.stats = stats
        self._running = Running()
        self._tiles: OrderedTiles | None = None
        self.enumeration: OrderedTiles | None = None
        if len(images):
            self._views, self._of = resolve_views(self._plan, images.shapes, images.dtypes, images.key)
            selections = [view.shown for view in self._views]
            if tiling.edge == "pad":
                tiling.pad_value(self._views[0].dtype)
            self._tiles = tiles_of(selections, self._of, tiling, order)
            # Only a shuffle of one image's time points changes what a tile's number means; the order itself is the server's to compute.
            own = order if tiling.kind == "time_batches" and len(images) == 1 else Order()
            self.enumeration = tiles_of(selections, self._of, tiling, own)

    def reordered(self, order: Order) -> ImageRead:
        """The same read in another order of its tiles; not of time batches. Raises InvalidArgument where a span leads beyond their end."""
        again = copy(self)
        again._order = order
        # What ends one is not to end the other.
        again._running = Running()
        if len(self._images):
            again._tiles = tiles_of([view.shown for view in self._views], self._of, self._tiling, order)
        return again

    def frames(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each image's view along t, z, y, x: its first index, and its length. (n, 4) each."""
        views = self._views if len(self._images) else []
        shown = [view.shown for view in views]
        firsts = np.array([(s.t[0] if s.t else 0, s.z[0] if s.z else 0, s.y, s.x) for s in shown], np.int64).reshape(-1, 4)
        lengths = np.array([(len(s.t), len(s.z), s.h, s.w) for s in shown], np.int64).reshape(-1, 4)
        return (firsts[self._of], lengths[self._of]) if views else (firsts, lengths)

    @property
    def has_runs(self) -> bool:
        """Whether every view's t and z follow each other without gaps."""
        chosen = [axis for view in (self._views if len(self._images) else []) for axis in (view.shown.t, view.shown.z)]
        return all(isinstance(axis, range) and (axis.step == 1 or len(axis) < 2) for axis in chosen)

    @property
    def _is_empty(self) -> bool:
        """Whether no view has an element: nothing of such tiles travels."""
        is_empty = self._tiles is not None and not math.prod(self._tiles.largest)
        if is_empty and self._beside:
            raise InvalidSelection("the views have no elements: nothing comes beside them", field="beside", value=self._beside[0])
        return is_empty

    def _stream(self, batch_size: int) -> TileStream | None:
        """What arrives; ``None`` where nothing will."""
        images, tiles = self._images, self._tiles
        if tiles is None or not len(tiles) or self._is_empty:
            return None
        options = images._connection.options
        request = pb.ReadTilesRequest(
            image_rows=pb.ImageRows(dataset=images.dataset, column=images.column, rows=images.rows.tolist()),
            view=plan_to_proto(self._plan),
            tiling=tiling_to_proto(self._tiling),
            order=order_to_proto(self._order),
            tiles_per_batch=min(batch_size, 2**32 - 1),
            if_version=images.version,
            pyramid_level=images.level,
            max_message_bytes=options.message_bytes,
            compression=compression_to_proto("none" if options.compression == "auto" else options.compression),
            beside=self._beside,
        )
        return self._running.begin(TileStream(images._connection, request, len(tiles), self.stats))

    def cancel(self) -> None:
        """End the read that was begun last, and any that is begun later, from any thread."""
        self._running.cancel()

    def tiles(self, prefetch: int, contiguous: bool) -> Iterator[ImageTileArray]:
        """The tiles, each checked to be the one that its number says."""
        stream = self._stream(0)
        if stream is None:
            return self._empty_tiles(contiguous)
        return self._ahead(self._delivered(stream, contiguous), prefetch, stream)

    def _ahead(self, found: Iterator[T], prefetch: int, stream: TileStream) -> Iterator[T]:
        """What is found, read ahead where that is asked for."""
        if not prefetch:
            return found
        options = self._images._connection.options
        return Prefetcher(found, prefetch, max_bytes=options.prefetch_bytes, size=_nbytes, cancel=stream.cancel)

    def _delivered(self, stream: TileStream, contiguous: bool) -> Iterator[ImageTileArray]:
        assert self.enumeration is not None
        for tile, block, beside in whole_tiles(stream, self.enumeration):
            yield self._shown(tile, block, beside, contiguous)

    def _empty_tiles(self, contiguous: bool) -> Iterator[ImageTileArray]:
        """The tiles of views without elements."""
        for tile in self._tiles or ():
            yield self._shown(tile, np.empty(tile.shape, self._views[0].dtype), (), contiguous)

    def _shown(self, tile: Tile, block: np.ndarray, beside: Sequence[np.ndarray], contiguous: bool) -> ImageTileArray:
        """A tile as its reader gets it; of a view without elements nothing comes beside it, nor was asked to."""
        layout, shown = self._views[0].layout, tile.selection
        return ImageTileArray(
            in_layout(block, layout, contiguous),
            tile.number,
            tile.position,
            tile.origin,
            (len(shown.z), shown.h, shown.w),
            tile.image,
            int(self._images.rows[tile.image]),
            {name: in_layout(part, layout, contiguous) for name, part in zip(self._beside, beside, strict=True)},
        )

    def _empty_batches(self, size: int, contiguous: bool) -> Iterator[ImageBatch]:
        """Batches of such tiles."""
        tiles = self._tiles
        for first in range(0, 0 if tiles is None else len(tiles), size):
            assert tiles is not None
            view, numbers = self._views[0], tiles.numbers(first, size)
            table, images = tiles.table(numbers), tiles.images(numbers)
            pixels = batch_in_layout(np.empty((len(numbers), *tiles.shape), view.dtype), view.layout, contiguous)
            rows = self._images.rows[images]
            yield ImageBatch(pixels, numbers, tiles.order.start + first, table[:, :4], table[:, 4:], images, rows, {})

    def batches(self, size: int, prefetch: int, contiguous: bool) -> Iterator[ImageBatch]:
        """Batches of ``size`` tiles."""
        if self._tiles is not None and not self._tiles.uniform:
            raise InvalidArgument(
                "tiles of these images differ in shape: a batch has tiles of one", field="tile_size", value=self._tiles.shape
            )
        stream = self._stream(size)
        if stream is None:
            return self._empty_batches(size, contiguous)
        return self._ahead(self._arriving(stream, size, contiguous), prefetch, stream)

    def _arriving(self, stream: TileStream, size: int, contiguous: bool) -> Iterator[ImageBatch]:
        assert self._tiles is not None
        assert self.enumeration is not None
        layout, rows = self._views[0].layout, self._images.rows
        for position, numbers, table, pixels, beside in uniform_batches(stream, self.enumeration, size, len(self._tiles)):
            images = self.enumeration.images(numbers)
            yield ImageBatch(
                batch_in_layout(pixels, layout, contiguous),
                numbers,
                position,
                table[:, :4],
                table[:, 4:],
                images,
                rows[images],
                {name: batch_in_layout(part, layout, contiguous) for name, part in zip(self._beside, beside, strict=True)},
            )
