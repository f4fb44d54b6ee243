"""Knowing when a server has really finished: no call running, and nothing left in the kernel that a client has not taken.

A call is over for gRPC once its last bytes are the kernel's. Closing the connection then is not yet safe: where a client still reads slowly, bytes
wait in the socket's send buffer, and the first window update that arrives at a closed socket makes the kernel drop them and reset the connection.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import grpc

__all__ = ["ActiveCalls", "stop_listening", "wait_until_sent"]

_POLL = 0.02
#: gRPC hands the kernel more as soon as there is room: nothing must be unsent for this long.
_QUIET_SECONDS = 0.1


class ActiveCalls:
    """The calls that run, counted until gRPC says that they are over (which is later than when their function returns)."""

    def __init__(self) -> None:
        self._count = 0
        self._changed = threading.Condition()

    def add(self, context: grpc.ServicerContext) -> None:
        """Count a call."""
        with self._changed:
            self._count += 1
        if not context.add_callback(self._done):
            self._done()  # Over already: a client that was quick to leave.

    def _done(self) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def wait_until_none(self, timeout: float) -> bool:
        """Wait until no call runs; whether that came to be in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._count == 0, timeout)


def wait_until_sent(port: int, timeout: float) -> None:
    """Wait until every connection of this process's ``port`` has had its bytes acknowledged, or the time is up."""
    deadline = time.monotonic() + timeout
    quiet_since: float | None = None
    while time.monotonic() < deadline:
        now = time.monotonic()
        if _unsent(port):
            quiet_since = None
        elif quiet_since is None:
            quiet_since = now
        elif now - quiet_since >= _QUIET_SECONDS:
            return
        time.sleep(_POLL)


def stop_listening(port: int) -> None:
    """Take no more connections on this process's ``port``; those that there are stay. Where other processes listen on it too, they get all new ones.

    gRPC cannot do that without closing connections as well, so its listening socket is replaced under it by one that nobody can connect to. (Shutting
    the socket down would do, but gRPC takes that for a failure and says so.)
    """
    for descriptor, connection in _sockets(port):
        with suppress(OSError), socket.socket(socket.AF_UNIX) as nobodys:
            if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                nobodys.bind("")  # An abstract name that the kernel chooses.
                nobodys.listen()
                nobodys.setblocking(False)
                os.dup2(nobodys.fileno(), descriptor, inheritable=False)


def _unsent(port: int) -> int:
    """Bytes in the send buffers of the connections that were accepted on ``port``."""
    unsent = 0
    for _, connection in _sockets(port):
        with suppress(OSError):  # Not connected, or gone meanwhile.
            connection.getpeername()
            unsent += struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)))[0]
    return unsent


def _sockets(port: int) -> Iterator[tuple[int, socket.socket]]:
    """This process's TCP sockets bound to ``port``: the descriptor, which is gRPC's, and a copy that is closed again behind its turn."""
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            copy = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            continue  # Gone meanwhile.
        with copy:
            if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.getsockname()[1] == port:
                yield int(name), copy
