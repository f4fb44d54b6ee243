"""``prefetch=n`` really prefetches: ahead of the consumer, by a bounded amount, on threads that end with the iterator."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.conformance import records
from tests.conformance.images import IMAGES, SHAPE
from tests.conformance.implementations import Implementation, as_numpy

import ome_tensor

PIXELS = IMAGES["chunks"].pixels

#: More threads than this are not "bounded", however much is to be prefetched.
MOST_THREADS = 32


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether a condition comes true within some time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


class CountingPlanes:
    """A plane loader that knows what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, int]] = []
        self.threads: set[threading.Thread] = set()
        self.failing: tuple[int, int, int] | None = None

    def __call__(self, t: int, z: int, c: int) -> np.ndarray:
        if (t, z, c) == self.failing:
            raise OSError("the disk is gone")
        self.asked.append((t, z, c))
        self.threads.add(threading.current_thread())
        return PIXELS[t, z, c]


@pytest.fixture
def planes() -> CountingPlanes:
    """A fresh loader."""
    return CountingPlanes()


def planewise(planes: CountingPlanes, **arguments: Any) -> Any:
    """Iterate over 24 tiles of which each reads exactly one plane."""
    view = ome_tensor.TensorView(records.as_dict(SHAPE, "uint16"), plane_loader=planes, c=0)
    return view.iter_tiles_3d(tile_size=(1, 13, 17), **arguments)


@pytest.mark.parametrize(
    "arguments", [{"tile_size": (5, 6)}, {"batch_size": 1}, {"tile_size": (4, 4), "shuffle": True, "seed": 3}], ids=str
)
@pytest.mark.parametrize("prefetch", [1, 3, 1000])
def test_prefetch_changes_nothing(any_view: Implementation, arguments: dict[str, Any], prefetch: int) -> None:
    """The same tiles in the same order."""
    view = any_view.view("chunks", z=[3, 1])
    plain = [as_numpy(tile) for tile in view.iter_dlpack(mode="numpy", **arguments)]
    ahead = [as_numpy(tile) for tile in view.iter_dlpack(mode="numpy", prefetch=prefetch, **arguments)]
    assert len(plain) == len(ahead)
    for one, other in zip(plain, ahead, strict=True):
        np.testing.assert_array_equal(one, other)


def test_prefetch_in_arrow_mode(our_view: Implementation) -> None:
    """Arrow tiles are prefetched too."""
    view = our_view.view("chunks_flat", t=1, z=2, c=1)
    ahead = [as_numpy(tile) for tile in view.iter_dlpack(tile_size=(5, 6), prefetch=2)]
    np.testing.assert_array_equal(ahead[-1], PIXELS[1, 2, 1, 10:, 12:].ravel())
    assert len(ahead) == 9


def test_prefetch_of_3d_tiles(our_view: Implementation) -> None:
    """3-D tiles are prefetched too."""
    view = our_view.view("chunks")
    ahead = [as_numpy(tile) for tile in view.iter_tiles_3d(tile_size=(1, 13, 17), prefetch=2)]
    np.testing.assert_array_equal(np.concatenate(ahead), PIXELS.reshape(12, 1, 2, 13, 17))


def test_without_prefetch_nothing_is_read_ahead(planes: CountingPlanes) -> None:
    """``prefetch=0`` reads a tile when it is asked for, on the caller's own thread."""
    iterator = planewise(planes)
    assert planes.asked == []
    next(iterator)
    assert planes.asked == [(0, 0, 0)]
    next(iterator)
    assert planes.asked == [(0, 0, 0), (0, 1, 0)]
    assert planes.threads == {threading.current_thread()}


@pytest.mark.parametrize("prefetch", [1, 3, 8])
def test_prefetch_reads_ahead(planes: CountingPlanes, prefetch: int) -> None:
    """While the consumer works on the first tile, the next ones are read, and no more than asked for."""
    iterator = planewise(planes, prefetch=prefetch)
    next(iterator)
    assert eventually(lambda: len(planes.asked) >= 1 + prefetch), planes.asked
    time.sleep(0.1)  # what reads too far ahead would go on now
    # One more may be in a thread's hands, waiting for room.
    assert len(planes.asked) <= 2 + prefetch
    assert threading.current_thread() not in planes.threads
    assert len(list(iterator)) == 11
    assert sorted(planes.asked) == [(t, z, 0) for t in range(3) for z in range(4)]


def test_threads_are_bounded_and_end(planes: CountingPlanes) -> None:
    """Dropping the iterator half-way ends its threads; a thousand tiles ahead are not a thousand threads."""
    before = set(threading.enumerate())
    iterator = planewise(planes, prefetch=1000)
    next(iterator)
    assert len(set(threading.enumerate()) - before) <= MOST_THREADS
    del iterator
    gc.collect()
    assert eventually(lambda: set(threading.enumerate()) <= before), set(threading.enumerate()) - before


@pytest.mark.parametrize("take", [0, 1, 12], ids=["not begun", "half-way", "exhausted"])
def test_threads_end_when_dropped(planes: CountingPlanes, take: int) -> None:
    """However far the iteration went."""
    before = set(threading.enumerate())
    iterator = planewise(planes, prefetch=2)
    for _ in range(take):
        next(iterator)
    del iterator
    gc.collect()
    assert eventually(lambda: set(threading.enumerate()) <= before), set(threading.enumerate()) - before


def test_threads_end_when_exhausted(planes: CountingPlanes) -> None:
    """An iterator that is held on to after its last tile holds no thread."""
    before = set(threading.enumerate())
    iterator = planewise(planes, prefetch=2)
    assert len(list(iterator)) == 12
    assert eventually(lambda: set(threading.enumerate()) <= before), set(threading.enumerate()) - before
    assert list(iterator) == []


def test_client_threads_end(client_of: Callable[[str, str], Any]) -> None:
    """Remote iterations, dropped half-way, do not leave a thread each behind."""
    view = client_of("tcp", "images").tensor_view("chunks")

    def begin_and_drop(times: int) -> None:
        for _ in range(times):
            next(view.iter_dlpack(tile_size=(1, 1), prefetch=4, mode="numpy"))
        gc.collect()

    begin_and_drop(5)  # gRPC starts its own threads with the first calls and keeps them
    time.sleep(0.2)
    before = threading.active_count()
    begin_and_drop(20)
    # The server of this test is in this process, and its pool may have grown by a few.
    assert eventually(lambda: threading.active_count() <= before + 4), threading.enumerate()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_arrive_in_their_place(planes: CountingPlanes, prefetch: int) -> None:
    """A tile that cannot be read fails when its turn comes, after the sound ones before it; the loader's own error arrives."""
    planes.failing = (1, 0, 0)
    iterator = planewise(planes, prefetch=prefetch)
    for z in range(4):
        np.testing.assert_array_equal(as_numpy(next(iterator))[0, 0, 0], PIXELS[0, z, 0])
    with pytest.raises(OSError, match="the disk is gone"):
        next(iterator)
    before = {thread for thread in threading.enumerate() if thread in planes.threads} - {threading.current_thread()}
    assert eventually(lambda: not any(thread.is_alive() for thread in before))
