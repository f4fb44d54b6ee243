"""How a client talks to its server; passed explicitly, and pickled with the client."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ome_tensor.errors import InvalidArgument

__all__ = ["COMPRESSIONS", "Options", "checked_target"]

#: What :attr:`Options.compression` may be.
COMPRESSIONS = ("none", "lz4", "zstd", "auto")


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
    """

    timeout: float = 60.0
    retry_for: float = 10.0
    prefetch_bytes: int = 64 << 20
    message_bytes: int = 0
    compression: str = "none"

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
        if self.compression not in COMPRESSIONS:
            raise InvalidArgument(
                f"compression must be one of {', '.join(COMPRESSIONS)}, not {self.compression!r}",
                field="compression",
                value=self.compression,
            )


def checked_target(target: str) -> str:
    """A target with a port, or one of gRPC's own forms (``unix:/path``, ``dns:///host:port``). Without a port gRPC would try 443.

    Raises:
        InvalidArgument: neither.
    """
    if not isinstance(target, str):
        raise InvalidArgument(f"target must be HOST:PORT, not {target!r}", field="target", value=target)
    target = target.strip()
    if re.match(r"(dns|ipv4|ipv6|unix|unix-abstract|xds):", target) and not re.fullmatch(r"\w+:[0-9]+", target):
        return target
    host, _, port = target.rpartition(":")
    # An IPv6 address wants brackets: without them its last group would be taken for the port.
    bare = host.startswith("[") or ":" not in host
    if not host or not bare or not (port.isascii() and port.isdecimal() and 0 < int(port) <= 65535):
        raise InvalidArgument(f"target must be HOST:PORT, not {target!r}", field="target", value=target)
    return target
