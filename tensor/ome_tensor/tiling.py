"""How a view is cut into tiles, in which order, and which of them one reader gets.

Pure arithmetic on a :class:`~ome_tensor.selection.Selection`. The order of a read is: enumerate all tiles (t, then z, y, x) -> drop by edge
policy -> shuffle by seed -> shard -> skip. Nothing longer than one permutation of integers is ever built; without a shuffle not even that.

A shuffled order is the one upstream gives for the same seed: ``random.Random(seed).shuffle`` on the enumeration. (The permutation that shuffle
makes depends only on the length, so shuffling the numbers is shuffling the tiles.)
"""

from __future__ import annotations

import math
import random
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np

from .errors import InvalidArgument
from .selection import Indices, Selection, compact
from .tile import Edge, Tile, centred_tile, grid_tile
from .windows import MAX_SIZE, Origins, PlacedWindows

__all__ = ["MAX_SEED", "Edge", "Order", "OrderedTiles", "Tile", "TileSequence", "Tiling", "check_seed"]

TilingKind: TypeAlias = Literal["whole", "time_batches", "tiles", "tiles_3d", "windows", "centred"]

EDGES: tuple[Edge, ...] = ("clip", "pad", "drop")

#: Seeds travel as uint64.
MAX_SEED = 2**64 - 1


