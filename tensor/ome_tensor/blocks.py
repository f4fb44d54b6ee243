"""The stored blocks of one record: planes or chunks, found once, each seen as a (Z, Y, X) array without copying a pixel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from .errors import InvalidRecord
from .payloads import BytesPayload, ChunkCache, ListPayload, ObjectPayload, Payload
from .pixel_types import first_misfit
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
        all_fit: Whether all stored values are known to fit the image's pixel type: by their dtype, or since they have been looked at.
    """

    def __init__(self, what: str, geometry: Mapping[str, np.ndarray], payload: Payload, meta: ImageMeta) -> None:
        self.what = what
        self.t, self.z, self.c, self.y, self.x, self.nz, self.ny, self.nx = (geometry[name] for name in _GEOMETRY)
        self.payload = payload
        self._meta = meta
        self._objects = payload if isinstance(payload, ObjectPayload) else None
        self.all_fit = payload.dtype is not None and np.can_cast(payload.dtype, meta.dtype, "safe")
        # The verdict on each block, so that none is looked at twice.
        self._fits = bytearray(0 if self.all_fit else len(self.t))
        # Views of stored memory whose length has been checked; decompressed chunks are the cache's to keep or to forget.
        self._arrays: dict[int, np.ndarray] = {}
        self._keeps = payload.addresses() is not None

    def __len__(self) -> int:
        return len(self.t)

    def name(self, block: int) -> str:
        """A block for an error message."""
        return _name(self.what, {"t": self.t, "z": self.z, "c": self.c, "y": self.y, "x": self.x}, block)

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
        if first_misfit(values, np.dtype(np.uint16)) is not None:
            raise InvalidRecord(
                f"{self.name(block)}: pixels of a dict do not fit in uint16, as OME-Arrow stores them", field=self.what
            )
        return values.astype(np.uint16)

    def array(self, block: int) -> np.ndarray:
        """A block as a (Z, Y, X) array on the stored memory."""
        array = self._arrays.get(block)
        if array is None:
            array = self.flat(block).reshape(self.nz[block], self.ny[block], self.nx[block])
            if self._keeps and len(self._arrays) < _ARRAYS_KEPT:
                self._arrays[block] = array
        return array

    def window(self, block: int, z: slice, y: slice, x: slice, *, fitting: bool) -> np.ndarray:
        """A part of a block as a (Z, Y, X) array; slices of step 1 inside it.

        Args:
            block: Its number.
            z, y, x: The part, counted in the block.
            fitting: Whether values that the image's pixel type cannot hold are an error; not for a caller who names a dtype.

        Raises:
            InvalidRecord: the payload is of another length than the block, or holds such a value.
        """
        if self._objects is not None:
            part = self._objects.window(block, (int(self.nz[block]), int(self.ny[block]), int(self.nx[block])), z, y, x)
            if part is not None:
                if fitting:
                    self._check_values(block, part, (z.start, y.start, x.start))
                return part
        array = self.array(block)
        if fitting and not self._fits[block]:
            self._check_values(block, array)
            self._fits[block] = True
        return array[z, y, x]

    def check_fit(self, blocks: Iterable[int]) -> None:
        """InvalidRecord where one of these blocks holds a value that the image's pixel type cannot. Each block is looked at once."""
        unknown = [block for block in blocks if not self._fits[block]]
        for block in unknown:
            self._check_values(block, self.array(block))
            self._fits[block] = True
        if unknown and 0 not in self._fits:
            self.all_fit = True

    def _check_values(self, block: int, values: np.ndarray, origin: tuple[int, int, int] = (0, 0, 0)) -> None:
        flat = values.reshape(-1)
        first = first_misfit(flat, self._meta.dtype)
        if first is None:
            return
        inside = np.unravel_index(first, values.shape)
        z, y, x = (
            int(start[block]) + before + int(place)
            for start, before, place in zip((self.z, self.y, self.x), origin, inside, strict=True)
        )
        value = flat[first].item()
        raise InvalidRecord(
            f"{self.what} hold {value!r} at (t={self.t[block]}, z={z}, c={self.c[block]}, y={y}, x={x}), which does not fit pixel type "
            f"{self._meta.pixel_type or 'uint16'!r} (dtype={flat.dtype.name!r} reads it as stored)",
            field=f"{self.what}.pixels",
            value=value,
        )

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


