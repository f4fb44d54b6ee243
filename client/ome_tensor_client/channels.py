"""The channels of one process to one server: the one for new calls, and those left behind while calls still run on them.

A server may be several workers on one port. A client is on the worker that the kernel picked for its connection, and reaches another one only by
connecting anew: when its worker shuts down, or, for a long read, when another worker has less to do.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast

import grpc

__all__ = ["Channels", "Impatient", "Moves"]

#: How often one read connects anew because another worker has less to do. The kernel picks a worker by chance each time: of two, sixteen tries miss
#: the free one once in 65,536 reads, of eight once in eight; after that a busy one is better than none.
_MOST_MOVES = 16

#: Before each of them, in seconds: clients that were refused together must not come back together.
_MOVE_PAUSE = (0.001, 0.008)

#: After a read has moved, the connection stays where it is for so long, in seconds: sixteen moves take about 0.1 s, so at most 2 % of the time
#: goes into moving, whatever the server says.
_SETTLED_SECONDS = 5.0

#: A read does not move while calls still run on so many connections left before.
_MOST_LEFT = 4

#: For so long gRPC tries to make a connection before it tries anew, in seconds (its ``grpc.min_reconnect_backoff_ms``).
_CONNECTING_SECONDS = 20.0


class Impatient(Protocol):
    """Whoever cancels a call that brings nothing.

    Attributes:
        timed_out: Whether it has.
    """

    timed_out: bool


class _Link:
    """A channel, and how it is used.

    Attributes:
        running: Calls that run on it.
        has_answered: Whether a call has brought anything.
        made: When, by time.monotonic().
    """

    __slots__ = ("channel", "has_answered", "made", "running")

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.running = 0
        self.has_answered = False
        self.made = time.monotonic()

    @property
    def may_be_dead(self) -> bool:
        """Whether a wait in vain on it may be its fault; one that is still being made may only take longer than its first callers wait."""
        return self.has_answered or time.monotonic() - self.made > _CONNECTING_SECONDS


class Channels:
    """A channel made when first used. Safe to use from any thread.

    Args:
        target: ``HOST:PORT``.
        make: Makes a channel to it.

    Attributes:
        target: As given.
    """

    def __init__(self, target: str, make: Callable[[str], grpc.Channel]) -> None:
        self.target, self._make = target, make
        # Those that are open: the current one, if there is one, and those that were left.
        self._links: list[_Link] = []
        # Channels of a parent process: destroying one after a fork would wait for threads that only the parent has.
        self._inherited: list[_Link] = []
        self.begin_anew()

    def begin_anew(self) -> None:
        """In a forked child: locks and channels stayed with the parent."""
        # Reentrant: a stream that garbage collection ends may do so in the middle of what is locked here.
        self._lock = threading.RLock()
        self._inherited += self._links
        self._links = []
        self._current: _Link | None = None
        self._settled_until = float("-inf")

    @property
    def current(self) -> grpc.Channel:
        """The channel for new calls."""
        with self._lock:
            return self._link().channel

    def _link(self) -> _Link:
        if self._current is None:
            self._current = _Link(self._make(self.target))
            self._links.append(self._current)
        return self._current

    @property
    def count(self) -> int:
        """How many are open."""
        return len(self._links)

    @contextmanager
    def use(self, waiting: Impatient | None = None) -> Iterator[grpc.Channel]:
        """The channel for one call; it is not closed before the block ends, unless by :meth:`close`.

        Where the block raises that the server is not available, the next call opens a connection of its own. Where it was the server that refused
        the call, as one that shuts down does, other workers may listen on that port, and the old connection would lead to the same one until it is
        gone. Where the connection failed, gRPC would make it anew by itself, but some releases (1.71) do so only while a call waits for it, and
        a call that fails at once does not: such a channel may never connect again.

        So does a call that was waited for in vain on a connection that has been made. It may have been a slow server, and then that costs a
        handshake; or the connection brings nothing any more, as where one bit of a frame's length is flipped and the other side waits for
        megabytes, and then every call on it would wait in vain until keepalive notices, a minute later.

        Args:
            waiting: Who waits for messages of the call, where it has no deadline of its own.
        """
        with self._lock:
            link = self._link()
            link.running += 1
        try:
            yield link.channel
            link.has_answered = True
        except grpc.RpcError as error:
            is_in_vain = _has_code(error, grpc.StatusCode.DEADLINE_EXCEEDED) or (waiting is not None and waiting.timed_out)
            if _has_code(error, grpc.StatusCode.UNAVAILABLE) or (is_in_vain and link.may_be_dead):
                self.leave(link.channel)
            raise
        finally:
            with self._lock:
                link.running -= 1
                idle = self._take_idle()
            _close(idle)

    def answered(self, channel: grpc.Channel) -> None:
        """A call that goes on has brought something."""
        with self._lock:
            for link in self._links:
                if link.channel is channel:
                    link.has_answered = True

    def leave(self, channel: grpc.Channel) -> None:
        """Make the next call open a connection of its own; calls in progress go on over the old one, which is closed behind the last of them.

        Of several calls that leave the same channel, only the first does anything.
        """
        with self._lock:
            if self._current is not None and self._current.channel is channel:
                self._current = None
            idle = self._take_idle()
        _close(idle)

    def _take_idle(self) -> list[_Link]:
        """Channels that were left and on which nothing runs any more."""
        idle = [link for link in self._links if link.running == 0 and link is not self._current]
        if idle:
            self._links = [link for link in self._links if link not in idle]
        return idle

    def close(self) -> None:
        """Close all; the next call opens another."""
        with self._lock:
            links, self._links, self._current = self._links, [], None
        _close(links)

    @property
    def is_settled(self) -> bool:
        """Whether reads are to stay where they are: one has moved lately, or calls still run on connections left before."""
        return time.monotonic() < self._settled_until or len(self._links) > _MOST_LEFT

    def claim_move(self) -> bool:
        """Whether the caller's read may move: one read at a time, and then none for a while."""
        with self._lock:
            if self.is_settled:
                return False
            self._settled_until = time.monotonic() + _SETTLED_SECONDS
            return True

    def __del__(self) -> None:
        if getattr(self, "_links", None):
            _closed_one()


