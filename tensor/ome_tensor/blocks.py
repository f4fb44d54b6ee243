"""The stored blocks of one record: planes or chunks, found once, each seen as a (Z, Y, X) array without copying a pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from .errors import InvalidRecord
from .payloads import BytesPayload, ChunkCache, ListPayload, ObjectPayload, Payload
from .record import ImageMeta, Record, field_of

__all__ = ["Blocks", "ChunkCache", "find_blocks"]

_GEOMETRY = ("t", "z", "c", "y", "x", "shape_z", "shape_y", "shape_x")

#: Views of blocks that one index remembers, some 250 bytes each.
_ARRAYS_KEPT = 65_536


class Blocks:
    """All stored blocks of a record.

    Attributes:
        what: ``planes`` or ``chunks``.
        t, z, c, y, x: int64 arrays: each block's origin in the image.
        nz, ny, nx: int64 arrays: each block's size in elements.
        payload: Their pixels.
    """

    def __init__(self, what: str, geometry: Mapping[str, np.ndarray], payload: Payload) -> None:
        self.what = what
        self.t, self.z, self.c, self.y, self.x, self.nz, self.ny, self.nx = (geometry[name] for name in _GEOMETRY)
        self.payload = payload
        # Views of stored memory whose length has been checked; decompressed chunks are the cache's to keep or to forget.
        self._arrays: dict[int, np.ndarray] = {}
        self._keeps = payload.addresses() is not None

    def __len__(self) -> int:
        return len(self.t)

    def name(self, block: int) -> str:
        """A block for an error message."""
        place = f"t={self.t[block]}, z={self.z[block]}, c={self.c[block]}"
        return f"plane ({place})" if self.what == "planes" else f"chunk ({place}, y={self.y[block]}, x={self.x[block]})"

    def flat(self, block: int) -> np.ndarray:
        """The stored values of a block, 1-D, ZYX order, in the stored dtype.

        Raises:
            InvalidRecord: there are more or fewer than the block's size.
        """
        expected = int(self.nz[block]) * int(self.ny[block]) * int(self.nx[block])
        values = self.payload.values(block, expected)
        stored = self.payload.length(block)
        if (len(values) if stored is None else stored) != expected:
            raise InvalidRecord(
                f"{self.name(block)}: pixels length {len(values) if stored in (None, -1) else stored} != expected {expected}",
                field=self.what,
            )
        return values

    def stored(self, block: int) -> np.ndarray:
        """:meth:`flat` in the dtype that Arrow stores: a dict's numbers have none of their own and are uint16 there, as upstream has them.

        Raises:
            InvalidRecord: also where a dict's number is not a uint16.
        """
        values = self.flat(block)
        if not isinstance(self.payload, ObjectPayload) or values.dtype == np.uint16:
            return values
        stored = values.astype(np.uint16)
        if not np.array_equal(stored, values):
            raise InvalidRecord(
                f"{self.name(block)}: pixels of a dict do not fit in uint16, as OME-Arrow stores them", field=self.what
            )
        return stored

    def array(self, block: int) -> np.ndarray:
        """A block as a (Z, Y, X) array on the stored memory."""
        array = self._arrays.get(block)
        if array is None:
            array = self.flat(block).reshape(self.nz[block], self.ny[block], self.nx[block])
            if self._keeps and len(self._arrays) < _ARRAYS_KEPT:
                self._arrays[block] = array
        return array

    def check_geometry(self, meta: ImageMeta) -> None:
        """InvalidRecord where a block lies outside the image: it could not be placed, and a block elsewhere may be what is missing."""
        t, z, c, y, x = meta.extent
        bad = (self.t < 0) | (self.t >= t) | (self.c < 0) | (self.c >= c)
        for origin, count, size in ((self.z, self.nz, z), (self.y, self.ny, y), (self.x, self.nx, x)):
            bad |= (origin < 0) | (count <= 0) | (count > size) | (origin > size - count)
        # No memory has so many bytes, and products of sizes would wrap.
        bad |= self.nz.astype(np.float64) * self.ny * self.nx > 2.0**58
        if bad.any():
            block = int(np.argmax(bad))
            shape = (int(self.nz[block]), int(self.ny[block]), int(self.nx[block]))
            raise InvalidRecord(
                f"{self.name(block)} of shape {shape} has an invalid shape or origin: its extent is out of range of the image {tuple(meta.extent)}",
                field=self.what,
            )


def find_blocks(record: Record, meta: ImageMeta, cache: ChunkCache) -> Blocks:
    """The record's chunks if it has any, else its planes.

    Raises:
        InvalidRecord: neither, a chunk order other than ZYX, or fields missing from the entries.
    """
    chunks = field_of(record, "chunks")
    entries = chunks.values if isinstance(chunks, pa.Scalar) else chunks
    if entries is not None and len(entries):
        if meta.chunk_order != "ZYX":
            raise InvalidRecord(
                f"Only chunk_order='ZYX' is supported for now, not {meta.chunk_order!r}", field="chunk_grid.chunk_order"
            )
        return _blocks_of(entries, "chunks", meta, cache)
    planes = field_of(record, "planes")
    entries = planes.values if isinstance(planes, pa.Scalar) else planes
    if entries is not None and len(entries):
        return _blocks_of(entries, "planes", meta, cache)
    raise InvalidRecord("the OME-Arrow record holds no pixels: neither planes nor chunks", field="planes")


def _blocks_of(entries: Any, what: str, meta: ImageMeta, cache: ChunkCache) -> Blocks:
    wanted = _GEOMETRY if what == "chunks" else _GEOMETRY[:3]
    geometry: dict[str, np.ndarray] = {}
    for name in wanted:
        geometry[name] = _column(entries, name, what)
    if what == "planes":
        zeros = np.zeros(len(entries), np.int64)
        ones = zeros + 1
        geometry |= {"y": zeros, "x": zeros, "shape_z": ones, "shape_y": ones * meta.extent.y, "shape_x": ones * meta.extent.x}
    payload: Payload
    if not isinstance(entries, pa.Array):
        payload = ObjectPayload(entries, what, meta.dtype, cache)
    elif "pixel_bytes" in {field.name for field in entries.type}:
        payload = BytesPayload(entries, meta.dtype, cache)
    else:
        try:
            lists = entries.field("pixels")
        except KeyError:
            raise InvalidRecord(f"{what} entries have no pixels", field=f"{what}.pixels") from None
        payload = ListPayload(lists, f"{what}.pixels")
    blocks = Blocks(what, geometry, payload)
    blocks.check_geometry(meta)
    return blocks


def _column(entries: Any, name: str, what: str) -> np.ndarray:
    """One integer field of all entries as int64."""
    field = f"{what}.{name}"
    try:
        if isinstance(entries, pa.Array):
            column = entries.field(name)
            if column.null_count:
                raise InvalidRecord(f"{field} is null in {column.null_count} entries", field=field)
            array = column.to_numpy(zero_copy_only=False)
        else:
            array = np.asarray([entry[name] for entry in entries])
    except (KeyError, TypeError):
        raise InvalidRecord(f"{field} is missing", field=field) from None
    if array.dtype.kind not in "iu":
        raise InvalidRecord(f"{field} must be integers", field=field)
    integers: np.ndarray = array.astype(np.int64, copy=False)
    return integers
