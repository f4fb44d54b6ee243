"""Making calls by the thousand, and judging what is answered."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from tests.fuzz.requests import Request

from ome_tensor.errors import Reason
from ome_tensor_proto.methods import ADMIN_METHODS, METHODS, Method
from ome_tensor_proto.status import DOMAIN, STATUS_CODES

__all__ = ["Answer", "Caller", "problem"]

_OURS = frozenset(method.path for method in (*METHODS.values(), *ADMIN_METHODS.values()))

#: Longest that a call may take; beyond, the server hangs. Loads are waited for, and uploads read by a process that has to start.
_PATIENCE = 30.0

#: A stream that is answered is read so far, and then given up.
_MOST_MESSAGES, _MOST_BYTES = 12, 4 << 20

#: What gRPC itself says for a server, without asking it: code, and the beginning of its text.
_GRPCS_OWN: tuple[tuple[grpc.StatusCode, re.Pattern[str]], ...] = (
    (grpc.StatusCode.UNIMPLEMENTED, re.compile("Method not found!")),
    # More calls at once than the server has threads.
    (grpc.StatusCode.RESOURCE_EXHAUSTED, re.compile("Concurrent RPC limit exceeded!")),
    # Metadata over 8 KiB may be refused, over 16 KiB are. The text lists them, and is left out where it is itself too long.
    (grpc.StatusCode.RESOURCE_EXHAUSTED, re.compile("received metadata size exceeds (soft|hard) limit|$")),
    # More calls wait than gRPC lets wait, after floods of calls that were taken back at once (``port``): it drops others, whoever made them.
    (grpc.StatusCode.CANCELLED, re.compile("CANCELLED$")),
    # Over twice the server's limit of requests: its own limit is told by itself.
    (grpc.StatusCode.RESOURCE_EXHAUSTED, re.compile("(SERVER|CLIENT): (Received|Sent) message larger than max")),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a call.

    Attributes:
        code: Its status.
        text: What the status says.
        details: Its ``grpc-status-details-bin``, or ``None``.
        messages: What was answered before.
        given_up: Whether it was the caller who ended it.
    """

    code: grpc.StatusCode
    text: str = ""
    details: bytes | None = None
    messages: Sequence[bytes] = ()
    given_up: bool = False

    @property
    def label(self) -> str:
        """For counting."""
        return "given up" if self.given_up else self.code.name


def problem(request: Request, answer: Answer) -> str | None:
    """What is wrong with an answer, or ``None``.

    A call ends OK, or with a status that the contract defines, with an ErrorInfo of the domain ``ome-tensor`` whose reason goes with its code, or
    with one of what gRPC says by itself (:data:`_GRPCS_OWN`). It never ends with UNKNOWN or INTERNAL: gRPC says the latter only of what is no
    HTTP/2, or framed or compressed wrongly, which its own client never sends (``port.py`` does, and has the list).
    """
    method = request.method
    if answer.given_up:
        return None
    if answer.code == grpc.StatusCode.OK:
        return _wrong_message(method, answer.messages) if method else "a method that is not there was answered"
    if "Traceback" in answer.text or "site-packages" in answer.text:
        return f"shows its insides: {answer.text!r}"
    if answer.code == grpc.StatusCode.DEADLINE_EXCEEDED and answer.details is None:
        return None if request.timeout else f"no answer within {_PATIENCE:g} s"
    if any(answer.code == code and text.match(answer.text) for code, text in _GRPCS_OWN):
        # Health's List is in the newer contract only, and not built.
        wants_more = answer.code == grpc.StatusCode.UNIMPLEMENTED and method is not None and method.name != "List"
        return f"{request.path} is not found" if wants_more else None
    if request.path not in _OURS:
        return _wrong_of_grpc(request, method, answer)
    return _wrong_refusal(answer)


def _wrong_message(method: Method, messages: Sequence[bytes]) -> str | None:
    if not messages and method.path in _OURS:
        return "OK without a message"
    for message in messages:
        try:
            method.response.FromString(message)
        except DecodeError:
            return f"an answer that is no {method.response.DESCRIPTOR.name}"
    return None


