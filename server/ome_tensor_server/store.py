"""The resident store: each dataset as one uncompressed Arrow IPC file, which any process can map.

A dataset is two files: ``ID-VERSION.arrow`` holds its image columns, ``ID.json`` (the manifest) says what it was made from and what it is. The
manifest is written last, by write, fsync, rename: a dataset is there whole or not at all, whenever the machine stops. While its source is
unchanged (its fingerprint) a restart maps the file and parses nothing.

An Arrow file given as a source needs no conversion. The store makes a file of its own that shares the source's blocks, where the file system
can do that; else it gives the source a second name, so that it can be mapped again after it was renamed or removed; else, on another file
system, it is mapped where it lies. In the latter two cases somebody may still write to it: see :meth:`ImageTable.check_unchanged`.

One process writes a dataset at a time, by a lock on its part of a file. A data file stays as long as any server that runs uses it
(:class:`Leases`). Files of other names than these are never touched.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

from ome_tensor.errors import InvalidArgument

from .file_system import sync_folder
from .leases import Leases, Locks
from .loading import Loaded, Loader
from .manifest import FORMAT, Manifest, dataset_id, read_manifest
from .mounts import is_memory, min_mode
from .readers.detect import is_address
from .readers.files import check_unchanged
from .readers.folders import folder_stats

__all__ = ["Manifest", "Store", "is_full", "is_store"]

_log = logging.getLogger(__name__)

#: By this file a folder is known as a store.
_MARKER = ".ome-tensor-store"
_MARKER_TEXT = (
    "ome-tensor serve keeps datasets here. It can all be deleted when no server runs: it is made again from the sources.\n"
)
_LOCK, _LEASES, LEVELS = ".lock", ".leases", "levels"

_DATA = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}\.arrow")
_MANIFEST = re.compile(r"[0-9a-f]{16}\.json")
_UNFINISHED = re.compile(r"[0-9a-f]{16}((-[0-9a-f]{16})?\.arrow|\.json)\.tmp")

#: What does not make a folder somebody else's: the last is in every new ext4 file system.
_HARMLESS = frozenset({_MARKER, _LOCK, _LEASES, LEVELS, "lost+found"})

#: Linux's ioctl that makes a file of another's blocks.
_FICLONE = 0x40049409

Progress = Callable[[int], None]


class Store:
    """A folder of datasets. Keep it for as long as they are served: it holds the leases on their files.

    Args:
        folder: Where: a store, an empty folder, or one to be made, for this user only. Datasets may be read by whoever may look into the folder and
            may read their sources: an operator who lets a group in lets it map them.
        spare: Another such folder, for what is there already, and for what finds no room in this one.
        is_optional: Nobody asked for it: what it cannot take may be kept elsewhere.

    Raises:
        InvalidArgument: it cannot be made or written, holds files that are not a store's, or is another user's: that one could put pixels
            into it.
    """

    def __init__(self, folder: Path, spare: Path | None = None, *, is_optional: bool = False) -> None:
        self.folder = folder.absolute()
        self.is_optional = is_optional
        self._spare_folder = spare
        self._spare: Store | None = None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self.folder.stat()
            if status.st_uid != os.geteuid() and os.geteuid() != 0:
                raise _unusable(folder, "belongs to another user")
            if not is_store(self.folder):
                self._found()
            self._locks = Locks(self.folder / _LOCK)
            self._leases = Leases(self.folder / _LEASES)
        except OSError as error:
            raise _unusable(folder, f"cannot be used: {error.strerror}") from None
        self._folder_mode = status.st_mode
        self._is_memory = is_memory(self.folder)
        #: The data file leased for each dataset.
        self._leased: dict[str, str] = {}

    def _found(self) -> None:
        """Make the folder a store."""
        others = sorted(name for name in os.listdir(self.folder) if not (name in _HARMLESS or _is_own(name)))
        if others:
            some = ", ".join(others[:3]) + (" and others" if len(others) > 3 else "")
            raise _unusable(self.folder, f"is no store, and holds other files ({some}): name a new or an empty folder")
        marker = self.folder / _MARKER
        marker.touch(mode=0o600)
        marker.write_text(_MARKER_TEXT)

    @property
    def levels_folder(self) -> Path:
        """Where pyramid levels that were made of its datasets belong."""
        return self.folder / LEVELS

    def current(self, location: str) -> Manifest | None:
        """The dataset of a source, where the store has it and the source is unchanged; used by this server from then on."""
        location = _resolved(location)
        found = self._current(location)
        if found is None:
            spare = self._open_spare()
            found = None if spare is None else spare._current(location)
        return found

    def load(
        self,
        location: str,
        loader: Loader,
        *,
        progress: Progress = lambda _: None,
        cancelled: threading.Event | None = None,
        anew: bool = False,
    ) -> Manifest:
        """The dataset of a source: from the store where that is current, else loaded into it.

        Args:
            location: The source.
            loader: Reads it.
            progress, cancelled: See :meth:`Loader.load`.
            anew: Whether to look at the source even where nothing says that it has changed: at an address nothing does.

        Raises:
            InvalidRecord, LimitExceeded, MissingDependency: the source cannot be read.
            OSError: the disk is full, or the source cannot be opened. The store is as it was.
            Cancelled: the load was given up.
        """
        found = None if anew else self.current(location)
        if found is not None:
            return found
        location = _resolved(location)
        try:
            return self._make(location, loader, progress, cancelled, anew)
        except OSError as error:
            spare = self._open_spare(make=True) if is_full(error) else None
            if spare is None:
                raise
            _log.warning("store %s is full: %s goes to %s", self.folder, os.path.basename(location), spare.folder)
            return spare._make(location, loader, progress, cancelled, anew)

    def discard(self, manifest: Manifest) -> bool:
        """This server does not use a dataset any more: its memory is wanted. Whether its file was removed.

        That is done where it lies in memory. Of a file on a disk only the pages leave memory, and it is there for the next time.
        """
        if self._spare is not None and self._spare._owns(manifest.file):
            return self._spare.discard(manifest)
        dataset, name = dataset_id(manifest.source), Path(manifest.file).name
        if self._leased.get(dataset) == name:
            del self._leased[dataset]
            self._leases.release(name)
        if not self._owns(manifest.file):
            return False
        if not self._is_memory:
            with suppress(OSError), open(manifest.file, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return False
        with self._locks.attempted(dataset) as is_mine:
            removed = is_mine and self._remove(manifest.file)
            if removed:
                (self.folder / f"{dataset}.json").unlink(missing_ok=True)
            return removed

    def _open_spare(self, *, make: bool = False) -> Store | None:
        folder = self._spare_folder
        if self._spare is None and folder is not None and (make or is_store(folder)):
            with suppress(InvalidArgument):
                self._spare = Store(folder)
        return self._spare

    def clean(self) -> None:
        """Remove what is of no use: what a crash left behind, data files that no manifest names, datasets whose source is gone. What a server
        that runs uses stays, for a later time.

        Where another process is just writing, nothing is done.
        """
        spare = self._open_spare()
        if spare is not None:
            spare.clean()
        with self._locks.attempted() as is_mine:
            if is_mine:
                self._clean()

    def _clean(self) -> None:
        named = set()
        for path in self._files(_MANIFEST):
            manifest = read_manifest(path)
            if manifest is None or (_is_gone(manifest.source) and self._remove(manifest.file)):
                path.unlink(missing_ok=True)
            else:
                named.add(manifest.file)
        for path in self._files(_DATA):
            if str(path) not in named:
                self._remove(str(path))
        for path in self._files(_UNFINISHED):
            path.unlink(missing_ok=True)

    def _files(self, pattern: re.Pattern[str]) -> list[Path]:
        return [self.folder / name for name in os.listdir(self.folder) if pattern.fullmatch(name)]

    def _owns(self, file: str) -> bool:
        path = Path(file)
        return path.parent == self.folder and _DATA.fullmatch(path.name) is not None

    def _remove(self, file: str) -> bool:
        """Remove a data file, unless a server uses it; whether that is so. What lies elsewhere stays, and hinders nothing."""
        if not self._owns(file):
            return True
        path = Path(file)
        with self._leases.unused(path.name) as is_unused:
            if is_unused:
                path.unlink(missing_ok=True)
        return is_unused

    def _current(self, source: str) -> Manifest | None:
        """What there is of a source, leased, if that is current."""
        manifest = read_manifest(self.folder / f"{dataset_id(source)}.json")
        if manifest is None or manifest.source != source or not manifest.is_current:
            return None
        with suppress(LookupError), self._leasing(manifest):
            # Until it was leased somebody may have taken it away.
            if not manifest.is_current:
                raise LookupError
            self._permit(manifest)
            return manifest
        return None

    @contextmanager
    def _leasing(self, manifest: Manifest) -> Iterator[None]:
        """Lease a dataset's file, which this server uses from now on instead of the one before; not where the block fails."""
        dataset, name = dataset_id(manifest.source), Path(manifest.file).name
        before = self._leased.get(dataset)
        if self._owns(manifest.file):
            self._leases.take(name)
        try:
            yield
        except BaseException:
            if name != before:
                self._leases.release(name)
            raise
        if before is not None and name != before:
            self._leases.release(before)
        self._leased[dataset] = name

    def _permit(self, manifest: Manifest) -> None:
        """Let those read a dataset's file who may by now: permissions of its source and of the folder may have been changed."""
        if self._owns(manifest.file) and not is_address(manifest.source):
            file = os.stat(manifest.file)
            mode = self._mode(file, manifest.source)
            # Of a file with two names the source's owner decides.
            if not os.path.samestat(file, os.stat(manifest.source)) and stat.S_IMODE(file.st_mode) != mode:
                os.chmod(manifest.file, mode)

    def _mode(self, file: os.stat_result, source: str) -> int:
        """For whom a file of the store is that was made of a source, or of all that lies in it."""
        stats = [os.stat(source), *(folder_stats(Path(source)) if os.path.isdir(source) else ())]
        return min_mode(self._folder_mode, file, stats)

    def _make(self, location: str, loader: Loader, progress: Progress, cancelled: threading.Event | None, anew: bool) -> Manifest:
        with self._locks.held(dataset_id(location), cancelled):
            # Another process may have done it meanwhile.
            found = None if anew else self._current(location)
            return found if found is not None else self._convert(location, loader, progress, cancelled)

    def _convert(self, location: str, loader: Loader, progress: Progress, cancelled: threading.Event | None) -> Manifest:
        name = dataset_id(location)
        record, temporary = self.folder / f"{name}.json", self.folder / f"{name}.arrow.tmp"
        before = read_manifest(record)
        there = before.version if before is not None and before.source == location and before.has_file else ""
        # What lies at an address has to be read before anybody knows its version.
        known = "" if is_address(location) else there
        target = None
        try:
            with open(temporary, "w+b", opener=_private) as file:
                loaded = loader.load(location, file.fileno(), known=known, progress=progress, cancelled=cancelled)
                is_there = before is not None and loaded.version == there
                if not (loaded.is_mapped or is_there):
                    if not is_address(location):
                        os.fchmod(file.fileno(), self._mode(os.fstat(file.fileno()), location))
                    os.fsync(file.fileno())
            made = self._manifest(location, loaded)
            target = made.file
            with self._leasing(made):
                if is_there and before is not None:
                    # Copied, touched or read again, and still the same.
                    made = replace(before, fingerprint=loaded.fingerprint)
                    self._permit(made)
                else:
                    if loaded.is_mapped:
                        path = self._keep(location, loaded, Path(made.file))
                    else:
                        path = Path(made.file)
                        temporary.replace(path)
                        sync_folder(self.folder)
                    made = self._found_file(made, path)
                with self._replacing(record) as file:
                    file.write(json.dumps(asdict(made)).encode())
        except BaseException:
            if target is not None and (before is None or before.file != target):
                self._remove(target)
            raise
        finally:
            temporary.unlink(missing_ok=True)
        if before is not None and before.file not in (made.file, made.source):
            self._remove(before.file)
        return made

    def _manifest(self, location: str, loaded: Loaded) -> Manifest:
        """What is to be said of a dataset; not yet where it lies."""
        info = loaded.info
        return Manifest(
            format=FORMAT,
            source=location,
            source_format=info.format,
            fingerprint=loaded.fingerprint,
            version=loaded.version,
            file=str(self.folder / f"{dataset_id(location)}-{loaded.version}.arrow"),
            file_inode=0,
            file_size=0,
            file_modified_ns=0,
            rows=info.rows,
            images=list(info.images),
            others=[list(other) for other in info.others],
        )

    def _found_file(self, manifest: Manifest, path: Path) -> Manifest:
        found = path.stat()
        return replace(
            manifest, file=str(path), file_inode=found.st_ino, file_size=found.st_size, file_modified_ns=found.st_mtime_ns
        )

    def _keep(self, location: str, loaded: Loaded, target: Path) -> Path:
        """Give the store a file of the source's very bytes that takes no room: ``target``, or the source itself where that cannot be had."""
        source = Path(location)
        if source.parent == self.folder:
            return source
        try:
            with self._replacing(target) as file, source.open("rb") as opened:
                os.fchmod(file.fileno(), min_mode(self._folder_mode, os.fstat(file.fileno()), [os.fstat(opened.fileno())]))
                # Its blocks, shared until either is written to.
                fcntl.ioctl(file.fileno(), _FICLONE, opened.fileno())
                check_unchanged(os.fstat(opened.fileno()), loaded.fingerprint, source)
            return target
        except OSError as error:
            if is_full(error):
                raise
        temporary = _temporary(target)
        try:
            temporary.unlink(missing_ok=True)
            os.link(source, temporary)
            # By its path, which may have come to name another file; then the check fails.
            check_unchanged(temporary.stat(), loaded.fingerprint, source)
            temporary.replace(target)
            sync_folder(self.folder)
            return target
        except OSError:
            # Another file system, or one without links, or another user's file.
            check_unchanged(source.stat(), loaded.fingerprint, source)
            return source
        finally:
            # Renaming one name of a file over another does nothing.
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _replacing(self, target: Path) -> Iterator[IO[bytes]]:
        """A file that becomes ``target`` at the end, whole and on disk, or disappears."""
        temporary = _temporary(target)
        try:
            with open(temporary, "wb", opener=_private) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(self.folder)


def is_store(folder: Path) -> bool:
    """Whether a folder is a store."""
    return (folder / _MARKER).is_file()


def is_full(error: OSError) -> bool:
    """Whether there is no room for more."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _unusable(folder: Path, why: str) -> InvalidArgument:
    return InvalidArgument(f"store {folder} {why}", field="store", value=str(folder))


def _is_own(name: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in (_DATA, _MANIFEST, _UNFINISHED))


def _temporary(target: Path) -> Path:
    return target.with_name(f"{target.name}.tmp")


def _is_gone(source: str) -> bool:
    """Whether there is no such file; one that only cannot be looked at may come back, and so may what an address names."""
    if is_address(source):
        return False
    try:
        os.stat(source)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        pass
    return False


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _resolved(location: str) -> str:
    return location if is_address(location) else os.path.realpath(location)
