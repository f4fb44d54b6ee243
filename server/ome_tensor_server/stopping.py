"""Signals as requests to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import FrameType

__all__ = ["StopRequests"]


class StopRequests:
    """Turns signals into a request to stop, and further ones into haste. Make it on the main thread, once a process.

    A signal's handler runs between two steps of whatever the main thread is doing, which may hold any lock: ``Event.set()`` there can wait for
    itself for ever. So the handler only puts into a ``SimpleQueue``, whose ``put()`` is made for that, and a thread does the rest.

    Args:
        signals: The signals.
        hurry: Called for each signal but the first.

    Attributes:
        asked: Set once a signal has come.
    """

    def __init__(self, *signals: signal.Signals, hurry: Callable[[], object]) -> None:
        self.asked = threading.Event()
        self._hurry = hurry
        self._queue: SimpleQueue[int] = SimpleQueue()
        threading.Thread(target=self._run, name="ome-tensor-signals", daemon=True).start()
        for number in signals:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._queue.put(number)

    def _run(self) -> None:
        while True:
            self._queue.get()
            if self.asked.is_set():
                self._hurry()
            self.asked.set()
