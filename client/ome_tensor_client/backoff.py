"""Whether, and when, a call that failed is made again."""

from __future__ import annotations

import random
import threading
import time

from ome_tensor.errors import BrokenStream, DeadlineExceeded, OmeTensorError, Overloaded, Unavailable

__all__ = ["TRANSIENT", "Backoff"]

#: What may go away by itself. Everything else is the caller's mistake or the data's fault, and trying again would only hide it.
TRANSIENT = (Unavailable, Overloaded, DeadlineExceeded, BrokenStream)

_FIRST_WAIT, _LONGEST_WAIT = 0.05, 2.0


class Backoff:
    """Decides whether a transient failure is retried, and waits between attempts.

    Args:
        retry_for: Seconds without progress after which to give up.
    """

    def __init__(self, retry_for: float) -> None:
        self._retry_for = retry_for
        self._loaded: set[str | None] = set()
        self.progress()

    def progress(self) -> None:
        """Something arrived: the clock starts anew."""
        self._hops = 0
        self._since = time.monotonic()
        self._wait = _FIRST_WAIT

    def hop(self, servers: int) -> bool:
        """Whether to try another of so many servers without a pause: each once."""
        self._hops += 1
        return self._hops < servers

    def pause(self, error: OmeTensorError, stop: threading.Event | None = None) -> None:
        """Sleep before the next attempt; raises ``error`` where it is not transient or the time is up."""
        if error.field == "loading" and error.value not in self._loaded:
            # The server is loading the dataset, and gets on with it: that may well take longer than a server that is away deserves. Of several
            # servers, what one has said before is no progress of another.
            self._loaded.add(error.value)
            self._since = time.monotonic()
        # Jitter: many workers that lost one server should not come back in step.
        wait = self._wait * random.uniform(0.5, 1.0)
        if error.retry_after is not None:
            # The server knows better; not all that were told the same are to come at once.
            wait = max(wait, error.retry_after * random.uniform(1.0, 1.25))
        if not isinstance(error, TRANSIENT) or time.monotonic() - self._since + wait > self._retry_for:
            raise error
        self._wait = min(2 * self._wait, _LONGEST_WAIT)
        self._hops = 0
        if stop is None:
            time.sleep(wait)
        else:
            stop.wait(wait)
