"""Windows and batches on a record in this process, against plain NumPy."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.integration.images import random_pixels, record_of

from ome_tensor import BatchArray, InvalidArgument, InvalidSelection, LazyTensorView, TensorView
from ome_tensor.errors import OmeTensorError
from ome_tensor.selection import Selection, compact
from ome_tensor.tiling import Order, TileSequence, Tiling
from ome_tensor.windows import Origins

PIXELS = random_pixels((3, 5, 2, 20, 24))
RECORD = record_of(PIXELS)
VIEW = TensorView(RECORD)


def joined(batches: Any) -> np.ndarray:
    """All batches as one array."""
    return np.concatenate([batch.array for batch in batches])


# --- windows against NumPy -------------------------------------------------------------------------------------------------------


@given(
    h=st.integers(1, 20),
    w=st.integers(1, 24),
    places=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=12),
    batch=st.integers(1, 5),
)
def test_planar_windows(h: int, w: int, places: list[tuple[float, float]], batch: int) -> None:
    """Rows and columns: all selected t, z and c; in listed order, repeated ones too."""
    origins = [(int(a * (20 - h)), int(b * (24 - w))) for a, b in places]
    batches = list(VIEW.iter_windows(origins, (h, w), batch))
    assert [len(found) for found in batches] == [min(batch, len(origins) - at) for at in range(0, len(origins), batch)]
    for number, (y, x) in enumerate(origins):
        found = batches[number // batch]
        row = number % batch
        np.testing.assert_array_equal(found.array[row], PIXELS[..., y : y + h, x : x + w], strict=True)
        assert found.numbers[row] == found.position + row == number
        assert found.origins[row].tolist() == [0, 0, y, x]
        assert found.valid[row].tolist() == [5, h, w]


def padded(t: int, z: int, y: int, x: int, size: tuple[int, int, int, int], selection: Selection, fill: int) -> np.ndarray:
    """What a padded window must show, the slow way: element by element of the selected planes."""
    nt, nz, h, w = size
    out = np.full((nt, nz, len(selection.c), h, w), fill, PIXELS.dtype)
    zs = list(selection.z)
    step = zs[1] - zs[0] if len(zs) > 1 else 1
    first = zs.index(z) if z in zs else (z - zs[0]) // step
    at = list(selection.t).index(t)
    for it, iz, iy, ix in itertools.product(range(nt), range(nz), range(h), range(w)):
        row, column, plane = y + iy, x + ix, first + iz
        inside = selection.y <= row < selection.y + selection.h and selection.x <= column < selection.x + selection.w
        if inside and 0 <= plane < len(zs):
            out[it, iz, :, iy, ix] = [PIXELS[list(selection.t)[at + it], zs[plane], c, row, column] for c in selection.c]
    return out


@given(data=st.data())
def test_padded_windows_of_a_part(data: st.DataObject) -> None:
    """Origins of four numbers, in image coordinates, on a view of a part of the image; sticking out on any side of y, x and z."""
    t = data.draw(st.sampled_from([slice(None), [2, 0], 1]))
    z = data.draw(st.sampled_from([slice(None), slice(None, None, 2), slice(3, 0, -1), [4, 1, 2], 3]))
    view = TensorView(RECORD, t=t, z=z, c=data.draw(st.sampled_from([0, [1, 0]])), roi=(3, 2, 15, 12), layout="TZCYX")
    s = view.resolved.selection
    nt, nz = data.draw(st.integers(1, len(s.t))), data.draw(st.integers(1, 4))
    h, w = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    zs = list(s.z)
    before = [zs[0] - k * s.z.step for k in range(1, nz)] if isinstance(s.z, range) else []
    origin = st.tuples(
        st.sampled_from(list(s.t)[: len(s.t) - nt + 1]),
        st.sampled_from(zs + before),
        st.integers(s.y - h + 1, s.y + s.h - 1),
        st.integers(s.x - w + 1, s.x + s.w - 1),
    )
    origins = data.draw(st.lists(origin, min_size=1, max_size=5))
    [batch] = view.iter_windows(np.array(origins), (nt, nz, h, w), 9, edge="pad", pad=7)
    assert batch.origins.tolist() == [list(place) for place in origins]
    for row, place in enumerate(origins):
        np.testing.assert_array_equal(batch.array[row], padded(*place, (nt, nz, h, w), s, 7), strict=True)
    # And what is known of them says where the pixels are.
    for (_, _, y, x), (_, valid_h, valid_w) in zip(batch.origins.tolist(), batch.valid.tolist(), strict=True):
        assert valid_h == min(y + h, s.y + s.h) - max(y, s.y)
        assert valid_w == min(x + w, s.x + s.w) - max(x, s.x)


@given(
    count=st.integers(0, 40),
    seed=st.integers(0, 2**64 - 1),
    shards=st.integers(1, 4),
    start=st.integers(0, 10),
    shuffle=st.booleans(),
)
def test_windows_are_ordered_as_a_list_is(count: int, seed: int, shards: int, start: int, shuffle: bool) -> None:
    """Shuffled as ``random.Random(seed).shuffle`` does it, sharded, skipped."""
    origins = np.stack([np.arange(count) % 20, np.arange(count) % 24], axis=1)
    wanted = list(range(count))
    if shuffle:
        random.Random(seed).shuffle(wanted)
    for index in range(shards):
        batches = list(VIEW.iter_windows(origins, (1, 1), 4, shuffle=shuffle, seed=seed, shard=(index, shards), start=start))
        numbers = [number for batch in batches for number in batch.numbers.tolist()]
        assert numbers == wanted[index::shards][start:]
        assert [batch.position for batch in batches] == list(range(start, start + len(numbers), 4))
        assert [place for batch in batches for place in batch.origins[:, 2:].tolist()] == origins[numbers].tolist()


# --- the sequence's columns ------------------------------------------------------------------------------------------------------

axes = st.lists(st.integers(0, 20), max_size=5).map(compact)
selections = st.builds(
    Selection, t=axes, z=axes, c=axes, x=st.integers(0, 5), y=st.integers(0, 5), w=st.integers(1, 20), h=st.integers(1, 20)
)
sizes = st.integers(1, 9)
tilings = st.one_of(
    st.just(Tiling()),
    st.builds(Tiling.time_batches, sizes, st.sampled_from(["clip", "drop"])),
    st.builds(Tiling.tiles, st.tuples(sizes, sizes), st.sampled_from(["clip", "pad", "drop"])),
    st.builds(Tiling.tiles_3d, st.tuples(sizes, sizes, sizes), st.sampled_from(["clip", "pad", "drop"])),
    st.builds(Tiling.windows, st.just([(5, 5), (5, 6), (-1, 5)]), st.just((7, 9)), st.just("pad")),
)


@given(
    s=selections, tiling=tilings, shuffle=st.booleans(), seed=st.integers(0, 9), shard=st.integers(0, 2), start=st.integers(0, 9)
)
def test_columns_say_what_tiles_say(s: Selection, tiling: Tiling, shuffle: bool, seed: int, shard: int, start: int) -> None:
    """Numbers and places of many tiles at once are those of each."""
    try:
        tiles = TileSequence(s, tiling, Order(shuffle, seed, shard, 3, start))
    except InvalidSelection:
        return
    numbers = tiles.numbers(0, len(tiles) + 1)
    assert numbers.tolist() == [tile.number for tile in tiles]
    wanted = [(*tile.origin, len(tile.selection.z), tile.selection.h, tile.selection.w) for tile in tiles]
    assert [tuple(row) for row in tiles.table(numbers).tolist()] == wanted
    assert tiles.numbers(1, 2).tolist() == numbers[1:3].tolist()


# --- batches ---------------------------------------------------------------------------------------------------------------------


@given(
    size=st.one_of(st.tuples(sizes, sizes), st.tuples(sizes, sizes, sizes)),
    batch=st.integers(1, 7),
    edge=st.sampled_from(["drop", "pad"]),
    layout=st.sampled_from([None, "XYCZT", "CTZYX", "ZTYXC"]),
    contiguous=st.booleans(),
    shuffle=st.booleans(),
    shard=st.integers(0, 1),
    start=st.integers(0, 5),
    drop_last=st.booleans(),
    prefetch=st.integers(0, 2),
)
def test_batches_are_tiles(
    size: Any, batch: int, layout: str | None, contiguous: bool, drop_last: bool, **arguments: Any
) -> None:
    """What ``iter_tiles`` gives one by one, in runs, with the same numbers and places."""
    arguments |= {"shard": (arguments["shard"], 2), "seed": 5, "pad": 3}
    view = TensorView(RECORD, z=slice(None, None, -1), roi=(1, 2, 22, 17), layout=layout)
    tiles = list(view.iter_tiles(tile_size=size, contiguous=contiguous, **arguments))
    batches = list(view.iter_batches(tile_size=size, batch_size=batch, contiguous=contiguous, drop_last=drop_last, **arguments))
    whole = len(tiles) // batch * batch
    wanted = [tiles[at : at + batch] for at in range(0, whole if drop_last else len(tiles), batch)]
    assert [len(found) for found in batches] == [len(run) for run in wanted]
    for found, run in zip(batches, wanted, strict=True):
        np.testing.assert_array_equal(found.array, np.stack([tile.array for tile in run]), strict=True)
        assert found.numbers.tolist() == [tile.number for tile in run]
        assert found.position == run[0].position
        assert found.origins.tolist() == [list(tile.origin) for tile in run]
        assert found.valid.tolist() == [list(tile.valid) for tile in run]
        assert found.array.flags.writeable
        assert found.array.flags.c_contiguous or not contiguous


def test_a_batch_is_a_dlpack_producer() -> None:
    """The tensor shares its memory, which nobody else has."""
    first, second = itertools.islice(VIEW.iter_batches(tile_size=(5, 6), batch_size=2), 2)
    torch = pytest.importorskip("torch")
    tensor = torch.from_dlpack(first)
    assert tuple(tensor.shape) == first.shape == (2, 3, 5, 2, 5, 6)
    assert tuple(first.__dlpack_device__()) == (1, 0)
    kept = second.array.copy()
    tensor.zero_()
    first.to_torch().view(torch.int16).add_(1)
    assert (first.array == 1).all()
    np.testing.assert_array_equal(second.array, kept)
    np.testing.assert_array_equal(VIEW.to_numpy(), PIXELS)
    assert np.from_dlpack(first).shape == first.shape


def test_lazy_and_collected_views_have_batches_too() -> None:
    """Before and after they are collected."""
    lazy = LazyTensorView(loader=lambda: RECORD, layout="TZCYX")
    wanted = joined(VIEW.iter_windows([(1, 2), (3, 4)], (5, 6), 2))
    np.testing.assert_array_equal(joined(lazy.iter_windows([(1, 2), (3, 4)], (5, 6), 2)), wanted)
    lazy.collect()
    np.testing.assert_array_equal(joined(lazy.iter_windows([(1, 2), (3, 4)], (5, 6), 2)), wanted)


def test_nothing_gives_no_batches() -> None:
    """No windows, no tiles that fit, nothing selected."""
    assert list(VIEW.iter_windows([], (5, 5), 2)) == []
    assert list(VIEW.iter_windows(np.empty((0, 4), np.int32), (2, 5, 5), 2)) == []
    assert list(VIEW.iter_batches(tile_size=(100, 100), batch_size=2)) == []
    empty = TensorView(RECORD, c=[], layout="TZCYX")
    assert [batch.shape for batch in empty.iter_windows([(0, 0)] * 3, (5, 5), 2)] == [(2, 3, 5, 0, 5, 5), (1, 3, 5, 0, 5, 5)]


def test_many_windows_cost_milliseconds() -> None:
    """Checked, placed and numbered as arrays: a hundred thousand are not a hundred thousand objects."""
    origins = np.random.default_rng(0).integers(0, 10, (100_000, 2))
    began = time.perf_counter()
    batches = VIEW.iter_windows(origins, (4, 4), 16, shuffle=True, seed=1, shard=(3, 1000))
    assert len(next(batches)) == 16
    # Measured: some 70 ms, nearly all of it Python's shuffle; the bound leaves room for a busy machine.
    assert time.perf_counter() - began < 2


# --- what is refused -------------------------------------------------------------------------------------------------------------

WINDOWS = [(0, 0), (1, 1)]
REFUSED: dict[str, tuple[Any, type[OmeTensorError], str, str]] = {
    "outside below": (
        lambda v: v.iter_windows([(0, 0), (16, 3)], (5, 5), 2),
        InvalidSelection,
        "window 1 at (y=16, x=3) of size 5 x 5 does not lie inside the view (y 0 to 19, x 0 to 23)",
        "origins",
    ),
    "outside left": (lambda v: v.iter_windows([(0, -1)], (5, 5), 2), InvalidSelection, "window 0 at (y=0, x=-1)", "origins"),
    "too large": (lambda v: v.iter_windows([(0, 0)], (21, 5), 2), InvalidSelection, "window 0", "origins"),
    "t outside": (lambda v: v.iter_windows([(3, 0, 0, 0)], (5, 5), 2), InvalidSelection, "window 0 at (t=3, z=0", "origins"),
    "z outside": (
        lambda v: v.iter_windows([(0, 4, 0, 0)], (2, 5, 5), 2),
        InvalidSelection,
        "of size 1 x 2 x 5 x 5 does not lie inside the view (t 0 to 2, z 0 to 4,",
        "origins",
    ),
    "t outside, padded": (
        lambda v: v.iter_windows([(2, 0, 0, 0)], (2, 1, 5, 5), 2, edge="pad"),
        InvalidSelection,
        "window 0 at (t=2",
        "origins",
    ),
    "nothing inside": (
        lambda v: v.iter_windows([(-5, 0)], (5, 5), 2, edge="pad"),
        InvalidSelection,
        "window 0 at (y=-5, x=0) of size 5 x 5 shows no pixel of",
        "origins",
    ),
    "far away": (lambda v: v.iter_windows([(0, 2**63 - 1)], (5, 5), 2, edge="pad"), InvalidSelection, "window 0", "origins"),
    "huge": (lambda v: v.iter_windows([(0, 2**64)], (5, 5), 2), InvalidSelection, "origins must be integers", "origins"),
    "floats": (lambda v: v.iter_windows([(0.0, 1.0)], (5, 5), 2), InvalidSelection, "origins must be integers", "origins"),
    "booleans": (lambda v: v.iter_windows([(True, False)], (5, 5), 2), InvalidSelection, "origins must be integers", "origins"),
    "three columns": (lambda v: v.iter_windows([(0, 1, 2)], (5, 5), 2), InvalidSelection, "(N, 2): y, x", "origins"),
    "one row": (lambda v: v.iter_windows((0, 1), (5, 5), 2), InvalidSelection, "(N, 2): y, x", "origins"),
    "ragged": (lambda v: v.iter_windows([(0, 1), (2,)], (5, 5), 2), InvalidSelection, "origins must be integers", "origins"),
    "text": (lambda v: v.iter_windows("ab", (5, 5), 2), InvalidSelection, "origins must be integers", "origins"),
    "size": (lambda v: v.iter_windows(WINDOWS, 5, 2), InvalidArgument, "size must be (h, w)", "size"),
    "depth without z": (lambda v: v.iter_windows(WINDOWS, (2, 5, 5), 2), InvalidArgument, "size must be (h, w)", "size"),
    "size 0": (lambda v: v.iter_windows(WINDOWS, (0, 5), 2), InvalidArgument, "positive", "size"),
    "size 2**31": (lambda v: v.iter_windows(WINDOWS, (2**31, 5), 2, edge="pad"), InvalidArgument, "2**31", "size"),
    "edge of windows": (lambda v: v.iter_windows(WINDOWS, (5, 5), 2, edge="drop"), InvalidArgument, "edge", "edge"),
    "edge of batches": (
        lambda v: v.iter_batches(tile_size=(5, 5), batch_size=2, edge="clip"),
        InvalidArgument,
        "edge must be drop or pad, not 'clip'",
        "edge",
    ),
    "batch size": (lambda v: v.iter_windows(WINDOWS, (5, 5), 0), InvalidArgument, "batch_size must be > 0", "batch_size"),
    "pad": (
        lambda v: v.iter_windows(WINDOWS, (5, 5), 2, edge="pad", pad=-1),
        InvalidArgument,
        "pad -1 does not fit in uint16",
        "pad",
    ),
    "shard": (lambda v: v.iter_windows(WINDOWS, (5, 5), 2, shard=(2, 2)), InvalidArgument, "shard_index 2", "shard_index"),
    "prefetch": (lambda v: v.iter_windows(WINDOWS, (5, 5), 2, prefetch=-1), InvalidArgument, "prefetch must be >= 0", "prefetch"),
    "device": (lambda v: v.iter_windows(WINDOWS, (5, 5), 2, device="tpu"), InvalidArgument, "Unsupported device", "device"),
    "tile size": (lambda v: v.iter_batches(tile_size=5, batch_size=2), InvalidArgument, "tile_size must be", "tile_size"),
}


@pytest.mark.parametrize("use,error,words,field", REFUSED.values(), ids=REFUSED)
def test_refusals_come_at_the_call(use: Any, error: type[OmeTensorError], words: str, field: str) -> None:
    """Not at the first batch; naming the window, its origin, or the argument."""
    with pytest.raises(error) as caught:
        use(VIEW)
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert caught.value.field == field


def test_a_layout_must_fit_what_is_delivered() -> None:
    """A window of several z cannot be shown without Z, also where padding makes them several."""
    view = TensorView(RECORD, t=0, z=0, layout="CYX")
    assert next(view.iter_windows([(0, 0, 1, 1)], (5, 5), 2)).shape == (1, 2, 5, 5)
    with pytest.raises(InvalidArgument, match="drops non-singleton dimension 'Z' of size 2"):
        view.iter_windows([(0, 0, 1, 1)], (2, 5, 5), 2, edge="pad")
    with pytest.raises(InvalidArgument, match="drops non-singleton dimension 'Z' of size 2"):
        view.iter_batches(tile_size=(2, 5, 5), batch_size=2, edge="pad")


def test_origins_are_their_own() -> None:
    """What the caller does with the list afterwards changes nothing."""
    given_list = np.array([(1, 2), (3, 4)])
    origins = Origins.of(given_list)
    given_list[:] = 0
    assert origins.array.tolist() == [[1, 2], [3, 4]]
    assert not origins.array.flags.writeable
    assert origins == Origins.of([(1, 2), (3, 4)])
    assert hash(origins) == hash(Origins.of([(1, 2), (3, 4)]))
    assert origins != Origins.of([(1, 2)])
    assert isinstance(next(VIEW.iter_windows(np.array([[1, 2]], np.uint64), (2, 2), 1)), BatchArray)
