"""Several servers of one dataset: reads spread over them, and go on where one is killed, hangs, or comes back."""

from __future__ import annotations

import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.integration.images import expected_tile, random_pixels, write_image
from tests.integration.processes import ServerProcess, wait_until
from tests.integration.proxy import Proxy

from ome_tensor import DatasetChanged, Unavailable
from ome_tensor_client import Client, connect

pytestmark = [pytest.mark.slow]

Start = Callable[..., ServerProcess]

#: grpcio survives a fork of a process that has used it since 1.74.
OLD_GRPC = tuple(map(int, grpc.__version__.split(".")[:2])) < (1, 74)

#: Small messages: many places for a read to move at.
MESSAGE = 64 << 10


@contextmanager
def reading(*targets: str, **options: Any) -> Iterator[Client]:
    usual = {"message_bytes": MESSAGE, "retry_for": 20, "timeout": 20, "transport": "tcp"}
    with connect(targets, **usual | options) as client:
        client._connection.prefer(0)
        yield client


def tiles_of(client: Client, **more: Any) -> Iterator[Any]:
    return client.tensor_view("big").iter_tiles(tile_size=(64, 128), shuffle=True, seed=3, **more)


def check(found: list[Any], wanted: list[int], pixels: np.ndarray) -> None:
    assert [tile.number for tile in found] == wanted
    for tile in found:
        np.testing.assert_array_equal(tile.array, expected_tile(pixels, tile), strict=True)


def reads_of(server: ServerProcess) -> int:
    """Reads that it has answered, to their end or not."""
    return server.log.read_text().count("method=ReadTiles")


@pytest.fixture
def pair(start_server: Start, big_path: Path) -> tuple[ServerProcess, ServerProcess]:
    first, second = start_server(big_path), start_server(big_path)
    return first.wait_serving(), second.wait_serving()


@pytest.fixture
def wanted(pair: tuple[ServerProcess, ServerProcess]) -> list[int]:
    """The order of the tiles, from one server alone."""
    with connect(pair[0].target, transport="tcp") as client:
        return [tile.number for tile in tiles_of(client)]


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("after", [1, 60, 200])
def test_a_read_goes_on_at_another_server(
    pair: tuple[ServerProcess, ServerProcess], wanted: list[int], big_pixels: np.ndarray, after: int, prefetch: int
) -> None:
    """Killed in the middle: each tile once, in order, and without a pause."""
    first, second = pair
    with reading(first.target, second.target) as client:
        tiles = tiles_of(client, prefetch=prefetch)
        found = list(itertools.islice(tiles, after))
        first.kill()
        began = time.monotonic()
        found.append(next(tiles))
        assert time.monotonic() - began < 5
        found += tiles
        # And what comes next goes to the other one at once.
        assert client.tensor_view("big", z=0, c=0, roi=(0, 0, 8, 8)).to_numpy().shape == (1, 8, 8)
    check(found, wanted, big_pixels)


def test_image_sets_and_several_connections_too(
    pair: tuple[ServerProcess, ServerProcess], wanted: list[int], big_pixels: np.ndarray
) -> None:
    first, second = pair
    with reading(first.target, second.target) as client, reading(first.target, second.target, connections=2) as two:
        images = client.dataset("big").images()
        batches = images.iter_batches(tile_size=(64, 128), batch_size=4, shuffle=True, seed=3)
        tiles = tiles_of(two)
        found, others = [next(batches)], list(itertools.islice(tiles, 10))
        first.kill()
        found += batches
        others += tiles
    assert np.concatenate([batch.numbers for batch in found]).tolist() == wanted
    check(others, wanted, big_pixels)


def test_shards_spread_and_a_server_that_is_back_is_used_again(
    pair: tuple[ServerProcess, ServerProcess], start_server: Start, big_path: Path, wanted: list[int], big_pixels: np.ndarray
) -> None:
    """Also by a read that is in progress: it goes home at the next batch."""
    first, second = pair
    with reading(first.target, second.target) as client:
        before = [reads_of(server) for server in pair]
        shards = [list(tiles_of(client, shard=(rank, 2))) for rank in range(2)]
        check([tile for together in zip(*shards, strict=True) for tile in together], wanted, big_pixels)
        wait_until(lambda: [reads_of(server) for server in pair] == [count + 1 for count in before], "a shard each")
        tiles = tiles_of(client)
        found = list(itertools.islice(tiles, 3))
        first.kill()
        found += itertools.islice(tiles, 20)
        again = start_server(big_path, listen=first.target).wait_serving()
        replicas = client._connection.replicas
        wait_until(lambda: not replicas.is_aside(replicas.channels[0]), "the first server is used again")
        found += tiles
        check(found, wanted, big_pixels)
        wait_until(lambda: reads_of(again) == 1, "the read has gone home")
        assert [tile.number for tile in tiles_of(client, shard=(0, 2))] == wanted[::2]
        wait_until(lambda: reads_of(again) == 2, "the next read begins there")


