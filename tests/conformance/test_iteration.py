"""``iter_dlpack`` and ``iter_tiles_3d``: what is yielded, in which order, and what is refused before the first tile."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.conformance.images import IMAGES
from tests.conformance.implementations import Implementation, Upstream, as_numpy

PIXELS = IMAGES["chunks"].pixels

Iterate = Callable[[Any], Any]


def tiles(view: Any, **arguments: Any) -> list[np.ndarray]:
    """2-D tiles or batches as arrays."""
    return [as_numpy(tile) for tile in view.iter_dlpack(mode="numpy", **arguments)]


def tiles_3d(view: Any, **arguments: Any) -> list[np.ndarray]:
    """3-D tiles as arrays."""
    return [as_numpy(tile) for tile in view.iter_tiles_3d(**arguments)]


def assert_same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    """The same arrays in the same order."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("size, counts", [(1, [1, 1, 1]), (2, [2, 1]), (3, [3]), (99, [3]), (None, [3])])
def test_batches(any_view: Implementation, size: int | None, counts: list[int]) -> None:
    """Batches over T; the last one may be smaller; without a size everything is one batch."""
    batches = tiles(any_view.view("chunks", c=1, roi=(2, 3, 8, 7)), batch_size=size)
    assert [len(batch) for batch in batches] == counts
    np.testing.assert_array_equal(np.concatenate(batches), PIXELS[:, :, 1:, 3:10, 2:10])


def test_tiles(any_view: Implementation) -> None:
    """Tiles over the ROI, row by row, clipped at its edges, each with all selected t, z and c."""
    view = any_view.view("chunks", t=[2, 0], z=1, roi=(2, 3, 11, 9))
    selected = PIXELS[[2, 0], 1:2, :, 3:12, 2:13]
    expected = [selected[..., y : y + 4, x : x + 5] for y in (0, 4, 8) for x in (0, 5, 10)]
    assert_same(tiles(view, tile_size=(4, 5)), expected)
    assert [tile.shape[-2:] for tile in expected][-1] == (1, 1)


def test_tiles_3d(any_view: Implementation) -> None:
    """3-D tiles: one t each, z cut in the order selected, all channels."""
    view = any_view.view("chunks", t=[2, 0], z=[3, 1, 0], roi=(2, 3, 11, 9))
    expected = [
        PIXELS[t : t + 1, z][..., 3 + y : min(3 + y + 5, 12), 2 + x : min(2 + x + 6, 13)]
        for t in (2, 0)
        for z in ([3, 1], [0])
        for y in (0, 5)
        for x in (0, 6)
    ]
    assert_same(tiles_3d(view, tile_size=(2, 5, 6)), expected)


@pytest.mark.parametrize("size", [(13, 17), (100, 100), (1, 17), [13, 1]], ids=str)
def test_tile_sizes(any_view: Implementation, size: Any) -> None:
    """Sizes up to and beyond the frame."""
    found = tiles(any_view.view("planes", t=0), tile_size=size)
    h, w = size
    assert_same(found, [PIXELS[:1, ..., y : y + h, x : x + w] for y in range(0, 13, h) for x in range(0, 17, w)])


ORDERS: list[tuple[str, Iterate]] = [
    ("batches", lambda view: tiles(view, batch_size=1, shuffle=True, seed=7)),
    ("larger batches", lambda view: tiles(view, batch_size=2, shuffle=True, seed=0)),
    ("tiles", lambda view: tiles(view, tile_size=(3, 4), shuffle=True, seed=7)),
    ("more tiles", lambda view: tiles(view, tile_size=(1, 2), shuffle=True, seed=2**64 - 1)),
    ("negative seed", lambda view: tiles(view, tile_size=(3, 4), shuffle=True, seed=-3)),
    ("tiles 3d", lambda view: tiles_3d(view, tile_size=(2, 5, 6), shuffle=True, seed=7)),
    ("seed without shuffle", lambda view: tiles(view, tile_size=(3, 4), seed=7)),
]


