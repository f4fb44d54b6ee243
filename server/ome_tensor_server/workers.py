"""The supervisor: several worker processes on one port, over one copy of the pixels.

It loads datasets into the store, publishes them, starts the workers and replaces those that die; what workers ask of it (a load, an upload's
registration) comes through a pair of sockets each. It serves nothing itself, so nothing that a client does can stop it. Workers are started afresh
rather than forked: gRPC does not survive a fork in use.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, BinaryIO

from ome_tensor.errors import InvalidArgument, ServerError, Unavailable

from .authentication import Authenticator
from .control import Control
from .entries import Entry
from .exchange import answer_requests
from .finding import SourceFile
from .house import House
from .http_port import HttpPort
from .meters import Meters, MetricsPage
from .settings import Settings, split_address
from .standing import Gauge, dataset_gauges
from .tls import server_credentials
from .uploads import Uploads
from .usage import Usage

__all__ = ["Supervisor"]

_log = logging.getLogger(__name__)

#: A worker that dies this soon after its start is started again with a growing pause.
_EARLY_SECONDS = 2.0
_LONGEST_PAUSE = 5.0
_POLL = 0.05
_START_SECONDS = 30.0

#: Of what a worker said before it ended, the last line is looked for in so many bytes, and so many characters of it are shown.
_SAID_BYTES, _SAID_CHARACTERS = 16 << 10, 300


@dataclass(slots=True)
class _Worker:
    """A worker's place, and the process that fills it.

    Attributes:
        number: Which of the workers.
        process: Its process, once one was started.
        said: What the process writes to stderr until it listens: an anonymous file.
        started: When it was started.
        pause: Seconds from its start to the next one's, should it end.
        ended: How the last process ended; empty before any has.
    """

    number: int
    process: subprocess.Popen[bytes] | None = None
    said: BinaryIO | None = None
    started: float = 0.0
    pause: float = 0.0
    ended: str = ""

    @property
    def runs(self) -> bool:
        """Whether its process runs."""
        return self.process is not None and self.process.poll() is None

    def last_words(self) -> str:
        """The last line that its process wrote to stderr before it listened; empty if it wrote nothing."""
        if self.said is None:
            return ""
        # Not by seeking: the process's own place in the file is this one's.
        size = os.fstat(self.said.fileno()).st_size
        said = os.pread(self.said.fileno(), _SAID_BYTES, max(0, size - _SAID_BYTES)).decode(errors="replace")
        return next((line.strip()[:_SAID_CHARACTERS] for line in reversed(said.split("\n")) if line.strip()), "")


class Supervisor:
    """Workers on one port.

    Args:
        settings: The server's; ``listen`` as the user gave it.

    Raises:
        InvalidArgument: the store, the folder of uploads, or a file of certificates, keys or tokens cannot be used.
        MissingDependency: an optional package is needed.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Each worker has its own; what is wrong with them is to be said once, and before any is started.
        server_credentials(settings)
        Authenticator(settings)
        self._control = Control.create(settings.workers)
        self._usage = Usage(settings.workers, worker=settings.workers)
        self._meters = Meters(settings.workers)
        self._page = MetricsPage(self._meters, self._gauges)
        self._http: HttpPort | None = None
        self._uploads = Uploads.at(settings.uploads, settings.max_upload_bytes)
        self._house: House | None = None
        self._workers = [_Worker(number) for number in range(settings.workers)]
        self._reserved: socket.socket | None = None
        self._lock = threading.Lock()
        self._publishing = threading.Lock()
        self._started = threading.Event()
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="ome-tensor-supervisor", daemon=True)

    def start(self) -> str:
        """Reserve the port and start the workers; they report NOT_SERVING until :meth:`load`. Gives the bound address once one of them listens.

        Raises:
            InvalidArgument: the address cannot be bound.
            ServerError: no worker can be started; it says why, and nothing is left running.
        """
        host, port = split_address(self.settings.listen)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            # Bound but never listening: it keeps the port for the workers between them, and takes no connection itself.
            self._reserved = socket.socket(found[0], found[1], found[2])
            self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            self._reserved.bind(found[4])
        except OSError as error:
            raise InvalidArgument(
                f"cannot listen on {self.settings.listen}: {error.strerror}", field="listen", value=self.settings.listen
            ) from None
        port = self._reserved.getsockname()[1]
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.settings = replace(self.settings, listen=address)
        self._watcher.start()
        try:
            self._wait_for_workers()
        except ServerError:
            self.stop(grace=0)
            raise
        if self.settings.metrics:
            self._http = HttpPort(self.settings.metrics, self._page.text, lambda: self._is_serving)
        return address

    @property
    def metrics_address(self) -> str | None:
        """``HOST:PORT`` of the HTTP port, where there is one."""
        return None if self._http is None else self._http.address

    @property
    def _is_serving(self) -> bool:
        """Whether a worker takes calls about data."""
        return (
            self._control.generation > 0
            and not self._stopping.is_set()
            and any(reads is not None for reads in self._control.reads())
        )

    def _gauges(self) -> Iterator[Gauge]:
        house = self._house
        if house is None:
            return dataset_gauges((), 0, self.settings)
        return dataset_gauges(house.librarian.entries, house.librarian.taken, self.settings)

    def _wait_for_workers(self) -> None:
        """Until one of them listens: whoever is told the address may connect at once."""
        deadline = time.monotonic() + _START_SECONDS
        while all(reads is None for reads in self._control.reads()):
            if all(worker.ended for worker in self._workers):
                raise ServerError(f"no worker can be started: {self._workers[0].ended}")
            if time.monotonic() > deadline:
                said = next((f"; one says: {words}" for worker in self._workers if (words := worker.last_words())), "")
                raise ServerError(f"no worker listens within {_START_SECONDS:g} s of its start{said}")
            if self._stopping.wait(_POLL):
                return
        self._started.set()

    def load(self, sources: Sequence[SourceFile], folders: Sequence[str] = ()) -> list[Entry]:
        """Register the sources, load them where the settings say so, and publish what there is then, which is given.

        Args:
            sources: What to serve.
            folders: Where they were found; see :meth:`House.move_in`.

        Raises:
            InvalidRecord, InvalidArgument: a source that was named itself cannot be served.
        """
        if self._house is None:
            self._house = House(self.settings, self._usage, lambda entries, _: self._publish(entries), self._uploads, sources)
        entries = self._house.move_in(sources, self._stopping.is_set, folders)
        self._publish(entries)
        return entries

    def _office(self, name: str) -> Callable[..., Any]:
        if self._house is None:
            raise Unavailable("the server is still loading its datasets; try again shortly")
        return self._house.office.offices[name]

    def _publish(self, entries: Sequence[Entry]) -> None:
        with self._publishing:
            if self._house is not None and self._house.is_open and not self._stopping.is_set():
                self._control.publish(entries)

    def _spawn(self, worker: _Worker) -> None:
        worker.started = time.monotonic()
        worker.pause = min(2 * worker.pause + 0.1, _LONGEST_PAUSE)
        try:
            # What a worker says before it listens may be why it never does; from then on it writes where this process does.
            if worker.said is not None:
                worker.said.close()
            worker.said = os.fdopen(os.memfd_create("ome-tensor-stderr"), "r+b", buffering=0)
            stderr = os.dup(2)
            here, there = socket.socketpair()
            try:
                instructions = {
                    "settings": asdict(self.settings),
                    "control": self._control.descriptor,
                    "usage": self._usage.descriptor,
                    "meters": self._meters.descriptor,
                    "exchange": there.fileno(),
                    "stderr": stderr,
                    "worker": worker.number,
                    "supervisor": os.getpid(),
                }
                worker.process = subprocess.Popen(
                    [sys.executable, "-m", "ome_tensor_server.worker", json.dumps(instructions)],
                    stdin=subprocess.DEVNULL,
                    stderr=worker.said,
                    pass_fds=(
                        self._control.descriptor,
                        self._usage.descriptor,
                        self._meters.descriptor,
                        there.fileno(),
                        stderr,
                    ),
                )
                threading.Thread(
                    target=answer_requests, args=(here, self._office), name="ome-tensor-exchange", daemon=True
                ).start()
            except OSError:
                here.close()
                raise
            finally:
                there.close()
                os.close(stderr)
        except OSError as error:
            worker.ended = f"worker {worker.number} cannot be started: {error.strerror}"
            _log.warning(worker.ended)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return [worker.process.pid for worker in self._workers if worker.process is not None and worker.runs]

    def _watch(self) -> None:
        """Start the workers, and replace those that die.

        All of it on this thread, which outlives them: to a process that asks to be told of its parent's end, that is the end of the thread that
        started it, and a worker would take the news for a second SIGTERM and cut its streams.
        """
        while not self._stopping.is_set():
            for worker in self._workers:
                if not worker.runs:
                    self._replace(worker)
            self._stopping.wait(_POLL)
        for worker in self._workers:
            if worker.process is not None:
                worker.process.wait()

    def _replace(self, worker: _Worker) -> None:
        """Start a process in the place of one that has ended, when it is time."""
        self._control.report(worker.number, None)
        self._usage.forget_worker(worker.number)
        self._meters.forget_worker(worker.number)
        process = worker.process
        if process is not None and not worker.ended:
            words = worker.last_words()
            worker.ended = f"worker {worker.number} (pid {process.pid}) ended with status {process.returncode}"
            worker.ended += f": {words}" if words else ""
            if self._started.is_set():
                _log.warning("%s; starting another", worker.ended)
        if worker.ended and not self._started.is_set():
            return  # Whether any worker can be started is not known yet.
        lived = time.monotonic() - worker.started
        if lived < worker.pause:
            return
        if lived > worker.pause + _EARLY_SECONDS:
            worker.pause = 0.0
        with self._lock:
            if not self._stopping.is_set():
                worker.ended = ""
                self._spawn(worker)

    def stop(self, grace: float | None = None) -> None:
        """Drain all workers and return when they are gone; with ``grace=0`` they end at once. May be called again, to hurry."""
        with self._lock:
            self._stopping.set()
        if self._house is not None:
            self._house.close()
        for worker in self._workers:
            if worker.process is not None:
                worker.process.send_signal(signal.SIGKILL if grace == 0 else signal.SIGTERM)
        if self._watcher.ident is not None:
            self._watcher.join()
        if self._reserved is not None:
            self._reserved.close()
        self._control.close()
        self._usage.close()
        if self._http is not None:
            self._http.close()
        self._meters.close()
