"""Pixels without a wire: datasets of a server on this host, mapped from its store and read by the same engine in this process.

What makes it safe:

* Client and server show each other that they run under one kernel; the server's policy decides, and then names a file.
* The file's permissions decide whether this user may open it, and it is trusted only where its inode, size and time of modification are those that
  the server told: another machine's or container's file system may have another file of that name.
* It is opened read-only and mapped copy-on-write: nothing that this process does reaches the server, and a write to such memory does not kill it.
* A dataset's file is never changed. A view keeps the mapping it began with, whatever happens to the dataset. Before each *new* view the file is
  looked at (two system calls, no message), and every two seconds the server is asked whether it still is the dataset's, and may be mapped: once
  that is not so any more, the next view is of what the server has by then. While the server cannot be reached what is mapped is good.
"""

from __future__ import annotations

import os
import secrets
import stat
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ome_tensor.arrow_file import map_arrow_file
from ome_tensor.errors import DeadlineExceeded, InvalidRecord, NotSupported, Unavailable
from ome_tensor.tables import ImageTable, MappedFile
from ome_tensor_proto.host import NONCE_BYTES, host_proof, is_host_proof
from ome_tensor_proto.v1 import tensor_service_pb2 as pb

from .options import Options

__all__ = ["MappedDatasets", "Transport"]

#: How long a mapping is believed to be the dataset's before the server is asked whether it still is.
_CONFIRM_SECONDS = 2.0

#: How long it is believed while the server cannot be asked: trying takes a second where the server hangs.
_UNREACHABLE_SECONDS = 5.0

#: How long a refusal holds before the server is asked again: what stands in the way may change, but not for every view.
_REFUSED_SECONDS = 60.0

_REASONS = {
    pb.MAP_REFUSAL_OTHER_HOST: "the server is on another host",
    pb.MAP_REFUSAL_NOT_ALLOWED: "the server does not allow it",
    pb.MAP_REFUSAL_NO_FILE: "the server has no file of it: it holds the dataset in its own memory, or is just replacing it",
}


@dataclass(frozen=True, slots=True)
class Transport:
    """How the pixels of one dataset come.

    Attributes:
        kind: ``mapped`` or ``tcp``.
        reason: Why they are not mapped; empty where they are.
    """

    kind: str
    reason: str = ""


class _Mapped:
    """A dataset's file as it was when it was mapped.

    Args:
        name: The dataset.
        answer: What the server says of it.
        path: Where it is for this process.

    Raises:
        OSError, InvalidRecord: it cannot be opened here, or is another file.
    """

    def __init__(self, name: str, answer: pb.MapDatasetResponse, path: Path) -> None:
        # Whatever is at that path here: opening it must neither wait (a FIFO) nor do anything (a device).
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        weakref.finalize(self, os.close, self._descriptor)
        self._file = MappedFile(path, answer.inode, answer.size, answer.modified_ns)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode) or not self.is_current:
            raise InvalidRecord(f"{path} is another file here than at the server", field="path", value=str(path))
        self._says = _what(answer)
        self.until = 0.0
        self.table = ImageTable(name, map_arrow_file(path, answer.dataset_version, self._descriptor))

    @property
    def is_current(self) -> bool:
        """Whether the file is unchanged, and still what its path names."""
        return self._file.is_opened(self._descriptor) and self._file.is_there

    def is_said_by(self, answer: pb.MapDatasetResponse) -> bool:
        """Whether the server's answer is what this was mapped by."""
        return self._says == _what(answer)


def _what(answer: pb.MapDatasetResponse) -> tuple[object, ...]:
    return answer.refusal, answer.dataset_version, answer.path, answer.inode, answer.size, answer.modified_ns


@dataclass(slots=True)
class _Refused:
    reason: str
    until: float = float("inf")


class _Dataset:
    """What is known of one dataset; a lock of its own, so that a server that hangs over one does not hold up the others."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.found: _Mapped | _Refused | None = None


class MappedDatasets:
    """What one client has mapped, by dataset; each is negotiated when first used.

    Args:
        target: The server, for messages.
        options: How the client talks.
        ask: Sends a MapDataset request; its second argument says whether to be patient: to wait for a server that cannot be reached right now.
        clock: Seconds.
    """

    def __init__(
        self,
        target: str,
        options: Options,
        ask: Callable[[pb.MapDatasetRequest, bool], pb.MapDatasetResponse],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._target, self._options, self._ask, self._clock = target, options, ask, clock
        self.begin_anew()

    def begin_anew(self) -> None:
        """In a forked child: locks, those within a mapped table too, may have been another thread's. Views keep what they have mapped."""
        self._datasets: dict[str, _Dataset] = {}
        self._lock = threading.Lock()

    @property
    def transports(self) -> dict[str, Transport]:
        """How the pixels of each dataset used so far come."""
        with self._lock:
            datasets = dict(self._datasets)
        return {
            name: Transport("tcp", found.reason) if isinstance(found, _Refused) else Transport("mapped")
            for name, dataset in datasets.items()
            if (found := dataset.found) is not None
        }

    def table(self, dataset: str) -> ImageTable | None:
        """The dataset's images, mapped; ``None`` where its pixels are to come over the wire.

        Raises:
            NotSupported: ``transport="mapped"`` was asked for and cannot be had.
            DatasetNotFound, Unavailable, ...: as any call.
        """
        with self._lock:
            known = self._datasets.setdefault(dataset, _Dataset())
        with known.lock:
            found = known.found
            if found is None or self._clock() >= found.until or (isinstance(found, _Mapped) and not found.is_current):
                found = known.found = self._negotiate(dataset, found)
        if isinstance(found, _Mapped):
            return found.table
        if self._options.transport == "mapped":
            raise NotSupported(
                f"dataset {dataset!r} of {self._target} cannot be mapped: {found.reason} (transport='auto' has its pixels sent)",
                field="transport",
                value="mapped",
            )
        return None

    def _negotiate(self, dataset: str, before: _Mapped | _Refused | None) -> _Mapped | _Refused:
        if self._options.transport == "tcp":
            return _Refused("transport='tcp' was asked for")
        nonce = secrets.token_bytes(NONCE_BYTES)
        proof = host_proof("client", nonce)
        if not proof:
            return _Refused("this system cannot tell whether the server is on the same host")
        mapped = before if isinstance(before, _Mapped) and before.is_current else None
        until = self._clock() + _REFUSED_SECONDS
        try:
            answer = self._ask(pb.MapDatasetRequest(dataset=dataset, nonce=nonce, host_proof=proof), mapped is None)
        except NotSupported:
            return _Refused("the server is too old for it", until)
        except (Unavailable, DeadlineExceeded):
            if mapped is None:
                raise
            mapped.until = self._clock() + _UNREACHABLE_SECONDS
            return mapped
        if answer.refusal:
            return _Refused(_REASONS.get(answer.refusal, f"the server refuses (reason {answer.refusal})"), until)
        if not is_host_proof("server", nonce, answer.host_proof):
            return _Refused("the server has not shown that it is on this host", until)
        if mapped is None or not mapped.is_said_by(answer):
            store = self._options.store
            path = Path(store, Path(answer.path).name) if store else Path(answer.path)
            try:
                mapped = _Mapped(dataset, answer, path.absolute())
            except OSError as error:
                return _Refused(f"{path} cannot be opened: {error.strerror or error}", until)
            except InvalidRecord as error:
                return _Refused(error.message, until)
        mapped.until = self._clock() + _CONFIRM_SECONDS
        return mapped
