"""What the file system says of a store's folder and files: whether they lie in memory, and for whom they are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

__all__ = ["is_memory", "min_mode"]


def is_memory(folder: Path) -> bool:
    """Whether a folder's files lie in memory, as far as Linux says."""
    device = os.stat(folder).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError), open("/proc/self/mountinfo") as mounts:
        for line in mounts:
            fields, _, rest = line.partition(" - ")
            if fields.split()[2] == wanted:
                return rest.split()[0] in ("tmpfs", "ramfs")
    return False


def min_mode(folder_mode: int, file: os.stat_result, sources: Sequence[os.stat_result]) -> int:
    """For whom a file is that was made of others: nobody who may not read all of these, or look into its folder, and nobody else writes to it.

    Args:
        folder_mode: Of the folder that it lies in.
        file: The file.
        sources: What it was made of.
    """
    mode = 0o600 | folder_mode & 0o044
    for source in sources:
        is_same_group = file.st_gid == source.st_gid
        group, others = bool(source.st_mode & 0o040), bool(source.st_mode & 0o004)
        # The source's group, where that is shut out, is among the others here; its others are this file's group.
        others = others and (group or is_same_group)
        mode &= 0o600 | 0o040 * (group if is_same_group else others) | 0o004 * others
    return mode
