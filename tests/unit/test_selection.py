"""The selection algebra, with NumPy's own indexing as the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ome_tensor.errors import InvalidSelection
from ome_tensor.indexing import narrow
from ome_tensor.layout import AXES, apply_layout, normalize_layout, to_axes
from ome_tensor.selection import (
    ChunkGrid,
    Extent,
    Region,
    Selection,
    as_index,
    canonical_index,
    canonical_region,
    compact,
    select,
)

#: No two axes of one size; each value names its place.
SHAPE = (3, 4, 2, 5, 7)
VALUES = np.arange(np.prod(SHAPE)).reshape(SHAPE)
EXTENT = Extent(*SHAPE)


def pick(selection: Selection) -> np.ndarray:
    """What a selection of the image means, by NumPy: (T, Z, C, H, W)."""
    s = selection
    frame = VALUES[..., s.y : s.y + s.h, s.x : s.x + s.w]
    return frame[np.ix_(list(s.t), list(s.z), list(s.c), range(s.h), range(s.w))]


def bounds(size: int) -> st.SearchStrategy[int | None]:
    """One end of a slice."""
    return st.none() | st.integers(-2 * size, 2 * size)


def slices(size: int, steps: st.SearchStrategy[int | None]) -> st.SearchStrategy[slice]:
    """Slices around an axis."""
    return st.builds(slice, bounds(size), bounds(size), steps)


def indices(size: int) -> st.SearchStrategy[Any]:
    """Everything that may be written for an axis and is inside it."""
    inside = st.integers(-size, size - 1)
    many = st.lists(inside, max_size=6)
    return st.one_of(
        st.none(),
        inside,
        inside.map(np.int16),
        slices(size, st.none() | st.integers(-3, 3).filter(bool)),
        many,
        many.map(tuple),
        many.map(lambda values: np.array(values, np.int64)),
        st.sampled_from([range(size), range(size - 1, -1, -1), range(0, size, 2), range(-size, 0)]),
    )


def by_numpy(index: Any, size: int) -> np.ndarray:
    """The positions that an index means."""
    positions = np.arange(size)
    if index is None:
        return positions
    if isinstance(index, slice):
        return positions[index]
    return np.atleast_1d(positions[np.asarray(index, np.int64)])


@given(st.data())
def test_select_is_numpys_indexing(data: st.DataObject) -> None:
    """All forms of indices, and a ROI."""
    t, z, c = (data.draw(indices(size)) for size in SHAPE[:3])
    x, y = data.draw(st.integers(0, SHAPE[4] - 1)), data.draw(st.integers(0, SHAPE[3] - 1))
    w, h = data.draw(st.integers(1, SHAPE[4] - x)), data.draw(st.integers(1, SHAPE[3] - y))
    chosen = select(
        EXTENT,
        t=canonical_index(t, "t"),
        z=canonical_index(z, "z"),
        c=canonical_index(c, "c"),
        region=canonical_region(t=None, z=None, roi=(x, y, w, h)),
    )
    wanted = VALUES[by_numpy(t, 3)][:, by_numpy(z, 4)][:, :, by_numpy(c, 2)][..., y : y + h, x : x + w]
    assert chosen.shape == wanted.shape
    assert chosen.size == wanted.size
    assert chosen.roi == (x, y, w, h)
    np.testing.assert_array_equal(pick(chosen), wanted)


@given(st.lists(st.integers(0, 50), max_size=12) | st.builds(range, st.integers(0, 50), st.integers(0, 50), st.integers(1, 5)))
def test_compact_keeps_the_values(values: Any) -> None:
    """As a range where they are evenly spaced, and equal to what it was made of."""
    found = compact(values)
    assert list(found) == list(values)
    steps = set(np.diff(list(values)).tolist())
    assert isinstance(found, range) == (len(values) < 2 or (len(steps) == 1 and steps != {0}))


@given(
    st.lists(st.integers(0, 9), max_size=8)
    | st.builds(range, st.integers(0, 9), st.integers(-1, 9), st.sampled_from([-3, -1, 1, 2]))
)
def test_as_index_is_the_inverse_of_fitting(values: Any) -> None:
    """Positions -> index -> the same positions, also backwards down to 0."""
    index = as_index(compact(values))
    assert canonical_index(index, "t") == index
    assert list(select(Extent(10, 1, 1, 1, 1), t=index).t) == list(values)


@pytest.mark.parametrize("start", [-9, -1, 0, 3])
@pytest.mark.parametrize("stop", [-9, -1, 0, 3, 12])
@pytest.mark.parametrize("step", [-2, -1, 1, 2])
def test_ranges_are_lists(start: int, stop: int, step: int) -> None:
    """A range means the positions it lists, negatives counted from the end, never the slice that looks like it."""
    values = range(start, stop, step)
    if any(not -10 <= value < 10 for value in values):
        with pytest.raises(InvalidSelection, match="out of range"):
            select(Extent(10, 1, 1, 1, 1), t=canonical_index(values, "t"))
    else:
        chosen = select(Extent(10, 1, 1, 1, 1), t=canonical_index(values, "t")).t
        assert list(chosen) == [value % 10 for value in values]


@st.composite
def narrowings(draw: st.DrawFn) -> tuple[Selection, str, tuple[Any, ...]]:
    """A selection, a layout of all its axes, and a key that NumPy takes and that keeps Y and X whole rectangles."""
    chosen = select(
        EXTENT,
        t=canonical_index(draw(indices(3)), "t"),
        z=canonical_index(draw(indices(4)), "z"),
        c=canonical_index(draw(indices(2)), "c"),
        region=draw(st.sampled_from([None, Region("roi", (1, 2, 5, 3)), Region("roi", (6, 0, 1, 5))])),
    )
    layout = "".join(draw(st.permutations(AXES)))
    sizes = dict(zip(AXES, chosen.shape, strict=True))
    key: list[Any] = []
    for letter in layout[: draw(st.integers(0, 5))]:
        size = sizes[letter]
        steps = st.none() | st.integers(-3, 3).filter(bool) if letter in "TZC" else st.sampled_from([None, 1])
        forms: list[st.SearchStrategy[Any]] = [slices(size, steps)]
        if size:
            forms.append(st.integers(-size, size - 1))
        key.append(draw(st.one_of(forms)))
    if draw(st.booleans()):
        # What stands behind it then belongs to the last axes.
        at = draw(st.integers(0, len(key)))
        return chosen, layout, (*key[:at], ...) if at < len(key) else (*key, ...)
    return chosen, layout, tuple(key)


@given(narrowings())
def test_narrow_is_numpys_basic_indexing(case: tuple[Selection, str, tuple[Any, ...]]) -> None:
    """On a view's own axes, in any layout; what it refuses is only what cannot be a rectangle."""
    chosen, layout, key = case
    wanted = apply_layout(pick(chosen), layout)[key]
    sizes = dict(zip(layout, apply_layout(pick(chosen), layout).shape, strict=True))
    empty = any(
        isinstance(part, slice) and letter in "HW" and not range(sizes[letter])[part]
        for letter, part in zip(layout, key, strict=False)
    )
    if empty or wanted.ndim == 0:
        with pytest.raises(InvalidSelection):
            narrow(chosen, layout, key)
        return
    selection, kept = narrow(chosen, layout, key)
    np.testing.assert_array_equal(apply_layout(pick(selection), kept), wanted)


