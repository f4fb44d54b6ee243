"""A loader's process: reads foreign sources, so that one that is damaged, or made to do harm, ends this process at worst and not the server.

Started by :mod:`.loading` as ``python -m ome_tensor_server.loader DESCRIPTOR LIMIT``: a connected socket, on which jobs come as lines of JSON and
answers go, and the bytes of memory that this process may have. It ends when its server closes the other end, or is gone.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any, TypeAlias

from ome_tensor.errors import InvalidRecord, LimitExceeded, OmeTensorError
from ome_tensor.tables import digest

from .budget import human_bytes
from .in_place_jobs import InPlaceJobs
from .readers.base import OpenedSource
from .readers.detect import is_address, location_name, open_source
from .readers.files import changing
from .uploads_check import check_upload

__all__ = ["main", "steadily"]

#: Errors of the system that come of what a source says: an offset beyond all files, for example.
_OF_BYTES = frozenset({errno.EINVAL, errno.EOVERFLOW, errno.ERANGE})

#: Seconds between two words on how far a job is.
_WORD = 0.1


def steadily(
    location: str, read: Callable[[OpenedSource], dict[str, Any]], opened: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """What ``read`` makes of a source; tried once more where the source was changed meanwhile. ``opened`` is called when the source is open."""
    problem: InvalidRecord | None = None
    for _ in range(2):
        with open_source(location) as source:
            opened()
            try:
                made = read(source)
                if source.is_unchanged():
                    return made
            except (InvalidRecord, OSError):
                # Of a source that is half one and half another anything may be said.
                if source.is_unchanged():
                    raise
            problem = changing(source.location)
    assert problem is not None
    raise problem


def _describe(job: dict[str, str], _: int, talk: _Talk) -> dict[str, Any]:
    return steadily(job["location"], lambda source: {"info": asdict(source.info())}, talk.opened)


def _load(job: dict[str, str], descriptor: int, talk: _Talk) -> dict[str, Any]:
    def read(source: OpenedSource) -> dict[str, Any]:
        version = source.version()
        is_known = version == job["known"]
        if is_known:
            pass
        elif source.is_mapped:
            source.validate()
        else:
            with open(descriptor, "wb", closefd=False) as file:
                file.seek(0)
                file.truncate()
                source.write(file, talk.progress)
            if is_address(job["location"]):
                # Its metadata may be the same with other pixels.
                with open(descriptor, "rb", closefd=False) as file:
                    version = digest(file)
        return {
            "version": version,
            "fingerprint": source.fingerprint(),
            "info": asdict(source.info()),
            "is_mapped": source.is_mapped,
            "is_known": is_known,
        }

    return steadily(job["location"], read, talk.opened)


def _check(job: dict[str, str], _: int, talk: _Talk) -> dict[str, Any]:
    talk.opened()  # How long it takes is a matter of the upload's size, which has its limit.
    return {"nbytes": check_upload(job["location"])}


_Job: TypeAlias = Callable[[dict[str, Any], int, "_Talk"], dict[str, Any]]

_JOBS: dict[str, _Job] = {
    "describe": _describe,
    "load": _load,
    "check": _check,
}


class _Talk:
    """The socket to the server."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._said = 0.0

    def say(self, message: dict[str, Any]) -> None:
        """Send a line."""
        # What an error is about may be a number of NumPy's.
        self._socket.sendall(json.dumps(message, default=str).encode() + b"\n")

    def progress(self, written: int) -> None:
        """Say how far the job is, now and then."""
        now = time.monotonic()
        if now - self._said > _WORD:
            self._said = now
            self.say({"progress": written})

    def opened(self) -> None:
        """Say that the source is open: what comes now may take as long as it is large."""
        self.say({"opened": True})

    def jobs(self) -> Any:
        """The jobs, each with the descriptor that came with it, or -1."""
        pending, descriptor = b"", -1
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._socket, 1 << 16, 1)
            if not data:
                return
            pending += data
            descriptor = descriptors[0] if descriptors else descriptor
            if pending.endswith(b"\n"):
                yield json.loads(pending), descriptor
                pending, descriptor = b"", -1


def _naming(location: str, error: OmeTensorError) -> OmeTensorError:
    """An error that says which source it is about."""
    name = location_name(location)
    if name in error.message:
        return error
    return type(error)(f"{name}: {error.message}", field=error.field, value=error.value)


def _answer(job: dict[str, Any], do: _Job, descriptor: int, talk: _Talk, limit: int) -> dict[str, Any]:
    try:
        return {"result": do(job, descriptor, talk)}
    except OmeTensorError as error:
        problem = error if job["job"] == "check" else _naming(job["location"], error)
    except MemoryError:
        name = location_name(job["location"])
        problem = LimitExceeded(
            f"{name} needs more memory to be read than the {human_bytes(limit)} that a reader may have", field="path", value=name
        )
    except OSError as error:
        if error.errno is not None and error.errno not in _OF_BYTES:
            return {"errno": error.errno, "strerror": error.strerror}
        problem = _unreadable(job["location"], error)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # A library in Rust that panics raises what is no Exception.
        problem = _unreadable(job["location"], error)
    return {"error": [problem.reason.value, problem.message, problem.field, problem.value]}


def _untalkative(do: Callable[[dict[str, Any], int], dict[str, Any]]) -> _Job:
    return lambda job, descriptor, _: do(job, descriptor)


def _unreadable(location: str, error: BaseException) -> InvalidRecord:
    """Whatever a library says of bytes that it did not expect."""
    name = location_name(location)
    why = next(iter(str(error).strip().splitlines()), "")
    return InvalidRecord(
        f"{name} cannot be read: {why or type(error).__name__} ({type(error).__name__})", field="path", value=name
    )


def _end_with(lifeline: int) -> None:
    """Have the kernel end this process as soon as the server is gone, whatever it is doing.

    No thread could: CPython 3.11 loops for ever, and lets no other thread run, where it finds no memory for the number of the instruction that raised
    MemoryError.

    Args:
        lifeline: The reading end of a pipe that nobody writes to: it tells of nothing but of its other end's being closed.
    """
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGIO})
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    # It may have gone before it could be told of. Not by select(), which fails on descriptors from 1024 on: they have the server's numbers.
    looked = select.poll()
    looked.register(lifeline, select.POLLIN)
    if looked.poll(0):
        os._exit(1)


def main(arguments: list[str]) -> None:
    """Do jobs until the server goes."""
    connection = socket.socket(fileno=int(arguments[0]))
    _end_with(int(arguments[2]))
    limit = int(arguments[1])
    if limit:
        # Memory of this process's own; files that it has mapped do not count.
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.CRITICAL)
    talk = _Talk(connection)
    in_place = InPlaceJobs()
    jobs = _JOBS | {name: _untalkative(do) for name, do in in_place.jobs.items()}
    for job, descriptor in talk.jobs():
        try:
            talk.say(_answer(job, jobs[job["job"]], descriptor, talk, limit))
        finally:
            if descriptor >= 0:
                os.close(descriptor)


if __name__ == "__main__":
    # The server may go at any moment.
    with suppress(BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        main(sys.argv[1:])
