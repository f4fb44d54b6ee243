"""A sync or an asyncio gRPC server: the same messages from both, to one stream, to 32, and to 256 of which 32 are stalled.

Three servers take turns, each in a process of its own that is new for each measurement, so that threads and memory are that measurement's:

* *sync*: this project's server as it is (``TensorServer``): a pool of threads, one for each stream.
* *asyncio, inline*: ``grpc.aio``; a stream's next message is produced on the event loop.
* *asyncio, executor*: the same, but produced in the loop's default executor.

What produces a message is the same function in all three, the service's own ``ReadTiles``: pixels of a mapped store gathered into messages of about
1 MiB. Each stream has a connection of its own, as separate clients have, and a thread of its own, in one of two client processes, which count bytes
and nothing else. Meanwhile another process reads single 256² windows, and compares each with NumPy: a stream's bytes are not looked at.

Streams go on behind their first message when all have it: bytes are those of equals. How long it takes until all have it where nobody waits, so
that the last call comes to a server that is busy with the first, is a table of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import numpy as np

from ome_tensor_proto.memory import keep_blocks
from ome_tensor_proto.methods import METHODS, ONE_MESSAGE, Method

from .peers.base import TILE, Data, Shape
from .processes import MemoryWatch, cpu_seconds, private_bytes
from .report import environment, number, print_table, write_json
from .wire import make_files, turns
from .wire_data import FULL, QUICK

__all__ = ["CASES", "Case", "Child", "Reading", "Row", "Start", "fairness", "main", "run"]

_KEY = "image"
_SYNC, _INLINE, _EXECUTOR = "sync", "asyncio, inline", "asyncio, executor"
PEERS = (_SYNC, _INLINE, _EXECUTOR)

#: Processes that the streams' clients are spread over: as many as this project's machines have cores. With one, the client would be measured.
_CLIENT_PROCESSES = 2

#: Seconds between letting the streams go on behind their first message, and the first byte that counts.
_RAMP, _QUICK_RAMP = 1.0, 0.3

#: Streams that have no message after so many seconds are lost: gRPC's core cancels a call that its server has not taken up in 30.
_BEGIN_SECONDS = 35.0

#: Seconds before something begins in which the processes hear of it.
_NOTICE = 0.2

#: A request is for more than any server here could send in the time: a stream that ends by itself would be no equal of the others.
_MOST_BYTES_A_SECOND = 5e9

#: Most rounds of how streams begin where nobody waits.
_MOST_STARTS = 3

#: Between single reads, in seconds: they are to feel the load, not to be it.
_PAUSE = 0.01

#: A single read that takes longer counts as this long.
_READ_SECONDS = 20.0

#: How long a process may take to answer beyond what it was asked to take, and to end.
_PATIENCE, _STOP_SECONDS = 60.0, 10.0

_MB, _MS = 1e6, 1e3


@dataclass(frozen=True)
class Case:
    """Streams at once.

    Attributes:
        streams: All of them.
        stalled: Those of them that read one message and then nothing.
    """

    streams: int
    stalled: int = 0

    @property
    def name(self) -> str:
        """As in the table."""
        many = f"{self.streams} stream{'s' * (self.streams != 1)}"
        return f"{many}, {self.stalled} stalled" if self.stalled else many


CASES = (Case(1), Case(32), Case(256, stalled=32))
_QUICK_CASES = (Case(1), Case(16, stalled=4))


@dataclass(frozen=True)
class Window:
    """When bytes count, by the clock that all processes share."""

    begin: float
    end: float


@dataclass(frozen=True)
class Load:
    """What one client process is to do.

    Attributes:
        target: The server.
        live: Of each stream that reads on, the tile it begins with: equals, but not all in the same place of the image.
        stalled: The same of those that stall.
        times: How often each stream asks for the image.
        wait: Whether streams wait for each other behind their first message.
    """

    target: str
    live: tuple[int, ...]
    stalled: tuple[int, ...]
    times: int
    wait: bool


@dataclass(frozen=True)
class Begun:
    """How streams began that were all called at once.

    Attributes:
        seconds: Until the last of them had its first message.
        lost: How many had none after 35 seconds.
    """

    seconds: float
    lost: int


@dataclass(frozen=True)
class Reading:
    """One case at one server in one round.

    Attributes:
        received: Bytes of each stream that was not stalled.
        seconds: In this time.
        server_cpu: The server's processor seconds.
        threads: Most threads it had.
        peak: Most private bytes it had above what it had before the first stream.
        latencies: Seconds of each single read.
    """

    received: tuple[int, ...]
    seconds: float
    server_cpu: float
    threads: int
    peak: int
    latencies: tuple[float, ...]

    @property
    def rate(self) -> float:
        """GB/s of all streams."""
        return sum(self.received) / self.seconds / 1e9

    @property
    def cost(self) -> float:
        """The server's processor seconds a GB."""
        return self.server_cpu / sum(self.received) * 1e9


