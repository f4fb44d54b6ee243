"""Clients that leave in the middle, in every way there is: no thread, no place and no buffer is left behind, at either end."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.images import expected_tile
from tests.integration.processes import HERE, wait_until
from tests.integration.raw import raw_client, request

from ome_tensor_client import Client, connect
from ome_tensor_proto.v1 import view_pb2
from ome_tensor_server.testing import RunningServer, running_server

READS = 3


@pytest.fixture(scope="module")
def narrow(big_path: Path) -> Iterator[RunningServer]:
    """A server with room for few reads."""
    with running_server([big_path], max_concurrent_reads=READS) as server:
        yield server


@pytest.fixture
def reader(narrow: RunningServer) -> Iterator[Client]:
    """A client that waits for room, but not for long: a place that is not freed by itself is an error."""
    with connect(narrow.target, retry_for=5) as client:
        yield client


def places(server: RunningServer) -> int:
    """Reads that the server could take on right now."""
    return server.server.free_reads


@pytest.fixture(autouse=True)
def no_garbage_collector() -> Iterator[None]:
    """Nothing may depend on when Python looks for cycles: in a training loop full of arrays that can be minutes later."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def prefetch_threads() -> int:
    """Threads that read ahead."""
    return sum(thread.name == "ome-tensor-prefetch" for thread in threading.enumerate())


def tiles(client: Client, prefetch: int = 0) -> Iterator[Any]:
    """A long read, begun."""
    found = client.tensor_view("big").iter_tiles(tile_size=(64, 64), prefetch=prefetch)
    next(found)
    return found


def drop(found: Iterator[Any]) -> None:
    """Nothing refers to it any more once the caller's own name is gone."""


def close(found: Iterator[Any]) -> None:
    """As a generator is closed."""
    found.close()  # type: ignore[attr-defined]


def throw(found: Iterator[Any]) -> None:
    """The training step fails."""

    def step() -> None:
        for tile in found:
            assert not tile.number / 0

    with pytest.raises(ZeroDivisionError):
        step()


def everything_is_free(server: RunningServer) -> None:
    """Every place, and nobody reads ahead; then as many reads as there are places, all at once and to their end."""
    wait_until(lambda: places(server) == READS, "the server's places are free", seconds=5)
    assert prefetch_threads() == 0
    with connect(server.target, retry_for=0) as client:
        views = [client.tensor_view("big", z=0, c=0, roi=(0, 0, 512, 512)) for _ in range(READS)]
        for together in zip(*(view.iter_tiles(tile_size=(64, 64)) for view in views), strict=True):
            assert len({tile.number for tile in together}) == 1
    wait_until(lambda: places(server) == READS, "the server's places are free", seconds=5)


@pytest.mark.parametrize("prefetch", [0, 1, 8])
@pytest.mark.parametrize("leave", [drop, close, throw])
def test_iterators_that_are_left(
    narrow: RunningServer, reader: Client, leave: Callable[[Iterator[Any]], None], prefetch: int
) -> None:
    """Dropped, closed, or left by an error: more often than the server has room, so that each must free its place."""
    for _ in range(2 * READS):
        found = tiles(reader, prefetch)
        leave(found)
        del found
    everything_is_free(narrow)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_killed_client(narrow: RunningServer, prefetch: int) -> None:
    """SIGKILL in the middle of a read: the server notices by itself."""
    script = [sys.executable, str(HERE / "vanishing_client.py"), narrow.target, "big", str(prefetch)]
    clients = [subprocess.Popen(script, stdout=subprocess.PIPE, text=True) for _ in range(READS)]
    for client in clients:
        assert client.stdout is not None
        assert client.stdout.readline() == "reading\n"
    assert places(narrow) == 0
    for client in clients:
        client.kill()
        client.communicate()
    everything_is_free(narrow)


def test_a_connection_closed_under_its_streams(narrow: RunningServer) -> None:
    """Closing the client ends its reads at both ends."""
    with connect(narrow.target, retry_for=0) as client:
        reads = [tiles(client, prefetch) for prefetch in (0, 2, 4)]
        assert places(narrow) == 0
    # Still referred to, so that it is the closing that frees the places.
    wait_until(lambda: places(narrow) == READS, "the server's places are free", seconds=5)
    del reads
    everything_is_free(narrow)