def _wrong_of_grpc(request: Request, method: Method | None, answer: Answer) -> str | None:
    """Of health and reflection: a service that is not known, bytes that are no message, too many calls at once; none has an ErrorInfo."""
    if method is None:
        return f"a method that is not there ended with {answer.code.name}: {answer.text!r}"
    said = f"{method.name} ended with {answer.code.name}: {answer.text!r}"
    if answer.code == grpc.StatusCode.NOT_FOUND:
        return None if method.name == "Check" else said
    if answer.code == grpc.StatusCode.INVALID_ARGUMENT:
        for message in request.messages:
            try:
                method.request.FromString(message)
            except DecodeError:
                return None
    if answer.code == grpc.StatusCode.RESOURCE_EXHAUSTED and method.name in ("ServerReflectionInfo", "Watch"):
        return None
    return said


def _wrong_refusal(answer: Answer) -> str | None:
    said = f"{answer.code.name}: {answer.text!r}"
    if answer.code in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL):
        return said
    if answer.details is None:
        return f"no details with {said}"
    try:
        status = status_pb2.Status.FromString(answer.details)
        info = error_details_pb2.ErrorInfo()
        unpacked = bool(status.details) and status.details[0].Unpack(info)
    except DecodeError:
        return f"details that are no Status with {said}"
    if not unpacked or info.domain != DOMAIN:
        return f"no ErrorInfo of {DOMAIN} with {said}"
    if info.reason not in Reason.__members__.values() or STATUS_CODES[Reason(info.reason)] != answer.code:
        return f"reason {info.reason!r} with {said}"
    if status.code != answer.code.value[0]:
        return f"details of another code ({status.code}) with {said}"
    return None


class Caller:
    """Makes calls on several connections.

    Args:
        target: ``HOST:PORT``.
        connections: How many.
    """

    def __init__(self, target: str, connections: int) -> None:
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            # What becomes of an answer is judged once.
            ("grpc.enable_retries", 0),
            ("grpc.max_metadata_size", 64 << 10),
            ("grpc.absolute_max_metadata_size", 128 << 10),
        ]
        self._channels = [aio.insecure_channel(target, options) for _ in range(connections)]

    async def close(self) -> None:
        """Close all connections."""
        for channel in self._channels:
            await channel.close()

    async def call(self, request: Request) -> Answer:
        """Make a call, and read its answer to the end or until there was enough of it."""
        channel = self._channels[request.number % len(self._channels)]
        method = request.method
        takes_stream, streaming = (method.takes_stream, method.streaming) if method else (False, False)
        make: Any = {
            (False, False): channel.unary_unary,
            (False, True): channel.unary_stream,
            (True, False): channel.stream_unary,
            (True, True): channel.stream_stream,
        }[takes_stream, streaming]
        call = make(request.path)(
            _one_by_one(request.messages) if takes_stream else request.messages[0],
            metadata=request.metadata,
            timeout=request.timeout or _PATIENCE,
            compression=grpc.Compression.Gzip if request.compressed else None,
        )
        if request.cancel_after >= 0:
            asyncio.get_running_loop().call_later(request.cancel_after, call.cancel)
        messages: list[bytes] = []
        try:
            if streaming:
                # A watch has no end.
                most = 1 if method and method.name == "Watch" else _MOST_MESSAGES
                nbytes = 0
                async for message in call:
                    messages.append(message)
                    nbytes += len(message)
                    if len(messages) >= most or nbytes > _MOST_BYTES:
                        call.cancel()
                        return Answer(grpc.StatusCode.OK, messages=messages)
            else:
                messages.append(await call)
        except aio.AioRpcError as error:
            return _answer(error.code(), error.details(), error.trailing_metadata(), request, messages)
        except asyncio.CancelledError:
            if not call.cancelled():
                raise
            return Answer(grpc.StatusCode.CANCELLED, "", None, messages, given_up=True)
        return _answer(await call.code(), await call.details(), await call.trailing_metadata(), request, messages)


def _answer(code: grpc.StatusCode, text: str | None, metadata: Any, request: Request, messages: Sequence[bytes]) -> Answer:
    details = next((value for name, value in metadata or () if name == "grpc-status-details-bin"), None)
    # Which of the two ends it was that noticed a deadline or a cancellation, nobody can tell.
    given_up = (
        (code == grpc.StatusCode.CANCELLED and request.cancel_after >= 0)
        or (code == grpc.StatusCode.DEADLINE_EXCEEDED and 0 < request.timeout < _PATIENCE)
        # The asyncio client's own, where it sends a message to a call that has just ended; what the server said is lost.
        or (code == grpc.StatusCode.INTERNAL and text == "Internal error from Core")
    )
    return Answer(code, text or "", details, messages, given_up)


async def _one_by_one(messages: Sequence[bytes]) -> AsyncIterator[bytes]:
    for message in messages:
        yield message
