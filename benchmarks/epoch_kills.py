"""kill -9 during epochs of training: ``python -m benchmarks.epoch_kills --kills 50``.

A TileLoader reads shuffled epochs, by a thread or by two workers, while the server is killed at random moments and started again on the same
port. Every
batch must be the one that an undisturbed epoch has there, bit for bit. Exit status 1 where one is not.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.processes import ServerProcess, serving
from benchmarks.report import number, print_table
from benchmarks.training import QUICK, write_planes
from ome_tensor_client import connect
from ome_tensor_client.torch import TileDataset, TileLoader

__all__ = ["main"]


def digest(batch: dict[str, Any]) -> str:
    """Of all that a batch says."""
    found = hashlib.sha256()
    for key in sorted(batch):
        value = batch[key]
        found.update(value.numpy().tobytes() if hasattr(value, "numpy") else repr(value).encode())
    return found.hexdigest()


class Killer:
    """Kills a server at random moments and starts it again, on a thread, until it has done so often enough."""

    def __init__(self, server: ServerProcess, kills: int, seed: int) -> None:
        self.server, self.kills = server, 0
        self._wanted = kills
        self._chance = random.Random(seed)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether all has been done."""
        return self.kills >= self._wanted

    def _run(self) -> None:
        while not self.is_done and not self._ended.wait(self._chance.uniform(0.05, 1.0)):
            self.server.kill()
            self.kills += 1
            time.sleep(self._chance.uniform(0, 0.4))
            self.server = self.server.again()

    def end(self) -> None:
        """No more kills; the server is up."""
        self._ended.set()
        self._thread.join()


def main() -> None:
    """Kill, read, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        path = write_planes(Path(folder), QUICK)
        server = serving(path)
        with connect(server.target, transport="tcp", retry_for=30, timeout=30, message_bytes=256 << 10) as client:
            images = client.dataset("planes").images("image", metadata=["label"])

            def loader(workers: int) -> TileLoader:
                dataset = TileDataset(images, tile_size=(128, 128), batch_size=4, shuffle=True, seed=1, dtype="uint16")
                return TileLoader(dataset, num_workers=workers, multiprocessing_context="fork" if workers else None)

            wanted = []
            for epoch in range(4):
                undisturbed = loader(0)
                undisturbed.set_epoch(epoch)
                wanted.append([digest(batch) for batch in undisturbed])
            killer = Killer(server, options.kills, options.seed)
            try:
                while not killer.is_done:
                    epoch, workers = counts["epochs"] % 4, (0, 2)[counts["epochs"] % 2]
                    reading = loader(workers)
                    reading.set_epoch(epoch)
                    found = []
                    for batch in reading:
                        found.append(digest(batch))
                        time.sleep(0.02)  # a step
                    counts["epochs"] += 1
                    counts["batches"] += len(found)
                    counts["retries"] += reading.stats().read.retries
                    wrong += found != wanted[epoch]
            finally:
                killer.end()
                killer.server.kill()
    rows = [(str(killer.kills), str(counts["epochs"]), number(counts["batches"]), str(counts["retries"]), str(wrong))]
    print_table("the server killed during epochs", ("kills", "epochs", "batches", "calls made again", "epochs that differ"), rows)
    sys.exit(1 if wrong or not counts["retries"] else 0)


if __name__ == "__main__":
    main()
