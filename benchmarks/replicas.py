"""Two servers of one dataset, one of them slow and the other one killed in the middle of an epoch: ``python -m benchmarks.replicas``.

Two ranks read the shards of shuffled epochs, one from each server. The slow server is behind a relay that lets so many bytes a second through, to
both ranks together; after a third of the time the other one is killed, after two thirds it is started again. Printed is what both ranks get before,
during and after; every tile of each epoch must come exactly once, with its pixels. Exit status 1 where that is not so.
"""

from __future__ import annotations

import argparse
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np

from benchmarks.epoch_kills import digest
from benchmarks.processes import serving
from benchmarks.report import number, print_table
from benchmarks.training import QUICK, write_planes
from ome_tensor_client import connect
from ome_tensor_client.torch import TileDataset, TileLoader

__all__ = ["main"]

_STEP = 64 << 10


class SlowRelay:
    """Lets so many bytes a second through from a server to all its clients together."""

    def __init__(self, target: str, bytes_per_second: float) -> None:
        host, _, port = target.rpartition(":")
        self._server, self._rate = (host, int(port)), bytes_per_second
        self._line = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
            except OSError:
                return
            for source, sink, rate in ((client, server, 0.0), (server, client, self._rate)):
                threading.Thread(target=self._pump, args=(source, sink, rate), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, rate: float) -> None:
        with suppress(OSError):
            while data := source.recv(_STEP):
                sink.sendall(data)
                if rate:
                    # One line: while it is taken nobody else's bytes go through.
                    with self._line:
                        time.sleep(len(data) / rate)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()


class Rank(threading.Thread):
    """Reads its shard of epoch after epoch.

    Attributes:
        arrived: When each tile came.
        found: Of each epoch, the digests of its batches.
        retries: Calls that were made again.
    """

    def __init__(self, loader: TileLoader) -> None:
        super().__init__()
        self._loader, self._ended = loader, threading.Event()
        self.arrived: list[float] = []
        self.found: list[list[tuple[tuple[int, ...], str]]] = []
        self.retries = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        """Until it is told to end with an epoch."""
        try:
            while not self._ended.is_set():
                self._loader.set_epoch(len(self.found))
                batches = []
                for batch in self._loader:
                    self.arrived += [time.monotonic()] * len(batch["tile"])
                    batches.append((tuple(batch["tile"].tolist()), digest(batch)))
                self.found.append(batches)
                self.retries += self._loader.stats().read.retries
        except BaseException as error:
            self.error = error

    def end(self) -> None:
        """This epoch is the last one."""
        self._ended.set()


def main() -> None:
    """Kill, measure, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=24.0)
    parser.add_argument("--slow", type=float, default=40e6, help="bytes a second of the slow server")
    options = parser.parse_args()
    third = options.seconds / 3
    with tempfile.TemporaryDirectory() as folder:
        path = write_planes(Path(folder), QUICK)
        quick, slow = serving(path), serving(path)
        relay = SlowRelay(slow.target, options.slow)

        def loader(shard: tuple[int, int], *targets: str) -> TileLoader:
            client = connect(targets, transport="tcp", retry_for=30, timeout=10, message_bytes=256 << 10)
            images = client.dataset("planes").images("image")
            dataset = TileDataset(
                images, tile_size=(128, 128), batch_size=4, shuffle=True, seed=1, shard=shard, dtype="uint16", prefetch=1
            )
            return TileLoader(dataset)

        ranks = [Rank(loader((rank, 2), quick.target, relay.target)) for rank in range(2)]
        began = time.monotonic()
        for rank in ranks:
            rank.start()
        time.sleep(third)
        quick.kill()
        time.sleep(third)
        quick = quick.again()
        time.sleep(third)
        for rank in ranks:
            rank.end()
        for rank in ranks:
            rank.join(120)
        problems = [rank.error for rank in ranks if rank.error is not None]
        wrong = sum(rank.is_alive() for rank in ranks)
        alone = [loader((rank, 2), quick.target) for rank in range(2)]
        tiles = 0
        for number_, rank in enumerate(ranks):
            for epoch, batches in enumerate(rank.found):
                alone[number_].set_epoch(epoch)
                wanted = [(tuple(batch["tile"].tolist()), digest(batch)) for batch in alone[number_]]
                wrong += batches != wanted
                tiles += sum(len(names) for names, _ in batches)
        # Of every epoch that both have read: each tile once.
        for epoch in range(min(len(rank.found) for rank in ranks)):
            seen = Counter(tile for rank in ranks for names, _ in rank.found[epoch] for tile in names)
            wrong += set(seen.values()) != {1}
        quick.kill()
        slow.kill()
        relay.close()
    rows = []
    for name, first in (("before", 0.0), ("one killed", third), ("it is back", 2 * third)):
        rates = []
        for rank in ranks:
            times = np.array(rank.arrived) - began
            rates.append(float(((times >= first) & (times < first + third)).sum()) / third)
        rows.append((name, *map(number, rates), number(sum(rates))))
    print_table(
        f"tiles/s; {tiles:,} tiles of {sum(len(rank.found) for rank in ranks)} shards of epochs, "
        f"{sum(rank.retries for rank in ranks)} calls made again, {wrong} wrong",
        ("when", "rank of the quick server", "rank of the slow one", "both"),
        rows,
    )
    for problem in problems:
        print(f"{type(problem).__name__}: {problem}")
    sys.exit(1 if wrong or problems else 0)


if __name__ == "__main__":
    main()
