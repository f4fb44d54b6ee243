"""Regions: roi, roi3d, roi_nd, tile, and what happens when two of them are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.conformance.images import IMAGES
from tests.conformance.implementations import Implementation

# T, Z, C, Y, X = 3, 4, 2, 13, 17; chunks of 2 x 5 x 6.
PIXELS = IMAGES["chunks"].pixels


@pytest.mark.parametrize("name", ["planes", "chunks", "bytes"])
@pytest.mark.parametrize(
    "roi",
    [(0, 0, 17, 13), (0, 0, 1, 1), (16, 12, 1, 1), (5, 4, 7, 6), (6, 5, 6, 5), (0, 3, 17, 1), (4, 0, 1, 13), [3, 2, 4, 5]],
    ids=str,
)
def test_roi(any_view: Implementation, name: str, roi: Any) -> None:
    """A ROI is ``(x, y, w, h)``: x counts columns, y counts rows."""
    x, y, w, h = roi
    view = any_view.view(name, roi=roi)
    assert view.shape == (3, 4, 2, h, w)
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[..., y : y + h, x : x + w])


@pytest.mark.parametrize(
    "roi, words",
    [
        ((0, 0, 18, 1), "roi is out of bounds"),
        ((17, 0, 1, 1), "roi is out of bounds"),
        ((0, 0, 1, 14), "roi is out of bounds"),
        ((10, 10, 7, 4), "roi is out of bounds"),
        ((-1, 0, 2, 2), "roi origin must be non-negative"),
        ((0, -1, 2, 2), "roi origin must be non-negative"),
        ((0, 0, 0, 2), "roi width and height must be positive"),
        ((0, 0, 2, 0), "roi width and height must be positive"),
        ((0, 0, -2, 2), "roi width and height must be positive"),
        ((-1, 0, 0, 2), "roi width and height must be positive"),  # checked before the origin
    ],
    ids=str,
)
def test_refused_roi(any_view: Implementation, roi: Any, words: str) -> None:
    """A ROI outside the frame is refused, never clipped."""
    any_view.refuses(words, "chunks", roi=roi)


@pytest.mark.parametrize("roi", [(0, 0, 2), (0, 0, 2, 2, 2), ()], ids=str)
def test_roi_of_wrong_length(our_view: Implementation, roi: Any) -> None:
    """Upstream's ValueError is about unpacking; ours names the argument."""
    our_view.refuses("roi must be (x, y, w, h)", "chunks", roi=roi)


def test_roi3d(any_view: Implementation) -> None:
    """``(x, y, z, w, h, d)`` is a ROI and a range of z."""
    view = any_view.view("chunks", roi3d=(5, 4, 1, 7, 6, 3), t=[2, 1])
    assert view.shape == (2, 3, 2, 6, 7)
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[[2, 1], 1:4, :, 4:10, 5:12])


@pytest.mark.parametrize(
    "selection, words",
    [
        ({"roi3d": (0, 0, 0, 2, 2, 1), "z": 0}, "Provide either z or roi3d, not both."),
        ({"roi3d": (0, 0, 0, 2, 2, 1), "z": slice(None)}, "Provide either z or roi3d, not both."),
        ({"roi3d": (0, 0, 2, 2)}, "roi3d must be (x, y, z, w, h, d)"),
        ({"roi3d": (0, 0, 0, 2, 2, 0)}, "roi3d depth must be positive"),
        ({"roi3d": (0, 0, 0, 2, 2, -1)}, "roi3d depth must be positive"),
        ({"roi3d": (0, 0, -1, 2, 2, 1)}, "roi3d z origin must be non-negative"),
        ({"roi3d": (0, 0, 3, 2, 2, 2)}, "roi3d depth is out of bounds"),
        ({"roi3d": (0, 0, 4, 2, 2, 1)}, "roi3d depth is out of bounds"),
        ({"roi3d": (16, 0, 0, 2, 2, 1)}, "roi is out of bounds"),
        ({"roi3d": (-1, 0, 0, 2, 2, 1)}, "roi origin must be non-negative"),
        ({"roi3d": (0, 0, 0, 0, 2, 1)}, "roi width and height must be positive"),
    ],
    ids=str,
)
def test_refused_roi3d(any_view: Implementation, selection: dict[str, Any], words: str) -> None:
    """A roi3d outside the volume, or beside z, is refused."""
    any_view.refuses(words, "chunks", **selection)


