"""Layouts, and what a view says about itself without reading a pixel."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import ome_arrow.tensor as upstream
import pytest
from tests.conformance import records
from tests.conformance.images import IMAGES, SHAPE
from tests.conformance.implementations import Implementation, as_numpy

import ome_tensor

PIXELS = IMAGES["chunks"].pixels


def arranged(pixels: np.ndarray, layout: str) -> np.ndarray:
    """A TZCYX array in another layout; dropped axes have size 1."""
    letters = layout.upper().replace("H", "Y").replace("W", "X")
    kept = [axis for axis in "TZCYX" if axis in letters]
    squeezed = pixels.squeeze(tuple("TZCYX".index(axis) for axis in "TZCYX" if axis not in letters))
    return squeezed.transpose([kept.index(letter) for letter in letters])


@pytest.mark.parametrize(
    "layout, normal",
    [
        ("TZCYX", "TZCHW"),
        ("TZCHW", "TZCHW"),
        ("tzcyx", "TZCHW"),
        (" xyczt ", "WHCZT"),
        ("TzCHx", "TZCHW"),
        ("CTZWY", "CTZWH"),
        ("YXTZC", "HWTZC"),
    ],
)
def test_layout_spelling(any_view: Implementation, layout: str, normal: str) -> None:
    """Letters of TZCYX, H and W for Y and X, any case, any order; the answer is always in TZCHW letters."""
    view = any_view.view("chunks", layout=layout)
    assert view.layout == normal
    np.testing.assert_array_equal(view.to_numpy(), arranged(PIXELS, normal))


@pytest.mark.parametrize("layout", ["".join(p) for p in permutations("TZCYX")][::7])
def test_permutations(any_view: Implementation, layout: str) -> None:
    """Every permutation gives the array, its shape and its strides in that order."""
    view = any_view.view("planes", layout=layout, t=[0, 2], z=slice(3))
    expected = arranged(PIXELS[[0, 2], :3], layout)
    strides = dict(zip("TZCYX", np.empty((2, 3, 2, 13, 17), np.uint16).strides, strict=True))
    assert view.shape == expected.shape
    assert view.strides == tuple(strides[letter] for letter in layout)
    array = view.to_numpy()
    np.testing.assert_array_equal(array, expected)
    assert array.strides == view.strides


@pytest.mark.parametrize("layout", ["CYX", "YXC", "YX", "XY", "ZYX", "TCYX", "X", "HW"])
def test_dropped_axes(any_view: Implementation, layout: str) -> None:
    """Axes of size 1 may be left out, each of them."""
    view = any_view.view("chunks", t=1, z=[2], c=slice(1, 2), roi=(3, 5, 6, 1) if layout == "X" else None, layout=layout)
    expected = PIXELS[1:2, 2:3, 1:2]
    expected = expected[:, :, :, 5:6, 3:9] if layout == "X" else expected
    assert view.shape == arranged(expected, layout).shape
    np.testing.assert_array_equal(view.to_numpy(), arranged(expected, layout))


@pytest.mark.parametrize(
    "selection, layout",
    [
        ({}, "TZCHW"),
        ({"t": 0}, "TZCHW"),
        ({"z": 0}, "TZCHW"),
        ({"t": 0, "z": 0}, "CHW"),
        ({"t": [1], "z": slice(3, 4)}, "CHW"),
        ({"t": 0, "z": 0, "c": 0}, "CHW"),
        ({"t": 0, "z": []}, "TZCHW"),
        ({"t": 0, "roi3d": (0, 0, 2, 3, 3, 1)}, "CHW"),
        ({"roi_nd": (0, 0, 0, 0, 1, 1, 3, 3)}, "CHW"),
    ],
    ids=str,
)
def test_default_layout(any_view: Implementation, selection: dict[str, Any], layout: str) -> None:
    """CHW for a single t and z, TZCHW otherwise."""
    view = any_view.view("chunks", **selection)
    assert view.layout == layout
    assert len(view.shape) == len(layout)


def test_empty_string_is_the_default_layout(any_view: Implementation) -> None:
    """``""`` means no layout; only a blank one is an error."""
    assert any_view.view("chunks", layout="").layout == "TZCHW"
    assert any_view.view("chunks", t=0, z=0, layout="").layout == "CHW"


@pytest.mark.parametrize(
    "selection, words",
    [
        ({"layout": "  "}, "layout must be non-empty"),
        ({"layout": "TZCYY"}, "layout cannot repeat dimensions"),
        ({"layout": "HY"}, "layout cannot repeat dimensions"),
        ({"layout": "QQ"}, "layout must use only TZC + (Y/X or H/W) letters"),
        ({"layout": "TZC-YX"}, "layout must use only TZC + (Y/X or H/W) letters"),
        ({"layout": "CYX"}, "drops non-singleton dimension 'T'"),
        ({"layout": "CYX", "t": 0}, "drops non-singleton dimension 'Z'"),
        ({"layout": "TZYX"}, "drops non-singleton dimension 'C'"),
        ({"layout": "C", "t": 0, "z": 0}, "drops non-singleton dimension 'H'"),
        ({"layout": "TYX", "z": [], "c": 0}, "drops non-singleton dimension 'Z'"),
    ],
    ids=str,
)
def test_refused_layout(any_view: Implementation, selection: dict[str, Any], words: str) -> None:
    """A layout that means nothing, or would lose pixels, is refused."""
    any_view.refuses(words, "chunks", **selection)


@pytest.mark.parametrize("layout", ["QQ", "TT", "   ", "TZCYXQ"])
def test_lazy_layout_is_checked_at_the_call(our_lazy_view: Implementation, layout: str) -> None:
    """Upstream takes ``"QQ"`` and fails when the pixels are wanted, far from the mistake."""
    view = our_lazy_view.view("chunks")
    with pytest.raises(ome_tensor.OmeTensorError, match="layout"):
        our_lazy_view.view("chunks", layout=layout)
    with pytest.raises(ome_tensor.OmeTensorError, match="layout"):
        view.with_layout(layout)


def test_with_layout(any_view: Implementation) -> None:
    """The same selection in another layout; the view itself does not change."""
    view = any_view.view("chunks", t=2, z=[3, 1], tile=(1, 1), dtype=np.float32)
    turned = view.with_layout("xyzc")
    assert (view.layout, turned.layout) == ("TZCHW", "WHZC")
    assert turned.dtype == np.float32
    np.testing.assert_array_equal(turned.to_numpy(), PIXELS[2, [3, 1], :, 5:10, 6:12].transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[2:, [3, 1], :, 5:10, 6:12])


def test_with_layout_keeps_the_channel_policy(any_view: Implementation) -> None:
    """Policies are part of the plan."""
    view = any_view.view("chunks", t=0, z=0, channel_policy="first").with_layout("YX")
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[0, 0, 0])


@pytest.mark.parametrize("layout", ["", "  ", "QQ", "YY", "CYX"])
def test_with_layout_refuses(any_view: Implementation, layout: str) -> None:
    """The same rules as at construction; ``""`` returns to the default layout."""
    if not layout:
        assert any_view.view("chunks", layout="YXTZC").with_layout("").layout == "TZCHW"
    else:
        any_view.refuses("layout", "chunks", use=lambda view: view.with_layout(layout).shape)


def test_contiguous(any_view: Implementation) -> None:
    """A permuted layout is a strided view of the gathered pixels, until a contiguous one is asked for."""
    view = any_view.view("chunks", t=0, z=0, layout="YXC")
    strided, contiguous = view.to_numpy(), view.to_numpy(contiguous=True)
    assert not strided.flags.c_contiguous
    assert contiguous.flags.c_contiguous
    np.testing.assert_array_equal(strided, contiguous)


def test_contiguous_dlpack(any_view: Implementation) -> None:
    """DLPack is contiguous unless told otherwise."""
    view = any_view.view("chunks", t=0, z=0, layout="YXC")
    assert np.from_dlpack(view.to_dlpack(mode="numpy")).flags.c_contiguous
    assert np.from_dlpack(view.to_dlpack(mode="numpy", contiguous=False)).strides == view.strides


STRIDED = [
    {},
    {"layout": "XYZCT"},
    {"t": [], "z": 1},
    {"t": 0, "z": 0, "roi": (1, 2, 5, 6)},
    {"t": 0, "z": 0, "layout": "YX", "channel_policy": "first"},
    {"layout": "CTZYX", "dtype": np.float64, "roi": (0, 0, 3, 1)},
    {"t": 1, "z": 1, "c": 1, "layout": "XY", "dtype": np.uint8},
]


@pytest.mark.parametrize("selection", STRIDED, ids=str)
def test_same_strides(our_view: Implementation, selection: dict[str, Any]) -> None:
    """Strides of the C-ordered TZCYX selection, permuted: also where the layout drops channels, and where nothing is selected."""
    theirs = upstream.TensorView(IMAGES["chunks"].record, **selection)
    ours = our_view.view("chunks", **selection)
    assert (ours.shape, ours.strides, ours.dtype, ours.layout) == (theirs.shape, theirs.strides, theirs.dtype, theirs.layout)
    if theirs.to_numpy().size:
        assert ours.to_numpy().strides == theirs.to_numpy().strides


def description(view: Any) -> tuple[Any, ...]:
    """All that a view says without pixels."""
    return view.dtype, view.device, view.layout, view.shape, view.strides


@pytest.mark.parametrize("module", [upstream, ome_tensor], ids=["upstream", "ours"])
def test_description_reads_no_pixels(module: Any) -> None:
    """Shape, strides, dtype, device and layout come from the metadata alone."""

    def no_pixels(t: int, z: int, c: int) -> np.ndarray:
        raise AssertionError(f"plane {t, z, c} was read")

    record = records.as_dict(SHAPE, "uint16")
    view = module.TensorView(record, plane_loader=no_pixels, t=0, roi=(1, 2, 3, 4), layout="ZCYX")
    assert description(view) == (np.uint16, "cpu", "ZCHW", (4, 2, 4, 3), (48, 24, 6, 2))
    assert description(view.with_layout("XYZCT"))[3] == (3, 4, 4, 2, 1)


def test_description(any_view: Implementation) -> None:
    """The same description everywhere, before and after the pixels are read."""
    view = any_view.view("chunks", t=0, roi=(1, 2, 3, 4), layout="zcyx")
    expected = (np.uint16, "cpu", "ZCHW", (4, 2, 4, 3), (48, 24, 6, 2))
    assert description(view) == expected
    assert view.to_numpy().shape == view.shape
    assert description(view) == expected


def test_tiles_have_the_views_layout(any_view: Implementation) -> None:
    """A tile with one t and one z keeps the layout of the view it was cut from."""
    view = any_view.view("chunks", roi=(0, 0, 10, 10))
    assert [as_numpy(tile).shape for tile in view.iter_tiles_3d(tile_size=(1, 10, 10))] == [(1, 1, 2, 10, 10)] * 12
    assert [as_numpy(tile).shape for tile in view.iter_dlpack(batch_size=2, mode="numpy")] == [
        (2, 4, 2, 10, 10),
        (1, 4, 2, 10, 10),
    ]


def test_tiles_may_drop_what_the_view_cannot(any_view: Implementation) -> None:
    """A layout without T suits tiles of one t each, though not the whole view."""
    view = any_view.view("chunks", layout="ZCYX")
    tiles = [as_numpy(tile) for tile in view.iter_tiles_3d(tile_size=(4, 13, 17))]
    np.testing.assert_array_equal(np.stack(tiles), PIXELS)
    batches = [as_numpy(batch) for batch in view.iter_dlpack(batch_size=1, mode="numpy")]
    np.testing.assert_array_equal(np.stack(batches), PIXELS)
