"""The tiles of many images in one order.

Everything about a table of tens of thousands of images, of as many sizes, is arithmetic on arrays: nothing is made for an image before one of its
tiles is asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from .errors import InvalidSelection, LimitExceeded
from .selection import Indices, Selection
from .tile import Tile, centred_tile, grid_tile
from .tiling import Order, OrderedTiles, TileSequence, Tiling
from .windows import Origins, PlacedWindows

__all__ = ["ImageTiles", "tiles_of"]

#: Which of t, z, y, x a tiling cuts.
_CUT = {"time_batches": (0,), "tiles": (2, 3), "tiles_3d": (0, 1, 2, 3)}


#: More than any image has of anything, and far enough from the end of int64 that a sum does not wrap around.
_FARTHEST = 2**61


class _Axis:
    """The chosen indices along one axis of many views; most often all views have the same."""

    def __init__(self, indices: Sequence[Indices]) -> None:
        numbers: dict[Indices, int] = {}
        self._of = np.array([numbers.setdefault(one, len(numbers)) for one in indices], np.int64)
        self._kinds = list(numbers)

    def at(self, views: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The index at a place of each view's; -1 where it has none there."""
        found = np.full(len(views), -1, np.int64)
        kinds = self._of[views]
        for kind in np.unique(kinds).tolist():
            indices = np.asarray(self._kinds[kind], np.int64)
            mine = (kinds == kind) & (places >= 0) & (places < len(indices))
            found[mine] = indices[places[mine]]
        return found

    def steps(self, views: np.ndarray) -> np.ndarray:
        """The distance between each view's; 1 where they are not evenly spaced."""
        steps = np.array([one.step if isinstance(one, range) else 1 for one in self._kinds], np.int64)
        found: np.ndarray = steps[self._of[views]]
        return found


