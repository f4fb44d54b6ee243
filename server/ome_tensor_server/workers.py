"""The supervisor: several worker processes on one port, over one copy of the pixels.

It loads datasets into the store, publishes them, starts the workers and replaces those that die. It serves nothing itself, so nothing that a
client does can stop it. Workers are started afresh rather than forked: gRPC does not survive a fork in use.
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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import BinaryIO

from ome_tensor.errors import InvalidArgument, ServerError

from .catalogue import SourceFile, load_each
from .control import Control, Entry
from .logs import Fields
from .settings import Settings, split_address
from .store import Store

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
        store: Where datasets are put.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings = settings
        self._store = store
        self._control = Control.create(settings.workers)
        self._workers = [_Worker(number) for number in range(settings.workers)]
        self._reserved: socket.socket | None = None
        self._lock = threading.Lock()
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
        return address

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

    def load(self, sources: Sequence[SourceFile]) -> list[Entry]:
        """Put the datasets into the store and publish them. Gives what there is then.

        Raises:
            InvalidRecord, InvalidArgument: a file that was named itself cannot be loaded.
        """
        entries = []
        self._store.clean()
        for source, manifest in load_each(sources, self._store.load, self._stopping.is_set):
            _log.info(Fields("loaded", dataset=source.name, file=manifest.file, version=manifest.version))
            entries.append(Entry(source.name, source.path.name, manifest))
        self._control.publish(entries)
        return entries

    def _spawn(self, worker: _Worker) -> None:
        worker.started = time.monotonic()
        worker.pause = min(2 * worker.pause + 0.1, _LONGEST_PAUSE)
        try:
            # What a worker says before it listens may be why it never does; from then on it writes where this process does.
            if worker.said is not None:
                worker.said.close()
            worker.said = os.fdopen(os.memfd_create("ome-tensor-stderr"), "r+b", buffering=0)
            stderr = os.dup(2)
            try:
                instructions = {
                    "settings": asdict(self.settings),
                    "control": self._control.descriptor,
                    "stderr": stderr,
                    "worker": worker.number,
                    "supervisor": os.getpid(),
                }
                worker.process = subprocess.Popen(
                    [sys.executable, "-m", "ome_tensor_server.worker", json.dumps(instructions)],
                    stdin=subprocess.DEVNULL,
                    stderr=worker.said,
                    pass_fds=(self._control.descriptor, stderr),
                )
            finally:
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
        for worker in self._workers:
            if worker.process is not None:
                worker.process.send_signal(signal.SIGKILL if grace == 0 else signal.SIGTERM)
        if self._watcher.ident is not None:
            self._watcher.join()
        if self._reserved is not None:
            self._reserved.close()
        self._control.close()
