"""One read over several connections: the same tiles in the same order, whatever becomes of one of them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.integration.images import record_of
from tests.integration.processes import ServerProcess, wait_until
from tests.integration.proxy import Proxy

from ome_tensor import InvalidRecord, TensorView
from ome_tensor.selection import Selection
from ome_tensor.tiling import Order, TileSequence, Tiling
from ome_tensor_client import connect
from ome_tensor_client.dealt import deal
from ome_tensor_server.testing import RunningServer, running_server


@given(total=st.integers(1, 60), shards=st.integers(1, 5), data=st.data(), count=st.integers(1, 7), shuffle=st.booleans())
def test_what_is_dealt_is_all_there_is(total: int, shards: int, data: st.DataObject, count: int, shuffle: bool) -> None:
    """Taken back in turn, the parts are the read: every number, once and in order."""
    shard = data.draw(st.integers(0, shards - 1))
    start = data.draw(st.integers(0, total))
    selection = Selection(range(1), range(1), range(1), 0, 0, total, 1)
    order = Order(shuffle, 5 if shuffle else None, shard, shards, start)
    whole = [tile.number for tile in TileSequence(selection, Tiling.tiles((1, 1)), order)]
    parts = deal(order, len(whole), count)
    assert len(parts) == min(count, len(whole))
    found = [[tile.number for tile in TileSequence(selection, Tiling.tiles((1, 1)), part)] for part, _ in parts]
    assert [len(numbers) for numbers in found] == [expected for _, expected in parts]
    assert [found[i % count][i // count] for i in range(len(whole))] == whole


def same(found: list[Any], wanted: list[Any]) -> None:
    """Equal in number, order, place and pixels."""
    assert [(tile.number, tile.position, tile.origin) for tile in found] == [
        (tile.number, tile.position, tile.origin) for tile in wanted
    ]
    for tile, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(tile.array, other.array, strict=True)


READS = {
    "in order": {"tile_size": (48, 54)},
    "padded": {"tile_size": (50, 64), "edge": "pad", "pad": 7},
    "shuffled": {"tile_size": (20, 30), "shuffle": True, "seed": 11, "prefetch": 3},
    "sharded": {"tile_size": (20, 30), "shuffle": True, "seed": 11, "shard": (1, 3), "start": 5},
    "boxes": {"tile_size": (2, 60, 60), "prefetch": 1},
    "slabs": {"tile_size": (200, 270)},
    "one tile": {"tile_size": (240, 270)},
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_tiles_are_the_same(served: RunningServer, pixels: np.ndarray, read: dict[str, Any]) -> None:
    """As over one connection; all of which are used."""
    with Proxy(served.target) as proxy, connect(proxy.target, connections=3, message_bytes=32 << 10) as client:
        found = list(client.tensor_view("image").iter_tiles(**read))
        assert proxy.connections == min(3, len(found))
    same(found, list(TensorView(record_of(pixels)).iter_tiles(**read)))


@pytest.mark.slow
@settings(max_examples=8)
@given(cuts=st.lists(st.integers(0, 300_000), min_size=3, max_size=8))
def test_each_resumes_by_itself(served: RunningServer, pixels: np.ndarray, cuts: list[int]) -> None:
    """Any of them cut anywhere."""
    read = READS["shuffled"]
    with (
        Proxy(served.target, cuts) as proxy,
        connect(proxy.target, connections=3, message_bytes=32 << 10, retry_for=20) as client,
    ):
        found = list(client.tensor_view("image").iter_tiles(**read))
    same(found, list(TensorView(record_of(pixels)).iter_tiles(**read)))


def test_a_read_that_is_dropped(served: RunningServer) -> None:
    """Leaves no thread and no read behind."""
    with connect(served.target, connections=4) as client:
        tiles = client.tensor_view("image").iter_tiles(tile_size=(8, 8))
        next(tiles)
        tiles.close()  # type: ignore[attr-defined]
        wait_until(
            lambda: not [thread for thread in threading.enumerate() if thread.name == "ome-tensor-prefetch"], "threads end"
        )
        wait_until(lambda: served.server.free_reads == served.server.settings.max_concurrent_reads, "reads end")


def test_damage_is_told_in_its_turn(tmp_path: Path) -> None:
    """Tiles before the damaged one come first, whichever connection they are on."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    record = record_of(np.arange(6 * 64, dtype=np.uint16).reshape(1, 6, 1, 8, 8))
    record["chunks"][4]["pixel_bytes"] = b"short"
    path = tmp_path / "damaged.ome.parquet"
    pq.write_table(pa.table({"image": pa.array([record])}), path)
    with running_server([path]) as server, connect(server.target, connections=3, retry_for=2) as client:
        tiles = client.tensor_view("damaged").iter_tiles(tile_size=(1, 8, 8))
        assert [next(tiles).number for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(InvalidRecord):
            next(tiles)


def test_with_workers(start_server: Any, big_path: Path, big_pixels: np.ndarray, tmp_path: Path) -> None:
    """Of two workers both send."""
    flags = ("--workers", "2", "--store", str(tmp_path / "store"))
    server: ServerProcess = start_server(big_path, *flags).wait_serving()
    with connect(server.target, connections=4, transport="tcp") as client:
        view = client.tensor_view("big", layout="TZCYX")
        seen = 0
        for tile in view.iter_tiles(tile_size=(128, 128), shuffle=True, seed=3):
            _, _, y, x = tile.origin
            np.testing.assert_array_equal(tile.array, big_pixels[..., y : y + 128, x : x + 128])
            seen += 1
    assert seen == 128
