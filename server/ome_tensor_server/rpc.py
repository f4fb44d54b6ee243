"""One way in for every call: parse and bound the request, map errors to statuses, log one line.

Service code is written as plain functions ``handler(request, call)``; it raises the errors of ``ome_tensor.errors`` and never speaks gRPC.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, Self

import grpc
from google.protobuf.message import DecodeError, Message

from ome_tensor.errors import Cancelled, DeadlineExceeded, InvalidArgument, LimitExceeded, OmeTensorError, ServerError
from ome_tensor.watchdog import Watchdog
from ome_tensor_proto.methods import ADMIN_METHODS, MAY_MOVE, METHODS, ONE_MESSAGE, Method
from ome_tensor_proto.status import to_status

from .drain import ActiveCalls
from .logs import Fields

__all__ = ["Call", "handlers"]

_log = logging.getLogger(__name__)


class Call:
    """One call in progress: what its log line will say, and whether the client is still there.

    Attributes:
        image: Key of what it is about, once known.
        tiles: Tiles sent so far.
        nbytes: Bytes of messages sent so far.
        waiting_since: When the client was offered the message it has not taken yet; ``None`` while none is on offer.
    """

    def __init__(self, method: str, context: grpc.ServicerContext) -> None:
        self.method = method
        self.image: str | None = None
        self.tiles: int | None = None
        self.nbytes = 0
        self.waiting_since: float | None = None
        self._stalled = False
        self._context = context
        self._at_end: list[Callable[[], None]] = []
        self._began = time.perf_counter()

    @property
    def is_active(self) -> bool:
        """Whether anybody still wants the answer: a cancelled stream does not stop its own thread."""
        return bool(self._context.is_active())

    @property
    def peer(self) -> str:
        """The client's address, as gRPC gives it."""
        return str(self._context.peer())

    @property
    def may_move(self) -> bool:
        """Whether the client would rather connect anew than share a busy worker."""
        return any(name == MAY_MOVE for name, _ in self._context.invocation_metadata())

    @property
    def time_remaining(self) -> float:
        """Seconds until the client gives up; infinite where it does not say."""
        remaining = self._context.time_remaining()
        return float("inf") if remaining is None else float(remaining)

    def at_end(self, do: Callable[[], None]) -> None:
        """Something to be done when the call is through, however it ends."""
        self._at_end.append(do)

    def end(self) -> None:
        """The call is through."""
        while self._at_end:
            self._at_end.pop()()

    def expire(self) -> None:
        """The client has left a message untaken for too long: free the thread. A client that comes back resumes."""
        self._stalled = True
        self._context.cancel()

    def finish(self, status: str, error: str | None = None) -> None:
        """Write the call's line."""
        if self._stalled:
            status, error = "CANCELLED", "stalled: the client left a message untaken"
        level = logging.INFO if status in ("OK", "CANCELLED") else logging.WARNING
        if not _log.isEnabledFor(level):
            return
        _log.log(
            level,
            Fields(
                "call",
                method=self.method,
                image=self.image,
                bytes=self.nbytes,
                tiles=self.tiles,
                ms=(time.perf_counter() - self._began) * 1e3,
                status=status,
                peer=self._context.peer(),
                error=error,
            ),
        )


Handler = Callable[[Any, Call], Any]


def handlers(
    service: Mapping[str, Handler], calls: ActiveCalls, max_request_bytes: int, stall_seconds: float
) -> grpc.GenericRpcHandler:
    """gRPC handlers for functions named as the contract's methods; a streaming one yields message bytes.

    Args:
        service: The functions by method name.
        calls: Where running calls are counted.
        max_request_bytes: Largest request.
        stall_seconds: How long a message of a stream may stay untaken, or the next one of a stream that is sent here may take to come.

    Raises:
        KeyError: a method of the contract has no function.
    """
    watchdog = Watchdog(stall_seconds, "ome-tensor-stalls")
    table: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {}
    of_one_message: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {}
    for name, method in (*METHODS.items(), *ADMIN_METHODS.items()):
        # Bytes in, bytes out: gRPC's own deserialiser would answer garbage with INTERNAL and a traceback.
        if method.takes_stream:
            table[method.path] = grpc.stream_unary_rpc_method_handler(
                _taking(method, service[name], calls, max_request_bytes, stall_seconds)
            )
        elif method.streaming:
            table[method.path] = grpc.unary_stream_rpc_method_handler(
                _streaming(method, service[name], calls, max_request_bytes, watchdog)
            )
            of_one_message[method.path] = grpc.unary_unary_rpc_method_handler(
                _unary(method, _only(service[name]), calls, max_request_bytes)
            )
        else:
            table[method.path] = grpc.unary_unary_rpc_method_handler(_unary(method, service[name], calls, max_request_bytes))
    return _Methods(table, of_one_message)


