"""Tilings, against the obvious implementation: a list of all tiles, then a slice of it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ome_tensor.errors import InvalidArgument
from ome_tensor.selection import Selection, compact
from ome_tensor.tiling import MAX_SEED, Order, TileSequence, Tiling, check_seed

sizes = st.integers(1, 9)


def axis(most: int) -> st.SearchStrategy[Any]:
    """Chosen positions: ranges, lists with repetitions, none at all."""
    return st.lists(st.integers(0, 20), max_size=most).map(compact)


selections = st.builds(
    Selection,
    t=axis(5),
    z=axis(5),
    c=axis(2),
    x=st.integers(0, 5),
    y=st.integers(0, 5),
    w=st.integers(1, 20),
    h=st.integers(1, 20),
)
tilings = st.one_of(
    st.just(Tiling()),
    st.builds(Tiling.time_batches, sizes, st.sampled_from(["clip", "drop"])),
    st.builds(Tiling.tiles, st.tuples(sizes, sizes), st.sampled_from(["clip", "pad", "drop"])),
    st.builds(Tiling.tiles_3d, st.tuples(sizes, sizes, sizes), st.sampled_from(["clip", "pad", "drop"])),
)
seeds = st.integers(0, MAX_SEED)


def runs(values: Sequence[int], size: int) -> list[Sequence[int]]:
    """Cut into runs; the last may be shorter."""
    return [values[at : at + size] for at in range(0, len(values), size)]


Block = tuple[list[int], list[int], tuple[int, int, int, int]]


def naive(s: Selection, tiling: Tiling, t: Sequence[int]) -> list[tuple[Block, tuple[int, ...]]]:
    """All tiles in a list: (t, z, roi) and the full size (t, z, h, w) that each should have."""
    ys, xs = range(s.y, s.y + s.h), range(s.x, s.x + s.w)
    whole = tiling.kind in ("whole", "time_batches")
    t_runs = {"time_batches": lambda: runs(t, tiling.t), "tiles_3d": lambda: runs(t, 1)}.get(tiling.kind, lambda: [t])()
    z_runs = runs(s.z, tiling.z) if tiling.kind == "tiles_3d" else [s.z]
    y_runs = [ys] if whole else runs(ys, tiling.h)
    x_runs = [xs] if whole else runs(xs, tiling.w)
    full = {
        "whole": lambda: (len(t), len(s.z), s.h, s.w),
        "time_batches": lambda: (tiling.t, len(s.z), s.h, s.w),
        "tiles": lambda: (len(t), len(s.z), tiling.h, tiling.w),
        "tiles_3d": lambda: (1, tiling.z, tiling.h, tiling.w),
    }[tiling.kind]()
    tiles = []
    for rt in t_runs:
        for rz in z_runs:
            for ry in y_runs:
                for rx in x_runs:
                    size = (len(rt), len(rz), len(ry), len(rx))
                    if tiling.edge == "drop" and size != full:
                        continue
                    tiles.append(((list(rt), list(rz), (rx[0], ry[0], len(rx), len(ry))), full if tiling.edge == "pad" else size))
    return tiles


def as_block(s: Selection) -> Block:
    """The same of a tile's selection."""
    return list(s.t), list(s.z), s.roi


# One full tile and a rest that is dropped, along each axis: the tile must not take the rest with it.
FOUR = Selection(range(4), range(4), range(1), 0, 0, 4, 4)


@example(s=FOUR, tiling=Tiling.time_batches(3, "drop"))
@example(s=FOUR, tiling=Tiling.tiles_3d((3, 3, 3), "drop"))
@example(s=FOUR, tiling=Tiling.tiles((3, 3), "drop"))
@given(s=selections, tiling=tilings)
def test_row_major(s: Selection, tiling: Tiling) -> None:
    """Every tile once, in order, with its size and number; all channels in each."""
    tiles = TileSequence(s, tiling)
    wanted = naive(s, tiling, s.t)
    assert [as_block(tile.selection) for tile in tiles] == [block for block, _ in wanted]
    assert [(tile.shape[0], tile.shape[1], *tile.shape[3:]) for tile in tiles] == [size for _, size in wanted]
    assert {tile.shape[2] for tile in tiles} <= {len(s.c)}
    assert all(tile.selection.c == s.c for tile in tiles)
    assert [(tile.position, tile.number) for tile in tiles] == [(i, i) for i in range(len(wanted))]
    assert len(tiles) == tiles.total == len(wanted)
    assert [tile.is_padded for tile in tiles] == [tile.shape != tile.selection.shape for tile in tiles]
    shapes = {tile.shape for tile in tiles}
    if len(shapes) > 1:
        assert not tiles.uniform
    if shapes:
        assert tiles.shape == tuple(max(shape[axis] for shape in shapes) for axis in range(5))
        assert tiles.tile(0).shape == tiles.shape


@given(s=selections, tiling=tilings)
def test_uniform_means_one_shape(s: Selection, tiling: Tiling) -> None:
    """What decides the form on the wire: never claimed wrongly, and claimed whenever it is so for tiles."""
    tiles = TileSequence(s, tiling)
    shapes = {tile.shape for tile in tiles}
    assert not tiles.uniform or len(shapes) <= 1
    if len(tiles) > 1 and len(shapes) == 1:
        assert tiles.uniform


