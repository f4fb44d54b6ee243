"""A TCP proxy that misbehaves on purpose: it cuts or stalls what a server sends after so many bytes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Self

_STEP = 16 << 10


class Proxy:
    """Forwards connections of the loopback interface to a server.

    Args:
        target: ``HOST:PORT`` of the server.
        cuts: The first connection is cut after as many bytes from the server as the first entry says, and so on; later ones are left alone.
        stall: Do not cut then, but forward nothing more: what a hung server or a dead network looks like.
        delay: Seconds before anything of a connection is forwarded: it takes that long to be made.
    """

    def __init__(self, target: str, cuts: Iterable[int] = (), *, stall: bool = False, delay: float = 0.0) -> None:
        host, _, port = target.rpartition(":")
        self._upstream = (host, int(port))
        self._cuts = iter(tuple(cuts))
        self._stall, self._delay = stall, delay
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._stopped = threading.Event()
        self.connections = 0
        self.done = 0  # cuts (or stalls) made
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            time.sleep(self._delay)
            try:
                server = socket.create_connection(self._upstream)
            except OSError:
                client.close()
                continue
            self._sockets += [client, server]
            self._start(self._pump, client, server, None)
            self._start(self._pump, server, client, next(self._cuts, None))

    def _pump(self, source: socket.socket, sink: socket.socket, limit: int | None) -> None:
        try:
            while limit is None or limit > 0:
                data = source.recv(_STEP if limit is None else min(_STEP, limit))
                if not data:
                    break
                sink.sendall(data)
                limit = None if limit is None else limit - len(data)
            if limit == 0:
                self.done += 1
                if self._stall:
                    self._stopped.wait()
        except OSError:
            pass  # The other direction was closed under us.
        for end in (source, sink):
            with suppress(OSError):  # Closed already.
                end.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._sockets:
            with suppress(OSError):  # Closed already.
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        for end in self._sockets:
            end.close()
