"""The HTTP port of a server, for those who watch it: ``/metrics``, ``/livez`` and ``/readyz``."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ome_tensor.errors import InvalidArgument

from .meters import CONTENT_TYPE
from .settings import split_address

__all__ = ["HttpPort"]

_log = logging.getLogger(__name__)

#: Seconds for the next bytes of a request, or for those of its answer to be taken; twice as many for all of it.
_PATIENCE = 10.0

#: Connections at a time: a probe and a few scrapers need no more.
_MOST_CONNECTIONS = 32


def _hang_up(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class HttpPort:
    """Answers until it is closed.

    Args:
        listen: ``HOST:PORT``.
        metrics: Gives the metrics page.
        is_ready: Whether the server serves.

    Attributes:
        address: ``HOST:PORT`` as bound.

    Raises:
        InvalidArgument: the address cannot be bound.
    """

    def __init__(self, listen: str, metrics: Callable[[], bytes], is_ready: Callable[[], bool]) -> None:
        # The connections that have a place, and when each has had its time.
        ends: dict[socket.socket, float] = {}

        class Handler(BaseHTTPRequestHandler):
            timeout = _PATIENCE
            server_version, sys_version = "ome-tensor", ""

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path == "/metrics":
                    self._answer(200, metrics(), CONTENT_TYPE)
                elif path == "/livez":
                    self._answer(200, b"ok\n")
                elif path == "/readyz":
                    ready = is_ready()
                    self._answer(200 if ready else 503, b"ok\n" if ready else b"not ready\n")
                else:
                    self._answer(404, b"there are /metrics, /livez and /readyz\n")

            do_HEAD = do_GET  # noqa: N815  as http.server names it

            def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                _log.debug("http %s %s", self.address_string(), format % args)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128
            address_family = socket.AF_INET6 if ":" in split_address(listen, "metrics")[0] else socket.AF_INET

            def process_request(self, request: Any, client_address: Any) -> None:
                # Only the thread that accepts gives places.
                if len(ends) >= _MOST_CONNECTIONS:
                    self.shutdown_request(request)
                    return
                ends[request] = time.monotonic() + 2 * _PATIENCE
                try:
                    super().process_request(request, client_address)
                except BaseException:
                    # There is no thread for it, which would have done this.
                    del ends[request]
                    raise

            def process_request_thread(self, request: Any, client_address: Any) -> None:
                try:
                    super().process_request_thread(request, client_address)
                finally:
                    del ends[request]

            def service_actions(self) -> None:
                # The handler's timeout is of each byte: whoever sends one now and then would keep a place for as long as he likes.
                now = time.monotonic()
                # A copy, made in one step: others end meanwhile.
                for request in [request for request, end in ends.copy().items() if end < now]:
                    _hang_up(request)

            def handle_error(self, request: Any, client_address: Any) -> None:
                # Whoever hangs up early is no news.
                _log.debug("http %s: a request failed", client_address, exc_info=True)

        host, port = split_address(listen, "metrics")
        try:
            self._server = Server((host, port), Handler)
        except OSError as error:
            raise InvalidArgument(
                f"cannot listen on {listen}: {error.strerror or error}", field="metrics", value=listen
            ) from None
        bound = self._server.server_address[1]
        self.address = f"[{host}]:{bound}" if ":" in host else f"{host}:{bound}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="ome-tensor-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
