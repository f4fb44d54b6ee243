"""Watching folders: files that come, change or go become datasets that come, change or go.

By looking every so often, which works on every file system, network ones included; nothing has to be told of a change by the system.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ome_tensor.errors import DatasetNotFound, OmeTensorError

from .entries import Entry
from .finding import SourceFile, find_all
from .librarian import Librarian
from .loads import is_lasting
from .readers.detect import fingerprint

__all__ = ["FolderWatch"]

_log = logging.getLogger(__name__)


class FolderWatch:
    """Keeps datasets in step with folders.

    A dataset that somebody has removed by hand stays removed until its source changes, or is registered by hand. Of several sources that would have
    one name, the one that has it keeps it.

    Args:
        librarian: What is told of changes.
        seconds: Between two looks; 0: there are none.
    """

    def __init__(self, librarian: Librarian, seconds: float) -> None:
        self._librarian = librarian
        self._seconds = seconds
        self._folders: Sequence[str] = ()
        self._stopping = threading.Event()
        #: Folders that could not be searched at the last look.
        self._away: set[str] = set()
        # All by location, and kept as long as it is found.
        #: What each source looked like at the last look: what is still being written looks different at each.
        self._seen: dict[str, str | None] = {}
        #: What was served after the last look, and what that looked like. Where it is gone at the next one, somebody has removed it by hand.
        self._served: dict[str, str] = {}
        #: What sources looked like that were removed by hand: left alone until they look different.
        self._removed: dict[str, str | None] = {}
        #: Sources whose present contents cannot be served: said once, and not tried again until they change.
        self._refused: dict[str, str | None] = {}
        #: Sources whose name is taken, and the location of the one that has it: said once.
        self._clashes: dict[str, str] = {}

    def start(self, folders: Sequence[str]) -> None:
        """Watch these folders from now on."""
        self._folders = [os.path.abspath(folder) for folder in folders]
        self._served = {entry.location: entry.fingerprint for entry in self._librarian.entries}
        if self._seconds and folders:
            threading.Thread(target=self._run, name="ome-tensor-watch", daemon=True).start()

    def stop(self) -> None:
        """Watch no more."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(self._seconds):
            try:
                self.look()
            except Exception:
                _log.exception("the watch on folders failed; it goes on")

    def look(self) -> None:
        """Look once: a source whose contents have settled since the last look is registered or refreshed, one that has gone is removed."""
        found = self._find()
        entries: dict[str, list[Entry]] = {}
        for entry in self._librarian.entries:
            entries.setdefault(entry.location, []).append(entry)
        self._removed = {
            location: looked for location, looked in (self._removed | self._served).items() if location not in entries
        }
        self._served = {location: same[0].fingerprint for location, same in entries.items()}
        before, self._seen = self._seen, {location: fingerprint(location) for location in found}
        for location, same in entries.items():
            if location not in found and not same[0].is_upload and self._has_gone(location, location in before):
                self._remove(same)
        names = self._taken_names(entries, found)
        for location, source in found.items():
            now = self._seen[location]
            if now is None or before.get(location) != now or self._refused.get(location) == now:
                continue
            try:
                self._look_at(source, now, entries.get(location, []), names)
            except OmeTensorError as error:
                # Others pass: a disk that is full, a load that was given up. Then it is tried again.
                if is_lasting(error):
                    self._refused[location] = now
                _log.warning("%s cannot be served as it is now: %s", location, error)
            except Exception:
                # Others are looked at all the same.
                self._refused[location] = now
                _log.exception("%s cannot be served as it is now", location)
        # What lies in a folder that is away is as it was, as far as anybody knows.
        self._seen |= {location: looked for location, looked in before.items() if self._is_away(location)}
        by_location: tuple[dict[str, Any], ...] = (self._removed, self._refused, self._clashes)
        for known in by_location:
            for location in [location for location in known if location not in self._seen]:
                del known[location]

    def _find(self) -> dict[str, SourceFile]:
        """What there is, by location."""
        found: dict[str, SourceFile] = {}
        for folder in self._folders:
            try:
                found |= {source.location: source for source in find_all([folder])}
            except (OmeTensorError, OSError) as error:
                # It may be away for a while, as network folders are: then nothing is taken off the air.
                if folder not in self._away:
                    self._away.add(folder)
                    _log.warning("not watching %s for now: %s", folder, error)
            else:
                self._away.discard(folder)
        return found

    def _is_away(self, location: str) -> bool:
        return any(Path(location).is_relative_to(folder) for folder in self._away)

    def _has_gone(self, location: str, was_found: bool) -> bool:
        """Whether a source that is served and was not found is none any more."""
        if self._is_away(location) or not any(Path(location).is_relative_to(folder) for folder in self._folders):
            return False
        try:
            os.stat(location)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False
        # There, but no source now. (What was never found may have been registered by hand: a hidden file, for one.)
        return was_found

    def _taken_names(self, entries: dict[str, list[Entry]], found: dict[str, SourceFile]) -> dict[str, str]:
        """Names and the locations of those who have them. What was removed by hand keeps its name: another source is not what was removed."""
        kept = {source.name: location for location, source in found.items() if location in self._removed}
        return kept | {entry.name: location for location, same in entries.items() for entry in same}

    def _look_at(self, source: SourceFile, now: str, same: list[Entry], names: dict[str, str]) -> None:
        """Register or refresh a source that has settled. Raises what the librarian does.

        Args:
            source: The source.
            now: What it looks like.
            same: What is served of it.
            names: Names that are taken, and by which location.
        """
        location = source.location
        for entry in same:
            if entry.fingerprint != now:
                with suppress(DatasetNotFound):  # Removed by hand just now.
                    self._served[location] = self._librarian.refresh(entry.name)[0].fingerprint
        if not same and self._removed.get(location) != now:
            holder = names.setdefault(source.name, location)
            if holder != location:
                if self._clashes.get(location) != holder:
                    self._clashes[location] = holder
                    _log.warning("%s is not served: dataset %r is %s; rename one", location, source.name, holder)
                return
            # As if it had been named itself: then it raises where it cannot be served.
            for entry in self._librarian.register([replace(source, named=True)]):
                self._served[location] = entry.fingerprint
        self._clashes.pop(location, None)
        self._refused.pop(location, None)

    def _remove(self, same: list[Entry]) -> None:
        for entry in same:
            _log.info("dataset %s is no longer served: its source has gone", entry.name)
            with suppress(DatasetNotFound):  # Removed by hand just now.
                self._librarian.remove(entry.name)
        self._served.pop(same[0].location, None)
