"""The librarian: every dataset that a server has, loaded when it is first used, within a budget of memory.

One librarian serves all workers of a server. What it knows of each dataset is an :class:`Entry`; each change of one is published whole, and a serving
process swaps its catalogue for the new one. A dataset is loaded by a thread of its own, once for all who wait for it. What is least recently used
leaves when room is needed; what a call is using does not.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace

from ome_tensor.errors import (
    DatasetNotFound,
    InvalidArgument,
    LimitExceeded,
    OmeTensorError,
    Overloaded,
    ServerError,
    Unavailable,
)
from ome_tensor.listing import DatasetState
from ome_tensor.tables import ImageTable, LoadedTable

from .budget import human_bytes
from .entries import Entry
from .fetching import Fetcher, info_of, not_loaded, with_info
from .finding import SourceFile, check_below
from .in_place import Readers
from .levels import LevelFiles
from .loading import Loader
from .loads import Load, as_problem, is_lasting, start_thread
from .logs import Fields
from .pyramid_office import PyramidOffice
from .readers.detect import fingerprint, is_address
from .room import Room, Share
from .store import Store
from .usage import SLOTS, Usage

__all__ = ["Librarian", "Publish"]

_log = logging.getLogger(__name__)

#: What is told of every change: all entries, and the tables that lie in this process's own memory, by name.
Publish = Callable[[Sequence[Entry], Mapping[str, LoadedTable]], None]

#: Datasets loaded at one time: another one waits. More would only share the disk and the processors.
_LOADS = 2

#: Seconds between two looks at whether a load that waits for its turn was cancelled.
_POLL = 0.05


@dataclass(eq=False, slots=True)
class _Kept:
    """A dataset, and all that is its own: removed and registered again it is another one, whatever its name.

    Attributes:
        entry: What is published of it.
        share: Of the room, while it is loaded.
        table: Where it lies in this process's memory.
        failure: Why it cannot be loaded, until it is looked at again.
        load: By which it is being loaded.
        replacement: By which another version of it is being loaded, while this one is served.
        changing: Held by whoever looks at its source again.
        is_stale: Whether what the store has of it is not to be trusted.
    """

    entry: Entry
    share: Share | None = None
    table: LoadedTable | None = None
    failure: OmeTensorError | None = None
    load: Load | None = None
    replacement: Load | None = None
    changing: threading.Lock = field(default_factory=threading.Lock)
    is_stale: bool = False


class Librarian:
    """All datasets of a server.

    Args:
        loader: Reads sources.
        readers: Read them where they lie.
        store: Where loaded datasets lie; ``None``: in this process's own memory.
        budget: Bytes that loaded datasets may take together.
        publish: Told of every change.
        usage: Who uses what.
        levels: Where pyramid levels are put that are made here.
    """

    def __init__(
        self,
        loader: Loader,
        readers: Readers,
        store: Store | None,
        budget: int,
        publish: Publish,
        usage: Usage,
        levels: LevelFiles,
    ) -> None:
        self.budget = budget
        self._store = store
        self._publish = publish
        self._usage = usage
        self._kept: dict[str, _Kept] = {}
        self._slots = deque(range(SLOTS))
        self._lock = threading.RLock()
        self._turns = threading.BoundedSemaphore(_LOADS)
        self._stopping = threading.Event()
        self._room = Room(budget, self._lock, self._leave)
        self._fetcher = Fetcher(loader, readers, store, self._room, usage)
        self._pyramids = PyramidOffice(levels, self._room, self._lock, self._images, self._turn, self._is_served)

    # -- what there is ---------------------------------------------------------------------------------------------------------------

    @property
    def entries(self) -> list[Entry]:
        """All datasets, by name."""
        with self._lock:
            return [self._kept[name].entry for name in sorted(self._kept)]

    def entry(self, name: str) -> Entry:
        """One dataset. Raises DatasetNotFound."""
        return self._find(name).entry

    def has(self, name: str) -> bool:
        """Whether there is a dataset of that name."""
        with self._lock:
            return name in self._kept

    def _find(self, name: str) -> _Kept:
        with self._lock:
            kept = self._kept.get(name)
        if kept is None:
            raise DatasetNotFound(f"no dataset {name!r}", field="name", value=name)
        return kept

    def _is_kept(self, kept: _Kept) -> bool:
        return self._kept.get(kept.entry.name) is kept

    def _is_served(self, entry: Entry) -> bool:
        kept = self._kept.get(entry.name)
        return kept is not None and (kept.entry.slot, kept.entry.version) == (entry.slot, entry.version)

    @property
    def tables(self) -> dict[str, LoadedTable]:
        """Those that lie in this process's own memory, by name."""
        with self._lock:
            return {name: kept.table for name, kept in self._kept.items() if kept.table is not None}

    @property
    def taken(self) -> int:
        """Bytes that datasets take, those being loaded included, and their levels."""
        return self._room.taken

    def _tell(self) -> None:
        """Publish what there is by now. With the lock held, so that nobody hears of changes in another order."""
        self._publish(self.entries, self.tables)

    def stop(self) -> None:
        """Give up what is being loaded."""
        self._stopping.set()
        with self._lock:
            for kept in self._kept.values():
                _cancel(kept)
        self._pyramids.stop()

    # -- registering -----------------------------------------------------------------------------------------------------------------

    def register(self, sources: Sequence[SourceFile], *, is_upload: bool = False) -> list[Entry]:
        """Serve these sources from now on, all or none; the entries of those that can be. One that is served already is looked at again.

        One that was found in a folder and turns out not to be readable is left out with a warning, so that one bad file does not take a lab's folder
        off the air.

        Raises:
            InvalidRecord, InvalidArgument, MissingDependency: a source that was named itself cannot be read, or its name is taken by another.
            LimitExceeded: there would be too many datasets.
        """
        found: list[_Kept] = []
        try:
            for source in sources:
                if self._stopping.is_set():
                    break
                try:
                    found.append(self._described(source, is_upload))
                except (OmeTensorError, OSError) as error:
                    problem = as_problem(error, source.location)
                    if source.named:
                        raise problem from None
                    _log.warning("left out %s: %s", source.location, problem)
            again = self._take_in(found)
        finally:
            with self._lock:
                for kept in found:
                    if not self._is_kept(kept):
                        self._let_go(kept)
        for name in again:
            self.refresh(name)
        return [self.entry(kept.entry.name) for kept in found]

    def _take_in(self, found: Sequence[_Kept]) -> list[str]:
        """Have new datasets served, all or none; the names of those that are served already."""
        with self._lock:
            before = {kept.entry.name: self._kept.get(kept.entry.name) for kept in found}
            for kept in found:
                there = before[kept.entry.name]
                if there is not None and there.entry.location != kept.entry.location:
                    raise InvalidArgument(
                        f"there is a dataset {kept.entry.name!r} already, of another source; give this one another name",
                        field="name",
                        value=kept.entry.name,
                    )
            fresh = [kept for kept in found if before[kept.entry.name] is None]
            if len(fresh) > len(self._slots):
                raise LimitExceeded(
                    f"this server serves at most {SLOTS} datasets", field="name", value=fresh[len(self._slots)].entry.name
                )
            for kept in fresh:
                if kept.entry.manifest is not None and not kept.entry.manifest.has_file:
                    # Since it was looked at, another dataset of this source has left memory, and its file with it.
                    self._room.give_back(kept.share)
                    kept.share, kept.entry = None, kept.entry.unloaded(DatasetState.NOT_LOADED)
                slot = self._slots.popleft()
                self._usage.clear(slot)
                kept.entry = replace(kept.entry, slot=slot)
                self._kept[kept.entry.name] = kept
            for kept in found:
                there = before[kept.entry.name]
                if there is not None:
                    there.entry = replace(there.entry, root=kept.entry.root)
            self._tell()
            return [name for name, there in before.items() if there is not None]

    def _described(self, source: SourceFile, is_upload: bool) -> _Kept:
        # A source that the store holds already need not be opened: a restart parses nothing.
        check_below(source.location, source.root)
        manifest = None if self._store is None else self._store.current(source.location)
        info = self._fetcher.describe(source.location, source.root) if manifest is None else info_of(manifest)
        entry = with_info(Entry.of(source, is_upload), info)
        if manifest is None:
            return _Kept(entry)
        share = _share(entry)
        with self._lock:
            if source.name not in self._kept and self._room.take(share, manifest.file_size):
                return _Kept(replace(entry, state=DatasetState.LOADED, version=manifest.version, manifest=manifest), share)
        return _Kept(entry)

    def remove(self, name: str) -> Entry:
        """Serve a dataset no more. Raises DatasetNotFound."""
        with self._lock:
            kept = self._find(name)
            del self._kept[name]
            _cancel(kept)
            self._tell()
            self._let_go(kept)
            self._slots.append(kept.entry.slot)
        return kept.entry

    # -- loading ---------------------------------------------------------------------------------------------------------------------

    def load(self, name: str, patience: float | None = None) -> Entry:
        """A dataset, ready to be read: loaded now, if it is not.

        Args:
            name: Its name.
            patience: Seconds to wait for that; ``None``: as long as it takes.

        Raises:
            DatasetNotFound: there is none of that name.
            Unavailable: it is still being loaded; field ``loading``, value the part that is.
            Cancelled, Overloaded, InvalidRecord, LimitExceeded: why it could not be loaded.
        """
        with self._lock:
            kept = self._find(name)
            entry = kept.entry
            if entry.is_ready:
                return entry
            if kept.failure is not None:
                # Another one each time: an error that is raised again keeps all those calls alive that it went through.
                raise copy(kept.failure)
            load = kept.load
            if load is None:
                load = self._begin(kept)
        if not load.done.wait(patience):
            part = self._usage.progress(entry.slot)
            raise Unavailable(
                f"dataset {name!r} is being loaded ({part:.0%} of {human_bytes(entry.estimated_bytes)}); try again shortly",
                field="loading",
                value=f"{part:.4f}",
            )
        if load.error is not None:
            raise copy(load.error)
        return self.entry(name)

    def cancel(self, name: str) -> bool:
        """Give up loading a dataset, or a new version of it; whether it was being loaded. Raises DatasetNotFound."""
        with self._lock:
            return _cancel(self._find(name))

    def _begin(self, kept: _Kept) -> Load:
        load, entry = Load(), kept.entry.unloaded(DatasetState.LOADING)
        self._usage.set_progress(entry.slot, 0.0)
        # First of all: where there is no thread, nothing is being loaded. It cannot be through before this is, which has the lock.
        start_thread(self._run, kept, entry, load, name="ome-tensor-load")
        kept.load, kept.entry = load, entry
        self._tell()
        return load

    def _run(self, kept: _Kept, entry: Entry, load: Load) -> None:
        """Load a dataset; on a thread of its own."""
        share = _share(entry)
        table: LoadedTable | None = None
        failure: OmeTensorError | None = None
        before = fingerprint(entry.location)
        try:
            with self._turn(load):
                loaded, table = self._fetcher.fetch(entry, load, share, anew=kept.is_stale)
        except Exception as error:
            self._room.give_back(share)
            loaded = self._failed(entry, load, error)
            # Only of the source itself: what the system refuses it may grant the next time. One that was changed meanwhile is another by now.
            if is_lasting(error) and fingerprint(entry.location) == before:
                failure = load.error
            elif is_lasting(error):
                loaded = entry.unloaded(DatasetState.NOT_LOADED)
        with self._lock:
            kept.load = None
            if self._install(kept, loaded, table, share):
                kept.failure = failure
        load.done.set()

    def _failed(self, entry: Entry, load: Load, error: Exception) -> Entry:
        """What becomes of a dataset that could not be loaded."""
        if isinstance(error, (OmeTensorError, OSError)):
            load.error = as_problem(error, entry.location)
        else:
            _log.exception(Fields("unexpected", dataset=entry.name))
            load.error = ServerError(
                f"unexpected {type(error).__name__} while {entry.name!r} was loaded; the server's log has the details"
            )
        _log.warning("dataset %s is not loaded: %s", entry.name, load.error)
        if is_lasting(load.error):
            return entry.unloaded(DatasetState.FAILED, load.error.message)
        return entry.unloaded(DatasetState.NOT_LOADED)

    def _install(self, kept: _Kept, loaded: Entry, table: LoadedTable | None, share: Share) -> bool:
        """Have a dataset be what was loaded, instead of what it was; whether it is still wanted. With the lock held."""
        if not self._is_kept(kept):
            self._room.give_back(share)
            self._discard(loaded)
            return False
        before, share_before = kept.entry, kept.share
        kept.entry, kept.table, kept.share = replace(loaded, root=before.root), table, share
        kept.is_stale = kept.is_stale and loaded.state is not DatasetState.LOADED
        self._room.give_back(share_before)
        if before.version != loaded.version:
            self._pyramids.forget(before)
        self._tell()
        if loaded.manifest is None:
            # Where there is a new one, the store has done so.
            self._discard(before)
        return True

    @contextmanager
    def _turn(self, load: Load) -> Iterator[None]:
        """One's turn to load. Raises Cancelled."""
        while not self._turns.acquire(timeout=_POLL):
            load.check()
        try:
            yield
        finally:
            self._turns.release()

    # -- leaving ---------------------------------------------------------------------------------------------------------------------

    def _leave(self, share: Share) -> bool:
        """Have the least recently used dataset or level leave, but not what the share is of; whether any could."""
        with self._lock:
            # Whoever reads a level uses its dataset, too: a level leaves before that does.
            leaving = self._pyramids.unused()
            leaving += [
                (self._last_used(kept.entry), lambda kept=kept, entry=kept.entry: self._evict(kept, entry))  # type: ignore[misc]
                for kept in self._kept.values()
                if kept.entry.state is DatasetState.LOADED
                and kept.share is not share
                and kept.replacement is None
                and not self._usage.is_used(kept.entry.slot)
                and not self._pyramids.is_busy(kept.entry)
            ]
        return any(leave() for _, leave in sorted(leaving, key=lambda one: one[0]))

    def _last_used(self, entry: Entry) -> int:
        return max(self._usage.last_used(entry.slot), self._pyramids.last_used(entry))

    def _evict(self, kept: _Kept, entry: Entry) -> bool:
        """Take a dataset out of memory, unless a call has begun to use it meanwhile; whether it is out."""
        with self._lock:
            if kept.entry is not entry or not self._is_kept(kept):
                return False
            table = kept.table
            kept.entry, kept.table = entry.unloaded(DatasetState.NOT_LOADED), None
            self._tell()
            # A call that saw the catalogue before this one has said so by now, or will find that it has to look again.
            if self._usage.is_used(entry.slot):
                kept.entry, kept.table = entry, table
                self._tell()
                return False
            self._room.give_back(kept.share)
            kept.share = None
            self._pyramids.forget(entry)
            self._discard(entry)
        _log.info(Fields("evicted", dataset=entry.name, version=entry.version))
        return True

    def _let_go(self, kept: _Kept) -> None:
        """Nobody is to read a dataset any more. With the lock held."""
        self._room.give_back(kept.share)
        kept.share = kept.table = None
        self._pyramids.forget(kept.entry)
        self._discard(kept.entry)

    def _discard(self, entry: Entry) -> None:
        """The store may take away what a dataset was, unless it is what another one is, or is about to be."""
        manifest = entry.manifest
        if self._store is None or manifest is None:
            return
        for kept in self._kept.values():
            other = kept.entry
            if other.manifest is not None and other.manifest.file == manifest.file:
                return
            if (kept.load is not None or kept.replacement is not None) and _is_same(other.location, manifest.source):
                return
        self._store.discard(manifest)

    # -- pyramids --------------------------------------------------------------------------------------------------------------------

    def make_level(self, name: str, column: str, row: int, level: int, patience: float) -> str:
        """The path of the file of a pyramid level that the source does not have: made now, once, if it is not there.

        Args:
            name, column, row: The image.
            level: From 1.
            patience: Seconds to wait.

        Raises:
            DatasetNotFound, InvalidArgument: there is no such image or level.
            Unavailable: it is still being made; field ``loading``, value the part that is.
            InvalidRecord, LimitExceeded, Overloaded: why it could not be made.
        """
        entry = self.entry(name)
        if not entry.is_ready:
            raise not_loaded(name)
        return self._pyramids.make(entry, column, row, level, patience)

    def _images(self, entry: Entry) -> ImageTable:
        """A dataset's images, to make levels of."""
        with self._lock:
            kept = self._kept.get(entry.name)
            table = kept.table if kept is not None and kept.entry.slot == entry.slot else None
        return self._fetcher.images(entry, table)

    # -- changing --------------------------------------------------------------------------------------------------------------------

    def refresh(self, name: str) -> tuple[Entry, bool]:
        """Look at a dataset's source again; the entry, and whether the source has changed. One that is loaded is served on until the new version is.

        A load that runs is waited for: nobody can say which version it reads. What lies at an address is read again, since nothing tells whether it
        has changed.

        Raises:
            DatasetNotFound: there is none of that name.
            Cancelled: it was given up.
            InvalidRecord, InvalidArgument and the like: the source cannot be read now. What is loaded is served on.
        """
        kept = self._find(name)
        with kept.changing:
            while True:
                load = kept.load
                if load is not None:
                    load.done.wait()
                entry = kept.entry
                try:
                    info = self._fetcher.describe(entry.location, entry.root)
                except OSError as error:
                    raise as_problem(error, entry.location) from None
                with self._lock:
                    if self._find(name) is not kept:
                        raise DatasetNotFound(f"dataset {name!r} was removed", field="name", value=name)
                    if kept.entry is not entry or kept.load is not None:
                        continue
                    fresh = with_info(entry, info)
                    anew = is_address(entry.location)
                    # Its file may have been taken from the store by somebody's hand.
                    is_gone = entry.manifest is not None and not entry.manifest.has_file
                    changed = info.fingerprint != entry.fingerprint or is_gone
                    had_failed, kept.failure = entry.state is DatasetState.FAILED, None
                    if not entry.is_ready:
                        kept.is_stale = kept.is_stale or anew
                        if changed or had_failed:
                            kept.entry = fresh.unloaded(DatasetState.NOT_LOADED)
                            self._tell()
                        return kept.entry, changed
                    if not (changed or anew):
                        return entry, False
                    load = kept.replacement = Load()
                return self._replace(kept, fresh, load, anew=anew)

    def _replace(self, kept: _Kept, fresh: Entry, load: Load, *, anew: bool) -> tuple[Entry, bool]:
        """Load a new version beside the old one and let it take its place; what reads the old one goes on with it.

        Where there is no room for both, the old one leaves first: whoever asks next waits for the new one.
        """
        version, share = kept.entry.version, _share(fresh)
        try:
            with self._turn(load):
                loaded, table = self._fetcher.fetch(fresh, load, share, anew=anew)
        except Exception as error:
            self._room.give_back(share)
            if not isinstance(error, Overloaded):
                kept.replacement = None
                if isinstance(error, (OmeTensorError, OSError)):
                    raise as_problem(error, fresh.location) from None
                raise
            loaded, table = fresh.unloaded(DatasetState.NOT_LOADED), None
        with self._lock:
            kept.replacement = None
            kept.is_stale = anew and not loaded.is_ready
            if not self._install(kept, loaded, table, share):
                raise DatasetNotFound(f"dataset {fresh.name!r} was removed", field="name", value=fresh.name)
            return kept.entry, kept.entry.version != version


def _share(entry: Entry) -> Share:
    return Share(f"dataset {entry.name!r}")


def _cancel(kept: _Kept) -> bool:
    """Give up what is being loaded of a dataset; whether anything was."""
    loads = [load for load in (kept.load, kept.replacement) if load is not None]
    for load in loads:
        load.cancelled.set()
    return bool(loads)


def _is_same(location: str, source: str) -> bool:
    return location == source or (not is_address(location) and os.path.realpath(location) == source)
