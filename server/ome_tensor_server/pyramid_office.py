"""Making pyramid levels when they are asked for, within the room that a server has; the least recently used leave for others."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from ome_tensor.errors import LimitExceeded, OmeTensorError, ServerError, Unavailable
from ome_tensor.keys import format_key
from ome_tensor.pixels import Pixels
from ome_tensor.tables import ImageTable

from .budget import human_bytes
from .entries import Entry
from .levels import LevelFiles, level_bytes, level_name, open_level
from .loads import Load, as_problem, start_thread
from .logs import Fields
from .room import Room, Share

__all__ = ["PyramidOffice"]

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Made:
    """A level that is there: of which version of which dataset, its memory, and when it was asked for last (nanoseconds, monotonic)."""

    dataset: str
    version: str
    share: Share
    last_used: int

    def is_of(self, entry: Entry) -> bool:
        """Whether it is of that version of a dataset."""
        return (self.dataset, self.version) == (entry.location, entry.version)


class PyramidOffice:
    """The levels of a server's images.

    Args:
        files: Where they lie.
        room: What they may take, together with all else.
        lock: The room's.
        images: Gives a dataset's images while they are read.
        turn: Waits for one's turn to load; raises Cancelled.
        is_served: Whether a version of a dataset is still the one that is served.
    """

    def __init__(
        self,
        files: LevelFiles,
        room: Room,
        lock: threading.RLock,
        images: Callable[[Entry], ImageTable],
        turn: Callable[[Load], AbstractContextManager[None]],
        is_served: Callable[[Entry], bool],
    ) -> None:
        self._files = files
        self._room = room
        self._lock = lock
        self._images = images
        self._turn = turn
        self._is_served = is_served
        self._made: dict[str, _Made] = {}
        self._making: dict[str, tuple[Entry, Load]] = {}

    def make(self, entry: Entry, column: str, row: int, level: int, patience: float) -> str:
        """The path of a level's file: made now, once for all who ask, if it is not there.

        Args:
            entry: The dataset, ready to be read.
            column, row: The image.
            level: From 1.
            patience: Seconds to wait.

        Raises:
            InvalidArgument: there is no such image or level.
            Unavailable: it is still being made; field ``loading``, value the part that is.
            InvalidRecord, LimitExceeded, Overloaded: why it could not be made.
        """
        key = format_key(entry.name, column, row)
        name = level_name(entry.location, entry.version, key, level)
        with self._lock:
            path = self._find(name)
            if path is not None:
                return path
            _, load = self._making.get(name, (entry, None))
            if load is None:
                load = Load()
                # Where there is no thread, nothing is being made. It cannot be through before this is, which has the lock.
                start_thread(self._run, entry, column, row, level, name, load, name="ome-tensor-level")
                self._making[name] = entry, load
        if not load.done.wait(patience):
            raise Unavailable(
                f"level {level} of {key} is being made ({load.progress:.0%}); try again shortly",
                field="loading",
                value=f"{load.progress:.4f}",
            )
        if load.error is not None:
            raise load.error
        return load.path

    def _find(self, name: str) -> str | None:
        """The path of a level that is there, which is in use from now on."""
        made = self._made.get(name)
        path = None if made is None else self._files.find(name)
        if made is not None:
            made.last_used = time.monotonic_ns()
            if path is None:
                self._forget(name)
        return path

    def is_busy(self, entry: Entry) -> bool:
        """Whether a level is being made of a dataset: it is being read."""
        return any(one.slot == entry.slot for one, _ in self._making.values())

    def last_used(self, entry: Entry) -> int:
        """When a level of a dataset was last asked for, in nanoseconds of the monotonic clock; 0 for never."""
        return max((made.last_used for made in self._made.values() if made.is_of(entry)), default=0)

    def unused(self) -> list[tuple[int, Callable[[], bool]]]:
        """When each level was last asked for, and what takes it out of memory unless it is being read; gives whether it is gone."""
        return [(made.last_used, lambda name=name: self._drop(name)) for name, made in self._made.items()]  # type: ignore[misc]

    def _drop(self, name: str) -> bool:
        with self._lock:
            if not self._files.drop(name):
                return False
            self._forget(name)
        return True

    def _forget(self, name: str) -> None:
        made = self._made.pop(name, None)
        if made is not None:
            self._room.give_back(made.share)

    def forget(self, entry: Entry) -> None:
        """A version of a dataset is served no more, nor are its levels."""
        if not entry.version:
            return
        with self._lock:
            self._files.forget(entry.location, entry.version)
            for name, made in list(self._made.items()):
                if made.is_of(entry):
                    self._forget(name)

    def stop(self) -> None:
        """Give up what is being made."""
        with self._lock:
            for _, load in self._making.values():
                load.cancelled.set()

    def _run(self, entry: Entry, column: str, row: int, level: int, name: str, load: Load) -> None:
        try:
            with self._turn(load):
                load.path = self._make(entry, column, row, level, load)
        except (OmeTensorError, OSError) as error:
            load.error = as_problem(error, entry.location)
        except Exception as error:
            key = format_key(entry.name, column, row)
            _log.exception(Fields("unexpected", image=key))
            load.error = ServerError(
                f"unexpected {type(error).__name__} while level {level} of {key} was made; the server's log has the details"
            )
        with self._lock:
            del self._making[name]
        load.done.set()

    def _make(self, entry: Entry, column: str, row: int, last: int, load: Load) -> str:
        """All levels up to the last."""
        images = self._images(entry)
        image = images.image(column, row)
        meta, pixels, path = image.pixels.meta, image.pixels, ""
        whole = sum(level_bytes(meta, level) for level in range(1, last + 1))
        before = 0

        def progress(written: int) -> None:
            load.progress = min(0.99, (before + written) / max(whole, 1))
            load.check()

        for level in range(1, last + 1):
            name, size = level_name(entry.location, entry.version, image.key, level), level_bytes(meta, level)
            with self._lock:
                found = self._find(name)
            if found is None:
                share = Share(f"level {level} of {image.key}")
                try:
                    path = self._make_one(entry, name, size, share, pixels, progress, load)
                except BaseException:
                    self._room.give_back(share)
                    raise
            else:
                path = found
            try:
                pixels = open_level(path, name, meta, level)
            except (FileNotFoundError, BlockingIOError):
                raise Unavailable(
                    f"level {level} of {image.key} has left memory for others; try again", field="loading", value="0"
                ) from None
            before += size
        images.forget()
        return path

    def _make_one(
        self, entry: Entry, name: str, size: int, share: Share, below: Pixels, progress: Callable[[int], None], load: Load
    ) -> str:
        if size > self._room.budget:
            raise LimitExceeded(
                f"{share.what} takes {human_bytes(size)}, and this server keeps at most {human_bytes(self._room.budget)} in memory (memory_limit)",
                field="memory_limit",
                value=size,
            )
        self._room.make(share, size, load.cancelled)
        # Another server of the same store may have made it.
        path = self._files.find(name) or self._files.make(name, below, progress)
        with self._lock:
            if not self._is_served(entry):
                self._files.forget(entry.location, entry.version)
                raise Unavailable(f"dataset {entry.name!r} was replaced; try again", field="loading", value="0")
            if name in self._made:
                # Made for the sake of another level at the same time: it is there once.
                self._room.give_back(share)
            else:
                self._made[name] = _Made(entry.location, entry.version, share, time.monotonic_ns())
        return path
