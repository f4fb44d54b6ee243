"""Uploads: datasets that clients have sent, kept for good in a folder of this server's.

Each is one file, the Arrow IPC stream as it was sent, named after its dataset. It is received under a name of its own, checked by a loader (the
server itself reads nothing of it), and given its name by renaming once it is whole and on disk: whenever the machine or the server stops, an upload
is there whole or not at all, and one that replaces another is either the old one or the new: the old one is kept beside it until the new one is
served.
"""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import re
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, unquote

from ome_tensor.errors import Cancelled, InvalidArgument, LimitExceeded
from ome_tensor_proto.v1 import admin_service_pb2 as pb

from .budget import human_bytes
from .file_system import sync_folder
from .finding import SourceFile

__all__ = ["Uploads"]

_log = logging.getLogger(__name__)

_MARKER = ".ome-tensor-uploads"
_MARKER_TEXT = (
    "ome-tensor serve keeps datasets here that were uploaded to it. They are not made from anything else: do not delete them.\n"
)

_SUFFIX = ".arrows"
_PART = re.compile(r"\d+-\d+\.part")

#: Of an upload that is being replaced.
_BEFORE = ".before"

#: What does not make a folder somebody else's: the last is in every new ext4 file system.
_HARMLESS = frozenset({_MARKER, "lost+found"})

#: A file's name has 255 bytes at most, and a name may need three for one.
_LONGEST_NAME = 240

#: Written at a time before it is put on disk, so that the end of a large upload does not wait for all of it.
_SYNC_BYTES = 64 << 20


