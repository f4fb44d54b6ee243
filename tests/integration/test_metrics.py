"""What a server tells of itself: the same as its clients have counted."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.integration.images import random_pixels, write_image
from tests.integration.processes import ServerProcess, wait_until, workers

from ome_tensor import DatasetNotFound, InvalidArgument
from ome_tensor_client import Client, connect
from ome_tensor_client.read_stats import ReadStats
from ome_tensor_client.tile_stream import TileStream
from ome_tensor_proto.v1 import tensor_service_pb2 as pb
from ome_tensor_proto.v1 import view_pb2
from ome_tensor_server import http_port
from ome_tensor_server.app import TensorServer
from ome_tensor_server.finding import find_sources
from ome_tensor_server.meters import Meters
from ome_tensor_server.settings import Settings
from ome_tensor_server.testing import RunningServer, running_server


@pytest.fixture
def watched(image_path: Path) -> Iterator[RunningServer]:
    with running_server([image_path], metrics="127.0.0.1:0") as server:
        yield server


def get(address: str | None, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def scraped(address: str | None) -> dict[tuple[str, str], float]:
    """Numbers by name and labels."""
    status, text = get(address, "/metrics")
    assert status == 200
    return {
        (sample.name, json.dumps(sample.labels, sort_keys=True)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def count(found: dict[tuple[str, str], float], name: str, **labels: str) -> float:
    return sum(
        value
        for (one, text), value in found.items()
        if one == f"ome_tensor_{name}" and labels.items() <= json.loads(text).items()
    )


def read_counted(client: Client, target: str, key: str = "image") -> ReadStats:
    """Read all tiles of an image, and count."""
    stats = ReadStats()
    shape = client.tensor_view(key, layout="TZCYX").shape
    tiles = -(-shape[3] // 64) * -(-shape[4] // 64)
    request = pb.ReadTilesRequest(keys=[key], tiling=view_pb2.Tiling(tiles=view_pb2.TilesCut(h=64, w=64)))
    for _ in TileStream(client._connection, request, tiles, stats):
        pass
    assert stats.tiles == tiles
    return stats


def test_a_server_counts_what_its_client_counts(watched: RunningServer) -> None:
    before = scraped(watched.server.metrics_address)
    with connect(watched.target, transport="tcp") as client:
        reads = [read_counted(client, watched.target) for _ in range(3)]
        for _ in range(4):
            with pytest.raises(DatasetNotFound):
                client.dataset("absent")
    # A call is over for its client a moment before it is for the server.
    wait_until(lambda: count(scraped(watched.server.metrics_address), "calls_running") == 0, "all calls are over")
    now = scraped(watched.server.metrics_address)

    def grown(name: str, **labels: str) -> float:
        return count(now, name, **labels) - count(before, name, **labels)

    assert grown("tiles_total") == sum(read.tiles for read in reads)
    assert grown("messages_total") == sum(read.messages for read in reads)
    # ResolveView's and GetDataset's answers are bytes, too.
    assert 0 <= grown("sent_bytes_total") - sum(read.nbytes for read in reads) < 20_000
    assert grown("calls_total", method="ReadTiles", code="OK") == 3
    assert grown("calls_total", method="GetDataset", code="NOT_FOUND") == 4
    assert grown("refused_total", reason="DATASET_NOT_FOUND") == 4
    assert grown("call_seconds_count", method="ReadTiles") == 3
    for phase in ("queue", "gather", "encode", "send"):
        assert grown("phase_seconds_count", phase=phase) == sum(read.messages for read in reads)
    assert count(now, "resident_bytes") == watched.catalogue.resident_bytes > 0
    assert count(now, "datasets", state="loaded") == 1
    assert count(now, "reads_running") == count(now, "in_flight_bytes") == 0


def test_the_page_and_the_call_say_the_same(watched: RunningServer) -> None:
    with connect(watched.target) as client:
        client.datasets()
        told = client.admin.metrics()
    page = scraped(watched.server.metrics_address)
    same = [
        sample
        for sample in told.samples
        if not sample.name.startswith(("ome_tensor_call", "ome_tensor_sent", "ome_tensor_received"))
    ]
    assert len(same) >= 12
    for sample in same:
        assert page[sample.name, json.dumps(sample.labels, sort_keys=True)] == sample.value, sample


def test_names_are_not_told(tmp_path: Path) -> None:
    """The port is for whoever watches, and not for those who may read."""
    path = write_image(tmp_path / "secret-plate.parquet", random_pixels((1, 1, 1, 8, 8)))
    with running_server([path], metrics="127.0.0.1:0") as server, connect(server.target) as client:
        client.tensor_view("secret-plate").to_numpy()
        assert "secret" not in get(server.server.metrics_address, "/metrics")[1]


def test_probes(watched: RunningServer) -> None:
    address = watched.server.metrics_address
    assert get(address, "/livez") == (200, "ok\n")
    assert get(address, "/readyz") == (200, "ok\n")
    assert get(address, "/")[0] == 404
    watched.server._service.drain()
    assert get(address, "/readyz") == (503, "not ready\n")
    assert get(address, "/livez")[0] == 200


def test_whoever_sends_nothing_holds_up_nobody(watched: RunningServer) -> None:
    host, _, port = str(watched.server.metrics_address).rpartition(":")
    before = set(threading.enumerate())
    idle = [socket.create_connection((host, int(port))) for _ in range(40)]
    try:
        assert all(one.send(b"GET /met") for one in idle[:20])
        time.sleep(0.5)
        # A thread for each of as many connections as it takes, 32. What else runs in this process may begin a few of its own.
        assert len(set(threading.enumerate()) - before) < 40
    finally:
        for one in idle:
            one.close()
    wait_until(lambda: get(watched.server.metrics_address, "/livez")[0] == 200, "the port answers")


def test_a_place_whose_thread_cannot_be_had_is_free_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host may be short of processes for a while."""
    port = http_port.HttpPort("127.0.0.1:0", lambda: b"", lambda: True)
    host, number = port.address.split(":")
    refused = []

    def refuse(*_: object) -> None:
        refused.append(1)
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(socketserver.ThreadingMixIn, "process_request", refuse)
        for _ in range(40):
            with socket.create_connection((host, int(number)), timeout=10) as connection:
                assert connection.recv(1) == b""
    assert len(refused) == 40
    assert get(port.address, "/livez")[0] == 200
    port.close()


