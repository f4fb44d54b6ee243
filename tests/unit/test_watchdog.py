"""What the watchdog must bear: to be called by garbage collection in the middle of itself, and a system without room for its thread."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest

from ome_tensor.watchdog import Watchdog


class Waits:
    """Something that waits."""

    def __init__(self) -> None:
        self.waiting_since: float | None = time.monotonic()
        self.expired = threading.Event()

    def expire(self) -> None:
        self.expired.set()


class Collects(Waits):
    """Where it is looked after, and that may allocate, the interpreter ends a stream that nobody holds any more."""

    def __init__(self, watchdog: Watchdog, stream: Waits) -> None:
        super().__init__()
        self._end = partial(watchdog.forget, stream)

    def __hash__(self) -> int:
        self._end()
        return 1


def test_a_stream_may_end_wherever_something_is_allocated() -> None:
    watchdog, ended = Watchdog(0.1, "test-watchdog"), Waits()
    watchdog.watch(ended)
    waits = Collects(watchdog, ended)
    watching = threading.Thread(target=watchdog.watch, args=(waits,), daemon=True)
    watching.start()
    watching.join(5)
    assert not watching.is_alive()
    assert waits.expired.wait(5)
    assert not ended.expired.is_set()
    watchdog.forget(waits)


def test_what_is_dropped_is_not_looked_after() -> None:
    watchdog = Watchdog(0.1, "test-watchdog")
    watchdog.watch(Waits())
    waits = Waits()
    watchdog.watch(waits)
    assert waits.expired.wait(5)
    assert len(watchdog._items) == 1
    watchdog.forget(waits)


def test_a_thread_that_cannot_be_started_now_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    watchdog, waits = Watchdog(0.1, "test-watchdog"), Waits()

    def full(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", full)
        with pytest.raises(RuntimeError, match="can't start"):
            watchdog.watch(waits)
    watchdog.watch(waits)
    assert waits.expired.wait(5)
    watchdog.forget(waits)
