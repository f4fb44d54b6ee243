"""Several worker processes on one port: one copy of the pixels, an even load, and a death that nobody notices."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tests.integration.images import expected_tile, random_pixels, write_image
from tests.integration.processes import ServerProcess, has_ended, health_of, wait_until, workers
from tests.integration.test_lifecycle import NOT_SERVING, SERVING, Reader, readers_of

from ome_tensor import OmeTensorError, Rebalance, Unavailable
from ome_tensor_client import channels, connect
from ome_tensor_client.connection import Connection
from ome_tensor_client.options import Options
from ome_tensor_client.tile_stream import TileStream
from ome_tensor_proto.methods import MAY_MOVE, METHODS, SERVICE
from ome_tensor_proto.status import to_status
from ome_tensor_proto.v1 import tensor_service_pb2 as pb
from ome_tensor_server import Settings, TensorServer
from ome_tensor_server.control import Control
from ome_tensor_server.finding import find_sources

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


def kill(processes: list[psutil.Process]) -> None:
    """Without a warning, and gone when this returns."""
    for process in processes:
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: all(map(has_ended, processes)), "the workers are dead")


def wait_replaced(server: ServerProcess, dead: list[psutil.Process]) -> None:
    """Until as many workers as there were take calls again."""
    pids = {process.pid for process in dead}
    wait_until(
        lambda: not pids & {worker.pid for worker in workers(server)} and None not in reads(server), "the workers are replaced"
    )


def are_whole(readers: list[Reader], pixels: np.ndarray) -> None:
    """Every reader gets to its end, with every tile, each once."""
    for reader in readers:
        reader.join(60)
        assert reader.error is None
        assert sorted(tile.number for tile in reader.tiles) == list(range(128))
        for tile in reader.tiles:
            np.testing.assert_array_equal(tile.array, expected_tile(pixels, tile))


def reads(server: ServerProcess) -> list[int | None]:
    """How many long reads each worker says it serves."""
    files = Path(f"/proc/{server.process.pid}/fd").iterdir()
    control = next(file for file in files if "memfd:ome-tensor-control" in os.readlink(file))
    with closing(Control(os.open(control, os.O_RDWR))) as opened:
        return opened.reads()


def test_reads_are_spread_evenly_and_sigterm_drains(start: Start, big_path: Path, big_pixels: np.ndarray) -> None:
    """Whatever worker the kernel picks for a connection, no worker has more to do than another; all streams end whole."""
    server = start(big_path, "--grace-seconds", "60")
    readers, go_on = readers_of(server, 4)
    assert reads(server) == [2, 2]
    processes = workers(server)
    server.terminate()
    go_on.set()
    are_whole(readers, big_pixels)
    assert server.process.wait(30) == 0
    assert all(map(has_ended, processes))


@pytest.mark.slow
def test_workers_that_were_replaced_drain_too(start: Start, big_path: Path, big_pixels: np.ndarray) -> None:
    """SIGTERM gives the streams of workers that took a dead one's place the same grace as those of the first."""
    server = start(big_path, "--grace-seconds", "60")
    victims = workers(server)
    kill(victims)
    wait_replaced(server, victims)
    readers, go_on = readers_of(server, 4)
    processes = workers(server)
    server.terminate()
    # A worker that is told twice ends at once; it must be waiting for its streams.
    time.sleep(1)
    assert not any(map(has_ended, processes))
    go_on.set()
    are_whole(readers, big_pixels)
    assert server.process.wait(30) == 0
    assert all(map(has_ended, processes))


def test_a_worker_that_dies_is_replaced_and_nobody_notices(start: Start, big_path: Path, big_pixels: np.ndarray) -> None:
    """kill -9 of both, one after the other, in the middle of a stream: every tile arrives, once and in order."""
    server = start(big_path)
    victims = workers(server)
    with connect(server.target, retry_for=30, transport="tcp") as client:
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
        with connect(server.target, transport="tcp") as client:
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


