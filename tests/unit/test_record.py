"""Records as found in the wild: odd metadata that reading does not need is absent, what it needs is an error with a name; dicts in parts."""

from __future__ import annotations

import copy
import datetime
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.integration.images import random_pixels, record_of

from ome_tensor import InvalidRecord, TensorView
from ome_tensor.record import Channel, ImageMeta, first_record, read_meta

PIXELS = random_pixels((1, 1, 1, 4, 5))
Record = dict[str, Any]


def record(**changes: Any) -> Record:
    """A record with fields changed; those of ``pixels_meta`` by ``meta``."""
    made = copy.deepcopy(record_of(PIXELS))
    made["pixels_meta"] |= changes.pop("meta", {})
    return made | changes


def channel(**fields: Any) -> Record:
    """``pixels_meta`` with one channel."""
    return {"channels": [{"id": "c", "name": "x", **fields}]}


ODD: dict[str, tuple[Record, Callable[[ImageMeta], object], object]] = {
    "grid of text": (record(chunk_grid="x"), lambda meta: meta.grid, None),
    "grid of numbers": (record(chunk_grid=[1, 2]), lambda meta: meta.grid, None),
    "chunk_y of text": (record(chunk_grid={"chunk_y": "a", "chunk_x": 4}), lambda meta: meta.grid, None),
    "chunk_y nan": (record(chunk_grid={"chunk_y": math.nan, "chunk_x": 4}), lambda meta: meta.grid, None),
    "chunk_y huge": (record(chunk_grid={"chunk_y": 2**62, "chunk_x": 4}), lambda meta: meta.grid, None),
    "chunk_y float": (record(chunk_grid={"chunk_y": 4.0, "chunk_x": 5}), lambda meta: meta.grid, (4, 5, 1, 1, 1)),
    "chunk_z of text": (record(chunk_grid={"chunk_y": 4, "chunk_x": 5, "chunk_z": "a"}), lambda meta: meta.grid, (4, 5, 1, 1, 1)),
    "channels a number": (record(meta={"channels": 3}), lambda meta: meta.channels, ()),
    "channels of text": (record(meta={"channels": "DNA"}), lambda meta: meta.channels, ()),
    "channels of numbers": (record(meta={"channels": [1, 2]}), lambda meta: meta.channels, ()),
    "color of text": (record(meta=channel(color_rgba="#ff")), lambda meta: meta.channels, (Channel("c", "x"),)),
    "color nan": (record(meta=channel(color_rgba=math.nan)), lambda meta: meta.channels, (Channel("c", "x"),)),
    "color inf": (record(meta=channel(color_rgba=math.inf)), lambda meta: meta.channels, (Channel("c", "x"),)),
    "color float": (record(meta=channel(color_rgba=255.0)), lambda meta: meta.channels, (Channel("c", "x", color_rgba=255),)),
    "color signed": (record(meta=channel(color_rgba=-1)), lambda meta: meta.channels[0].color_rgba, 0xFFFFFFFF),
    "wavelength of text": (record(meta=channel(emission_um="red")), lambda meta: meta.channels[0].emission_um, None),
    "size of text": (record(meta={"physical_size_x": "0.5"}), lambda meta: meta.physical_size, (None, None, None)),
    "size nan": (record(meta={"physical_size_x": math.nan}), lambda meta: meta.physical_size, (None, None, None)),
    "time of text": (record(acquisition_datetime="2024-01-01"), lambda meta: meta.acquired, None),
    "time a number": (record(acquisition_datetime=1), lambda meta: meta.acquired, None),
}


@pytest.mark.parametrize("in_arrow", [False, True])
@pytest.mark.parametrize("odd, part, expected", ODD.values(), ids=ODD)
def test_odd_metadata_is_absent(odd: Record, part: Callable[[ImageMeta], object], expected: object, in_arrow: bool) -> None:
    """Upstream reads most of these; the pixels do not need any."""
    data = pa.array([odd]) if in_arrow else odd
    assert part(read_meta(first_record(data))) == expected
    np.testing.assert_array_equal(TensorView(data).to_numpy()[0], PIXELS[0, 0, 0], strict=True)


def test_a_color_beyond_python() -> None:
    """A dict may hold any number."""
    assert read_meta(record(meta={"physical_size_x": 10**400})).physical_size == (None, None, None)
    assert read_meta(record(meta=channel(color_rgba=2**40 + 5))).channels[0].color_rgba == 5