@given(s=selections, tiling=tilings, seed=seeds)
def test_shuffled_as_a_list_is(s: Selection, tiling: Tiling, seed: int) -> None:
    """``random.Random(seed).shuffle`` on the tiles; on the time points for batches, which are cut afterwards."""
    tiles = TileSequence(s, tiling, Order(shuffle=True, seed=seed))
    t = list(s.t)
    if tiling.kind == "time_batches":
        random.Random(seed).shuffle(t)
        wanted = list(enumerate(naive(s, tiling, t)))
    else:
        wanted = list(enumerate(naive(s, tiling, t)))
        random.Random(seed).shuffle(wanted)
    assert [(tile.number, as_block(tile.selection)) for tile in tiles] == [(number, block) for number, (block, _) in wanted]
    assert [tile.position for tile in tiles] == list(range(len(wanted)))
    for tile in tiles:
        # A tile found by its number is the tile that was met in the order.
        assert tiles.tile(tile.number, tile.position) == tile


@given(s=selections, tiling=tilings, shuffle=st.booleans(), seed=seeds, count=st.integers(1, 9))
def test_shards_are_a_partition(s: Selection, tiling: Tiling, shuffle: bool, seed: int, count: int) -> None:
    """Every tile in exactly one shard; sizes differ by one at most; interleaved they are the order."""
    whole = [tile.number for tile in TileSequence(s, tiling, Order(shuffle, seed))]
    shards = [[tile.number for tile in TileSequence(s, tiling, Order(shuffle, seed, index, count))] for index in range(count)]
    assert sorted(itertools.chain.from_iterable(shards)) == sorted(whole)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert [whole[index::count] for index in range(count)] == shards


@given(s=selections, tiling=tilings, seed=seeds, shard=st.integers(0, 2), start=st.integers(0, 30))
def test_start_skips(s: Selection, tiling: Tiling, seed: int, shard: int, start: int) -> None:
    """What a resumed read gets is what was left; positions go on counting."""
    whole = list(TileSequence(s, tiling, Order(True, seed, shard, 3)))
    rest = TileSequence(s, tiling, Order(True, seed, shard, 3, start))
    assert list(rest) == whole[start:]
    assert len(rest) == len(whole[start:])


def test_a_huge_tiling_costs_nothing() -> None:
    """Tiles are computed on demand: ten billion of them are as cheap as ten."""
    tiles = TileSequence(Selection(range(100), range(100), range(3), 0, 0, 100_000, 100_000), Tiling.tiles_3d((1, 100, 100)))
    assert tiles.total == 10_000 * 1_000_000
    last = tiles[len(tiles) - 1]
    assert as_block(last.selection) == ([99], [99], (99_900, 99_900, 100, 100))


@pytest.mark.parametrize("index", [-1, 12, 100])
def test_positions_outside(index: int) -> None:
    """As of a range; negatives do not count from the end here."""
    with pytest.raises(IndexError):
        TileSequence(Selection(range(1), range(1), range(1), 0, 0, 4, 3), Tiling.tiles((1, 1)))[index]


@pytest.mark.parametrize(
    "make,field",
    [
        (lambda: Tiling.tiles((0, 4)), "tile_size"),
        (lambda: Tiling.tiles((4, -1)), "tile_size"),
        (lambda: Tiling.tiles((4,)), "tile_size"),
        (lambda: Tiling.tiles((4, 4, 4)), "tile_size"),
        (lambda: Tiling.tiles("44"), "tile_size"),
        (lambda: Tiling.tiles((4.0, 4)), "tile_size"),
        (lambda: Tiling.tiles((True, 4)), "tile_size"),
        (lambda: Tiling.tiles(4), "tile_size"),
        (lambda: Tiling.tiles_3d((4, 4)), "tile_size"),
        (lambda: Tiling.time_batches(0), "batch_size"),
        (lambda: Tiling.time_batches(1.5), "batch_size"),
        (lambda: Tiling.time_batches(2, "pad"), "edge"),
        (lambda: Tiling.tiles((4, 4), "wrap"), "edge"),  # type: ignore[arg-type]
        (lambda: Order(shard_count=0), "shard_count"),
        (lambda: Order(shard_index=2, shard_count=2), "shard_index"),
        (lambda: Order(shard_index=-1), "shard_index"),
        (lambda: Order(start=-1), "start"),
        (lambda: check_seed(1.0), "seed"),
        (lambda: check_seed(True), "seed"),
        (lambda: check_seed(MAX_SEED + 1), "seed"),
    ],
)
def test_what_is_refused(make: Any, field: str) -> None:
    """Naming the argument."""
    with pytest.raises(InvalidArgument) as caught:
        make()
    assert caught.value.field == field


@given(st.integers(-MAX_SEED, MAX_SEED))
def test_negative_seeds_are_pythons(seed: int) -> None:
    """``random.Random`` takes a negative seed for its absolute value."""
    checked = check_seed(seed)
    assert checked is not None
    assert 0 <= checked <= MAX_SEED
    assert random.Random(seed).random() == random.Random(checked).random()
