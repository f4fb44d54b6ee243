"""Pixel types: which stored values they hold, checked once, and never in the way of a caller who names a dtype."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.integration.images import random_pixels, record_of

import ome_tensor.blocks
from ome_tensor import InvalidRecord, TensorView
from ome_tensor.pixel_types import _CHECKED_AT_ONCE, dtype_of_pixel_type, first_misfit

TYPES = "bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128".split()

#: Values at and beside the edges of every type.
EDGES = [
    edge + step
    for bits in (0, 1, 7, 8, 11, 15, 16, 24, 31, 32, 53, 63, 64)
    for edge in (2**bits, -(2**bits))
    for step in (-1, 0, 1)
]


def holds(dtype: np.dtype, value: Any) -> bool:
    """What a type holds, worked out with Python's own exact numbers."""
    if dtype.kind == "c":
        return all(holds(np.dtype(f"f{dtype.itemsize // 2}"), part) for part in (value.real, value.imag))
    if isinstance(value, complex):
        return value.imag == 0 and holds(dtype, value.real)
    if dtype.kind == "f":
        # Rounded to what the type has, nothing finite may be infinite.
        with np.errstate(over="ignore"):
            return not math.isfinite(value) or bool(np.isfinite(np.float64(value).astype(dtype)))
    low, high = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    return math.isfinite(value) and value == int(value) and low <= int(value) <= high


def stored(dtype: np.dtype) -> st.SearchStrategy[Any]:
    """A Python number that an array of that dtype holds exactly."""
    if dtype.kind == "b":
        return st.booleans()
    if dtype.kind in "iu":
        low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
        return st.integers(low, high) | st.sampled_from([edge for edge in EDGES if low <= edge <= high])
    width = dtype.itemsize * 8 // (2 if dtype.kind == "c" else 1)
    edges = (
        [float(edge) for edge in EDGES if np.float64(edge).astype(f"f{width // 8}") == edge] if width > 16 else [0.0, 1.0, -1.0]
    )
    real = st.floats(width=width) | st.sampled_from(edges)
    if dtype.kind == "f":
        return real
    return st.builds(complex, real, st.just(0.0) | real)


@given(st.data())
def test_the_first_misfit_is_found(data: st.DataObject) -> None:
    """Of any type in any other."""
    source, wanted = (np.dtype(data.draw(st.sampled_from(TYPES))) for _ in range(2))
    numbers = data.draw(st.lists(stored(source), min_size=1, max_size=5))
    values = np.array(numbers, source)
    expected = next((place for place, value in enumerate(values.tolist()) if not holds(wanted, value)), None)
    assert first_misfit(values, wanted) == expected
    if source.itemsize > 1:
        assert first_misfit(values.astype(source.newbyteorder(">")), wanted) == expected


def test_far_misfits_are_found() -> None:
    """Values are looked at in pieces."""
    values = np.zeros(3 * _CHECKED_AT_ONCE + 7, np.int64)
    assert first_misfit(values, np.dtype(np.uint8)) is None
    values[[2 * _CHECKED_AT_ONCE + 1, -1]] = 256
    assert first_misfit(values, np.dtype(np.uint8)) == 2 * _CHECKED_AT_ONCE + 1


@pytest.mark.parametrize("name", ["quaternion", "(2,)u2", "u2,", "{}", "", "U9999999999999", 7, b"u2", "M8[s]", "O", "float128"])
def test_no_pixel_types(name: object) -> None:
    """NumPy reads a whole language of types, and fails in many ways."""
    with pytest.raises(InvalidRecord, match="is not a pixel type"):
        dtype_of_pixel_type(name)


def planes(values: np.ndarray, pixel_type: str) -> dict[str, Any]:
    """A record of TZCYX planes that are stored as they are."""
    record = record_of(values)
    record["pixels_meta"]["type"] = pixel_type
    del record["chunks"], record["chunk_grid"]
    record["planes"] = [{"t": t, "z": z, "c": c, "pixels": values[t, z, c].ravel()} for t, z, c in np.ndindex(*values.shape[:3])]
    return record


@pytest.mark.parametrize("in_arrow", [True, False])
def test_a_block_is_looked_at_once(monkeypatch: pytest.MonkeyPatch, in_arrow: bool) -> None:
    """However many regions are read of it: a wide integer costs nothing more then."""
    looked: list[int] = []

    def counting(values: np.ndarray, dtype: np.dtype) -> int | None:
        looked.append(len(values))
        return first_misfit(values, dtype)

    monkeypatch.setattr(ome_tensor.blocks, "first_misfit", counting)
    pixels = random_pixels((2, 3, 1, 9, 11))
    record = planes(pixels.astype(np.int64), "uint16")
    view = TensorView(pa.array([record]) if in_arrow else record, layout="TZCYX")
    for roi in [(0, 0, 3, 3), (5, 5, 6, 4), (0, 0, 11, 9)]:
        x, y, w, h = roi
        for _ in range(2):
            np.testing.assert_array_equal(view[0, 1:, :, y : y + h, x : x + w].to_numpy(), pixels[0, 1:, :, y : y + h, x : x + w])
    assert looked == [99, 99]
    np.testing.assert_array_equal(view.to_numpy(), pixels)
    np.testing.assert_array_equal(view.to_numpy(), pixels)
    assert looked == [99] * 6


def test_a_dtype_that_fits_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual case: its dtype says that it fits."""
    monkeypatch.setattr(ome_tensor.blocks, "first_misfit", None)
    pixels = random_pixels((2, 1, 1, 9, 11), np.uint8)
    for record in (planes(pixels, "uint8"), planes(pixels, "uint16"), record_of(pixels)):
        np.testing.assert_array_equal(TensorView(pa.array([record]), layout="TZCYX").to_numpy(), pixels)


@pytest.mark.parametrize("byte", [2, 255])
@pytest.mark.parametrize("chunk_dtype", ["bit", "bool", None])
def test_a_bit_is_0_or_1(byte: int, chunk_dtype: str | None) -> None:
    """Another byte seen as a boolean would be neither true nor false, and what torch makes of it is undefined."""
    pixels = random_pixels((1, 1, 1, 4, 5), bool)
    record = record_of(pixels)
    record["pixels_meta"]["type"] = "bit"
    record["chunks"][0]["dtype"] = chunk_dtype
    np.testing.assert_array_equal(TensorView(pa.array([record])).to_numpy()[0], pixels[0, 0, 0], strict=True)
    record["chunks"][0]["pixel_bytes"] = bytes([0, 1, byte] + [0] * 17)
    with pytest.raises(InvalidRecord, match=f"chunks hold {byte} at .*y=0, x=2.* pixel type 'bit'"):
        TensorView(pa.array([record])).to_numpy()
