"""A gRPC server that passes every call on to a true one, and changes some of the answers: a server that lies, or one that is older."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc

from ome_tensor_proto.methods import METHODS, SERVICE


@contextmanager
def relay(
    truth: str, changes: Mapping[str, Callable[[Any], Any]], asks: Mapping[str, Callable[[bytes], bytes]] | None = None
) -> Iterator[str]:
    """Its address.

    Args:
        truth: The true server.
        changes: By the contract's method names: what becomes of an answer. Of a stream that is the list of its messages, else the message; as bytes.
        asks: What becomes of a request.
    """

    def metadata(given: Any) -> list[tuple[str, Any]]:
        return [(name, value) for name, value in given or () if name.startswith(("ome-tensor", "grpc-status-details"))]

    @contextmanager
    def errors_passed_on(context: grpc.ServicerContext) -> Iterator[None]:
        try:
            yield
        except grpc.RpcError as error:
            context.set_trailing_metadata(metadata(error.trailing_metadata()))
            context.abort(error.code(), error.details())

    with grpc.insecure_channel(truth) as channel:

        def pass_on(name: str) -> grpc.RpcMethodHandler:
            path = METHODS[name].path
            change = changes.get(name, lambda answer: answer)
            ask = (asks or {}).get(name, lambda request: request)

            def stream(data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
                with errors_passed_on(context):
                    call = channel.unary_stream(path)(ask(data), timeout=10, metadata=metadata(context.invocation_metadata()))
                    answer = list(call)
                context.set_trailing_metadata(metadata(call.trailing_metadata()))
                return iter(change(answer))

            def unary(data: bytes, context: grpc.ServicerContext) -> bytes:
                method = channel.unary_unary(path)
                with errors_passed_on(context):
                    answer, call = method.with_call(ask(data), timeout=10, metadata=metadata(context.invocation_metadata()))
                context.set_trailing_metadata(metadata(call.trailing_metadata()))
                return change(answer)

            if METHODS[name].streaming:
                return grpc.unary_stream_rpc_method_handler(stream)
            return grpc.unary_unary_rpc_method_handler(unary)

        pool = futures.ThreadPoolExecutor(4)
        server = grpc.server(pool)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {name: pass_on(name) for name in METHODS}),)
        )
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(0).wait()
            pool.shutdown()
