"""Work in progress on a dataset, and what becomes of it when it fails."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ome_tensor.errors import (
    Cancelled,
    InvalidArgument,
    InvalidRecord,
    LimitExceeded,
    MissingDependency,
    OmeTensorError,
    Overloaded,
    Unavailable,
)

from .readers.detect import location_name

__all__ = ["Load", "as_problem", "is_lasting", "kept_problems", "start_thread"]

#: Faults of the source or of its size, which another try would only find again.
_LASTING = (InvalidRecord, InvalidArgument, LimitExceeded, MissingDependency)

#: What the system says of a path, and not of its own state.
_OF_PATH = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
)

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


class Load:
    """One load in progress, and who waits for it.

    Attributes:
        done: Set when it is through.
        cancelled: Set to give it up.
        error: Why it failed.
        progress: How far it is, from 0 to 1.
        path: Of the file that it made, where it makes one.
    """

    def __init__(self) -> None:
        self.done = threading.Event()
        self.cancelled = threading.Event()
        self.error: OmeTensorError | None = None
        self.progress = 0.0
        self.path = ""

    def check(self) -> None:
        """Raise Cancelled where it was given up."""
        if self.cancelled.is_set():
            raise Cancelled("the load was cancelled")


def start_thread(do: Callable[..., None], *arguments: Any, name: str) -> None:
    """Have something done by a thread of its own. Raises Unavailable where the system has none left."""
    try:
        threading.Thread(target=do, args=arguments, name=name, daemon=True).start()
    except RuntimeError:
        raise Unavailable("this server has no thread left to do it; try again shortly", field="threads") from None


def is_lasting(error: Exception) -> bool:
    """Whether another try would only find the same fault: not what the system refuses, which may have changed by then."""
    return isinstance(error, _LASTING)


@contextmanager
def kept_problems(name: str) -> Iterator[None]:
    """What the system says inside about the folder of uploads, as those hear of it who sent the upload of that name."""
    try:
        yield
    except OSError as error:
        if isinstance(error, OmeTensorError):  # Some are both.
            raise
        why = error.strerror or str(error)
        if error.errno in _NO_ROOM:
            raise Overloaded(
                f"the upload {name!r} cannot be kept: {why}; the server's disk is full", field="uploads", value=name
            ) from None
        raise Unavailable(f"the upload {name!r} cannot be kept now: {why}", field="uploads", value=name) from None


def as_problem(error: OmeTensorError | OSError, location: str) -> OmeTensorError:
    """An error as those hear of it who asked for the source.

    Args:
        error: What was raised.
        location: The source.
    """
    if isinstance(error, OmeTensorError):
        return error
    name, why = location_name(location), error.strerror or str(error)
    if error.errno in _NO_ROOM:
        return Overloaded(f"{name} cannot be loaded: {why}; the server's disk is full", field="path", value=name)
    if error.errno is None or error.errno in _OF_PATH:
        return InvalidArgument(f"{name} cannot be loaded: {why}", field="path", value=name)
    # Too many open files, a disk that failed to answer: of the system's state, not of the source.
    return Unavailable(f"{name} cannot be loaded now: {why}; try again", field="path", value=name)
