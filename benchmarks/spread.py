"""How evenly connections are spread over the workers of one port: by the kernel alone (SO_REUSEPORT), and long reads of our client by our server."""

from __future__ import annotations

import argparse
import os
import selectors
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

from ome_tensor_client import Client, connect
from ome_tensor_server.control import Control

from .data import byte_chunks, make_image, write_parquet
from .peers.base import running
from .report import number, print_table, write_json

__all__ = ["main", "run"]

_WORKERS, _CONNECTIONS = (2, 4), (4, 16, 64)
#: 32 MiB, read sixteen times over: more than buffers between server and client ever swallow, so every read still runs when all are counted.
_SHAPE, _TIMES = (1, 4, 2, 2048, 1024), 16


def plain(workers: int, connections: int) -> list[int]:
    """Connections that each of some listening sockets was given by the kernel."""
    with ExitStack() as stack, selectors.DefaultSelector() as ready:
        address = ("127.0.0.1", 0)
        for worker in range(workers):
            listener = stack.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
            listener.listen(connections)
            listener.setblocking(False)
            ready.register(listener, selectors.EVENT_READ, worker)
            address = listener.getsockname()
        clients = [stack.enter_context(socket.create_connection(address)) for _ in range(connections)]
        given: Counter[int] = Counter()
        while given.total() < len(clients):
            for key, _ in ready.select(1):
                stack.enter_context(key.fileobj.accept()[0])  # type: ignore[union-attr]
                given[key.data] += 1
        return [given[worker] for worker in range(workers)]


@contextmanager
def served(path: Path, workers: int) -> Iterator[tuple[str, Control]]:
    """A server of ours: where it listens, and what its workers say of themselves."""
    command = [sys.executable, "-m", "ome_tensor_client", "serve", str(path), "--listen", "127.0.0.1:0", "--log-level", "error"]
    command += ["--workers", str(workers), "--store", str(path.parent / "store")]
    with running(command, stdout=-1) as process:
        assert process.stdout is not None
        target = process.stdout.readline().strip().removeprefix("listening on ")
        files = Path(f"/proc/{process.pid}/fd").iterdir()
        shared = next(file for file in files if "memfd:ome-tensor-control" in os.readlink(file))
        with connect(target, retry_for=30) as client, closing(Control(os.open(shared, os.O_RDWR))) as control:
            client.datasets()
            while None in control.reads():
                time.sleep(0.01)
            yield target, control


def ours(target: str, control: Control, connections: int) -> tuple[list[int], float]:
    """Long reads that each worker serves when that many clients began one at once, and the slowest's seconds to its first tile."""

    def begin(client: Client) -> tuple[Iterator[Any], float]:
        began = time.monotonic()
        tiles = client.tensor_view("image", t=[0] * _TIMES).iter_tiles_3d(tile_size=(1, 256, 256))
        next(tiles)
        return tiles, time.monotonic() - began

    with ExitStack() as stack:
        clients = [stack.enter_context(connect(target, transport="tcp")) for _ in range(connections)]
        for client in clients:
            client.datasets()
        with ThreadPoolExecutor(connections) as threads:
            found = list(threads.map(begin, clients))
        given = [reads or 0 for reads in control.reads()]
        assert sum(given) == connections, given
        for tiles, _ in found:
            tiles.close()  # type: ignore[attr-defined]
    while any(control.reads()):
        time.sleep(0.001)
    return given, max(seconds for _, seconds in found)


def _figures(trials: Sequence[list[int]]) -> dict[str, float]:
    """The share of trials that were as even as can be, and how many times its fair share the busiest worker had: on average and at worst."""
    busiest = [max(given) * len(given) / sum(given) for given in trials]
    even = sum(max(given) - min(given) <= 1 for given in trials) / len(trials)
    return {"even": even, "busiest": mean(busiest), "worst": max(busiest)}


def run(*, trials: int, tell: Callable[[str], None] = lambda _: None) -> dict[str, dict[str, dict[str, float]]]:
    """Figures of ``plain`` and ``ours`` by workers and connections."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image.parquet")
        write_parquet(byte_chunks(make_image(_SHAPE), (1, 512, 512)), path)
        for workers in _WORKERS:
            with served(path, workers) as (target, control):
                for connections in _CONNECTIONS:
                    tell(case := f"{connections} on {workers}")
                    reads = [ours(target, control, connections) for _ in range(trials)]
                    found[case] = {
                        # The kernel's choice takes no time: more trials for a steadier figure.
                        "plain": _figures([plain(workers, connections) for _ in range(20 * trials)]),
                        "ours": _figures([given for given, _ in reads]) | {"last_ms": 1e3 * median(slow for _, slow in reads)},
                    }
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spread", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two trials")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(arguments)
    found = run(trials=2 if options.quick else 20, tell=lambda what: print(what, file=sys.stderr))
    rows = []
    for case, figures in found.items():
        each = [(f"{one['even']:.0%}", f"{one['busiest']:.2f} ({one['worst']:.2f})") for one in figures.values()]
        rows.append([case, *each[0], *each[1], number(figures["ours"]["last_ms"])])
    title = "share of trials that were even; the busiest worker's load over its fair share, mean and (worst); ms to the last first tile"
    print_table(title, ("connections on workers", "kernel: even", "busiest", "ours: even", "busiest", "ms"), rows)
    if options.json:
        write_json(options.json, "spread", found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
