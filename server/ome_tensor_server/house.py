"""What a server's datasets need, put together: a store, a loader, the librarian, uploads, and a watch on folders."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress

from ome_tensor.errors import InvalidArgument, OmeTensorError
from ome_tensor.listing import DatasetState

from .budget import human_bytes
from .entries import Entry
from .finding import SourceFile
from .in_place import settings_readers
from .levels import LevelFiles
from .librarian import Librarian, Publish
from .loading import Loader, shared_loader
from .offices import OwnOffice
from .places import open_store
from .readers.detect import is_address
from .settings import Settings
from .store import Store
from .uploads import Uploads
from .usage import Usage
from .watching import FolderWatch

__all__ = ["House"]

_log = logging.getLogger(__name__)


class House:
    """All that serves datasets, but for the serving.

    Args:
        settings: The server's.
        usage: Who uses what.
        publish: Told of every change.
        uploads: Where uploads are kept, or ``None``.
        sources: What is to be served: where the store is depends on how much that is.

    Attributes:
        librarian: Knows all datasets.
        office: What may be done with them.
        is_open: Whether the first sources have been registered.

    Raises:
        InvalidArgument: the store cannot be used.
    """

    def __init__(
        self, settings: Settings, usage: Usage, publish: Publish, uploads: Uploads | None, sources: Sequence[SourceFile]
    ) -> None:
        self._settings = settings
        self._uploads = uploads
        self.is_open = False
        loader, readers = shared_loader(settings.reader_bytes), settings_readers(settings)
        store = _open_store(settings, loader, sources)
        if store is not None:
            store.clean()
        levels = LevelFiles(None if store is None else store.levels_folder)
        levels.clean()
        self.librarian = Librarian(loader, readers, store, settings.dataset_bytes, publish, usage, levels)
        self._roots: list[str] = _split_roots(settings.roots)
        self.office = OwnOffice(self.librarian, loader, uploads, self._roots)
        self._watch = FolderWatch(self.librarian, settings.watch_seconds)

    def move_in(self, sources: Sequence[SourceFile], stopped: Callable[[], bool], folders: Sequence[str] = ()) -> list[Entry]:
        """Register sources, and uploads of before, and load them where the settings say so; what there is then.

        Args:
            sources: What to serve.
            stopped: Whether to give up.
            folders: Where the sources were found: roots, where the settings name none, and what is watched.

        Raises:
            InvalidRecord, InvalidArgument: a source that was named itself cannot be served.
        """
        if not self._settings.roots:
            self._roots += [folder for folder in folders if folder not in self._roots]
        entries = self.librarian.register(sources)
        if self._uploads is not None:
            self._uploads.claim()
            for name, path in self._uploads.found():
                try:
                    entries += self.librarian.register([self._uploads.source(name, path)], is_upload=True)
                except OmeTensorError as error:
                    _log.warning("upload %s is not served: %s", name, error)
        if self._settings.preload:
            self._preload(sources, stopped)
        self.is_open = True
        self._watch.start(folders)
        return self.librarian.entries

    def _preload(self, sources: Sequence[SourceFile], stopped: Callable[[], bool]) -> None:
        """Load what fits, in order: what was named itself must load."""
        named = {source.name for source in sources if source.named}
        librarian = self.librarian
        for entry in librarian.entries:
            if stopped():
                return
            if entry.state is not DatasetState.NOT_LOADED:
                continue
            if librarian.taken + entry.estimated_bytes > librarian.budget and entry.estimated_bytes <= librarian.budget:
                _log.warning(
                    "dataset %s (%s) is loaded when it is used: those before it fill the memory limit",
                    entry.name,
                    human_bytes(entry.estimated_bytes),
                )
                continue
            try:
                librarian.load(entry.name)
            except OmeTensorError as error:
                if entry.name in named:
                    raise
                _log.warning("left out %s: %s", entry.location, error)
                librarian.remove(entry.name)

    def close(self) -> None:
        """Give up what is being loaded, and watch no more."""
        self._watch.stop()
        self.librarian.stop()
        if self._uploads is not None:
            self._uploads.release()


def _split_roots(text: str) -> list[str]:
    # A colon parts an address's scheme from the rest, too.
    parts = re.split(r"\s+" if re.search(r"\w://", text) else re.escape(os.pathsep), text)
    return [part if is_address(part) else os.path.abspath(part) for part in parts if part]


def _open_store(settings: Settings, loader: Loader, sources: Sequence[SourceFile]) -> Store | None:
    def size(location: str) -> int:
        # Registering it will say what is wrong.
        with suppress(OmeTensorError, OSError):
            return loader.describe(location).nbytes
        return 0

    try:
        locations = [source.location for source in sources]
        # What lies in this process's memory several workers cannot serve.
        return open_store(settings.store, locations, size, settings.dataset_bytes, is_optional=settings.workers == 1)
    except InvalidArgument as error:
        if settings.store != "auto" or settings.workers > 1:
            raise
        # Nobody asked for one: a container without a writable folder serves all the same.
        _log.warning("datasets are kept in this process's memory: %s", error)
        return None
