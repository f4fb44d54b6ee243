"""Who uses which dataset: shared by all workers without a lock, so that none that is in use is taken out of memory."""

from __future__ import annotations

import mmap
import os
import threading
import time

import numpy as np

__all__ = ["SLOTS", "Usage"]

#: Datasets that one server can count. Their counters cost memory only once they are written to.
SLOTS = 1 << 16

#: What is counted of a dataset by each worker: calls that use it now, and when one began last (nanoseconds of the monotonic clock, which all
#: processes of a machine share).
_RUNNING, _LAST, _COUNTERS = range(3)

_MILLION = 1_000_000


class Usage:
    """Counters of a server's datasets, by slot.

    Every worker has counters of its own, which only it writes; the sum is what counts. One row more is the loading process's: how far a load is.

    Args:
        workers: Number of workers.
        descriptor: Of the anonymous file that another process's ``Usage`` made; without one it is made.
        worker: Whose counters this process writes.
    """

    def __init__(self, workers: int = 1, descriptor: int | None = None, worker: int = 0) -> None:
        self.descriptor = os.memfd_create("ome-tensor-usage") if descriptor is None else descriptor
        counters = (workers + 1) * SLOTS * _COUNTERS
        if descriptor is None:
            os.ftruncate(self.descriptor, 8 * counters)
        self._memory = mmap.mmap(self.descriptor, 8 * counters)
        # Aligned 8-byte loads and stores are whole on every processor this runs on.
        self._counters = np.frombuffer(self._memory, np.int64).reshape(workers + 1, SLOTS, _COUNTERS)
        self._own = self._counters[worker]
        self._progress = self._counters[workers, :, 0]
        self._lock = threading.Lock()

    def begin(self, slot: int) -> None:
        """A call uses the dataset."""
        with self._lock:
            self._own[slot, _RUNNING] += 1
            self._own[slot, _LAST] = time.monotonic_ns()

    def end(self, slot: int) -> None:
        """A call that used it is through."""
        with self._lock:
            self._own[slot, _RUNNING] -= 1
            self._own[slot, _LAST] = time.monotonic_ns()

    def is_used(self, slot: int) -> bool:
        """Whether a call of any worker uses it now."""
        return bool(self._counters[:-1, slot, _RUNNING].any())

    def last_used(self, slot: int) -> int:
        """When it was last used, to be compared with other datasets'; 0 for never."""
        return int(self._counters[:-1, slot, _LAST].max())

    def clear(self, slot: int) -> None:
        """The slot is another dataset's from now on. By the loading process, while no worker knows of the slot."""
        self._counters[:, slot] = 0

    def forget_worker(self, worker: int) -> None:
        """A worker has died: nothing is in use by it. By its supervisor."""
        self._counters[worker, :, _RUNNING] = 0

    def set_progress(self, slot: int, part: float) -> None:
        """How far the load of a dataset is, from 0 to 1. By the loading process."""
        self._progress[slot] = int(part * _MILLION)

    def progress(self, slot: int) -> float:
        """How far its load is."""
        return int(self._progress[slot]) / _MILLION

    def close(self) -> None:
        """Close this process's descriptor; the counters can still be used."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
