"""A server's life: loading, serving, draining; what its callers see of each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.integration.images import expected_tile, random_pixels, write_image
from tests.integration.processes import ServerProcess, health_of, wait_until
from tests.integration.raw import raw_client, reason_of, request

from ome_tensor import InvalidArgument, OmeTensorError, Unavailable
from ome_tensor_client import connect
from ome_tensor_proto.methods import METHODS, SERVICE
from ome_tensor_server import Settings, TensorServer
from ome_tensor_server.finding import find_sources

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
Start = Callable[..., ServerProcess]


@pytest.fixture
def loading() -> Any:
    """A server that listens and has loaded nothing yet."""
    server = TensorServer(Settings(listen="127.0.0.1:0", store="none"))
    server.start()
    yield server
    server.stop(grace=0)


def test_health_while_loading(loading: TensorServer, image_path: Path) -> None:
    """NOT_SERVING until the data is there, then SERVING; per service, and for the server as a whole."""
    assert [health_of(loading.address, name) for name in ("", SERVICE)] == [NOT_SERVING] * 2
    loading.load(find_sources([image_path]))
    assert [health_of(loading.address, name) for name in ("", SERVICE)] == [SERVING] * 2


@pytest.mark.parametrize("name", METHODS)
def test_calls_while_loading(loading: TensorServer, name: str) -> None:
    """UNAVAILABLE, for every method: a proxy then tries elsewhere."""
    message = request() if METHODS[name].streaming else METHODS[name].request()
    with raw_client(loading.address) as raw, pytest.raises(grpc.RpcError) as caught:
        raw.read(message) if METHODS[name].streaming else raw.call(name, message)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert reason_of(caught.value)[0] == "UNAVAILABLE"


def test_a_client_waits_for_the_data(loading: TensorServer, image_path: Path, pixels: np.ndarray) -> None:
    """A job that starts together with its server needs no sleep in its script."""
    found: list[Any] = []
    with connect(loading.address, retry_for=30) as client:
        reader = threading.Thread(target=lambda: found.append(client.tensor_view("image", c=0).to_numpy()))
        reader.start()
        with raw_client(loading.address) as raw, pytest.raises(grpc.RpcError):
            raw.read(request())
        assert not found
        loading.load(find_sources([image_path]))
        reader.join(20)
    np.testing.assert_array_equal(found[0], pixels[:, :, :1], strict=True)


def test_impatient_clients_are_told(loading: TensorServer) -> None:
    """Without retries: the server's own words."""
    with connect(loading.address, retry_for=0) as client, pytest.raises(Unavailable, match="loading"):
        client.datasets()


def test_a_taken_port(loading: TensorServer) -> None:
    """Two servers on one port would each get half of the calls."""
    second = TensorServer(Settings(listen=loading.address, store="none"))
    with pytest.raises(InvalidArgument, match=loading.address):
        second.start()
    second.stop(grace=0)


def test_stopping_twice(image_path: Path) -> None:
    """Harmless, and also before anything was started."""
    server = TensorServer(Settings(listen="127.0.0.1:0", store="none"))
    server.start()
    server.stop()
    server.stop()
    server.wait(timeout=1)
    assert health_of(server.address) is None


def test_a_listener_on_ipv6(image_path: Path) -> None:
    """The bound address is one that a client can use as it is."""
    server = TensorServer(Settings(listen="[::1]:0", store="none"))
    try:
        address = server.start()
    except InvalidArgument:
        pytest.skip("this host has no IPv6 loopback")
    server.load(find_sources([image_path]))
    assert address.startswith("[::1]:")
    with connect(address) as client:
        assert [dataset.name for dataset in client.datasets()] == ["image"]
    server.stop(grace=0)


class Reader(threading.Thread):
    """Reads tiles: three, then waits until it is let go, then the rest. Its client does not retry, so that nothing can hide a loss.

    Attributes:
        tiles: What it has read.
        error: What ended it, if anything did.
    """

    def __init__(self, target: str, started: threading.Barrier, go_on: threading.Event, prefetch: int) -> None:
        super().__init__()
        self.tiles: list[Any] = []
        self.error: Exception | None = None
        self._server, self._begun, self._go_on, self._prefetch = target, started, go_on, prefetch

    def run(self) -> None:
        """Read."""
        try:
            with connect(self._server, retry_for=0, transport="tcp") as client:
                for tile in client.tensor_view("big").iter_tiles(
                    tile_size=(128, 128), shuffle=True, seed=4, prefetch=self._prefetch
                ):
                    self.tiles.append(tile)
                    if len(self.tiles) == 3:
                        self._begun.wait(30)
                        self._go_on.wait(60)
        except Exception as error:
            self.error = error
            self._begun.abort()


