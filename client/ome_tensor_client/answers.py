"""Answers to calls that are short: waited for message by message, and checked for what the network may have done to them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import grpc

from ome_tensor.errors import BrokenStream
from ome_tensor.watchdog import Watchdog
from ome_tensor_proto.checksums import AnswerChecksum
from ome_tensor_proto.methods import CHECKSUM

__all__ = ["Messages", "Sending", "check_answer", "end_call", "only_answer"]

#: What a server has for its answer to all that it was sent, beyond the usual: it checks an upload, which takes a while for each byte.
_CHECKED_BYTES_PER_SECOND = 20e6
_SHORT = 9


def end_call(call: Any) -> None:
    """Cancel a streaming call and hear of its end, on the thread that reads it.

    Of a stream that is read on its reader's thread (``SingleThreadedUnaryStream``) nobody else hears of that, and gRPC keeps the call for as long
    as its channel lives (grpcio 1.85: 18 KB each). It has no public way to ask: ``next()`` raises at once. Where its insides are others, nothing is
    done, and a test says so.
    """
    call.cancel()
    hear, state = getattr(call, "_consume_next_event", None), getattr(call, "_state", None)
    while hear is not None and getattr(state, "due", None):
        # Of a cancelled call every operation ends at once, whatever the network does.
        hear()


def only_answer(answer: bytes | None) -> bytes:
    """The answer of a unary call. Raises BrokenStream where it ended well without one: gRPC then gives ``None``."""
    if answer is None:
        raise BrokenStream("the call ended well, and no answer came")
    return answer


def check_answer(request: bytes, messages: Sequence[bytes], call: Any) -> None:
    """Whether request and answer arrived as they were sent.

    Args:
        request: As it was sent, asking for a checksum.
        messages: As they arrived.
        call: gRPC's, which is over.

    Raises:
        BrokenStream: they did not, or the server does not say.
    """
    said = next((value for name, value in call.trailing_metadata() or () if name == CHECKSUM), None)
    checksum = AnswerChecksum(request)
    for message in messages:
        checksum.update(message)
    if said != checksum.text:
        raise BrokenStream(
            "request or answer did not arrive as it was sent (its checksum differs)" if said else "the answer has no checksum"
        )


class Messages:
    """The messages of a short stream, each waited for as long as the watchdog's timeout.

    Attributes:
        timed_out: Whether one did not come.
        waiting_since: See :class:`ome_tensor.watchdog.Waiting`.
    """

    def __init__(self) -> None:
        self.timed_out = False
        self.waiting_since: float | None = None
        self._call: Any = None

    def of(self, call: Any, watchdog: Watchdog) -> list[bytes]:
        """All of a call."""
        self._call, self.waiting_since = call, time.monotonic()
        watchdog.watch(self)
        try:
            found = []
            for message in call:
                found.append(message)
                self.waiting_since = time.monotonic()
            return found
        finally:
            watchdog.forget(self)

    def expire(self) -> None:
        """One did not come."""
        self.timed_out = True
        self._call.cancel()


class Sending:
    """A call that sends a stream: each message has to be taken as soon as an answer has to come, and the answer to the last in good time.

    Attributes:
        timed_out: Whether one was not.
        waiting_since: See :class:`ome_tensor.watchdog.Waiting`.
    """

    def __init__(self, parts: Iterator[bytes], timeout: float) -> None:
        self._parts, self._timeout = parts, timeout
        self._call: Any = None
        self.timed_out = False
        self.waiting_since: float | None = None

    def _sent(self) -> Iterator[bytes]:
        """The parts, for gRPC to take."""
        nbytes = 0
        for part in self._parts:
            self.waiting_since = time.monotonic()
            nbytes += len(part)
            yield part
            # What comes next may take its time to be made.
            self.waiting_since = None
        # As if the wait began later.
        self.waiting_since = time.monotonic() + _SHORT * self._timeout + nbytes / _CHECKED_BYTES_PER_SECOND

    def of(self, method: Any, watchdog: Watchdog, **options: Any) -> bytes:
        """The answer.

        Args:
            method: gRPC's, of a call that sends a stream.
            watchdog: Ends a wait that is too long.
            options: For the call.
        """
        self._call = method.future(self._sent(), **options)
        watchdog.watch(self)
        try:
            return only_answer(self._call.result())
        except grpc.FutureCancelledError:
            # Only the watchdog cancels it; gRPC has its own error for that, which says no more.
            raise self._call from None
        finally:
            watchdog.forget(self)
            # Interrupted (Ctrl-C), nobody waits for it any more.
            self._call.cancel()

    def expire(self) -> None:
        """Something took too long."""
        self.timed_out = True
        self._call.cancel()