def test_whoever_sends_a_byte_now_and_then_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_port, "_PATIENCE", 0.3)
    port = http_port.HttpPort("127.0.0.1:0", lambda: b"", lambda: True)
    host, number = port.address.split(":")
    slow = [socket.create_connection((host, int(number))) for _ in range(32)]
    try:
        began = time.monotonic()
        while time.monotonic() - began < 1.5:
            for one in slow:
                with suppress(OSError):
                    one.send(b"G" if time.monotonic() - began < 0.1 else b"E")
            time.sleep(0.1)
        assert get(port.address, "/livez")[0] == 200
    finally:
        for one in slow:
            one.close()
        port.close()


def test_a_port_that_is_taken(image_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InvalidArgument, match="cannot listen") as caught, running_server([image_path], metrics=listen):
            pass
        assert caught.value.field == "metrics"


def test_all_workers_are_counted_also_those_that_died(image_path: Path, tmp_path: Path) -> None:
    flags = ("--workers", "2", "--store", str(tmp_path / "store"), "--metrics", "127.0.0.1:0", "--log-level", "error")
    with ServerProcess(image_path, tmp_path / "log", *flags) as process:
        process.wait_serving()
        line = wait_until(lambda: next((x for x in process.log.read_text().split() if x.startswith("http://")), ""), "a page")
        address = line.removeprefix("http://").removesuffix("/metrics")
        tiles = 0
        for _ in range(8):
            with connect(process.target, transport="tcp") as client:
                tiles += read_counted(client, process.target).tiles
        wait_until(lambda: count(scraped(address), "tiles_total") == tiles, "all tiles are counted", 5)
        assert count(scraped(address), "workers") == 2
        assert get(address, "/readyz")[0] == 200
        before = workers(process)
        for worker in before:
            worker.kill()
        wait_until(lambda: len(found := workers(process)) == 2 and not set(found) & set(before), "new workers", 30)
        wait_until(lambda: get(address, "/readyz")[0] == 200, "they serve", 30)
        assert count(scraped(address), "tiles_total") == tiles
        with connect(process.target) as client:
            assert client.admin.metrics().total("tiles_total") == tiles
            np.testing.assert_array_equal(client.tensor_view("image").shape, client.tensor_view("image").to_numpy().shape)


def test_a_read_that_was_given_up_is_not_counted_as_running(tmp_path: Path) -> None:
    """Workers' numbers are read without asking them: each end of a read is written down."""
    meters = Meters()
    write_image(tmp_path / "big.parquet", random_pixels((1, 1, 1, 4096, 4096)))
    server = TensorServer(Settings(listen="127.0.0.1:0", store="none", preload=True), meters=meters)
    try:
        target = server.start()
        server.load(find_sources([tmp_path]))
        with connect(target, transport="tcp") as client:
            tiles = client.tensor_view("big").iter_batches(tile_size=(512, 512), batch_size=1)
            next(tiles)
            tiles.close()
        running = next(family for family in meters.families() if family.name == "ome_tensor_reads_running")
        wait_until(lambda: server.free_reads == server.settings.max_concurrent_reads, "the read has ended", 5)

        def now() -> float:
            return next(f for f in meters.families() if f.name == running.name).samples[0].value

        wait_until(lambda: now() == 0, "it is not counted any more", 2)
    finally:
        server.stop(grace=0)
