"""One server, as one process sees it: a channel made when first used, calls with deadlines, retries and this project's errors."""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
from dataclasses import replace
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from ome_tensor.errors import (
    BrokenStream,
    Cancelled,
    DeadlineExceeded,
    OmeTensorError,
    Overloaded,
    Unavailable,
)
from ome_tensor.watchdog import Watchdog
from ome_tensor_proto.memory import keep_blocks
from ome_tensor_proto.methods import MAY_MOVE, METHODS, ONE_MESSAGE
from ome_tensor_proto.status import from_rpc_error
from ome_tensor_proto.v1 import tensor_service_pb2 as pb

from .channels import Channels
from .compression import Advisor
from .known_images import KnownImages
from .mapping import MappedDatasets
from .options import Options, checked_target

__all__ = ["Backoff", "Connection"]

M = TypeVar("M", bound=Message)

#: What may go away by itself. Everything else is the caller's mistake or the data's fault, and trying again would only hide it.
TRANSIENT = (Unavailable, Overloaded, DeadlineExceeded, BrokenStream)

_FIRST_WAIT, _LONGEST_WAIT = 0.05, 2.0

_CHANNEL_OPTIONS = (
    # Channels of equal target and options would share one TCP connection across clients.
    ("grpc.use_local_subchannel_pool", 1),
    # Measured (PERFORMANCE): large HTTP/2 frames, fewer wake-ups.
    ("grpc.http2.max_frame_size", (16 << 20) - 1),
    # A message is a few MiB at most; what is larger is not this contract's.
    ("grpc.max_receive_message_length", 256 << 20),
    ("grpc.max_send_message_length", -1),
    # Measured with 1 MiB messages: 1.40 GB/s with gRPC's own 8 KiB and up, 1.72 with this, which gRPC lowers by itself for what is small.
    ("grpc.experimental.tcp_read_chunk_size", 1 << 20),
    ("grpc.experimental.tcp_min_read_chunk_size", 1 << 20),
    # A server whose machine vanished is noticed although nothing is sent to it.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # gRPC's own wait between attempts to connect grows to two minutes; a restarted server would not be noticed for as long.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A stream is read on the thread that wants it, without a second one to wake up for each message.
    ("SingleThreadedUnaryStream", 1),
)

_IMPATIENT_SECONDS = 1.0


class Backoff:
    """Decides whether a transient failure is retried, and waits between attempts.

    Args:
        retry_for: Seconds without progress after which to give up.
    """

    def __init__(self, retry_for: float) -> None:
        self._retry_for = retry_for
        self.progress()

    def progress(self) -> None:
        """Something arrived: the clock starts anew."""
        self._since = time.monotonic()
        self._wait = _FIRST_WAIT

    def pause(self, error: OmeTensorError, stop: threading.Event | None = None) -> None:
        """Sleep before the next attempt; raises ``error`` where it is not transient or the time is up."""
        # Jitter: many workers that lost one server should not come back in step.
        wait = self._wait * random.uniform(0.5, 1.0)
        if not isinstance(error, TRANSIENT) or time.monotonic() - self._since + wait > self._retry_for:
            raise error
        self._wait = min(2 * self._wait, _LONGEST_WAIT)
        if stop is None:
            time.sleep(wait)
        else:
            stop.wait(wait)


