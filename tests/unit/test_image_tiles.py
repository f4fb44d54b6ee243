"""Tiles of many images: one enumeration, in any order, shared out without a gap or a repeat."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ome_tensor.errors import InvalidArgument, InvalidSelection, LimitExceeded
from ome_tensor.image_tiles import ImageTiles, tiles_of
from ome_tensor.image_views import resolve_views
from ome_tensor.plan import Plan
from ome_tensor.selection import Extent, Selection
from ome_tensor.tiling import Order, Tile, TileSequence, Tiling

sizes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(1, 9), st.integers(1, 9))

tilings = st.one_of(
    st.just(Tiling()),
    st.builds(lambda t: Tiling.time_batches(t), st.integers(1, 3)),
    st.builds(
        lambda h, w, edge: Tiling.tiles((h, w), edge),
        st.integers(1, 5),
        st.integers(1, 5),
        st.sampled_from(["clip", "pad", "drop"]),
    ),
    st.builds(
        lambda z, h, w, edge: Tiling.tiles_3d((z, h, w), edge),
        st.integers(1, 3),
        st.integers(1, 5),
        st.integers(1, 5),
        st.sampled_from(["clip", "pad", "drop"]),
    ),
    st.builds(
        lambda h, w, edge: Tiling.centred((h, w), edge),
        st.integers(1, 12),
        st.integers(1, 12),
        st.sampled_from(["clip", "pad", "drop"]),
    ),
)


def view(size: tuple[int, ...]) -> Selection:
    t, z, c, h, w = size
    return Selection(range(t), range(z), range(c), 1, 2, w, h)


#: Indices as a plan may choose them: in steps, backwards, listed with repetitions, none.
indices = st.one_of(
    st.builds(
        lambda first, count, step: range(first, first + count * step, step),
        st.integers(6, 8),
        st.integers(0, 3),
        st.sampled_from([1, 2, -1]),
    ),
    st.sampled_from([(3, 1, 1), (0, 4), (5, 2, 9, 0)]),
)


@st.composite
def odd_view(draw: st.DrawFn) -> Selection:
    """A view whose t and z are chosen in any way, z perhaps none."""
    t = draw(indices.filter(len))
    z = draw(indices)
    h, w = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return Selection(t, z, range(draw(st.integers(1, 2))), draw(st.integers(0, 3)), draw(st.integers(0, 3)), w, h)


@st.composite
def many(draw: st.DrawFn) -> tuple[list[Selection], np.ndarray]:
    """Some views, and images of them."""
    views = draw(st.lists(st.one_of(sizes.map(view), odd_view()), min_size=1, max_size=4))
    of = draw(st.lists(st.integers(0, len(views) - 1), min_size=2, max_size=9))
    return views, np.array(of)


def place(tile: Tile) -> tuple[object, ...]:
    return (tile.selection, tile.shape, tile.inset, tile.listed)


@settings(deadline=None)
@given(many=many(), tiling=tilings)
def test_images_one_after_the_other(many: tuple[list[Selection], np.ndarray], tiling: Tiling) -> None:
    views, of = many
    tiles = ImageTiles(views, of, tiling)
    alone = [(image, tile) for image, number in enumerate(of) for tile in TileSequence(views[number], tiling)]
    assert len(tiles) == tiles.total == len(alone)
    numbers = np.arange(tiles.total)
    table, images = tiles.table(numbers), tiles.images(numbers)
    for number, (tile, (image, own)) in enumerate(zip(tiles, alone, strict=True)):
        assert (tile.number, tile.position, tile.image) == (number, number, image)
        assert place(tile) == place(own)
        s = tile.selection
        assert table[number].tolist() == [*tile.origin, len(s.z), s.h, s.w]
        assert images[number] == image
    shapes = {tile.shape for tile in tiles}
    assert not shapes or tiles.uniform == (len(shapes) == 1)
    if tiles.uniform and len(tiles):
        assert shapes == {tiles.shape} == {tiles.largest}
    elif len(tiles):
        assert tiles.largest == tuple(max(sizes) for sizes in zip(*shapes, strict=True))


@settings(deadline=None)
@given(many=many(), tiling=tilings, seed=st.integers(0, 2**64 - 1), count=st.integers(1, 4), start=st.integers(0, 5))
def test_a_shuffle_is_of_all_tiles_and_shards_are_all_of_it(
    many: tuple[list[Selection], np.ndarray], tiling: Tiling, seed: int, count: int, start: int
) -> None:
    views, of = many
    total = ImageTiles(views, of, tiling).total
    wanted = list(range(total))
    random.Random(seed).shuffle(wanted)
    whole = ImageTiles(views, of, tiling, Order(True, seed))
    assert [tile.number for tile in whole] == whole.numbers(0, total).tolist() == wanted
    shards = [ImageTiles(views, of, tiling, Order(True, seed, index, count)) for index in range(count)]
    found: list[int] = [0] * total
    for index, shard in enumerate(shards):
        assert [tile.number for tile in shard] == wanted[index::count]
        later = ImageTiles(views, of, tiling, Order(True, seed, index, count, start))
        assert [(tile.number, tile.position) for tile in later] == [(tile.number, tile.position) for tile in shard][start:]
        for tile in shard:
            found[tile.number] += 1
    assert found == [1] * total


@settings(deadline=None)
@given(many=many(), data=st.data(), shuffle=st.booleans(), start=st.integers(0, 6))
def test_spans_are_parts_of_the_order(
    many: tuple[list[Selection], np.ndarray], data: st.DataObject, shuffle: bool, start: int
) -> None:
    views, of = many
    tiling = Tiling.tiles((3, 2))
    whole = [tile.number for tile in ImageTiles(views, of, tiling, Order(shuffle, 5))]
    spans = []
    for _ in range(data.draw(st.integers(1, 3))):
        first = data.draw(st.integers(0, len(whole) - 1))
        stride = data.draw(st.integers(1, 4))
        spans.append((first, data.draw(st.integers(0, (len(whole) - 1 - first) // stride + 1)), stride))
    wanted = [whole[first + place * stride] for first, count, stride in spans for place in range(count)]
    tiles = ImageTiles(views, of, tiling, Order(shuffle, 5, start=start, spans=tuple(spans)))
    assert [tile.number for tile in tiles] == tiles.numbers(0, len(wanted)).tolist() == wanted[start:]
    assert [tile.position for tile in tiles] == list(range(start, max(start, len(wanted))))


def test_spans_that_are_none() -> None:
    with pytest.raises(InvalidArgument, match="spans or a shard"):
        Order(shard_count=2, spans=((0, 1, 1),))
    for span in ((-1, 1, 1), (0, -1, 1), (0, 1, 0)):
        with pytest.raises(InvalidArgument, match="a span is"):
            Order(spans=(span,))
    with pytest.raises(InvalidArgument, match="leads to position 4 of an order of 4 tiles"):
        TileSequence(view((1, 1, 1, 4, 4)), Tiling.tiles((2, 2)), Order(spans=((0, 2, 4),)))


@settings(deadline=None)
@given(many=many(), data=st.data())
def test_windows_in_listed_order(many: tuple[list[Selection], np.ndarray], data: st.DataObject) -> None:
    views, of = many
    count = data.draw(st.integers(1, 12))
    images = [data.draw(st.integers(0, len(of) - 1)) for _ in range(count)]
    origins = []
    for image in images:
        shown = views[of[image]]
        origins.append((shown.y + data.draw(st.integers(0, shown.h - 1)), shown.x + data.draw(st.integers(0, shown.w - 1))))
    tiling = Tiling.windows(origins, (4, 3), "pad", images=images)
    tiles = ImageTiles(views, of, tiling)
    assert [tile.image for tile in tiles] == tiles.images(np.arange(count)).tolist() == images
    table = tiles.table(np.arange(count))
    for number, tile in enumerate(tiles):
        own = TileSequence(views[of[images[number]]], Tiling.windows([origins[number]], (4, 3), "pad"))
        assert place(tile) == place(own.tile(0))
        assert table[number].tolist() == own.table(np.array([0]))[0].tolist()


def test_windows_of_images_whose_t_and_z_differ() -> None:
    views = [Selection(range(4), range(2, 8, 2), range(1), 0, 0, 9, 9), Selection((1, 3), range(5), range(1), 2, 1, 6, 7)]
    images, origins = [1, 0, 1, 0], [(1, 3, 1, 2), (2, 4, 6, 6), (3, 0, 5, 5), (0, 2, 0, 0)]
    tiles = ImageTiles(views, np.array([0, 1]), Tiling.windows(origins, (2, 3, 3), images=images))
    table = tiles.table(np.arange(4)[::-1])[::-1]
    for number, tile in enumerate(tiles):
        own = TileSequence(views[images[number]], Tiling.windows([origins[number]], (2, 3, 3)))
        assert place(tile) == place(own.tile(0))
        assert table[number].tolist() == own.table(np.array([0]))[0].tolist()
    origins[3] = (0, 3, 0, 0)
    with pytest.raises(InvalidSelection, match=r"window 3 at \(t=0, z=3, y=0, x=0\) .* z 2, 4, 6"):
        ImageTiles(views, np.array([0, 1]), Tiling.windows(origins, (2, 3, 3), images=images))


def test_views_of_a_table_of_images_of_all_sizes_are_those_of_each() -> None:
    random = np.random.default_rng(5)
    extents = random.integers(2, 6, (60, 5))
    dtypes = [str(random.choice(["uint8", "int16"])) for _ in extents]
    for arguments in (
        {},
        {"z": slice(1, 4), "c": [1, 0]},
        {"t": -1, "z": 0},
        {"roi": (0, 1, 2, 1)},
        {"layout": "HWC", "t": 0, "z": 1},
    ):
        plan = Plan.of({"dtype": "float32"} | arguments)
        views, of = resolve_views(plan, extents, dtypes, "image {}".format)
        assert len({(tuple(extent), name) for extent, name in zip(extents.tolist(), dtypes, strict=True)}) == len(views)
        for extent, name, number in zip(extents.tolist(), dtypes, of.tolist(), strict=True):
            own = plan.resolve(Extent(*extent), np.dtype(name))
            assert (views[number].selection, views[number].dtype) == (own.selection, own.dtype)


def test_numbers_that_do_not_fit() -> None:
    views, of = [view((1, 1, 1, 9, 9)), view((1, 1, 1, 3, 3))], np.array([0, 1])
    for edge in ("clip", "drop"):
        tiles = ImageTiles(views, of, Tiling.tiles((2**64 - 1, 2**63), edge))  # type: ignore[arg-type]
        assert [tile.shape for tile in tiles] == ([(1, 1, 1, 9, 9), (1, 1, 1, 3, 3)] if edge == "clip" else [])
    huge = Selection(range(2**31), range(1), range(1), 0, 0, 2**31 - 1, 2**31 - 1)
    with pytest.raises(LimitExceeded, match=r"about 1.98e\+28 tiles"):
        ImageTiles([huge], np.array([0, 0]), Tiling.tiles_3d((1, 1, 1)))


def test_a_window_that_does_not_fit_is_named_by_its_number_in_the_list() -> None:
    views, of = [view((1, 1, 1, 9, 9)), view((1, 1, 1, 3, 3))], np.array([0, 1, 0])
    good = [(2, 1), (2, 1), (2, 1)]
    ImageTiles(views, of, Tiling.windows(good, (3, 3), images=[0, 1, 2]))
    with pytest.raises(InvalidSelection, match="window 1 at"):
        ImageTiles(views, of, Tiling.windows([(2, 1), (3, 1), (2, 1)], (3, 3), images=[0, 1, 2]))
    with pytest.raises(InvalidSelection, match="window 2 is of image 3, and there are 3"):
        ImageTiles(views, of, Tiling.windows(good, (3, 3), images=[0, 1, 3]))
    for images in ([0, 1], [0.5, 1, 2], [-1, 0, 1], "abc"):
        with pytest.raises(InvalidSelection, match="images"):
            Tiling.windows(good, (3, 3), images=images)


@given(length=st.integers(1, 20), size=st.integers(1, 25), first=st.integers(0, 5))
def test_a_centred_window(length: int, size: int, first: int) -> None:
    """Against what NumPy makes of it."""
    line = np.arange(100, 100 + length)
    start = (length - size) // 2
    padded = np.pad(line, (max(0, -start), max(0, start + size - length)))
    wanted = padded[max(0, start) : max(0, start) + size]
    shown = Selection(range(1), range(1), range(1), first, 0, length, 1)
    (tile,) = TileSequence(shown, Tiling.centred((1, size), "pad"))
    row = np.zeros(size, int)
    s = tile.selection
    row[tile.inset[2] : tile.inset[2] + s.w] = line[s.x - first : s.x - first + s.w]
    np.testing.assert_array_equal(row, wanted)
    assert tile.origin[3] == first + start
    (clipped,) = TileSequence(shown, Tiling.centred((1, size), "clip"))
    assert clipped.shape == clipped.selection.shape == (1, 1, 1, 1, min(size, length))
    assert len(TileSequence(shown, Tiling.centred((1, size), "drop"))) == (size <= length)


def test_centred_windows_that_are_none() -> None:
    for size in ((0, 1), (1,), "ab", (1.5, 2), (2**31, 1)):
        with pytest.raises(InvalidArgument, match="centred"):
            Tiling.centred(size)


def test_one_image_is_what_it_is_alone() -> None:
    """Time batches of one image are shuffled as upstream does: its time points."""
    shown = view((5, 1, 1, 4, 4))
    tiles = tiles_of([shown], np.array([0]), Tiling.time_batches(2), Order(True, 3))
    assert isinstance(tiles, TileSequence)
    assert tiles.tile(0).selection.t == TileSequence(shown, Tiling.time_batches(2), Order(True, 3)).tile(0).selection.t
    assert isinstance(tiles_of([shown], np.array([0]), Tiling.windows([(2, 1)], (2, 2), images=[0])), TileSequence)


def test_one_view_for_images_that_are_alike() -> None:
    extents = np.array([[1, 1, 2, 5, 6], [1, 1, 2, 7, 6], [1, 1, 2, 5, 6]])
    views, of = resolve_views(Plan.of({"c": 1}), extents, ["uint8"] * 3, "image {}".format)
    assert of.tolist() == [0, 1, 0]
    assert [one.shown.shape for one in views] == [(1, 1, 1, 5, 6), (1, 1, 1, 7, 6)]
    with pytest.raises(InvalidArgument, match="image 1 is int8, and image 0 uint8"):
        resolve_views(Plan(), extents, ["uint8", "int8", "uint8"], "image {}".format)
    views, _ = resolve_views(Plan.of({"dtype": "float32"}), extents, ["uint8", "int8", "uint8"], "image {}".format)
    assert {one.dtype for one in views} == {np.dtype(np.float32)}
    with pytest.raises(InvalidSelection, match="image 1: roi is out of bounds"):
        resolve_views(Plan.of({"roi": (0, 0, 6, 6)}), extents[[1, 0]], ["uint8"] * 2, "image {}".format)