class _Methods(grpc.GenericRpcHandler):
    """Finds a call's handler: by its method, and by whether its client expects a single message of a stream."""

    def __init__(
        self,
        table: Mapping[str, grpc.RpcMethodHandler[bytes, bytes]],
        of_one_message: Mapping[str, grpc.RpcMethodHandler[bytes, bytes]],
    ) -> None:
        self._table, self._of_one_message = table, of_one_message

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        """See gRPC; ``None`` for a method that is not here."""
        path = handler_call_details.method
        if path in self._of_one_message and any(name == ONE_MESSAGE for name, _ in handler_call_details.invocation_metadata):
            return self._of_one_message[path]
        return self._table.get(path)


def _only(handler: Handler) -> Handler:
    """A streaming handler's only message."""

    def answer(request: Any, call: Call) -> bytes:
        messages: Generator[bytes, None, None] = handler(request, call)
        # The stream's own clean-up runs when it is closed: at once, since it holds a place among the concurrent reads.
        with closing(messages):
            message = next(messages)
            if next(messages, None) is not None:
                raise InvalidArgument(f"{ONE_MESSAGE}: this read takes more than one message", field=ONE_MESSAGE)
            return message

    return answer


def _parse(method: Method, data: bytes, max_request_bytes: int) -> Message:
    if len(data) > max_request_bytes:
        raise LimitExceeded(
            f"the request is {len(data)} bytes; this server takes at most {max_request_bytes}", field="request", value=len(data)
        )
    try:
        return method.request.FromString(data)
    except DecodeError as error:
        raise InvalidArgument(f"the request is not a valid {method.request.DESCRIPTOR.name}: {error}", field="request") from None


def _refuse(error: Exception, call: Call, context: grpc.ServicerContext) -> None:
    """End the call with the status of the error; raises, as gRPC's abort does."""
    if not isinstance(error, OmeTensorError):
        _log.exception(Fields("unexpected", method=call.method, image=call.image))
        error = ServerError(f"unexpected {type(error).__name__} in {call.method}; the server's log has the details")
    status = to_status(error)
    call.finish(status.code.name, str(error))
    context.abort_with_status(status)


def _as_bytes(message: bytes | Message) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


def _unary(
    method: Method, handler: Handler, calls: ActiveCalls, max_request_bytes: int
) -> Callable[[bytes, grpc.ServicerContext], bytes]:
    def answer(data: bytes, context: grpc.ServicerContext) -> bytes:
        calls.add(context)
        call = Call(method.name, context)
        try:
            answered = handler(_parse(method, data, max_request_bytes), call)
            message: bytes = answered if isinstance(answered, bytes) else answered.SerializeToString()
        except Exception as error:
            _refuse(error, call, context)
            raise
        finally:
            call.end()
        call.nbytes = len(message)
        call.finish("OK")
        return message

    return answer


def _taking(
    method: Method, handler: Handler, calls: ActiveCalls, max_request_bytes: int, stall_seconds: float
) -> Callable[[Iterator[bytes], grpc.ServicerContext], bytes]:
    def answer(parts: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        calls.add(context)
        call = Call(method.name, context)
        # gRPC waits for a message as long as the client likes. So another thread waits for it, and the call's own thread for that one, as long as
        # is allowed: unlike one that a watchdog cancels, it can still say why it ends the call.
        with _Receiver(method.name, parts, stall_seconds) as received:

            def requests() -> Iterator[Message]:
                for data in received:
                    call.nbytes += len(data)
                    yield _parse(method, data, max_request_bytes)
                # A client that goes may end its stream as one that is through does.
                if not call.is_active:
                    raise _gone()

            try:
                message: bytes = handler(requests(), call).SerializeToString()
            except Exception as error:
                _refuse(error, call, context)
                raise
            finally:
                call.end()
        call.finish("OK")
        return message

    return answer


class _Receiver:
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
            raise _gone() from None


def _gone() -> Cancelled:
    return Cancelled("the client has gone")


def _streaming(
    method: Method, handler: Handler, calls: ActiveCalls, max_request_bytes: int, watchdog: Watchdog
) -> Callable[[bytes, grpc.ServicerContext], Iterator[bytes]]:
    def answer(data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        calls.add(context)
        call = Call(method.name, context)
        messages: Iterator[bytes] = iter(())
        watchdog.watch(call)
        try:
            messages = handler(_parse(method, data, max_request_bytes), call)
            for message in map(_as_bytes, messages):
                call.nbytes += len(message)
                call.waiting_since = time.monotonic()
                yield message
                call.waiting_since = None
        except GeneratorExit:
            call.finish("CANCELLED")
            raise
        except Exception as error:
            _refuse(error, call, context)
            raise
        else:
            call.finish("OK" if call.is_active else "CANCELLED")
        finally:
            watchdog.forget(call)
            # At once, not when somebody collects garbage: it holds a place among the concurrent reads.
            close = getattr(messages, "close", None)
            if close is not None:
                close()
            call.end()

    return answer