class Uploads:
    """A folder of uploads.

    Args:
        folder: Where: a folder of uploads, an empty one, or one to be made.
        max_bytes: Largest upload.

    Raises:
        InvalidArgument: it cannot be made or written, or holds other files.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder.absolute()
        self._max_bytes = max_bytes
        self._numbers = itertools.count()
        self._release: Callable[[], object] = lambda: None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            marker = self.folder / _MARKER
            if not marker.is_file():
                others = sorted(set(os.listdir(self.folder)) - _HARMLESS)
                if others:
                    raise _unusable(folder, f"holds other files ({', '.join(others[:3])}): name a new or an empty folder")
                marker.write_text(_MARKER_TEXT)
        except OSError as error:
            raise _unusable(folder, f"cannot be used: {error.strerror}") from None

    @classmethod
    def at(cls, folder: str, max_bytes: int) -> Uploads | None:
        """The uploads of a setting; ``None`` where it is empty. Raises InvalidArgument."""
        return cls(Path(folder), max_bytes) if folder else None

    def claim(self) -> None:
        """Put the folder in order, as the one server that takes uploads into it. Where another server does so, nothing is done.

        What was being received when a server stopped is removed, and where an upload was being replaced the one before is back: nobody was told that
        it is not.
        """
        marker = (self.folder / _MARKER).open("rb")
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            marker.close()
            _log.warning(
                "another server takes uploads into %s; those of one are not seen by the other until it starts again", self.folder
            )
            return
        self.release()
        self._release = weakref.finalize(self, marker.close)
        for name in os.listdir(self.folder):
            if _PART.fullmatch(name):
                (self.folder / name).unlink(missing_ok=True)
            elif name.endswith(_SUFFIX + _BEFORE):
                self._restore(self.folder / name.removesuffix(_BEFORE))

    def release(self) -> None:
        """Leave the folder to another server."""
        self._release()

    def found(self) -> list[tuple[str, Path]]:
        """Name and file of all uploads, by name."""
        paths = [self.folder / name for name in os.listdir(self.folder) if name.endswith(_SUFFIX)]
        return sorted((unquote(path.name[: -len(_SUFFIX)]), path) for path in paths)

    def source(self, name: str, path: Path) -> SourceFile:
        """An upload as a source to serve."""
        return SourceFile(name, str(path), named=True)

    def receive(self, header: pb.UploadHeader, payloads: Iterator[bytes], *, is_active: Callable[[], bool]) -> Path:
        """Write an upload to a file of its own, on disk when this returns; nobody sees it yet.

        Args:
            header: What it will be.
            payloads: Its bytes.
            is_active: Whether the client is still there.

        Raises:
            InvalidArgument: a name that no file can have, or another number of bytes than the header says.
            LimitExceeded: it is too large.
            Cancelled: the client has gone.
            OSError: it cannot be written.
        """
        self._path(header.name)
        if header.total_bytes > self._max_bytes:
            raise self._too_large(header.total_bytes)
        # In containers that share a folder processes have equal numbers.
        part = self.folder / f"{os.getpid()}{time.time_ns()}-{next(self._numbers)}.part"
        received = unsynced = 0
        try:
            with open(part, "xb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                for payload in payloads:
                    received += len(payload)
                    unsynced += len(payload)
                    if received > self._max_bytes:
                        raise self._too_large(received)
                    file.write(payload)
                    if unsynced > _SYNC_BYTES:
                        file.flush()
                        os.fdatasync(file.fileno())
                        unsynced = 0
                # A client that dies ends its stream as one that is through does.
                if not is_active():
                    raise Cancelled("the client has gone", field="header.name", value=header.name)
                if header.total_bytes and received != header.total_bytes:
                    raise InvalidArgument(
                        f"{received} bytes arrived of an upload of {header.total_bytes}",
                        field="header.total_bytes",
                        value=received,
                    )
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return part

    def _too_large(self, size: int) -> LimitExceeded:
        return LimitExceeded(
            f"the upload has {'at least ' if size <= self._max_bytes else ''}{human_bytes(size)}; this server takes at most "
            f"{human_bytes(self._max_bytes)} (max_upload_bytes)",
            field="header.total_bytes",
            value=size,
        )

    @contextmanager
    def committed(self, part: Path, name: str) -> Iterator[Path]:
        """With a received file under its dataset's name: there after a restart once the block is through; where it fails, all is as it was.

        Raises:
            OSError: it cannot be renamed.
        """
        path = self._path(name)
        before = _before(path)
        if path.exists():
            try:
                os.link(path, before)
            except OSError:
                # A file system without links.
                path.replace(before)
        part.replace(path)
        sync_folder(self.folder)
        try:
            yield path
        except BaseException:
            if before.exists():
                self._restore(path)
            else:
                path.unlink(missing_ok=True)
            sync_folder(self.folder)
            raise
        before.unlink(missing_ok=True)
        sync_folder(self.folder)

    def _restore(self, path: Path) -> None:
        """An upload is again what it was."""
        before = _before(path)
        before.replace(path)
        # Renaming one name of a file over another does nothing.
        before.unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        """Whether there is an upload of that name, served or not. Raises InvalidArgument for a name that no file can have."""
        return self._path(name).exists()

    def remove(self, name: str) -> None:
        """Delete an upload. Raises OSError."""
        self._path(name).unlink(missing_ok=True)
        sync_folder(self.folder)

    def _path(self, name: str) -> Path:
        """The file of a dataset; InvalidArgument where no file can be named so."""
        # Every character that means something to a file system is written otherwise: a name cannot lead anywhere else.
        encoded = quote(name, safe=" ()+,=@")
        encoded = encoded.replace(".", "%2E") if not encoded.strip(".") else encoded
        if not name or len(encoded) > _LONGEST_NAME:
            raise InvalidArgument(
                f"the name of an upload must have 1 to {_LONGEST_NAME} characters (others than letters, digits and -_. count as three and more), not "
                f"{len(encoded)}",
                field="header.name",
                value=name,
            )
        return self.folder / f"{encoded}{_SUFFIX}"


def _before(path: Path) -> Path:
    return path.with_name(path.name + _BEFORE)


def _unusable(folder: Path, why: str) -> InvalidArgument:
    return InvalidArgument(f"uploads {folder} {why}", field="uploads", value=str(folder))