def readers_of(server: ServerProcess, count: int) -> tuple[list[Reader], threading.Event]:
    """Readers that are all in the middle of a stream, and what lets them go on."""
    started, go_on = threading.Barrier(count + 1), threading.Event()
    readers = [Reader(server.target, started, go_on, prefetch=number % 3) for number in range(count)]
    for reader in readers:
        reader.start()
    try:
        started.wait(30)
    except threading.BrokenBarrierError:
        raise AssertionError(f"not all readers began: {[reader.error for reader in readers]}") from None
    return readers, go_on


def test_sigterm_under_load_loses_no_tile(start_server: Start, big_path: Path, big_pixels: np.ndarray) -> None:
    """Health turns, new calls are refused, every running stream is delivered to its last tile, and the process ends with 0."""
    server = start_server(big_path, "--grace-seconds", "60").wait_serving()
    readers, go_on = readers_of(server, 5)
    with grpc.insecure_channel(server.target) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=60)
        assert next(watch).status == SERVING
        server.terminate()
        assert next(watch).status == NOT_SERVING
        watch.cancel()

    def refused() -> bool:
        with connect(server.target, retry_for=0) as client:
            try:
                client.datasets()
            except Unavailable:
                return True
            return False

    wait_until(refused, "new calls are refused")
    assert server.process.poll() is None, "it must wait for its streams"
    go_on.set()
    for reader in readers:
        reader.join(60)
        assert reader.error is None
        assert sorted(tile.number for tile in reader.tiles) == list(range(128))
        for tile in reader.tiles:
            np.testing.assert_array_equal(tile.array, expected_tile(big_pixels, tile), strict=True)
    assert server.process.wait(20) == 0
    log = server.log.read_text()
    assert log.count("method=ReadTiles") == 5
    assert "Traceback" not in log


def test_the_grace_period_ends(start_server: Start, big_path: Path, big_pixels: np.ndarray) -> None:
    """A reader that never comes back does not keep the server: it ends on time, and the reader gets an error, never a short read."""
    server = start_server(big_path, "--grace-seconds", "0.5").wait_serving()
    readers, go_on = readers_of(server, 2)
    began = time.monotonic()
    server.terminate()
    assert server.process.wait(20) == 0
    assert time.monotonic() - began < 0.5 + 8
    go_on.set()
    for reader in readers:
        reader.join(30)
        assert isinstance(reader.error, OmeTensorError)
        assert len(reader.tiles) < 128
        for tile in reader.tiles:
            np.testing.assert_array_equal(tile.array, expected_tile(big_pixels, tile), strict=True)


def test_sigterm_at_rest(start_server: Start, image_path: Path) -> None:
    """Nothing to wait for: it ends at once."""
    server = start_server(image_path).wait_serving()
    began = time.monotonic()
    server.terminate()
    assert server.process.wait(20) == 0
    assert time.monotonic() - began < 8
    assert "Traceback" not in server.log.read_text()


def test_one_bad_file_does_not_take_a_folder_off_the_air(start_server: Start, tmp_path: Path) -> None:
    """Left out with a warning; named itself, it is an error."""
    folder = tmp_path / "lab"
    folder.mkdir()
    write_image(folder / "good.ome.parquet", random_pixels((1, 1, 1, 4, 4)))
    (folder / "bad.parquet").write_bytes(b"PAR1 and then nothing")
    (folder / "notes.txt").write_text("not an image")
    server = start_server(folder).wait_serving()
    with connect(server.target) as client:
        assert [dataset.name for dataset in client.datasets()] == ["good"]
    assert "bad.parquet" in server.log.read_text()
    failed = start_server(folder / "bad.parquet")
    assert failed.process.wait(20) != 0
    assert "bad.parquet" in failed.log.read_text()
    assert "Traceback" not in failed.log.read_text()
