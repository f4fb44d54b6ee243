"""Where the store is: as the user says, or wherever there is room."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from ome_tensor.errors import InvalidArgument

from .manifest import dataset_id, read_manifest
from .store import Store, is_store

__all__ = ["open_store"]

_SHARED_MEMORY = Path("/dev/shm")


def open_store(
    setting: str, locations: Sequence[str], size: Callable[[str], int], most: int, *, is_optional: bool = True
) -> Store | None:
    """The store that a setting means.

    Args:
        setting: A folder; ``auto``: shared memory where those sources that are in no store yet fit in half of what is free there, else the user's
            cache folder; ``none``. With ``auto`` each of the two is used for what it holds already, and where the other is full.
        locations: What is to be served.
        size: About the bytes that a source will take.
        most: No more will be there at a time.
        is_optional: Whether what finds no room with ``auto`` may be kept in this process's own memory.

    Raises:
        InvalidArgument: the folder cannot be used.
    """
    if setting == "none":
        return None
    if setting != "auto":
        return Store(Path(setting))
    places = [_SHARED_MEMORY / f"ome-tensor-{os.getuid()}"]
    # A user without a home has no cache folder.
    with suppress(RuntimeError):
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        places.append(Path(cache) / "ome-tensor" / "store")
    missing = [location for location in locations if not any(_is_held(os.path.realpath(location), place) for place in places)]
    if not _fits(min(most, sum(map(size, missing)))):
        places.reverse()
    problems = []
    for place in places:
        others = [other for other in places if other != place]
        try:
            return Store(place, others[0] if others else None, is_optional=is_optional)
        except InvalidArgument as error:
            problems.append(error)
    raise problems[0]


def _fits(needed: int) -> bool:
    try:
        free = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return False
    return needed < free.f_bavail * free.f_frsize // 2 and os.access(_SHARED_MEMORY, os.W_OK)


def _is_held(source: str, folder: Path) -> bool:
    manifest = read_manifest(folder / f"{dataset_id(source)}.json") if is_store(folder) else None
    return manifest is not None and manifest.source == source and manifest.is_current