@pytest.mark.parametrize(
    "roi_nd, roi_type, where",
    [
        ((4, 5, 10, 12), None, np.s_[:, :, :, 4:10, 5:12]),
        ((4, 5, 10, 12), "2d", np.s_[:, :, :, 4:10, 5:12]),
        ((1, 4, 5, 3, 10, 12), "2d_timelapse", np.s_[1:3, :, :, 4:10, 5:12]),
        ((1, 4, 5, 3, 10, 12), "3d", np.s_[:, 1:3, :, 4:10, 5:12]),
        ((1, 2, 4, 5, 3, 4, 10, 12), None, np.s_[1:3, 2:4, :, 4:10, 5:12]),
        ((1, 2, 4, 5, 3, 4, 10, 12), "4d", np.s_[1:3, 2:4, :, 4:10, 5:12]),
        ([0, 0, 13, 17], None, np.s_[:, :, :, 0:13, 0:17]),
    ],
    ids=str,
)
def test_roi_nd(any_view: Implementation, roi_nd: Any, roi_type: str | None, where: Any) -> None:
    """Min/max bounds, rows before columns; 4 and 8 values need no type."""
    view = any_view.view("chunks", roi_nd=roi_nd, roi_type=roi_type, layout="TZCYX")
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[where])


@pytest.mark.parametrize(
    "selection, words",
    [
        ({"roi_nd": (0, 0, 0, 1, 1, 1)}, "roi_nd with 6 values is ambiguous"),
        ({"roi_nd": (0, 0, 1)}, "roi_nd must have length 4, 6, or 8."),
        ({"roi_nd": (0,) * 10}, "roi_nd must have length 4, 6, or 8."),
        ({"roi_nd": (0, 0, 0, 1, 1, 1), "roi_type": "2d"}, "roi_type='2d' requires 4 values."),
        ({"roi_nd": (0, 0, 1, 1), "roi_type": "2d_timelapse"}, "roi_type='2d_timelapse' requires 6 values."),
        ({"roi_nd": (0, 0, 1, 1), "roi_type": "3d"}, "roi_type='3d' requires 6 values."),
        ({"roi_nd": (0, 0, 1, 1), "roi_type": "4d"}, "roi_type='4d' requires 8 values."),
        ({"roi_nd": (0, 0, 1, 1), "roi_type": "5d"}, "Unsupported roi_type"),
        ({"roi_nd": (0, 0, 1, 1), "roi_type": "2D"}, "Unsupported roi_type"),
        ({"roi_nd": (0, 0, 0, 4, 2, 2), "roi_type": "2d_timelapse"}, "roi_nd time bounds are out of range."),
        ({"roi_nd": (-1, 0, 0, 2, 2, 2), "roi_type": "2d_timelapse"}, "roi_nd time bounds are out of range."),
        ({"roi_nd": (1, 0, 0, 1, 2, 2), "roi_type": "2d_timelapse"}, "roi_nd time bounds are out of range."),
        ({"roi_nd": (0, 0, 0, 0, 4, 1, 2, 2)}, "roi_nd time bounds are out of range."),
        ({"roi_nd": (0, 0, 0, 5, 2, 2), "roi_type": "3d"}, "roi_nd depth bounds are out of range."),
        ({"roi_nd": (-1, 0, 0, 2, 2, 2), "roi_type": "3d"}, "roi_nd depth bounds are out of range."),
        ({"roi_nd": (0, 2, 0, 0, 1, 2, 2, 2)}, "roi_nd depth bounds are out of range."),
        ({"roi_nd": (4, 0, 4, 2)}, "roi_nd spatial bounds must satisfy max > min."),
        ({"roi_nd": (0, 4, 2, 3)}, "roi_nd spatial bounds must satisfy max > min."),
        ({"roi_nd": (0, 0, 14, 2)}, "roi is out of bounds"),
        ({"roi_nd": (-1, 0, 2, 2)}, "roi origin must be non-negative"),
        ({"roi_type": "2d"}, "roi_type requires roi_nd."),
    ],
    ids=str,
)
def test_refused_roi_nd(any_view: Implementation, selection: dict[str, Any], words: str) -> None:
    """Bounds that are ambiguous, inverted or outside the image are refused."""
    any_view.refuses(words, "chunks", **selection)


