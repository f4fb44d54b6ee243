"""One server, as one process sees it: a channel made when first used, calls with deadlines, retries and this project's errors."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from ome_tensor.errors import (
    BrokenStream,
    DatasetChanged,
    DeadlineExceeded,
    InvalidArgument,
    NotAuthenticated,
    OmeTensorError,
    Unavailable,
)
from ome_tensor.watchdog import Watchdog
from ome_tensor_proto.channel_options import CHANNEL_OPTIONS
from ome_tensor_proto.memory import keep_blocks
from ome_tensor_proto.methods import ADMIN_METHODS, CHECKSUM, MAY_MOVE, METHODS, ONE_MESSAGE
from ome_tensor_proto.v1 import tensor_service_pb2 as pb

from .answers import Messages, Sending, check_answer, end_call, only_answer
from .backoff import TRANSIENT, Backoff
from .call_errors import error_about, error_of_call
from .channels import Channels
from .compression import Advisor
from .health import check_health
from .identity import Identity, Outgoing
from .known_images import KnownImages
from .mapping import MappedDatasets
from .options import Options, checked_targets
from .replicas import Replicas

__all__ = ["Connection"]

M = TypeVar("M", bound=Message)

_CHANNEL_OPTIONS = (
    # Channels of equal target and options would share one TCP connection across clients.
    ("grpc.use_local_subchannel_pool", 1),
    *CHANNEL_OPTIONS,
    # A message is a few MiB at most; what is larger is not this contract's.
    ("grpc.max_receive_message_length", 256 << 20),
    # Measured with 1 MiB messages: 1.40 GB/s with gRPC's own 8 KiB and up, 1.72 with this, which gRPC lowers by itself for what is small.
    ("grpc.experimental.tcp_read_chunk_size", 1 << 20),
    ("grpc.experimental.tcp_min_read_chunk_size", 1 << 20),
    # gRPC's own wait between attempts to connect grows to two minutes; a restarted server would not be noticed for as long.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A stream is read on the thread that wants it, without a second one to wake up for each message. Of older releases a stream read so
    # does not always hear that its server has died (grpcio 1.71: 2 of 12 kills, 1.74: 1 of 40, 1.85: none of 120), and waits for its timeout.
    *((("SingleThreadedUnaryStream", 1),) if tuple(map(int, grpc.__version__.split(".")[:2])) >= (1, 85) else ()),
)

_IMPATIENT_SECONDS = 1.0

#: Seconds that a server which was put aside has to say that it serves again.
_ANSWER = 1.0

#: A stream that is gathered whole may take so many times what a call may.
_SHORT_STREAM = 10


class Connection:
    """A connection to a server, or to several that hold the same. Pickles as its targets and options; usable after a fork, each process with
    channels of its own.

    Args:
        target: ``HOST:PORT``, or several of them.
        options: How to talk.

    Attributes:
        target: As text, commas between several.
        replicas: The servers.
        checks: Whether reads ask for checksums.

    Raises:
        InvalidArgument: a malformed target, or several to be mapped from.
    """

    def __init__(self, target: str | Sequence[str], options: Options) -> None:
        targets = checked_targets(target)
        self.target = ",".join(targets)
        self.options = options
        identity = self._identity = Identity(options, targets)
        self.checks = not identity.is_near if options.checksum is None else options.checksum
        self._checked = ((CHECKSUM, "1"),) if self.checks else ()
        self.replicas = Replicas(
            targets, lambda target, further: identity.channel(target, (*_CHANNEL_OPTIONS, *further)), partial(_serves, options)
        )
        if len(targets) > 1:
            if options.transport == "mapped":
                raise InvalidArgument(
                    "transport='mapped' is of one server, on this host; name one target",
                    field="transport",
                    value=options.transport,
                )
            options = replace(options, transport="tcp")
        self._siblings: list[Connection] = []
        self._lock = threading.Lock()
        self.watchdog = self._new_watchdog()
        self.advisor = Advisor()
        self.images = KnownImages()
        self.mapped = MappedDatasets(
            self.target,
            options,
            lambda request, patient: self.call("MapDataset", request, pb.MapDatasetResponse, patient=patient),
        )
        _connections.add(self)

    def __reduce__(self) -> tuple[object, ...]:
        return Connection, (self.replicas.targets, self.options)

    def _new_watchdog(self) -> Watchdog:
        return Watchdog(self.options.timeout, "ome-tensor-watchdog")

    def after_fork(self) -> None:
        """Begin anew in a child: threads, and locks that another thread held, stayed with the parent."""
        self.replicas.begin_anew()
        self._identity.begin_anew()
        self._lock = threading.Lock()
        self.watchdog = self._new_watchdog()
        self.advisor = Advisor()
        self.images = KnownImages()
        self.mapped.begin_anew()

    @property
    def channel(self) -> grpc.Channel:
        """This process's channel for new calls."""
        return self.replicas.pick().current

    @property
    def channels(self) -> Channels:
        """The channels for a new call."""
        return self.replicas.pick()

    def prefer(self, index: int) -> None:
        """Of several servers, read from the one of that number, counted round, as long as it serves: so that readers who know their numbers
        spread evenly."""
        self.replicas.preferred = index

    def check_alone(self, what: str) -> None:
        """InvalidArgument where there are several servers, for what would make them differ."""
        if self.replicas.are_several:
            raise InvalidArgument(
                f"{what} is of one server, and this client has several ({self.target}): connect to one",
                field="target",
                value=self.target,
            )

    def close(self) -> None:
        """Close the channel; the next call opens another."""
        self.replicas.close()
        for sibling in self._siblings:
            sibling.close()

    @property
    def several(self) -> list[Connection]:
        """As many connections as one read is to be spread over, this one first."""
        if len(self._siblings) < self.options.connections - 1:
            with self._lock:
                alone = replace(self.options, connections=1)
                while len(self._siblings) < self.options.connections - 1:
                    self._siblings.append(Connection(self.replicas.targets, alone))
        for place, sibling in enumerate(self._siblings):
            sibling.prefer(self.replicas.preferred + place + 1)
        return [self, *self._siblings]

    def call(self, name: str, request: Message, response: type[M], *, patient: bool = True, timeout: float | None = None) -> M:
        """A unary call.

        Args:
            name: The method's name in the contract.
            request: Its request.
            response: The class of its response.
            patient: Whether to retry, and to wait for as long as the options say; else one try of a second at most, for what can do without.
            timeout: Seconds to wait, instead of what the options say.

        Raises:
            OmeTensorError: what the server raised, or why it could not be reached.
        """
        data = request.SerializeToString()
        backoff = Backoff(self.options.retry_for if patient else 0)
        timeout = timeout or (self.options.timeout if patient else min(_IMPATIENT_SECONDS, self.options.timeout))
        while True:
            channels, began, outgoing = self.channels, time.monotonic(), self._identity.outgoing(_path(name), *self._checked)
            error: OmeTensorError
            try:
                with outgoing, channels.use() as channel:
                    # Without serialisers a channel takes and gives bytes.
                    method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_path(name))
                    if not self.checks:
                        answer = only_answer(method(data, timeout=timeout, metadata=outgoing.metadata))
                    else:
                        answer, made = method.with_call(data, timeout=timeout, metadata=outgoing.metadata)
                        check_answer(data, [only_answer(answer)], made)
                return response.FromString(answer)
            except DecodeError:
                raise BrokenStream(f"{channels.target}: the answer to {name} is not a valid message", field="target") from None
            except BrokenStream as broken:
                error = broken
            except grpc.RpcError as rpc_error:
                error = self.error_of(rpc_error, channels, outgoing)
            if self.fails_over(channels, error, backoff, began):
                continue
            if isinstance(error, DeadlineExceeded):
                raise error  # The caller's whole patience is spent.
            backoff.pause(error)

    def fails_over(self, channels: Channels, error: OmeTensorError, backoff: Backoff, began: float | None) -> bool:
        """A call failed: whether to make it again at once, of another server.

        Args:
            channels: What it was made on.
            error: Why.
            backoff: Of all tries of that call.
            began: When it began, where it brought nothing.
        """
        if not self.replicas.are_several or not isinstance(error, TRANSIENT):
            return False
        # Each is tried once before anybody waits, even where one comes and goes.
        return self.replicas.put_aside(channels, began) and backoff.hop(len(self.replicas.targets))

    def gather(self, name: str, request: Message) -> list[bytes]:
        """All messages of a streaming call that is short; asked for anew where it is cut.

        Raises:
            OmeTensorError: as :meth:`call`.
        """
        backoff = Backoff(self.options.retry_for)
        data = request.SerializeToString()
        while True:
            channels, began, outgoing = self.channels, time.monotonic(), self._identity.outgoing(_path(name), *self._checked)
            messages = Messages()
            error: OmeTensorError
            try:
                with outgoing, channels.use(messages) as channel:
                    method: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(_path(name))
                    call = method(data, timeout=_SHORT_STREAM * self.options.timeout, metadata=outgoing.metadata)
                    # Where another server can be asked, one that hangs is not waited for that long.
                    found = messages.of(call, self.watchdog) if self.replicas.are_several else list(call)
                    if self.checks:
                        check_answer(data, found, call)
                    return found
            except BrokenStream as broken:
                error = broken
            except grpc.RpcError as rpc_error:
                error = self.no_message(channels) if messages.timed_out else self.error_of(rpc_error, channels, outgoing)
            if self.fails_over(channels, error, backoff, began):
                continue
            if isinstance(error, DeadlineExceeded):
                raise error
            backoff.pause(error)

    def watch(self, name: str, request: Message) -> Iterator[bytes]:
        """The messages of a streaming call, as they come, for as long as it takes; not tried again. Raises what :meth:`call` does."""
        outgoing = self._identity.outgoing(_path(name))
        try:
            with outgoing, self.channels.use() as channel:
                method: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(_path(name))
                call = method(request.SerializeToString(), metadata=outgoing.metadata)
                try:
                    yield from call
                finally:
                    end_call(call)
        except grpc.RpcError as rpc_error:
            raise self.error_of(rpc_error, outgoing=outgoing) from None

    def send(self, name: str, requests: Iterator[bytes]) -> bytes:
        """A call that takes a stream, once; it may take ten times what a call may when all is sent, and more where that is much. Raises what
        :meth:`call` does.
        """
        sending = Sending(requests, self.options.timeout)
        outgoing = self._identity.outgoing(_path(name))
        try:
            with outgoing, self.channels.use(sending) as channel:
                method: grpc.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(_path(name))
                return sending.of(method, self.watchdog, metadata=outgoing.metadata)
        except grpc.RpcError as rpc_error:
            if sending.timed_out:
                raise self.no_message(self.channels) from None
            raise self.error_of(rpc_error, outgoing=outgoing) from None

    def read_one(self, request: bytes) -> bytes:
        """The only message of a ReadTiles call that takes one, without what streams need; one try.

        Raises:
            OmeTensorError: as :meth:`call`, and whatever a server says that does not do this: then read it as a stream.
        """
        self._reuse_memory()
        channels, began, outgoing = (
            self.channels,
            time.monotonic(),
            self._identity.outgoing(_path("ReadTiles"), (ONE_MESSAGE, "1")),
        )
        try:
            with outgoing, channels.use() as channel:
                method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHODS["ReadTiles"].path)
                return only_answer(method(request, timeout=self.options.timeout, metadata=outgoing.metadata))
        except grpc.RpcError as rpc_error:
            error = self.error_of(rpc_error, channels, outgoing)
            if isinstance(error, TRANSIENT) and self.replicas.put_aside(channels, began):
                # Also one that hangs: a stream reads it from the next server.
                raise Unavailable(error.message, field=error.field, value=error.value) from None
            raise error from None

    def _reuse_memory(self) -> None:
        global _memory_is_reused
        if self.options.reuse_memory and not _memory_is_reused:
            _memory_is_reused = True
            keep_blocks()

    def outgoing(self, name: str, *, may_move: bool = False) -> Outgoing:
        """What goes with a new streaming call.

        Args:
            name: The method's name in the contract.
            may_move: Whether the server may answer Rebalance; see :class:`.channels.Moves`.
        """
        return self._identity.outgoing(_path(name), *(((MAY_MOVE, "1"),) if may_move else ()))

    def stream(self, name: str, request: bytes, channel: grpc.Channel, outgoing: Outgoing) -> Any:
        """A streaming call of ``TensorService``: an iterator of message bytes with ``cancel()``.

        It has no deadline of its own, since a read may last for hours: the watchdog ends a wait for a single message.

        Args:
            name: The method's name in the contract.
            request: The bytes of its request.
            channel: What to call on, from :attr:`channels`: in use until the stream ends.
            outgoing: What goes with it.
        """
        self._reuse_memory()
        method: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(METHODS[name].path)
        return method(request, metadata=outgoing.metadata)

    def error_of(
        self, rpc_error: grpc.RpcError, channels: Channels | None = None, outgoing: Outgoing | None = None
    ) -> OmeTensorError:
        """This project's error for gRPC's; one about the connection names the target, that of the call's channels where there are several.

        Args:
            rpc_error: What gRPC raised.
            channels: What the call was made on.
            outgoing: What went with it.
        """
        error = self._error_of(rpc_error, channels, outgoing)
        if outgoing is not None:
            error.request_id = outgoing.request_id
        return error

    def _error_of(self, rpc_error: grpc.RpcError, channels: Channels | None, outgoing: Outgoing | None) -> OmeTensorError:
        error = error_of_call(rpc_error, self.options, self.target if channels is None else channels.target, self.target)
        if isinstance(error, NotAuthenticated) and outgoing is not None and self._identity.has_newer(outgoing):
            # It was renewed meanwhile: to be tried again with that.
            return Unavailable(error.message, field=error.field, value=error.value)
        if isinstance(error, DatasetChanged) and channels is not None and self.replicas.are_several:
            # Which of them differs is what somebody has to know who is to mend it.
            return DatasetChanged(f"{channels.target}: {error.message}", field=error.field, value=error.value)
        return error

    def no_message(self, channels: Channels) -> OmeTensorError:
        """The error for a stream whose next message did not come in time."""
        return error_about(channels.target, f"no message within {self.options.timeout:g} s", DeadlineExceeded, self.target)


def _serves(options: Options, target: str) -> bool:
    """Whether a server says that it serves."""
    try:
        found = check_health(target, timeout=_ANSWER, **options.about_tls)
    except OmeTensorError:
        return False
    return found == "SERVING"


def _path(name: str) -> str:
    return (METHODS[name] if name in METHODS else ADMIN_METHODS[name]).path


# Whether this process's C library has been told to keep freed blocks.
_memory_is_reused = False

# Every connection of this process, so that a forked child can begin anew with each.
_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _after_fork() -> None:
    for connection in list(_connections):
        connection.after_fork()


os.register_at_fork(after_in_child=_after_fork)
