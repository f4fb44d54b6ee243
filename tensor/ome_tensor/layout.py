"""Layouts: which axes a tensor has, and in which order. Letters of TZCYX; internally Y and X are written H and W, as upstream does."""

from __future__ import annotations

from functools import cache

import numpy as np

from .errors import InvalidArgument
from .selection import Selection

__all__ = ["AXES", "apply_layout", "check_layout", "default_layout", "normalize_layout", "shape_and_strides"]

AXES = "TZCHW"
_ALIASES = str.maketrans({"Y": "H", "X": "W"})
_WRITTEN = str.maketrans({"H": "Y", "W": "X"})


def normalize_layout(layout: object) -> str | None:
    """Letters of TZCHW in the asked order; ``None`` and ``""`` mean the default layout, as upstream.

    Raises:
        InvalidArgument: blank, letters other than TZCYXHW, or a letter twice.
    """
    if layout is None or layout == "":
        return None
    if not isinstance(layout, str):
        raise InvalidArgument(f"layout must be text such as 'CYX', not {layout!r}", field="layout", value=layout)
    letters = layout.strip().upper().translate(_ALIASES)
    if not letters:
        raise InvalidArgument("layout must be non-empty", field="layout", value=layout)
    if not set(letters) <= set(AXES):
        raise InvalidArgument(
            f"layout must use only TZC + (Y/X or H/W) letters (for example CYX, YXC, TZCYX), not {layout!r}",
            field="layout",
            value=layout,
        )
    if len(set(letters)) != len(letters):
        raise InvalidArgument(f"layout cannot repeat dimensions: {layout!r}", field="layout", value=layout)
    return letters


def default_layout(selection: Selection) -> str:
    """``CHW`` where one t and one z are selected, else ``TZCHW``."""
    return "CHW" if len(selection.t) == 1 and len(selection.z) == 1 else AXES


def drops_channels(selection: Selection, layout: str, channel_policy: str) -> bool:
    """Whether only the first of several selected channels is shown: the layout has no C and the policy is ``first``."""
    return channel_policy == "first" and "C" not in layout and len(selection.c) > 1


def check_layout(selection: Selection, layout: str, channel_policy: str) -> None:
    """InvalidArgument where the layout drops an axis of another size than 1."""
    dropped = _steps(layout)[0]
    if not dropped:
        return
    shape = selection.shape
    for axis in dropped:
        letter = AXES[axis]
        if shape[axis] != 1 and not (letter == "C" and drops_channels(selection, layout, channel_policy)):
            # Upstream's letters, and those that a caller of this project has more likely written.
            written = layout.translate(_WRITTEN)
            raise InvalidArgument(
                f"layout '{layout}'{f' ({written})' if written != layout else ''} drops non-singleton dimension '{letter}' of size "
                f"{shape[axis]}.",
                field="layout",
                value=layout,
            )


def shape_and_strides(
    selection: Selection, layout: str, itemsize: int, channel_policy: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape in elements and strides in bytes of the C-ordered TZCYX selection, permuted to ``layout``.

    Raises:
        InvalidArgument: the layout drops an axis of another size than 1.
    """
    check_layout(selection, layout, channel_policy)
    shape = selection.shape
    strides = [itemsize] * 5
    for axis in (3, 2, 1, 0):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    axes = [AXES.index(letter) for letter in layout]
    return tuple(shape[axis] for axis in axes), tuple(strides[axis] for axis in axes)


def apply_layout(array: np.ndarray, layout: str) -> np.ndarray:
    """A TZCYX array seen in ``layout``: a view, never a copy. Axes the layout lacks must have size 1."""
    if layout == AXES:
        return array
    dropped, order = _steps(layout)
    squeezed = array.squeeze(dropped)
    return squeezed if order is None else squeezed.transpose(order)


@cache
def _steps(layout: str) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The axes to drop, and the order of those left (``None``: as they are). There are 325 layouts."""
    kept = [axis for axis, letter in enumerate(AXES) if letter in layout]
    order = tuple(kept.index(AXES.index(letter)) for letter in layout)
    return tuple(axis for axis in range(5) if axis not in kept), None if order == tuple(sorted(order)) else order


@cache
def _back(layout: str) -> tuple[tuple[int, ...], tuple[slice | None, ...]]:
    """The order that sorts a layout's axes as TZCYX, and the index that puts in those it lacks."""
    order = tuple(sorted(range(len(layout)), key=lambda i: AXES.index(layout[i])))
    return order, tuple(slice(None) if letter in layout else None for letter in AXES)


def to_axes(array: np.ndarray, layout: str) -> np.ndarray:
    """The inverse of :func:`apply_layout`: an array in ``layout`` seen as TZCYX, so that it can be gathered into."""
    order, places = _back(layout)
    return array.transpose(order)[places]
