"""Remote views: the same TensorView and LazyTensorView as locally, their pixels behind a server."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ome_tensor.batches import BatchArray, batch_in_layout
from ome_tensor.errors import BrokenStream, DatasetChanged, DatasetNotFound, ImageNotFound, OmeTensorError
from ome_tensor.exports import TensorExports, in_layout
from ome_tensor.keys import parse_key
from ome_tensor.layout import AXES, apply_layout
from ome_tensor.lazy import Arguments
from ome_tensor.pixels import DensePixels
from ome_tensor.plan import Plan, ResolvedPlan
from ome_tensor.prefetch import Prefetcher
from ome_tensor.selection import Region, Selection, as_index
from ome_tensor.slabs import split_into_slabs
from ome_tensor.tiling import Order, Tile, TileSequence, Tiling
from ome_tensor.view import TensorView, view_of_image
from ome_tensor_proto.codec import compression_to_proto, order_to_proto, plan_to_proto, selection_from_proto, tiling_to_proto
from ome_tensor_proto.listing import image_from_proto
from ome_tensor_proto.v1 import tensor_service_pb2 as pb

from .dealt import deal, taken_back
from .known_images import KnownImage
from .received import uniform_batches, whole_tiles
from .running import Running
from .tile_stream import TileStream, read_one

if TYPE_CHECKING:
    from .connection import Connection

__all__ = ["RemoteSource"]

TileAndArray = tuple[Tile, np.ndarray]

#: Views of at most so many bytes are described from memory: of a larger one a round trip is no part worth saving, and the server's limits are
#: better heard before room for it is made.
_SMALL = 16 << 20

_IN_ORDER = Order()

#: A whole read of at most so many bytes is expected in one message: servers are set to aim at 1 MiB.
_ONE_MESSAGE = 512 << 10

#: Windows listed in one request: some 400 KiB for images of common sizes, 2.5 MiB at most; a server takes 4 MiB.
_MOST_WINDOWS = 65_536


class RemoteSource:
    """The source of one image's lazy views: a server and a key. Pickles.

    Args:
        connection: The server.
        key: The image's key.
        level: Of its resolution pyramid.
    """

    def __init__(self, connection: Connection, key: str, level: int = 0) -> None:
        self.connection = connection
        self.key = key
        self.level = level

    def open(self, arguments: Arguments) -> TensorView:
        """Describe the plan: from the mapped dataset, or by one ResolveView call. See :meth:`ome_tensor.lazy.Source.open`."""
        plan = Plan.of(arguments)
        mapped = self._mapped(plan)
        return self.described(plan) if mapped is None else mapped

    def _mapped(self, plan: Plan) -> TensorView | None:
        key = parse_key(self.key)
        table = self.connection.mapped.table(key.dataset)
        if table is None:
            return None
        if self.level:
            # Levels that the server makes are not in the file.
            image = table.image(key.column, key.row)
            if self.level >= len(table.levels(image.column, image.row)):
                return None
        return view_of_image(table.image(key.column, key.row, self.level).pixels, plan)

    def described(self, plan: Plan) -> RemoteView:
        """A view of the image as its server describes it now, whether or not it is mapped; one call."""
        answer = self.connection.call(
            "ResolveView",
            pb.ResolveViewRequest(key=self.key, view=plan_to_proto(plan), pyramid_level=self.level),
            pb.ResolveViewResponse,
        )
        meta = image_from_proto(answer.image).meta
        if meta is None:
            raise BrokenStream(f"the server describes {self.key!r} without its size or dtype")
        known = KnownImage(answer.key, meta, answer.dataset_version, self.level)
        self.connection.images.put(self.key, known)
        resolved = ResolvedPlan(
            selection_from_proto(answer.selection), answer.layout, np.dtype(answer.dtype), plan.channel_policy
        )
        return RemoteView.of_pixels(RemotePixels(self.connection, known), resolved, plan.dtype)

    def read(self, arguments: Arguments) -> tuple[TensorView, TensorView]:
        """Describe and fetch: in one round trip where the image is known already and the view is small. The read names the version that it was
        described by, so what is remembered can be out of date and still never wrong. See :meth:`ome_tensor.lazy.Source.read`."""
        plan = Plan.of(arguments)
        opened = self._mapped(plan)
        if opened is not None:
            return opened, opened
        remembered = self._remembered(plan)
        if remembered is not None:
            try:
                return remembered, self.collect(remembered)
            except (DatasetChanged, DatasetNotFound, ImageNotFound):
                self.connection.images.forget(self.key, self.level)
        opened = self.described(plan)
        return opened, self.collect(opened)

    def _remembered(self, plan: Plan) -> RemoteView | None:
        known = self.connection.images.get(self.key, self.level)
        if known is None:
            return None
        try:
            resolved = plan.resolve(known.meta.extent, known.meta.dtype, known.meta.grid)
        except OmeTensorError:
            return None  # It may fit the image as it is by now: for its server to say.
        if resolved.nbytes > _SMALL:
            return None
        return RemoteView.of_pixels(RemotePixels(self.connection, known), resolved, plan.dtype)

    def collect(self, opened: TensorExports) -> TensorView:
        """Fetch the pixels, once, into memory that the view keeps; what is mapped is in reach already."""
        assert isinstance(opened, TensorView)
        if not isinstance(opened, RemoteView):
            return opened
        resolved = opened.resolved
        shown = opened.read_shown()
        pixels = DensePixels(resolved.shown, shown, beyond=opened.pixels)
        return TensorView.of_pixels(pixels, resolved, opened.override, memory=apply_layout(shown, resolved.layout))


def _put(block: np.ndarray, out: np.ndarray) -> None:
    if out.shape != block.shape or block.dtype != out.dtype:
        raise BrokenStream(f"a {block.dtype} block of {block.shape} arrived for {out.dtype} {out.shape}")
    out[...] = block


class RemotePixels:
    """The pixels of one version of an image on a server.

    Args:
        connection: The server.
        image: What is known of the image; another version's pixels are refused.
    """

    def __init__(self, connection: Connection, image: KnownImage) -> None:
        self.connection = connection
        self.key = image.key
        self.meta = image.meta
        self.version = image.version
        self.level = image.level

    @property
    def stored_dtype(self) -> np.dtype | None:
        """Only the server knows."""
        return None

    def gather(self, selection: Selection, out: np.ndarray) -> None:
        """Read a selection into ``out``; a large one comes in slabs, each copied to its place as it arrives."""
        if out.size == 0:
            return
        request = self.request(selection, out.dtype, Tiling(), Order(), arrow=False)
        if out.nbytes <= _ONE_MESSAGE and self.connection.options.compression != "auto":
            batch = read_one(self.connection, request)
            if batch is not None:
                _put(batch.pixels[0], out)
                return
        delivered = 0
        with closing(TileStream(self.connection, request, expected=1)) as stream:
            for batch in stream:
                block, place = batch.pixels[0], tuple(slice(length) for length in out.shape)
                if stream.header.slabs:
                    slab = split_into_slabs(out.shape, out.dtype.itemsize, stream.header.slab_bytes)[batch.slab]
                    place = tuple(slice(first, first + count) for first, count in zip(slab.origin, slab.shape, strict=True))
                _put(block, out[place])
                delivered += block.size
        if delivered != out.size:
            raise BrokenStream(f"{delivered} of {out.size} pixels arrived")

    def flat_values(self, selection: Selection) -> np.ndarray:
        """The stored values of one plane or chunk, 1-D, in private memory."""
        request = self.request(selection, None, Tiling(), Order(), arrow=True)
        with closing(TileStream(self.connection, request, expected=1)) as stream:
            parts = [batch.pixels[0].reshape(-1) for batch in stream]
        if sum(part.size for part in parts) != selection.size:
            raise BrokenStream(f"{sum(part.size for part in parts)} of {selection.size} stored values arrived")
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def request(
        self, selection: Selection, dtype: np.dtype | None, tiling: Tiling, order: Order, *, arrow: bool
    ) -> pb.ReadTilesRequest:
        """The request for tiles of a selection that is fitted to the image already."""
        plan = Plan(
            as_index(selection.t),
            as_index(selection.z),
            as_index(selection.c),
            Region("roi", selection.roi),
            AXES,
            None if arrow else dtype,
        )
        compression = self.connection.options.compression
        return pb.ReadTilesRequest(
            keys=[self.key],
            view=plan_to_proto(plan, mode="arrow" if arrow else "numpy"),
            # Absent: whole, and in order.
            tiling=None if tiling.kind == "whole" else tiling_to_proto(tiling),
            order=None if order == _IN_ORDER else order_to_proto(order),
            if_version=self.version,
            pyramid_level=self.level,
            max_message_bytes=self.connection.options.message_bytes,
            # Decided by the stream itself, read by read.
            compression=compression_to_proto("none" if compression == "auto" else compression),
        )


class RemoteView(TensorView):
    """A view whose pixels are on a server: whole reads gather from there, tiles are streamed."""

    @property
    def pixels(self) -> RemotePixels:
        """Where the pixels are."""
        assert isinstance(self._pixels, RemotePixels)
        return self._pixels

    @property
    def override(self) -> np.dtype | None:
        """The dtype the caller asked for, or ``None``."""
        return self._override

    def _values(self) -> np.ndarray:
        return self.stored_values(self._resolved.selection)

    def _tiles(self, tiling: Tiling, order: Order, *, contiguous: bool, prefetch: int, arrow: bool) -> Iterator[TileAndArray]:
        if order.shuffle and order.seed is None:
            # A random order that can be resumed is one whose seed is known.
            order = replace(order, seed=secrets.randbits(64))
        resolved = self._resolved
        shown = resolved.selection if arrow else resolved.shown
        # Only a shuffle of time points changes what a tile's number means; the order itself is the server's to compute.
        numbered = TileSequence(shown, tiling, order if tiling.kind == "time_batches" else Order())
        if arrow:
            self._check_stored(tiling, order)
        elif shown.size == 0:
            return (
                (tile, in_layout(np.empty(tile.shape, resolved.dtype), resolved.layout, contiguous))
                for tile in TileSequence(shown, tiling, order)
            )
        # Counted without its order, which is the server's to compute.
        expected = len(TileSequence(shown, tiling, order))
        connections = self.pixels.connection.several
        if len(connections) > 1 and expected > 1 and not arrow:
            # What is dealt out are shards of the caller's shard: their numbers say nothing of which server is whose.
            server = order.shard_index if order.shard_count > 1 else self.pixels.connection.replicas.preferred
            parts = [
                self._ahead(
                    self._stream(one, shown, tiling, part, count, server=server + place), numbered, contiguous, max(1, prefetch)
                )
                for place, (one, (part, count)) in enumerate(
                    zip(connections, deal(order, expected, len(connections)), strict=False)
                )
            ]
            return taken_back(parts, order.start, expected)
        stream = self._stream(self.pixels.connection, shown, tiling, order, expected, arrow=arrow)
        if not prefetch:
            return self._delivered(stream, numbered, contiguous, arrow)
        return self._ahead(stream, numbered, contiguous, prefetch, arrow=arrow)

    def _stream(
        self,
        connection: Connection,
        shown: Selection,
        tiling: Tiling,
        order: Order,
        expected: int,
        *,
        arrow: bool = False,
        server: int | None = None,
    ) -> TileStream:
        request = self.pixels.request(shown, self._resolved.dtype, tiling, order, arrow=arrow)
        return TileStream(connection, request, expected, server=server)

    def _ahead(
        self, stream: TileStream, numbered: TileSequence, contiguous: bool, prefetch: int, *, arrow: bool = False
    ) -> Prefetcher[TileAndArray]:
        options = self.pixels.connection.options
        return Prefetcher(
            self._delivered(stream, numbered, contiguous, arrow),
            prefetch,
            max_bytes=options.prefetch_bytes // options.connections,
            size=lambda item: item[1].nbytes,
            cancel=stream.cancel,
        )

    def _check_stored(self, tiling: Tiling, order: Order) -> None:
        """``mode="arrow"``: let the server say now, not at the first tile, if a tile is not a stored plane or chunk."""
        plan = self.pixels.request(self._resolved.selection, self._override, tiling, order, arrow=True)
        view = plan.view
        if self._override is not None:
            view.dtype = self._override.name
        self.pixels.connection.call(
            "ResolveView",
            pb.ResolveViewRequest(
                key=self.pixels.key, view=view, tiling=plan.tiling, order=plan.order, pyramid_level=self.pixels.level
            ),
            pb.ResolveViewResponse,
        )

    def _delivered(self, stream: TileStream, numbered: TileSequence, contiguous: bool, arrow: bool) -> Iterator[TileAndArray]:
        for tile, block, _ in whole_tiles(stream, numbered):
            yield tile, block.reshape(-1) if arrow else in_layout(block, self._resolved.layout, contiguous)

    def _batches(self, tiling: Tiling, order: Order, size: int, *, contiguous: bool, prefetch: int) -> Iterator[BatchArray]:
        shown = self._resolved.shown
        if shown.size == 0:
            return super()._batches(tiling, order, size, contiguous=contiguous, prefetch=prefetch)
        if order.shuffle and order.seed is None:
            order = replace(order, seed=secrets.randbits(64))
        running = Running()
        found = self._arriving(TileSequence(shown, tiling, order), size, contiguous, running)
        if not prefetch:
            return found
        return Prefetcher(
            found,
            prefetch,
            max_bytes=self.pixels.connection.options.prefetch_bytes,
            size=lambda batch: batch.array.nbytes,
            cancel=running.cancel,
        )

    def _arriving(self, tiles: TileSequence, size: int, contiguous: bool, running: Running) -> Iterator[BatchArray]:
        """Batches as messages bring them."""
        resolved, start = self._resolved, tiles.order.start
        for first, count, part, order, numbers in _requests(tiles, size):
            if running.is_cancelled:
                return
            request = self.pixels.request(resolved.shown, resolved.dtype, part, order, arrow=False)
            request.tiles_per_batch = min(size, 2**32 - 1)
            stream = running.begin(TileStream(self.pixels.connection, request, count))
            numbered = TileSequence(resolved.shown, part)
            for position, given, table, pixels, _ in uniform_batches(stream, numbered, size, count):
                if numbers is not None:
                    if not np.array_equal(given, np.arange(position, position + len(given))):
                        raise BrokenStream(f"windows arrived in another order than listed, from position {position} on")
                    given = numbers[position : position + len(given)]
                    position += start + first
                array = batch_in_layout(pixels, resolved.layout, contiguous)
                yield BatchArray(array, given, position, table[:, :4], table[:, 4:])


def _requests(tiles: TileSequence, size: int) -> Iterator[tuple[int, int, Tiling, Order, np.ndarray | None]]:
    """What to ask for: index of the first tile, number of tiles, tiling, order, and of windows their numbers in the whole list.

    The order of tiles is the server's to compute. A list of windows is ordered here: only what this reader is to get of it is sent, in requests
    that every server takes, each of whole batches.
    """
    tiling, expected = tiles.tiling, len(tiles)
    if tiling.origins is None:
        if expected:
            yield 0, expected, tiling, tiles.order, None
        return
    step = max(1, _MOST_WINDOWS // size) * size
    for first in range(0, expected, step):
        numbers = tiles.numbers(first, step)
        yield first, len(numbers), replace(tiling, origins=tiling.origins.take(numbers)), Order(), numbers
