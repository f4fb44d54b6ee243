"""Iteration over a view's tiles, batches and windows, written once over three primitives.

:class:`TileIteration` checks arguments at the call, chooses the tiling and hands pixels on.
"""

from __future__ import annotations

import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from .batches import BatchArray, uploaded
from .errors import InvalidArgument
from .handoff import DLPackTensor, check_device, parse_device, parse_mode, to_torch, upload_each
from .plan import ResolvedPlan
from .selection import Selection
from .tiling import Edge, Order, Tile, TileSequence, Tiling, check_seed, positive

__all__ = [
    "ImageTileArray",
    "TileArray",
    "TileIteration",
    "check_batch_edge",
    "in_batches",
    "order_of",
    "prefetch_of",
    "tiling_of",
    "windows_of",
]

B = TypeVar("B", bound=BatchArray)


@dataclass(frozen=True, slots=True)
class TileArray:
    """A tile's pixels and where they belong.

    Attributes:
        array: The pixels in the view's layout; private memory, writable.
        number: The tile's number in the row-major enumeration of the view's tiles; the same in every order and shard.
        position: Its place in this read, from 0.
        origin: ``(t, z, y, x)`` of its first element, in image coordinates (``-1`` on an axis with nothing selected).
        valid: ``(z, h, w)``: how much of the array are pixels of the view; the rest is padding.
    """

    array: np.ndarray
    number: int
    position: int
    origin: tuple[int, int, int, int]
    valid: tuple[int, int, int]

    def to_torch(self) -> Any:
        """The pixels as a torch tensor on the same memory."""
        return to_torch(DLPackTensor(self.array))

    def __dlpack__(self, **options: Any) -> Any:
        return DLPackTensor(self.array).__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return DLPackTensor(self.array).__dlpack_device__()


@dataclass(frozen=True, slots=True)
class ImageTileArray(TileArray):
    """A tile of one of many images. See :class:`TileArray`; its number is that in the enumeration of all images' tiles.

    Attributes:
        image: Which image of the set it is of, from 0.
        row: The image's row in the dataset.
        beside: By image column that comes beside, the same region of its image, in the view's layout.
    """

    image: int
    row: int
    beside: dict[str, np.ndarray]


