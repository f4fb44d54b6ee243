"""The servers of :mod:`benchmarks.concurrency`: one service, behind threads and behind an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc

from ome_tensor_proto.memory import keep_blocks
from ome_tensor_proto.methods import METHODS, ONE_MESSAGE, Method

__all__ = ["EXECUTOR", "INLINE", "PEERS", "SERVERS", "SYNC"]

SYNC, INLINE, EXECUTOR = "sync", "asyncio, inline", "asyncio, executor"
PEERS = (SYNC, INLINE, EXECUTOR)


def _settings(store: str, streams: int) -> Any:
    from ome_tensor_server.settings import Settings

    return Settings(listen="127.0.0.1:0", store=store, preload=True, max_concurrent_reads=streams)


def _serve_sync(pipe: Connection, path: Path, store: str, streams: int) -> None:
    """This project's server, until the pipe is closed."""
    from ome_tensor_server.app import TensorServer
    from ome_tensor_server.finding import find_sources

    keep_blocks()
    server = TensorServer(_settings(store, streams))
    try:
        target = server.start()
        server.load(find_sources([path]))
        pipe.send(target)
        pipe.recv()
    finally:
        server.stop(0)


def _serve_asyncio(pipe: Connection, path: Path, store: str, streams: int, executor: bool) -> None:
    """The same service behind ``grpc.aio``, until the pipe is closed."""
    keep_blocks()
    asyncio.run(_serve_on_loop(pipe, path, store, streams, executor))


async def _serve_on_loop(pipe: Connection, path: Path, store: str, streams: int, executor: bool) -> None:
    from ome_tensor.blocks import ChunkCache
    from ome_tensor_server import app
    from ome_tensor_server.catalogue import Shelves
    from ome_tensor_server.finding import find_sources
    from ome_tensor_server.house import House
    from ome_tensor_server.in_place import settings_readers
    from ome_tensor_server.service import TensorService
    from ome_tensor_server.usage import Usage

    settings, usage, sources = _settings(store, streams), Usage(), find_sources([path])
    service = TensorService(settings, usage=usage)
    house = House(settings, usage, lambda entries, tables: None, None, sources)
    house.move_in(sources, lambda: False)
    shelves = Shelves(ChunkCache(settings.decode_cache_bytes, settings.max_chunk_bytes), settings_readers(settings))
    catalogue = shelves.catalogue(house.librarian.entries, house.librarian.tables)
    service.serve(catalogue, 0, lambda: None, house.office)
    server = grpc.aio.server(
        options=[*app._OPTIONS, ("grpc.so_reuseport", 0)],
        maximum_concurrent_rpcs=settings.max_concurrent_reads + app._METADATA_THREADS,
    )
    server.add_generic_rpc_handlers((_AsyncMethods(service.methods, _in_executor if executor else _inline),))
    port = server.add_insecure_port(settings.listen)
    await server.start()
    ended = asyncio.Event()
    # No thread that waits: threads are counted.
    asyncio.get_running_loop().add_reader(pipe.fileno(), ended.set)
    pipe.send(f"127.0.0.1:{port}")
    await ended.wait()
    asyncio.get_running_loop().remove_reader(pipe.fileno())
    await server.stop(0)


Run = Callable[..., Awaitable[Any]]


async def _inline(function: Callable[..., Any], *arguments: Any) -> Any:
    """On the loop, which does nothing else meanwhile."""
    return function(*arguments)


async def _in_executor(function: Callable[..., Any], *arguments: Any) -> Any:
    """In the loop's default executor, as whoever knows that the loop must not be blocked does it."""
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


class _Context:
    """What the service asks of a call's context, answered by asyncio's."""

    def __init__(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        self._context = context

    def is_active(self) -> bool:
        return not self._context.done()

    def peer(self) -> str:
        return self._context.peer()

    def invocation_metadata(self) -> Any:
        return self._context.invocation_metadata() or ()


class _AsyncMethods(grpc.GenericRpcHandler):
    """The service's functions as asyncio's handlers: what ``ome_tensor_server.rpc`` is for the sync server, less the errors of a wrong request.

    Args:
        methods: The functions by the contract's method names.
        run: How to call them.
    """

    def __init__(self, methods: Any, run: Run) -> None:
        from ome_tensor_server.authentication import Authenticator
        from ome_tensor_server.calls import Gate
        from ome_tensor_server.limits import Rates
        from ome_tensor_server.meters import Meters
        from ome_tensor_server.settings import Settings

        self._run = run
        self._gate = Gate(Authenticator(Settings()), Rates(Settings()), Meters())
        self._table = {}
        self._of_one_message = {}
        for name, method in METHODS.items():
            if method.streaming:
                self._table[method.path] = grpc.unary_stream_rpc_method_handler(self._streaming(method, methods[name]))
                self._of_one_message[method.path] = grpc.unary_unary_rpc_method_handler(
                    self._unary(method, lambda request, call, read=methods[name]: _only(read(request, call)))
                )
            else:
                self._table[method.path] = grpc.unary_unary_rpc_method_handler(self._unary(method, methods[name]))

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """See gRPC."""
        path = handler_call_details.method
        if path in self._of_one_message and any(name == ONE_MESSAGE for name, _ in handler_call_details.invocation_metadata):
            return self._of_one_message[path]
        return self._table.get(path)

    def _unary(self, method: Method, handler: Callable[..., Any]) -> Callable[..., Awaitable[bytes]]:
        from ome_tensor_server.calls import Call

        def answer(data: bytes, context: Any) -> bytes:
            answered = handler(method.request.FromString(data), Call(method.name, _Context(context), self._gate))  # type: ignore[arg-type]
            return answered if isinstance(answered, bytes) else answered.SerializeToString()

        async def respond(data: bytes, context: Any) -> bytes:
            return await self._run(answer, data, context)

        return respond

    def _streaming(self, method: Method, handler: Callable[..., Any]) -> Callable[..., Awaitable[None]]:
        from ome_tensor_server.calls import Call

        async def respond(data: bytes, context: Any) -> None:
            messages = handler(method.request.FromString(data), Call(method.name, _Context(context), self._gate))  # type: ignore[arg-type]
            # A cancelled stream leaves an executor's thread in the middle of a message: it is not closed before that is done.
            lock = threading.Lock()

            def produce() -> bytes | None:
                with lock:
                    return next(messages, None)

            try:
                while (message := await self._run(produce)) is not None:
                    await context.write(message)
            finally:
                with lock:
                    messages.close()

        return respond


def _only(messages: Iterator[bytes]) -> bytes:
    (message,) = messages
    return message


#: By name: what a child is to do, and its last arguments.
SERVERS: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    SYNC: (_serve_sync, ()),
    INLINE: (_serve_asyncio, (False,)),
    EXECUTOR: (_serve_asyncio, (True,)),
}