def test_cancelled_calls_of_any_client(narrow: RunningServer) -> None:
    """Also of a client that is not ours, at any point of the stream; each is logged as what it was."""
    cut = view_pb2.Tiling(tiles=view_pb2.TilesCut(h=64, w=64))
    with raw_client(narrow.target) as raw:
        for number in range(3 * READS):
            everything_is_free(narrow)
            stream = raw.stream(request("big", tiling=cut))
            assert len(list(itertools.islice(stream, number))) == number
            stream.cancel()
    everything_is_free(narrow)


def test_refused_reads_take_no_place(narrow: RunningServer, reader: Client) -> None:
    """Calls that fail take no place either."""
    for _ in range(3 * READS):
        with pytest.raises(ValueError, match="index"):
            list(reader.tensor_view("big", t=5).iter_tiles(tile_size=(64, 64)))
        with pytest.raises(ValueError, match="tile"):
            reader.tensor_view("big").iter_tiles(tile_size=(0, 64))
    everything_is_free(narrow)


def test_no_buffer_is_left(narrow: RunningServer, reader: Client) -> None:
    """Both ends are in this process: after many reads left in the middle, its memory is what it was."""

    def leave_some() -> None:
        for prefetch in (0, 4) * 4:
            close(tiles(reader, prefetch))
        everything_is_free(narrow)
        gc.collect()

    tracemalloc.start()
    try:
        leave_some()  # What is made once: caches, threads, imports.
        before, _ = tracemalloc.get_traced_memory()
        leave_some()
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # One forgotten message would be a whole MiB.
    assert after - before < 256 << 10, f"{before} -> {after} bytes, peak {peak}"


def test_tiles_outlive_their_stream(reader: Client, big_pixels: np.ndarray) -> None:
    """What was handed out stays right, whatever became of the read, the iterator and the client."""
    found = reader.tensor_view("big").iter_tiles(tile_size=(64, 64), prefetch=4)
    kept = list(itertools.islice(found, 20))
    close(found)
    reader.close()
    gc.collect()
    for tile in kept:
        np.testing.assert_array_equal(tile.array, expected_tile(big_pixels, tile), strict=True)


def test_threads_end_with_the_server(big_path: Path) -> None:
    """A stopped server leaves no thread of its own."""
    others = set(threading.enumerate())
    with running_server([big_path], max_concurrent_reads=READS) as server, connect(server.target, retry_for=5) as client:
        found = tiles(client)
        own = [thread for thread in set(threading.enumerate()) - others if thread.name.startswith("ome-tensor-call")]
        assert own
        del found
        everything_is_free(server)
    assert not [thread for thread in own if thread.is_alive()]


def test_a_client_that_takes_nothing_loses_its_place_and_may_come_back(big_path: Path) -> None:
    """A stalled reader frees its place after ``stall_seconds``; when it reads on, it gets every tile, each once."""
    with (
        running_server([big_path], max_concurrent_reads=1, stall_seconds=1, batch_bytes=1 << 16) as server,
        connect(server.target) as client,
    ):
        tiles = client.tensor_view("big").iter_tiles(tile_size=(32, 32))
        got = [next(tiles)]
        assert places(server) == 0
        wait_until(lambda: places(server) == 1, "the place of the stalled read", seconds=10)
        got += tiles
        everything = client.tensor_view("big").iter_tiles(tile_size=(32, 32))
        for number, (tile, wanted) in enumerate(itertools.zip_longest(got, everything)):
            assert tile.number == wanted.number == number
            np.testing.assert_array_equal(tile.array, wanted.array)


def test_servers_of_one_process_leave_no_files_open(image_path: Path) -> None:
    """An application may have one after another."""

    def open_files() -> int:
        with running_server([image_path]) as server, connect(server.target, transport="tcp") as client:
            client.datasets()
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    open_files()  # What a process has once.
    before = open_files()
    for _ in range(3):
        after = open_files()
    assert after <= before + 1
