"""What a client sends: the request of a call, or the messages of a stream.

Each is waited for on a thread, and gRPC lets a client take as long as it likes, so that a few clients that begin calls and send nothing would have
all threads. Hence every method is, for gRPC, one that takes a stream: the wait is then this server's own, and has its end.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import grpc

from ome_tensor.errors import Cancelled, DeadlineExceeded, InvalidArgument, Overloaded
from ome_tensor.watchdog import Watchdog

from .limits import RETRY_AFTER
from .principals import Caller

__all__ = ["REQUEST_SECONDS", "Receiver", "Requests", "gone"]

#: Seconds that the request of a call may take to come, at most; one of some megabytes takes a while over a slow line.
REQUEST_SECONDS = 30.0


class Requests:
    """Waits for the requests of calls that have one: of so many calls of one host (network of IPv6), and so long.

    Args:
        most: Calls of one host whose requests may be waited for at one time.
        seconds: How long each may take.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self._most = most
        self._watchdog = Watchdog(seconds, "ome-tensor-requests")
        self._waiting: Counter[str] = Counter()
        self._lock = threading.Lock()

    def first(self, parts: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        """The request of a call that has one.

        Raises:
            Cancelled: the client has gone, or has let it be waited for too long.
            InvalidArgument: the call has none.
            Overloaded: too many calls of this host have not sent theirs.
        """
        network = Caller(str(context.peer())).network
        with self._lock:
            if self._waiting[network] >= self._most:
                raise Overloaded(
                    f"{self._most} calls of {network} have sent no request yet, and no more are waited for; try again later",
                    field="request",
                    value=self._most,
                    retry_after=RETRY_AFTER,
                )
            self._waiting[network] += 1
        try:
            data = self.next(parts, context)
            if data is None:
                # A call that is given up often looks first as if it had no request. Asked again, gRPC has heard of what lies behind that.
                self.next(parts, context)
        finally:
            with self._lock:
                self._waiting[network] -= 1
                if not self._waiting[network]:
                    del self._waiting[network]
        if data is None:
            if not context.is_active():
                raise gone()
            raise InvalidArgument("the call has no request", field="request")
        return data

    def next(self, parts: Iterator[bytes], context: grpc.ServicerContext) -> bytes | None:
        """The next message of any call; ``None`` behind the last. Raises Cancelled."""
        wait = _Wait(context)
        self._watchdog.watch(wait)
        try:
            return next(parts, None)
        except grpc.RpcError:
            if wait.is_over:
                raise Cancelled(f"the client sent nothing for {self._watchdog.timeout:g} s") from None
            raise gone() from None
        finally:
            wait.waiting_since = None
            self._watchdog.forget(wait)


class _Wait:
    """A thread that waits for a message; see :class:`ome_tensor.watchdog.Waiting`."""

    def __init__(self, context: grpc.ServicerContext) -> None:
        self._context = context
        self.waiting_since: float | None = time.monotonic()
        self.is_over = False

    def expire(self) -> None:
        self.is_over = True
        self._context.cancel()


class Receiver:
    """The messages that a client sends, each waited for so long and no longer; the next one is received while one is worked on.

    Args:
        name: Of the method, for people.
        parts: The messages, as gRPC gives them.
        stall_seconds: How long the next one may take.
    """

    def __init__(self, name: str, parts: Iterator[bytes], stall_seconds: float) -> None:
        self._name, self._parts, self._stall_seconds = name, parts, stall_seconds
        self._thread = ThreadPoolExecutor(1, "ome-tensor-receive")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Not waited for: gRPC ends its wait only once the call is over.
        self._thread.shutdown(wait=False, cancel_futures=True)

    def __iter__(self) -> Iterator[bytes]:
        """Raises DeadlineExceeded where the next one does not come in time; Cancelled where the client has gone."""
        coming = self._thread.submit(next, self._parts, None)
        while (data := self._result(coming)) is not None:
            coming = self._thread.submit(next, self._parts, None)
            yield data
        # A call that is given up often looks first as if its stream had come to its end. Asked again, gRPC has heard of what lies behind that.
        self._result(self._thread.submit(next, self._parts, None))

    def _result(self, coming: Future[bytes | None]) -> bytes | None:
        try:
            return coming.result(self._stall_seconds)
        except TimeoutError:
            raise DeadlineExceeded(
                f"{self._name}: the client sent nothing for {self._stall_seconds:g} s, which this server waits at most (stall_seconds)",
                field="stall_seconds",
                value=self._stall_seconds,
            ) from None
        except grpc.RpcError:
            # All that gRPC raises here: the client has cancelled the call, its time is up, or the connection is lost.
            raise gone() from None


def gone() -> Cancelled:
    return Cancelled("the client has gone")
