"""Uploads that take the place of others: until the new one is served, the old one is not gone."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.integration.images import random_pixels, record_of
from tests.integration.processes import wait_until

from ome_tensor import Cancelled, DatasetNotFound, LimitExceeded
from ome_tensor.listing import DatasetState
from ome_tensor_client import Client, connect
from ome_tensor_server.testing import running_server

#: 0.5 MB each.
OLD, NEW = random_pixels((1, 500, 500), seed=1), random_pixels((1, 500, 500), seed=2)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".ome-tensor-uploads")


def read(client: Client) -> np.ndarray:
    return client.tensor_view("up", layout="CYX").to_numpy()


def test_what_could_never_be_loaded_is_refused(tmp_path: Path) -> None:
    """A server of 2 MB takes no upload of 5 MB; what it was to replace is served on, after a restart too."""
    large = pa.table({"image": pa.array([record_of(np.zeros((1, 1, 1, 1600, 1600), np.uint16))])})
    options: dict[str, Any] = {
        "uploads": str(tmp_path / "uploads"),
        "memory_limit": "2M",
        "decode_cache_bytes": 1 << 18,
        "preload": False,
    }
    with running_server([], **options) as server, connect(server.target) as client:
        client.upload("up", OLD)
        np.testing.assert_array_equal(read(client), OLD)
        for name, replace in (("up", True), ("other", False)):
            with pytest.raises(
                LimitExceeded, match=r"takes 4\.8\d+ MiB when it is loaded, and this server keeps at most"
            ) as caught:
                client.upload(name, large, replace=replace)
            assert caught.value.field == "memory_limit"
        np.testing.assert_array_equal(read(client), OLD)
        assert files(tmp_path / "uploads") == ["up.arrows"]
    with running_server([], **options) as server, connect(server.target) as client:
        assert [one.name for one in client.datasets()] == ["up"]
        np.testing.assert_array_equal(read(client), OLD)


@contextmanager
def slow_addresses(folder: Path) -> Iterator[tuple[str, threading.Event]]:
    """A web server of a folder that gives chunks only once an event is set."""
    go_on = threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            if self.path.endswith("/0.0"):
                go_on.wait(30)
            super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", go_on
    finally:
        go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_replacement_that_is_given_up(tmp_path: Path) -> None:
    """Two loads of slow addresses have their turn. What waits for its own can be given up, and then all is as it was, and after a restart too."""
    zarr = pytest.importorskip("zarr")
    for name in "ab":
        zarr.create_array(tmp_path / "web" / f"{name}.zarr", shape=(64, 64), chunks=(64, 64), dtype="uint8", zarr_format=2)[:] = 1
    uploads = tmp_path / "uploads"
    with slow_addresses(tmp_path / "web") as (where, go_on):
        sources = [f"{where}/{name}.zarr" for name in "ab"]
        with (
            running_server(sources, uploads=str(uploads), preload=False) as server,
            connect(server.target, retry_for=0) as client,
            ThreadPoolExecutor() as threads,
        ):
            client.upload("up", OLD)
            np.testing.assert_array_equal(read(client), OLD)
            client.upload("other", OLD)
            slow = [threads.submit(client.admin.load, name) for name in "ab"]
            wait_until(lambda: all(client.dataset(name).state is DatasetState.LOADING for name in "ab"), "both are being loaded")
            replacing = threads.submit(client.upload, "up", NEW, replace=True)
            wait_until(lambda: "up.arrows.before" in files(uploads), "the new one has its name")
            # Neither other uploads nor reads wait for it.
            client.upload("third", NEW)
            client.admin.remove("third")
            np.testing.assert_array_equal(read(client), OLD)
            assert client.admin.cancel_load("up")
            with pytest.raises(Cancelled):
                replacing.result(20)
            np.testing.assert_array_equal(read(client), OLD)
            assert files(uploads) == ["other.arrows", "up.arrows"]
            # One that is removed is removed: not held up by what is to take its place.
            replacing = threads.submit(client.upload, "up", NEW, replace=True)
            wait_until(lambda: "up.arrows.before" in files(uploads), "the new one has its name")
            client.admin.remove("up")
            with pytest.raises((Cancelled, DatasetNotFound)):
                replacing.result(20)
            client.upload("up", OLD)
            go_on.set()
            for one in slow:
                one.result(20)
            client.upload("up", NEW, replace=True)
            np.testing.assert_array_equal(read(client), NEW)
    with running_server([], uploads=str(uploads)) as server, connect(server.target) as client:
        np.testing.assert_array_equal(read(client), NEW)
    assert files(uploads) == ["other.arrows", "up.arrows"]


@pytest.mark.parametrize("moment", ["kept", "renamed", "moved"])
def test_a_server_that_ends_while_one_takes_the_place_of_another(tmp_path: Path, moment: str) -> None:
    """Nobody was told that the new one is there: the old one is."""
    uploads = tmp_path / "uploads"
    with running_server([], uploads=str(uploads)) as server, connect(server.target) as client:
        client.upload("new", NEW)
        client.upload("up", OLD)
    up, before, new = uploads / "up.arrows", uploads / "up.arrows.before", uploads / "new.arrows"
    if moment == "moved":
        # Where there are no links.
        up.rename(before)
    else:
        os.link(up, before)
    if moment != "kept":
        new.rename(up)
    else:
        new.unlink()
    (uploads / "123-4.part").write_bytes(b"half")
    with running_server([], uploads=str(uploads)) as server, connect(server.target) as client:
        np.testing.assert_array_equal(read(client), OLD)
        assert files(uploads) == ["up.arrows"]


def test_two_servers_of_one_folder(tmp_path: Path, server_log: pytest.LogCaptureFixture) -> None:
    """The second one leaves alone what the first is receiving."""
    uploads = tmp_path / "uploads"
    with running_server([], uploads=str(uploads)):
        (uploads / "123-4.part").write_bytes(b"half")
        with running_server([], uploads=str(uploads)):
            assert files(uploads) == ["123-4.part"]
        assert any("another server takes uploads into" in record.getMessage() for record in server_log.records)