def positive(value: object, name: str, complaint: str) -> int:
    """A positive integer, or InvalidArgument with ``complaint``."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidArgument(f"{name} must be an integer, not {value!r}", field=name, value=value)
    number = int(value.__index__())
    if number <= 0:
        raise InvalidArgument(f"{complaint}: {value!r}", field=name, value=value)
    return number


def check_seed(seed: object) -> int | None:
    """A seed as a uint64, or ``None``. ``random.Random`` takes a negative seed for its absolute value, and so does this.

    Raises:
        InvalidArgument: not an integer, or one that does not fit in 64 bits.
    """
    if seed is None:
        return None
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise InvalidArgument(f"seed must be an integer, not {seed!r}", field="seed", value=seed)
    number = abs(int(seed.__index__()))
    if number > MAX_SEED:
        raise InvalidArgument(f"seed must fit in 64 bits: {seed}", field="seed", value=seed)
    return number


@dataclass(frozen=True, slots=True)
class Tiling:
    """How to cut a view.

    Attributes:
        kind: ``whole``: one tile; ``time_batches``: ``t`` time indices each; ``tiles``: ``h`` x ``w`` pixels with all t, z, c;
            ``tiles_3d``: ``z`` x ``h`` x ``w`` for one t with all c; ``windows``: one size at listed origins, with all c; ``centred``: one window of
            ``z`` (0: all) x ``h`` x ``w`` in the middle, with all t and c.
        t, z, h, w: Sizes in elements, as far as the kind uses them. Windows at ``(y, x)`` have all t and z, and 0 here.
        edge: What happens to tiles that stick out: ``clip`` them, ``pad`` them to full size, or ``drop`` them. Time batches cannot be padded;
            windows are padded or, with ``clip``, refused where one sticks out.
        pad: The value to pad with.
        origins: Where the windows begin.
    """

    kind: TilingKind = "whole"
    t: int = 0
    z: int = 0
    h: int = 0
    w: int = 0
    edge: Edge = "clip"
    pad: float = 0
    origins: Origins | None = None

    def __post_init__(self) -> None:
        # A pad value travels as a double: one that is not is rounded here, on both sides of the wire alike.
        if isinstance(self.pad, (bool, np.bool_)) or not isinstance(self.pad, (int, float, np.integer, np.floating)):
            raise InvalidArgument(f"pad must be a real number, not {self.pad!r}", field="pad", value=self.pad)
        try:
            object.__setattr__(self, "pad", float(self.pad))
        except OverflowError:
            raise InvalidArgument(
                f"pad must be a real number that fits a double, not {self.pad!r}", field="pad", value=self.pad
            ) from None
        if self.edge not in EDGES:
            raise InvalidArgument(f"edge must be one of {', '.join(EDGES)}, not {self.edge!r}", field="edge", value=self.edge)
        if self.edge == "pad" and self.kind in ("whole", "time_batches"):
            raise InvalidArgument("edge='pad' is for tiles of one size, not for time batches", field="edge", value=self.edge)
        if self.edge == "drop" and self.kind == "windows":
            raise InvalidArgument("edge='drop' is not for windows: they are listed one by one", field="edge", value=self.edge)

    def pad_value(self, dtype: np.dtype) -> np.ndarray:
        """The pad value as a scalar array of a view's dtype.

        Raises:
            InvalidArgument: the dtype is of integers and cannot hold it.
        """
        value = self.pad
        if dtype.kind in "iu":
            bounds = np.iinfo(dtype)
            if not (math.isfinite(value) and bounds.min <= int(value) <= bounds.max):
                raise InvalidArgument(f"pad {value:g} does not fit in {dtype}", field="pad", value=value)
            return np.array(int(value), dtype)
        with np.errstate(over="ignore"):  # a float16 has an infinity for what it cannot hold
            return np.array(value).astype(dtype)

    @classmethod
    def time_batches(cls, size: object, edge: Edge = "clip") -> Tiling:
        """Batches of ``size`` time indices."""
        return cls("time_batches", t=positive(size, "batch_size", "batch_size must be > 0"), edge=edge)

    @classmethod
    def tiles(cls, size: object, edge: Edge = "clip", pad: float = 0, *, name: str = "tile_size") -> Tiling:
        """Tiles of ``(h, w)`` pixels."""
        h, w = _sizes(size, 2, name, f"{name} must be (tile_h, tile_w)", "tiles must be positive")
        return cls("tiles", h=h, w=w, edge=edge, pad=pad)

    @classmethod
    def tiles_3d(cls, size: object, edge: Edge = "clip", pad: float = 0) -> Tiling:
        """Tiles of ``(z, h, w)`` elements."""
        z, h, w = _sizes(size, 3, "tile_size", "tile_size must be (tile_z, tile_h, tile_w)", "tile_size entries must be positive")
        return cls("tiles_3d", z=z, h=h, w=w, edge=edge, pad=pad)

    @classmethod
    def centred(cls, size: object, edge: Edge = "pad", pad: float = 0) -> Tiling:
        """One window of ``(h, w)`` pixels, or of ``(z, h, w)``, in the middle of the view: a smaller view is filled up, clipped, or dropped."""
        count = len(size) if isinstance(size, (Sequence, np.ndarray)) and not isinstance(size, (str, bytes)) else 0
        entries = _sizes(
            size, 3 if count == 3 else 2, "centred", "centred must be (h, w) or (z, h, w)", "centred entries must be positive"
        )
        if max(entries) > MAX_SIZE:
            raise InvalidArgument(f"centred entries must be below 2**31: {max(entries)}", field="centred", value=max(entries))
        return cls("centred", z=entries[0] if len(entries) == 3 else 0, h=entries[-2], w=entries[-1], edge=edge, pad=pad)

    @classmethod
    def windows(cls, origins: object, size: object, edge: Edge = "clip", pad: float = 0, images: object = None) -> Tiling:
        """Windows of one size at listed origins, in image coordinates.

        Args:
            origins: Integers of shape (N, 2), ``(y, x)``: windows with all selected t and z; or (N, 4), ``(t, z, y, x)``.
            size: ``(h, w)``; with (N, 4) origins also ``(z, h, w)`` or ``(t, z, h, w)``, otherwise of one t and one z.
            edge: ``clip``: every window must lie inside the view; ``pad``: it may stick out along z, y and x.
            pad: The value to pad with.
            images: Of a read of several images, which one each window is of, from 0; ``None``: all of the first.
        """
        listed = Origins.of(origins, images)
        form = "size must be (h, w)" if listed.planar else "size must be (h, w), (z, h, w) or (t, z, h, w)"
        count = len(size) if isinstance(size, (Sequence, np.ndarray)) else 0
        wanted = count if count in ((2,) if listed.planar else (2, 3, 4)) else 2
        entries = _sizes(size, wanted, "size", form, "size entries must be positive")
        if max(entries) > MAX_SIZE:
            raise InvalidArgument(f"size entries must be below 2**31: {max(entries)}", field="size", value=max(entries))
        t, z = (0, 0) if listed.planar else (1, 1, *entries[:-2])[-2:]
        return cls("windows", t=t, z=z, h=entries[-2], w=entries[-1], edge=edge, pad=pad, origins=listed)


def _sizes(size: object, count: int, name: str, form: str, complaint: str) -> tuple[int, ...]:
    if isinstance(size, (str, bytes)) or not isinstance(size, (Sequence, np.ndarray)) or len(size) != count:
        raise InvalidArgument(f"{form}, not {size!r}", field=name, value=size)
    return tuple(positive(entry, name, complaint) for entry in size)


@dataclass(frozen=True, slots=True)
class Order:
    """In which order, and which part of it.

    Attributes:
        shuffle: Whether to shuffle.
        seed: uint64; ``None`` with ``shuffle`` means a fresh random order.
        shard_index, shard_count: This reader gets every ``shard_count``-th tile of the order, from ``shard_index`` on.
        start: Tiles of this reader's part to skip (resume).
        spans: ``(first, count, stride)``: the positions of the order that this reader gets instead of a shard, one span after the other.
    """

    shuffle: bool = False
    seed: int | None = None
    shard_index: int = 0
    shard_count: int = 1
    start: int = 0
    spans: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.spans and (self.shard_count, self.shard_index) != (1, 0):
            raise InvalidArgument("an order has spans or a shard, not both", field="spans", value=self.spans[0])
        for span in self.spans:
            if min(span[:2]) < 0 or span[2] < 1:
                raise InvalidArgument(
                    f"a span is (first, count, stride) from 0, stride from 1, not {span}", field="spans", value=span
                )
        if self.shard_count < 1:
            raise InvalidArgument(
                f"shard_count must be positive: {self.shard_count}", field="shard_count", value=self.shard_count
            )
        if not 0 <= self.shard_index < self.shard_count:
            raise InvalidArgument(
                f"shard_index {self.shard_index} must be in [0, {self.shard_count})", field="shard_index", value=self.shard_index
            )
        if self.start < 0:
            raise InvalidArgument(f"start must be >= 0: {self.start}", field="start", value=self.start)


class OrderedTiles(Sequence[Tile]):
    """The tiles of a read in its order: ``len()``, indexing by position and iteration, computed on demand.

    Attributes:
        order: Row-major or shuffled, shard or spans, start.
        tiling: How the views are cut.
        total: Number of tiles in the enumeration after the edge policy, over all shards.
        uniform: Whether every tile of the enumeration has the same delivered shape.
    """

    order: Order
    tiling: Tiling
    total: int
    uniform: bool

    def _arrange(self, order: Order, total: int) -> None:
        """Set the order of so many tiles. Raises InvalidArgument where a span leads beyond their end."""
        self.order, self.total = order, total
        # Made when the first tile is asked for: counting tiles, or refusing them, needs no order.
        self._shuffled: Sequence[int] | None = None
        self._spans: np.ndarray | None = None
        if order.spans:
            spans = np.array(order.spans, object)
            last = spans[:, 0] + (spans[:, 1] - 1) * spans[:, 2]
            for span, end in zip(order.spans, last.tolist(), strict=True):
                if span[1] and end >= total:
                    raise InvalidArgument(
                        f"span {span} leads to position {end} of an order of {total} tiles", field="spans", value=span
                    )
            # Where a span of no position begins, and how far apart those of a single one are, means nothing and may be any number.
            spans[:, 0], spans[:, 2] = np.minimum(spans[:, 0], total), np.minimum(spans[:, 2], max(1, total))
            ends = np.cumsum(spans[:, 1:2], axis=0)
            if ends[-1, 0] > np.iinfo(np.int64).max:
                raise InvalidArgument(f"the spans have {ends[-1, 0]} positions together", field="spans", value=ends[-1, 0])
            self._spans = np.concatenate([spans, ends], axis=1).astype(np.int64)
            self._length = max(0, int(self._spans[-1, 3]) - order.start)
            return
        in_shard = max(0, -(-(total - order.shard_index) // order.shard_count))
        self._length = max(0, in_shard - order.start)

    @property
    def _permutes(self) -> bool:
        """Whether a shuffle is one of the tiles' numbers."""
        return True

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tile:  # type: ignore[override]
        if not 0 <= index < self._length:
            raise IndexError(index)
        position = self.order.start + index
        if self._spans is None:
            place = self.order.shard_index + position * self.order.shard_count
        else:
            place = int(self._places(np.array([position]))[0])
        return self.tile(place if self._permuted is None else self._permuted[place], position)

    def __iter__(self) -> Iterator[Tile]:
        return map(self.__getitem__, range(self._length))

    def _places(self, positions: np.ndarray) -> np.ndarray:
        """Where in the whole order this reader's positions stand."""
        if self._spans is None:
            return self.order.shard_index + positions * self.order.shard_count
        first, counts, stride, ends = self._spans.T
        span = np.searchsorted(ends, positions, side="right")
        places: np.ndarray = first[span] + (positions - (ends - counts)[span]) * stride[span]
        return places

    @property
    def _permuted(self) -> Sequence[int] | None:
        """The order of the tiles' numbers, where it is not that of the enumeration."""
        if self._shuffled is None and self.order.shuffle and self._permutes:
            self._shuffled = permutation(self.total, self.order.seed)
        return self._shuffled

    def numbers(self, first: int, count: int) -> np.ndarray:
        """The numbers of up to ``count`` tiles from index ``first`` on: what their :attr:`Tile.number` are."""
        start = self.order.start
        places = self._places(np.arange(start + first, start + min(first + count, self._length), dtype=np.int64))
        permuted = self._permuted
        return places if permuted is None else np.frombuffer(permuted, np.int64)[places]  # type: ignore[call-overload]

    def images(self, numbers: np.ndarray) -> np.ndarray:
        """Of each numbered tile, of which image it is. (n,), int64."""
        return np.zeros(len(numbers), np.int64)

    @abstractmethod
    def table(self, numbers: np.ndarray) -> np.ndarray:
        """Of each numbered tile its :attr:`Tile.origin` (t, z, y, x), and how many z, y and x of it are of the view. (n, 7), int64."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int, int, int]:
        """The largest delivered (T, Z, C, H, W): every tile's where :attr:`uniform`."""

    @property
    @abstractmethod
    def largest(self) -> tuple[int, int, int, int, int]:
        """The size that no tile exceeds along any axis."""

    @abstractmethod
    def tile(self, number: int, position: int = 0) -> Tile:
        """The tile of that number of the enumeration."""


