"""Remote views: the same TensorView and LazyTensorView as locally, their pixels behind a server."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ome_tensor.errors import BrokenStream
from ome_tensor.exports import TensorExports, in_layout
from ome_tensor.layout import AXES, apply_layout
from ome_tensor.lazy import Arguments
from ome_tensor.pixels import DensePixels
from ome_tensor.plan import Plan, ResolvedPlan
from ome_tensor.prefetch import Prefetcher
from ome_tensor.record import ImageMeta
from ome_tensor.selection import Region, Selection, as_index
from ome_tensor.slabs import split_into_slabs
from ome_tensor.tiling import Order, Tile, TileSequence, Tiling
from ome_tensor.view import TensorView
from ome_tensor_proto.codec import order_to_proto, plan_to_proto, selection_from_proto, tiling_to_proto
from ome_tensor_proto.listing import image_from_proto
from ome_tensor_proto.v1 import tensor_service_pb2 as pb

from .tile_stream import TileStream

if TYPE_CHECKING:
    from .connection import Connection

__all__ = ["RemoteSource"]

TileAndArray = tuple[Tile, np.ndarray]


class RemoteSource:
    """The source of one image's lazy views: a server and a key. Pickles.

    Args:
        connection: The server.
        key: The image's key.
    """

    def __init__(self, connection: Connection, key: str) -> None:
        self.connection = connection
        self.key = key

    def open(self, arguments: Arguments) -> RemoteView:
        """Describe the plan, by one ResolveView call. See :meth:`ome_tensor.lazy.Source.open`."""
        plan = Plan.of(arguments)
        answer = self.connection.call(
            "ResolveView", pb.ResolveViewRequest(key=self.key, view=plan_to_proto(plan)), pb.ResolveViewResponse
        )
        meta = image_from_proto(answer.image).meta
        if meta is None:
            raise BrokenStream(f"the server describes {self.key!r} without its size or dtype")
        resolved = ResolvedPlan(
            selection_from_proto(answer.selection), answer.layout, np.dtype(answer.dtype), plan.channel_policy
        )
        return RemoteView.of_pixels(RemotePixels(self.connection, answer.key, meta, answer.dataset_version), resolved, plan.dtype)

    def collect(self, opened: TensorExports) -> TensorView:
        """Fetch the pixels, once, into memory that the view keeps."""
        assert isinstance(opened, RemoteView)
        resolved = opened.resolved
        shown = opened.read_shown()
        pixels = DensePixels(resolved.shown, shown, beyond=opened.pixels)
        return TensorView.of_pixels(pixels, resolved, opened.override, memory=apply_layout(shown, resolved.layout))


class RemotePixels:
    """The pixels of one version of an image on a server.

    Args:
        connection: The server.
        key: The image's canonical key.
        meta: The image's metadata.
        version: The dataset's version; another one's pixels are refused.
    """

    def __init__(self, connection: Connection, key: str, meta: ImageMeta, version: str) -> None:
        self.connection = connection
        self.key = key
        self.meta = meta
        self.version = version

    def gather(self, selection: Selection, out: np.ndarray) -> None:
        """Read a selection into ``out``; a large one comes in slabs, each copied to its place as it arrives."""
        if out.size == 0:
            return
        delivered = 0
        with closing(self._whole(selection, out.dtype, arrow=False)) as stream:
            for batch in stream:
                block, place = batch.pixels[0], tuple(slice(length) for length in out.shape)
                if stream.header.slabs:
                    slab = split_into_slabs(out.shape, out.dtype.itemsize, stream.header.slab_bytes)[batch.slab]
                    place = tuple(slice(first, first + count) for first, count in zip(slab.origin, slab.shape, strict=True))
                if out[place].shape != block.shape or block.dtype != out.dtype:
                    raise BrokenStream(f"a {block.dtype} block of {block.shape} arrived for {out.dtype} {out[place].shape}")
                out[place] = block
                delivered += block.size
        if delivered != out.size:
            raise BrokenStream(f"{delivered} of {out.size} pixels arrived")

    def flat_values(self, selection: Selection) -> np.ndarray:
        """The stored values of one plane or chunk, 1-D, in private memory."""
        with closing(self._whole(selection, None, arrow=True)) as stream:
            parts = [batch.pixels[0].reshape(-1) for batch in stream]
        if sum(part.size for part in parts) != selection.size:
            raise BrokenStream(f"{sum(part.size for part in parts)} of {selection.size} stored values arrived")
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _whole(self, selection: Selection, dtype: np.dtype | None, *, arrow: bool) -> TileStream:
        return TileStream(self.connection, self.request(selection, dtype, Tiling(), Order(), arrow=arrow), expected=1)

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
        return pb.ReadTilesRequest(
            keys=[self.key],
            view=plan_to_proto(plan, mode="arrow" if arrow else "numpy"),
            tiling=tiling_to_proto(tiling),
            order=order_to_proto(order),
            if_version=self.version,
            max_message_bytes=self.connection.options.message_bytes,
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
        request = self.pixels.request(shown, resolved.dtype, tiling, order, arrow=arrow)
        stream = TileStream(self.pixels.connection, request, expected)
        found = self._delivered(stream, numbered, contiguous, arrow)
        if not prefetch:
            return found
        return Prefetcher(
            found,
            prefetch,
            max_bytes=self.pixels.connection.options.prefetch_bytes,
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
            pb.ResolveViewRequest(key=self.pixels.key, view=view, tiling=plan.tiling, order=plan.order),
            pb.ResolveViewResponse,
        )

    def _delivered(self, stream: TileStream, numbered: TileSequence, contiguous: bool, arrow: bool) -> Iterator[TileAndArray]:
        for tile, block in _whole_tiles(stream, numbered):
            yield tile, block.reshape(-1) if arrow else in_layout(block, self._resolved.layout, contiguous)


def _whole_tiles(stream: TileStream, numbered: TileSequence) -> Iterator[TileAndArray]:
    """Tiles as they arrive, those in slabs put together, each checked to be the one that its number says."""
    assembled: np.ndarray | None = None
    with closing(stream):
        for batch in stream:
            columns = {name: column.tolist() for name, column in batch.columns.items()}
            places = zip(*(columns[name] for name in ("t", "z", "y", "x", "valid_z", "valid_h", "valid_w")), strict=True)
            for row, (number, got) in enumerate(zip(columns["tile"], places, strict=True)):
                if not 0 <= number < numbered.total:
                    raise BrokenStream(f"tile {number} arrived of a view with {numbered.total}")
                tile = numbered.tile(number, batch.first_position + row)
                s = tile.selection
                wanted = (s.t[0] if s.t else -1, s.z[0] if s.z else -1, s.y, s.x, len(s.z), s.h, s.w)
                if got != wanted:
                    raise BrokenStream(f"tile {number} arrived with (t, z, y, x, depth, height, width) {got}, not {wanted}")
                block = batch.pixels[row]
                if stream.header.slabs:
                    # The reader has seen to it that slabs come in order and without gaps.
                    if assembled is None:
                        assembled = np.empty(tile.shape, block.dtype)
                    first = columns["offset"][row]
                    end = first + block.size
                    if end > assembled.size or (batch.tile_count == 1) != (end == assembled.size):
                        raise BrokenStream(f"tile {number} of {assembled.size} elements arrived up to {end}")
                    assembled.reshape(-1)[first:end] = block.reshape(-1)
                    if batch.tile_count == 0:
                        continue
                    block, assembled = assembled, None
                if block.shape != tile.shape:
                    raise BrokenStream(f"tile {number} arrived as {block.shape}, not {tile.shape}")
                yield tile, block
