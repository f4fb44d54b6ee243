"""Where a view's pixels come from: a stored record, a caller's plane loader, or an array already in memory, behind one small face."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from .blocks import ChunkCache
from .errors import InvalidRecord
from .index import PixelIndex, copy_dense, require_single_plane
from .record import ImageMeta, Record, first_record, read_meta
from .selection import Selection, compact

__all__ = ["DensePixels", "LoadedPlanes", "Pixels", "StoredPixels", "pixels_of"]


class Pixels(Protocol):
    """Where a view's pixels come from."""

    meta: ImageMeta

    @property
    def stored_dtype(self) -> np.dtype | None:
        """Dtype of what :meth:`flat_values` gives, where all blocks share one; ``None`` where they do not, or only reading them can tell."""

    def gather(self, selection: Selection, out: np.ndarray) -> None:
        """Write the selection's pixels into ``out``, a writable TZCYX array of the selection's shape, cast as ``numpy.astype`` does.

        Raises:
            InvalidRecord: a needed block is missing, doubled or damaged, or, where ``out`` is of the image's own dtype, a block that is read stores
                a value that this dtype cannot hold. ``out`` may have been written in part.
        """

    def flat_values(self, selection: Selection) -> np.ndarray:
        """``mode="arrow"``: the stored values of exactly one plane or chunk, 1-D, in the stored dtype. May be stored memory.

        Raises:
            InvalidSelection: the selection is not exactly one stored plane or chunk.
        """


class LoadedPlanes:
    """Pixels that a caller's function loads, one whole plane at a time.

    Args:
        meta: The image's metadata.
        load: ``load(t, z, c)`` gives one plane of Y * X values.
        stored: The record's own pixels, for ``mode="arrow"``, which the loader does not concern.
    """

    def __init__(self, meta: ImageMeta, load: Callable[[int, int, int], Any], stored: Callable[[], Pixels]) -> None:
        self.meta = meta
        self._load = load
        self._stored = stored

    @property
    def stored_dtype(self) -> np.dtype | None:
        """See :attr:`Pixels.stored_dtype`."""
        return self._stored().stored_dtype

    def gather(self, selection: Selection, out: np.ndarray) -> None:
        """See :meth:`Pixels.gather`."""
        s, extent = selection, self.meta.extent
        for it, t in enumerate(s.t):
            for iz, z in enumerate(s.z):
                for ic, c in enumerate(s.c):
                    plane = np.asarray(self._load(t, z, c))
                    if plane.size != extent.y * extent.x:
                        raise InvalidRecord(
                            f"plane_loader({t}, {z}, {c}) gave {plane.size} values of shape {plane.shape}, expected {extent.y} x {extent.x}",
                            field="plane_loader",
                        )
                    out[it, iz, ic] = plane.reshape(extent.y, extent.x)[s.y : s.y + s.h, s.x : s.x + s.w]

    def flat_values(self, selection: Selection) -> np.ndarray:
        """See :meth:`Pixels.flat_values`."""
        return self._stored().flat_values(selection)


class DensePixels:
    """Pixels of one selection already in memory, addressed by image coordinates.

    Args:
        selection: What ``array`` holds.
        array: Its pixels, TZCYX.
        beyond: Where everything else comes from: other pixels, and the stored values of ``mode="arrow"``.
    """

    def __init__(self, selection: Selection, array: np.ndarray, beyond: Pixels) -> None:
        self.meta = beyond.meta
        self._selection = selection
        self._array = array
        self._beyond = beyond
        # Of an index selected twice either copy will do: they are equal.
        self._places = [{index: place for place, index in enumerate(axis)} for axis in (selection.t, selection.z, selection.c)]

    @property
    def stored_dtype(self) -> np.dtype | None:
        """See :attr:`Pixels.stored_dtype`."""
        return self._beyond.stored_dtype

    def gather(self, selection: Selection, out: np.ndarray) -> None:
        """See :meth:`Pixels.gather`."""
        s, held = selection, self._selection
        y, x = s.y - held.y, s.x - held.x
        axes = (s.t, s.z, s.c)
        inside = y >= 0 and x >= 0 and y + s.h <= held.h and x + s.w <= held.w
        if not inside or not all(index in place for place, axis in zip(self._places, axes, strict=True) for index in axis):
            self._beyond.gather(selection, out)
            return
        t, z, c = (compact([place[index] for index in axis]) for place, axis in zip(self._places, axes, strict=True))
        copy_dense(self._array, Selection(t, z, c, x, y, s.w, s.h), out)

    def flat_values(self, selection: Selection) -> np.ndarray:
        """See :meth:`Pixels.flat_values`."""
        return self._beyond.flat_values(selection)


class StoredPixels:
    """A record's own pixels: metadata at once, the index when first needed (a view with a plane loader never needs it).

    Args:
        record: The record.
        cache: Where decompressed chunks are kept.

    Raises:
        InvalidRecord: the metadata is damaged.
    """

    def __init__(self, record: Record, cache: ChunkCache | None = None) -> None:
        self.meta = read_meta(record)
        self._record: Record | None = record
        self._cache = cache
        self._index: PixelIndex | None = None
        self._lock = threading.Lock()

    @property
    def index(self) -> PixelIndex:
        """The index, built once. Raises InvalidRecord where the blocks are damaged."""
        index = self._index
        if index is None:
            with self._lock:
                if self._index is None:
                    assert self._record is not None
                    self._index = PixelIndex(self._record, self.meta, self._cache)
                    self._record = None
                index = self._index
        return index

    @property
    def stored_dtype(self) -> np.dtype | None:
        """See :attr:`Pixels.stored_dtype`."""
        return self.index.stored_dtype

    def gather(self, selection: Selection, out: np.ndarray) -> None:
        """See :meth:`Pixels.gather`."""
        self.index.gather(selection, out)

    def flat_values(self, selection: Selection) -> np.ndarray:
        """See :meth:`Pixels.flat_values`."""
        require_single_plane(selection)
        return self.index.flat_values(selection)


class _Cache:
    """Pixels by the identity of the Arrow object they were found in (which hashes by content or not at all), as long as it lives."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Any], StoredPixels]] = {}
        self._lock = threading.Lock()

    def get(self, data: Any) -> StoredPixels:
        key = id(data)
        entry = self._entries.get(key)
        if entry is not None and entry[0]() is data:
            return entry[1]
        record = first_record(data)
        if not isinstance(data, (pa.Array, pa.ChunkedArray)):
            return StoredPixels(record)  # A dict may be changed by its owner; a scalar would be kept alive by its own entry.
        pixels = StoredPixels(record)
        with self._lock:
            self._entries[key] = (weakref.ref(data, lambda _: self._entries.pop(key, None)), pixels)
        return pixels


# The one piece of state this package keeps: an identity map that forgets with its keys, so that a view made anew for each tile by a
# caller's own loop does not parse the record again.
_cache = _Cache()


def pixels_of(data: object) -> StoredPixels:
    """The pixels of the first record of OME-Arrow ``data``; the same object for the same Arrow array as long as that lives."""
    return _cache.get(data)