@pytest.mark.parametrize("iterate", [pytest.param(iterate, id=name) for name, iterate in ORDERS])
def test_shuffled_as_upstream(our_view: Implementation, iterate: Iterate) -> None:
    """The same seed gives upstream's order, tile for tile."""
    selection = {"t": [0, 2, 1], "z": slice(1, 4), "roi": (1, 0, 15, 12)}
    assert_same(iterate(our_view.view("chunks", **selection)), iterate(Upstream().view("chunks", **selection)))


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_shuffled_by_python(any_view: Implementation, seed: int) -> None:
    """The order is that of ``random.Random(seed).shuffle``, which is what makes it the same everywhere."""
    view = any_view.view("single")
    order = list(range(11))
    random.Random(seed).shuffle(order)
    found = tiles(view, tile_size=(1, 7), shuffle=True, seed=seed)
    assert_same(found, [IMAGES["single"].pixels[0, 0, :, row : row + 1] for row in order])


@pytest.mark.parametrize(
    "iterate",
    [
        pytest.param(lambda view: tiles(view, tile_size=(3, 4), shuffle=True), id="tiles"),
        pytest.param(lambda view: tiles_3d(view, tile_size=(2, 5, 6), shuffle=True), id="tiles 3d"),
        pytest.param(lambda view: tiles(view, batch_size=1, shuffle=True), id="batches"),
    ],
)
def test_shuffled_without_seed(any_view: Implementation, iterate: Iterate) -> None:
    """Every tile once, in some order."""
    found = iterate(any_view.view("chunks", c=0))
    assert sum(tile.size for tile in found) == PIXELS[:, :, 0].size
    assert sorted(np.concatenate([tile.ravel() for tile in found])) == sorted(PIXELS[:, :, 0].ravel())


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("layout", ["YXCZT", "CTZYX"])
def test_layout_of_tiles(any_view: Implementation, layout: str, contiguous: bool) -> None:
    """Tiles come in the view's layout, contiguous unless told otherwise."""
    view = any_view.view("chunks", layout=layout, dtype=np.float32)
    whole = view.to_numpy()
    y, x = layout.index("Y"), layout.index("X")
    found = [np.from_dlpack(tile) for tile in view.iter_dlpack(tile_size=(13, 10), mode="numpy", contiguous=contiguous)]
    assert_same(found, [whole.take(range(10), axis=x), whole.take(range(10, 17), axis=x)])
    assert found[0].shape[y] == 13
    assert all(tile.flags.c_contiguous for tile in found) or not contiguous


def test_channel_policy_of_tiles(any_view: Implementation) -> None:
    """Tiles of a view that shows the first channel only show the first channel only."""
    view = any_view.view("chunks", c=[1, 0], layout="TZYX", channel_policy="first")
    assert_same(tiles(view, tile_size=(13, 17)), [PIXELS[:, :, 1]])
    np.testing.assert_array_equal(np.concatenate(tiles_3d(view, tile_size=(4, 13, 17))), PIXELS[:, :, 1])


def test_arrow_tiles(any_view: Implementation) -> None:
    """Arrow mode is the default: tiles that are exactly the stored chunks come flat, in the stored dtype."""
    view = any_view.view("chunks_flat", t=1, z=2, c=1)
    found = [as_numpy(tile) for tile in view.iter_dlpack(tile_size=(5, 6))]
    plane = PIXELS[1, 2, 1]
    assert_same(found, [plane[y : y + 5, x : x + 6].ravel() for y in (0, 5, 10) for x in (0, 6, 12)])


def test_arrow_tiles_shuffled(our_view: Implementation) -> None:
    """Shuffled as upstream, too."""
    view = our_view.view("chunks_flat", t=1, z=2, c=1)
    shuffled = [as_numpy(tile) for tile in view.iter_dlpack(tile_size=(5, 6), shuffle=True, seed=3)]
    in_order = tiles(Upstream().view("chunks_flat", t=1, z=2, c=1), tile_size=(5, 6), shuffle=True, seed=3)
    assert_same(shuffled, [tile.ravel() for tile in in_order])


def test_arrow_batches(any_view: Implementation) -> None:
    """Batches of one t are whole planes, flat."""
    view = any_view.view("planes", z=0, c=1)
    assert_same([as_numpy(plane) for plane in view.iter_dlpack(batch_size=1)], [PIXELS[t, 0, 1].ravel() for t in range(3)])


ARROW_REFUSALS = [
    ("planes", {}, {}, "mode='arrow' requires a single (t, z, c) selection."),
    ("planes", {"z": 0, "c": 0}, {"batch_size": 2}, "mode='arrow' requires a single (t, z, c) selection."),
    ("planes", {"t": 0, "z": 0, "c": 0}, {"tile_size": (5, 6)}, "mode='arrow' requires a full-frame ROI"),
    ("chunks_flat", {"t": 0, "z": 0, "c": 0}, {"tile_size": (4, 6)}, "mode='arrow' requires ROI to match chunk size."),
    # The first tile is a chunk, the second is none.
    ("chunks_flat", {"t": 0, "z": 0, "c": 0, "roi": (0, 0, 8, 5)}, {"tile_size": (5, 6)}, "requires ROI to match chunk size."),
]


