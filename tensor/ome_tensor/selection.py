"""The selection algebra: from what a caller writes to the pixels it means.

This layer is pure: it never sees a pixel, a file or a socket. Its entry points are

* :func:`canonical_index`, :func:`canonical_region`: check the *form* of an argument, without an image (what a client can do before
  any traffic);
* :func:`select`: fit a checked form to an image's extent, giving a :class:`Selection`.

Axis order is TZCYX throughout. A ROI is ``(x, y, w, h)``; ``roi_nd`` is min/max bounds, row first. Limits (how many indices a server
takes) are not this layer's: they live with the server's settings. Error texts follow upstream's tensor module, so that code written for it
keeps working.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from .errors import InvalidRecord, InvalidSelection

__all__ = [
    "ChunkGrid",
    "Extent",
    "Index",
    "Indices",
    "Region",
    "Selection",
    "as_index",
    "canonical_index",
    "canonical_region",
    "compact",
    "select",
]

#: What a caller may write for t, z or c, once its form is checked: all, one, a slice, or a list in which order and duplicates count.
Index: TypeAlias = "int | slice | tuple[int, ...] | None"

#: Chosen positions on one axis; a range where they are evenly spaced, so that a long axis costs nothing.
Indices: TypeAlias = "range | tuple[int, ...]"

RegionKind = Literal["roi", "roi3d", "2d", "2d_timelapse", "3d", "4d", "tile"]

_INT64_MIN, _INT64_MAX = -(2**63), 2**63 - 1

#: Larger numbers are described: 77 digits are a line.
_MOST_BITS_SHOWN = 256

_ROI_ND_LENGTH = {"2d": 4, "2d_timelapse": 6, "3d": 6, "4d": 8}


class Extent(NamedTuple):
    """An image's size in elements, in TZCYX order; every entry is positive."""

    t: int
    z: int
    c: int
    y: int
    x: int


class ChunkGrid(NamedTuple):
    """The stored blocks' size in elements; ``tile=(tile_y, tile_x)`` counts in it."""

    y: int
    x: int
    z: int = 1
    c: int = 1
    t: int = 1


