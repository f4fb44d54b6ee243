"""Getting a dataset ready to be read: from the store, by a loader, or in place where it is larger than the budget."""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import replace

from ome_tensor.errors import LimitExceeded, Unavailable
from ome_tensor.listing import DatasetState
from ome_tensor.tables import ImageTable, LoadedTable

from .budget import human_bytes
from .entries import Entry
from .finding import check_below
from .in_place import Readers, open_in_place
from .loading import Loader, load_in_memory
from .loads import Load
from .logs import Fields
from .manifest import Manifest
from .readers.base import SourceInfo
from .readers.detect import is_address
from .room import Room, Share
from .store import Store, is_full
from .usage import Usage

__all__ = ["Fetcher", "info_of", "not_loaded", "with_info"]

_log = logging.getLogger(__name__)

#: Seconds between two lines of the log on how far a load is.
_WORD = 5.0


class _TooLargeError(Exception):
    """A source turns out not to fit into the budget while it is being read."""


class Fetcher:
    """Reads sources, or has them read.

    Args:
        loader: Reads them.
        readers: Read them where they lie.
        store: Where loaded datasets lie; ``None``: in this process's own memory.
        room: What they may take.
        usage: Where it is written down how far a load is.
    """

    def __init__(self, loader: Loader, readers: Readers, store: Store | None, room: Room, usage: Usage) -> None:
        self._loader = loader
        self._readers = readers
        self._store = store
        self._room = room
        self._usage = usage

    def describe(self, location: str, root: str) -> SourceInfo:
        """What a source holds.

        Args:
            location: The source.
            root: See :func:`check_below`.

        Raises:
            InvalidRecord, MissingDependency, OSError: it cannot be read.
            InvalidArgument: it leads out of its root.
        """
        check_below(location, root)
        info = self._loader.describe(location)
        # It may have been made a link meanwhile: then nothing is to be known of what that leads to.
        check_below(location, root)
        return info

    def fetch(self, entry: Entry, load: Load, share: Share, *, anew: bool = False) -> tuple[Entry, LoadedTable | None]:
        """A dataset's entry once it is loaded, and its table where that is in this process's memory.

        Args:
            entry: The dataset.
            load: The load, which may be cancelled.
            share: The room it takes.
            anew: Whether its source is to be read whatever the store has of it.
        """
        store, location, is_remote = self._store, entry.location, is_address(entry.location)
        check_below(location, entry.root)
        manifest = None if store is None or anew else store.current(location)
        if manifest is not None and is_remote and manifest.fingerprint != entry.fingerprint:
            manifest = None  # The store cannot know: it asks no address.
        size = entry.estimated_bytes if manifest is None else manifest.file_size
        if size > self._room.budget:
            return self._in_place(entry, size, anew=anew), None
        self._room.make(share, size, load.cancelled)
        said = time.monotonic()

        def progress(written: int) -> None:
            nonlocal said
            part = min(0.99, written / max(size, 1))
            self._usage.set_progress(entry.slot, part)
            if time.monotonic() - said > _WORD:
                said = time.monotonic()
                _log.info(Fields("loading", dataset=entry.name, part=f"{part:.0%}", bytes=written))
            if written > share.nbytes:
                # The estimate was too low: what is written now is the better one.
                if written > self._room.budget:
                    raise _TooLargeError
                self._room.make(share, min(written + written // 4, self._room.budget), load.cancelled)

        table: LoadedTable | None = None
        info = None if manifest is None else info_of(manifest)
        try:
            if store is not None and manifest is None:
                try:
                    manifest = store.load(
                        location, self._loader, progress=progress, cancelled=load.cancelled, anew=anew or is_remote
                    )
                    info = info_of(manifest)
                except OSError as error:
                    if not (store.is_optional and is_full(error)):
                        raise
                    _log.warning("%s is kept in this process's memory: store %s is full", entry.source_name, store.folder)
            if manifest is None:
                table, loaded = load_in_memory(location, self._loader, progress=progress, cancelled=load.cancelled)
                info = replace(loaded.info, nbytes=table.nbytes, fingerprint=loaded.fingerprint)
            check_below(location, entry.root)
        except _TooLargeError:
            self._room.give_back(share)
            return self._in_place(entry, self._room.budget + 1, anew=anew), None
        assert info is not None
        version = manifest.version if manifest is not None else table.version if table is not None else ""
        self._room.set(share, info.nbytes)
        _log.info(Fields("loaded", dataset=entry.name, bytes=info.nbytes, version=version))
        # What was loaded may be newer than what was looked at.
        entry = replace(with_info(entry, info), estimated_bytes=entry.estimated_bytes)
        return replace(entry, state=DatasetState.LOADED, problem="", version=version, manifest=manifest), table

    def _in_place(self, entry: Entry, size: int, *, anew: bool) -> Entry:
        """The entry of a dataset that is larger than the budget. Raises LimitExceeded where its source can only be read whole."""
        info = self.describe(entry.location, entry.root)
        if info.not_in_place:
            raise LimitExceeded(
                f"dataset {entry.name!r} takes {human_bytes(max(size, info.nbytes))}, and this server keeps at most "
                f"{human_bytes(self._room.budget)} in memory (memory_limit); it cannot be served from its source piece by piece: "
                f"{info.not_in_place}",
                field="memory_limit",
                value=max(size, info.nbytes),
            )
        # Of an address nothing but its metadata can be told: who looks again wants whatever is there now.
        told = f"{info.fingerprint}\0{time.time_ns()}" if anew else info.fingerprint
        version = hashlib.sha256(f"{entry.location}\0{told}".encode()).hexdigest()[:16]
        _log.info(Fields("in place", dataset=entry.name, bytes=info.nbytes, version=version))
        return replace(with_info(entry, info), state=DatasetState.IN_PLACE, problem="", version=version, manifest=None)

    def images(self, entry: Entry, table: LoadedTable | None) -> ImageTable:
        """A loaded dataset's images, to make levels of; ``table`` where it lies in this process's memory."""
        if entry.state is DatasetState.IN_PLACE:
            served = open_in_place(entry, self._readers)
            return ImageTable(entry.name, served.table, columns=served.columns)
        if entry.manifest is not None:
            return ImageTable(entry.name, entry.manifest.table())
        if table is None:
            raise not_loaded(entry.name)
        return ImageTable(entry.name, table)


def not_loaded(name: str) -> Unavailable:
    """The error of a dataset that has left memory since it was asked for."""
    return Unavailable(f"dataset {name!r} is not loaded any more; try again", field="loading", value="0")


def with_info(entry: Entry, info: SourceInfo) -> Entry:
    """An entry that says what was found out of its source."""
    return replace(
        entry,
        format=info.format,
        rows=info.rows,
        images=tuple(info.images),
        others=tuple((name, kind) for name, kind in info.others),
        estimated_bytes=info.nbytes,
        fingerprint=info.fingerprint,
    )


def info_of(manifest: Manifest) -> SourceInfo:
    """What a source held when the store took it in."""
    return SourceInfo(
        format=manifest.source_format,
        images=manifest.images,
        others=manifest.others,
        rows=manifest.rows,
        nbytes=manifest.file_size,
        fingerprint=manifest.fingerprint,
    )
