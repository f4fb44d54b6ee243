"""What all workers of one server agree on: which datasets there are, and how busy each worker is.

A small file in memory that every worker maps. The catalogue is a JSON file beside it, replaced as a whole; a generation number tells workers when
to read it again. How many reads a worker serves is a number of its own that only it writes, so none of this needs a lock.
"""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .store import Manifest

__all__ = ["Control", "Entry"]

_HEADER = 2  # generation; number of workers


@dataclass(frozen=True, slots=True)
class Entry:
    """One dataset of the catalogue.

    Attributes:
        name: Its name.
        source_name: Its source's file name.
        manifest: Where its pixels are.
    """

    name: str
    source_name: str
    manifest: Manifest


class Control:
    """The shared state.

    Args:
        folder: Where it lies.
        workers: Number of workers, to make it; 0 to open what is there.
    """

    def __init__(self, folder: Path, workers: int = 0) -> None:
        self._catalogue = folder / "catalogue.json"
        path = folder / "state"
        if workers:
            path.write_bytes(bytes(8 * (_HEADER + workers)))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)
        # Aligned 8-byte loads and stores are whole on every processor this runs on.
        self._numbers = np.frombuffer(self._memory, np.int64)
        if workers:
            self._numbers[1] = workers

    @property
    def generation(self) -> int:
        """Number of the published catalogue; 0 before there is one."""
        return int(self._numbers[0])

    def publish(self, entries: list[Entry]) -> None:
        """Make a new catalogue known to all workers."""
        temporary = self._catalogue.with_suffix(".tmp")
        temporary.write_text(json.dumps([asdict(entry) for entry in entries]))
        os.replace(temporary, self._catalogue)
        self._numbers[0] += 1

    def entries(self) -> list[Entry]:
        """The published catalogue."""
        found = json.loads(self._catalogue.read_text())
        return [Entry(entry["name"], entry["source_name"], Manifest(**entry["manifest"])) for entry in found]

    def report(self, worker: int, reads: int) -> None:
        """Say how many reads a worker serves; only that worker says it, or its supervisor once it is gone."""
        self._numbers[_HEADER + worker] = reads

    def reads(self) -> list[int]:
        """How many reads each worker serves."""
        return [int(number) for number in self._numbers[_HEADER : _HEADER + int(self._numbers[1])]]