def test_times_and_texts_that_python_does_not_have() -> None:
    """A year far away, bytes that are no text."""
    far = pa.array([2**62], pa.int64()).cast(pa.timestamp("s"))
    text = pa.StringArray.from_buffers(1, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff"))
    plain = pa.array([record()])
    fields = {field.name: plain.field(field.name) for field in plain.type} | {"acquisition_datetime": far, "name": text}
    data = pa.StructArray.from_arrays(list(fields.values()), list(fields))
    meta = read_meta(data[0])
    assert (meta.acquired, meta.name, meta.id) == (None, "", "image")


def test_what_is_as_it_should_be_is_kept() -> None:
    """Tolerance is not deafness."""
    moment = datetime.datetime(2024, 2, 3, 4, 5, 6)
    fields = {"color_rgba": 0xFF0000FF, "emission_um": 0.5, "excitation_um": None, "illumination": "Epifluorescence"}
    meta = read_meta(record(meta=channel(**fields) | {"physical_size_x": 2}, acquisition_datetime=moment))
    assert meta.channels == (Channel("c", "x", 0.5, None, "Epifluorescence", 0xFF0000FF),)
    assert (meta.physical_size, meta.acquired) == ((None, None, 2.0), moment)


NEEDED: dict[str, tuple[Record, str]] = {
    "width inf": (record(meta={"size_x": math.inf}), "pixels_meta.size_x"),
    "width nan": (record(meta={"size_x": math.nan}), "pixels_meta.size_x"),
    "width of text": (record(meta={"size_x": "4"}), "pixels_meta.size_x"),
    "planes a number": (record(chunks=None, planes=5), "planes"),
    "planes of text": (record(chunks=None, planes="foo"), "planes"),
    "planes a struct": (record(chunks=None, planes={"t": 0, "z": 0, "c": 0, "pixels": [1]}), "planes"),
    "planes of numbers": (record(chunks=None, planes=[1, 2]), "planes"),
    "planes of texts": (record(chunks=None, planes=["a"]), "planes"),
    "chunks of text": (record(chunks="zz"), "chunks"),
    "chunks a number": (record(chunks=1.5), "chunks"),
    "t a list": (record(chunks=None, planes=[{"t": [0], "z": 0, "c": 0, "pixels": [0] * 20}]), "planes.t"),
    "pixels_meta of text": (record() | {"pixels_meta": "foo"}, "pixels_meta"),
    "bytes a number": (record(chunks=[record()["chunks"][0] | {"pixel_bytes": 5}]), "pixel_bytes"),
    "bytes a struct": (record(chunks=[record()["chunks"][0] | {"pixel_bytes": {"a": 1}}]), "pixel_bytes"),
    "chunk dtype": (record(chunks=[record()["chunks"][0] | {"dtype": "bogus"}]), "chunks.dtype"),
}


@pytest.mark.parametrize("in_arrow", [False, True])
@pytest.mark.parametrize("odd, field", NEEDED.values(), ids=NEEDED)
def test_what_is_needed_is_named(odd: Record, field: str, in_arrow: bool) -> None:
    """Never an error from inside."""
    with pytest.raises(InvalidRecord) as caught:
        TensorView(pa.array([odd]) if in_arrow else odd).to_numpy()
    assert caught.value.field is not None
    assert field in caught.value.field
    assert field in str(caught.value)


def test_a_chunk_that_does_not_decompress_is_named_by_its_place() -> None:
    """Whoever looks for it does not count chunks."""
    odd = record(chunks=[record()["chunks"][0] | {"compression": "zstd", "pixel_bytes": b"123"}])
    for data in (odd, pa.array([odd])):
        with pytest.raises(InvalidRecord, match=r"^chunk \(t=0, z=0, c=0, y=0, x=0\): its zstd bytes do not decompress"):
            TensorView(data).to_numpy()


# --- dicts ----------------------------------------------------------------------------------------------------------------------

LARGE = random_pixels((1, 2, 1, 60, 70))


def listed(pixels: np.ndarray = LARGE, form: Callable[[np.ndarray], Any] = lambda plane: plane.ravel().tolist()) -> Record:
    """A record of planes as Python lists."""
    made = record_of(pixels)
    made["chunks"] = made["chunk_grid"] = None
    made["planes"] = [{"t": t, "z": z, "c": c, "pixels": form(pixels[t, z, c])} for t, z, c in np.ndindex(*pixels.shape[:3])]
    return made


@pytest.mark.parametrize("size", [(7, 9), (60, 9), (7, 70), (60, 70), (1, 1)])
def test_lists_are_read_in_parts(size: tuple[int, int]) -> None:
    """Tile by tile, over and over: first from the rows, then from the whole that they became."""
    view = TensorView(listed())
    for _ in range(3):
        for tile in view.iter_tiles(tile_size=size):
            _, _, y, x = tile.origin
            h, w = tile.valid[-2:]
            np.testing.assert_array_equal(tile.array, LARGE[..., y : y + h, x : x + w])


def test_only_the_rows_of_a_region_are_converted() -> None:
    """What lies beside it is not even looked at, but counted: a list of another length is another plane."""
    odd = listed()
    odd["planes"][1]["pixels"][0] = "not a number"
    np.testing.assert_array_equal(TensorView(odd, roi=(3, 1, 9, 8)).to_numpy(), LARGE[..., 1:9, 3:12])
    with pytest.raises(InvalidRecord, match="not a sequence of numbers"):
        TensorView(odd, roi=(0, 0, 9, 8)).to_numpy()
    odd["planes"][1]["pixels"].pop()
    with pytest.raises(InvalidRecord, match="pixels"):
        TensorView(odd, z=1, roi=(3, 1, 9, 8)).to_numpy()
    short = listed()
    short["planes"][1]["pixels"].pop()
    with pytest.raises(InvalidRecord, match=r"plane \(t=0, z=1, c=0\): pixels length 4199 != expected 4200"):
        TensorView(short, roi=(3, 1, 9, 8)).to_numpy()


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(lambda plane: plane.tolist(), id="nested lists"),
        pytest.param(lambda plane: tuple(plane.ravel().tolist()), id="tuples"),
        pytest.param(lambda plane: plane.astype(float).ravel().tolist(), id="floats"),
        pytest.param(lambda plane: list(plane.ravel()), id="numpy numbers"),
        pytest.param(lambda plane: plane, id="arrays"),
    ],
)
def test_other_sequences(form: Callable[[np.ndarray], Any]) -> None:
    """Whatever NumPy makes of them."""
    np.testing.assert_array_equal(TensorView(listed(form=form), roi=(3, 1, 9, 8)).to_numpy(), LARGE[..., 1:9, 3:12])