ROI, ROI3D, ROI_ND, TILE = (0, 0, 2, 2), (0, 0, 0, 2, 2, 1), (0, 0, 2, 2), (0, 0)
TIME_BOUNDS = {"roi_nd": (0, 0, 0, 1, 2, 2), "roi_type": "2d_timelapse"}
DEPTH_BOUNDS = {"roi_nd": (0, 0, 0, 1, 2, 2), "roi_type": "3d"}
ALL_BOUNDS = {"roi_nd": (0, 0, 0, 0, 1, 1, 2, 2)}


@pytest.mark.parametrize(
    "selection, words",
    [
        ({"roi_nd": ROI_ND, "roi": ROI}, "Provide only one of roi_nd, roi3d, roi, or tile."),
        ({"roi_nd": ROI_ND, "roi3d": ROI3D}, "Provide only one of roi_nd, roi3d, roi, or tile."),
        ({"roi_nd": ROI_ND, "tile": TILE}, "Provide only one of roi_nd, roi3d, roi, or tile."),
        ({"roi3d": ROI3D, "roi": ROI}, "Provide only one of roi3d, roi, or tile."),
        ({"roi3d": ROI3D, "tile": TILE}, "Provide only one of roi3d, roi, or tile."),
        ({"roi": ROI, "tile": TILE}, "Provide either roi or tile, not both."),
        ({**TIME_BOUNDS, "t": 0}, "Provide either t or roi_nd time bounds, not both."),
        ({**ALL_BOUNDS, "t": 0}, "Provide either t or roi_nd time bounds, not both."),
        ({**DEPTH_BOUNDS, "z": 0}, "Provide either z or roi_nd depth bounds, not both."),
        ({**ALL_BOUNDS, "z": [0]}, "Provide either z or roi_nd depth bounds, not both."),
    ],
    ids=str,
)
def test_conflicts(any_view: Implementation, selection: dict[str, Any], words: str) -> None:
    """Two statements about one thing are refused, even where they agree."""
    any_view.refuses(words, "chunks", **selection)


def test_bounds_go_with_the_other_axes(any_view: Implementation) -> None:
    """Time bounds leave z free, depth bounds leave t free."""
    view = any_view.view("chunks", z=-1, c=1, **TIME_BOUNDS)
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[0, -1, 1:, :2, :2])
    view = any_view.view("chunks", t=-1, c=1, **DEPTH_BOUNDS)
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[-1, 0, 1:, :2, :2])


@pytest.mark.parametrize("name", ["chunks", "bytes"])
@pytest.mark.parametrize("tile", [(0, 0), (1, 1), (2, 2), (2, 0), [0, 2]], ids=str)
def test_tile(any_view: Implementation, name: str, tile: Any) -> None:
    """``(tile_y, tile_x)`` on the chunk grid; tiles at the right and lower edge are clipped."""
    ty, tx = tile
    expected = PIXELS[..., ty * 5 : ty * 5 + 5, tx * 6 : tx * 6 + 6]
    view = any_view.view(name, tile=tile)
    assert view.shape == expected.shape
    np.testing.assert_array_equal(view.to_numpy(), expected)


