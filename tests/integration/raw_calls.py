"""Calls written out frame by frame, from any of this host's addresses: clients that do what no library lets them."""

from __future__ import annotations

import socket
from collections.abc import Iterable

from tests.fuzz import http2

__all__ = ["EMPTY", "begin_calls"]

#: A gRPC message without a field.
EMPTY = bytes(5)


def begin_calls(
    target: str,
    path: str,
    count: int = 1,
    *,
    host: str = "127.0.0.1",
    request: bytes | None = None,
    settings: Iterable[tuple[int, int]] = (),
) -> socket.socket:
    """So many calls on one connection, numbered 1, 3, 5, ...

    Args:
        target: ``HOST:PORT``.
        path: What is called.
        count: How often.
        host: Where it comes from.
        request: What each sends, as gRPC frames it; ``None`` for nothing, and no end either.
        settings: Of HTTP/2.
    """
    to, _, port = target.rpartition(":")
    connection = socket.create_connection((to, int(port)), timeout=20, source_address=(host, 0))
    said = http2.PREFACE + http2.settings(settings)
    for number in range(1, 2 * count, 2):
        said += http2.headers(number, http2.grpc_headers(path))
        if request is not None:
            said += http2.frame(http2.DATA, http2.END_STREAM, number, request)
    connection.sendall(said)
    return connection