def _name(what: str, geometry: Mapping[str, np.ndarray], block: int) -> str:
    t, z, c, y, x = (int(geometry[axis][block]) for axis in "tzcyx")
    return f"plane (t={t}, z={z}, c={c})" if what == "planes" else f"chunk (t={t}, z={z}, c={c}, y={y}, x={x})"


def find_blocks(record: Record, meta: ImageMeta, cache: ChunkCache) -> Blocks:
    """The record's chunks if it has any, else its planes.

    Raises:
        InvalidRecord: neither, no lists of structs, a chunk order other than ZYX, or fields missing from the entries.
    """
    entries = _entries(record, "chunks")
    if len(entries):
        if meta.chunk_order != "ZYX":
            raise InvalidRecord(
                f"Only chunk_order='ZYX' is supported for now, not {meta.chunk_order!r}", field="chunk_grid.chunk_order"
            )
        return _blocks_of(entries, "chunks", meta, cache)
    entries = _entries(record, "planes")
    if len(entries):
        return _blocks_of(entries, "planes", meta, cache)
    raise InvalidRecord("the OME-Arrow record holds no pixels: neither planes nor chunks", field="planes")


def _entries(record: Record, what: str) -> Any:
    """The record's planes or chunks: an Arrow struct array, or a sequence of mappings; empty where the record has none."""
    value = field_of(record, what)
    if value is None:
        return ()
    entries = value.values if isinstance(value, (pa.ListScalar, pa.LargeListScalar, pa.FixedSizeListScalar)) else value
    if isinstance(entries, pa.Array):
        if isinstance(entries, pa.StructArray) or not len(entries):
            return entries
    elif isinstance(entries, (Sequence, np.ndarray)) and all(isinstance(entry, Mapping) for entry in entries):
        return entries
    if isinstance(value, (pa.Scalar, pa.Array)):
        kind = str(value.type)
    elif isinstance(value, (list, tuple)):
        kind = "a list of " + next(type(entry).__name__ for entry in value if not isinstance(entry, Mapping))
    else:
        kind = type(value).__name__
    raise InvalidRecord(f"{what} must be a list of structs, not {kind}", field=what, value=kind)


def _blocks_of(entries: Any, what: str, meta: ImageMeta, cache: ChunkCache) -> Blocks:
    wanted = _GEOMETRY if what == "chunks" else _GEOMETRY[:3]
    geometry: dict[str, np.ndarray] = {}
    for name in wanted:
        geometry[name] = _column(entries, name, what)
    if what == "planes":
        zeros = np.zeros(len(entries), np.int64)
        ones = zeros + 1
        geometry |= {"y": zeros, "x": zeros, "shape_z": ones, "shape_y": ones * meta.extent.y, "shape_x": ones * meta.extent.x}
    name_of = partial(_name, what, geometry)
    payload: Payload
    if not isinstance(entries, pa.Array):
        payload = ObjectPayload(entries, what, meta.dtype, cache, name_of)
    elif "pixel_bytes" in {field.name for field in entries.type}:
        payload = BytesPayload(entries, meta.dtype, cache, name_of)
    else:
        try:
            lists = entries.field("pixels")
        except KeyError:
            raise InvalidRecord(f"{what} entries have no pixels", field=f"{what}.pixels") from None
        payload = ListPayload(lists, f"{what}.pixels")
    blocks = Blocks(what, geometry, payload, meta)
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
    except ValueError:
        array = np.empty(0, object)  # Lists of different lengths, for example.
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise InvalidRecord(f"{field} must be integers", field=field)
    integers: np.ndarray = array.astype(np.int64, copy=False)
    return integers
