"""Several servers, and what is worse than one that is killed: one that hangs, that nobody answers for, that has no room, or that lies."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.images import expected_tile, random_pixels, write_image
from tests.integration.processes import ServerProcess, wait_until

from ome_tensor import DatasetChanged, DeadlineExceeded, Overloaded, Unavailable
from ome_tensor_client import Client, connect
from ome_tensor_server.testing import running_server

#: Nobody listens there.
NOBODY = "127.0.0.1:9"

SMALL = {"z": 0, "c": 0, "roi": (0, 0, 8, 8)}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, big_path: Path) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    """Two servers that every test leaves as they were."""
    logs = tmp_path_factory.mktemp("logs")
    with ExitStack() as stack:
        first, second = (stack.enter_context(ServerProcess(big_path, logs / f"{place}.log")) for place in range(2))
        yield first.wait_serving(), second.wait_serving()


@contextmanager
def reading(*targets: str, prefer: int = 0, **options: Any) -> Iterator[Client]:
    usual = {"message_bytes": 64 << 10, "retry_for": 5, "timeout": 20, "transport": "tcp"}
    with connect(targets, **usual | options) as client:
        client._connection.prefer(prefer)
        yield client


@contextmanager
def frozen(server: ServerProcess) -> Iterator[None]:
    """Nothing is refused and nothing comes."""
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


def took(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.monotonic()
    return call(), time.monotonic() - began


def tiles_of(client: Client, **more: Any) -> Iterator[Any]:
    return client.tensor_view("big").iter_tiles(tile_size=(64, 128), shuffle=True, seed=3, **more)


def reads_of(server: ServerProcess) -> int:
    """Reads that it has answered, to their end or not."""
    return server.log.read_text().count("method=ReadTiles")


def test_small_reads_leave_a_server_that_hangs(pair: tuple[ServerProcess, ServerProcess], big_pixels: np.ndarray) -> None:
    """Reads of one message have no stream to resume: after one timeout the next server has them, and the next read goes there at once."""
    with reading(pair[0].target, pair[1].target, timeout=1) as client:

        def small() -> np.ndarray:
            return client.tensor_view("big", **SMALL).to_numpy()

        small()
        with frozen(pair[0]):
            for patience in (3, 0.9):
                found, seconds = took(small)
                np.testing.assert_array_equal(found, big_pixels[0, 0, 0, :8, :8][None])
                assert seconds < patience


def test_selections_leave_a_server_that_hangs(pair: tuple[ServerProcess, ServerProcess]) -> None:
    """They may take ten times as long as a call, but not for their next message."""
    with reading(pair[0].target, pair[1].target, timeout=1) as client:
        dataset = client.dataset("big")
        with frozen(pair[0]):
            images, seconds = took(dataset.images)
        assert len(images) == 1
        assert seconds < 4


def test_all_hang(pair: tuple[ServerProcess, ServerProcess]) -> None:
    """Each has its time, once."""
    with reading(pair[0].target, pair[1].target, timeout=0.5) as client:
        client.tensor_view("big", **SMALL).to_numpy()
        with frozen(pair[0]), frozen(pair[1]):
            began = time.monotonic()
            for call in (client.datasets, lambda: client.tensor_view("big", **SMALL).to_numpy()):
                with pytest.raises(DeadlineExceeded, match=rf"\(one of {pair[0].target},{pair[1].target}\)"):
                    call()
            assert time.monotonic() - began < 6


@pytest.mark.slow
def test_a_machine_that_is_gone(pair: tuple[ServerProcess, ServerProcess]) -> None:
    """It does not even refuse: connections to it are never made."""
    with ExitStack() as stack:
        hole = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        # Nobody takes these, and then there is no room for more.
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(hole.getsockname())
        client = stack.enter_context(reading(f"127.0.0.1:{hole.getsockname()[1]}", pair[0].target, timeout=60))
        datasets, seconds = took(client.datasets)
        assert [dataset.name for dataset in datasets] == ["big"]
        assert seconds < 10


def test_one_that_says_it_serves_and_does_not(pair: tuple[ServerProcess, ServerProcess], big_pixels: np.ndarray) -> None:
    """A read tries to go home, also after more than ``retry_for`` elsewhere, comes back each time, and tries ever less often."""
    with reading(NOBODY, pair[1].target, retry_for=0.3) as client:
        client._connection.replicas._ask = lambda target: True
        wanted = list(range(256))
        before, found = reads_of(pair[1]), []
        for tile in tiles_of(client):
            np.testing.assert_array_equal(tile.array, expected_tile(big_pixels, tile), strict=True)
            found.append(tile.number)
            time.sleep(0.01)
        assert sorted(found) == wanted
        with connect(pair[0].target) as alone:
            assert found == [tile.number for tile in tiles_of(alone)]
        # In some three seconds: after 0.25, one and four more.
        wait_until(lambda: reads_of(pair[1]) > before, "the log")
        assert 2 <= reads_of(pair[1]) - before <= 5


def test_one_that_has_no_room(pair: tuple[ServerProcess, ServerProcess], tmp_path: Path, big_path: Path) -> None:
    with ServerProcess(big_path, tmp_path / "full.log", "--max-concurrent-reads", "1") as full:
        full.wait_serving()
        with reading(full.target, retry_for=0) as first, reading(full.target, pair[0].target, retry_for=0) as client:
            held = tiles_of(first)
            next(held)
            with pytest.raises(Overloaded):
                next(tiles_of(first))
            assert sum(1 for _ in tiles_of(client)) == 256
            held.close()


def test_connections_spread_from_the_preferred_server_on(pair: tuple[ServerProcess, ServerProcess]) -> None:
    """The streams of one read are no shards of their own: with more servers than connections all of those are used by somebody."""
    # The first server is never asked for by the one client, and the last not by the other.
    with reading(NOBODY, pair[0].target, pair[1].target, prefer=1, connections=2) as client:
        for shard in (None, (1, 3)):
            before = [reads_of(server) for server in pair]
            more = {} if shard is None else {"shard": shard}
            assert sum(1 for _ in tiles_of(client, **more)) == (256 if shard is None else 85)
            wanted = [reads + 1 for reads in before]
            wait_until(lambda wanted=wanted: [reads_of(server) for server in pair] == wanted, "one stream at each")
        assert not any(one.replicas._aside for one in client._connection.several)


def test_errors_say_who(tmp_path: Path) -> None:
    """Which server it was, and which there are; of two versions, who has the other one."""
    with (
        reading(NOBODY, "127.0.0.1:10", retry_for=0) as client,
        pytest.raises(Unavailable, match=r"one of 127\.0\.0\.1:9,127\.0\.0\.1:10\)"),
    ):
        client.datasets()
    with ExitStack() as stack:
        targets = []
        for seed in range(2):
            (tmp_path / str(seed)).mkdir()
            path = write_image(tmp_path / str(seed) / "big.ome.parquet", random_pixels((1, 1, 1, 128, 128), seed=seed))
            targets.append(stack.enter_context(running_server([path])).target)
        client = stack.enter_context(reading(*targets))
        view = client.tensor_view("big")
        assert view.shape
        client._connection.prefer(1)
        with pytest.raises(DatasetChanged, match=f"^{targets[1]}: "):
            list(view.iter_tiles(tile_size=(64, 64)))
