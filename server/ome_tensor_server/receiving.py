"""The messages of a stream that a client sends."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import grpc

from ome_tensor.errors import Cancelled, DeadlineExceeded

__all__ = ["Receiver", "gone"]


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