class ImageTiles(OrderedTiles):
    """The tiles of several images' views. See :class:`OrderedTiles`.

    Enumerated image by image, and in each as :class:`TileSequence` does; windows in the order in which they are listed. A shuffle is one of all
    tiles.

    Args:
        selections: What views there are, at least one where there are images.
        of: Which of them is each image's. (n,) integers.
        tiling: How they are cut.
        order: Row-major or shuffled, shard or spans, start.

    Raises:
        InvalidSelection: a window does not fit its image, or is of an image that there is not.
        LimitExceeded: more tiles than numbers of 64 bits count.
    """

    def __init__(self, selections: Sequence[Selection], of: np.ndarray, tiling: Tiling, order: Order | None = None) -> None:
        self.tiling = tiling
        self._selections = list(selections)
        self._of = np.asarray(of, np.int64)
        shapes = np.array([view.shape for view in selections], np.int64).reshape(-1, 5)
        #: Of each view along t, z, y, x: its length, the size of a tile, and the number of tiles.
        self._lengths = shapes[:, [0, 1, 3, 4]]
        self._sizes = self._tile_sizes()
        self._counts, uniform = self._count()
        self._windows: _Windows | None = None
        if tiling.origins is None:
            #: Number of the first tile of each image, and of all tiles.
            many = float(self._counts.astype(float).prod(axis=1)[self._of].sum())
            if many > _FARTHEST:
                raise LimitExceeded(f"the views have about {many:.3g} tiles: too many to number", field="tiling", value=many)
            self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._counts.prod(axis=1)[self._of])])
            total = int(self._starts[-1])
            is_used = np.zeros(len(shapes), bool)
            is_used[self._of] = True
            used = np.flatnonzero(is_used & (self._counts.prod(axis=1) > 0))
        else:
            self._windows = _Windows(tiling.origins, self._selections, self._of, self._sizes, tiling.edge == "pad")
            total = len(tiling.origins)
            used = np.unique(self._of[self._windows.images])
        delivered = np.empty_like(shapes)
        delivered[:, [0, 1, 3, 4]] = self._sizes if tiling.edge == "pad" else np.minimum(self._sizes, self._lengths)
        delivered[:, 2] = shapes[:, 2]
        found = delivered[used] if len(used) else delivered[:1]
        self.uniform = bool((found == found[:1]).all() and uniform[used].all())
        nothing = np.zeros((1, 5), np.int64)
        found = found if len(found) else nothing
        # Sizes of an untrusted request multiply to more than 64 bits hold.
        self._shape = tuple(found[int(np.argmax(found.astype(float).prod(axis=1)))].tolist())
        self._largest = tuple(found.max(axis=0).tolist())
        self._arrange(order or Order(), total)

    def _tile_sizes(self) -> np.ndarray:
        tiling, sizes = self.tiling, self._lengths.copy()
        # Tiles may be larger than any image, and their sizes than int64 holds.
        t, z, h, w = (min(size, _FARTHEST) for size in (tiling.t, tiling.z, tiling.h, tiling.w))
        if tiling.kind == "time_batches":
            sizes[:, 0] = t
        elif tiling.kind == "tiles_3d":
            sizes[:] = (1, z, h, w)
        elif tiling.kind != "whole":
            sizes[:, 2:] = h, w
            if tiling.kind != "tiles" and z:
                sizes[:, 1] = z
            if tiling.kind == "windows" and t:
                sizes[:, 0] = t
        return sizes

    def _count(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each view the tiles along each axis, and whether they are of one shape."""
        tiling, lengths, sizes = self.tiling, self._lengths, self._sizes
        counts = np.ones_like(lengths)
        uniform = np.ones(len(lengths), bool)
        for axis in _CUT.get(tiling.kind, ()):
            length, size = lengths[:, axis], sizes[:, axis]
            if tiling.edge == "drop":
                counts[:, axis] = length // size
            else:
                counts[:, axis] = -(-length // size)
                uniform &= (tiling.edge == "pad") | (length % size == 0) | ((length < size) & (tiling.edge == "clip"))
        if tiling.kind == "centred" and tiling.edge == "drop":
            counts[(lengths[:, 1:] < sizes[:, 1:]).any(axis=1), 3] = 0
        return counts, uniform

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """See :attr:`OrderedTiles.shape`: of the most elements, where they differ."""
        return self._shape

    @property
    def largest(self) -> tuple[int, int, int, int, int]:
        """See :attr:`OrderedTiles.largest`."""
        return self._largest

    def images(self, numbers: np.ndarray) -> np.ndarray:
        """See :meth:`OrderedTiles.images`."""
        if self._windows is not None:
            listed: np.ndarray = self._windows.images[numbers]
            return listed
        images: np.ndarray = np.searchsorted(self._starts, numbers, side="right") - 1
        return images

    @cached_property
    def _axes(self) -> tuple[_Axis, _Axis, np.ndarray]:
        """The views' t and z, and their (y, x)."""
        views = self._selections
        return (
            _Axis([view.t for view in views]),
            _Axis([view.z for view in views]),
            np.array([(view.y, view.x) for view in views]),
        )

    def table(self, numbers: np.ndarray) -> np.ndarray:
        """See :meth:`OrderedTiles.table`."""
        if self._windows is not None:
            return self._windows.table(numbers)
        images = self.images(numbers)
        views = self._of[images]
        lengths, sizes = self._lengths[views], self._sizes[views]
        t, z, corners = self._axes
        table = np.empty((len(numbers), 7), np.int64)
        if self.tiling.kind != "centred":
            places = np.empty((len(numbers), 4), np.int64)
            rest = numbers - self._starts[images]
            for axis in (3, 2, 1):
                rest, places[:, axis] = np.divmod(rest, self._counts[views, axis])
            places[:, 0] = rest
            firsts = places * sizes
            table[:, 0], table[:, 1] = t.at(views, firsts[:, 0]), z.at(views, firsts[:, 1])
            table[:, 2:4] = corners[views] + firsts[:, 2:]
            table[:, 4:] = np.minimum(sizes, lengths - firsts)[:, 1:]
            return table
        starts = (lengths - sizes)[:, 1:] // 2
        begins, ends = np.maximum(starts, 0), np.minimum(lengths[:, 1:], starts + sizes[:, 1:])
        table[:, 0], table[:, 1] = t.at(views, np.zeros_like(views)), z.at(views, begins[:, 0])
        table[:, 4:] = ends - begins
        if self.tiling.edge == "pad":
            # Planes before the first have the numbers that they would have in an even sequence.
            table[:, 1] += np.minimum(starts[:, 0], 0) * z.steps(views)
            begins = starts
        table[:, 2:4] = corners[views] + begins[:, 1:]
        return table

    @cached_property
    def _listed(self) -> tuple[list[int], list[int], list[list[int]], list[list[int]]]:
        """What :meth:`tile` needs, one by one faster than arrays."""
        return self._starts.tolist(), self._of.tolist(), self._sizes.tolist(), self._counts.tolist()

    def tile(self, number: int, position: int = 0) -> Tile:
        """See :meth:`OrderedTiles.tile`."""
        if self._windows is not None:
            return self._windows.tile(number, position)
        starts, of, sizes, counts = self._listed
        image = bisect_right(starts, number) - 1
        view = of[image]
        whole, edge = self._selections[view], self.tiling.edge
        if self.tiling.kind == "centred":
            return centred_tile(whole, edge, sizes[view], number, position, image)
        return grid_tile(whole, whole.t, edge, sizes[view], counts[view], number - starts[image], number, position, image)


class _Windows:
    """Listed windows of many images, in groups of views that differ only in their frames.

    Args:
        origins: The list.
        selections, of: As :class:`ImageTiles`.
        sizes: Of each view's windows, along t, z, y, x.
        padded: Whether they may stick out.

    Attributes:
        images: Of which image each is.

    Raises:
        InvalidSelection: one does not fit.
    """

    def __init__(
        self, origins: Origins, selections: Sequence[Selection], of: np.ndarray, sizes: np.ndarray, padded: bool
    ) -> None:
        self.images = np.zeros(len(origins), np.int64) if origins.images is None else origins.images
        if len(self.images) and int(self.images.max()) >= len(of):
            number = int(np.argmax(self.images >= len(of)))
            image = int(self.images[number])
            raise InvalidSelection(f"window {number} is of image {image}, and there are {len(of)}", field="images", value=image)
        groups: dict[tuple[Indices, Indices, Indices], int] = {}
        group_of = np.array([groups.setdefault((s.t, s.z, s.c), len(groups)) for s in selections], np.int64)
        frames = np.array([(s.y, s.x, s.h, s.w) for s in selections], np.int64).reshape(-1, 4)
        view_of = of[self.images]
        self._groups = group_of[view_of]
        # Which of its group's windows each is.
        self._ranks = np.zeros(len(origins), np.int64)
        self._placed: list[PlacedWindows | None] = [None] * len(groups)
        order = np.argsort(self._groups, kind="stable")
        ends = np.searchsorted(self._groups[order], np.arange(len(groups) + 1))
        for group in range(len(groups)):
            mine = order[ends[group] : ends[group + 1]]
            if not len(mine):
                continue
            self._ranks[mine] = np.arange(len(mine))
            view = int(view_of[mine[0]])
            size: tuple[int, int, int, int] = tuple(sizes[view].tolist())
            some = origins.take(mine).alone()
            self._placed[group] = PlacedWindows(some, size, selections[view], padded, frames[view_of[mine]])

    def _of(self, group: int) -> PlacedWindows:
        placed = self._placed[group]
        assert placed is not None
        return placed

    def table(self, numbers: np.ndarray) -> np.ndarray:
        """See :meth:`PlacedWindows.table`."""
        groups, ranks = self._groups[numbers], self._ranks[numbers]
        table = np.empty((len(numbers), 7), np.int64)
        for group in np.unique(groups).tolist():
            mine = groups == group
            table[mine] = self._of(group).table(ranks[mine])
        return table

    def tile(self, number: int, position: int) -> Tile:
        """One of them."""
        placed = self._of(int(self._groups[number]))
        window, inset, origin = placed.place(int(self._ranks[number]))
        t, z, h, w = placed.size
        return Tile(position, number, window, (t, z, len(window.c), h, w), inset, origin, int(self.images[number]))


def tiles_of(selections: Sequence[Selection], of: np.ndarray, tiling: Tiling, order: Order | None = None) -> OrderedTiles:
    """The tiles of one or many images: of one, as that image's own are, time batches shuffled as upstream does."""
    is_one = len(of) == 1 and (tiling.origins is None or tiling.origins.images is None or not tiling.origins.images.any())
    if is_one:
        if tiling.origins is not None and tiling.origins.images is not None:
            tiling = replace(tiling, origins=tiling.origins.alone())
        return TileSequence(selections[int(of[0])], tiling, order)
    return ImageTiles(selections, of, tiling, order)
