"""The resident store: each dataset as one uncompressed Arrow IPC file, which any process can map.

A dataset is two files: ``ID-VERSION.arrow`` holds its image columns, ``ID.json`` (the manifest) says what it was made from and what it is. The
manifest is written last, by write, fsync, rename: a dataset is there whole or not at all, whenever the machine stops. While its source is
unchanged (path, size, modification time) a restart maps the file and parses nothing.

An Arrow file given as a source needs no conversion. The store makes a file of its own that shares the source's blocks, where the file system
can do that; else it gives the source a second name, so that it can be mapped again after it was renamed or removed; else, on another file
system, it is mapped where it lies. In the latter two cases somebody may still write to it: see :meth:`ImageTable.check_unchanged`.

One process writes at a time, by a lock on the folder. A data file stays as long as any server that runs uses it (:class:`Leases`). Files of other
names than these are never touched.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

from ome_tensor.arrow_file import ArrowImages, is_arrow, is_arrow_file
from ome_tensor.errors import InvalidArgument, OmeTensorError
from ome_tensor.tables import digest

from .arrow_writer import write_images
from .leases import Leases
from .manifest import FORMAT, Manifest, dataset_id, read_manifest
from .parquet import ParquetImages
from .sources import Source, read_source

__all__ = ["Manifest", "Store", "is_full", "is_store", "open_store"]

_log = logging.getLogger(__name__)

_SHARED_MEMORY = Path("/dev/shm")

#: By this file a folder is known as a store.
_MARKER = ".ome-tensor-store"
_MARKER_TEXT = (
    "ome-tensor serve keeps datasets here. It can all be deleted when no server runs: it is made again from the sources.\n"
)
_LOCK, _LEASES = ".lock", ".leases"

_DATA = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}\.arrow")
_MANIFEST = re.compile(r"[0-9a-f]{16}\.json")
_UNFINISHED = re.compile(r"[0-9a-f]{16}(-[0-9a-f]{16}\.arrow|\.json)\.tmp")

#: What does not make a folder somebody else's: the last is in every new ext4 file system.
_HARMLESS = frozenset({_MARKER, _LOCK, _LEASES, "lost+found"})

#: Linux's ioctl that makes a file of another's blocks.
_FICLONE = 0x40049409


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
            (self.folder / _LOCK).touch(mode=0o600)
            self._leases = Leases(self.folder / _LEASES)
        except OSError as error:
            raise _unusable(folder, f"cannot be used: {error.strerror}") from None
        self._folder_mode = status.st_mode
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

    def load(self, path: Path) -> Manifest:
        """The dataset of a source file: from the store where that is current, else converted into it.

        Raises:
            InvalidRecord: the source cannot be read, holds no images, or is being changed.
            OSError: the disk is full, or the source cannot be opened. The store is as it was.
        """
        path = path.resolve()
        found = self._current(path)
        if found is not None:
            return found
        spare = self._open_spare()
        found = None if spare is None else spare._current(path)
        if found is not None:
            return found
        try:
            return self._make(path)
        except OSError as error:
            spare = self._open_spare(make=True) if is_full(error) else None
            if spare is None:
                raise
            _log.warning("store %s is full: %s goes to %s", self.folder, path.name, spare.folder)
            return spare._make(path)

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
        with self._locked(wait=False) as is_mine:
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

    def _current(self, source: Path) -> Manifest | None:
        """What there is of a source, leased, if that is current."""
        manifest = read_manifest(self.folder / f"{dataset_id(source)}.json")
        if manifest is None or manifest.source != str(source) or not manifest.is_current:
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
        dataset, name = dataset_id(Path(manifest.source)), Path(manifest.file).name
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
        if self._owns(manifest.file):
            file, source = os.stat(manifest.file), os.stat(manifest.source)
            mode = self._mode(file, source)
            # Of a file with two names the source's owner decides.
            if not os.path.samestat(file, source) and stat.S_IMODE(file.st_mode) != mode:
                os.chmod(manifest.file, mode)

    def _mode(self, file: os.stat_result, source: os.stat_result) -> int:
        """For whom a file of the store is: nobody who may not read its source, or may not look into the folder, and nobody else writes to it."""
        is_same_group = file.st_gid == source.st_gid
        group, others = bool(source.st_mode & 0o040), bool(source.st_mode & 0o004)
        # The source's group, where that is shut out, is among the others here; its others are this file's group.
        others = others and (group or is_same_group)
        return 0o600 | (self._folder_mode & (0o040 * (group if is_same_group else others) | 0o004 * others))

    @contextmanager
    def _locked(self, *, wait: bool = True) -> Iterator[bool]:
        """With the right to write; without waiting, whether it was to be had."""
        # Opened for writing too: locks on NFS ask for that.
        with (self.folder / _LOCK).open("r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True

    def _make(self, path: Path) -> Manifest:
        with self._locked():
            # Another process may have done it meanwhile.
            found = self._current(path)
            return found if found is not None else read_source(path, self._convert)

    def _convert(self, source: Source) -> Manifest:
        name = dataset_id(source.path)
        record = self.folder / f"{name}.json"
        before = read_manifest(record)
        version = digest(source.file)
        manifest = Manifest(
            format=FORMAT,
            source=str(source.path),
            size=source.stat.st_size,
            modified_ns=source.stat.st_mtime_ns,
            version=version,
            file=str(self.folder / f"{name}-{version}.arrow"),
            file_inode=0,
            file_size=0,
            file_modified_ns=0,
            rows=0,
            others=[],
        )
        try:
            with self._leasing(manifest):
                if before is not None and (before.version, before.file) == (version, manifest.file) and before.has_file:
                    # Copied or touched, and still the same.
                    source.check()
                    made = replace(before, size=manifest.size, modified_ns=manifest.modified_ns)
                    self._permit(made)
                else:
                    made = self._fill(manifest, source)
                with self._replacing(record) as file:
                    file.write(json.dumps(asdict(made)).encode())
        except BaseException:
            if before is None or before.file != manifest.file:
                self._remove(manifest.file)
            raise
        if before is not None and before.file not in (made.file, made.source):
            self._remove(before.file)
        return made

    def _fill(self, manifest: Manifest, source: Source) -> Manifest:
        """Put the pixels where the manifest says, or leave them where they are; the manifest with what is known then."""
        target = Path(manifest.file)
        images: ParquetImages | ArrowImages
        if is_arrow(source.file):
            images = ArrowImages(source.path, source.file.fileno())
            if images.is_mapped:
                # Reads metadata only.
                rows, target = images.load(manifest.version).rows, self._keep(source, target)
            else:
                with self._replacing(target, source) as file:
                    rows = write_images(images.schema, images.row_groups(source.file), file)
        else:
            images = ParquetImages(source.path, source.file)
            with self._replacing(target, source) as file:
                rows = write_images(images.schema, images.row_groups(), file)
        found = target.stat()
        if os.path.samestat(found, source.stat):
            # That is what was digested, not what may be written to it by now.
            found = source.stat
        return replace(
            manifest,
            file=str(target),
            file_inode=found.st_ino,
            file_size=found.st_size,
            file_modified_ns=found.st_mtime_ns,
            rows=rows,
            others=[list(other) for other in images.others],
        )

    def _keep(self, source: Source, target: Path) -> Path:
        """Give the store a file of the source's very bytes that takes no room: ``target``, or the source itself where that cannot be had."""
        if source.path.parent == self.folder:
            source.check()
            return source.path
        try:
            with self._replacing(target, source) as file:
                # Its blocks, shared until either is written to.
                fcntl.ioctl(file.fileno(), _FICLONE, source.file.fileno())
            return target
        except OSError as error:
            if is_full(error):
                raise
        temporary = _temporary(target)
        try:
            temporary.unlink(missing_ok=True)
            os.link(source.path, temporary)
            # By its path, which may have come to name another file; then the check fails.
            source.check()
            temporary.replace(target)
            self._sync()
            return target
        except OSError:
            # Another file system, or one without links, or another user's file.
            source.check()
            return source.path
        finally:
            # Renaming one name of a file over another does nothing.
            temporary.unlink(missing_ok=True)

    @contextmanager
    def _replacing(self, target: Path, source: Source | None = None) -> Iterator[IO[bytes]]:
        """A file that becomes ``target`` at the end, whole and on disk, or disappears; also where its source was changed meanwhile."""
        temporary = _temporary(target)
        try:
            with open(temporary, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                if source is not None:
                    os.fchmod(file.fileno(), self._mode(os.fstat(file.fileno()), source.stat))
                yield file
                file.flush()
                os.fsync(file.fileno())
            if source is not None:
                source.check()
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._sync()

    def _sync(self) -> None:
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
    """Whether there is no such file; one that only cannot be looked at may come back."""
    try:
        os.stat(source)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        pass
    return False


def open_store(setting: str, sources: Sequence[Path]) -> Store | None:
    """The store that a setting means.

    Args:
        setting: A folder; ``auto``: shared memory where those sources that are in no store yet fit in half of what is free there, else the user's
            cache folder; ``none``. With ``auto`` each of the two is used for what it holds already, and where the other is full.
        sources: What is to be loaded.

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
    needed = sum(_size(source) for source in sources if not any(_is_held(source.resolve(), place) for place in places))
    if not _fits(needed):
        places.reverse()
    problems = []
    for place in places:
        others = [other for other in places if other != place]
        try:
            return Store(place, others[0] if others else None, is_optional=True)
        except InvalidArgument as error:
            problems.append(error)
    raise problems[0]


def _fits(needed: int) -> bool:
    try:
        free = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return False
    return needed < free.f_bavail * free.f_frsize // 2 and os.access(_SHARED_MEMORY, os.W_OK)


def _is_held(source: Path, folder: Path) -> bool:
    manifest = read_manifest(folder / f"{dataset_id(source)}.json") if is_store(folder) else None
    return manifest is not None and manifest.source == str(source) and manifest.is_current


def _size(source: Path) -> int:
    """About the bytes that a source will take in a store."""
    try:
        if is_arrow_file(source):
            # Compressed ones are rarely packed closer than that; others are not copied.
            arrow = ArrowImages(source)
            return 0 if arrow.is_mapped else 2 * arrow.file.size
        parquet = ParquetImages(source)
        try:
            return parquet.decoded_bytes
        finally:
            parquet.close()
    except (OmeTensorError, OSError):
        # Loading it will say what is wrong.
        return 0