class TileSequence(OrderedTiles):
    """The tiles of one view. See :class:`OrderedTiles`.

    Args:
        selection: What the view shows.
        tiling: How it is cut.
        order: Row-major or shuffled, shard, start.
    """

    def __init__(self, selection: Selection, tiling: Tiling, order: Order | None = None) -> None:
        self.selection = selection
        self.tiling = tiling
        nt, nz, _, h, w = selection.shape
        # Tile sizes along t, z, y, x; an axis that is not cut is one tile, present even where it is empty (an empty view has its tiles, as upstream).
        sizes = {
            "whole": (nt, nz, h, w),
            "time_batches": (tiling.t, nz, h, w),
            "tiles": (nt, nz, tiling.h, tiling.w),
            "tiles_3d": (1, tiling.z, tiling.h, tiling.w),
            "windows": (tiling.t or nt, tiling.z or nz, tiling.h, tiling.w),
            "centred": (nt, tiling.z or nz, tiling.h, tiling.w),
        }[tiling.kind]
        cut = {"time_batches": "t", "tiles": "yx", "tiles_3d": "tzyx"}.get(tiling.kind, "")
        counts = []
        uniform = True
        for axis, length, size in zip("tzyx", (nt, nz, h, w), sizes, strict=True):
            if axis not in cut:
                counts.append(1)
            elif tiling.edge == "drop":
                counts.append(length // size)
            else:
                counts.append(-(-length // size))
                uniform = uniform and (tiling.edge == "pad" or length % size == 0 or (length < size and tiling.edge == "clip"))
        self._windows: PlacedWindows | None = None
        if tiling.origins is not None:
            self._windows = PlacedWindows(tiling.origins, sizes, selection, tiling.edge == "pad")
            counts[3] = len(tiling.origins)
        if tiling.kind == "centred" and tiling.edge == "drop" and (nz < sizes[1] or h < sizes[2] or w < sizes[3]):
            counts[3] = 0
        self._sizes = sizes
        self._counts = counts
        self.uniform = uniform
        self._shuffled_t: Indices | None = None
        self._arrange(order or Order(), counts[0] * counts[1] * counts[2] * counts[3])

    @property
    def _permutes(self) -> bool:
        # Upstream shuffles time points, and then cuts them.
        return self.tiling.kind != "time_batches"

    def table(self, numbers: np.ndarray) -> np.ndarray:
        """See :meth:`OrderedTiles.table`."""
        if self._windows is not None:
            return self._windows.table(numbers)
        if self.tiling.kind == "centred":
            tile = self.tile(0)
            shown = tile.selection
            return np.tile(np.array([*tile.origin, len(shown.z), shown.h, shown.w], np.int64), (len(numbers), 1))
        whole = self.selection
        st, sz, sh, sw = self._sizes
        rest, ix = np.divmod(numbers, self._counts[3])
        rest, iy = np.divmod(rest, self._counts[2])
        it, iz = np.divmod(rest, self._counts[1])
        table = np.empty((len(numbers), 7), np.int64)
        for column, indices, size, place in ((0, self._t, st, it), (1, whole.z, sz, iz)):
            table[:, column] = np.asarray(indices[:: max(size, 1)], np.int64)[place] if indices else -1
        table[:, 2] = whole.y + iy * sh
        table[:, 3] = whole.x + ix * sw
        for column, length, size, place in ((4, len(whole.z), sz, iz), (5, whole.h, sh, iy), (6, whole.w, sw, ix)):
            table[:, column] = np.minimum(size, length - place * size)
        return table

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """See :attr:`OrderedTiles.shape`."""
        nt, nz, nc, h, w = self.selection.shape
        full = (self._sizes[0], self._sizes[1], nc, self._sizes[2], self._sizes[3])
        if self.tiling.edge == "pad":
            return full
        return min(full[0], nt), min(full[1], nz), nc, min(full[3], h), min(full[4], w)

    @property
    def _t(self) -> Indices:
        """The time points as they are cut: upstream shuffles them and then cuts them into batches."""
        chosen = self.selection.t
        if not self.order.shuffle or self.tiling.kind != "time_batches":
            return chosen
        if self._shuffled_t is None:
            self._shuffled_t = compact([chosen[i] for i in permutation(len(chosen), self.order.seed)])
        return self._shuffled_t

    @property
    def largest(self) -> tuple[int, int, int, int, int]:
        """See :attr:`OrderedTiles.largest`."""
        return self.tile(0).shape if self.total else self.shape

    def tile(self, number: int, position: int = 0) -> Tile:
        """See :meth:`OrderedTiles.tile`."""
        if self.tiling.kind == "centred":
            return centred_tile(self.selection, self.tiling.edge, self._sizes, number, position)
        if self._windows is not None:
            window, inset, origin = self._windows.place(number)
            full = (self._sizes[0], self._sizes[1], len(window.c), self._sizes[2], self._sizes[3])
            return Tile(position, number, window, full, inset, origin)
        return grid_tile(self.selection, self._t, self.tiling.edge, self._sizes, self._counts, number, number, position)


def permutation(length: int, seed: int | None) -> Sequence[int]:
    """Numbers 0 to ``length`` - 1 in the order that ``random.Random(seed).shuffle`` gives a list of that length; 8 bytes each."""
    return _shuffled(length, None) if seed is None else _seeded(length, seed)


def _shuffled(length: int, seed: int | None) -> Sequence[int]:
    numbers = array("q", range(length))
    random.Random(seed).shuffle(numbers)
    return numbers


# Every shard and every resumed read of an epoch asks for the same order.
_seeded = lru_cache(maxsize=4)(_shuffled)
