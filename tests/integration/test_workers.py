"""Several worker processes on one port: one copy of the pixels, an even load, and a death that nobody notices."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.integration.images import expected_tile, random_pixels, write_image
from tests.integration.processes import ServerProcess, wait_until
from tests.integration.test_lifecycle import readers_of

from ome_tensor_client import connect
from ome_tensor_server.control import Control

psutil = pytest.importorskip("psutil")

Start = Callable[..., ServerProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a server of two workers on a store of this test's."""
    running: list[ServerProcess] = []

    def make(path: Path, *flags: str) -> ServerProcess:
        store = str(tmp_path / "store")
        server = ServerProcess(path, tmp_path / f"log{len(running)}", "--workers", "2", "--store", store, *flags)
        running.append(server)
        return server.wait_serving()

    yield make
    for server in running:
        children = psutil.Process(server.process.pid).children() if server.process.poll() is None else []
        server.__exit__()
        # Workers follow their supervisor, however it ended.
        wait_until(lambda children=children: all(map(has_ended, children)), "the workers end")


def workers(server: ServerProcess) -> list[psutil.Process]:
    """The worker processes."""
    return psutil.Process(server.process.pid).children()


def has_ended(process: psutil.Process) -> bool:
    """Whether it runs no more; one that nobody has reaped yet counts as ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def reads(server: ServerProcess) -> list[int]:
    """How many reads each worker says it serves."""
    instructions = json.loads(workers(server)[0].cmdline()[-1])
    return Control(Path(instructions["control"])).reads()


def test_reads_are_spread_evenly_and_sigterm_drains(start: Start, big_path: Path, big_pixels: np.ndarray) -> None:
    """Whatever worker the kernel picks for a connection, no worker has more to do than another; all streams end whole."""
    server = start(big_path, "--grace-seconds", "60")
    readers, go_on = readers_of(server, 4)
    assert reads(server) == [2, 2]
    processes = workers(server)
    server.terminate()
    go_on.set()
    for reader in readers:
        reader.join(60)
        assert reader.error is None
        assert len(reader.tiles) == len({tile.number for tile in reader.tiles})
        for tile in reader.tiles:
            np.testing.assert_array_equal(tile.array, expected_tile(big_pixels, tile))
    assert server.process.wait(30) == 0
    assert all(map(has_ended, processes))


def test_a_worker_that_dies_is_replaced_and_nobody_notices(start: Start, big_path: Path, big_pixels: np.ndarray) -> None:
    """kill -9 of both, one after the other, in the middle of a stream: every tile arrives, once and in order."""
    server = start(big_path)
    victims = workers(server)
    with connect(server.target, retry_for=30) as client:
        tiles = client.tensor_view("big").iter_tiles(tile_size=(64, 64))
        got = [next(tiles)]
        for victim in victims:
            victim.send_signal(signal.SIGKILL)
            victim.wait(10)
            got += [next(tiles) for _ in range(40)]
        got += tiles
    assert [tile.number for tile in got] == list(range(len(got)))
    for tile in got:
        np.testing.assert_array_equal(tile.array, expected_tile(big_pixels, tile))
    wait_until(lambda: len(workers(server)) == 2, "both workers are replaced")
    assert not {worker.pid for worker in workers(server)} & {victim.pid for victim in victims}


def own_memory(process: psutil.Process) -> int:
    """Bytes that are a process's alone: not a mapped file's, which are the page cache's."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)[1])


@pytest.mark.slow
def test_workers_share_one_copy_of_the_pixels(start: Start, tmp_path: Path) -> None:
    """A worker that has read the whole dataset, over and over, has not got it in memory of its own."""
    # Large beside what glibc keeps of freed messages.
    pixels = random_pixels((1, 16, 2, 2048, 2048))
    server = start(write_image(tmp_path / "large.ome.parquet", pixels))
    before = [own_memory(worker) for worker in workers(server)]
    for _ in range(4):
        with connect(server.target) as client:
            np.testing.assert_array_equal(client.tensor_view("large", layout="TZCYX").to_numpy(), pixels)
    after = [own_memory(worker) for worker in workers(server)]
    mapped = [[entry.path for entry in worker.memory_maps() if entry.path.endswith(".arrow")] for worker in workers(server)]
    assert mapped[0] == mapped[1]
    assert len(mapped[0]) == 1
    assert max(late - early for early, late in zip(before, after, strict=True)) < pixels.nbytes // 2


def test_a_restart_maps_what_is_there(start: Start, big_path: Path, big_pixels: np.ndarray, tmp_path: Path) -> None:
    """The same file of the store serves the next start."""
    files = tmp_path / "store"
    server = start(big_path)
    (before,) = files.glob("*.arrow")
    inode = before.stat().st_ino
    server.terminate()
    assert server.process.wait(30) == 0
    again = start(big_path)
    (after,) = files.glob("*.arrow")
    assert after.stat().st_ino == inode
    with connect(again.target) as client:
        np.testing.assert_array_equal(client.tensor_view("big", layout="TZCYX").to_numpy(), big_pixels)


def test_workers_end_with_their_supervisor(start: Start, big_path: Path) -> None:
    """kill -9 of the supervisor leaves no orphan on the port."""
    server = start(big_path)
    processes = workers(server)
    server.kill()
    wait_until(lambda: all(map(has_ended, processes)), f"the workers end; {server.log.read_text()}")
