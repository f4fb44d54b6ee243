"""What all workers of one server agree on: which datasets there are, and how busy each worker is.

One anonymous file in memory, passed to the workers by descriptor: it has no name, so nobody cleans it away, and it is gone with the last
process. Numbers at its head are mapped; the catalogue is JSON behind them. A generation number tells workers when to read it again. How many reads
a worker serves is a number of its own that only it writes, so none of this needs a lock.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Sequence

import numpy as np

from .entries import Entry

__all__ = ["Control"]

#: Generation; number of workers; where the catalogue begins; its length.
_GENERATION, _WORKERS, _OFFSET, _LENGTH, _HEADER = range(5)

#: The number of reads of a worker that takes no calls.
_AWAY = -1


class Control:
    """The shared state.

    Args:
        descriptor: Of the file that :meth:`create` made, in this or another process; closed with this.
    """

    def __init__(self, descriptor: int) -> None:
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self._first = 8 * (_HEADER + int(np.frombuffer(os.pread(descriptor, 8 * _HEADER, 0), np.int64)[_WORKERS]))
        self._memory = mmap.mmap(descriptor, self._first)
        # Aligned 8-byte loads and stores are whole on every processor this runs on.
        self._numbers = np.frombuffer(self._memory, np.int64)

    @classmethod
    def create(cls, workers: int) -> Control:
        """A new one, for so many workers, none of which takes calls yet."""
        descriptor = os.memfd_create("ome-tensor-control")
        numbers = np.full(_HEADER + workers, _AWAY, np.int64)
        numbers[:_HEADER] = (0, workers, numbers.nbytes, 0)
        os.pwrite(descriptor, numbers.tobytes(), 0)
        return cls(descriptor)

    @property
    def descriptor(self) -> int:
        """Of the file, to be passed to a worker."""
        return self._file.fileno()

    def close(self) -> None:
        """Close this process's descriptor; the numbers can still be read."""
        self._file.close()

    @property
    def generation(self) -> int:
        """Number of the published catalogue; 0 before there is one."""
        return int(self._numbers[_GENERATION])

    def publish(self, entries: Sequence[Entry]) -> None:
        """Make a new catalogue known to all workers. By one process only."""
        generation = self.generation + 1
        data = json.dumps([generation, [entry.to_json() for entry in entries]]).encode()
        # Never over the last one, which may be being read: before it where there is room, else behind it.
        offset, length = int(self._numbers[_OFFSET]), int(self._numbers[_LENGTH])
        if self._first + len(data) <= offset:
            offset = self._first
        else:
            offset += length
        os.pwrite(self.descriptor, data, offset)
        self._numbers[_OFFSET], self._numbers[_LENGTH] = offset, len(data)
        self._numbers[_GENERATION] = generation

    def entries(self) -> tuple[int, list[Entry]]:
        """The published catalogue, and its number."""
        while True:
            offset, length = int(self._numbers[_OFFSET]), int(self._numbers[_LENGTH])
            data = os.pread(self.descriptor, length, offset)
            try:
                generation, found = json.loads(data)
            except ValueError:
                continue  # Where it was, the next but one is being written.
            if generation >= self.generation:
                return generation, [Entry.from_json(entry) for entry in found]

    def report(self, worker: int, reads: int | None) -> None:
        """Say how many long reads a worker serves, or ``None``: that it takes no calls. For that worker, or its supervisor once it is gone."""
        self._numbers[_HEADER + worker] = _AWAY if reads is None else reads

    def reads(self) -> list[int | None]:
        """How many long reads each worker serves; ``None`` of one that takes no calls: it starts, drains or has died."""
        return [None if number == _AWAY else int(number) for number in self._numbers[_HEADER:]]
