"""Reflection (``grpc.reflection.v1alpha``): what services and messages there are, for tools that have no contract of their own."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from ome_tensor.errors import Cancelled

from .health import parsed
from .receiving import Requests

__all__ = ["MOST_CALLS", "Reflection"]

#: Calls at one time: each holds a thread while its client asks one thing after another.
MOST_CALLS = 8


class Reflection:
    """gRPC's own service, for a few clients at one time, and with bytes in: see :func:`.health.parsed`.

    Args:
        services: Full names of the services that it tells of.
        requests: Waits for calls' requests.
    """

    def __init__(self, services: Sequence[str], requests: Requests) -> None:
        self._requests = requests
        self._servicer = reflection.ReflectionServicer(services)
        self._places = threading.BoundedSemaphore(MOST_CALLS)

    @property
    def handler(self) -> grpc.GenericRpcHandler:
        """The service, for a server."""
        serialize = reflection_pb2.ServerReflectionResponse.SerializeToString
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(self._info, None, serialize)
        }
        return grpc.method_handlers_generic_handler(reflection.SERVICE_NAME, methods)

    def _info(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
        if not self._places.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"this server answers {MOST_CALLS} calls of reflection at once")
        try:
            received = iter(lambda: self._requests.next(requests, context), None)
            yield from self._servicer.ServerReflectionInfo(
                (parsed(reflection_pb2.ServerReflectionRequest, data, context) for data in received), context
            )
        except Cancelled:
            context.abort(grpc.StatusCode.CANCELLED, "the client has gone, or asked nothing for long")
        finally:
            self._places.release()
