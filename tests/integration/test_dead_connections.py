"""A connection that is open and brings nothing any more, as one whose frames a flipped bit has put out of step: left after one wait in vain."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from tests.integration.images import random_pixels, write_image
from tests.integration.network import Network, Trouble
from tests.integration.processes import ServerProcess
from tests.integration.proxy import Proxy

from ome_tensor import DeadlineExceeded
from ome_tensor_client import Client, connect

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
