"""TensorView: the pixels of one OME-Arrow record in this process, seen as a tensor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa

from .batches import BatchArray, batch_in_layout, batch_to_axes
from .errors import InvalidArgument
from .exports import TensorExports, in_layout
from .indexing import narrow
from .layout import apply_layout, normalize_layout, to_axes
from .pixels import LoadedPlanes, Pixels, pixels_of
from .plan import CHUNK_POLICIES, Plan, ResolvedPlan, check_policy
from .prefetch import Prefetcher
from .record import ImageMeta
from .selection import Selection
from .slabs import Slab
from .tiling import Order, Tile, TileSequence, Tiling

__all__ = ["TensorView"]


class TensorView(TensorExports):
    """The pixels of one OME-Arrow record, seen as a tensor. Construction reads metadata only.

    Args:
        data: An OME-Arrow dict, StructScalar, StructArray (row 0) or ChunkedArray (first non-empty record).
        plane_loader: ``plane_loader(t, z, c)`` gives one YX plane; used instead of the stored pixels.
        t, z, c: An integer (negatives from the end), a slice, a sequence of integers (order and duplicates count) or an integer array;
            ``None`` for all.
        roi: ``(x, y, w, h)`` in pixels.
        roi3d: ``(x, y, z, w, h, d)``: a ROI and a range of z.
        roi_nd: Min/max bounds, row first, read by ``roi_type``: ``2d`` (ymin, xmin, ymax, xmax); ``2d_timelapse`` (tmin, ymin, xmin, tmax,
            ymax, xmax); ``3d`` (zmin, ymin, xmin, zmax, ymax, xmax); ``4d`` (tmin, zmin, ymin, xmin, tmax, zmax, ymax, xmax).
        roi_type: May be left out for 4 and 8 values.
        tile: ``(tile_y, tile_x)``: one cell of the record's chunk grid.
        layout: Axis letters of TZCYX (H/W accepted for Y/X) in any order; axes of size 1 may be left out. Default ``CHW`` where one t and one
            z are selected, else ``TZCHW``.
        dtype: Convert as ``numpy.astype`` does; default the record's pixel type.
        chunk_policy: ``auto``, ``combine`` or ``keep``; accepted as upstream does. Storage is referred to, so none of them copies.
        channel_policy: What a layout without C does with several channels: ``error``, or show the ``first``.

    Raises:
        InvalidSelection, InvalidArgument: an argument is malformed or outside the image (both are ValueErrors).
        InvalidRecord: the record's metadata is damaged (a ValueError).
    """

    def __init__(
        self,
        data: Mapping[str, Any] | pa.StructScalar | pa.StructArray | pa.ChunkedArray,
        *,
        plane_loader: Callable[[int, int, int], np.ndarray] | None = None,
        t: int | slice | Sequence[int] | np.ndarray | None = None,
        z: int | slice | Sequence[int] | np.ndarray | None = None,
        c: int | slice | Sequence[int] | np.ndarray | None = None,
        roi: tuple[int, int, int, int] | None = None,
        roi3d: tuple[int, int, int, int, int, int] | None = None,
        roi_nd: tuple[int, ...] | None = None,
        roi_type: Literal["2d", "2d_timelapse", "3d", "4d"] | None = None,
        tile: tuple[int, int] | None = None,
        layout: str | None = None,
        dtype: Any = None,
        chunk_policy: Literal["auto", "combine", "keep"] = "auto",
        channel_policy: Literal["error", "first"] = "error",
    ) -> None:
        plan = Plan.of(locals())
        check_policy(chunk_policy, "chunk_policy", CHUNK_POLICIES)
        stored = pixels_of(data)
        pixels: Pixels = stored if plane_loader is None else LoadedPlanes(stored.meta, plane_loader, lambda: stored)
        meta = stored.meta
        self._open(pixels, plan.resolve(meta.extent, meta.dtype, meta.grid), plan.dtype)

    def _open(self, pixels: Pixels, resolved: ResolvedPlan, override: np.dtype | None) -> None:
        self._pixels = pixels
        self._resolved = resolved
        self._override = override
        self._memory: np.ndarray | None = None
        self._lock = threading.Lock()

    @classmethod
    def of_pixels(
        cls, pixels: Pixels, resolved: ResolvedPlan, override: np.dtype | None = None, memory: np.ndarray | None = None
    ) -> Self:
        """A view of pixels that are found already: what a server and a collected remote view start from.

        Args:
            pixels: Where they come from.
            resolved: The plan fitted to that image.
            override: The dtype the caller asked for, or ``None``; ``mode="arrow"`` cannot give any but the stored one.
            memory: The whole view in its layout where it has been read already; private memory, which the view then keeps.
        """
        view = cls.__new__(cls)
        view._open(pixels, resolved, override)
        view._memory = memory
        return view

    @property
    def device(self) -> str:
        """Where the view's memory is: always ``cpu``."""
        return "cpu"

    @property
    def resolved(self) -> ResolvedPlan:
        """What the view shows: selection in image coordinates, layout, dtype."""
        return self._resolved

    @property
    def meta(self) -> ImageMeta:
        """The image's metadata."""
        return self._pixels.meta

    def with_layout(self, layout: str) -> Self:
        """The same selection in another layout; ``None`` or ``""`` for the default. Raises InvalidArgument for a malformed one."""
        resolved = self._resolved
        selection, dtype = resolved.selection, resolved.dtype
        return self.of_pixels(
            self._pixels,
            Plan(layout=normalize_layout(layout), dtype=dtype, channel_policy=resolved.channel_policy).fit(selection, dtype),
            self._override,
        )

    def __getitem__(self, key: Any) -> Self:
        """A narrower view by NumPy basic indexing on this view's axes; see :func:`ome_tensor.indexing.narrow` for what is refused."""
        resolved = self._resolved
        selection, layout = narrow(resolved.check().shown, resolved.layout, key)
        return self.of_pixels(
            self._pixels, ResolvedPlan(selection, layout, resolved.dtype, resolved.channel_policy), self._override
        )

    # -- primitives ----------------------------------------------------------------------------------------------------------------

    def _resolve(self) -> ResolvedPlan:
        return self._resolved

    def _array(self) -> np.ndarray:
        with self._lock:
            if self._memory is None:
                self._memory = apply_layout(self.read_shown(), self._resolved.layout)
            return self._memory

    def read_shown(self) -> np.ndarray:
        """The pixels that the view shows, read anew into private memory: TZCYX, only the first channel where only that is shown.

        All selected channels are given room even then, so that the strides are those of the whole selection, as upstream's are; room that is
        never touched costs nothing.
        """
        resolved = self._resolved.check()
        selection = resolved.shown
        shown = np.empty(resolved.selection.shape, resolved.dtype)[:, :, : len(selection.c)]
        self._pixels.gather(selection, shown)
        return shown

    def _read_into(self, out: np.ndarray) -> None:
        self._pixels.gather(self._resolved.check().shown, out)

    def _values(self) -> np.ndarray:
        return self.stored_values(self._resolved.selection).copy()

    def stored_values(self, selection: Selection) -> np.ndarray:
        """``mode="arrow"``: the stored values of exactly one plane or chunk, 1-D. May be stored memory: to be copied, not changed.

        Raises:
            InvalidSelection: the selection is not exactly one stored plane or chunk.
            InvalidArgument: the view was asked for in another dtype than the stored one.
        """
        values = self._pixels.flat_values(selection)
        if self._override is not None and self._override != values.dtype:
            raise InvalidArgument(
                f"mode='arrow' gives stored {values.dtype} values and cannot convert to dtype '{self._override}'; use mode='numpy'.",
                field="dtype",
                value=str(self._override),
            )
        return values

    def _tiles(
        self, tiling: Tiling, order: Order, *, contiguous: bool, prefetch: int, arrow: bool
    ) -> Iterator[tuple[Tile, np.ndarray]]:
        resolved = self._resolved
        tiles = TileSequence(resolved.selection if arrow else resolved.shown, tiling, order)
        if arrow:
            # Every tile must be a stored plane or chunk, so there are no more to check than those.
            for tile in tiles:
                self.stored_values(tile.selection)
            found = ((tile, self.stored_values(tile.selection).copy()) for tile in tiles)
        else:
            found = ((tile, self._read_tile(tile, tiling, contiguous)) for tile in tiles)
        return Prefetcher(found, prefetch) if prefetch else found

    def _batches(self, tiling: Tiling, order: Order, size: int, *, contiguous: bool, prefetch: int) -> Iterator[BatchArray]:
        tiles = TileSequence(self._resolved.shown, tiling, order)
        found = (self._read_batch(tiles, first, size, contiguous) for first in range(0, len(tiles), size))
        return Prefetcher(found, prefetch) if prefetch else found

    def _read_batch(self, tiles: TileSequence, first: int, size: int, contiguous: bool) -> BatchArray:
        """One batch in fresh memory; every tile is written once, where it stays."""
        layout, dtype = self._resolved.layout, self._resolved.dtype
        numbers = tiles.numbers(first, size)
        if contiguous:
            letters = dict(zip("TZCHW", tiles.tile(0).shape, strict=True))
            array = np.empty((len(numbers), *(letters[letter] for letter in layout)), dtype)
            targets = batch_to_axes(array, layout)
        else:
            targets = np.empty((len(numbers), *tiles.tile(0).shape), dtype)
            array = batch_in_layout(targets, layout, contiguous)
        for number, target in zip(numbers.tolist(), targets, strict=True):
            gather_tile(self._pixels, tiles.tile(number), tiles.tiling, target)
        table = tiles.table(numbers)
        return BatchArray(array, numbers, tiles.order.start + first, table[:, :4], table[:, 4:])

    def _read_tile(self, tile: Tile, tiling: Tiling, contiguous: bool) -> np.ndarray:
        """One tile in fresh memory; written once, in the order in which it is handed out."""
        layout, dtype = self._resolved.layout, self._resolved.dtype
        if contiguous:
            letters = dict(zip("TZCHW", tile.shape, strict=True))
            array = np.empty(tuple(letters[letter] for letter in layout), dtype)
            target = to_axes(array, layout)
        else:
            target = np.empty(tile.shape, dtype)
            array = in_layout(target, layout, contiguous)
        gather_tile(self._pixels, tile, tiling, target)
        return array


