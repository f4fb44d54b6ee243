"""Who uses which file of a folder that several servers share, and who writes which dataset."""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ome_tensor.errors import Cancelled

__all__ = ["Leases", "Locks"]

# Linux's struct flock: type, whence, start, length, process (unused).
_FLOCK = "hhqqi0q"

#: Seconds between two looks at whether a lock is to be had.
_POLL = 0.05


class Leases:
    """Leases on names: a file whose name is leased is not to be taken away.

    Every name has a byte of one lock file. Who uses the name holds a read lock on that byte, so whoever gets a write lock on it knows that nobody
    does. The locks are those of open file descriptions: they end with their process, however it ends, need no room on a full disk, and hold
    between two holders in one process too.

    Args:
        path: The lock file; made if it is not there.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        weakref.finalize(self, os.close, self._file)
        self._held: set[str] = set()

    def take(self, name: str) -> None:
        """Lease a name, for as long as this object lives or until it is released. Afterwards look whether the file is there."""
        self._lock(fcntl.F_RDLCK, name, wait=True)
        self._held.add(name)

    def release(self, name: str) -> None:
        """Give a lease back, if there is one."""
        if name in self._held:
            self._held.remove(name)
            self._lock(fcntl.F_UNLCK, name)

    @contextmanager
    def unused(self, name: str) -> Iterator[bool]:
        """Whether nobody, this holder included, has leased a name; then nobody gets to until the end of the block."""
        # A holder's own read lock would not stand in the way of its write lock.
        if name in self._held or not self._lock(fcntl.F_WRLCK, name):
            yield False
            return
        try:
            yield True
        finally:
            self._lock(fcntl.F_UNLCK, name)

    def _lock(self, kind: int, name: str, *, wait: bool = False) -> bool:
        # 62 bits: beyond the end of a file a lock may lie, beyond what its length may be not.
        start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 2
        lock = struct.pack(_FLOCK, kind, os.SEEK_SET, start, 1, 0)
        try:
            fcntl.fcntl(self._file, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, lock)
        except BlockingIOError:
            return False
        return True


class Locks:
    """Rights to write the datasets of a folder: each that of one process at a time, and of one thread. Like leases they end with their process.

    Args:
        path: The lock file; made if it is not there.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.touch(mode=0o600)

    @contextmanager
    def held(self, dataset: str, cancelled: threading.Event | None = None) -> Iterator[None]:
        """With the right to write a dataset, as soon as that is to be had.

        Args:
            dataset: Its number, in hexadecimal digits.
            cancelled: Set to wait no longer.

        Raises:
            Cancelled: that was set.
        """
        # Opened anew each time: the lock is that opening's, so that it holds against other threads too.
        with self._path.open("r+b") as file:
            while not _lock(file.fileno(), dataset):
                if cancelled is None:
                    _lock(file.fileno(), dataset, wait=True)
                    break
                if cancelled.wait(_POLL):
                    raise Cancelled("the load was cancelled")
            yield

    @contextmanager
    def attempted(self, dataset: str = "") -> Iterator[bool]:
        """With the right to write a dataset, or all where none is named, if it is to be had at once; whether it was."""
        with self._path.open("r+b") as file:
            yield _lock(file.fileno(), dataset)


def _lock(file: int, dataset: str, *, wait: bool = False) -> bool:
    # One byte of the file for each dataset, which need not be there; or all of them.
    start, length = (int(dataset, 16) >> 2, 1) if dataset else (0, 0)
    lock = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, lock)
    except BlockingIOError:
        return False
    return True
