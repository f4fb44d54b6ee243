"""How a client talks to its server; passed explicitly, and pickled with the client."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ome_tensor.errors import InvalidArgument

__all__ = ["Options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of :func:`ome_tensor_client.connect`.

    Attributes:
        timeout: Seconds to wait for an answer; of a stream, for its next message. Never unbounded: a hung server is an error, not a hang.
        retry_for: Seconds without progress during which transient failures (server restarting, connection lost, overload) are retried with
            backoff; 0 for none.
        prefetch_bytes: Bound on the bytes that ``prefetch=n`` reads ahead in one iterator.
        message_bytes: Size of a message to ask for; 0 for the server's choice (about 1 MiB).
    """

    timeout: float = 60.0
    retry_for: float = 10.0
    prefetch_bytes: int = 64 << 20
    message_bytes: int = 0

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise InvalidArgument(f"{option.name} must be a number, not {value!r}", field=option.name, value=value)
            if value < 0 or (option.name in ("timeout", "prefetch_bytes") and value == 0):
                raise InvalidArgument(f"{option.name} must be positive: {value!r}", field=option.name, value=value)
