"""The health service of gRPC (``grpc.health.v1``), of this server's own.

That of gRPC's package for Python sends while it holds its lock. A send is over when gRPC's one thread for events has seen to it; and that
thread waits for the lock whenever a watch ends. So one watch that ends while another one begins stops the whole server, for good, and one whose
client takes no message stops every check. Here nothing is sent under a lock, and nothing waits for a watch's client.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2

from ome_tensor.errors import OmeTensorError
from ome_tensor.watchdog import Watchdog
from ome_tensor_proto.status import to_status

from .principals import Caller
from .receiving import Requests

__all__ = ["Health", "parsed"]

M = TypeVar("M", bound=Message)

#: Watches at one time. They hold no thread while nothing changes, but a place each in the list of those who are told.
_MOST_WATCHES = 32

#: Those of one host: what it holds, others cannot.
_MOST_OF_ONE = 16

#: Threads that tell watches of a change: so many clients may leave a message untaken before others hear of it late.
_TELLERS = 16

#: Seconds that the last change has to reach the watches before they are ended.
_LAST_WORD = 1.0


def parsed(kind: type[M], data: bytes, context: grpc.ServicerContext) -> M:
    """A message; ends the call with INVALID_ARGUMENT where the bytes are none.

    gRPC's own deserialiser would say INTERNAL, write a traceback into the log, and, of a method that takes a stream, never let go of the call.
    """
    try:
        return kind.FromString(data)
    except DecodeError as error:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the request is not a valid {kind.DESCRIPTOR.name}: {error}")
        raise


class Health:
    """Says what the status of services is.

    Args:
        requests: Waits for calls' requests.
        catch_up: Waits until this worker serves what another one may have said it serves.
        stall_seconds: How long a watch's client may leave a message untaken.
    """

    def __init__(self, requests: Requests, catch_up: Callable[[], None], stall_seconds: float) -> None:
        self._requests = requests
        self._catch_up = catch_up
        self._watchdog = Watchdog(stall_seconds, "ome-tensor-health-stalls")
        #: Held for a moment only: gRPC's thread for events wants it.
        self._lock = threading.Lock()
        self._status: dict[str, int] = {}
        self._watches: dict[str, set[_Watch]] = {}
        self._tellers = futures.ThreadPoolExecutor(_TELLERS, thread_name_prefix="ome-tensor-health")
        self._told: list[futures.Future[None]] = []
        self._is_final = False

    @property
    def handler(self) -> grpc.GenericRpcHandler:
        """The service, for a server. Bytes in: see :func:`parsed`."""
        serialize = health_pb2.HealthCheckResponse.SerializeToString
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Check": grpc.stream_unary_rpc_method_handler(self.Check, None, serialize),
            "Watch": grpc.stream_stream_rpc_method_handler(self.Watch, None, serialize),
        }
        return grpc.method_handlers_generic_handler(health.SERVICE_NAME, methods)

    def _service(self, parts: Iterator[bytes], context: grpc.ServicerContext) -> str:
        """The service that a call is about; ends the call where it says none that could be read."""
        try:
            data = self._requests.first(parts, context)
        except OmeTensorError as error:
            context.abort_with_status(to_status(error))
            raise
        return parsed(health_pb2.HealthCheckRequest, data, context).service

    def Check(self, parts: Iterator[bytes], context: grpc.ServicerContext) -> Any:
        """See ``grpc.health.v1.Health``."""
        service = self._service(parts, context)
        self._catch_up()
        status = self._status.get(service)
        if status is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return health_pb2.HealthCheckResponse(status=status)

    def Watch(self, parts: Iterator[bytes], context: grpc.ServicerContext, send_response_callback: Callable[[Any], None]) -> None:
        """See ``grpc.health.v1.Health``; returns at once, and the call goes on. One watch too many ends with RESOURCE_EXHAUSTED."""
        service = self._service(parts, context)
        host = Caller(str(context.peer())).host
        with self._lock:
            hosts = [watch.host for watches in self._watches.values() for watch in watches]
        if len(hosts) >= _MOST_WATCHES or hosts.count(host) >= _MOST_OF_ONE:
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"this server answers {_MOST_WATCHES} health watches at once, {_MOST_OF_ONE} of them from one host",
            )
        with self._lock:
            status = self._status.get(service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
            watch = _Watch(context, host, send_response_callback, status, self._watchdog)
            self._watches.setdefault(service, set()).add(watch)
        if not context.add_callback(lambda: self._forget(service, watch)):
            self._forget(service, watch)  # Over already.
        watch.tell()

    # What gRPC calls a method that keeps no thread while it has nothing to say.
    Watch.experimental_non_blocking = True  # type: ignore[attr-defined]

    def _forget(self, service: str, watch: _Watch) -> None:
        with self._lock:
            watches = self._watches.get(service, set())
            watches.discard(watch)
            if not watches:
                self._watches.pop(service, None)

    def set(self, services: Iterable[str], status: int) -> None:
        """Say that the status of these services is another one from now on; after :meth:`shut_down` nothing happens."""
        with self._lock:
            if not self._is_final:
                self._set(services, status)

    def shut_down(self) -> None:
        """No service serves any more, whatever is said later."""
        with self._lock:
            self._set(list(self._status), health_pb2.HealthCheckResponse.NOT_SERVING)
            self._is_final = True

    def _set(self, services: Iterable[str], status: int) -> None:
        self._told = [one for one in self._told if not one.done()]
        for service in services:
            if self._status.get(service) != status:
                self._status[service] = status
                for watch in self._watches.get(service, ()):
                    watch.status = status
                    self._told.append(self._tellers.submit(watch.tell))

    def end_watches(self) -> None:
        """End every watch; they may hear the last change first."""
        futures.wait(self._told, _LAST_WORD)
        with self._lock:
            watches = [watch for several in self._watches.values() for watch in several]
        for watch in watches:
            watch.context.cancel()
        self._tellers.shutdown(wait=False)


class _Watch:
    """A client that wants to hear of changes.

    Attributes:
        context: Its call.
        host: Where it comes from.
        status: What it is to hear, if it has not.
        waiting_since: When it was offered a message that it has not taken yet; ``None`` while none is on offer.
    """

    def __init__(
        self, context: grpc.ServicerContext, host: str, send: Callable[[Any], None], status: int, watchdog: Watchdog
    ) -> None:
        self.context, self.host = context, host
        self.status = status
        self.waiting_since: float | None = None
        self._told: int | None = None
        self._send = send
        self._watchdog = watchdog
        self._telling = threading.Lock()

    def tell(self) -> None:
        """Send what it has not heard; where another thread is about it, that one does. Waits for as long as the client takes no message."""
        while self.status != self._told and self._telling.acquire(blocking=False):
            self._watchdog.watch(self)
            try:
                self._told = self.status
                self.waiting_since = time.monotonic()
                self._send(health_pb2.HealthCheckResponse(status=self._told))
            finally:
                self.waiting_since = None
                self._watchdog.forget(self)
                self._telling.release()

    def expire(self) -> None:
        """The client has left a message untaken for too long: free the thread."""
        self.context.cancel()