def test_tile_is_a_roi_not_a_chunk(any_view: Implementation) -> None:
    """The grid cuts Y and X only: all z are shown, however deep the chunks are."""
    view = any_view.view("chunks", tile=(1, 2), z=[3, 0], t=0)
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[:1, [3, 0], :, 5:10, 12:17])


@pytest.mark.parametrize(
    "name, tile, words",
    [
        ("chunks", (0,), "tile must be (tile_y, tile_x)"),
        ("chunks", (0, 0, 0), "tile must be (tile_y, tile_x)"),
        ("chunks", (-1, 0), "tile indices must be non-negative"),
        ("chunks", (0, -1), "tile indices must be non-negative"),
        ("chunks", (3, 0), "tile indices out of bounds"),
        ("chunks", (0, 3), "tile indices out of bounds"),
        ("planes", (0, 0), "tile selection requires chunk_grid metadata"),
    ],
    ids=str,
)
def test_refused_tile(any_view: Implementation, name: str, tile: Any, words: str) -> None:
    """A tile outside the grid, or without a grid, is refused."""
    any_view.refuses(words, name, tile=tile)


def test_tile_without_chunk_fields(our_view: Implementation) -> None:
    """A record that never heard of chunks says so, instead of failing on a missing field."""
    our_view.refuses("tile selection requires chunk_grid metadata", "nonstrict", tile=(0, 0))
    our_view.refuses("tile selection requires chunk_grid metadata", "null_chunks", tile=(0, 0))


@pytest.mark.parametrize(
    "selection, words",
    [
        ({"roi": (0.0, 0, 2, 2)}, "roi"),
        ({"roi": (0, 0, 2.9, 2)}, "roi"),
        ({"roi": np.array([0.0, 0.0, 2.0, 2.0])}, "roi"),
        ({"roi": (False, 0, True, 2)}, "roi"),
        ({"roi": "0022"}, "roi"),
        ({"roi_nd": (0.7, 0, 2.9, 2)}, "roi_nd"),
        ({"roi_nd": (np.float32(0), 0, 2, 2)}, "roi_nd"),
        ({"roi_nd": (True, 0, 2, 2)}, "roi_nd"),
        ({"roi_nd": ("0", "0", "2", "2")}, "roi_nd"),
        ({"roi3d": (0, 0, 0.5, 2, 2, 1)}, "roi3d"),
        ({"roi3d": (0, 0, 0, 2, 2, True)}, "roi3d"),
        ({"tile": (0.0, 0)}, "tile"),
        ({"tile": (True, 0)}, "tile"),
    ],
    ids=str,
)
def test_only_integers_bound_a_region(our_view: Implementation, selection: dict[str, Any], words: str) -> None:
    """Upstream truncates fractions silently, and shows a different region from the one asked for."""
    our_view.refuses(words, "chunks", **selection)


@pytest.mark.parametrize(
    "selection, where",
    [
        ({"roi": np.array([5, 4, 7, 6])}, np.s_[:, :, :, 4:10, 5:12]),
        ({"roi": (np.int64(5), np.uint8(4), 7, 6)}, np.s_[:, :, :, 4:10, 5:12]),
        ({"roi_nd": np.array([4, 5, 10, 12], dtype=np.uint16)}, np.s_[:, :, :, 4:10, 5:12]),
        ({"roi3d": np.array([5, 4, 1, 7, 6, 3])}, np.s_[:, 1:4, :, 4:10, 5:12]),
        ({"tile": (np.int32(1), np.int32(1))}, np.s_[:, :, :, 5:10, 6:12]),
    ],
    ids=str,
)
def test_numpy_integers_bound_a_region(our_view: Implementation, selection: dict[str, Any], where: Any) -> None:
    """Bounds that NumPy computed can be used as they are."""
    np.testing.assert_array_equal(our_view.view("chunks", **selection).to_numpy(), PIXELS[where])
