"""Signals that end a command, as exceptions: what it has begun is undone on the way out."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["unwinding"]

#: Asked to end, and left by the terminal. Ctrl-C is an exception by itself.
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

#: Seconds until a signal comes again whose exception was dropped.
_AGAIN = 0.01


class _Ended(SystemExit):
    """A signal asked the command to end.

    Attributes:
        number: The signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


@contextmanager
def unwinding() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise SystemExit with the status a shell gives for them, 128 + n. For the main thread.

    One that the caller ignores stays ignored: that is how ``nohup`` keeps a command alive.
    """

    def on_signal(number: int, frame: FrameType | None) -> None:
        raise _Ended(number)

    def on_dropped(dropped: Any) -> None:
        # A handler runs wherever the main thread happens to be. Inside a finaliser or a weak reference's callback Python drops what it raises, and
        # the command would go on as if nobody had asked it to end (one in twenty, right behind the first use of many modules).
        if isinstance(dropped.exc_value, _Ended):
            threading.Timer(_AGAIN, signal.pthread_kill, (threading.main_thread().ident, dropped.exc_value.number)).start()
        else:
            hook_before(dropped)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    changed = [number for number in _SIGNALS if before[number] is not signal.SIG_IGN]
    hook_before, sys.unraisablehook = sys.unraisablehook, on_dropped
    for number in changed:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, before[number])
        sys.unraisablehook = hook_before
