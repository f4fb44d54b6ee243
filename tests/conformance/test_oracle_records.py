"""NumPy as oracle on random records: any shape, any chunks, any encoding and pixel type must read as the array it was made from.

The engine recognises layouts that it can read fast; this looks for records that resemble one of them and are not.
"""

from __future__ import annotations

from itertools import pairwise, product
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conformance import records
from tests.conformance.test_oracle import ORACLE

import ome_tensor

ENCODINGS = ["planes", "chunks", "none", "zstd", "lz4"]
DTYPES = ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "float32", "float64"]


@st.composite
def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """An axis cut into intervals: evenly, as a grid does, or anywhere."""
    if draw(st.booleans()):
        step = draw(st.integers(1, size))
        edges = [*range(0, size, step), size]
    else:
        edges = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))})
    return list(pairwise(edges))


@st.composite
def entries(draw: st.DrawFn, pixels: np.ndarray, encoding: str) -> list[dict[str, Any]]:
    """All planes or chunks of an array, in a random order or in one that has a meaning."""
    if encoding == "planes":
        found = list(records.plane_entries(pixels, "".join(draw(st.permutations("tzc")))))
    else:
        found = []
        nt, nz, nc, ny, nx = pixels.shape
        even = draw(cuts(nz)), draw(cuts(ny)), draw(cuts(nx))
        for t, c in product(range(nt), range(nc)):
            # Now and then a volume is cut in its own way.
            parts = (draw(cuts(nz)), draw(cuts(ny)), draw(cuts(nx))) if draw(st.integers(0, 9)) == 0 else even
            for (z, z1), (y, y1), (x, x1) in product(*parts):
                values = pixels[t, z:z1, c, y:y1, x:x1].ravel()
                place = {"t": t, "c": c, "z": z, "y": y, "x": x, "shape_z": z1 - z, "shape_y": y1 - y, "shape_x": x1 - x}
                found.append({**place, **payload(values, encoding)})
    order = draw(st.sampled_from(["as it is", "backwards", "shuffled"]))
    if order == "shuffled":
        return draw(st.permutations(found))
    return found[::-1] if order == "backwards" else found


def payload(values: np.ndarray, encoding: str) -> dict[str, Any]:
    """The pixel fields of a chunk."""
    if encoding == "chunks":
        return {"pixels": values}
    content = values.tobytes()
    if encoding != "none":
        content = pa.Codec(encoding).compress(content, asbytes=True)
    return {"dtype": values.dtype.name, "compression": encoding, "pixel_bytes": content}


@st.composite
def images(draw: st.DrawFn) -> tuple[Any, np.ndarray]:
    """A record, as one of the kinds of data, and the TZCYX array that it holds."""
    shape = tuple(draw(st.integers(1, n)) for n in (3, 4, 3, 6, 7))
    encoding = draw(st.sampled_from(ENCODINGS))
    pixels = records.numbered(shape, draw(st.sampled_from(DTYPES)))
    byte_chunks = encoding not in ("planes", "chunks")
    kind = records.struct_type(pa.from_numpy_dtype(pixels.dtype), byte_chunks=byte_chunks)
    part = "planes" if encoding == "planes" else "chunks"
    record = records.as_dict(shape, pixels.dtype.name, **{part: draw(entries(pixels, encoding))})
    array = records.as_array(record, kind)
    before = draw(st.integers(0, 2))
    if before:
        # Rows before it move every offset.
        array = pa.concat_arrays([*[array] * before, array]).slice(before)
    return draw(st.sampled_from([array, array[0], pa.chunked_array([array.slice(0, 0), array]), array[0].as_py()])), pixels


@settings(ORACLE, max_examples=250)
@given(data=st.data())
def test_random_records(data: st.DataObject) -> None:
    """Whole, and a random block of random planes, through a random layout."""
    stored, pixels = data.draw(images(), label="image")
    np.testing.assert_array_equal(ome_tensor.TensorView(stored, layout="TZCYX").to_numpy(), pixels)
    plan: dict[str, Any] = {}
    expected = pixels
    for axis, letter in enumerate("tzc"):
        plan[letter] = data.draw(st.lists(st.integers(0, pixels.shape[axis] - 1), min_size=1, max_size=4), label=letter)
        expected = expected.take(plan[letter], axis=axis)
    (y, y1), (x, x1) = (sorted(data.draw(st.tuples(*[st.integers(0, n - 1)] * 2))) for n in pixels.shape[3:])
    plan["roi"] = (x, y, x1 - x + 1, y1 - y + 1)
    layout = "".join(data.draw(st.permutations("TZCYX"), label="layout"))
    expected = expected[..., y : y1 + 1, x : x1 + 1].transpose(["TZCYX".index(letter) for letter in layout])
    dtype = data.draw(st.sampled_from([None, "float32"]), label="dtype")
    view = ome_tensor.TensorView(stored, layout=layout, dtype=dtype, **plan)
    np.testing.assert_array_equal(view.to_numpy(), expected.astype(dtype or expected.dtype))
    tile = tuple(data.draw(st.integers(1, 4), label="tile") for _ in range(3))
    tiles = [np.from_dlpack(tile) for tile in view.iter_tiles_3d(tile_size=tile)]
    assert sum(tile.size for tile in tiles) == expected.size
