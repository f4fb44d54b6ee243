"""Answers to calls that are short: waited for message by message, and checked for what the network may have done to them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from xxhash import xxh3_64

from ome_tensor.errors import BrokenStream
from ome_tensor.watchdog import Watchdog
from ome_tensor_proto.methods import CHECKSUM

__all__ = ["Messages", "check_answer", "only_answer"]


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
    hasher = xxh3_64(request)
    for message in messages:
        hasher.update(message)
    if said != hasher.hexdigest():
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