@dataclass(frozen=True)
class Row:
    """A server's figures in one case: medians over rounds, single reads' over those of all rounds.

    Attributes:
        case, peer: Which.
        rate: GB/s of all streams.
        ratio: Times the sync server's rate in the same round.
        fairness: Jain's index over the streams that were not stalled: 1 where all got the same, 1/n where one got all; ``None`` for a single one.
        slowest: The slowest one's bytes over the fastest one's.
        cost: The server's processor seconds a GB.
        threads: The server's, at most.
        peak_mb: The server's private memory above what it held before, at most.
        p50_ms, p99_ms, reads: Of single reads meanwhile.
    """

    case: str
    peer: str
    rate: float
    ratio: float
    fairness: float | None
    slowest: float | None
    cost: float
    threads: float
    peak_mb: float
    p50_ms: float
    p99_ms: float
    reads: int


@dataclass(frozen=True)
class Start:
    """How the streams of a case begin at a server where none waits for the others.

    Attributes:
        case, peer: Which.
        seconds: Until the last has its first message: median over rounds.
        lost: Streams that had none after 35 seconds: in the worst round.
    """

    case: str
    peer: str
    seconds: float
    lost: int


def fairness(received: Sequence[float]) -> float:
    """Jain's index: the square of the sum over n times the sum of the squares; 1 where nobody got anything."""
    squares = sum(one * one for one in received)
    return sum(received) ** 2 / (len(received) * squares) if squares else 1.0


# -- processes ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Failed:
    """A child's answer where it failed."""

    why: str


