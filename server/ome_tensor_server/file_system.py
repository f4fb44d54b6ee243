"""What the file system says of a file, and what it is told to keep."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

__all__ = ["FileState", "file_identity", "file_state", "state_of", "sync_folder"]

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


def sync_folder(folder: Path) -> None:
    """Names of files in a folder, as they are now, outlive a loss of power. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
