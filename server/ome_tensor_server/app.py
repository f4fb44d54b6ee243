"""A server's life: bind, load, serve, drain."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from ome_tensor.blocks import ChunkCache
from ome_tensor.errors import InvalidArgument
from ome_tensor_proto.methods import SERVICE

from .catalogue import Catalogue, SourceFile, load_catalogue
from .control import Control
from .drain import ActiveCalls, stop_listening, wait_until_sent
from .rpc import handlers
from .service import TensorService
from .settings import Settings, split_address
from .store import Store, open_store

__all__ = ["TensorServer"]

_log = logging.getLogger(__name__)

#: Threads beside those for reads: metadata calls are short, and must get through while every read slot is taken.
_METADATA_THREADS = 16

_OPTIONS = (
    # Measured (PERFORMANCE): large HTTP/2 frames, fewer wake-ups.
    ("grpc.http2.max_frame_size", (16 << 20) - 1),
    ("grpc.max_send_message_length", -1),
    # A client whose machine vanished without a word is noticed within a minute; one that died is noticed at once.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


class _Health(health.HealthServicer):
    """The health service; remembers who is watching, so that a shutdown need not wait for them.

    Args:
        catch_up: Waits until this worker serves what another one may have said it serves.
    """

    def __init__(self, catch_up: Callable[[], None]) -> None:
        super().__init__()
        self._catch_up = catch_up
        self._watches: weakref.WeakSet[grpc.ServicerContext] = weakref.WeakSet()

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:
        """See ``grpc.health.v1.Health``."""
        self._catch_up()
        return super().Check(request, context)

    def Watch(self, request: Any, context: grpc.ServicerContext, send_response_callback: Any = None) -> Any:
        """See ``grpc.health.v1.Health``."""
        self._watches.add(context)
        return super().Watch(request, context, send_response_callback)

    def end_watches(self) -> None:
        """Cancel every watch."""
        for context in list(self._watches):
            context.cancel()


class TensorServer:
    """A gRPC server over a catalogue.

    Args:
        settings: How it runs.
        worker: Which of several workers on one port this is.
        control: What they share; ``None`` for a server on its own.

    Attributes:
        settings: The settings.
        port: The bound port, once started.
    """

    def __init__(self, settings: Settings, *, worker: int = 0, control: Control | None = None) -> None:
        self.settings = settings
        self.port = 0
        self._shares_port = control is not None
        threads = settings.max_concurrent_reads + _METADATA_THREADS
        self._threads = futures.ThreadPoolExecutor(threads, thread_name_prefix="ome-tensor-call")
        self._server = grpc.server(
            self._threads,
            # Calls beyond the threads are refused at once instead of queued in silence.
            maximum_concurrent_rpcs=threads,
            # Of requests' size the service's own limit is told clearly; gRPC's is the wall behind it.
            options=[
                *_OPTIONS,
                # Two servers on one port would each get half of the calls without a word, unless that is what is wanted.
                ("grpc.so_reuseport", int(self._shares_port)),
                ("grpc.max_receive_message_length", 2 * settings.max_request_bytes + (1 << 20)),
            ],
        )
        self._service = TensorService(settings, worker=worker, control=control)
        self._calls = ActiveCalls()
        self._health = _Health(self._service.catch_up)
        self._stopping = threading.Event()
        self._store: Store | None = None
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        self._server.add_generic_rpc_handlers(
            (handlers(self._service.methods, self._calls, settings.max_request_bytes, settings.stall_seconds),)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    def _set_health(self, status: int) -> None:
        for name in ("", SERVICE):
            self._health.set(name, status)

    @property
    def address(self) -> str:
        """``HOST:PORT`` as bound."""
        host, _ = split_address(self.settings.listen)
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def free_reads(self) -> int:
        """Reads that could be taken on now."""
        return self._service.free_reads

    def start(self) -> str:
        """Bind and answer; calls about data are refused as UNAVAILABLE until :meth:`load` is through. Gives the bound address.

        Raises:
            InvalidArgument: the address cannot be bound.
        """
        try:
            self.port = self._server.add_insecure_port(self.settings.listen)
        except RuntimeError:
            self.port = 0
        if self.port == 0:
            raise InvalidArgument(
                f"cannot listen on {self.settings.listen}: the port is in use or the address is not this host's",
                field="listen",
                value=self.settings.listen,
            )
        self._server.start()
        self._service.open()
        return self.address

    def load(self, sources: Sequence[SourceFile]) -> Catalogue:
        """Load the datasets, then report SERVING. Raises what :func:`load_catalogue` does."""
        cache = ChunkCache(self.settings.decode_cache_bytes, self.settings.max_chunk_bytes)
        if self._store is None:
            # Kept: as long as it is there, no other server takes the datasets' files away.
            self._store = self._open_store(sources)
        if self._store is not None:
            self._store.clean()
        catalogue = load_catalogue(sources, cache, self._stopping.is_set, self._store)
        self.serve(catalogue)
        return catalogue

    def _open_store(self, sources: Sequence[SourceFile]) -> Store | None:
        try:
            return open_store(self.settings.store, [source.path for source in sources])
        except InvalidArgument as error:
            if self.settings.store != "auto":
                raise
            # Nobody asked for one: a container without a writable folder serves all the same.
            _log.warning("datasets are kept in this process's memory: %s", error)
            return None

    def serve(self, catalogue: Catalogue, generation: int = 0) -> None:
        """Serve these datasets from now on, and report SERVING. Reads that run go on with what they began with.

        Args:
            catalogue: The datasets.
            generation: The catalogue's number in the control state of several workers.
        """
        if not self._stopping.is_set():
            self._service.serve(catalogue, generation, lambda: self._set_health(health_pb2.HealthCheckResponse.SERVING))

    def stop(self, grace: float | None = None) -> None:
        """Drain: health turns to NOT_SERVING, new calls are refused, running ones may finish within ``grace`` seconds (default: the settings').

        Returns when all is quiet. May be called again, from a signal handler too, to shorten the grace.
        """
        patience = self.settings.grace_seconds if grace is None else grace
        deadline = time.monotonic() + patience
        self._stopping.set()
        if self._shares_port and self.port:
            # Whoever connects from now on reaches a worker that stays. A server on its own goes on to say that it is shutting down.
            stop_listening(self.port)
        self._health.enter_graceful_shutdown()
        self._service.drain()
        # Connections stay open, and new calls are refused by the service, until what runs has arrived: gRPC's own stop closes a connection
        # behind its last call, which may cost a slow client the end of its stream.
        if self._calls.wait_until_none(patience):
            wait_until_sent(self.port, max(0.0, deadline - time.monotonic()))
        # Watches last as long as their clients like, and would hold up everything else.
        self._health.end_watches()
        self._server.stop(0).wait()
        self._threads.shutdown(wait=True)

    def wait(self, timeout: float | None = None) -> None:
        """Block until stopped."""
        self._server.wait_for_termination(timeout)
