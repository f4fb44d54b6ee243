"""How a client shows who it is, and knows its server: channels in plain text or TLS, and what goes with each call."""

from __future__ import annotations

import ipaddress
import os
import secrets
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import grpc

from ome_tensor.errors import InvalidArgument
from ome_tensor_proto.methods import REQUEST_ID

from .options import Options, is_socket
from .tracing import begin_span, end_span

__all__ = ["Identity", "Outgoing"]

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """What goes with one call.

    A context manager around the call: its span, where it has one, ends with it.

    Attributes:
        request_id: What the server's log names it by.
        token: The token it brings, if any.
        metadata: Both, as gRPC's metadata, and whatever else.
        span: OpenTelemetry's, or ``None``.
    """

    request_id: str
    # Kept out of what a traceback may show, as it is in the options.
    token: str = field(repr=False)
    metadata: Metadata = field(repr=False)
    span: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self.span is not None:
            end_span(self.span, error)


class Identity:
    """Of one client.

    Args:
        options: Its options.
        targets: Its servers.

    Attributes:
        is_near: Whether all its servers are on this host, as far as their addresses tell.

    Raises:
        InvalidArgument: a token would travel in plain text beyond this host.
    """

    def __init__(self, options: Options, targets: Sequence[str]) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._token = options.token
        far = next((target for target in targets if not _is_near(target)), None)
        self.is_near = far is None
        if far is not None and (options.token or options.token_file) and not options.is_secure and not options.insecure:
            raise InvalidArgument(
                f"a token would travel to {far} in plain text, where anybody on the way can take it: use tls=True (or ca=FILE), "
                "or say insecure=True",
                field="token",
            )

    def begin_anew(self) -> None:
        """In a forked child: a lock that another thread held stayed with the parent."""
        self._lock = threading.Lock()

    def channel(self, target: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """A channel to a server. Raises InvalidArgument where a file of certificates or keys cannot be read."""
        own = self._options
        if not own.is_secure:
            return grpc.insecure_channel(target, options=options)
        credentials = grpc.ssl_channel_credentials(_content("ca", own.ca), _content("key", own.key), _content("cert", own.cert))
        if own.server_name:
            options = (*options, ("grpc.ssl_target_name_override", own.server_name))
        return grpc.secure_channel(target, credentials, options=options)

    def outgoing(self, path: str, *further: tuple[str, str]) -> Outgoing:
        """What goes with a new call of a method, and more metadata. Raises InvalidArgument where the file of the token cannot be read."""
        request_id, token = secrets.token_hex(8), self._current()
        metadata = ((REQUEST_ID, request_id), *further)
        if token:
            metadata = (*metadata, ("authorization", f"Bearer {token}"))
        if not self._options.tracing:
            return Outgoing(request_id, token, metadata)
        span, carried = begin_span(path)
        return Outgoing(request_id, token, (*metadata, *carried), span)

    def has_newer(self, outgoing: Outgoing) -> bool:
        """Whether the file of the token holds another one by now than a call brought."""
        return bool(self._options.token_file) and self._current() != outgoing.token

    def _current(self) -> str:
        path = self._options.token_file
        if not path:
            return self._token
        with self._lock:
            try:
                found = os.stat(path)
                seen = found.st_mtime_ns, found.st_size, found.st_ino
                if seen != self._seen:
                    self._token = replace(self._options, token=Path(path).read_text("utf-8").strip(), token_file="").token
                    self._seen = seen
            except (OSError, UnicodeDecodeError) as error:
                said = getattr(error, "strerror", None) or "it is not text"
                raise InvalidArgument(f"token_file {path!r} cannot be read: {said}", field="token_file", value=path) from None
            return self._token


def _content(name: str, path: str) -> bytes | None:
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidArgument(f"{name} {path!r} cannot be read: {error.strerror}", field=name, value=path) from None


def _is_near(target: str) -> bool:
    """Whether a target is on this host."""
    if is_socket(target):
        return True
    host = target.removeprefix("dns:").removeprefix("ipv4:").removeprefix("ipv6:").lstrip("/").rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
