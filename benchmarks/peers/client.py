"""A peer's client in a process of its own, and what one workload cost it.

The process holds the peer's library and a mapping of the expected image, nothing of any other peer; it waits on a pipe between tasks.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.children import PATIENCE, Child

from .base import TILE, WINDOW, Data, Place, Plane, Reader, tile_places

__all__ = ["ClientProcess", "Sample", "Task"]

#: How long a client may take for one task before the benchmark gives up on it.
_TASK_SECONDS = 300.0 - PATIENCE


@dataclass(frozen=True)
class Task:
    """One workload.

    Attributes:
        kind: All tiles, single planes or windows.
        places: Planes, or windows' origins.
        limit: Tiles to read; 0 for all.
        check: Compare every tile (window) with NumPy: a pass that is not timed. Planes are always compared, between two readings of the clock.
    """

    kind: Literal["tiles", "planes", "windows"]
    places: Sequence[Plane] | Sequence[Place] = ()
    limit: int = 0
    check: bool = False


@dataclass(frozen=True)
class Sample:
    """What a task took.

    Attributes:
        start, end: By the clock that all processes share.
        cpu: The client's processor seconds, all threads.
        nbytes: Bytes of pixels that arrived.
        latencies: Seconds of each plane.
    """

    start: float
    end: float
    cpu: float
    nbytes: int
    latencies: tuple[float, ...] = ()


class ClientProcess(Child):
    """A reader's process; a context manager that ends it.

    Args:
        reader: What it runs.
        data: The image to expect.
    """

    def __init__(self, reader: Reader, data: Data) -> None:
        super().__init__(_work, reader, data.npy)
        try:
            # Open and warm: the first bytes have gone both ways.
            self.answer(_TASK_SECONDS)
        except BaseException:
            self.close()
            raise

    def begin(self, task: Task) -> None:
        """Start a task; :meth:`finish` waits for it."""
        self.tell(task)

    def finish(self) -> Sample:
        """The task's sample. Raises RuntimeError with the client's traceback where it failed or got wrong pixels."""
        found: Sample = self.answer(_TASK_SECONDS)
        return found

    def run(self, task: Task) -> Sample:
        """One task, waited for."""
        self.begin(task)
        return self.finish()


def _work(pipe: Connection, reader: Reader, npy: Path) -> None:
    try:
        image = np.load(npy, mmap_mode="r")
        reader.open()
        _compare(reader.plane((0, 0, 0, 0)), image[0, 0, 0, :TILE, :TILE])
        pipe.send(None)
        while True:
            task: Task = pipe.recv()
            pipe.send(_perform(task, reader, image))
    except BaseException as error:
        # All peers are read by this function.
        error.add_note(type(reader).__name__)
        raise
    finally:
        reader.close()


def _perform(task: Task, reader: Reader, image: np.ndarray) -> Sample:
    gc.collect()
    if task.kind == "planes":
        return _planes(task, reader, image)
    cpu, start, nbytes = time.process_time(), time.monotonic(), 0
    if task.kind == "tiles":
        wanted = tile_places(image.shape)
        for tile in islice(reader.tiles(), task.limit or None):
            nbytes += tile.nbytes
            if task.check:
                z, y, x = next(wanted)
                _compare(tile, image[0, z, :, y : y + TILE, x : x + TILE])
        expected = (task.limit or sum(1 for _ in tile_places(image.shape))) * image.shape[2] * TILE**2 * 2
    else:
        places = iter(task.places)
        for batch in reader.windows(task.places):  # type: ignore[arg-type]
            nbytes += batch.nbytes if isinstance(batch, np.ndarray) else sum(window.nbytes for window in batch)
            if task.check:
                for window, (z, y, x) in zip(batch, places, strict=False):  # type: ignore[misc]
                    _compare(window, image[0, z, :, y : y + WINDOW, x : x + WINDOW])
        expected = len(task.places) * image.shape[2] * WINDOW**2 * 2
    end = time.monotonic()
    if nbytes != expected:
        raise AssertionError(f"{nbytes} bytes of pixels arrived of {expected}")
    return Sample(start, end, time.process_time() - cpu, nbytes)


def _planes(task: Task, reader: Reader, image: np.ndarray) -> Sample:
    latencies, cpu, begin = [], 0.0, time.monotonic()
    for place in task.places:
        worked, start = time.process_time(), time.perf_counter()
        found = reader.plane(place)  # type: ignore[arg-type]
        latencies.append(time.perf_counter() - start)
        cpu += time.process_time() - worked
        z, c, y, x = place  # type: ignore[misc]
        _compare(found, image[0, z, c, y : y + TILE, x : x + TILE])
    return Sample(begin, time.monotonic(), cpu, len(task.places) * TILE**2 * 2, tuple(latencies))


def _compare(got: np.ndarray, want: np.ndarray) -> None:
    if got.dtype != want.dtype or not np.array_equal(got, want):
        raise AssertionError(f"{got.dtype} {got.shape} is not what NumPy gives")