@pytest.mark.parametrize("name, selection, arguments, words", ARROW_REFUSALS, ids=str)
def test_arrow_tiles_are_checked_at_the_call(
    our_view: Implementation, name: str, selection: dict[str, Any], arguments: dict[str, Any], words: str
) -> None:
    """Every tile is checked before the first is handed out: upstream fails somewhere in the middle of an epoch."""
    our_view.refuses(words, name, use=lambda view: view.iter_dlpack(**arguments), **selection)


@pytest.mark.filterwarnings("ignore:Exporting an unversioned DLPack:DeprecationWarning")
@pytest.mark.parametrize("name, selection, arguments, words", ARROW_REFUSALS, ids=str)
def test_refused_arrow_tiles(name: str, selection: dict[str, Any], arguments: dict[str, Any], words: str) -> None:
    """Upstream refuses the same, at the tile."""
    Upstream().refuses(words, name, use=lambda view: list(view.iter_dlpack(**arguments)), **selection)


TILE, TILE_3D = {"tile_size": (4, 4)}, {"tile_size": (2, 4, 4)}

REFUSALS = [
    ("iter_dlpack", {"prefetch": -1}, "prefetch must be >= 0"),
    ("iter_dlpack", {**TILE, "prefetch": -1}, "prefetch must be >= 0"),
    ("iter_dlpack", {"batch_size": 0}, "batch_size must be > 0"),
    ("iter_dlpack", {"batch_size": -2}, "batch_size must be > 0"),
    ("iter_dlpack", {"tile_size": (0, 4)}, "tiles must be positive"),
    ("iter_dlpack", {"tile_size": (4, -1)}, "tiles must be positive"),
    ("iter_dlpack", {**TILE, "tiles": (4, 4)}, "Provide only one of tile_size or tiles."),
    ("iter_tiles_3d", {**TILE_3D, "prefetch": -1}, "prefetch must be >= 0"),
    ("iter_tiles_3d", {**TILE_3D, "mode": "arrow"}, "supports only mode='numpy'"),
    ("iter_tiles_3d", {"tile_size": (0, 4, 4)}, "tile_size entries must be positive"),
    ("iter_tiles_3d", {"tile_size": (2, 0, 4)}, "tile_size entries must be positive"),
    ("iter_tiles_3d", {"tile_size": (2, 4, -4)}, "tile_size entries must be positive"),
]


def begin(method: str, arguments: dict[str, Any], take: int) -> Callable[[Any], list[Any]]:
    """Call an iterator, in numpy mode unless told otherwise, and take some tiles."""

    def use(view: Any) -> list[Any]:
        iterator = getattr(view, method)(**{"mode": "numpy", **arguments})
        return [tile for tile, _ in zip(iterator, range(take), strict=False)]

    return use


@pytest.mark.parametrize("method, arguments, words", REFUSALS, ids=str)
def test_refused_arguments(any_view: Implementation, method: str, arguments: dict[str, Any], words: str) -> None:
    """Arguments that mean nothing are refused."""
    any_view.refuses(words, "chunks", use=begin(method, arguments, 1))


@pytest.mark.parametrize("method, arguments, words", REFUSALS, ids=str)
def test_arguments_are_checked_at_the_call(our_view: Implementation, method: str, arguments: dict[str, Any], words: str) -> None:
    """Upstream's generators say nothing before the first ``next()``."""
    our_view.refuses(words, "chunks", use=begin(method, arguments, 0))


