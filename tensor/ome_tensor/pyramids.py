"""Resolution pyramids that no source has: each level half the height and width of the one before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from .errors import InvalidSelection
from .index import copy_dense
from .listing import Level
from .pixels import Pixels
from .record import ImageMeta
from .selection import Extent, Selection

__all__ = ["ArrayPixels", "halve", "halved", "is_label", "level_meta", "made_levels", "write_level"]

#: An image whose longer side is no longer than this is small enough.
_SMALL = 256

#: Bytes of the level before that are read at a time.
_STRIP_BYTES = 16 << 20


def is_label(meta: ImageMeta) -> bool:
    """Whether an image's values name things instead of measuring them, so that a mean of them would name another thing: labels, and masks of bits."""
    return meta.image_type.strip().lower() == "label" or meta.dtype.kind == "b"


def made_levels(extent: Extent) -> tuple[Level, ...]:
    """The levels of an image without a pyramid of its own: itself, and those that can be made of it, as long as the longer side is over 256."""
    levels = [Level(tuple(extent))]  # type: ignore[arg-type]
    t, z, c, y, x = extent
    while max(y, x) > _SMALL:
        y, x = (y + 1) // 2, (x + 1) // 2
        levels.append(Level((t, z, c, y, x), is_stored=False))
    return tuple(levels)


def level_meta(meta: ImageMeta, level: int) -> ImageMeta:
    """The metadata of a made level: a pixel of it is 2 ** level times as high and wide as one of the image."""
    t, z, c, y, x = meta.extent
    scale = 2**level
    depth, height, width = meta.physical_size
    return replace(
        meta,
        extent=Extent(t, z, c, -(-y // scale), -(-x // scale)),
        physical_size=(depth, None if height is None else height * scale, None if width is None else width * scale),
        grid=None,
    )


def halve(planes: np.ndarray, label: bool) -> np.ndarray:
    """The next level of planes (..., Y, X): (..., ceil(Y / 2), ceil(X / 2)), same dtype.

    Each pixel is the mean of the 2 x 2 pixels it covers (of those that there are, at an odd edge), integers rounded half to even; of labels it is the
    first of them, which is a value that occurs.
    """
    if label:
        return planes[..., ::2, ::2]
    edges = [(0, 0)] * (planes.ndim - 2) + [(0, planes.shape[-2] % 2), (0, planes.shape[-1] % 2)]
    # Twice the same pixel weighs as much as that pixel alone.
    whole = np.pad(planes, edges, mode="edge")
    quarters = (whole[..., 0::2, 0::2], whole[..., 0::2, 1::2], whole[..., 1::2, 0::2], whole[..., 1::2, 1::2])
    if planes.dtype.kind in "iu":
        return _integer_mean(quarters)
    wide = np.result_type(planes.dtype, np.float64)
    total = sum((quarter.astype(wide) for quarter in quarters[1:]), quarters[0].astype(wide))
    mean: np.ndarray = (total / 4).astype(planes.dtype)
    return mean


def _integer_mean(quarters: tuple[np.ndarray, ...]) -> np.ndarray:
    """The mean of four integers, rounded half to even, without a type that is wider than theirs: of 64-bit ones there is none."""
    dtype = quarters[0].dtype
    quotient: np.ndarray = sum((quarter >> 2 for quarter in quarters[1:]), quarters[0] >> 2)
    rest: np.ndarray = sum(((quarter & 3).astype(np.uint8) for quarter in quarters[1:]), (quarters[0] & 3).astype(np.uint8))
    quotient = quotient + (rest >> 2).astype(dtype)
    rest = rest & 3
    up = (rest == 3) | ((rest == 2) & ((quotient & 1) == 1))
    mean: np.ndarray = (quotient + up.astype(dtype)).astype(dtype)
    return mean


def halved(extent: Extent) -> Extent:
    """The size of the next level."""
    t, z, c, y, x = extent
    return Extent(t, z, c, (y + 1) // 2, (x + 1) // 2)


def write_level(before: Pixels, out: np.ndarray, progress: Callable[[int], None] = lambda _: None) -> None:
    """Make the next level, a strip of a plane at a time.

    Args:
        before: The level before.
        out: Where it belongs: TZCYX of the :func:`halved` size, of the image's dtype.
        progress: Told how many bytes of it have been written so far; may raise, which ends it.

    Raises:
        InvalidRecord: pixels of the level before are damaged.
    """
    extent, dtype = before.meta.extent, before.meta.dtype
    label = is_label(before.meta)
    rows = max(2, _STRIP_BYTES // max(1, extent.x * dtype.itemsize) // 2 * 2)
    strip = np.empty((1, 1, 1, min(rows, extent.y), extent.x), dtype)
    written = 0
    for t in range(extent.t):
        for z in range(extent.z):
            for c in range(extent.c):
                for y in range(0, extent.y, rows):
                    height = min(rows, extent.y - y)
                    part = strip[..., :height, :]
                    before.gather(Selection(range(t, t + 1), range(z, z + 1), range(c, c + 1), 0, y, extent.x, height), part)
                    small = halve(part[0, 0, 0], label)
                    out[t, z, c, y // 2 : y // 2 + len(small)] = small
                    written += small.nbytes
                    progress(written)


class ArrayPixels:
    """Pixels of a whole image in one array. See :class:`~ome_tensor.pixels.Pixels`.

    Args:
        meta: The image's metadata.
        array: Its pixels, TZCYX.
    """

    def __init__(self, meta: ImageMeta, array: np.ndarray) -> None:
        self.meta = meta
        self._array = array

    @property
    def stored_dtype(self) -> np.dtype | None:
        """See :attr:`Pixels.stored_dtype`."""
        return self._array.dtype

    def gather(self, selection: Selection, out: np.ndarray) -> None:
        """See :meth:`Pixels.gather`."""
        copy_dense(self._array, selection, out)

    def flat_values(self, selection: Selection) -> np.ndarray:
        """See :meth:`Pixels.flat_values`: a level that was made has no stored planes or chunks."""
        raise InvalidSelection(
            "mode='arrow' gives stored values, and this pyramid level is made by the server; use mode='numpy'.", field="mode"
        )