class TileIteration(ABC):
    """Iteration shared by all views."""

    @abstractmethod
    def _resolve(self) -> ResolvedPlan:
        """The plan fitted to the image."""

    @abstractmethod
    def _tiles(
        self, tiling: Tiling, order: Order, *, contiguous: bool, prefetch: int, arrow: bool
    ) -> Iterator[tuple[Tile, np.ndarray]]:
        """Tiles in the view's layout (flat stored values with ``arrow``), each in private memory."""

    @abstractmethod
    def _batches(self, tiling: Tiling, order: Order, size: int, *, contiguous: bool, prefetch: int) -> Iterator[BatchArray]:
        """Tiles of one shape in batches of ``size``, each in private memory; the last one may be smaller."""

    def iter_dlpack(
        self,
        *,
        batch_size: int | None = None,
        tile_size: tuple[int, int] | None = None,
        tiles: tuple[int, int] | None = None,
        shuffle: bool = False,
        seed: int | None = None,
        prefetch: int = 0,
        device: str = "cpu",
        contiguous: bool = True,
        mode: str = "arrow",
    ) -> Iterator[Any]:
        """Iterate over time batches, or over 2-D tiles with all selected t, z and c in each. Arguments are checked here, not at the first ``next()``.

        Args:
            batch_size: Time indices a batch; default all.
            tile_size: ``(h, w)`` in pixels; tiles at the right and lower edge are clipped.
            tiles: Deprecated name of ``tile_size``.
            shuffle, seed: Shuffle time indices or tiles, in upstream's order for that seed.
            prefetch: Number of items to read ahead, on one thread that ends with the iterator.
            device, contiguous, mode: As in :meth:`to_dlpack`.

        Raises:
            InvalidArgument: naming the argument and its value.
        """
        if tiles is not None:
            if tile_size is not None:
                raise InvalidArgument("Provide only one of tile_size or tiles.", field="tiles", value=tiles)
            warnings.warn("iter_dlpack(tiles=...) is deprecated; use tile_size=... instead.", DeprecationWarning, stacklevel=2)
            tile_size = tiles
        if tile_size is not None:
            tiling = Tiling.tiles(tile_size)
        elif batch_size is not None:
            tiling = Tiling.time_batches(batch_size)
        else:
            tiling = Tiling.time_batches(max(1, len(self._resolve().selection.t)))
        return self._iterate(tiling, shuffle, seed, prefetch, device, contiguous, mode)

    def iter_tiles_3d(
        self,
        *,
        tile_size: tuple[int, int, int],
        shuffle: bool = False,
        seed: int | None = None,
        prefetch: int = 0,
        device: str = "cpu",
        contiguous: bool = True,
        mode: str = "numpy",
    ) -> Iterator[Any]:
        """Iterate over ``(z, h, w)`` tiles, one t at a time, with all selected c in each; clipped at the edges.

        Arguments as in :meth:`iter_dlpack`.
        """
        if parse_mode(mode) != "numpy":
            raise InvalidArgument("iter_tiles_3d currently supports only mode='numpy'.", field="mode", value=mode)
        return self._iterate(Tiling.tiles_3d(tile_size), shuffle, seed, prefetch, device, contiguous, mode)

    def iter_tiles(
        self,
        *,
        tile_size: tuple[int, ...],
        edge: Edge = "clip",
        pad: float = 0,
        shuffle: bool = False,
        seed: int | None = None,
        shard: tuple[int, int] = (0, 1),
        start: int = 0,
        prefetch: int = 0,
        contiguous: bool = True,
    ) -> Iterator[TileArray]:
        """Iterate over tiles that know their number and origin.

        Args:
            tile_size: ``(h, w)``: all selected t, z, c in each tile; or ``(z, h, w)``: one t at a time. Small tiles of a remote view share the
                memory of the message they came in (about 1 MiB): copy those that are kept.
            edge: ``clip`` tiles that stick out, ``pad`` them to full size with ``pad``, or ``drop`` them.
            pad: The padding value.
            shuffle, seed: Shuffled by seed, as :meth:`iter_dlpack`.
            shard: ``(index, count)``: every ``count``-th tile of the order, from ``index`` on.
            start: Tiles of the shard to skip.
            prefetch: Number of tiles to read ahead.
            contiguous: Copy a permuted layout into C order.

        Raises:
            InvalidArgument: naming the argument and its value.
        """
        tiling = tiling_of(tile_size, edge, pad)
        order = order_of(shuffle, seed, shard, start)
        found = self._tiles(self._fitting(tiling), order, contiguous=contiguous, prefetch=prefetch_of(prefetch), arrow=False)
        return (
            TileArray(array, tile.number, tile.position, tile.origin, (len(tile.selection.z), tile.selection.h, tile.selection.w))
            for tile, array in found
        )

    def iter_batches(
        self,
        *,
        tile_size: tuple[int, ...],
        batch_size: int,
        edge: Literal["drop", "pad"] = "drop",
        pad: float = 0,
        shuffle: bool = False,
        seed: int | None = None,
        shard: tuple[int, int] = (0, 1),
        start: int = 0,
        drop_last: bool = False,
        prefetch: int = 0,
        device: str = "cpu",
        contiguous: bool = True,
    ) -> Iterator[BatchArray]:
        """Iterate over batches of tiles of one shape: each is one ``(N, <layout>)`` tensor. Of a remote view it is the received message, not a copy.

        Args:
            tile_size: As in :meth:`iter_tiles`.
            batch_size: Tiles a batch; the last one may have fewer. A server bounds the bytes of one (``max_message_bytes``).
            edge: ``drop`` tiles that stick out, or ``pad`` them to full size with ``pad``.
            pad: The padding value.
            shuffle, seed, shard: As in :meth:`iter_tiles`.
            start: Tiles of the shard to skip: ``n * batch_size`` goes on after ``n`` batches.
            drop_last: Leave out a last batch of fewer tiles.
            prefetch: Number of batches to read ahead.
            device: ``cpu``, ``cuda`` or ``cuda:N``: the arrays are then torch tensors there.
            contiguous: Copy a permuted layout into C order.

        Raises:
            InvalidArgument: naming the argument and its value.
        """
        check_batch_edge(edge)
        return self._in_batches(
            tiling_of(tile_size, edge, pad),
            order_of(shuffle, seed, shard, start),
            batch_size,
            drop_last,
            prefetch,
            device,
            contiguous,
        )

    def iter_windows(
        self,
        origins: Any,
        size: tuple[int, ...],
        batch_size: int,
        *,
        edge: Literal["error", "pad"] = "error",
        pad: float = 0,
        shuffle: bool = False,
        seed: int | None = None,
        shard: tuple[int, int] = (0, 1),
        start: int = 0,
        drop_last: bool = False,
        prefetch: int = 0,
        device: str = "cpu",
        contiguous: bool = True,
    ) -> Iterator[BatchArray]:
        """Iterate over windows of one size at listed origins, in listed order; batches as in :meth:`iter_batches`.

        Args:
            origins: Integers of shape (N, 2), ``(y, x)``: each window has all selected t and z; or (N, 4), ``(t, z, y, x)``. In image coordinates.
            size: ``(h, w)``; with (N, 4) origins also ``(z, h, w)`` or ``(t, z, h, w)``: that many selected ones from the origin's on, else one each.
            batch_size: Windows a batch; the last one may have fewer.
            edge: ``error``: every window must lie inside the view; ``pad``: it may stick out along z, y and x, and is filled up with ``pad``.
            pad, shuffle, seed, shard, start, drop_last, prefetch, device, contiguous: As in :meth:`iter_batches`.

        Raises:
            InvalidSelection: a window does not fit; names its number and origin.
            InvalidArgument: naming the argument and its value.
        """
        tiling = windows_of(origins, size, edge, pad)
        return self._in_batches(
            tiling, order_of(shuffle, seed, shard, start), batch_size, drop_last, prefetch, device, contiguous
        )

    def _in_batches(
        self, tiling: Tiling, order: Order, batch_size: int, drop_last: bool, prefetch: int, device: str, contiguous: bool
    ) -> Iterator[BatchArray]:
        def read(size: int, depth: int) -> Iterator[BatchArray]:
            return self._batches(self._fitting(tiling), order, size, contiguous=contiguous, prefetch=depth)

        return in_batches(read, batch_size, drop_last, prefetch, device)

    def _iterate(
        self, tiling: Tiling, shuffle: bool, seed: int | None, prefetch: int, device: str, contiguous: bool, mode: str
    ) -> Iterator[Any]:
        where, mode = parse_device(device), parse_mode(mode)
        depth = prefetch_of(prefetch)
        order = Order(bool(shuffle), check_seed(seed))
        check_device(where, mode)
        found = self._tiles(self._fitting(tiling), order, contiguous=contiguous, prefetch=depth, arrow=mode == "arrow")
        if where.kind == "cuda":
            return upload_each((array for _, array in found), where)
        return (DLPackTensor(array) for _, array in found)

    def _fitting(self, tiling: Tiling) -> Tiling:
        """The tiling, if the view's layout can show its tiles: one that the whole view has too many t for may fit each batch."""
        resolved = self._resolve()
        if tiling.edge == "pad":
            tiling.pad_value(resolved.dtype)
        tiles = TileSequence(resolved.shown, tiling)
        if tiles.total:
            # The first tile of the enumeration is the largest along every axis.
            nt, nz, nc, h, w = tiles.tile(0).shape
            block = Selection(range(nt), range(nz), range(nc), 0, 0, w, h)
            ResolvedPlan(block, resolved.layout, resolved.dtype, resolved.channel_policy).check()
        return tiling