class Connection:
    """A connection to one server. Pickles as its target and options; usable after a fork, each process with a channel of its own.

    Args:
        target: ``HOST:PORT``.
        options: How to talk.
    """

    def __init__(self, target: str, options: Options) -> None:
        self.target = checked_target(target)
        self.options = options
        self.channels = Channels(self.target, _CHANNEL_OPTIONS)
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
        return Connection, (self.target, self.options)

    def _new_watchdog(self) -> Watchdog:
        return Watchdog(self.options.timeout, "ome-tensor-watchdog")

    def after_fork(self) -> None:
        """Begin anew in a child: threads, and locks that another thread held, stayed with the parent."""
        self.channels.begin_anew()
        self._lock = threading.Lock()
        self.watchdog = self._new_watchdog()
        self.advisor = Advisor()
        self.images = KnownImages()
        self.mapped.begin_anew()

    @property
    def channel(self) -> grpc.Channel:
        """This process's channel for new calls."""
        return self.channels.current

    def close(self) -> None:
        """Close the channel; the next call opens another."""
        self.channels.close()
        for sibling in self._siblings:
            sibling.close()

    @property
    def several(self) -> list[Connection]:
        """As many connections as one read is to be spread over, this one first."""
        if len(self._siblings) < self.options.connections - 1:
            with self._lock:
                alone = replace(self.options, connections=1)
                while len(self._siblings) < self.options.connections - 1:
                    self._siblings.append(Connection(self.target, alone))
        return [self, *self._siblings]

    def call(self, name: str, request: Message, response: type[M], *, patient: bool = True) -> M:
        """A unary call of ``TensorService``.

        Args:
            name: The method's name in the contract.
            request: Its request.
            response: The class of its response.
            patient: Whether to retry, and to wait for as long as the options say; else one try of a second at most, for what can do without.

        Raises:
            OmeTensorError: what the server raised, or why it could not be reached.
        """
        data = request.SerializeToString()
        backoff = Backoff(self.options.retry_for if patient else 0)
        timeout = self.options.timeout if patient else min(_IMPATIENT_SECONDS, self.options.timeout)
        while True:
            try:
                with self.channels.use() as channel:
                    # Without serialisers a channel takes and gives bytes.
                    method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHODS[name].path)
                    answer = method(data, timeout=timeout)
                return response.FromString(answer)
            except DecodeError:
                raise BrokenStream(f"{self.target}: the answer to {name} is not a valid message", field="target") from None
            except grpc.RpcError as rpc_error:
                error = self.error_of(rpc_error)
            if isinstance(error, DeadlineExceeded):
                raise error  # The caller's whole patience is spent.
            backoff.pause(error)

    def read_one(self, request: Message) -> bytes:
        """The only message of a ReadTiles call that takes one, without what streams need; one try.

        Raises:
            OmeTensorError: as :meth:`call`, and whatever a server says that does not do this: then read it as a stream.
        """
        self._reuse_memory()
        try:
            with self.channels.use() as channel:
                method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHODS["ReadTiles"].path)
                return method(request.SerializeToString(), timeout=self.options.timeout, metadata=((ONE_MESSAGE, "1"),))
        except grpc.RpcError as rpc_error:
            raise self.error_of(rpc_error) from None

    def _reuse_memory(self) -> None:
        global _memory_is_reused
        if self.options.reuse_memory and not _memory_is_reused:
            _memory_is_reused = True
            keep_blocks()

    def stream(self, name: str, request: Message, channel: grpc.Channel, *, may_move: bool = False) -> Any:
        """A streaming call of ``TensorService``: an iterator of message bytes with ``cancel()``.

        It has no deadline of its own, since a read may last for hours: the watchdog ends a wait for a single message.

        Args:
            name: The method's name in the contract.
            request: Its request.
            channel: What to call on, from :attr:`channels`: in use until the stream ends.
            may_move: Whether the server may answer Rebalance; see :class:`.channels.Moves`.
        """
        self._reuse_memory()
        method: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(METHODS[name].path)
        return method(request.SerializeToString(), metadata=((MAY_MOVE, "1"),) if may_move else None)

    def error_of(self, rpc_error: grpc.RpcError) -> OmeTensorError:
        """This project's error for gRPC's; one about the connection names the target."""
        error = from_rpc_error(rpc_error)
        if error.field is None and isinstance(error, (Unavailable, DeadlineExceeded, Cancelled)):
            seconds = f" within {self.options.timeout:g} s" if isinstance(error, DeadlineExceeded) else ""
            return type(error)(f"{self.target}: {_plain(error)}{seconds}", field="target", value=self.target)
        return error


def _plain(error: OmeTensorError) -> str:
    """gRPC's text without its jargon where that says nothing more."""
    if isinstance(error, DeadlineExceeded):
        return "no answer"
    text = error.message
    for said, meant in (
        ("Connection refused", "connection refused; is a server running there?"),
        ("DNS resolution failed", "no such host"),
        ("Domain name not found", "no such host"),
        ("Socket closed", "the connection was closed"),
    ):
        if said in text:
            return meant
    return text


# Whether this process's C library has been told to keep freed blocks.
_memory_is_reused = False

# Every connection of this process, so that a forked child can begin anew with each.
_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


def _after_fork() -> None:
    for connection in list(_connections):
        connection.after_fork()


os.register_at_fork(after_in_child=_after_fork)