class Child:
    """A process of this benchmark's: talks over a pipe, and ends when the pipe is closed, by :meth:`close` or because its parent is gone.

    Args:
        work: Called in it with the other end of the pipe and the arguments.
        arguments: What it needs; pickled.

    Attributes:
        pid: The process.
    """

    def __init__(self, work: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_guarded, args=(there, work, arguments), daemon=True)
        self._process.start()
        there.close()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def tell(self, what: Any) -> None:
        """Send it something."""
        self._pipe.send(what)

    def answer(self, within: float = 0.0) -> Any:
        """What it sends, waited for that many seconds and some patience. Raises RuntimeError with its traceback where it failed."""
        if not self._pipe.poll(within + _PATIENCE):
            raise RuntimeError(f"process {self.pid} has not answered within {within + _PATIENCE:g} s")
        try:
            found = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"process {self.pid} died") from None
        if isinstance(found, _Failed):
            raise RuntimeError(found.why)
        return found

    def close(self) -> None:
        """End it."""
        self._pipe.close()
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _guarded(pipe: Connection, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        work(pipe, *arguments)
    except (EOFError, BrokenPipeError):
        pass  # the parent is through with it
    except BaseException:
        pipe.send(_Failed(f"{work.__name__}: {traceback.format_exc()}"))


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


# -- servers -----------------------------------------------------------------------------------------------------------------------


def _settings(store: str) -> Any:
    from ome_tensor_server.settings import Settings

    # One for everybody: the largest case, and room for the single reads.
    return Settings(listen="127.0.0.1:0", store=store, preload=True, max_concurrent_reads=max(case.streams for case in CASES) + 8)


def _serve_sync(pipe: Connection, path: Path, store: str) -> None:
    """This project's server, until the pipe is closed."""
    from ome_tensor_server.app import TensorServer
    from ome_tensor_server.finding import find_sources

    keep_blocks()
    server = TensorServer(_settings(store))
    try:
        target = server.start()
        server.load(find_sources([path]))
        pipe.send(target)
        pipe.recv()
    finally:
        server.stop(0)


def _serve_asyncio(pipe: Connection, path: Path, store: str, executor: bool) -> None:
    """The same service behind ``grpc.aio``, until the pipe is closed."""
    keep_blocks()
    asyncio.run(_serve_on_loop(pipe, path, store, executor))


async def _serve_on_loop(pipe: Connection, path: Path, store: str, executor: bool) -> None:
    from ome_tensor.blocks import ChunkCache
    from ome_tensor_server import app
    from ome_tensor_server.catalogue import Shelves
    from ome_tensor_server.finding import find_sources
    from ome_tensor_server.house import House
    from ome_tensor_server.in_place import settings_readers
    from ome_tensor_server.service import TensorService
    from ome_tensor_server.usage import Usage

    settings, usage, sources = _settings(store), Usage(), find_sources([path])
    service = TensorService(settings, usage=usage)
    house = House(settings, usage, lambda entries, tables: None, None, sources)
    house.move_in(sources, lambda: False)
    shelves = Shelves(ChunkCache(settings.decode_cache_bytes, settings.max_chunk_bytes), settings_readers(settings))
    catalogue = shelves.catalogue(house.librarian.entries, house.librarian.tables)
    service.serve(catalogue, 0, lambda: None, house.office)
    server = grpc.aio.server(
        options=[*app._OPTIONS, ("grpc.so_reuseport", 0)],
        maximum_concurrent_rpcs=settings.max_concurrent_reads + app._METADATA_THREADS,
    )
    server.add_generic_rpc_handlers((_AsyncMethods(service.methods, _in_executor if executor else _inline),))
    port = server.add_insecure_port(settings.listen)
    await server.start()
    ended = asyncio.Event()
    # No thread that waits: threads are counted.
    asyncio.get_running_loop().add_reader(pipe.fileno(), ended.set)
    pipe.send(f"127.0.0.1:{port}")
    await ended.wait()
    asyncio.get_running_loop().remove_reader(pipe.fileno())
    await server.stop(0)


Run = Callable[..., Awaitable[Any]]


async def _inline(function: Callable[..., Any], *arguments: Any) -> Any:
    """On the loop, which does nothing else meanwhile."""
    return function(*arguments)


async def _in_executor(function: Callable[..., Any], *arguments: Any) -> Any:
    """In the loop's default executor, as whoever knows that the loop must not be blocked does it."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


class _Context:
    """What the service asks of a call's context, answered by asyncio's."""

    def __init__(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        self._context = context

    def is_active(self) -> bool:
        return not self._context.done()

    def peer(self) -> str:
        return self._context.peer()

    def invocation_metadata(self) -> Any:
        return self._context.invocation_metadata() or ()


class _AsyncMethods(grpc.GenericRpcHandler):
    """The service's functions as asyncio's handlers: what ``ome_tensor_server.rpc`` is for the sync server, less the errors of a wrong request.

    Args:
        methods: The functions by the contract's method names.
        run: How to call them.
    """

    def __init__(self, methods: Any, run: Run) -> None:
        from ome_tensor_server.authentication import Authenticator
        from ome_tensor_server.calls import Gate
        from ome_tensor_server.limits import Rates
        from ome_tensor_server.meters import Meters
        from ome_tensor_server.settings import Settings

        self._run = run
        self._gate = Gate(Authenticator(Settings()), Rates(Settings()), Meters())
        self._table = {}
        self._of_one_message = {}
        for name, method in METHODS.items():
            if method.streaming:
                self._table[method.path] = grpc.unary_stream_rpc_method_handler(self._streaming(method, methods[name]))
                self._of_one_message[method.path] = grpc.unary_unary_rpc_method_handler(
                    self._unary(method, lambda request, call, read=methods[name]: _only(read(request, call)))
                )
            else:
                self._table[method.path] = grpc.unary_unary_rpc_method_handler(self._unary(method, methods[name]))

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """See gRPC."""
        path = handler_call_details.method
        if path in self._of_one_message and any(name == ONE_MESSAGE for name, _ in handler_call_details.invocation_metadata):
            return self._of_one_message[path]
        return self._table.get(path)

    def _unary(self, method: Method, handler: Callable[..., Any]) -> Callable[..., Awaitable[bytes]]:
        from ome_tensor_server.calls import Call

        def answer(data: bytes, context: Any) -> bytes:
            answered = handler(method.request.FromString(data), Call(method.name, _Context(context), self._gate))  # type: ignore[arg-type]
            return answered if isinstance(answered, bytes) else answered.SerializeToString()

        async def respond(data: bytes, context: Any) -> bytes:
            return await self._run(answer, data, context)

        return respond

    def _streaming(self, method: Method, handler: Callable[..., Any]) -> Callable[..., Awaitable[None]]:
        from ome_tensor_server.calls import Call

        async def respond(data: bytes, context: Any) -> None:
            messages = handler(method.request.FromString(data), Call(method.name, _Context(context), self._gate))  # type: ignore[arg-type]
            # A cancelled stream leaves an executor's thread in the middle of a message: it is not closed before that is done.
            lock = threading.Lock()

            def produce() -> bytes | None:
                with lock:
                    return next(messages, None)

            try:
                while (message := await self._run(produce)) is not None:
                    await context.write(message)
            finally:
                with lock:
                    messages.close()

        return respond


def _only(messages: Iterator[bytes]) -> bytes:
    (message,) = messages
    return message


_SERVERS: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    _SYNC: (_serve_sync, ()),
    _INLINE: (_serve_asyncio, (False,)),
    _EXECUTOR: (_serve_asyncio, (True,)),
}


# -- clients -----------------------------------------------------------------------------------------------------------------------


def _read_streams(pipe: Connection) -> None:
    """A client process: of each load, how its streams began, and, where it is told when bytes count, those received by each."""
    keep_blocks()
    while True:
        received, failures = _perform(pipe, pipe.recv())
        # Calls are in cycles with their tracebacks, and each keeps a connection open: the next load is not to pay for them.
        gc.collect()
        if failures:
            raise RuntimeError(f"{len(failures)} streams were cut: {failures[0]}")
        pipe.send(received)


def _perform(pipe: Connection, load: Load) -> tuple[list[int], list[str]]:
    """Bytes of each stream that reads on, and why streams ended early that had begun."""
    streams = [_Stream(load, start, stalls=False) for start in load.live]
    streams += [_Stream(load, start, stalls=True) for start in load.stalled]
    with ExitStack() as stack:
        for stream in streams:
            stack.callback(stream.close)
        for stream in streams:
            stream.connect()
        pipe.send("ready")
        go: float = pipe.recv()
        threads = [threading.Thread(target=stream.read, daemon=True) for stream in streams]
        _sleep_until(go)
        for thread in threads:
            thread.start()
        begun = [stream.begun.wait(max(0.0, go + _BEGIN_SECONDS - time.monotonic())) for stream in streams]
        pipe.send(Begun(time.monotonic() - go, begun.count(False)))
        window: Window | None = pipe.recv()
        if window is not None:
            for stream in streams:
                stream.go_on(window)
            # Not before the single reads are through as well: the last one would be done only because the load is gone.
            pipe.recv()
        for stream in streams:
            stream.cancel()
        for thread in threads:
            thread.join(_PATIENCE / 2)
    cut = [stream.failure for stream in streams if stream.failure and stream.begun.is_set()]
    return [stream.received for stream in streams if not stream.stalls], cut


class _Stream:
    """One stream, on a connection of its own.

    Args:
        load: What it is part of.
        start: The tile it begins with.
        stalls: Whether it reads one message and then nothing.

    Attributes:
        begun: Set with the first message.
        received: Bytes that arrived while they counted.
        failure: Why it ended early; empty where it did not.
    """

    def __init__(self, load: Load, start: int, *, stalls: bool) -> None:
        from ome_tensor_client.connection import _CHANNEL_OPTIONS

        self._load, self._start, self.stalls = load, start, stalls
        self._channel = grpc.insecure_channel(load.target, options=_CHANNEL_OPTIONS)
        self._call: Any = None
        self._cancelled = False
        self._window: Window | None = None
        self._may_go_on = threading.Event()
        if not load.wait:
            self._may_go_on.set()
        self.begun = threading.Event()
        self.received = 0
        self.failure = ""

    def connect(self) -> None:
        """Wait for the connection."""
        grpc.channel_ready_future(self._channel).result(_PATIENCE / 2)

    def read(self) -> None:
        """Read until it is cancelled."""
        method: Any = self._channel.unary_stream(METHODS["ReadTiles"].path)
        self._call = method(_request(self._load.times, self._start))
        try:
            for message in self._call:
                self.begun.set()
                if self.stalls:
                    return
                self._may_go_on.wait()
                window, now = self._window, time.monotonic()
                if window is not None and window.begin <= now < window.end:
                    self.received += len(message)
            self.failure = "it ended by itself"
        except grpc.RpcError as error:
            if not self._cancelled:
                self.failure = str(error)

    def go_on(self, window: Window) -> None:
        """Read on, if it waits; bytes count in this time."""
        self._window = window
        self._may_go_on.set()

    def cancel(self) -> None:
        """End it, from any thread."""
        self._cancelled = True
        self._may_go_on.set()
        if self._call is not None:
            self._call.cancel()

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


def _request(times: int, start: int) -> bytes:
    """All 256² tiles of the image with its three channels, over and over."""
    from ome_tensor.plan import Plan
    from ome_tensor.tiling import Order, Tiling
    from ome_tensor_proto.codec import order_to_proto, plan_to_proto, tiling_to_proto
    from ome_tensor_proto.v1 import tensor_service_pb2 as pb

    return pb.ReadTilesRequest(
        keys=[_KEY],
        view=plan_to_proto(Plan.of({"t": [0] * times})),
        tiling=tiling_to_proto(Tiling.tiles_3d((1, TILE, TILE))),
        order=order_to_proto(Order(start=start)),
    ).SerializeToString()


def _read_singly(pipe: Connection, npy: Path) -> None:
    """A process that reads random 256² windows of one plane, one after the other, with this project's client, and compares each."""
    from ome_tensor.errors import DeadlineExceeded
    from ome_tensor_client import connect

    image = np.load(npy, mmap_mode="r")
    rng = np.random.default_rng(11)
    _, nz, nc, ny, nx = image.shape
    while True:
        target: str = pipe.recv()
        with connect(target, transport="tcp", timeout=_READ_SECONDS) as client:
            # Connected, and the image is known: what follows is one round trip each.
            client.tensor_view(_KEY, t=0, z=0, c=0, roi=(0, 0, TILE, TILE), layout="YX").to_numpy()
            pipe.send("ready")
            window: Window = pipe.recv()
            _sleep_until(window.begin)
            latencies = []
            while time.monotonic() < window.end:
                z, c, y, x = (int(rng.integers(n)) for n in (nz, nc, ny - TILE + 1, nx - TILE + 1))
                start = time.perf_counter()
                try:
                    got = client.tensor_view(_KEY, t=0, z=z, c=c, roi=(x, y, TILE, TILE), layout="YX").to_numpy()
                except DeadlineExceeded:
                    latencies.append(_READ_SECONDS)
                    continue
                latencies.append(time.perf_counter() - start)
                if not np.array_equal(got, image[0, z, c, y : y + TILE, x : x + TILE]):
                    raise AssertionError(f"the window at {z, c, y, x} is not what NumPy gives")
                time.sleep(_PAUSE)
        pipe.send(latencies)


# -- measurements ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Clients:
    """The processes that ask, for all measurements."""

    streams: Sequence[Child]
    single: Child


def _threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def _loads(case: Case, target: str, data: Data, seconds: float, *, wait: bool) -> list[Load]:
    """The streams of a case, dealt out to the client processes; to each its part of the stalled ones."""
    _, nz, nc, ny, nx = data.shape
    tiles = nz * (ny // TILE) * (nx // TILE)
    times = math.ceil(seconds * _MOST_BYTES_A_SECOND / (nz * nc * ny * nx * 2))
    starts = [number * tiles // case.streams for number in range(case.streams)]
    # Stalled ones are spread evenly among the others.
    stalled = {number * case.streams // case.stalled for number in range(case.stalled)}
    live = [start for number, start in enumerate(starts) if number not in stalled]
    rest = [start for number, start in enumerate(starts) if number in stalled]
    return [
        Load(target, tuple(live[first::_CLIENT_PROCESSES]), tuple(rest[first::_CLIENT_PROCESSES]), times, wait)
        for first in range(_CLIENT_PROCESSES)
    ]


def _start(peer: str, data: Data) -> Child:
    """A new server; its address is its first answer."""
    work, more = _SERVERS[peer]
    return Child(work, data.parquet, str(data.folder / "ome-tensor-store"), *more)


def _begin(loads: Sequence[Load], children: Sequence[Child]) -> Begun:
    """Connect every stream, then call all at once."""
    for child, load in zip(children, loads, strict=True):
        child.tell(load)
    for child in children:
        child.answer()
    go = time.monotonic() + _NOTICE
    for child in children:
        child.tell(go)
    found: list[Begun] = [child.answer(_BEGIN_SECONDS) for child in children]
    return Begun(max(begun.seconds for begun in found), sum(begun.lost for begun in found))


def _end(children: Sequence[Child], what: Any) -> list[int]:
    """End all streams; bytes of each that read on."""
    for child in children:
        child.tell(what)
    return [nbytes for child in children for nbytes in child.answer()]


def begin_at_once(peer: str, case: Case, data: Data, clients: _Clients) -> Begun:
    """All streams of a case called and read at once, at a new server: how the last of them begin while it is busy with the first."""
    with _start(peer, data) as server:
        begun = _begin(_loads(case, server.answer(), data, 2 * _BEGIN_SECONDS, wait=False), clients.streams)
        _end(clients.streams, None)
    return begun


def measure(peer: str, case: Case, data: Data, clients: _Clients, *, seconds: float, ramp: float) -> Reading:
    """One case at a new server."""
    with _start(peer, data) as server:
        target = server.answer()
        clients.single.tell(target)
        clients.single.answer()
        memory = MemoryWatch(server.pid, every=0.02, of=private_bytes)
        threads = MemoryWatch(server.pid, every=0.1, of=_threads)
        with memory, threads:
            begun = _begin(_loads(case, target, data, ramp + seconds + _READ_SECONDS, wait=True), clients.streams)
            if begun.lost:
                raise RuntimeError(f"{case.name}, {peer}: {begun.lost} streams did not begin")
            begin = time.monotonic() + _NOTICE + ramp
            window = Window(begin, begin + seconds)
            for child in (clients.single, *clients.streams):
                child.tell(window)
            _sleep_until(window.begin)
            before = cpu_seconds(server.pid)
            _sleep_until(window.end)
            cpu = cpu_seconds(server.pid) - before
            latencies = clients.single.answer(_READ_SECONDS)
        received = _end(clients.streams, "stop")
    return Reading(tuple(received), seconds, cpu, threads.peak[server.pid], memory.growth(server.pid), tuple(latencies))


def summary(readings: dict[tuple[str, str], list[Reading]]) -> list[Row]:
    """The table's rows from the rounds of each case and server."""
    rows = []
    for (case, peer), rounds in readings.items():
        if not all(map(sum, (reading.received for reading in rounds))):
            raise AssertionError(f"{case}, {peer}: nothing arrived")
        latencies = [latency for reading in rounds for latency in reading.latencies]
        several = len(rounds[0].received) > 1
        rows.append(
            Row(
                case,
                peer,
                median(reading.rate for reading in rounds),
                median(a.rate / b.rate for a, b in zip(rounds, readings[case, _SYNC], strict=True)),
                median(fairness(reading.received) for reading in rounds) if several else None,
                median(min(reading.received) / max(reading.received) for reading in rounds) if several else None,
                median(reading.cost for reading in rounds),
                median(reading.threads for reading in rounds),
                median(reading.peak for reading in rounds) / _MB,
                float(np.percentile(latencies, 50)) * _MS,
                float(np.percentile(latencies, 99)) * _MS,
                len(latencies),
            )
        )
    return rows


def starts(begun: dict[tuple[str, str], list[Begun]]) -> list[Start]:
    """The second table's rows."""
    return [
        Start(case, peer, median(one.seconds for one in rounds), max(one.lost for one in rounds))
        for (case, peer), rounds in begun.items()
    ]


def run(
    *, quick: bool = False, rounds: int | None = None, seconds: float | None = None, tell: Callable[[str], None] = lambda _: None
) -> tuple[list[Row], list[Start]]:
    """Measure everything."""
    shape: Shape = QUICK if quick else FULL
    rounds = rounds or (1 if quick else 5)
    seconds = seconds or (0.5 if quick else 5.0)
    cases = _QUICK_CASES if quick else CASES
    readings: dict[tuple[str, str], list[Reading]] = {(case.name, peer): [] for case in cases for peer in PEERS}
    # A single stream has nobody to wait for.
    begun: dict[tuple[str, str], list[Begun]] = {(case.name, peer): [] for case in cases[1:] for peer in PEERS}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        data = make_files(Path(folder, "noise"), shape, "noise", zarr=False)
        clients = _Clients(
            [stack.enter_context(Child(_read_streams)) for _ in range(_CLIENT_PROCESSES)],
            stack.enter_context(Child(_read_singly, data.npy)),
        )
        for case in cases:
            for turn, peer in turns(PEERS, rounds):
                tell(f"{case.name}, {peer}, round {turn + 1} of {rounds}")
                ramp = _QUICK_RAMP if quick else _RAMP
                readings[case.name, peer].append(measure(peer, case, data, clients, seconds=seconds, ramp=ramp))
        for case in cases[1:]:
            # It may take half a minute each time, and differs by far more than it varies.
            for turn, peer in turns(PEERS, min(rounds, _MOST_STARTS)):
                tell(f"{case.name} begin at once, {peer}, round {turn + 1}")
                begun[case.name, peer].append(begin_at_once(peer, case, data, clients))
    return summary(readings), starts(begun)


def show(rows: Sequence[Row], begun: Sequence[Start]) -> None:
    """Print the tables."""
    print_table(
        "Sync or asyncio server, the same messages; " + ", ".join(f"{name} {what}" for name, what in environment().items()),
        ("case", "server", "GB/s", "x sync", "fairness", "slowest", "server s/GB", "threads", "MB", "p50 ms", "p99 ms", "reads"),
        [
            (
                row.case,
                row.peer,
                *map(number, (row.rate, row.ratio, row.fairness, row.slowest, row.cost)),
                f"{row.threads:.0f}",
                *map(number, (row.peak_mb, row.p50_ms, row.p99_ms)),
                str(row.reads),
            )
            for row in rows
        ],
    )
    print(
        "fairness: Jain's index of the streams that are not stalled; slowest: its bytes over the fastest one's; MB: the server's private"
    )
    print(
        "memory above what it held before, at most; p50, p99: single 256² reads meanwhile, each a new call; reads: how many those were"
    )
    print_table(
        "All streams called at once, none waits for the others: seconds until the last has its first message",
        ("case", "server", "s", "without one after 35 s"),
        [(start.case, start.peer, number(start.seconds), str(start.lost)) for start in begun],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.concurrency", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="few streams, half a second, one round: shows that it works, not how fast anybody is"
    )
    parser.add_argument("--rounds", type=int, help="rounds that medians are taken over (5)")
    parser.add_argument("--seconds", type=float, help="how long bytes are counted (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(arguments)
    # For the processes started from here: each connection that ends with its server would have a line of its own.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    rows, begun = run(
        quick=options.quick, rounds=options.rounds, seconds=options.seconds, tell=lambda what: print(what, file=sys.stderr)
    )
    show(rows, begun)
    if options.json:
        write_json(
            options.json, "concurrency", {"cases": [asdict(row) for row in rows], "starts": [asdict(start) for start in begun]}
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