@pytest.mark.parametrize(
    "method, arguments, words",
    [
        ("iter_dlpack", {"mode": "list"}, "Unsupported mode"),
        ("iter_dlpack", {"device": "tpu"}, "Unsupported device"),
        ("iter_tiles_3d", {**TILE_3D, "device": "tpu"}, "Unsupported device"),
        ("iter_dlpack", {"tile_size": (4,)}, "tile_size must be (tile_h, tile_w)"),
        ("iter_dlpack", {"tile_size": (4, 4, 4)}, "tile_size must be (tile_h, tile_w)"),
        ("iter_tiles_3d", {"tile_size": (4, 4)}, "tile_size must be (tile_z, tile_h, tile_w)"),
        ("iter_dlpack", {"tile_size": (4.5, 4)}, "tile_size"),
        ("iter_dlpack", {"tile_size": (True, 4)}, "tile_size"),
        ("iter_dlpack", {"batch_size": 1.5}, "batch_size"),
        ("iter_dlpack", {"batch_size": True}, "batch_size"),
        ("iter_dlpack", {"prefetch": 1.5}, "prefetch"),
        ("iter_dlpack", {**TILE, "shuffle": True, "seed": "abc"}, "seed"),
        ("iter_dlpack", {**TILE, "shuffle": True, "seed": 1.5}, "seed"),
    ],
    ids=str,
)
def test_other_arguments_are_checked_at_the_call(
    our_view: Implementation, method: str, arguments: dict[str, Any], words: str
) -> None:
    """Whatever cannot be iterated by is refused at the call, naming the argument."""
    our_view.refuses(words, "chunks", use=begin(method, arguments, 0))


def test_layout_that_loses_pixels_is_refused_at_the_call(our_view: Implementation) -> None:
    """Also what only the tiles can tell: a layout that drops an axis of theirs."""
    for method, arguments in (("iter_dlpack", TILE), ("iter_dlpack", {"batch_size": 2}), ("iter_tiles_3d", TILE_3D)):
        our_view.refuses("drops non-singleton dimension", "chunks", use=begin(method, arguments, 0), layout="CYX")


def test_tiles_argument_is_deprecated(any_view: Implementation) -> None:
    """``tiles=`` still works, and warns."""
    view = any_view.view("chunks", t=0)
    with pytest.warns(DeprecationWarning, match="tiles"):
        found = tiles(view, tiles=(5, 6))
    assert_same(found, tiles(view, tile_size=(5, 6)))


def test_deprecation_points_to_the_caller(our_view: Implementation) -> None:
    """The warning is given at the call, for the line that makes it: elsewhere Python would not show it."""
    view = our_view.view("chunks", t=0)
    with pytest.warns(DeprecationWarning, match="tiles") as warned:
        view.iter_dlpack(tiles=(5, 6), mode="numpy")
    assert [warning.filename for warning in warned] == [__file__]


def test_numpy_integers_are_sizes(our_view: Implementation) -> None:
    """Sizes that NumPy computed can be used as they are."""
    view = our_view.view("chunks", t=0)
    assert_same(tiles(view, tile_size=(np.int64(5), np.uint8(6))), tiles(view, tile_size=(5, 6)))
    assert_same(tiles(view, batch_size=np.int32(1)), tiles(view, batch_size=1))
    assert_same(tiles_3d(view, tile_size=(np.int16(2), 5, 6)), tiles_3d(view, tile_size=(2, 5, 6)))


def test_tiles_are_independent(our_view: Implementation) -> None:
    """A tile that is written to changes no other tile, and nothing of the view."""
    view = our_view.view("chunks_whole", t=0, c=0, z=0)
    for tile in view.iter_dlpack(tile_size=(13, 17), mode="numpy"):
        np.from_dlpack(tile, copy=True)[...] = 0
    for tile in view.iter_dlpack(tile_size=(5, 6), mode="numpy"):
        torch.from_dlpack(tile).zero_()
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[0, 0, :1])


def test_tiles_are_dlpack_objects(our_view: Implementation) -> None:
    """What is yielded follows the standard, and may be kept while the iteration goes on."""
    kept = list(our_view.view("chunks", t=0).iter_dlpack(tile_size=(5, 6), mode="numpy"))
    assert {tuple(tile.__dlpack_device__()) for tile in kept} == {(1, 0)}
    again = [as_numpy(tile) for tile in kept]
    assert_same(again, [as_numpy(tile) for tile in kept])
    assert_same(again, tiles(Upstream().view("chunks", t=0), tile_size=(5, 6)))


def test_iterators_are_independent(our_view: Implementation) -> None:
    """Two iterations of one view do not disturb each other."""
    view = our_view.view("chunks", t=0)
    one, other = (view.iter_dlpack(tile_size=(5, 6), mode="numpy") for _ in range(2))
    pairs = [(as_numpy(a), as_numpy(b)) for a, b in zip(one, other, strict=True)]
    assert_same([a for a, _ in pairs], [b for _, b in pairs])
