"""Reading ahead: in order, bounded, and gone when nobody wants it any more."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ome_tensor.prefetch import Prefetcher


def threads() -> list[threading.Thread]:
    """Those that read ahead."""
    return [thread for thread in threading.enumerate() if thread.name == "ome-tensor-prefetch"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Before and after each test, without help from the garbage collector."""
    assert threads() == []
    yield
    assert threads() == []


def wait_until(condition: Callable[[], object]) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def settled(read: list[int]) -> int:
    """How many items have been read once nothing moves any more."""
    # Nothing tells that a thread waits; it has had 50 times as long as it needs.
    count = -1
    while count != len(read):
        count = len(read)
        time.sleep(0.05)
    return count


class Source:
    """Numbers; records which have been read, and whether it was closed.

    Attributes:
        read: Numbers handed out so far.
        closed: Whether it was closed.
    """

    def __init__(self, count: int, error_at: int | None = None) -> None:
        self.read: list[int] = []
        self.closed = False
        self._count, self._error_at = count, error_at

    def __iter__(self) -> Source:
        return self

    def __next__(self) -> int:
        number = len(self.read)
        if number == self._error_at:
            raise ZeroDivisionError(number)
        if number == self._count:
            raise StopIteration
        self.read.append(number)
        return number

    def close(self) -> None:
        """Note it."""
        self.closed = True


@settings(deadline=None, max_examples=50)
@given(count=st.integers(0, 50), depth=st.integers(1, 60), max_bytes=st.none() | st.integers(0, 40))
def test_everything_in_order(count: int, depth: int, max_bytes: int | None) -> None:
    """Whatever the bounds."""
    source = Source(count)
    found = Prefetcher(source, depth, max_bytes=max_bytes, size=lambda item: item)
    assert list(found) == list(range(count))
    assert list(found) == []
    assert source.closed


@settings(deadline=None, max_examples=30)
@given(error_at=st.integers(0, 20), depth=st.integers(1, 30))
def test_an_error_comes_in_its_place(error_at: int, depth: int) -> None:
    """After everything that was read before it, once; then there is nothing more."""
    found = Prefetcher(Source(30, error_at), depth)
    assert [next(found) for _ in range(error_at)] == list(range(error_at))
    with pytest.raises(ZeroDivisionError, match=str(error_at)):
        next(found)
    assert list(found) == []


@pytest.mark.parametrize("depth", [1, 3, 10])
def test_it_reads_as_far_ahead_as_it_may(depth: int) -> None:
    """And starts before anybody asks."""
    source = Source(100)
    found = Prefetcher(source, depth)
    wait_until(lambda: len(source.read) == depth)
    assert settled(source.read) == depth
    assert next(found) == 0
    wait_until(lambda: len(source.read) == depth + 1)
    assert settled(source.read) == depth + 1
    found.close()


@pytest.mark.parametrize("max_bytes,ahead", [(0, 1), (10, 1), (11, 2), (35, 4), (1000, 20)])
def test_it_holds_no_more_bytes_than_it_may(max_bytes: int, ahead: int) -> None:
    """Items of 10 bytes: full as soon as the bound is reached; one is always allowed."""
    source = Source(100)
    found = Prefetcher(source, 20, max_bytes=max_bytes, size=lambda _: 10)
    wait_until(lambda: len(source.read) == ahead)
    assert settled(source.read) == ahead
    next(found)
    wait_until(lambda: len(source.read) == ahead + 1)
    assert settled(source.read) == ahead + 1
    found.close()


def test_dropping_ends_it() -> None:
    """By reference count alone: in a training loop the garbage collector may come much later."""
    source = Source(100)
    gc.disable()
    try:
        found = Prefetcher(source, 3)
        next(found)
        assert len(threads()) == 1
        del found
        assert threads() == []
    finally:
        gc.enable()
    assert source.closed


def test_closing_ends_it() -> None:
    """Also while it is full, also twice; what was read ahead is forgotten."""
    source = Source(100)
    found = Prefetcher(source, 3)
    wait_until(lambda: len(source.read) == 3)
    found.close()
    assert threads() == []
    assert source.closed
    assert list(found) == []
    found.close()


class Network(Source):
    """A source that waits for something that only ``cancel`` can end."""

    def __init__(self) -> None:
        super().__init__(100)
        self.cancelled = threading.Event()
        self.waiting = threading.Event()
        self.cancels = 0

    def __next__(self) -> int:
        self.waiting.set()
        assert self.cancelled.wait(10)
        raise ConnectionError("cancelled")

    def cancel(self) -> None:
        """End the wait."""
        self.cancels += 1
        self.cancelled.set()


@pytest.mark.parametrize("drop", [True, False])
def test_a_waiting_source_is_woken(drop: bool) -> None:
    """Cancelled once, and its error is nobody's concern any more."""
    source = Network()
    found = Prefetcher(source, 2, cancel=source.cancel)
    assert source.waiting.wait(10)
    began = time.monotonic()
    if drop:
        del found
    else:
        found.close()
        assert list(found) == []
    assert time.monotonic() - began < 2
    assert source.cancels == 1
    assert source.closed


def test_closing_wakes_a_reader() -> None:
    """Another thread that waits for the next item gets the end, not a hang."""
    source = Network()
    found = Prefetcher(source, 2, cancel=source.cancel)
    ends: list[object] = []
    reader = threading.Thread(target=lambda: ends.append(next(found, "end")))
    reader.start()
    assert source.waiting.wait(10)
    found.close()
    reader.join(10)
    assert ends == ["end"]


def test_items_are_not_kept() -> None:
    """Once handed out, an item is the reader's alone: it holds megabytes."""

    class Item:
        """Something that can be watched."""

    items = [Item() for _ in range(3)]
    watched = [weakref.ref(item) for item in items]
    found = Prefetcher((items.pop(0) for _ in range(3)), 3)
    for reference in watched:
        item = next(found)
        assert reference() is item
        del item
        assert reference() is None
    assert next(found, None) is None


def test_many_readers_share_one_iterator() -> None:
    """Each item goes to one of them."""
    found = Prefetcher(Source(500), 10)
    taken: list[int] = []
    readers = [threading.Thread(target=lambda: taken.extend(found)) for _ in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(10)
        assert not reader.is_alive()
    assert sorted(taken) == list(range(500))
