"""How a client talks to its server; passed explicitly, and pickled with the client."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ome_tensor.errors import InvalidArgument
from ome_tensor.keys import check_name

__all__ = ["COMPRESSIONS", "MOST_CONNECTIONS", "TRANSPORTS", "Options", "checked_target", "checked_targets", "is_socket"]

#: What :attr:`Options.compression` may be.
COMPRESSIONS = ("none", "lz4", "zstd", "auto")

#: Most of :attr:`Options.connections`: each holds a place among the server's concurrent reads.
MOST_CONNECTIONS = 16

#: What :attr:`Options.transport` may be.
TRANSPORTS = ("auto", "tcp", "mapped")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of :func:`ome_tensor_client.connect`.

    Attributes:
        timeout: Seconds to wait for an answer; of a stream, for its next message. Never unbounded: a hung server is an error, not a hang.
        retry_for: Seconds without progress during which transient failures (server restarting, connection lost, overload) are retried with
            backoff; 0 for none.
        prefetch_bytes: Bound on the bytes that ``prefetch=n`` reads ahead in one iterator.
        message_bytes: Size of a message to ask for; 0 for the server's choice (about 1 MiB).
        compression: Of pixels on their way: ``none``, ``lz4``, ``zstd``, or ``auto``: whichever brings them sooner over this link, measured while
            reading (see :mod:`ome_tensor_client.compression`).
        transport: How pixels come: ``tcp``, ``mapped`` (from the store of a server on this host), or ``auto``: mapped where that can be (see
            :mod:`ome_tensor_client.mapping`).
        reuse_memory: Whether the first stream may tell glibc to keep freed blocks of up to 32 MiB for this process, 256 MiB at most, instead of
            fetching fresh pages for each message: nearly twice the throughput at half the processor time (see :mod:`ome_tensor_proto.memory`).
        connections: TCP connections that the tiles of one read are spread over, 1 to 16: more than one where a single one does not fill the network,
            or does not keep a server's workers busy. Each is read ahead of on a thread of its own.
        checksum: Whether what comes over the wire brings checksums, and is read again where they differ: TCP's own is weak, and what network
            cards and switches damage passes it (Stone and Partridge 2000, https://doi.org/10.1145/347059.347561). ``None``: where it leaves
            this host. On the loopback interface, where nothing is damaged, they would cost 6 to 9 % of the throughput.
        tls: Whether to talk TLS, trusting the authorities that the system trusts; ``ca`` and ``cert`` mean that too.
        ca: PEM file of the authorities to trust instead.
        cert, key: PEM files of a client certificate and its key, for servers that want one.
        server_name: The name that the server's certificate is for, where it is reached by another one (through a tunnel, by a number).
        token: Who this is, as the server knows it (``ome-tensor token create``, or an identity provider's).
        token_file: File that holds the token instead; read again when it changes, so that a token may be renewed under a running job.
        insecure: Allow a token to travel in plain text beyond this host.
        tracing: Take part in the application's OpenTelemetry traces.
        store: Folder in which this process finds the server's store, where that is another one than the server says: two containers may have one
            volume in two places.
    """

    timeout: float = 60.0
    retry_for: float = 10.0
    prefetch_bytes: int = 64 << 20
    message_bytes: int = 0
    compression: str = "none"
    transport: str = "auto"
    store: str = ""
    reuse_memory: bool = True
    connections: int = 1
    checksum: bool | None = None
    tls: bool = False
    ca: str = ""
    cert: str = ""
    key: str = ""
    server_name: str = ""
    token: str = field(default="", repr=False)
    token_file: str = ""
    insecure: bool = False
    tracing: bool = False

    def __post_init__(self) -> None:
        for name in ("timeout", "retry_for"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InvalidArgument(f"{name} must be a number of seconds, not {value!r}", field=name, value=value)
        for name in ("prefetch_bytes", "message_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value >= 2**63:
                raise InvalidArgument(f"{name} must be a number of bytes, not {value!r}", field=name, value=value)
        for name, least in (("timeout", 1e-3), ("retry_for", 0), ("prefetch_bytes", 1), ("message_bytes", 0)):
            value = getattr(self, name)
            if value < least:
                raise InvalidArgument(f"{name} must be at least {least}: {value!r}", field=name, value=value)
        for name, allowed in (("compression", COMPRESSIONS), ("transport", TRANSPORTS)):
            value = getattr(self, name)
            if value not in allowed:
                raise InvalidArgument(f"{name} must be one of {', '.join(allowed)}, not {value!r}", field=name, value=value)
        for name in ("reuse_memory", "tls", "insecure", "tracing", "checksum"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (value is not None or name != "checksum"):
                raise InvalidArgument(f"{name} must be True or False: {value!r}", field=name, value=value)
        connections = self.connections
        if isinstance(connections, bool) or not isinstance(connections, int) or not 1 <= connections <= MOST_CONNECTIONS:
            raise InvalidArgument(
                f"connections must be a number from 1 to {MOST_CONNECTIONS}: {connections!r}",
                field="connections",
                value=connections,
            )
        for name, what in (
            ("store", "the path of a folder"),
            ("ca", "the path of a file"),
            ("cert", "the path of a file"),
            ("key", "the path of a file"),
            ("server_name", "a name"),
            ("token_file", "the path of a file"),
        ):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise InvalidArgument(f"{name} must be {what} as text: {value!r}", field=name, value=value)
        # A token is never repeated.
        if not isinstance(self.token, str) or (self.token and not re.fullmatch(r"[\x21-\x7e]+", self.token)):
            raise InvalidArgument("token must be a line of printable ASCII characters without spaces", field="token")
        if self.token and self.token_file:
            raise InvalidArgument("token and token_file: give one of them", field="token_file", value=self.token_file)
        for name, other in (("cert", "key"), ("key", "cert")):
            if getattr(self, name) and not getattr(self, other):
                raise InvalidArgument(f"{name} needs {other}", field=other, value="")
        if self.server_name and not self.is_secure:
            raise InvalidArgument(
                "server_name is of certificates: it needs tls or ca", field="server_name", value=self.server_name
            )

    @property
    def about_tls(self) -> dict[str, Any]:
        """The fields that say how the connection is secured, by name."""
        return {name: getattr(self, name) for name in ("tls", "ca", "cert", "key", "server_name")}

    @property
    def is_secure(self) -> bool:
        """Whether the connection is TLS."""
        return self.tls or bool(self.ca or self.cert)


#: Most servers that one connection spreads its reads over.
MOST_TARGETS = 64


def checked_targets(target: str | Sequence[str]) -> tuple[str, ...]:
    """One target or several: a list, or a text with commas between them. Raises InvalidArgument where one is malformed or named twice."""
    given: list[Any]
    if isinstance(target, str):
        # A path of a socket may have one in it.
        given = [target] if is_socket(target) else target.split(",")
    elif isinstance(target, (list, tuple)):
        given = list(target)
    else:
        given = []
    if not 1 <= len(given) <= MOST_TARGETS:
        raise InvalidArgument(
            f"target must be HOST:PORT, or a list of 1 to {MOST_TARGETS} of them, not {target!r}", field="target", value=target
        )
    found = tuple(map(checked_target, given))
    for place, one in enumerate(found):
        if one in found[:place]:
            raise InvalidArgument(f"target {one!r} is named twice", field="target", value=one)
    return found


def is_socket(target: str) -> bool:
    """Whether a target is a socket on this host; a host may be called ``unixbox``."""
    return target.startswith(("unix:", "unix-abstract:"))


def checked_target(target: str) -> str:
    """A target with a port, or one of gRPC's own forms (``unix:/path``, ``dns:///host:port``). Without a port gRPC would try 443.

    Raises:
        InvalidArgument: neither.
    """
    if not isinstance(target, str):
        raise InvalidArgument(f"target must be HOST:PORT, not {target!r}", field="target", value=target)
    target = check_name(target, "target", "target").strip()
    if re.match(r"(dns|ipv4|ipv6|unix|unix-abstract|xds):", target) and not re.fullmatch(r"\w+:[0-9]+", target):
        return target
    host, _, port = target.rpartition(":")
    # An IPv6 address wants brackets: without them its last group would be taken for the port.
    bare = (host.startswith("[") or ":" not in host) and "," not in host
    if not host or not bare or not (port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) <= 65535):
        # Whoever pasted a page sees its beginning.
        shown = target if len(target) <= 100 else f"{target[:100]}…"
        raise InvalidArgument(f"target must be HOST:PORT, not {shown!r}", field="target", value=target)
    return target
