"""Ending what waits too long: one thread looks after everything that may wait, and ends when there has been nothing to look after for a while."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Protocol

__all__ = ["Watchdog"]


#: How many intervals in a row with nothing to look after end the thread: a new one for each call would cost a tenth of a millisecond.
_IDLE_INTERVALS = 2


class Waiting(Protocol):
    """Something that waits at times, on another thread.

    Attributes:
        waiting_since: ``time.monotonic()`` when it began to wait; ``None`` while it does not.
    """

    waiting_since: float | None

    def expire(self) -> None:
        """Called on the watchdog's thread when a wait has lasted too long; must end it, and must not block."""


class Watchdog:
    """Expires what waits longer than ``timeout``; late by up to a quarter of it, or a second.

    Cheaper than a timer a wait: to begin and to end one is to set an attribute.

    Args:
        timeout: Seconds.
        name: The thread's name.
    """

    def __init__(self, timeout: float, name: str) -> None:
        self.timeout = timeout
        self._name = name
        self._interval = min(1.0, timeout / 4)
        # Reentrant, and a set that may change wherever something is allocated: garbage collection may end a stream, which is forgotten then, in
        # the middle of what is locked here. (A WeakSet must not change while it is iterated over.)
        self._items: set[weakref.ref[Waiting]] = set()
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None

    def watch(self, item: Waiting) -> None:
        """Look after an item, as long as it lives or until it is forgotten."""
        with self._lock:
            self._items.add(weakref.ref(item))
            if self._thread is None:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                # Where the system has no room for it now, the next wait tries again.
                thread.start()
                self._thread = thread

    def forget(self, item: Waiting) -> None:
        """Look after it no more. The thread is left to notice by itself: waking it for each short wait would cost more than the wait."""
        with self._lock:
            self._items.discard(weakref.ref(item))

    def _run(self) -> None:
        idle = 0
        while True:
            time.sleep(self._interval)
            with self._lock:
                # Copied at once, without a step in which it could change.
                references = self._items.copy()
                items = [item for item in (reference() for reference in references) if item is not None]
                self._items.difference_update([reference for reference in references if reference() is None])
                idle = 0 if items else idle + 1
                if idle == _IDLE_INTERVALS:
                    self._thread = None
                    return
            now = time.monotonic()
            for item in items:
                since = item.waiting_since
                if since is not None and now - since > self.timeout:
                    item.expire()
            del items
