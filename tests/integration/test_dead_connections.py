"""A connection that is open and brings nothing any more, as one whose frames a flipped bit has put out of step, or whose other end has lost its
power: left after one wait in vain, and noticed by keepalive where nobody waits."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.fuzz import http2
from tests.integration.images import random_pixels, write_image
from tests.integration.network import Network, Trouble
from tests.integration.processes import ServerProcess, wait_until
from tests.integration.proxy import Proxy

from ome_tensor import DeadlineExceeded
from ome_tensor_client import Client, connect, connection
from ome_tensor_server import app
from ome_tensor_server.testing import running_server

PIXELS = random_pixels((1, 1, 1, 256, 256), seed=8)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("dead")
    (folder / "data").mkdir()
    write_image(folder / "data" / "image.parquet", PIXELS)
    with ServerProcess(folder / "data", folder / "log", "--uploads", str(folder / "uploads")).wait_serving() as server:
        yield server.target


@pytest.fixture
def network(target: str) -> Iterator[Network]:
    with Network(target) as network:
        yield network


def kill_connections(network: Network) -> None:
    """Those that there are bring no answer any more, and are not closed; new ones are well."""
    network.answers = Trouble(silent_after=1)


def let_new_ones_live(network: Network) -> None:
    network.answers = Trouble(silent_after=10**12)


def lookup(client: Client) -> None:
    assert client.dataset("image").metadata().num_rows == 1


def region(client: Client) -> None:
    view = client.tensor_view("image", roi=(10, 20, 30, 40), layout="YX")
    np.testing.assert_array_equal(view.to_numpy(), PIXELS[0, 0, 0, 20:60, 10:40])


def tiles(client: Client) -> None:
    view = client.tensor_view("image", layout="YX")
    assert sum(1 for _ in view.iter_tiles(tile_size=(64, 64), shuffle=True, seed=1)) == 16


def upload(client: Client) -> None:
    client.upload("sent", PIXELS, replace=True)


@pytest.mark.parametrize("read", [lookup, region, tiles, pytest.param(upload, marks=pytest.mark.slow)])
def test_one_wait_in_vain_and_the_next_call_is_answered(network: Network, read: Callable[[Client], None]) -> None:
    with connect(network.target, transport="tcp", timeout=1, retry_for=0) as client:
        read(client)
        kill_connections(network)
        with pytest.raises(DeadlineExceeded, match="within 1 s"):
            read(client)
        let_new_ones_live(network)
        read(client)


def test_a_stream_goes_on_where_its_connection_died(target: str) -> None:
    with (
        Proxy(target, cuts=[30_000], stall=True) as network,
        connect(network.target, transport="tcp", timeout=1, retry_for=20) as client,
    ):
        view = client.tensor_view("image", layout="YX")
        found = {tile.number: tile.array for tile in view.iter_tiles(tile_size=(32, 32), shuffle=True, seed=1)}
        assert network.done == 1
        assert network.connections == 2
    assert sorted(found) == list(range(64))
    np.testing.assert_array_equal(found[9], PIXELS[0, 0, 0, 32:64, 32:64])


def test_a_connection_that_takes_longer_to_make_than_a_call_may_is_made(target: str) -> None:
    """Each call that has waited in vain would else begin again with a new one."""
    with (
        Proxy(target, delay=1.5) as network,
        connect(network.target, transport="tcp", timeout=0.5, retry_for=0) as client,
    ):
        with pytest.raises(DeadlineExceeded):
            client.datasets()
        wait_until(lambda: answered(client), "an answer")
        assert network.connections == 1


def answered(client: Client) -> bool:
    try:
        return bool(client.datasets())
    except DeadlineExceeded:
        return False


def often(options: Sequence[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    """The options of a channel or a server with keepalive in seconds, where it is in tens of them."""
    changed = {"grpc.keepalive_time_ms": 1_000, "grpc.keepalive_timeout_ms": 1_000, "grpc.http2.ping_timeout_ms": 1_000}
    assert {name for name, _ in options} >= set(changed)
    return tuple((name, changed.get(name, value)) for name, value in options)


def test_a_server_lets_go_of_a_client_that_is_gone(image_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked whether it is there, also without a call, and has not answered. One that has may stay."""
    monkeypatch.setattr(app, "_OPTIONS", often(app._OPTIONS))
    with running_server([image_path]) as server, grpc.insecure_channel(server.target) as well:
        ask = well.unary_unary("/grpc.health.v1.Health/Check")
        assert ask(b"")
        states: list[grpc.ChannelConnectivity] = []
        well.subscribe(states.append)
        host, _, port = server.target.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=20) as gone:
            gone.sendall(http2.PREFACE + http2.settings() + http2.settings(flags=http2.ACK))
            said = b""
            while more := gone.recv(1 << 16):
                said += more
        assert any(one[3] == http2.PING and not one[4] & http2.ACK for one in http2.whole_frames(said))
        assert ask(b"")
        assert set(states) == {grpc.ChannelConnectivity.READY}


def test_a_client_leaves_a_server_that_is_gone_before_it_has_waited_in_vain(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_CHANNEL_OPTIONS", often(connection._CHANNEL_OPTIONS))
    with (
        Proxy(target, cuts=[30_000], stall=True) as network,
        connect(network.target, transport="tcp", timeout=100, retry_for=20) as client,
    ):
        began = time.monotonic()
        view = client.tensor_view("image", layout="YX")
        assert sum(1 for _ in view.iter_tiles(tile_size=(32, 32))) == 64
        assert time.monotonic() - began < 20
        assert (network.done, network.connections) == (1, 2)


@pytest.mark.slow
def test_a_client_that_takes_its_time_answers_all_the_same(image_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two batches of a training step that lasts, nobody in the client reads from its stream."""
    monkeypatch.setattr(app, "_OPTIONS", often(app._OPTIONS))
    with (
        running_server([image_path], mapping="off") as server,
        Proxy(server.target) as network,
        connect(network.target, transport="tcp", message_bytes=4096) as client,
    ):
        tiles = client.tensor_view("image").iter_tiles(tile_size=(16, 16))
        next(tiles)
        time.sleep(5)
        assert sum(1 for _ in tiles) > 100
        assert network.connections == 1