def tiling_of(tile_size: Any, edge: Edge, pad: float) -> Tiling:
    """Tiles of ``(h, w)`` or ``(z, h, w)``. Raises InvalidArgument."""
    entries = len(tile_size) if hasattr(tile_size, "__len__") else 0
    return Tiling.tiles_3d(tile_size, edge, pad) if entries == 3 else Tiling.tiles(tile_size, edge, pad)


def check_batch_edge(edge: object) -> None:
    """InvalidArgument where tiles would not all be of one shape."""
    if edge not in ("drop", "pad"):
        raise InvalidArgument(f"edge must be drop or pad, not {edge!r}: a batch has tiles of one shape", field="edge", value=edge)


def windows_of(origins: Any, size: tuple[int, ...], edge: object, pad: float, images: Any = None) -> Tiling:
    """Windows at listed origins, with ``images`` each of the image of that number. Raises InvalidArgument."""
    if edge not in ("error", "pad"):
        raise InvalidArgument(f"edge must be error or pad, not {edge!r}", field="edge", value=edge)
    return Tiling.windows(origins, size, "pad" if edge == "pad" else "clip", pad, images)


def in_batches(
    read: Callable[[int, int], Iterator[B]], batch_size: object, drop_last: bool, prefetch: object, device: str
) -> Iterator[B]:
    """The batches that a caller's arguments mean.

    Args:
        read: Begins the read, given the size of a batch and the number of batches to read ahead.
        batch_size, drop_last, prefetch, device: As in :meth:`TileIteration.iter_batches`.

    Raises:
        InvalidArgument: naming the argument; nothing has been read then.
    """
    size = positive(batch_size, "batch_size", "batch_size must be > 0")
    where, depth = parse_device(device), prefetch_of(prefetch)
    check_device(where, "numpy")
    found = read(size, depth)
    if drop_last:
        found = (batch for batch in found if len(batch) == size)
    return uploaded(found, where) if where.kind == "cuda" else found


def order_of(shuffle: bool, seed: int | None, shard: object, start: object) -> Order:
    """The order that a caller's arguments mean. Raises InvalidArgument, naming the argument."""
    if not isinstance(shard, (tuple, list)) or len(shard) != 2:
        raise InvalidArgument(f"shard must be (index, count), not {shard!r}", field="shard", value=shard)
    index, count = (_count(value, "shard") for value in shard)
    return Order(bool(shuffle), check_seed(seed), index, count, _count(start, "start"))


def _count(value: object, name: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidArgument(f"{name} must be an integer, not {value!r}", field=name, value=value)
    return operator.index(value)


def prefetch_of(prefetch: object) -> int:
    """A number of items to read ahead. Raises InvalidArgument."""
    depth = _count(prefetch, "prefetch")
    if depth < 0:
        raise InvalidArgument(f"prefetch must be >= 0: {prefetch}", field="prefetch", value=prefetch)
    return depth
