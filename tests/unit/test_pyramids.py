"""Levels that the server makes: area means, and for labels the nearest pixel."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ome_tensor import pyramids
from ome_tensor.pyramids import ArrayPixels, halve, level_meta, made_levels, write_level
from ome_tensor.record import ImageMeta
from ome_tensor.selection import Extent

INTEGERS = "int8 uint8 int16 uint16 int32 uint32 int64 uint64".split()


@settings(deadline=None)
@given(dtype=st.sampled_from(INTEGERS), y=st.integers(1, 7), x=st.integers(1, 7), seed=st.integers(0, 99))
def test_the_mean_of_integers_is_exact_and_rounded_half_to_even(dtype: str, y: int, x: int, seed: int) -> None:
    bounds = np.iinfo(dtype)
    plane = np.random.default_rng(seed).integers(bounds.min, bounds.max, (y, x), dtype, endpoint=True)
    found = halve(plane, False)
    assert found.dtype == plane.dtype
    assert found.shape == ((y + 1) // 2, (x + 1) // 2)
    for row, column in np.ndindex(found.shape):
        covered = [int(value) for value in plane[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].ravel()]
        assert int(found[row, column]) == round(Fraction(sum(covered), len(covered)))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64"])
def test_the_mean_of_floats(dtype: str) -> None:
    plane = np.arange(12).reshape(3, 4).astype(dtype)
    np.testing.assert_array_equal(halve(plane, False), np.array([[2.5, 4.5], [8.5, 10.5]], dtype), strict=True)


def test_a_label_is_one_that_occurs() -> None:
    plane = np.array([[7, 9, 1], [9, 9, 2], [3, 4, 5]], np.uint32)
    np.testing.assert_array_equal(halve(plane, True), np.array([[7, 1], [3, 5]], np.uint32), strict=True)


def meta_of(array: np.ndarray, image_type: str = "image") -> ImageMeta:
    return ImageMeta(Extent(*array.shape), array.dtype, image_type=image_type, physical_size=(1.0, 0.5, None))


@pytest.mark.parametrize("image_type", ["image", "label"])
def test_strips_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch, image_type: str) -> None:
    monkeypatch.setattr(pyramids, "_STRIP_BYTES", 300)
    array = np.random.default_rng(0).integers(0, 65536, (2, 1, 3, 37, 23), np.uint16)
    out = np.zeros((2, 1, 3, 19, 12), np.uint16)
    written: list[int] = []
    write_level(ArrayPixels(meta_of(array, image_type), array), out, written.append)
    np.testing.assert_array_equal(out, halve(array, image_type == "label"), strict=True)
    assert written == sorted(written)
    assert written[-1] == out.nbytes


def test_which_levels_there_are() -> None:
    shapes = [level.shape for level in made_levels(Extent(1, 2, 3, 1001, 400))]
    assert shapes == [(1, 2, 3, 1001, 400), (1, 2, 3, 501, 200), (1, 2, 3, 251, 100)]
    assert [level.is_stored for level in made_levels(Extent(1, 1, 1, 1001, 4))] == [True, False, False]
    assert len(made_levels(Extent(1, 1, 1, 256, 256))) == 1
    meta = level_meta(meta_of(np.zeros((1, 2, 3, 1001, 400), np.uint8)), 2)
    assert tuple(meta.extent) == shapes[2]
    assert meta.physical_size == (1.0, 2.0, None)
