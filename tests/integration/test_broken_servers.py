"""Servers that are gone, hang, or lie: every one of them is a clear error within a known time, and never a short read taken for a whole one."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from tests.integration.images import drain, expected_tile
from tests.integration.proxy import Proxy
from tests.integration.relay import relay

from ome_tensor import BrokenStream, DeadlineExceeded, OmeTensorError, Unavailable
from ome_tensor_client import connect
from ome_tensor_proto.v1 import tensor_service_pb2 as pb
from ome_tensor_server.testing import RunningServer

#: A read of 1.5 MiB in a dozen messages.
MESSAGE = 128 << 10

#: What a machine with two busy cores may add to a time that we promise.
SLACK = 5.0


@pytest.fixture
def dead_address() -> Iterator[str]:
    """An address where nobody listens: bound, so that nobody else takes it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
def hung_address() -> Iterator[str]:
    """An address that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


USES: dict[str, Callable[[Any], object]] = {
    "datasets": lambda client: client.datasets(),
    "image": lambda client: client.image("image"),
    "shape": lambda client: client.tensor_view("image").shape,
    "pixels": lambda client: client.tensor_view("image").to_numpy(),
    "tiles": lambda client: list(client.tensor_view("image").iter_tiles(tile_size=(8, 8))),
    "prefetched": lambda client: list(client.tensor_view("image").iter_tiles(tile_size=(8, 8), prefetch=2)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_nobody_there(dead_address: str, use: Callable[[Any], object]) -> None:
    """Unavailable, naming the address, within the time allowed for retries."""
    began = time.monotonic()
    with connect(dead_address, retry_for=0.5) as client, pytest.raises(Unavailable, match=dead_address):
        use(client)
    assert time.monotonic() - began < 0.5 + SLACK


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_nobody_answers(hung_address: str, use: Callable[[Any], object]) -> None:
    """A server that hangs is an error within the timeout, not a hang."""
    began = time.monotonic()
    with (
        connect(hung_address, timeout=0.5, retry_for=0.5) as client,
        pytest.raises((DeadlineExceeded, Unavailable), match=hung_address),
    ):
        use(client)
    assert time.monotonic() - began < 0.5 + 0.5 + SLACK


def test_a_server_that_never_comes_back(served: RunningServer, pixels: np.ndarray) -> None:
    """Tiles until it went away, then Unavailable within ``retry_for``."""
    with Proxy(served.target, [200_000]) as proxy:
        client = connect(proxy.target, message_bytes=32 << 10, retry_for=1)
        tiles = client.tensor_view("image").iter_tiles(tile_size=(24, 27))
        found = list(itertools.islice(tiles, 3))
    began = time.monotonic()
    with client, pytest.raises(Unavailable):
        drain(tiles, found)
    assert time.monotonic() - began < 1 + SLACK
    assert [tile.number for tile in found] == list(range(len(found)))
    for tile in found:
        np.testing.assert_array_equal(tile.array, expected_tile(pixels, tile), strict=True)


def test_a_stream_that_stalls(served: RunningServer) -> None:
    """A network that dies without a word in the middle of a read: an error within two timeouts (the one running, and one attempt more)."""
    with (
        Proxy(served.target, [200_000] + [0] * 20, stall=True) as proxy,
        connect(proxy.target, message_bytes=32 << 10, timeout=1, retry_for=1) as client,
    ):
        tiles = client.tensor_view("image").iter_tiles(tile_size=(24, 27))
        began = time.monotonic()
        with pytest.raises((DeadlineExceeded, Unavailable)):
            list(tiles)
        assert proxy.done
        assert time.monotonic() - began < 2 + 1 + SLACK


@pytest.mark.slow
def test_a_reader_slower_than_the_timeout(big_pixels: np.ndarray, big_path: Any, start_server: Any) -> None:
    """The timeout is the server's to keep, not the training loop's: a reader that pauses longer loses nothing."""
    server = start_server(big_path).wait_serving()
    with connect(server.target, timeout=1, retry_for=10) as client:
        numbers = []
        for tile in client.tensor_view("big").iter_tiles(tile_size=(256, 256)):
            numbers.append(tile.number)
            np.testing.assert_array_equal(tile.array, expected_tile(big_pixels, tile), strict=True)
            if tile.number in (0, 1, 20):
                time.sleep(1.5)  # The reader's own work, not a wait for something.
    assert numbers == list(range(32))


# --- a server that lies ---------------------------------------------------------------------------------------------------------

Edit = Callable[[int, list[bytes]], list[bytes]]


@contextmanager
def lying_server(truth: str, edit: Edit) -> Iterator[str]:
    """A gRPC server that passes calls on to a true one, and changes the messages of reads; ``edit`` gets the number of the read too."""
    reads = itertools.count()
    with relay(truth, {"ReadTiles": lambda messages: edit(next(reads), messages)}) as target:
        yield target


def without_marker(messages: list[bytes]) -> list[bytes]:
    """The same tiles, but the end-of-stream marker is missing."""
    last = pb.ReadTilesResponse.FromString(messages[-1])
    last.payload = last.payload.removesuffix(b"\xff\xff\xff\xff\x00\x00\x00\x00")
    return [*messages[:-1], *([last.SerializeToString()] if last.payload else [])]


def other_version(messages: list[bytes]) -> list[bytes]:
    """The header names another version of the dataset."""
    first = pb.ReadTilesResponse.FromString(messages[0])
    first.header.dataset_version = "another"
    return [first.SerializeToString(), *messages[1:]]


Lie = Callable[[list[bytes]], list[bytes]]

#: Told every time, the read can never be completed.
HOPELESS: dict[str, Lie] = {
    "nothing at all": lambda messages: [],
    "no marker": without_marker,
    "no last message": lambda messages: messages[:-1],
    "no first message": lambda messages: messages[1:],
    "first one twice": lambda messages: messages[:1] + messages,
    "first one cut": lambda messages: [messages[0][:-100], *messages[1:]],
    "first one garbage": lambda messages: [b"\xff" * 100, *messages[1:]],
}

#: What comes before the lie is good, so that asking again makes progress.
MENDABLE: dict[str, Lie] = {
    "half": lambda messages: messages[: (len(messages) + 1) // 2],
    "one left out": lambda messages: messages[:2] + messages[3:],
    "one twice": lambda messages: messages[:2] + messages[1:],
    "two swapped": lambda messages: messages[:1] + messages[2:3] + messages[1:2] + messages[3:],
    "one cut": lambda messages: messages[:1] + [message[:-100] for message in messages[1:2]] + messages[2:],
    "one garbage": lambda messages: messages[:1] + [b"\xff" * 100 for _ in messages[1:2]] + messages[2:],
}


@pytest.mark.parametrize("lie", HOPELESS.values(), ids=HOPELESS)
@pytest.mark.parametrize("read", ["tiles", "prefetched", "whole"])
def test_a_short_read_is_never_taken_for_a_whole_one(served: RunningServer, pixels: np.ndarray, lie: Lie, read: str) -> None:
    """Streams that end with OK but are not what was announced: BrokenStream, after tiles that are good and in order."""
    found: list[Any] = []
    with (
        lying_server(served.target, lambda number, messages: lie(messages)) as target,
        connect(target, message_bytes=MESSAGE, retry_for=0.3) as client,
    ):
        view = client.tensor_view("image")
        if read == "whole":
            with pytest.raises(BrokenStream):
                view.to_numpy()
        else:
            with pytest.raises(BrokenStream):
                drain(view.iter_tiles(tile_size=(30, 27), prefetch=2 * (read == "prefetched")), found)
    assert [tile.number for tile in found] == list(range(len(found)))
    for tile in found:
        np.testing.assert_array_equal(tile.array, expected_tile(pixels, tile), strict=True)


@pytest.mark.parametrize("lie", MENDABLE.values(), ids=MENDABLE)
def test_a_liar_is_asked_again(served: RunningServer, pixels: np.ndarray, lie: Lie) -> None:
    """From the last good tile on, until everything is there and right; never more, never less."""
    with (
        lying_server(served.target, lambda number, messages: lie(messages) if len(messages) > 1 else messages) as target,
        connect(target, message_bytes=MESSAGE, retry_for=10) as client,
    ):
        found = list(client.tensor_view("image").iter_tiles(tile_size=(30, 27)))
    assert [tile.number for tile in found] == list(range(80))
    for tile in found:
        np.testing.assert_array_equal(tile.array, expected_tile(pixels, tile), strict=True)


@pytest.mark.parametrize("lie", [*HOPELESS.values(), *MENDABLE.values()], ids=[*HOPELESS, *MENDABLE])
def test_a_server_that_lies_once(served: RunningServer, pixels: np.ndarray, lie: Lie) -> None:
    """The same of slabs: what was broken the first time is asked for again, from the last good slab on."""
    with (
        lying_server(served.target, lambda number, messages: messages if number else lie(messages)) as target,
        connect(target, message_bytes=MESSAGE, retry_for=10) as client,
    ):
        np.testing.assert_array_equal(client.tensor_view("image").to_numpy(), pixels, strict=True)


def test_another_version_in_the_header(served: RunningServer) -> None:
    """The view was resolved on one version: pixels of another are not its pixels, whoever forgot to check."""
    with (
        lying_server(served.target, lambda number, messages: other_version(messages)) as target,
        connect(target, message_bytes=MESSAGE, retry_for=0.3) as client,
        pytest.raises(OmeTensorError, match="version"),
    ):
        client.tensor_view("image").to_numpy()


def test_an_error_in_the_middle_reaches_every_reader(served: RunningServer) -> None:
    """Prefetching or not, the error comes where it happened, once, and the iterator then is over."""
    before = threading.active_count()

    def broken(number: int, messages: list[bytes]) -> list[bytes]:
        return messages[:3]

    with lying_server(served.target, broken) as target, connect(target, message_bytes=MESSAGE, retry_for=0) as client:
        for prefetch in (0, 1, 8):
            tiles = client.tensor_view("image").iter_tiles(tile_size=(30, 27), prefetch=prefetch)
            with pytest.raises(BrokenStream):
                list(tiles)
            assert list(tiles) == []
    assert not [thread for thread in threading.enumerate() if thread.name == "ome-tensor-prefetch"]
    assert threading.active_count() <= before + 2
