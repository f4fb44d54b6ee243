"""``view[...]``: NumPy basic indexing of a view on its own axes, as a narrower selection."""

from __future__ import annotations

from typing import Any

from .errors import InvalidSelection
from .selection import Indices, Selection, compact, exact_integer, slice_part

__all__ = ["narrow"]


def narrow(selection: Selection, layout: str, key: Any) -> tuple[Selection, str]:
    """NumPy basic indexing of a view on its own axes: a narrower selection, and the layout with the axes that integers drop.

    Args:
        selection: What the view shows.
        layout: The view's layout, letters of TZCHW.
        key: What stands in ``view[key]``: integers, slices, ``...`` or a tuple of them.

    Raises:
        InvalidSelection: ``newaxis``, masks, lists; a step other than 1 or nothing left on Y or X (a ROI is a full rectangle).
        IndexError: too many indices, or one out of range, as NumPy says it.
    """
    keys = _expand_key(key, layout)
    sizes = dict(zip("TZCHW", selection.shape, strict=True))
    axes: dict[str, Indices] = {"T": selection.t, "Z": selection.z, "C": selection.c}
    x, y, w, h = selection.roi
    kept = []
    for letter, part in zip(layout, keys, strict=True):
        if isinstance(part, slice):
            chosen = range(sizes[letter])[slice(*(None if p is None else slice_part(p, letter) for p in _parts(part)))]
            kept.append(letter)
        else:
            position = exact_integer(part, f"only integers, slices and '...' index a view; axis {letter} got", "key")
            if not -sizes[letter] <= position < sizes[letter]:
                raise _OutOfRange(
                    f"index {position} is out of bounds for axis {letter} with size {sizes[letter]}", field="key", value=position
                )
            position %= sizes[letter]
            chosen = range(position, position + 1)
        if letter in axes:
            source = axes[letter]
            axes[letter] = source[chosen.start : chosen.stop] if chosen.step == 1 else compact([source[i] for i in chosen])
            continue
        if chosen.step != 1:
            raise InvalidSelection(
                f"a step of {chosen.step} on axis {letter} is not supported: a view's Y and X are whole rectangles",
                field="key",
                value=part,
            )
        if len(chosen) == 0:
            raise InvalidSelection(f"{part} selects no pixel on axis {letter}", field="key", value=part)
        if letter == "H":
            y, h = y + chosen.start, len(chosen)
        else:
            x, w = x + chosen.start, len(chosen)
    if not kept:
        # A layout has at least one letter, on the wire too.
        raise InvalidSelection(
            "indexing down to a single pixel is not supported: keep one axis with a slice", field="key", value=key
        )
    return Selection(axes["T"], axes["Z"], axes["C"], x, y, w, h), "".join(kept)


class _OutOfRange(InvalidSelection, IndexError):
    """An index outside a view's own axis: NumPy raises IndexError there."""


def _parts(part: slice) -> tuple[object, object, object]:
    if part.step == 0:
        raise InvalidSelection("slice step cannot be zero", field="key", value=part)
    return part.start, part.stop, part.step


def _expand_key(key: Any, layout: str) -> list[Any]:
    """One entry per letter of the layout: ``...`` filled in, missing trailing axes taken whole."""
    keys = list(key) if isinstance(key, tuple) else [key]
    if any(part is None for part in keys):
        raise InvalidSelection("newaxis (None) is not supported in view[...]; reshape the array instead", field="key", value=key)
    dots = [i for i, part in enumerate(keys) if part is Ellipsis]
    if len(dots) > 1:
        raise _OutOfRange("an index can only have a single ellipsis ('...')", field="key", value=key)
    missing = len(layout) - (len(keys) - len(dots))
    if missing < 0:
        raise _OutOfRange(
            f"too many indices: the view has {len(layout)} axes ({layout}), got {len(keys) - len(dots)}", field="key", value=key
        )
    at = dots[0] if dots else len(keys)
    return keys[:at] + [slice(None)] * missing + keys[at + len(dots) :]
