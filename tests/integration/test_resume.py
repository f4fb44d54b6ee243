"""A read survives what networks and servers do: cut anywhere, it goes on at the next tile; nothing twice, nothing skipped, nothing mixed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.integration.images import drain, expected_tile, random_pixels, record_of, write_image
from tests.integration.processes import ServerProcess
from tests.integration.proxy import Proxy

from ome_tensor import DatasetChanged, LazyTensorView, TensorView, Unavailable
from ome_tensor_client import Client, connect
from ome_tensor_server.testing import RunningServer

#: Small messages, so that a read of 1.5 MiB has many places to be cut at.
MESSAGE = 32 << 10

Read = Callable[[Any], Iterator[Any]]
READS: dict[str, Read] = {
    "tiles": lambda view: view.iter_tiles(tile_size=(48, 54)),
    "clipped": lambda view: view.iter_tiles(tile_size=(50, 64)),
    "padded": lambda view: view.iter_tiles(tile_size=(50, 64), edge="pad", pad=7),
    "shuffled": lambda view: view.iter_tiles(tile_size=(20, 30), shuffle=True, seed=11),
    "sharded": lambda view: view.iter_tiles(tile_size=(20, 30), shuffle=True, seed=11, shard=(1, 3)),
    "started": lambda view: view.iter_tiles(tile_size=(20, 30), start=40),
    "boxes": lambda view: view.iter_tiles(tile_size=(2, 60, 60)),
    "prefetched": lambda view: view.iter_tiles(tile_size=(20, 30), prefetch=3),
    "slabs": lambda view: view.iter_tiles(tile_size=(200, 270)),
    "slabs shuffled": lambda view: view.iter_tiles(tile_size=(100, 100), shuffle=True, seed=5, shard=(0, 2), prefetch=1),
}


@pytest.fixture(scope="module")
def local(pixels: np.ndarray) -> TensorView:
    """The same image without a network: what every read must give."""
    return TensorView(record_of(pixels))


def same_tiles(found: list[Any], wanted: list[Any]) -> None:
    """Equal in number, order, place and pixels."""
    assert [(tile.number, tile.position, tile.origin, tile.valid) for tile in found] == [
        (tile.number, tile.position, tile.origin, tile.valid) for tile in wanted
    ]
    for tile, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(tile.array, other.array, strict=True)


def patient(target: str) -> Client:
    """A client that does not give up."""
    return connect(target, message_bytes=MESSAGE, retry_for=20)


cuts_anywhere = st.lists(st.integers(0, 600_000), min_size=1, max_size=3)
with_fixtures = settings(deadline=None, max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])


#: On the oldest versions, too: what one of each kind of order and of message does, all do there.
OFTEN = {"tiles", "slabs", "shuffled"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow) for name in READS])
@with_fixtures
@example(cuts=[100_000, 40_000, 90_000, 35_000])
@example(cuts=[0, 500, 5_000])
@given(cuts=cuts_anywhere)
def test_tiles_survive_cuts(served: RunningServer, local: TensorView, name: str, cuts: list[int]) -> None:
    """Cut after any number of bytes, again and again."""
    with Proxy(served.target, cuts) as proxy, patient(proxy.target) as client:
        found = list(READS[name](client.tensor_view("image")))
    same_tiles(found, list(READS[name](local)))


@with_fixtures
@example(cuts=[100_000, 40_000, 90_000, 35_000])
@given(cuts=cuts_anywhere)
def test_whole_views_survive_cuts(served: RunningServer, pixels: np.ndarray, cuts: list[int]) -> None:
    """`to_numpy`, into memory of the view's own or the caller's, and what was asked for with indices."""
    with Proxy(served.target, cuts) as proxy, patient(proxy.target) as client:
        view = client.tensor_view("image")
        np.testing.assert_array_equal(view.to_numpy(), pixels, strict=True)
        out = np.empty_like(pixels[1:, ::2])
        client.tensor_view("image", t=1, z=slice(None, None, 2), layout="TZCYX").to_numpy(out=out)
        np.testing.assert_array_equal(out, pixels[1:, ::2], strict=True)


@with_fixtures
@given(cuts=cuts_anywhere, prefetch=st.integers(0, 4))
def test_the_dlpack_iterators_survive_cuts(served: RunningServer, local: TensorView, cuts: list[int], prefetch: int) -> None:
    """Upstream's iterators are the same stream."""

    def arrays(view: TensorView | LazyTensorView) -> list[np.ndarray]:
        tiles = view.iter_dlpack(tile_size=(64, 64), shuffle=True, seed=3, prefetch=prefetch, mode="numpy")
        boxes = view.iter_tiles_3d(tile_size=(1, 100, 100), prefetch=prefetch)
        return [np.from_dlpack(tile) for tile in itertools.chain(tiles, boxes)]

    with Proxy(served.target, cuts) as proxy, patient(proxy.target) as client:
        found = arrays(client.tensor_view("image"))
    for one, other in zip(found, arrays(local), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


def test_the_proxy_really_cuts(served: RunningServer, local: TensorView) -> None:
    """The tests above would pass with a proxy that does nothing: this one counts."""
    with Proxy(served.target, [100_000] * 5) as proxy, patient(proxy.target) as client:
        found = list(READS["tiles"](client.tensor_view("image")))
        assert proxy.done == 5
        assert proxy.connections == 6
    same_tiles(found, list(READS["tiles"](local)))


def test_no_retries_means_none(served: RunningServer, pixels: np.ndarray) -> None:
    """With ``retry_for=0`` a cut is an error, after tiles that are good."""
    with Proxy(served.target, [100_000] * 5) as proxy, connect(proxy.target, message_bytes=MESSAGE, retry_for=0) as client:
        view = client.tensor_view("image")
        tiles, found = view.iter_tiles(tile_size=(48, 54)), []
        with pytest.raises(Unavailable, match=proxy.target):
            drain(tiles, found)
        assert list(tiles) == []
    assert [tile.number for tile in found] == list(range(len(found)))
    for tile in found:
        np.testing.assert_array_equal(tile.array, expected_tile(pixels, tile), strict=True)


def test_an_unseeded_shuffle_resumes_too(served: RunningServer, pixels: np.ndarray) -> None:
    """The client draws the seed, so that the order of the second half is that of the first."""
    with Proxy(served.target, [300_000, 300_000]) as proxy, patient(proxy.target) as client:
        tiles = list(client.tensor_view("image").iter_tiles(tile_size=(24, 27), shuffle=True))
        assert proxy.done == 2
    assert sorted(tile.number for tile in tiles) == list(range(100))
    for tile in tiles:
        np.testing.assert_array_equal(tile.array, expected_tile(pixels, tile), strict=True)


# --- servers that die and come back ---------------------------------------------------------------------------------------------

Start = Callable[..., ServerProcess]


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_killed_server_that_comes_back(start_server: Start, big_path: Path, big_pixels: np.ndarray, prefetch: int) -> None:
    """kill -9 in the middle of a read, a new process on the same port: the read goes on."""
    first = start_server(big_path).wait_serving()
    with connect(first.target, retry_for=30) as client:
        tiles = client.tensor_view("big").iter_tiles(tile_size=(128, 128), prefetch=prefetch)
        found = list(itertools.islice(tiles, 5))
        first.kill()
        second = start_server(big_path, listen=first.target)
        found += tiles
    assert [tile.number for tile in found] == list(range(128))
    for tile in found:
        np.testing.assert_array_equal(tile.array, expected_tile(big_pixels, tile), strict=True)
    # That it was in the middle: the second server had something left to do.
    second.terminate()
    assert second.process.wait(20) == 0
    assert "method=ReadTiles" in second.log.read_text()


@pytest.mark.parametrize("how", ["tiles", "whole"])
def test_a_dataset_that_changed_is_never_mixed(
    start_server: Start, tmp_path: Path, big_path: Path, big_pixels: np.ndarray, how: str
) -> None:
    """The server comes back with other pixels under the same name: the read fails, and what it had given was all of the old ones."""
    path = tmp_path / "served" / "big.ome.parquet"
    path.parent.mkdir()
    path.symlink_to(big_path)
    first = start_server(path).wait_serving()
    with connect(first.target, retry_for=30) as client:
        view = client.tensor_view("big")
        assert view.shape == big_pixels.shape
        tiles = view.iter_tiles(tile_size=(128, 128))
        found = list(itertools.islice(tiles, 5)) if how == "tiles" else []
        first.kill()
        path.unlink()
        write_image(path, random_pixels(big_pixels.shape, seed=99))
        start_server(path, listen=first.target).wait_serving()
        if how == "whole":
            with pytest.raises(DatasetChanged, match="version"):
                view.to_numpy()
        else:
            with pytest.raises(DatasetChanged, match="version"):
                drain(tiles, found)
        for tile in found:
            np.testing.assert_array_equal(tile.array, expected_tile(big_pixels, tile), strict=True)
        # A view made now is of the new pixels, all of them.
        again = client.tensor_view("big", z=0, c=0).to_numpy()
        np.testing.assert_array_equal(again, random_pixels(big_pixels.shape, seed=99)[0, :1, 0], strict=True)