@dataclass(frozen=True, slots=True)
class Region:
    """A spatial (and perhaps t/z) region in the form the caller gave it.

    Attributes:
        kind: ``roi`` (x, y, w, h); ``roi3d`` (x, y, z, w, h, d); ``2d`` ... ``4d``: ``roi_nd`` bounds of that ``roi_type``;
            ``tile`` (tile_y, tile_x) on the chunk grid.
        values: As many integers as the kind wants.
    """

    kind: RegionKind
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """Normalised: indices inside the image, a ROI inside the frame.

    Attributes:
        t, z, c: Chosen indices, in the order asked for, duplicates kept; may be empty.
        x, y: The ROI's origin in pixels.
        w, h: The ROI's size in pixels, both positive.
    """

    t: Indices
    z: Indices
    c: Indices
    x: int
    y: int
    w: int
    h: int

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Number of elements along T, Z, C, Y, X."""
        return len(self.t), len(self.z), len(self.c), self.h, self.w

    @property
    def roi(self) -> tuple[int, int, int, int]:
        """The ROI as ``(x, y, w, h)``."""
        return self.x, self.y, self.w, self.h

    @property
    def size(self) -> int:
        """Number of elements."""
        return len(self.t) * len(self.z) * len(self.c) * self.h * self.w


def canonical_index(index: object, axis: str) -> Index:
    """Check the form of a t, z or c argument: ``None``, an integer, a slice, or a sequence (or integer array) of integers.

    Raises:
        InvalidSelection: ``Unsupported t index type``, ``t indices must be integers`` (booleans are not integers here: ``True`` would
            silently mean 1), or one beyond 64 bits, which no image has and no message holds.
    """
    if index is None:
        return index
    if type(index) is int:
        return _in_64_bits(index, axis)
    if isinstance(index, slice):
        return slice(*(None if part is None else slice_part(part, axis) for part in (index.start, index.stop, index.step)))
    if isinstance(index, range):
        for end in index[:1], index[-1:]:
            for item in end:
                _in_64_bits(item, axis)
        return tuple(index)
    if isinstance(index, np.ndarray) and index.ndim == 1:
        if index.dtype.kind not in "iu" and index.size:
            raise InvalidSelection(f"{axis} indices must be integers, not {index.dtype}", field=axis, value=index)
        return tuple(_in_64_bits(item, axis) for item in index.tolist())
    if isinstance(index, Sequence) and not isinstance(index, (str, bytes, bytearray)):
        return tuple(_in_64_bits(exact_integer(item, f"{axis} indices must be integers", axis), axis) for item in index)
    return _in_64_bits(exact_integer(index, f"Unsupported {axis} index type", axis), axis)


def _in_64_bits(value: int, axis: str) -> int:
    if not _INT64_MIN <= value <= _INT64_MAX:
        text = _text_of(value)
        raise InvalidSelection(f"{axis} index {text} out of range: it does not fit in 64 bits", field=axis, value=text)
    return value


def _text_of(number: int) -> str:
    """Digits, but not thousands of them, which Python refuses to write."""
    bits = number.bit_length()
    return str(number) if bits <= _MOST_BITS_SHOWN else f"of {bits} bits"


def slice_part(part: object, axis: str) -> int:
    return exact_integer(part, f"{axis} slice parts must be integers", axis)


def exact_integer(value: object, complaint: str, field: str) -> int:
    """An exact integer (int or NumPy integer, never a boolean or a float)."""
    if type(value) is int:
        return value
    if isinstance(value, (bool, np.bool_)):
        raise InvalidSelection(f"{complaint}, not bool: {value!r}", field=field, value=value)
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidSelection(f"{complaint}: {value!r}", field=field, value=value) from None


def _integers(values: object, field: str, wrong_length: str, lengths: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(values, (Sequence, np.ndarray)) or isinstance(values, (str, bytes)):
        raise InvalidSelection(f"{wrong_length}, not {values!r}", field=field, value=values)
    if len(values) not in lengths:
        raise InvalidSelection(f"{wrong_length} Got {len(values)} values: {values!r}", field=field, value=values)
    found = tuple(exact_integer(value, f"{field} entries must be integers", field) for value in values)
    for value in found:
        if not _INT64_MIN <= value <= _INT64_MAX:
            text = _text_of(value)
            raise InvalidSelection(f"{field} is out of bounds: value {text} does not fit in 64 bits", field=field, value=text)
    return found


def canonical_region(
    *,
    t: Index,
    z: Index,
    roi: object = None,
    roi3d: object = None,
    roi_nd: object = None,
    roi_type: object = None,
    tile: object = None,
) -> Region | None:
    """Check the form of the region arguments and that no two of them contradict each other.

    Args:
        t, z: The axis arguments, only to find contradictions.
        roi, roi3d, roi_nd, roi_type, tile: As in ``TensorView``.

    Returns:
        The region, or ``None`` for the full frame.

    Raises:
        InvalidSelection: naming the argument; the texts are upstream's.
    """
    if roi_nd is not None:
        if roi is not None or roi3d is not None or tile is not None:
            raise InvalidSelection("Provide only one of roi_nd, roi3d, roi, or tile.", field="roi_nd")
        kind, values = _canonical_roi_nd(roi_nd, roi_type)
        if kind in ("2d_timelapse", "4d") and t is not None:
            raise InvalidSelection("Provide either t or roi_nd time bounds, not both.", field="t")
        if kind in ("3d", "4d") and z is not None:
            raise InvalidSelection("Provide either z or roi_nd depth bounds, not both.", field="z")
        return Region(kind, values)
    if roi_type is not None:
        raise InvalidSelection("roi_type requires roi_nd.", field="roi_type", value=roi_type)
    if roi3d is not None:
        if roi is not None or tile is not None:
            raise InvalidSelection("Provide only one of roi3d, roi, or tile.", field="roi3d")
        if z is not None:
            raise InvalidSelection("Provide either z or roi3d, not both.", field="roi3d")
        return Region("roi3d", _integers(roi3d, "roi3d", "roi3d must be (x, y, z, w, h, d).", (6,)))
    if roi is not None and tile is not None:
        raise InvalidSelection("Provide either roi or tile, not both.", field="roi")
    if tile is not None:
        return Region("tile", _integers(tile, "tile", "tile must be (tile_y, tile_x).", (2,)))
    if roi is not None:
        return Region("roi", _integers(roi, "roi", "roi must be (x, y, w, h).", (4,)))
    return None


def _canonical_roi_nd(roi_nd: object, roi_type: object) -> tuple[RegionKind, tuple[int, ...]]:
    values = _integers(
        roi_nd, "roi_nd", "roi_nd must have length 4, 6, or 8.", (4, 6, 8) if roi_type is None else tuple(range(64))
    )
    if roi_type is None:
        if len(values) == 6:
            raise InvalidSelection(
                "roi_nd with 6 values is ambiguous; provide roi_type ('2d_timelapse' or '3d').", field="roi_type"
            )
        return ("2d" if len(values) == 4 else "4d"), values
    wanted = _ROI_ND_LENGTH.get(roi_type) if isinstance(roi_type, str) else None
    if wanted is None:
        raise InvalidSelection(
            f"Unsupported roi_type: {roi_type!r}. Expected one of: {', '.join(_ROI_ND_LENGTH)}.", field="roi_type", value=roi_type
        )
    if len(values) != wanted:
        raise InvalidSelection(
            f"roi_type='{roi_type}' requires {wanted} values. Got {len(values)}.", field="roi_nd", value=values
        )
    return roi_type, values  # type: ignore[return-value]


def select(
    extent: Extent,
    *,
    t: Index = None,
    z: Index = None,
    c: Index = None,
    region: Region | None = None,
    grid: ChunkGrid | None = None,
) -> Selection:
    """Fit a canonical selection to an image.

    Args:
        extent: The image's size.
        t, z, c: Canonical indices; negatives count from the end, slices are clipped as Python does.
        region: Canonical region, or ``None`` for the full frame.
        grid: The image's chunk grid; needed for a ``tile`` region only.

    Raises:
        InvalidSelection: an index or the region is outside the image; names the argument and the value.
        InvalidRecord: the chunk grid's sizes are not positive.
    """
    roi = (0, 0, extent.x, extent.y)
    if region is not None:
        kind, values = region.kind, region.values
        if kind == "roi":
            roi = values  # type: ignore[assignment]
        elif kind == "tile":
            roi = _roi_of_tile(values, extent, grid)
        elif kind == "roi3d":
            roi, z = _split_roi3d(values, extent)
        else:
            roi, t_bounds, z_bounds = _split_roi_nd(kind, values, extent)
            t = t_bounds or t
            z = z_bounds or z
    chosen_t, chosen_z, chosen_c = _indices(t, extent.t, "t"), _indices(z, extent.z, "z"), _indices(c, extent.c, "c")
    x, y, w, h = roi
    if w <= 0 or h <= 0:
        raise InvalidSelection(f"roi width and height must be positive: {roi}", field="roi", value=roi)
    if x < 0 or y < 0:
        raise InvalidSelection(f"roi origin must be non-negative: {roi}", field="roi", value=roi)
    if x + w > extent.x or y + h > extent.y:
        raise InvalidSelection(
            f"roi is out of bounds: {roi} in an image of {extent.x} x {extent.y} pixels", field="roi", value=roi
        )
    return Selection(chosen_t, chosen_z, chosen_c, x, y, w, h)


def _indices(index: Index, size: int, axis: str) -> Indices:
    if index is None:
        return range(size)
    if isinstance(index, int):
        position = index + size if index < 0 else index
        if not 0 <= position < size:
            raise InvalidSelection(f"{axis} index {index} out of range for size {size}", field=axis, value=index)
        return range(position, position + 1)
    if isinstance(index, slice):
        if index.step == 0:
            raise InvalidSelection(f"{axis} slice step cannot be zero", field=axis, value=index)
        return range(size)[index]
    for item in index:
        if not -size <= item < size:
            raise InvalidSelection(f"{axis} index {item} out of range for size {size}", field=axis, value=item)
    return compact([item + size if item < 0 else item for item in index])


def compact(values: Sequence[int]) -> Indices:
    """Indices as a range where they are evenly spaced, else as a tuple."""
    if not values:
        return range(0)
    if len(values) == 1:
        return range(values[0], values[0] + 1)
    step = values[1] - values[0]
    if step:
        candidate = range(values[0], values[0] + step * len(values), step)
        if all(map(operator.eq, candidate, values)):
            return candidate
    return tuple(values)


def as_index(indices: Indices) -> slice | tuple[int, ...]:
    """The inverse of fitting: chosen (non-negative) positions as a canonical index; a range becomes a slice."""
    if isinstance(indices, tuple):
        return indices
    if indices.step == 1:
        return slice(indices.start, indices.stop, 1)
    stop = indices[-1] + indices.step if indices else indices.start
    return slice(indices.start, None if stop < 0 else stop, indices.step)


def _roi_of_tile(tile: tuple[int, ...], extent: Extent, grid: ChunkGrid | None) -> tuple[int, int, int, int]:
    if grid is None:
        raise InvalidSelection("tile selection requires chunk_grid metadata", field="tile", value=tile)
    if grid.y <= 0 or grid.x <= 0:
        raise InvalidRecord(f"chunk_grid chunk sizes must be positive: {grid.y} x {grid.x}", field="chunk_grid", value=grid[:2])
    tile_y, tile_x = tile
    if tile_y < 0 or tile_x < 0:
        raise InvalidSelection(f"tile indices must be non-negative: {tile}", field="tile", value=tile)
    x, y = tile_x * grid.x, tile_y * grid.y
    if x >= extent.x or y >= extent.y:
        raise InvalidSelection(
            f"tile indices out of bounds: {tile} in a grid of {-(-extent.y // grid.y)} x {-(-extent.x // grid.x)} chunks",
            field="tile",
            value=tile,
        )
    return x, y, min(grid.x, extent.x - x), min(grid.y, extent.y - y)


def _split_roi3d(roi3d: tuple[int, ...], extent: Extent) -> tuple[tuple[int, int, int, int], slice]:
    x, y, z, w, h, depth = roi3d
    if depth <= 0:
        raise InvalidSelection(f"roi3d depth must be positive: {depth}", field="roi3d", value=roi3d)
    if z < 0:
        raise InvalidSelection(f"roi3d z origin must be non-negative: {z}", field="roi3d", value=roi3d)
    if z + depth > extent.z:
        raise InvalidSelection(f"roi3d depth is out of bounds: z {z} + {depth} > {extent.z}", field="roi3d", value=roi3d)
    return (x, y, w, h), slice(z, z + depth)


def _split_roi_nd(
    kind: str, values: tuple[int, ...], extent: Extent
) -> tuple[tuple[int, int, int, int], slice | None, slice | None]:
    half = len(values) // 2
    low, high = values[:half], values[half:]
    t_bounds = slice(low[0], high[0]) if kind in ("2d_timelapse", "4d") else None
    z_at = {"3d": 0, "4d": 1}.get(kind)
    z_bounds = None if z_at is None else slice(low[z_at], high[z_at])
    for bounds, size, name in ((t_bounds, extent.t, "time"), (z_bounds, extent.z, "depth")):
        if bounds is not None and not 0 <= bounds.start < bounds.stop <= size:
            raise InvalidSelection(
                f"roi_nd {name} bounds are out of range. Got {bounds.start} to {bounds.stop}, size {size}.",
                field="roi_nd",
                value=values,
            )
    y, x = low[-2:]
    w, h = high[-1] - x, high[-2] - y
    if w <= 0 or h <= 0:
        raise InvalidSelection(f"roi_nd spatial bounds must satisfy max > min. Got {values}.", field="roi_nd", value=values)
    return (x, y, w, h), t_bounds, z_bounds