def test_a_server_that_hangs_is_left(
    pair: tuple[ServerProcess, ServerProcess], wanted: list[int], big_pixels: np.ndarray
) -> None:
    """Its machine is frozen: nothing is refused and nothing comes."""
    first, second = pair
    with reading(first.target, second.target, timeout=1.5) as client:
        tiles = tiles_of(client)
        found = list(itertools.islice(tiles, 3))
        os.kill(first.process.pid, signal.SIGSTOP)
        try:
            began = time.monotonic()
            found += tiles
            # Calls of one answer, too: the second knows by now.
            assert client.image("big").key == "big/image/0"
            assert time.monotonic() - began < 15
        finally:
            os.kill(first.process.pid, signal.SIGCONT)
    check(found, wanted, big_pixels)


def test_all_away(pair: tuple[ServerProcess, ServerProcess], start_server: Start, big_path: Path, big_pixels: np.ndarray) -> None:
    """For a while: waited for. For good: an error, in bounded time, that says who."""
    first, second = pair
    with reading(first.target, second.target) as client:
        tiles = tiles_of(client)
        found = list(itertools.islice(tiles, 5))
        first.kill()
        second.kill()
        start_server(big_path, listen=second.target)
        found += tiles
        assert len({tile.number for tile in found}) == len(found) == 256
    with reading(first.target, "127.0.0.1:9", retry_for=1) as client:
        began = time.monotonic()
        with pytest.raises(Unavailable, match=r"127\.0\.0\.1:\d+: connection refused"):
            client.datasets()
        with pytest.raises(Unavailable):
            list(tiles_of(client))
        assert time.monotonic() - began < 10


def test_another_version_is_not_mixed_in(tmp_path: Path, start_server: Start) -> None:
    """The other server's pixels are other pixels: an error, not a mixture."""
    servers = []
    for seed in range(2):
        (tmp_path / str(seed)).mkdir()
        path = write_image(tmp_path / str(seed) / "big.ome.parquet", random_pixels((1, 1, 1, 1024, 512), seed=seed))
        servers.append(start_server(path).wait_serving())
    with reading(*(server.target for server in servers)) as client:
        tiles = tiles_of(client)
        found = list(itertools.islice(tiles, 3))
        servers[0].kill()
        with pytest.raises(DatasetChanged, match="big"):
            found += tiles
    assert len(found) < 32


def test_a_cut_connection_costs_no_pause(
    pair: tuple[ServerProcess, ServerProcess], wanted: list[int], big_pixels: np.ndarray
) -> None:
    """The server itself is well: it is used again as soon as it says so."""
    first, second = pair
    with Proxy(first.target, [500_000] * 3) as proxy, reading(proxy.target, second.target) as client:
        found = list(tiles_of(client))
        assert proxy.done >= 1
    check(found, wanted, big_pixels)


def test_copies_prefer_for_themselves(pair: tuple[ServerProcess, ServerProcess]) -> None:
    first, second = pair
    with connect([first.target, second.target]) as client:
        copies = [pickle.loads(pickle.dumps(client)) for _ in range(40)]
        assert {copy.targets for copy in copies} == {(first.target, second.target)}
        assert {copy._connection.replicas.preferred for copy in copies} == {0, 1}
        client._connection.prefer(7)
        assert client._connection.replicas.home().target == second.target
        assert client.datasets()[0].name == "big"


@pytest.mark.skipif(OLD_GRPC, reason=f"grpcio {grpc.__version__} does not survive a fork")
def test_a_forked_child_begins_anew(pair: tuple[ServerProcess, ServerProcess]) -> None:
    """What the parent has put aside, and asks, is the parent's affair. In a process of its own: others have threads that no fork survives."""
    script = f"""
import os
from ome_tensor_client import connect
with connect(["{pair[0].target}", "127.0.0.1:9"], transport="tcp") as client:
    client._connection.prefer(1)
    assert client.datasets()[0].name == "big"
    assert client._connection.replicas._asking is not None
    if (child := os.fork()) == 0:
        replicas = client._connection.replicas
        os._exit(int(replicas._asking is not None or bool(replicas._aside)))
    assert os.waitpid(child, 0)[1] == 0
    print("a child of its own")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "a child of its own\n", done.stderr
