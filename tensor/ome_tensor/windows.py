"""Windows: tiles of one size at listed origins.

Two layers, both of arrays and never of one Python object a window: :class:`Origins` is the list as its caller wrote it, its form checked;
:class:`PlacedWindows` is that list fitted to a selection, where every window is known to lie inside (or, where padded, to touch) the view.

An origin is ``(y, x)``, for windows with all selected t and z, or ``(t, z, y, x)``; all in image coordinates. A window of several t (or z)
shows as many *selected* ones in a row, from the named one on, as tiles do.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import InvalidSelection
from .selection import Indices, Selection

__all__ = ["Origins", "PlacedWindows"]

# Far outside any image, and far enough from the ends of int64 that sums with a size cannot wrap around.
_FARTHEST = 2**62

#: Numbers of images travel as int32.
_MOST_IMAGES = 2**31 - 1

#: Sizes along one axis travel as int32.
MAX_SIZE = 2**31 - 1


class Origins:
    """The origins of a list of windows; immutable.

    Args:
        array: (N, 2) or (N, 4) integers, checked: use :meth:`of`.
        images: Of which image each window is; ``None``: all of the first.
        numbers: Of each its number in the list that these are a part of; ``None`` where they are all of it.

    Attributes:
        array: The origins, int64, read-only.
        images, numbers: As given, int64.
    """

    __slots__ = ("array", "images", "numbers")
    array: np.ndarray

    def __init__(self, array: np.ndarray, images: np.ndarray | None = None, numbers: np.ndarray | None = None) -> None:
        self.array = array
        self.images = images
        self.numbers = numbers

    @classmethod
    def of(cls, origins: object, images: object = None) -> Origins:
        """From anything that NumPy can make integers of shape (N, 2) or (N, 4) of; copied.

        Args:
            origins: The origins.
            images: N integers from 0: which image each is of; ``None``: all of the first.

        Raises:
            InvalidSelection: it cannot.
        """
        form = "origins must be integers of shape (N, 2): y, x; or (N, 4): t, z, y, x"
        try:
            given = np.asarray(origins)
        except (ValueError, TypeError, OverflowError) as error:
            raise InvalidSelection(f"{form}; not {_brief(origins)}", field="origins", value=_brief(origins)) from error
        if given.size == 0 and given.ndim <= 2:
            given = np.empty((0, 4 if given.ndim == 2 and given.shape[1] == 4 else 2), np.int64)
        if given.ndim != 2 or given.shape[1] not in (2, 4) or given.dtype.kind not in "iu":
            what = f"{given.dtype} of shape {given.shape}"
            raise InvalidSelection(f"{form}; not {what}", field="origins", value=what)
        # uint64 may hold what int64 cannot; a comparison of arrays settles it without a conversion.
        wild = (given > _FARTHEST) | (given < -_FARTHEST)
        if wild.any():
            number = int(np.argmax(wild.any(axis=1)))
            place = tuple(given[number].tolist())
            raise InvalidSelection(f"window {number} at {place} is outside any image", field="origins", value=place)
        array = given.astype(np.int64, order="C", copy=True)
        array.flags.writeable = False
        if images is None:
            return cls(array)
        try:
            chosen = np.asarray(images)
        except (ValueError, TypeError, OverflowError):
            chosen = np.empty(0, object)
        if chosen.shape != (len(array),) or (chosen.dtype.kind not in "iu" and chosen.size):
            raise InvalidSelection(
                f"images must be {len(array)} integers, one for each origin, not {chosen.dtype} of shape {chosen.shape}",
                field="images",
                value=_brief(images),
            )
        if chosen.size and (int(chosen.min()) < 0 or int(chosen.max()) > _MOST_IMAGES):
            wrong = int(chosen.min()) if int(chosen.min()) < 0 else int(chosen.max())
            raise InvalidSelection(f"images must be numbers of images, from 0: {wrong}", field="images", value=wrong)
        return cls(array, chosen.astype(np.int64))

    def __len__(self) -> int:
        return len(self.array)

    @property
    def planar(self) -> bool:
        """Whether they are ``(y, x)`` only."""
        return bool(self.array.shape[1] == 2)

    def take(self, numbers: np.ndarray) -> Origins:
        """Those of some windows, in that order."""
        array = self.array[numbers]
        array.flags.writeable = False
        kept = np.asarray(numbers, np.int64) if self.numbers is None else self.numbers[numbers]
        return Origins(array, None if self.images is None else self.images[numbers], kept)

    def alone(self) -> Origins:
        """The same places, of one image, whichever that is."""
        return Origins(self.array, None, self.numbers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Origins) or (self.images is None) != (other.images is None):
            return False
        same = self.images is None or other.images is None or np.array_equal(self.images, other.images)
        return bool(same and np.array_equal(self.array, other.array))

    def __hash__(self) -> int:
        return hash((self.array.shape, self.array.tobytes()))

    def __repr__(self) -> str:
        return f"Origins({self.array.shape[0]} x {self.array.shape[1]})"


def _brief(value: object) -> str:
    return type(value).__name__


class PlacedWindows:
    """A list of windows fitted to a selection.

    Args:
        origins: Where they begin.
        size: (t, z, h, w) of each; t and z are ignored where the origins are planar.
        selection: The view.
        padded: Whether windows may stick out of the view along z, y and x, as long as they show a pixel of it.
        frames: Where windows are of several views that differ only in their frames: of each its view's (y, x, h, w). (N, 4) integers.

    Raises:
        InvalidSelection: a window does not fit; it names the first such window by number and origin.
    """

    def __init__(
        self,
        origins: Origins,
        size: tuple[int, int, int, int],
        selection: Selection,
        padded: bool,
        frames: np.ndarray | None = None,
    ) -> None:
        self._selection = s = selection
        self._origins = origins
        self._padded = padded
        self._frames = frames
        array = origins.array
        self._y, self._x = array[:, -2], array[:, -1]
        self._t_at: np.ndarray | None = None
        self._z_at: np.ndarray | None = None
        self.size = size
        top, left, h, w = (s.y, s.x, s.h, s.w) if frames is None else frames.T
        bad = _outside(self._y, top, top + h, size[2], padded) | _outside(self._x, left, left + w, size[3], padded)
        if not origins.planar:
            self._t_at, unknown = _places(s.t, array[:, 0])
            bad |= unknown | _outside(self._t_at, 0, len(s.t), size[0], False)
            self._z_at, unknown = _places(s.z, array[:, 1])
            bad |= unknown | _outside(self._z_at, 0, len(s.z), size[1], padded)
        if bad.any():
            self._refuse(int(np.argmax(bad)))

    def _view(self, number: int) -> Selection:
        """What a window is of."""
        s = self._selection
        if self._frames is None:
            return s
        y, x, h, w = self._frames[number].tolist()
        return Selection(s.t, s.z, s.c, x, y, w, h)

    def _refuse(self, number: int) -> None:
        s, planar = self._view(number), self._origins.planar
        axes = "yx" if planar else "tzyx"
        place = tuple(self._origins.array[number].tolist())
        if self._origins.numbers is not None:
            number = int(self._origins.numbers[number])
        at = ", ".join(f"{axis}={value}" for axis, value in zip(axes, place, strict=True))
        size = " x ".join(map(str, self.size[2:] if planar else self.size))
        view = [f"y {s.y} to {s.y + s.h - 1}, x {s.x} to {s.x + s.w - 1}"]
        if not planar:
            view = [f"{axis} {_range(indices)}" for axis, indices in (("t", s.t), ("z", s.z))] + view
        where = "shows no pixel of, or a t or z outside," if self._padded else "does not lie inside"
        raise InvalidSelection(
            f"window {number} at ({at}) of size {size} {where} the view ({', '.join(view)})", field="origins", value=place
        )

    def table(self, numbers: np.ndarray) -> np.ndarray:
        """Of each numbered window: t, z, y, x of its first element, and how many of its z, y and x are of the view. (n, 7), int64."""
        s = self._selection
        _, depth, height, width = self.size
        array = self._origins.array[numbers]
        table = np.empty((len(array), 7), np.int64)
        table[:, 2:4] = array[:, -2:]
        if self._z_at is None:
            table[:, 0] = s.t[0] if s.t else -1
            table[:, 1] = s.z[0] if s.z else -1
            table[:, 4] = len(s.z)
        else:
            table[:, :2] = array[:, :2]
            table[:, 4] = _covered(self._z_at[numbers], 0, len(s.z), depth)
        top, left, h, w = (s.y, s.x, s.h, s.w) if self._frames is None else self._frames[numbers].T
        table[:, 5] = _covered(array[:, -2], top, top + h, height)
        table[:, 6] = _covered(array[:, -1], left, left + w, width)
        return table

    def place(self, number: int) -> tuple[Selection, tuple[int, int, int], tuple[int, int, int, int]]:
        """One window: its pixels, clipped to the view; where along (z, y, x) of the window they begin; and its origin."""
        s = self._view(number)
        nt, nz, height, width = self.size
        y, x = self._y.item(number), self._x.item(number)
        top, left = max(y, s.y), max(x, s.x)
        t, z, front = s.t, s.z, 0
        first_t, first_z = s.t[0] if s.t else -1, s.z[0] if s.z else -1
        if self._t_at is not None and self._z_at is not None:
            t_at, z_at = self._t_at.item(number), self._z_at.item(number)
            t = s.t[t_at : t_at + nt]
            z = s.z[max(0, z_at) : z_at + nz]
            front = max(0, -z_at)
            first_t, first_z = self._origins.array.item(number, 0), self._origins.array.item(number, 1)
        shown = Selection(t, z, s.c, left, top, min(x + width, s.x + s.w) - left, min(y + height, s.y + s.h) - top)
        return shown, (front, top - y, left - x), (first_t, first_z, y, x)


def _outside(first: np.ndarray, begin: Any, end: Any, size: int, padded: bool) -> np.ndarray:
    """Which runs of ``size`` from ``first`` on do not lie inside [begin, end); where padded, which do not even touch it."""
    outside: np.ndarray = (first <= begin - size) | (first >= end) if padded else (first < begin) | (first > end - size)
    return outside


def _covered(first: np.ndarray, begin: Any, end: Any, size: int) -> Any:
    return np.minimum(first + size, end) - np.maximum(first, begin)


def _places(indices: Indices, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where in the chosen indices each wanted one stands (of a repeated one, its first place), and which are not among them.

    Of evenly spaced indices the places go on beyond both ends, so that padded windows may begin there.
    """
    if isinstance(indices, range) and len(indices):
        places, rest = np.divmod(wanted - indices.start, indices.step)
        return places, rest != 0
    if not indices:
        return np.zeros(len(wanted), np.int64), np.ones(len(wanted), bool)
    chosen, firsts = np.unique(np.asarray(indices, np.int64), return_index=True)
    near = np.minimum(np.searchsorted(chosen, wanted), len(chosen) - 1)
    return firsts[near], chosen[near] != wanted


def _range(indices: Indices) -> str:
    if not indices:
        return "none"
    if len(indices) == 1:
        return str(indices[0])
    if isinstance(indices, range) and indices.step == 1:
        return f"{indices[0]} to {indices[-1]}"
    return ", ".join(map(str, indices[:8])) + (" …" if len(indices) > 8 else "")
