"""A gRPC server that passes every call on to a true one, and changes some of the answers: a server that lies, or one that is older."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc

from ome_tensor_proto.methods import METHODS, SERVICE


@contextmanager
def relay(truth: str, changes: Mapping[str, Callable[[Any], Any]]) -> Iterator[str]:
    """Its address.

    Args:
        truth: The true server.
        changes: By the contract's method names: what becomes of an answer. Of a stream that is the list of its messages, else the message; as bytes.
    """
    with grpc.insecure_channel(truth) as channel:

        def pass_on(name: str) -> grpc.RpcMethodHandler:
            path = METHODS[name].path
            change = changes.get(name, lambda answer: answer)
            if METHODS[name].streaming:
                return grpc.unary_stream_rpc_method_handler(
                    lambda data, context: iter(change(list(channel.unary_stream(path)(data, timeout=10))))
                )
            return grpc.unary_unary_rpc_method_handler(lambda data, context: change(channel.unary_unary(path)(data, timeout=10)))

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
