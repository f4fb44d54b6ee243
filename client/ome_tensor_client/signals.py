"""Signals that end a command, as exceptions: what it has begun is undone on the way out."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["unwinding"]

#: Asked to end, and left by the terminal. Ctrl-C is an exception by itself.
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def unwinding() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise SystemExit with the status a shell gives for them, 128 + n. For the main thread.

    One that the caller ignores stays ignored: that is how ``nohup`` keeps a command alive.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    changed = [number for number in _SIGNALS if before[number] is not signal.SIG_IGN]
    for number in changed:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, before[number])