@pytest.mark.parametrize(
    "key,error,words",
    [
        (None, InvalidSelection, "newaxis"),
        ((0, None), InvalidSelection, "newaxis"),
        ([0, 1], InvalidSelection, "only integers"),
        (np.ones(3, bool), InvalidSelection, "only integers"),
        (True, InvalidSelection, "bool"),
        (1.0, InvalidSelection, "only integers"),
        ("a", InvalidSelection, "only integers"),
        ((..., ...), IndexError, "ellipsis"),
        ((0,) * 6, IndexError, "too many"),
        (3, IndexError, "out of bounds"),
        (-4, IndexError, "out of bounds"),
        ((..., slice(None, None, 2)), InvalidSelection, "step"),
        ((..., slice(None, None, -1), slice(None)), InvalidSelection, "step"),
        ((..., slice(3, 3)), InvalidSelection, "no pixel"),
        (slice(None, None, 0), InvalidSelection, "zero"),
        (slice(0.5, None), InvalidSelection, "integers"),
        ((0, 0, 0, 0, 0), InvalidSelection, "single pixel"),
    ],
)
def test_what_narrow_refuses(key: Any, error: type[Exception], words: str) -> None:
    """With the type that NumPy's users expect, and always one of ours."""
    with pytest.raises(error, match=words) as caught:
        narrow(select(EXTENT), AXES, key)
    assert isinstance(caught.value, InvalidSelection)


@given(st.permutations(AXES), st.integers(0, 5))
def test_layouts_are_views_and_have_an_inverse(letters: list[str], keep: int) -> None:
    """Axes of size 1 may be left out; nothing is copied either way."""
    layout = "".join(letters[:keep]) or "T"
    array = np.zeros([2 + AXES.index(letter) if letter in layout else 1 for letter in AXES])
    shown = apply_layout(array, layout)
    assert shown.shape == tuple(2 + AXES.index(letter) for letter in layout)
    assert np.shares_memory(shown, array)
    back = to_axes(shown, layout)
    assert back.shape == array.shape
    assert back.strides == array.strides or 1 in array.shape
    assert np.shares_memory(back, array)


@given(st.text("tzcyxhwTZCYXHW", min_size=1, max_size=5))
def test_layout_spellings(text: str) -> None:
    """Y is H and X is W, in either case; twice the same axis is refused."""
    letters = text.upper().replace("Y", "H").replace("X", "W")
    if len(set(letters)) < len(letters):
        with pytest.raises(ValueError, match="repeat"):
            normalize_layout(text)
    else:
        assert normalize_layout(f" {text} ") == letters


@given(tile=st.tuples(st.integers(0, 3), st.integers(0, 3)), grid=st.tuples(st.integers(1, 6), st.integers(1, 8)))
def test_grid_tiles(tile: tuple[int, int], grid: tuple[int, int]) -> None:
    """A block of the chunk grid, clipped to the frame."""
    y, x = (place * size for place, size in zip(tile, grid, strict=True))
    region = canonical_region(t=None, z=None, tile=tile)
    if y >= SHAPE[3] or x >= SHAPE[4]:
        with pytest.raises(InvalidSelection, match="out of bounds"):
            select(EXTENT, region=region, grid=ChunkGrid(*grid))
    else:
        chosen = select(EXTENT, region=region, grid=ChunkGrid(*grid))
        np.testing.assert_array_equal(pick(chosen), VALUES[..., y : y + grid[0], x : x + grid[1]])
