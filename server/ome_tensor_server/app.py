"""A server's life: bind, load, serve, drain."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import TypeVar

import grpc
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as REFLECTION_SERVICE

from ome_tensor.blocks import ChunkCache
from ome_tensor.errors import InvalidArgument
from ome_tensor.tables import LoadedTable
from ome_tensor_proto.channel_options import CHANNEL_OPTIONS
from ome_tensor_proto.methods import ADMIN_SERVICE, SERVICE

from .admin import MOST_CALLS as MOST_ADMIN_CALLS
from .admin import AdminService
from .authentication import Authenticator
from .calls import Gate
from .catalogue import Catalogue, Shelves
from .control import Control
from .drain import ActiveCalls, stop_listening, wait_until_sent
from .entries import Entry
from .finding import SourceFile
from .health import Health
from .house import House
from .http_port import HttpPort
from .in_place import settings_readers
from .limits import Rates
from .logs import Fields
from .meters import Meters, MetricsPage
from .offices import Office
from .receiving import REQUEST_SECONDS, Requests
from .reflection import MOST_CALLS as MOST_REFLECTION_CALLS
from .reflection import Reflection
from .rpc import handlers
from .service import TensorService
from .settings import Settings, split_address
from .standing import Gauge, dataset_gauges
from .tls import server_credentials
from .tracing import interceptors
from .uploads import Uploads
from .usage import Usage

__all__ = ["TensorServer"]

S = TypeVar("S", Meters, Usage)

_log = logging.getLogger(__name__)

#: Threads beside those for reads: metadata calls are short, and must get through while every read slot is taken.
_METADATA_THREADS = 16

_OPTIONS = (
    *CHANNEL_OPTIONS,
    # So often clients may ask whether the server is there, and it asks those that call nothing, too.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


def _alone(shared: S) -> S:
    """What no other process shares: its descriptor is only there to be passed on."""
    shared.close()
    return shared


class TensorServer:
    """A gRPC server over a catalogue.

    Args:
        settings: How it runs.
        worker: Which of several workers on one port this is.
        control: What they share; ``None`` for a server on its own.
        usage: Where they count the use of datasets.
        meters: Where they count everything else.

    Attributes:
        settings: The settings.
        port: The bound port, once started.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        worker: int = 0,
        control: Control | None = None,
        usage: Usage | None = None,
        meters: Meters | None = None,
    ) -> None:
        self.settings = settings
        self.port = 0
        self._credentials = server_credentials(settings)
        self._meters = _alone(Meters()) if meters is None else meters
        gate = Gate(Authenticator(settings), Rates(settings), self._meters)
        self._shares_port = control is not None
        # What changes datasets may take long, and is limited by itself: its threads come on top.
        threads = settings.max_concurrent_reads + _METADATA_THREADS + MOST_ADMIN_CALLS + MOST_REFLECTION_CALLS
        # No single host takes all of them by beginning calls and sending nothing, also while it has every read.
        most_silent = min(threads // 2, MOST_ADMIN_CALLS)
        self._requests = requests = Requests(most_silent, min(settings.stall_seconds, REQUEST_SECONDS))
        self._threads = futures.ThreadPoolExecutor(threads, thread_name_prefix="ome-tensor-call")
        self._server = grpc.server(
            self._threads,
            # Calls beyond the threads are refused at once instead of queued in silence.
            maximum_concurrent_rpcs=threads,
            interceptors=interceptors(settings),
            # Of requests' size the service's own limit is told clearly; gRPC's is the wall behind it.
            options=[
                *_OPTIONS,
                # Two servers on one port would each get half of the calls without a word, unless that is what is wanted.
                ("grpc.so_reuseport", int(self._shares_port)),
                ("grpc.max_receive_message_length", 2 * settings.max_request_bytes + (1 << 20)),
            ],
        )
        self._usage = _alone(Usage()) if usage is None else usage
        self._cache = ChunkCache(settings.own_cache_bytes, settings.max_chunk_bytes)
        self._readers = settings_readers(settings)
        self._counted = self._readers.hits, self._readers.misses
        self._shelves = Shelves(self._cache, self._readers, self._make_level)
        self._service = TensorService(settings, worker=worker, control=control, usage=self._usage, report=self._report)
        # Made by whoever has the librarian, and cleaned by it: a worker only receives into it.
        self._uploads = Uploads.at(settings.uploads, settings.max_upload_bytes)
        self._page = MetricsPage(self._meters, self._gauges)
        admin = AdminService(self._service.policy, lambda: self._service.office, self._service.info, self._uploads, self._page)
        self._http: HttpPort | None = None
        self._calls = ActiveCalls()
        self._health = Health(requests, self._service.catch_up, settings.stall_seconds)
        self._stopping = threading.Event()
        self._house: House | None = None
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        methods = handlers(
            dict(self._service.methods) | dict(admin.methods),
            gate,
            self._calls,
            requests,
            settings.max_request_bytes,
            settings.stall_seconds,
        )
        reflection = Reflection((SERVICE, ADMIN_SERVICE, health.SERVICE_NAME, REFLECTION_SERVICE), requests)
        self._server.add_generic_rpc_handlers((methods, self._health.handler, reflection.handler))

    def _report(self) -> None:
        """What is not counted call by call."""
        meters, turns = self._meters, self._service.turns
        meters.set("cache_hits", self._cache.hits + self._readers.hits - self._counted[0])
        meters.set("cache_misses", self._cache.misses + self._readers.misses - self._counted[1])
        meters.set("reads_running", self._service.reads.running)
        meters.set("reads_waiting", turns.waiting)
        meters.set("in_flight_bytes", turns.in_flight)

    def _gauges(self) -> Iterator[Gauge]:
        self._report()
        catalogue = self._service.catalogue
        return dataset_gauges(catalogue.entries, catalogue.resident_bytes, self.settings)

    def _set_health(self, status: int) -> None:
        self._health.set(("", SERVICE, ADMIN_SERVICE), status)

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
            if self._credentials is None:
                self.port = self._server.add_insecure_port(self.settings.listen)
            else:
                self.port = self._server.add_secure_port(self.settings.listen, self._credentials)
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
        if self.settings.metrics and not self._shares_port:
            self._http = HttpPort(self.settings.metrics, self._page.text, lambda: self._service.is_serving)
        return self.address

    @property
    def metrics_address(self) -> str | None:
        """``HOST:PORT`` of the HTTP port, where there is one."""
        return None if self._http is None else self._http.address

    def load(self, sources: Sequence[SourceFile], folders: Sequence[str] = ()) -> Catalogue:
        """Register these sources, load them where the settings say so, and report SERVING. Raises what :meth:`House.move_in` does.

        Args:
            sources: What to serve.
            folders: Where they were found; see :meth:`House.move_in`.
        """
        if self._house is None:
            # Kept: as long as it is there, no other server takes the datasets' files away.
            self._house = House(self.settings, self._usage, self._publish, self._uploads, sources)
        self._house.move_in(sources, self._stopping.is_set, folders)
        catalogue = self._shelves.catalogue(self._house.librarian.entries, self._house.librarian.tables)
        self.serve(catalogue, office=self._house.office)
        return catalogue

    def _publish(self, entries: Sequence[Entry], tables: Mapping[str, LoadedTable]) -> None:
        """Serve what the librarian has by now; before it has moved in, nothing is served."""
        if self._house is not None and self._house.is_open:
            self.serve(self._shelves.catalogue(entries, tables))

    def _make_level(self, name: str, column: str, row: int, level: int) -> str:
        return self._service.office.make_level(name, column, row, level, self.settings.load_seconds)

    def follow(self, entries: Sequence[Entry], generation: int, office: Office) -> None:
        """Serve what the supervisor has published."""
        self.serve(self._shelves.catalogue(entries), generation, office)

    def serve(self, catalogue: Catalogue, generation: int = 0, office: Office | None = None) -> None:
        """Serve these datasets from now on, and report SERVING. Reads that run go on with what they began with.

        Args:
            catalogue: The datasets.
            generation: The catalogue's number in the control state of several workers.
            office: What loads and changes datasets.
        """
        if not self._stopping.is_set():
            self._service.serve(catalogue, generation, lambda: self._set_health(health_pb2.HealthCheckResponse.SERVING), office)

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
        self._health.shut_down()
        self._service.drain()
        # Connections stay open, and new calls are refused by the service, until what runs has arrived: gRPC's own stop closes a connection
        # behind its last call, which may cost a slow client the end of its stream.
        if self._calls.wait_until_none(patience):
            wait_until_sent(self.port, max(0.0, deadline - time.monotonic()))
        # Watches last as long as their clients like, and would hold up everything else.
        self._health.end_watches()
        if self._house is not None:
            self._house.close()
        self._server.stop(0).wait()
        if self._http is not None:
            self._http.close()
        hits = self._cache.hits + self._readers.hits - self._counted[0]
        misses = self._cache.misses + self._readers.misses - self._counted[1]
        if misses:
            _log.info(Fields("chunks", hits=hits, misses=misses))
        self._threads.shutdown(wait=True)

    def wait(self, timeout: float | None = None) -> None:
        """Block until stopped."""
        self._server.wait_for_termination(timeout)
