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
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ome_tensor.errors import InvalidArgument

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


class Supervisor:
    """Workers on one port.

    Args:
        settings: The server's; ``listen`` as the user gave it.
        store: Where datasets are put.
    """

    def __init__(self, settings: Settings, store: Store) -> None:
        self.settings = settings
        self._store = store
        self._folder = tempfile.TemporaryDirectory(prefix="ome-tensor-control-")
        self._control = Control(Path(self._folder.name), settings.workers)
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * settings.workers
        self._started = [0.0] * settings.workers
        self._pause = [0.0] * settings.workers
        self._reserved: socket.socket | None = None
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="ome-tensor-supervisor", daemon=True)

    def start(self) -> str:
        """Reserve the port and start the workers; they report NOT_SERVING until :meth:`load`. Gives the bound address.

        Raises:
            InvalidArgument: the address cannot be bound.
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
        for worker in range(self.settings.workers):
            self._spawn(worker)
        self._watcher.start()
        self._wait_for_workers((host, port))
        return address

    def _wait_for_workers(self, address: tuple[str, int]) -> None:
        """Until one of them listens: whoever is told the address may connect at once."""
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and not self._stopping.wait(_POLL):
            try:
                socket.create_connection(address, timeout=1).close()
            except OSError:
                continue
            return

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

    def _spawn(self, worker: int) -> None:
        instructions = {
            "settings": asdict(self.settings),
            "control": self._folder.name,
            "worker": worker,
            "supervisor": os.getpid(),
        }
        self._control.report(worker, 0)
        self._started[worker] = time.monotonic()
        self._processes[worker] = subprocess.Popen(
            [sys.executable, "-m", "ome_tensor_server.worker", json.dumps(instructions)], stdin=subprocess.DEVNULL
        )

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run."""
        return [process.pid for process in self._processes if process is not None and process.poll() is None]

    def _watch(self) -> None:
        """Replace workers that die."""
        while not self._stopping.wait(_POLL):
            for worker, process in enumerate(self._processes):
                if process is None or process.poll() is None:
                    continue
                lived = time.monotonic() - self._started[worker]
                if lived < self._pause[worker]:
                    continue
                if lived > self._pause[worker] + _EARLY_SECONDS:
                    self._pause[worker] = 0.0
                _log.warning("worker %d (pid %d) ended with status %d; starting another", worker, process.pid, process.returncode)
                self._pause[worker] = min(2 * self._pause[worker] + 0.1, _LONGEST_PAUSE)
                with self._lock:
                    if not self._stopping.is_set():
                        self._spawn(worker)

    def stop(self, grace: float | None = None) -> None:
        """Drain all workers and return when they are gone; with ``grace=0`` they end at once. May be called again, to hurry."""
        with self._lock:
            self._stopping.set()
        running = [process for process in self._processes if process is not None]
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if grace == 0 else signal.SIGTERM)
        for process in running:
            process.wait()
        if self._reserved is not None:
            self._reserved.close()
        self._folder.cleanup()
