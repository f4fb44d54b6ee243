"""Indices, the kinds of data a view is made of, policies, dtype: everything about a selection but its region."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.conformance.images import IMAGES
from tests.conformance.implementations import Implementation, as_numpy

PIXELS = IMAGES["chunks"].pixels

INDICES = [
    (None, [0, 1, 2, 3]),
    (0, [0]),
    (3, [3]),
    (-1, [3]),
    (-4, [0]),
    (slice(1, 3), [1, 2]),
    (slice(None, None, 2), [0, 2]),
    (slice(None, None, -1), [3, 2, 1, 0]),
    (slice(-2, None), [2, 3]),
    (slice(2, 99), [2, 3]),  # clipped, as Python does
    (slice(-99, 2), [0, 1]),
    (slice(3, 1), []),
    ([], []),
    ([2, 0], [2, 0]),
    ((1, 1, 3, 1), [1, 1, 3, 1]),  # duplicates and order are kept
    ([-1, 0, -4], [3, 0, 0]),
    (range(1, 4), [1, 2, 3]),
    (range(3, 0, -2), [3, 1]),
]


@pytest.mark.parametrize("index, chosen", INDICES, ids=lambda value: repr(value).replace(" ", ""))
def test_index(any_view: Implementation, index: Any, chosen: list[int]) -> None:
    """An index means what Python and NumPy mean by it; negatives count from the end."""
    view = any_view.view("chunks", z=index, layout="TZCYX")
    assert view.shape == (3, len(chosen), 2, 13, 17)
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[:, chosen])


@pytest.mark.parametrize("axis, number", [("t", 0), ("z", 1), ("c", 2)])
def test_index_of_each_axis(any_view: Implementation, axis: str, number: int) -> None:
    """t, z and c each index their own axis."""
    view = any_view.view("planes", layout="TZCYX", **{axis: [1, 0, 1]})
    np.testing.assert_array_equal(view.to_numpy(), np.take(PIXELS, [1, 0, 1], axis=number))


def test_indices_together(any_view: Implementation) -> None:
    """Indices of several axes select a rectangular block, not pairs."""
    view = any_view.view("chunks", t=[2, 0], z=slice(1, 4, 2), c=-1, roi=(5, 4, 7, 6))
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[[2, 0]][:, 1:4:2, 1:2, 4:10, 5:12])


@pytest.mark.parametrize(
    "selection, words",
    [
        ({"z": 4}, "z index 4 out of range"),
        ({"z": -5}, "z index -5 out of range"),
        ({"z": [0, 4]}, "z index 4 out of range"),
        ({"t": [-4]}, "t index -4 out of range"),
        ({"t": 3}, "t index 3 out of range"),
        ({"c": (0, 1, 2)}, "c index 2 out of range"),
        ({"t": ["a"]}, "t indices must be integers"),
        ({"t": [1.0]}, "t indices must be integers"),
        ({"c": [None]}, "c indices must be integers"),
        ({"t": "0"}, "Unsupported t index type"),
        ({"t": b"0"}, "Unsupported t index type"),
        ({"t": 1.5}, "Unsupported t index type"),
        ({"z": {0}}, "Unsupported z index type"),
        ({"c": object}, "Unsupported c index type"),
        ({"t": slice(None, None, 0)}, "slice step cannot be zero"),
    ],
    ids=str,
)
def test_refused_index(any_view: Implementation, selection: dict[str, Any], words: str) -> None:
    """An index outside the image, or of a kind that means nothing, is refused by name."""
    any_view.refuses(words, "chunks", **selection)


@pytest.mark.parametrize(
    "selection, words",
    [
        ({"t": True}, "Unsupported t index type"),
        ({"t": np.True_}, "Unsupported t index type"),
        ({"z": [True, False, True, False]}, "z indices must be integers"),
        ({"z": np.array([True, False, True, False])}, "z indices must be integers"),
        ({"c": [0, np.False_]}, "c indices must be integers"),
        ({"t": np.float64(1.0)}, "Unsupported t index type"),
        ({"t": np.array([1.0])}, "t indices must be integers"),
        ({"t": slice(False, True)}, "t"),
        ({"t": slice(0.0, 2)}, "t"),
    ],
    ids=str,
)
def test_booleans_and_floats_are_not_indices(our_view: Implementation, selection: dict[str, Any], words: str) -> None:
    """A mask is not a list of indices: upstream reads ``True`` as 1 and shows the wrong planes."""
    our_view.refuses(words, "chunks", **selection)


@pytest.mark.parametrize(
    "index, chosen",
    [
        (np.int64(2), [2]),
        (np.uint8(1), [1]),
        (np.int16(-1), [3]),
        (np.array([3, 0, -1]), [3, 0, 3]),
        (np.array([2], dtype=np.uint16), [2]),
        (np.array([], dtype=np.intp), []),
        (np.arange(4)[::-1], [3, 2, 1, 0]),
        ([np.int32(1), 2], [1, 2]),
        (slice(np.int64(1), np.int64(3)), [1, 2]),
    ],
    ids=repr,
)
def test_numpy_integers_are_indices(our_view: Implementation, index: Any, chosen: list[int]) -> None:
    """What ``np.arange``, ``argmax`` and the like return can be used as it is."""
    view = our_view.view("chunks", z=index, layout="TZCYX")
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[:, chosen])


def test_numpy_array_out_of_range(our_view: Implementation) -> None:
    """Integer arrays are held to the same bounds."""
    our_view.refuses("z index 4 out of range", "chunks", z=np.array([0, 4]))
    our_view.refuses("z index -5 out of range", "chunks", z=np.int64(-5))


@pytest.mark.parametrize("policy", ["error", "first", " First ", "ERROR"])
def test_channel_policy_words(any_view: Implementation, policy: str) -> None:
    """Policies are words in any case; with one channel both do the same."""
    view = any_view.view("chunks", t=0, z=0, c=1, layout="YX", channel_policy=policy)
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[0, 0, 1])


def test_channel_policy_first(any_view: Implementation) -> None:
    """``first`` keeps the first *selected* channel when the layout drops C."""
    view = any_view.view("chunks", t=0, z=0, c=[1, 0], layout="YX", channel_policy="first")
    assert view.shape == (13, 17)
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[0, 0, 1])


def test_channel_policy_first_keeps_all_where_the_layout_has_c(any_view: Implementation) -> None:
    """``first`` drops nothing that the layout shows."""
    view = any_view.view("chunks", t=0, z=0, layout="YXC", channel_policy="first")
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[0, 0].transpose(1, 2, 0))


def test_refused_policies(any_view: Implementation) -> None:
    """Unknown policies are refused by name."""
    any_view.refuses("Unsupported channel_policy 'last'", "chunks", channel_policy="last")
    any_view.refuses("Unsupported chunk_policy 'split'", "chunks", chunk_policy="split")


def test_channel_policy_error(any_view: Implementation) -> None:
    """Dropping one of several channels must be asked for."""
    any_view.refuses("drops non-singleton dimension 'C'", "chunks", t=0, z=0, layout="YX")


@pytest.mark.parametrize("name", ["planes", "chunks", "bytes_zstd", "bytes_i16", "planes_f32", "bytes_i8_lz4"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "int64", "float32", "float64", "bool"])
def test_dtype_override(any_view: Implementation, name: str, dtype: str) -> None:
    """A dtype override means ``numpy.astype``: integers wrap, nothing is scaled or clamped."""
    expected = IMAGES[name].pixels[1:].astype(dtype)
    view = any_view.view(name, t=slice(1, None), roi=(2, 3, 9, 8), dtype=np.dtype(dtype))
    assert view.dtype == expected.dtype
    array = view.to_numpy()
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected[..., 3:11, 2:11])
    assert view.strides[-1] == expected.itemsize


@pytest.mark.parametrize("dtype", [np.float32, "f4", float, int, np.dtype(">u2")])
def test_dtype_spellings(any_view: Implementation, dtype: Any) -> None:
    """Whatever NumPy takes as a dtype is taken; values are the same in whichever byte order."""
    view = any_view.view("chunks", t=0, z=0, dtype=dtype)
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[0, 0].astype(dtype))


def test_dtype_of_the_image(any_view: Implementation) -> None:
    """Without an override it is the image's own type, not that of the stored lists."""
    assert any_view.view("stack_u16").dtype == np.uint8
    assert any_view.view("chunks").dtype == np.uint16
    assert any_view.view("planes_f32").dtype == np.float32
    np.testing.assert_array_equal(any_view.view("stack_u16").to_numpy(), IMAGES["stack"].pixels)


def test_empty_selection(any_view: Implementation) -> None:
    """No index at all is an empty array, not an error, and has no batches."""
    view = any_view.view("chunks", t=[], c=1)
    assert view.shape == (0, 4, 1, 13, 17)
    assert view.to_numpy().shape == (0, 4, 1, 13, 17)
    assert list(view.iter_dlpack(batch_size=2, mode="numpy")) == []
    assert list(view.iter_tiles_3d(tile_size=(2, 5, 5))) == []


def test_selection_of_tiles_keeps_order_and_duplicates(any_view: Implementation) -> None:
    """Iteration shows the same selection as the whole view."""
    view = any_view.view("chunks", t=[2, 2, 0], z=[3, 0], c=[1, 0], roi=(1, 1, 12, 9))
    tiles = [as_numpy(tile) for tile in view.iter_dlpack(batch_size=1, mode="numpy")]
    np.testing.assert_array_equal(np.concatenate(tiles), PIXELS[[2, 2, 0]][:, [3, 0]][:, :, [1, 0], 1:10, 1:13])
