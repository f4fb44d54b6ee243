"""The clients of :mod:`benchmarks.concurrency`: processes of many streams, and one of single reads."""

from __future__ import annotations

import gc
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from ome_tensor_proto.memory import keep_blocks
from ome_tensor_proto.methods import METHODS

from .children import PATIENCE, sleep_until
from .peers.base import TILE

__all__ = ["BEGIN_SECONDS", "READ_SECONDS", "Begun", "Load", "Window", "read_singly", "read_streams"]

_KEY = "image"

#: Streams that have no message after so many seconds are lost: gRPC's core cancels a call that its server has not taken up in 30.
BEGIN_SECONDS = 35.0

#: Between single reads, in seconds: they are to feel the load, not to be it.
_PAUSE = 0.01

#: A single read that takes longer counts as this long.
READ_SECONDS = 20.0


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


def read_streams(pipe: Connection) -> None:
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
        sleep_until(go)
        for thread in threads:
            thread.start()
        begun = [stream.begun.wait(max(0.0, go + BEGIN_SECONDS - time.monotonic())) for stream in streams]
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
            thread.join(PATIENCE / 2)
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
        grpc.channel_ready_future(self._channel).result(PATIENCE / 2)

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


def read_singly(pipe: Connection, npy: Path) -> None:
    """A process that reads random 256² windows of one plane, one after the other, with this project's client, and compares each."""
    from ome_tensor.errors import DeadlineExceeded
    from ome_tensor_client import connect

    image = np.load(npy, mmap_mode="r")
    rng = np.random.default_rng(11)
    _, nz, nc, ny, nx = image.shape
    while True:
        target: str = pipe.recv()
        with connect(target, transport="tcp", timeout=READ_SECONDS) as client:
            # Connected, and the image is known: what follows is one round trip each.
            client.tensor_view(_KEY, t=0, z=0, c=0, roi=(0, 0, TILE, TILE), layout="YX").to_numpy()
            pipe.send("ready")
            window: Window = pipe.recv()
            sleep_until(window.begin)
            latencies = []
            while time.monotonic() < window.end:
                z, c, y, x = (int(rng.integers(n)) for n in (nz, nc, ny - TILE + 1, nx - TILE + 1))
                start = time.perf_counter()
                try:
                    got = client.tensor_view(_KEY, t=0, z=z, c=c, roi=(x, y, TILE, TILE), layout="YX").to_numpy()
                except DeadlineExceeded:
                    latencies.append(READ_SECONDS)
                    continue
                latencies.append(time.perf_counter() - start)
                if not np.array_equal(got, image[0, z, c, y : y + TILE, x : x + TILE]):
                    raise AssertionError(f"the window at {z, c, y, x} is not what NumPy gives")
                time.sleep(_PAUSE)
        pipe.send(latencies)
