"""How much one caller, and all together, may ask of a server at a time; beyond that a call is refused at once, and told when to come again."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ome_tensor.errors import Overloaded

from .settings import Settings

__all__ = ["RETRY_AFTER", "Rates", "Reads"]

#: Callers that are remembered; those that came longest ago are forgotten first, and begin with a full measure again.
_REMEMBERED = 10_000

#: When a reader is told to come again whose place is taken: reads last for seconds.
RETRY_AFTER = 0.5


_ROUNDING = 1e-6


class _Bucket:
    """A token bucket: so many calls a second, a second's worth at once."""

    __slots__ = ("_filled", "_rate", "_tokens")

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        # Below one a second it would otherwise never hold a whole one.
        self._tokens = max(1.0, rate)
        self._filled = now

    def wait(self, now: float) -> float:
        """Seconds until it holds one; 0: it does now."""
        self._tokens = min(max(1.0, self._rate), self._tokens + (now - self._filled) * self._rate)
        self._filled = now
        missing = 1.0 - self._tokens
        # What time adds up to is never quite whole.
        return missing / self._rate if missing > _ROUNDING else 0.0

    def take(self) -> None:
        self._tokens -= 1.0


class Rates:
    """Calls begun each second.

    Args:
        settings: ``max_requests_per_second`` and ``max_caller_requests_per_second``.
        clock: Seconds.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._caller_rate = settings.max_requests_per_second, settings.max_caller_requests_per_second
        self._clock = clock
        self._lock = threading.Lock()
        self._all = _Bucket(self._rate, clock()) if self._rate else None
        self._callers: OrderedDict[str, _Bucket] = OrderedDict()

    def admit(self, caller: str) -> None:
        """Count a call. Raises Overloaded where that is one too many."""
        if not self._rate and not self._caller_rate:
            return
        with self._lock:
            now = self._clock()
            own: _Bucket | None = None
            if self._caller_rate:
                own = self._callers.get(caller)
                if own is None:
                    own = self._callers[caller] = _Bucket(self._caller_rate, now)
                    if len(self._callers) > _REMEMBERED:
                        self._callers.popitem(last=False)
                self._callers.move_to_end(caller)
                if wait := own.wait(now):
                    raise _too_many("max_caller_requests_per_second", self._caller_rate, "of one caller", wait)
            if self._all is not None:
                if wait := self._all.wait(now):
                    raise _too_many("max_requests_per_second", self._rate, "in all", wait)
                self._all.take()
            if own is not None:
                own.take()


def _too_many(name: str, rate: float, whose: str, wait: float) -> Overloaded:
    return Overloaded(
        f"this server takes {rate:g} calls a second {whose} ({name}); try again later", field=name, value=rate, retry_after=wait
    )


class Reads:
    """Streams of pixels served at one time.

    Args:
        settings: ``max_concurrent_reads`` and ``max_caller_reads``.
    """

    def __init__(self, settings: Settings) -> None:
        self._most, self._most_each = settings.max_concurrent_reads, settings.caller_reads
        self._lock = threading.Lock()
        self._each: dict[str, int] = {}
        self._count = 0

    @property
    def free(self) -> int:
        """Reads that could be taken on now."""
        with self._lock:
            return self._most - self._count

    @property
    def running(self) -> int:
        """Reads that are being served."""
        return self._count

    @contextmanager
    def one(self, caller: str) -> Iterator[None]:
        """A read's place. Raises Overloaded where there is none."""
        with self._lock:
            if self._count >= self._most:
                raise Overloaded(
                    f"this server serves {self._most} reads at once, and all are taken; try again later",
                    field="max_concurrent_reads",
                    value=self._most,
                    retry_after=RETRY_AFTER,
                )
            if self._each.get(caller, 0) >= self._most_each:
                raise Overloaded(
                    f"this server serves {self._most_each} reads at once to one caller, and all of yours are taken; try again later",
                    field="max_caller_reads",
                    value=self._most_each,
                    retry_after=RETRY_AFTER,
                )
            self._count += 1
            self._each[caller] = self._each.get(caller, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._count -= 1
                self._each[caller] -= 1
                if not self._each[caller]:
                    del self._each[caller]
