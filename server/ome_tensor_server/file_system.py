"""What the file system says of a file, and what it is told to keep."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

__all__ = ["FileState", "file_identity", "file_state", "replace_file", "state_of", "sync_folder"]

#: Size, time of the last change in nanoseconds, and number of a file.
FileState: TypeAlias = tuple[int, int, int]


def state_of(stat: os.stat_result) -> FileState:
    """What differs once a file was written to, or another one took its place."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def file_state(path: str | Path) -> FileState | None:
    """The state of the file at a path; ``None`` where there is none that may be looked at."""
    try:
        return state_of(os.stat(path))
    except OSError:
        return None


def file_identity(stat: os.stat_result) -> tuple[int, *FileState]:
    """The same, told from files of other file systems, too."""
    return stat.st_dev, *state_of(stat)


def replace_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Put a file there, whole or not at all. One that was there leaves it its mode, and its owner where that may be. Raises OSError."""
    descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if path.exists():
                # The server may be another user's, who was let in by group or owner.
                found = path.stat()
                os.fchmod(file.fileno(), found.st_mode & 0o777)
                with suppress(PermissionError):
                    os.fchown(file.fileno(), found.st_uid, found.st_gid)
            else:
                os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Names of files in a folder, as they are now, outlive a loss of power. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