# --- replacing a worker -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_new_worker_is_ready_before_it_is_reached(start: Start, image_path: Path) -> None:
    """While workers are killed one after the other, health may find nobody at the instant of a death, but never a worker that has no data yet."""
    server = start(image_path)
    seen: list[int | None] = []
    stop = threading.Event()

    def poll() -> None:
        while not stop.is_set():
            seen.append(health_of(server.target, SERVICE))

    poller = threading.Thread(target=poll)
    poller.start()
    try:
        for _ in range(4):
            victims = workers(server)[:1]
            kill(victims)
            wait_replaced(server, victims)
    finally:
        stop.set()
        poller.join(20)
    assert SERVING in seen
    assert NOT_SERVING not in seen


def test_nothing_of_the_workers_lies_where_it_may_be_cleaned_away(
    start: Start, image_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The temporary folder is empty while workers run, so whatever cleans it, a dead one is replaced."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    server = start(image_path)
    assert list(folder.iterdir()) == []
    folder.rmdir()
    victims = workers(server)
    kill(victims)
    wait_replaced(server, victims)
    with connect(server.target, retry_for=10) as client:
        assert [dataset.name for dataset in client.datasets()] == ["image"]


def test_workers_that_cannot_start_are_an_error(image_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that says why, and no address that nobody listens on."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'ome_tensor_server.worker' in sys.orig_argv:\n"
        "    os.write(2, b'a line before\\nthere is no room\\n')\n"
        "    os._exit(3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    command = [sys.executable, "-m", "ome_tensor_client", "serve", str(image_path), "--listen", "127.0.0.1:0"]
    command += ["--workers", "2", "--store", str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert re.search(r"no worker can be started: .*ended with status 3: there is no room$", line)


def test_a_worker_that_is_told_to_go_takes_no_new_clients_and_sends_its_own_away(
    start: Start, big_path: Path, big_pixels: np.ndarray
) -> None:
    """SIGTERM of one of two: its stream ends whole, clients that were connected to it reach the other one, and another takes its place."""
    server = start(big_path, "--grace-seconds", "60")
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(server.target, retry_for=5, transport="tcp")) for _ in range(8)]
        for client in clients:
            client.datasets()
        readers, go_on = readers_of(server, 1)
        busy = reads(server).index(1)
        (worker,) = (one for one in workers(server) if json.loads(one.cmdline()[-1])["worker"] == busy)
        worker.send_signal(signal.SIGTERM)
        wait_until(lambda: reads(server)[busy] is None, "the worker drains")
        assert [health_of(server.target, SERVICE) for _ in range(16)] == [SERVING] * 16
        for client in clients:
            assert client.tensor_view("big", z=0, c=0, roi=(0, 0, 8, 8)).to_numpy().shape[-2:] == (8, 8)
        assert not has_ended(worker)
        go_on.set()
        are_whole(readers, big_pixels)
        wait_replaced(server, [worker])
    assert "Traceback" not in server.log.read_text()
    assert "Failed accept" not in server.log.read_text()


# --- moving to another worker -------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The targets of all channels that clients open."""
    found: list[str] = []
    open_channel = grpc.insecure_channel

    def counted(target: str, options: Any = None) -> grpc.Channel:
        found.append(target)
        return open_channel(target, options=options)

    monkeypatch.setattr(channels.grpc, "insecure_channel", counted)
    return found


def at_once(count: int, do: Callable[[int], object]) -> None:
    """Do something on several threads; raises what one of them raised."""
    with futures.ThreadPoolExecutor(count) as threads:
        list(threads.map(do, range(count)))


@pytest.mark.parametrize("clients", [1, 4])
def test_short_reads_stay_where_they_are(start: Start, big_path: Path, opened: list[str], clients: int) -> None:
    """However many there are at one moment at one worker: a connection is opened once."""
    server = start(big_path)
    with ExitStack() as stack:
        connected = [stack.enter_context(connect(server.target, transport="tcp")) for _ in range(clients)]
        opened.clear()

        def read(number: int) -> None:
            for _ in range(50):
                connected[number % clients].tensor_view("big", z=0, c=0, roi=(64, 64, 256, 256)).to_numpy()

        at_once(4, read)
        assert opened == [server.target] * clients


@pytest.mark.slow
def test_one_client_moves_seldom_and_keeps_no_idle_connection(start: Start, big_path: Path, opened: list[str]) -> None:
    """Four threads that share a client, long reads one after the other: it is asked to move all the time, and does so for a moment at most."""
    server = start(big_path)
    with connect(server.target, transport="tcp") as client:
        client.datasets()
        opened.clear()
        began = time.monotonic()
        at_once(4, lambda _: [client.tensor_view("big").to_numpy() for _ in range(4)])
        rounds = 1 + (time.monotonic() - began) // channels._SETTLED_SECONDS
        assert len(opened) <= channels._MOST_MOVES * rounds
        assert client._connection.channels.count == 1


def test_long_reads_are_sent_only_to_workers_that_take_calls(big_path: Path, opened: list[str]) -> None:
    """Another worker is worth a new connection where it serves at least two long reads less, and never while it starts, drains or is dead."""
    control = Control.create(2)
    server = TensorServer(Settings(listen="127.0.0.1:0", store="none"), worker=0, control=control)
    target = server.start()
    try:
        server.load(find_sources([big_path]))
        with ExitStack() as stack:
            held = []

            def connections_of_one_more(elsewhere: int | None) -> int:
                control.report(1, elsewhere)
                opened.clear()
                tiles = stack.enter_context(connect(target)).tensor_view("big", t=[0] * 8).iter_tiles_3d(tile_size=(1, 256, 256))
                next(tiles)
                held.append(tiles)
                assert control.reads() == [len(held), elsewhere]
                return len(opened)

            stays, moves = 1, 1 + channels._MOST_MOVES
            assert [connections_of_one_more(None) for _ in range(3)] == [stays] * 3
            assert connections_of_one_more(2) == moves
            assert connections_of_one_more(4) == stays
            assert connections_of_one_more(6) == stays
        wait_until(lambda: control.reads() == [0, 6], "what was read is not counted any more")
    finally:
        server.stop(grace=0)
    assert control.reads() == [None, 6]
    control.close()


@contextmanager
def refusing(error: OmeTensorError) -> Iterator[tuple[str, list[bool]]]:
    """A server that answers every read with an error, and what each call said of moving."""
    offers: list[bool] = []

    def answer(data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        offers.append(MAY_MOVE in dict(context.invocation_metadata()))
        context.abort_with_status(to_status(error))
        yield b""

    method = METHODS["ReadTiles"]
    server = grpc.server(futures.ThreadPoolExecutor(2))
    handlers = {method.name: grpc.unary_stream_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", offers
    finally:
        server.stop(0).wait()


def read_all(connection: Any) -> None:
    """A read of one tile, without asking for its description first."""
    with closing(TileStream(connection, pb.ReadTilesRequest(keys=["image"]), expected=1)) as stream:
        list(stream)


def test_a_server_that_always_sends_reads_away() -> None:
    """A few moves, and then it is an error like any other: within the time for retries."""
    with refusing(Rebalance("elsewhere")) as (target, offers), closing(Connection(target, Options(retry_for=1))) as connection:
        began = time.monotonic()
        with pytest.raises(Unavailable, match="sends this read away"):
            read_all(connection)
        assert time.monotonic() - began < 1 + 5
        moves = channels._MOST_MOVES
        assert offers[:moves] == [True] * moves
        # Then by the backoff, which doubles from 50 ms on; and the next read is not offered to move so soon.
        assert len(offers[moves:]) < 10
        del offers[:]
        with pytest.raises(Unavailable, match="sends this read away"):
            read_all(connection)
        assert not any(offers)
        assert connection.channels.count <= 1


def test_a_refused_call_tries_another_connection(opened: list[str]) -> None:
    """Of several workers on one port the next connection may reach another one; a channel would go back to the same."""
    with (
        refusing(Unavailable("shutting down")) as (target, offers),
        closing(Connection(target, Options(retry_for=1))) as connection,
    ):
        with pytest.raises(Unavailable, match="shutting down"):
            read_all(connection)
        assert len(opened) == len(offers) > 2
        assert connection.channels.count == 0
