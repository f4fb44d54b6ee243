"""Hand-off in ``mode="arrow"``: the stored values of exactly one plane or chunk, flat, in the stored dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.conformance.images import IMAGES
from tests.conformance.implementations import Implementation, as_numpy

import ome_tensor

PIXELS = IMAGES["chunks"].pixels


def export(view: Any) -> np.ndarray:
    """Arrow mode is the default."""
    return as_numpy(view.to_dlpack())


@pytest.mark.parametrize(
    "name, selection, expected",
    [
        ("planes", {"t": 1, "z": 2, "c": 1}, PIXELS[1, 2, 1]),
        ("planes", {"t": -1, "z": [0], "c": slice(0, 1), "layout": "XY"}, PIXELS[2, 0, 0]),
        ("planes", {"t": 0, "z": 0, "c": 0, "roi": (0, 0, 17, 13)}, PIXELS[0, 0, 0]),
        ("planes_shuffled", {"t": 2, "z": 3, "c": 1}, PIXELS[2, 3, 1]),
        ("chunks_flat", {"t": 1, "z": 2, "c": 1, "tile": (1, 0)}, PIXELS[1, 2, 1, 5:10, 0:6]),
        ("chunks_flat", {"t": 1, "z": 2, "c": 1, "tile": (2, 2)}, PIXELS[1, 2, 1, 10:13, 12:17]),
        ("chunks_flat", {"t": 0, "z": 3, "c": 0, "roi": (6, 5, 6, 5)}, PIXELS[0, 3, 0, 5:10, 6:12]),
        ("chunks_rows", {"t": 0, "z": 3, "c": 0, "roi": (0, 5, 17, 5)}, PIXELS[0, 3, 0, 5:10]),
        ("planes_f32", {"t": 2, "z": 1, "c": 0}, IMAGES["planes_f32"].pixels[2, 1, 0]),
        ("single", {}, IMAGES["single"].pixels),
    ],
    ids=lambda value: "" if isinstance(value, np.ndarray) else str(value),
)
def test_values(any_view: Implementation, name: str, selection: dict[str, Any], expected: np.ndarray) -> None:
    """Flat values of the plane or chunk; layouts do not matter."""
    values = export(any_view.view(name, **selection))
    assert values.ndim == 1
    assert values.dtype == expected.dtype
    np.testing.assert_array_equal(values, expected.ravel())


def test_stored_dtype(any_view: Implementation) -> None:
    """The stored dtype, not the logical one."""
    values = export(any_view.view("stack_u16", z=2, c=1))
    assert values.dtype == np.uint16
    np.testing.assert_array_equal(values, IMAGES["stack"].pixels[0, 2, 1].ravel())


@pytest.mark.parametrize("name", ["nonstrict", "null_chunks"])
def test_stored_dtype_of_nonstrict_records(our_view: Implementation, name: str) -> None:
    """Records as found in the wild, int64 values and all."""
    values = export(our_view.view(name, t=1, z=2, c=1))
    assert values.dtype == np.int64
    np.testing.assert_array_equal(values, PIXELS[1, 2, 1].ravel())


ONE = {"t": 0, "z": 0, "c": 0}

REFUSALS = [
    ("planes", {}, "mode='arrow' requires a single (t, z, c) selection."),
    ("planes", {"t": 0, "z": 0}, "mode='arrow' requires a single (t, z, c) selection."),
    ("planes", {"t": 0, "z": 0, "c": [0, 0]}, "mode='arrow' requires a single (t, z, c) selection."),
    ("chunks_flat", {"t": [], "z": 0, "c": 0}, "mode='arrow' requires a single (t, z, c) selection."),
    ("planes", {**ONE, "roi": (0, 0, 16, 13)}, "mode='arrow' requires a full-frame ROI"),
    ("planes", {**ONE, "roi": (0, 1, 17, 12)}, "mode='arrow' requires a full-frame ROI"),
    ("chunks_flat", ONE, "mode='arrow' requires ROI to match chunk size."),
    ("chunks_flat", {**ONE, "roi": (0, 0, 6, 4)}, "mode='arrow' requires ROI to match chunk size."),
    ("chunks_flat", {**ONE, "roi": (6, 5, 11, 5)}, "mode='arrow' requires ROI to match chunk size."),
    ("chunks_flat", {**ONE, "roi": (1, 0, 6, 5)}, "Chunk not found for the requested (t, z, c, roi)."),
    ("chunks", {"t": 0, "z": 1, "c": 0, "tile": (0, 0)}, "Chunk not found for the requested (t, z, c, roi)."),
    ("chunks", {**ONE, "tile": (0, 0)}, "mode='arrow' requires shape_z == 1"),
]


@pytest.mark.parametrize("name, selection, words", REFUSALS, ids=str)
def test_refusals(any_view: Implementation, name: str, selection: dict[str, Any], words: str) -> None:
    """Anything but exactly one stored block is refused, with the reason."""
    any_view.refuses(words, name, use=export, **selection)


@pytest.mark.parametrize("method", ["to_torch", "to_jax"])
def test_other_libraries(any_view: Implementation, method: str) -> None:
    """torch and JAX get the same values by default, and the same refusals."""
    values = getattr(any_view.view("planes", t=1, z=2, c=1), method)()
    np.testing.assert_array_equal(np.asarray(values), PIXELS[1, 2, 1].ravel())
    any_view.refuses("mode='arrow' requires a single (t, z, c) selection.", "planes", use=lambda view: getattr(view, method)())


def test_byte_chunks(our_view: Implementation) -> None:
    """Byte-encoded chunks hold no Arrow values: refused with the way out, as upstream does, or given right."""
    view = our_view.view("bytes_zstd", t=1, z=2, c=1, tile=(1, 1))
    try:
        values = export(view)
    except ome_tensor.InvalidArgument as error:
        values = None
        message = str(error)
    if values is None:
        assert "mode='numpy'" in message
        return
    np.testing.assert_array_equal(values, PIXELS[1, 2, 1, 5:10, 6:12].ravel())


@pytest.mark.parametrize("name", ["planes", "chunks_flat", "nonstrict"])
def test_dtype_override_is_not_ignored(our_view: Implementation, name: str) -> None:
    """Upstream hands out the stored dtype whatever was asked for; ours refuses a dtype that is not the stored one."""
    stored = np.int64 if name == "nonstrict" else np.uint16
    tile = (0, 0) if name == "chunks_flat" else None
    error = our_view.refuses("dtype", name, use=export, dtype=np.float32, tile=tile, **ONE)
    assert "arrow" in str(error)
    assert export(our_view.view(name, dtype=stored, tile=tile, **ONE)).dtype == stored


def test_cuda_is_refused(any_view: Implementation) -> None:
    """Arrow values are host memory; which of the two reasons comes first does not matter."""
    view = any_view.view("single")
    with pytest.raises((ValueError, RuntimeError), match=r"mode='arrow' does not support device='cuda'|no CUDA"):
        view.to_dlpack(device="cuda")


@pytest.mark.parametrize("name", ["planes", "chunks_flat"])
def test_values_are_private(our_view: Implementation, name: str) -> None:
    """Writing to what arrow mode hands out changes neither the view nor the image."""
    tile = (0, 0) if name == "chunks_flat" else None
    view = our_view.view(name, tile=tile, **ONE)
    before = view.to_numpy().copy()
    view.to_torch().zero_()
    np.testing.assert_array_equal(view.to_numpy(), before)
    assert export(view).any()
    np.testing.assert_array_equal(our_view.view(name, tile=tile, **ONE).to_numpy(), before)


def array_of(name: str) -> pa.StructArray:
    """The record alone."""
    return IMAGES[name].record


SOURCES: dict[str, Callable[[str], Any]] = {
    "scalar": lambda name: IMAGES[name].scalar,
    "dict": lambda name: IMAGES[name].dictionary,
    "one chunk": lambda name: pa.chunked_array([array_of(name)]),
    "chunks": lambda name: pa.chunked_array([array_of(name).slice(0, 0), array_of(name), array_of(name)]),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["planes", "chunks_flat"])
def test_other_kinds_of_data(source: str, name: str) -> None:
    """Whatever the record comes as, the values have the dtype that OME-Arrow stores.

    Upstream means the same but passes these through Python objects, warns about it, and with pyarrow 26 fails for two of them.
    """
    tile = (1, 0) if name == "chunks_flat" else None
    expected = PIXELS[1, 2, 1, 5:10, 0:6] if tile else PIXELS[1, 2, 1]
    values = export(ome_tensor.TensorView(SOURCES[source](name), t=1, z=2, c=1, tile=tile))
    assert values.dtype == np.uint16
    np.testing.assert_array_equal(values, expected.ravel())
