"""The resident store: each dataset as one uncompressed Arrow IPC file, which any process can map.

A dataset is two files: ``ID-VERSION.arrow`` holds its image columns, ``ID.json`` (the manifest) says what it was made from and what it is. The
manifest is written last, by write, fsync, rename: a dataset is there whole or not at all, whenever the machine stops. While its source is
unchanged (path, size, modification time) a restart maps the file and parses nothing.

One process writes at a time, by a lock on the folder; readers need none, since a file that is replaced lives on for those who mapped it.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from ome_tensor.errors import InvalidArgument

from .arrow_file import ArrowImages, is_arrow_file, map_arrow_file
from .parquet import ParquetImages
from .table import LoadedTable, digest

__all__ = ["Manifest", "Store", "default_store"]

_FORMAT = 1
_SHARED_MEMORY = Path("/dev/shm")

#: Written, and given back to the system, at a time.
_SLICE = 16 << 20


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a dataset's file is.

    Attributes:
        format: Of this manifest.
        source: Absolute path of the source file.
        size, modified_ns: The source's when it was read.
        version: Digest of the source's bytes.
        file: Absolute path of the Arrow IPC file; the source itself where that is one.
        file_size: Its size.
        rows: Rows of the table.
        others: Name and Arrow type of the columns that hold no images.
    """

    format: int
    source: str
    size: int
    modified_ns: int
    version: str
    file: str
    file_size: int
    rows: int
    others: list[list[str]]

    def table(self) -> LoadedTable:
        """The dataset, mapped. Raises what :func:`map_arrow_file` does."""
        mapped = map_arrow_file(Path(self.file), self.version)
        return LoadedTable(mapped.images, tuple((name, kind) for name, kind in self.others), self.rows, self.version)

    @property
    def is_current(self) -> bool:
        """Whether the source is what it was, and the file is there, whole."""
        try:
            source, file = os.stat(self.source), os.stat(self.file)
        except OSError:
            return False
        return (source.st_size, source.st_mtime_ns, file.st_size) == (self.size, self.modified_ns, self.file_size)


class Store:
    """A folder of datasets.

    Args:
        folder: Where; made if it is not there, for this user only.

    Raises:
        InvalidArgument: it cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock_path = self.folder / ".lock"
            self._lock_path.touch(mode=0o600)
        except OSError as error:
            raise InvalidArgument(f"store {folder} cannot be used: {error.strerror}", field="store", value=str(folder)) from None

    def load(self, source: Path) -> Manifest:
        """The dataset of a source file: from the store where that is current, else converted into it.

        Raises:
            InvalidRecord: the source cannot be read, or holds no images.
            OSError: the disk is full, or the source cannot be opened. The store is as it was.
        """
        source = source.resolve()
        name = hashlib.sha256(os.fsencode(source)).hexdigest()[:16]
        found = self._manifest(name)
        if found is not None and found.source == str(source) and found.is_current:
            return found
        with self._locked():
            # Another process may have done it meanwhile.
            found = self._manifest(name)
            if found is None or not found.is_current:
                found = self._convert(source, name, found)
        return found

    def clean(self) -> None:
        """Remove what a crash left behind: half-written files, and data files that no manifest names."""
        with self._locked():
            named = set()
            for path in self.folder.glob("*.json"):
                manifest = self._manifest(path.stem)
                if manifest is not None:
                    named.add(manifest.file)
            for path in self.folder.iterdir():
                if path.suffix == ".tmp" or (path.suffix == ".arrow" and str(path) not in named):
                    path.unlink(missing_ok=True)

    def _manifest(self, name: str) -> Manifest | None:
        try:
            values = json.loads((self.folder / f"{name}.json").read_text())
            return Manifest(**values) if values.get("format") == _FORMAT else None
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock_path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _convert(self, source: Path, name: str, before: Manifest | None) -> Manifest:
        stat = source.stat()
        version = digest(source)
        images: ParquetImages | ArrowImages = ArrowImages(source) if is_arrow_file(source) else ParquetImages(source)
        try:
            if isinstance(images, ArrowImages) and images.is_mapped:
                target = source  # Served as it is.
            else:
                target = self.folder / f"{name}-{version}.arrow"
                with self._replacing(target) as file:
                    _write(images, file)
        finally:
            images.close()
        manifest = Manifest(
            format=_FORMAT,
            source=str(source),
            size=stat.st_size,
            modified_ns=stat.st_mtime_ns,
            version=version,
            file=str(target),
            file_size=target.stat().st_size,
            rows=images.rows,
            others=[list(other) for other in images.others],
        )
        with self._replacing(self.folder / f"{name}.json") as file:
            file.write(json.dumps(asdict(manifest)).encode())
        if before is not None and before.file not in (manifest.file, before.source):
            Path(before.file).unlink(missing_ok=True)
        return manifest

    @contextmanager
    def _replacing(self, target: Path) -> Iterator[IO[bytes]]:
        """A file that becomes ``target`` at the end, whole and on disk, or disappears."""
        temporary = target.with_name(f"{target.name}.tmp")
        try:
            with open(temporary, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write(images: ParquetImages | ArrowImages, file: IO[bytes]) -> None:
    """Write image columns as an uncompressed Arrow IPC file, a row group at a time."""
    sink = _Sink(file)
    with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), images.schema) as writer:
        for table in images.row_groups():
            # Then each buffer is written once and belongs to this table alone: what is written can go.
            sink.releases = all(column.num_chunks <= 1 for column in table.columns)
            batches = table.to_batches()
            del table
            while batches:
                writer.write_batch(batches.pop(0))


class _Sink:
    """A file for Arrow to write to that gives the memory of large buffers back as they are written.

    A record of one image is decoded whole; without this, at the end of writing it to shared memory it would be there twice.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.releases = False
        self.closed = False

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if not self.releases or len(view) < 2 * _SLICE:
            self._file.write(view)
            return len(view)
        address = pa.py_buffer(data).address
        for at in range(0, len(view), _SLICE):
            part = view[at : at + _SLICE]
            self._file.write(part)
            _give_back(address + at, len(part))
        return len(view)

    def flush(self) -> None:
        self._file.flush()

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self.closed = True


def _give_back(address: int, size: int) -> None:
    """Give the whole pages of memory that will not be read again back to the system; it reads as zeros then."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        ctypes.CDLL(None, use_errno=True).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def default_store(needed: int) -> Path:
    """Where datasets go when nobody says: shared memory where they fit in half of what is free there, else the user's cache folder.

    Args:
        needed: Bytes, roughly.
    """
    try:
        free = os.statvfs(_SHARED_MEMORY)
        fits = needed < free.f_bavail * free.f_frsize // 2 and os.access(_SHARED_MEMORY, os.W_OK)
    except OSError:
        fits = False
    if fits:
        return _SHARED_MEMORY / f"ome-tensor-{os.getuid()}"
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "ome-tensor" / "store"