class Moves:
    """What one read does where its server asks it to connect anew.

    Args:
        channels: Its client's.
    """

    def __init__(self, channels: Channels) -> None:
        self._channels = channels
        self._tries = _MOST_MOVES
        self._claimed = False
        self._offered = False

    def offer(self) -> bool:
        """Whether the next call says that it may be asked."""
        self._offered = self._tries > 0 and (self._claimed or not self._channels.is_settled)
        return self._offered

    def make(self, channel: grpc.Channel, stop: threading.Event) -> bool:
        """The call was asked to; returns, after a moment, whether to call again at once: a server that asks unbidden has failed.

        Args:
            channel: What the call ran on.
            stop: Ends the wait.
        """
        if not self._offered:
            return False
        self._claimed = self._claimed or self._channels.claim_move()
        if not self._claimed:
            self._tries = 0  # Another read of this client was quicker, and this one stays where it is.
            return True
        self._tries -= 1
        self._channels.leave(channel)
        stop.wait(random.uniform(*_MOVE_PAUSE))
        return True


def _has_code(error: grpc.RpcError, code: grpc.StatusCode) -> bool:
    return bool(hasattr(error, "code") and cast(Any, error).code() == code)


def _close(links: list[_Link]) -> None:
    for link in links:
        link.channel.close()
        _closed_one()


# When a channel of this process was last closed, by time.monotonic().
_closed_at = float("-inf")

#: gRPC takes a channel apart on threads of its own; a child forked meanwhile may wait forever for a lock one of them held (grpcio 1.85:
#: about one parent in forty that forked at once after a close; none in eighty with this pause).
_SETTLE_SECONDS = 0.05


def _closed_one() -> None:
    global _closed_at
    _closed_at = time.monotonic()


def _before_fork() -> None:
    # Only a fork within a moment of a close waits, so this costs nothing otherwise.
    time.sleep(max(0.0, _closed_at + _SETTLE_SECONDS - time.monotonic()))


os.register_at_fork(before=_before_fork)
