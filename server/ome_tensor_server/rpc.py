"""One way in for every call: parse and bound the request, map errors to statuses, log one line.

Service code is written as plain functions ``handler(request, call)``; it raises the errors of ``ome_tensor.errors`` and never speaks gRPC.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from ome_tensor.errors import InvalidArgument, LimitExceeded, OmeTensorError, ServerError
from ome_tensor.watchdog import Watchdog
from ome_tensor_proto.checksums import AnswerChecksum
from ome_tensor_proto.methods import ADMIN_METHODS, CHECKSUM, METHODS, ONE_MESSAGE, Method
from ome_tensor_proto.status import to_status

from .calls import Call, Gate
from .drain import ActiveCalls
from .logs import Fields
from .receiving import Receiver, Requests, gone

__all__ = ["handlers"]

_log = logging.getLogger(__name__)


Handler = Callable[[Any, Call], Any]


def handlers(
    service: Mapping[str, Handler],
    gate: Gate,
    calls: ActiveCalls,
    requests: Requests,
    max_request_bytes: int,
    stall_seconds: float,
) -> grpc.GenericRpcHandler:
    """gRPC handlers for functions named as the contract's methods; a streaming one yields message bytes.

    Args:
        service: The functions by method name.
        gate: What every call passes.
        calls: Where running calls are counted.
        requests: Waits for their requests.
        max_request_bytes: Largest request.
        stall_seconds: How long a message of a stream may stay untaken, or the next one of a stream that is sent here may take to come.

    Raises:
        KeyError: a method of the contract has no function.
    """
    watchdog = Watchdog(stall_seconds, "ome-tensor-stalls")
    table: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {}
    of_one_message: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {}
    for name, method in (*METHODS.items(), *ADMIN_METHODS.items()):
        # Bytes in, bytes out: gRPC's own deserialiser would answer garbage with INTERNAL and a traceback. A stream in, always: see .receiving. On
        # the wire a stream of one request is the same as a request.
        if method.takes_stream:
            table[method.path] = grpc.stream_unary_rpc_method_handler(
                _taking(method, service[name], gate, calls, max_request_bytes, stall_seconds)
            )
        elif method.streaming:
            table[method.path] = grpc.stream_stream_rpc_method_handler(
                _streaming(method, service[name], gate, calls, requests, max_request_bytes, watchdog)
            )
            of_one_message[method.path] = grpc.stream_unary_rpc_method_handler(
                _unary(method, _only(service[name]), gate, calls, requests, max_request_bytes)
            )
        else:
            table[method.path] = grpc.stream_unary_rpc_method_handler(
                _unary(method, service[name], gate, calls, requests, max_request_bytes)
            )
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
            message = next(messages, None)
            if message is None:
                raise gone()  # A stream without a message is one that nobody wants any more.
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
        _log.exception(Fields("unexpected", method=call.method, image=call.image, request=call.request_id))
        error = ServerError(f"unexpected {type(error).__name__} in {call.method}; the server's log has the details")
    status = to_status(error)
    call.finish(status.code.name, error)
    context.abort_with_status(status)


def _as_bytes(message: bytes | Message) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


def _admitted(call: Call, parts: Iterator[bytes], context: grpc.ServicerContext, calls: ActiveCalls, requests: Requests) -> bytes:
    """The request of a call. Who calls is found out first: a stranger's is not waited for."""
    try:
        call.admit()
        with call.others_time():
            data = requests.first(parts, context)
    finally:
        # Only now: whoever drains a server waits for no request.
        calls.add(context)
    call.begin(data)
    return data


def _unary(
    method: Method, handler: Handler, gate: Gate, calls: ActiveCalls, requests: Requests, max_request_bytes: int
) -> Callable[[Iterator[bytes], grpc.ServicerContext], bytes]:
    def answer(parts: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        call = Call(method.name, context, gate)
        try:
            data = _admitted(call, parts, context, calls, requests)
            answered = handler(_parse(method, data, max_request_bytes), call)
            message: bytes = answered if isinstance(answered, bytes) else answered.SerializeToString()
        except Exception as error:
            _refuse(error, call, context)
            raise
        finally:
            call.end()
        call.nbytes = len(message)
        if call.wants_checksum:
            checksum = AnswerChecksum(data)
            checksum.update(message)
            context.set_trailing_metadata(((CHECKSUM, checksum.text),))
        call.finish("OK")
        return message

    return answer


def _taking(
    method: Method, handler: Handler, gate: Gate, calls: ActiveCalls, max_request_bytes: int, stall_seconds: float
) -> Callable[[Iterator[bytes], grpc.ServicerContext], bytes]:
    def answer(parts: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        calls.add(context)
        call = Call(method.name, context, gate)
        # gRPC waits for a message as long as the client likes. So another thread waits for it, and the call's own thread for that one, as long as
        # is allowed: unlike one that a watchdog cancels, it can still say why it ends the call.
        with Receiver(method.name, parts, stall_seconds) as received:

            def requests() -> Iterator[Message]:
                for data in received:
                    call.check_access()
                    gate.meters.add("received_bytes", value=len(data))
                    yield _parse(method, data, max_request_bytes)
                # A client that goes may end its stream as one that is through does.
                if not call.is_active:
                    raise gone()

            try:
                call.admit()
                message: bytes = handler(requests(), call).SerializeToString()
            except Exception as error:
                _refuse(error, call, context)
                raise
            finally:
                call.end()
        call.finish("OK")
        return message

    return answer


def _streaming(
    method: Method,
    handler: Handler,
    gate: Gate,
    calls: ActiveCalls,
    requests: Requests,
    max_request_bytes: int,
    watchdog: Watchdog,
) -> Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]:
    def answer(parts: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        call = Call(method.name, context, gate)
        messages: Iterator[bytes] = iter(())
        watchdog.watch(call)
        try:
            data = _admitted(call, parts, context, calls, requests)
            messages = handler(_parse(method, data, max_request_bytes), call)
            checksum = AnswerChecksum(data) if call.wants_checksum else None
            for message in map(_as_bytes, messages):
                if checksum is not None:
                    checksum.update(message)
                # Whoever is let out in the middle of a read is told so instead of given more.
                call.check_access()
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
            if checksum is not None:
                context.set_trailing_metadata(((CHECKSUM, checksum.text),))
            call.finish("OK" if call.is_active else "CANCELLED")
        finally:
            watchdog.forget(call)
            # At once, not when somebody collects garbage: it holds a place among the concurrent reads.
            close = getattr(messages, "close", None)
            if close is not None:
                close()
            call.end()

    return answer
