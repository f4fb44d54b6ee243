"""Stored blocks: every layout of chunks reads alike, and every kind of damage is an error that names the place, never a wrong pixel."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.integration.images import random_pixels, record_of

from ome_tensor import InvalidRecord, LimitExceeded, TensorView
from ome_tensor.blocks import ChunkCache
from ome_tensor.pixels import StoredPixels
from ome_tensor.plan import Plan
from ome_tensor.view import view_of_image

SHAPE = (2, 3, 2, 9, 11)
PIXELS = random_pixels(SHAPE)
Record = dict[str, Any]


def cut(pixels: np.ndarray, size: tuple[int, int, int], form: str = "bytes", codec: str | None = None) -> Record:
    """A record of chunks of (z, y, x), as bytes or as lists."""
    record = record_of(pixels)
    nz, ny, nx = size
    record["chunk_grid"] = {"chunk_z": nz, "chunk_y": ny, "chunk_x": nx, "chunk_order": "ZYX"}
    record["chunks"] = []
    t, z, c, y, x = pixels.shape
    for it, ic, iz, iy, ix in np.ndindex(t, c, -(-z // nz), -(-y // ny), -(-x // nx)):
        part = pixels[it, iz * nz : (iz + 1) * nz, ic, iy * ny : (iy + 1) * ny, ix * nx : (ix + 1) * nx]
        chunk: Record = {"t": it, "c": ic, "z": iz * nz, "y": iy * ny, "x": ix * nx}
        chunk |= dict(zip(("shape_z", "shape_y", "shape_x"), part.shape, strict=True))
        if form == "lists":
            chunk["pixels"] = part.ravel().tolist()
        else:
            data = part.tobytes()
            chunk |= {"dtype": pixels.dtype.name, "compression": codec}
            chunk["pixel_bytes"] = pa.Codec(codec).compress(data, asbytes=True) if codec else data
        record["chunks"].append(chunk)
    return record


def arrow(record: Record) -> pa.StructArray:
    """The record in Arrow."""
    return pa.array([record])


FORMS: dict[str, Callable[[Record], Any]] = {"arrow": arrow, "dict": lambda record: record}


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 11)),
    form=st.sampled_from(["lists", "bytes", "zstd", "lz4"]),
    seed=st.none() | st.integers(0, 99),
    in_arrow=st.booleans(),
    region=st.tuples(st.integers(0, 10), st.integers(0, 8), st.integers(1, 11), st.integers(1, 9)),
    z=st.lists(st.integers(0, 2), max_size=4),
)
def test_every_grid_reads_alike(
    size: tuple[int, int, int], form: str, seed: int | None, in_arrow: bool, region: tuple[int, ...], z: list[int]
) -> None:
    """Any chunk size, encoding, order in the file, selection and ROI."""
    record = cut(PIXELS, size, "lists" if form == "lists" else "bytes", form if form in ("zstd", "lz4") else None)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(record["chunks"]))
        record["chunks"] = [record["chunks"][place] for place in order]
    x, y = region[:2]
    w, h = min(region[2], 11 - x), min(region[3], 9 - y)
    view = TensorView(arrow(record) if in_arrow else record, z=z, roi=(x, y, w, h), layout="TZCYX")
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[:, z][..., y : y + h, x : x + w], strict=True)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_irregular_chunks_read_alike(data: st.DataObject) -> None:
    """Rows of chunks of different heights and widths: no grid to divide by."""
    pixels = PIXELS[:1, :1, :1]
    record = record_of(pixels)
    chunk = record["chunks"].pop()
    y_cuts = sorted({0, 9, *data.draw(st.lists(st.integers(1, 8), max_size=3))})
    for y0, y1 in itertools.pairwise(y_cuts):
        x_cuts = sorted({0, 11, *data.draw(st.lists(st.integers(1, 10), max_size=3))})
        for x0, x1 in itertools.pairwise(x_cuts):
            part = pixels[0, 0, 0, y0:y1, x0:x1]
            place = {"y": y0, "x": x0, "shape_y": y1 - y0, "shape_x": x1 - x0}
            record["chunks"].append(chunk | place | {"pixel_bytes": part.tobytes()})
    np.testing.assert_array_equal(TensorView(arrow(record), layout="TZCYX").to_numpy(), pixels, strict=True)


Damage = Callable[[Record], object]


def last(**changes: Any) -> Damage:
    """Change fields of the last chunk; a callable makes the new value from the old."""

    def damage(record: Record) -> None:
        chunk = record["chunks"][-1]
        for name, value in changes.items():
            chunk[name] = value(chunk[name]) if callable(value) else value

    return damage


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing": (lambda record: record["chunks"].pop(), "missing"),
    "twice": (lambda record: record["chunks"].append(record["chunks"][-1]), "overlap"),
    "shifted over another": (last(y=4), "overlap|missing"),
    "too short": (last(pixel_bytes=lambda data: data[:-2]), "length"),
    "too long": (last(pixel_bytes=lambda data: data + b"\0\0"), "length"),
    "half a pixel": (last(pixel_bytes=lambda data: data[:-1]), "length"),
    "empty": (last(pixel_bytes=b""), "length"),
    "no bytes": (last(pixel_bytes=None), "length|pixels"),
    "another dtype": (last(dtype="uint8"), "length"),
    "unknown dtype": (last(dtype="quaternion"), "quaternion"),
    "unknown codec": (last(compression="middle-out"), "middle-out"),
    "not compressed": (last(compression="zstd"), "zstd"),
    "t outside": (last(t=2), "out of range"),
    "negative t": (last(t=-1), "out of range"),
    "c outside": (last(c=2), "out of range"),
    "z outside": (last(z=3), "out of range"),
    "x outside": (last(x=8), "out of range"),
    "huge y": (last(y=2**62), "out of range"),
    "flat": (last(shape_y=0), "shape"),
    "huge shape": (last(shape_z=2**30, shape_y=2**30, shape_x=2**30), "out of range"),
    "null t": (last(t=None), "null|integers|missing"),
    "t of text": (last(t="1"), "integers|missing"),
    "no order": (lambda record: record["chunk_grid"].update(chunk_order="XYZ"), "XYZ"),
    "nothing": (lambda record: record.update(chunks=[]), "no pixels"),
    "no width": (lambda record: record["pixels_meta"].update(size_x=0), "size_x|x size"),
    "unknown type": (lambda record: record["pixels_meta"].update(type="quaternion"), "quaternion"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damage,words", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_an_error(form: str, damage: Damage, words: str) -> None:
    """Naming what is wrong; and a read that does not touch the damage is right, or refused, but never wrong."""
    record = copy.deepcopy(cut(PIXELS, (1, 5, 11)))
    damage(record)
    try:
        data = FORMS[form](record)
    except (pa.ArrowException, TypeError):
        pytest.skip("Arrow itself cannot hold this damage")
    with pytest.raises(InvalidRecord, match=words) as caught:
        TensorView(data, layout="TZCYX").to_numpy()
    assert caught.value.field
    try:
        elsewhere = TensorView(data, t=0, z=0, layout="TZCYX").to_numpy()
    except InvalidRecord:
        return
    np.testing.assert_array_equal(elsewhere, PIXELS[:1, :1], strict=True)


@pytest.mark.parametrize("codec", ["zstd", "lz4", "gzip"])
@pytest.mark.parametrize(
    "change", [lambda data: data[:-4], lambda data: data[:-1], lambda data: b"", lambda data: b"\xff" * len(data)]
)
def test_damaged_compression(codec: str, change: Callable[[bytes], bytes]) -> None:
    """What does not decompress to the pixels that belong there."""
    if not pa.Codec.is_available(codec):
        pytest.skip(f"this pyarrow has no {codec}")
    record = cut(PIXELS, (3, 9, 11), codec=codec)
    record["chunks"][-1]["pixel_bytes"] = change(record["chunks"][-1]["pixel_bytes"])
    with pytest.raises(InvalidRecord, match=codec):
        TensorView(arrow(record)).to_numpy()


@pytest.mark.parametrize("values", [10, 98, 100])
def test_compressed_pixels_of_another_number(values: int) -> None:
    """It decompresses, but to fewer or more pixels than the chunk has."""
    record = cut(PIXELS[:1, :1, :1], (1, 9, 11), codec="zstd")
    record["chunks"][0]["pixel_bytes"] = pa.Codec("zstd").compress(np.zeros(values, np.uint16).tobytes(), asbytes=True)
    with pytest.raises(InvalidRecord, match="99"):
        TensorView(arrow(record)).to_numpy()


@pytest.mark.parametrize("pixels", [[1, None, 3], ["a"], [[1]], 7])
def test_lists_that_are_no_numbers(pixels: object) -> None:
    """Nulls have no value; text is none."""
    record = cut(PIXELS[:1, :1, :1, :1, :3], (1, 1, 3), "lists")
    record["chunks"][0]["pixels"] = pixels
    with pytest.raises(InvalidRecord, match="pixels"):
        TensorView(arrow(record)).to_numpy()


def test_a_bomb_is_not_unpacked() -> None:
    """A few bytes can claim to be any size; a server says how much it takes."""
    record = cut(np.zeros((1, 1, 1, 1000, 1000), np.uint16), (1, 1000, 1000), codec="zstd")
    assert len(record["chunks"][0]["pixel_bytes"]) < 1000
    cache = ChunkCache(max_chunk_bytes=1_000_000)
    view = view_of_image(StoredPixels(arrow(record)[0], cache), Plan())
    with pytest.raises(LimitExceeded, match="max_chunk_bytes"):
        view.to_numpy()


def test_the_cache_keeps_its_bound() -> None:
    """Least recently used out first; what is too large is not kept; threads that want one chunk get it."""
    record = cut(PIXELS, (1, 9, 11), codec="zstd")
    chunk = 9 * 11 * 2
    cache = ChunkCache(3 * chunk)
    pixels = StoredPixels(arrow(record)[0], cache)

    def read(_: int) -> bool:
        return np.array_equal(view_of_image(pixels, Plan(layout="TZCHW")).to_numpy(), PIXELS)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(40)))
    assert cache.nbytes == 3 * chunk
    none = ChunkCache(chunk - 1)
    assert np.array_equal(view_of_image(StoredPixels(arrow(record)[0], none), Plan(layout="TZCHW")).to_numpy(), PIXELS)
    assert none.nbytes == 0
