"""What every view offers, whatever stands behind it: exports and tile iteration, written once over a few primitives.

:class:`TensorExports` checks arguments, chooses the tiling and hands pixels on. Its subclasses say how to describe the view and how to read it:
``TensorView`` from a record in this process, ``LazyTensorView`` from its source, which may be a server.
"""

from __future__ import annotations

import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import InvalidArgument
from .handoff import DLPackTensor, check_device, parse_device, parse_mode, to_jax, to_torch, upload, upload_each
from .layout import apply_layout, to_axes
from .plan import ResolvedPlan
from .tiling import Edge, Order, Tile, TileSequence, Tiling, check_seed

__all__ = ["TensorExports", "TileArray"]


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


class TensorExports(ABC):
    """Exports and iteration shared by all views."""

    # -- primitives ----------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _resolve(self) -> ResolvedPlan:
        """The plan fitted to the image."""

    @abstractmethod
    def _array(self) -> np.ndarray:
        """The whole view in its layout, in memory that the view keeps; writable, never handed out without a guard."""

    @abstractmethod
    def _read_into(self, out: np.ndarray) -> None:
        """Read the whole view into ``out``, a writable TZCYX array of the shape and dtype that is shown."""

    @abstractmethod
    def _values(self) -> np.ndarray:
        """``mode="arrow"``: the flat stored values, in private memory."""

    @abstractmethod
    def _tiles(
        self, tiling: Tiling, order: Order, *, contiguous: bool, prefetch: int, arrow: bool
    ) -> Iterator[tuple[Tile, np.ndarray]]:
        """Tiles in the view's layout (flat stored values with ``arrow``), each in private memory."""

    # -- whole view ----------------------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in elements, in layout order. Reads no pixels."""
        return self._resolve().shape

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides in bytes of the C-ordered TZCYX selection, permuted to the layout. Reads no pixels."""
        return self._resolve().strides

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the elements. Reads no pixels."""
        return self._resolve().dtype

    @property
    def layout(self) -> str:
        """Axis letters of TZCHW, in order. Reads no pixels."""
        return self._resolve().layout

    @property
    def nbytes(self) -> int:
        """Bytes of the view's elements. Reads no pixels."""
        return self._resolve().nbytes

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.layout)

    def __len__(self) -> int:
        return self.shape[0]

    def to_numpy(self, *, contiguous: bool = False, out: np.ndarray | None = None) -> np.ndarray:
        """The view as a read-only NumPy array in its layout.

        The array shares memory with the view, which reads its pixels once; copy it to change it.

        Args:
            contiguous: Give a C-contiguous array: a copy of its own where the layout is permuted.
            out: A writable array of the view's shape and dtype to read into, past the view's own memory; it is what is returned.

        Raises:
            InvalidArgument: ``out`` does not fit.
        """
        if out is not None:
            self._read_into(to_axes(self._fitting_out(out), self.layout))
            return out
        array = self._array()
        if contiguous and not array.flags.c_contiguous:
            return np.ascontiguousarray(array)
        array = array.view()
        array.flags.writeable = False
        return array

    def _fitting_out(self, out: object) -> np.ndarray:
        shape, dtype = self.shape, self.dtype
        if not isinstance(out, np.ndarray) or out.shape != shape or out.dtype != dtype or not out.flags.writeable:
            got = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
            raise InvalidArgument(f"out must be a writable {dtype} array of shape {shape}, not {got}", field="out", value=got)
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.to_numpy()
        if dtype is not None and np.dtype(dtype) != array.dtype:
            if copy is False:
                raise ValueError(f"a {array.dtype} view cannot be seen as {np.dtype(dtype)} without a copy")
            return array.astype(dtype)
        return array.copy() if copy else array

    def to_dlpack(self, *, device: str = "cpu", contiguous: bool = True, mode: str = "arrow") -> Any:
        """The view as a DLPack producer.

        Args:
            device: ``cpu``, ``cuda`` or ``cuda:N``.
            contiguous: Copy a permuted layout into C order.
            mode: ``numpy``: tensor-shaped; shares memory with :meth:`to_numpy`. ``arrow``: the flat stored values of the one plane or
                chunk that is selected, copied.

        Raises:
            InvalidArgument: an unknown device or mode; a selection that ``mode="arrow"`` cannot give.
            DeviceUnavailable: no CUDA.
        """
        where, mode = parse_device(device), parse_mode(mode)
        check_device(where, mode)
        if mode == "arrow":
            return DLPackTensor(self._values())
        array = self._array()
        copied = contiguous and not array.flags.c_contiguous
        if copied:
            array = np.ascontiguousarray(array)
        return DLPackTensor(array, shared=not copied) if where.kind == "cpu" else upload(array, where)

    def to_torch(self, *, device: str = "cpu", contiguous: bool = True, mode: str = "arrow") -> Any:
        """The view as a torch tensor; arguments as in :meth:`to_dlpack`."""
        return to_torch(self.to_dlpack(device=device, contiguous=contiguous, mode=mode))

    def to_jax(self, *, device: str = "cpu", contiguous: bool = True, mode: str = "arrow") -> Any:
        """The view as a JAX array; arguments as in :meth:`to_dlpack`."""
        return to_jax(self.to_dlpack(device=device, contiguous=contiguous, mode=mode))

    # -- iteration -----------------------------------------------------------------------------------------------------------------

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
        entries = len(tile_size) if hasattr(tile_size, "__len__") else 0
        tiling = Tiling.tiles_3d(tile_size, edge, pad) if entries == 3 else Tiling.tiles(tile_size, edge, pad)
        if not isinstance(shard, (tuple, list)) or len(shard) != 2:
            raise InvalidArgument(f"shard must be (index, count), not {shard!r}", field="shard", value=shard)
        index, count, skip = (
            _count(value, name) for value, name in zip((*shard, start), ("shard", "shard", "start"), strict=True)
        )
        order = Order(bool(shuffle), check_seed(seed), index, count, skip)
        found = self._tiles(self._fitting(tiling), order, contiguous=contiguous, prefetch=_prefetch(prefetch), arrow=False)
        return (
            TileArray(
                array, tile.number, tile.position, _origin(tile), (len(tile.selection.z), tile.selection.h, tile.selection.w)
            )
            for tile, array in found
        )

    def _iterate(
        self, tiling: Tiling, shuffle: bool, seed: int | None, prefetch: int, device: str, contiguous: bool, mode: str
    ) -> Iterator[Any]:
        where, mode = parse_device(device), parse_mode(mode)
        depth = _prefetch(prefetch)
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
            ResolvedPlan(tiles.tile(0).selection, resolved.layout, resolved.dtype, resolved.channel_policy).check()
        return tiling


def _origin(tile: Tile) -> tuple[int, int, int, int]:
    s = tile.selection
    return (s.t[0] if s.t else -1), (s.z[0] if s.z else -1), s.y, s.x


def _count(value: object, name: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InvalidArgument(f"{name} must be an integer, not {value!r}", field=name, value=value)
    return operator.index(value)


def _prefetch(prefetch: object) -> int:
    depth = _count(prefetch, "prefetch")
    if depth < 0:
        raise InvalidArgument(f"prefetch must be >= 0: {prefetch}", field="prefetch", value=prefetch)
    return depth


def in_layout(array: np.ndarray, layout: str, contiguous: bool) -> np.ndarray:
    """A tile's TZCYX pixels as the view shows them."""
    shown = apply_layout(array, layout)
    return np.ascontiguousarray(shown) if contiguous else shown
