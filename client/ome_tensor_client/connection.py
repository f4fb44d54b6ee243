"""One server, as one process sees it: a channel made when first used, calls with deadlines, retries and this project's errors."""

from __future__ import annotations

import os
import random
import threading
import time
import weakref
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
from ome_tensor_proto.methods import MAY_MOVE, METHODS
from ome_tensor_proto.status import from_rpc_error

from .compression import Advisor
from .options import Options, checked_target

__all__ = ["Backoff", "Connection"]

#: Old connections kept while calls may still run on them; a read that outlasts so many moves resumes elsewhere.
_CHANNELS_LEFT = 16

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
    # A server whose machine vanished is noticed although nothing is sent to it.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # gRPC's own wait between attempts to connect grows to two minutes; a restarted server would not be noticed for as long.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A stream is read on the thread that wants it, without a second one to wake up for each message.
    ("SingleThreadedUnaryStream", 1),
)


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
        self._channel: grpc.Channel | None = None
        self._lock = threading.Lock()
        self.watchdog = self._new_watchdog()
        self.advisor = Advisor()
        # Channels of a parent process: destroying one after a fork would wait for threads that only the parent has.
        self._inherited: list[grpc.Channel] = []
        self._left: list[grpc.Channel] = []
        _connections.add(self)

    def __reduce__(self) -> tuple[object, ...]:
        return Connection, (self.target, self.options)

    def _new_watchdog(self) -> Watchdog:
        return Watchdog(self.options.timeout, "ome-tensor-watchdog")

    def after_fork(self) -> None:
        """Begin anew in a child: threads, and locks that another thread held, stayed with the parent."""
        self._lock = threading.Lock()
        self.watchdog = self._new_watchdog()
        self.advisor = Advisor()
        if self._channel is not None:
            self._inherited.append(self._channel)
            self._channel = None
        self._inherited += self._left
        self._left = []

    @property
    def channel(self) -> grpc.Channel:
        """This process's channel."""
        with self._lock:
            if self._channel is None:
                self._channel = grpc.insecure_channel(self.target, options=_CHANNEL_OPTIONS)
            return self._channel

    def close(self) -> None:
        """Close the channel; the next call opens another."""
        with self._lock:
            channels = [*self._left, *([] if self._channel is None else [self._channel])]
            self._left, self._channel = [], None
        for channel in channels:
            channel.close()
            _closed_one()

    def __del__(self) -> None:
        if getattr(self, "_channel", None) is not None:
            _closed_one()

    def call(self, name: str, request: Message, response: type[M]) -> M:
        """A unary call of ``TensorService``.

        Args:
            name: The method's name in the contract.
            request: Its request.
            response: The class of its response.

        Raises:
            OmeTensorError: what the server raised, or why it could not be reached.
        """
        data = request.SerializeToString()
        backoff = Backoff(self.options.retry_for)
        while True:
            try:
                # Without serialisers a channel takes and gives bytes.
                method: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(METHODS[name].path)
                return response.FromString(method(data, timeout=self.options.timeout))
            except DecodeError:
                raise BrokenStream(f"{self.target}: the answer to {name} is not a valid message", field="target") from None
            except grpc.RpcError as rpc_error:
                error = self.error_of(rpc_error)
            if isinstance(error, DeadlineExceeded):
                raise error  # The caller's whole patience is spent.
            backoff.pause(error)

    def stream(self, name: str, request: Message, *, may_move: bool = False) -> Any:
        """A streaming call of ``TensorService``: an iterator of message bytes with ``cancel()``.

        It has no deadline of its own, since a read may last for hours: the watchdog ends a wait for a single message.

        Args:
            name: The method's name in the contract.
            request: Its request.
            may_move: Whether the server may answer Rebalance; the caller then calls :meth:`reconnect` and tries again.
        """
        method: grpc.UnaryStreamMultiCallable[bytes, bytes] = self.channel.unary_stream(METHODS[name].path)
        return method(request.SerializeToString(), metadata=((MAY_MOVE, "1"),) if may_move else None)

    def reconnect(self) -> None:
        """Make the next call open a connection of its own; calls in progress go on over the old one."""
        with self._lock:
            if self._channel is not None:
                self._left.append(self._channel)
                self._channel = None
            # Closing one would end its calls; some are still being read.
            while len(self._left) > _CHANNELS_LEFT:
                self._left.pop(0)

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


# Every connection of this process, so that a forked child can begin anew with each.
_connections: weakref.WeakSet[Connection] = weakref.WeakSet()


# When a channel of this process was last closed, by time.monotonic().
_closed_at = float("-inf")

#: gRPC takes a channel apart on threads of its own; a child forked meanwhile may wait forever for a lock one of them held (grpcio 1.85:
#: about one parent in forty that forked at once after a close; none in eighty with this pause).
_SETTLE_SECONDS = 0.05


def _closed_one() -> None:
    global _closed_at
    _closed_at = time.monotonic()


def _before_fork() -> None:
    # Only a fork within a moment of a close waits, so this costs nothing otherwise.
    time.sleep(max(0.0, _closed_at + _SETTLE_SECONDS - time.monotonic()))


def _after_fork() -> None:
    for connection in list(_connections):
        connection.after_fork()


os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
