"""Sources that are a folder: what tells one state of it from another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from ome_tensor.errors import InvalidRecord
from ome_tensor_server.file_system import FileState, state_of

from .base import OpenedSource

__all__ = [
    "FolderSource",
    "folder_digest",
    "folder_fingerprint",
    "folder_states",
    "folder_stats",
    "states_fingerprint",
]


def _files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """All files below a folder, by path from there, sorted. Raises InvalidRecord where a link leads out of it."""
    real = os.path.realpath(folder)
    found = []
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(here, name)
            if os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(real):
                raise InvalidRecord(
                    f"{folder.name} has a link that leads out of it: {os.path.relpath(path, folder)}",
                    field="path",
                    value=folder.name,
                )
        for name in files:
            path = os.path.join(here, name)
            found.append((os.path.relpath(path, folder), os.stat(path)))
    yield from sorted(found, key=lambda entry: entry[0])


def folder_stats(folder: Path) -> Iterator[os.stat_result]:
    """What the file system says of each file below a folder. Raises InvalidRecord where a link leads out of it."""
    return (stat for _, stat in _files(folder))


def folder_states(folder: Path) -> dict[str, FileState]:
    """What the file system says of each file below a folder, by path from there, sorted. Raises InvalidRecord where a link leads out of it."""
    return {name: state_of(stat) for name, stat in _files(folder)}


def folder_fingerprint(folder: Path) -> str:
    """What differs once anything in a folder was changed: of paths, sizes and times, without reading a file."""
    return states_fingerprint(folder_states(folder))


def states_fingerprint(states: Mapping[str, FileState]) -> str:
    """See :func:`folder_fingerprint`: of what :func:`folder_states` says."""
    digest = hashlib.sha256()
    for name, (size, modified, _) in states.items():
        digest.update(f"{name}\0{size}\0{modified}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def folder_digest(folder: Path) -> str:
    """16 hexadecimal digits of a digest of all files of a folder, paths included."""
    state = hashlib.sha256()
    for name, stat in _files(folder):
        state.update(f"{name}\0{stat.st_size}\0".encode(errors="surrogateescape"))
        with open(folder / name, "rb") as file:
            state.update(hashlib.file_digest(file, "sha256").digest())
    return state.hexdigest()[:16]


class FolderSource(OpenedSource):
    """A folder, opened.

    Args:
        location: Its path.

    Attributes:
        path: Its path.

    Raises:
        InvalidRecord: it has links that lead out of it.
        OSError: it cannot be read.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self.path = Path(location)
        self._fingerprint = folder_fingerprint(self.path)

    def version(self) -> str:
        """See :meth:`OpenedSource.version`: of all files."""
        return folder_digest(self.path)

    def fingerprint(self) -> str:
        """See :meth:`OpenedSource.fingerprint`."""
        return self._fingerprint

    def is_unchanged(self) -> bool:
        """See :meth:`OpenedSource.is_unchanged`."""
        try:
            return folder_fingerprint(self.path) == self._fingerprint
        except (OSError, InvalidRecord):
            return False

    def unreadable(self, why: str) -> InvalidRecord:
        """The error of a folder that is not what it seems to be."""
        return InvalidRecord(f"{self.path.name} cannot be read: {why}", field="path", value=self.path.name)

    def close(self) -> None:
        """See :meth:`OpenedSource.close`."""
