"""Processes that read foreign bytes: started when they are first needed, kept for the next job, bounded in memory and time, gone when this one is."""

from __future__ import annotations

import atexit
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from ome_tensor.errors import Cancelled, InvalidRecord, Unavailable
from ome_tensor_proto.status import error_of_reason

from .budget import human_bytes
from .readers.detect import location_name

__all__ = ["CrashedError", "Pool", "Process", "StuckError", "shared_pool"]

T = TypeVar("T", bound="Pool")

_log = logging.getLogger(__name__)

#: Seconds between two looks at whether a job has been cancelled.
_POLL = 0.05
_IDLE_POLL = 1.0

_TICKS = os.sysconf("SC_CLK_TCK")

#: Seconds that a process which has closed its end gets to end.
_DYING = 10.0

#: So many times its patience a source may take of a processor's time, once it is open, between two signs of progress: its digest is made without
#: one, and of a terabyte takes a quarter of an hour.
_SILENT = 60


class StuckError(Exception):
    """The process has been at a job for long and does nothing, or does not get anywhere; says which."""


class CrashedError(Exception):
    """The process ended in the middle of a job."""


class Process:
    """One loader."""

    def __init__(self, code: Sequence[str], memory_limit: int) -> None:
        self._socket, there = socket.socketpair()
        # Nothing is written to it: that its writing end is closed, by whatever becomes of this process, ends the other.
        lifeline, self._lifeline = os.pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, *code, str(there.fileno()), str(memory_limit), str(lifeline)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # What libraries have to say of damaged files is of use to nobody else.
                stderr=None if _log.isEnabledFor(logging.DEBUG) else subprocess.DEVNULL,
                pass_fds=(there.fileno(), lifeline),
                # Arrow's other allocators set memory aside that the limit would count. A terminal's Ctrl-C is for the server.
                env=os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system", "RUST_BACKTRACE": "0"},
                start_new_session=True,
            )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            there.close()
            os.close(lifeline)
        self._pending = b""
        self.number = self._process.pid
        self.jobs = 0
        self.last_location = ""

    def run(
        self,
        job: dict[str, Any],
        descriptor: int | None,
        progress: Callable[[int], None],
        cancelled: threading.Event | None,
        patience: float,
        opening: float,
    ) -> dict[str, Any]:
        """A job's answer; ``patience`` is how many seconds it may neither say nor compute anything, ``opening`` how many times as long it may compute
        before it says that the source is open, or answers.

        Raises CrashedError, StuckError, Cancelled, and what ``progress`` raises; then this process is of no more use.
        """
        self.jobs += 1
        line = json.dumps(job).encode() + b"\n"
        try:
            if descriptor is None:
                self._socket.sendall(line)
            else:
                sent = socket.send_fds(self._socket, [line], [descriptor])
                self._socket.sendall(line[sent:])
        except OSError:
            raise CrashedError from None
        # Metadata of any size are read in a moment; those that lead back to themselves are read for ever.
        most = self._ticks() + opening * patience * _TICKS
        while True:
            message = self._next(cancelled, patience, most)
            if "opened" in message:
                most = self._ticks() + _SILENT * patience * _TICKS
            elif "progress" not in message:
                return message
            else:
                most = self._ticks() + _SILENT * patience * _TICKS
                progress(message["progress"])

    def _next(self, cancelled: threading.Event | None, patience: float, most: float) -> dict[str, Any]:
        # A library that waits for a thread of its own that has failed waits for ever, and takes no processor time.
        worked, since = self._ticks(), time.monotonic()
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while b"\n" not in self._pending:
            if cancelled is not None and cancelled.is_set():
                raise Cancelled("the load was cancelled")
            if not poll.poll(_POLL * 1000 if cancelled is not None else _IDLE_POLL * 1000):
                if time.monotonic() - since > patience:
                    now = self._ticks()
                    # An event loop that nobody feeds takes a little, too: a hundredth of one processor's time is nothing.
                    if now - worked <= max(1.0, patience * _TICKS / 100):
                        raise StuckError(f"it did nothing for {patience:g} s")
                    if now > most:
                        raise StuckError("it worked for long and got nowhere")
                    worked, since = now, time.monotonic()
            else:
                try:
                    data = self._socket.recv(1 << 16)
                except OSError:
                    data = b""
                if not data:
                    raise CrashedError
                self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _ticks(self) -> int:
        """Processor time that it has had, in the system's ticks; 0 where it is gone."""
        try:
            fields = Path(f"/proc/{self.number}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0
        # https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html: utime and stime, the 14th and 15th of all.
        return int(fields[11]) + int(fields[12])

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def end(self) -> None:
        """End it, at once."""
        self._close()
        self._process.kill()
        self._process.wait()

    def _close(self) -> None:
        self._socket.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def forsake(self) -> None:
        """Forget it: it is another process's."""
        self._close()
        self._process.returncode = 0

    def last_words(self) -> str:
        """Of one that has ended by itself: why, for a person."""
        try:
            status = self._process.wait(_DYING)
        except subprocess.TimeoutExpired:
            status = 0
        self.end()
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"


class Pool:
    """Has jobs done by processes of their own. For any number of threads.

    Args:
        memory_limit: Bytes of memory that each process may have, mapped files not counted; 0: as many as it likes.
        patience: Seconds that one may neither say nor compute anything before it is ended: a source at an address may be slow to answer. Five times
            as much may the opening of a source compute.
    """

    #: What Python is to run: nothing that lies where the server was started, which may be a folder of foreign files.
    _code: Sequence[str] = ("-P", "-m", "ome_tensor_server.loader")

    #: So many times its patience a job may compute until its source is open, or it answers.
    _opening: ClassVar[float] = 5

    #: Idle processes kept for later jobs; one more ends when its job is done.
    _most_idle: ClassVar[int] = 2

    #: A job of one process is followed by so many more at most: what a library leaks goes with it.
    _most_jobs: ClassVar[int] = 1000

    def __init__(self, memory_limit: int = 0, patience: float = 60.0) -> None:
        self._limit = memory_limit
        self._patience = patience
        self._idle: list[Process] = []
        self._lock = threading.Lock()
        self._is_closed = False

    def _run(
        self,
        job: dict[str, Any],
        descriptor: int | None = None,
        progress: Callable[[int], None] = lambda _: None,
        cancelled: threading.Event | None = None,
    ) -> dict[str, Any]:
        """What comes of a job: ``job`` is its name, ``location`` the source, the rest is its own. Raises what it raised."""
        location = job["location"]
        while True:
            process = self._take(location)
            try:
                answer = process.run(job, descriptor, progress, cancelled, self._patience, self._opening)
                break
            except (CrashedError, StuckError) as error:
                if isinstance(error, StuckError):
                    process.end()
                    what, why = "hung", str(error)
                else:
                    what, why = "crashed", process.last_words()
                # What it read before may have been its death, or the system for its memory: then a new one gets through.
                if process.jobs == 1:
                    raise self._lost(location, what, why) from None
            except BaseException:
                # It may be in the middle of anything.
                process.end()
                raise
        process.last_location = location
        self._give_back(process)
        if "errno" in answer:
            raise OSError(answer["errno"], answer["strerror"], location)
        if "error" in answer:
            raise error_of_reason(*answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def _lost(self, location: str, what: str, why: str) -> InvalidRecord:
        if why == "SIGABRT" and self._limit:
            why += f"; it may need more memory than the {human_bytes(self._limit)} that a reader may have"
        elif why == "SIGKILL":
            why += "; the system may have run out of memory"
        name = location_name(location)
        _log.warning("the reader of %s %s: %s", location, what, why)
        return InvalidRecord(f"{name} cannot be read: its reader {what} ({why})", field="path", value=name)

    def _take(self, location: str) -> Process:
        """A process: rather one that has just read the same source."""
        with self._lock:
            if self._is_closed:
                raise Unavailable("the server is shutting down; try again, or elsewhere")
            while self._idle:
                process = next((one for one in reversed(self._idle) if one.last_location == location), self._idle[-1])
                self._idle.remove(process)
                if process.is_alive:
                    return process
                # The system may have killed it for its memory; that says nothing of what is read next.
                process.end()
        return Process(self._code, self._limit)

    def _give_back(self, process: Process) -> None:
        with self._lock:
            if not self._is_closed and len(self._idle) < self._most_idle and process.jobs < self._most_jobs:
                self._idle.append(process)
                return
        process.end()

    @property
    def processes(self) -> list[int]:
        """Those that are idle, by their numbers."""
        with self._lock:
            return [process.number for process in self._idle]

    def forsake(self) -> None:
        """Forget all processes, without ending them: in a process that was forked off they are not its own."""
        for process in self._idle:
            process.forsake()
        self._idle, self._lock = [], threading.Lock()

    def close(self) -> None:
        """End all idle processes; one with a job ends with it."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for process in idle:
            process.end()


_shared: dict[tuple[Any, ...], Pool] = {}
_sharing = threading.Lock()


def _after_fork() -> None:
    """In a process that was forked off: the processes are its parent's."""
    global _sharing
    _sharing = threading.Lock()
    for pool in _shared.values():
        pool.forsake()
    _shared.clear()


os.register_at_fork(after_in_child=_after_fork)


def shared_pool(kind: type[T], *arguments: Any) -> T:
    """This process's only pool of a kind that was made with such arguments."""
    with _sharing:
        pool = _shared.get((kind, *arguments))
        if pool is None:
            pool = _shared[kind, *arguments] = kind(*arguments)
            atexit.register(pool.close)
        assert isinstance(pool, kind)
        return pool
