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
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .children import Child, sleep_until
from .concurrency_clients import BEGIN_SECONDS, READ_SECONDS, Begun, Load, Window, read_singly, read_streams
from .concurrency_servers import PEERS, SERVERS, SYNC
from .peers.base import TILE, Data, Shape
from .processes import MemoryWatch, cpu_seconds, private_bytes
from .report import environment, number, print_table, write_json
from .wire import make_files, turns
from .wire_data import FULL, QUICK

__all__ = ["CASES", "PEERS", "Case", "Reading", "Row", "Start", "fairness", "main", "run"]

#: Processes that the streams' clients are spread over: as many as this project's machines have cores. With one, the client would be measured.
_CLIENT_PROCESSES = 2

#: Seconds between letting the streams go on behind their first message, and the first byte that counts.
_RAMP, _QUICK_RAMP = 1.0, 0.3

#: Seconds before something begins in which the processes hear of it.
_NOTICE = 0.2

#: A request is for more than any server here could send in the time: a stream that ends by itself would be no equal of the others.
_MOST_BYTES_A_SECOND = 5e9

#: Most rounds of how streams begin where nobody waits.
_MOST_STARTS = 3

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
    work, more = SERVERS[peer]
    # One setting for everybody: the largest case, and room for the single reads.
    most = max(case.streams for case in CASES) + 8
    return Child(work, data.parquet, str(data.folder / "ome-tensor-store"), most, *more)


def _begin(loads: Sequence[Load], children: Sequence[Child]) -> Begun:
    """Connect every stream, then call all at once."""
    for child, load in zip(children, loads, strict=True):
        child.tell(load)
    for child in children:
        child.answer()
    go = time.monotonic() + _NOTICE
    for child in children:
        child.tell(go)
    found: list[Begun] = [child.answer(BEGIN_SECONDS) for child in children]
    return Begun(max(begun.seconds for begun in found), sum(begun.lost for begun in found))


def _end(children: Sequence[Child], what: Any) -> list[int]:
    """End all streams; bytes of each that read on."""
    for child in children:
        child.tell(what)
    return [nbytes for child in children for nbytes in child.answer()]


def begin_at_once(peer: str, case: Case, data: Data, clients: _Clients) -> Begun:
    """All streams of a case called and read at once, at a new server: how the last of them begin while it is busy with the first."""
    with _start(peer, data) as server:
        begun = _begin(_loads(case, server.answer(), data, 2 * BEGIN_SECONDS, wait=False), clients.streams)
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
            begun = _begin(_loads(case, target, data, ramp + seconds + READ_SECONDS, wait=True), clients.streams)
            if begun.lost:
                raise RuntimeError(f"{case.name}, {peer}: {begun.lost} streams did not begin")
            begin = time.monotonic() + _NOTICE + ramp
            window = Window(begin, begin + seconds)
            for child in (clients.single, *clients.streams):
                child.tell(window)
            sleep_until(window.begin)
            before = cpu_seconds(server.pid)
            sleep_until(window.end)
            cpu = cpu_seconds(server.pid) - before
            latencies = clients.single.answer(READ_SECONDS)
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
                median(a.rate / b.rate for a, b in zip(rounds, readings[case, SYNC], strict=True)),
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
            [stack.enter_context(Child(read_streams)) for _ in range(_CLIENT_PROCESSES)],
            stack.enter_context(Child(read_singly, data.npy)),
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