def gather_tile(pixels: Pixels, tile: Tile, tiling: Tiling, out: np.ndarray) -> None:
    """Write one tile into ``out``, a TZCYX array of the tile's shape, padding included."""
    if tile.is_padded:
        out[...] = tiling.pad_value(out.dtype)
        s, (z, y, x) = tile.selection, tile.inset
        out = out[:, z : z + len(s.z), :, y : y + s.h, x : x + s.w]
    pixels.gather(tile.selection, out)


def gather_slab(pixels: Pixels, tile: Tile, tiling: Tiling, slab: Slab, out: np.ndarray) -> None:
    """Write one slab of a tile into ``out``, a TZCYX array of the slab's shape, padding included."""
    s = tile.selection
    inset = (0, tile.inset[0], 0, *tile.inset[1:])
    # Where the slab and the tile's pixels meet, counted in the slab and in the pixels.
    begins = [max(0, before - first) for first, before in zip(slab.origin, inset, strict=True)]
    firsts = [max(0, first - before) for first, before in zip(slab.origin, inset, strict=True)]
    counts = tuple(
        max(0, min(length - begin, size - first))
        for begin, first, length, size in zip(begins, firsts, slab.shape, s.shape, strict=True)
    )
    if counts != slab.shape:
        out[...] = tiling.pad_value(out.dtype)
        out = out[tuple(slice(begin, begin + count) for begin, count in zip(begins, counts, strict=True))]
    t, z, c, y, x = firsts
    nt, nz, nc, h, w = counts
    if out.size:
        pixels.gather(Selection(s.t[t : t + nt], s.z[z : z + nz], s.c[c : c + nc], s.x + x, s.y + y, w, h), out)


def view_of_image(pixels: Pixels, plan: Plan) -> TensorView:
    """A view of an image that is found already."""
    meta = pixels.meta
    return TensorView.of_pixels(pixels, plan.resolve(meta.extent, meta.dtype, meta.grid), plan.dtype)
