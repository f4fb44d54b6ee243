"""Several servers that hold the same datasets: which one a call goes to, and when one that failed is used again.

Each call goes to its preferred server unless that one has been put aside: its connection failed, it drains, it did not answer in time, or has no
room. While one is put aside, a thread asks it by the health protocol whether it serves again. Nothing of this happens where there is one server.
"""

from __future__ import annotations

import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import grpc

from .channels import Channels

__all__ = ["Replicas"]

#: Seconds between two questions to a server that is put aside: at first, and at most.
_FIRST_ASK, _LAST_ASK = 0.25, 2.0

#: A call that begins within so many seconds of a server's return and brings nothing is the same trouble still: a server may say that it serves while
#: its reads hang, and each return costs a reader its whole timeout.
_SAME_TROUBLE = 10.0

#: Then the server stays away for so much longer than before, in seconds at first and at most.
_FIRST_HOLD, _HOLD_GROWTH, _LAST_HOLD = 0.25, 4, 60.0

#: Milliseconds for a connection to be made, where another server can be asked instead: gRPC's own 20 s are how long a machine that is gone, and
#: refuses nothing, would stall its first caller.
_CONNECT_MS = 4_000


class _Trouble:
    """How a server has failed.

    Attributes:
        back_since: When it was last used again.
        hold: Seconds that it was to stay aside, whatever it says.
        until: When they are over.
    """

    __slots__ = ("back_since", "hold", "until")

    def __init__(self) -> None:
        self.back_since = self.until = float("-inf")
        self.hold = 0.0

    def again(self, now: float, began: float | None) -> None:
        """It failed; see :meth:`Replicas.put_aside`."""
        if began is None:
            self.hold = 0.0
        elif began - self.back_since > _SAME_TROUBLE:
            # Away for no shorter than it has just kept a caller waiting.
            self.hold = min(now - began, _LAST_HOLD)
        else:
            self.hold = min(max(now - began, _FIRST_HOLD, _HOLD_GROWTH * self.hold), _LAST_HOLD)
        self.until = now + self.hold


class Replicas:
    """The servers of a connection, and the channels to each. Safe to use from any thread.

    Args:
        targets: ``HOST:PORT`` of each.
        make: Makes a channel to one, with these options of gRPC's.
        ask: Whether a server serves; may take a second.
        clock: Seconds.

    Attributes:
        targets: As given.
        preferred: Which of them calls go to, by number, counted round, unless they say otherwise: at first any, so that many clients spread over
            all. How often it goes round decides which one comes next where that one is away, so that its clients spread over the others.
    """

    def __init__(
        self,
        targets: Sequence[str],
        make: Callable[[str, tuple[tuple[str, Any], ...]], grpc.Channel],
        ask: Callable[[str], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.targets = tuple(targets)
        further = (("grpc.min_reconnect_backoff_ms", _CONNECT_MS),) if len(self.targets) > 1 else ()
        self.channels = [Channels(target, lambda target: make(target, further)) for target in self.targets]
        self._only = self.channels[0] if len(self.channels) == 1 else None
        self._ask, self._clock = ask, clock
        self.begin_anew()

    def begin_anew(self) -> None:
        """In a new process: locks, threads and channels stayed with the parent."""
        for channels in self.channels:
            channels.begin_anew()
        # Reentrant: garbage collection may end a stream in the middle of what is locked here.
        self._lock = threading.RLock()
        # Those put aside, the one put aside last at the end.
        self._aside: list[Channels] = []
        self._troubles = {channels: _Trouble() for channels in self.channels}
        self._asking: threading.Thread | None = None
        self.preferred = random.randrange(max(1, len(self.targets) * (len(self.targets) - 1)))

    @property
    def are_several(self) -> bool:
        """Whether there is more than one."""
        return self._only is None

    def home(self, offset: int | None = None) -> Channels:
        """The channels that are preferred, put aside or not.

        Args:
            offset: Prefer the server of that number, counted round; by default :attr:`preferred`.
        """
        return self.channels[(self.preferred if offset is None else offset) % len(self.channels)]

    def pick(self, offset: int | None = None) -> Channels:
        """The channels for a call: the preferred ones, or the next that are not put aside; of servers that all are, the one that failed first.

        Args:
            offset: As for :meth:`home`.
        """
        if self._only is not None:
            return self._only
        count = len(self.channels)
        rounds, first = divmod(self.preferred if offset is None else offset, count)
        with self._lock:
            for place in range(count):
                # The others in turn, beginning with another one each time round.
                step = 1 + (place - 1 + rounds) % (count - 1) if place else 0
                found = self.channels[(first + step) % count]
                if found not in self._aside:
                    return found
            return self._aside[0]

    def is_aside(self, channels: Channels) -> bool:
        """Whether a server is put aside."""
        return channels in self._aside

    def put_aside(self, channels: Channels, began: float | None = None) -> bool:
        """A call to a server failed as it does where the server is away; returns whether there is another one that has not.

        Args:
            channels: The server's.
            began: When that call began, where it brought nothing: a server that says it serves, and does not, is believed ever later.
        """
        if self._only is not None:
            return False
        with self._lock:
            if channels in self._aside:
                self._aside.remove(channels)
            else:
                self._troubles[channels].again(self._clock(), began)
            self._aside.append(channels)
            if self._asking is None or not self._asking.is_alive():
                # It holds this object weakly: whoever drops a connection need not close it.
                asking = threading.Thread(target=_readmit, args=(weakref.ref(self),), name="ome-tensor-replicas", daemon=True)
                # A process that is ending takes no more threads, and needs no answer.
                with suppress(RuntimeError):
                    asking.start()
                    self._asking = asking
            return len(self._aside) < len(self.channels)

    def close(self) -> None:
        """Close all channels; the next call opens others."""
        with self._lock:
            self._aside = []
            self._troubles = {channels: _Trouble() for channels in self.channels}
        for channels in self.channels:
            channels.close()

    def _waiting(self) -> list[Channels]:
        """Those that are to be asked; none: the thread that asks ends."""
        with self._lock:
            if not self._aside:
                self._asking = None
            return list(self._aside)

    def _look(self, channels: Channels) -> None:
        trouble = self._troubles[channels]
        if self._clock() < trouble.until or not self._ask(channels.target):
            return
        with self._lock:
            if channels in self._aside:
                self._aside.remove(channels)
                trouble.back_since = self._clock()


def _readmit(owner: weakref.ref[Replicas]) -> None:
    pause, clock = _FIRST_ASK, threading.Event()
    while True:
        clock.wait(pause)
        pause = min(2 * pause, _LAST_ASK)
        replicas = owner()
        if replicas is None:
            return
        for channels in (waiting := replicas._waiting()):
            replicas._look(channels)
        if not waiting:
            return
        del replicas
