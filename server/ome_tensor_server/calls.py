"""One call in progress: who makes it, what it has cost, and what the log will say of it."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import grpc

from ome_tensor.errors import NotAllowed, NotAuthenticated, OmeTensorError
from ome_tensor_proto.methods import CHECKSUM, MAY_MOVE, REQUEST_ID

from .authentication import Authenticator
from .limits import Rates
from .logs import AUDIT, Fields
from .principals import ANYBODY, Caller

if TYPE_CHECKING:
    from .meters import Meters

__all__ = ["Call", "Gate"]

_log = logging.getLogger(__name__)
_audit = logging.getLogger(AUDIT)

#: What a client may name a call: it stands in log lines.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


@dataclass(frozen=True, slots=True)
class Gate:
    """What every call passes.

    Attributes:
        authenticator: Says who calls.
        rates: How many calls may begin.
        meters: Where they are counted.
    """

    authenticator: Authenticator
    rates: Rates
    meters: Meters


class Call:
    """One call in progress.

    Attributes:
        method: Its method's name.
        request: The bytes of its request, once they have come; of a stream that a client sends, none.
        request_id: What the client, or for want of that the server, names it by.
        caller: Who makes it; anybody before :meth:`admit`.
        image: Key of what it is about, once known.
        tiles: Tiles sent so far.
        nbytes: Bytes of messages sent so far.
        waiting_since: When the client was offered the message it has not taken yet; ``None`` while none is on offer.
    """

    def __init__(self, method: str, context: grpc.ServicerContext, gate: Gate) -> None:
        self.method = method
        self.request = b""
        self.image: str | None = None
        self.tiles: int | None = None
        self.nbytes = 0
        self.waiting_since: float | None = None
        self._stalled = False
        self._context = context
        self._gate = gate
        self._at_end: list[Callable[[], None]] = []
        self._began = time.perf_counter()
        self._metadata = context.invocation_metadata()
        self.caller = Caller(str(context.peer()))
        given = next((value for name, value in self._metadata if name == REQUEST_ID), "")
        self.request_id = given if isinstance(given, str) and _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        gate.meters.add("calls_running")

    def begin(self, request: bytes) -> None:
        """Its request has come."""
        self.request = request
        self._gate.meters.add("received_bytes", value=len(request))

    @contextmanager
    def others_time(self) -> Iterator[None]:
        """What is waited for here is the client's, and no part of what the call takes."""
        since = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - since

    def admit(self) -> None:
        """Find out who calls, and count it.

        Raises:
            NotAuthenticated: nobody whom this server knows.
            Overloaded: one call too many.
        """
        principal = self._gate.authenticator.principal(self._metadata, self._identity)
        self.caller = Caller(self.caller.peer, principal)
        self._gate.rates.admit(self.caller.key)

    def _identity(self) -> Mapping[str, Iterable[bytes]]:
        # A list for each name, whatever grpcio's stub says.
        return cast(Mapping[str, Iterable[bytes]], self._context.auth_context())

    def check_access(self) -> None:
        """Whether whoever was let in at the beginning still is. Raises NotAuthenticated."""
        principal = self.caller.principal
        if principal is not ANYBODY and not principal.is_valid:
            raise NotAuthenticated("the token has expired or was revoked", field="authorization")

    @property
    def meters(self) -> Meters:
        """Where its cost is counted."""
        return self._gate.meters

    @property
    def is_active(self) -> bool:
        """Whether anybody still wants the answer: a cancelled stream does not stop its own thread."""
        return bool(self._context.is_active())

    @property
    def may_move(self) -> bool:
        """Whether the client would rather connect anew than share a busy worker."""
        return any(name == MAY_MOVE for name, _ in self._metadata)

    @property
    def wants_checksum(self) -> bool:
        """Whether the client wants one of request and answer."""
        return any(name == CHECKSUM for name, _ in self._metadata)

    @property
    def time_remaining(self) -> float:
        """Seconds until the client gives up; infinite where it does not say."""
        remaining = self._context.time_remaining()
        return float("inf") if remaining is None else float(remaining)

    def at_end(self, do: Callable[[], None]) -> None:
        """Something to be done when the call is through, however it ends."""
        self._at_end.append(do)

    def end(self) -> None:
        """The call is through."""
        while self._at_end:
            self._at_end.pop()()

    def expire(self) -> None:
        """The client has left a message untaken for too long: free the thread. A client that comes back resumes."""
        self._stalled = True
        self._context.cancel()

    def audit(self, action: str, outcome: str, dataset: str | None = None) -> None:
        """Write down who changed what, or wanted to: whatever the log's level."""
        _audit.info(
            Fields(
                "audit",
                action=action,
                dataset=dataset or self.image,
                outcome=outcome,
                principal=self.caller.principal.name,
                peer=self.caller.peer,
                request=self.request_id,
            )
        )

    def finish(self, status: str, error: OmeTensorError | None = None) -> None:
        """Count the call, and write its line."""
        said = None if error is None else str(error)
        if self._stalled:
            status, said = "CANCELLED", "stalled: the client left a message untaken"
        elif isinstance(error, (NotAuthenticated, NotAllowed)):
            self.audit(self.method, "denied")
        seconds = time.perf_counter() - self._began
        meters = self._gate.meters
        meters.add("calls_running", value=-1)
        meters.add("calls", self.method, status)
        meters.observe("call_seconds", self.method, seconds)
        if error is not None:
            meters.add("refused", error.reason)
        if self.tiles is None:
            # Of tiles each message is counted as it goes.
            meters.add("sent_bytes", value=self.nbytes)
        level = logging.INFO if status in ("OK", "CANCELLED") else logging.WARNING
        if not _log.isEnabledFor(level):
            return
        _log.log(
            level,
            Fields(
                "call",
                method=self.method,
                image=self.image,
                bytes=self.nbytes,
                tiles=self.tiles,
                ms=seconds * 1e3,
                status=status,
                principal=self.caller.principal.name if self.caller.principal is not ANYBODY else None,
                peer=self.caller.peer,
                request=self.request_id,
                error=said,
            ),
        )
